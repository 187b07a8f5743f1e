"""The readers of data files and the downloader, on small files in the exact formats and on a local server."""

import contextlib
import gzip
import hashlib
import http.server
import io
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from made import make_cifar10, make_cifar100, make_mnist, make_tinyimagenet, python2_pickle
from PIL import Image

from flatcl.datasets import _files
from flatcl.datasets._files import load_cifar, load_mnist, load_tinyimagenet
from flatcl.utils import download
from flatcl.utils.download import fetch, md5_of
from flatcl.utils.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:.*not the official data set")
ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
MAKERS = {"cifar10": make_cifar10, "cifar100": make_cifar100}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No test may reach the network, the home folder or data that this machine happens to have."""

    def refuse(urls, path, md5, what):
        raise AssertionError(f"would download {path}")

    monkeypatch.setattr(_files, "fetch", refuse)
    monkeypatch.setattr(_files, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)


def assert_rows(got, expected):
    for (x, y), (made_x, made_y) in zip(got, expected, strict=True):
        assert x.dtype == torch.uint8 and y.dtype == torch.int64 and x.is_contiguous()
        assert np.array_equal(x.numpy(), made_x) and np.array_equal(y.numpy(), made_y)


def refused(load, *args, match):
    """The call must fail with a DataError of one line."""
    with pytest.raises(DataError, match=match) as caught:
        load(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- MNIST


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
@pytest.mark.parametrize("gz", [False, True])
def test_mnist_round_trip(tmp_path, name, gz):
    expected = make_mnist(tmp_path, name, gz=gz)
    assert_rows(load_mnist(tmp_path, name), expected)
    for packed in (tmp_path / name / "raw").glob("*.gz"):
        assert packed.with_suffix("").read_bytes() == gzip.decompress(packed.read_bytes())
        packed.unlink()
    assert_rows(load_mnist(tmp_path, name), expected)
    assert not list(tmp_path.rglob("*.tmp"))


def test_mnist_gz_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    expected = make_mnist(tmp_path, gz=True)
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(_files.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "read only")))
    assert_rows(load_mnist(tmp_path, "MNIST"), expected)
    assert set(tmp_path.rglob("*")) == before


def test_fashion_mnist_of_debian_is_read_in_place(tmp_path, monkeypatch):
    expected = make_mnist(tmp_path / "elsewhere", "FashionMNIST", gz=True)
    monkeypatch.setattr(_files, "DEBIAN_FASHION_MNIST", tmp_path / "elsewhere" / "FashionMNIST" / "raw")
    assert_rows(load_mnist(tmp_path / "data", "FashionMNIST"), expected)
    assert not (tmp_path / "data").exists()


def test_mnist_is_downloaded_in_torchvisions_layout(tmp_path, monkeypatch):
    expected = make_mnist(tmp_path / "server", gz=True)

    def deliver(urls, path, md5, what):
        assert all(url.startswith("http") and url.endswith(path.name) for url in urls) and len(md5) == 32
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "server" / "MNIST" / "raw" / path.name, path)

    monkeypatch.setattr(_files, "fetch", deliver)
    assert_rows(load_mnist(tmp_path / "data", "MNIST"), expected)


def test_made_sets_warn(tmp_path):
    make_mnist(tmp_path, n_train=30, n_test=20)
    with pytest.warns(UserWarning, match="30 train and 20 test images.* this is not the official data set") as warned:
        assert not load_mnist(tmp_path, "MNIST").is_official
    assert len(warned) == 1 and warned[0].filename == __file__


@pytest.mark.parametrize(
    "file, damage, match",
    [
        ("train-images-idx3-ubyte", lambda data: data[:-1], "truncated"),
        ("t10k-labels-idx1-ubyte", lambda data: data[:3], "truncated"),
        ("t10k-labels-idx1-ubyte", lambda data: data + b"\0", "too long"),
        ("train-labels-idx1-ubyte", lambda data: b"\0\0\x08\x03" + data[4:], "magic 2051, should be 2049"),
        ("train-labels-idx1-ubyte", lambda data: data[:-1] + b"\x0a", r"label 10, not in 0\.\.9"),
        ("train-labels-idx1-ubyte", lambda data: b"\0\0\x08\x01\0\0\0\x01\0", "100 images but 1 labels"),
        ("train-labels-idx1-ubyte", lambda data: b"\0\0\x08\x01\0\0\0\0", "no rows"),
        ("t10k-images-idx3-ubyte", lambda data: data[:8] + b"\0\0\0\x0e\0\0\0\x38" + data[16:], "14x56, not 28x28"),
    ],
)
def test_damaged_idx(tmp_path, file, damage, match):
    make_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / file
    path.write_bytes(damage(path.read_bytes()))
    refused(load_mnist, tmp_path, "MNIST", match=match)


def test_truncated_gz_leaves_nothing(tmp_path):
    make_mnist(tmp_path, gz=True)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    assert str(path) in refused(load_mnist, tmp_path, "MNIST", match="damaged archive")
    assert not list(tmp_path.rglob("*-ubyte"))


def test_flipped_byte_in_a_file_of_official_length(tmp_path, monkeypatch):
    expected = make_mnist(tmp_path, n_test=10000)
    raw = tmp_path / "MNIST" / "raw"
    refused(load_mnist, tmp_path, "MNIST", match="t10k-images-idx3-ubyte: corrupt")
    official = {file.name: md5_of(file) for file in raw.iterdir()}
    monkeypatch.setitem(_files.MNIST_MD5, "MNIST", official)
    assert_rows(load_mnist(tmp_path, "MNIST"), expected)
    labels = raw / "t10k-labels-idx1-ubyte"
    data = bytearray(labels.read_bytes())
    data[5000] ^= 1
    labels.write_bytes(data)
    refused(load_mnist, tmp_path, "MNIST", match="t10k-labels-idx1-ubyte: corrupt")


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_unreadable_file(tmp_path, monkeypatch):
    make_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"

    def denied(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(_files, "open", denied, raising=False)  # a mode of 000 does not stop root
    assert str(path) in refused(load_mnist, tmp_path, "MNIST", match="Permission denied")


@pytest.mark.parametrize("name, n_zeros", [("MNIST", 5923), ("FashionMNIST", 6000)])
def test_real_data(name, n_zeros, recwarn):
    root = Path(os.environ.get("FLATCL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / name).is_dir():
        pytest.skip(f"no real {name}")
    (train_x, train_y), (test_x, test_y) = load_mnist(root, name)
    assert train_x.shape == (60000, 1, 28, 28) and test_x.shape == (10000, 1, 28, 28)
    assert (train_y == 0).sum() == n_zeros and len(test_y) == 10000
    assert not any("not the official data set" in str(warning.message) for warning in recwarn)


# ---------------------------------------------------------------------------------------------------------- CIFAR


def pack_cifar(root, name, *others):
    """Move the made folder into torchvision's archive, with extra (name, data) members."""
    with tarfile.open(root / ARCHIVES[name], "w:gz") as tar:
        for member, data in others:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        tar.add(root / FOLDERS[name], FOLDERS[name])
    shutil.rmtree(root / FOLDERS[name])


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.filterwarnings("error:.*numpy.core")
def test_cifar_round_trip(tmp_path, name):
    expected = MAKERS[name](tmp_path)
    with pytest.warns(UserWarning, match="not the official data set"):
        assert_rows(load_cifar(tmp_path, name), expected)
    pack_cifar(tmp_path, name)
    assert_rows(load_cifar(tmp_path, name), expected)
    (tmp_path / ARCHIVES[name]).unlink()
    assert_rows(load_cifar(tmp_path, name), expected)  # from the folder that was unpacked


