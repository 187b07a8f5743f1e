"""One HTML page about runs: tables that sort and filter, each run's details, and what two runs differ in.

The page is one file that needs no network. Its data are in it once, as JSON in which no character can end the element
around it; `page.js` makes text of them, never HTML. A Content-Security-Policy lets no other script run and nothing be
fetched. What many runs share (flags, environment, code) is there once, so that a page of thousands of runs stays small.
The page has no date and no path but those of the runs: the same runs give the same bytes.
"""

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from flatcl.utils.files import open_regular, read_json, read_text, user_path
from flatcl.utils.reports.cells import Number
from flatcl.utils.reports.groups import (
    METRICS,
    Group,
    Mixture,
    check_metrics,
    check_setting,
    costs_of,
    group_runs,
    harmless,
    keys_of,
    sort_key,
)
from flatcl.utils.reports.runs import RECORD, Run

TEST, VALIDATION, UNKNOWN = "test split", "validation split", "split not known"
REPEATED = "repeated"  # a newer run of the same place has the same flags and seed
COSTS = ("train_s", "forward_rows", "backward_rows", "peak_memory_mib")  # columns of the table of runs
MOST_FLAGS = 8  # flags that get a column of their own; more of them share one
LOG_LINES, LOG_BYTES = 200, 20_000  # of the end of a run's log
LOGS_BYTES, SEEDED_BYTES = 6_000_000, 4_000_000  # of all logs and of all that seeds decided, as they are in the page
MOST_LINKS = 8  # pictures that have a link of their own in the contents
README_BYTES, BENCHMARK_BYTES = 2**20, 2**20
OTHERS = "other flags"  # those that vary and are not at their defaults


@dataclass(frozen=True)
class Section:
    """The runs of one place: of a folder that was given, or of a folder with a record."""

    title: str
    runs: list[Run]


def build(
    runs: Sequence[Run],
    given: Sequence[str | Path],
    by: Sequence[str] | None = None,
    metrics: Sequence[str] = METRICS,
    setting: str | None = None,
    order: Sequence[str] = (),
    figures: Mapping[str, str] = {},
    notes: Sequence[str] = (),
) -> str:
    """The page as text.

    `runs`: of any status, from `all_runs(given)`. `by`, `metrics`, `setting`, `order`: as in `tables.table`.
    `figures`: {title: SVG}. `notes`: sentences on what is not in the page. Raises `UsageError` for unknown keys,
    metrics and settings.
    """
    if any(run.summary["metrics"] for run in runs):
        check_metrics(metrics, runs)
    check_setting(setting, runs)
    keys = keys_of(runs, by)
    sections = sections_of(runs, given)
    content = _Content([run for section in sections for run in section.runs], keys, metrics)
    first, tables = 0, []
    for section in sections:
        tables.append(_tables(section.runs, first, content, keys if by else None, metrics, setting, order))
        first += len(section.runs)
    data = content.to_json(sections) | {"sections": tables, "setting": setting}
    return _html(data, sections, figures, [*(note.removeprefix("note: ") for note in notes), *content.notes])


def sections_of(runs: Sequence[Run], given: Sequence[str | Path]) -> list[Section]:
    """The runs by their places, in the order of these; within one in the order of dataset, model, ... and seed."""
    folders = [path if path.is_dir() else path.parent for path in map(user_path, given)]
    places: dict[Path, list[Run]] = {}
    for run in runs:
        places.setdefault(_place(run, folders), []).append(run)

    def rank(run: Run) -> list[tuple]:
        return [sort_key(run.get(key)) for key in ("dataset", "model", "optimizer", "buffer_size", "seed")]

    return [Section(_title(place, folders), sorted(places[place], key=rank)) for place in sorted(places)]


def _place(run: Run, given: Sequence[Path]) -> Path:
    if run.path.parent.name == RECORD:
        return run.path.parent.parent
    return next((folder for folder in given if run.path.is_relative_to(folder)), run.path.parent)


def _title(place: Path, given: Sequence[Path]) -> str:
    """The heading of the nearest README.md at the place or above it, inside the given folders; else the path."""
    for folder in (place, *place.parents):
        heading = _heading(folder / "README.md")
        if heading is not None:
            below = place.relative_to(folder)
            return heading if below == Path() else f"{heading}: {below.as_posix()}"
        if folder in given:
            break
    return str(place)


def _heading(file: Path) -> str | None:
    try:
        text = read_text(file, README_BYTES)
    except (OSError, ValueError):
        return None
    found = re.search(r"^# +(.*\S)", text, re.MULTILINE)
    return found[1].replace("`", "") if found else None


