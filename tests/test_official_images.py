"""The readers of SVHN, GTSRB and EuroSAT, on small files in the exact formats, sound and damaged."""

import re
import shutil
import zipfile

import numpy as np
import pytest
import scipy.io
import torch
from made import encoded, make_eurosat, make_gtsrb, make_svhn

from flatcl.datasets import _files, _images, seq_eurosat, seq_gtsrb, seq_svhn
from flatcl.datasets._images import held_out
from flatcl.datasets.seq_eurosat import CLASSES, load_eurosat
from flatcl.datasets.seq_gtsrb import PARTS, load_gtsrb
from flatcl.datasets.seq_svhn import load_svhn
from flatcl.utils.errors import DataError
from flatcl.utils.registry import DATASETS

pytestmark = pytest.mark.filterwarnings("ignore:.*not the official data set")
GTSRB_ZIPS = [archive for _, archive, _ in PARTS.values()]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No network, and no home folder but one of the test."""

    def refuse(urls, path, md5, what):
        raise AssertionError(f"would download {path}")

    monkeypatch.setattr(_files, "fetch", refuse)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def assert_rows(got, expected):
    for (x, y), (made_x, made_y) in zip(got, expected, strict=True):
        assert x.dtype == torch.uint8 and y.dtype == torch.int64 and x.is_contiguous()
        assert np.array_equal(x.numpy(), made_x) and np.array_equal(y.numpy(), made_y)


def refused(load, root, match):
    with pytest.raises(DataError, match=match) as caught:
        load(root)
    assert "\n" not in str(caught.value)


def no_decoding(monkeypatch):
    monkeypatch.setattr(_images, "rgb", lambda *args: pytest.fail("decoded again"))


def rewrite(archive, change):
    """`change(name, data)` gives a member's new data; None drops it."""
    with zipfile.ZipFile(archive) as old:
        members = {name: change(name, old.read(name)) for name in old.namelist() if not name.endswith("/")}
    with zipfile.ZipFile(archive, "w") as new:
        for name, data in members.items():
            if data is not None:
                new.writestr(name, data)


@pytest.mark.parametrize(
    "name, make", [("seq-svhn", make_svhn), ("seq-gtsrb", make_gtsrb), ("seq-eurosat", make_eurosat)]
)
def test_what_is_missing_is_named_and_downloaded(name, make, tmp_path, monkeypatch):
    cls = DATASETS.load(name)
    expected = {
        "seq-svhn": f"put train_32x32.mat, test_32x32.mat into {tmp_path}",
        "seq-gtsrb": f"put {', '.join(GTSRB_ZIPS)} into {tmp_path / 'gtsrb'}",
        "seq-eurosat": f"put EuroSAT.zip into {tmp_path / 'eurosat'}",
    }[name]
    assert cls.missing(tmp_path) == expected
    make(tmp_path / "server", **({} if name == "seq-svhn" else {"zips": True}))

    def deliver(urls, path, md5, what):
        assert all(url.startswith("http") and url.endswith(path.name) for url in urls) and len(md5) == 32
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "server" / path.relative_to(tmp_path), path)

    monkeypatch.setattr(_files, "fetch", deliver)
    load = {"seq-svhn": load_svhn, "seq-gtsrb": load_gtsrb, "seq-eurosat": load_eurosat}[name]
    with pytest.warns(UserWarning, match="this is not the official data set"):
        load(tmp_path)
    assert cls.missing(tmp_path) is None


def test_the_addresses_and_sums_are_torchvisions():
    import inspect

    from torchvision.datasets import GTSRB, EuroSAT

    source = inspect.getsource(GTSRB)
    assert seq_gtsrb.URL in source and all(zip in source and md5 in source for _, zip, md5 in PARTS.values())
    source = inspect.getsource(EuroSAT)
    assert seq_eurosat.URL in source and seq_eurosat.MD5 in source
    assert {name for _, name, _ in seq_svhn._official().values()} == {"train_32x32.mat", "test_32x32.mat"}


# ----------------------------------------------------------------------------------------------------------- SVHN


def test_svhn_round_trip(tmp_path):
    expected = make_svhn(tmp_path)
    assert 0 in expected[0][1]
    assert_rows(load_svhn(tmp_path), expected)


