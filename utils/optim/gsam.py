"""GSAM (Zhuang et al., ICLR 2022), algorithm 1: SAM that also closes the gap between the two losses.

    g_p = gradient at w + e, e that of SAM with rho_t    g_perp = g - (<g, g_p> / |g_p|^2) g_p
    u = g_p - gsam_alpha * g_perp
    rho_t = gsam_rho_min + (rho - gsam_rho_min) * lr_t / lr

rho_t follows the learning rate down, and starts anew with it in each task. The ascent is SAM's; the authors' port to
torch has ASAM's as a flag. gsam_alpha 0.4 is from that port's example on CIFAR-10, where it goes with ASAM's ascent and
rho 2.

Passes: 2 forward, 2 backward
Memory: 2 P (perturbed weights, clean gradient)
"""

from dataclasses import dataclass

import torch

from flatcl.utils.arguments import flag
from flatcl.utils.optim._sharpness import EPS, Grads, SharpnessAware, dot, norm
from flatcl.utils.registry import OPTIMIZERS


@OPTIMIZERS.register("gsam")
class GSAM(SharpnessAware):
    @dataclass(frozen=True)
    class Args(SharpnessAware.Args):
        gsam_alpha: float = flag(0.4, "weight of the part of the clean gradient orthogonal to the perturbed one", low=0)
        gsam_rho_min: float | None = flag(None, "rho at a learning rate of 0; default: rho, a constant", low=0)

    def __init__(self, method, lr: float, *args, **kwargs):
        super().__init__(method, lr, *args, **kwargs)
        self.lr_max = lr

    @classmethod
    def check(cls, config, method) -> list[str]:
        problems = super().check(config, method)
        sets_rates = sum("learning_rate" in vars(part) for part in method.__mro__) > 1  # not only Method itself
        is_constant = config.lr_scheduler == "none" and not config.warmup_epochs and not sets_rates
        if config.gsam_rho_min is not None and is_constant:
            problems.append(
                "--gsam_rho_min has no effect with --lr_scheduler none: rho is constant. Choose a schedule."
            )
        if config.gsam_rho_min is not None and config.gsam_rho_min > config.rho:
            problems.append(
                f"--gsam_rho_min must be at most --rho {config.rho:g}, got {config.gsam_rho_min:g}. Give less."
            )
        return problems

    phase = SharpnessAware.phase  # rho follows the learning rate, which a phase has anyway

    def ascent(self, g: Grads, objective) -> Grads:
        rho, rho_min = self.args.rho, self.args.gsam_rho_min
        if rho_min is not None:
            rho = rho_min + (rho - rho_min) * min(1.0, self.base.lr / self.lr_max)
        return torch._foreach_mul(g, rho / (norm(g) + EPS))

    def descent(self, g: Grads, g_adv: Grads) -> Grads:
        square = dot(g_adv, g_adv)
        alpha = self.args.gsam_alpha * (square > 0).to(square)  # without g_p there is no part across it
        along = torch.where(square > 0, dot(g, g_adv) / square, 0.0)
        update = torch._foreach_mul(g_adv, 1 + alpha * along)
        torch._foreach_sub_(update, torch._foreach_mul(g, alpha))
        return update
