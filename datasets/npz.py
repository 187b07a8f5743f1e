"""Your own arrays: `--data_file FILE.npz` with train_x, train_y, test_x, test_y (or Keras's x_train, y_train, ...).

Images uint8 (N, H, W), (N, C, H, W) or (N, H, W, C), labels whole numbers (N,) or (N, 1) from 0 on; `np.savez` writes
such a file. Give --n_tasks, or --classes_per_task 2,3,1 where tasks differ. Normalised by mean and std of the training
images, not augmented. Defaults, no published ones: ResNet-18, 10 epochs, batches of 32 and 32 of the memory, lr 0.03.
"""

import functools
import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flatcl.datasets._arrays import laid_out
from flatcl.datasets._benchmark import Arrays, Benchmark
from flatcl.datasets._images import mean_and_std
from flatcl.utils.arguments import flag
from flatcl.utils.errors import DataError, UsageError
from flatcl.utils.files import user_path
from flatcl.utils.registry import DATASETS

NAMES = (("train_x", "train_y", "test_x", "test_y"), ("x_train", "y_train", "x_test", "y_test"))
DAMAGED = (ValueError, KeyError, EOFError, OSError, MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error)


@DATASETS.register("npz")
class Npz(Benchmark):
    default_backbone = "resnet18"
    defaults = dict(n_epochs=10, batch_size=32, minibatch_size=32, lr=0.03)

    @dataclass(frozen=True)
    class Args:
        data_file: str = flag("", "the .npz file of the images and labels")

    @classmethod
    def declared(cls, config: Any) -> type[Benchmark]:
        if not config.data_file:
            raise UsageError("--dataset npz needs --data_file, got none. Give the .npz file of your images and labels.")
        with _opened(user_path(config.data_file)) as npz:
            num_classes, shape = npz.num_classes(), npz.image_shape()
        return cls.with_declared(num_classes=num_classes, shape=shape)

    @classmethod
    def sources(cls, config: Any) -> dict[str, str]:
        file = user_path(config.data_file)
        status = file.stat()
        return {f"data {config.data_file}": _sha256(file, status.st_size, status.st_mtime_ns)}

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        with _opened(user_path(self.config.data_file)) as npz:
            train_x, train_y, test_x, test_y = map(npz.read, npz.names)
        train_x, test_x = laid_out(train_x), laid_out(test_x)
        if train_x.dtype == np.uint8 and train_x.ndim == 4:  # else it is refused as soon as this returns
            self.mean, self.std = mean_and_std(train_x)
        return (train_x, _flat(train_y)), (test_x, _flat(test_y))

    def decided(self) -> dict[str, Any]:
        """With mean and std."""
        return super().decided() | {"mean": self.mean, "std": self.std}


@functools.lru_cache
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    """16 hexadecimal digits; of a file that has not changed, computed once in a process."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


@contextmanager
def _opened(file: Path) -> Iterator["_File"]:
    """Whatever is wrong inside with the file is a `DataError`."""
    if not file.is_file():
        raise DataError(f"{file}: there is no such file. Give an .npz file by --data_file.")
    if not zipfile.is_zipfile(file):
        raise DataError(
            f"{file}: this is not an .npz file, or it is damaged. Write it with np.savez(FILE, train_x=...)."
        )
    try:
        with np.load(file, allow_pickle=False) as npz:
            yield _File(file, npz)
    except DataError:
        raise
    except DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file}: damaged ({reason}). Write it again.") from error


class _File:
    """An open .npz file, `names` those of its four arrays. Nothing is unpickled."""

    def __init__(self, file: Path, npz: Any):
        self.file, self.npz = file, npz
        fits = [names for names in NAMES if set(names) <= set(npz.files)]
        if not fits:
            found = ", ".join(npz.files) or "none"
            raise DataError(f"{file}: it must have the arrays {', '.join(NAMES[0])}, got {found}. Use these names.")
        self.names = fits[0]
        self.headers = {name: self._header(name) for name in self.names}
        pickled = [name for name, (_, dtype) in self.headers.items() if dtype.hasobject]
        if pickled:
            raise DataError(
                f"{file}: {', '.join(pickled)} must be numbers, got Python objects, which could run any code and are "
                "not read. Save an array of numbers."
            )

    def _header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """(shape, dtype) of an array, which is not read."""
        with self.npz.zip.open(f"{name}.npy") as content:
            version = np.lib.format.read_magic(content)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(content)
        return shape, dtype

    def read(self, name: str) -> np.ndarray:
        return self.npz[name]

    def num_classes(self) -> int:
        name, labels = self.names[1], _flat(self.read(self.names[1]))
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) == 0:
            raise DataError(
                f"{self.file}: {name} must be whole numbers (N,), got {labels.dtype} {labels.shape}. Save "
                f"{'y.argmax(1) of one-hot labels' if labels.ndim == 2 else 'y.astype(np.int64)'}."
            )
        classes = np.unique(labels)
        if classes[0] != 0 or classes[-1] != len(classes) - 1:
            raise DataError(
                f"{self.file}: {name} must number its {len(classes)} classes from 0 to {len(classes) - 1}, got "
                f"{classes[0]} to {classes[-1]}. Save np.searchsorted(np.unique({name}), y) of both."
            )
        return len(classes)

    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        shape, _ = self.headers[self.names[0]]
        if len(shape) not in (3, 4):
            raise DataError(
                f"{self.file}: {self.names[0]} must be (N, H, W), (N, C, H, W) or (N, H, W, C), got {shape}. Reshape "
                "it."
            )
        return laid_out(np.broadcast_to(np.uint8(0), shape)).shape[1:]


def _flat(labels: np.ndarray) -> np.ndarray:
    """(N,) of (N, 1)."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
