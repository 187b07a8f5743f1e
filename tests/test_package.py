"""One importable name: from a clone, from a wheel, installed for editing; with plugins and names of their own."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import flatcl
from flatcl.__main__ import main
from flatcl.utils.registry import ROOT

CONTENT = ("flatcl", "models", "datasets", "backbone", "utils", "main.py", "pyproject.toml", "requirements.txt",
           "README.md", "LICENSE", "MANIFEST.in", "Makefile", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff",
           "mkdocs.yml", "docs", "examples")  # fmt: skip
SHORT = ["--debug_mode", "--stop_after", "1", "--non_verbose", "--threads", "1", "--device", "cpu"]

PLUGIN = '''
"""A method whose file imports modules with the names of our folders."""

import datasets
import utils

from flatcl.models.er import ER
from flatcl.utils.registry import METHODS


@METHODS.register("homonyms")
class Homonyms(ER):
    def loss(self, joint):
        assert datasets.WHOSE == "Hugging Face's" and utils.WHOSE == "a user's"
        return super().loss(joint)
'''

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "small-plugin"
version = "1.0"

[project.entry-points."flatcl.models"]
small = "small_plugin:Small"

[project.entry-points."flatcl.datasets"]
small-data = "small_plugin:SmallData"

[project.entry-points."flatcl.backbones"]
small-net = "small_plugin:SmallNet"

[project.entry-points."flatcl.optimizers"]
small_sam = "small_plugin:SmallSam"

[tool.setuptools]
py-modules = ["small_plugin"]
"""

MODULE = '''
"""Names from an installed package."""

import datasets
from torch import nn

from flatcl.datasets.seq_synth import SeqSynth
from flatcl.models import ReplayMethod
from flatcl.models.er import ER
from flatcl.utils.optim.sam import SAM

assert datasets.WHOSE == "Hugging Face's"


class Small(ER):
    """Replay from elsewhere."""


class SmallData(SeqSynth):
    """Images from elsewhere."""


class SmallSam(SAM):
    """Sharpness from elsewhere."""


class SmallNet(nn.Module):
    """A network from elsewhere."""

    def __init__(self, shape, num_classes, args=None):
        super().__init__()
        channels, height, width = shape
        self.num_features = channels * height * width
        self.classifier = nn.Linear(self.num_features, num_classes)

    def features(self, x):
        return x.flatten(1)

    def forward(self, x):
        return self.classifier(self.features(x))
'''


