"""Folders of images of any kind, one sub-folder a class: uint8 RGB images of one size, decoded once and then cached."""

import errno
import hashlib
import io
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flatcl.datasets._cache import cache_folders, kept, key_of
from flatcl.datasets._files import MAX_FILE_BYTES, in_threads, one_line, read_file, walk
from flatcl.utils.errors import DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # Pillow's names of them; nothing else is tried
MAX_PIXELS = 80_000_000  # of one image: a small file can unpack to any size
SHOWN = 5  # names in a message
VERSION = 1  # raised when the same files give other pixels than before


def named(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(sorted(names)[:SHOWN]) + more


def has_sub_folders(folder: Path) -> bool:
    return any(path.is_dir() for path in folder.iterdir())


@one_line
def sub_folders(folder: Path) -> list[str]:
    """Their names, sorted, without hidden ones. Raises `DataError` where there are none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder. Give one that has a sub-folder for each class.")
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: it has no sub-folders. Give a folder that has one for each class.")
    return names


def parts_of(folder: Path) -> tuple[Path, Path | None]:
    """(the folder of training images, that of test images or None where they are to be split off)."""
    names = sub_folders(folder)
    test = next((name for name in ("val", "test") if name in names), None)
    if "train" in names and test is not None:
        return folder / "train", folder / test
    if names == ["train"]:
        raise DataError(
            f"{folder}: it has train/, but neither val/ nor test/. Add one of them, or give {folder / 'train'}: "
            "--val_fraction of its images is then held out."
        )
    return folder, None


def check_same(classes: Sequence[str], where: Path, others: Sequence[str], there: Path) -> None:
    """Raises `DataError` unless both folders have the same classes."""
    sides = [(there, set(classes) - set(others)), (where, set(others) - set(classes))]
    lacking = [f"{folder} lacks {named(names)}" for folder, names in sides if names]
    if lacking:
        raise DataError(f"{where} and {there} must have the same classes: {'; '.join(lacking)}. Add or remove them.")


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """{path below `folder`: (bytes, time of its last change in ns)} of its images, sorted; without hidden ones. A link
    that leads nowhere has zeros."""
    found = {}
    for name, entry in walk(folder):
        if name.lower().endswith(EXTENSIONS) and not any(part.startswith(".") for part in name.split("/")):
            try:
                found[name] = (entry.stat().st_size, entry.stat().st_mtime_ns)
            except FileNotFoundError:
                found[name] = (0, 0)
    return dict(sorted(found.items()))


@one_line
def digest(folder: Path) -> str:
    """16 hexadecimal digits over the names and sizes of all images in a folder."""
    return _digest({name: size for name, (size, _) in _files(folder).items()})


def _digest(files: Mapping[str, object]) -> str:
    lines = b"".join(os.fsencode(f"{name}\0{stamp}\n") for name, stamp in files.items())
    return hashlib.sha256(lines).hexdigest()[:16]


@one_line
def read_folder(
    folder: Path, classes: Sequence[str], size: tuple[int, int], root: Path
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images uint8 (N, 3, H, W), labels int64 (N,), the place in `classes`, and names of the files, sorted.

    The shorter side is resized to `size` (H, W) and the middle cut out. What was decoded is kept in `root/cache`. Files
    that cannot be decoded are left out, with one warning. Raises `DataError` for a class without any image.
    """
    place = {name: label for label, name in enumerate(classes)}
    files = {name: stamp for name, stamp in _files(folder).items() if "/" in name and name.split("/")[0] in place}
    names, reasons = list(files), {}
    shown = f"{folder.name}-{size[0]}x{size[1]}"
    caches = cache_folders(root / "cache" / f"{shown}-{key_of(folder)}", folder)
    fingerprint = {"kind": "images", "version": VERSION, "digest": _digest(files), "size": list(size)}
    arrays = kept(caches, ("images", "rows"), fingerprint, lambda: _decode(folder, names, size, reasons))
    found = [names[row] for row in arrays["rows"]]
    labels = np.array([place[name.split("/")[0]] for name in found], np.int64)
    _report_broken(folder, sorted(files.keys() - set(found)), len(files), reasons)
    empty = [classes[label] for label in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)]
    if empty:
        raise DataError(f"{folder}: {_without_images(folder, empty)}. Add some, or remove the folder.")
    return arrays["images"], labels, found


