"""Runs on this machine: N worker processes, each of which imports torch once and makes one run after the other."""

import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from flatcl.utils.console import have_standard_streams, program, say
from flatcl.utils.engine.lock import Busy, Lock
from flatcl.utils.studies.engines import (
    ALREADY,
    BUSY,
    FAILED,
    INTERRUPTED,
    LAST_LINE,
    OK,
    Job,
    OnEnd,
    OnWait,
    Runner,
)

RETRY_S = 2.0  # until a job that another sweep is at is tried again
STOP_S = 30.0  # what an interrupted run may take to write what it has finished


@dataclass(frozen=True)
class Local:
    """`--engine local`."""

    num_workers: int = 1

    def run(self, jobs: Sequence[Job], on_end: OnEnd, extra: Sequence[str], runner: Runner, on_wait: OnWait) -> None:
        run_all(jobs, self.num_workers, on_end, extra, runner, on_wait)


@dataclass
class Worker:
    """A process that makes one run at a time, until one fails."""

    process: Any
    connection: Any
    job: Job | None = None

    @classmethod
    def start(cls, runner: Runner) -> "Worker":
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, runner), daemon=True)
        process.start()
        there.close()  # only the worker holds that end: its death is an end of file here
        return cls(process, here)

    def give(self, job: Job, extra: Sequence[str]) -> None:
        self.job = job
        self.connection.send(([*job.argv, *extra], str(job.log), job.label))

    def result(self) -> tuple[int, str]:
        """(exit code, why there is no log that says more)."""
        sent = self.sent()
        if sent is None:
            self.process.join()
            return self.process.exitcode or FAILED, ""  # negative: the signal that killed it
        return sent

    def sent(self) -> tuple[int, str] | None:
        """What the worker says of its run; None where it has ended without a word."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            return None


def run_all(
    jobs: Sequence[Job],
    num_workers: int,
    on_end: OnEnd,
    extra: Sequence[str],
    runner: Runner,
    on_wait: OnWait = lambda job, why: None,
) -> None:
    """Runs all jobs and calls `on_end(job, exit code, why there is no log)` after each; a negative code is the signal
    that killed it.

    A worker is replaced after a failed run, which may have left CUDA or memory unusable. A job that another process is
    at is tried again until that one has finished it, or has died; `on_wait(job, why)` is called once for it.
    """
    waiting = deque(jobs)
    busy: list[tuple[float, Job]] = []  # (when to try again, job), the earliest first
    workers: list[Worker] = []
    idle: list[Worker] = []
    told: set[Job] = set()
    try:
        while waiting or busy or workers:
            while busy and busy[0][0] <= time.monotonic():
                waiting.append(busy.pop(0)[1])
            while waiting and (idle or len(workers) < num_workers):
                worker = idle.pop() if idle else Worker.start(runner)
                try:
                    worker.give(waiting[0], extra)
                except OSError:  # it has died while it had nothing to do
                    worker.connection.close()
                    continue
                waiting.popleft()
                workers.append(worker)
            pause = max(0.0, busy[0][0] - time.monotonic()) if busy else None
            if not workers:
                time.sleep(pause or 0.0)
            for connection in wait([worker.connection for worker in workers], pause) if workers else ():
                worker = next(worker for worker in workers if worker.connection is connection)
                job, (code, why) = worker.job, worker.result()
                workers.remove(worker)
                if code in (OK, BUSY):
                    idle.append(worker)
                else:
                    connection.close()
                if code == BUSY:
                    busy.append((time.monotonic() + RETRY_S, job))
                    if job not in told:
                        told.add(job)
                        on_wait(job, why)
                else:
                    on_end(job, code, why)
    finally:
        stop(workers, idle, on_end)


def stop(workers: Sequence[Worker], idle: Sequence[Worker] = (), on_end: OnEnd = lambda job, code, why: None) -> None:
    """Asks the runs to end as Ctrl-C does, so that they keep what they have, and ends those that do not. `on_end` is
    called for a run that comes to its own end meanwhile: Ctrl-C in its last seconds, after its last step, changes
    nothing."""
    for worker in (*workers, *idle):
        if worker.process.is_alive():
            os.kill(worker.process.pid, signal.SIGINT)
    end = time.monotonic() + STOP_S
    ended = []
    left = {worker.connection: worker for worker in workers}
    while left and time.monotonic() < end:
        for connection in wait(list(left), max(0.0, end - time.monotonic())):
            worker = left.pop(connection)
            ended.append((worker.job, worker.sent()))
            connection.close()  # it waits for no further run
    for worker in (*left.values(), *idle):
        worker.connection.close()
    for job, sent in ended:
        if sent is not None and sent[0] < 128 and sent[0] != BUSY:  # 128 and more: our signal
            on_end(job, *sent)
    workers = [*workers, *idle]
    for worker in workers:
        worker.process.join(max(0.0, end - time.monotonic()))
    for worker in workers:
        if worker.process.is_alive():
            worker.process.terminate()


def _work(connection, runner: Runner) -> None:
    """A worker's life: runs until there are no more, or until one fails."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a sweep in the background has left it ignored
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C in the terminal reaches the sweep alone, which passes it on once
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    have_standard_streams()
    try:
        while True:
            argv, log, label = connection.recv()
            code, why = run_claimed(argv, Path(log), label, runner)
            connection.send((code, why))
            if code not in (OK, BUSY):
                return
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return


def _end_with_parent() -> None:
    """A sweep that was killed leaves no run behind: its run ends as by SIGTERM, with a checkpoint."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_S)
    os._exit(FAILED)


def run_claimed(argv: list[str], log: Path, label: str, runner: Runner) -> tuple[int, str]:
    """(exit code, why there is no log, or what a busy one waits for, or ALREADY). One process at a time runs a job,
    whatever sweep it belongs to."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with Lock(log.with_suffix(".lock"), label):
            code = _run_logged(argv, log, runner)
            if code == BUSY:
                return code, f"waits: another process is at it, see {log}"
            return code, ALREADY if code == OK and _had_nothing_to_do(log) else ""
    except Busy as error:
        return BUSY, _who(error, log.with_suffix(".lock"), label)
    except OSError as error:
        return FAILED, f"its log {log} cannot be written: {error.strerror or error}"


def _who(error: Busy, lock: Path, label: str) -> str:
    """Who is at a job: words that go on from its name."""
    if error.holder is None:
        return str(error).removeprefix(f"{label} ")
    if error.holder.is_here:
        return f"is being made by another sweep (process {error.holder.pid})"
    return f"is being made by another sweep ({error.holder}). If you know that it is not alive, delete {lock}."


def _had_nothing_to_do(log: Path) -> bool:
    """Whether another process has finished the run since this sweep looked; asked while we hold its lock."""
    return any(line.startswith(ALREADY) for line in log.read_text(errors="replace").splitlines()[1:])


def _run_logged(argv: list[str], log: Path, runner: Runner) -> int:
    with _console_to(log):
        say(f"{program()} {shlex.join(argv)}")
        code = _code_of(argv, runner)
        say(f"{LAST_LINE} {code}")
        return code


def _code_of(argv: list[str], runner: Runner) -> int:
    try:
        return runner(argv)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:  # whatever a run does wrong, the others go on
        traceback.print_exc()
        return FAILED


@contextmanager
def _console_to(log: Path):
    """Sends the file descriptors 1 and 2 to `log`, what C libraries print included."""
    with open(log, "wb") as file:
        saved = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        sys.stdout.reconfigure(line_buffering=True)  # a log that can be followed
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)
