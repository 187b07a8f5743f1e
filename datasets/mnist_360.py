"""MNIST-360 (Buzzega et al., 2020): one stream of rotating digits without task boundaries.

Digits 0..8. Each digit is cut into 6 chunks; the pairs (0,1), (1,2), ..., (8,0) are streamed three times, and each
pair uses up one chunk of both its digits. A batch holds the two digits in proportion to what remains of them. Digit j
starts at (j - 1) * 60 degrees and turns by 360 / n_j with each image; images are drawn from a chunk with replacement.
The test set has each test image once, digit by digit through a full turn (the published code draws them with
replacement). As there, the network has 10 outputs; no image has the label 9. The stream depends on the batch size.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatcl.datasets._benchmark import Arrays, Benchmark, Split, gather_pixels
from flatcl.datasets._files import Loaded, load_mnist, missing_mnist
from flatcl.datasets._rotation import rotation_maps
from flatcl.utils.engine import seeding
from flatcl.utils.registry import DATASETS

DIGITS, CHUNKS, ROUNDS = 9, 6, 3


@DATASETS.register("mnist-360")
class Mnist360(Benchmark):
    setting = "general-continual"
    draws_tasks = True
    num_classes = 10
    empty_classes = (9,)
    shape = (1, 28, 28)
    defaults = dict(n_tasks=1, n_epochs=1, batch_size=16, minibatch_size=16, lr=0.1)

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        found = load_mnist(root, "MNIST")
        train, test = ((x[y < DIGITS], y[y < DIGITS]) for x, y in found)
        return Loaded(train, test, found.is_official)

    @classmethod
    def missing(cls, root: Path) -> str | None:
        return missing_mnist(root, "MNIST")

    @classmethod
    def check_classes(cls, config: Any) -> list[str]:
        problems = [
            f"--{name} has no effect on {cls.name}: its stream has no tasks. Drop it."
            for name, given in (
                ("permute_classes", config.permute_classes),
                ("custom_class_order", config.custom_class_order),
                ("n_tasks", config.n_tasks != 1),
                ("class_il_argmax", config.class_il_argmax != "all"),
            )
            if given
        ]
        if config.n_epochs != 1 and not (config.joint or config.learner.trains_jointly):
            problems.append(
                f"--n_epochs must be 1 on {cls.name}, which is a stream, got {config.n_epochs}. Drop it or add --joint."
            )
        return problems

    def decided(self) -> dict[str, Any]:
        """With the stream's length and its SHA-256: that of the images' rows, int64, little-endian, as they come.

        The rows themselves are some 50,000 numbers, and follow from the seed, the batch size and the labels.
        """
        rows, _, lengths = self._stream
        digest = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
        stream = {"images": len(rows), "distinct": len(np.unique(rows)), "batches": len(lengths), "sha256": digest}
        return super().decided() | {"stream": stream}

    def num_rows(self, index: int) -> tuple[int, int]:
        return len(self._stream[0]), len(self._test)

    def train_split(self, index: int) -> Split:
        rows, angles, lengths = self._stream
        split = self._rotated(self._train, rows, angles)
        return Split(split.images, split.labels, split.ids, lengths)

    def make_test(self, index: int) -> Split:
        rows, angles = _full_turns(self._test.labels.cpu().numpy(), start=lambda digit: 0.0)
        return self._rotated(self._test, rows, angles)

    def joint_split(self) -> Split:
        """Each training image once, at the angle that its turn brings; shuffled like any data set."""
        return self._rotated(self._train, *_full_turns(self._train.labels.cpu().numpy(), start=_start))

    @cached_property
    def _stream(self) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
        """(rows, angles, batch lengths) of the training stream."""
        rng = seeding.generator(self.config.seed, "stream")
        labels = self._train.labels.cpu().numpy()
        images = {digit: np.flatnonzero(labels == digit) for digit in range(DIGITS)}
        chunks = {digit: _chunks(rows) for digit, rows in images.items()}
        drawn = dict.fromkeys(images, 0)
        rows, angles, lengths = [], [], []
        for pair in ROUNDS * [(digit, (digit + 1) % DIGITS) for digit in range(DIGITS)]:
            pools = [chunks[digit].pop() for digit in pair]
            for counts in _proportional_batches([len(pool) for pool in pools], self.config.batch_size):
                for digit, pool, count in zip(pair, pools, counts, strict=True):
                    rows.append(pool[rng.integers(0, len(pool), count)])
                    turn = 360.0 / len(images[digit]) * (drawn[digit] + np.arange(count))
                    angles.append(_start(digit) + turn)
                    drawn[digit] += count
                lengths.append(sum(counts))
        return np.concatenate(rows), np.concatenate(angles), tuple(lengths)

    @staticmethod
    def _rotated(split: Split, rows: np.ndarray, angles: np.ndarray) -> Split:
        index = torch.from_numpy(rows).to(split.labels.device)
        images = split.images[index]
        for part in range(0, len(rows), 4096):  # bounds the maps' memory
            maps: Tensor = torch.from_numpy(rotation_maps(angles[part : part + 4096], 28))
            images[part : part + 4096] = gather_pixels(images[part : part + 4096], maps)
        return Split(images, split.labels[index], torch.arange(len(rows), device=index.device))


def _start(digit: int) -> float:
    return (digit - 1) * 60.0


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    size = len(rows) // CHUNKS + 1
    return [rows[i * size : (i + 1) * size] for i in range(CHUNKS)]


def _proportional_batches(remaining: list[int], batch_size: int) -> list[tuple[int, int]]:
    """Images of the first and second digit in each batch, until either is used up."""
    first, second = remaining
    batches = []
    while first and second:
        a = min(round(first / (first + second) * batch_size), first)
        b = min(batch_size - a, second)
        batches.append((a, b))
        first, second = first - a, second - b
    return batches


def _full_turns(labels: np.ndarray, start) -> tuple[np.ndarray, np.ndarray]:
    rows = [np.flatnonzero(labels == digit) for digit in range(DIGITS)]
    angles = [start(digit) + np.arange(len(r)) * 360.0 / len(r) for digit, r in enumerate(rows) if len(r)]
    return np.concatenate(rows), np.concatenate(angles)
