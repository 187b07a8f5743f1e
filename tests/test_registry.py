"""Names and files; plugins, installed packages, and what is said when something is wrong with them."""

import dataclasses
import itertools
import json
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flatcl.utils import declared
from flatcl.utils.arguments import SELECTORS, args_of, resolve, schema
from flatcl.utils.commands.train import main
from flatcl.utils.engine.build import build
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import BACKBONES, DATASETS, METHODS, OPTIMIZERS, ROOT, Registry, load_plugin

REGISTRIES = {"model": METHODS, "dataset": DATASETS, "backbone": BACKBONES, "optimizer": OPTIMIZERS}
EVERY_NAME = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry.names()]


def files_of(registry):
    return sorted(p for p in (ROOT / registry.folder).glob("*.py") if not p.name.startswith("_"))


def python(code, *argv):
    """What a fresh interpreter prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def command(*argv):
    return subprocess.run(
        [sys.executable, "main.py", *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def problems_of(*argv):
    with pytest.raises(UsageError) as caught:
        resolve([str(word) for word in argv])
    return caught.value.problems


def test_names_are_file_names_and_listing_imports_nothing():
    result = python(
        """
import json, sys
from flatcl.utils import registry
kinds = [registry.METHODS, registry.DATASETS, registry.BACKBONES, registry.OPTIMIZERS]
names = [kind.choices() for kind in kinds]
summaries = [[kind.summary(name) for name in kind.choices()] for kind in kinds]
heavy = {"torch", "kornia", "numpy", "torchvision", "timm", "tensorboard", "matplotlib"}
parts = ("flatcl.models", "flatcl.datasets", "flatcl.backbone", "flatcl.utils.optim", "flatcl.utils.engine")
package = [m for m in sys.modules if m.startswith(parts) or m.split(".")[0] in heavy]
print(json.dumps([names, summaries, package]))
"""
    )
    names, summaries, imported = result
    assert imported == []
    for registry, written, lines in zip(REGISTRIES.values(), names, summaries, strict=True):
        stems = [path.stem.replace("_", registry.separator) for path in files_of(registry)]
        stems = [f"{stem}:NAME" if stem in ("timm", "torchvision") else stem for stem in stems]
        assert written == sorted(stems) and len(written) > 1
        for name, line in zip(written, lines, strict=True):
            file = ROOT / registry.folder / f"{name.removesuffix(':NAME').replace('-', '_')}.py"
            assert line and file.read_text().startswith(f'"""{line}')


@pytest.mark.parametrize("kind, name", EVERY_NAME)
def test_each_file_registers_its_own_name(kind, name):
    registry = REGISTRIES[kind]
    obj = registry.load(name)
    stem = name.replace("-", "_")
    assert obj.name == name and obj.__module__ == f"flatcl.{registry.folder.replace('/', '.')}.{stem}"
    for spelling in (stem, stem.replace("_", "-"), name.upper(), f" {name} "):
        assert registry.load(spelling) is obj
        assert registry.summary(spelling) == registry.summary(name) != ""


@pytest.mark.parametrize("kind, name", EVERY_NAME)
def test_what_a_file_declares_is_what_its_class_has(kind, name, monkeypatch):
    registry = REGISTRIES[kind]
    cls = registry.load(name)
    names = {field.name for field in dataclasses.fields(cls.Args)} if args_of(cls) else set()
    monkeypatch.setattr(registry, "load", lambda name: pytest.fail("its file is not understood"))
    assert declared.flags(registry, name) == names
    for constant in (
        "default_backbone",
        "default_optimizer",
        "setting",
        "shape",
        "needs_features",
        "rows_are_independent",
    ):
        assert declared.attribute(registry, name, constant) == getattr(cls, constant, None), constant


@pytest.mark.parametrize(
    "text, ours",
    [
        ("from x import Base\n@METHODS.register('made')\nclass Made(Base):\n    pass", False),  # of elsewhere
        ("@METHODS.register('made')\nclass Made:\n    Args = make_dataclass('Args', FLAGS)", False),
        ("@METHODS.register('made')\nclass Made:\n    for name in FLAGS:\n        pass", False),
        ("class Made:\n    pass\nMETHODS.register('made')(Made)", False),
        ("@METHODS.register('made')\nclass Made(", False),
        ("@METHODS.register('made')\nclass Made:\n    class Args:\n        size: int = flag(1, '')", True),
        (
            "import torch.nn as nn\nfrom flatcl.models import ReplayMethod as R\nclass A(nn.Module):\n    pass\n"
            "@METHODS.register('made')\nclass Made(R, A):\n    class Args(R.Args):\n        beta: float = flag(1, '')",
            True,
        ),
    ],
)
def test_a_file_that_is_not_understood_is_loaded(text, ours, tmp_path):
    (tmp_path / "made.py").write_text(text)
    loaded = SimpleNamespace(Args=make_dataclass("Args", [("loaded", int, 1)]))
    registry = SimpleNamespace(file=lambda name: tmp_path / "made.py", load=lambda name: loaded)
    found = declared.flags(registry, "made")
    assert (
        found == {"loaded"}
        if not ours
        else found in ({"size"}, {"buffer_size", "minibatch_size", "buffer_policy", "beta"})
    )


