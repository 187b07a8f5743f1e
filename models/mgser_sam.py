"""MGSER-SAM (Li & Tang, IJCNN 2024): soft replay under SAM, guided by the clean gradient of the memory.

    L_t = CE(f(x), y)    L_s = alpha * mean (f(x') - z')^2 + beta * CE(f(x''), y'')
    g~  = gradient of L_t + L_s at theta + rho * (g_t + g_s) / |g_t + g_s|
    u   = g~ + guide * g_s, with g_s the gradient of L_s at the unmoved weights

The loss is DER++'s and the ascent is the optimizer's (`sam` unless told otherwise); this file adds the guide. The
forwards of stream and memory are separate, so g_s costs no extra pass. With `--guide 0` it is DER++ under SAM, bit for
bit. The authors' code and hyperparameters are not public: ours are DER++'s, with rho and guide as stated below.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flatcl.models._method import Grads, Objective, ours
from flatcl.models.derpp import DerPP
from flatcl.utils.arguments import flag
from flatcl.utils.optim._sharpness import dot, norm
from flatcl.utils.registry import METHODS


@METHODS.register("mgser_sam")
class MgserSam(DerPP):
    default_optimizer = "sam"
    published = ours(
        DerPP.published, "validation splits of four MNIST streams, tests/records/mgser_validation", rho=0.1, guide=1.0
    )

    @dataclass(frozen=True)
    class Args(DerPP.Args):
        guide: float = flag(1.0, "weight of the memory's clean gradient in the update", low=0)
        guide_on: str = flag("memory", "which memory terms guide", choices=("memory", "logits", "labels"))

    def __init__(self, net, args, context):
        super().__init__(net, args, context)
        if args.guide > 0:
            self.guides = {"memory": ("logits", "labels") if args.guide_on == "memory" else (args.guide_on,)}

    phase = DerPP.phase

    def combine(self, update: Grads, guides: dict[str, Grads]) -> Grads:
        if "memory" not in guides:  # the first steps, before there is a memory
            return update
        return torch._foreach_add(update, guides["memory"], alpha=self.args.guide)

    def diagnose(self, objective: Objective, update: Grads) -> dict[str, Tensor]:
        """Whether the conflict that the paper speaks of is there: angles, norms and sharpness gaps of this step.

        Gaps and the adversarial gradient are of the step's second pass, under optimizers that have one over all rows.
        """
        if "memory" not in objective.guides or objective.clean is None or not objective.passes:
            return {}
        (clean, g), *perturbed = objective.passes
        g_s = objective.guides["memory"]
        g_t = torch._foreach_sub(g, g_s)
        found = {
            "cos_current_memory": _cosine(g_t, g_s),
            "norm_current": norm(g_t),
            "norm_memory": norm(g_s),
        }
        if perturbed:
            loss, g_adv = perturbed[0]
            gap = {name: loss.terms[name] - clean.terms[name] for name in clean.terms}
            found["cos_adversarial_memory"] = _cosine(g_adv, g_s)
            found["sharpness_current"] = gap["current"]
            found["sharpness_memory"] = gap["logits"] + gap["labels"]
        return found


def _cosine(a: Grads, b: Grads) -> Tensor:
    return dot(a, b) / (norm(a) * norm(b) + 1e-12)
