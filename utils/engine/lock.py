"""A file that says that a process is alive, so that no two of them write to one folder.

Whoever puts the file in place holds it. On one machine the process's number and the time of its start tell whether the
holder lives; from another machine (or container) its heartbeat does: a thread touches the file every 30 s, and 5
minutes without a touch mean that it is dead. Nothing but atomic names is needed (`link`, `rename`, exclusive creation),
so it works on shared file systems too; the age is measured by the file server's own clock.
"""

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from flatcl.utils.errors import UsageError

HEARTBEAT_S = 30.0
STALE_S = 300.0  # without a touch
TRIES = 500  # 10 s
LONGEST = 4096  # bytes of a lock file; ours has some 200


class Busy(UsageError):
    """Another process, which is alive, holds the lock: `holder`, where it is known."""

    def __init__(self, problem: str, holder: "Holder | None" = None):
        self.holder = holder
        super().__init__(problem)


@dataclass(frozen=True)
class Holder:
    """A process. `place` is the machine since its last start and the container: where `pid` has a meaning; `started` is
    when it started, by the machine's own count, where that is known. `token` is of one lock of one process."""

    pid: int
    host: str
    place: str
    started: int | None
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_here(self) -> bool:
        """Whether its number has a meaning here: then it is certain that it lives."""
        return self.place == _place()


class Lock:
    """`with Lock(folder / "lock", "the run in x"): ...`; `what` stands at the beginning of the message of `Busy`."""

    def __init__(self, file: Path, what: str):
        self.file, self.what = Path(file), what
        self.token = secrets.token_hex(8)
        self._ours: Holder | None = None  # while we hold it
        self._stop = threading.Event()

    def acquire(self) -> None:
        """Takes the lock, also one that a dead process left. Raises `Busy`, which names the holder's pid and host, or
        `OSError` where nothing can be written."""
        ours = Holder(os.getpid(), platform.node(), _place(), _started(os.getpid()), self.token)
        fresh = self.file.with_name(f"{self.file.name}.{ours.pid}.{self.token}.tmp")
        try:
            fresh.write_text(json.dumps(asdict(ours)))
            for _ in range(TRIES):
                if _put(fresh, self.file) or self._take_over(fresh):
                    break
                time.sleep(0.02)  # somebody else is at it; what has become of it is seen at the next try
            else:
                raise Busy(
                    f"{self.what} is in use: several processes try to write to it at the same time. Try again later, "
                    f"or delete {self.file}."
                )
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
        self._ours = ours
        self._stop = threading.Event()
        threading.Thread(target=self._beat, args=(self._stop,), name="heartbeat", daemon=True).start()

    def release(self) -> None:
        """Gives the lock back. One that another process has taken over in the meantime is left alone."""
        self._stop.set()
        if self._is_in_place() and self._ours.pid == os.getpid():  # a forked child does not give its parent's lock back
            with contextlib.suppress(OSError):
                self.file.unlink(missing_ok=True)
        self._ours = None

    def check(self) -> None:
        """Raises `Busy` where another process has taken the lock over (this one slept too long, or the file was
        deleted)."""
        found = None if self._is_in_place() else holder(self.file)
        if found is not None:
            raise Busy(f"{self.what} was taken over by {found}. This process stops, so that their results do not mix.")

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _take_over(self, fresh: Path) -> bool:
        """Puts our file in the place of a dead holder's. False where that has changed meanwhile. Of those who try at
        the same time one at a time looks and acts, under a lock of its own, which may be left behind as well."""
        self._raise_if_busy(fresh)
        try:
            with Lock(self.file.with_name(f"{self.file.name}.takeover"), self.what):
                if not os.path.lexists(self.file):
                    return False
                self._raise_if_busy(fresh)
                os.replace(fresh, self.file)
                return True
        except Busy:
            self._raise_if_busy(fresh)
            return False

    def _raise_if_busy(self, fresh: Path) -> None:
        found, is_alive = _look(self.file, fresh)
        if found is not None and is_alive:
            raise Busy(
                f"{self.what} is in use by {found}. Wait for it to end, or stop it. If you know that it is not alive, "
                f"delete {self.file}.",
                found,
            )
        if is_alive:
            raise Busy(
                f"{self.what} seems to be in use: {self.file} cannot be read, and is less than {STALE_S / 60:.0f} "
                "minutes old. Wait, or delete that file."
            )

    def _is_in_place(self) -> bool:
        return self._ours is not None and _read(self.file) == self._ours

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):  # the folder may be gone, or the server away for a while
                if self._is_in_place():
                    os.utime(self.file)