def test_importing_a_name_imports_no_other_file():
    """Of the methods, only what `mgser_sam` itself builds on."""
    imported = python(
        """
import json, sys
from flatcl.utils.registry import METHODS
METHODS.load("mgser-sam")
print(json.dumps([m for m in sys.modules if m.startswith(("flatcl.models.", "flatcl.datasets.", "flatcl.backbone."))]))
"""
    )
    others = {f"flatcl.models.{name}" for name in ("er", "joint", "er_sam")}
    assert "flatcl.models.mgser_sam" in imported and not others & set(imported)
    assert not [m for m in imported if m.startswith(("flatcl.datasets.", "flatcl.backbone."))]


@pytest.mark.parametrize(
    "kind, wrong, near",
    [
        ("model", "mgser-sem", "mgser_sam"),
        ("model", "DERP", "derpp"),
        ("dataset", "seq_cifar_10", "seq-cifar10"),
        ("backbone", "resnet81", "resnet18"),
        ("optimizer", "amsa", "asam"),
    ],
)
def test_unknown_names_give_near_ones(kind, wrong, near):
    with pytest.raises(UsageError, match=f"unknown {kind}") as caught:
        REGISTRIES[kind].load(wrong)
    assert near in str(caught.value) and "Did you mean" in str(caught.value)
    flags = {"model": "er", "dataset": "seq-synth", kind: wrong}
    problems = problems_of(*(word for name, value in flags.items() for word in (f"--{name}", value)))
    assert any(near in line for line in problems)


def test_a_name_like_no_other_gives_all_of_them():
    with pytest.raises(UsageError) as caught:
        OPTIMIZERS.load("zzzzzz")
    assert all(name in str(caught.value) for name in OPTIMIZERS.names())


def test_machinery_and_paths_are_not_names():
    for name in ("_method", "_replay", "../utils/console", "er.py", ""):
        with pytest.raises(UsageError):
            METHODS.load(name)


PLUGIN = '''"""Four names of our own."""

from dataclasses import dataclass

import torch
from torch import nn

from flatcl.datasets._benchmark import Benchmark
from flatcl.models._method import Loss, Method
from flatcl.utils.arguments import flag
from flatcl.utils.optim._sharpness import SharpnessAware
from flatcl.utils.registry import BACKBONES, DATASETS, METHODS, OPTIMIZERS


@METHODS.register("my_method")
class MyMethod(Method):
    """A method of ours."""

    @dataclass(frozen=True)
    class Args:
        my_weight: float = flag(1.0, "weight of the loss", low=0)

    default_optimizer = "my_optimizer"

    def loss(self, stream):
        logits = self.net(stream.x)
        rows = nn.functional.cross_entropy(logits, stream.y, reduction="none")
        return Loss({"current": self.args.my_weight * rows}, logits)


@OPTIMIZERS.register("my_optimizer")
class MyOptimizer(SharpnessAware):
    def direction(self, objective):
        return [part.sign() for part in objective.gradient()]


@BACKBONES.register("my-net")
class MyNet(nn.Sequential):
    def __init__(self, shape, num_classes, args=None):
        super().__init__(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], num_classes))


@DATASETS.register("my-data")
class MyData(Benchmark):
    num_classes, shape, default_backbone = 4, (1, 2, 2), "my-net"
    defaults = dict(n_tasks=2, batch_size=4, lr=0.01)

    def load(self, root):
        y = torch.arange(4).repeat(8)
        x = torch.zeros(32, 4, dtype=torch.uint8)
        x[torch.arange(32), y] = 255
        return (x.view(32, 1, 2, 2), y), (x.view(32, 1, 2, 2), y)
'''


@pytest.fixture
def plugin(tmp_path):
    file = tmp_path / "ours.py"
    file.write_text(PLUGIN)
    return file


