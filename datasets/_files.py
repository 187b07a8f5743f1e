"""Readers of the data sets' files: idx (MNIST), pickled batches (CIFAR), JPEGs (Tiny-ImageNet).

Every reader returns `((train_x, train_y), (test_x, test_y))`, a `Loaded`: images uint8 (N, C, H, W) contiguous, labels
int64 (N,).
Layout, addresses and checksums are torchvision's where it has them, so files that its users already have are found.
A file with the official number of rows must be the official file, bit for bit, or one that is known to have the same
rows in another order, which warns; other numbers are a made set and warn.
All problems are a DataError of one line.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import lzma
import math
import os
import re
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flatcl.datasets import _pickled
from flatcl.datasets._cache import cache_folders, cached, write_cache
from flatcl.utils.download import fetch, md5_of
from flatcl.utils.errors import DataError

Rows = tuple[Tensor, Tensor]


class Loaded(tuple[Rows, Rows]):
    """(train, test), and whether they are the official data: all of it, row for row."""

    is_official: bool

    def __new__(cls, train: Rows, test: Rows, is_official: bool) -> "Loaded":
        found = super().__new__(cls, (train, test))
        found.is_official = is_official
        return found

    def __getnewargs__(self) -> tuple[Rows, Rows, bool]:
        return (*self, self.is_official)


# Nothing is read beyond these sizes, so that a damaged or hostile file cannot fill the memory.
MAX_FILE_BYTES = 512 << 20  # of one file, unpacked; the largest of the official ones, CIFAR's archives, have 178 MiB
MAX_TEXT_BYTES = 16 << 20  # Tiny-ImageNet's annotations have 0.4 MiB
MAX_IMAGE_BYTES = 1 << 20  # a 64x64 JPEG has some 2 KiB
CHUNK_BYTES = 1 << 20

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
MNIST_MD5 = {  # of the uncompressed files; torchvision lists only those of the .gz
    "MNIST": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}
MNIST_ROWS = {"train": 60000, "t10k": 10000}

# CIFAR-100 as it can be put together from public PNG files: it has all images and labels of the official files, but the
# order of these rows among themselves, whose PNG files have no number, is published nowhere.
REORDERED = {
    "996a95375358b9a9502103a334e63867": "100 of its 50,000 rows",
    "8ff34ef6a7d397116c2d6ad2dccafc6e": "23 of its 10,000 rows",
}

TINY = "tiny-imagenet-200"
TINY_URLS = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "https://cs231n.stanford.edu/tiny-imagenet-200.zip")
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"  # as public code quotes it, from memory; torchvision does not list it
TINY_ROWS = (100000, 10000)
TINY_ARRAYS = ("train_x", "train_y", "test_x", "test_y")
CHUNK_IMAGES = 64


def one_line(load):
    """What the operating system refuses (permissions, a broken disk) becomes a DataError too."""

    @functools.wraps(load)
    def guarded(root: Path, *args):
        try:
            return load(Path(root), *args)
        except OSError as error:
            raise DataError(
                f"{error.filename or root}: cannot be read ({error.strerror or error}); "
                "check that it exists, its permissions and its disk"
            ) from error

    return guarded


def loaded(where: Path, train: Rows, test: Rows, official: Sequence[int]) -> Loaded:
    """Warns where the numbers of rows are not the official ones."""
    got = len(train[1]), len(test[1])
    if got != tuple(official):
        message = (
            f"{where}: {got[0]} train and {got[1]} test images, the official data has {official[0]} and {official[1]}"
        )
        warnings.warn(f"{message}: this is not the official data set", stacklevel=4)
    return Loaded(train, test, got == tuple(official))


def check_archive(path: Path, official: str) -> None:
    """An archive that holds the official number of rows; an unpacked folder has no checksum."""
    if path.suffix == ".zip" and (got := md5_of(path)) != official:
        raise DataError(f"{path}: corrupt (md5 {got}, officially {official}); delete it and start again to fetch it")


def check_md5(data: bytes, official: str, path: Path) -> None:
    got = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if got != official:
        raise DataError(f"{path}: corrupt (md5 {got}, officially {official}); delete it and start again to fetch it")


def _read(file: BinaryIO, where: Path | str, limit: int) -> bytes:
    """All that is in an open file. What is longer than any official file may be is a DataError."""
    content = io.BytesIO()
    while chunk := file.read(min(CHUNK_BYTES, limit + 1 - content.tell())):
        content.write(chunk)
        if content.tell() > limit:
            raise DataError(f"{where}: more than {limit >> 20} MiB, refused; delete it and fetch the official file")
    return content.getvalue()


def read_file(path: Path, limit: int) -> bytes:
    with open(path, "rb") as file:
        return _read(file, path, limit)


def _gunzip(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            return _read(file, path, MAX_FILE_BYTES)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged archive ({error}); delete it and start again to fetch it") from error


def _keep(path: Path, data: bytes) -> None:
    """Write a file atomically; a folder that cannot be written only costs the same work at the next start."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------- MNIST


