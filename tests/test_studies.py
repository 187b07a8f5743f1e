"""Study files, what the seed decides, and the status of runs: each expected number is worked out in the test."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from made import make_mnist

from flatcl.models._method import Method
from flatcl.utils import studies
from flatcl.utils.arguments import SEEDS, resolve
from flatcl.utils.commands import sweep
from flatcl.utils.engine import run
from flatcl.utils.engine.build import build
from flatcl.utils.engine.lock import Lock
from flatcl.utils.errors import Interrupted, UsageError
from flatcl.utils.registry import METHODS, ROOT
from flatcl.utils.reports.runs import find_runs
from flatcl.utils.reports.tables import group_runs, mixtures
from flatcl.utils.studies import status
from flatcl.utils.studies.engines.local import STOP_S, Local, run_claimed

YAML = """
name: small
models: [sgd, er, derpp]
datasets: [seq-digits]
optimizers: [sgd, sam]
buffer_sizes: [50, 100]
seeds: 0-1
grid: {rho: [0.05, 0.10]}
flags: {n_epochs: 2, permute_classes: true, optim_wd: 1e-4}
fix: {class_order: 7}
cells:
  - {model: [derpp], buffer_size: 100, lr: 0.03}
"""
TOML = """
name = "small"
models = ["sgd", "er", "derpp"]
datasets = ["seq-digits"]
optimizers = ["sgd", "sam"]
buffer_sizes = [50, 100]
seeds = [0, 1]
grid = {rho = ["0.05", "0.10"]}
flags = {n_epochs = 2, permute_classes = true, optim_wd = "1e-4"}
fix = {class_order = 7}
cells = [{model = "derpp", buffer_size = 100, lr = 0.03}]
"""
SMALL = "models: [er]\ndatasets: [seq-digits]\n"


@pytest.fixture
def write(tmp_path):
    """Writes a study file; returns its path."""

    def write(text, name="study.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def problems_of(path):
    with pytest.raises(UsageError) as error:
        studies.read(path)
    return error.value.problems


# files


def test_yaml_toml_and_json_say_the_same(write):
    yaml = studies.read(write(YAML))
    content = {
        "name": "small", "models": "sgd,er,derpp", "datasets": "seq-digits", "optimizers": ["sgd", "sam"],
        "buffer_sizes": [50, 100], "seeds": "0-1", "grid": {"rho": [0.05, "0.10"]}, "fix": {"class_order": 7},
        "flags": {"n_epochs": 2, "permute_classes": True, "optim_wd": "1e-4"},
        "cells": [{"model": "derpp", "buffer_size": 100, "lr": 0.03}],
    }  # fmt: skip
    others = [studies.read(write(json.dumps(content), "study.json"))]
    if sys.version_info >= (3, 11):
        others.append(studies.read(write(TOML, "study.toml")))
    assert all(other == studies.read(write(YAML)) or vars(other) | {"places": 0} == vars(yaml) | {"places": 0}
               for other in others)  # fmt: skip
    assert yaml.flags == {"n_epochs": "2", "permute_classes": "1", "optim_wd": "1e-4"}
    assert yaml.grid == {"rho": ("0.05", "0.10")} and yaml.fix == {"class_order": 7} and yaml.seeds == (0, 1)
    assert studies.read(write(SMALL)).name == "study"


def test_numbers_of_yaml_are_those_that_are_written(write):
    study = studies.read(write(SMALL + "flags: {notes: 010, lr_milestones: [3, 4], clip_grad: null, lr: 1:30}\n"))
    assert study.flags == {"notes": "010", "lr_milestones": "3,4", "clip_grad": "none", "lr": "1:30"}


def test_axes_are_for_the_runs_that_have_the_flag(write):
    points = studies.read(write(YAML)).points()
    # sgd: 1 size; er and derpp: 2 sizes: 5 pairs; under sgd 1 radius, under sam 2: 15; with 2 seeds 30
    assert len(points) == len({tuple(point.items()) for point in points}) == 30
    assert all(("rho" in point) == (point["optimizer"] == "sam") for point in points)
    assert all(("buffer_size" in point) == (point["model"] != "sgd") for point in points)
    own = [point for point in points if "lr" in point]
    assert {(point["model"], point["buffer_size"], point["lr"]) for point in own} == {("derpp", "100", "0.03")}
    assert len(own) == 6  # 1 + 2 radii, 2 seeds


def test_a_cell_knows_the_optimizer_that_a_method_brings(write):
    cell = "cells: [{optimizer: mgser_sam, lr: 0.5}, {dataset: seq_digits, model: er, lr: 0.2}]\n"
    default = METHODS.load("er_sam").default_optimizer
    text = "models: [er_sam, er]\ndatasets: [seq-digits]\n" + cell.replace("mgser_sam", default)
    assert [point["lr"] for point in studies.read(write(text)).points()] == ["0.5", "0.2"]


def test_flags_of_a_cell_are_for_the_runs_that_have_them(write):
    text = "models: [er, sgd]\ndatasets: [seq-digits]\noptimizers: [sgd, sam]\n"
    text += "cells: [{dataset: seq-digits, rho: 0.02, minibatch_size: 16}]\n"
    points = studies.read(write(text)).points()
    assert len(points) == 4
    assert all(("rho" in point) == (point["optimizer"] == "sam") for point in points)
    assert all(("minibatch_size" in point) == (point["model"] == "er") for point in points)


WRONG = """
modls: [er]
models: [er, drepp]
datasets: {a: 1}
seeds: 0-x
lr: 0.1
seeds: 3
grid:
  rho: [0.1]
  seed: [1]
