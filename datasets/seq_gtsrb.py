"""Sequential GTSRB: 43 traffic signs, 6 tasks of 8, 7, 7, 7, 7, 7 classes (Stallkamp et al., 2012); resized to 32x32.

Read from torchvision's folder `gtsrb`, or from the zips in it, decoded once. Random crop (padding 4), no flip; mean and
std of the training images. The other values are those of seq-cifar10, with 10 epochs: ours.
"""

import csv
import functools
import io
import re
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import nn

from flatcl.datasets._benchmark import Arrays, Benchmark
from flatcl.datasets._cache import cache_folders, kept
from flatcl.datasets._files import (
    MAX_TEXT_BYTES,
    FolderSource,
    Loaded,
    ZipSource,
    check_archive,
    decode_source,
    fingerprint_of,
    loaded,
    obtained,
    one_line,
    open_source,
    read_file,
)
from flatcl.datasets._images import mean_and_std, resized
from flatcl.utils.engine.augment import CropFlip
from flatcl.utils.errors import DataError
from flatcl.utils.registry import DATASETS

URL = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
TRUTH = "GT-final_test.csv"
PARTS = {  # (what lies in root/gtsrb, else the zip that has it, its md5), as in torchvision
    "train": ("GTSRB/Training", "GTSRB-Training_fixed.zip", "513f3c79a4c5141765e10e952eaa2478"),
    "test": ("GTSRB/Final_Test/Images", "GTSRB_Final_Test_Images.zip", "c7e4e6327067d32654124b0fe9e82185"),
    "truth": (TRUTH, "GTSRB_Final_Test_GT.zip", "fe31e9c9270bbcd7b84b7f21a9d9d9e5"),
}
ROWS = {"train": 26640, "test": 12630}
ARRAYS = ("train_x", "train_y", "test_x", "test_y")


@DATASETS.register("seq-gtsrb")
class SeqGtsrb(Benchmark):
    num_classes = 43
    shape = (3, 32, 32)
    default_backbone = "resnet18"
    defaults = dict(
        n_tasks=6, classes_per_task=(8, 7, 7, 7, 7, 7), n_epochs=10, batch_size=32, minibatch_size=32, lr=0.03
    )

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        found = load_gtsrb(root)
        self.mean, self.std = mean_and_std(found[0][0])
        return found

    @classmethod
    def missing(cls, root: Path) -> str | None:
        folder = root / "gtsrb"
        zips = [file for path, file, _ in PARTS.values() if not any((folder / name).exists() for name in (path, file))]
        return f"put {', '.join(zips)} into {folder}" if zips else None

    def augmentations(self) -> list[nn.Module]:
        return [CropFlip(padding=4, flip=0.0)]


@one_line
def load_gtsrb(root: Path) -> Loaded:
    """(train, test), each images uint8 (N, 3, 32, 32) and labels int64 (N,) in 0..42, downloaded if absent; decoded
    images are kept in `root/gtsrb-cache`. Raises `DataError`."""
    folder = root / "gtsrb"
    paths = {
        part: obtained(folder / path, folder / archive, URL + archive, md5, "GTSRB")
        for part, (path, archive, md5) in PARTS.items()
    }
    caches = cache_folders(root / "gtsrb-cache", folder)
    fingerprint = {part: fingerprint_of(path) for part, path in paths.items()}
    arrays = kept(caches, ARRAYS, fingerprint, lambda: _decode(paths))
    train, test = (tuple(torch.from_numpy(arrays[f"{part}_{what}"]) for what in "xy") for part in ROWS)
    return loaded(folder, train, test, tuple(ROWS.values()))


def _decode(paths: dict[str, Path]) -> dict[str, np.ndarray]:
    arrays = {}
    for part, official in ROWS.items():
        with closing(open_source(paths[part], f"{PARTS[part][0]}/")) as source:
            rows = _labelled(source.names) if part == "train" else _annotated(source, paths["truth"])
            if not rows:
                raise DataError(f"{source.path}: no {part} images in it; {source.remedy}")
            if len(rows) == official:
                check_archive(source.path, PARTS[part][2])
            arrays[f"{part}_y"] = np.array(list(rows.values()), np.int64)
            decode = functools.partial(resized, size=32, formats=("PPM",))
            arrays[f"{part}_x"] = decode_source(source, list(rows), 32, decode, "PPM image")
    return arrays


def _labelled(names: set[str]) -> dict[str, int]:
    """{training image: class}, in the order of their names: 00042/00007_00029.ppm is of class 42."""
    found = (re.fullmatch(r"(000[0-4]\d)/[^/]+\.ppm", name) for name in sorted(names))
    return {match[0]: int(match[1]) for match in found if match and int(match[1]) < SeqGtsrb.num_classes}


def _annotated(source: ZipSource | FolderSource, truth: Path) -> dict[str, int]:
    """{test image: class}, in the order of the file that says it. Each image there must be in the source."""
    rows = {}
    try:
        lines = list(csv.DictReader(io.StringIO(_read_truth(truth)), delimiter=";", skipinitialspace=True))
    except csv.Error as error:
        raise DataError(f"{truth}: damaged ({error}); fetch it again") from error
    for line in lines:
        name, label = line.get("Filename"), line.get("ClassId")
        if name not in source.names:
            raise DataError(f"{source.path}: {source.folder}{name} is named by {truth} but missing; {source.remedy}")
        if not (label and label.isdecimal() and int(label) < SeqGtsrb.num_classes):
            raise DataError(f"{truth}: {name} has the class {label!r}, not a number in 0..42; fetch it again")
        rows[name] = int(label)
    return rows


def _read_truth(path: Path) -> str:
    if path.suffix != ".zip":
        return read_file(path, MAX_TEXT_BYTES).decode("utf-8", "replace")
    with closing(ZipSource(path, "")) as source:
        if TRUTH not in source.names:
            raise DataError(f"{path}: {TRUTH} is missing; {source.remedy}")
        return source.read(TRUTH, MAX_TEXT_BYTES).decode("utf-8", "replace")
