"""Sequential Tiny-ImageNet: 10 tasks of 20 classes, 100 epochs each; random crop (padding 4) and flip (DER paper).

The test set is the official validation split. Classes follow the order of `wnids.txt`.
"""

from pathlib import Path

from flatcl.datasets._benchmark import Arrays
from flatcl.datasets._files import load_tinyimagenet, missing_tinyimagenet
from flatcl.datasets.seq_cifar10 import SeqCifar10
from flatcl.utils.registry import DATASETS


@DATASETS.register("seq-tinyimg")
class SeqTinyImagenet(SeqCifar10):
    num_classes = 200
    shape = (3, 64, 64)
    mean = (0.4802, 0.4480, 0.3975)
    std = (0.2770, 0.2691, 0.2821)
    defaults = dict(n_tasks=10, n_epochs=100, batch_size=32, minibatch_size=32, lr=0.03)

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        return load_tinyimagenet(root)

    @classmethod
    def missing(cls, root: Path) -> str | None:
        return missing_tinyimagenet(root)
