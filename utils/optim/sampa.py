"""SAMPa (Xie, Pethick & Cevher, NeurIPS 2024): the two gradients of SAM at points known in advance, so in parallel.

    h  = gradient of B_(t-1) at y_t             from the step before
    a  = gradient of B_(t-1) at x_t + rho * h / (|h| + 1e-12)
    h' = gradient of B_t at y_(t+1) = x_t - what the base optimizer makes of h
    u  = (1 - sampa_lambda) * a + sampa_lambda * h'

a and h' do not wait for each other, so two devices take the time of one pass. Here they run one after the other, and
SAMPa costs what SAM does; in a step that is recorded on a GPU, side by side. As in the authors' code, the perturbation
and a, one step after h, are of the same batch, and the look-ahead has the base's momentum and weight decay. Unlike that
code, h is kept and not recovered from the sum (with sampa_lambda 0 it would be lost), and BatchNorm's running
statistics move with the newest batch.
The clean pass, from which guides, stored logits and the loss come, is the one at y; the references of A-GEM, A-GEM-R
and GEM are taken there too. A task's first step is the base's.

Passes: 2 forward, 2 backward
Memory: 3 P (perturbed weights, h before and after), the previous batch
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatcl.utils.arguments import flag
from flatcl.utils.optim._sharpness import Grads, SharpnessAware
from flatcl.utils.registry import OPTIMIZERS


@OPTIMIZERS.register("sampa")
class SAMPa(SharpnessAware):
    @dataclass(frozen=True)
    class Args(SharpnessAware.Args):
        rho: float = flag(0.1, "radius of the ball in which the worst point is sought", low=0)
        sampa_lambda: float = flag(0.2, "weight of the newest batch's gradient in the update", low=0, high=1)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.previous: dict[str, Any] | None = None  # a snapshot of the step before
        self._kept: dict[Any, dict[str, Any]] = {}  # this task's snapshots, by the form of their blocks
        self.is_stuck = False  # the step before was not taken: the gradient at its previous batch would be the same

    def phase(self) -> Any:
        """The form of the previous batch."""
        return None if self.is_stuck else self.previous and (self.previous["form"], tuple(self.previous["used"]))

    def direction(self, objective) -> Grads:
        if self.previous is None or self.is_stuck:
            return self._remember_gradients(objective)
        h = self.state["h"]
        with self.side_by_side() as beside:
            with self.at(self.base.look_ahead(self.clipped(h), self.previous["used"]), frozen=False):
                newest = self._remember_gradients(objective)
            with beside, self.at(self.ascent(self.state.get("h_climbed", h), objective)):
                a = objective.later(self.previous, self.state.get("h_still")).gradient()
        return torch._foreach_lerp(a, newest, self.args.sampa_lambda)

    def _remember_gradients(self, objective) -> Grads:
        gradient, climbed = self.gradients(objective)
        self.pending["h"] = gradient
        if climbed is not gradient:
            self.pending["h_climbed"] = climbed
        if objective.sharp_on != "all":
            self.pending["h_still"] = objective.still.whole or [torch.zeros_like(p) for p in self.params]
        return gradient

    def settle(self, objective) -> None:
        """Keeps the batch, in the place of the last one of its form: a program reads it there."""
        if not self.is_sharp(objective):
            return
        new = objective.snapshot()
        if new["form"] not in self._kept:
            self._kept[new["form"]] = _each_tensor(new, torch.clone)
        old = self._kept[new["form"]]
        old |= {"noise": new["noise"], "used": new["used"]}
        for into, block in zip(old["blocks"], new["blocks"], strict=True):
            into["x"].copy_(block["x"])
            for name, column in block["columns"].items():
                into["columns"][name].copy_(column)

    def skip(self) -> None:
        self.is_stuck = True

    def tick(self, objective) -> None:
        self.is_stuck = False
        if self.is_sharp(objective):
            self.previous = self._kept[objective.form]

    def begin_task(self, task) -> None:
        super().begin_task(task)
        self.forget("h", "h_climbed", "h_still")
        self.previous, self._kept, self.is_stuck = None, {}, False

    def follow(self) -> bool:
        before = self.names
        has_changed = super().follow()
        if has_changed and self.previous is not None:
            used = dict(zip(before, self.previous["used"], strict=True))
            self.previous["used"] = [used.get(name, False) for name in self.names]
        return has_changed

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "previous": _each_tensor(self.previous, torch.clone)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.previous, self._kept = _each_tensor(state["previous"], lambda tensor: tensor.to(self.device)), {}
        if self.previous is not None:
            self.previous["noise"] = state["previous"]["noise"]  # of generators, which live where they live
            self._kept[self.previous["form"]] = self.previous


def _each_tensor(content: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested lists and dicts with each tensor changed. A batch is a view of its chunk: a clone saves less."""
    if isinstance(content, dict):
        return {name: _each_tensor(value, change) for name, value in content.items()}
    if isinstance(content, list):
        return [_each_tensor(value, change) for value in content]
    return change(content) if isinstance(content, Tensor) else content
