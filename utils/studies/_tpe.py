"""Trials that Optuna's TPE proposes (Bergstra et al., 2011), kept in an SQLite file that several processes share.

A trial belongs to the process that holds its lock file. One whose process has died is taken over as it is: its runs go
on from their checkpoints. So a killed search is continued by the same command, and no process waits for a dead one.
"""

import hashlib
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatcl.utils.engine.lock import Busy, Lock
from flatcl.utils.errors import UsageError
from flatcl.utils.studies import tune
from flatcl.utils.studies._tune_section import Range, Section
from flatcl.utils.studies.tune import Cell, Trial

WAIT_S = 0.1  # until a lock that is held for a moment is tried again


@dataclass(frozen=True)
class Taken:
    """A trial that this process is to run."""

    cell: Cell
    number: int
    flags: Mapping[str, str]
    lock: Lock


class Tpe:
    """The trials of all cells of one study. `whole`: flags that take whole numbers. Needs the package optuna."""

    def __init__(self, folder: Path, name: str, section: Section, whole: Collection[str], may_write: bool = True):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.section, self.whole, self.may_write = optuna, section, whole, may_write
        self.file, self.locks = folder / f"{name}.db", folder / f"{name}.locks"
        self._studies: dict[Cell, Any] = {}
        if may_write:
            self.locks.mkdir(parents=True, exist_ok=True)

    def take(self, cells: Sequence[Cell], most: int) -> list[Taken]:
        """At most so many trials to run now, of the cells with the fewest trials first; those of processes that have
        died are taken over. Empty where none is left, or others are at what is left: see `is_over`."""
        taken: list[Taken] = []
        with self._alone():
            while len(taken) < most:
                in_turn = sorted(cells, key=lambda cell: (sum(one.cell is cell for one in taken), self._num_over(cell)))
                new = next((one for one in map(self._next, in_turn) if one is not None), None)
                if new is None:
                    break
                taken.append(new)
        return taken

    def tell(self, one: Taken, trial: Trial) -> None:
        """How a trial has ended."""
        states = self.optuna.trial.TrialState
        state = {tune.FINISHED: states.COMPLETE, tune.PRUNED: states.PRUNED}.get(trial.state, states.FAIL)
        self._study(one.cell).tell(one.number, trial.value, state=state, skip_if_finished=True)

    def is_over(self, cell: Cell) -> bool:
        trials = self._all(cell)
        return len(trials) >= (self.section.trials or 0) and all(trial.state.is_finished() for trial in trials)

    def configurations(self, cell: Cell) -> list[dict[str, str]]:
        """The flags of all trials so far, by their numbers."""
        return [self._flags(trial.params) for trial in self._all(cell)]

    @contextmanager
    def _alone(self):
        """One process at a time counts trials and asks for new ones: otherwise there would be too many."""
        lock = Lock(self.locks / "ask.lock", "the search")
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

    def _next(self, cell: Cell) -> Taken | None:
        trials = self._all(cell)
        for trial in trials:
            lock = None if trial.state.is_finished() else self._claimed(cell, trial.number)
            if lock is not None:
                return Taken(cell, trial.number, self._flags(trial.params), lock)
        if len(trials) >= (self.section.trials or 0):
            return None
        study = self._study(cell)
        study.sampler = self._sampler(cell, len(trials))
        trial = study.ask(self._distributions(cell))
        lock = self._claimed(cell, trial.number)
        return None if lock is None else Taken(cell, trial.number, self._flags(trial.params), lock)

    def _num_over(self, cell: Cell) -> int:
        return sum(trial.state.is_finished() for trial in self._all(cell))

    def _claimed(self, cell: Cell, number: int) -> Lock | None:
        lock = Lock(self.locks / f"{_short(cell)}-{number}.lock", f"trial {number} of {cell.label}")
        try:
            lock.acquire()
            return lock
        except Busy:
            return None

    def _sampler(self, cell: Cell, number: int) -> Any:
        """One of its own for each trial: what is proposed does not depend on how often the search was stopped."""
        seed = int(hashlib.sha256(f"{self.section.random_seed} {number}".encode()).hexdigest()[:8], 16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar is marked as experimental
            return self.optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=True)

    def _distributions(self, cell: Cell) -> dict[str, Any]:
        kinds = self.optuna.distributions
        found = {}
        for name, values in cell.space.items():
            if not isinstance(values, Range):
                found[name] = kinds.CategoricalDistribution(values)
            elif name in self.whole:
                found[name] = kinds.IntDistribution(round(values.low), round(values.high), log=values.log)
            else:
                found[name] = kinds.FloatDistribution(values.low, values.high, log=values.log)
        return found

    def _flags(self, params: Mapping[str, Any]) -> dict[str, str]:
        own = (name for name in self.section.space if name in params)
        return {
            name: params[name] if isinstance(params[name], str) else tune.word(params[name], name in self.whole)
            for name in own
        }

    def _all(self, cell: Cell) -> list[Any]:
        if not self.may_write and not self.file.exists():
            return []
        return self._study(cell).get_trials(deepcopy=False)

    def _study(self, cell: Cell) -> Any:
        if cell not in self._studies:
            try:
                self._studies[cell] = self.optuna.create_study(
                    storage=f"sqlite:///{self.file}", study_name=cell.label, direction="maximize", load_if_exists=True
                )
            except Exception as error:  # SQLAlchemy has many kinds for a file that is none of Optuna's
                raise UsageError(f"{self.file} cannot be used ({type(error).__name__}). Move it away.") from None
        return self._studies[cell]


def _short(cell: Cell) -> str:
    return hashlib.sha256(cell.label.encode()).hexdigest()[:12]
