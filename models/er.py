"""Experience Replay (Ratcliff, 1990; Riemer et al., 2019): stream and memory in one joint batch."""

from torch.nn.functional import cross_entropy

from flatcl.models._method import Batch, Block, Loss, published
from flatcl.models._replay import ReplayMethod
from flatcl.models.sgd import DER, XDER
from flatcl.utils.registry import METHODS


@METHODS.register("er")
class ER(ReplayMethod):
    published = published(
        DER,
        {
            ("perm-mnist", 200, 500, 5120): dict(lr=0.2, batch_size=128, minibatch_size=128, n_epochs=1),
            ("rot-mnist", 200, 500, 5120): dict(lr=0.2, batch_size=128, minibatch_size=128, n_epochs=1),
            ("seq-mnist", 200): dict(lr=0.01, batch_size=10, minibatch_size=10, n_epochs=1),
            ("seq-mnist", 500, 5120): dict(lr=0.1, batch_size=10, minibatch_size=10, n_epochs=1),
            ("mnist-360", 200, 500): dict(lr=0.2, batch_size=1, minibatch_size=16, n_epochs=1),
            ("mnist-360", 1000): dict(lr=0.2, batch_size=4, minibatch_size=16, n_epochs=1),
            ("seq-cifar10", 200, 500, 5120): dict(lr=0.1, batch_size=32, minibatch_size=32, n_epochs=50),
            ("seq-tinyimg", 200, 5120): dict(lr=0.1, batch_size=32, minibatch_size=32, n_epochs=100),
            ("seq-tinyimg", 500): dict(lr=0.03, batch_size=32, minibatch_size=32, n_epochs=100),
        },
    ) | published(XDER, {("seq-cifar100", 500, 2000): dict(lr=0.1, batch_size=32, minibatch_size=32, n_epochs=50)})

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        return (self.replay_jointly(batch),)

    phase = ReplayMethod.phase

    def loss(self, joint: Block) -> Loss:
        return Loss({"replay": cross_entropy(self.net(joint.x), joint.y, reduction="none")})
