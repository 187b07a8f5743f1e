"""Downloads of data sets, by urllib alone: mirrors, resumption, checksum, one process at a time, one clear failure."""

import contextlib
import hashlib
import os
import queue
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import urlsplit

from tqdm import tqdm

import flatcl
from flatcl.utils.errors import DataError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TIMEOUT_S = 4.0  # for one connection, and for one silence within a transfer
PROBE_S = 6.0  # for all mirrors together: a name server that hangs obeys no socket timeout
ATTEMPTS = 20  # times that one mirror's broken transfer is taken up again, as long as each brings new bytes
CHUNK_BYTES = 1 << 20
POLL_S = 0.2  # between two looks at a lock


def fetch(urls: Sequence[str], path: Path, md5: str | None, what: str) -> None:
    """Download to `path` from the first of `urls` (http, https) that works; `what` names the data set for people.

    An interrupted download stays in `<path>.part` and is resumed. `path` appears only when complete and, where `md5` is
    given, verified. While another process downloads it, waits, and takes what that one got. A failure leaves no file or
    folder behind but a `.part` that can be resumed. Raises DataError if no mirror delivers or the folder cannot be
    written.
    """
    part = path.with_name(path.name + ".part")
    failures = []
    try:
        with _alone(path, what) as is_there:
            if is_there:
                return
            part.open("ab").close()
            probes = [_probe(url) for url in urls]
            deadline = time.monotonic() + PROBE_S
            for url, probe in zip(urls, probes, strict=True):
                failure = _probed(probe, deadline) or _obtain(url, part, md5)
                if failure is None:
                    os.replace(part, path)
                    return
                failures.append(f"{urlsplit(url).netloc}: {failure}")
    except OSError as error:  # network errors were turned into failures where they arose: this is the disk
        raise DataError(
            f"{what}: cannot write {path.name} to {path.parent} ({_reason(error)}); "
            "free or unlock that folder, or choose another with --base_path"
        ) from error
    raise DataError(
        f"{what}: cannot download {path.name} ({'; '.join(failures)}); download it by hand from {' or '.join(urls)} "
        f"and put it in {path.parent}"
    )


@contextlib.contextmanager
def _alone(path: Path, what: str) -> Iterator[bool]:
    """One process at a time is inside for `path`; gives whether the file is there by then. Makes the folder; what is
    empty in the end (the folders made here, `<path>.part`) is removed.

    `<path>.lock` is locked by the operating system, which frees it when its holder dies, however that happens. On
    Windows, and on file systems without locks, nobody waits: each downloads, and the last one wins.
    """
    lock, part = path.with_name(path.name + ".lock"), path.with_name(path.name + ".part")
    made: list[Path] = []
    holding = None
    try:
        while holding is None:
            _make_folders(path.parent, made)
            holding = _locked(lock, what)
        yield path.exists()
    finally:
        with contextlib.suppress(OSError):
            if _size(part) == 0:
                part.unlink(missing_ok=True)
        if holding is not None:
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        if holding is not None:
            holding.close()  # after all that, so that who waits for it finds nothing half-done


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Adds to `made` what was not there, from the outside in."""
    for new in reversed([folder, *folder.parents]):
        if not new.is_dir():
            with contextlib.suppress(FileExistsError):
                new.mkdir()
                made.append(new)


def _locked(lock: Path, what: str) -> contextlib.ExitStack | None:
    """Holds the lock until it is closed; None where the one who held it before has removed the file."""
    if fcntl is None:
        return contextlib.ExitStack()
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(lock, "ab"))
            if not _try_lock(file):
                print(f"{what}: another process is downloading {lock.stem}; waiting for it", file=sys.stderr)
                while not _try_lock(file):
                    time.sleep(POLL_S)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                return None
        except FileNotFoundError:
            return None
        return stack.pop_all()


def _try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def md5_of(path: Path) -> str:
    """Hexadecimal md5 of a file, read in chunks."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _open(url: str, first: int, last: int | str = "") -> HTTPResponse:
    # An opener of our own: the default one also follows file: and ftp: addresses.
    opener = urllib.request.OpenerDirector()
    for handler in ("Proxy", "Unknown", "HTTP", "HTTPS", "HTTPDefaultError", "HTTPRedirect"):
        opener.add_handler(getattr(urllib.request, handler + "Handler")())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    headers = {"User-Agent": f"flatcl/{flatcl.__version__}"}
    if first or last != "":
        headers["Range"] = f"bytes={first}-{last}"
    return opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)


def _probe(url: str) -> queue.Queue:
    """Ask a mirror for one byte in the background; the queue gets None or why it cannot be reached.

    All mirrors are asked at once and in daemon threads, so that being offline costs one timeout, not one a mirror.
    """
    answer = queue.Queue()

    def ask():
        try:
            _open(url, 0, 0).close()
            answer.put(None)
        except HTTPError:
            answer.put(None)  # it speaks; whether it has the file shows in the real request
        except (OSError, HTTPException) as error:
            answer.put(_reason(error))

    threading.Thread(target=ask, daemon=True).start()
    return answer


def _probed(probe: queue.Queue, deadline: float) -> str | None:
    try:
        return probe.get(timeout=max(deadline - time.monotonic(), 0.001))
    except queue.Empty:
        return f"no answer in {PROBE_S:g} s"


def _obtain(url: str, part: Path, md5: str | None) -> str | None:
    """Complete and verify `part` from one mirror. Returns None, or why it did not work."""
    failure = None
    for _ in range(ATTEMPTS):
        before = _size(part)
        failure = _transfer(url, part)
        if failure is not None:
            if _size(part) > before:
                continue
            return failure
        if md5 is None or md5_of(part) == md5:
            return None
        part.unlink()
        failure = "md5 differs from the official one"
        if before == 0:  # otherwise the leftover that we resumed may be to blame: once more from the start
            return failure
    return failure


def _transfer(url: str, part: Path) -> str | None:
    """One request; appends to `part`. Returns None when the file's end was reached, else why not."""
    have = _size(part)
    try:
        response = _open(url, have)
    except HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing behind our last byte: complete, or not this file's beginning
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return None
            part.unlink()
            return _transfer(url, part)
        return f"HTTP {error.code}"
    except (OSError, HTTPException) as error:
        return _reason(error)
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            return "answers with a range that was not asked for"
        return _save(response, part, have if resumed else 0)


def _save(response: HTTPResponse, part: Path, have: int) -> str | None:
    length = response.headers.get("Content-Length")
    total = have + int(length) if length else None
    name = part.name.removesuffix(".part")
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name, file=sys.stderr, leave=False)
    with open(part, "ab" if have else "wb") as file, bar:
        while True:
            try:
                chunk = response.read1(CHUNK_BYTES)  # not read(): that loses what came before a timeout
            except (OSError, HTTPException) as error:
                return _reason(error)
            if not chunk:
                break
            file.write(chunk)
            bar.update(len(chunk))
            have += len(chunk)
    return None if total is None or have == total else f"stopped after {have} of {total} bytes"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError):
        return f"no answer in {TIMEOUT_S:g} s"
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return " ".join(str(text).split())