def setting_of(run: Run) -> str | None:
    """The setting of its benchmark, or, of a method that has no results in it (`pnn`), its first one."""
    setting, has = run.summary.get("setting"), run.summary["metrics"]
    return setting if setting in has or not has else next(iter(has))


def split_of(run: Run) -> str:
    """What a run's accuracies were measured on. Runs from before the flag `validation` had the test split alone."""
    if not run.flags:
        return UNKNOWN
    return VALIDATION if run.flags.get("validation") else TEST


def repeats_in(runs: Sequence[Run], with_code: bool) -> set[int]:
    """Places in `runs`, all of one section, of finished runs whose flags and seed (and code) a newer finished one
    has."""
    newest: dict[tuple[str, str | None], int] = {}
    old = set()
    for number in sorted(range(len(runs)), key=lambda number: (_folder(runs[number]), str(runs[number].path))):
        name = runs[number].summary.get("config_hash")
        if name and runs[number].summary["status"] == "finished":
            key = name, runs[number].get("code_version") if with_code else None
            if key in newest:
                old.add(newest[key])
            newest[key] = number
    return old


def counted_in(runs: Sequence[Run], by: Sequence[str] | None) -> list[Run]:
    """The runs of one section that are in its means: finished, of equal ones the newest. Runs of other code are not
    equal where code_version is among the keys `by`."""
    old = repeats_in(runs, "code_version" in (by or ()))
    return [run for number, run in enumerate(runs) if run.summary["status"] == "finished" and number not in old]


def _folder(run: Run) -> str:
    """The name of the run folder, which begins with the time."""
    return run.content.get("folder") or run.path.name


def _tables(
    runs: Sequence[Run],
    first: int,
    content: "_Content",
    keys: Sequence[str] | None,
    metrics: Sequence[str],
    setting: str | None,
    order: Sequence[str],
) -> list[dict[str, Any]]:
    """The tables of a section's groups, one for each setting. Runs on validation splits have groups of their own. The
    runs have the numbers `first`, `first` + 1, ... in the page."""
    content.repeated |= {first + number for number in repeats_in(runs, "code_version" in (keys or ()))}
    counted = counted_in(runs, keys)
    if not counted:
        return []
    numbers = {id(run): first + number for number, run in enumerate(runs)}
    keys = keys_of(counted, None) if keys is None else list(keys)
    costs = costs_of(counted)
    found: dict[str, list[dict]] = {}
    for split in (TEST, VALIDATION, UNKNOWN):
        own = [run for run in counted if split_of(run) == split]
        if setting is not None:
            own = [run for run in own if setting in run.summary["metrics"]]
        for group in group_runs(own, keys, setting, order) if own else ():
            row = _row(group, split, metrics, costs) | {"runs": [numbers[id(run)] for run in group.runs]}
            found.setdefault(group.setting, []).append(row)
    return [{"setting": name, "keys": keys, "rows": rows} for name, rows in sorted(found.items())]


def _row(group: Group, split: str, metrics: Sequence[str], costs: set[str]) -> dict[str, Any]:
    """A group: the values of its keys, [text, mean] of each metric, and what its mean is over that is unlike."""
    stats = {metric: group.stat(metric) for metric in metrics}
    mixed = Mixture.of(group)
    notes = [f"mixes runs of {mixed}"] if mixed else []
    notes += [f"{stat.n} of {len(group.runs)} runs have {metric}" for metric, stat in stats.items()
              if 0 < stat.n < len(group.runs)]  # fmt: skip
    notes += [f"flags chosen by a search ({group.tuned})"] if group.tuned else []
    cells = [[str(Number.of(stat, metric in costs)), stat.mean] for metric, stat in stats.items()]
    return {"values": list(group.by.values()), "split": split, "cells": cells, "notes": "; ".join(notes)}


