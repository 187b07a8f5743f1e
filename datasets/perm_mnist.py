"""Permuted MNIST: 20 tasks, each with one random permutation of the pixels, the first task too (DER paper)."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatcl.datasets._benchmark import Arrays, DomainBenchmark
from flatcl.datasets._files import load_mnist, missing_mnist
from flatcl.utils.engine import seeding
from flatcl.utils.registry import DATASETS


@DATASETS.register("perm-mnist")
class PermMnist(DomainBenchmark):
    draws_tasks = True
    num_classes = 10
    shape = (1, 28, 28)
    defaults = dict(n_tasks=20, n_epochs=1, batch_size=128, minibatch_size=128, lr=0.2)

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        return load_mnist(root, "MNIST")

    @classmethod
    def missing(cls, root: Path) -> str | None:
        return missing_mnist(root, "MNIST")

    def pixel_map(self, index: int) -> Tensor:
        return self._maps[index]

    def decided(self) -> dict[str, Any]:
        """With the permutation of each task: pixel p shows pixel permutation[p] of the image, row by row."""
        return super().decided() | {"permutations": self._maps.tolist()}

    @cached_property
    def _maps(self) -> Tensor:
        rng = seeding.generator(self.config.seed, "permutation")
        return torch.stack([torch.from_numpy(rng.permutation(28 * 28)) for _ in range(self.num_tasks)])
