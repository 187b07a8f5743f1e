"""The run folders below a folder and what is in their files, from an index that is never trusted over the files.

`.index.json` in the searched folder holds what was read of each run folder, and size, times and inode of the files that
it was read from: a run folder in which any of these differs is read anew. An index that is damaged, foreign, too large
or unreadable counts as none; where none can be written, everything is read each time. It may be deleted at any time.
"""

import json
import os
import stat
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

FILE, FORMAT = ".index.json", 1
FILES = ("summary.json", "config.json", "environment.json")
WORTHWHILE = 100  # run folders that had to be read; for fewer, no index is written
RECENT_NS = 2 * 10**9  # a file may change again within the file system's clock tick and look the same
MOST_BYTES = 2**30

Stamps = list[list[int] | None]  # of each of FILES; None where it is missing


def read_runs(
    folder: Path, read: Callable[[Path], Any], record: str, may_write: bool = True
) -> tuple[list[tuple[Path, Any]], list[Path], list[Path]]:
    """([(run folder, what `read` makes of it)] of all run folders below `folder`, files named `record` there, folders
    that have a configuration and no summary), each in the order of their paths. What `read` gives must fit into JSON;
    None says that it is no run. Without `may_write`, an index is used, but none is written."""
    found, records, begun = _walk(str(folder), record)
    known = _load(folder)
    contents = {path: known[path][1] for path, stamps in found if path in known and known[path][0] == stamps}
    missing = [path for path, _ in found if path not in contents]
    fresh = _Fresh(folder) if may_write and len(missing) >= WORTHWHILE else None
    try:
        for path in missing:
            contents[path] = read(folder / path)
        if fresh is not None:
            fresh.write([[path, stamps, contents[path]] for path, stamps in found
                         if contents[path] is not None and _newest(stamps) < fresh.made_ns - RECENT_NS])  # fmt: skip
    finally:
        if fresh is not None:
            fresh.remove()
    runs = [(folder / path, contents[path]) for path, _ in found]
    return runs, [folder / path for path in records], [folder / path for path in begun]


def _walk(top: str, record: str) -> tuple[list[tuple[str, Stamps]], list[str], list[str]]:
    """([(path below `top`, stamps)] of each folder that has a summary.json, paths of the records, folders with a
    config.json alone). A run folder itself is not searched: it holds many files, and no runs."""
    found, records, begun, waiting = [], [], [], [""]
    while waiting:
        path = waiting.pop()
        own = os.path.join(top, path)
        stamps = [_stamp(os.path.join(own, name)) for name in FILES]
        if stamps[0] is not None:
            found.append((path, stamps))
            if stamps[1] is not None:
                continue
        elif stamps[1] is not None:
            begun.append(path)
        with suppress(OSError), os.scandir(own) as entries:  # what may not be read is passed over
            for entry in entries:
                if entry.name == record:
                    records.append(os.path.join(path, entry.name))
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append(os.path.join(path, entry.name))
    found.sort(key=lambda item: item[0].split(os.sep))
    return found, *(sorted(paths, key=lambda path: path.split(os.sep)) for paths in (records, begun))


def _stamp(file: str) -> list[int] | None:
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _newest(stamps: Stamps) -> int:
    """When a run folder's files changed last, in nanoseconds."""
    return max(max(stamp[1:3]) for stamp in stamps if stamp is not None)


def _load(folder: Path) -> dict[str, tuple[Stamps, Any]]:
    try:
        with open(folder / FILE, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
                return {}
            header, _, body = file.read().partition(b"\n")
        if json.loads(header) != {"format": FORMAT, "crc32": zlib.crc32(body)}:
            return {}
        return {path: (stamps, content) for path, stamps, content in json.loads(body)}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe that lies in the file's place without waiting for its other end."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


class _Fresh:
    """An index in the making, under a name of its own. `made_ns`: when it was begun, by the clock of the file system,
    which may not be ours. Where nothing can be written, it stays away."""

    def __init__(self, folder: Path):
        self.target, self.made_ns = folder / FILE, 0
        self.path = folder / f"{FILE}.{os.getpid()}.{time.monotonic_ns()}.new"
        with suppress(OSError), open(self.path, "xb") as file:
            self.made_ns = os.fstat(file.fileno()).st_mtime_ns

    def write(self, entries: list) -> None:
        if self.made_ns == 0:
            return
        with suppress(OSError, ValueError, RecursionError):
            body = json.dumps(entries).encode()
            header = json.dumps({"format": FORMAT, "crc32": zlib.crc32(body)}).encode()
            self.path.write_bytes(header + b"\n" + body)
            os.replace(self.path, self.target)

    def remove(self) -> None:
        """What was not finished; nothing after `write`."""
        with suppress(OSError):
            os.unlink(self.path)
