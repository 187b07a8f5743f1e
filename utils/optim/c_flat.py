"""C-Flat (Bian et al., NeurIPS 2024): SAM plus first-order flatness (small gradient norms around the weights).

    g1 = gradient at w + rho * g / |g|
    e1 = rho * (g1 - g) / |g1 - g|    g2 = gradient at w + e1
    e2 = rho * g2 / |g2|              g3 = gradient at w + e1 + e2
    u  = g1 + cflat_lambda * (g3 - g2)

One rho for all three, 1e-12 added to each norm, as in the authors' code. That code trains the first task with plain
SGD: `--sam_from_task 1` does so.

Passes: 4 forward, 4 backward
Memory: 5 P (perturbed weights, offset, three gradients)
"""

from dataclasses import dataclass

import torch

from flatcl.utils.arguments import flag
from flatcl.utils.optim._sharpness import Grads, SharpnessAware
from flatcl.utils.registry import OPTIMIZERS


@OPTIMIZERS.register("c_flat")
class CFlat(SharpnessAware):
    @dataclass(frozen=True)
    class Args(SharpnessAware.Args):
        rho: float = flag(0.2, "radius of the ball in which the worst points are sought", low=0)
        cflat_lambda: float = flag(0.2, "weight of first-order flatness", low=0)

    @classmethod
    def check(cls, config, method) -> list[str]:
        problems = super().check(config, method)
        if {config.ascent_on, config.sharp_on} == {"current", "memory"}:
            problems.append(
                f"--optimizer c_flat needs the gradient of the ascent's rows at the perturbed weights: --ascent_on "
                f"{config.ascent_on} and --sharp_on {config.sharp_on} exclude each other. Give the same, or all."
            )
        return problems

    phase = SharpnessAware.phase

    def direction(self, objective) -> Grads:
        _, climbed = self.gradients(objective)
        with self.at(self.ascent(climbed, objective)):
            g1, climbed1 = self.gradients(objective)
        offset = self.ascent(torch._foreach_sub(climbed1, climbed), objective)
        with self.at(offset):
            g2, climbed2 = self.gradients(objective)
        with self.at(torch._foreach_add(offset, self.ascent(climbed2, objective))):
            g3 = objective.gradient()
        update = torch._foreach_sub(g3, g2)
        torch._foreach_mul_(update, self.args.cflat_lambda)
        torch._foreach_add_(update, g1)
        return update