@one_line
def load_mnist(root: Path, name: str) -> Loaded:
    """MNIST or FashionMNIST (`name`) from `root/<name>/raw`, downloaded if absent.

    Returns ((train_x, train_y), (test_x, test_y)): x uint8 (N, 1, 28, 28), y int64 (N,) in 0..9. Raises DataError.
    """
    raw = root / name / "raw"
    files = MNIST_MD5[name]
    _fetch_mnist(raw, name, [file for file in files if _mnist_source(raw, name, file) is None])
    sources = {file: _mnist_source(raw, name, file) for file in files}
    contents = {
        file: _gunzip(path) if path.suffix == ".gz" else read_file(path, MAX_FILE_BYTES)
        for file, path in sources.items()
    }
    train, test = (_mnist_split(part, files, sources, contents) for part in MNIST_ROWS)
    for file, path in sources.items():
        if path == raw / f"{file}.gz":
            _keep(raw / file, contents[file])  # only now, when it is known to be sound
    return loaded(raw, train, test, tuple(MNIST_ROWS.values()))


def missing_mnist(root: Path, name: str) -> str | None:
    """What `load_mnist` would have to download, and where to put it by hand; None if nothing. Opens no file."""
    raw = Path(root) / name / "raw"
    files = [f"{file}.gz" for file in MNIST_MD5[name] if _mnist_source(raw, name, file) is None]
    return f"put {', '.join(files)} into {raw}" if files else None


