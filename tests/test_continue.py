"""A run as the start of another: `--from RUN --continue 1`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from made import make_mnist

from flatcl.utils.arguments import resolve
from flatcl.utils.commands import sweep
from flatcl.utils.commands.train import main
from flatcl.utils.engine import checkpoint

BASE = ("--dataset", "seq-synth", "--non_verbose", "--log_every", "5")


@pytest.fixture(autouse=True)
def unpictured(monkeypatch):
    monkeypatch.setattr("flatcl.utils.engine.logs.Logs.finish", lambda *args, **options: [])


def start(tmp_path, *words, code=0):
    """A run's folder."""
    before = {*tmp_path.rglob("config.json")}
    assert main([*words, "--results_path", str(tmp_path / "results"), "--non_verbose"]) == code
    (file,) = {*tmp_path.rglob("config.json")} - before
    return file.parent


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def refused(capsys, *words):
    capsys.readouterr()
    assert main([*words]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize("model", ["er", "mgser_sam", "lucir", "pnn", "si"])
def test_tasks_trained_in_two_runs_are_those_of_one(model, tmp_path, assert_same):
    whole = start(tmp_path / "whole", "--model", model, *BASE, "--stop_after", "3")
    first = start(tmp_path / "first", "--model", model, *BASE, "--stop_after", "2")
    second = start(tmp_path / "second", "--from", str(first), "--continue", "1", "--stop_after", "3")
    assert read(second, "accuracy") == read(whole, "accuracy")
    states = [checkpoint.load(folder / "checkpoint") for folder in (whole, second)]
    for name in ("method", "optimizer", "random", "order"):
        assert_same(states[0][name], states[1][name])
    assert states[1]["cost"]["steps"] == states[0]["cost"]["steps"]
    assert read(second, "summary")["cost"]["wall_s"] > read(first, "summary")["cost"]["wall_s"]
    lines = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines if "task" in line] == [2]  # its own alone


def test_a_continued_run_says_so_and_is_no_other_run(tmp_path, capsys):
    first = start(tmp_path, "--model", "er", *BASE, "--stop_after", "1")
    again = ["--from", str(first), "--continue", "1", "--stop_after", "2", "--lr", "0.01"]
    second = start(tmp_path, *again)
    assert f"continues {first} after 1 task(s)" in capsys.readouterr().out
    config = read(second, "config")
    parent = config["continues"]
    assert parent["run"] == str(first) and parent["tasks"] == 1
    assert parent["config_hash"] == read(first, "config")["config_hash"] and parent["code"]["models/er.py"]
    plain = ["--model", "er", *BASE, "--stop_after", "2", "--lr", "0.01"]
    assert len({resolve(plain).hash, config["config_hash"], parent["config_hash"]}) == 3
    assert resolve(again).hash == config["config_hash"]
    assert resolve(["--from", str(second)]).hash == config["config_hash"]  # repeats it, from the same start
    third = start(tmp_path, "--from", str(second), "--continue", "1", "--stop_after", "3")
    assert read(third, "config")["continues"]["tasks"] == 2
    assert len(read(third, "accuracy")["accuracy"]["class-il"]) == 3


def test_a_sweep_does_not_take_a_continued_run_for_one_from_the_start(tmp_path):
    first = start(tmp_path, "--model", "er", *BASE, "--stop_after", "1")
    words = ["--from", str(first), "--continue", "1", "--stop_after", "2"]
    start(tmp_path, *words)
    plain = ["--model", "er", *BASE, "--stop_after", "2"]

    def found(argv):
        argv = [*argv, "--results_path", str(tmp_path / "results")]
        job = sweep.Job({}, tuple(argv), resolve(argv))
        return job.hash in sweep.look([job]).done

    assert found(words) and not found(plain)
    start(tmp_path, *plain)
    assert found(plain)


def test_another_optimizer_begins_anew(tmp_path):
    first = start(tmp_path, "--model", "er", *BASE, "--stop_after", "1", "--optim_mom", "0.9")
    second = start(tmp_path, "--from", str(first), "--continue", "--stop_after", "2", "--optimizer", "gsam")
    assert read(second, "config")["flags"]["optimizer"]["value"] == "gsam"
    state = checkpoint.load(second / "checkpoint")
    assert set(state["optimizer"]["names"]) and len(state["progress"]["tasks"]) == 2


