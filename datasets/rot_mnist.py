"""Rotated MNIST: 20 tasks, each with one random angle in [0, 180) degrees (DER paper).

Nearest neighbour, centre pivot, black outside, as Pillow rotates; the same angle for training and test images.
"""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from datasets._benchmark import Arrays, DomainBenchmark
from datasets._files import load_mnist
from datasets._rotation import rotation_maps
from utils import seeding
from utils.registry import DATASETS


@DATASETS.register("rot-mnist")
class RotMnist(DomainBenchmark):
    num_classes = 10
    shape = (1, 28, 28)
    defaults = dict(n_tasks=20, n_epochs=1, batch_size=128, minibatch_size=128, lr=0.2)

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        return load_mnist(root, "MNIST")

    @cached_property
    def _maps(self) -> Tensor:
        angles = seeding.generator(self.config.seed, "rotation").uniform(0.0, 180.0, self.num_tasks)
        return torch.from_numpy(rotation_maps(angles, 28))

    def pixel_map(self, index: int) -> Tensor:
        return self._maps[index]
