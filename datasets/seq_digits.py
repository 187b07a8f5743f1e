"""Sequential digits: scikit-learn's bundled 8x8 handwritten digits, 5 tasks of 2; real data without a download.

1797 images (UCI, Alpaydin & Kaynak, 1998). Every fifth image of each digit is a test image.
"""

from pathlib import Path

import torch

from flatcl.datasets._benchmark import Arrays, Benchmark
from flatcl.utils.registry import DATASETS


@DATASETS.register("seq-digits")
class SeqDigits(Benchmark):
    num_classes = 10
    shape = (1, 8, 8)
    defaults = dict(n_tasks=5, n_epochs=5, batch_size=10, minibatch_size=10, buffer_size=100, lr=0.1)

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        from sklearn.datasets import load_digits  # slow to import

        digits = load_digits()
        images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
        labels = torch.from_numpy(digits.target).to(torch.int64)
        test = torch.zeros(len(labels), dtype=torch.bool)
        for digit in range(10):
            test[(labels == digit).nonzero().squeeze(1)[4::5]] = True
        return (images[~test], labels[~test]), (images[test], labels[test])