def _mnist_source(raw: Path, name: str, file: str) -> Path | None:
    candidates = [raw / file, raw / f"{file}.gz"]
    if name == "FashionMNIST":
        candidates.append(DEBIAN_FASHION_MNIST / f"{file}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _fetch_mnist(raw: Path, name: str, missing: Sequence[str]) -> None:
    if not missing:
        return
    import torchvision.datasets

    official = getattr(torchvision.datasets, name)
    md5s = dict(official.resources)
    what = f"{name} ({len(missing)} missing: {', '.join(file + '.gz' for file in missing)})"
    for file in missing:
        archive = f"{file}.gz"
        fetch([mirror + archive for mirror in official.mirrors], raw / archive, md5s[archive], what)


def _mnist_split(
    part: str, md5s: Mapping[str, str], sources: Mapping[str, Path], contents: Mapping[str, bytes]
) -> Rows:
    arrays = []
    for file, n_dims in ((f"{part}-images-idx3-ubyte", 3), (f"{part}-labels-idx1-ubyte", 1)):
        array = _parse_idx(contents[file], sources[file], n_dims)
        if len(array) == MNIST_ROWS[part]:
            check_md5(contents[file], md5s[file], sources[file])
        arrays.append(array)
    images, labels = arrays
    where = sources[f"{part}-images-idx3-ubyte"]
    if images.shape[1:] != (28, 28):
        raise DataError(f"{where}: images are {images.shape[1]}x{images.shape[2]}, not 28x28; fetch the official file")
    if len(images) != len(labels):
        raise DataError(f"{where}: {len(images)} images but {len(labels)} labels; delete and fetch both again")
    if labels.max() > 9:
        raise DataError(f"{sources[f'{part}-labels-idx1-ubyte']}: label {labels.max()}, not in 0..9; fetch it again")
    return torch.from_numpy(images[:, None].copy()), torch.from_numpy(labels.astype(np.int64))


def _parse_idx(data: bytes, path: Path, n_dims: int) -> np.ndarray:
    """uint8 array with `n_dims` dimensions. The idx magic is 0x0800 (unsigned bytes) plus the number of dimensions."""
    start = 4 * (1 + n_dims)
    remedy = "delete it and start again to fetch it"
    if len(data) < start:
        raise DataError(f"{path}: truncated ({len(data)} bytes, its header needs {start}); {remedy}")
    magic, *shape = np.frombuffer(data, ">u4", 1 + n_dims).tolist()
    if magic != 2048 + n_dims:
        raise DataError(f"{path}: not an idx file of this kind (magic {magic}, should be {2048 + n_dims}); {remedy}")
    size = start + math.prod(shape)
    if len(data) != size:
        problem = "truncated" if len(data) < size else "too long"
        raise DataError(f"{path}: {problem} ({len(data)} bytes, its header says {size}); {remedy}")
    if shape[0] == 0:
        raise DataError(f"{path}: has no rows; {remedy}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


# ---------------------------------------------------------------------------------------------------------- CIFAR


@one_line
def load_cifar(root: Path, name: str) -> Loaded:
    """cifar10 or cifar100 (`name`) from torchvision's folder or archive in `root`, downloaded if absent.

    Returns ((train_x, train_y), (test_x, test_y)): x uint8 (N, 3, 32, 32), y int64 (N,) in 0..9 or 0..99 (fine labels).
    Raises DataError.
    """
    official, folder, archive, needed = _cifar_places(root, name)
    unpacked = all((folder / file).is_file() for file in needed)
    if unpacked:
        contents = {file: read_file(folder / file, MAX_FILE_BYTES) for file in needed}
    else:
        if not archive.is_file():
            fetch([official.url], archive, official.tgz_md5, name)
        contents = _untar(archive, official.base_folder, needed, official.meta["filename"])
    where = folder if unpacked else archive
    train, is_train_official = _cifar_split(where, dict(official.train_list), contents, name, 50000)
    test, is_test_official = _cifar_split(where, dict(official.test_list), contents, name, 10000)
    if not unpacked:
        for file, data in contents.items():
            _keep(folder / file, data)  # only now, when it is known to be sound
    found = loaded(where, train, test, (50000, 10000))
    found.is_official = is_train_official and is_test_official
    return found


def missing_cifar(root: Path, name: str) -> str | None:
    """What `load_cifar` would have to download, and where to put it by hand; None if nothing. Opens no file."""
    _, folder, archive, needed = _cifar_places(Path(root), name)
    if archive.is_file() or all((folder / file).is_file() for file in needed):
        return None
    return f"put {archive.name} into {archive.parent}"


def _cifar_places(root: Path, name: str) -> tuple[Any, Path, Path, list[str]]:
    """(torchvision's class, unpacked folder, archive, names of the files in the folder)."""
    import torchvision.datasets

    official = getattr(torchvision.datasets, name.upper())
    needed = [file for file, _ in (*official.train_list, *official.test_list)]
    return official, root / official.base_folder, root / official.filename, needed


def _cifar_split(
    where: Path, md5s: Mapping[str, str], contents: Mapping[str, bytes], name: str, official_rows: int
) -> tuple[Rows, bool]:
    """Images and labels, and whether they are the official ones in the official order."""
    key, n_classes = ("labels", 10) if name == "cifar10" else ("fine_labels", 100)
    batches, is_official = [], True
    for file, md5 in md5s.items():
        record, labels = _cifar_batch(contents[file], where / file, key, n_classes)
        has_all = len(labels) == official_rows // len(md5s)
        is_official &= has_all and _is_in_order(contents[file], md5, where / file)
        images = np.frombuffer(record.data, np.uint8).reshape(record.shape, order=record.order)
        batches.append((images.reshape(-1, 3, 32, 32), np.array(labels, np.int64)))
    images, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*batches, strict=True))
    return (images.contiguous(), labels), is_official


