"""Everything that a run needs to go on; written atomically, verified, read without unpickling foreign code.

Two generations lie in the folder. Each file ends in the digest of all that stands before it, since `torch.load` does
not notice flipped bits: what does not fit is never loaded.
"""

import contextlib
import hashlib
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from flatcl.utils.console import complain, reason
from flatcl.utils.errors import UsageError
from flatcl.utils.files import open_regular, sync, sync_folder

FILE, BEFORE = "state.pt", "state.before.pt"
FORMAT = 1
SEAL = b"sha256 "  # and 64 hexadecimal digits and a line end, after torch's file
SEAL_BYTES = len(SEAL) + 65
ZIP_END = b"PK\5\6"  # the last 22 bytes of a zip file without a comment


class _Sealing:
    """A file for `torch.save`, which cannot bear a failed write: the error is kept, and raised by `seal`."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            if self.error is None:
                self.file.write(content)
                self.digest.update(content)
        except OSError as error:
            self.error = error
        return len(content)

    def flush(self) -> None:
        pass

    def seal(self) -> None:
        self.write(SEAL + self.digest.hexdigest().encode() + b"\n")
        if self.error is not None:
            raise self.error
        sync(self.file)


def save(folder: Path, state: dict[str, Any]) -> None:
    """`state` holds tensors, numbers, strings, lists and dicts only. The last one becomes the generation before. Raises
    `OSError` where it cannot be written; the generations that are there then stay as they are."""
    folder.mkdir(exist_ok=True)  # not its parents: a run folder that was deleted stays so
    fresh = folder / f"{FILE}.{os.getpid()}.tmp"
    try:
        _write(fresh, {"format": FORMAT, **state})
        if (folder / FILE).exists():
            _keep_before(folder)
        os.replace(fresh, folder / FILE)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
    sync_folder(folder)


def _keep_before(folder: Path) -> None:
    """The present state is the generation before, too: by a second name, so that it has its own until the new one takes
    that; where the file system has no hard links, by a new one alone."""
    second = folder / f"{BEFORE}.{os.getpid()}.tmp"
    try:
        os.link(folder / FILE, second)
    except OSError:
        os.replace(folder / FILE, folder / BEFORE)
        return
    os.replace(second, folder / BEFORE)
    second.unlink(missing_ok=True)  # where both were names of the same file, `replace` has done nothing


def save_weights(file: Path, weights: dict[str, torch.Tensor]) -> None:
    """A file that `torch.load(file, weights_only=True)` reads; atomic too."""
    fresh = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        _write(fresh, weights)
        os.replace(fresh, file)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def _write(fresh: Path, content: dict[str, Any]) -> None:
    with open(fresh, "wb") as file:
        sealing = _Sealing(file)
        torch.save(content, cast(BinaryIO, sealing))
        sealing.seal()


def exists(folder: Path) -> bool:
    """Whether there is a checkpoint of any state."""
    return any((folder / name).exists() for name in (FILE, BEFORE))


def load(folder: Path, config_hash: str | None = None, repair: bool = False) -> dict[str, Any]:
    """The newest state that is whole; says so where that is the generation before. Raises `UsageError` if there is
    none, or none of the configuration with this hash. With `repair`, a damaged newest one gives way to the one that is
    loaded, so that the next `save` does not push out the only whole one."""
    damages = []
    for file in (folder / FILE, folder / BEFORE):
        if not file.exists():
            continue
        try:
            state = _read(file)
        except Exception as error:  # a damaged file fails in many ways
            damages.append(f"{file} is damaged ({reason(error)})")
            continue
        if state.get("format", 0) > FORMAT:
            raise UsageError(f"{file} was written by a newer version of this program. Use that version.")
        if config_hash not in (None, state["config_hash"]):
            raise UsageError(
                f"{file} belongs to the configuration {state['config_hash']}, but config.json is {config_hash}: it "
                "was edited, or made by an earlier version. Start a new run with --from instead."
            )
        if damages:
            complain(f"warning: {damages[0]}: the checkpoint before it, {file.name}, is used")
            if repair:
                os.replace(file, folder / FILE)
        return state
    if damages:
        raise UsageError(f"{' and '.join(damages)}. Repeat the run with --from instead.")
    raise UsageError(f"{folder / FILE} does not exist: there is nothing to continue from. Repeat the run with --from.")


def keep_last(folder: Path) -> None:
    """A run that is finished needs no second generation, unless it is the only one."""
    if (folder / FILE).exists():
        (folder / BEFORE).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _read(file: Path) -> dict[str, Any]:
    """Verified and loaded; raises whatever is wrong with it."""
    _verify(file)
    state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not isinstance(state.get("config_hash"), str):
        raise ValueError("not a checkpoint of a run")
    if not isinstance(state.get("format", 0), int):
        raise ValueError("of an unknown format")
    return state


def _verify(file: Path) -> None:
    """Raises where a byte is not as it was written."""
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        opened.seek(max(0, size - SEAL_BYTES))
        end = opened.read()
        if end.startswith(SEAL):
            opened.seek(0)
            digest, left = hashlib.sha256(), size - SEAL_BYTES
            while left > 0 and (part := opened.read(min(left, 2**20))):
                digest.update(part)
                left -= len(part)
            if left or end != SEAL + digest.hexdigest().encode() + b"\n":
                raise ValueError("its content does not match its sha256")
            return
        if end[-22:-18] != ZIP_END:
            raise ValueError("its end is missing")
        opened.seek(0)
        with zipfile.ZipFile(opened) as archive:  # of before there was a digest
            if archive.testzip() is not None:
                raise ValueError("its content does not match its CRC")
