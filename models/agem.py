"""A-GEM, Averaged Gradient Episodic Memory (Chaudhry et al., ICLR 2019), eq. 11.

    g <- g - (g . g_ref / g_ref . g_ref) * g_ref    where g . g_ref < 0, g_ref of the loss on a draw from the memory

At the end of a task, buffer_size / number of tasks of its images, drawn at random, go into the memory, as in the code
behind the DER paper (the paper's own memory is filled while the stream passes). The update that the optimizer found is
what is projected; g_ref is taken at the unperturbed weights (under `sampa` at those of its look-ahead), by a pass after
the stream's.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flatcl.models._method import Batch, Block, Grads, Loss, published
from flatcl.models._passes import SharedMemory
from flatcl.models.sgd import DER
from flatcl.utils.optim._driver import dot
from flatcl.utils.registry import METHODS


@METHODS.register("agem")
class AGem(SharedMemory):
    settings = ("class-il", "domain-il")
    own_memory = True
    has_memory = False  # the memory is a reference, no part of the loss
    published = published(
        DER,
        {
            ("perm-mnist", 200, 500, 5120): dict(lr=0.1, batch_size=128, minibatch_size=128, n_epochs=1),
            ("rot-mnist", 200): dict(lr=0.1, batch_size=128, minibatch_size=128, n_epochs=1),
            ("rot-mnist", 500, 5120): dict(lr=0.3, batch_size=128, minibatch_size=128, n_epochs=1),
            ("seq-mnist", 200, 500, 5120): dict(lr=0.1, batch_size=10, minibatch_size=128, n_epochs=1),
            ("seq-cifar10", 200, 500, 5120): dict(lr=0.03, batch_size=32, minibatch_size=32, n_epochs=50),
            ("seq-tinyimg", 200, 500, 5120): dict(lr=0.01, batch_size=32, minibatch_size=32, n_epochs=100),
        },
    )

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        return (batch.block, *(block.as_reference() for block in self.replay()))

    phase = SharedMemory.phase

    def loss(self, stream: Block) -> Loss:
        logits = self.net(stream.x)
        return Loss({"current": cross_entropy(logits, stream.y, reduction="none")}, logits)

    def references(self, memory: Block) -> Iterator[tuple[str, Tensor]]:
        yield "memory", cross_entropy(self.net(memory.x), memory.y)

    def combine(self, update: Grads, guides: dict[str, Grads]) -> Grads:
        if "memory" not in guides:  # the first task
            return update
        reference = guides["memory"]
        conflict = dot(update, reference).clamp(max=0)
        square = dot(reference, reference)
        share = torch.where(conflict < 0, conflict / square, 0.0)
        return torch._foreach_sub(update, torch._foreach_mul(reference, share))

    def end_task(self, task) -> None:
        self.store_share(task)
