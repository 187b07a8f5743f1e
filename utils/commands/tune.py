"""Choose flags on the validation split, then run the study with them: `flatcl tune study.yaml --jobs 2`.

The section `tune` of the study file says what is searched and how. The choice is written to results_path/tune before
any run reads the test set. Each trial is an ordinary run, so nothing that is finished is run again: a search that was
stopped is continued by the same command, and several processes may work on one.
"""

import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from flatcl.utils import studies
from flatcl.utils.arguments import Request
from flatcl.utils.commands import sweep, train
from flatcl.utils.commands._engines import add_engines, chosen
from flatcl.utils.commands._parser import Parser
from flatcl.utils.console import complain, say, shown
from flatcl.utils.engine.results import environment
from flatcl.utils.errors import RunFailed, UsageError
from flatcl.utils.extras import require
from flatcl.utils.registry import load_plugin
from flatcl.utils.reports.groups import TUNED
from flatcl.utils.studies import Study, status, tune
from flatcl.utils.studies._pruning import Pruner, marked
from flatcl.utils.studies._tune_section import INCREMENTAL, Range
from flatcl.utils.studies.engines import FAILED, INTERRUPTED, OK, Engine, Runner
from flatcl.utils.studies.engines.local import RETRY_S, Local
from flatcl.utils.studies.engines.slurm import Slurm
from flatcl.utils.studies.tune import Cell, Trial

USAGE = 2
TRIES = 3  # of a run that a signal has ended which was meant for the one before it
WHY = {
    tune.PRUNED: "pruned: below the median of the finished trials",
    tune.DIVERGED: "diverged: this trial has no value",
}
STOPPED = tuple(WHY)
SHOW = "It is a flag of flatcl sweep. flatcl tune STUDY --show prints what was tried so far, and starts nothing."
NO_AXES = ("notes", "validation")  # of the test runs: said to them, and not shown as a column


