"""Sequential MNIST: 5 tasks of 2 digits; pixels in 0..1, no normalisation (DER paper's protocol)."""

from pathlib import Path

from flatcl.datasets._benchmark import Arrays, Benchmark
from flatcl.datasets._files import load_mnist, missing_mnist
from flatcl.utils.registry import DATASETS


@DATASETS.register("seq-mnist")
class SeqMnist(Benchmark):
    num_classes = 10
    shape = (1, 28, 28)
    defaults = dict(n_tasks=5, n_epochs=1, batch_size=10, minibatch_size=10, lr=0.03)

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        return load_mnist(root, "MNIST")

    @classmethod
    def missing(cls, root: Path) -> str | None:
        return missing_mnist(root, "MNIST")
