"""The mission's benchmarks on the real files of CIFAR-10, CIFAR-100 and Tiny-ImageNet, where they are.

They are looked for in $FLATCL_DATA; CIFAR-10 also in `../shared/data`, packed. Without them these tests are skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flatcl.datasets._files import missing_cifar, missing_tinyimagenet
from flatcl.utils.arguments import resolve
from flatcl.utils.engine.build import build
from flatcl.utils.registry import DATASETS

SHARED = Path(__file__).parents[2] / "shared" / "data"
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*(in another order|not the official data set)")


def found(missing, what):
    folder = os.environ.get("FLATCL_DATA")
    if folder and missing(Path(folder)) is None:
        return folder
    pytest.skip(f"the real files of {what} are not on this machine: set FLATCL_DATA")


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    if not (SHARED / "cifar10").is_dir():
        return found(lambda root: missing_cifar(root, "cifar10"), "CIFAR-10")
    root = tmp_path_factory.mktemp("real")
    subprocess.run([sys.executable, SHARED / "unpack.py", "cifar10", root], check=True, capture_output=True)
    return str(root)


@pytest.fixture(scope="module")
def cifar100():
    return found(lambda root: missing_cifar(root, "cifar100"), "CIFAR-100")


@pytest.fixture(scope="module")
def tinyimg():
    return found(missing_tinyimagenet, "Tiny-ImageNet")


def benchmark(dataset, root, *argv):
    config = resolve(["--model", "sgd", "--dataset", dataset, "--base_path", str(root), *argv])
    return DATASETS.load(dataset)(config)


def statistics(images):
    """Mean and standard deviation of each channel, in 0..1."""
    pixels = images.double().div_(255).transpose(0, 1).flatten(1)
    return pixels.mean(1).tolist(), pixels.std(1).tolist()


def test_cifar10_has_the_published_sizes_and_statistics(cifar10):
    own = benchmark("seq-cifar10", cifar10)
    assert [(len(task.train), len(task.test)) for task in own] == [(10000, 2000)] * 5
    mean, std = statistics(own._train.images)
    assert mean == pytest.approx(own.mean, abs=1e-4) and std == pytest.approx(own.std, abs=1e-4)
    assert own._train.labels[:5].tolist() == [6, 9, 9, 4, 1]  # frog, truck, truck, deer, automobile


def test_cifar100_has_the_published_sizes_and_statistics(cifar100):
    own = benchmark("seq-cifar100", cifar100)
    assert [(len(task.train), len(task.test)) for task in own] == [(5000, 1000)] * 10
    mean, std = statistics(own._train.images)
    assert mean == pytest.approx(own.mean, abs=1e-3) and std == pytest.approx(own.std, abs=1e-3)


def test_tinyimg_has_a_validation_split_of_fifty_images_a_class(tinyimg):
    own = benchmark("seq-tinyimg", tinyimg)
    assert [len(task.test) for task in own] == [1000] * 10 and len({len(task.train) for task in own}) == 1
    mean, std = statistics(own._train.images[::7])
    assert mean == pytest.approx(own.mean, abs=5e-3) and std == pytest.approx(own.std, abs=5e-3)
    assert (own[3].test.labels.bincount()[60:80] == 50).all()


def test_the_online_protocol_trains_on_real_images(cifar10):
    argv = ["--model", "mgser_sam", "--dataset", "seq-cifar10", "--protocol", "online", "--base_path", cifar10]
    argv += ["--validation", "--stop_after", "2", "--eval_tasks", "seen", "--debug_mode", "--disable_log"]
    trainer = build(resolve(argv), CPU, None)
    trainer.run()
    assert trainer.cost.steps == 10 and type(trainer.method.net).__name__ == "ReducedResNet18"
    assert len(trainer.method.buffer) == 100 and trainer.method.buffer.all()["x"].dtype == torch.uint8