def _is_in_order(data: bytes, official: str, path: Path) -> bool:
    """Whether this is the official file; else it must be one that is known to have the same rows in another order, and
    that is said."""
    reordered = REORDERED.get(hashlib.md5(data, usedforsecurity=False).hexdigest())
    if reordered is None:
        check_md5(data, official, path)
        return True
    warnings.warn(
        f"{path}: has all images and labels of the official file, but {reordered} (of beaver, shrew and skunk) are "
        "in another order: numbers differ a little from those on the official file",
        stacklevel=5,
    )
    return False


def _cifar_batch(data: bytes, path: Path, key: str, n_classes: int) -> tuple[_pickled.Array, list[int]]:
    """Images (N, 3072) and N labels as one pickled batch states them; no array is built yet."""
    remedy = "delete it (and its archive) and start again to fetch it"
    try:
        content = _pickled.read(data)
    except _pickled.Refused as error:
        raise DataError(f"{path}: damaged or unsafe pickle, refused ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a CIFAR batch; {remedy}")
    content = {field.decode("latin1") if isinstance(field, bytes) else field: value for field, value in content.items()}
    images, labels = content.get("data"), content.get(key)
    if not (isinstance(images, _pickled.Array) and images.shape[1:] == (3072,)):
        raise DataError(f"{path}: its 'data' is not a uint8 array (N, 3072); {remedy}")
    if not (isinstance(labels, list) and len(labels) == images.shape[0] > 0):
        raise DataError(f"{path}: its '{key}' are not a list of {images.shape[0]} labels, at least one; {remedy}")
    if not all(isinstance(label, int) and 0 <= label < n_classes for label in labels):
        raise DataError(f"{path}: its '{key}' are not all integers in 0..{n_classes - 1}; {remedy}")
    return images, labels


def _untar(archive: Path, folder: str, needed: Sequence[str], meta: str) -> dict[str, bytes]:
    """Contents of the expected regular files, by bare name. Nothing else in the archive is ever touched.

    Reads the plain headers itself (POSIX ustar, 512 bytes each): CIFAR needs no links, long names and sparse files, and
    with those a small archive can keep `tarfile` busy for ever.
    """
    remedy = "delete it and start again to fetch it"
    data, at, contents = _gunzip(archive), 0, {}
    while any(header := data[at : at + 512]):  # zeros mark the end
        size, checksum = _octal(header[124:136]), _octal(header[148:156])
        if size is None or checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise DataError(f"{archive}: damaged archive (there is no member at byte {at:,} of the tar); {remedy}")
        start = at + 512
        if start + size > len(data):
            raise DataError(f"{archive}: damaged archive (the tar ends too early); {remedy}")
        path = PurePosixPath(header[:100].partition(b"\0")[0].decode("latin-1"))
        if header[156:157] in b"0\0" and str(path.parent) == folder and path.name in (*needed, meta):
            contents[path.name] = data[start : start + size]
        at = start + -(-size // 512) * 512
    missing = [file for file in needed if file not in contents]
    if missing:
        raise DataError(f"{archive}: {folder}/{missing[0]} is missing; {remedy}")
    return contents


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else None


# -------------------------------------------------------------------------------------------------- Tiny-ImageNet


@one_line
def load_tinyimagenet(root: Path) -> Loaded:
    """Tiny-ImageNet from `root/tiny-imagenet-200.zip` or `root/tiny-imagenet-200/`, downloaded if neither is there.

    The decoded images are kept in `root/tiny-imagenet-200-cache/` (or under ~/.cache/flatcl) for the next start.
    Returns ((train_x, train_y), (test_x, test_y)): x uint8 (N, 3, 64, 64), y int64 (N,), the line of wnids.txt; test is
    the official validation split, whose labels are public. Raises DataError.
    """
    archive, caches, source = root / f"{TINY}.zip", _tiny_caches(root), _tiny_source(root)
    fingerprint = fingerprint_of(source)  # taken before reading: what changes meanwhile is read again next time
    arrays = cached(caches, TINY_ARRAYS, fingerprint)
    if arrays is None:
        if source is None:
            fetch(TINY_URLS, archive, TINY_MD5, "Tiny-ImageNet")
            source, fingerprint = archive, fingerprint_of(archive)
        arrays = _decode_source(source)
        write_cache(caches, arrays, fingerprint)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    train, test = ((tensors[f"{part}_x"], tensors[f"{part}_y"]) for part in ("train", "test"))
    return loaded(source or caches[0], train, test, TINY_ROWS)


class ZipSource:
    """Members of a zip by their path below `folder` (`tiny-imagenet-200/`), read in place: nothing is extracted."""

    def __init__(self, path: Path, folder: str):
        self.path, self.folder, self.remedy = path, folder, "delete the zip and fetch it again"
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
            raise DataError(f"{path}: truncated or not a zip ({error}); {self.remedy}") from error
        self.names = set()
        for name in self._zip.namelist():
            if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                raise DataError(f"{path}: refused: its member {name!r} lies outside the folder; {self.remedy}")
            if name.startswith(folder):
                self.names.add(name.removeprefix(folder))

    def read(self, name: str, limit: int) -> bytes:
        try:
            with self._zip.open(f"{self.folder}{name}") as file:
                return _read(file, f"{self.path}: member {self.folder}{name}", limit)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError) as error:
            raise DataError(f"{self.path}: member {self.folder}{name} is damaged ({error}); {self.remedy}") from error

    def close(self) -> None:
        self._zip.close()


