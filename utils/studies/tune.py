"""The search of `flatcl tune`: the cells of a study, the flags of each trial, the choice, and the record of all that.

Nothing here runs anything. What the study file says about the search is in `_tune_section`.
"""

import hashlib
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flatcl.utils.arguments import Config, Flag
from flatcl.utils.console import reason
from flatcl.utils.engine.lock import Busy, Lock
from flatcl.utils.errors import RunFailed, UsageError
from flatcl.utils.files import read_json, write_json
from flatcl.utils.reports.tables import RENDER
from flatcl.utils.studies._tune_section import Range, Section
from flatcl.utils.studies.study import Study

FINISHED, PRUNED, DIVERGED, FAILED, OPEN = (  # states of a trial
    "finished", "pruned", "diverged", "failed", "not finished",
)  # fmt: skip
OVER = (FINISHED, PRUNED, DIVERGED)  # those that another try does not change
WAIT_S = 0.1  # until a lock that is held for a moment is tried again
MOST_COMBINATIONS = 10_000  # of a grid, in one cell
DRAWS = 1000  # tries in a row that give nothing new, until a space counts as exhausted
DIGITS = 4  # of a number that is drawn from a range
Flags = Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Cell:
    """A place in the study without its seeds. `space`: the searched flags that it has; `group`: what it has in common
    with the cells that a shared flag is chosen for together."""

    axes: Flags
    space: Mapping[str, tuple[str, ...] | Range]
    group: tuple[tuple[str, str], ...]

    @property
    def label(self) -> str:
        named = ("model", "dataset", "buffer_size")
        rest = (f"{name} {value}" for name, value in self.axes.items() if name not in named)
        return " ".join([*(self.axes[name] for name in named if name in self.axes), *rest])


@dataclass(frozen=True)
class Trial:
    """One configuration of a cell. `values`: {seed: the metric, a fraction} of its finished runs; `runs`: the hashes of
    all of them."""

    number: int
    flags: Flags
    state: str = OPEN
    values: Mapping[int, float] = field(default_factory=dict)
    runs: tuple[str, ...] = ()

    @property
    def value(self) -> float | None:
        """The mean over the seeds of the search, a fraction; None unless all runs have finished."""
        return statistics.fmean(self.values.values()) if self.state == FINISHED and self.values else None


def cells_of(study: Study) -> list[Cell]:
    """The cells of a study that has a section `tune`."""
    assert study.tune is not None
    found: dict[tuple, Cell] = {}
    for point in study.points():
        axes = {name: value for name, value in point.items() if name not in study.seed_flags}
        space = {name: values for name, values in study.tune.space.items() if study.has_flag(point, name)}
        found.setdefault(tuple(axes.items()), Cell(axes, space, study.group(axes)))
    return list(found.values())


def distinct(words: Sequence[str], flag: Flag) -> tuple[str, ...]:
    """Of words that mean the same value, such as 0.1 and 1e-1, the first."""
    first: dict[Any, str] = {}
    for own in words:
        try:
            first.setdefault(flag.parse([own]), own)
        except ValueError:  # what is wrong with it is said when a run with it is resolved
            first.setdefault(own, own)
    return tuple(first.values())


def fixed(study: Study, record: Mapping[str, Any] | None, axes: Flags) -> dict[str, str]:
    """The shared flags of a cell that have been chosen already, with another cell of its group."""
    assert study.tune is not None
    for entry in record["cells"] if record else ():
        if study.group(entry["axes"]) == study.group(axes):
            return {name: own for name, own in entry["chosen"]["flags"].items() if name in study.tune.share}
    return {}


def word(value: float, is_whole: bool) -> str:
    """A number of a range as a word: runs are known by their words, so it has few digits."""
    return str(round(value)) if is_whole else f"{value:.{DIGITS}g}"


def ends(cell: Cell, whole: Collection[str]) -> list[dict[str, str]]:
    """Configurations that show whether all values of a cell's space are allowed: each word, and both ends of a range.
    `whole`: flags that take whole numbers."""
    if not cell.space:
        return [{}]
    columns = []
    for name, values in cell.space.items():
        words = [word(end, name in whole) for end in (values.low, values.high)] if isinstance(values, Range) else values
        columns.append([(name, own) for own in words])
    longest = max(map(len, columns))
    return [dict(column[min(i, len(column) - 1)] for column in columns) for i in range(longest)]


def configurations(section: Section, cell: Cell, whole: Collection[str]) -> list[dict[str, str]]:
    """The trials of grid and random, in order; none for a cell that has no flag of the space.

    Draw i of a flag depends on `random_seed`, the flag and i alone: cells with the same flags try the same values.
    """
    if not cell.space:
        return []
    if section.method == "grid":
        size = math.prod(len(values) for values in cell.space.values())
        if size > MOST_COMBINATIONS:
            raise UsageError(f"{cell.label}: the grid has {size:,} combinations. Use method: random.")
        return [dict(zip(cell.space, own, strict=True)) for own in itertools.product(*cell.space.values())]
    found: dict[tuple, dict[str, str]] = {}
    draw = since = 0
    while len(found) < (section.trials or 0) and since < DRAWS:
        flags = {name: _drawn(section, name, values, draw, name in whole) for name, values in cell.space.items()}
        since = since + 1 if tuple(flags.items()) in found else 0
        found.setdefault(tuple(flags.items()), flags)
        draw += 1
    return list(found.values())