def test_a_plugin_adds_names_of_all_four_kinds_and_they_run(plugin, capsys):
    argv = ["--plugin", str(plugin), "--model", "my-method", "--dataset", "my_data", "--disable_log", "--device=cpu"]
    config = resolve([*argv, "--my_weight", "2"])
    assert (config.model, config.dataset) == ("my_method", "my-data")
    assert (config.backbone, config.optimizer) == ("my-net", "my_optimizer")
    assert config.my_weight == 2.0 and config.origins["my_weight"] == "argv"
    assert [loaded.path for loaded in config.plugins] == [str(plugin)]
    for registry, name in ((METHODS, "my_method"), (DATASETS, "my-data"), (BACKBONES, "my-net")):
        assert name in registry.names()
    assert METHODS.summary("my_method") == "A method of ours."
    assert main(argv) == 0
    assert "Accuracy for 2 task(s)" in capsys.readouterr().out
    trainer = build(config, torch.device("cpu"), None)
    assert trainer.run()["cost"]["steps"] == 8
    assert any("my_weight" in line for line in problems_of(*argv, "--my_wait", "2"))


def test_plugin_names_mix_with_the_built_in_ones(plugin):
    pairs = [("mgser_sam", "my-data", "my_optimizer"), ("my_method", "seq-synth", "sam"), ("er", "my-data", "asam")]
    for model, dataset, optimizer in pairs:
        config = resolve(
            ["--plugin", str(plugin), "--model", model, "--dataset", dataset, "--optimizer", optimizer]
            + ["--disable_log", "--non_verbose", "--debug_mode", "--stop_after=2", "--n_tasks=2"]
        )
        summary = build(config, torch.device("cpu"), None).run()
        assert summary["status"] == "finished" and summary["optimizer"] == optimizer


def test_a_broken_file_of_a_folder_costs_only_itself(tmp_path):
    """As a method that is being written, or the lock that Emacs leaves beside it."""
    from flatcl.utils import registry

    (tmp_path / "mine.py").write_text("class Mine(:\n")
    (tmp_path / ".#er.py").symlink_to("nowhere")
    (tmp_path / "_base.py").write_text("")
    assert set(registry._listed(str(tmp_path), 0)) == {"mine"}
    assert registry.summary_of(tmp_path / "mine.py") == "" == registry.summary_of(tmp_path / ".#er.py")


def test_a_plugin_is_named_twice_or_by_another_path_without_harm(plugin, tmp_path):
    load_plugin(str(plugin))
    first = METHODS.load("my_method")
    (tmp_path / "link.py").symlink_to(plugin)
    load_plugin(str(tmp_path / "link.py"))
    load_plugin(str(plugin.parent / "." / plugin.name))
    assert METHODS.load("my_method") is first


