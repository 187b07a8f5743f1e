"""Runs by Slurm: one array job whose tasks take runs from one list until none is left.

A task claims a run by its lock, as any other executor does. Before its time limit, and when it is preempted, it stops
the run with a checkpoint and puts itself back into the queue. No package is needed: the batch script is ours.
"""

import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from flatcl.utils.console import complain, reason, say
from flatcl.utils.engine.lock import STALE_S
from flatcl.utils.errors import UsageError
from flatcl.utils.files import read_json, write_json, write_text
from flatcl.utils.registry import HOME
from flatcl.utils.studies.engines import BUSY, FAILED, INTERRUPTED, OK, Job, Runner
from flatcl.utils.studies.engines.local import RETRY_S, Worker, stop

NOTICE_S = 120  # before the time limit, to stop a run with a checkpoint
SHORTEST_S = 300  # of a time limit: a task that only starts and stops would go on so forever
PATIENCE_S = STALE_S + 60  # by then a run whose executor has died can be taken over
ASK_S = 60.0  # for an answer of Slurm
RUNS, SCRIPT, ENDED = "runs.json", "job.sh", "ended"
OURS = {
    "array", "chdir", "cpus-per-task", "error", "gres", "ntasks", "open-mode", "output", "parsable", "partition",
    "requeue", "signal", "time", "wrap",
}  # fmt: skip
STOPS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")


@dataclass(frozen=True)
class Slurm:
    """`--engine slurm`. `num_workers` tasks; `more`: further flags of sbatch, without their dashes."""

    num_workers: int = 1
    partition: str = ""
    time: str = ""
    cpus_per_run: int | None = None  # None: the most --threads of a run
    gpus_per_run: int = 0
    gres: str = ""
    more: Mapping[str, str] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """What is wrong with the flags."""
        found = []
        if self.time and (_seconds(self.time) or 0) < SHORTEST_S:
            found.append(
                f"--time expects minutes, hours:minutes:seconds or days-hours, and at least {SHORTEST_S // 60} "
                f"minutes, got '{self.time}'. Example: 8:00:00."
            )
        if self.gres and self.gpus_per_run:
            found.append("--gres and --gpus_per_run both ask for GPUs. Give one of them.")
        for name, value in {"partition": self.partition, "gres": self.gres, **self.more}.items():
            if not re.fullmatch("[a-z][a-z-]*", name):
                found.append(
                    f"--slurm_args expects KEY=VALUE with a flag of sbatch, got '{name}'. Example: account=me."
                )
            if not _is_plain(value):
                found.append(f"{name}: {value!r} has characters that a batch script cannot hold. Write it without.")
        for name in sorted(OURS & set(self.more)):
            found.append(f"--slurm_args {name}: that is set by this program, or has a flag of its own. Drop it.")
        return found

    def script(self, folder: Path, jobs: Sequence[Job]) -> str:
        """The batch script whose tasks work on the runs in `folder`, an absolute path."""
        if not _is_plain(f"{folder}{os.getcwd()}") or "%" in str(folder):
            raise UsageError(
                f"{folder}: Slurm cannot take quotes, %, backslashes or line breaks in paths. Use another "
                "--results_path or working directory."
            )
        cpus = self.cpus_per_run or max(job.config.threads for job in jobs)
        gres = self.gres or (f"gpu:{self.gpus_per_run}" if self.gpus_per_run else "")
        options = {
            "job-name": "flatcl",
            "array": f"0-{self.tasks(jobs) - 1}",
            "ntasks": "1",
            "cpus-per-task": str(cpus),
            "partition": self.partition,
            "time": self.time,
            "gres": gres,
            "chdir": os.getcwd(),
            "output": str(folder / "task_%a.log"),
            "open-mode": "append",
            "signal": f"USR1@{NOTICE_S}",
            **self.more,
        }
        asked = [f"#SBATCH --{name}={_quoted(value)}" for name, value in options.items() if value or name in self.more]
        asked = [line.removesuffix("=") for line in asked]
        path = [f'export PYTHONPATH={shlex.quote(str(HOME))}"${{PYTHONPATH:+:$PYTHONPATH}}"'] if HOME else []
        worker = shlex.join([sys.executable, "-m", "flatcl", "worker", str(folder)])
        run = f"exec srun --ntasks=1 --cpus-per-task={cpus} {worker}"
        return "\n".join(["#!/bin/bash", *asked, "#SBATCH --requeue", *path, run, ""])

    def tasks(self, jobs: Sequence[Job]) -> int:
        return min(self.num_workers, len(jobs))

    def submit(self, jobs: Sequence[Job], extra: Sequence[str]) -> None:
        """Writes and submits the array job, and says how to follow it. Raises `UsageError`."""
        if shutil.which("sbatch") is None:
            raise UsageError(
                "--engine slurm needs Slurm's sbatch, which is not found. Use it where jobs are submitted; --dry_run "
                "shows the script."
            )
        folder = new_folder(jobs)
        script = self.script(folder, jobs)
        try:
            (folder / ENDED).mkdir(parents=True)
            runs = [{"axes": dict(job.axes), "argv": list(job.argv)} for job in jobs]
            write_json(folder / RUNS, {"tasks": self.tasks(jobs), "extra": list(extra), "runs": runs})
            write_text(folder / SCRIPT, script)
        except OSError as error:
            raise UsageError(f"{folder}: cannot write there ({reason(error)}). Nothing was submitted.") from None
        code, answer = _ask("sbatch", "--parsable", str(folder / SCRIPT))
        if code:
            raise UsageError(f"sbatch refused {folder / SCRIPT}: {answer}. Correct the flags; nothing was submitted.")
        number = answer.split(";")[0]
        say(f"submitted job {number}: {self.tasks(jobs)} task(s) for {len(jobs)} run(s)")
        say(f"how far it is: the same command with --status; the queue: squeue -j {number}; output: {folder}")
        say(f"to stop it: scancel {number}")


