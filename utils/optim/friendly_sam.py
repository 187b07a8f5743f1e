"""Friendly SAM, F-SAM (Li et al., CVPR 2024): the ascent uses only the noise of the batch, not the full gradient.

    d = g - friendly_sigma * m    m = friendly_lambda * m + (1 - friendly_lambda) * g    e = rho * d / (|d| + 1e-12)

As the authors' code, not as the paper's formula: d takes m from before the step, and in a task's first step m = d = g
(plain SAM); the average takes the raw gradient. It estimates the gradient of a task's own mixture of stream and memory,
so it starts anew with each task.

Passes: 2 forward, 2 backward
Memory: 4 P (perturbed weights, clean gradient, average before and after)
"""

from dataclasses import dataclass

import torch

from flatcl.utils.arguments import flag
from flatcl.utils.optim._sharpness import Grads, SharpnessAware
from flatcl.utils.registry import OPTIMIZERS


@OPTIMIZERS.register("friendly_sam")
class FriendlySAM(SharpnessAware):
    @dataclass(frozen=True)
    class Args(SharpnessAware.Args):
        rho: float = flag(0.2, "radius of the ball in which the worst point is sought", low=0)
        friendly_sigma: float = flag(
            1.0, "how much of the averaged gradient is subtracted from the ascent direction", low=0
        )
        friendly_lambda: float = flag(0.6, "decay of the averaged gradient", low=0, high=1)

    phase = SharpnessAware.phase

    def ascent(self, g: Grads, objective) -> Grads:
        m = self.state.get("m")
        if m is None:
            self.pending["m"] = g
            return super().ascent(g, objective)
        averaged = torch._foreach_lerp(m, g, 1 - self.args.friendly_lambda)
        direction = torch._foreach_add(g, m, alpha=-self.args.friendly_sigma)
        # a parameter without gradient in this step is neither averaged nor moved
        self.pending["m"] = [new if used else old for new, old, used in zip(averaged, m, objective.used, strict=True)]
        direction = [new if used else zero for new, zero, used in zip(direction, g, objective.used, strict=True)]
        return super().ascent(direction, objective)

    def begin_task(self, task) -> None:
        super().begin_task(task)
        self.forget("m")
