"""What a benchmark declares and loads, checked before it is used: one line that says what, got, and what to do."""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatcl.utils.errors import DataError, UsageError

Arrays = tuple[Tensor, Tensor]  # images uint8 (N, C, H, W), labels int64 (N,)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def check_declared(benchmark: Any) -> None:
    """Raises `UsageError` where shape, mean and std do not fit each other."""
    name, shape, declared = benchmark.name, benchmark.shape, {}
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise UsageError(f"{name}: shape must be (channels, height, width), got {shape}. Correct it in its class.")
    for what in ("mean", "std"):
        value = getattr(benchmark, what)
        if value is None:
            continue
        try:
            declared[what] = tuple(float(number) for number in value)
        except (TypeError, ValueError):
            raise UsageError(
                f"{name}: {what} must be a tuple of numbers, one for each channel, got {value!r}. "
                "Write it as (0.5,) for one channel."
            ) from None
        if len(declared[what]) != shape[0]:
            raise UsageError(
                f"{name}: {what} must have a number for each channel of shape {shape}, {shape[0]}, got "
                f"{len(declared[what])}. Give {shape[0]}."
            )
    if len(declared) == 1:
        raise UsageError(f"{name}: {', '.join(declared)} is given without the other. Give mean and std, or neither.")
    if not all(0 <= number <= 1 for number in declared.get("mean", ())):
        raise UsageError(
            f"{name}: mean must be that of pixels in 0..1, got {declared['mean']}. Divide mean and std by 255 if "
            "they are those of pixels in 0..255."
        )
    if not all(number > 0 and math.isfinite(number) for number in declared.get("std", ())):
        raise UsageError(f"{name}: std must be above 0 and finite, got {declared['std']}. Correct it in its class.")


def checked_arrays(benchmark: Any, loaded: Any) -> tuple[Arrays, Arrays]:
    """What `load` returned, as it is used; `Benchmark.load` says what is converted. Raises `DataError`."""
    name, parts = benchmark.name, []
    if not _is_pair(loaded) or not all(_is_pair(part) for part in loaded):
        raise DataError(
            f"{name}: load must return ((train_x, train_y), (test_x, test_y)), got {_described(loaded)}. "
            "Return two pairs of images and labels."
        )
    for part, (images, labels) in zip(("training", "test"), loaded, strict=True):
        images = _checked_images(f"{name}: load's {part} images", images, benchmark.shape)
        labels = _checked_labels(f"{name}: load's {part} labels", labels, benchmark.num_classes)
        if len(images) != len(labels):
            raise DataError(
                f"{name}: load gave {len(images)} {part} images and {len(labels)} {part} labels. "
                "Return one label for each image."
            )
        if len(images) == 0:
            raise DataError(f"{name}: load gave no {part} images. Return at least one.")
        parts.append((images, labels))
    _check_classes(benchmark, parts[0][1])
    return tuple(parts)


def digest_of(train: Arrays, test: Arrays) -> str:
    """Of images and labels."""
    found = 0
    for tensor in (*train, *test):
        found = zlib.crc32(tensor.contiguous().numpy(), found)
    return f"crc32 {found:08x}"


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _described(value: Any, inside: bool = True) -> str:
    if isinstance(value, tuple | list):
        kinds = f" ({', '.join(_described(item, inside=False) for item in value)})" if inside and len(value) < 6 else ""
        return f"a {type(value).__name__} of {len(value)}{kinds}"
    return "None" if value is None else type(value).__name__