def new_folder(jobs: Sequence[Job]) -> Path:
    """Where the files of a submission go, beside the runs."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return Path(os.path.abspath(jobs[0].results_path)) / "slurm" / name


def _is_plain(text: str) -> bool:
    return text.isprintable() and not set(text) & set("\"'\\")


def _quoted(value: str) -> str:
    return value if re.fullmatch(r"[\w./:@%,+=-]*", value) else f'"{value}"'


def _seconds(text: str) -> int | None:
    """A time limit as Slurm reads it: minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    found = TIME.fullmatch(text)
    if found is None:
        return None
    days, *parts = (None if part is None else int(part) for part in found.group("d", "a", "b", "c"))
    a, b, c = (part or 0 for part in parts)
    if days is not None:
        return ((days * 24 + a) * 60 + b) * 60 + c
    return a * 60 + b if parts[2] is None else (a * 60 + b) * 60 + c


def _ask(*words: str) -> tuple[int, str]:
    """(exit code, what it has printed) of a command of Slurm's."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=ASK_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return FAILED, reason(error)
    return done.returncode, " ".join((done.stdout if done.returncode == 0 else done.stderr or done.stdout).split())


# in a task


class Stopped(KeyboardInterrupt):
    """Slurm wants the task's resources back."""


def catch_stops() -> None:
    """From now on the first of Slurm's signals raises `Stopped`, further ones are ignored: srun may pass them on, and
    Slurm sends them, more than once."""

    def handle(number: int, frame: FrameType | None) -> None:
        for name in STOPS:
            signal.signal(name, signal.SIG_IGN)
        raise Stopped

    for number in STOPS:
        signal.signal(number, handle)


@dataclass(frozen=True)
class Submitted:
    """What a submission's folder says. `runs`: (place in the grid, command line) of each."""

    folder: Path
    tasks: int
    extra: list[str]
    runs: list[tuple[dict[str, str], list[str]]]