def _drawn(section: Section, name: str, values: tuple[str, ...] | Range, draw: int, is_whole: bool) -> str:
    share = random.Random(f"{section.random_seed} {name} {draw}").random()
    if not isinstance(values, Range):
        return values[int(share * len(values))]
    if values.log:
        value = math.exp(math.log(values.low) + share * (math.log(values.high) - math.log(values.low)))
    else:
        value = values.low + share * (values.high - values.low)
    return word(value, is_whole)


def groups(section: Section, cells: Collection[Cell]) -> list[list[Cell]]:
    """The cells that are chosen for together: each by itself, but for flags that are shared."""
    found: dict[tuple, list[Cell]] = {}
    for cell in cells:
        shared = tuple(name for name in section.share if name in cell.space)
        found.setdefault((shared, cell.group) if shared else (cell,), []).append(cell)
    return list(found.values())


def choose(section: Section, trials: Mapping[Cell, Sequence[Trial]]) -> dict[Cell, Trial]:
    """For each cell its trial with the highest mean; of equal ones the first. The values of shared flags are those with
    the highest mean, over the cells of a group, of the best trial that has them. Raises `RunFailed` where a cell has no
    finished trial to choose."""
    chosen: dict[Cell, Trial] = {}
    for cells in groups(section, trials):
        names = [name for name in section.share if name in cells[0].space]
        best = [_best_by(trials[cell], names) for cell in cells]
        common = [key for key in best[0] if all(key in own for own in best)]
        if not common:
            labels = "; ".join(cell.label for cell in cells)
            together = " that all of them have tried" if len(cells) > 1 else ""
            raise RunFailed(f"no trial to choose for {labels}: none{together} has finished. See their logs.")
        key = max(common, key=lambda key: statistics.fmean(_value(own[key]) for own in best))
        chosen |= {cell: own[key] for cell, own in zip(cells, best, strict=True)}
    return {cell: chosen[cell] for cell in trials}


def _best_by(trials: Sequence[Trial], names: Sequence[str]) -> dict[tuple[str, ...], Trial]:
    """{values of these flags: the best finished trial that has them}."""
    best: dict[tuple[str, ...], Trial] = {}
    for trial in trials:
        key = tuple(trial.flags[name] for name in names)
        if trial.value is not None and (key not in best or trial.value > _value(best[key])):
            best[key] = trial
    return best


def _value(trial: Trial) -> float:
    assert trial.value is not None
    return trial.value


def number_of_configurations(trials: Sequence[Trial]) -> int:
    """Different ones: a method of search may propose one twice. A cell that is not searched has one."""
    return len({tuple(trial.flags.items()) for trial in trials}) or 1


# the record


def folder_of(results: Path) -> Path:
    return results / "tune"


def record_file(results: Path, study: Study) -> Path:
    return folder_of(results) / f"{study.name}.json"


def flags_of_cell(config: Config, seed_flags: Collection[str]) -> dict[str, Any]:
    """What the study says of a cell's runs, as far as it can change a number."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in config.values.items()
        if config.origins[name] == "argv" and config.flags[name].result and name not in seed_flags
    }


def digest(*content: Any) -> str:
    """12 hexadecimal digits: what is kept beside the record has them in its name, so that no other search meets it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def begun(
    record: Mapping[str, Any] | None, study: Study, flags: Mapping[Cell, Mapping[str, Any]], code: Mapping[str, Any]
) -> dict[str, Any]:
    """The record at the start of a search: the rule, and the cells that it is for. `flags`: what the study says of each
    cell; `code`: what searches."""
    assert study.tune is not None
    record = record or {"study": study.name, "tune": study.tune.to_json(), **code, "begun": [], "cells": []}
    known = [entry["axes"] for entry in record["begun"]]
    new = [{"axes": dict(cell.axes), "flags": dict(own)} for cell, own in flags.items() if dict(cell.axes) not in known]
    return {**record, "begun": [*record["begun"], *new]}


def entry_of(cell: Cell, trials: Sequence[Trial], chosen: Trial) -> dict[str, Any]:
    """What the record says of a cell whose search is over."""
    return {
        "axes": dict(cell.axes),
        "num_configurations": number_of_configurations(trials),
        "chosen": {"trial": chosen.number, "flags": dict(chosen.flags), "value": chosen.value},
        "trials": [
            {
                "number": trial.number, "flags": dict(trial.flags), "state": trial.state, "value": trial.value,
                "values": {str(seed): value for seed, value in trial.values.items()}, "runs": list(trial.runs),
            }
            for trial in trials
        ],
    }  # fmt: skip


def trials_of(entry: Mapping[str, Any]) -> list[Trial]:
    """The trials that a record holds of one cell."""
    return [
        Trial(
            own["number"], own["flags"], own["state"],
            {int(seed): value for seed, value in own["values"].items()}, tuple(own["runs"]),
        )
        for own in entry["trials"]
    ]  # fmt: skip