class _Pool:
    """Contents that many runs share, each once: a run has its number."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.bytes = 0
        self._numbers: dict[str, int] = {}

    def number(self, content: Any, most_bytes: int | None = None) -> int | None:
        """None where a new content would make more than `most_bytes` of all."""
        text = json.dumps(content)
        if text not in self._numbers:
            if most_bytes is not None and self.bytes + len(text) > most_bytes:
                return None
            self._numbers[text] = len(self.items)
            self.items.append(content)
            self.bytes += len(text)
        return self._numbers[text]


class _Content:
    """What the page says of single runs."""

    def __init__(self, runs: Sequence[Run], keys: Sequence[str], metrics: Sequence[str]):
        self.runs, self.metrics, self.notes = runs, list(metrics), []
        self.repeated: set[int] = set()
        varying = [name for name in _varying(runs) if name not in (*keys, "seed")]
        self.columns = [*keys, *([] if "seed" in keys else ["seed"])]
        self.single, self.together = (varying, []) if len(varying) <= MOST_FLAGS else ([], varying)
        self.common = _common(runs)
        self.environments, self.codes, self.origins, self.defaults, self.names = (_Pool() for _ in range(5))
        self.logs, self.seeded = self._logs(), self._seeded()

    def to_json(self, sections: Sequence[Section]) -> dict[str, Any]:
        numbers = iter(range(len(self.runs)))
        runs = [self._run(next(numbers), place) for place, section in enumerate(sections) for _ in section.runs]
        return {
            "titles": [section.title for section in sections],
            "metrics": self.metrics,
            "costs": sorted(costs_of(self.runs)),
            "cost_columns": [name for name in COSTS if name in costs_of(self.runs)],
            "columns": [*self.columns, *self.single, *([OTHERS] if self.together else [])],
            "num_named": len(self.columns),
            "common": self.common,
            "origins": self.origins.items,
            "defaults": self.defaults.items,
            "environments": self.environments.items,
            "codes": self.codes.items,
            "names": self.names.items,
            "seeded": self.seeded[0].items,
            "runs": runs,
        }

    def _run(self, number: int, place: int) -> dict[str, Any]:
        run = self.runs[number]
        config, environment = run.content.get("config", {}), run.content.get("environment")
        flags = {name: entry for name, entry in config.get("flags", {}).items() if name not in self.common}
        own = {name: [entry["value"], self.origins.number(entry.get("origin"))] for name, entry in flags.items()
               if entry.get("origin") != "default"}  # fmt: skip
        defaults = {name: entry["value"] for name, entry in flags.items() if entry.get("origin") == "default"}
        code = {name: config[name] for name in ("protocol", "code", "changed_code", "continues", "plugins")
                if config.get(name)}  # fmt: skip
        known = isinstance(environment, dict)
        commit = environment.get("commit") if known else None
        setting = setting_of(run)
        others = " ".join(f"{name}={_written(own[name][0])}" for name in self.together if name in own)
        values = [run.get(name) for name in (*self.columns, *self.single)]
        return {
            "place": place,
            "hash": run.summary.get("config_hash") or _folder(run),
            "folder": _folder(run),
            "status": REPEATED if number in self.repeated else run.summary["status"],
            "split": split_of(run),
            "setting": setting,
            "values": [*values, others] if self.together else values,
            "metrics": {name: self._numbers(values) for name, values in run.summary["metrics"].items()},
            "cost": self._numbers(run.summary.get("cost", {})),
            "commit": commit if isinstance(commit, str) else None,
            "changed": known and environment.get("uncommitted_changes") is True,
            "notes": run.summary.get("notes") or run.flags.get("notes") or "",
            "has_flags": bool(run.flags),
            "own": own,
            "defaults": self.defaults.number(defaults),
            "environment": self.environments.number(environment) if environment is not None else None,
            "code": self.codes.number(code),
        } | {name: found[number] for name, found in (("seeded", self.seeded[1]), ("log", self.logs)) if number in found}

    def _numbers(self, values: Mapping[str, Any]) -> list:
        """Named numbers as [which names, the numbers]."""
        return [self.names.number(list(values)), list(values.values())]

    def _newest_first(self) -> list[int]:
        return sorted(range(len(self.runs)), key=lambda number: _folder(self.runs[number]), reverse=True)

    def _logs(self) -> dict[int, str | None]:
        """{number of a run: the end of its log, None where it is left out}; the newest runs' come first."""
        found: dict[int, str | None] = {}
        files: set[Path | None] = set()
        room = LOGS_BYTES
        for number in self._newest_first():
            file = log_of(self.runs[number])
            if file in files:  # a newer run with the same hash has written it
                continue
            files.add(file)
            if file is not None:
                text = _end_of(file) if room > 0 else None
                if text is None and room > 0:
                    continue  # it cannot be read
                room -= len(json_for_html(text))
                found[number] = text if room >= 0 else None
        missing = sum(text is None for text in found.values())
        if missing:
            self.notes.append(
                f"{missing:,} of {len(found):,} logs are left out, of the oldest runs: the page takes at most "
                f"{LOGS_BYTES // 10**6} MB of logs."
            )
        return found

    def _seeded(self) -> tuple[_Pool, dict[int, int | None]]:
        """(what seeds decided: benchmark.json, {number of a run: which}); None where it is left out."""
        pool, found = _Pool(), {}
        for number in self._newest_first():
            run = self.runs[number]
            if run.path.parent.name != RECORD:
                with suppress(OSError, ValueError):
                    file = run.path / "benchmark.json"
                    if file.stat().st_size <= BENCHMARK_BYTES:
                        found[number] = pool.number(read_json(file), SEEDED_BYTES)
        missing = sum(which is None for which in found.values())
        if missing:
            self.notes.append(
                f"What the seed decided (benchmark.json) is left out for {missing:,} of {len(found):,} runs: the page "
                f"takes at most {SEEDED_BYTES // 10**6} MB of it."
            )
        return pool, found