flags:
  rho: 0.1
  n_epoch: 3
  day: 2020-01-01
  lr: abc
fix: {class_oder: 0, init: -1}
vary: [init]
cells:
  - {model: er}
"""


def test_all_mistakes_are_said_at_once_with_line_and_key(write, capsys, tmp_path):
    path = write(WRONG)
    assert sweep.main([path, "--", "--results_path", str(tmp_path / "results")]) == 2
    lines = capsys.readouterr().err.replace(f"error: {path}, ", "").splitlines()
    wanted = [
        "line 2, modls: unknown key. Did you mean models?",
        "line 3, models[1]: unknown model: 'drepp'. Did you mean derpp",
        "line 4, datasets: expects a list, got keys and values.",
        "line 5, seeds: expects numbers and ranges, got '0-x'. Example: 0-2,5.",
        "line 6, lr: unknown key. It is a flag of a run: write it below flags.",
        "line 7, seeds: the key is given twice, first in line 5. Give it once.",
        "line 9, grid.rho: --rho also stands below flags. Give it in one place.",
        "line 10, grid.seed: --seed has a key of its own. Write: seeds: ...",
        "line 13, flags.n_epoch: unknown flag: n_epoch. Did you mean n_epochs",
        "line 14, flags.day: unknown flag: day. See flatcl train",
        "line 14, flags.day: expects a number or a text, got a date. Put it into quotes.",
        "line 15, flags.lr: --lr expects a number, got 'abc'.",
        "line 16, fix.class_oder: unknown source of random numbers: 'class_oder'. Did you mean class_order",
        "line 16, fix.init: expects one seed, a whole number from 0 to 4294967295, got '-1'.",
        "line 17, vary: fix and vary exclude each other. Give one of them.",
        "line 19, cells[0]: this cell sets no flag. Add one, such as lr: 0.03.",
    ]
    assert len(lines) == len(wanted)
    for line in wanted:
        assert any(found.startswith(line) for found in lines), (line, lines)
    assert [line for line in lines if not line.startswith("line")] == [] and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("grid: {rho: [1]}\n", "grid.rho: none of the runs has this flag. Drop it."),
        ("cells: [{model: derpp, lr: 1}]\n", "cells[0]: no run has model derpp. Correct it, or drop the cell."),
        ("grid: {lr: [1]}\ncells: [{model: er, lr: 1}]\n", "cells[0].lr: --lr is an axis of the study."),
        ("cells: [{model: er, rho: 1}]\n", "cells[0].rho: none of the runs of this cell has this flag. Drop it."),
        ("vary: [init]\ngrid: {init_seed: [5]}\n", "grid.init_seed: the seeds decide it, by vary. Drop it."),
        ("flags: {n_epochs: 1, lr: 0,1}\n", "flags.1: expects the name of a flag, got the number 1. Write numbers with "
         "a point (0.1, not 0,1), and lists in [ ]."),
        ("cells: [{lr: 0.1}]\n", "cells[0]: this cell names no model, dataset, optimizer or buffer_size. Add one."),
        ("flags: !!python/object/apply:os.system [ls]\n", "flags: expects a plain mapping or list"),
        ("name: &a [*a]\n", "nested too deeply"),
        ("flags: [\n", "not YAML"),
        ("a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\n",
         "more than 100,000 entries"),
    ],
)  # fmt: skip
def test_refused_in_a_study(text, message, write):
    assert message in "\n".join(problems_of(write(SMALL + text)))


def test_keys_given_twice_in_json_and_toml_and_files_of_other_kinds(write, tmp_path):
    twice = '{"models": ["er"], "datasets": ["seq-digits"], "seeds": 1, "seeds": 2}'
    assert "the key 'seeds' is given 2 times" in "\n".join(problems_of(write(twice, "a.json")))
    assert "not JSON" in problems_of(write("{", "b.json"))[0]
    if sys.version_info >= (3, 11):
        assert "not TOML" in problems_of(write("seeds = 1\nseeds = 2\n", "a.toml"))[0]
    assert "is not a study file: its name must end in .yaml" in problems_of("derpp")[0]
    assert "No such file" in problems_of(tmp_path / "none.yaml")[0]


def test_without_the_package_one_message_says_what_to_install(write, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert sweep.main([write(SMALL)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and 'pip install "flatcl[study]"' in error and "pip install PyYAML" in error


@pytest.mark.parametrize(
    "flag, hint",
    [
        ("--epochs", "Did you mean --n_epochs, a flag of each run? Then write it after a separate --, as in: flatcl "
                     "sweep ... -- --n_epochs VALUE."),
        ("--job", "Did you mean --jobs or --json?"),
        ("--modle", "Did you mean --models"),
        ("--xyz", "Choose from: --help, --models"),
    ],
)  # fmt: skip
def test_the_nearest_flag_may_be_one_of_the_runs(flag, hint, write, capsys):
    assert sweep.main([write(SMALL), flag, "1"]) == 2
    assert capsys.readouterr().err.startswith(f"error: unknown flag: {flag}. {hint}")


def test_a_value_that_a_run_refuses_is_named_with_its_place(write, capsys):
    path = write(SMALL + "flags:\n  n_epochs: 0\ngrid:\n  lr: [0.1, x]\n")
    assert sweep.main([path]) == 2
    error = capsys.readouterr().err
    assert f"error: {path}, line 4, flags.n_epochs: er on seq-digits: --n_epochs must be at least 1, got 0." in error
    assert f"error: {path}, line 6, grid.lr: er on seq-digits: --lr expects a number, got 'x'." in error


def test_the_command_line_replaces_what_the_file_says(write):
    path = write(YAML + "results_path: somewhere\n")
    words = [path, "--seeds", "5", "--jobs", "3", "--models", "derpp,er", "--grid", "optimizer=sgd"]
    jobs, engine, _ = sweep._prepare([*words, "--", "--n_epochs", "3", "--lr", "0.2", "--class_order_seed", "1"])
    assert engine == Local(3) and len(jobs) == 4
    values = [job.config.values for job in jobs]
    assert {(own["model"], own["optimizer"], own["seed"]) for own in values} == {("derpp", "sgd", 5), ("er", "sgd", 5)}
    assert all((own["n_epochs"], own["lr"], own["class_order_seed"]) == (3, 0.2, 1) for own in values)
    assert all(own["results_path"] == "somewhere" and own["permute_classes"] is True for own in values)
    by_file, _, _ = sweep._prepare([path])
    assert {(job.config.model, job.config.lr) for job in by_file if job.config.values.get("buffer_size") == 100} == {
        ("derpp", 0.03), ("er", 0.1)
    }  # fmt: skip
    assert {job.config.class_order_seed for job in by_file} == {7}
    with pytest.raises(UsageError, match="--optimizer after -- is an axis"):
        sweep._prepare([path, "--", "--optimizer", "sam"])


def test_names_of_a_plugin_and_flags_that_only_some_runs_have(write, tmp_path):
    text = (
        "from flatcl.models.er import ER\nfrom flatcl.utils.registry import METHODS\n"
        "@METHODS.register('my_er')\nclass MyEr(ER):\n    pass\n"
    )
    (tmp_path / "mine.py").write_text(text)
    path = write(f"models: [my_er, sgd]\ndatasets: [seq-digits]\nflags: {{plugin: {tmp_path / 'mine.py'}}}\n")
    jobs, _, _ = sweep._prepare([path, "--", "--buffer_size", "60"])
    assert [job.config.values.get("buffer_size") for job in jobs] == [60, None]


def test_the_example_is_the_one_of_the_page():
    page, file = (ROOT / "docs/studies.md").read_text(), ROOT / "examples/study.yaml"
    assert f"```yaml\n{file.read_text()}```" in page
    # er and derpp: 2 buffer sizes, 1 run under sgd and 2 under sam; sgd: 1 and 2; 5 seeds
    assert len(studies.read(file).points()) == 5 * (2 * 2 * 3 + 3)


# what the seed decides


def rows_of(trainer):
    """Trains, and returns the ids of the training rows, batch by batch."""
    epoch, seen = trainer.stream.epoch, []

    def spy(split):
        for batch in epoch(split):
            seen.append(batch.ids.tolist())
            yield batch

    trainer.stream.epoch = spy
    trainer.run()
    return seen


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.method.net.parameters()])


PLAIN = [name for name in METHODS.names() if METHODS.load(name).train_split is Method.train_split]
QUICK = {"debug_mode": 1, "stop_after": 2, "permute_classes": 1, "seed": 3, "eval_tasks": "seen"}


def test_for_one_seed_all_methods_see_the_same_tasks_and_the_same_order_of_rows(start):
    """So that differences can be paired by seed. The others train on other rows, such as exemplars of earlier tasks."""
    slow = {"hal": {"steps_on_anchors": 1}}
    assert len(PLAIN) > 20 and not {"er", "derpp", "mgser_sam", "pnn", "si"} - set(PLAIN)
    whole = start("er", **QUICK)
    order, decided, rows = whole.benchmark.class_order(), whole.benchmark.decided(), rows_of(whole)
    assert order != list(range(10)) and len(rows) == 10  # 2 tasks of 5 batches
    for name in PLAIN:
        if METHODS.load(name).trains_jointly:
            continue
        trainer = start(name, **QUICK, **slow.get(name, {}))
        assert trainer.benchmark.decided() == decided, name
        assert rows_of(trainer) == rows, name
    for optimizer in ("sam", "esam", "sparse_sam", "looksam"):
        assert rows_of(start("er", **QUICK, optimizer=optimizer)) == rows, optimizer


@pytest.mark.parametrize("dataset, key", [("perm-mnist", "permutations"), ("rot-mnist", "angles")])
def test_for_one_seed_all_methods_see_the_same_transforms(dataset, key, tmp_path):
    make_mnist(tmp_path)

    def decided(model, *words):
        base = ["--model", model, "--dataset", dataset, "--base_path", str(tmp_path), "--n_tasks", "3", "--disable_log"]
        return build(resolve([*base, *words]), torch.device("cpu"), None).benchmark.decided()[key]

    first = decided("er", "--seed", "4")
    assert all(decided(model, "--seed", "4") == first for model in ("sgd", "derpp", "agem", "mgser_sam"))
    assert decided("er", "--seed", "5", "--class_order_seed", "4") == first != decided("er", "--seed", "5")


def test_each_source_can_have_a_seed_of_its_own(start):
    def facts(**flags):
        trainer = start("er", **{**QUICK, **flags})
        return trainer.benchmark.class_order(), weights_of(trainer).tolist(), rows_of(trainer)

    base, other = facts(), facts(seed=8)
    assert all(mine != its for mine, its in zip(base, other, strict=True))
    # rows are those of the classes of the task: with the order of the classes, they change as well
    order, weights, _ = facts(class_order_seed=8)
    assert (order, weights) == (other[0], base[1])
    assert facts(init_seed=8) == (base[0], other[1], base[2])
    order, weights, rows = facts(data_order_seed=8)
    assert (order, weights) == base[:2] and rows != base[2]
    assert facts(class_order_seed=8, data_order_seed=8, init_seed=8) == other


def test_seeds_of_their_own_leave_the_hash_alone_until_they_are_given():
    words = ["--model", "er", "--dataset", "seq-digits", "--permute_classes"]
    plain = resolve(words).hash
    assert resolve([*words, *(word for name in SEEDS for word in (f"--{name}", "none"))]).hash == plain
    assert len({plain, *(resolve([*words, f"--{name}", "0"]).hash for name in SEEDS)}) == 4


@pytest.mark.parametrize(
    "dataset, words, message",
    [
        ("seq-digits", ["--class_order_seed", "1"], "no effect on seq-digits, whose classes have a fixed order"),
        ("mnist-360", ["--data_order_seed", "1"], "no effect on mnist-360, whose stream the benchmark draws"),
    ],
)
def test_a_seed_of_nothing_is_refused(dataset, words, message):
    with pytest.raises(UsageError, match=message):
        resolve(["--model", "er", "--dataset", dataset, *words])


def test_a_run_with_seeds_of_its_own_goes_on_exactly(start, assert_same):
    flags = {**QUICK, "class_order_seed": 1, "data_order_seed": 2, "init_seed": 4, "backbone": "mnistmlp"}
    whole = start("derpp", **flags)
    whole.run()
    first, steps = start("derpp", **flags), []
    observe = first.method.observe

    def stopping(*args, **kwargs):
        steps.append(1)
        if len(steps) == 7:
            first.stop(signal.SIGINT)
        return observe(*args, **kwargs)

    first.method.observe = stopping
    with pytest.raises(Interrupted):
        first.run()
    state = first.state_dict()  # with the global generators, which the next trainer sets anew
    second = start("derpp", **flags)
    second.load_checkpoint(state)
    second.run()
    assert_same(second.method.state_dict(), whole.method.state_dict())


def test_a_study_fixes_a_source_or_varies_nothing_else(write):
    base = SMALL + "flags: {permute_classes: 1}\nseeds: 1-2\n"

    def seeds(text):
        jobs, _, _ = sweep._prepare([write(base + text)])
        return [tuple(job.config.values[name] for name in ("seed", *SEEDS)) for job in jobs]

    assert seeds("fix: {class_order: 0, init: 9}\n") == [(1, 0, None, 9), (2, 0, None, 9)]
    assert seeds("vary: [class_order, data_order]\n") == [(0, 1, 1, None), (0, 2, 2, None)]
    with pytest.raises(UsageError, match="--grid init_seed: the seeds decide it, by vary in .*yaml. Drop it."):
        sweep._prepare([write(base + "vary: [init]\n"), "--grid", "init_seed=5"])


def test_runs_that_vary_one_source_make_one_row_without_a_warning(write, tmp_path):
    text = f"flags: {{permute_classes: 1}}\nseeds: 1-2\nvary: [class_order]\nresults_path: {tmp_path / 'results'}\n"
    jobs, _, _ = sweep._prepare([write(SMALL + text)])
    for job in jobs:
        finish(job)
    (group,) = group_runs(find_runs([tmp_path]), ["model"], "class-il")
    assert len(group.runs) == 2 and mixtures([group]) == []


# status


def folder_of(job, when="20260101-120000"):
    path = job.results_path / "class-il" / job.config.dataset / job.config.model / f"{when}-{job.hash}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(job.config.to_json()))
    return path


def finish(job, wall_s=10.0, state="finished", tasks=5):
    """A run folder as the engine leaves it; of an unfinished run, with a checkpoint."""
    path, config = folder_of(job), job.config
    summary = {
        "model": config.model, "dataset": config.dataset, "optimizer": config.optimizer, "seed": config.seed,
        "status": state, "metrics": {"class-il": {"final_average_accuracy": 0.5}}, "cost": {"wall_s": wall_s},
        "config_hash": job.hash,
    }  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "accuracy.json").write_text(json.dumps({"tasks": list(range(tasks))}))
    (path / "checkpoint").mkdir(exist_ok=True)
    (path / "checkpoint" / "state.pt").write_bytes(b"")
    return path


def log(job, text):
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.log.write_text(text)


@pytest.fixture
def twelve(write, tmp_path):
    """(path of the study, its jobs): er and sgd, six seeds each."""
    results = tmp_path / "results"
    path = write(f"models: [er, sgd]\ndatasets: [seq-digits]\nseeds: 0-5\nresults_path: {results}\n")
    return path, sweep._prepare([path])[0]


def run_here(jobs, on_end, extra, runner, on_wait):
    """In place of worker processes, which would each import torch anew."""
    for job in jobs:
        code, why = run_claimed([*job.argv, *extra], job.log, job.label, runner)
        on_end(job, code, why)


def contents(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in folder.rglob("*")
    }


def shown(capsys, *words):
    code = sweep.main(["--status", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def test_status_says_of_each_run_how_far_it_is_and_writes_nothing(twelve, capsys, tmp_path):
    path, jobs = twelve
    results = tmp_path / "results"
    finish(jobs[0], wall_s=10.0)
    finish(jobs[1], wall_s=30.0)
    finish(jobs[2], state="interrupted", tasks=2)  # 3 of 5 left
    log(jobs[2], "...\nexit code 130\n")
    finish(jobs[3], state="running", tasks=1)  # killed without a word
    log(jobs[4], "error: no such thing\nexit code 2\n")
    finish(jobs[6], state="diverged", tasks=1)  # without a sweep
    finish(jobs[7], state="running", tasks=4)
    results.joinpath("logs").mkdir(exist_ok=True)
    with Lock(jobs[7].log.with_suffix(".lock"), "it"):
        before = contents(tmp_path)
        code, found = shown(capsys, path)
        assert sweep.main([path, "--status"]) == 1
        text = capsys.readouterr().out
        assert sweep.main([path, "--dry_run"]) == 0
        listed = capsys.readouterr().out.splitlines()
        assert contents(tmp_path) == before
    kinds = ["finished"] * 2 + ["to do"] * 5 + ["running"] + ["to do"] * 4
    assert listed[:12] == [f"{kind:9} {job.label}" for kind, job in zip(kinds, jobs, strict=True)]
    assert listed[12] == "12 run(s), 2 of them finished, 1 running"
    assert code == found["exit_code"] == 1
    assert [state["state"] for state in found["states"]] == [
        "finished", "finished", "interrupted", "interrupted", "failed", "not started",
        "failed", "running", *["not started"] * 4,
    ]  # fmt: skip
    assert [state["tasks"] for state in found["states"]] == [5, 5, 2, 1, 0, 0, 1, 4, 0, 0, 0, 0]
    assert [cell["tasks"] for cell in found["cells"]] == [13, 5]
    assert found["runs"] == {
        "all": 12, "finished": 2, "running": 1, "failed": 2, "interrupted": 2, "not started": 5
    }  # fmt: skip
    # median of 10 and 30: 20 s for a whole run. er: 3/5 + 4/5 + 1 + 1; sgd: 4/5 + 1/5 + 4: 8.4 runs, by one worker
    left = found["left"]
    assert left["seconds"] == pytest.approx(8.4 * 20) and left["workers"] == 1
    assert left["basis"] == {"the same cell": 4, "the same dataset": 6} and left["unknown_runs"] == 0
    assert f"study study in {results}: 12 runs: 2 finished, 1 running, 2 failed, 2 interrupted, 5 not started" in text
    assert f"er seq-digits seed 4: exit code 2, 0 of 5 tasks done, log {jobs[4].log}" in text
    assert "sgd seq-digits seed 0: diverged (loss not finite), 1 of 5 tasks done, see " in text
    assert f"sgd seq-digits seed 1: 4 of 5 tasks done, process {os.getpid()} on " in text
    assert "time left: about 3 min with 1 worker" in text


def test_a_run_that_diverges_is_called_so_by_the_sweep_and_by_its_status(write, tmp_path, capfd, monkeypatch):
    path = write(SMALL + f"flags: {{lr: 1e6, n_epochs: 1}}\nresults_path: {tmp_path / 'results'}\n")
    monkeypatch.setattr(run, "_draw", lambda draw: None)
    monkeypatch.setattr(Local, "run", lambda self, *args: run_here(*args))
    assert sweep.main([path]) == 1
    said = capfd.readouterr()
    (log_file,) = tmp_path.glob("results/logs/*.log")
    assert f"er seq-digits seed 0 -> diverged (loss not finite), see {log_file}" in said.out
    assert f"er seq-digits seed 0 diverged (loss not finite): {log_file}" in said.err and "(1)" not in said.out
    assert sweep.main([path, "--status"]) == 1
    assert "er seq-digits seed 0: diverged (loss not finite), 0 of 5 tasks done, log " in capfd.readouterr().out


def test_exit_codes_of_status_and_time_left_that_is_not_known(twelve, capsys):
    path, jobs = twelve
    code, found = shown(capsys, path, "--jobs", "4")
    assert code == 3 and found["left"] == {"seconds": None, "workers": 4, "basis": {}, "unknown_runs": 12}
    for job in jobs:
        finish(job)
    code, found = shown(capsys, path)
    assert code == 0 and found["left"]["seconds"] == 0 and found["runs"]["finished"] == 12
    words = ["--models", "er,sgd", "--datasets", "seq-digits", "--seeds", "0-5"]
    run = ["--", "--results_path", str(jobs[0].results_path)]
    assert shown(capsys, *words, *run)[0] == 0
    assert sweep.main([*words, "--status", *run]) == 0
    assert capsys.readouterr().out.startswith(f"12 runs in {jobs[0].results_path}: 12 finished, 0 running")
    assert sweep.main([path, "--json"]) == 2 and "--json has no effect without --status" in capsys.readouterr().err


def test_the_longest_run_bounds_the_time_left(twelve):
    _, jobs = twelve
    done = status.State(jobs[0], status.FINISHED, 5, 5, wall_s=100.0)
    assert status.left([done, status.State(jobs[1], status.NOT_STARTED, 0, 5)], jobs=8).seconds == 100.0
    words = ["1 s", "89 s", "5 min", "1 h 20 min", "2 d 3 h"]
    assert [status.duration(seconds) for seconds in (0.2, 89, 300, 4800, 183_600)] == words


def test_locks_of_another_machine_and_runs_of_other_code(twelve):
    _, jobs = twelve
    path = finish(jobs[0], state="running", tasks=1)
    lock = path / "lock"
    far = {"pid": 1, "host": "far", "place": "far away", "started": 1, "token": "x"}
    lock.write_text(json.dumps(far))
    assert [state.why for state in status.look(jobs[:1], {})] == ["process 1 on far"]
    os.utime(lock, (time.time() - 400, time.time() - 400))  # its heart has stopped
    assert status.look(jobs[:1], {})[0].state == status.INTERRUPTED
    config = json.loads((path / "config.json").read_text())
    config["code"]["models/er.py"] = "0" * 16
    (path / "config.json").write_text(json.dumps(config))
    assert status.look(jobs[:1], {})[0].state == status.NOT_STARTED
    assert status.look(jobs[:1], {}, keep_changed=True)[0].state == status.INTERRUPTED


def test_status_follows_a_sweep_that_is_killed_and_goes_on(write, tmp_path, capsys):
    results = tmp_path / "results"
    text = f"seeds: 0-1\nflags: {{n_epochs: 40, stop_after: 1}}\nresults_path: {results}\n"
    path = write(SMALL + text)
    command = [sys.executable, "-m", "flatcl", "sweep", path]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 300
        while not [*results.rglob("metrics.jsonl")]:
            assert time.monotonic() < end
            time.sleep(0.05)
        code, found = shown(capsys, path)
        assert code == 3 and [state["state"] for state in found["states"]] == ["running", "not started"]
    finally:
        process.kill()
        process.wait()
    lock = next((results / "logs").glob("*.lock"), None)
    while lock is not None and lock.exists() and shown(capsys, path)[1]["runs"]["running"]:
        time.sleep(0.05)  # its worker writes a checkpoint
    code, found = shown(capsys, path)
    assert code == 3 and [state["state"] for state in found["states"]] == ["interrupted", "not started"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=600).returncode == 0
    assert shown(capsys, path)[0] == 0 and len([*results.rglob("summary.json")]) == 2
    assert [Path(file).read_text().splitlines()[-1] for file in (results / "logs").glob("*.log")] == ["exit code 0"] * 2


# Ctrl-C


def test_ctrl_c_while_a_finished_run_draws_its_pictures_ends_the_sweep_soon_and_shows_the_run(tmp_path):
    words = ["--models", "er", "--datasets", "seq-digits", "--seeds", "0-1", "--jobs", "1"]
    run = ["--n_epochs", "1", "--stop_after", "2", "--results_path", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "flatcl", "sweep", *words, "--", *run],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not any(json.loads(file.read_text())["status"] == "finished" for file in tmp_path.rglob("summary.json")):
            assert time.monotonic() < end
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        since = time.monotonic()
        out, error = process.communicate(timeout=120)
        assert time.monotonic() - since < STOP_S / 2
    finally:
        process.kill()
    assert process.returncode == 130 and "er seq-digits seed 0 -> class-il " in out
    assert "interrupted: 1 of 2 finished" in error
    assert not [word for word in ("Traceback", "Warning", "leaked") if word in error], error