def _as_tensor(what: str, value: Any) -> Tensor:
    """A plain tensor in host memory, of whatever dtype and shape."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))
    if not isinstance(value, Tensor):
        got = f"a NumPy array of {value.dtype}" if isinstance(value, np.ndarray) else _described(value)
        raise DataError(f"{what} must be a tensor or a NumPy array of numbers, got {got}. Convert them.")
    return value.detach().cpu().as_subclass(Tensor)


def _checked_images(what: str, value: Any, shape: Sequence[int]) -> Tensor:
    images = _as_tensor(what, value)
    if images.dtype != torch.uint8:
        low, high = _range(images)
        raise DataError(
            f"{what} must be uint8 in 0..255, got {_named(images)} from {low:.6g} to {high:.6g}. "
            f"{_as_bytes(images, low, high, isinstance(value, np.ndarray))}"
        )
    if tuple(images.shape[1:]) != tuple(shape) or images.ndim != 4:
        raise DataError(
            f"{what} must be (N, C, H, W) with (C, H, W) = {tuple(shape)}, got {tuple(images.shape)}. "
            f"{_as_declared(images, value, tuple(shape))}"
        )
    if len(images) and images[:1000].amax() == 1 == images.amax():
        raise DataError(
            f"{what} must be uint8 in 0..255, got only 0 and 1. If the pixels are in 0..1, return (255 * x).round() "
            "as uint8."
        )
    return images.contiguous()


def _named(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _range(values: Tensor) -> tuple[float, float]:
    """(least, greatest), whatever the dtype; (0, 0) of nothing."""
    if values.numel() == 0:
        return 0, 0
    values = values if values.is_floating_point() else values.to(torch.int64)
    return values.min().item(), values.max().item()


def _as_bytes(images: Tensor, low: float, high: float, is_array: bool) -> str:
    """The line that makes bytes of these images, where one does."""
    cast = ".astype(np.uint8)" if is_array else ".to(torch.uint8)"
    if not (0 <= low and high <= 255):  # NaN too
        return "Return the pixels as they were before normalisation; declare mean and std in the class."
    if images.dtype == torch.bool:
        return f"Return 255 * x{cast}."
    if not images.is_floating_point():
        return f"Return x{cast}."
    return f"Return (255 * x).round(){cast}." if high <= 1 else f"Return x.round(){cast}."


def _as_declared(images: Tensor, given: Any, shape: tuple[int, ...]) -> str:
    """The line that brings these images to the declared shape, where one does."""
    channels, *size = shape
    is_array = isinstance(given, np.ndarray)
    if tuple(images.shape[1:]) == (*size, channels):
        return f"Return x.{'transpose' if is_array else 'permute'}(0, 3, 1, 2)."
    if channels == 1 and tuple(images.shape[1:]) == tuple(size):
        return "Return x[:, None]."
    if images.ndim == 2 and images.shape[1] == math.prod(shape):
        return f"Return x.reshape(-1, {', '.join(map(str, shape))})."
    return "Correct `shape` in the class, or return images of that shape."


def _checked_labels(what: str, value: Any, num_classes: int) -> Tensor:
    labels = _as_tensor(what, value)
    if labels.ndim != 1:
        got = f"must be (N,), got {tuple(labels.shape)}"
        if labels.ndim == 2 and labels.shape[1] == 1:
            raise DataError(f"{what} {got}. Return y[:, 0].")
        if labels.ndim == 2 and labels.shape[1] == num_classes:
            raise DataError(f"{what} {got}. Return y.argmax(1) if they are one-hot.")
        raise DataError(f"{what} {got}. Return the number of each image's class.")
    if labels.dtype not in SIGNED + UNSIGNED:
        cast = ".astype(np.int64)" if isinstance(value, np.ndarray) else ".to(torch.int64)"
        raise DataError(
            f"{what} must be whole numbers, int64, got {_named(labels)}. Return y{cast} if each is the number of a "
            "class."
        )
    labels = labels.to(torch.int64)
    low, high = _range(labels)
    if 0 <= low and high < num_classes:
        return labels
    got = f"{what} must be 0..{num_classes - 1}, since num_classes is {num_classes}, got {low}..{high}"
    if low == 1 and high == num_classes:
        raise DataError(f"{got}. Return y - 1.")
    if low < 0:
        rows = int((labels < 0).sum())
        raise DataError(f"{got} ({rows} below 0). Leave out the images without a class, or number the classes from 0.")
    raise DataError(f"{got}. Number the classes from 0, or set num_classes to {high + 1} in the class.")


def _check_classes(benchmark: Any, labels: Tensor) -> None:
    """Each class has a training image, but those of `empty_classes`."""
    counts = torch.bincount(labels, minlength=benchmark.num_classes).tolist()
    missing = [label for label, count in enumerate(counts) if count == 0 and label not in benchmark.empty_classes]
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise DataError(
            f"{benchmark.name}: load gave no training images for {len(missing)} of {benchmark.num_classes} classes: "
            f"{shown}. Correct num_classes or the labels; if these classes have no images on purpose, set "
            f"`empty_classes = ({shown},)` in the class."
        )


def check_pixel_map(name: str, index: int, pixel_map: Any, shape: Sequence[int]) -> None:
    """Raises `UsageError` unless it is (H * W,) int64 in 0..H * W."""
    pixels = shape[1] * shape[2]
    wanted = f"{name}: pixel_map({index}) must be an int64 tensor ({pixels},) of numbers in 0..{pixels}"
    if not isinstance(pixel_map, Tensor) or pixel_map.dtype != torch.int64:
        got = _named(pixel_map) if isinstance(pixel_map, Tensor) else _described(pixel_map)
        raise UsageError(f"{wanted}, got {got}. Convert it, as by torch.from_numpy(map).to(torch.int64).")
    if tuple(pixel_map.shape) != (pixels,):
        raise UsageError(f"{wanted}, got {tuple(pixel_map.shape)}. Give a number for each pixel, row by row.")
    low, high = pixel_map.min().item(), pixel_map.max().item()
    if low < 0 or high > pixels:
        raise UsageError(f"{wanted}, got {low}..{high}. Number the pixels from 0, row by row; {pixels} is black.")
