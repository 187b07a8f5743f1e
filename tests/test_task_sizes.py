"""Tasks of unequal sizes by --classes_per_task: what it decides, what it refuses, and methods that depend on it."""

import json
import signal
from pathlib import Path

import pytest
import torch
from made import declared

from flatcl.utils.arguments import resolve
from flatcl.utils.commands import report, sweep
from flatcl.utils.commands.train import main
from flatcl.utils.engine import checkpoint
from flatcl.utils.engine.logs import Logs
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import DATASETS, METHODS

FAST = ("--dataset", "seq-synth", "--non_verbose", "--buffer_size", "40")
BY_TASK = ("bic", "er", "icarl", "lucir", "lwf", "lwf_mc", "pnn", "xder")  # these read the sizes of tasks


@pytest.fixture(autouse=True)
def unpictured(monkeypatch):
    monkeypatch.setattr("flatcl.utils.engine.logs.Logs.finish", lambda *args, **options: [])


def configure(*words, dataset="seq-digits"):
    return resolve(["--model", "er", "--dataset", dataset, *map(str, words)])


def refused(*words, dataset="seq-digits"):
    with pytest.raises(UsageError) as caught:
        configure(*words, dataset=dataset)
    (problem,) = caught.value.problems
    return problem


def run(folder, *words, code=0):
    """A run's folder."""
    before = {*folder.rglob("config.json")}
    assert main([*words, "--results_path", str(folder)]) == code
    (file,) = {*folder.rglob("config.json")} - before
    return file.parent


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_each_task_has_as_many_classes_as_was_said():
    config = configure("--classes_per_task", "5,1,4", "--permute_classes")
    benchmark = config.benchmark(config)
    assert (config.n_tasks, config.origins["n_tasks"]) == (3, "--classes_per_task")
    assert [task.classes for task in benchmark] == [range(5), range(5, 6), range(6, 10)]
    for task in benchmark:
        for split in (task.train, task.test):
            assert split.labels.unique().tolist() == list(task.classes)
    assert torch.equal(torch.cat([task.train.ids for task in benchmark]).sort().values, benchmark._train.ids)
    order = benchmark.class_order()
    assert [task["classes"] for task in benchmark.decided()["tasks"]] == [order[:5], order[5:6], order[6:]]
    assert [task["train_rows"] for task in benchmark.decided()["tasks"]] == [len(task.train) for task in benchmark]


def test_equal_sizes_are_the_tasks_of_n_tasks():
    plain, sized = configure(), configure("--classes_per_task", "2,2,2,2,2")
    for task, other in zip(plain.benchmark(plain), sized.benchmark(sized), strict=True):
        assert task.classes == other.classes and torch.equal(task.train.ids, other.train.ids)
    assert configure("--classes_per_task", "2,3,5", "--n_tasks", 3).hash == configure("--classes_per_task=2,3,5").hash
    assert len({plain.hash, configure("--classes_per_task", "2,3,5").hash, configure("--n_tasks", 2).hash}) == 3


def test_the_upper_of_two_layers_decides_the_tasks(tmp_path):
    @DATASETS.register("sized")
    class Sized(DATASETS.load("seq-synth")):
        defaults = DATASETS.load("seq-synth").defaults | dict(classes_per_task=(4, 6))

    del Sized.defaults["n_tasks"]
    sized = configure(dataset="sized")
    assert (sized.n_tasks, sized.classes_per_task) == (2, (4, 6))
    agreed = configure("--n_tasks", 2, dataset="sized")
    assert (agreed.n_tasks, agreed.classes_per_task) == (2, (4, 6)) and agreed.hash == sized.hash
    equal = configure("--n_tasks", 5, dataset="sized")
    assert (equal.n_tasks, equal.classes_per_task, equal.origins["classes_per_task"]) == (5, (), "--n_tasks")
    first = str(run(tmp_path, "--model", "er", *FAST, "--debug_mode", "--classes_per_task", "3,3,4"))
    again = resolve(["--from", first])
    assert (again.n_tasks, again.classes_per_task) == (3, (3, 3, 4)) and again.hash == read(Path(first), "config")[
        "config_hash"
    ]
    other = resolve(["--from", first, "--classes_per_task", "9,1"])
    assert (other.n_tasks, other.classes_per_task) == (2, (9, 1))
    equal = resolve(["--from", first, "--n_tasks", "2"])
    assert (equal.n_tasks, equal.classes_per_task) == (2, ())


def test_sizes_that_cannot_be_are_refused():
    problem = refused("--classes_per_task", "2,3,4")
    assert "10 classes of seq-digits" in problem and "got 9 (2 + 3 + 4)" in problem
    problem = refused("--classes_per_task", "2,3,5", "--n_tasks", 4)
    assert problem.startswith("--n_tasks 4 does not match --classes_per_task 2,3,5, which are 3 tasks.")
    assert "must be at least 1, got 0" in refused("--classes_per_task", "10,0")
    assert "expects a whole number, got '2.5'" in refused("--classes_per_task", "2.5")
    assert "--classes_per_task" in refused("--n_tasks", 3), "that there is a way"


