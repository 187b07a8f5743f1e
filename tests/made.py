"""Small data sets in the exact on-disk formats, with every class present, for tests without the real data.

Each class is a fixed pattern plus a little noise, the same in train and test, so that a network can learn it.
Each function returns `((train_x, train_y), (test_x, test_y))` as NumPy arrays: what a reader must give back.
"""

import gzip
import io
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import scipy.io
from PIL import Image

from flatcl.utils.registry import DATASETS

Rows = tuple[np.ndarray, np.ndarray]


def declared() -> list[str]:
    """The benchmarks whose classes say what they are; the others need data that a user gives."""
    return [name for name in DATASETS.names() if hasattr(DATASETS.load(name), "shape")]


def _rows(rng: np.random.Generator, n: int, patterns: np.ndarray) -> Rows:
    """x uint8 (n, *shape) and y int64 (n,): as many of each class as possible, shuffled."""
    assert n >= len(patterns), f"{n} rows cannot hold all {len(patterns)} classes"
    labels = rng.permutation(np.arange(n) % len(patterns))
    noise = rng.integers(0, 56, (n, *patterns.shape[1:]))
    return (patterns[labels] + noise).astype(np.uint8), labels


def make_mnist(
    root: Path, name: str = "MNIST", n_train: int = 100, n_test: int = 50, seed: int = 0, gz: bool = False
) -> tuple[Rows, Rows]:
    """`root/<name>/raw/*-ubyte` (or, with `gz`, only `*-ubyte.gz`); x is (N, 1, 28, 28)."""
    raw = Path(root) / name / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 200, (10, 1, 28, 28))
    splits = _rows(rng, n_train, patterns), _rows(rng, n_test, patterns)
    for part, (images, labels) in zip(("train", "t10k"), splits, strict=True):
        contents = {
            f"{part}-images-idx3-ubyte": struct.pack(">4I", 2051, len(images), 28, 28) + images.tobytes(),
            f"{part}-labels-idx1-ubyte": struct.pack(">2I", 2049, len(labels)) + labels.astype(np.uint8).tobytes(),
        }
        for file, data in contents.items():
            if gz:
                (raw / f"{file}.gz").write_bytes(gzip.compress(data))
            else:
                (raw / file).write_bytes(data)
    return splits


class _Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which is how the real CIFAR files hold keys and pixels."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def _save_bytes(self, value):
        if len(value) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(value)]) + value)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = _save_bytes


def python2_pickle(content: object) -> bytes:
    """Protocol 2, with NumPy's module under the name that it had in NumPy 1."""
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def _write_cifar(folder: Path, file: str, rows: Rows, **labels: list[int]) -> None:
    images, _ = rows
    content = {
        b"batch_label": file.encode(),
        **{key.encode(): value for key, value in labels.items()},
        b"data": images.reshape(len(images), 3072),
        b"filenames": [b"image_%d.png" % row for row in range(len(images))],
    }
    (folder / file).write_bytes(python2_pickle(content))


def make_cifar10(root: Path, n_per_batch: int = 20, seed: int = 0) -> tuple[Rows, Rows]:
    """`root/cifar-10-batches-py/`: five train batches and one of test; x is (N, 3, 32, 32)."""
    folder = Path(root) / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 200, (10, 3, 32, 32))
    batches = [_rows(rng, n_per_batch, patterns) for _ in range(6)]
    for file, rows in zip([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"], batches, strict=True):
        _write_cifar(folder, file, rows, labels=rows[1].tolist())
    names = [b"class_%d" % k for k in range(10)]
    (folder / "batches.meta").write_bytes(python2_pickle({b"label_names": names, b"num_vis": 3072}))
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches[:5], strict=True))
    return (images, labels), batches[5]


