"""Runs of a search that are stopped between tasks: the median rule (Golovin et al., 2017).

A run is stopped where its average accuracy after a task is below the median of the finished runs of the same cell and
seed after the same task. Deviates from Optuna's pruner, which compares the best value so far: the average accuracy of
a stream falls from task to task, so its best value is always the first one.
"""

import contextlib
import os
import signal
import statistics
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flatcl.utils.engine.lock import holder
from flatcl.utils.files import read_json, write_json
from flatcl.utils.identity import digest_of
from flatcl.utils.studies.status import is_of_other_code, num_tasks

PRUNE_AFTER = 5  # finished runs to compare with, before any run is stopped
POLL_S = 0.5


class Pruner:
    """`with Pruner(groups, setting, folder, keep_changed): ...` watches the runs while others make them. `groups`: runs
    that are compared with each other; `folder`: where it marks, by their hashes, those that it has stopped. Runs of
    other code count only with `keep_changed`. `has_stopped`: whether it has sent a signal, which can hit a process that
    has begun its next run meanwhile."""

    def __init__(self, groups: Sequence[Sequence[Any]], setting: str, folder: Path, keep_changed: bool = False):
        self.groups, self.setting, self.folder, self.has_stopped = groups, setting, folder, False
        self.keep_changed = keep_changed
        self._finished: dict[str, list[float]] = {}  # the curves of finished runs, by their hashes
        self._end = threading.Event()

    def __enter__(self) -> "Pruner":
        self._thread = threading.Thread(target=self._watch, name="pruner", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(POLL_S):
            for group in self.groups:
                self._look(group)

    def _look(self, group: Sequence[Any]) -> None:
        for job in group:
            if job.hash not in self._finished and not marked(self.folder, job, self.keep_changed):
                curve, is_finished = _curve(job, self.setting, self.keep_changed)
                if is_finished:
                    self._finished[job.hash] = curve
                elif 0 < len(curve) < num_tasks(job.config) and job.log.with_suffix(".lock").exists():
                    self._judge(job, curve, group)

    def _judge(self, job: Any, curve: list[float], group: Sequence[Any]) -> None:
        last = len(curve) - 1
        curves = [self._finished[other.hash] for other in group if other.hash in self._finished]
        others = [own[last] for own in curves if len(own) > last]
        if len(others) >= PRUNE_AFTER and curve[last] < statistics.median(others):
            self._stop(job, {"run": job.label, "tasks": last + 1, "value": curve[last],
                             "median": statistics.median(others), "finished_runs": len(others)})  # fmt: skip

    def _stop(self, job: Any, why: dict[str, Any]) -> None:
        """As Ctrl-C does. A run of another machine is left to the search there."""
        process = holder(job.log.with_suffix(".lock"), may_write=False)
        if process is not None and process.is_here and process.pid != os.getpid():
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / f"{job.hash}.json", {**why, "code": digest_of(job.config.code)})
                self.has_stopped = True
                os.kill(process.pid, signal.SIGINT)


def marked(folder: Path, job: Any, keep_changed: bool) -> bool:
    """Whether a run of this code was stopped by the rule."""
    file = folder / f"{job.hash}.json"
    if not file.exists():
        return False
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return keep_changed or read_json(file).get("code", (own := digest_of(job.config.code))) == own
    return True


def _curve(job: Any, setting: str, keep_changed: bool) -> tuple[list[float], bool]:
    """(average accuracy after each finished task over the tasks trained until then, whether the run has finished)."""
    config = job.config
    folders = sorted(job.results_path.glob(f"*/{config.dataset}/{config.model}/*-{job.hash}*"))
    if not folders or is_of_other_code(folders[-1], config, keep_changed):
        return [], False
    try:
        rows = read_json(folders[-1] / "accuracy.json")["accuracy"][setting]
        first = config.start_from
        curve = [statistics.fmean(row[first : first + i + 1]) for i, row in enumerate(rows)]
        summary = folders[-1] / "summary.json"
        return curve, summary.exists() and read_json(summary)["status"] == "finished"
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return [], False
