"""From a data set's files to summary.json, on small sets in the true formats; and what is said when there are none."""

import json
import socket
import time
import warnings
from pathlib import Path

import pytest
from made import make_cifar10, make_cifar100, make_mnist, make_tinyimagenet

from flatcl.datasets import _files
from flatcl.utils.commands.train import main as run_main

pytestmark = pytest.mark.filterwarnings("ignore:.*not the official data set")

MAKERS = {
    "seq-mnist": make_mnist,
    "seq-fmnist": lambda root: make_mnist(root, "FashionMNIST"),
    "perm-mnist": make_mnist,
    "rot-mnist": make_mnist,
    "mnist-360": lambda root: make_mnist(root, n_train=350),
    "seq-cifar10": make_cifar10,
    "seq-cifar100": make_cifar100,
    "seq-tinyimg": make_tinyimagenet,
}
COLOUR = ("seq-cifar10", "seq-cifar100", "seq-tinyimg")
ABSENT = {  # the folder below --base_path, and the file that belongs there
    "seq-mnist": ("MNIST/raw", "train-images-idx3-ubyte.gz"),
    "seq-fmnist": ("FashionMNIST/raw", "train-images-idx3-ubyte.gz"),
    "seq-cifar10": ("", "cifar-10-python.tar.gz"),
    "seq-cifar100": ("", "cifar-100-python.tar.gz"),
    "seq-tinyimg": ("", "tiny-imagenet-200.zip"),
}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """A machine without network, whose home folder and system hold no data."""

    def unreachable(*args, **keywords):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(_files, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)


def main(tmp_path, dataset, *words):
    folders = ("--base_path", tmp_path / "data", "--results_path", tmp_path / "results")
    argv = ["--model", "er", "--dataset", dataset, *folders, "--device", "cpu", "--non_verbose", *words]
    return run_main([str(word) for word in argv])


def run_folder(tmp_path) -> Path:
    (summary,) = (tmp_path / "results").rglob("summary.json")
    return summary.parent


@pytest.mark.parametrize("dataset", COLOUR)
def test_colour_images_train_a_resnet(tmp_path, dataset, capsys):
    MAKERS[dataset](tmp_path / "data")
    trained = 1 if dataset == "seq-tinyimg" else 2
    words = ("--backbone", "reduced-resnet18", "--n_epochs", 1, "--debug_mode", 1, "--stop_after", trained)
    assert main(tmp_path, dataset, *words, "--buffer_size", 20, "--minibatch_size", 8) == 0
    folder = run_folder(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert folder.parts[-4:-1] == ("class-il", dataset, "er")
    assert summary["status"] == "finished" and summary["dataset"] == dataset and summary["setting"] == "class-il"
    assert summary["backbone"] == "reduced-resnet18" and set(summary["accuracy"]) == {"class-il", "task-il"}
    tasks = 5 if dataset == "seq-cifar10" else 10
    for matrix in summary["accuracy"].values():
        assert [len(row) for row in matrix] == [tasks] * trained
        assert all(0 <= value <= 1 for row in matrix for value in row)
    images = {"seq-cifar10": 20, "seq-cifar100": 20, "seq-tinyimg": 40}[dataset]
    assert summary["cost"]["steps"] == trained * -(-images // 32)
    config = json.loads((folder / "config.json").read_text())["flags"]
    assert config["stop_after"] == {"value": trained, "origin": "argv"}
    assert len((folder / "metrics.jsonl").read_text().splitlines()) >= trained
    shown = capsys.readouterr().out
    assert f"Accuracy for {trained} task(s)" in shown and str(folder) in shown


@pytest.mark.parametrize("dataset", ["seq-mnist", "seq-fmnist", "perm-mnist", "rot-mnist", "mnist-360"])
def test_digits_train_the_mlp(tmp_path, dataset):
    MAKERS[dataset](tmp_path / "data")
    stop = () if dataset == "mnist-360" else ("--stop_after", 2)
    assert main(tmp_path, dataset, "--debug_mode", 1, *stop) == 0
    summary = json.loads((run_folder(tmp_path) / "summary.json").read_text())
    setting = {"mnist-360": "general-continual", "perm-mnist": "domain-il", "rot-mnist": "domain-il"}
    assert summary["setting"] == setting.get(dataset, "class-il") and summary["status"] == "finished"
    assert set(summary["accuracy"]) >= {summary["setting"]}


def test_what_is_learned_is_what_the_files_hold(tmp_path):
    """Each made class is a pattern of its own: from files read in the wrong order nothing could be learned."""
    make_mnist(tmp_path / "data", n_train=1000, n_test=200)
    assert main(tmp_path, "seq-mnist", "--n_epochs", 3, "--lr", 0.1, "--model_config", "default", "--joint") == 0
    metrics = json.loads((run_folder(tmp_path) / "summary.json").read_text())["metrics"]
    assert metrics["class-il"]["final_average_accuracy"] > 0.9


@pytest.mark.parametrize("dataset", ABSENT)
def test_without_data_and_network_a_message_says_what_to_put_where(tmp_path, dataset, capsys):
    folder, file = ABSENT[dataset]
    start = time.monotonic()
    assert main(tmp_path, dataset) == 2
    assert time.monotonic() - start < 10
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("error:")]
    where = tmp_path / "data" / folder
    assert file in line and str(where) in line and "http" in line, line
    assert "Traceback" not in shown.err and "Accuracy" not in shown.out
    assert not list((tmp_path / "results").rglob("*.json")), "no trace of a run that never began"
    left = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert not left, f"nothing half-fetched is left: {left}"


def test_made_sets_say_what_they_are(tmp_path, capsys):
    """A set that is not the official one must not pass for it."""
    make_cifar10(tmp_path / "data")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(tmp_path, "seq-cifar10", "--debug_mode", 1, "--stop_after", 1, "--backbone", "mnistmlp") == 0
    assert "100 train and 20 test images" in (said := capsys.readouterr().err) and "not the official data set" in said