def _without_images(folder: Path, empty: Sequence[str]) -> str:
    others = sum(1 for name in empty for _ in walk(folder / name))
    note = f" ({others} other or broken file(s); images are {', '.join(EXTENSIONS)})" if others else ""
    return f"no image of the class(es) {named(empty)} can be read{note}"


def _report_broken(folder: Path, broken: Sequence[str], number: int, reasons: Mapping[str, str]) -> None:
    if broken:
        shown = [f"{name} ({reasons[name]})" if name in reasons else name for name in broken]
        warnings.warn(
            f"{folder}: {len(broken)} of {number} images cannot be read and are left out: {named(shown)}", stacklevel=3
        )


def _decode(
    folder: Path, names: Sequence[str], size: tuple[int, int], reasons: dict[str, str]
) -> dict[str, np.ndarray]:
    """'images' uint8 (N, 3, H, W) of the files that can be decoded, and 'rows' int64 (N,): their places in `names`. Why
    the others cannot be is written into `reasons`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        images = np.empty((len(names), 3, *size), np.uint8)
    except MemoryError:
        needed = f"{len(names)} images of {size[0]}x{size[1]} need {3 * len(names) * size[0] * size[1] / 2**30:.1f} GiB"
        raise DataError(f"{folder}: {needed}, more memory than is free. Give a smaller --image_size.") from None

    def decode_row(row: int) -> None:
        try:
            image = rgb(read_file(folder / names[row], MAX_FILE_BYTES))
            fitted = ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR)
            images[row] = np.asarray(fitted).transpose(2, 0, 1)
        except UnidentifiedImageError:
            reasons[names[row]] = "no image of a known type"
        except Exception as error:  # on damaged data a decoder can raise nearly anything
            if isinstance(error, OSError) and error.errno not in (
                None,
                errno.ENOENT,
            ):  # the disk's, which may pass: not the image's
                raise
            reasons[names[row]] = " ".join(str(getattr(error, "strerror", None) or error).split())[:80]

    in_threads(decode_row, len(names), folder.name)
    rows = np.array([row for row, name in enumerate(names) if name not in reasons], np.int64)
    return {"images": images if not reasons else images[rows], "rows": rows}


def rgb(data: bytes, formats: Sequence[str] = FORMATS):
    """A file's bytes as a PIL image, RGB of 8 bits, turned as its EXIF data says; of many frames the first. Raises
    whatever a decoder raises on damaged data, and ValueError for too large images and for pixels of floats."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=formats) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height}, more than {MAX_PIXELS:,} pixels")
        if image.mode == "F":
            raise ValueError("float pixels, whose range is not known")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits; Pillow would cut them off at 255
            image = Image.fromarray(((np.asarray(image).clip(0, 65535).astype(np.int32) + 128) // 257).astype(np.uint8))
        return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


def resized(data: bytes, size: int, formats: Sequence[str]) -> np.ndarray:
    """A file's bytes as uint8 (3, size, size), stretched. Raises as `rgb` does."""
    from PIL import Image

    return np.asarray(rgb(data, formats).resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def held_out(names: Sequence[str], labels: np.ndarray, fraction: float) -> np.ndarray:
    """A mask (N,) of this fraction of each class, at least one image of it and not all.

    Which ones follows from the files' names alone: it is the same with each seed, and on each machine.
    """
    keys = [hashlib.sha256(os.fsencode(name)).hexdigest() for name in names]
    order = np.lexsort((keys, labels))
    mask = np.zeros(len(names), bool)
    for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        mask[rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)]] = True
    return mask


def mean_and_std(images: Tensor | np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of each channel of images (N, C, H, W) uint8, as pixels in 0..1. A channel of one value has the std 1."""
    images = torch.as_tensor(images)
    total = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for part in images.split(64):  # bounds the memory
        pixels = part.transpose(0, 1).flatten(1).double()  # sums of whole numbers: exact, in any order
        total += torch.stack((pixels.sum(1), pixels.square_().sum(1)))
    mean, square = total / (images.numel() // images.shape[1])
    std = (square - mean**2).clamp(min=0).sqrt()
    return tuple((mean / 255).tolist()), tuple(torch.where(std > 0.01, std / 255, 1.0).tolist())
