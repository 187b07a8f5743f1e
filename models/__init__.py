"""Continual learners, one file each. What a new one is written with: `from flatcl.models import Method, Loss, ...`."""

from flatcl.models._blocks import Block, Loss
from flatcl.models._method import Batch, Context, Method, published
from flatcl.models._replay import ReplayMethod

__all__ = ["Batch", "Block", "Context", "Loss", "Method", "ReplayMethod", "published"]
