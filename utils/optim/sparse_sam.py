"""Sparse SAM (Mi et al., NeurIPS 2022; Systematic Investigation, 2023): SAM that perturbs only some weights.

    e = rho * g / (|g| + 1e-7) * M    |g| over all weights, M binary, `sparsity` of it zero

    fisher   M: the largest of f = sum_i (gradient of CE(x_i, y_i))^2
    nm       M: in every `sparse_m` consecutive weights, the `sparse_n` with the largest f; biases and norms all
    dynamic  M: random at first; then the smallest |g| * M are dropped, and as many grown elsewhere at random

The mask is renewed at the first step of a task and of every `sparse_every`-th epoch. f comes from rows of that step,
stream and memory, before it is taken, sample by sample in eval mode: the authors' code takes it afterwards, with a
first mask of zeros, and lets it move BatchNorm's statistics. In a convolution, consecutive are the output channels, and
the mask lies on the weights whose f it was made from. A dynamic mask is renewed after that step's ascent, by its g, as
in the authors' code: in epoch t of T of a task (from 0) the share drop_rate * (1 + cos(pi t / T)) / 2 of it, so that in
tasks of one epoch it changes once, by drop_rate, which is the share throughout where --budget_rows leaves T open. That
code drops so many even where fewer can grow, and moves too few then; here as many are dropped as grow. The mask is kept
from task to task and its schedule restarts; new weights are moved. No time is saved by any of these masks: dense
products stay dense.

Passes: 2 forward, 2 backward
Memory: 3 P (perturbed weights, clean gradient, mask)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from flatcl.utils.arguments import flag
from flatcl.utils.engine.passes import eval_mode, row_gradients
from flatcl.utils.engine.phase import Ordinary
from flatcl.utils.optim._driver import flat
from flatcl.utils.optim._sharpness import Grads, SharpnessAware, norm
from flatcl.utils.registry import OPTIMIZERS

OWN_FLAGS = {
    "sparsity": ("fisher", "dynamic"), "fisher_rows": ("fisher", "nm"), "drop_rate": ("dynamic",),
    "sparse_n": ("nm",), "sparse_m": ("nm",),
}  # fmt: skip


@OPTIMIZERS.register("sparse_sam")
class SparseSAM(SharpnessAware):
    fill = {"mask": 1.0}

    @dataclass(frozen=True)
    class Args(SharpnessAware.Args):
        rho: float = flag(0.1, "radius of the ball in which the worst point is sought", low=0)
        sparse_mask: str = flag("fisher", "how the mask is made", choices=("fisher", "dynamic", "nm"))
        sparsity: float = flag(0.5, "share of the weights that is not perturbed", low=0, below=1)
        sparse_every: int = flag(1, "epochs from one mask to the next", low=1)
        fisher_rows: int = flag(16, "rows of a step that the Fisher information is computed from", low=1)
        drop_rate: float = flag(0.5, "share of a dynamic mask that is renewed when a task begins", low=0, high=1)
        sparse_n: int = flag(2, "number of weights perturbed in each group", low=1)
        sparse_m: int = flag(4, "size of a group: consecutive weights", low=2)

    @classmethod
    def check(cls, config, method) -> list[str]:
        problems = super().check(config, method)
        for name, masks in OWN_FLAGS.items():
            if config.origins[name] == "argv" and config.sparse_mask not in masks:
                problems.append(
                    f"--{name} has no effect with --sparse_mask {config.sparse_mask}. Use {' or '.join(masks)}."
                )
        if config.sparse_mask == "nm" and config.sparse_n >= config.sparse_m:
            problems.append(
                f"--sparse_n must be less than --sparse_m {config.sparse_m}, got {config.sparse_n}. Give less."
            )
        return problems

    def phase(self) -> bool | Ordinary:
        return Ordinary("sparse_sam renews its mask", for_good=False) if self._is_due else False

    def tick(self, objective) -> None:
        if self._is_due and self.is_sharp(objective):
            self.clock["renewed"] = self.clock["epoch"]

    def direction(self, objective) -> Grads:
        self._renew_mask(objective)
        g, climbed = self.gradients(objective)
        mask = self.pending.get("mask", self.state.get("mask"))
        offset = torch._foreach_mul(climbed, self.args.rho / (norm(climbed) + 1e-7))
        torch._foreach_mul_(offset, mask)
        with self.at(offset):
            g_adv = objective.gradient()
        if self._is_due and self.args.sparse_mask == "dynamic":
            self.pending["mask"] = self._regrown(mask, g)
        return g_adv

    @property
    def _is_due(self) -> bool:
        epoch = self.clock["epoch"]
        is_new = epoch % self.args.sparse_every == 0 and self.clock.get("renewed", -1) != epoch
        return is_new or "mask" not in self.state  # also after an epoch without a step that needed one

    def _renew_mask(self, objective) -> None:
        if not self._is_due:
            return
        if self.args.sparse_mask != "dynamic":
            scores = self._fisher(objective)
            nm = self.args.sparse_mask == "nm"
            self.pending["mask"] = [self._n_of_m(f) for f in scores] if nm else self._largest(scores)
        elif "mask" not in self.state:
            ones = self._size - math.ceil(self.args.sparsity * self._size - 1e-9)
            self.pending["mask"] = self._unflatten(self._top(self._random(), ones))

    def _fisher(self, objective) -> Grads:
        """Sum over rows of the squared gradients of the cross entropy, sample by sample, nothing else moved."""
        blocks = [block for block in objective.whole if "y" in block.columns]
        x, y = (torch.cat([getattr(block, name) for block in blocks]) for name in ("x", "y"))
        number = min(self.args.fisher_rows, len(y))
        rows = torch.arange(number, device=y.device) * len(y) // number
        x, y = x[rows], y[rows]
        objective.tally.forward_rows += number
        objective.tally.backward_rows += number
        net = self.method.net
        with eval_mode(net):
            parts = [[g.square().sum(0) for g in gradients] for gradients, _ in row_gradients(net, x, y)]
        sums = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        names = [f"net.{name}" for name, p in net.named_parameters() if p.requires_grad]
        found = dict(zip(names, sums, strict=True))
        return [found.get(name, torch.zeros_like(p)) for name, p in zip(self.names, self.params, strict=True)]

    def _largest(self, scores: Grads) -> Grads:
        kept = math.floor(self._size * (1 - self.args.sparsity) + 1e-9)
        return self._unflatten(self._top(flat(scores), kept))

    def _n_of_m(self, scores: Tensor) -> Tensor:
        """The mask of one parameter; (out, in) as stored, (out, in, h, w) along the output channels."""
        if scores.ndim < 2:
            return torch.ones_like(scores)
        ordered = scores if scores.ndim == 2 else scores.movedim(0, -1)
        n, m, length = self.args.sparse_n, self.args.sparse_m, ordered.shape[-1]
        groups = pad(ordered, (0, -length % m), value=-1.0).unflatten(-1, (-1, m))
        best = torch.zeros_like(groups).scatter_(-1, groups.topk(n).indices, 1.0)
        mask = best.flatten(-2)[..., :length]
        return mask.contiguous() if scores.ndim == 2 else mask.movedim(-1, 0).contiguous()

    def _regrown(self, mask: Grads, g: Grads) -> Grads:
        epoch, n_epochs = self.clock["epoch"], self.clock.get("n_epochs", 0)
        rate = self.args.drop_rate * (1 + math.cos(math.pi * epoch / n_epochs if n_epochs else 0.0)) / 2
        still = self.args.sparsity * self._size
        in_mask, m = self._size - still, flat(mask)
        new = min(in_mask * rate, still)
        kept = self._top((flat(g).abs() + 1e-7) * m, math.floor(in_mask - new + 1e-9))
        # where there is room; where a mask of parameters that have grown has less, what was dropped comes back
        grown = self._top((self._random() + 1e-7 + (1 - m)) * (1 - kept), math.floor(new + 1e-9))
        return self._unflatten(kept + grown)

    @property
    def _size(self) -> int:
        return sum(p.numel() for p in self.params)

    def _random(self) -> Tensor:
        return torch.from_numpy(self.rng.random(self._size)).to(self.device, self.params[0].dtype)

    @staticmethod
    def _top(scores: Tensor, number: int) -> Tensor:
        return torch.zeros_like(scores).index_fill_(0, scores.topk(number).indices, 1.0)

    def _unflatten(self, flat: Tensor) -> Grads:
        parts = flat.split([p.numel() for p in self.params])
        return [part.view_as(p).clone() for part, p in zip(parts, self.params, strict=True)]

    def begin_task(self, task) -> None:
        super().begin_task(task)
        self.clock["renewed"] = -1

    def begin_epoch(self, epoch: int, n_epochs: int | None = None) -> None:
        super().begin_epoch(epoch, n_epochs)
        self.clock["n_epochs"] = n_epochs or 0