class Tuning:
    """The search of one study, and the runs of what it has chosen."""

    def __init__(self, study: Study, rest: Sequence[str], engine: Engine, keep_changed: bool, runner: Runner):
        assert study.tune is not None
        self.study, self.section, self.engine, self.runner = study, study.tune, engine, runner
        self.keep_changed, self.extra = keep_changed, sweep.flags_of_all(keep_changed)
        self.shared = sweep.Shared([*study.words(), *rest], study.points())
        self._jobs: dict[tuple[Cell, tuple], list[sweep.Job]] = {}
        self._codes: dict[str, int] = {}  # of runs that have failed here, by their hashes
        self._again: set[str] = set()  # runs that were hit by a signal for another run
        found = [(cell, self._plan([self._point(cell, {}, self.section.seeds[0])])[0]) for cell in tune.cells_of(study)]
        self.results = found[0][1].results_path
        self.file = tune.record_file(self.results, study)
        self.record = tune.read_record(self.file)
        bases = {self._narrowed(cell, job): job for cell, job in found}
        self.cells = list(bases)
        self.whole = {name for cell, job in bases.items() for name in cell.space if job.config.flags[name].kind is int}
        section = self.section.to_json()
        self.pruned = tune.folder_of(self.results) / f"{study.name}.pruned" / tune.digest(section)
        self.flags = {cell: tune.flags_of_cell(job.config, study.seed_flags) for cell, job in bases.items()}
        self.digests = {cell: tune.digest(section, dict(cell.axes), own) for cell, own in self.flags.items()}
        self.bases = bases  # a run of each cell, without searched flags
        self._check()

    def _narrowed(self, cell: Cell, job: sweep.Job) -> Cell:
        """Each value once, and of a flag that is shared with cells that are chosen for, theirs alone."""
        chosen = tune.fixed(self.study, self.record, cell.axes)
        space = {
            name: values if isinstance(values, Range) else tune.distinct(values, job.config.flags[name])
            for name, values in cell.space.items()
        }
        return dataclasses.replace(
            cell, space={name: (chosen[name],) if name in chosen else values for name, values in space.items()}
        )

    def _check(self) -> None:
        """What a search of this study would stumble over, before any work."""
        if self.section.method == "tpe" and any(cell.space and self._entry(cell) is None for cell in self.cells):
            require("optuna", "tune", "tune.method: tpe")
        problems = []
        for cell, job in self.bases.items():
            is_joint = job.config.joint or job.config.learner.trains_jointly
            if cell.space and is_joint and self.section.metric == INCREMENTAL:
                problems.append(
                    f"{cell.label}: tune.metric is {INCREMENTAL}, which a run on all tasks at once does not have. Give "
                    "metric: final_average_accuracy, or such models a study of their own."
                )
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
            self._test_point(cell, flags, seed)
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

    def _test_point(self, cell: Cell, flags: Mapping[str, str], seed: int) -> dict[str, str]:
        """A run on the test set, also where the study's flags come `from` a run of a validation split."""
        return {**cell.axes, **flags, **self.study.seed_axes(seed), "validation": "0"}

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
        problems: list[str] = []
        if left:
            self._say_budget(left)
            self._update()
            if self._search_tpe(left) if self.section.method == "tpe" else self._search(left):
                complain("interrupted: the same command goes on with the search")
                return INTERRUPTED
            problems = self._choose(left)
        say(f"\n{self.table()}\nrecord of the search: {self.file}")
        if problems:
            raise RunFailed("\n".join(problems))
        return OK if until == "search" else self._test()

    def _update(self, entries: Sequence[Mapping[str, Any]] = ()) -> None:
        """Adds cells whose search is over to the record, but none that another process has added meanwhile."""

        def changed(record: dict[str, Any] | None) -> dict[str, Any]:
            if record is not None:
                tune.check_same(self.file, record, self.study, self.flags)
            record = tune.begun(record, self.study, self.flags, _code())
            known = [entry["axes"] for entry in record["cells"]]
            new = [own for own in entries if own["axes"] not in known and self._fits(own, record)]
            return {**record, "cells": [*record["cells"], *new]}

        self.record = tune.update_record(self.file, changed)

    def _fits(self, entry: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
        """Whether its shared flags are those that another process may have chosen meanwhile."""
        return tune.fixed(self.study, record, entry["axes"]).items() <= entry["chosen"]["flags"].items()

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
        say(f"search by {self.section.method} on the validation split, {len(self.section.seeds)} run(s) a trial:")
        for cell in cells:
            number = _number(counts[cell], "trial") if cell in counts else "no flag of the space, as it is"
            say(f"  {cell.label}: {number}")
        for cell, count in counts.items():
            if count < (self.section.trials or 0):
                complain(f"note: the space of {cell.label} has only {_number(count, 'configuration')}")
        if self.section.method == "grid" and len({*counts.values()}) > 1:
            complain("note: the cells have unequal numbers of trials; method: random with trials makes them equal")
        sys.stdout.flush()

    def _search(self, cells: Sequence[Cell]) -> bool:
        """Grid and random. True where the user has interrupted."""
        trials = [
            self._jobs_of(cell, flags)
            for cell in cells for flags in tune.configurations(self.section, cell, self.whole)
        ]  # fmt: skip
        self._say_found(trials)
        return self._make(trials)

    def _search_tpe(self, cells: Sequence[Cell]) -> bool:
        """As many trials at a time as there are workers, of all cells in turn. True where interrupted."""
        cells = [cell for cell in cells if cell.space]
        if not cells:
            return False
        tpe = self._tpe(cells)
        ended = [self._jobs_of(cell, own) for cell in cells for own in tpe.configurations(cell, ended=True).values()]
        self._say_found(ended)
        if self._make(ended):  # those that other code has made
            return True
        most = getattr(self.engine, "num_workers", None) or getattr(self.engine, "most", None) or 1
        while True:
            taken = tpe.take(cells, most)
            if not taken and all(map(tpe.is_over, cells)):
                return False
            if not taken:  # other processes are at the last ones
                time.sleep(RETRY_S)
            for cell in cells if self.section.prune else ():  # also what others have tried is compared with
                for flags in tpe.configurations(cell).values():
                    self._jobs_of(cell, flags)
            try:
                if self._make([self._jobs_of(one.cell, one.flags) for one in taken]):
                    return True
                trials, _ = self._looked([(one.cell, one.number, one.flags) for one in taken])
                for one, trial in zip(taken, trials, strict=True):
                    tpe.tell(one, trial)
            finally:
                for one in taken:
                    one.lock.release()

    def _tpe(self, cells: Sequence[Cell], may_write: bool = True):
        from flatcl.utils.studies._tpe import Tpe

        digests = {cell: self.digests[cell] for cell in cells}
        return Tpe(tune.folder_of(self.results), self.study.name, self.section, self.whole, digests, may_write)

    def _say_found(self, trials: Sequence[Sequence[sweep.Job]]) -> None:
        """What there is of the search already, and what of it does not count."""
        jobs = [job for own in trials for job in own]
        if jobs:
            found = sweep.look(jobs, keep_changed=self.keep_changed)
            said = f"{len(jobs)} run(s) of the search, {len(found.done)} of them already finished and skipped"
            for line in (said, *found.notes()):
                say(line)

    def _make(self, trials: Sequence[Sequence[sweep.Job]]) -> bool:
        """Makes the runs of trials that are not over. True where the user has interrupted. With pruning, one seed after
        the other: of a trial that is stopped, no further run is begun."""
        step = 1 if self.section.prune else len(self.section.seeds)
        parts = (slice(start, start + step) for start in range(0, len(self.section.seeds), step))
        return any(self._make_part(trials, part) for part in parts)

    def _make_part(self, trials: Sequence[Sequence[sweep.Job]], part: slice) -> bool:
        for _ in range(TRIES):
            pending = self._pending(trials, part)
            if not pending:
                return False
            self._again.clear()
            with self._pruner() as pruner:
                failed, interrupted = sweep.run_shown(
                    pending, self.engine, self.extra, self.runner, stopped=lambda job: self._why_stopped(job, pruner)
                )
            self._codes |= {job.hash: code for job, code in failed.items()}
            if interrupted or not self._again:
                return interrupted
        return False

    def _pending(self, trials: Sequence[Sequence[sweep.Job]], part: slice) -> list[sweep.Job]:
        """The runs to make, of those in `part` of each trial: a trial with a run that was pruned or has diverged is
        over, and what has failed here is left to the next command."""
        jobs = list({job.hash: job for own in trials for job in own}.values())
        done = sweep.look(jobs, keep_changed=self.keep_changed).done
        states = self._states([job for job in jobs if job.hash not in done])
        under_way = [own for own in trials if not any(states.get(job.hash) in tune.OVER for job in own)]
        left = {job.hash: job for own in under_way for job in own[part]}
        return [job for hash, job in left.items() if hash not in done and hash not in self._codes]

    def _pruner(self):
        if not self.section.prune:
            return nullcontext()
        groups: dict[tuple[Cell, int], list[sweep.Job]] = {}
        for (cell, _), own in self._jobs.items():  # also of trials that have ended before
            for i, job in enumerate(own):
                groups.setdefault((cell, i), []).append(job)
        return Pruner(list(groups.values()), self.section.setting, self.pruned, self.keep_changed)

    def _why_stopped(self, job: sweep.Job, pruner: Pruner | None) -> str:
        """Why an unfinished run is no failure."""
        (state,) = self._states([job]).values()
        if state in WHY:
            return WHY[state]
        if pruner is not None and pruner.has_stopped and status.exit_code_of(job.log) in (None, OK, INTERRUPTED):
            self._again.add(job.hash)
            return "interrupted by the signal for a pruned run; it is made again"
        return ""

    def _states(self, jobs: Sequence[sweep.Job]) -> dict[str, str]:
        """{hash: what has become of it} of unfinished runs."""
        found = {}
        for job, state in zip(jobs, status.look(jobs, {}, self.keep_changed), strict=True):
            if self.section.prune and marked(self.pruned, job, self.keep_changed):
                found[job.hash] = tune.PRUNED
            elif state.why == status.DIVERGED:  # with the same code, as it would again
                found[job.hash] = tune.DIVERGED
            elif state.state == status.FAILED or job.hash in self._codes:
                found[job.hash] = tune.FAILED
            else:
                found[job.hash] = tune.OPEN
        return found

    def _looked(self, trials: Sequence[tuple[Cell, int, Mapping[str, str]]]) -> tuple[list[Trial], sweep.Found]:
        """What has become of trials, each given as (cell, number, flags), and what there is of their runs."""
        planned = [self._jobs_of(cell, flags) for cell, _, flags in trials]
        jobs = [job for own in planned for job in own]
        found = sweep.look(jobs, None, self.keep_changed, may_write=False)
        states = self._states([job for job in jobs if job.hash not in found.done])
        looked = []
        for (_, number, flags), own in zip(trials, planned, strict=True):
            values = {
                seed: found.done[job.hash].summary["metrics"][self.section.setting][self.section.metric]
                for seed, job in zip(self.section.seeds, own, strict=True) if job.hash in found.done
            }  # fmt: skip
            there = {states.get(job.hash, tune.FINISHED) for job in own}
            state = next(state for state in (*STOPPED, tune.FAILED, tune.OPEN, tune.FINISHED) if state in there)
            looked.append(Trial(number, flags, state, values, tuple(job.hash for job in own)))
        return looked, found

    def _trials(self, cells: Sequence[Cell]) -> tuple[dict[Cell, list[Trial]], sweep.Found]:
        """All trials of cells that have a space, and what there is of their runs."""
        cells = [cell for cell in cells if cell.space]
        if self.section.method == "tpe" and cells:
            tpe = self._tpe(cells, may_write=False)
            flags = {cell: tpe.configurations(cell) for cell in cells}
        else:
            flags = {cell: dict(enumerate(tune.configurations(self.section, cell, self.whole))) for cell in cells}
        listed = [(cell, number, own) for cell in cells for number, own in flags[cell].items()]
        trials: dict[Cell, list[Trial]] = {cell: [] for cell in cells}
        looked, found = self._looked(listed)
        for (cell, _, _), trial in zip(listed, looked, strict=True):
            trials[cell].append(trial)
        return trials, found

    def _choose(self, cells: Sequence[Cell]) -> list[str]:
        """Writes what is chosen. From then on it is fixed, whatever happens to the runs of the search. A cell with a
        trial that is not over is not chosen for: another try may make it the best. Returns why something is not
        chosen."""
        trials, found = self._trials(cells)
        chosen = {cell: Trial(0, {}, tune.FINISHED) for cell in cells if not cell.space}
        problems: list[str] = []
        for group in tune.groups(self.section, trials):
            own = {cell: trials[cell] for cell in group}
            self._say_states(own)
            if any(trial.state not in tune.OVER for listed in own.values() for trial in listed):
                problems.append(self._why_not_chosen(own, found))
                continue
            try:
                chosen |= tune.choose(self.section, own)
            except RunFailed as error:
                problems.append(str(error))
        self._update([tune.entry_of(cell, trials.get(cell, []), chosen[cell]) for cell in cells if cell in chosen])
        problems += [
            f"nothing is chosen for {cell.label} yet: another process has chosen --{', --'.join(self.section.share)} "
            "for it and others meanwhile. Give the same command again."
            for cell in chosen if self._entry(cell) is None
        ]  # fmt: skip
        return problems

    def _say_states(self, trials: Mapping[Cell, Sequence[Trial]]) -> None:
        for cell, own in trials.items():
            counts = Counter(trial.state for trial in own if trial.state not in (tune.FINISHED, tune.PRUNED))
            if counts:
                said = ", ".join(f"{number} {state}" for state, number in counts.items())
                complain(f"note: {cell.label}: of {_number(len(own), 'trial')}, {said}")

    def _why_not_chosen(self, trials: Mapping[Cell, Sequence[Trial]], found: sweep.Found) -> str:
        """The runs that a choice waits for, each with what is known about it."""
        labels = "; ".join(cell.label for cell in trials)
        lines = [f"nothing is chosen for {labels} yet. The same command makes these runs of the search again:"]
        open_ = [(cell, trial) for cell, own in trials.items() for trial in own if trial.state not in tune.OVER]
        jobs = [job for cell, trial in open_ for job in self._jobs_of(cell, trial.flags) if job.hash not in found.done]
        for state in status.look(jobs[: status.SHOWN], {}, self.keep_changed):
            lines.append(f"  {state.job.label}: {self._why_open(state, found)}")
        if len(jobs) > status.SHOWN:
            lines.append(f"  and {len(jobs) - status.SHOWN} more")
        return "\n".join(lines)

    def _why_open(self, state: status.State, found: sweep.Found) -> str:
        job = state.job
        if job.hash in found.changed:
            return f"made by other code or data ({', '.join(found.changed[job.hash])} changed since)"
        code = self._codes.get(job.hash)
        why = (
            state.why or state.state
            if code is None
            else f"killed by signal {-code}"
            if code < 0
            else f"exit code {code}"
        )
        said = status.last_words(job.log)
        place = job.log if job.log.exists() else state.folder
        return why + (f", {said}" if said else "") + (f", see {place}" if place else "")

    def table(self) -> str:
        """All trials, from the files alone: of cells that are over from the record, of others from their runs."""
        known = {cell: self._entry(cell) for cell in self.cells}
        trials, found = self._trials([cell for cell, entry in known.items() if entry is None])
        for line in found.notes():
            complain(line)
        trials |= {cell: tune.trials_of(entry) for cell, entry in known.items() if entry is not None}
        chosen = {cell: entry["chosen"]["trial"] for cell, entry in known.items() if entry is not None}
        ordered = {cell: trials[cell] for cell in self.cells if cell in trials}
        return tune.trial_table(self.section, ordered, chosen)

    # part 2

    def _test(self) -> int:
        """The chosen flags on the test set, and what stands behind each number."""
        entries = [(cell, self._entry(cell)) for cell in self.cells]
        points = [
            {**self._test_point(cell, entry["chosen"]["flags"], seed), **self._notes(cell, entry)}
            for cell, entry in entries for seed in self.study.seeds if entry is not None
        ]  # fmt: skip
        planned = self._plan(points)
        jobs = [
            dataclasses.replace(job, axes={name: own for name, own in job.axes.items() if name not in NO_AXES})
            for job in planned
        ]
        say("\nthe chosen flags on the test set:")
        code = sweep.sweep(jobs, self.engine, self.extra, self.runner, self.keep_changed)
        if code != INTERRUPTED:
            say(f"\n{tune.configuration_table([entry for _, entry in entries if entry])}", end="")
        return code

    def _notes(self, cell: Cell, entry: Mapping[str, Any]) -> dict[str, str]:
        """What stands behind a test run, unless the study gives it notes of its own."""
        if self.bases[cell].config.origins["notes"] == "argv" or not entry["trials"]:
            return {}
        number = _number(entry["num_configurations"], "configuration")
        return {"notes": f"{TUNED}{number}, {self.section.rule} on validation"}


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _code() -> dict[str, Any]:
    return {
        name: value
        for name, value in environment("cpu").items()
        if name in ("version", "commit", "uncommitted_changes")
    }


def _parser() -> Parser:
    parser = Parser(
        of_runs="write it after a separate --, as in: flatcl tune study.yaml -- {flag} VALUE",
        elsewhere={"--dry_run": SHOW, "--status": SHOW, "--json": SHOW},
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
    searched = dict.fromkeys([*study.axes, *study.tune.space], "")
    decided = ("validation", *(["budget_rows"] if study.tune.budget_rows else []))
    problems = [
        f"--{name} is set by the search, and also given after --. Drop it." for name in decided if name in given.words
    ]
    study = study.without({*given.words})
    try:
        request = sweep.check_rest([*study.words(), *rest], searched)
    except UsageError as error:
        raise UsageError(*problems, *error.problems) from None
    if problems:
        raise UsageError(*problems)
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
            complain(f"error: {problem}")
        return USAGE
    except RunFailed as error:
        complain(f"failed: {error}")
        return FAILED
    except KeyboardInterrupt:  # between two runs
        complain("interrupted: the same command goes on")
        return INTERRUPTED
