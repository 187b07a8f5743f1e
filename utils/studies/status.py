"""How far the runs of a study are, from their files alone. Nothing is written, and no lock is taken.

A run is `running` while the process lives that holds its lock (on another machine: while its heartbeat is less than 5
minutes old). Of the others, the end of the log of a sweep and `status` in summary.json say how they ended.
"""

import os
import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flatcl.utils.arguments import SEEDS, Config
from flatcl.utils.engine import checkpoint
from flatcl.utils.engine.lock import holder
from flatcl.utils.errors import UsageError
from flatcl.utils.files import open_regular, read_json
from flatcl.utils.reports.runs import Run
from flatcl.utils.reports.tables import RENDER
from flatcl.utils.saved import read_saved
from flatcl.utils.studies.engines import LAST_LINE

FINISHED, RUNNING, FAILED, INTERRUPTED, NOT_STARTED = STATES = (
    "finished", "running", "failed", "interrupted", "not started",
)  # fmt: skip
DIVERGED = "diverged (loss not finite)"  # why a run has failed
OK, SOME_FAILED, NOT_ALL_YET = 0, 1, 3  # exit codes
SHOWN = 20  # runs of each kind, one a line
TAIL = 2048  # bytes of a log that hold its last lines
WIDTH = 200  # letters of a line of a log that is shown
FOLDER = re.compile(r"\d{8}-\d{6}-([0-9a-f]{12})(-\d+)?")
SIMILAR = {  # what runs must have in common to take a similar time, the nearest first
    "the same cell": None,
    "the same model, optimizer and dataset": ("model", "optimizer", "dataset"),
    "the same model and dataset": ("model", "dataset"),
    "the same dataset": ("dataset",),
}


