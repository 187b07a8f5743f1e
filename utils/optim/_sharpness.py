"""The driver of all optimizers: directions and combinations over a frozen objective.

A sharpness-aware optimizer says where to move the weights (`ascent`) and how the gradients make the update
(`descent`); what it needs for that, snapshot and restore by copy, norms, frozen BatchNorm statistics, is here once.
The update goes to a base optimizer. Weight decay acts in the base alone, at the unmoved weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.arguments import flag
from utils.optim._base import SGD, Base, Grads


def norm(vector: Grads) -> Tensor:
    """Global L2 norm () of a list of tensors."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(vector)))


def dot(a: Grads, b: Grads) -> Tensor:
    """Inner product () of two aligned lists of tensors."""
    return torch.stack([product.sum() for product in torch._foreach_mul(a, b)]).sum()


@contextmanager
def frozen_statistics(module: nn.Module | list[nn.Module]) -> Iterator[None]:
    """BatchNorm layers normalise with the batch, but their running averages and counters stay as they are.

    Takes a module or its list of BatchNorm layers. Safe to nest, and left behind by an exception as by a return.
    """
    layers = batchnorms(module) if isinstance(module, nn.Module) else module
    tracked = [layer.track_running_stats for layer in layers]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer, was_tracked in zip(layers, tracked, strict=True):
            layer.track_running_stats = was_tracked


def batchnorms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class SharpnessAware:
    """SAM's skeleton: one clean pass, one pass at moved weights. Subclasses override `ascent` or `descent`, or, for
    another number of passes, `direction`."""

    name: str
    defaults: dict[str, Any] = {}  # values that a published SGD setting cannot speak for

    @dataclass(frozen=True)
    class Args:
        optim_mom: float = flag(0.0, "momentum of the base SGD", low=0, below=1)
        optim_nesterov: bool = flag(False, "Nesterov momentum in the base SGD")

    def __init__(self, method: nn.Module, lr: float, weight_decay: float, args: Any):
        self.args = args
        self.params = [p for p in method.parameters() if p.requires_grad]
        self.base = self.make_base(self.params, lr, weight_decay)
        self._batchnorms = batchnorms(method)

    def make_base(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> Base:
        return SGD(params, lr, weight_decay, self.args.optim_mom, self.args.optim_nesterov)

    def ascent(self, g: Grads, objective: Any) -> Grads:
        """The offset of the weights for the second pass, from the clean gradient."""
        raise NotImplementedError

    def descent(self, g: Grads, g_adv: Grads) -> Grads:
        """The update, from the clean gradient and the one at the moved weights."""
        return g_adv

    def direction(self, objective: Any) -> Grads:
        g = objective.gradient()
        with self.at(self.ascent(g, objective)):
            g_adv = objective.gradient()
        return self.descent(g, g_adv)

    def step(self, objective: Any) -> Grads:
        """One update of the weights; returns it as it went into the base optimizer."""
        update = objective.combine(self.direction(objective))
        self.base.step(update, objective.used)
        return update

    @contextmanager
    def at(self, offset: Grads) -> Iterator[None]:
        """Inside, the weights are moved by `offset` and BatchNorm statistics are frozen; after it, and after any
        exception, the weights are bitwise what they were."""
        with torch.no_grad():
            saved = [param.detach().clone() for param in self.params]
            try:
                torch._foreach_add_(self.params, offset)
                with frozen_statistics(self._batchnorms), torch.enable_grad():
                    yield
            finally:
                torch._foreach_copy_(self.params, saved)

    def set_lr(self, lr: float) -> None:
        self.base.lr = lr

    def begin_task(self, task: Any) -> None:
        """What a variant forgets at a task boundary. The base optimizer goes on."""

    def begin_epoch(self, epoch: int) -> None:
        """Clock of variants that count epochs; `epoch` starts at 0 in each task."""

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base.load_state_dict(state["base"])
