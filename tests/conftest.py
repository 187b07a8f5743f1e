"""Fixtures: runs built in memory on the synthetic benchmark, and a small network with BatchNorm as a plugin."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)

TINY_BN = (
    '"""The small network of the contracts."""\n'
    + """
from flatcl.utils.contracts._runs import TinyBn
from flatcl.utils.registry import BACKBONES

BACKBONES.register("tiny-bn")(TinyBn)
"""
)


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

    from flatcl.utils.contracts._runs import difference

    def check(a, b):
        found = difference(a, b)
        assert found is None, found

    return check
