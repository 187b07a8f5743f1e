"""MER, Meta-Experience Replay (Riemer et al., ICLR 2019), algorithm 6: one big batch, learning rates as interpolations.

    theta_A = theta
    batch_num times: theta_W = theta; step on CE of stream and a draw; theta = theta_W + beta * (theta - theta_W)
    theta = theta_A + gamma * (theta - theta_A)

The paper's stream has one image a batch (published: --batch_size 1). All draws come before the first step. Under the
optimizer `mesa`, with beta or gamma below 1, the averaged weights follow the weights as they are before MER goes back.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flatcl.models._method import Batch, Block, published
from flatcl.models.er import ER
from flatcl.models.sgd import DER
from flatcl.utils.arguments import flag
from flatcl.utils.optim._driver import trainable
from flatcl.utils.registry import METHODS


@METHODS.register("mer")
class MER(ER):
    @dataclass(frozen=True)
    class Args(ER.Args):
        beta: float = flag(1.0, "share of each step that is kept", above=0, high=1)
        gamma: float = flag(1.0, "share of a batch's steps that is kept", above=0, high=1)
        batch_num: int = flag(1, "steps on each batch", low=1, high=1000)

    published = published(
        DER,
        {
            ("seq-mnist", 200, 500): dict(
                lr=0.1, batch_size=1, minibatch_size=128, n_epochs=1, beta=1.0, gamma=1.0, batch_num=1
            ),
            ("seq-mnist", 5120): dict(
                lr=0.03, batch_size=1, minibatch_size=128, n_epochs=1, beta=1.0, gamma=1.0, batch_num=1
            ),
            ("mnist-360", 200, 1000): dict(
                lr=0.2, batch_size=1, minibatch_size=128, n_epochs=1, beta=1.0, gamma=1.0, batch_num=3
            ),
            ("mnist-360", 500): dict(
                lr=0.1, batch_size=1, minibatch_size=128, n_epochs=1, beta=1.0, gamma=1.0, batch_num=3
            ),
        },
    )

    phase = ER.phase

    def steps(self, batch: Batch) -> Iterator[tuple[Block, ...]]:
        draws = [self.draw(batch) for _ in range(self.args.batch_num)]
        before = self._weights(self.args.gamma)
        for blocks in draws:
            within = self._weights(self.args.beta)
            yield blocks
            self._go_back(within, self.args.beta)
        self._go_back(before, self.args.gamma)

    def _weights(self, share: float) -> list[Tensor] | None:
        return None if share == 1 else [p.detach().clone() for p in trainable(self.net)]

    @torch.no_grad()
    def _go_back(self, to: list[Tensor] | None, share: float) -> None:
        if to is not None:
            torch._foreach_lerp_(trainable(self.net), to, 1 - share)
