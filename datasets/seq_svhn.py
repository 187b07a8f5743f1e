"""Sequential SVHN: 5 tasks of 2 digits, 32x32 colour photographs of house numbers (Netzer et al., 2011).

Read from torchvision's files, `train_32x32.mat` and `test_32x32.mat`, without `extra`. Random crop (padding 4), no
flip; mean and std of the training images. The other values are those of seq-cifar10, with 10 epochs: ours.
"""

import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from flatcl.datasets._benchmark import Arrays, Benchmark
from flatcl.datasets._files import MAX_FILE_BYTES, Loaded, check_md5, loaded, obtained, one_line, read_file
from flatcl.datasets._images import mean_and_std
from flatcl.utils.engine.augment import CropFlip
from flatcl.utils.errors import DataError
from flatcl.utils.registry import DATASETS

ROWS = {"train": 73257, "test": 26032}


@DATASETS.register("seq-svhn")
class SeqSvhn(Benchmark):
    num_classes = 10
    shape = (3, 32, 32)
    default_backbone = "resnet18"
    defaults = dict(n_tasks=5, n_epochs=10, batch_size=32, minibatch_size=32, lr=0.03)

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        found = load_svhn(root)
        self.mean, self.std = mean_and_std(found[0][0])
        return found

    @classmethod
    def missing(cls, root: Path) -> str | None:
        files = [name for _, name, _ in _official().values() if not (root / name).is_file()]
        return f"put {', '.join(files)} into {root}" if files else None

    def augmentations(self) -> list[nn.Module]:
        return [CropFlip(padding=4, flip=0.0)]


def _official() -> dict[str, tuple[str, str, str]]:
    """{part: (address, file, md5)}."""
    from torchvision.datasets import SVHN

    return {part: tuple(SVHN.split_list[part]) for part in ROWS}


@one_line
def load_svhn(root: Path) -> Loaded:
    """(train, test), each images uint8 (N, 3, 32, 32) and labels int64 (N,) in 0..9, downloaded if absent. Raises
    `DataError`."""
    parts = []
    for part, (url, name, md5) in _official().items():
        path = obtained(root / name, root / name, url, md5, "SVHN")
        data = read_file(path, MAX_FILE_BYTES)
        images, labels = _parse(data, path)
        if len(labels) == ROWS[part]:
            check_md5(data, md5, path)
        parts.append((images, labels))
    return loaded(root / "train_32x32.mat", *parts, tuple(ROWS.values()))


def _parse(data: bytes, path: Path) -> Arrays:
    """Images and labels of a MATLAB file with X (32, 32, 3, N) and y (N, 1), where 10 stands for the digit 0."""
    import scipy.io

    remedy = "delete it and start again to fetch it"
    try:
        shapes = {name: shape for name, shape, _ in scipy.io.whosmat(io.BytesIO(data))}
        if not {"X", "y"} <= shapes.keys() or max(math.prod(shapes["X"]), math.prod(shapes["y"])) > MAX_FILE_BYTES:
            raise ValueError(f"it has {shapes}")
        content = scipy.io.loadmat(io.BytesIO(data), variable_names=["X", "y"])
        images, labels = content["X"], content["y"].reshape(-1)
    except Exception as error:  # on damaged data this reader can raise nearly anything
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: damaged, or not a MATLAB file with X and y ({reason}); {remedy}") from error
    if images.dtype != np.uint8 or images.shape[:3] != (32, 32, 3) or images.ndim != 4 or len(labels) == 0:
        raise DataError(f"{path}: its X is {images.dtype} {images.shape}, not uint8 (32, 32, 3, N); {remedy}")
    if len(labels) != images.shape[3]:
        raise DataError(f"{path}: {images.shape[3]} images but {len(labels)} labels; {remedy}")
    if labels.dtype.kind not in "iu" or labels.max() > 10 or labels.min() < 0:
        raise DataError(f"{path}: its y must be whole numbers in 1..10; {remedy}")
    images = np.ascontiguousarray(images.transpose(3, 2, 0, 1))
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64) % 10)
