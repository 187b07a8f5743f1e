"""SAM (Foret et al., ICLR 2021), eq. 2 and 3: descend with the gradient at the worst point of a ball.

    e = rho * g / (|g| + 1e-12)    u = gradient at w + e

Weight decay acts in the base step only, not in the ascent. 2 forwards, 2 backwards.
"""

from dataclasses import dataclass

import torch

from utils.arguments import flag
from utils.optim._sharpness import Grads, SharpnessAware, norm
from utils.registry import OPTIMIZERS


@OPTIMIZERS.register("sam")
class SAM(SharpnessAware):
    @dataclass(frozen=True)
    class Args(SharpnessAware.Args):
        rho: float = flag(0.05, "radius of the ball in which the worst point is sought", low=0)

    def ascent(self, g: Grads, objective) -> Grads:
        return torch._foreach_mul(g, self.args.rho / (norm(g) + 1e-12))