@pytest.mark.parametrize("name", declared())
def test_benchmarks_whose_tasks_are_not_cut_by_classes_refuse_sizes(name):
    cls = DATASETS.load(name)
    if cls.setting != "class-il":
        problem = refused("--classes_per_task", "5,5", dataset=name)
        assert problem.startswith("--classes_per_task has no effect on") and name in problem


def test_benchmarks_with_sizes_of_their_own_refuse_others():
    @DATASETS.register("sizes")
    class Sizes(DATASETS.load("seq-synth")):
        task_sizes = (4, 6)

    @DATASETS.register("ranges")
    class Ranges(DATASETS.load("seq-synth")):
        def classes_of(self, index):
            return super().classes_of(index)

    for name in ("sizes", "ranges"):
        assert f"no effect on {name}" in refused("--classes_per_task", "6,4", dataset=name)
    assert configure(dataset="sizes").n_tasks == 2


def test_a_benchmark_without_a_number_of_tasks_says_how_to_give_it():
    @DATASETS.register("open")
    class Open(DATASETS.load("seq-synth")):
        defaults = {name: value for name, value in DATASETS.load("seq-synth").defaults.items() if name != "n_tasks"}

    assert refused(dataset="open").startswith(
        "open does not say into how many tasks its 10 classes are split. Give --classes_per_task or --n_tasks"
    )
    assert configure("--classes_per_task", "1,9", dataset="open").n_tasks == 2


@pytest.mark.parametrize("dataset", ["seq-digits", "seq-synth"])
@pytest.mark.parametrize("model", BY_TASK)
def test_methods_learn_tasks_of_unequal_sizes(model, dataset, start):
    flags = dict(buffer_size=40) if hasattr(METHODS.load(model).Args, "buffer_size") else {}
    trainer = start(model, dataset=dataset, classes_per_task="3,1,4,2", n_epochs=1, debug_mode=1, **flags)
    summary = trainer.run()
    assert len(summary["accuracy"]["task-il"]) == 4
    assert all(0 <= value <= 1 for row in summary["accuracy"]["task-il"] for value in row)


def test_icarl_learns_unequal_tasks_not_only_runs_them(start):
    trainer = start("icarl", dataset="seq-digits", classes_per_task="5,2,3", n_epochs=5, buffer_size=200)
    assert trainer.run()["metrics"]["class-il"]["final_average_accuracy"] > 0.5  # by chance: 0.1


@pytest.mark.parametrize("model", ["bic", "er", "icarl", "lucir", "xder"])
def test_a_resumed_run_of_unequal_tasks_is_the_whole_one(model, tmp_path, monkeypatch, assert_same):
    words = ("--model", model, *FAST, "--classes_per_task", "2,5,3")
    whole = run(tmp_path / "whole", *words)
    advance, steps = Logs.advance, iter(range(1, 10**6))

    def stopping(self, images):
        advance(self, images)
        if next(steps) == 15:  # of 8 + 20 + 12
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Logs, "advance", stopping)
        part = run(tmp_path / "part", *words, code=143)
    assert len(read(part, "accuracy")["tasks"]) == 1
    assert main(["--resume", str(part), "--non_verbose"]) == 0
    assert read(part, "accuracy") == read(whole, "accuracy")
    states = [checkpoint.load(folder / "checkpoint") for folder in (whole, part)]
    for name in ("method", "optimizer", "random", "order"):
        assert_same(states[0][name], states[1][name])


def test_a_run_of_unequal_tasks_continues_and_keeps_its_sizes(tmp_path, capsys):
    words = ("--model", "er", *FAST, "--classes_per_task", "2,5,3")
    whole = run(tmp_path / "whole", *words)
    first = run(tmp_path / "first", *words, "--stop_after", "1")
    second = run(tmp_path / "second", "--from", str(first), "--continue", "1", "--stop_after", "3")
    assert read(second, "accuracy") == read(whole, "accuracy")
    capsys.readouterr()
    assert main(["--from", str(first), "--continue", "1", "--stop_after", "3", "--classes_per_task", "2,8"]) == 2
    assert (
        "--classes_per_task must be [2, 5, 3], as in the run that is continued, got (2, 8)" in capsys.readouterr().err
    )


def test_sweeps_and_reports_tell_runs_of_other_sizes_apart(tmp_path, capsys):
    base = ("--model", "er", *FAST, "--debug_mode")
    for sizes in ("2,8", "8,2"):
        run(tmp_path, *base, "--classes_per_task", sizes)
    argv = (*base, "--classes_per_task", "2,8", "--results_path", str(tmp_path))
    other = (*base, "--classes_per_task", "5,5", "--results_path", str(tmp_path))
    jobs = [sweep.Job({}, words, resolve(list(words))) for words in (argv, other)]
    assert set(sweep.look(jobs).done) == {jobs[0].hash}
    capsys.readouterr()
    assert report.main([str(tmp_path)]) == 2
    refusal = capsys.readouterr().err
    assert "(classes_per_task = 2 8, 8 2)" in refusal and "--where 'classes_per_task=2 8'" in refusal
    assert report.main([str(tmp_path), "--where", "classes_per_task=2 8"]) == 0
    assert report.main([str(tmp_path), "--mix"]) == 0
    assert "classes_per_task = " in capsys.readouterr().err, "the report says that it mixes them"
