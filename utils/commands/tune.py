"""Choose flags on the validation split, then run the study with them: `flatcl tune study.yaml --jobs 2`.

The section `tune` of the study file says what is searched and how. The choice is written to results_path/tune before
any run reads the test set. Each trial is an ordinary run, so nothing that is finished is run again: a search that was
stopped is continued by the same command, and several processes may work on one.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from flatcl.utils import studies
from flatcl.utils.arguments import Request
from flatcl.utils.commands import sweep, train
from flatcl.utils.commands._engines import add_engines, chosen
from flatcl.utils.commands._parser import Parser
from flatcl.utils.console import complain, shown
from flatcl.utils.engine.results import environment
from flatcl.utils.errors import RunFailed, UsageError
from flatcl.utils.extras import require
from flatcl.utils.files import read_json
from flatcl.utils.registry import load_plugin
from flatcl.utils.studies import Study, status, tune
from flatcl.utils.studies._pruning import Pruner, marked
from flatcl.utils.studies.engines import FAILED, INTERRUPTED, OK, Engine, Runner
from flatcl.utils.studies.engines.local import RETRY_S, Local
from flatcl.utils.studies.engines.slurm import Slurm
from flatcl.utils.studies.tune import Cell, Trial

USAGE = 2
TRIES = 3  # of a run that a signal has ended which was meant for the one before it


class Tuning:
    """The search of one study, and the runs of what it has chosen."""

    def __init__(self, study: Study, rest: Sequence[str], engine: Engine, keep_changed: bool, runner: Runner):
        assert study.tune is not None
        self.study, self.section, self.engine, self.runner = study, study.tune, engine, runner
        self.keep_changed, self.extra = keep_changed, sweep.flags_of_all(keep_changed)
        self.cells = tune.cells_of(study)
        self.shared = sweep.Shared([*study.words(), *rest], study.points())
        self._jobs: dict[tuple[Cell, tuple], list[sweep.Job]] = {}
        bases = {cell: self._plan([self._point(cell, {}, self.section.seeds[0])])[0] for cell in self.cells}
        self.results = bases[self.cells[0]].results_path
        self.whole = {name for cell, job in bases.items() for name in cell.space if job.config.flags[name].kind is int}
        self.file = tune.record_file(self.results, study)
        self.pruned = tune.folder_of(self.results) / f"{study.name}.pruned"
        self.flags = {cell: tune.flags_of_cell(job.config) for cell, job in bases.items()}
        self.record = tune.read_record(self.file)
        self._check(bases)

    def _check(self, bases: Mapping[Cell, sweep.Job]) -> None:
        """What a search of this study would stumble over, before any work."""
        if self.section.method == "tpe" and any(self._entry(cell) is None for cell in self.cells):
            require("optuna", "tune", "tune.method: tpe")
        problems = []
        for cell, job in bases.items():
            own = job.config.benchmark.setting
            if self.section.setting not in (own, *(["task-il"] if own == "class-il" else [])):
                problems.append(f"{cell.label}: tune.setting is {self.section.setting}, its runs have {own}. Set it.")
        if problems:
            raise UsageError(*problems)
        self._plan([
            self._point(cell, flags, self.section.seeds[0])
            for cell in self.cells for flags in tune.ends(cell, self.whole)
        ])  # fmt: skip
        self._plan([
            {**cell.axes, **flags, **self.study.seed_axes(seed)}
            for cell in self.cells for flags in tune.ends(cell, self.whole)[:1] for seed in self.study.seeds
        ])  # fmt: skip
        if self.record is not None:
            tune.check_same(self.file, self.record, self.study, self.flags)

    def _plan(self, points: Sequence[Mapping[str, str]]) -> list[sweep.Job]:
        try:
            return sweep.plan(points, self.shared)
        except UsageError as error:
            raise UsageError(*map(self.study.located, error.problems)) from None

    def _point(self, cell: Cell, flags: Mapping[str, str], seed: int) -> dict[str, str]:
        """A run of the search."""
        given = {"stop_after": self.section.stop_after, "budget_rows": self.section.budget_rows}
        forced = {name: str(value) for name, value in given.items() if value is not None}
        return {**cell.axes, **flags, **self.study.seed_axes(seed), **forced, "validation": "1"}

    def _jobs_of(self, cell: Cell, flags: Mapping[str, str]) -> list[sweep.Job]:
        """The runs of one trial, in the order of the seeds of the search."""
        key = cell, tuple(flags.items())
        if key not in self._jobs:
            self._jobs[key] = self._plan([self._point(cell, flags, seed) for seed in self.section.seeds])
        return self._jobs[key]

    # part 1

    def run(self, until: str) -> int:
        """Both parts; returns the exit code."""
        left = [cell for cell in self.cells if self._entry(cell) is None]
        if left:
            self._say_budget(left)
            self.record = tune.begun(self.record, self.study, self.flags, _code())
            tune.write_record(self.file, self.record)
            if self._search_tpe(left) if self.section.method == "tpe" else self._search(left):
                complain("interrupted: the same command goes on with the search")
                return INTERRUPTED
            self._choose(left)
        print(f"\n{self.table()}\nrecord of the search: {self.file}", flush=True)
        return OK if until == "search" else self._test()

    def _entry(self, cell: Cell) -> dict[str, Any] | None:
        """What the record says of a cell whose search is over."""
        entries = self.record["cells"] if self.record else ()
        return next((entry for entry in entries if entry["axes"] == dict(cell.axes)), None)

    def _say_budget(self, cells: Sequence[Cell]) -> None:
        """How many trials each cell gets. Methods that were tried more often than others look better than they are."""
        if self.section.method == "tpe":
            counts = {cell: self.section.trials or 0 for cell in cells if cell.space}
        else:
            counts = {cell: len(tune.configurations(self.section, cell, self.whole)) for cell in cells if cell.space}
        print(f"search by {self.section.method} on the validation split, {len(self.section.seeds)} run(s) a trial:")
        for cell in cells:
            print(f"  {cell.label}: {f'{counts[cell]} trials' if cell in counts else 'no flag of the space, as it is'}")
        if len({*counts.values()}) > 1:
            complain("note: the cells have unequal numbers of trials; method: random with trials makes them equal")
        sys.stdout.flush()

    def _search(self, cells: Sequence[Cell]) -> bool:
        """Grid and random. True where the user has interrupted."""
        jobs = [
            job
            for cell in cells for flags in tune.configurations(self.section, cell, self.whole)
            for job in self._jobs_of(cell, flags)
        ]  # fmt: skip
        return self._make(jobs)

    def _search_tpe(self, cells: Sequence[Cell]) -> bool:
        """As many trials at a time as there are workers, of all cells in turn. True where interrupted."""
        tpe, cells = self._tpe(), [cell for cell in cells if cell.space]
        most = getattr(self.engine, "num_workers", None) or getattr(self.engine, "most", None) or 1
        while True:
            taken = tpe.take(cells, most)
            if not taken and all(map(tpe.is_over, cells)):
                return False
            if not taken:  # other processes are at the last ones
                time.sleep(RETRY_S)
            for cell in cells if self.section.prune else ():  # also what others have tried is compared with
                for flags in tpe.configurations(cell):
                    self._jobs_of(cell, flags)
            try:
                if self._make([job for one in taken for job in self._jobs_of(one.cell, one.flags)]):
                    return True
                trials = self._looked([(one.cell, one.number, one.flags) for one in taken])
                for one, trial in zip(taken, trials, strict=True):
                    tpe.tell(one, trial)
            finally:
                for one in taken:
                    one.lock.release()

    def _tpe(self, may_write: bool = True):
        from flatcl.utils.studies._tpe import Tpe

        return Tpe(tune.folder_of(self.results), self.study.name, self.section, self.whole, may_write)

    def _make(self, jobs: Sequence[sweep.Job]) -> bool:
        """Makes the runs that are neither finished nor over. True where the user has interrupted."""
        jobs = list({job.hash: job for job in jobs}.values())
        for _ in range(TRIES):
            found = sweep.look(jobs, keep_changed=self.keep_changed)
            pending = [job for job in jobs if job.hash not in found.done and not self._is_over(job)]
            if not pending:
                return False
            with self._pruner(jobs):
                failed, interrupted = sweep.run_shown(
                    pending, self.engine, self.extra, self.runner, stopped=self._why_stopped
                )
            if interrupted:
                return True
            if INTERRUPTED not in failed.values():
                return False
        return False

    def _pruner(self, jobs: Sequence[sweep.Job]):
        if not self.section.prune:
            return nullcontext()
        groups: dict[Any, list[sweep.Job]] = {}
        known = [job for own in self._jobs.values() for job in own]  # also of trials that have ended before
        cells = {job.hash: (cell, i) for (cell, _), own in self._jobs.items() for i, job in enumerate(own)}
        for job in {job.hash: job for job in [*known, *jobs]}.values():
            groups.setdefault(cells[job.hash], []).append(job)
        return Pruner(list(groups.values()), self.section.setting, self.pruned)

    def _why_stopped(self, job: sweep.Job) -> str:
        if self.section.prune and marked(self.pruned, job.hash):
            return "pruned: below the median of the finished trials"
        return "diverged: this trial has no value" if self._has_diverged(job) else ""

    def _is_over(self, job: sweep.Job) -> bool:
        """Whether an unfinished run is not to be tried again."""
        return bool(self._why_stopped(job))

    def _has_diverged(self, job: sweep.Job) -> bool:
        (state,) = status.look([job], {}, self.keep_changed)
        try:
            return state.state == status.FAILED and read_json(state.folder / "summary.json")["status"] == "diverged"
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _looked(self, trials: Sequence[tuple[Cell, int, Mapping[str, str]]]) -> list[Trial]:
        """What has become of trials, each given as (cell, number, flags)."""
        planned = [self._jobs_of(cell, flags) for cell, _, flags in trials]
        done = sweep.look([job for jobs in planned for job in jobs], None, self.keep_changed, may_write=False).done
        found = []
        for (_, number, flags), jobs in zip(trials, planned, strict=True):
            values = {
                seed: done[job.hash].summary["metrics"][self.section.setting][self.section.metric]
                for seed, job in zip(self.section.seeds, jobs, strict=True) if job.hash in done
            }  # fmt: skip
            found.append(Trial(number, flags, self._state(jobs, done), values, tuple(job.hash for job in jobs)))
        return found

    def _state(self, jobs: Sequence[sweep.Job], done: Mapping[str, Any]) -> str:
        missing = [job for job in jobs if job.hash not in done]
        if not missing:
            return tune.FINISHED
        if self.section.prune and any(marked(self.pruned, job.hash) for job in missing):
            return tune.PRUNED
        failed = any(state.state == status.FAILED for state in status.look(missing, {}, self.keep_changed))
        return tune.FAILED if failed else tune.OPEN

    def _trials(self, cells: Sequence[Cell], may_write: bool = True) -> dict[Cell, list[Trial]]:
        """All trials of cells that have a space."""
        cells = [cell for cell in cells if cell.space]
        if self.section.method == "tpe":
            tpe = self._tpe(may_write)
            flags = {cell: tpe.configurations(cell) for cell in cells}
        else:
            flags = {cell: tune.configurations(self.section, cell, self.whole) for cell in cells}
        listed = [(cell, number, own) for cell in cells for number, own in enumerate(flags[cell])]
        found: dict[Cell, list[Trial]] = {cell: [] for cell in cells}
        for (cell, _, _), trial in zip(listed, self._looked(listed), strict=True):
            found[cell].append(trial)
        return found

    def _choose(self, cells: Sequence[Cell]) -> None:
        """Writes what is chosen. From then on it is fixed, whatever happens to the runs of the search."""
        trials = self._trials(cells)
        for cell, own in trials.items():
            self._say_lost(cell, own)
        chosen = tune.choose(self.section, trials)
        entries = [
            tune.entry_of(cell, trials.get(cell, []), chosen.get(cell, Trial(0, {}, tune.FINISHED))) for cell in cells
        ]
        self.record = tune.read_record(self.file) or self.record  # another process may have chosen meanwhile
        assert self.record is not None
        new = [entry for cell, entry in zip(cells, entries, strict=True) if self._entry(cell) is None]
        self.record = {**self.record, "cells": [*self.record["cells"], *new]}
        tune.write_record(self.file, self.record)

    def _say_lost(self, cell: Cell, trials: Sequence[Trial]) -> None:
        lost = [trial for trial in trials if trial.state in (tune.FAILED, tune.OPEN)]
        if lost:
            complain(f"note: {cell.label}: {len(lost)} of {len(trials)} trials failed and cannot be chosen")

    def table(self) -> str:
        """All trials, from the files alone: of cells that are over from the record, of others from their runs."""
        known = {cell: self._entry(cell) for cell in self.cells}
        trials = self._trials([cell for cell, entry in known.items() if entry is None], may_write=False)
        trials |= {cell: tune.trials_of(entry) for cell, entry in known.items() if entry is not None}
        chosen = {cell: entry["chosen"]["trial"] for cell, entry in known.items() if entry is not None}
        ordered = {cell: trials[cell] for cell in self.cells if cell in trials}
        return tune.trial_table(self.section, ordered, chosen)

    # part 2

    def _test(self) -> int:
        """The chosen flags on the test set, and what stands behind each number."""
        entries = [(cell, self._entry(cell)) for cell in self.cells]
        points = [
            {**cell.axes, **entry["chosen"]["flags"], **self.study.seed_axes(seed), **self._notes(entry)}
            for cell, entry in entries for seed in self.study.seeds if entry is not None
        ]  # fmt: skip
        planned = self._plan(points)
        jobs = [
            dataclasses.replace(job, axes={name: value for name, value in job.axes.items() if name != "notes"})
            for job in planned
        ]
        print("\nthe chosen flags on the test set:", flush=True)
        code = sweep.sweep(jobs, self.engine, self.extra, self.runner, self.keep_changed)
        if code != INTERRUPTED:
            print(f"\n{tune.configuration_table([entry for _, entry in entries if entry])}", end="", flush=True)
        return code

    def _notes(self, entry: Mapping[str, Any]) -> dict[str, str]:
        if any(name == "notes" for name, _ in self.shared.flags) or not entry["trials"]:
            return {}
        number = entry["num_configurations"]
        return {"notes": f"tuned: {number} configuration{'s' * (number > 1)}, {self.section.rule} on validation"}


def _code() -> dict[str, Any]:
    return {
        name: value
        for name, value in environment("cpu").items()
        if name in ("version", "commit", "uncommitted_changes")
    }


def _parser() -> Parser:
    parser = Parser(
        of_runs="write it after a separate --, as in: flatcl tune study.yaml -- {flag} VALUE",
        prog="flatcl tune",
        description="Searches the flags of the study's section tune on the validation split, writes down what it "
        "chooses, and runs the study with it on the test set. Flags of all runs come after a separate --.",
        epilog="examples: flatcl tune study.yaml --jobs 2\n          flatcl tune study.yaml --until search\n"
        "          flatcl tune study.yaml --show",
    )
    parser.add_argument("study", help="a study file with a section tune (see docs/tuning.md)")
    parser.add_argument(
        "--until", choices=("search", "test"), default="test", help="search: stop before the test set is read"
    )
    parser.add_argument("--show", action="store_true", help="print what was tried so far, the best first, and stop")
    sweep.add_keep_changed(parser)
    add_engines(parser)
    return parser


def _engine(args: argparse.Namespace, study: Study) -> Engine:
    """Raises `UsageError` for an engine that ends before its runs do, or whose runs cannot be stopped from here."""
    engine = chosen(args)
    if isinstance(engine, Slurm):
        raise UsageError(
            "--engine slurm: a search waits for its runs, and Slurm's are made later. Use --engine local or ray, e.g. "
            "inside one job of Slurm."
        )
    if study.tune is not None and study.tune.prune and not isinstance(engine, Local):
        raise UsageError("tune.prune is for --engine local: runs elsewhere cannot be stopped. Drop one of them.")
    return engine


def _prepare(argv: Sequence[str], runner: Runner) -> tuple[argparse.Namespace, Tuning]:
    cut = list(argv).index("--") if "--" in argv else len(argv)
    rest = list(argv[cut + 1 :])
    args = _parser().parse_args(argv[:cut])
    given = Request.parse(rest)
    for plugin in given.plugins:
        load_plugin(plugin)
    study = studies.read(args.study)
    if study.tune is None:
        raise UsageError(f"{args.study} has no section tune. Write one as in docs/tuning.md, or use flatcl sweep.")
    engine = _engine(args, study)
    searched = dict.fromkeys([*study.axes, *study.tune.space, "validation"], "")
    study = study.without({*given.words})
    request = sweep.check_rest([*study.words(), *rest], searched)
    keep_changed = bool(args.keep_changed) or request.keep_changed
    return args, Tuning(study, rest, engine, keep_changed, runner)


def main(argv: Sequence[str], runner: Runner = train.main) -> int:
    """0 done, 1 some runs failed, 2 bad input, 130 interrupted."""
    try:
        args, tuning = _prepare(list(argv), runner)
        if args.show:
            return shown(lambda: print(tuning.table(), end=""))
        sweep.catch_stops()
        return tuning.run(args.until)
    except UsageError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return USAGE
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:  # between two runs
        complain("interrupted: the same command goes on")
        return INTERRUPTED
