"""Which code made a run: digests, changed code in sweeps and on resume, plugins that travel with their runs, runs that
are continued or shared."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from made import (
    make_cifar10,
    make_cifar100,
    make_eurosat,
    make_gtsrb,
    make_mnist,
    make_svhn,
    make_tinyimagenet,
)

from flatcl.datasets import _files
from flatcl.utils.arguments import resolve
from flatcl.utils.commands import report, sweep
from flatcl.utils.commands.train import main
from flatcl.utils.download import md5_of
from flatcl.utils.engine.lock import Lock
from flatcl.utils.errors import UsageError
from flatcl.utils.identity import code_of, data_of, differences, digest_of_code, meaning
from flatcl.utils.registry import DATASETS, METHODS, OPTIMIZERS, ROOT, load_plugin
from flatcl.utils.studies.engines import BUSY, FAILED, local

METHOD = '''"""ER with a scaled loss."""

from flatcl.models._method import Loss
from flatcl.models.er import ER
from flatcl.utils.registry import METHODS

SCALE = 1.0


@METHODS.register("mine")
class Mine(ER):
    def loss(self, *blocks):
        loss = super().loss(*blocks)
        return loss.mapped(lambda part: part * SCALE)
'''
SWEEP = (sys.executable, "-m", "flatcl", "sweep")
MINE = ("--model", "mine", "--dataset", "seq-synth", "--debug_mode", "--stop_after", "2", "--non_verbose")


@pytest.fixture
def plugin(tmp_path):
    file = tmp_path / "code" / "mine.py"
    file.parent.mkdir()
    file.write_text(METHOD)
    return file


@pytest.fixture(autouse=True)
def unpictured(monkeypatch):
    monkeypatch.setattr("flatcl.utils.engine.logs.Logs.finish", lambda *args, **options: [])


def start(tmp_path, *words, code=0):
    """A run's folder."""
    before = {*tmp_path.rglob("config.json")}
    assert main([*words, "--results_path", str(tmp_path / "results")]) == code
    (file,) = {*tmp_path.rglob("config.json")} - before
    return file.parent


