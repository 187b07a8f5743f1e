"""LookSAM (Liu et al., CVPR 2022): SAM every k-th step; other steps reuse its part orthogonal to the gradient.

    t = 0, k, 2k, ...:  u = g_s, SAM's gradient    g_v = g_s - (<g, g_s> / |g|^2) g
    else:               u = g + looksam_alpha * |g| / (|g_v| + 1e-12) * g_v

Norms and products are global, as in the paper; several ports have them tensor by tensor, which is another algorithm.
t and g_v start anew with each task, and when parameters have grown. looksam_alpha is 0.1, which a comparison on
CIFAR-100 found better than the paper's 0.7 for vision transformers. Look-LayerSAM (layer-wise radii) is not here: its
published descriptions contradict each other.

Passes: 1 + 1/k forward, 1 + 1/k backward
Memory: 3 P (perturbed weights, clean gradient, g_v)
"""

from dataclasses import dataclass
from typing import Any

import torch

from flatcl.utils.arguments import flag
from flatcl.utils.optim._sharpness import EPS, Grads, SharpnessAware, dot, norm
from flatcl.utils.registry import OPTIMIZERS


@OPTIMIZERS.register("looksam")
class LookSAM(SharpnessAware):
    @dataclass(frozen=True)
    class Args(SharpnessAware.Args):
        rho: float = flag(0.1, "radius of the ball in which the worst point is sought", low=0)
        looksam_every: int = flag(5, "k: every k-th step is a SAM step", low=1)
        looksam_alpha: float = flag(0.1, "length of the reused component, relative to the norm of the gradient", low=0)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.clock["t"] = 0

    def phase(self) -> bool:
        """Whether the next sharp step has an ascent."""
        return self.clock["t"] % self.args.looksam_every == 0

    def tick(self, objective) -> None:
        self.clock["t"] += self.is_sharp(objective)

    def direction(self, objective) -> Grads:
        if self.phase():
            return super().direction(objective)
        objective.sharp_on = "all"  # no pass at perturbed weights follows
        g, g_v = objective.gradient(), self.state["g_v"]
        length = self.args.looksam_alpha * norm(g) / (norm(g_v) + EPS)
        return torch._foreach_add(torch._foreach_mul(g_v, length), g)

    def descent(self, g: Grads, g_adv: Grads) -> Grads:
        square = dot(g, g)
        along = torch.where(square > 0, dot(g, g_adv) / square, 0.0)
        self.pending["g_v"] = torch._foreach_sub(g_adv, torch._foreach_mul(g, along))
        return g_adv

    def begin_task(self, task) -> None:
        super().begin_task(task)
        self._restart()

    def follow(self) -> bool:
        has_changed = super().follow()
        if has_changed:
            self._restart()
        return has_changed

    def _restart(self) -> None:
        self.clock["t"] = 0
        self.forget("g_v")
