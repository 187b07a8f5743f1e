"""Runs on a Ray cluster (`pip install "flatcl[ray]"`): each run is a task, on whichever node has room for it.

The nodes share the folders of results and data, and see the code under the same path. A run whose node or worker is
lost is given to another one, which goes on from its last checkpoint; a run that fails by itself is not tried again.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatcl.utils.errors import UsageError
from flatcl.utils.extras import require
from flatcl.utils.registry import HOME
from flatcl.utils.studies.engines import BUSY, FAILED, Job, OnEnd, OnWait, Runner
from flatcl.utils.studies.engines.local import RETRY_S, STOP_S

CURRENT = Path("/tmp/ray/ray_current_cluster")  # where `ray start` writes the address of this machine's cluster
CONNECT_S, ANSWER_S = 5.0, 20.0
MOST_LOSSES = 5  # nodes and workers that one run may lose: it could be what ends them
SMALL_STORE = 100 * 2**20  # bytes of shared memory for a cluster of our own: runs hand over nothing but exit codes


@dataclass(frozen=True)
class Ray:
    """`--engine ray`. `address`: HOST:PORT, or `auto` for the cluster that is there, else one on this machine."""

    address: str = "auto"
    cpus_per_run: float | None = None  # None: the run's --threads
    gpus_per_run: float = 0.0
    most: int | None = None  # runs at the same time; None: as many as there is room for

    def run(self, jobs: Sequence[Job], on_end: OnEnd, extra: Sequence[str], runner: Runner, on_wait: OnWait) -> None:
        if jobs:
            self._check_devices(jobs)
            with _connected(self.address):
                self._check_room(jobs)
                _Driver(self, on_end, on_wait, extra, runner).run(jobs)

    def needs(self, job: Job) -> tuple[float, float]:
        """(CPUs, GPUs) of a run."""
        return self.cpus_per_run or float(job.config.threads), self.gpus_per_run

    def _check_devices(self, jobs: Sequence[Job]) -> None:
        wanting = next((job for job in jobs if str(job.config.device).startswith("cuda")), None)
        if wanting is not None and not self.gpus_per_run:
            raise UsageError(
                f"{wanting.label}: --device {wanting.config.device} needs a GPU, and --gpus_per_run is 0. Add "
                "--gpus_per_run 1, or a fraction for runs that share one."
            )

    def _check_room(self, jobs: Sequence[Job]) -> None:
        """Raises `UsageError` where no node has what a run asks for: Ray would wait for such a node forever."""
        nodes = _nodes()
        for cpus, gpus in dict.fromkeys(map(self.needs, jobs)):
            if not _fits(cpus, gpus, nodes):
                there = ", ".join(sorted({f"{has[0]:g} CPUs and {has[1]:g} GPUs" for has in nodes})) or "nothing"
                raise UsageError(
                    f"a run asks for {cpus:g} CPUs and {gpus:g} GPUs (--cpus_per_run, by default its --threads; "
                    f"--gpus_per_run), and no node of the cluster has them: the nodes have {there}. Ask for less."
                )


def _nodes() -> list[tuple[float, float]]:
    """(CPUs, GPUs) of each node that is alive, in use or not."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(has.get("CPU", 0.0), has.get("GPU", 0.0)) for has in alive]


def _fits(cpus: float, gpus: float, nodes: Sequence[tuple[float, float]]) -> bool:
    return any(cpus <= has[0] and gpus <= has[1] for has in nodes)


