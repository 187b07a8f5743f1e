"""What a trained network says of the test images: predictions.npz, confusion matrix, accuracy of each class."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flatcl.utils.files import open_regular

FILE = "predictions.npz"
COLUMNS = {"logits": 2, "labels": 1, "tasks": 1}  # and their dimensions


def save(folder: Path, predictions: Mapping[str, np.ndarray]) -> None:
    """`logits` (N, K) float32, `labels` and `tasks` (N,) int64 of all test images; labels and columns are outputs, in
    the order in which the classes were learned. Atomic. Raises `OSError`."""
    columns: dict[str, Any] = {**predictions}
    fresh = folder / f"{FILE}.{os.getpid()}.tmp"
    try:
        with open(fresh, "wb") as file:
            np.savez(file, **columns)
        os.replace(fresh, folder / FILE)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise


def load(folder: Path) -> dict[str, np.ndarray] | None:
    """What `save` has written; None where there is no such file, or one that is damaged."""
    try:
        with open_regular(folder / FILE) as file, np.load(file, allow_pickle=False) as content:
            found = {name: content[name] for name in COLUMNS}
    except Exception:  # a damaged file fails in many ways
        return None
    sizes = {len(column) for column in found.values()}
    fits = len(sizes) == 1 and all(found[name].ndim == dims for name, dims in COLUMNS.items())
    return found if fits else None


def num_competing(config: Any, decided: Mapping[str, Any], num_tasks: int) -> int:
    """How many outputs, from the first on, class-il predicts over after so many tasks of a run (--class_il_argmax).
    `config` (`Config`): its flags; `decided`: its benchmark.json. Before the end of a first task, its classes count."""
    if config.class_il_argmax == "all" or config.joint or config.learner.trains_jointly:
        return len(decided["class_order"])
    tasks = decided["tasks"][: config.start_from + max(1, num_tasks)]
    return len({label for task in tasks for label in task["classes"]})


def confusion_matrix(
    predictions: Mapping[str, np.ndarray], class_order: Sequence[int], competing: int | None = None
) -> np.ndarray:
    """(K, K) int64: how many test images of the class of a row were taken for the class of a column. Rows and columns
    are the classes of the data set, in its own order; `class_order`: the class behind each output; `competing`: the
    number of outputs that are predicted over, default: all."""
    order = np.asarray(class_order)
    size = len(order)
    places = order[predictions["labels"]] * size + order[predictions["logits"][:, :competing].argmax(1)]
    return np.bincount(places, minlength=size * size).reshape(size, size)


def class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """(K,) float64, fractions, from a confusion matrix; NaN for a class without test images."""
    counts = confusion.sum(1)
    return np.divide(confusion.diagonal(), counts, out=np.full(len(counts), np.nan), where=counts > 0)
