"""FDR, Function Distance Regularisation (Benjamin et al., ICLR 2019), as the code behind the DER paper does it.

    step on CE(f(x), y), then a step of its own on mean_i | softmax(f(x'_i)) - softmax(z'_i) |_2

The norm is not squared and its weight is `fdr_weight` = 1: the published runs list an alpha that their code does not
use. At the end of task t the memory has B / (t + 1) images of each task, with the logits of their augmented view.

Two optimizer steps a batch, on two losses: an optimizer that keeps a gradient from one step to the next (`looksam`,
`friendly_sam`, `sampa`) then uses gradients of the other loss too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from flatcl.models._method import Batch, Block, Loss, published
from flatcl.models._passes import SharedMemory, shuffled
from flatcl.models.sgd import DER
from flatcl.utils.arguments import flag
from flatcl.utils.registry import METHODS


@METHODS.register("fdr")
class FDR(SharedMemory):
    settings = ("class-il", "domain-il")
    own_memory = True

    @dataclass(frozen=True)
    class Args(SharedMemory.Args):
        fdr_weight: float = flag(1.0, "weight of the distance to the remembered outputs", low=0)

    published = published(
        DER,
        {
            ("perm-mnist", 200, 500, 5120): dict(lr=0.1, batch_size=128, minibatch_size=128, n_epochs=1),
            ("rot-mnist", 200, 500, 5120): dict(lr=0.2, batch_size=128, minibatch_size=128, n_epochs=1),
            ("seq-mnist", 200): dict(lr=0.03, batch_size=128, minibatch_size=128, n_epochs=1),
            ("seq-mnist", 500, 5120): dict(lr=0.1, batch_size=128, minibatch_size=128, n_epochs=1),
            ("seq-cifar10", 200, 500, 5120): dict(lr=0.03, batch_size=32, minibatch_size=32, n_epochs=50),
            ("seq-tinyimg", 200, 500, 5120): dict(lr=0.03, batch_size=32, minibatch_size=32, n_epochs=100),
        },
    )

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        return (batch.block, *self.replay())

    def steps(self, batch: Batch) -> Iterator[tuple[Block, ...]]:
        for block in self.draw(batch):
            yield (block,)

    phase = SharedMemory.phase

    def loss(self, block: Block) -> Loss:
        logits = self.net(block.x)
        if not block.memory:
            return Loss({"current": cross_entropy(logits, block.y, reduction="none")}, logits)
        gap = logits.softmax(1) - block.logits.softmax(1)
        return Loss({"function": self.args.fdr_weight * torch.linalg.vector_norm(gap, dim=1)})

    @torch.no_grad()
    def end_task(self, task) -> None:
        kept = self.buffer.all()
        known = kept["task"].unique().tolist() if kept else []
        share = self.buffer.capacity // (len(known) + 1)
        new = self._of_this_task(task, share)
        for index in known[::-1]:
            firsts = (kept["task"] == index).nonzero().squeeze(1)[:share]
            new = {name: torch.cat((kept[name][firsts], rows)) for name, rows in new.items()}
        self.buffer.replace(**new)

    def _of_this_task(self, task, share: int) -> dict[str, torch.Tensor]:
        parts, missing = [], share
        for x, y, ids in shuffled(self, task.train, self.context.config.batch_size):
            logits = self.net(self.context.augment(x))  # of whole batches, in train mode
            self.count(forward=len(x))
            parts.append([column[:missing] for column in (x, y, ids, logits, torch.full_like(y, task.index))])
            missing -= len(parts[-1][0])
            if missing == 0:
                break
        return dict(zip(("x", "y", "ids", "logits", "task"), map(torch.cat, zip(*parts, strict=True)), strict=True))