def said(capsys, *words, code=2):
    """What a command line that is refused says: one line."""
    capsys.readouterr()
    assert main([*words]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


# digests


SAME = {
    "comment": ("SCALE = 1.0", "SCALE = 1.0  # as published"),
    "line ends": ("\n", "\r\n"),
    "docstring": ('"""ER with a scaled loss."""', '"""Another text."""'),
    "blank lines": ("SCALE", "\n\nSCALE"),
    "type hints": ("def loss(self, *blocks):", "def loss(self, *blocks: Block) -> Loss:"),
    "layout": (
        "loss.mapped(lambda part: part * SCALE)",
        "loss.mapped(\n            lambda part: part * SCALE,\n        )",
    ),
    "an import that nothing uses": (
        "from flatcl.models._method import Loss",
        "from flatcl.models._method import Block, Loss",
    ),
    "published values": (
        "class Mine(ER):\n",
        'class Mine(ER):\n    published = {("seq-mnist", 200): {"lr": (1, "")}}\n',
    ),
}
OTHER = {
    "a number": ("SCALE = 1.0", "SCALE = 2.0"),
    "a type of number": ("SCALE = 1.0", "SCALE = 1"),
    "a name": ("part * SCALE", "part / SCALE"),
    "a base": ("class Mine(ER)", "class Mine(ER, object)"),
    "an attribute": ("class Mine(ER):\n", "class Mine(ER):\n    revisits = True\n"),
}


def digest(text):
    from flatcl.utils.identity import _dump

    return _dump(meaning(text))


@pytest.mark.parametrize("change", SAME)
def test_what_changes_no_number_changes_no_digest(change):
    old, new = SAME[change]
    assert old in METHOD
    assert digest(METHOD) == digest(METHOD.replace(old, new))


@pytest.mark.parametrize("change", OTHER)
def test_what_could_change_a_number_changes_the_digest(change):
    old, new = OTHER[change]
    assert old in METHOD
    assert digest(METHOD) != digest(METHOD.replace(old, new))


def test_a_hint_and_its_import_alone_change_no_digest():
    assert digest("from a import B\ndef f(x: B): pass") == digest("def f(x): pass")
    assert digest("import a.effect\ndef f(x): pass") != digest("def f(x): pass")  # for what it does


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    from flatcl.utils.identity import _read

    files = [tmp_path / "a.py", tmp_path / "b.py"]
    files[0].write_text(METHOD, encoding="utf-8")
    files[1].write_text(METHOD, encoding="utf-8-sig")
    assert _read("x", files[0]) == _read("x", files[1])


def test_a_plugin_is_known_by_its_text_not_by_its_name():
    assert not differences({"plugin a.py": "1", "plugin b.py": "2"}, {"plugin b.py": "1", "plugin c.py": "2"})
    assert differences({"plugin a.py": "1"}, {"plugin a.py": "2"}) == ["plugin a.py"]
    assert differences({"plugin a.py": "1"}, {}) == ["plugin a.py"]


def test_what_a_plugin_imports_counts(tmp_path, plugin):
    (plugin.parent / "scale.py").write_text("SCALE = 1.0\n")
    plugin.write_text(METHOD.replace("SCALE = 1.0\n", "import flatcl.models._views\nfrom scale import SCALE\n"))
    code = resolve([*MINE, "--plugin", str(plugin)]).code
    assert {"plugin mine.py", "plugin's scale.py", "models/_views.py", "models/er.py"} <= code.keys()
    ours = ("utils/optim/", "utils/engine/policies/")
    assert not any("torch" in file or file.startswith("utils/") and not file.startswith(ours) for file in code)
    sys.modules.pop("scale")


def test_what_lies_beside_a_plugin_travels_with_it(tmp_path, plugin):
    """A run goes on where the plugin and its own module are gone."""
    (plugin.parent / "scale.py").write_text("SCALE = 1.0\n")
    plugin.write_text(METHOD.replace("SCALE = 1.0\n", "from scale import SCALE\n"))
    words = ["--debug_mode", "--stop_after", "1", "--results_path", str(tmp_path / "results"), "--non_verbose"]
    start = [sys.executable, "main.py", *MINE, "--plugin", str(plugin), *words]
    assert subprocess.run(start, cwd=ROOT, capture_output=True, timeout=120).returncode == 0
    plugin.unlink()
    (plugin.parent / "scale.py").unlink()
    (config,) = (tmp_path / "results").rglob("config.json")
    again = [sys.executable, "main.py", "--from", str(config), "--results_path", str(tmp_path / "again")]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (copy,) = (tmp_path / "again").rglob("config.json")
    assert json.loads(copy.read_text())["code"] == json.loads(config.read_text())["code"]


def test_a_module_beside_a_plugin_that_another_one_hides_is_refused(tmp_path):
    """Not silently another plugin's."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "helper.py").write_text(f"NAME = {name!r}\n")
        (tmp_path / name / f"{name}.py").write_text(f"import random\nimport helper  # {name}\n")
        (tmp_path / name / "random.py").write_text("")  # Python's own goes before, as everywhere
    try:
        load_plugin(str(tmp_path / "a/a.py"))
        with pytest.raises(UsageError, match=r"imports 'helper' and gets .*a/helper\.py, not .*b/helper\.py"):
            load_plugin(str(tmp_path / "b/b.py"))
        sys.modules.pop("helper")
        load_plugin(str(tmp_path / "a/a.py"))
    finally:
        sys.modules.pop("helper", None)


def test_the_identity_does_not_depend_on_the_path_of_the_clone(tmp_path):
    """As on a cluster, where a home folder is reached through a link."""
    (tmp_path / "link").symlink_to(ROOT)
    lines = (
        "from flatcl.utils.arguments import resolve; print(resolve(['--model', 'er', '--dataset', 'seq-synth']).code)"
    )
    found = [
        subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(folder)},
                       capture_output=True, text=True, check=True).stdout
        for folder in (ROOT, tmp_path / "link")
    ]  # fmt: skip
    assert found[0] == found[1] and "models/er.py" in found[0]


CELL = """
class Mine:
    factor = 2

    class Inner:
        names = (1, None)
        widths = [8, {"deep": 16}]

    @staticmethod
    def loss(x, scale=0.5):
        return x * scale if x in {1, 2, 3} else len

    @property
    def double(self):
        return lambda: 2 * self.factor
"""


def test_a_class_without_a_file_counts_by_what_it_was_compiled_to():
    """As in a notebook, where the text of a class cannot be found."""

    def digest(old="", new=""):
        names = {"__name__": "__main__"}
        exec(compile(CELL.replace(old, new) if old else CELL, "<cell>", "exec"), names)
        return digest_of_code(names["Mine"])

    changes = (("factor = 2", "factor = 3"), ("(1, None)", "(2, None)"), ("0.5", "0.4"), ("2, 3}", "2, 4}"),
               ("len", "sum"), ("2 * self", "3 * self"), ("Inner", "Other"), ("16", "32"), ("[8", "[9"))  # fmt: skip
    assert len({digest(), *(digest(*change) for change in changes)}) == 1 + len(changes) and digest() == digest()
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from flatcl.utils.identity import digest_of_code\n"
    code += f"exec(compile({CELL!r}, '<cell>', 'exec')); print(digest_of_code(Mine))"
    for seed in ("1", "2"):
        env = {"PATH": "", "PYTHONHASHSEED": seed}
        assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == digest()


def test_the_help_of_a_flag_does_not_count_but_its_default_does():
    flag = 'x: float = flag(0.5, "weight", low=0)'
    assert digest(flag) == digest(flag.replace("weight", "weight of the penalty"))
    assert digest(flag) != digest(flag.replace("0.5", "0.6"))
    assert digest(flag) != digest(flag.replace("low=0", "low=1"))


def test_the_files_of_a_run_are_those_of_its_classes_their_bases_and_what_these_import():
    code = code_of([METHODS.load("xder"), OPTIMIZERS.load("gsam")])
    assert {"models/xder.py", "models/_replay.py", "models/_method.py", "models/_views.py"} <= code.keys()
    assert {"utils/optim/gsam.py", "utils/optim/_sharpness.py", "utils/optim/_driver.py"} <= code.keys()
    assert (
        not {"models/sgd.py", "utils/engine/trainer.py", "utils/optim/sam.py"} & code.keys()
    )  # sgd: a word in `published`
    assert all(len(value) == 16 for value in code.values())


def test_every_pair_of_names_has_a_file_of_its_own_in_the_code():
    for registry, folder in ((METHODS, "models"), (OPTIMIZERS, "utils/optim")):
        for name in registry.names():
            assert f"{folder}/{name}.py" in code_of([registry.load(name)])


def test_an_installed_package_counts_with_what_it_imports_of_itself(tmp_path, monkeypatch):
    package = tmp_path / "flatter"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "costs.py").write_text("SCALE = 1.0\n")
    (package / "method.py").write_text(METHOD.replace("SCALE = 1.0\n", "from .costs import SCALE\n"))
    info = tmp_path / "flatter-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flatter\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[flatcl.models]\nmine = flatter.method:Mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    code = code_of([METHODS.load("mine")])
    assert {"flatter.method", "flatter.costs", "models/er.py"} <= code.keys()


# sweeps


def swept(tmp_path, plugin, *words, model="mine"):
    """A sweep in a process of its own, as a user starts it. Returns what it says."""
    argv = [*SWEEP, "--models", model, "--datasets", "seq-synth", *words]
    argv += ["--", "--debug_mode", "--stop_after", "1", "--results_path", str(tmp_path / "results")]
    argv += ["--plugin", str(plugin)] if plugin else []
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def folders(tmp_path):
    return sorted(file.parent for file in (tmp_path / "results").rglob("config.json"))


def test_a_sweep_runs_again_what_other_code_has_made(tmp_path, plugin):
    assert "1 run(s), 0 of them" in swept(tmp_path, plugin)
    assert "1 run(s), 1 of them" in swept(tmp_path, plugin)
    plugin.write_text(METHOD.replace("SCALE = 1.0", "SCALE = 3.0"))
    out = swept(tmp_path, plugin, "--keep_changed", "1")
    assert "1 run(s), 1 of them" in out and len(folders(tmp_path)) == 1
    out = swept(tmp_path, plugin)
    assert "1 run(s), 0 of them" in out and "made by other code or data (plugin mine.py changed since)" in out
    assert len(folders(tmp_path)) == 2
    assert "1 run(s), 1 of them" in swept(tmp_path, plugin)
    copies = [(folder / "plugins" / "mine.py").read_text() for folder in folders(tmp_path)]
    assert copies == [METHOD, METHOD.replace("SCALE = 1.0", "SCALE = 3.0")]


def test_a_part_of_the_official_data_is_not_taken_for_all_of_it(tmp_path, capsys):
    """Nor for another part."""
    words = ["--models", "er", "--datasets", "seq-mnist", "--buffer_sizes", "50"]
    own = ["--", "--debug_mode", "--base_path", str(tmp_path), "--results_path", str(tmp_path / "results")]

    def swept(seeds):
        done = subprocess.run([*SWEEP, *words, "--seeds", seeds, *own], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    make_mnist(tmp_path, n_train=200)
    swept("0")
    assert "1 run(s), 1 of them" in swept("0")
    make_mnist(tmp_path, n_train=300)
    out = swept("0,1")
    assert "2 run(s), 1 of them" in out and "made on data that is not the official one (data of seq-mnist)" in out
    assert report.main([str(tmp_path / "results")]) == 2
    assert "different code or data: data of seq-mnist" in capsys.readouterr().err
    assert report.main([str(tmp_path / "results"), "--by", "model,seed", "--against", "seed=0"]) == 0
    assert "they also differ in the data of seq-mnist" in capsys.readouterr().err


@pytest.mark.parametrize("now", ["another part", "official"])
@pytest.mark.filterwarnings("ignore:.*not the official data set")
def test_a_run_does_not_go_on_with_other_data(tmp_path, now, monkeypatch, capsys):
    make_mnist(tmp_path)
    words = ["--model", "er", "--dataset", "seq-mnist", "--buffer_size", "50", "--debug_mode", "--stop_after", "1"]
    folder = start(tmp_path, *words, "--base_path", str(tmp_path))

    def content(name):
        return json.loads((folder / f"{name}.json").read_text())

    first = content("benchmark")["pixels"]
    assert content("config")["code"]["data of seq-mnist"] == first
    (folder / "summary.json").write_text(json.dumps({**content("summary"), "status": "interrupted"}))
    if now == "official":
        monkeypatch.setattr(_files, "MNIST_ROWS", {"train": 100, "t10k": 50})
        md5s = {file: md5_of(tmp_path / "MNIST" / "raw" / file) for file in _files.MNIST_MD5["MNIST"]}
        monkeypatch.setattr(_files, "MNIST_MD5", {"MNIST": md5s})
        found = "official"
    else:
        make_mnist(tmp_path, seed=1)
        found = "crc32 .*"
    error = said(capsys, "--resume", str(folder))
    assert re.search(f"begun with other images of seq-mnist \\({first}\\) than there are now \\({found}\\)", error)
    assert main(["--resume", str(folder), "--keep_changed", "1"]) == 0
    (later,) = content("config")["changed_code"]
    assert later["code"].get("data of seq-mnist") == content("benchmark").get("pixels") != first


MADE = {
    "seq-mnist": make_mnist, "perm-mnist": make_mnist, "rot-mnist": make_mnist, "mnist-360": make_mnist,
    "seq-fmnist": partial(make_mnist, name="FashionMNIST"), "seq-cifar10": make_cifar10,
    "seq-cifar100": make_cifar100, "seq-tinyimg": make_tinyimagenet, "seq-svhn": make_svhn, "seq-gtsrb": make_gtsrb,
    "seq-eurosat": make_eurosat,
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
@pytest.mark.filterwarnings("ignore:.*not the official data set")
def test_each_benchmark_knows_data_that_is_not_official(name, tmp_path):
    config = resolve(["--model", "sgd", "--dataset", name, "--base_path", str(tmp_path)])
    found = []
    for seed in (0, 1):
        shutil.rmtree(tmp_path)
        MADE[name](tmp_path, seed=seed)
        benchmark = DATASETS.load(name)(config)
        assert data_of(benchmark) == {f"data of {name}": benchmark.unofficial}
        found.append(benchmark.unofficial)
    assert len({*found}) == 2 and None not in found
    benchmark = DATASETS.load("seq-synth")(resolve(["--model", "sgd", "--dataset", "seq-synth"]))
    assert data_of(benchmark) == {}


def test_a_sweep_whose_output_nobody_reads_goes_on(tmp_path):
    words = ["--models", "er", "--datasets", "seq-synth", "--seeds", "0,1"]
    own = ["--", "--debug_mode", "--stop_after", "1", "--results_path", str(tmp_path / "my results")]
    done = subprocess.run([*SWEEP, *words, *own], cwd=ROOT, preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert len([*(tmp_path / "my results").rglob("summary.json")]) == 2
    (log, _) = sorted((tmp_path / "my results" / "logs").glob("*.log"))
    assert "--results_path '" in log.read_text().splitlines()[0]  # the command can be copied


def test_an_axis_that_changes_no_number_is_refused(capsys):
    for axis, message in (
        ("device=cpu,cuda", "--device cannot change a number"),
        ("dry_run=0,1", "--grid dry_run: it"),
    ):
        words = ["--models", "er", "--datasets", "seq-synth", "--grid", axis, "--dry_run"]
        assert sweep.main(words) == 2 and message in capsys.readouterr().err
    assert sweep.main(["--models", "er", "--datasets", "seq-synth", "--grid", "device=cpu", "--dry_run"]) == 0


def finished_by(config, tmp_path, **changed):
    """A folder with a finished run of `config`, as `config.json` and `summary.json` say."""
    folder = tmp_path / "results" / "one"
    folder.mkdir(parents=True, exist_ok=True)
    content = {**config.to_json(), **changed}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    summary = {"status": "finished", "config_hash": config.hash, "metrics": {}, "model": "er", "dataset": "seq-synth"}
    (folder / "summary.json").write_text(json.dumps({**summary, "seed": 0}))


@pytest.mark.parametrize("file", ["models/er.py", "models/_method.py", "utils/optim/sgd.py", "backbone/mnistmlp.py"])
def test_an_edited_file_of_the_tree_is_other_code(file, tmp_path):
    argv = ["--model", "er", "--dataset", "seq-synth", "--results_path", str(tmp_path / "results")]
    job = sweep.Job({}, tuple(argv), resolve(argv))
    finished_by(job.config, tmp_path)
    found = sweep.look([job])
    assert found.done.keys() == {job.hash} and found.notes() == []
    finished_by(job.config, tmp_path, code={**job.config.code, file: "0" * 16})
    found = sweep.look([job])
    assert not found.done and found.changed == {job.hash: [file]}
    assert file in found.notes()[0]
    assert sweep.look([job], keep_changed=True).done.keys() == {job.hash}


def test_a_run_that_went_on_with_other_code_is_not_of_the_present_one(tmp_path):
    argv = ["--model", "er", "--dataset", "seq-synth", "--results_path", str(tmp_path / "results")]
    job = sweep.Job({}, tuple(argv), resolve(argv))
    other = {**job.config.code, "models/er.py": "0" * 16}
    finished_by(job.config, tmp_path, changed_code=[{"after_step": 3, "code": other}])
    assert sweep.look([job]).changed == {job.hash: ["models/er.py"]}


def test_a_run_that_does_not_say_its_code_counts_with_one_note(tmp_path):
    argv = ["--model", "er", "--dataset", "seq-synth", "--results_path", str(tmp_path / "results")]
    job = sweep.Job({}, tuple(argv), resolve(argv))
    finished_by(job.config, tmp_path, code=None)
    found = sweep.look([job])
    assert found.done.keys() == {job.hash} and len(found.notes()) == 1
    assert "1 of them do not say which code made them" in found.notes()[0]


def test_the_number_of_jobs_changes_no_number(tmp_path, tiny_bn):
    """With BatchNorm, sums over rows depend on the number of threads."""
    accuracy = []
    for jobs in ("1", "2"):
        swept(
            tmp_path / jobs, tiny_bn, "--seeds", "0-1", "--jobs", jobs, "--grid", "backbone=tiny-bn", model="derpp_sam"
        )
        found = [json.loads((folder / "accuracy.json").read_text()) for folder in folders(tmp_path / jobs)]
        threads = {json.loads((f / "environment.json").read_text())["threads"] for f in folders(tmp_path / jobs)}
        assert threads == {1}
        accuracy.append(sorted(json.dumps(one["accuracy"]) for one in found))
    assert accuracy[0] == accuracy[1]


def test_threads_are_part_of_the_identity():
    argv = ["--model", "er", "--dataset", "seq-synth"]
    two = resolve([*argv, "--threads", "2"]) if os.cpu_count() > 1 else None
    assert resolve(argv).threads == 1
    assert two is None or two.hash != resolve(argv).hash


# resume


@pytest.fixture
def stopped(tmp_path, plugin, monkeypatch):
    """The folder of a run of the plugin that was stopped after its first task."""
    from flatcl.utils.engine.trainer import Trainer

    with monkeypatch.context() as patch:
        train = Trainer._finish_task

        def stop(self, task):
            train(self, task)
            if len(self.progress.tasks) == 1:
                self._stop_signal = signal.SIGTERM

        patch.setattr(Trainer, "_finish_task", stop)
        return start(tmp_path, *MINE, "--plugin", str(plugin), code=128 + signal.SIGTERM)


def test_resume_with_changed_code_is_refused_and_names_the_files(stopped, capsys):
    file = stopped / "config.json"
    content = json.loads(file.read_text())
    content["code"]["models/er.py"] = "0" * 16
    file.write_text(json.dumps(content))
    error = said(capsys, "--resume", str(stopped))
    assert "was made by other code or data: models/er.py changed since" in error and "--keep_changed 1" in error
    assert main(["--resume", str(stopped), "--keep_changed", "1"]) == 0
    (later,) = json.loads(file.read_text())["changed_code"]
    assert later["after_step"] == 5 and later["code"]["models/er.py"] != "0" * 16


def test_resume_refuses_a_plugin_whose_text_has_changed(stopped, plugin, capsys):
    plugin.write_text(METHOD.replace("SCALE = 1.0", "raise SystemError('executed')"))
    for word in ("--resume", "--from"):
        error = said(capsys, word, str(stopped), "--dry_run")
        assert f"the plugin {plugin} is not the one that" in error and "executed" not in error
        assert f"--plugin {stopped}/plugins/mine.py" in error
    assert main(["--resume", str(stopped), "--plugin", str(stopped / "plugins" / "mine.py")]) == 0
    assert f"note: plugin {stopped}/plugins/mine.py, named by {stopped}/config.json" in capsys.readouterr().err


def test_a_plugin_that_has_moved_is_named_anew_or_taken_from_the_run(stopped, plugin, capsys, tmp_path):
    moved = tmp_path / "new" / "mine.py"
    moved.parent.mkdir()
    shutil.move(plugin, moved)
    assert main(["--from", str(stopped), "--plugin", str(moved), "--dry_run"]) == 0
    assert f"note: plugin {moved}" in capsys.readouterr().err
    folder = shutil.move(stopped, tmp_path / "elsewhere")
    assert main(["--resume", str(folder)]) == 0
    assert f"note: plugin {folder}/plugins/mine.py" in capsys.readouterr().err


def test_a_copy_in_the_folder_that_was_edited_is_refused(stopped, plugin, capsys):
    plugin.unlink()
    (stopped / "plugins" / "mine.py").write_text("raise SystemError('executed')")
    error = said(capsys, "--resume", str(stopped))
    assert "is not the one that" in error and "executed" not in error


def test_a_folder_cannot_name_a_copy_outside_of_it(stopped, plugin, capsys, tmp_path):
    plugin.unlink()
    (stopped / "plugins" / "mine.py").unlink()
    (tmp_path / "mine.py").write_text("raise SystemError('executed')")
    file = stopped / "config.json"
    content = json.loads(file.read_text())
    content["plugins"][0]["copy"] = "../../../../../../mine.py"
    file.write_text(json.dumps(content))
    error = said(capsys, "--resume", str(stopped), "--keep_changed", "1")
    assert "there is no such file" in error and "executed" not in error


def test_an_edited_plugin_is_loaded_anew(tmp_path, plugin):
    first = resolve([*MINE, "--plugin", str(plugin)])
    plugin.write_text(METHOD.replace("SCALE = 1.0", "SCALE = 3.0"))
    second = resolve([*MINE, "--plugin", str(plugin)])
    assert differences(first.code, second.code) == ["plugin mine.py"]
    assert sys.modules[METHODS.load("mine").__module__].SCALE == 3.0


@pytest.mark.parametrize("words", [("--keep_changed", "1"), ("--resume", "x", "--keep_changed", "2")])
def test_keep_changed_where_it_has_no_sense(words, capsys):
    assert "--keep_changed" in said(capsys, "--model", "er", "--dataset", "seq-synth", *words)


def test_of_two_plugins_of_one_name_each_can_be_given_anew(tmp_path, capsys):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "p.py")
        files[-1].write_text(METHOD.replace('"mine"', f'"mine_{name}"').replace("class Mine", f"class Mine{name}"))
    words = [word for file in files for word in ("--plugin", str(file))]
    folder = start(tmp_path, "--model", "mine_a", *MINE[2:], *words)
    files[1].write_text(files[1].read_text() + "X = 1\n")
    error = said(capsys, "--from", str(folder), "--dry_run")
    (copy,) = re.findall(r"--plugin (\S+) uses the original", error)
    assert main(["--from", str(folder), "--dry_run", "--plugin", copy]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--from", "RUN", "--model_config", "default"),
            "--model_config default cannot be given with the file of a run",
        ),
        (
            ("--from", "RUN", "--dataset", "seq-cifar10", "--protocol", "online"),
            "--protocol online cannot be given with",
        ),
        (("--resume", "RUN", "--from", "RUN"), "--resume RUN and --from exclude each other"),
    ],
)
def test_flags_that_a_file_leaves_without_effect_are_refused(words, message, tmp_path, capsys):
    folder = str(start(tmp_path, "--model", "er", *MINE[2:]))
    assert message in said(capsys, *(folder if word == "RUN" else word for word in words), "--dry_run")


@pytest.mark.parametrize("text", ["import sys\nsys.exit(0)", "raise SystemExit", "import sys\nsys.exit('enough')"])
def test_a_plugin_that_ends_the_program_is_named(text, tmp_path, capsys):
    file = tmp_path / "quits.py"
    file.write_text(text)
    error = said(capsys, "--model", "er", "--dataset", "seq-synth", "--plugin", str(file))
    assert f"--plugin {file}: it ends the program while it is imported (sys.exit(" in error
    assert len(error.splitlines()) == 1


def test_a_path_that_cannot_be_one(capsys):
    for path in ("a\0b.py", "~nobody-there/x.py", "\udcff.py"):
        assert len(said(capsys, "--model", "er", "--dataset", "seq-synth", "--plugin", path).splitlines()) == 1


# --resume auto


ER = ("--model", "er", "--dataset", "seq-synth", "--debug_mode", "--non_verbose", "--resume", "auto")


def test_auto_starts_goes_on_and_is_done(tmp_path, capsys, monkeypatch):
    from flatcl.utils.engine.trainer import Trainer

    argv = [*ER, "--results_path", str(tmp_path / "results")]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_checkpoint_is_due", lambda self: setattr(self, "_stop_signal", signal.SIGTERM))
        assert main(argv) == 143
    (folder,) = folders(tmp_path)
    assert main(argv) == 0
    assert "resumed after step 2" in capsys.readouterr().out
    assert main(argv) == 0
    assert f"already finished: {folder}" in capsys.readouterr().out
    assert folders(tmp_path) == [folder]
    assert main([*argv, "--seed", "1"]) == 0  # another configuration
    assert len(folders(tmp_path)) == 2


def test_auto_does_not_go_on_with_other_code(tmp_path, capsys):
    argv = [*ER, "--results_path", str(tmp_path / "results")]
    assert main(argv) == 0
    (folder,) = folders(tmp_path)
    content = json.loads((folder / "config.json").read_text())
    content["code"]["models/er.py"] = "0" * 16
    (folder / "config.json").write_text(json.dumps(content))
    assert main(argv) == 0
    assert f"note: {folder} was made by other code or data (models/er.py changed since)" in capsys.readouterr().out
    assert len(folders(tmp_path)) == 2


def test_auto_and_sweeps_agree_on_what_is_the_same_code(tmp_path, capsys):
    argv = [*ER, "--results_path", str(tmp_path / "results")]
    assert main(argv) == 0
    (folder,) = folders(tmp_path)
    content = json.loads((folder / "config.json").read_text())
    other = {**content["code"], "models/er.py": "0" * 16}
    (folder / "config.json").write_text(json.dumps({**content, "changed_code": [{"after_step": 1, "code": other}]}))
    config = resolve(argv[:-4] + argv[-2:])
    assert not sweep.look([sweep.Job({}, (), config)]).done
    assert main(argv) == 0
    assert "it is not continued" in capsys.readouterr().out and len(folders(tmp_path)) == 2
    assert sweep.look([sweep.Job({}, (), config)]).done


def test_auto_of_a_run_that_lost_its_checkpoint_starts_anew(tmp_path, capsys):
    argv = [*ER, "--results_path", str(tmp_path / "results")]
    assert main(argv) == 0
    (folder,) = folders(tmp_path)
    shutil.rmtree(folder / "checkpoint")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    assert main(argv) == 0
    assert "note: not continued: " in capsys.readouterr().out and len(folders(tmp_path)) == 2


def test_auto_of_a_run_that_is_alive_says_try_again(tmp_path, capsys):
    argv = [*ER, "--results_path", str(tmp_path / "results")]
    assert main(argv) == 0
    (folder,) = folders(tmp_path)
    (folder / "summary.json").unlink()
    with Lock(folder / "lock", "the run"):
        assert main(argv) == BUSY
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    config = resolve(argv[:-4] + argv[-2:])
    with Lock(folder.parent / f".{config.hash}.lock", "the configuration"):  # before there is a run folder
        assert main(argv) == BUSY
    assert main(argv) == 0 and folders(tmp_path) == [folder]


def test_auto_takes_the_flags_that_change_no_number(tmp_path, monkeypatch):
    from flatcl.utils.engine.trainer import Trainer

    argv = [*ER, "--results_path", str(tmp_path / "results")]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_checkpoint_is_due", lambda self: setattr(self, "_stop_signal", signal.SIGTERM))
        assert main(argv) == 143
    (folder,) = folders(tmp_path)
    assert main([*argv, "--keep_checkpoint", "0", "--notes", "again"]) == 0
    assert folders(tmp_path) == [folder] and (folder / "model.pt").exists()


def test_auto_needs_folders(capsys):
    assert "--resume auto looks for run folders" in said(capsys, *ER, "--disable_log")


# sweeps whose parts die


@pytest.fixture
def big(tmp_path):
    """Words of a sweep whose runs take long enough to be killed."""
    argv = [*SWEEP, "--models", "er", "--datasets", "seq-digits", "--seeds", "0-1"]
    argv += ["--", "--n_epochs", "40", "--stop_after", "1", "--results_path", str(tmp_path / "results")]
    return argv


def wait_for(what, seconds=60.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_workers_end_with_their_sweep_and_the_next_one_goes_on(number, big, tmp_path):
    process = subprocess.Popen(big, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: [*tmp_path.rglob("metrics.jsonl")])
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    (file,) = (tmp_path / "results" / "logs").glob("*.lock")
    worker = json.loads(file.read_text())["pid"]
    process.send_signal(number)
    process.wait(60)
    wait_for(lambda: not is_alive(worker))
    assert json.loads((metrics.parent / "summary.json").read_text())["status"] == "interrupted"
    done = subprocess.run(big, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(folders(tmp_path)) == 2  # one of each seed: the interrupted one was continued
    logs = [file.read_text() for file in (tmp_path / "results" / "logs").glob("*.log")]
    assert sum("resumed after step" in log for log in logs) == 1


def test_two_sweeps_on_one_folder_share_the_work(big, tmp_path):
    processes = [
        subprocess.Popen(big, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outs: list[str] = []
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert out.count("er seq-digits") >= 2 and "FAILED" not in out
        outs.append(out)
    lines = [line for out in outs for line in out.splitlines() if " -> " in line]
    assert sum("by another process" not in line for line in lines) == 2
    for out in outs:
        others = out.count("by another process")
        assert not others or f"{out.count(' -> ') - others} run(s) made here, {others} by others meanwhile" in out
    assert len(folders(tmp_path)) == 2  # each run once
    assert {json.loads((f / "summary.json").read_text())["status"] for f in folders(tmp_path)} == {"finished"}


def test_a_job_that_another_process_is_at_waits_for_it(tmp_path):
    log = tmp_path / "job.log"
    with Lock(log.with_suffix(".lock"), "a job"):
        code, why = local.run_claimed([], log, "a job", lambda argv: 1 / 0)
        assert code == BUSY and why == f"is being made by another sweep (process {os.getpid()})"
        holder = json.loads(log.with_suffix(".lock").read_text())
        log.with_suffix(".lock").write_text(json.dumps({**holder, "host": "far", "place": "far away"}))
        _, why = local.run_claimed([], log, "a job", lambda argv: 1 / 0)
        said = f"is being made by another sweep (process {os.getpid()} on far). If you know that it is not alive, "
        assert why == f"{said}delete {log.with_suffix('.lock')}."
        log.with_suffix(".lock").write_text(json.dumps(holder))
    assert not log.exists()  # the other one's log is left alone


def die_when_told(argv):
    """A worker's run: a job of seed 1 is busy at first."""
    if argv[argv.index("--seed") + 1] == "1" and not Path(argv[-1]).exists():
        Path(argv[-1]).write_text(str(os.getpid()))
        return BUSY
    return 0


def test_an_idle_worker_that_dies_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "RETRY_S", 1.0)
    argv = ["--model", "er", "--dataset", "seq-synth", "--seed", "1", "--results_path", str(tmp_path)]
    ended, waited = [], []

    def on_wait(job, why):
        waited.append(why)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

    job = sweep.Job({}, tuple(argv), resolve(argv))
    extra = ["--notes", str(tmp_path / "pid")]
    local.run_all([job], 1, lambda *end: ended.append(end[1]), extra, die_when_told, on_wait)
    assert ended == [0] and len(waited) == 1


def test_a_job_that_cannot_write_its_log_says_why(tmp_path):
    (tmp_path / "logs").write_text("a file in the folder's place")
    code, why = local.run_claimed([], tmp_path / "logs" / "job.log", "a job", lambda argv: 0)
    assert code == FAILED and "its log" in why and "cannot be written" in why


def test_load_plugin_takes_the_same_text_under_another_path_as_the_same(tmp_path, plugin):
    load_plugin(str(plugin))
    before = METHODS.load("mine")
    load_plugin(str(shutil.copy(plugin, tmp_path / "copy.py")))
    assert METHODS.load("mine") is before


def test_types_of_local_names_do_not_count_and_those_of_flags_do():
    plain = "def f(x):\n    y = x + 1\n    return y\n"
    typed = "def f(x: int) -> int:\n    z: int\n    y: int = x + 1\n    return y\n"
    assert digest(plain) == digest(typed)
    assert digest("class Args:\n    a: int = flag(1)\n") != digest("class Args:\n    a: float = flag(1)\n")