def done(words, **options):
    """A process that has ended well; what it has printed."""
    process = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=300, **options)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def pip(python, *words):
    done([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation", *words])


def environment(folder):
    """A new virtual environment in which the packages of this one, but not this program, can be imported."""
    done([sys.executable, "-m", "venv", "--without-pip", folder])
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (site / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What is packed, in a folder that may be written to."""
    folder = tmp_path_factory.mktemp("source")
    for name in CONTENT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def packed(source):
    """The folder of the wheel, built out of the source distribution, and of that."""
    done([sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source])
    return source / "dist"


@pytest.fixture(scope="module")
def homonyms(tmp_path_factory):
    """A folder with a package `datasets`, as Hugging Face's is called, and one with a plugin and its own `utils`."""
    folder = tmp_path_factory.mktemp("homonyms")
    (folder / "site/datasets").mkdir(parents=True)
    (folder / "site/datasets/__init__.py").write_text('WHOSE = "Hugging Face\'s"\n')
    (folder / "mine").mkdir()
    (folder / "mine/utils.py").write_text('WHOSE = "a user\'s"\n')
    (folder / "mine/plugin.py").write_text(PLUGIN)
    return folder


@pytest.fixture(scope="module")
def installed(packed, homonyms, tmp_path_factory):
    """The programs of an environment with the wheel, the package `datasets` and a plugin that has entry points."""
    folder = tmp_path_factory.mktemp("installed")
    programs = environment(folder / "venv")
    (wheel,) = packed.glob("*.whl")
    plugin = folder / "small"
    plugin.mkdir()
    (plugin / "pyproject.toml").write_text(PYPROJECT)
    (plugin / "small_plugin.py").write_text(MODULE)
    pip(programs / "python", wheel, plugin)
    site = done([programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    shutil.copytree(homonyms / "site/datasets", Path(site) / "datasets")
    return programs


def train(*words, plugin=None, **chosen):
    chosen = {"model": "er", "dataset": "seq-synth", **chosen}
    named = [word for name, value in chosen.items() for word in (f"--{name}", value)]
    return [*words, *named, *(["--plugin", plugin] if plugin else []), *SHORT]


def test_the_packed_files_are_those_of_the_repository(packed):
    (wheel,), (archive,) = packed.glob("*.whl"), packed.glob("*.tar.gz")
    assert wheel.name.startswith(f"flatcl-{flatcl.__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    parts = ("models", "datasets", "backbone", "utils")
    here = {f"flatcl/{path.relative_to(ROOT)}" for part in parts for path in (ROOT / part).rglob("*.py")}
    here |= {f"flatcl/{path.name}" for path in (ROOT / "flatcl").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == here
    assert "flatcl/utils/commands/targets.csv" in names
    assert {f"flatcl/utils/reports/page.{kind}" for kind in ("css", "html", "js")} <= names
    with tarfile.open(archive) as inside:
        names = {name.partition("/")[2] for name in inside.getnames()}
    assert {"requirements.txt", "README.md", "LICENSE", "CONTRIBUTING.md", "CITATION.cff", "mkdocs.yml"} <= names
    assert {f"docs/{path.name}" for path in (ROOT / "docs").iterdir() if path.is_file()} <= names


def test_the_package_asks_for_what_the_requirements_name(installed):
    code = "import importlib.metadata as m; print('\\n'.join(m.requires('flatcl'))); print(m.version('flatcl'))"
    *asked, version = done([installed / "python", "-c", code]).split("\n")[:-1]
    assert version == flatcl.__version__
    optional = [line for line in asked if "extra ==" in line]
    assert [line for line in asked if line not in optional] == (ROOT / "requirements.txt").read_text().split()
    extra = [line.split(";")[0].strip() for line in optional if 'extra == "docs"' in line]
    docs = (ROOT / "docs/requirements.txt").read_text().split()
    assert {Requirement(line) for line in extra} == {Requirement(line) for line in docs}
    assert [line.split(";")[0].strip() for line in optional if '"timm"' in line] == ["timm>=1.0", "safetensors>=0.4"]
    heading = "Unreleased" if "dev" in version else version
    assert f"\n## {heading}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_trains_in_another_folder(installed, tmp_path):
    out = done(train(installed / "flatcl", "train", dataset="seq-digits"), cwd=tmp_path)
    assert "Accuracy for 1 task(s)" in out
    (file,) = tmp_path.rglob("environment.json")
    assert f'"version": "{flatcl.__version__}"' in file.read_text() and '"commit": null' in file.read_text()
    again = subprocess.run([installed / "flatcl", "train", "--resume", file.parent], capture_output=True, text=True)
    assert again.returncode == 0 and "this run is finished" in again.stdout


def test_an_interrupted_run_of_the_wheel_says_how_it_goes_on(installed, tmp_path):
    plugin = tmp_path / "stopped.py"
    plugin.write_text(
        "import os, signal\nfrom flatcl.models.er import ER\nfrom flatcl.utils.registry import METHODS\n"
        "@METHODS.register('stopped')\nclass Stopped(ER):\n    def remember(self, batch, loss):\n"
        "        super().remember(batch, loss)\n        os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    words = train(installed / "flatcl", "train", model="stopped", plugin=plugin)
    process = subprocess.run([*map(str, words)], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 143
    assert re.search(r"Continue with: flatcl train --resume \S+", process.stderr)


def test_the_wheel_has_the_names_of_an_installed_plugin(installed, tmp_path):
    listed = done([installed / "flatcl", "list"], cwd=tmp_path)
    assert {"small ", "small-data ", "small-net ", "small_sam "} <= set(re.findall(r"^  (small\S* )", listed, re.M))
    chosen = {"model": "small", "dataset": "small-data", "backbone": "small-net", "optimizer": "small_sam"}
    assert "Accuracy for 1 task(s)" in done(train(installed / "flatcl", "train", **chosen), cwd=tmp_path)
    (config,) = tmp_path.rglob("config.json")
    assert '"small_plugin": ' in config.read_text()  # its code is a part of the run's identity


def test_the_wheel_checks_a_plugin(installed, homonyms, tmp_path):
    """Without the tests, and without pytest."""
    done([installed / "python", "-c", "import flatcl, importlib.util as u; assert u.find_spec('flatcl.tests') is None"])
    (tmp_path / "mine.py").write_text(
        "from flatcl.models.er import ER\nfrom flatcl.utils.registry import METHODS\n"
        "@METHODS.register('mine')\nclass Mine(ER):\n    pass\n"
    )
    lines = done([installed / "flatcl", "check", "mine.py"], cwd=tmp_path).splitlines()
    assert lines[0] == "model mine" and lines[-1] == f"{len(lines) - 2} ok, 0 failed, 0 skipped"
    assert "skip  it can be loaded: data missing" in done([installed / "flatcl", "check", "seq-mnist"], cwd=tmp_path)


def test_a_plugin_finds_packages_with_the_names_of_our_folders(installed, homonyms, tmp_path):
    """With the wheel, with main.py, and with the module in a clone."""
    beside = {**os.environ, "PYTHONPATH": str(homonyms / "site")}
    starts = [
        ([installed / "flatcl", "train"], dict(cwd=tmp_path)),
        ([sys.executable, ROOT / "main.py"], dict(cwd=tmp_path, env=beside)),
        ([sys.executable, "-m", "flatcl", "train"], dict(cwd=ROOT, env=beside)),
    ]
    for start, options in starts:
        words = train(*start, model="homonyms", plugin=homonyms / "mine/plugin.py", results_path=tmp_path / "results")
        assert "Accuracy for 1 task(s)" in done(words, **options)


@pytest.mark.parametrize("start", ["wheel", "clone"])
def test_a_plugin_that_imports_the_old_way_gets_one_line(start, installed, tmp_path):
    plugin = tmp_path / "old.py"
    plugin.write_text("from models._method import Method\n")
    words = [installed / "flatcl", "train"] if start == "wheel" else [sys.executable, ROOT / "main.py"]
    process = subprocess.run([*map(str, train(*words, plugin=plugin))], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr == (
        f"error: --plugin {plugin}: it does not import: No module named 'models' (in this package it is "
        "flatcl.models). "
        "Correct the file and try again.\n"
    )


def test_in_a_clone_the_parts_have_one_name(tmp_path):
    """Not a second one, wherever Python is started and whatever is on its path."""
    code = textwrap.dedent("""
        import importlib.util, pkgutil, sys
        import flatcl
        import flatcl.utils.engine.run
        for name in ("models", "datasets", "backbone", "utils", "flatcl.tests", "flatcl.main", "flatcl.flatcl"):
            assert importlib.util.find_spec(name) is None, name
        importlib.invalidate_caches()
        assert importlib.util.find_spec("models") is None and importlib.util.find_spec("flatcl.backbone")
        assert {module.name for module in pkgutil.iter_modules(flatcl.__path__)} >= {"models", "utils", "__main__"}
        files = [str(getattr(module, "__file__", None)) for module in sys.modules.values()]
        ours = [file for file in files if file.startswith(sys.argv[1]) and "site-packages" not in file]
        assert len(ours) == len(set(ours)) > 20
    """)
    for folder in (ROOT, tmp_path, ROOT / "tests"):
        done([sys.executable, "-c", code, ROOT], cwd=folder, env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"})


def test_an_editable_installation_is_the_clone(source, tmp_path):
    programs = environment(tmp_path / "venv")
    pip(programs / "python", "--editable", source)
    assert "Accuracy for 1 task(s)" in done(train(programs / "flatcl", "train"), cwd=tmp_path)
    code = "import flatcl.models.er as er; print(er.__file__)"
    assert Path(done([programs / "python", "-c", code], cwd=tmp_path).strip()) == source / "models/er.py"


# the command


def test_the_command_names_the_nearest(capsys):
    assert main(["trian", "--model", "er"]) == 2
    assert capsys.readouterr().err == "error: there is no command 'trian'. Did you mean train?\n"


def test_the_command_without_its_first_word_says_which(capsys):
    assert main(["--model", "er"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the first word must be a command, got '--model'") and "flatcl train --model er" in err


@pytest.mark.parametrize("command", sorted(path.stem for path in (ROOT / "utils/commands").glob("[a-z]*.py")))
def test_each_command_answers_help_and_refuses_what_it_does_not_know(command, capsys):
    try:
        code = main([command, "--help"])
    except SystemExit as end:  # argparse's
        code = end.code
    assert code == 0 and "usage: " in capsys.readouterr().out
    pair = ["--model", "er", "--dataset", "seq-synth"] if command == "train" else []
    assert main([command, *pair, "--no_such_flag", "1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: unknown flag: --no_such_flag. ") and err.count("\n") == 1


def test_the_command_lists_the_commands(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  train +Train a method on a benchmark", out, re.MULTILINE)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flatcl {flatcl.__version__}\n"
