"""Rotated MNIST: 20 tasks, each with one random angle in [0, 180) degrees; else as perm-mnist (DER paper).

Nearest neighbour, centre pivot, black outside, as Pillow rotates; the same angle for training and test images.
"""

from functools import cached_property

import torch
from torch import Tensor

from datasets._rotation import rotation_maps
from datasets.perm_mnist import PermMnist
from utils import seeding
from utils.registry import DATASETS


@DATASETS.register("rot-mnist")
class RotMnist(PermMnist):
    @cached_property
    def _maps(self) -> Tensor:
        angles = seeding.generator(self.config.seed, "rotation").uniform(0.0, 180.0, self.num_tasks)
        return torch.from_numpy(rotation_maps(angles, 28))
