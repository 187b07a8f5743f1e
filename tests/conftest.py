"""Fixtures: runs built in memory on the synthetic benchmark, and a small network with BatchNorm as a plugin."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)

TINY_BN = '''"""A convolution with bias, BatchNorm and a linear layer."""

from torch import nn
from torch.nn.functional import relu

from flatcl.utils.registry import BACKBONES


@BACKBONES.register("tiny-bn")
class TinyBn(nn.Sequential):
    def __init__(self, shape, num_classes, args=None):
        channels, height, width = shape
        super().__init__(
            nn.Conv2d(channels, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * ((height + 1) // 2) * ((width + 1) // 2), num_classes),
        )
        self.num_features = self[-1].in_features

    @property
    def stages(self):
        conv, norm, _, flatten, classifier = self
        return [(lambda x: norm(conv(x)), relu), (lambda x: classifier(flatten(x)), nn.Identity())]

    def features(self, x):
        for layer in list(self)[:-1]:
            x = layer(x)
        return x
'''


@pytest.fixture(autouse=True)
def forget_plugins():
    """What a test adds to the registries, and folders of plugins on Python's path, end with the test."""
    path = sys.path[:]
    yield
    sys.path[:] = path
    from flatcl.utils.registry import REGISTRIES

    for registry in REGISTRIES:
        package = f"flatcl.{registry.folder.replace('/', '.')}"
        for key, obj in list(registry._objects.items()):
            if obj.__module__ != f"{package}.{key}":
                del registry._objects[key]
    for module in [name for name in sys.modules if name.startswith("flatcl_plugin_")]:
        del sys.modules[module]


@pytest.fixture(scope="session")
def tiny_bn(tmp_path_factory):
    """Path of the plugin with the backbone `tiny-bn`."""
    file = tmp_path_factory.mktemp("plugins") / "tiny_bn.py"
    file.write_text(TINY_BN)
    return str(file)


@pytest.fixture
def start(tiny_bn):
    """`start(model, flag=value, ...)` -> a trainer that writes nothing, as the command line would build it."""
    from flatcl.utils.arguments import resolve
    from flatcl.utils.engine.build import build

    def start(model, **flags):
        flags = {
            "model": model, "dataset": "seq-synth", "backbone": "tiny-bn", "device": "cpu", "threads": 1,
            "disable_log": 1, "non_verbose": 1, **flags,
        }  # fmt: skip
        config = resolve(["--plugin", tiny_bn, *(f"--{name}={value}" for name, value in flags.items())])
        return build(config, torch.device("cpu"), None)

    return start


@pytest.fixture(scope="session")
def assert_same():
    """`assert_same(a, b)`: nested containers of tensors and plain values are equal bit for bit."""

    def check(a, b, where="it"):
        assert type(a) is type(b), where
        if isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                check(a[key], b[key], f"{where}[{key!r}]")
        elif isinstance(a, list | tuple):
            assert len(a) == len(b), where
            for position, (left, right) in enumerate(zip(a, b, strict=True)):
                check(left, right, f"{where}[{position}]")
        elif isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), where
        elif isinstance(a, np.ndarray):
            assert np.array_equal(a, b), where
        else:
            assert a == b, where

    return check
