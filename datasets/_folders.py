"""What the benchmarks made of a user's folders of images share: flags, reading, normalisation, identity."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from flatcl.datasets import _images
from flatcl.datasets._benchmark import Benchmark
from flatcl.utils.arguments import flag
from flatcl.utils.engine.augment import CropFlip
from flatcl.utils.errors import DataError, UsageError
from flatcl.utils.files import user_path

Rows = tuple[np.ndarray, np.ndarray]  # images uint8 (N, 3, H, W), labels int64 (N,)


class FolderData(Benchmark):
    """Images of any kind and size, normalised by mean and std of the training images; random crop and flip."""

    class_names: tuple[str, ...]
    pixels = 0  # CRC-32 of the images that were read: `sources` sees names and sizes alone
    default_backbone = "resnet18"
    defaults = dict(n_epochs=10, batch_size=32, minibatch_size=32, lr=0.03)

    @dataclass(frozen=True)
    class Args:
        data_folder: str = flag("", "folder of the images")
        image_size: tuple[int, ...] = flag(
            (64, 64), "height and width, or one number for both: the shorter side is resized, then the centre cropped",
            low=8, high=4096,
        )  # fmt: skip
        val_fraction: float = flag(
            0.2,
            "share of the images of each class that is held out for testing, if there is no val/ or test/",
            above=0,
            below=1,
        )

    @classmethod
    def given(cls, config: Any) -> tuple[Path, tuple[int, int]]:
        """(the folder, (height, width)). Raises `UsageError`."""
        problems, size = [], config.image_size
        if not config.data_folder:
            problems.append(f"--dataset {cls.name} needs --data_folder, got none. Give the folder of your images.")
        if len(size) not in (1, 2):
            problems.append(
                f"--image_size must be one number or two (height, width), got {len(size)}. Give 64 or 64,48."
            )
        if problems:
            raise UsageError(*problems)
        return user_path(config.data_folder), (size[0], size[-1])

    @classmethod
    def check_fraction(cls, config: Any, is_split: bool) -> None:
        if is_split and config.origins["val_fraction"] == "argv":
            raise UsageError(f"--val_fraction has no effect on {config.data_folder}, which has test images. Drop it.")

    @classmethod
    def sources(cls, config: Any) -> dict[str, str]:
        return {f"data {config.data_folder}": _images.digest(user_path(config.data_folder))}

    def read(self, folder: Path, root: Path) -> tuple[Rows, Rows]:
        """Training and test images of a folder with train/ and val/, or of one that is split."""
        own, tests = _images.parts_of(folder)
        images, labels, names = self._decoded(own, root)
        if tests is not None:
            return (images, labels), self._decoded(tests, root)[:2]
        single = np.flatnonzero(np.bincount(labels) == 1)
        if len(single):
            raise DataError(
                f"{own}: a class with one image cannot be split into training and test images: "
                f"{_images.named([self.class_names[label] for label in single])}. Add images, or give a folder that "
                "has train/ and val/."
            )
        held = _images.held_out(names, labels, self.config.val_fraction)
        return (images[~held], labels[~held]), (images[held], labels[held])

    def _decoded(self, folder: Path, root: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Images, labels and names of a folder; the images count in `pixels`."""
        images, labels, names = _images.read_folder(folder, self.class_names, self.shape[1:], root)
        self.pixels = zlib.crc32(images, self.pixels)
        return images, labels, names

    def augmentations(self) -> list[nn.Module]:
        return [CropFlip(padding=self.shape[1] // 8)]

    def decided(self) -> dict[str, Any]:
        """With the names of the classes, in the order of the data set's numbers, mean and std, and a digest of the
        images."""
        names, pixels = list(self.class_names), f"crc32 {self.pixels:08x}"
        return super().decided() | {"class_names": names, "mean": self.mean, "std": self.std, "pixels": pixels}