def holder(file: Path, may_write: bool = True) -> Holder | None:
    """The living process that holds the lock; None where nobody does, or where it cannot be told who. Without
    `may_write`, the age of another machine's heartbeat is by this machine's clock."""
    found, is_alive = _look(Path(file), None, may_write)
    return found if is_alive else None


def _look(file: Path, probe: Path | None, may_write: bool = True) -> tuple[Holder | None, bool]:
    """(who wrote the lock, if it can be read; whether it counts as alive). `probe` is a file of ours beside it."""
    found = _read(file)
    if found is not None and found.place == _place():
        state = _is_alive(found)
        if state is not None:
            return found, state
    age = _age_s(file, probe) if may_write else _age_by_our_clock_s(file)
    return found, age is not None and age < STALE_S


def _read(file: Path) -> Holder | None:
    """What a lock file says; None where there is none, or where it is torn or foreign."""
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for a writer
        with open(descriptor, "rb") as opened:
            found = Holder(**json.loads(opened.read(LONGEST)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    kinds = (found.pid, int), (found.host, str), (found.place, str), (found.token, str)
    fits = all(type(value) is kind for value, kind in kinds) and isinstance(found.started, int | None)
    return found if fits and found.pid > 0 else None


def _put(fresh: Path, file: Path) -> bool:
    """Puts `fresh` in place, whole, unless there is such a file already."""
    try:
        os.link(fresh, file)
        return True
    except FileExistsError:
        return os.stat(fresh).st_nlink > 1  # over NFS the answer of a link that succeeded can be lost
    except OSError:  # a file system without hard links
        pass
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with open(descriptor, "wb") as opened:
        opened.write(fresh.read_bytes())
    return True


def _is_alive(found: Holder) -> bool | None:
    """Whether a process of this machine lives; None where the machine does not tell."""
    if os.name != "posix":
        return None  # elsewhere, signal 0 would end the process
    try:
        os.kill(found.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it is there, and another user's
    started = _started(found.pid)
    if started is None or found.started is None:
        return None
    return started == found.started  # else the number was given to another process


def _started(pid: int) -> int | None:
    """Start of a process in clock ticks since the machine's start; -1 for one that has ended, None if not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return -1 if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _place() -> str:
    """Where a process number has a meaning: the host, its last start, and the container's own process numbers."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _age_by_our_clock_s(file: Path) -> float | None:
    """Seconds since the last touch; None where the file cannot be seen."""
    try:
        return time.time() - file.lstat().st_mtime
    except OSError:
        return None


def _age_s(file: Path, probe: Path | None) -> float | None:
    """Seconds since the last touch, by the clock that stamps files there; None where the file is gone, 0 where it
    cannot be told."""
    own = probe or file.with_name(f"{file.name}.{os.getpid()}.{secrets.token_hex(8)}.tmp")
    try:
        touched = file.lstat().st_mtime
    except FileNotFoundError:
        return None
    except OSError:
        return 0.0
    try:
        own.touch()
        return own.stat().st_mtime - touched
    except OSError:
        return 0.0
    finally:
        if probe is None:
            with contextlib.suppress(OSError):
                own.unlink(missing_ok=True)
