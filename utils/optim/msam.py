"""mSAM (Behdin et al., 2022 and 2023): SAM in each of m shards of the batch, each with an ascent of its own.

    g_j = gradient of shard j at w    e_j = rho * g_j / (|g_j| + 1e-12)
    u   = sum_j (|S_j| / |B|) * gradient of shard j at w + e_j

m is a number of shards, as in mSAM, not of rows, as in "m-sharpness". Each shard has its part of every block, of its
rows from the stream and of those from the memory, so that the mix of the loss is kept; there are never more shards than
the smallest of these has rows, nor so many that BatchNorm would see a single one. It normalises within a shard; its
running averages take m clean passes a step, with the momentum 1 - (1 - tau)^(1/m), which keeps their pace.

Passes: 2 forward, 2 backward (in 2 m shards)
Memory: 3 P (perturbed weights, clean gradient, sum)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from flatcl.utils.arguments import flag
from flatcl.utils.optim._sharpness import Grads, SharpnessAware
from flatcl.utils.registry import OPTIMIZERS


@OPTIMIZERS.register("msam")
class MSAM(SharpnessAware):
    in_shards = True

    @dataclass(frozen=True)
    class Args(SharpnessAware.Args):
        msam_shards: int = flag(4, "m: shards of the batch", low=1, high=10**6)

    phase = SharpnessAware.phase

    def direction(self, objective) -> Grads:
        update = clean = None
        number = objective.num_shards(self.args.msam_shards, self.fewest_rows)
        for share, shard in objective.shards(number):
            with self._slower_statistics(len(objective.own_shards(number))):
                g, climbed = self.gradients(shard)
            with self.at(self.ascent(climbed, shard)):
                g_adv = shard.gradient()
            update = _add_share(update, g_adv, share)
            if self.args.renormalize:
                clean = _add_share(clean, g, share)
        objective.clean = None if clean is None else objective.of_all_shards(clean, number)
        return objective.of_all_shards(update, number)

    @contextmanager
    def _slower_statistics(self, number: int) -> Iterator[None]:
        momenta = [layer.momentum for layer in self._batchnorms]
        try:
            for layer, tau in zip(self._batchnorms, momenta, strict=True):
                if number > 1 and tau is not None:  # None: a plain average over all passes
                    layer.momentum = 1 - (1 - tau) ** (1 / number)
            yield
        finally:
            for layer, tau in zip(self._batchnorms, momenta, strict=True):
                layer.momentum = tau


def _add_share(total: Grads | None, grads: Grads, share: float) -> Grads:
    if total is None:
        return torch._foreach_mul(grads, share)
    torch._foreach_add_(total, grads, alpha=share)
    return total
