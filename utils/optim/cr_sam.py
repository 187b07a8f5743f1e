"""CR-SAM (Wu, Luo & Wunsch, AAAI 2024): SAM with a penalty on curvature, by finite differences in both directions.

    g+, g- = gradients at w + e and w - e, e that of SAM
    u = g+ + cr_gamma * (g+ + g- - 2 g) + cr_beta * (g+ - g-)

This is the rule of the authors' code. The paper's penalty is logarithmic: there the two brackets are divided by
L+ + L- - 2 L and by L+ - L-, which the code leaves out; `--cr_log 1` divides, and drops a term whose divisor is below
1e-8. BatchNorm's running statistics move at w only, where the code moves them at w - e too.

Passes: 3 forward, 3 backward
Memory: 4 P (perturbed weights, offset, two gradients)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flatcl.utils.arguments import flag
from flatcl.utils.optim._sharpness import Grads, SharpnessAware
from flatcl.utils.registry import OPTIMIZERS


@OPTIMIZERS.register("cr_sam")
class CRSAM(SharpnessAware):
    @dataclass(frozen=True)
    class Args(SharpnessAware.Args):
        rho: float = flag(0.1, "radius of the ball in which the worst point is sought", low=0)
        cr_gamma: float = flag(0.1, "weight of the curvature along the ascent direction", low=0)
        cr_beta: float = flag(0.01, "weight of the slope along the ascent direction", low=0)
        cr_log: bool = flag(False, "the paper's logarithmic penalty instead of the code's")

    phase = SharpnessAware.phase

    def direction(self, objective) -> Grads:
        g, climbed = self.gradients(objective)
        offset = self.ascent(climbed, objective)
        with self.at(offset):
            plus = objective.gradient()
        with self.at(torch._foreach_neg(offset)):
            minus = objective.gradient()
        gamma, beta = self.args.cr_gamma, self.args.cr_beta
        if self.args.cr_log:
            at_w, at_plus, at_minus = objective.tally.totals[-3:]
            gamma = _over(gamma, at_plus + at_minus - 2 * at_w)
            beta = _over(beta, at_plus - at_minus)
        update = torch._foreach_mul(plus, 1 + gamma + beta)
        torch._foreach_add_(update, torch._foreach_mul(minus, gamma - beta))
        torch._foreach_add_(update, torch._foreach_mul(g, -2 * gamma))
        return update


def _over(weight: float, divisor: Tensor) -> Tensor:
    """weight / divisor, or 0 where that means nothing."""
    usable = divisor.abs() >= 1e-8
    return torch.where(usable, weight / torch.where(usable, divisor, torch.ones_like(divisor)), 0.0)
