"""Whole runs: what they leave on disk, that they repeat, and that stopping them changes nothing."""

import json
import math
import os
import pkgutil
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made import make_mnist
from PIL import Image

import flatcl
from flatcl.utils import files, metrics
from flatcl.utils.arguments import resolve
from flatcl.utils.commands.train import main
from flatcl.utils.engine import checkpoint, evaluator, results
from flatcl.utils.engine.build import build as build_trainer
from flatcl.utils.engine.logs import Logs
from flatcl.utils.engine.texts import closing_table, describe
from flatcl.utils.engine.trainer import Trainer, learning_rate
from flatcl.utils.registry import OPTIMIZERS, ROOT, load_plugin

SUMMARY = {
    "model", "dataset", "optimizer", "backbone", "setting", "seed", "status", "metrics", "accuracy", "cost",
    "config_hash", "notes", "eval_tasks",
}  # fmt: skip
COST = {
    "batches",
    "steps",
    "skipped_steps",
    "forward_rows",
    "backward_rows",
    "train_s",
    "eval_s",
    "wall_s",
    "peak_memory_mib",
}
METRICS = {
    "final_average_accuracy", "final_overall_accuracy", "average_incremental_accuracy",
    "average_incremental_overall_accuracy", "forgetting_chaudhry18", "forgetting_mammoth", "bwt_gem17", "fwt_gem17",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_process_state(monkeypatch):
    """Threads and the user's settings must not leak from test to test."""
    monkeypatch.delenv("FLATCL_DATA", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def unpictured(monkeypatch):
    """Drawing takes longer than training here; what is drawn has tests of its own."""
    monkeypatch.setattr(Logs, "finish", lambda *_: None)


def start(folder, *argv, code=0):
    """Runs a command line below `folder`; returns its run folder."""
    before = set(Path(folder).rglob("config.json"))
    assert main([*argv, "--results_path", str(folder)]) == code
    (file,) = set(Path(folder).rglob("config.json")) - before
    return file.parent


def read(folder, name="summary.json"):
    return json.loads((folder / name).read_text())


def board_folder(folder):
    """Where a run has its event files."""
    (found,) = (folder / "tensorboard").iterdir()
    return found


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder):
    """metrics.jsonl without what the clock decides."""
    return [{key: value for key, value in line.items() if not key.endswith("_per_s")} for line in lines_of(folder)]


def identical(a, b):
    """Bit for bit, through dicts and lists; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.cpu().numpy().tobytes() == b.cpu().numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and repr(a) == repr(b)


def trained(*argv):
    """(accuracies and untrained row, weights and state) of a run that writes nothing."""
    config = resolve([*argv, "--disable_log"])
    trainer = build_trainer(config, torch.device("cpu"), None)
    trainer.run()
    return vars(trainer.progress), dict(trainer.method.state_dict())


def write_plugin(folder, name, text):
    file = folder / f"{name}.py"
    file.write_text(text)
    return str(file)


# the run folder


@pytest.fixture(scope="module")
def mgser(tmp_path_factory):
    """A finished run of mgser_sam with a point of the training curve at every second step."""
    words = (
        "--model",
        "mgser_sam",
        "--dataset",
        "seq-synth",
        "--log_every",
        "2",
        "--notes",
        "a note",
        "--threads",
        "1",
    )
    return start(tmp_path_factory.mktemp("mgser"), *words)


@pytest.fixture(scope="module")
def events(mgser):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(board_folder(mgser)), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def test_the_run_folder_lies_where_the_design_says_and_has_every_file(mgser):
    setting, dataset, model, name = mgser.parts[-4:]
    assert (setting, dataset, model) == ("class-il", "seq-synth", "mgser_sam")
    assert name.endswith(read(mgser, "config.json")["config_hash"])
    names = {path.name for path in mgser.iterdir()}
    assert {"config.json", "environment.json", "metrics.jsonl", "accuracy.json", "summary.json", "checkpoint"} <= names
    assert {"accuracy_matrix.png", "accuracy_matrix_task-il.png", "curves.png"} <= names
    assert any("tfevents" in path.name for path in board_folder(mgser).iterdir())
    assert not list(mgser.rglob("*.new"))


def test_config_has_value_and_origin_of_every_flag(mgser):
    content = read(mgser, "config.json")
    config = resolve(["--from", str(mgser)])
    assert set(content["flags"]) == set(config.values)
    assert all(set(entry) == {"value", "origin"} and entry["origin"] for entry in content["flags"].values())
    assert content["flags"]["log_every"] == {"value": 2, "origin": "argv"}
    assert content["flags"]["lr"] == {"value": 0.05, "origin": "dataset seq-synth"}
    assert content["protocol"] >= 1 and content["config_hash"] == config.hash


def test_environment_names_what_the_numbers_depend_on(mgser):
    content = read(mgser, "environment.json")
    assert content["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert content["device"] == ("cuda:0" if torch.cuda.is_available() else "cpu") and content["device_name"]
    assert content["threads"] == 1 and content["cpus"] >= 1 and content["python"]
    assert content["commit"] is None or len(content["commit"]) == 40


def test_metrics_has_a_line_for_each_task_and_the_training_curve(mgser):
    lines = lines_of(mgser)
    tasks = [line for line in lines if "task" in line]
    steps = [line for line in lines if "task" not in line]
    assert [line["task"] for line in tasks] == list(range(5))
    assert [line["step"] for line in steps] == list(range(2, 41, 2))
    assert all({"train/loss", "train/lr", "train/images_per_s"} <= set(line) for line in steps)
    assert [line["accuracy"]["class-il"] for line in tasks] == read(mgser)["accuracy"]["class-il"]
    assert [line["step"] for line in tasks] == [8, 16, 24, 32, 40]
    for count, line in enumerate(tasks, start=1):
        for setting, average in line["average_accuracy"].items():
            assert average == pytest.approx(sum(line["accuracy"][setting][:count]) / count, abs=1e-12)


def test_accuracy_has_the_whole_matrix_and_the_untrained_row(mgser):
    content, summary = read(mgser, "accuracy.json"), read(mgser)
    assert content["accuracy"] == summary["accuracy"]
    for setting in ("class-il", "task-il"):
        assert np.array(content["accuracy"][setting]).shape == (5, 5)
        assert len(content["untrained"][setting]) == 5
        assert all(0 <= value <= 1 for row in content["accuracy"][setting] for value in row)
    assert content["untrained"]["task-il"] != content["accuracy"]["task-il"][0]


def test_summary_has_exactly_the_agreed_keys_and_right_numbers(mgser):
    summary = read(mgser)
    assert set(summary) == SUMMARY and set(summary["cost"]) == COST
    assert set(summary["metrics"]) == set(summary["accuracy"]) == {"class-il", "task-il"}
    assert summary["status"] == "finished" and summary["notes"] == "a note" and summary["seed"] == 0
    assert (summary["optimizer"], summary["backbone"], summary["setting"]) == ("sam", "mnistmlp", "class-il")
    untrained = read(mgser, "accuracy.json")["untrained"]
    for setting, matrix in summary["accuracy"].items():
        a = np.array(matrix)
        found = summary["metrics"][setting]
        assert set(found) == METRICS
        assert found["final_average_accuracy"] == pytest.approx(a[-1].mean())
        assert found["final_overall_accuracy"] == pytest.approx(a[-1].mean()), "all tasks are equally large"
        rows = [a[t, : t + 1].mean() for t in range(5)]
        assert found["average_incremental_accuracy"] == pytest.approx(np.mean(rows))
        assert found["forgetting_chaudhry18"] == pytest.approx((a[:-1].max(0) - a[-1])[:-1].mean())
        assert found["bwt_gem17"] == pytest.approx((a[-1] - a.diagonal())[:-1].mean())
        b = np.array(untrained[setting])
        assert found["fwt_gem17"] == pytest.approx((np.diagonal(a, 1) - b[1:]).mean())


def test_the_cost_counts_every_pass(mgser):
    """SAM passes each row twice; DER++ adds two draws of 16, once there is a memory."""
    cost = read(mgser)["cost"]
    assert cost["steps"] == 40
    assert cost["forward_rows"] == cost["backward_rows"] == 2 * (16 + 39 * 48)
    assert 0 < cost["train_s"] <= cost["wall_s"] and cost["eval_s"] > 0 and cost["peak_memory_mib"] > 0


def test_the_pictures_open(mgser):
    for file in mgser.glob("*.png"):
        with Image.open(file) as picture:
            picture.load()
            assert min(picture.size) > 50
    assert len(list(mgser.glob("*.png"))) == 4


def test_tensorboard_has_the_agreed_tags(events):
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/loss_current", "train/loss_logits", "train/loss_labels"} <= tags
    assert {"train/lr", "train/images_per_s", "accuracy/class-il", "accuracy/task-il"} <= tags
    for setting in ("class-il", "task-il"):
        assert {f"accuracy/{setting}/task_{task:02d}" for task in range(1, 6)} <= tags
    assert {tag.rpartition("/")[2] for tag in tags if tag.startswith("metrics/")} == METRICS
    assert {tag for tag in tags if tag.startswith("gradients/")} >= {
        "gradients/cos_current_memory",
        "gradients/norm_memory",
    }
    images = set(events.Tags()["images"])
    assert {"accuracy_matrix", "accuracy_matrix_task-il"} <= images
    assert events.Images("accuracy_matrix")[0].encoded_image_string.startswith(b"\x89PNG")


def test_tensorboard_has_the_numbers_of_the_run(events, mgser):
    summary, steps = read(mgser), [line for line in lines_of(mgser) if "task" not in line]
    losses = events.Scalars("train/loss")
    assert [point.step for point in losses] == [line["step"] for line in steps]
    assert [point.value for point in losses] == pytest.approx([line["train/loss"] for line in steps], rel=1e-6)
    for j in range(5):
        points = events.Scalars(f"accuracy/class-il/task_{j + 1:02d}")
        assert [point.step for point in points] == [1, 2, 3, 4, 5]
        assert [point.value for point in points] == pytest.approx([row[j] for row in summary["accuracy"]["class-il"]])
    (final,) = events.Scalars("metrics/class-il/final_average_accuracy")
    assert final.value == pytest.approx(summary["metrics"]["class-il"]["final_average_accuracy"])
    assert [point.value for point in events.Scalars("train/lr")] == pytest.approx([0.05] * 20)


def test_loss_terms_add_up_to_the_loss(mgser):
    for line in lines_of(mgser):
        if "task" not in line:
            terms = [value for key, value in line.items() if key.startswith("train/loss_")]
            assert sum(terms) == pytest.approx(line["train/loss"], rel=1e-5)


def test_tensorboard_has_the_hyperparameters(events):
    from tensorboard.plugins.hparams import metadata

    assert {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"} <= set(
        events.summary_metadata
    )
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    given = metadata.parse_session_start_info_plugin_data(content).hparams
    assert given["rho"].number_value == 0.05 and given["model"].string_value == "mgser_sam"


def test_the_console_has_a_line_for_each_task_and_the_closing_table(tmp_path, capsys, unpictured):
    folder = start(tmp_path, "--model", "er", "--dataset", "seq-synth")
    out = capsys.readouterr().out
    final = read(folder)["metrics"]
    assert [f"Accuracy for {t} task(s): [Class-IL]: " in out for t in range(1, 6)] == [True] * 5
    values = [f"{100 * final[setting]['final_average_accuracy']:.2f} %" for setting in ("class-il", "task-il")]
    assert f"Accuracy for 5 task(s): [Class-IL]: {values[0]} [Task-IL]: {values[1]}" in out
    assert all(name in out for name in METRICS)
    assert "40 steps" in out and "1,264 rows forward" in out and str(folder) in out


@pytest.mark.parametrize(("n_tasks", "words"), [(10, ()), (12, ()), (12, ("--joint",)), (12, ("--disable_log",))])
def test_the_console_has_the_whole_matrix_of_ten_tasks_and_the_last_row_of_more(
    n_tasks, words, mnist, tmp_path, capsys, unpictured
):
    argv = ["--model", "sgd", "--dataset", "perm-mnist", "--base_path", mnist, "--n_tasks", str(n_tasks)]
    assert main([*argv, *words, "--debug_mode", "--results_path", str(tmp_path)]) == 0
    table = capsys.readouterr().out.split("\nAccuracy in % [Domain-IL], ")[1].split("\nmetric ")[0].splitlines()
    folders = [file.parent for file in tmp_path.rglob("summary.json")]
    if n_tasks == 10:
        assert table[0] == "after task (row) on task (column)" and len(table) == 12
        assert [row.split()[0] for row in table[2:]] == [str(task) for task in range(1, 11)]
        return
    assert table[0] == "at the end of training" and max(map(len, table[:3])) <= 100
    assert [row.split()[:2] for row in table[1:3]] == [["task", "1-10"], ["task", "11-12"]]
    if words == ("--disable_log",):
        assert folders == [] and len(table) == 3
    else:
        last = read(folders[0])["accuracy"]["domain-il"][-1]
        assert [value for row in table[1:3] for value in row.split()[2:]] == [f"{100 * value:.2f}" for value in last]
        file = Path(table[4].removeprefix("Accuracy after every task: "))
        assert json.loads(file.read_text())["accuracy"]["domain-il"][-1] == last


def test_the_closing_table_of_a_thousand_tasks():
    cost = {"steps": 1, "forward_rows": 1, "backward_rows": 1, "train_s": 1, "eval_s": 1, "wall_s": 1,
            "peak_memory_mib": 1, "skipped_steps": 0}  # fmt: skip
    matrix = [[0.5] * t + [None] * (1000 - t) for t in range(1, 1001)]
    matrix[-1][2] = None
    summary = {"accuracy": {"class-il": matrix}, "metrics": {"class-il": {"forgetting_chaudhry18": 0.1}}, "cost": cost}
    lines = closing_table(summary, list(range(1000)), None).splitlines()
    rows = [line for line in lines if line.lstrip().startswith("task ")]
    assert len(rows) == 100 and {len(row) for row in rows} == {88}
    assert rows[0].split() == ["task", "1-10", "50.00", "50.00", "–", *["50.00"] * 7]


def test_two_equal_runs_at_one_time_get_folders_of_their_own(tmp_path, unpictured):
    argv = ("--model", "sgd", "--dataset", "seq-synth", "--debug_mode", "--n_tasks", "1")
    assert len({start(tmp_path, *argv) for _ in range(3)}) == 3


def test_every_json_file_is_put_in_place_whole(tmp_path, monkeypatch, unpictured):
    placed, replace = [], os.replace

    def watch(source, target):
        if str(target).endswith(".json"):
            json.loads(Path(source).read_text())
        placed.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    folder = start(tmp_path, "--model", "er", "--dataset", "seq-synth", "--stop_after", "2", "--debug_mode")
    assert {path.name for path in folder.glob("*.json")} | {"state.pt"} <= set(placed)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    results.write_json(file, {"a": 1})
    with pytest.raises(ValueError):
        results.write_json(file, {"a": math.nan})
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError):
        results.write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}


def test_pictures_that_cannot_be_drawn_cost_no_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Logs, "finish", lambda *_: 1 / 0)
    folder = start(tmp_path, "--model", "sgd", "--dataset", "seq-synth", "--debug_mode")
    (line,) = capsys.readouterr().err.splitlines()
    assert read(folder)["status"] == "finished" and "(ZeroDivisionError: division by zero); the results are c" in line


# every kind of run finishes


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_mnist(root, n_train=300, n_test=100)
    return str(root)


@pytest.mark.parametrize("model", ["er", "mgser_sam", "joint"])
@pytest.mark.parametrize("dataset", ["perm-mnist", "rot-mnist"])
def test_domain_incremental(model, dataset, mnist, tmp_path, unpictured):
    argv = ("--model", model, "--dataset", dataset, "--base_path", mnist, "--n_tasks", "3", "--log_every", "1")
    folder = start(tmp_path, *argv, "--lr", "0.02")
    summary = read(folder)
    assert list(summary["accuracy"]) == ["domain-il"] and set(summary["metrics"]["domain-il"]) == METRICS
    assert np.array(summary["accuracy"]["domain-il"]).shape == ((1, 3) if model == "joint" else (3, 3))
    assert folder.parts[-4:-1] == ("domain-il", dataset, model)


@pytest.mark.parametrize("model", ["er", "derpp", "mgser_sam", "joint"])
def test_general_continual(model, mnist, tmp_path, unpictured):
    summary = read(start(tmp_path, "--model", model, "--dataset", "mnist-360", "--base_path", mnist, "--lr", "0.02"))
    assert list(summary["accuracy"]) == ["general-continual"]
    assert np.array(summary["accuracy"]["general-continual"]).shape == (1, 1)
    assert summary["metrics"]["general-continual"]["forgetting_chaudhry18"] is None
    assert summary["status"] == "finished" and summary["cost"]["steps"] > 10


def test_pictures_of_a_run_with_one_task_and_of_a_joint_run(mnist, tmp_path):
    for number, words in enumerate(
        (("--dataset", "mnist-360"), ("--dataset", "perm-mnist", "--n_tasks", "2", "--joint"))
    ):
        folder = start(tmp_path / str(number), "--model", "er", *words, "--base_path", mnist, "--debug_mode")
        assert read(folder)["status"] == "finished"
        with Image.open(folder / "accuracy_matrix.png") as picture:
            picture.load()


def test_joint_is_one_row_and_only_its_accuracies_are_defined(tmp_path, capsys, unpictured):
    summary = read(start(tmp_path, "--model", "er", "--dataset", "seq-synth", "--joint"))
    row = summary["accuracy"]["class-il"][0]
    found = summary["metrics"]["class-il"]
    assert found.pop("final_average_accuracy") == pytest.approx(sum(row) / 5)
    assert found.pop("final_overall_accuracy") == pytest.approx(sum(row) / 5)
    assert set(found.values()) == {None}
    assert "Accuracy for 5 task(s)" in capsys.readouterr().out


def test_start_from_and_stop_after_give_the_part_between(tmp_path, capsys, unpictured):
    argv = ("--model", "er", "--dataset", "seq-synth", "--start_from", "1", "--stop_after", "4")
    folder = start(tmp_path, *argv)
    summary, out = read(folder), capsys.readouterr().out
    matrix = np.array(summary["accuracy"]["task-il"])
    assert matrix.shape == (3, 5) and read(folder, "accuracy.json")["tasks"] == [1, 2, 3]
    square = matrix[:, 1:4]
    untrained = np.array(read(folder, "accuracy.json")["untrained"]["task-il"])[1:4]
    assert summary["metrics"]["task-il"] == metrics.summarize(square.tolist(), untrained.tolist(), [32] * 3)
    assert summary["metrics"]["task-il"]["final_average_accuracy"] == pytest.approx(square[-1].mean())
    assert [line["task"] for line in lines_of(folder) if "task" in line] == [1, 2, 3]
    table = out.split("after task (row)")[1].splitlines()[2:5]
    assert [row.split()[0] for row in table] == ["2", "3", "4"], "rows are named after the tasks that were trained"


def test_stop_after_trains_the_first_tasks_as_the_whole_run_does():
    argv = ("--model", "er", "--dataset", "seq-synth")
    whole, part = trained(*argv)[0], trained(*argv, "--stop_after", "2")[0]
    assert part["accuracy"]["class-il"] == whole["accuracy"]["class-il"][:2]


def test_dry_run_and_disable_log_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--model", "er", "--dataset", "seq-synth", "--debug_mode"]
    assert main([*argv, "--dry_run"]) == 0
    assert main([*argv, "--disable_log"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_learning_rates_of_the_schedulers(tmp_path, unpictured):
    argv = ["--model", "sgd", "--dataset", "seq-synth", "--lr", "0.08", "--n_epochs", "4"]
    steps = resolve([*argv, "--lr_scheduler", "multistep", "--lr_milestones", "1,3", "--lr_gamma", "0.5"])
    assert [learning_rate(steps, epoch) for epoch in range(4)] == pytest.approx([0.08, 0.04, 0.04, 0.02])
    cosine = resolve([*argv, "--lr_scheduler", "cosine"])
    expected = [0.04 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert [learning_rate(cosine, epoch) for epoch in range(4)] == pytest.approx(expected)
    words = ("--n_tasks", "2", "--lr_scheduler", "multistep", "--lr_milestones", "1", "--log_every", "20")
    folder = start(tmp_path, *argv[:4], "--n_epochs", "2", "--lr", "0.08", *words)
    rates = [line["train/lr"] for line in lines_of(folder) if "train/lr" in line]
    assert rates == pytest.approx([0.08, 0.008, 0.08, 0.008]), "each task starts anew"


def test_the_overall_accuracy_counts_images(unpictured, tmp_path, capsys):
    """The tasks of seq-digits have unequal test sets, so that it differs from the average over tasks."""
    folder = start(tmp_path, "--model", "er", "--dataset", "seq-digits", "--stop_after", "4", "--threads", "1")
    trainer = build_trainer(resolve(["--from", str(folder), "--disable_log"]), torch.device("cpu"), None)
    sizes = [len(task.test) for task in trainer.benchmark][:4]
    assert len(set(sizes)) > 1
    for setting, matrix in read(folder)["accuracy"].items():
        right = sum(round(size * value) for size, value in zip(sizes, matrix[-1], strict=False))
        found = read(folder)["metrics"][setting]
        assert found["final_overall_accuracy"] == right / sum(sizes) != found["final_average_accuracy"]
    values = [f"{100 * found['final_overall_accuracy']:.2f} %" for found in read(folder)["metrics"].values()]
    assert re.search(rf"final_overall_accuracy\s+{values[0]}\s+{values[1]}", capsys.readouterr().out)


# tasks to come are not evaluated


def below_the_diagonal(matrix):
    return [[value if j <= t else None for j, value in enumerate(row)] for t, row in enumerate(matrix)]


def test_with_eval_tasks_seen_tasks_to_come_are_null_and_nothing_else_changes(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = ("--model", "mgser_sam", "--dataset", "seq-synth", "--threads", "1", "--device", "cpu")
    folder = start(tmp_path, *argv, "--eval_tasks", "seen")
    said = capsys.readouterr()
    progress, weights = trained(*argv)
    summary, content = read(folder), read(folder, "accuracy.json")
    assert content["untrained"] == {} and summary["eval_tasks"] == "seen" and summary["status"] == "finished"
    assert content["accuracy"] == summary["accuracy"]
    for setting, matrix in progress["accuracy"].items():
        seen = below_the_diagonal(matrix)
        assert summary["accuracy"][setting] == seen
        assert [line["accuracy"][setting] for line in lines_of(folder) if "task" in line] == seen
        assert summary["metrics"][setting] == metrics.summarize(seen, None, [32] * 5)
        assert summary["metrics"][setting]["fwt_gem17"] is None
    assert identical(checkpoint.load(folder / "checkpoint")["method"], weights), "training does not depend on it"
    assert re.search(r"fwt_gem17\s+–\s+–\s+not measured: only tasks seen are evaluated", said.out)
    assert re.search(r"\n   1 +[\d.]+      –      –      –      –\n", said.out)
    assert said.err == "" and len(list(folder.glob("*.png"))) == 4
    events = EventAccumulator(str(board_folder(folder)), size_guidance={"scalars": 0}).Reload()
    assert [point.step for point in events.Scalars("accuracy/class-il/task_03")] == [3, 4, 5]
    assert not any(tag.endswith("fwt_gem17") for tag in events.Tags()["scalars"])


def test_what_is_measured_with_all_tasks_is_said_to_be_all(mgser):
    assert read(mgser)["eval_tasks"] == "all" and read(mgser, "config.json")["flags"]["eval_tasks"]["value"] == "auto"


@pytest.mark.parametrize(
    "words",
    [
        ("--start_from", "1", "--stop_after", "4"),
        ("--joint",),
        ("--class_il_argmax", "seen"),
        ("--model", "pnn"),
        ("--n_tasks", "1"),
    ],
)
def test_eval_tasks_seen_with(words):
    argv = ("--model", "er", "--dataset", "seq-synth", "--debug_mode", *words)
    everything, seen = trained(*argv)[0], trained(*argv, "--eval_tasks", "seen")[0]
    for setting, matrix in everything["accuracy"].items():
        expected = [
            [value if "--joint" in words or j <= task else None for j, value in enumerate(row)]
            for task, row in zip(everything["tasks"], matrix, strict=True)
        ]
        assert seen["accuracy"][setting] == expected
    assert seen["untrained"] == {} != everything["untrained"] and seen["tasks"] == everything["tasks"]


def test_eval_tasks_seen_of_a_stream_and_of_domains(mnist, tmp_path, unpictured):
    for number, (words, shape) in enumerate(
        ((("--dataset", "mnist-360"), (1, 1)), (("--dataset", "perm-mnist", "--n_tasks", "3"), (3, 3)))
    ):
        words = ("--model", "er", *words, "--base_path", mnist, "--debug_mode", "--eval_tasks", "seen")
        summary = read(start(tmp_path / str(number), *words))
        (matrix,) = summary["accuracy"].values()
        assert np.array(matrix, float).shape == shape and matrix == below_the_diagonal(matrix)
        assert summary["status"] == "finished" and None not in matrix[-1]


MANY = """
import torch
from flatcl.datasets._benchmark import Benchmark
from flatcl.utils.registry import DATASETS

@DATASETS.register("many-tasks")
class ManyTasks(Benchmark):
    \"\"\"60 tasks of one class: 4 images of 4 pixels.\"\"\"

    num_classes, shape = 60, (1, 2, 2)
    defaults = dict(n_tasks=60, n_epochs=1, batch_size=4, minibatch_size=4, lr=0.1)

    def load(self, root):
        labels = torch.arange(60).repeat(4)
        images = torch.randint(0, 256, (240, 1, 2, 2), generator=torch.Generator().manual_seed(0))
        return (images.to(torch.uint8), labels), (images.to(torch.uint8), labels)
"""


@pytest.fixture
def many(tmp_path):
    file = write_plugin(tmp_path, "many_tasks", MANY)
    return ("--plugin", file, "--model", "er", "--dataset", "many-tasks", "--threads", "1", "--device", "cpu")


def test_of_many_tasks_only_those_seen_are_evaluated_and_that_is_said(many, tmp_path, capsys, unpictured):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = start(tmp_path / "runs", *many)
    out = capsys.readouterr().out
    assert re.search(r"\n  eval_tasks +seen +auto, since there are more than 50 tasks\n", out)
    assert "fwt_gem17" in out and "not measured: only tasks seen" in out
    summary, content = read(folder), read(folder, "accuracy.json")
    assert summary["eval_tasks"] == "seen" and content["accuracy"] == summary["accuracy"]
    assert content["tasks"] == list(range(60)) and content["untrained"] == {}
    for matrix in summary["accuracy"].values():
        assert np.array(matrix, float).shape == (60, 60) and matrix == below_the_diagonal(matrix)
    tags = set(EventAccumulator(str(board_folder(folder)), size_guidance={"scalars": 0}).Reload().Tags()["scalars"])
    assert "accuracy/class-il" in tags and not any("/task_" in tag for tag in tags), "1,000 tasks: 1,000 curves"
    fewer = resolve([*many, "--n_tasks", "30"])
    assert fewer.evaluated == "all" and "eval_tasks" not in describe(fewer)
    assert resolve([*many, "--eval_tasks", "all"]).evaluated == "all"


def test_a_long_matrix_is_not_written_anew_after_each_task_and_nothing_is_lost(many, tmp_path, monkeypatch, unpictured):
    """What is written for a task must not grow with those before it; a run that is killed has its rows all the same."""
    from flatcl.utils.engine import trainer

    whole = start(tmp_path / "whole", *many)
    monkeypatch.setattr(trainer, "WRITING_SHARE", 0.0)  # no time for it after the first task
    write, written = results.RunFolder.write, []
    monkeypatch.setattr(
        results.RunFolder,
        "write",
        lambda self, name, *rest, **how: (written.append(name), write(self, name, *rest, **how)),
    )
    train_task = Trainer._train_task

    def ends(self, task):
        if task.index == 40:
            raise SystemExit
        train_task(self, task)

    monkeypatch.setattr(Trainer, "_train_task", ends)
    with pytest.raises(SystemExit):
        main([*many, "--results_path", str(tmp_path / "part")])
    (file,) = (tmp_path / "part").rglob("config.json")
    part = file.parent
    assert written.count("accuracy.json") == 2, "after the first task and at the end"
    assert len(read(part, "accuracy.json")["tasks"]) == 40 == len(read(part)["accuracy"]["class-il"])
    assert [line["task"] for line in lines_of(part) if "task" in line] == list(range(40))
    (part / "accuracy.json").unlink()  # a killed run had not written it at the end
    monkeypatch.setattr(Trainer, "_train_task", train_task)
    assert main(["--resume", str(part)]) == 0
    assert_same_run(whole, part)


def test_an_interrupted_run_has_its_matrix_whole_whatever_it_had_written(many, tmp_path, interrupt, monkeypatch):
    from flatcl.utils.engine import trainer

    monkeypatch.setattr(trainer, "WRITING_SHARE", 0.0)
    interrupt(7)
    folder = start(tmp_path / "runs", *many, code=143)
    assert read(folder, "accuracy.json")["tasks"] == list(range(6)) and len(read(folder)["accuracy"]["class-il"]) == 6
    (folder / "accuracy.json").write_text("{}")  # as a kill would leave an old one
    interrupt(1)
    assert main(["--resume", str(folder)]) == 143
    assert read(folder, "accuracy.json")["tasks"] == list(range(7))


def test_json_files_have_a_row_on_a_line():
    content = {
        "a": {"x": [[0.5, None], [1 / 3, 1]], "y": []},
        "b": [1, 2],
        "c": [],
        "d": {},
        "e": "a\nb",
        "f": [{"g": 1}],
    }
    text = files.json_text(content)
    assert json.loads(text) == content
    assert text.splitlines()[:5] == ["{", ' "a": {', '  "x": [', "   [0.5, null],", "   [0.3333333333333333, 1]"]
    with pytest.raises(ValueError):
        files.json_text({"a": [float("nan")]})


# repeatability


@pytest.mark.parametrize("model", ["er", "derpp", "mgser_sam"])
def test_one_seed_gives_one_run_whatever_ran_before(model):
    argv = ("--model", model, "--dataset", "seq-synth")
    first = trained(*argv)
    trained("--model", "er_sam", "--dataset", "seq-digits", "--seed", "3", "--debug_mode", "--batch_size", "7")
    torch.rand(5), np.random.rand(5)
    assert identical(trained(*argv), first)


def test_what_is_logged_does_not_change_the_run(tmp_path, unpictured):
    argv = ("--model", "mgser_sam", "--dataset", "seq-synth")
    folder = start(tmp_path, *argv, "--device", "cpu", "--log_every", "1", "--checkpoint_minutes", "1e-9")
    assert read(folder)["accuracy"] == trained(*argv)[0]["accuracy"]
    assert identical(checkpoint.load(folder / "checkpoint")["method"], trained(*argv)[1])


def test_different_seeds_differ_in_weights_data_order_and_accuracy():
    argv = ("--model", "er", "--dataset", "seq-synth", "--augmentation", "0")
    runs = [trained(*argv, "--seed", str(seed)) for seed in range(3)]
    assert len({json.dumps(progress["accuracy"]) for progress, _ in runs}) == 3
    assert len({json.dumps(progress["untrained"]) for progress, _ in runs}) == 3


def test_runs_leave_the_threads_of_their_process_alone():
    torch.set_num_threads(2)
    trained("--model", "sgd", "--dataset", "seq-synth", "--debug_mode", "--threads", "1")
    main(["--model", "sgd", "--dataset", "seq-synth", "--debug_mode", "--disable_log"])
    assert torch.get_num_threads() == 2


# stopping and going on


@pytest.fixture
def interrupt(monkeypatch):
    """Sends this process a signal after a number of steps from now."""
    advance = Logs.advance

    def arm(step, number=signal.SIGTERM):
        done = 0

        def counted(self, images):
            nonlocal done
            done += 1
            advance(self, images)
            if done == step:
                signal.raise_signal(number)

        monkeypatch.setattr(Logs, "advance", counted)

    yield arm
    monkeypatch.setattr(Logs, "advance", advance)


def assert_same_run(a, b):
    """Accuracies, curves, weights, buffer, momentum and generators of two run folders, bit for bit."""
    one, two = read(a), read(b)
    for key in ("status", "metrics", "accuracy", "config_hash"):
        assert one[key] == two[key], key
    assert [one["cost"][key] == two["cost"][key] for key in ("steps", "forward_rows", "backward_rows")] == [True] * 3
    assert timeless(a) == timeless(b)
    assert read(a, "accuracy.json") == read(b, "accuracy.json")
    first, second = checkpoint.load(a / "checkpoint"), checkpoint.load(b / "checkpoint")
    for key in ("method", "optimizer", "order", "random", "progress", "stream"):
        assert identical(first[key], second[key]), key


TWO_EPOCHS = ("--n_epochs", "2", "--stop_after", "3")  # 8 steps an epoch, 16 a task, 48 in all
CASES = [
    pytest.param("er", TWO_EPOCHS, 1, id="er-first-step"),
    pytest.param("er", TWO_EPOCHS, 8, id="er-last-step-of-an-epoch"),
    pytest.param("er", TWO_EPOCHS, 16, id="er-last-step-of-a-task"),
    pytest.param("er", TWO_EPOCHS, 17, id="er-first-step-of-a-task"),
    pytest.param("er", TWO_EPOCHS, 48, id="er-very-last-step"),
    pytest.param("sgd", TWO_EPOCHS, 11, id="sgd-second-epoch"),
    pytest.param("derpp", TWO_EPOCHS, 5, id="derpp-inside-task-1"),
    pytest.param("derpp", TWO_EPOCHS, 29, id="derpp-second-epoch-of-task-2"),
    pytest.param("er", (*TWO_EPOCHS, "--augmentation", "0"), 21, id="er-not-augmented"),
    pytest.param("er", (*TWO_EPOCHS, "--optimizer", "adam"), 21, id="er-adam"),
    pytest.param("er", ("--n_epochs", "2", "--joint"), 50, id="er-joint"),
    pytest.param(
        "gdumb", ("--stop_after", "3", "--fitting_epochs", "4", "--cutmix_alpha", "1", "--optim_mom", "0.9"), 34,
        id="gdumb-in-its-fit",
    ),
    pytest.param("gdumb", ("--stop_after", "3", "--gdumb_sampler", "greedy", "--fitting_epochs", "2"), 20, id="gdumb"),
    pytest.param("pnn", (*TWO_EPOCHS, "--optim_mom", "0.9"), 29, id="pnn-second-column"),
    pytest.param(
        "pnn", ("--backbone", "reduced-resnet18", "--debug_mode", "--stop_after", "2", "--batch_size", "4",
                "--optimizer", "sam"), 7, id="pnn-batchnorm-of-the-second-column",
    ),
    pytest.param("xder", (*TWO_EPOCHS, "--optim_mom", "0.9"), 29, id="xder-second-epoch-of-task-2"),
    pytest.param("xder", (*TWO_EPOCHS, "--optimizer", "sam"), 32, id="xder-last-step-of-a-task"),
    pytest.param(
        "mgser_sam",
        (*TWO_EPOCHS, "--optim_mom", "0.9", "--lr_scheduler", "multistep", "--lr_milestones", "1", "--lr", "0.02"),
        43, id="mgser_sam-last-task-momentum-multistep",
    ),
    pytest.param(
        "mgser_sam", (*TWO_EPOCHS, "--lr_scheduler", "cosine", "--optim_mom", "0.9", "--lr", "0.02"), 13,
        id="mgser_sam-second-epoch-cosine",
    ),
    pytest.param(
        "derpp", ("--backbone", "reduced-resnet18", "--debug_mode", "--stop_after", "2", "--batch_size", "4",
                  "--minibatch_size", "4"), 7, id="derpp-batchnorm",
    ),
    pytest.param("icarl", TWO_EPOCHS, 29, id="icarl"),
    pytest.param("lwf", TWO_EPOCHS, 29, id="lwf"),
    pytest.param("lwf", TWO_EPOCHS, 16, id="lwf-last-step-of-a-task"),
    pytest.param("lwf_mc", TWO_EPOCHS, 29, id="lwf_mc"),
    pytest.param("bic", TWO_EPOCHS, 29, id="bic"),
    pytest.param("lucir", (*TWO_EPOCHS, "--optim_mom", "0.9"), 29, id="lucir"),
    pytest.param("lucir", (*TWO_EPOCHS, "--optimizer", "sam"), 36, id="lucir-task-3"),
    pytest.param(
        "lucir", (*TWO_EPOCHS, "--optimizer", "msam", "--optim_mom", "0.9"), 32, id="lucir-last-step-of-a-task",
    ),
]  # fmt: skip


@pytest.mark.parametrize("model, words, step", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(model, words, step, tmp_path, interrupt, unpictured, capsys):
    argv = ("--model", model, "--dataset", "seq-synth", *words, "--log_every", "3", "--device", "cpu")
    whole = start(tmp_path / "whole", *argv)
    interrupt(step)
    part = start(tmp_path / "part", *argv, code=128 + signal.SIGTERM)
    assert f"--resume {part}" in capsys.readouterr().err
    assert read(part)["status"] == "interrupted" and read(part)["cost"]["batches"] == step
    assert main(["--resume", str(part)]) == 0
    assert_same_run(whole, part)


VARIANTS = [(name, ()) for name in OPTIMIZERS.names()] + [
    ("saf", ("--saf_start", "0", "--saf_lag", "1")),
    ("sparse_sam", ("--sparse_mask", "dynamic")),
    ("mesa", ("--mesa_carry", "1", "--mesa_decay", "0.9")),
    ("sampa", ("--ascent_on", "memory", "--amp", "bf16")),
    ("friendly_sam", ("--sam_from_task", "1", "--perturb", "no_norm_bias")),
]


@pytest.mark.parametrize("optimizer, words", VARIANTS, ids=lambda value: "-".join(value) if value else "")
def test_a_resumed_run_is_the_uninterrupted_one_under_every_optimizer(
    optimizer, words, tmp_path, interrupt, unpictured, capsys
):
    """In the middle of the second of three epochs of the second task."""
    argv = ("--model", "derpp", "--dataset", "seq-synth", "--n_epochs", "3", "--stop_after", "3", "--log_every", "3")
    argv += ("--optimizer", optimizer, *words)
    whole = start(tmp_path / "whole", *argv)
    interrupt(37)
    part = start(tmp_path / "part", *argv, code=128 + signal.SIGTERM)
    assert main(["--resume", str(part)]) == 0
    assert_same_run(whole, part)


@pytest.mark.parametrize("step", range(1, 9))
def test_resuming_anywhere_in_an_epoch_that_is_augmented_in_chunks(step, tmp_path, interrupt, unpictured, monkeypatch):
    """As on larger images, where an epoch does not fit into one call: here chunks of 3, 3 and 2 batches."""
    monkeypatch.setattr(evaluator, "CPU_BYTES", 50 * 4 * 3 * 8 * 8)
    argv = ("--model", "er", "--dataset", "seq-synth", "--stop_after", "2", "--log_every", "1")
    whole = start(tmp_path / "whole", *argv)
    interrupt(step)
    part = start(tmp_path / "part", *argv, code=143)
    assert main(["--resume", str(part)]) == 0
    assert_same_run(whole, part)


def test_the_chunks_of_the_test_above_are_chunks(monkeypatch):
    monkeypatch.setattr(evaluator, "CPU_BYTES", 50 * 4 * 3 * 8 * 8)
    trainer = build_trainer(resolve(["--model", "er", "--dataset", "seq-synth"]), torch.device("cpu"), None)
    _, ends = trainer.stream._plan(trainer.benchmark[0].train)
    chunks = trainer.stream._chunks(ends, (3, 8, 8))
    assert [(chunk.start, chunk.stop) for chunk in chunks] == [(0, 3), (3, 6), (6, 8)]


def test_a_run_that_is_interrupted_again_and_again(tmp_path, interrupt, unpictured):
    argv = ("--model", "derpp", "--dataset", "seq-synth", *TWO_EPOCHS, "--log_every", "1")
    whole = start(tmp_path / "whole", *argv)
    interrupt(7)
    part = start(tmp_path / "part", *argv, code=143)
    for code in (143, 143, 143, 143, 143, 0):
        interrupt(7)
        assert main(["--resume", str(part)]) == code
    assert_same_run(whole, part)


def test_ctrl_c_is_answered_with_a_checkpoint_as_well(tmp_path, interrupt, unpictured):
    argv = ("--model", "er", "--dataset", "seq-synth", "--stop_after", "2")
    interrupt(3, signal.SIGINT)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    folder = start(tmp_path, *argv, code=130)
    assert checkpoint.load(folder / "checkpoint")["cost"]["steps"] == 3
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("step", [1, 10, 19])
def test_a_stream_without_boundaries_resumes(step, mnist, tmp_path, interrupt, unpictured):
    argv = ("--model", "derpp", "--dataset", "mnist-360", "--base_path", mnist, "--log_every", "1", "--lr", "0.02")
    whole = start(tmp_path / "whole", *argv)
    assert read(whole)["cost"]["steps"] == 19
    interrupt(step)
    part = start(tmp_path / "part", *argv, code=143)
    assert main(["--resume", str(part)]) == 0
    assert_same_run(whole, part)


SIGNALLING = """
import signal
from flatcl.models.derpp import DerPP
from flatcl.utils.registry import METHODS

@METHODS.register("told_to_stop")
class ToldToStop(DerPP):
    stop_at = None

    def loss(self, *blocks):
        if self.buffer.num_seen == ToldToStop.stop_at:
            ToldToStop.stop_at = None
            signal.raise_signal(signal.SIGTERM)
        return super().loss(*blocks)
"""


def test_a_signal_in_the_middle_of_a_step_waits_for_its_end(tmp_path, unpictured):
    from flatcl.utils.registry import METHODS

    file = write_plugin(tmp_path, "told_to_stop", SIGNALLING)
    argv = ("--model", "told_to_stop", "--plugin", file, "--dataset", "seq-synth", "--optimizer", "sam", *TWO_EPOCHS)
    whole = start(tmp_path / "whole", *argv, "--log_every", "1")
    METHODS.load("told_to_stop").stop_at = 20 * 16
    part = start(tmp_path / "part", *argv, "--log_every", "1", code=143)
    assert read(part)["cost"]["steps"] == 21
    assert main(["--resume", str(part)]) == 0
    assert_same_run(whole, part)


def test_a_run_that_ended_between_two_tasks_goes_on(tmp_path, monkeypatch, unpictured):
    argv = ("--model", "mgser_sam", "--dataset", "seq-synth", "--optim_mom", "0.9", "--lr", "0.02", "--log_every", "3")
    whole = start(tmp_path / "whole", *argv)
    train_task = Trainer._train_task

    def dies(self, task):
        if task.index == 3:
            raise OSError("pulled the plug")
        train_task(self, task)

    monkeypatch.setattr(Trainer, "_train_task", dies)
    with pytest.raises(OSError, match="pulled the plug"):
        main([*argv, "--results_path", str(tmp_path / "part")])
    monkeypatch.setattr(Trainer, "_train_task", train_task)
    (file,) = (tmp_path / "part").rglob("config.json")
    part = file.parent
    summary = read(part)
    assert summary["status"] == "crashed" and len(summary["accuracy"]["class-il"]) == 3
    assert summary["accuracy"]["class-il"] == read(whole)["accuracy"]["class-il"][:3]
    assert read(part, "accuracy.json")["tasks"] == [0, 1, 2]
    assert [line["task"] for line in lines_of(part) if "task" in line] == [0, 1, 2]
    assert set(summary) == SUMMARY and set(summary["metrics"]["class-il"]) == METRICS
    assert main(["--resume", str(part)]) == 0
    assert_same_run(whole, part)


MORTAL = """
from flatcl.models.er import ER
from flatcl.utils.registry import METHODS

@METHODS.register("mortal")
class Mortal(ER):
    dies_at = None

    def remember(self, batch, loss):
        super().remember(batch, loss)
        if self.buffer.num_seen == Mortal.dies_at:
            raise OSError("pulled the plug")
"""


def test_a_crash_inside_a_task_keeps_the_finished_ones_and_can_be_resumed(tmp_path, unpictured):
    """What was logged after the last checkpoint is written anew, not twice."""
    from flatcl.utils.registry import METHODS

    file = write_plugin(tmp_path, "mortal", MORTAL)
    argv = ("--model", "mortal", "--plugin", file, "--dataset", "seq-synth", "--log_every", "1")
    whole = start(tmp_path / "whole", *argv)
    METHODS.load("mortal").dies_at = 21 * 16
    with pytest.raises(OSError, match="pulled the plug"):
        main([*argv, "--results_path", str(tmp_path / "part")])
    (config,) = (tmp_path / "part").rglob("config.json")
    part = config.parent
    assert read(part)["status"] == "crashed" and len(read(part)["accuracy"]["task-il"]) == 2
    assert read(part)["accuracy"]["task-il"] == read(whole)["accuracy"]["task-il"][:2]
    assert lines_of(part)[-1]["step"] == 20
    METHODS.load("mortal").dies_at = None
    assert main(["--resume", str(part)]) == 0
    assert_same_run(whole, part)


def test_tensorboard_of_a_resumed_run_has_each_point_once(tmp_path, interrupt):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from flatcl.utils.registry import METHODS

    file = write_plugin(tmp_path, "mortal", MORTAL)
    argv = ("--model", "mortal", "--plugin", file, "--dataset", "seq-synth", "--log_every", "1", "--stop_after", "3")
    load_plugin(file)
    METHODS.load("mortal").dies_at = 21 * 16
    with pytest.raises(OSError):
        main([*argv, "--results_path", str(tmp_path)])
    (config,) = tmp_path.rglob("config.json")
    METHODS.load("mortal").dies_at = None
    assert main(["--resume", str(config.parent)]) == 0
    events = EventAccumulator(str(board_folder(config.parent)), size_guidance={"scalars": 0}).Reload()
    assert [point.step for point in events.Scalars("train/loss")] == list(range(1, 25))
    assert [point.step for point in events.Scalars("accuracy/class-il/task_03")] == [1, 2, 3]


def test_a_crash_before_the_first_task_ends_leaves_a_readable_summary(tmp_path, unpictured):
    from flatcl.utils.registry import METHODS

    file = write_plugin(tmp_path, "mortal", MORTAL)
    load_plugin(file)
    METHODS.load("mortal").dies_at = 3 * 16
    with pytest.raises(OSError, match="pulled the plug"):
        main(["--model", "mortal", "--dataset", "seq-synth", "--results_path", str(tmp_path)])
    (summary,) = tmp_path.rglob("summary.json")
    assert read(summary.parent)["status"] == "crashed" and read(summary.parent)["accuracy"] == {}


def refused(capsys, *argv):
    capsys.readouterr()
    assert main(list(argv)) == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith("note: plugin ")]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_a_run_without_checkpoint_cannot_be_resumed(tmp_path, capsys, unpictured):
    folder = start(tmp_path, "--model", "sgd", "--dataset", "seq-synth", "--debug_mode", "--n_tasks", "1")
    (folder / "checkpoint" / "state.pt").unlink()
    assert "--from" in refused(capsys, "--resume", str(folder))


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "half", "keys"])
def test_a_damaged_checkpoint_is_named(damage, tmp_path, capsys, interrupt, unpictured):
    interrupt(3)
    folder = start(tmp_path, "--model", "er", "--dataset", "seq-synth", "--debug_mode", "--n_tasks", "2", code=143)
    file = folder / "checkpoint" / "state.pt"
    (folder / "checkpoint" / "state.before.pt").unlink()
    content = file.read_bytes()
    if damage == "keys":
        torch.save({"method": {}}, file)
    else:
        file.write_bytes(
            {"cut": content[:-200], "empty": b"", "foreign": b"hello", "half": content[: len(content) // 2]}[damage]
        )
    before = {path: path.read_bytes() for path in folder.glob("*.json*")}
    line = refused(capsys, "--resume", str(folder))
    assert str(file) in line and "--from" in line
    assert before == {path: path.read_bytes() for path in folder.glob("*.json*")}


def test_a_checkpoint_of_another_network_is_named(tmp_path, capsys, interrupt, unpictured):
    interrupt(3)
    folder = start(tmp_path, "--model", "er", "--dataset", "seq-synth", "--debug_mode", "--n_tasks", "2", code=143)
    content = read(folder, "config.json")
    content["flags"]["hidden"]["value"] = 50
    (folder / "config.json").write_text(json.dumps(content))
    assert "state.pt" in refused(capsys, "--resume", str(folder))


def test_resume_changes_nothing_that_could_change_a_number(tmp_path, capsys, interrupt, unpictured):
    interrupt(3)
    argv = ("--model", "er", "--dataset", "seq-synth", "--debug_mode", "--stop_after", "1")
    folder = start(tmp_path, *argv, code=143)
    for words in (("--lr", "0.2"), ("--seed", "0"), ("--threads", "2"), ("--results_path", "x"), ("--disable_log",)):
        assert f"{words[0]} cannot be changed" in refused(capsys, "--resume", str(folder), *words)
    assert main(["--resume", str(folder), "--non_verbose", "--device", "cpu"]) == 0


def test_a_run_without_folder_can_be_interrupted(interrupt, capsys):
    interrupt(2)
    assert main(["--model", "er", "--dataset", "seq-synth", "--disable_log"]) == 143
    assert "interrupted at step 2" in capsys.readouterr().err


# runs that fail


@pytest.mark.parametrize("words", [("--log_every", "1"), ()], ids=["logged-often", "logged-never"])
def test_a_run_that_diverges_says_so(words, tmp_path, capsys, unpictured):
    """However seldom it logs: 40 steps are fewer than --log_every. No step of the second task can be taken."""
    folder = start(tmp_path, "--model", "er", "--dataset", "seq-synth", "--lr", "1e6", *words, code=1)
    err = capsys.readouterr().err
    assert re.match(r"failed: the loss or the update was not finite in \d+ steps in a row", err) and "--lr" in err
    assert len(err.splitlines()) == 1
    assert read(folder)["status"] == "diverged" and set(read(folder)) == SUMMARY
    assert read(folder)["cost"]["skipped_steps"] >= 8


def test_a_run_that_diverges_in_its_second_task_keeps_what_it_had(tmp_path, capsys, unpictured):
    text = (
        "from flatcl.models.er import ER\nfrom flatcl.models._method import Loss\n"
        "from flatcl.utils.registry import METHODS\n"
        "@METHODS.register('late')\nclass Late(ER):\n    def loss(self, joint):\n        loss = super().loss(joint)\n"
        "        bad = float('nan') if self.buffer.num_seen > 12 * 16 else 1.0\n"
        "        return Loss({name: rows * bad for name, rows in loss.rows.items()})\n"
    )
    file = write_plugin(tmp_path, "late", text)
    argv = ("--model", "late", "--plugin", file, "--dataset", "seq-synth", "--log_every", "1")
    summary = read(start(tmp_path / "out", *argv, code=1))
    assert summary["status"] == "diverged" and len(summary["accuracy"]["class-il"]) == 2
    assert summary["cost"]["skipped_steps"] == 11 and summary["cost"]["steps"] == 24
    assert "in 11 steps in a row (step 24)" in capsys.readouterr().err


def test_a_run_that_cannot_be_built_leaves_no_folder(tmp_path):
    text = (
        "from flatcl.models.er import ER\nfrom flatcl.utils.registry import METHODS\n@METHODS.register('unbuilt')\n"
        "class Unbuilt(ER):\n    def __init__(self, *args):\n        raise RuntimeError('a mistake in a plugin')\n"
    )
    argv = ["--model", "unbuilt", "--plugin", write_plugin(tmp_path, "unbuilt", text), "--dataset", "seq-synth"]
    with pytest.raises(RuntimeError, match="a mistake in a plugin"):
        main([*argv, "--results_path", str(tmp_path / "out")])
    assert not list((tmp_path / "out").rglob("config.json"))


# offline

OFFLINE = """
import importlib, socket, sys

class Refused(socket.socket):
    def __new__(cls, *args, **kwargs):
        raise AssertionError("opened a socket")

def refuse(*args, **kwargs):
    raise AssertionError("asked for an address")

socket.socket, socket.create_connection, socket.getaddrinfo = Refused, refuse, refuse
from flatcl.utils.commands.train import main
assert main(["--list"]) == 0
for module in MODULES:
    importlib.import_module(module)
assert main(["--model", "mgser_sam", "--dataset", "seq-synth", "--debug_mode", "--results_path", sys.argv[1]]) == 0
try:
    socket.socket()
except AssertionError:
    print("offline to the end")
"""


def test_nothing_opens_a_socket(tmp_path):
    """Importing every module, listing, and a whole run."""
    modules = [module.name for module in pkgutil.walk_packages(flatcl.__path__, "flatcl.")]
    assert {"flatcl.models.er", "flatcl.utils.engine.trainer", "flatcl.__main__"} < set(modules)
    code = f"MODULES = {modules}\n{OFFLINE}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "offline to the end"


# equal compute, reduced precision, steps that are not taken


def build(*argv):
    """A trainer that writes nothing."""
    return build_trainer(
        resolve([*argv, "--disable_log", "--non_verbose", "--device", "cpu"]), torch.device("cpu"), None
    )


BUDGET = ("--model", "derpp", "--dataset", "seq-synth", "--budget_rows", "30000")


def compute(cost):
    return cost["forward_rows"] + 2 * cost["backward_rows"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
def test_a_budget_is_spent_to_the_step_and_evenly_by_the_tasks(optimizer, capsys):
    trainer = build(*BUDGET, "--optimizer", optimizer)
    spent, steps = [], []
    finish = trainer._finish_task

    def note(task):
        spent.append(compute(vars(trainer.cost)))
        steps.append(trainer.cost.steps)
        finish(task)

    trainer._finish_task = note
    cost = trainer.run()["cost"]
    dearest = 3 * 4 * 3 * 16  # rows of a step x 4 passes, counted as forward and twice as backward
    for number, value in enumerate(spent, start=1):
        assert 0 <= value - 6000 * number < 2 * dearest
    assert len(spent) == 5 and compute(cost) == spent[-1]
    assert all(b > a for a, b in zip(steps, steps[1:], strict=False))


def test_joint_training_on_a_stream_spends_its_budget(mnist, capsys):
    """It is shuffled like any data set, and not a stream that passes once."""
    cost = build("--model", "joint", "--dataset", "mnist-360", "--base_path", str(mnist), "--budget_rows", "5000")
    assert 0 <= compute(cost.run()["cost"]) - 5000 < 3 * 16


def test_forward_transfer_is_not_defined_where_later_tasks_do_not_compete(capsys):
    argv = ("--model", "er", "--dataset", "seq-synth", "--debug_mode", "--class_il_argmax", "seen")
    found = build(*argv).run()["metrics"]
    assert found["class-il"]["fwt_gem17"] is None and found["task-il"]["fwt_gem17"] is not None


def test_what_is_cheaper_gets_more_steps_for_the_same_budget(capsys):
    steps = {name: build(*BUDGET, "--optimizer", name).run()["cost"]["steps"] for name in ("sgd", "sam", "c_flat")}
    assert steps["sgd"] / steps["sam"] == pytest.approx(2, rel=0.1)
    assert steps["sam"] / steps["c_flat"] == pytest.approx(2, rel=0.1)


def test_a_budget_too_small_for_a_step_still_gives_each_task_one(capsys):
    assert build(*BUDGET[:-1], "1").run()["cost"]["steps"] == 5


@pytest.mark.parametrize("step", (1, 9, 14, 15, 16, 17, 28, 29, 30, 31))
def test_a_run_with_a_budget_resumes(step, tmp_path, interrupt, unpictured):
    """Also where a task's share has just been spent, in its first or a later epoch: a task has 8 batches."""
    argv = (*BUDGET, "--optimizer", "sampa")
    whole = read(start(tmp_path / "whole", *argv))
    interrupt(step)
    folder = start(tmp_path / "cut", *argv, code=143)
    assert main(["--resume", str(folder)]) == 0
    resumed = read(folder)
    assert resumed["accuracy"] == whole["accuracy"]
    assert resumed["cost"]["steps"] == whole["cost"]["steps"] and compute(resumed["cost"]) == compute(whole["cost"])


def test_a_stream_passes_once_whatever_the_budget(mnist, capsys):
    argv = ("--model", "er", "--dataset", "mnist-360", "--base_path", str(mnist))
    whole = build(*argv).run()["cost"]["steps"]
    assert build(*argv, "--budget_rows", "100000000").run()["cost"]["steps"] == whole
    assert build(*argv, "--budget_rows", "600").run()["cost"]["steps"] < whole


@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
def test_every_optimizer_learns_in_bfloat16_nearly_as_in_float32(optimizer, capsys):
    """Weights, gradients and what is remembered stay in float32."""
    argv = ("--model", "derpp", "--dataset", "seq-synth", "--stop_after", "2", "--optimizer", optimizer)
    full, half = build(*argv), build(*argv, "--amp", "bf16")
    accuracies = [trainer.run()["metrics"]["task-il"]["final_average_accuracy"] for trainer in (full, half)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.15)
    tensors = [*half.method.state_dict()["_extra_state"]["columns"].values(), *half.optimizer.params]
    tensors += [entry for entries in half.optimizer.state.values() for entry in entries]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
    assert half.method.buffer.all()["logits"].isfinite().all()
    weights = [torch.cat([p.flatten() for p in trainer.optimizer.params]) for trainer in (full, half)]
    assert not torch.equal(*weights)
    assert (weights[0] - weights[1]).norm() < 0.2 * weights[0].norm()


def test_skipped_steps_are_counted_and_reported(tmp_path, capsys, unpictured):
    text = (
        "from flatcl.models.er import ER\nfrom flatcl.models._method import Loss\n"
        "from flatcl.utils.registry import METHODS\n"
        "@METHODS.register('moody')\nclass Moody(ER):\n    calls = 0\n"
        "    def draw(self, batch):\n        self.calls += 1\n        return super().draw(batch)\n"
        "    def loss(self, joint):\n        bad = float('nan') if self.calls % 5 == 0 else 1.0\n"
        "        return Loss({name: rows * bad for name, rows in super().loss(joint).rows.items()})\n"
    )
    argv = ("--model", "moody", "--plugin", write_plugin(tmp_path, "moody", text), "--dataset", "seq-synth")
    folder = start(tmp_path / "out", *argv, "--log_every", "1", "--optimizer", "sam")
    summary = read(folder)
    assert summary["status"] == "finished" and summary["cost"]["skipped_steps"] == 8 == summary["cost"]["steps"] // 5
    assert "8 steps were not taken" in capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [line for line in lines if "train/loss" in line]
    assert [line["train/loss"] is None for line in curve] == [(n + 1) % 5 == 0 for n in range(40)]
    assert curve[-1]["train/skipped_steps"] == 8