def mat(**content):
    return lambda path: scipy.io.savemat(path, content)


X, Y = np.full((32, 32, 3, 20), 9, np.uint8), np.ones((20, 1), np.uint8)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "damaged, or not a MATLAB file"),
        (lambda path: path.write_bytes(b""), "damaged, or not a MATLAB file"),
        (lambda path: path.write_bytes(b"<html>not found</html>" * 50), "damaged, or not a MATLAB file"),
        (mat(X=X), "damaged, or not a MATLAB file with X and y"),
        (mat(X=X[..., :19], y=Y), "19 images but 20 labels"),
        (mat(X=X.astype(float), y=Y), "its X is float64 .*, not uint8"),
        (mat(X=X[:30], y=Y), r"its X is uint8 \(30, 32, 3, 20\)"),
        (mat(X=X, y=Y + 10), "its y must be whole numbers in 1..10"),
        (mat(X=X, y=Y / 2), "its y must be whole numbers in 1..10"),
    ],
)
def test_damaged_svhn(tmp_path, change, match):
    make_svhn(tmp_path)
    change(tmp_path / "test_32x32.mat")
    refused(load_svhn, tmp_path, match=f"test_32x32.mat: {match}")


def test_svhn_with_a_flipped_byte_or_too_long(tmp_path, monkeypatch):
    make_svhn(tmp_path)
    path = tmp_path / "test_32x32.mat"
    sound = path.read_bytes()
    for at in range(130, len(sound), len(sound) // 15):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 0x55]) + sound[at + 1 :])
        refused(load_svhn, tmp_path, match="test_32x32.mat")
    path.write_bytes(sound)
    monkeypatch.setattr(seq_svhn, "ROWS", {"train": 40, "test": 26032})
    refused(load_svhn, tmp_path, match="train_32x32.mat: corrupt")
    monkeypatch.setattr(seq_svhn, "MAX_FILE_BYTES", 30000)
    refused(load_svhn, tmp_path, match="more than 0 MiB, refused|not a MATLAB file with X and y")


# ---------------------------------------------------------------------------------------------------------- GTSRB


@pytest.mark.parametrize("zips", [False, True])
def test_gtsrb_round_trip_and_cache(tmp_path, monkeypatch, zips):
    expected = make_gtsrb(tmp_path, zips=zips)
    assert sorted(path.name for path in (tmp_path / "gtsrb").iterdir()) == sorted(
        GTSRB_ZIPS if zips else ["GTSRB", "GT-final_test.csv"]
    )
    assert_rows(load_gtsrb(tmp_path), expected)
    with monkeypatch.context() as patch:
        no_decoding(patch)
        assert_rows(load_gtsrb(tmp_path), expected)
    assert {path.name for path in tmp_path.iterdir()} == {"gtsrb", "gtsrb-cache"}
    shutil.rmtree(tmp_path / "gtsrb")
    other = make_gtsrb(tmp_path, n_train=3, seed=1, zips=zips)
    assert_rows(load_gtsrb(tmp_path), other)


def test_gtsrb_is_resized(tmp_path):
    make_gtsrb(tmp_path)
    file = next((tmp_path / "gtsrb" / "GTSRB" / "Training" / "00000").glob("*.ppm"))
    file.write_bytes(encoded(np.full((3, 40, 90), 77, np.uint8), "PPM"))
    (images, _), _ = load_gtsrb(tmp_path)
    assert images.shape[1:] == (3, 32, 32) and any((image == 77).all() for image in images)


def test_damaged_gtsrb(tmp_path):
    make_gtsrb(tmp_path)
    base = tmp_path / "gtsrb"
    truth, tests = base / "GT-final_test.csv", base / "GTSRB" / "Final_Test" / "Images"
    text = truth.read_text()
    truth.write_text(re.sub(r";\d+\s*\Z", ";43\n", text))
    refused(load_gtsrb, tmp_path, match="00042.ppm has the class '43', not a number in 0..42")
    truth.write_text(text.replace("ClassId", "Class"))
    refused(load_gtsrb, tmp_path, match="has the class None")
    truth.write_text(text.replace("00001.ppm", "0" * 200_000))
    refused(load_gtsrb, tmp_path, match="GT-final_test.csv: damaged .field larger than field limit")
    truth.write_text("")
    refused(load_gtsrb, tmp_path, match="no test images")
    truth.write_text(text)
    (tests / "00003.ppm").write_bytes(b"P6 broken")
    refused(load_gtsrb, tmp_path, match="Final_Test/Images/00003.ppm is not a PPM image .*extract the zip again")
    (tests / "00003.ppm").unlink()
    refused(load_gtsrb, tmp_path, match="00003.ppm is named by .* but missing")


def test_damaged_gtsrb_zips(tmp_path, monkeypatch):
    make_gtsrb(tmp_path, zips=True)
    train, tests, truth = (tmp_path / "gtsrb" / name for name in GTSRB_ZIPS)
    monkeypatch.setattr(seq_gtsrb, "ROWS", {"train": 86, "test": 12630})
    refused(load_gtsrb, tmp_path, match=f"{train.name}: corrupt .md5")
    monkeypatch.undo()
    sound = truth.read_bytes()
    rewrite(truth, lambda name, data: None)
    refused(load_gtsrb, tmp_path, match="GT-final_test.csv is missing")
    truth.write_bytes(sound)
    with zipfile.ZipFile(tests, "a") as archive:
        archive.writestr("../evil.ppm", b"evil")
    refused(load_gtsrb, tmp_path, match="lies outside the folder")
    tests.write_bytes(tests.read_bytes()[:500])
    refused(load_gtsrb, tmp_path, match="truncated or not a zip")
    rewrite(train, lambda name, data: None)
    refused(load_gtsrb, tmp_path, match="no train images in it; delete the zip")


# -------------------------------------------------------------------------------------------------------- EuroSAT


@pytest.mark.parametrize("zips", [False, True])
def test_eurosat_round_trip_split_and_cache(tmp_path, monkeypatch, zips):
    made = make_eurosat(tmp_path, zips=zips)
    names = sorted(made)
    labels = np.array([CLASSES.index(name.split("/")[0]) for name in names])
    test = held_out(names, labels, 0.2)
    assert np.bincount(labels[test]).tolist() == [1] * 10
    images = np.stack([made[name] for name in names])
    expected = ((images[~test], labels[~test]), (images[test], labels[test]))
    assert_rows(load_eurosat(tmp_path), expected)
    no_decoding(monkeypatch)
    assert_rows(load_eurosat(tmp_path), expected)


def test_the_split_stays_when_files_are_added():
    names = [f"{k:03d}.jpg" for k in range(100)]
    labels = np.zeros(100, int)
    few, more = held_out(names, labels, 0.2), held_out([*names, "new.jpg"], np.zeros(101, int), 0.2)
    assert few.sum() == 20 and (few != more[:100]).sum() <= 1
    assert 5 < few[:50].sum() < 15, "by a hash, not the first ones"
    unequal = held_out(names, np.arange(100) // 98, 0.5)
    assert unequal[:98].sum() == 49 and unequal[98:].sum() == 1
    for count, fraction, expected in ((2, 0.01, 1), (2, 0.99, 1), (3, 0.99, 2), (1, 0.5, 0)):
        assert held_out(names[:count], labels[:count], fraction).sum() == expected


def test_damaged_eurosat(tmp_path, monkeypatch):
    make_eurosat(tmp_path, zips=True)
    archive = tmp_path / "eurosat" / "EuroSAT.zip"
    sound = archive.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(seq_eurosat, "ROWS", 50)
        refused(load_eurosat, tmp_path, match="EuroSAT.zip: corrupt .md5")
    rewrite(archive, lambda name, data: None if "River" in name and not name.endswith("_1.jpg") else data)
    refused(load_eurosat, tmp_path, match="fewer than 2 images of River; delete the zip")
    archive.write_bytes(sound)
    rewrite(archive, lambda name, data: data[:300] if name.endswith("River_2.jpg") else data)
    refused(load_eurosat, tmp_path, match="2750/River/River_2.jpg is not a JPEG image")
    archive.write_bytes(sound)
    with zipfile.ZipFile(archive, "a") as added:
        added.writestr("2750/../../evil", b"evil")
    refused(load_eurosat, tmp_path, match="lies outside the folder")
    assert not (tmp_path / "eurosat-cache").exists()
