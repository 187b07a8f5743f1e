"""Dark Experience Replay++ (Buzzega et al., NeurIPS 2020), eq. 6: DER plus the labels of a second, independent draw.

Three forwards (stream, logits, labels), hence three BatchNorm batches, as in the code behind the paper.
"""

from dataclasses import dataclass

from torch.nn.functional import cross_entropy

from flatcl.models._method import Batch, Block, Loss, published
from flatcl.models.der import Der, logit_distance
from flatcl.models.sgd import DER, XDER
from flatcl.utils.arguments import flag
from flatcl.utils.registry import METHODS


@METHODS.register("derpp")
class DerPP(Der):
    @dataclass(frozen=True)
    class Args(Der.Args):
        beta: float = flag(0.5, "weight of the replayed labels", low=0)

    published = published(
        DER,
        {
            ("perm-mnist", 200): dict(lr=0.1, batch_size=128, minibatch_size=128, n_epochs=1, alpha=1.0, beta=1.0),
            ("perm-mnist", 500): dict(lr=0.2, batch_size=128, minibatch_size=128, n_epochs=1, alpha=1.0, beta=0.5),
            ("perm-mnist", 5120): dict(lr=0.2, batch_size=128, minibatch_size=128, n_epochs=1, alpha=0.5, beta=1.0),
            ("rot-mnist", 200): dict(lr=0.1, batch_size=128, minibatch_size=128, n_epochs=1, alpha=1.0, beta=0.5),
            ("rot-mnist", 500): dict(lr=0.2, batch_size=128, minibatch_size=128, n_epochs=1, alpha=0.5, beta=1.0),
            ("rot-mnist", 5120): dict(lr=0.2, batch_size=128, minibatch_size=128, n_epochs=1, alpha=0.5, beta=0.5),
            ("seq-mnist", 200): dict(lr=0.03, batch_size=10, minibatch_size=128, n_epochs=1, alpha=0.2, beta=1.0),
            ("seq-mnist", 500): dict(lr=0.03, batch_size=10, minibatch_size=10, n_epochs=1, alpha=1.0, beta=0.5),
            ("seq-mnist", 5120): dict(lr=0.1, batch_size=10, minibatch_size=64, n_epochs=1, alpha=0.2, beta=0.5),
            ("mnist-360", 200, 500): dict(lr=0.2, batch_size=16, minibatch_size=16, n_epochs=1, alpha=0.5, beta=1.0),
            ("mnist-360", 1000): dict(lr=0.2, batch_size=16, minibatch_size=128, n_epochs=1, alpha=0.2, beta=1.0),
            ("seq-cifar10", 200): dict(lr=0.03, batch_size=32, minibatch_size=32, n_epochs=50, alpha=0.1, beta=0.5),
            ("seq-cifar10", 500): dict(lr=0.03, batch_size=32, minibatch_size=32, n_epochs=50, alpha=0.2, beta=0.5),
            ("seq-cifar10", 5120): dict(lr=0.03, batch_size=32, minibatch_size=32, n_epochs=50, alpha=0.1, beta=1.0),
            ("seq-tinyimg", 200): dict(lr=0.03, batch_size=32, minibatch_size=32, n_epochs=100, alpha=0.1, beta=1.0),
            ("seq-tinyimg", 500): dict(lr=0.03, batch_size=32, minibatch_size=32, n_epochs=100, alpha=0.2, beta=0.5),
            ("seq-tinyimg", 5120): dict(lr=0.03, batch_size=32, minibatch_size=32, n_epochs=100, alpha=0.1, beta=0.5),
        },
    ) | published(
        XDER,
        {
            ("seq-cifar100", 500, 2000): dict(
                lr=0.03, batch_size=32, minibatch_size=32, n_epochs=50, alpha=0.1, beta=0.5
            )
        },
    )

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        return (batch.block, *self.replay(draws=2))

    phase = Der.phase

    def loss(self, stream: Block, for_logits: Block | None = None, for_labels: Block | None = None) -> Loss:
        logits = self.net(stream.x)
        rows = {"current": (stream, cross_entropy(logits, stream.y, reduction="none"))}
        if for_logits is not None:
            distance = logit_distance(self.net(for_logits.x), for_logits.logits)
            rows["logits"] = (for_logits, self.args.alpha * distance)
            costs = cross_entropy(self.net(for_labels.x), for_labels.y, reduction="none")
            rows["labels"] = (for_labels, self.args.beta * costs)
        return Loss(rows, logits)
