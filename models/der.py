"""Dark Experience Replay, DER (Buzzega et al., NeurIPS 2020), eq. 5: replay matches the logits of the past.

The squared distance is a mean over classes as well as rows, to which the published alphas are tuned; stored logits are
those of the augmented image in train mode, before the update. (With --buffer_policy herding they are taken when a task
ends, of the un-augmented images in eval mode.)
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from flatcl.models._method import Batch, Block, Loss, published
from flatcl.models._replay import ReplayMethod
from flatcl.models.sgd import DER, XDER
from flatcl.utils.arguments import flag
from flatcl.utils.registry import METHODS


def logit_distance(logits: Tensor, targets: Tensor) -> Tensor:
    """(N, K), (N, K) -> (N,): mean over the classes of the squared difference."""
    return (logits - targets).square().mean(1)


@METHODS.register("der")
class Der(ReplayMethod):
    keeps_logits = True

    @dataclass(frozen=True)
    class Args(ReplayMethod.Args):
        alpha: float = flag(0.5, "weight of the replayed logits", low=0)

    published = published(
        DER,
        {
            ("perm-mnist", 200, 500): dict(lr=0.2, batch_size=128, minibatch_size=128, n_epochs=1, alpha=1.0),
            ("perm-mnist", 5120): dict(lr=0.2, batch_size=128, minibatch_size=128, n_epochs=1, alpha=0.5),
            ("rot-mnist", 200): dict(lr=0.2, batch_size=128, minibatch_size=128, n_epochs=1, alpha=1.0),
            ("rot-mnist", 500, 5120): dict(lr=0.2, batch_size=128, minibatch_size=128, n_epochs=1, alpha=0.5),
            ("seq-mnist", 200): dict(lr=0.03, batch_size=10, minibatch_size=10, n_epochs=1, alpha=0.2),
            ("seq-mnist", 500): dict(lr=0.03, batch_size=10, minibatch_size=128, n_epochs=1, alpha=1.0),
            ("seq-mnist", 5120): dict(lr=0.1, batch_size=10, minibatch_size=128, n_epochs=1, alpha=0.5),
            ("mnist-360", 200): dict(lr=0.1, batch_size=16, minibatch_size=64, n_epochs=1, alpha=0.5),
            ("mnist-360", 500): dict(lr=0.2, batch_size=16, minibatch_size=16, n_epochs=1, alpha=0.5),
            ("mnist-360", 1000): dict(lr=0.1, batch_size=8, minibatch_size=16, n_epochs=1, alpha=0.5),
            ("seq-cifar10", 200, 500, 5120): dict(lr=0.03, batch_size=32, minibatch_size=32, n_epochs=50, alpha=0.3),
            ("seq-tinyimg", 200, 500, 5120): dict(lr=0.03, batch_size=32, minibatch_size=32, n_epochs=100, alpha=0.1),
        },
    ) | published(
        XDER,
        {("seq-cifar100", 500, 2000): dict(lr=0.03, batch_size=32, minibatch_size=32, n_epochs=50, alpha=0.3)},
    )

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        return (batch.block, *self.replay())

    phase = ReplayMethod.phase

    def loss(self, stream: Block, memory: Block | None = None) -> Loss:
        logits = self.net(stream.x)
        rows = {"current": (stream, cross_entropy(logits, stream.y, reduction="none"))}
        if memory is not None:
            rows["logits"] = (memory, self.args.alpha * logit_distance(self.net(memory.x), memory.logits))
        return Loss(rows, logits)