def _varying(runs: Sequence[Run]) -> list[str]:
    """Flags that change numbers and have several values among the runs that have them."""
    seen: dict[str, Any] = {}
    several: dict[str, None] = {}
    skipped = harmless() | {"validation"}  # which each row is marked with
    for run in runs:
        for name, value in run.flags.items():
            if name not in skipped and seen.setdefault(name, value) != value:
                several[name] = None
    return list(several)


def _common(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Flags that have one value and origin in all runs whose flags are known."""
    configs = [run.content["config"]["flags"] for run in runs if run.flags]
    if not configs:
        return {}
    return {name: {"value": entry["value"], "origin": entry.get("origin")} for name, entry in configs[0].items()
            if all(config.get(name) == entry for config in configs)}  # fmt: skip


def _written(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def log_of(run: Run) -> Path | None:
    """The log that a sweep has written of a run: `logs/<hash>.log` beside the folders of the settings."""
    name = run.summary.get("config_hash")
    if run.path.parent.name == RECORD or not name or not re.fullmatch(r"\w[\w.-]*", name) or len(run.path.parents) < 4:
        return None
    file = run.path.parents[3] / "logs" / f"{name}.log"
    with suppress(OSError):
        if file.stat().st_mtime < (run.path / "config.json").stat().st_mtime:
            return None  # it is of an earlier run
    return file if file.is_file() and not file.is_symlink() else None


def _end_of(file: Path) -> str | None:
    """The last lines; of a line that was written over (a progress bar), what stood there last."""
    try:
        with open_regular(file) as opened:
            size = os.fstat(opened.fileno()).st_size
            opened.seek(max(0, size - LOG_BYTES))
            content = opened.read(LOG_BYTES).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in content.split("\n")]
    if size > LOG_BYTES and len(lines) > 1:
        del lines[0]  # it is cut
    cut = size > LOG_BYTES or len(lines) > LOG_LINES + 1
    text = "\n".join(["[earlier lines are left out]"] * cut + lines[-LOG_LINES - 1 :])
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]", "", text).rstrip("\n")


def json_for_html(content: Any) -> str:
    """JSON in ASCII without the characters that HTML knows: nothing in it can end a <script>, or begin a comment."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)  # U+2028 and U+2029 are escaped as not ASCII
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _html(
    data: Mapping[str, Any], sections: Sequence[Section], figures: Mapping[str, str], notes: Sequence[str]
) -> str:
    style, script = (_part(f"page.{kind}") for kind in ("css", "js"))
    single = len(sections) == 1
    blocks = [(f"place-{number}", "Groups" if single else section.title) for number, section in enumerate(sections)]
    pictures = [(f"picture-{number}", title) for number, title in enumerate(figures, start=1)]
    title = f"Runs: {sections[0].title}" if single else f"Runs of {len(sections)} folders"
    few = pictures if len(pictures) <= MOST_LINKS else [("pictures", f"Pictures ({len(pictures)})")]
    linked = [*blocks, ("runs", "All runs"), *few, *([("notes", "What is not here")] if notes else [])]
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_part("page.html")).substitute(
        policy=policy,
        title=_text(title),
        style=style,
        script=script,
        data=json_for_html(data),
        contents="\n".join(f'<li><a href="#{name}">{_text(label)}</a></li>' for name, label in linked),
        places="\n".join(f'<section id="{name}"><h2>{_text(label)}</h2></section>' for name, label in blocks),
        pictures="\n".join(
            _figure(name, label, svg) for (name, label), svg in zip(pictures, figures.values(), strict=True)
        ),
        notes="".join(f"<li>{_text(note)}</li>" for note in notes),
        hide_pictures="" if figures else " hidden",
        hide_notes="" if notes else " hidden",
    )


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _text(text: str) -> str:
    return html.escape(text.encode("utf-8", errors="replace").decode())


def _figure(name: str, title: str, svg: str) -> str:
    """As an image, in which no script runs and nothing is fetched, whatever the SVG has taken over from the runs."""
    encoded = base64.b64encode(svg.encode("utf-8", errors="replace")).decode()
    return (
        f'<figure id="{name}"><figcaption>{_text(title)}</figcaption>'
        f'<img alt="{_text(title)}" src="data:image/svg+xml;base64,{encoded}"></figure>'
    )
