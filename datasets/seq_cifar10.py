"""Sequential CIFAR-10: 5 tasks of 2 classes, 50 epochs each; random crop (padding 4) and flip (DER paper).

`--protocol online` is what the field runs when compute is short: one epoch, 10 images of the stream and 10 of the
memory in a step (Lopez-Paz & Ranzato, 2017; Chaudhry et al., 2019). It is the same for seq-cifar100 and seq-tinyimg.
"""

from pathlib import Path

from torch import nn

from flatcl.datasets._benchmark import Arrays, Benchmark
from flatcl.datasets._files import load_cifar, missing_cifar
from flatcl.utils.engine.augment import CropFlip
from flatcl.utils.registry import DATASETS


@DATASETS.register("seq-cifar10")
class SeqCifar10(Benchmark):
    num_classes = 10
    shape = (3, 32, 32)
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2615)
    default_backbone = "resnet18"
    defaults = dict(n_tasks=5, n_epochs=50, batch_size=32, minibatch_size=32, lr=0.03)
    protocols = {
        "online": {
            "backbone": "reduced-resnet18", "n_epochs": 1, "batch_size": 10, "minibatch_size": 10, "lr": 0.03,
            "lr_scheduler": "none", "lr_milestones": (),
        }
    }  # fmt: skip

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        return load_cifar(root, "cifar10")

    @classmethod
    def missing(cls, root: Path) -> str | None:
        return missing_cifar(root, "cifar10")

    def augmentations(self) -> list[nn.Module]:
        return [CropFlip(padding=4)]
