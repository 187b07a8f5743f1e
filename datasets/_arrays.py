"""Benchmarks of images that a user has in memory: `flatcl.benchmark_from_arrays`."""

import hashlib
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from flatcl.datasets._benchmark import Arrays, Benchmark
from flatcl.datasets._checks import checked_arrays
from flatcl.utils.errors import DataError, UsageError
from flatcl.utils.objects import Description
from flatcl.utils.registry import DATASETS

Pair = tuple[Any, Any]  # images and labels, arrays or tensors
DIGITS = 12  # hexadecimal, of a sha256


class FromArrays(Benchmark):
    """What the benchmarks made of arrays share; `arrays` and `order` are set in each."""

    arrays: tuple[Arrays, Arrays]
    order: tuple[int, ...]  # of the classes, as the tasks name them
    transforms: Callable[[], list[nn.Module]] | None = None
    digest: str
    code: dict[str, str]  # of the augmentations

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        return self.arrays

    def augmentations(self) -> list[nn.Module]:
        return [] if self.transforms is None else type(self).transforms()

    def class_order(self) -> list[int]:
        is_given = self.config.custom_class_order or self.config.permute_classes
        return super().class_order() if is_given else list(self.order)

    @classmethod
    def sources(cls, config: Any) -> dict[str, str]:
        return {f"arrays of {cls.name}": cls.digest} | cls.code


def benchmark_from_arrays(
    train: Pair,
    test: Pair,
    tasks: int | Sequence[Sequence[int]] | None = None,
    *,
    name: str | None = None,
    augmentations: Callable[[], list[nn.Module]] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backbone: str = "mnistmlp",
    **defaults: Any,
) -> type[Benchmark]:
    """A class-incremental benchmark of arrays: give it to `flatcl.train` or `flatcl.build` as `dataset`.

    train, test: (images, labels), NumPy arrays or tensors. Images are uint8 in 0..255, (N, C, H, W), (N, H, W, C) with
    at most 4 channels, or (N, H, W); labels are whole numbers (N,), 0..K - 1.
    tasks: the classes of each task, [[0, 1], [2, 3, 4]], each class once; or the number of tasks, which divides K;
    None: one task for each class.
    name: how the benchmark is called in results; default: `arrays-` and a digest of the arrays.
    augmentations: a function that returns kornia augmentations of images in 0..1, each drawing for each image; default:
    none. mean, std: one number for each channel, of pixels in 0..1; default: no normalisation.
    backbone and further keywords (`lr=0.1, batch_size=32, n_epochs=5`): the benchmark's defaults for these flags.

    Returns a subclass of `flatcl.datasets.Benchmark`. Raises `DataError` and `UsageError` for what does not fit.
    """
    parts = [_pair(what, part) for what, part in (("train", train), ("test", test))]
    images, labels = parts[0]
    classes = int(labels.max()) + 1 if labels.ndim == 1 and len(labels) else 1
    if classes > len(labels) > 0:
        raise DataError(
            f"train: labels must be 0..K - 1, got up to {classes - 1} for {len(labels)} images. Number them so."
        )
    if images.ndim != 4:
        raise DataError(
            f"train: images must be (N, C, H, W), (N, H, W, C) or (N, H, W), got {tuple(images.shape)}. Reshape them."
        )
    content: dict[str, Any] = {"num_classes": classes, "shape": tuple(images.shape[1:]), "name": "arrays"}
    content |= {"mean": _numbers("mean", mean), "std": _numbers("std", std)}
    checked = checked_arrays(type("Checked", (FromArrays,), content), parts)
    content["arrays"] = tuple((x.clone(), y.clone()) for x, y in checked)  # the caller may go on using the others
    content["order"], sizes = _tasks(tasks, classes)
    transforms = Description([] if augmentations is None else augmentations())
    settings = f"{sizes} {content['order']} {content['mean']} {content['std']} {transforms.text}"
    content |= {"digest": _digest(content["arrays"], settings), "code": transforms.code}
    content |= {"task_sizes": sizes, "default_backbone": backbone, "defaults": {"n_tasks": len(sizes), **defaults}}
    content["transforms"] = None if augmentations is None else staticmethod(augmentations)
    name = name or f"arrays-{content['digest'][:8]}"
    content["__doc__"] = f"{len(labels):,} training images of {classes} classes, given as arrays."
    made = type("GivenArrays", (FromArrays,), {**content, "__module__": __name__})
    return DATASETS.register(name)(made)


def laid_out(images: Any) -> Tensor | np.ndarray:
    """Images as (N, C, H, W), of (N, H, W) or, with at most 4 channels, (N, H, W, C); anything else as it is."""
    images = images if isinstance(images, Tensor) else np.asarray(images)
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] > 4 >= images.shape[3]:
        return images.permute(0, 3, 1, 2) if isinstance(images, Tensor) else images.transpose(0, 3, 1, 2)
    return images


def _pair(what: str, part: Any) -> Pair:
    """(images, labels); the checks of all benchmarks say what is wrong with them."""
    if not isinstance(part, tuple | list) or len(part) != 2:
        raise DataError(f"{what} must be a pair (images, labels), got {type(part).__name__}. Give both arrays.")
    return laid_out(part[0]), part[1] if isinstance(part[1], Tensor) else np.asarray(part[1])


def _tasks(tasks: Any, classes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(order of the classes, number of classes of each task)."""
    if tasks is None:
        tasks = classes
    if isinstance(tasks, Integral):
        tasks = int(tasks)
        if tasks < 1 or classes % tasks:
            raise UsageError(
                f"tasks must divide the {classes} classes, got {tasks}. Give the classes of each, as [[0, 1], [2]]."
            )
        return tuple(range(classes)), (classes // tasks,) * tasks
    try:
        order = [int(label) for task in tasks for label in task]
    except (TypeError, ValueError):
        raise UsageError(
            f"tasks must be the classes of each task, as [[0, 1], [2]], or a number of equal tasks, got {tasks}."
        ) from None
    if sorted(order) != list(range(classes)) or not all(len(task) for task in tasks):
        raise UsageError(
            f"tasks must name each of the classes 0..{classes - 1} once, and no task may be empty, got {list(tasks)}."
        )
    return tuple(order), tuple(len(task) for task in tasks)


def _numbers(name: str, given: Sequence[float] | None) -> tuple[float, ...] | None:
    try:
        return None if given is None else tuple(map(float, given))
    except TypeError:
        raise UsageError(f"{name} must have one number for each channel, as in ({given},), got {given}.") from None


def _digest(arrays: tuple[Arrays, Arrays], settings: str) -> str:
    found = hashlib.sha256(settings.encode())
    for images, labels in arrays:
        found.update(f"{tuple(images.shape)}".encode())
        found.update(images.numpy())
        found.update(labels.numpy())
    return found.hexdigest()[:DIGITS]
