"""Finished runs: found in folders and in records, chosen, written into a record.

What is left out or counted once is said on stderr, so that no table hides what it stands on.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatcl.utils.arguments import Config, EngineArgs, flags_of
from flatcl.utils.console import complain, reason
from flatcl.utils.errors import UsageError
from flatcl.utils.files import is_writable, parse_json, read_json, read_text, user_path
from flatcl.utils.registry import canonical, nearest
from flatcl.utils.reports import _run_index as run_index
from flatcl.utils.saved import other_code

RECORD = "runs.jsonl"


@dataclass(frozen=True)
class Run:
    """One finished run: its summary, and the values of its flags."""

    path: Path
    summary: Mapping[str, Any]
    flags: Mapping[str, Any]
    protocol: int | None = None
    content: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)  # the files it was read from

    @property
    def code(self) -> Mapping[str, str] | None:
        """{file: digest} of the code that made it; None where that was not written down."""
        return self.content.get("config", {}).get("code")

    def differs_from(self, config: Config) -> list[str]:
        """The files of other code than the present one that the run was made with."""
        saved = self.content.get("config", {})
        later = [entry["code"] for entry in saved.get("changed_code", ())]
        return other_code([self.code, *later], (saved.get("continues") or {}).get("code"), config)

    def get(self, key: str) -> Any:
        """The value of a key of the summary, else of a flag; None where the run has neither."""
        return self.summary[key] if key in self.summary else self.flags.get(key)

    @property
    def keys(self) -> set[str]:
        plain = {key for key, value in self.summary.items() if not isinstance(value, dict | list)}
        return plain | set(self.flags)


def load_runs(paths: Sequence[str | Path], say: Callable[[str], None] = complain) -> list[Run]:
    """The finished runs in these folders, searched recursively; of equal runs (flags and seed) the newest. Raises
    `UsageError` where there are none."""
    runs = find_runs(paths, say)
    if not runs:
        raise UsageError(
            f"no finished runs in {', '.join(str(path) for path in paths)}. Give folders that hold run folders."
        )
    return runs


def find_runs(
    paths: Sequence[str | Path],
    say: Callable[[str], None] = complain,
    with_repeats: bool = False,
    may_write: bool = True,
) -> list[Run]:
    """As `load_runs`, but there may be none. `with_repeats`: all of equal runs, the newest last. Without `may_write`,
    no index is written."""
    found: dict[Path, Run] = {}
    unfinished: dict[str, int] = {}
    for path in paths:
        folder = user_path(path)
        place = folder.resolve()
        for run in _runs_in(folder, say, may_write):
            if run is not None and run.summary["status"] == "finished":
                found[place / run.path.relative_to(folder)] = run
            elif run is not None:
                unfinished[run.summary["status"]] = unfinished.get(run.summary["status"], 0) + 1
    if unfinished:
        counts = ", ".join(f"{number} {status}" for status, number in sorted(unfinished.items()))
        say(f"note: left out, since they did not finish: {counts}.")
    return _by_age(found.values()) if with_repeats else _newest(list(found.values()), say)


def _runs_in(folder: Path, say: Callable[[str], None], may_write: bool) -> Iterable[Run | None]:
    """Run folders, and records (`runs.jsonl`) of run folders that are not kept."""
    try:
        next(folder.iterdir(), None)  # rglob is silent about a folder that it cannot read
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror}. Give a folder that holds run folders.") from None
    runs, records = run_index.read_runs(folder, _contents, RECORD, may_write)
    for path, content in runs:
        yield _as_run(path, content, say)
    for file in records:
        try:
            lines = read_text(file).splitlines()
        except (OSError, ValueError) as error:
            say(f"note: left out, since it cannot be read ({reason(error)}): {file}")
            continue
        for number, line in enumerate(lines, start=1):
            yield _as_run(file / str(number), _parsed(line), say)


def _contents(folder: Path) -> dict[str, Any] | None:
    """What a record keeps of a run folder; None where that is no run's. Of the summary without the matrix, which no
    table needs. The index keeps it, so that it is looked at once."""
    content: dict[str, Any] = {"folder": folder.name}
    for file in run_index.FILES:
        try:
            content[file.removesuffix(".json")] = read_json(folder / file)
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return None
    if isinstance(content.get("summary"), dict):
        content["summary"].pop("accuracy", None)
    return content if _is_of_a_run(content) else None


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        content = parse_json(line)
    except ValueError:
        return None
    return content if _is_of_a_run(content) else None


def _as_run(path: Path, content: dict[str, Any] | None, say: Callable[[str], None]) -> Run | None:
    """A run of any status; None for what is not the summary of one of ours."""
    if content is None:
        say(f"note: left out, since it is not the summary of a run: {path}")
        return None
    config = content.get("config", {"flags": {}})
    flags = {name: entry["value"] for name, entry in config["flags"].items()}
    return Run(path, content["summary"], flags, config.get("protocol"), content)


def _is_of_a_run(content: Any) -> bool:
    """Whether everything that a table is made of has the type that our files have."""
    try:
        return _has_types(content)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _has_types(content: Mapping[str, Any]) -> bool:
    summary, config = content["summary"], content.get("config", {"flags": {}})
    flags = {name: entry["value"] for name, entry in config["flags"].items()}

    def plain(value: Any, *kinds: type) -> bool:
        return value is None or (isinstance(value, kinds) and (not isinstance(value, str) or is_writable(value)))

    parts = (*config.get("changed_code", ()), config.get("continues") or {"code": None})
    codes = [config.get("code") or {}, *(part["code"] or {} for part in parts)]
    numbers = [*summary["metrics"].values(), summary.get("cost", {})]
    values = [item for value in flags.values() for item in (value if isinstance(value, list) else [value])]
    values += [value for key, value in summary.items() if key not in ("metrics", "cost", "accuracy")]
    names = [*flags, *summary, *summary["metrics"], *(name for part in numbers for name in part), summary["status"]]
    return (
        isinstance(summary["status"], str)
        and all(isinstance(part, dict) for part in (summary["metrics"], *numbers))
        and all(plain(value, int, float) for part in numbers for value in part.values())
        and all(plain(value, int, float, str) for value in (*values, *names))
        and all(plain(value, str) for value in (summary.get("config_hash"), content.get("folder")))
        and all(isinstance(part, str) for code in codes for item in code.items() for part in item)
        and isinstance(config.get("protocol", 0), int)
    )


def write_record(runs: Sequence[Run], path: str | Path) -> None:
    """One line of JSON for each run: summary, configuration and environment, without the accuracy matrix and without
    the flags that cannot change a number (where files lay)."""
    places = {name for name, item in flags_of(EngineArgs, "engine").items() if not item.result}
    lines = []
    for run in runs:
        summary = {key: value for key, value in run.content["summary"].items() if key != "accuracy"}
        config = dict(run.content.get("config", {"flags": {}}))
        config["flags"] = {name: entry for name, entry in config["flags"].items() if name not in places}
        lines.append(json.dumps({**run.content, "summary": summary, "config": config}, sort_keys=True))
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _newest(runs: list[Run], say: Callable[[str], None]) -> list[Run]:
    """One run of each config hash."""
    kept: dict[Any, Run] = {}
    for run in _by_age(runs):
        kept[run.summary.get("config_hash") or run.path] = run
    if len(kept) < len(runs):
        repeated = len(runs) - len(kept)
        say(f"note: {repeated} run(s) repeat another one's flags and seed; the newest of equal runs counts.")
    return list(kept.values())


def _by_age(runs: Iterable[Run]) -> list[Run]:
    """The newest last. Folder names begin with the time, and copies keep them, unlike file times."""
    return sorted(runs, key=lambda run: (run.content.get("folder") or run.path.name, str(run.path)))


def select(runs: Sequence[Run], where: Mapping[str, str]) -> list[Run]:
    """The runs whose keys have these values; commas separate alternatives: {"model": "er,derpp", "seed": "0"}."""
    for key, wanted in where.items():
        check_key(key, runs)
        choices = [comparable(word) for word in wanted.split(",")]
        found = [run for run in runs if comparable(run.get(key)) in choices]
        if not found:
            has = sorted({comparable(run.get(key)) for run in runs})
            raise UsageError(f"no run has {key} = {wanted}. These occur: {', '.join(has)}.")
        runs = found
    return list(runs)


def comparable(value: Any) -> str:
    """One spelling of a value, for words of the command line and for values of JSON: 0.10 and 0.1, True and 1."""
    if isinstance(value, list | tuple):
        return " ".join(comparable(item) for item in value)
    if value is None or str(value).lower() in ("true", "false"):
        return {"none": "none", "true": "1", "false": "0"}[str(value).lower()]
    try:
        return f"{float(value):.12g}"
    except ValueError:
        return canonical(str(value))


def check_key(key: str, runs: Sequence[Run]) -> None:
    known = set().union(*(run.keys for run in runs))
    if key not in known:
        raise UsageError(f"unknown key: '{key}'. {nearest(key, sorted(known))}")