def test_another_optimizer_takes_over_weights_and_counts(tmp_path):
    """MESA averages from the weights that it is given, not from those that were drawn; skipped steps count."""
    from flatcl.utils.engine.build import build

    first = start(tmp_path, "--model", "er", *BASE, "--stop_after", "1")
    state = checkpoint.load(first / "checkpoint")
    state["cost"]["skipped_steps"] = 7
    words = ["--optimizer", "mesa", "--mesa_carry", "1", "--stop_after", "2", "--disable_log"]
    config = resolve(["--from", str(first), "--continue", "1", *words])
    trainer = build(config, torch.device("cpu"), None, None, is_new=False)
    trainer.continue_from(state, same_optimizer=False)
    trainer.optimizer.begin_task(trainer.benchmark[1])
    pairs = zip(trainer.optimizer.teacher.parameters(), trainer.method.net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    trainer._check_skips()
    assert trainer.cost.skipped_steps == 7


def test_a_continued_run_has_its_own_page_of_charts(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = start(tmp_path, "--model", "er", *BASE, "--stop_after", "1")
    second = start(tmp_path, "--from", str(first), "--continue", "1", "--stop_after", "2")
    (board,) = (second / "tensorboard").iterdir()
    assert "custom_scalars__config__" in EventAccumulator(str(board)).Reload().Tags()["tensors"]


def test_a_run_that_continues_another_is_repeated_as_such(tmp_path, capsys):
    first = start(tmp_path, "--model", "er", *BASE, "--stop_after", "1", "--debug_mode")
    second = start(tmp_path, "--from", str(first), "--continue", "1", "--stop_after", "2")
    for flag, value in (("--seed", "5"), ("--permute_classes", "1"), ("--validation", "1"), ("--model", "derpp")):
        assert f"{flag} must be " in refused(capsys, "--from", str(second), flag, value)
    assert resolve(["--from", str(second), "--lr", "0.5"]).continues.config_hash == read(first, "config")["config_hash"]


@pytest.mark.filterwarnings("ignore:.*not the official data set")
def test_a_parent_on_other_data_is_said(tmp_path, capsys):
    words = ["--model", "er", "--dataset", "seq-mnist", "--debug_mode", "--base_path", str(tmp_path)]
    make_mnist(tmp_path)
    first = start(tmp_path, *words, "--stop_after", "1")
    start(tmp_path, "--from", str(first), "--continue", "1", "--stop_after", "2")
    assert "note: " not in capsys.readouterr().err
    make_mnist(tmp_path, seed=1)
    start(tmp_path, "--from", str(first), "--continue", "1", "--stop_after", "3")
    assert f"note: {first} was made with other data of seq-mnist" in capsys.readouterr().err


def test_what_learns_at_the_end_is_not_continued(tmp_path, capsys):
    flags = ["--model", "gdumb", "--dataset", "seq-synth", "--buffer_size", "20", "--fitting_epochs", "1"]
    first = start(tmp_path, *flags, "--stop_after", "1", "--non_verbose")
    words = ("--from", str(first), "--continue", "1", "--stop_after", "2")
    assert "gdumb learns only at the end of a run, from new weights, so there is nothing to" in refused(capsys, *words)


def test_a_continued_run_resumes(tmp_path, monkeypatch):
    from flatcl.utils.engine.trainer import Trainer

    first = start(tmp_path, "--model", "derpp", *BASE, "--stop_after", "1")
    words = ["--from", str(first), "--continue", "1", "--stop_after", "2"]
    whole = start(tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_checkpoint_is_due", lambda self: setattr(self, "_stop_signal", 15))
        second = start(tmp_path, *words, code=143)
    assert main(["--resume", str(second), "--non_verbose"]) == 0
    assert read(second, "accuracy") == read(whole, "accuracy")
    assert main([*words, "--resume", "auto", "--results_path", str(tmp_path / "results")]) == 0


def test_a_continued_run_that_was_killed_before_its_first_checkpoint_starts_where_its_parent_ended(
    tmp_path, monkeypatch
):
    from flatcl.utils.engine.trainer import Trainer

    first = start(tmp_path, "--model", "er", *BASE, "--stop_after", "1")
    words = ["--from", str(first), "--continue", "1", "--stop_after", "2"]
    whole = start(tmp_path / "whole", *words)
    second = start(tmp_path, *words)
    for path in (second / "checkpoint", second / "accuracy.json", second / "summary.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    trained = []
    monkeypatch.setattr(Trainer, "_train_task", lambda self, task, train=Trainer._train_task: (
        trained.append(task.index), train(self, task)))  # fmt: skip
    assert main(["--resume", str(second), "--non_verbose"]) == 0
    assert trained == [1] and read(second, "accuracy") == read(whole, "accuracy")


def test_a_parent_of_other_code_is_said(tmp_path, capsys):
    first = start(tmp_path, "--model", "er", *BASE, "--stop_after", "1", "--debug_mode")
    content = read(first, "config")
    content["code"]["models/er.py"] = "0" * 16
    (first / "config.json").write_text(json.dumps(content))
    words = ["--from", str(first), "--continue", "1", "--stop_after", "2"]
    second = start(tmp_path, *words)
    assert f"note: {first} was made by other code or data: models/er.py changed since" in capsys.readouterr().err
    job = sweep.Job({}, (), resolve([*words, "--results_path", str(tmp_path / "results")]))
    assert sweep.look([job]).done  # as it would be made now: from the same start
    content["code"]["models/er.py"] = "1" * 16
    (first / "config.json").write_text(json.dumps(content))
    job = sweep.Job({}, (), resolve([*words, "--results_path", str(tmp_path / "results")]))
    assert sweep.look([job]).changed == {job.hash: ["models/er.py"]} and second.is_dir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stop_after", "1"], "1 task(s) of"),
        (
            ["--stop_after", "2", "--buffer_size", "50"],
            "--buffer_size must be 100, as in the run that is continued, got 50",
        ),
        (["--stop_after", "2", "--seed", "1"], "--seed must be 0, as in the run that is continued, got 1"),
        (["--stop_after", "2", "--model", "derpp"], "--model must be er, as in the run that is continued, got derpp"),
        (["--stop_after", "2", "--dataset", "seq-digits"], "--dataset must be seq_synth, as in the run"),
        (["--stop_after", "2", "--hidden", "7"], "--hidden must be 100, as in the run that is continued, got 7"),
        (
            ["--stop_after", "2", "--debug_mode", "0", "--budget_rows", "5000"],
            "--budget_rows cannot be used with --continue",
        ),
        (
            ["--stop_after", "2", "--permute_classes", "1"],
            "--permute_classes must be False, as in the run that is continued, got True",
        ),
    ],
)
def test_what_cannot_be_continued_is_said_before_any_work(words, message, tmp_path, capsys):
    first = start(tmp_path, "--model", "er", *BASE, "--stop_after", "1", "--debug_mode")
    before = [*tmp_path.rglob("config.json")]
    assert message in refused(capsys, "--from", str(first), "--continue", "1", *words)
    assert [*tmp_path.rglob("config.json")] == before


def test_runs_that_are_not_finished_or_have_nothing_to_go_on_from(tmp_path, capsys, monkeypatch):
    from flatcl.utils.engine.trainer import Trainer

    assert "Name that run by --from" in refused(capsys, "--model", "er", *BASE, "--continue", "1")
    light = start(tmp_path, "--model", "er", *BASE, "--stop_after", "1", "--keep_checkpoint", "0")
    assert torch.load(light / "model.pt", weights_only=True)
    assert "has no checkpoint" in refused(capsys, "--from", str(light), "--continue", "1", "--stop_after", "2")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_checkpoint_is_due", lambda self: setattr(self, "_stop_signal", 15))
        none = start(tmp_path, "--model", "er", *BASE, code=143)
    assert "has finished no task" in refused(capsys, "--from", str(none), "--continue", "1")
    joint = start(tmp_path, "--model", "joint", *BASE, "--debug_mode")
    assert "a joint run has trained all tasks" in refused(capsys, "--from", str(joint), "--continue", "1")


def test_a_run_that_was_stopped_inside_a_task_is_to_be_finished_first(tmp_path, capsys, monkeypatch):
    from flatcl.utils.engine.trainer import Trainer

    def stop(self):
        if len(self.progress.tasks) == 1:
            self._stop_signal = 15

    monkeypatch.setattr(Trainer, "_checkpoint_is_due", stop)
    folder = start(tmp_path, "--model", "er", *BASE, "--stop_after", "2", code=143)
    error = refused(capsys, "--from", str(folder), "--continue", "1", "--stop_after", "3")
    assert "was stopped inside a task, or was continued since then. Finish it by --resume." in error


def test_a_parent_that_is_gone_is_named(tmp_path, capsys):
    first = start(tmp_path, "--model", "er", *BASE, "--stop_after", "1", "--debug_mode")
    second = start(tmp_path, "--from", str(first), "--continue", "1", "--stop_after", "2")
    first.rename(tmp_path / "moved")
    assert main(["--resume", str(second)]) == 0  # finished: nothing to be done
    assert f"{first} has no checkpoint" in refused(capsys, "--from", str(second))
    assert Path(read(second, "config")["continues"]["run"]) == first
