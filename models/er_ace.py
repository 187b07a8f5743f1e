"""ER-ACE, ER with Asymmetric Cross-Entropy (Caccia et al., ICLR 2022), eq. 3: the stream's loss ignores old classes.

    L = CE(f(x), y) over the classes of the batch and those still to come + CE(f(x'), y') over all classes

Linear head, as in the runs of the X-DER paper. From the second task on the stream's classes compete with each other and
with those from the highest class seen upwards, unless that is the last one. Replay begins with the second task; without
tasks, or with --task_free, with the second batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flatcl.models._method import Batch, Block, Loss, published
from flatcl.models._replay import ReplayMethod
from flatcl.models.sgd import XDER
from flatcl.utils.arguments import flag
from flatcl.utils.registry import METHODS


@METHODS.register("er_ace")
class ErAce(ReplayMethod):
    @dataclass(frozen=True)
    class Args(ReplayMethod.Args):
        task_free: bool = flag(False, "replay and mask in the first task too")

    published = published(
        XDER, {("seq-cifar100", 500, 2000): dict(lr=0.03, batch_size=32, minibatch_size=32, n_epochs=50)}
    )

    def __init__(self, net, args, context):
        super().__init__(net, args, context)
        self.register_buffer("seen", torch.zeros(context.benchmark.num_classes, dtype=torch.bool))
        self.register_buffer("num_tasks", torch.zeros((), dtype=torch.int64))
        self.is_replaying = self._may_replay()

    def _may_replay(self) -> bool:
        boundless = self.args.task_free or self.context.benchmark.setting == "general-continual"
        return boundless or int(self.num_tasks) > 0

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        competing = self._competing(batch.y).expand(len(batch.y), -1)
        stream = Block(batch.inputs, y=batch.y, ids=batch.ids, competing=competing)
        return (stream, *(self.replay() if self.is_replaying else ()))

    def _competing(self, y: Tensor) -> Tensor:
        """(K,) bool: the classes that take part in the stream's softmax."""
        present = torch.zeros_like(self.seen).index_fill(0, y, True)
        if not self.is_replaying:
            return torch.ones_like(present)
        classes = torch.arange(len(present), device=y.device)
        highest = torch.where(self.seen | present, classes, 0).max()
        return present | ((classes >= highest) & (highest < len(present) - 1))

    phase = ReplayMethod.phase

    def loss(self, stream: Block, memory: Block | None = None) -> Loss:
        logits = self.net(stream.x)
        masked = logits.masked_fill(~stream.competing, float("-inf"))
        rows = {"current": (stream, cross_entropy(masked, stream.y, reduction="none"))}
        if memory is not None:
            rows["replay"] = (memory, cross_entropy(self.net(memory.x), memory.y, reduction="none"))
        return Loss(rows, logits)

    def remember(self, batch: Batch, loss: Loss) -> None:
        super().remember(batch, loss)
        self.seen.index_fill_(0, batch.y, True)

    def end_task(self, task) -> None:
        super().end_task(task)
        self.num_tasks += 1
        self.is_replaying = True

    def load_state_dict(self, *args, **kwargs):
        keys = super().load_state_dict(*args, **kwargs)
        self.is_replaying = self._may_replay()
        return keys
