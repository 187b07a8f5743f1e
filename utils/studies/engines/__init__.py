"""How the runs of a sweep are executed: on this machine (`local`), on a Ray cluster (`ray`), by Slurm (`slurm`).

Whatever executes a run claims it first, through a lock file in the results folder (`local.run_claimed`), and goes on
with what an interrupted run has left. So several executors, of several kinds, may work on one folder at the same time.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

OK, FAILED, BUSY, INTERRUPTED = 0, 1, 75, 130  # exit codes of a run
LAST_LINE = "exit code"  # of a run's log, then the code; a log without it is of a run that was killed
ALREADY = "already finished"  # how `train` begins its line where another process has made the run
Runner = Callable[[list[str]], int]  # `main` of the command `train`


class Job(Protocol):
    """A run: the command line that makes it, its name in messages, its configuration, and where its output goes."""

    argv: tuple[str, ...]
    config: Any

    @property
    def label(self) -> str: ...

    @property
    def hash(self) -> str: ...

    @property
    def log(self) -> Path: ...


OnEnd = Callable[[Job, int, str], None]  # (job, exit code, why there is no log, or ALREADY)
OnWait = Callable[[Job, str], None]  # (job, what it waits for: words that go on from its name)


class Engine(Protocol):
    def run(self, jobs: Sequence[Job], on_end: OnEnd, extra: Sequence[str], runner: Runner, on_wait: OnWait) -> None:
        """Runs all jobs, each by `runner([*job.argv, *extra])`, and calls `on_end` after each: a negative code is the
        signal that killed it. `on_wait` is called once for a job that another process is at. Raises `UsageError`
        before any run begins where they cannot be executed so; `KeyboardInterrupt` ends the runs with a checkpoint."""
