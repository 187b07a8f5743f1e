"""Sharpness-aware optimizers: a rule for the direction of the ascent, and one that combines gradients to an update.

A variant overrides `ascent` (the offset of the weights in the second pass) or `descent` (the update), or, for another
number of passes, `direction`, which gets gradients from `self.gradients(objective)` and `objective.gradient()` and
perturbs the weights by `with self.at(offset)`, never in another way. It resets in `begin_task`; state and `phase` are
as in `Driver`. Gradients are not copies: make a new list, do not change them in place. These flags are the same for all
variants: which loss the ascent uses, which rows are taken at perturbed weights, which parameters are perturbed, and
from which task on. Weight decay of the base optimizer acts only there, at the unperturbed weights; a method's penalties
(of `ewc_on`, of `si`, by --wd_reg) are part of its loss, which the perturbation increases.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from flatcl.utils.arguments import flag
from flatcl.utils.optim._base import Grads
from flatcl.utils.optim._driver import Driver, Wanted, dot, frozen_statistics, norm
from flatcl.utils.protocols import Config, Method
from flatcl.utils.registry import BACKBONES

__all__ = ["Grads", "SharpnessAware", "dot", "frozen_statistics", "norm"]

EPS = 1e-12  # added to norms that divide
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class SharpnessAware(Driver):
    """The structure of SAM: one clean pass, one pass at perturbed weights."""

    @dataclass(frozen=True)
    class Args(Driver.Args):
        rho: float = flag(0.05, "radius of the ball in which the worst point is sought", low=0)
        ascent_on: str = flag(
            "all",
            "which loss the perturbation increases: that of all rows, of the stream's rows (current), or of the "
            "memory's rows",
            choices=("all", "current", "memory"),
        )
        sharp_on: str = flag(
            "all",
            "which rows are taken at the perturbed weights: all, the stream's (current), or the memory's; the others "
            "keep their gradient at the unperturbed ones",
            choices=("all", "current", "memory"),
        )
        perturb: str = flag(
            "all",
            "which parameters are perturbed: all, all except biases and normalisation layers, or only normalisation "
            "layers",
            choices=("all", "no_norm_bias", "norm_only"),
        )
        sam_from_task: int = flag(0, "first task that is trained with perturbed weights, counted from 0", low=0)
        renormalize: bool = flag(False, "scale the update to the norm of the clean gradient (Stable SAM)")

    def __init__(
        self, method: nn.Module, lr: float, weight_decay: float, args: Any, rng: np.random.Generator | None = None
    ):
        super().__init__(method, lr, weight_decay, args, rng)
        self._unperturbed = self._find_unperturbed()

    @classmethod
    def check(cls, config: Config, method: type[Method]) -> list[str]:
        problems = []
        for name in ("ascent_on", "sharp_on"):
            if config.values[name] != "all" and not method.has_memory:
                problems.append(
                    f"--{name} {config.values[name]} needs a method whose loss has rows of the memory, {method.name} "
                    "has none. Use all."
                )
        if 0 < config.sam_from_task <= config.start_from:
            problems.append(
                f"--sam_from_task {config.sam_from_task} has no effect with --start_from {config.start_from}. "
                "Give more, or drop it."
            )
        tasks = 1 if config.joint or method.trains_jointly else config.stop_after or config.n_tasks
        if config.sam_from_task >= tasks:
            problems.append(
                f"--sam_from_task must be less than the number of tasks {tasks}, got {config.sam_from_task}. "
                "Give less, or use the optimizer sgd."
            )
        if config.perturb == "norm_only" and not _has_norms(config):
            why = "--freeze_backbone 1 leaves" if config.freeze_backbone else f"the backbone {config.backbone} has"
            problems.append(
                f"--perturb norm_only needs normalisation layers to train, {why} none. Choose another backbone, or "
                "perturb all."
            )
        return problems

    def ascent(self, g: Grads, objective: Any) -> Grads:
        """The offset of the weights for the second pass (a new list); `g`: clean gradient of what --ascent_on says."""
        return torch._foreach_mul(g, self.args.rho / (norm(g) + EPS))

    def descent(self, g: Grads, g_adv: Grads) -> Grads:
        """The update, from the clean gradient of the whole loss and the gradient at the perturbed weights."""
        return g_adv

    def direction(self, objective: Any) -> Grads:
        g, climbed = self.gradients(objective)
        with self.at(self._perturbed_part(self.ascent(climbed, objective))):
            g_adv = objective.gradient()
        return self.descent(g, g_adv)

    def gradients(self, objective: Any, wanted: Wanted = None) -> tuple[Grads, Grads]:
        """(gradient of the whole loss, gradient that --ascent_on selects, with zeros for what --perturb excludes)."""
        g, climbed = objective.gradients(self.args.ascent_on, wanted)
        return g, self._perturbed_part(climbed)

    @property
    def fewest_rows(self) -> int:
        """The fewest rows of a pass over part of a block: BatchNorm may have no statistics of a single row."""
        return 2 if self._batchnorms else 1

    phase = Driver.phase  # --sam_from_task, --ascent_on, --sharp_on: one answer for a task and its blocks

    def is_sharp(self, objective: Any) -> bool:
        """Whether this step is sharpness-aware, and not a plain step of the base optimizer."""
        has_rows = objective.has(self.args.ascent_on) and objective.has(self.args.sharp_on)
        return self.clock["task"] >= self.args.sam_from_task and has_rows

    def update(self, objective: Any) -> Grads:
        if not self.is_sharp(objective):
            return objective.gradient()
        objective.sharp_on = self.args.sharp_on
        update = self.direction(objective)
        if self.args.renormalize:
            scale = norm(objective.clean) / (norm(update) + EPS)
            objective.scale_last_guides(scale)
            return torch._foreach_mul(update, scale)
        return update

    def follow(self) -> bool:
        has_changed = super().follow()
        if has_changed:
            self._unperturbed = self._find_unperturbed()
        return has_changed

    def _perturbed_part(self, vector: Grads) -> Grads:
        """The vector with zeros for parameters that --perturb excludes."""
        if not self._unperturbed:
            return vector
        return [self._unperturbed.get(i, part) for i, part in enumerate(vector)]

    def _find_unperturbed(self) -> dict[int, torch.Tensor]:
        """{position of a parameter that --perturb excludes: zeros}."""
        if self.args.perturb == "all":
            return {}
        norms = {id(p) for m in self.method.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
        only = self.args.perturb == "norm_only"
        perturbed = [id(p) in norms if only else p.ndim > 1 and id(p) not in norms for p in self.params]
        return {i: torch.zeros_like(p) for i, (p, m) in enumerate(zip(self.params, perturbed, strict=True)) if not m}


def _has_norms(config: Config) -> bool:
    if config.freeze_backbone:  # the classifier, a Linear layer, is trained alone
        return False
    backbone = BACKBONES.load(config.backbone)
    with torch.random.fork_rng(devices=[]):
        net = backbone(config.benchmark.shape, config.benchmark.num_classes, config.view(backbone))
    norms = (module for module in net.modules() if isinstance(module, NORMS))
    return any(p.requires_grad for module in norms for p in module.parameters(recurse=False))
