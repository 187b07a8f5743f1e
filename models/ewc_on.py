"""Online EWC (Kirkpatrick et al., 2017; Schwarz et al., ICML 2018), as the code behind the DER paper does it.

    L = CE(f(x), y) + e_lambda * sum F (theta - theta*)^2
    F <- gamma * F + 1/N sum_i p_i * (gradient of log p_i)^2,  p_i = p(y_i | x_i)    at the end of a task

Without the paper's 1/2; each squared gradient is weighted with the probability of the label (the empirical Fisher
information, `--fisher_weight none`, is not), and N counts the last batch as full. Images are augmented and pass one by
one, BatchNorm in train mode: its running averages move along.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flatcl.models._method import Block, Loss, Method, published
from flatcl.models._passes import Drawing, shuffled
from flatcl.models.sgd import DER
from flatcl.utils.arguments import flag
from flatcl.utils.engine.passes import square_sums
from flatcl.utils.optim._driver import batchnorms, flat, frozen_statistics, trainable
from flatcl.utils.registry import METHODS

PASS = 256  # images of one call; after as many, running averages of momentum 0.1 have forgotten what was before

WEIGHTS = {"probability": lambda costs: (-costs).exp(), "none": torch.ones_like}


@METHODS.register("ewc_on")
class EwcOn(Drawing, Method):
    settings = ("class-il", "domain-il")

    @dataclass(frozen=True)
    class Args:
        e_lambda: float = flag(10.0, "weight of the penalty", low=0)
        gamma: float = flag(1.0, "how much of the earlier tasks' Fisher information is kept", low=0, high=1)
        fisher_weight: str = flag(
            "probability", "weight of an image's squared gradient: its label's probability, or 1 (none)",
            choices=("probability", "none"),
        )  # fmt: skip

    published = published(
        DER,
        {
            ("perm-mnist",): dict(lr=0.1, batch_size=128, n_epochs=1, e_lambda=0.7, gamma=1.0),
            ("rot-mnist",): dict(lr=0.1, batch_size=128, n_epochs=1, e_lambda=0.7, gamma=1.0),
            ("seq-mnist",): dict(lr=0.03, batch_size=10, n_epochs=1, e_lambda=90.0, gamma=1.0),
            ("seq-cifar10",): dict(lr=0.03, batch_size=32, n_epochs=50, e_lambda=10.0, gamma=1.0),
            ("seq-tinyimg",): dict(lr=0.03, batch_size=32, n_epochs=100, e_lambda=25.0, gamma=1.0),
        },
    )

    @classmethod
    def check(cls, config, benchmark) -> list[str]:
        problems = super().check(config, benchmark)
        if config.sync_bn:
            problems.append(
                "--sync_bn 1 cannot be used with ewc_on, which needs the gradients of single rows, and torch's "
                "SyncBatchNorm has none. Drop it."
            )
        return problems

    def __init__(self, net, args, context):
        super().__init__(net, args, context)
        size = sum(p.numel() for p in trainable(net))
        self.register_buffer("fisher", torch.zeros(size))
        self.register_buffer("anchor", torch.zeros(size))  # theta*

    def theta(self) -> Tensor:
        """(P,): all weights that are trained."""
        return flat(trainable(self.net))

    phase = Method.phase

    def loss(self, stream: Block) -> Loss:
        logits = self.net(stream.x)
        penalty = self.args.e_lambda * (self.fisher * (self.theta() - self.anchor).square()).sum()
        rows = {"current": cross_entropy(logits, stream.y, reduction="none")}
        return Loss(rows, logits, {"ewc": penalty})

    def end_task(self, task) -> None:
        batch_size = self.context.config.batch_size
        total, seen, last = torch.zeros_like(self.fisher), 0, None
        for images, labels, _ in shuffled(self, task.train, PASS):
            inputs = self.context.augment(images)
            with frozen_statistics(self.net):
                sums = square_sums(self.net, inputs, labels, WEIGHTS[self.args.fisher_weight])
            total += flat(sums)
            seen += len(labels)
            last = inputs if last is None else torch.cat((last, inputs))[-PASS:]
        self.count(forward=seen, backward=seen)
        if batchnorms(self.net):  # their running averages: those of the last images are all that is left of them
            with torch.no_grad():
                for image in last.split(1):
                    self.net(image)
            self.count(forward=len(last))
        self.fisher.mul_(self.args.gamma).add_(total / (math.ceil(seen / batch_size) * batch_size))
        self.anchor.copy_(self.theta().detach())
