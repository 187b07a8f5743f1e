"""Plain fine-tuning on each task in turn: the lower bound."""

from torch.nn.functional import cross_entropy

from flatcl.models._method import Block, Loss, Method, published
from flatcl.utils.registry import METHODS

DER = "DER paper (Buzzega et al., 2020), Mammoth best_args"
XDER = "X-DER paper (Boschini et al., 2022), Mammoth best_args"


@METHODS.register("sgd")
class SGD(Method):
    published = published(
        DER,
        {
            ("perm-mnist",): dict(lr=0.2, batch_size=128, n_epochs=1),
            ("rot-mnist",): dict(lr=0.2, batch_size=128, n_epochs=1),
            ("seq-mnist",): dict(lr=0.03, batch_size=10, n_epochs=1),
            ("mnist-360",): dict(lr=0.1, batch_size=4, n_epochs=1),
            ("seq-cifar10",): dict(lr=0.1, batch_size=32, n_epochs=50),
            ("seq-tinyimg",): dict(lr=0.03, batch_size=32, n_epochs=100),
        },
    ) | published(XDER, {("seq-cifar100",): dict(lr=0.03, batch_size=32, n_epochs=50)})

    phase = Method.phase

    def loss(self, stream: Block) -> Loss:
        logits = self.net(stream.x)
        return Loss({"current": cross_entropy(logits, stream.y, reduction="none")}, logits)
