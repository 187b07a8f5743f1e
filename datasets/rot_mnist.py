"""Rotated MNIST: 20 tasks, each with one random angle in [0, 180) degrees; otherwise like perm-mnist (DER paper).

Nearest neighbour, centre pivot, black outside, as Pillow rotates; the same angle for training and test images.
"""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatcl.datasets._rotation import rotation_maps
from flatcl.datasets.perm_mnist import PermMnist
from flatcl.utils.engine import seeding
from flatcl.utils.registry import DATASETS


@DATASETS.register("rot-mnist")
class RotMnist(PermMnist):
    def decided(self) -> dict[str, Any]:
        """With the angle of each task, in degrees, counter-clockwise."""
        return super(PermMnist, self).decided() | {"angles": self._angles.tolist()}

    @cached_property
    def _angles(self) -> np.ndarray:
        return seeding.generator(self.config.seed, "rotation").uniform(0.0, 180.0, self.num_tasks)

    @cached_property
    def _maps(self) -> Tensor:
        return torch.from_numpy(rotation_maps(self._angles, 28))
