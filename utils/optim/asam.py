"""ASAM (Kwon et al., ICML 2021), eq. 8: SAM in a ball that scales with the weights.

    e = rho * T^2 g / (|T g| + 1e-16)    T = |w| + asam_eta on weights, 1 on biases

Weights are the parameters that a module calls `weight...` (BatchNorm's included), as in the authors' code, and all
others of two or more dimensions but biases: that code would leave out a matrix for its name. asam_eta is the paper's
0.01, where the code's command line has 0; unlike that code, BatchNorm's running statistics move in the clean pass only.

Passes: 2 forward, 2 backward
Memory: 2 P (perturbed weights, clean gradient)
"""

from dataclasses import dataclass

import torch

from flatcl.utils.arguments import flag
from flatcl.utils.optim._sharpness import Grads, SharpnessAware, norm
from flatcl.utils.registry import OPTIMIZERS


@OPTIMIZERS.register("asam")
class ASAM(SharpnessAware):
    @dataclass(frozen=True)
    class Args(SharpnessAware.Args):
        rho: float = flag(0.5, "radius of the scaled ball in which the worst point is sought", low=0)
        asam_eta: float = flag(0.01, "added to |w|, so that a weight of zero is perturbed too", low=0)

    phase = SharpnessAware.phase

    @torch.no_grad()
    def ascent(self, g: Grads, objective) -> Grads:
        scaled = [i for i, (name, p) in enumerate(zip(self.names, self.params, strict=True)) if _is_weight(name, p)]
        if not scaled:
            return torch._foreach_mul(g, self.args.rho / (norm(g) + 1e-16))
        scale = torch._foreach_add(torch._foreach_abs([self.params[i] for i in scaled]), self.args.asam_eta)
        t_g = list(g)
        for i, product in zip(scaled, torch._foreach_mul([g[i] for i in scaled], scale), strict=True):
            t_g[i] = product
        offset = torch._foreach_mul(t_g, self.args.rho / (norm(t_g) + 1e-16))
        torch._foreach_mul_([offset[i] for i in scaled], scale)
        return offset


def _is_weight(name: str, parameter: torch.Tensor) -> bool:
    own_name = name.rsplit(".", 1)[-1]  # an index, in a ParameterList
    return "weight" in own_name or (parameter.ndim > 1 and "bias" not in own_name)