class FolderSource:
    """The same for an extracted folder."""

    def __init__(self, path: Path, folder: str):
        self.path, self.folder, self.remedy = path, folder, "extract the zip again"
        self.names = {name for name, _ in walk(path)}

    def read(self, name: str, limit: int) -> bytes:
        return read_file(self.path / name, limit)

    def close(self) -> None:
        pass


def open_source(path: Path, folder: str) -> ZipSource | FolderSource:
    """`folder`, with a / at its end, as it is named in the zip."""
    return (ZipSource if path.suffix == ".zip" else FolderSource)(path, folder)


def obtained(path: Path, archive: Path, url: str, md5: str, what: str) -> Path:
    """`path`, or where it is not there, the archive that holds it, which is downloaded if need be."""
    if path.exists():
        return path
    if not archive.is_file():
        fetch([url], archive, md5, what)
    return archive


def walk(folder: Path) -> Iterator[tuple[str, os.DirEntry]]:
    """(path below `folder`, entry) of every file. Unlike rglob, raises where a folder cannot be read."""
    stack = [""]
    while stack:
        below = stack.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                if entry.is_dir():
                    stack.append(f"{below}{entry.name}/")
                else:
                    yield below + entry.name, entry


def _decode_source(path: Path) -> dict[str, np.ndarray]:
    source = open_source(path, f"{TINY}/")
    try:
        wnids = _tiny_text(source, "wnids.txt").split()
        if len(wnids) != 200 or len(set(wnids)) != 200:
            raise DataError(f"{path}: wnids.txt lists {len(set(wnids))} classes, not 200; {source.remedy}")
        classes = {wnid: index for index, wnid in enumerate(wnids)}
        arrays = {}
        for part, rows in (("train", _tiny_train(source, classes)), ("test", _tiny_val(source, classes))):
            absent = set(wnids) - {wnids[label] for _, label in rows}
            if absent:
                raise DataError(f"{path}: no {part} images of {_some(absent)}; {source.remedy}")
            arrays[f"{part}_y"] = np.array([label for _, label in rows], np.int64)
            arrays[f"{part}_x"] = decode_source(source, [name for name, _ in rows], 64, _decode_image, "64x64 JPEG")
        return arrays
    finally:
        source.close()


def missing_tinyimagenet(root: Path) -> str | None:
    """What `load_tinyimagenet` would have to download, and where to put it by hand; None if nothing. Opens no file."""
    root = Path(root)
    if _tiny_source(root) is not None or any((cache / "meta.json").is_file() for cache in _tiny_caches(root)):
        return None
    return f"put {TINY}.zip into {root}"


def _tiny_source(root: Path) -> Path | None:
    archive, folder = root / f"{TINY}.zip", root / TINY
    return archive if archive.is_file() else folder if folder.is_dir() else None