class _Driver:
    """Hands the runs to the cluster and waits for them."""

    def __init__(self, options: Ray, on_end: OnEnd, on_wait: OnWait, extra: Sequence[str], runner: Runner):
        self.options, self.on_end, self.on_wait = options, on_end, on_wait
        self.task = _task(os.getcwd(), f"{runner.__module__}:{runner.__qualname__}", options.gpus_per_run > 0)
        self.extra = list(extra)
        self.under_way: dict[Any, Job] = {}  # by Ray's reference of its result
        self.losses: dict[Job, int] = {}
        self.told: set[Job] = set()

    def run(self, jobs: Sequence[Job]) -> None:
        import ray

        waiting, busy = deque(jobs), deque()  # busy: (when to try again, job), the earliest first
        most = self.options.most or len(jobs)
        try:
            while waiting or busy or self.under_way:
                while busy and busy[0][0] <= time.monotonic():
                    waiting.append(busy.popleft()[1])
                while waiting and len(self.under_way) < most:
                    self._start(waiting.popleft())
                pause = max(0.0, busy[0][0] - time.monotonic()) if busy else None
                if not self.under_way:
                    time.sleep(pause or 0.0)
                    continue
                for done in ray.wait(list(self.under_way), timeout=pause)[0]:
                    job = self.under_way.pop(done)
                    if self._has_to_wait(job, done):
                        busy.append((time.monotonic() + RETRY_S, job))
        finally:
            self._stop()

    def _start(self, job: Job) -> None:
        import ray

        cpus, gpus = self.options.needs(job)
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(self.task)
        self.under_way[remote.remote([*job.argv, *self.extra], os.path.abspath(job.log), job.label)] = job

    def _has_to_wait(self, job: Job, done: Any) -> bool:
        """Whether a run that has come back has to be tried again later; tells how it ended if not."""
        import ray
        from ray import exceptions as errors

        try:
            code, why = ray.get(done)
        except (errors.NodeDiedError, errors.WorkerCrashedError, errors.OutOfMemoryError) as lost:
            self.losses[job] = self.losses.get(job, 0) + 1
            if self.losses[job] > MOST_LOSSES:
                self.on_end(job, FAILED, f"{self.losses[job]} workers or nodes were lost under it; {_first_line(lost)}")
                return False
            room = "" if _fits(*self.options.needs(job), _nodes()) else ", once a node has room for it"
            self.on_wait(job, f"waits: its node or worker was lost; it goes on from its checkpoint{room}")
            return True
        except errors.RayError as error:  # e.g. a node with another version of Python
            code, why = FAILED, _first_line(error)
        if code == BUSY:
            if job not in self.told:
                self.told.add(job)
                self.on_wait(job, why)
            return True
        self.on_end(job, code, why)
        return False

    def _stop(self) -> None:
        """Asks the runs that are under way to end as Ctrl-C does, with a checkpoint."""
        import ray

        left = list(self.under_way)
        for one in left:
            ray.cancel(one, force=False)
        if left:
            ray.wait(left, num_returns=len(left), timeout=STOP_S)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _task(folder: str, runner: str, has_gpu: bool):
    """What a node does for a run. Ray sends this function as it is: the node need not find our package beforehand."""
    home = str(HOME or "")

    def task(argv, log, label):
        import os
        import pkgutil
        import sys
        from pathlib import Path

        try:
            os.chdir(folder)  # paths in flags begin there
        except OSError as error:
            where = f"{os.uname().nodename} cannot enter {folder} ({error.strerror})"
            return 1, f"{where}: the nodes must share the folders of code, data and results"
        if home and home not in sys.path:
            sys.path.insert(0, home)
        if not has_gpu:  # a run sees what it has asked for
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from flatcl.utils.studies.engines.local import run_claimed

        return run_claimed(argv, Path(log), label, pkgutil.resolve_name(runner))

    task.__module__ = "__main__"  # by which Ray knows functions that it has to send
    return task


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Inside, this process is connected to the cluster, or to one of its own, of which nothing is left afterwards."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    require("ray", "ray", "--engine ray")
    import ray

    found = _there(address)
    own = tempfile.mkdtemp(prefix="ray-", dir="/tmp" if os.path.isdir("/tmp") else None) if found is None else None
    options = dict(address=found or "local", log_to_driver=False, logging_level="CRITICAL")
    if own is not None:  # sockets lie in there, whose paths must be short
        options |= dict(_temp_dir=own, include_dashboard=False, object_store_memory=SMALL_STORE)
    try:
        with _own_handlers():
            _start(ray, options, found)
        yield
    finally:
        ray.shutdown()
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)


def _start(ray: Any, options: dict[str, Any], address: str | None) -> None:
    try:
        ray.init(**options)
    except (Exception, SystemExit) as error:
        what = f"the Ray cluster at {address} cannot be joined" if address else "Ray cannot be started on this machine"
        raise UsageError(f"{what} ({_first_line(error)}). The versions of Ray and Python must be the same.") from None


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Ray replaces handlers of signals; inside, ours are put back at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _there(address: str) -> str | None:
    """The address of a cluster that answers; None where there is none, and `auto` leaves it to us. Ray itself would
    wait minutes for an answer, and join what another sweep has started for itself."""
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if named and not named.rpartition(":")[2].isdecimal():
        raise UsageError(f"--address expects HOST:PORT or auto, got '{named}'. Example: 10.0.0.1:6379.")
    if named:
        if not _answers(named):
            raise UsageError(
                f"no Ray cluster answers at {named} (--address, or RAY_ADDRESS). Start one by `ray start --head`, or "
                "drop the flag: then one is started on this machine."
            )
        return named
    try:
        current = CURRENT.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return current if _answers(current) else None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, ValueError, OverflowError):
        return False
    ask = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        return subprocess.run(ask, capture_output=True, timeout=ANSWER_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False