def test_a_plugin_that_raises_is_named_with_its_reason(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("print('loading')\nraise RuntimeError('no luck today')\n")
    argv = ("--plugin", file, "--model", "er", "--dataset", "seq-synth")
    for _ in range(2):  # it fails again, rather than be taken for loaded
        (problem,) = problems_of(*argv)
        assert str(file) in problem and "RuntimeError" in problem and "no luck today" in problem
    file.write_text("x = (\n")
    (problem,) = problems_of(*argv)
    assert "SyntaxError" in problem
    file.write_text("")  # corrected
    assert resolve([str(word) for word in argv]).model == "er"


def test_a_plugin_that_raises_half_way_leaves_no_name_behind(tmp_path):
    file = tmp_path / "half.py"
    file.write_text(
        "from flatcl.models._method import Method\nfrom flatcl.utils.registry import METHODS\n\n\n"
        "@METHODS.register('half_done')\nclass Half(Method):\n    pass\n\n\nraise ValueError('half')\n"
    )
    with pytest.raises(UsageError):
        load_plugin(str(file))
    assert "half_done" not in METHODS.names()


def test_a_missing_plugin_and_one_that_is_not_python(tmp_path):
    (problem,) = problems_of("--plugin", tmp_path / "none.py", "--model", "er", "--dataset", "seq-synth")
    assert "none.py" in problem and "no such file" in problem
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    (problem,) = problems_of("--plugin", text, "--model", "er", "--dataset", "seq-synth")
    assert "notes.txt" in problem and ".py" in problem


def test_bad_plugins_end_the_command_with_2_and_no_traceback(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("1 / 0\n")
    done = command("--plugin", file, "--list")
    assert done.returncode == 2 and "ZeroDivisionError" in done.stderr and "Traceback" not in done.stderr


TAKEN = """
from flatcl.models._method import Method
from flatcl.utils.registry import METHODS


@METHODS.register("er")
class Usurper(Method):
    pass
"""


def test_two_plugins_with_one_name(tmp_path):
    for stem in ("one", "two"):
        (tmp_path / f"{stem}.py").write_text(f"# {stem}\n" + TAKEN.replace('"er"', '"mine"'))
    load_plugin(str(tmp_path / "one.py"))
    with pytest.raises(UsageError, match="registered twice") as caught:
        load_plugin(str(tmp_path / "two.py"))
    assert "mine" in str(caught.value)
    assert "one" in METHODS.load("mine").__module__


def test_a_plugin_cannot_take_the_name_of_a_file(tmp_path):
    """Whether or not the file has been imported yet: who types `er` gets `er`, or an error."""
    file = tmp_path / "usurper.py"
    file.write_text(TAKEN)
    METHODS.load("er")
    with pytest.raises(UsageError, match="'er'"):
        load_plugin(str(file))
    assert METHODS.load("er").__module__ == "flatcl.models.er"
    code = """
import json, sys
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import METHODS, load_plugin
try:
    load_plugin(sys.argv[1])
    said = None
except UsageError as error:
    said = str(error)
print(json.dumps([said, METHODS.load("er").__module__]))
"""
    said, module = python(code, file)
    assert said is not None and "'er'" in said
    assert module == "flatcl.models.er"


def test_a_file_that_does_not_register_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "things"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "alpha.py").write_text('"""Forgot to register."""\n')
    monkeypatch.setattr("flatcl.utils.registry.ROOT", tmp_path)
    monkeypatch.setattr("flatcl.__path__", [str(tmp_path)])
    things = Registry("thing", "things", "flatcl.things")
    assert things.names() == ["alpha"] and things.summary("alpha") == "Forgot to register."
    with pytest.raises(UsageError, match=r"things/alpha\.py does not register"):
        things.load("alpha")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installed package with entry points for all four kinds, one of which does not import."""
    site = tmp_path / "site"
    info = site / "foreign_continual-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-continual\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[flatcl.models]\nforeign-method = foreign_continual:Foreign\nruined = foreign_ruin:Nothing\n"
        "[flatcl.datasets]\nmy-data = foreign_plugin:MyData\n"
        "[flatcl.backbones]\nmy-net = foreign_plugin:MyNet\n"
        "[flatcl.optimizers]\nmy_optimizer = foreign_plugin:MyOptimizer\n"
    )
    (site / "foreign_continual.py").write_text(
        '"""Not registered by a decorator."""\n\nfrom flatcl.models.sgd import SGD\n\n\n'
        'class Foreign(SGD):\n    """Fine-tuning from elsewhere."""\n'
    )
    (site / "foreign_plugin.py").write_text(PLUGIN)
    (site / "foreign_ruin.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.syspath_prepend(site)
    yield
    for module in ("foreign_continual", "foreign_plugin", "foreign_ruin"):
        sys.modules.pop(module, None)


def test_installed_packages_add_names(installed):
    assert {"foreign_method", "ruined"} <= set(METHODS.names()) and "my-data" in DATASETS.names()
    assert "foreign_continual" not in sys.modules  # listing imports nothing
    assert METHODS.load("foreign-method").name == "foreign_method"
    assert METHODS.summary("foreign_method") == "Fine-tuning from elsewhere."
    config = resolve(
        ["--model=foreign_method", "--dataset=my-data", "--backbone=my_net", "--optimizer=my_optimizer"]
        + ["--disable_log", "--non_verbose"]
    )
    summary = build(config, torch.device("cpu"), None).run()
    assert summary["model"] == "foreign_method" and summary["dataset"] == "my-data"
    assert METHODS.load("sgd").name == "sgd"  # the class that it was made from keeps its name


def test_an_installed_package_that_does_not_import_is_named(installed):
    (problem, *_) = problems_of("--model", "ruined", "--dataset", "seq-synth")
    assert "foreign_ruin" in problem and "a_module_that_nobody_has" in problem
    assert METHODS.load("er").name == "er"  # the others go on


def test_flags_of_every_combination_are_disjoint():
    loaded = {kind: [registry.load(name) for name in registry.names()] for kind, registry in SELECTORS.items()}
    count = 0
    for combination in itertools.product(*loaded.values()):
        flags = schema(dict(zip(SELECTORS, combination, strict=True)))
        assert all(flag.help for flag in flags.values())
        count += 1
    assert count == len(loaded["model"]) * len(loaded["dataset"]) * len(loaded["backbone"]) * len(loaded["optimizer"])


def test_a_flag_of_two_owners_is_refused(tmp_path):
    file = tmp_path / "clash.py"
    file.write_text(PLUGIN.replace("my_weight", "rho").replace('default_optimizer = "my_optimizer"', ""))
    load_plugin(str(file))
    (problem,) = problems_of("--model", "my_method", "--dataset", "seq-synth", "--optimizer", "sam")
    assert "--rho" in problem and "my_method" in problem and "sam" in problem
    assert resolve(["--model", "my_method", "--dataset", "seq-synth", "--optimizer", "sgd"]).rho == 1.0


def test_files_of_the_registries_are_where_the_names_point():
    assert {kind: Path(registry.folder).parts[0] for kind, registry in REGISTRIES.items()} == {
        "model": "models", "dataset": "datasets", "backbone": "backbone", "optimizer": "utils",
    }  # fmt: skip
    assert REGISTRIES == SELECTORS