def read(folder: Path) -> Submitted:
    """Raises `UsageError` where this is no folder of a submission."""
    try:
        content = read_json(folder / RUNS)
        runs = [({str(k): str(v) for k, v in run["axes"].items()}, _words(run["argv"])) for run in content["runs"]]
        return Submitted(folder, max(1, int(content["tasks"])), _words(content["extra"]), runs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{folder} is no folder of a submission: {RUNS} cannot be read ({type(error).__name__}: {reason(error)}). "
            "Give one that `sweep --engine slurm` has made."
        ) from None


def _words(content: object) -> list[str]:
    if not isinstance(content, list) or not all(isinstance(word, str) for word in content):
        raise ValueError("a command line must be a list of texts")
    return content


class Task:
    """One task's work: the runs that nobody else is at, one after the other."""

    def __init__(self, submitted: Submitted, jobs: Sequence[Job], runner: Runner):
        self.submitted, self.runner = submitted, runner
        number = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
        first = number * len(jobs) // submitted.tasks % max(1, len(jobs))
        self.left = [*jobs[first:], *jobs[:first]]  # tasks begin at different runs, and seldom wait for each other
        self.worker: Worker | None = None
        self.num_failed = 0

    def run(self) -> int:
        """0, 1 where a run has failed, 130 when stopped. Afterwards nothing is left, or others are at what is left."""
        try:
            self._work()
            if self.left:
                say(f"{len(self.left)} run(s) are left to others, who are at them")
            return FAILED if self.num_failed else OK
        except Stopped:
            self._stop_run()
            requeue()
            return INTERRUPTED
        except KeyboardInterrupt:
            return INTERRUPTED
        finally:
            self._stop_run()

    def _work(self) -> None:
        """Tries the runs in turn. Where others are at all that is left, waits until they have ended, or are seen to
        live: the lock of a node that has died counts for `STALE_S`."""
        since = time.monotonic()
        while self.left and time.monotonic() - since < PATIENCE_S:
            before = len(self.left)
            self.left = [job for job in self.left if not self._is_ended(job) and self._make(job) == BUSY]
            if len(self.left) < before:
                since = time.monotonic()
            elif self.left:
                time.sleep(RETRY_S)

    def _make(self, job: Job) -> int:
        """Makes a run, if nobody is at it; returns its exit code."""
        self.worker = self.worker or Worker.start(self.runner)
        self.worker.give(job, self.submitted.extra)
        code, why = self.worker.result()
        if code == BUSY:
            return code
        if code in {sign * number + base for number in STOPS for sign, base in ((1, 128), (-1, 0))}:
            raise Stopped  # the signal came to the run first
        self._ended(job).write_text(f"{code}\n", encoding="utf-8")
        say(f"{job.label}: finished" if code == OK else f"{job.label}: FAILED ({code}), {why or f'see {job.log}'}")
        if code != OK:
            self.num_failed += 1
            self.worker = None  # it has ended
        return code

    def _ended(self, job: Job) -> Path:
        return self.submitted.folder / ENDED / job.hash

    def _is_ended(self, job: Job) -> bool:
        """Whether a task of this submission has made the run, or has failed to."""
        return self._ended(job).exists()

    def _stop_run(self) -> None:
        if self.worker is not None:
            stop([self.worker])
            self.worker = None


def requeue() -> None:
    """Puts this task back into Slurm's queue, unless somebody has cancelled it."""
    array, number = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{number}" if array and number else os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    code, state = _ask("scontrol", "show", "job", job)
    if code == 0 and "JobState=CANCELLED" in state:
        say("stopped: the job was cancelled")
        return
    code, answer = _ask("scontrol", "requeue", job)
    if code:
        complain(f"stopped, and not put back into the queue ({answer}). The same sweep command does the rest.")
    else:
        say("stopped with a checkpoint, and put back into the queue")
