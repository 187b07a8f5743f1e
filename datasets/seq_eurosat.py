"""Sequential EuroSAT: 5 tasks of 2 kinds of land use, 64x64 satellite images, RGB (Helber et al., 2019).

Read from torchvision's folder `eurosat/2750`, or from `eurosat/EuroSAT.zip`, decoded once. The data set has no test
images of its own: a fifth of each class is, chosen by the files' names. Random crop (padding 4) and flip; mean and std
of the training images. The other values are those of seq-cifar10, with 10 epochs: ours.
"""

import functools
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import nn

from flatcl.datasets._benchmark import Arrays, Benchmark
from flatcl.datasets._cache import cache_folders, kept, rows_kept
from flatcl.datasets._files import (
    FolderSource,
    ZipSource,
    check_archive,
    decode_source,
    described,
    fingerprint_of,
    obtained,
    one_line,
    open_source,
    warn_made,
)
from flatcl.datasets._images import held_out, mean_and_std, resized
from flatcl.utils.engine.augment import CropFlip
from flatcl.utils.errors import DataError
from flatcl.utils.registry import DATASETS

CLASSES = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop", "Residential",
    "River", "SeaLake",
)  # fmt: skip
COMMIT = "c877bcd43f099cd0196738f714544e355477f3fd"
URL = f"https://huggingface.co/datasets/torchgeo/eurosat/resolve/{COMMIT}/EuroSAT.zip"  # as in torchvision
MD5 = "c8fa014336c82ac7804f0398fcb19387"
ROWS, TEST_SHARE = 27000, 0.2
ARRAYS = ("train_x", "train_y", "test_x", "test_y")


@DATASETS.register("seq-eurosat")
class SeqEurosat(Benchmark):
    num_classes = len(CLASSES)
    shape = (3, 64, 64)
    default_backbone = "resnet18"
    defaults = dict(n_tasks=5, n_epochs=10, batch_size=32, minibatch_size=32, lr=0.03)

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        train, test = load_eurosat(root)
        self.mean, self.std = mean_and_std(train[0])
        return train, test

    @classmethod
    def missing(cls, root: Path) -> str | None:
        is_there = any(path.exists() for path in _places(root))
        return None if is_there else f"put EuroSAT.zip into {root / 'eurosat'}"

    @classmethod
    def unofficial(cls, root: Path) -> str | None:
        return _unofficial(root)

    def augmentations(self) -> list[nn.Module]:
        return [CropFlip(padding=4)]


def _unofficial(root: Path) -> str | None:
    path = next((path for path in _places(root) if path.exists()), None)
    if path is None:
        return None
    rows = rows_kept(_caches(root), ("train_y", "test_y"), {"source": fingerprint_of(path)})
    if rows is None:
        with closing(open_source(path, "2750/")) as source:
            rows = [len(_names(source))]
    return described([sum(rows)], [ROWS])


def _places(root: Path) -> tuple[Path, Path]:
    return root / "eurosat" / "2750", root / "eurosat" / "EuroSAT.zip"


def _caches(root: Path) -> tuple[Path, Path]:
    return cache_folders(root / "eurosat-cache", root / "eurosat")


@one_line
def load_eurosat(root: Path) -> tuple[Arrays, ...]:
    """(train, test), each images uint8 (N, 3, 64, 64) and labels int64 (N,) in 0..9, the place in CLASSES, downloaded
    if absent; decoded images are kept in `root/eurosat-cache`. Raises `DataError`."""
    path = obtained(*_places(root), URL, MD5, "EuroSAT")
    arrays = kept(_caches(root), ARRAYS, {"source": fingerprint_of(path)}, lambda: _decode(path))
    train, test = (tuple(torch.from_numpy(arrays[f"{part}_{what}"]) for what in "xy") for part in ("train", "test"))
    warn_made(path, (len(train[1]), len(test[1])), (round(ROWS * (1 - TEST_SHARE)), round(ROWS * TEST_SHARE)))
    return train, test


def _names(source: ZipSource | FolderSource) -> list[str]:
    return sorted(name for name in source.names if name.endswith(".jpg") and name.split("/")[0] in CLASSES)


def _decode(path: Path) -> dict[str, np.ndarray]:
    with closing(open_source(path, "2750/")) as source:
        names = _names(source)
        labels = np.array([CLASSES.index(name.split("/")[0]) for name in names], np.int64)
        few = [name for label, name in enumerate(CLASSES) if (labels == label).sum() < 2]
        if few:
            raise DataError(f"{path}: fewer than 2 images of {', '.join(few)}; {source.remedy}")
        if len(names) == ROWS:
            check_archive(path, MD5)
        decode = functools.partial(resized, size=64, formats=("JPEG",))
        images, test = decode_source(source, names, 64, decode, "JPEG image"), held_out(names, labels, TEST_SHARE)
    return {"train_x": images[~test], "train_y": labels[~test], "test_x": images[test], "test_y": labels[test]}
