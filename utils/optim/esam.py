"""ESAM (Du et al., ICLR 2022): SAM with a part of the parameters in the ascent and a part of the rows in the descent.

    e = (rho / esam_beta) * g_M / (|g_M| + 1e-7)    M: each tensor with probability esam_beta, drawn anew every step
    u = gradient at w + e over the esam_gamma of the rows whose loss the ascent has raised most

As the authors' code, whole tensors are left out, so that the clean pass need not find their gradients; the paper draws
single weights. Rows are chosen within each block, and there apart for stream and memory, so that neither can push the
other out: floor(esam_gamma * n) of n, at least one (the code takes one less, and none at all of three). No tensor is
left out in a task's first step; one always stays. Nothing is frozen, BatchNorm's running statistics move at w only.

With --sharp_on, the chosen rows of one joint forward keep the weight that they have among the chosen rows of all.

Passes: 2 + gamma forward, 1 + gamma backward (2 and 2 with gamma 1)
Memory: 2 P (perturbed weights, clean gradient)
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flatcl.utils.arguments import flag
from flatcl.utils.optim._sharpness import Grads, SharpnessAware, norm
from flatcl.utils.registry import OPTIMIZERS


@OPTIMIZERS.register("esam")
class ESAM(SharpnessAware):
    @dataclass(frozen=True)
    class Args(SharpnessAware.Args):
        esam_beta: float = flag(0.6, "share of the parameter tensors that is perturbed", above=0, high=1)
        esam_gamma: float = flag(0.5, "share of the rows that the update is computed from", above=0, high=1)

    @classmethod
    def check(cls, config, method) -> list[str]:
        problems = super().check(config, method)
        if config.renormalize and config.esam_beta < 1:
            problems.append(
                f"--renormalize needs the whole clean gradient, which --esam_beta {config.esam_beta:g} leaves out in "
                "part. Give --esam_beta 1, or drop it."
            )
        return problems

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.clock["started"] = 0

    def phase(self) -> int:
        """Whether a task has begun: tensors are drawn."""
        return self.clock["started"]

    def draw(self, objective) -> dict[str, np.ndarray]:
        """`perturbed` (P,) bool: the tensors of this step."""
        if not self.phase() or not self.is_sharp(objective) or self.args.esam_beta == 1:
            return {}
        draws = self.rng.random(len(self.params))
        draws[list(self._unperturbed)] = 1  # which --perturb excludes: one of the others always stays
        return {"perturbed": (draws < self.args.esam_beta) | (draws == draws.min())}

    def tick(self, objective) -> None:
        self.clock["started"] |= self.is_sharp(objective)

    def direction(self, objective) -> Grads:
        _, climbed = self.gradients(objective, self.drawn.get("perturbed"))
        offset = torch._foreach_mul(climbed, self.args.rho / self.args.esam_beta / (norm(climbed) + 1e-7))
        with self.at(offset):
            if self.args.esam_gamma == 1:
                return objective.gradient()
            worst = objective.hardest(self.args.esam_gamma, objective.loss, objective.values(), self.fewest_rows)
            return worst.gradient()

    def begin_task(self, task) -> None:
        super().begin_task(task)
        self.clock["started"] = 0
