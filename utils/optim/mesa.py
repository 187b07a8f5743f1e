"""MESA (Du et al., NeurIPS 2022): no ascent; the loss keeps outputs close to those of averaged weights.

    loss + mesa_lambda * tau^2 * mean KL(softmax(z_v / tau) || softmax(z / tau))
    v = mesa_decay * v + (1 - mesa_decay) * w after each step, BatchNorm's statistics included; z_v in eval mode

The factor tau^2 is the authors' code's, not the paper's. The mean is over all rows of a step, those of the memory too.
v starts from w in each task, or is carried over (`--mesa_carry 1`), a slow teacher then. The authors' code begins once
the epoch, from 0, is more than 5; here it begins in the epoch mesa_start, which is 0, since tasks of one epoch would
never see it. w is what is evaluated.

Passes: 2 forward, 1 backward
Memory: 1 P (averaged weights)
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flatcl.utils.arguments import flag
from flatcl.utils.optim._driver import Driver, Grads, keep_corner
from flatcl.utils.optim.saf import divergence
from flatcl.utils.registry import OPTIMIZERS


@OPTIMIZERS.register("mesa")
class MESA(Driver):
    @dataclass(frozen=True)
    class Args(Driver.Args):
        mesa_lambda: float = flag(0.8, "weight of the distance to the averaged weights' outputs", low=0)
        mesa_tau: float = flag(5.0, "temperature of both outputs", above=0)
        mesa_start: int = flag(0, "epoch of a task, from 0, in which it begins", low=0)
        mesa_decay: float = flag(0.9998, "decay of the averaged weights", low=0, high=1)
        mesa_carry: bool = flag(False, "keep the averaged weights from task to task")

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._copy_net()

    @classmethod
    def check(cls, config, method) -> list[str]:
        epochs = 1 if config.debug_mode else config.n_epochs
        if config.mesa_start < epochs or config.budget_rows is not None:
            return []
        return [
            f"--mesa_start must be less than the {epochs} epoch(s) of a task, got {config.mesa_start}. Give less, or "
            "use the optimizer sgd."
        ]

    def phase(self) -> bool:
        """Whether it has begun."""
        return self.clock["epoch"] >= self.args.mesa_start

    def direction(self, objective) -> Grads:
        if self.phase():
            tau, shares = self.args.mesa_tau, objective.shares
            targets = objective.outputs_of(self.teacher)

            def term(logits):
                return [
                    self.args.mesa_lambda * share * divergence(z_v, z, tau)
                    for share, z_v, z in zip(shares, targets, logits, strict=True)
                ]

            objective.add("mesa", term)
        return objective.gradient()

    def settle(self, objective) -> None:
        torch._foreach_lerp_(self._averaged, self._followed, 1 - self.args.mesa_decay)
        if self._counters:
            torch._foreach_copy_(*map(list, zip(*self._counters, strict=True)))

    def begin_task(self, task) -> None:
        super().begin_task(task)
        self._copy_net(self.teacher if self.args.mesa_carry else None)

    def begin_anew(self, num_skipped: int) -> None:
        super().begin_anew(num_skipped)
        self._copy_net()

    def follow(self) -> bool:
        has_changed = super().follow()
        if has_changed:
            self._copy_net(self.teacher)
        return has_changed

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "teacher": {k: v.clone() for k, v in self.teacher.state_dict().items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.teacher.load_state_dict(state["teacher"])

    def _copy_net(self, old: nn.Module | None = None) -> None:
        """A new average, from the net as it is; what `old` has of it is kept."""
        self.teacher = copy.deepcopy(self.method.net).requires_grad_(False).eval()
        present, past = _tensors(self.teacher), {} if old is None else _tensors(old)
        for name in present.keys() & past.keys():
            keep_corner(past[name], present[name])
        followed = _tensors(self.method.net)
        real = [name for name, tensor in present.items() if tensor.is_floating_point()]
        self._averaged, self._followed = [present[name] for name in real], [followed[name] for name in real]
        self._counters = [(present[name], followed[name]) for name in present.keys() - set(real)]


def _tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in [*net.named_parameters(), *net.named_buffers()]}
