"""MGSER-SAM (Li & Tang, IJCNN 2024): soft replay under SAM, guided by the clean gradient of the memory.

    L_t = CE(f(x), y)    L_s = alpha * mean (f(x') - z')^2 + beta * CE(f(x''), y'')
    g~  = gradient of L_t + L_s at theta + rho * (g_t + g_s) / |g_t + g_s|
    u   = g~ + guide * g_s, with g_s the gradient of L_s at the unperturbed weights

The loss is DER++'s and the ascent is the optimizer's (`sam` unless told otherwise); this file adds the guide. The
forwards of stream and memory are separate, so g_s costs no extra pass. With `--guide 0` it is DER++ under SAM, bit for
bit. The authors' code and hyperparameters are not public: ours are DER++'s, with rho and guide as stated below.

The paper's text is not public either, so other readings of it are a flag away. `--ascent_on` says the loss of which
rows the perturbation increases, `--sharp_on` which rows are taken at the perturbed weights. `--guide_mode align` is the
alignment of Gradient Vaccine (Wang et al., ICLR 2021), which UniGrad-FS applies to gradients at perturbed weights. With
m the memory's gradient in the step's last pass, c = g~ - m the rest of the update, phi their cosine and p the running
mean of phi:

    u = g~ + guide * t * (|c| / |m| m + |m| / |c| c)    t = p sqrt(1 - phi^2) / sqrt(1 - p^2) - phi, 0 if phi >= p

With guide 1, each of the two then has the cosine p to what the other was. Under an optimizer whose update is made of
several gradients (cr_sam, c_flat, gsam, sampa, looksam), c has what the others of them bring.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flatcl.models._method import Batch, Grads, Loss, Objective, ours, ours_online
from flatcl.models.derpp import DerPP
from flatcl.utils.arguments import flag
from flatcl.utils.optim._sharpness import dot, norm
from flatcl.utils.protocols import Benchmark, Config
from flatcl.utils.registry import METHODS


@METHODS.register("mgser_sam")
class MgserSam(DerPP):
    default_optimizer = "sam"
    published = {
        **ours(
            DerPP.published, "validation splits of MNIST streams, tests/records/mgser_validation", rho=0.1, guide=1.0
        ),
        **ours_online("validation split of seq-cifar10, tests/records/cifar10_online", rho=0.01, guide=0.5),
    }

    @dataclass(frozen=True)
    class Args(DerPP.Args):
        guide: float = flag(1.0, "weight of the memory's clean gradient in the update; of the alignment", low=0)
        guide_on: str = flag("memory", "which memory terms guide", choices=("memory", "logits", "labels"))
        guide_mode: str = flag(
            "add",
            "how the memory guides: its clean gradient is added, or its gradient and the rest of the update are "
            "aligned where they conflict more than they usually do",
            choices=("add", "align"), fixed=True,
        )  # fmt: skip
        align_beta: float = flag(
            0.01, "guide_mode align: weight of the newest cosine in the running mean", above=0, below=1
        )

    def __init__(self, net, args, context):
        super().__init__(net, args, context)
        if args.guide > 0:
            self.guides = {"memory": ("logits", "labels") if args.guide_on == "memory" else (args.guide_on,)}
        self.guides_last = args.guide_mode == "align"
        if self.guides_last:
            dtype = next(net.parameters()).dtype
            self.register_buffer("cosine", torch.tensor(float("nan"), dtype=dtype))  # of this step
            self.register_buffer("usual_cosine", torch.zeros((), dtype=dtype))

    @classmethod
    def check(cls, config: Config, benchmark: type[Benchmark]) -> list[str]:
        problems = super().check(config, benchmark)
        if config.guide_mode == "add" and config.origins["align_beta"] == "argv":
            problems.append("--align_beta has no effect with --guide_mode add. Use align, or drop it.")
        for name in ("guide_mode", "guide_on"):
            if config.guide == 0 and config.values[name] != config.flags[name].default:
                problems.append(f"--{name} has no effect with --guide 0. Give a weight, or drop it.")
        return problems

    phase = DerPP.phase

    def combine(self, update: Grads, guides: dict[str, Grads]) -> Grads:
        if "memory" not in guides:  # the first steps, before there is a memory
            return update
        if self.args.guide_mode == "align":
            return self._aligned(update, guides["memory"])
        return torch._foreach_add(update, guides["memory"], alpha=self.args.guide)

    @torch.no_grad()
    def _aligned(self, update: Grads, memory: Grads) -> Grads:
        rest = torch._foreach_sub(update, memory)
        of_rest, of_memory, p = norm(rest), norm(memory), self.usual_cosine
        usable = of_rest * of_memory > 0
        phi = torch.where(usable, dot(rest, memory) / (of_rest * of_memory), 0.0).clamp(-1, 1)
        ratio = torch.where(usable, of_rest / of_memory, 1.0)
        t = p * (1 - phi**2).sqrt() / (1 - p**2).clamp_min(1e-6).sqrt() - phi
        t = torch.where(usable & (phi < p), self.args.guide * t, 0.0)
        aligned = torch._foreach_add(update, torch._foreach_mul(memory, t * ratio))
        torch._foreach_add_(aligned, torch._foreach_mul(rest, t / ratio))
        self.cosine.copy_(phi)  # for `remember`
        return aligned

    def remember(self, batch: Batch, loss: Loss) -> None:
        super().remember(batch, loss)
        if self.guides_last:
            newer = self.usual_cosine.lerp(self.cosine, self.args.align_beta)
            self.usual_cosine.copy_(torch.where(newer.isfinite(), newer, self.usual_cosine))

    def diagnose(self, objective: Objective, update: Grads) -> dict[str, Tensor]:
        """Whether the conflict that the paper speaks of is there: angles, norms and sharpness gaps of this step.

        Gaps and the adversarial gradient are of the step's second pass, under optimizers that have one over all rows.
        """
        if "memory" not in objective.guides or objective.clean is None or not objective.passes:
            return {}
        if self.guides_last:
            return {"cos_rest_memory": self.cosine, "usual_cos_rest_memory": self.usual_cosine}
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
