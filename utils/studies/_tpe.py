"""Trials that Optuna's TPE proposes (Bergstra et al., 2011), kept in an SQLite file that several processes share.

A trial belongs to the process that holds its lock file. One whose process has died is taken over as it is: its runs go
on from their checkpoints. So a killed search is continued by the same command, and no process waits for a dead one.
"""

import hashlib
import sqlite3
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatcl.utils.console import reason
from flatcl.utils.engine.lock import Busy, Lock
from flatcl.utils.errors import UsageError
from flatcl.utils.studies import tune
from flatcl.utils.studies._tune_section import Range, Section
from flatcl.utils.studies.tune import Cell, Trial

LOCKED_S = 60.0  # that a process waits for others to finish writing to the database


@dataclass(frozen=True)
class Taken:
    """A trial that this process is to run."""

    cell: Cell
    number: int
    flags: Mapping[str, str]
    lock: Lock


class Tpe:
    """The trials of some cells of one study. `whole`: flags that take whole numbers; `digests`: of the search of each
    cell, since the file may hold trials of others, of the same name. Needs the package optuna.

    Whatever the database does not do raises `UsageError`.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        section: Section,
        whole: Collection[str],
        digests: Mapping[Cell, str],
        may_write: bool = True,
    ):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.section, self.whole, self.digests, self.may_write = optuna, section, whole, digests, may_write
        self.file, self.locks = folder / f"{name}.db", folder / f"{name}.locks"
        self._studies: dict[Cell, Any] = {}
        self._left: set[tuple[Cell, int]] = set()  # trials that have failed here, for the next command
        if may_write:
            self.locks.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._open()
        elif self.file.exists():
            self._open()

    def take(self, cells: Sequence[Cell], most: int) -> list[Taken]:
        """At most so many trials to run now, of the cells with the fewest trials first; those of processes that have
        died are taken over. Empty where none is left, or others are at what is left: see `is_over`."""
        taken: list[Taken] = []
        with self._alone(), self._reasons():
            for cell in cells:
                self._end_incomplete(cell)
            while len(taken) < most:
                in_turn = sorted(cells, key=lambda cell: (sum(one.cell is cell for one in taken), self._num_over(cell)))
                new = next((one for one in map(self._next, in_turn) if one is not None), None)
                if new is None:
                    break
                taken.append(new)
        return taken

    def tell(self, one: Taken, trial: Trial) -> None:
        """How a trial has ended. One that has not ended is left to the next command."""
        states = self.optuna.trial.TrialState
        ends = {tune.FINISHED: states.COMPLETE, tune.PRUNED: states.PRUNED, tune.DIVERGED: states.FAIL}
        if trial.state not in ends:
            self._left.add((one.cell, one.number))
            return
        with self._reasons():
            self._studies[one.cell].tell(one.number, trial.value, state=ends[trial.state], skip_if_finished=True)

    def is_over(self, cell: Cell) -> bool:
        """Whether there is nothing left to do for this process or another one."""
        trials = self._trials(cell)
        return len(trials) >= (self.section.trials or 0) and all(
            trial.state.is_finished() or (cell, trial.number) in self._left for trial in trials
        )

    def configurations(self, cell: Cell, ended: bool = False) -> dict[int, dict[str, str]]:
        """{number: flags} of all trials so far; with `ended`, of those that are not under way."""
        trials = self._trials(cell)
        return {
            trial.number: self._flags(cell, trial)
            for trial in trials if trial.state.is_finished() or not ended
        }  # fmt: skip

    def _alone(self):
        """One process at a time counts trials and asks for new ones: otherwise there would be too many."""
        return tune.alone(self.locks / "ask.lock", "the search")

    def _end_incomplete(self, cell: Cell) -> None:
        """Ends trials that a process did not live to give all flags: whoever asks holds the lock that we hold now."""
        for trial in self._studies[cell].get_trials(deepcopy=False):
            if not trial.state.is_finished() and not _is_complete(cell, trial):
                self._studies[cell].tell(trial.number, state=self.optuna.trial.TrialState.FAIL)

    def _next(self, cell: Cell) -> Taken | None:
        trials = self._trials(cell)
        for trial in trials:
            is_free = not trial.state.is_finished() and (cell, trial.number) not in self._left
            lock = self._claimed(cell, trial.number) if is_free else None
            if lock is not None:
                return Taken(cell, trial.number, self._flags(cell, trial), lock)
        if len(trials) >= (self.section.trials or 0):
            return None
        study = self._studies[cell]
        study.sampler = self._sampler(len(trials))
        trial = study.ask(self._distributions(cell))
        lock = self._claimed(cell, trial.number)
        return None if lock is None else Taken(cell, trial.number, self._flags(cell, trial), lock)

    def _num_over(self, cell: Cell) -> int:
        return sum(trial.state.is_finished() for trial in self._trials(cell))

    def _claimed(self, cell: Cell, number: int) -> Lock | None:
        lock = Lock(self.locks / f"{self.digests[cell]}-{number}.lock", f"trial {number} of {cell.label}")
        try:
            lock.acquire()
            return lock
        except Busy:
            return None

    def _sampler(self, number: int) -> Any:
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

    def _flags(self, cell: Cell, trial: Any) -> dict[str, str]:
        values = {name: trial.params[name] for name in cell.space}
        return {
            name: value if isinstance(value, str) else tune.word(value, name in self.whole)
            for name, value in values.items()
        }

    def _trials(self, cell: Cell) -> list[Any]:
        """All that have their flags."""
        if cell not in self._studies:
            return []
        with self._reasons():
            return [trial for trial in self._studies[cell].get_trials(deepcopy=False) if _is_complete(cell, trial)]

    def _open(self) -> None:
        with self._reasons():
            storage = self.optuna.storages.RDBStorage("sqlite:///study.db", {"creator": self._connected})
            known = self.optuna.get_all_study_names(storage)
            for cell, digest in self.digests.items():
                name = f"{cell.label} {digest}"
                if name in known:
                    self._studies[cell] = self.optuna.load_study(study_name=name, storage=storage)
                elif self.may_write:
                    self._studies[cell] = self.optuna.create_study(
                        study_name=name, storage=storage, direction="maximize"
                    )

    def _connected(self) -> sqlite3.Connection:
        """By the name of the file: in an address, which Optuna takes otherwise, some letters have a meaning."""
        connection = sqlite3.connect(self.file, timeout=LOCKED_S, check_same_thread=False)
        if not self.may_write:
            connection.execute("PRAGMA query_only = ON")
        return connection

    @contextmanager
    def _reasons(self) -> Iterator[None]:
        """Says in one line why the database could not be used."""
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (self.optuna.exceptions.OptunaError, SQLAlchemyError, sqlite3.Error, RuntimeError) as error:
            cause: BaseException = error
            while cause.__cause__ is not None:  # theirs begin with ours, the reason is at the end
                cause = cause.__cause__
            raise UsageError(
                f"{self.file} cannot be used: {reason(cause)}. Give the same command again once nothing else uses the "
                "file; or move it away: finished runs are kept, new trials are proposed."
            ) from None


def _is_complete(cell: Cell, trial: Any) -> bool:
    return cell.space.keys() <= trial.params.keys()