def test_cifar_pickled_by_python_3(tmp_path):
    expected = make_cifar10(tmp_path)
    (images, labels), file = expected[1], tmp_path / "cifar-10-batches-py" / "test_batch"
    for key in (bytes, str):
        fields = {"data": images.reshape(-1, 3072), "labels": labels.tolist()}
        fields = {name.encode() if key is bytes else name: value for name, value in fields.items()}
        file.write_bytes(pickle.dumps(fields, protocol=2))
        assert_rows(load_cifar(tmp_path, "cifar10"), expected)


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_malicious_pickle_is_not_executed(tmp_path):
    make_cifar10(tmp_path)
    bait = tmp_path / "executed"
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(pickle.dumps({b"data": Evil(bait), b"labels": []}, protocol=2))
    assert str(file) in refused(load_cifar, tmp_path, "cifar10", match=r"refused \(asks for '\w+.system'")
    assert not bait.exists()


def test_cifar_archive_writes_nothing_outside(tmp_path):
    root = tmp_path / "a" / "data"
    expected = make_cifar10(root)
    folder = FOLDERS["cifar10"]
    evil = ["../evil", f"{folder}/../../evil", "/tmp/continual_evil", f"{folder}/evil", f"{folder}/sub/test_batch"]
    pack_cifar(root, "cifar10", *((name, b"evil") for name in evil))
    assert_rows(load_cifar(root, "cifar10"), expected)
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {ARCHIVES["cifar10"], *(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"}
    assert not Path("/tmp/continual_evil").exists()


def test_cifar_archive_with_a_link_is_not_followed(tmp_path):
    make_cifar100(tmp_path)
    (tmp_path / "secret").write_bytes((tmp_path / FOLDERS["cifar100"] / "test").read_bytes())
    link = tarfile.TarInfo(f"{FOLDERS['cifar100']}/test")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
    with tarfile.open(tmp_path / ARCHIVES["cifar100"], "w:gz") as tar:
        tar.add(tmp_path / FOLDERS["cifar100"] / "train", f"{FOLDERS['cifar100']}/train")
        tar.addfile(link)
    shutil.rmtree(tmp_path / FOLDERS["cifar100"])
    refused(load_cifar, tmp_path, "cifar100", match="cifar-100-python/test is missing")
    assert not (tmp_path / FOLDERS["cifar100"]).exists()


def test_truncated_cifar_archive(tmp_path):
    make_cifar10(tmp_path)
    pack_cifar(tmp_path, "cifar10")
    archive = tmp_path / ARCHIVES["cifar10"]
    archive.write_bytes(archive.read_bytes()[:-5000])
    assert str(archive) in refused(load_cifar, tmp_path, "cifar10", match="damaged archive")
    assert not (tmp_path / FOLDERS["cifar10"]).exists()


@pytest.mark.parametrize(
    "content, match",
    [
        ([1, 2], "holds a list"),
        ({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}, "not a uint8 array"),
        ({b"data": np.zeros((2, 100), np.uint8), b"labels": [0, 1]}, "not a uint8 array"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "not a list of 2 labels"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}, r"not all integers in 0\.\.9"),
        ({b"labels": [0]}, "not a uint8 array"),
    ],
)
def test_cifar_batch_with_other_content(tmp_path, content, match):
    make_cifar10(tmp_path)
    (tmp_path / FOLDERS["cifar10"] / "data_batch_2").write_bytes(python2_pickle(content))
    refused(load_cifar, tmp_path, "cifar10", match=f"data_batch_2: .*{match}")


def test_truncated_cifar_batch(tmp_path):
    make_cifar10(tmp_path)
    file = tmp_path / FOLDERS["cifar10"] / "data_batch_2"
    file.write_bytes(file.read_bytes()[:5000])
    refused(load_cifar, tmp_path, "cifar10", match="data_batch_2: damaged")


def test_cifar_of_official_length_must_be_official(tmp_path, monkeypatch):
    make_cifar100(tmp_path, n_train=100, n_test=10000)
    built, frombuffer = [], np.frombuffer
    monkeypatch.setattr(np, "frombuffer", lambda data, *args: built.append(len(data)) or frombuffer(data, *args))
    refused(load_cifar, tmp_path, "cifar100", match="cifar-100-python/test: corrupt")
    assert built == [100 * 3072], "the checksum of test comes before its array"


def test_cifar_with_some_rows_in_another_order_is_taken_with_a_warning(tmp_path, monkeypatch):
    expected = make_cifar100(tmp_path, n_train=100, n_test=10000)
    md5 = hashlib.md5((tmp_path / FOLDERS["cifar100"] / "test").read_bytes()).hexdigest()
    monkeypatch.setattr(_files, "REORDERED", {md5: "7 of its rows"})
    with pytest.warns(UserWarning, match="cifar-100-python/test: has all images .* but 7 of its rows .* another order"):
        found = load_cifar(tmp_path, "cifar100")
    assert_rows(found, expected)
    assert not found.is_official


def test_official_cifar_is_known_as_such(tmp_path, monkeypatch):
    import torchvision.datasets

    make_cifar100(tmp_path, n_train=50000, n_test=10000)
    assert not (tmp_path / ARCHIVES["cifar100"]).exists()
    for part in ("train", "test"):
        files = [[part, md5_of(tmp_path / FOLDERS["cifar100"] / part)]]
        monkeypatch.setattr(torchvision.datasets.CIFAR100, f"{part}_list", files)
    assert load_cifar(tmp_path, "cifar100").is_official


def bomb(path, mib):
    """A gzip file of `mib` MiB of zeros, a thousand times smaller itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(mib):
            file.write(bytes(1 << 20))


@pytest.mark.parametrize("name", MAKERS)
def test_cifar_archive_that_unpacks_for_ever(tmp_path, monkeypatch, name):
    monkeypatch.setattr(_files, "MAX_FILE_BYTES", 3 << 20)
    bomb(tmp_path / ARCHIVES[name], 4)
    refused(load_cifar, tmp_path, name, match=f"{ARCHIVES[name]}: more than 3 MiB, refused")


def test_data_that_is_longer_than_any_official_file(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "MAX_FILE_BYTES", 1 << 20)
    make_mnist(tmp_path)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    with open(images, "r+b") as file:
        file.truncate(1 << 40)  # a sparse file: a terabyte that takes no room
    refused(load_mnist, tmp_path, "MNIST", match=f"{images}: more than 1 MiB, refused")
    images.unlink()
    bomb(images.with_name(f"{images.name}.gz"), 2)
    refused(load_mnist, tmp_path, "MNIST", match=f"{images}.gz: more than 1 MiB, refused")
    make_cifar10(tmp_path)
    with open(tmp_path / FOLDERS["cifar10"] / "data_batch_4", "r+b") as file:
        file.truncate(1 << 40)
    refused(load_cifar, tmp_path, "cifar10", match="data_batch_4: more than 1 MiB, refused")


def test_official_files_are_far_below_the_limits():
    largest = 50_000 * (3072 + 60)  # CIFAR-100's train; CIFAR's archives have 60 000 such rows
    assert 2 * 6 / 5 * largest < _files.MAX_FILE_BYTES
    assert 40 * len("val_9999.JPEG\tn01440000\t0\t32\t44\t62\n") * 10_000 < _files.MAX_TEXT_BYTES


def tar_header(name, size, kind=b"0", checksum=None):
    header = bytearray(512)
    header[: len(name)] = name
    header[124 : 124 + len(size)] = size
    header[156:157] = kind
    header[148:156] = b"%06o\0 " % (sum(header) + 8 * 32) if checksum is None else checksum
    return bytes(header)


TRAIN = b"cifar-100-python/train"
SPARSE = tar_header(TRAIN, b"%011o" % 512, b"S")
ODD_TARS = {
    "longer than the archive": (tar_header(TRAIN, b"77777777777"), "the tar ends too early"),
    "negative size": (tar_header(TRAIN, b"\xff" * 12), "there is no member at byte 0 of the tar"),
    "signed size": (tar_header(TRAIN, b"-0000001000"), "there is no member at byte 0 of the tar"),
    "huge size": (tar_header(TRAIN, b"\x80" + b"\x7f" * 11), "there is no member at byte 0 of the tar"),
    "no size": (tar_header(TRAIN, b""), "there is no member at byte 0 of the tar"),
    "bad checksum": (tar_header(TRAIN, b"0", checksum=b"000001\0 "), "there is no member at byte 0 of the tar"),
    "half a header": (tar_header(TRAIN, b"0")[:300], "the tar ends too early"),
    "no tar": (b"<html>not found</html>" * 100, "there is no member at byte 0 of the tar"),
    "empty": (b"", "cifar-100-python/train is missing"),
    "sparse": (SPARSE + bytes(512), "cifar-100-python/train is missing"),
    "device": (tar_header(TRAIN, b"0", b"3"), "cifar-100-python/train is missing"),
    "long name": (
        tar_header(b"././@LongLink", b"%011o" % 22, b"L") + TRAIN.ljust(512, b"\0"),
        "cifar-100-python/train is missing",
    ),
    "many long names": (tar_header(b"././@LongLink", b"0", b"L") * 3000, "cifar-100-python/train is missing"),
    "long attributes": (
        tar_header(b"x", b"%011o" % (1 << 20), b"x") + b"1" * (1 << 20),
        "cifar-100-python/train is missing",
    ),
}


@pytest.mark.parametrize("what", ODD_TARS)
def test_cifar_archive_with_odd_headers(tmp_path, what):
    data, match = ODD_TARS[what]
    (tmp_path / ARCHIVES["cifar100"]).write_bytes(gzip.compress(data))
    refused(load_cifar, tmp_path, "cifar100", match=match)


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_cifar_archive_of_every_style(tmp_path, style):
    expected = make_cifar100(tmp_path)
    with tarfile.open(tmp_path / ARCHIVES["cifar100"], "w:gz", format=style) as tar:
        for prefix in ("./", ""):  # later members count
            tar.add(tmp_path / FOLDERS["cifar100"], prefix + FOLDERS["cifar100"])
    shutil.rmtree(tmp_path / FOLDERS["cifar100"])
    assert_rows(load_cifar(tmp_path, "cifar100"), expected)


# -------------------------------------------------------------------------------------------------- Tiny-ImageNet


@pytest.fixture(scope="module")
def made_tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return root / "tiny-imagenet-200.zip", make_tinyimagenet(root)


@pytest.fixture
def tiny(tmp_path, made_tiny):
    """(root, expected rows): a fresh copy of the made zip."""
    root = tmp_path / "data"
    root.mkdir()
    shutil.copy2(made_tiny[0], root)
    return root, made_tiny[1]


def rewrite_tiny(root, change):
    """Rewrite the zip's members: `change(name, data)` gives the new data, None drops the member."""
    path = root / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path) as old:
        members = {name: change(name, old.read(name)) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            if data is not None:
                new.writestr(name, data)


def no_decoding(monkeypatch):
    def fail(data):
        raise AssertionError("decoded again")

    monkeypatch.setattr(_files, "_decode_image", fail)


def test_tiny_round_trip_and_cache(tiny, monkeypatch):
    root, expected = tiny
    with pytest.warns(UserWarning, match="400 train and 200 test images"):
        assert_rows(load_tinyimagenet(root), expected)
    assert {path.name for path in root.iterdir()} == {"tiny-imagenet-200.zip", "tiny-imagenet-200-cache"}
    no_decoding(monkeypatch)
    with pytest.warns(UserWarning, match="400 train and 200 test images"):
        assert_rows(load_tinyimagenet(root), expected)
    (root / "tiny-imagenet-200.zip").unlink()
    assert_rows(load_tinyimagenet(root), expected)


def test_tiny_from_an_extracted_folder(tiny, monkeypatch):
    root, expected = tiny
    zipfile.ZipFile(root / "tiny-imagenet-200.zip").extractall(root)
    (root / "tiny-imagenet-200.zip").unlink()
    assert_rows(load_tinyimagenet(root), expected)
    (next((root / "tiny-imagenet-200" / "val" / "images").iterdir())).unlink()
    refused(load_tinyimagenet, root, match="annotated but missing; extract")


def test_tiny_cache_follows_the_zip(tiny, capsys):
    root, _ = tiny
    load_tinyimagenet(root)
    expected = make_tinyimagenet(root, n_train=1, seed=1)
    capsys.readouterr()
    assert_rows(load_tinyimagenet(root), expected)
    assert "its source has changed" in capsys.readouterr().err
    assert_rows(load_tinyimagenet(root), expected)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("file", ["train_x.npy", "train_y.npy", "test_x.npy", "test_y.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "absent"])
def test_damaged_tiny_cache_is_rebuilt(tiny, file, damage, capsys, monkeypatch):
    root, expected = tiny
    load_tinyimagenet(root)
    path = root / "tiny-imagenet-200-cache" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes({"flip": data, "truncate": data[:-7], "empty": b"", "absent": b""}[damage])
    if damage == "absent":
        path.unlink()
    capsys.readouterr()
    assert_rows(load_tinyimagenet(root), expected)
    assert "built again" in capsys.readouterr().err or (file, damage) == ("meta.json", "absent")
    no_decoding(monkeypatch)
    assert_rows(load_tinyimagenet(root), expected)
    assert len(list(root.iterdir())) == 2


@pytest.mark.parametrize(
    "file, change",
    [
        ("train_x.npy", lambda data: data.replace(b"(400, 3, 64, 64)", b"(9999999999,3,9)")),
        ("meta.json", lambda data: b"[" * 100_000),
        ("meta.json", lambda data: b"[1]"),
        ("meta.json", lambda data: data + b" " * _files.MAX_TEXT_BYTES),
    ],
)
def test_absurd_tiny_cache_is_rebuilt(tiny, file, change, capsys):
    root, expected = tiny
    load_tinyimagenet(root)
    path = root / "tiny-imagenet-200-cache" / file
    path.write_bytes(change(path.read_bytes()))
    capsys.readouterr()
    assert_rows(load_tinyimagenet(root), expected)
    assert "built again" in capsys.readouterr().err


def test_tiny_cache_in_the_home_folder(tiny, tmp_path, monkeypatch):
    root, expected = tiny
    mkdir = Path.mkdir

    def only_at_home(self, *args, **kwargs):
        if self.parent == root:
            raise OSError(30, "Read-only file system", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", only_at_home)
    assert_rows(load_tinyimagenet(root), expected)
    assert len(list((tmp_path / "home" / ".cache" / "flatcl").iterdir())) == 1
    no_decoding(monkeypatch)
    assert_rows(load_tinyimagenet(root), expected)
    assert [path.name for path in root.iterdir()] == ["tiny-imagenet-200.zip"]


def test_tiny_without_any_place_for_the_cache(tiny, monkeypatch, capsys):
    root, expected = tiny
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert_rows(load_tinyimagenet(root), expected)
    assert "cannot be written" in capsys.readouterr().err


def test_truncated_tiny_zip(tiny):
    root, _ = tiny
    path = root / "tiny-imagenet-200.zip"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(path) in refused(load_tinyimagenet, root, match="truncated or not a zip .*delete the zip and fetch")


def test_tiny_zip_with_a_crc_error(tiny):
    root, _ = tiny
    path = root / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path) as archive:
        info = next(item for item in archive.infolist() if item.filename.endswith("val_17.JPEG"))
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len(info.filename) + 400] ^= 1  # a local header has 30 bytes and the name
    path.write_bytes(data)
    refused(load_tinyimagenet, root, match="member tiny-imagenet-200/val/images/val_17.JPEG is damaged .*CRC")
    assert not (root / "tiny-imagenet-200-cache").exists()


@pytest.mark.parametrize(
    "drop, match",
    [
        ("wnids.txt", "wnids.txt is missing"),
        ("val/val_annotations.txt", "val_annotations.txt is missing"),
        ("val/images/val_5.JPEG", "val/images/val_5.JPEG is annotated but missing"),
    ],
)
def test_tiny_with_a_file_missing(tiny, drop, match):
    root, _ = tiny
    rewrite_tiny(root, lambda name, data: None if name.endswith(drop) else data)
    refused(load_tinyimagenet, root, match=match)


def test_tiny_with_a_class_missing(tiny):
    root, _ = tiny
    rewrite_tiny(root, lambda name, data: None if "n01440007" in name else data)
    refused(load_tinyimagenet, root, match="no train images of n01440007;")


def test_tiny_with_an_unfinished_annotation_file(tiny):
    root, _ = tiny
    rewrite_tiny(root, lambda name, data: b"\n".join(data.split(b"\n")[:3]) if "val_ann" in name else data)
    refused(load_tinyimagenet, root, match="val_10.JPEG is not in val_annotations.txt")
    rewrite_tiny(root, lambda name, data: data + b"\nval_3.JPEG\tn0" if "val_ann" in name else data)
    refused(load_tinyimagenet, root, match="no known class in")


@pytest.mark.parametrize(
    "file, limit",
    [("wnids.txt", "MAX_TEXT_BYTES"), ("val_annotations.txt", "MAX_TEXT_BYTES"), ("val_3.JPEG", "MAX_IMAGE_BYTES")],
)
@pytest.mark.parametrize("unpacked", [False, True])
def test_tiny_with_a_file_that_is_too_long(tiny, file, limit, unpacked):
    root, _ = tiny
    padding = getattr(_files, limit)
    rewrite_tiny(root, lambda name, data: data + b"\n" * padding if name.endswith(file) else data)
    if unpacked:
        zipfile.ZipFile(root / "tiny-imagenet-200.zip").extractall(root)
        (root / "tiny-imagenet-200.zip").unlink()
    refused(load_tinyimagenet, root, match=f"{file}: more than {padding >> 20} MiB, refused")


def test_tiny_members_damaged_under_every_compression(tiny):
    root, _ = tiny
    path = root / "tiny-imagenet-200.zip"
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("tiny-imagenet-200/wnids.txt", "".join(f"n{k:08d}\n" for k in range(200)))
        sound = path.read_bytes()
        for at in range(30 + len("tiny-imagenet-200/wnids.txt"), len(sound), 7):
            path.write_bytes(sound[:at] + bytes([sound[at] ^ 0xFF]) + sound[at + 1 :])
            refused(load_tinyimagenet, root, match=str(root))


@pytest.mark.parametrize("kind", ["size", "text", "png", "cut"])
def test_tiny_with_a_bad_image(tiny, kind):
    root, _ = tiny

    def change(name, data):
        if not name.endswith("val_3.JPEG"):
            return data
        if kind in ("text", "cut"):
            return b"<html>" if kind == "text" else data[: len(data) // 2]
        file = io.BytesIO()
        Image.new("RGB", (64, 32) if kind == "size" else (64, 64)).save(file, "JPEG" if kind == "size" else "PNG")
        return file.getvalue()

    rewrite_tiny(root, change)
    refused(load_tinyimagenet, root, match="val_3.JPEG is not a 64x64 JPEG" + (".*64x32" if kind == "size" else ""))


@pytest.mark.parametrize("name", ["../evil", "/evil", "tiny-imagenet-200/../../evil", "tiny-imagenet-200\\..\\evil"])
def test_tiny_zip_that_points_outside(tiny, name):
    root, _ = tiny
    with zipfile.ZipFile(root / "tiny-imagenet-200.zip", "a") as archive:
        archive.writestr(name, b"evil")
    refused(load_tinyimagenet, root, match="lies outside the folder")


# ----------------------------------------------------------------------------------------------------- Downloading


class Server(http.server.ThreadingHTTPServer):
    """Serves `content[path]`. The first `n_breaks` transfers break half way; `ranges` says if Range is honoured; with
    `is_held`, transfers stop half way until `go` is set."""

    daemon_threads = True

    def __init__(self, content, n_breaks=0, ranges=True, is_held=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.n_breaks, self.ranges, self.asked = content, n_breaks, ranges, []
        self.go = threading.Event()
        if not is_held:
            self.go.set()

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}{path}"

    def starts(self):
        """First byte of every request but the probes."""
        return [int(start[1]) if start else 0 for start in self.asked if start is None or start[2] == ""]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, data = self.server, self.server.content.get(self.path)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        server.asked.append(wanted)
        is_probe = bool(wanted and wanted[2])
        if data is None:
            is_probe or server.go.wait(20)
            return self.send_error(404)
        start, end = (int(wanted[1]), int(wanted[2] or len(data) - 1) + 1) if wanted and server.ranges else (0, None)
        if wanted and server.ranges and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = data[start:end]
        self.send_response(206 if wanted and server.ranges else 200)
        if wanted and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        if server.n_breaks and not is_probe:
            server.n_breaks -= 1
            body = body[:half]
        with contextlib.suppress(ConnectionError):  # of a client that was killed
            self.wfile.write(body[:half])
            is_probe or server.go.wait(20)
            self.wfile.write(body[half:])

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(*args, **kwargs):
        servers.append(Server(*args, **kwargs))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def closed():
    """Address of a local port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}/"


CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


def test_fetch_resumes_what_broke(serve, tmp_path):
    server = serve({"/f.zip": CONTENT}, n_breaks=1)
    path = tmp_path / "new" / "f.zip"
    fetch([server.url("/f.zip")], path, MD5, "made")
    assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]
    assert server.starts() == [0, 150_000]


def test_fetch_resumes_an_earlier_process(serve, tmp_path):
    server = serve({"/f.zip": CONTENT})
    (tmp_path / "f.zip.part").write_bytes(CONTENT[:1234])
    fetch([server.url("/f.zip")], tmp_path / "f.zip", MD5, "made")
    assert (tmp_path / "f.zip").read_bytes() == CONTENT and server.starts() == [1234]


@pytest.mark.parametrize("left", [CONTENT, CONTENT + b"more", b"another file"])
@pytest.mark.parametrize("ranges", [True, False])
def test_fetch_whatever_was_left(serve, tmp_path, left, ranges):
    server = serve({"/f.zip": CONTENT}, ranges=ranges)
    (tmp_path / "f.zip.part").write_bytes(left)
    fetch([server.url("/f.zip")], tmp_path / "f.zip", MD5, "made")
    assert (tmp_path / "f.zip").read_bytes() == CONTENT


def test_fetch_restarts_where_ranges_are_ignored(serve, tmp_path):
    server = serve({"/f.zip": CONTENT}, ranges=False)
    (tmp_path / "f.zip.part").write_bytes(CONTENT[:1234])
    fetch([server.url("/f.zip")], tmp_path / "f.zip", None, "made")
    assert (tmp_path / "f.zip").read_bytes() == CONTENT


def test_fetch_goes_to_the_next_mirror(serve, closed, tmp_path):
    bad, good = serve({"/f.zip": CONTENT[:-1] + b"x"}), serve({"/f.zip": CONTENT})
    fetch([closed + "f.zip", bad.url("/f.zip"), good.url("/f.zip")], tmp_path / "f.zip", MD5, "made")
    assert (tmp_path / "f.zip").read_bytes() == CONTENT
    assert bad.starts() == [0] and good.starts() == [0]


def test_fetch_says_why_each_mirror_failed(serve, closed, tmp_path):
    server = serve({"/bad": b"x"})
    urls = [closed + "f.zip", server.url("/absent"), server.url("/bad"), "file:///etc/hostname"]
    message = refused(fetch, urls, tmp_path / "f.zip", MD5, "made", match="made: cannot download f.zip")
    assert all(reason in message for reason in ("refused", "HTTP 404", "md5 differs", "unknown url type", *urls))
    assert str(tmp_path) in message and not list(tmp_path.iterdir())


def test_fetch_waits_for_silent_mirrors_all_at_once(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        urls = [f"http://127.0.0.1:{silent.getsockname()[1]}/{k}" for k in range(3)]
        start = time.monotonic()
        refused(fetch, urls, tmp_path / "f.zip", None, "made", match="no answer in 4 s")
        assert time.monotonic() - start < 8


def test_fetch_into_a_folder_that_cannot_be_written(tmp_path, closed):
    (tmp_path / "file").touch()
    refused(fetch, [closed], tmp_path / "file" / "f.zip", None, "made", match="cannot write f.zip to .*/file ")


@pytest.mark.parametrize("folder", ["", "new", "new/and/deep"])
def test_a_failed_download_leaves_no_folder(serve, tmp_path, folder):
    (tmp_path / "mine").mkdir()
    refused(fetch, [serve({}).url("/f.zip")], tmp_path / "mine" / folder / "f.zip", MD5, "made", match="HTTP 404")
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_what_a_broken_download_got_is_kept(serve, tmp_path):
    server = serve({"/f.zip": CONTENT}, n_breaks=1000)
    refused(fetch, [server.url("/f.zip")], tmp_path / "new" / "f.zip", MD5, "made", match="stopped after")
    assert os.listdir(tmp_path / "new") == ["f.zip.part"]
    server.n_breaks = 0
    fetch([server.url("/f.zip")], tmp_path / "new" / "f.zip", MD5, "made")
    assert os.listdir(tmp_path / "new") == ["f.zip"]


def test_an_interrupted_download_leaves_no_folder(serve, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_obtain", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch([serve({}).url("/f.zip")], tmp_path / "new" / "f.zip", MD5, "made")
    assert not list(tmp_path.iterdir())


FETCH = """
import sys, pathlib
from flatcl.utils.download import fetch
fetch([sys.argv[1]], pathlib.Path(sys.argv[2]), sys.argv[3], "made")
"""


@pytest.fixture
def fetching():
    """Starts a process that fetches."""
    processes = []

    def start(url, path):
        words = [sys.executable, "-c", FETCH, url, str(path), MD5]
        process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


needs_locks = pytest.mark.skipif(os.name != "posix", reason="no locks there")


@needs_locks
def test_of_simultaneous_downloads_one_fetches(serve, fetching, tmp_path):
    server, path = serve({"/f.zip": CONTENT}, is_held=True), tmp_path / "new" / "deep" / "f.zip"
    first = fetching(server.url("/f.zip"), path)
    until(lambda: server.starts())
    others = [fetching(server.url("/f.zip"), path) for _ in range(2)]
    for process in others:
        assert process.stderr.readline() == "made: another process is downloading f.zip; waiting for it\n"
    server.go.set()
    assert [process.wait(20) for process in (first, *others)] == [0, 0, 0]
    assert server.starts() == [0] and path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["f.zip"]


@needs_locks
def test_a_download_whose_process_was_killed_is_taken_over(serve, fetching, tmp_path):
    server, path = serve({"/f.zip": CONTENT}, is_held=True), tmp_path / "f.zip"
    first = fetching(server.url("/f.zip"), path)
    part = tmp_path / "f.zip.part"
    until(lambda: part.exists() and part.stat().st_size > 100_000)
    second = fetching(server.url("/f.zip"), path)
    assert "waiting" in second.stderr.readline()
    first.send_signal(signal.SIGKILL)
    first.wait(20)
    until(lambda: len(server.starts()) == 2)
    assert server.starts()[1] > 100_000
    server.go.set()
    assert second.wait(20) == 0 and path.read_bytes() == CONTENT and os.listdir(tmp_path) == ["f.zip"]


@needs_locks
def test_simultaneous_downloads_that_all_fail_leave_no_folder(serve, fetching, tmp_path):
    server, path = serve({}, is_held=True), tmp_path / "new" / "deep" / "f.zip"
    processes = [fetching(server.url("/f.zip"), path)]
    until(lambda: server.starts())
    processes += [fetching(server.url("/f.zip"), path) for _ in range(2)]
    for process in processes[1:]:
        assert "waiting" in process.stderr.readline()
    server.go.set()
    for process in processes:
        assert process.wait(20) == 1 and "HTTP 404" in process.stderr.read()
    assert len(server.starts()) == 3 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "load, folder, file",
    [
        (lambda root: load_mnist(root, "MNIST"), "MNIST/raw", "train-images-idx3-ubyte.gz"),
        (lambda root: load_mnist(root, "FashionMNIST"), "FashionMNIST/raw", "train-images-idx3-ubyte.gz"),
        (lambda root: load_cifar(root, "cifar10"), "", "cifar-10-python.tar.gz"),
        (lambda root: load_cifar(root, "cifar100"), "", "cifar-100-python.tar.gz"),
        (load_tinyimagenet, "", "tiny-imagenet-200.zip"),
    ],
)
def test_offline(tmp_path, monkeypatch, closed, load, folder, file):
    import torchvision.datasets as official

    monkeypatch.setattr(_files, "fetch", fetch)
    monkeypatch.setattr(_files, "TINY_URLS", (closed + "tiny-imagenet-200.zip",))
    for name in ("MNIST", "FashionMNIST"):
        monkeypatch.setattr(getattr(official, name), "mirrors", [closed, closed])
    for name in ("CIFAR10", "CIFAR100"):
        monkeypatch.setattr(getattr(official, name), "url", closed)
    start = time.monotonic()
    message = refused(load, tmp_path, match=file)
    assert str(tmp_path / folder) in message and closed in message
    assert time.monotonic() - start < 10
    assert not list(tmp_path.iterdir())
