"""Decoded images kept for the next start: arrays in a folder, with a description that tells whether they still hold.

A cache is used only where its format, the fingerprint of its source and the checksum of each array are right; else it
is built again. Where it cannot be written, only the work at each start is lost.
"""

import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flatcl.utils.files import parse_json, read_text

VERSION = 1
LONGEST_META = 16 << 20  # bytes

Arrays = dict[str, np.ndarray]


def cache_folders(folder: Path, source: Path) -> tuple[Path, Path]:
    """`folder`; else, where that cannot be written, one in the home folder under a key of the source's path."""
    return folder, Path.home() / ".cache" / "flatcl" / f"{folder.name.removesuffix('-cache')}-{key_of(source)}"


def key_of(path: Path) -> str:
    """16 hexadecimal digits that stand for a path."""
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]


def kept(
    caches: Sequence[Path], names: Sequence[str], fingerprint: Mapping[str, Any], make: Callable[[], Arrays]
) -> Arrays:
    """The arrays of these names, from a cache, or else made and kept."""
    arrays = cached(caches, names, fingerprint)
    if arrays is None:
        arrays = make()
        write_cache(caches, arrays, fingerprint)
    return arrays


def cached(caches: Sequence[Path], names: Sequence[str], fingerprint: Mapping[str, Any] | None) -> Arrays | None:
    """Arrays of the first sound cache of this source (None: of any source), or None; says why one is not used."""
    for cache in caches:
        try:
            if (cache / "meta.json").is_file():
                return _read_cache(cache, names, fingerprint)
        except (OSError, ValueError, EOFError, KeyError, TypeError, MemoryError, RecursionError) as error:
            print(f"{cache}: not used ({' '.join(str(error).split())}); it will be built again", file=sys.stderr)
    return None


def _read_cache(cache: Path, names: Sequence[str], fingerprint: Mapping[str, Any] | None) -> Arrays:
    meta = parse_json(read_text(cache / "meta.json", LONGEST_META))
    if meta["version"] != VERSION:
        raise ValueError(f"format {meta['version']}, this program writes {VERSION}")
    if fingerprint is not None and meta["source"] != fingerprint:
        raise ValueError("its source has changed")
    arrays = {}
    for name in names:
        array = np.load(cache / f"{name}.npy", allow_pickle=False)
        if _describe(array) != meta["arrays"][name]:
            raise ValueError(f"{name}.npy is damaged")
        arrays[name] = array
    return arrays


def _describe(array: np.ndarray) -> dict[str, Any]:
    # crc32 finds damage as well as sha256 would, and checks the 1.2 GB in about a second.
    contiguous = np.ascontiguousarray(array)
    return {"shape": list(array.shape), "dtype": str(array.dtype), "crc32": zlib.crc32(contiguous.data)}


def write_cache(caches: Sequence[Path], arrays: Arrays, fingerprint: Mapping[str, Any]) -> None:
    meta = {
        "version": VERSION,
        "source": fingerprint,
        "arrays": {name: _describe(array) for name, array in arrays.items()},
    }
    problem = None
    for cache in caches:
        temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
        aside = cache.with_name(f"{cache.name}.{os.getpid()}.old")
        try:
            temporary.mkdir(parents=True)
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array)
            (temporary / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
            if cache.exists():
                os.replace(cache, aside)  # a folder cannot be replaced unless it is empty
            os.replace(temporary, cache)
            return
        except OSError as error:
            problem = error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)
    print(f"{caches[0]}: cannot be written ({problem}); the images are decoded at every start", file=sys.stderr)