def update_record(file: Path, change: Callable[[dict[str, Any] | None], dict[str, Any]]) -> dict[str, Any]:
    """Writes what `change` makes of the record that is there now, and returns it. Of several processes one at a time
    does so: none of them overwrites what another has written since it looked."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with alone(file.with_name(f"{file.name}.lock"), f"the record {file}"):
            record = change(read_record(file))
            write_json(file, record, durable=True)
            return record
    except OSError as error:
        raise UsageError(f"{file}: cannot write there ({reason(error)}). Give another results_path.") from None


@contextmanager
def alone(file: Path, what: str) -> Iterator[None]:
    """Holds a lock that everybody holds for a moment only, and waits for it. Raises `OSError`."""
    lock = Lock(file, what)
    while True:
        try:
            lock.acquire()
            break
        except Busy:
            time.sleep(WAIT_S)
    try:
        yield
    finally:
        lock.release()


def read_record(file: Path) -> dict[str, Any] | None:
    """None where there is none yet. Raises `UsageError` for a file that is none of ours."""
    try:
        record = read_json(file)
        for entry in record["cells"]:
            chosen = entry["chosen"]
            if not all(isinstance(value, str) for value in (*entry["axes"].values(), *chosen["flags"].values())):
                raise ValueError("flags must be texts")
            _ = int(entry["num_configurations"]), int(chosen["trial"]), trials_of(entry)
        _ = record["tune"].items(), [(entry["axes"], entry["flags"].items()) for entry in record["begun"]]
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} cannot be read as the record of a search ({type(error).__name__}: {reason(error)}). Move it away, "
            "or give the study another name."
        ) from None


def check_same(file: Path, record: Mapping[str, Any], study: Study, flags: Mapping[Cell, Mapping[str, Any]]) -> None:
    """Raises `UsageError` where a search of this name was begun with another section, or a cell of it with other flags:
    what was chosen by one rule must not be mixed with what another one chooses."""
    assert study.tune is not None
    now, then = study.tune.to_json(), record["tune"]
    names = [name for name in dict.fromkeys((*now, *then)) if now.get(name) != then.get(name)]
    differing = [f"tune.{name} was {json.dumps(then.get(name))} and is {json.dumps(now.get(name))}" for name in names]
    for cell, own in flags.items():
        before = next((entry["flags"] for entry in record["begun"] if entry["axes"] == dict(cell.axes)), own)
        for name in dict.fromkeys((*own, *before)):
            if own.get(name) != before.get(name):
                differing.append(
                    f"{cell.label}: --{name} was {json.dumps(before.get(name))} and is {json.dumps(own.get(name))}"
                )
    if differing:
        others = (file.with_name(f"{study.name}{suffix}") for suffix in (".db", ".locks", ".pruned"))
        away = ", ".join(str(own) for own in (file, *others) if own.exists())
        raise UsageError(
            *(f"{file}: the search was begun otherwise: {text}." for text in differing),
            f"Restore the study file, give the study another name, or move away what belongs to the search: {away}.",
        )


# what a person sees


def trial_table(section: Section, cells: Mapping[Cell, Sequence[Trial]], chosen: Mapping[Cell, int]) -> str:
    """All trials, those of a cell by their value; `chosen`: the trial of a cell that was chosen. Ends in a newline."""
    axes = list(dict.fromkeys(name for cell in cells for name in cell.axes))
    names = [name for name in section.space if any(name in cell.space for cell in cells)]
    body = []
    for cell, trials in cells.items():
        for trial in sorted(trials, key=lambda trial: (trial.value is None, -(trial.value or 0.0), trial.number)):
            body.append([
                *(cell.axes.get(name, "") for name in axes),
                str(trial.number),
                *(trial.flags.get(name, "") for name in names),
                "" if trial.value is None else f"{100 * trial.value:.2f}",
                trial.state,
                "chosen" if chosen.get(cell) == trial.number else "",
            ])  # fmt: skip
    head = [*axes, "trial", *names, "value (%)", "state", ""]
    seeds = ", ".join(map(str, section.seeds))
    footing = f"value: mean {section.setting} {section.metric} on the validation split, seeds {seeds}"
    if section.stop_after is not None:
        footing += f", after {section.stop_after} task(s)"
    return f"{RENDER['text'](head, body, len(head))}{footing}\n"


def configuration_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """What stands behind each number of the closing table. Ends in a newline."""
    axes = list(dict.fromkeys(name for entry in entries for name in entry["axes"]))
    body = []
    for entry in entries:
        chosen = entry["chosen"]
        flags = ", ".join(f"{name} {value}" for name, value in chosen["flags"].items())
        value = "" if chosen["value"] is None else f"{100 * chosen['value']:.2f}"
        body.append(
            [*(entry["axes"].get(name, "") for name in axes), str(entry["num_configurations"]), flags or "–", value]
        )
    head = [*axes, "configurations", "chosen", "validation (%)"]
    return RENDER["text"](head, body, len(head))