class Job(Protocol):
    """One run of a grid, as `sweep` plans it."""

    axes: Mapping[str, str]
    config: Config

    @property
    def hash(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def log(self) -> Path: ...
    @property
    def results_path(self) -> Path: ...


@dataclass(frozen=True)
class State:
    """Of one run: which of `STATES`, the tasks that are done and all of them; `why`: the process that is at it, or how
    it ended; `wall_s`: of a finished one."""

    job: Job
    state: str
    tasks: int
    num_tasks: int
    why: str = ""
    folder: Path | None = None
    wall_s: float | None = None

    @property
    def cell(self) -> tuple[tuple[str, str], ...]:
        """Its axes without the seeds."""
        return tuple((name, value) for name, value in self.job.axes.items() if name not in ("seed", *SEEDS))


@dataclass(frozen=True)
class Left:
    """The time that is left, in seconds with so many workers; None where no finished run says it. `basis`: how many
    runs were estimated by which finished ones. `unknown`: runs that are not in it."""

    seconds: float | None
    workers: int
    basis: Mapping[str, int]
    unknown: int


def look(jobs: Sequence[Job], done: Mapping[str, Run], keep_changed: bool = False) -> list[State]:
    """The state of each run. `done`: the finished ones by their hashes."""
    folders: dict[tuple[Path, str, str], dict[str, Path]] = {}
    found = []
    for job in jobs:
        number, run = num_tasks(job.config), done.get(job.hash)
        if run is not None:
            wall_s = run.summary.get("cost", {}).get("wall_s")
            found.append(State(job, FINISHED, number, number, folder=run.path, wall_s=wall_s))
            continue
        place = (job.results_path, job.config.dataset, job.config.model)
        if place not in folders:
            folders[place] = dict(_newest(*place))
        found.append(_unfinished(job, folders[place].get(job.hash), number, keep_changed))
    return found


def num_tasks(config: Config) -> int:
    """How many tasks a run trains on; a joint one has all data in one."""
    if config.joint or config.learner.trains_jointly:
        return 1
    return (config.stop_after or config.n_tasks) - config.start_from


def _newest(results: Path, dataset: str, model: str) -> Iterator[tuple[str, Path]]:
    """(hash, run folder), the newest of a hash last. The folders of a model are listed once for all of its runs."""
    for setting in _entries(results):
        place = setting / dataset / model
        for folder in sorted(_entries(place)):  # names begin with the time
            named = FOLDER.fullmatch(folder.name)
            if named:
                yield named[1], folder


def _entries(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [folder / entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _unfinished(job: Job, folder: Path | None, num_tasks: int, keep_changed: bool) -> State:
    locks = [job.log.with_suffix(".lock"), *([folder / "lock"] if folder else [])]
    process = next((found for found in map(_living, locks) if found is not None), None)
    status = _status(folder)
    counts = folder is not None and status != "finished" and not is_of_other_code(folder, job.config, keep_changed)
    tasks = _tasks(folder) if folder is not None and counts else 0
    if process is not None:
        return State(job, RUNNING, tasks, num_tasks, str(process), folder)
    code = exit_code_of(job.log)
    has_diverged = counts and status == "diverged"
    if code is not None and 0 < code < 128 and code != 75:  # 75: another process was at it; 128 and more: a signal
        why = DIVERGED if has_diverged and code == 1 else f"exit code {code}"
        return State(job, FAILED, tasks, num_tasks, why, folder)
    if code is None and counts and status in ("crashed", "diverged"):  # started without a sweep, or its log is gone
        return State(job, FAILED, tasks, num_tasks, DIVERGED if has_diverged else str(status), folder)
    if folder is not None and counts and checkpoint.exists(folder / "checkpoint"):
        return State(job, INTERRUPTED, tasks, num_tasks, "", folder)
    return State(job, NOT_STARTED, 0, num_tasks)


def _living(lock: Path) -> Any:
    return holder(lock, may_write=False)


def _status(folder: Path | None) -> str | None:
    try:
        return None if folder is None else read_json(folder / "summary.json")["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tasks(folder: Path) -> int:
    """How many tasks are finished."""
    try:
        return len(read_json(folder / "accuracy.json")["tasks"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def is_of_other_code(folder: Path, config: Config, keep_changed: bool) -> bool:
    """Whether a sweep would begin the run anew."""
    try:
        return not keep_changed and bool(read_saved(str(folder)).differs_from(config))
    except UsageError:
        return True


def exit_code_of(log: Path) -> int | None:
    """What the last line of a log says; None where a run was killed, or there is no log."""
    try:
        last = _tail(log)[-1]
        return int(last.removeprefix(LAST_LINE)) if last.startswith(LAST_LINE) else None
    except (OSError, ValueError, IndexError):
        return None


def last_words(log: Path) -> str:
    """The last thing that a run has said, which is the error of one that failed; empty without a log."""
    try:
        lines = [line.strip() for line in _tail(log) if not line.startswith(LAST_LINE)]
    except (OSError, ValueError):
        return ""
    return next((textwrap.shorten(line, WIDTH, placeholder=" ...") for line in reversed(lines) if line), "")


def _tail(log: Path) -> list[str]:
    with open_regular(log) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        return file.read(TAIL).decode(errors="replace").splitlines()


def exit_code(states: Sequence[State]) -> int:
    """0 all finished, 1 some failed, 3 not all yet."""
    there = {state.state for state in states}
    return SOME_FAILED if FAILED in there else OK if there <= {FINISHED} else NOT_ALL_YET


def left(states: Sequence[State], jobs: int) -> Left:
    """The time left, by the median wall time of finished runs: each run is expected to take that of its own cell, or
    else of the most similar ones, for the share of its tasks that is not done. `jobs`: workers, where none works
    now."""
    workers = sum(state.state == RUNNING for state in states) or jobs
    times: dict[tuple, list[float]] = {}
    for state in states:
        for key in _keys(state) if state.wall_s is not None else ():
            times.setdefault(key, []).append(state.wall_s or 0.0)
    waiting = [state for state in states if state.state != FINISHED]
    parts, basis = [], Counter[str]()
    for state in waiting:
        key = next((key for key in _keys(state) if key in times), None)
        if key is not None:
            share = 1 - min(state.tasks, state.num_tasks) / state.num_tasks
            parts.append(statistics.median(times[key]) * share)
            basis[key[0]] += 1
    seconds = max(sum(parts) / workers, max(parts)) if parts else None if waiting else 0.0
    return Left(seconds, workers, dict(basis), len(waiting) - len(parts))


def _keys(state: State) -> Iterator[tuple]:
    for what, names in SIMILAR.items():
        yield (what, state.cell if names is None else tuple(state.job.config.values[name] for name in names))


def to_json(states: Sequence[State], time_left: Left, name: str | None) -> dict[str, Any]:
    """Everything that `report` shows, and each run; for `json.dumps`."""
    return {
        "study": name,
        "exit_code": exit_code(states),
        "runs": _counts(states),
        "left": {
            "seconds": time_left.seconds, "workers": time_left.workers, "basis": time_left.basis,
            "unknown_runs": time_left.unknown,
        },
        "cells": [
            {"cell": dict(cell), "tasks": done, "num_tasks": number, "runs": _counts(own)}
            for cell, own, done, number in _cells(states)
        ],
        "states": [
            {
                "run": state.job.label, "hash": state.job.hash, "axes": dict(state.job.axes), "state": state.state,
                "tasks": state.tasks, "num_tasks": state.num_tasks, "why": state.why, "wall_s": state.wall_s,
                "folder": None if state.folder is None else str(state.folder), "log": str(state.job.log),
            }
            for state in states
        ],
    }  # fmt: skip


def _counts(states: Sequence[State]) -> dict[str, int]:
    found = Counter(state.state for state in states)
    return {"all": len(states), **{state: found[state] for state in STATES}}


def _cells(states: Sequence[State]) -> Iterator[tuple[tuple, list[State], int, int]]:
    """(cell, its runs, tasks that are done, all tasks), in the order of the study."""
    cells: dict[tuple, list[State]] = {}
    for state in states:
        cells.setdefault(state.cell, []).append(state)
    for cell, own in cells.items():
        yield cell, own, sum(state.tasks for state in own), sum(state.num_tasks for state in own)


def report(states: Sequence[State], time_left: Left, name: str | None) -> str:
    """Counts, a table of the cells, the runs that are not over, the time left: text that ends in a newline."""
    counts = _counts(states)
    number = "1 run" if len(states) == 1 else f"{len(states)} runs"
    places = ", ".join(sorted({str(state.job.config.results_path) for state in states}))
    head = f"study {name} in {places}: {number}" if name else f"{number} in {places}"
    lines = [f"{head}: {', '.join(f'{counts[state]} {state}' for state in STATES)}", "", _table(states).rstrip("\n")]
    for kind in (RUNNING, FAILED, INTERRUPTED):
        own = [state for state in states if state.state == kind]
        if own:
            lines += ["", f"{kind}:", *(f"  {state.job.label}: {_detail(state)}" for state in own[:SHOWN])]
        if len(own) > SHOWN:
            lines.append(f"  and {len(own) - SHOWN} more (--json lists all)")
    return "\n".join([*lines, "", _left_in_words(time_left), ""])


def _table(states: Sequence[State]) -> str:
    cells = list(_cells(states))
    keys = list(dict.fromkeys(name for cell, *_ in cells for name, _ in cell))
    shown = [state for state in STATES if any(own.state == state for own in states)]
    body = []
    for cell, own, done, number in cells:
        counts = _counts(own)
        row = [dict(cell).get(key, "") for key in keys]
        body.append([*row, f"{done}/{number}", *(str(counts[state] or "") for state in shown)])
    return RENDER["text"]([*keys, "tasks", *shown], body, len(keys))


def _detail(state: State) -> str:
    tasks = f"{state.tasks} of {state.num_tasks} tasks done"
    if state.state == FAILED:
        return f"{state.why}, {tasks}, {f'log {state.job.log}' if state.job.log.exists() else f'see {state.folder}'}"
    return f"{tasks}, {state.why}" if state.why else f"{tasks}, goes on from its checkpoint"


def _left_in_words(time_left: Left) -> str:
    if time_left.seconds is None:
        return "time left: unknown, since no run of a like kind is finished"
    if not time_left.seconds and not time_left.unknown:
        return "time left: none"
    by = "; ".join(f"{number} run(s) by {what}" for what, number in time_left.basis.items())
    workers = "1 worker" if time_left.workers == 1 else f"{time_left.workers} workers"
    text = f"time left: about {duration(time_left.seconds)} with {workers}, by the median time of finished runs ({by})"
    if time_left.unknown:
        text += f"; and {time_left.unknown} run(s) on data sets on which none is finished, not counted"
    return text


def duration(seconds: float) -> str:
    """`2 d 3 h`, `1 h 20 min`, `5 min`, `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
