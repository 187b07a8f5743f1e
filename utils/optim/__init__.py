"""Optimizers, one file each. What a new one is written with: `from flatcl.utils.optim import SharpnessAware, ...`."""

from flatcl.utils.optim._driver import Driver
from flatcl.utils.optim._sharpness import SharpnessAware

__all__ = ["Driver", "SharpnessAware"]
