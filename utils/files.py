"""Files that are whole at any moment, and careful reading of files that may be damaged, foreign or endless."""

import contextlib
import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from flatcl.utils.errors import UsageError

LONGEST = 2**28  # bytes of a file of ours that is read whole: the matrices of 1,000 tasks take some 50 MB


def write_json(path: Path, content: Any, durable: bool = False) -> None:
    write_text(path, json_text(content) + "\n", durable)


def json_text(content: Any, indent: str = "\n") -> str:
    """A line for each key, and one for each row of a matrix: read at a glance, and written by json's C encoder."""
    inner = indent + " "
    if isinstance(content, dict) and content:
        parts = [f"{json.dumps(name)}: {json_text(value, inner)}" for name, value in content.items()]
        return "{" + inner + f",{inner}".join(parts) + indent + "}"
    if isinstance(content, list) and any(isinstance(item, list | dict) for item in content):
        return "[" + inner + f",{inner}".join(json_text(item, inner) for item in content) + indent + "]"
    return json.dumps(content, allow_nan=False)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Atomically: a reader sees the old file or the new one, and a failed write leaves the old one and nothing else.
    With `durable`, it is on the disk when this returns, and survives a power failure."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                sync(file)
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def printable(value: object) -> str:
    """As text that UTF-8 has: a note may have been typed in another encoding."""
    return str(value).encode("utf-8", "replace").decode("utf-8")


def sync(file) -> None:
    """Waits until an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_regular(path: str | os.PathLike):
    """An ordinary file, opened for reading bytes. Raises `ValueError` for a device or a pipe, which may never end."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not an ordinary file")
    return open(descriptor, "rb")


def read_text(path: str | os.PathLike, longest: int = LONGEST) -> str:
    """An UTF-8 file. Raises `OSError`, or `ValueError` where it is longer, a device, or no text."""
    with open_regular(path) as file:
        content = file.read(longest + 1)
    if len(content) > longest:
        raise ValueError(f"more than {longest:,} bytes")
    return content.decode("utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """Raises `OSError`, or `ValueError` for all that is not JSON."""
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """As `json.loads`, but strict: NaN, infinite numbers and too deep a nesting are `ValueError`s."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"{word[:20]} is too large")
    return value


def sha256_of(path: str | os.PathLike) -> str:
    """Of a file's bytes, hexadecimal. Raises `OSError`, or `ValueError` for a device or a pipe."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def user_path(text: str | os.PathLike) -> Path:
    """A path that a user gave, ~ replaced. Raises `UsageError` for what can be no path."""
    text = os.fspath(text)
    try:
        if is_writable(text):
            return Path(text).expanduser()
    except RuntimeError:  # ~ and a user that does not exist
        pass
    raise UsageError(f"{text!r} cannot be a path. Check its characters, or the user after ~.")


def is_writable(text: str) -> bool:
    """Whether the system can take these characters: no NUL, no half of a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
