"""LwF.MC, learning without forgetting for many classes (Rebuffi et al., CVPR 2017): iCaRL's loss without its memory.

    L = mean over rows and classes seen of BCE(sigmoid(f(x)), q) + wd_reg * |theta|^2
    q = sigmoid(f_old(x)) for the classes of past tasks, the label for those of the present one

f_old is the network at the end of the last task, in eval mode, on the same augmented images. The head is linear, as in
X-DER's code; the figures of that paper are its (in Mammoth's list of best arguments the row stands under `lwf`). That
code has no |theta|^2 in the loss, but the weight decay of SGD, whose gradient is half as large for the same weight.
"""

from dataclasses import dataclass
from typing import Any

from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from flatcl.models._incremental import Incremental, decay
from flatcl.models._method import Batch, Block, Loss, published
from flatcl.models._passes import WithTeacher
from flatcl.models.sgd import XDER
from flatcl.utils.arguments import flag
from flatcl.utils.registry import METHODS


@METHODS.register("lwf_mc")
class LwfMc(WithTeacher, Incremental):
    @dataclass(frozen=True)
    class Args:
        wd_reg: float = flag(0.0005, "weight of |theta|^2 in the loss", low=0)

    published = published(
        XDER, {("seq-cifar100",): dict(lr=0.03, batch_size=32, n_epochs=50, optim_wd=0.0005, wd_reg=0.0)}
    )

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        targets = one_hot(batch.y, self.context.benchmark.num_classes)[:, : self.seen].to(batch.inputs.dtype)
        if self.teacher is not None:
            targets[:, : self.past] = self.taught(batch.inputs)[:, : self.past].sigmoid()
        return (Block(batch.inputs, y=batch.y, ids=batch.ids, targets=targets),)

    phase = Incremental.phase

    def loss(self, stream: Block) -> Loss:
        logits = self.net(stream.x)
        costs = binary_cross_entropy_with_logits(logits[:, : self.seen].float(), stream.targets, reduction="none")
        return Loss({"classes": costs.mean(1)}, logits, decay(self.net, self.args.wd_reg))

    def end_task(self, task: Any) -> None:
        self.keep_teacher()
