"""Sequential Fashion-MNIST: 5 tasks of 2 classes, with the protocol and the defaults of seq-mnist."""

from pathlib import Path

from flatcl.datasets._benchmark import Arrays
from flatcl.datasets._files import load_mnist, missing_mnist
from flatcl.datasets.seq_mnist import SeqMnist
from flatcl.utils.registry import DATASETS


@DATASETS.register("seq-fmnist")
class SeqFashionMnist(SeqMnist):
    published_as = "seq-mnist"

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        return load_mnist(root, "FashionMNIST")

    @classmethod
    def missing(cls, root: Path) -> str | None:
        return missing_mnist(root, "FashionMNIST")
