"""CLS-ER, Complementary Learning System ER (Arani et al., ICLR 2022), eq. 1 to 4: two averages of the weights.

    L = CE(f([x; x']), [y; y']) + reg_weight * mean (f(x') - z')^2
    z' for each row: the logits of the stable model where its probability of y' is larger, else of the plastic one
    after a step, with probability freq: theta_ema <- a theta_ema + (1 - a) theta,  a = min(1 - 1 / (n + 1), alpha)

f(x') is a forward of its own: a BatchNorm batch of the memory's rows, as the averages' logits are. The averages are of
parameters alone; both models run in train mode while training, so that they keep BatchNorm statistics of their own. The
stable model is what is evaluated.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flatcl.models._method import Batch, Block, Loss, published
from flatcl.models._replay import ReplayMethod
from flatcl.models.der import logit_distance
from flatcl.utils.arguments import flag
from flatcl.utils.optim._driver import batchnorms
from flatcl.utils.registry import METHODS

CLS_ER = "CLS-ER paper (Arani et al., 2022), best args of its code"


def _row(stable_freq, stable_alpha, reg_weight, plastic_freq=1.0, plastic_alpha=0.99, **others) -> dict:
    return dict(
        reg_weight=reg_weight, stable_freq=stable_freq, stable_alpha=stable_alpha,
        plastic_freq=plastic_freq, plastic_alpha=plastic_alpha, **others,
    )  # fmt: skip


@METHODS.register("cls_er")
class ClsEr(ReplayMethod):
    @dataclass(frozen=True)
    class Args(ReplayMethod.Args):
        reg_weight: float = flag(0.15, "weight of the distance to the averages' logits", low=0)
        stable_freq: float = flag(0.7, "probability that a step updates the stable model", low=0, high=1)
        stable_alpha: float = flag(0.999, "decay of the stable model", low=0, below=1)
        plastic_freq: float = flag(1.0, "probability that a step updates the plastic model", low=0, high=1)
        plastic_alpha: float = flag(0.99, "decay of the plastic model", low=0, below=1)

    published = published(
        CLS_ER,
        {
            ("seq-mnist", 200): _row(0.9, 0.99, 2.0, lr=0.03, batch_size=10, minibatch_size=128, n_epochs=1),
            ("seq-mnist", 500): _row(0.9, 0.99, 2.0, lr=0.1, batch_size=10, minibatch_size=32, n_epochs=1),
            ("seq-mnist", 5120): _row(0.8, 0.99, 2.0, lr=0.1, batch_size=10, minibatch_size=32, n_epochs=1),
            ("perm-mnist", 200, 500): _row(0.8, 0.99, 1.0, lr=0.2, batch_size=128, minibatch_size=128, n_epochs=1),
            ("perm-mnist", 5120): _row(0.9, 0.99, 1.0, lr=0.2, batch_size=128, minibatch_size=128, n_epochs=1),
            ("rot-mnist", 200, 500, 5120): _row(
                1.0, 0.999, 0.75, lr=0.2, batch_size=128, minibatch_size=128, n_epochs=1
            ),
            ("mnist-360", 200): _row(1.0, 0.999, 0.75, lr=0.2, batch_size=16, minibatch_size=16, n_epochs=1),
            ("mnist-360", 500): _row(0.9, 0.99, 1.25, lr=0.2, batch_size=16, minibatch_size=32, n_epochs=1),
            ("mnist-360", 1000): _row(0.9, 0.99, 0.75, lr=0.2, batch_size=16, minibatch_size=128, n_epochs=1),
            ("seq-cifar10", 200): _row(
                0.1, 0.999, 0.15, 0.3, 0.999, lr=0.1, batch_size=32, minibatch_size=32, n_epochs=50
            ),
            ("seq-cifar10", 500): _row(
                0.1, 0.999, 0.15, 0.9, 0.999, lr=0.1, batch_size=32, minibatch_size=32, n_epochs=50
            ),
            ("seq-cifar10", 5120): _row(
                0.8, 0.999, 0.15, 1.0, 0.999, lr=0.1, batch_size=32, minibatch_size=32, n_epochs=50
            ),
            ("seq-tinyimg", 200): _row(
                0.04, 0.999, 0.1, 0.08, 0.999, lr=0.05, batch_size=32, minibatch_size=32, n_epochs=50
            ),
            ("seq-tinyimg", 500): _row(
                0.05, 0.999, 0.1, 0.08, 0.999, lr=0.05, batch_size=32, minibatch_size=32, n_epochs=50
            ),
            ("seq-tinyimg", 5120): _row(
                0.07, 0.999, 0.1, 0.08, 0.999, lr=0.05, batch_size=32, minibatch_size=32, n_epochs=50
            ),
        },
    )

    def __init__(self, net, args, context):
        super().__init__(net, args, context)
        self.stable = copy.deepcopy(net).requires_grad_(False)
        self.plastic = copy.deepcopy(net).requires_grad_(False)
        self.num_steps = 0

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        joint = self.replay_jointly(batch)
        if not joint.memory:
            return (joint,)
        memory = joint.take(lambda column: column[-joint.memory :], joint.memory)
        return (joint, Block(memory.x, joint.memory, **memory.columns, targets=self._targets(memory.x, memory.y)))

    @torch.no_grad()
    def _targets(self, x: Tensor, y: Tensor) -> Tensor:
        """(M, K): the averages' logits."""
        stable, plastic = self.stable(x), self.plastic(x)
        self.count(forward=2 * len(x))
        y = y[:, None]
        is_better = stable.softmax(1).gather(1, y) > plastic.softmax(1).gather(1, y)
        return torch.where(is_better, stable, plastic)

    phase = ReplayMethod.phase

    def loss(self, joint: Block, memory: Block | None = None) -> Loss:
        logits = self.net(joint.x)
        rows = {"replay": (joint, cross_entropy(logits, joint.y, reduction="none"))}
        if memory is not None:
            distance = logit_distance(self.net(memory.x), memory.targets)
            rows["consistency"] = (memory, self.args.reg_weight * distance)
        return Loss(rows, logits[: len(joint) - joint.memory])

    def remember(self, batch: Batch, loss: Loss) -> None:
        super().remember(batch, loss)
        if len(self.buffer) == 0:  # a policy that chooses rows at a task's end: so far the averages have seen no images
            for average in (self.stable, self.plastic):
                for own, theirs in zip(batchnorms(average), batchnorms(self.net), strict=True):
                    for into, of in zip(own.buffers(), theirs.buffers(), strict=True):
                        into.copy_(of)
        self.num_steps += 1
        for average, freq, alpha in (
            (self.plastic, self.args.plastic_freq, self.args.plastic_alpha),
            (self.stable, self.args.stable_freq, self.args.stable_alpha),
        ):
            if self.context.rng.random() < freq:
                decay = min(1 - 1 / (self.num_steps + 1), alpha)
                torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in self.net.parameters()], 1 - decay)

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        return self.stable(x)

    def get_extra_state(self) -> dict:
        return {**super().get_extra_state(), "num_steps": self.num_steps}

    def set_extra_state(self, state: dict) -> None:
        super().set_extra_state(state)
        self.num_steps = state["num_steps"]
