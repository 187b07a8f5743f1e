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
from flatcl.datasets._cache import cache_folders, kept
from flatcl.datasets._files import (
    Loaded,
    check_archive,
    decode_source,
    fingerprint_of,
    loaded,
    obtained,
    one_line,
    open_source,
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
        found = load_eurosat(root)
        self.mean, self.std = mean_and_std(found[0][0])
        return found

    @classmethod
    def missing(cls, root: Path) -> str | None:
        folder = root / "eurosat"
        is_there = any((folder / name).exists() for name in ("2750", "EuroSAT.zip"))
        return None if is_there else f"put EuroSAT.zip into {folder}"

    def augmentations(self) -> list[nn.Module]:
        return [CropFlip(padding=4)]


@one_line
def load_eurosat(root: Path) -> Loaded:
    """(train, test), each images uint8 (N, 3, 64, 64) and labels int64 (N,) in 0..9, the place in CLASSES, downloaded
    if absent; decoded images are kept in `root/eurosat-cache`. Raises `DataError`."""
    folder = root / "eurosat"
    path = obtained(folder / "2750", folder / "EuroSAT.zip", URL, MD5, "EuroSAT")
    caches = cache_folders(root / "eurosat-cache", folder)
    arrays = kept(caches, ARRAYS, {"source": fingerprint_of(path)}, lambda: _decode(path))
    train, test = (tuple(torch.from_numpy(arrays[f"{part}_{what}"]) for what in "xy") for part in ("train", "test"))
    return loaded(path, train, test, (round(ROWS * (1 - TEST_SHARE)), round(ROWS * TEST_SHARE)))


def _decode(path: Path) -> dict[str, np.ndarray]:
    with closing(open_source(path, "2750/")) as source:
        names = sorted(name for name in source.names if name.endswith(".jpg") and name.split("/")[0] in CLASSES)
        labels = np.array([CLASSES.index(name.split("/")[0]) for name in names], np.int64)
        few = [name for label, name in enumerate(CLASSES) if (labels == label).sum() < 2]
        if few:
            raise DataError(f"{path}: fewer than 2 images of {', '.join(few)}; {source.remedy}")
        if len(names) == ROWS:
            check_archive(path, MD5)
        decode = functools.partial(resized, size=64, formats=("JPEG",))
        images, test = decode_source(source, names, 64, decode, "JPEG image"), held_out(names, labels, TEST_SHARE)
    return {"train_x": images[~test], "train_y": labels[~test], "test_x": images[test], "test_y": labels[test]}
