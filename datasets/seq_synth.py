"""Synthetic images made in memory, 5 tasks of 2 classes, colour and augmented: for tests and for trying things out.

Each class is a fixed random pattern; an image is its class's pattern under noise. The images do not depend on the
run's seed.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from flatcl.datasets._benchmark import Arrays, Benchmark
from flatcl.utils.engine.augment import CropFlip
from flatcl.utils.registry import DATASETS


@DATASETS.register("seq-synth")
class SeqSynth(Benchmark):
    num_classes = 10
    shape = (3, 8, 8)
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)
    defaults = dict(n_tasks=5, n_epochs=1, batch_size=16, minibatch_size=16, buffer_size=100, lr=0.05)

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        rng = np.random.default_rng(0)
        patterns = rng.uniform(0.0, 255.0, (self.num_classes, *self.shape))

        def draw(per_class: int) -> Arrays:
            labels = np.repeat(np.arange(self.num_classes), per_class)
            images = patterns[labels] + rng.normal(0.0, 64.0, (len(labels), *self.shape))
            return torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)

        return draw(64), draw(16)

    def augmentations(self) -> list[nn.Module]:
        return [CropFlip(padding=1)]