def _tiny_caches(root: Path) -> tuple[Path, Path]:
    return cache_folders(root / f"{TINY}-cache", root / TINY)


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{len(names)} classes ({shown}, ...)" if len(names) > 3 else shown


def _tiny_text(source: ZipSource | FolderSource, name: str) -> str:
    if name not in source.names:
        raise DataError(f"{source.path}: {TINY}/{name} is missing; {source.remedy}")
    return source.read(name, MAX_TEXT_BYTES).decode("utf-8", "replace")


def _tiny_train(source: ZipSource | FolderSource, classes: Mapping[str, int]) -> list[tuple[str, int]]:
    """(member, class) in the order of class and number, which is the same for zip and folder."""
    pattern = re.compile(r"train/([^/]+)/images/\1_(\d+)\.JPEG")
    found = (pattern.fullmatch(name) for name in source.names)
    known = (match for match in found if match and match[1] in classes)
    return [(name, label) for label, _, name in sorted((classes[m[1]], int(m[2]), m[0]) for m in known)]


def _tiny_val(source: ZipSource | FolderSource, classes: Mapping[str, int]) -> list[tuple[str, int]]:
    """(member, class) in the order of the annotations. Every image needs a line and every line an image."""
    rows = {}
    for line in _tiny_text(source, "val/val_annotations.txt").splitlines():
        file, _, rest = line.partition("\t")
        wnid, member = rest.partition("\t")[0], f"val/images/{file}"
        if wnid not in classes:
            raise DataError(f"{source.path}: val_annotations.txt: no known class in {line!r}; {source.remedy}")
        if member not in source.names:
            raise DataError(f"{source.path}: {TINY}/{member} is annotated but missing; {source.remedy}")
        rows[member] = classes[wnid]
    for name in sorted(source.names):
        if name.startswith("val/images/") and name.endswith(".JPEG") and name not in rows:
            raise DataError(f"{source.path}: {TINY}/{name} is not in val_annotations.txt; {source.remedy}")
    return list(rows.items())


def decode_source(
    source: ZipSource | FolderSource, names: Sequence[str], size: int, decode: Callable[[bytes], np.ndarray], what: str
) -> np.ndarray:
    """uint8 (N, 3, size, size): what `decode` makes of these files' bytes. `what` says what they are, for people."""

    images = np.empty((len(names), 3, size, size), np.uint8)

    def decode_row(row: int) -> None:
        try:
            images[row] = decode(source.read(names[row], MAX_IMAGE_BYTES))
        except (DataError, PermissionError):
            raise
        except Exception as error:  # on damaged data a decoder can raise nearly anything
            where = f"{source.path}: {source.folder}{names[row]}"
            raise DataError(f"{where} is not a {what} ({error}); {source.remedy}") from error

    in_threads(decode_row, len(names), source.path.name)
    return images


def in_threads(work: Callable[[int], None], number: int, what: str) -> None:
    """work(0) ... work(number - 1), with a progress bar. Threads suffice, because Pillow and zlib release the
    interpreter's lock."""

    def work_on(start: int) -> int:
        rows = range(start, min(start + CHUNK_IMAGES, number))
        for row in rows:
            work(row)
        return len(rows)

    bar = tqdm(total=number, unit="image", desc=what, file=sys.stderr, leave=False)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for count in pool.map(work_on, range(0, number, CHUNK_IMAGES)):
            bar.update(count)


def _decode_image(data: bytes) -> np.ndarray:
    """One JPEG as uint8 (3, 64, 64); greyscale is spread over the three channels. Raises ValueError for other sizes."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        if image.size != (64, 64):
            raise ValueError(f"image is {image.width}x{image.height}, not 64x64")
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def fingerprint_of(source: Path | None) -> dict[str, Any] | None:
    """What tells one source from another without reading it: 250 MB of zip, or 120 000 files."""
    if source is None:
        return None
    if not source.is_dir():
        stat = source.stat()
        return {"kind": source.suffix[1:], "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    sizes = [entry.stat().st_size for _, entry in walk(source)]
    return {"kind": "folder", "files": len(sizes), "bytes": sum(sizes)}
