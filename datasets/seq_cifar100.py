"""Sequential CIFAR-100: 10 tasks of 10 classes, 50 epochs each; random crop (padding 4) and flip (X-DER paper).

The learning rate falls at epochs 35 and 45 of each task, by 0.2 (the maintainers' statement of the X-DER setting; the
code published with the paper has 0.1).
"""

from pathlib import Path

from flatcl.datasets._benchmark import Arrays
from flatcl.datasets._files import load_cifar, missing_cifar
from flatcl.datasets.seq_cifar10 import SeqCifar10
from flatcl.utils.registry import DATASETS


@DATASETS.register("seq-cifar100")
class SeqCifar100(SeqCifar10):
    num_classes = 100
    mean = (0.5071, 0.4867, 0.4408)
    std = (0.2675, 0.2565, 0.2761)
    defaults = dict(
        n_tasks=10, n_epochs=50, batch_size=32, minibatch_size=32, lr=0.03,
        lr_scheduler="multistep", lr_milestones=(35, 45), lr_gamma=0.2,
    )  # fmt: skip

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        return load_cifar(root, "cifar100")

    @classmethod
    def missing(cls, root: Path) -> str | None:
        return missing_cifar(root, "cifar100")