def make_cifar100(root: Path, n_train: int = 200, n_test: int = 100, seed: int = 0) -> tuple[Rows, Rows]:
    """`root/cifar-100-python/`: train and test with fine and coarse labels; x is (N, 3, 32, 32), y the fine labels."""
    folder = Path(root) / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 200, (100, 3, 32, 32))
    splits = _rows(rng, n_train, patterns), _rows(rng, n_test, patterns)
    for file, rows in zip(("train", "test"), splits, strict=True):
        _write_cifar(folder, file, rows, fine_labels=rows[1].tolist(), coarse_labels=(rows[1] // 5).tolist())
    names = {b"fine_label_names": [b"fine_%d" % k for k in range(100)]}
    (folder / "meta").write_bytes(python2_pickle(names))
    return splits


def _jpeg(rng: np.random.Generator, colour: np.ndarray, grey: bool) -> tuple[bytes, np.ndarray]:
    """A file's bytes, and what Pillow decodes from them: uint8 (3, 64, 64)."""
    smooth = np.kron(rng.integers(0, 56, (8, 8, 3)), np.ones((8, 8, 1), int)) + colour
    image = Image.fromarray(smooth.astype(np.uint8))
    file = io.BytesIO()
    (image.convert("L") if grey else image).save(file, "JPEG", quality=90)
    with Image.open(io.BytesIO(file.getvalue())) as decoded:
        return file.getvalue(), np.asarray(decoded.convert("RGB")).transpose(2, 0, 1)


def make_tinyimagenet(root: Path, n_train: int = 2, n_val: int = 1, seed: int = 0) -> tuple[Rows, Rows]:
    """`root/tiny-imagenet-200.zip`: 200 classes, `n_train` and `n_val` images each, the first one greyscale.

    Rows come in the reader's order: train by class and number, test as annotated. x is (N, 3, 64, 64).
    """
    Path(root).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    wnids = [f"n{number:08d}" for number in rng.permutation(200) + 1440000]  # line order is not sorted order
    colours = rng.integers(0, 200, (200, 3))
    images, labels = {"train": [], "val": []}, {"train": [], "val": []}
    with zipfile.ZipFile(Path(root) / "tiny-imagenet-200.zip", "w") as archive:

        def add(part: str, label: int, name: str):
            data, decoded = _jpeg(rng, colours[label], grey=not images[part])
            archive.writestr(f"tiny-imagenet-200/{name}", data)
            images[part].append(decoded)
            labels[part].append(label)

        archive.writestr("tiny-imagenet-200/wnids.txt", "\n".join(wnids) + "\n")
        archive.writestr("tiny-imagenet-200/words.txt", "".join(f"{wnid}\tthing\n" for wnid in sorted(wnids)))
        for label, wnid in enumerate(wnids):
            for k in range(n_train):
                add("train", label, f"train/{wnid}/images/{wnid}_{k}.JPEG")
            archive.writestr(f"tiny-imagenet-200/train/{wnid}/{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
        lines = []
        for k, label in enumerate(rng.permutation(np.repeat(np.arange(200), n_val)).tolist()):
            add("val", label, f"val/images/val_{k}.JPEG")
            lines.append(f"val_{k}.JPEG\t{wnids[label]}\t0\t32\t44\t62\n")
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", "".join(lines))
        archive.writestr("tiny-imagenet-200/test/images/test_0.JPEG", _jpeg(rng, colours[0], grey=False)[0])
    return tuple((np.stack(images[part]), np.array(labels[part], np.int64)) for part in ("train", "val"))


def make_svhn(root: Path, n_train: int = 40, n_test: int = 20, seed: int = 0) -> tuple[Rows, Rows]:
    """`root/train_32x32.mat` and `test_32x32.mat`, where 10 stands for the digit 0; x is (N, 3, 32, 32)."""
    Path(root).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 200, (10, 3, 32, 32))
    splits = _rows(rng, n_train, patterns), _rows(rng, n_test, patterns)
    for part, (images, labels) in zip(("train", "test"), splits, strict=True):
        y = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        content = {"X": images.transpose(2, 3, 1, 0), "y": y}
        scipy.io.savemat(Path(root) / f"{part}_32x32.mat", content, do_compression=True)
    return splits


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    """(3, H, W) uint8 as a file of this kind."""
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, kind)
    return file.getvalue()


def zipped(folder: Path, archive: Path) -> None:
    """Packs the files of a folder, by their paths below it, and removes it."""
    with zipfile.ZipFile(archive, "w") as packed:
        for file in sorted(folder.rglob("*")):
            packed.write(file, file.relative_to(folder))
    shutil.rmtree(folder)


def make_gtsrb(root: Path, n_train: int = 2, n_test: int = 1, seed: int = 0, zips: bool = False) -> tuple[Rows, Rows]:
    """`root/gtsrb` as torchvision unpacks it, or the three zips: 43 classes with so many images, 32x32 already, for
    which nothing is resized. Rows come in the reader's order."""
    rng, base = np.random.default_rng(seed), Path(root) / "gtsrb"
    patterns = rng.integers(0, 200, (43, 3, 32, 32))
    folders = base / "GTSRB" / "Training", base / "GTSRB" / "Final_Test" / "Images"
    train_y = np.repeat(np.arange(43), n_train)
    test_y = rng.permutation(np.repeat(np.arange(43), n_test))
    splits = tuple(
        ((patterns[y] + rng.integers(0, 56, (len(y), 3, 32, 32))).astype(np.uint8), y) for y in (train_y, test_y)
    )
    for row, (pixels, label) in enumerate(zip(*splits[0], strict=True)):
        (folders[0] / f"{label:05d}").mkdir(parents=True, exist_ok=True)
        (folders[0] / f"{label:05d}" / f"{row:05d}_00000.ppm").write_bytes(encoded(pixels, "PPM"))
        (folders[0] / f"{label:05d}" / f"GT-{label:05d}.csv").write_text("Filename;Width;Height;ClassId\n")
    folders[1].mkdir(parents=True)
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for row, (pixels, label) in enumerate(zip(*splits[1], strict=True)):
        (folders[1] / f"{row:05d}.ppm").write_bytes(encoded(pixels, "PPM"))
        lines.append(f"{row:05d}.ppm;32;32;5;5;27;27;{label}")
    (base / "GT-final_test.csv").write_text("\r\n".join(lines) + "\r\n")
    if zips:
        for part, archive in (("Training", "GTSRB-Training_fixed.zip"), ("Final_Test", "GTSRB_Final_Test_Images.zip")):
            shutil.copytree(base / "GTSRB" / part, base / "new" / "GTSRB" / part)
            zipped(base / "new", base / archive)
        shutil.rmtree(base / "GTSRB")
        (base / "new").mkdir()
        (base / "GT-final_test.csv").rename(base / "new" / "GT-final_test.csv")
        zipped(base / "new", base / "GTSRB_Final_Test_GT.zip")
    return splits


def make_eurosat(root: Path, n: int = 5, seed: int = 0, zips: bool = False) -> dict[str, np.ndarray]:
    """`root/eurosat/2750/<class>/<class>_<number>.jpg`, or `root/eurosat/EuroSAT.zip`: n images of each of 10 classes.

    Returns {class/file: what Pillow decodes from it}, uint8 (3, 64, 64): which are test images is the reader's choice.
    """
    from flatcl.datasets.seq_eurosat import CLASSES

    rng, base = np.random.default_rng(seed), Path(root) / "eurosat"
    colours, images = rng.integers(0, 200, (len(CLASSES), 3)), {}
    for label, name in enumerate(CLASSES):
        (base / "2750" / name).mkdir(parents=True)
        for number in range(1, n + 1):
            data, decoded = _jpeg(rng, colours[label], grey=False)
            (base / "2750" / name / f"{name}_{number}.jpg").write_bytes(data)
            images[f"{name}/{name}_{number}.jpg"] = decoded
    if zips:
        (base / "new").mkdir()
        (base / "2750").rename(base / "new" / "2750")
        zipped(base / "new", base / "EuroSAT.zip")
    return images
