"""--log_to: Weights & Biases and MLflow get a run's curves, flags and pictures, both without a network; a tracker that
fails costs no run; a resumed run goes on in the same run of the tracker."""

import json
import signal
import struct
import sys
from types import SimpleNamespace

import pytest

from flatcl.utils.arguments import resolve
from flatcl.utils.commands.train import main
from flatcl.utils.engine import trackers
from flatcl.utils.engine.labels import run_name
from flatcl.utils.engine.logs import Logs

ARGV = ("--model", "er", "--dataset", "seq-synth", "--stop_after", "2", "--log_every", "2", "--threads", "1",
        "--device", "cpu", "--non_verbose", "1", "--notes", "two words")  # fmt: skip
STEPS = 16  # of two tasks of 128 images, 16 at once


def run_of(folder, *words, code=0):
    before = set(folder.rglob("config.json"))
    assert main([*ARGV, *words, "--results_path", str(folder)]) == code
    (file,) = set(folder.rglob("config.json")) - before
    return file.parent


def stopped_and_resumed(folder, name):
    """The folder of a run that a signal has stopped after 11 steps, and that was resumed; and its ids then and now."""
    with pytest.MonkeyPatch.context() as patch:
        advance, done = Logs.advance, []

        def counted(self, images):
            advance(self, images)
            done.append(images)
            if len(done) == 11:
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(Logs, "advance", counted)
        run = run_of(folder, "--log_to", name, code=143)
    first = json.loads((run / "tracker.json").read_text())
    assert main(["--resume", str(run)]) == 0
    return run, first, json.loads((run / "tracker.json").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("plain"))


def lines_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("_per_s")} for line in lines]


def assert_same_numbers(run, plain):
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (run, plain))
    assert one["accuracy"] == other["accuracy"] and one["config_hash"] == other["config_hash"]
    assert lines_of(run) == lines_of(plain)


# Weights & Biases


def records(file):
    """What an offline run would send. The file is a log of protobuf records in blocks of 32 KiB, each with a header of
    checksum, length and kind (1: whole, 2 to 4: first, middle and last part)."""
    from wandb.proto import wandb_internal_pb2

    content, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        if kind == 0 or 32768 - at % 32768 < 7:  # the rest of a block
            at += 32768 - at % 32768
            continue
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(part)
            part = b""


def history(found):
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for record in found if record.WhichOneof("record_type") == "history"]  # fmt: skip


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    pytest.importorskip("wandb", reason="the extra 'wandb' is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.delenv("WANDB_PROJECT", raising=False)
        yield stopped_and_resumed(tmp_path_factory.mktemp("wandb"), "wandb")


def test_wandb_has_the_curves_the_flags_and_the_pictures(offline, plain):
    run, _, ids = offline
    assert_same_numbers(run, plain)
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    parts = [list(records(file)) for file in files]
    assert len(files) == 2, "what a resumed run adds offline lies beside the first part, under the same id"
    for part, ended in zip(parts, (1, 0), strict=True):
        (begun,) = [record.run for record in part if record.WhichOneof("record_type") == "run"]
        assert begun.run_id == ids["wandb"] and begun.project == "flatcl" and begun.notes == "two words"
        assert begun.display_name == run_name(resolve(ARGV))
        given = {item.key: json.loads(item.value_json) for item in begun.config.update}
        assert given["model"] == "er" and given["lr"] == 0.05 and "results_path" not in given
        assert [record.exit.exit_code for record in part if record.WhichOneof("record_type") == "exit"] == [ended]
    points = [point for part in parts for point in history(part)]
    losses = {point["step"]: point["train/loss"] for point in points if "train/loss" in point}
    assert losses == {line["step"]: line["train/loss"] for line in lines_of(run) if "train/loss" in line}
    assert sorted(losses) == list(range(2, STEPS + 1, 2))
    tasks = {point["task"]: point["accuracy/class-il"] for point in points if "accuracy/class-il" in point}
    averages = [line["average_accuracy"]["class-il"] for line in lines_of(run) if "task" in line]
    assert [tasks[1], tasks[2]] == averages
    summary = json.loads((run / "summary.json").read_text())
    (final,) = [point for point in points if "cost/steps" in point]
    assert final["metrics/class-il/final_average_accuracy"] == averages[-1] and final["cost/steps"] == STEPS
    assert final["metrics/task-il/bwt_gem17"] == summary["metrics"]["task-il"]["bwt_gem17"]
    pictures = {key for point in points for key in point if key.endswith("/path")}
    assert pictures == {f"{name}{end}/path" for name in ("accuracy_matrix", "curves") for end in ("", "_task-il")}


def test_wandb_goes_on_with_the_same_run(offline):
    _, first, ids = offline
    assert first == ids and set(ids) == {"wandb"}


# MLflow


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A client of a new SQLite store."""
    mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    pytest.importorskip("sqlalchemy", reason="MLflow's local store needs sqlalchemy")
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'runs.db'}")
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
        yield mlflow.MlflowClient()


@pytest.fixture(scope="module")
def tracked(store, tmp_path_factory):
    return stopped_and_resumed(tmp_path_factory.mktemp("runs"), "mlflow")


def test_mlflow_has_the_curves_the_flags_and_the_pictures(store, tracked, plain):
    run, first, ids = tracked
    assert first == ids and set(ids) == {"mlflow"}
    assert_same_numbers(run, plain)
    (found,) = store.search_runs([store.get_experiment_by_name("ours").experiment_id])
    assert found.info.run_id == ids["mlflow"] and found.info.status == "FINISHED"
    assert found.info.run_name == run_name(resolve(ARGV))
    assert found.data.tags["status"] == "finished" and found.data.tags["mlflow.note.content"] == "two words"
    assert found.data.params["model"] == "er" and found.data.params["lr"] == "0.05"
    assert "base_path" not in found.data.params
    losses = {metric.step: metric.value for metric in store.get_metric_history(ids["mlflow"], "train/loss")}
    assert losses == {line["step"]: line["train/loss"] for line in lines_of(run) if "train/loss" in line}
    points = store.get_metric_history(ids["mlflow"], "accuracy/class-il")
    averages = [line["average_accuracy"]["class-il"] for line in lines_of(run) if "task" in line]
    assert [(point.step, point.value) for point in points] == [(1, averages[0]), (2, averages[1])]
    assert found.data.metrics["metrics/class-il/final_average_accuracy"] == averages[-1]
    assert found.data.metrics["cost/steps"] == STEPS
    names = {artifact.path for artifact in store.list_artifacts(ids["mlflow"])}
    assert names == {f"{name}{end}.png" for name in ("accuracy_matrix", "curves") for end in ("", "_task-il")}


def test_a_store_that_cannot_be_reached_costs_no_run(store, plain, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nosuch://nowhere")
    run = run_of(tmp_path, "--log_to", "mlflow")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("warning: --log_to mlflow failed (")
    assert lines[0].endswith("the run continues without it")
    assert_same_numbers(run, plain)
    assert not (run / "tracker.json").exists()


# any tracker


class Failing(trackers.Tracker):
    """A tracker whose second point cannot be sent."""

    name = "failing"

    def _start(self, known):
        self.sent = []
        return known or "id"

    def _send(self, values, axis, step):
        if self.sent:
            raise RuntimeError("no\nconnection")
        self.sent.append((values, axis, step))


def test_after_a_failure_nothing_more_is_sent_and_one_warning_is_said(tmp_path, capsys):
    folder = SimpleNamespace(path=tmp_path, write=lambda name, content: None)
    tracker = Failing(SimpleNamespace(), folder)
    tracker.scalar("a", 0.5, 1)
    tracker.flush()  # it has not begun
    tracker.begin()
    tracker.scalar("a", 1.0, 5)
    tracker.scalar("b", 2.0, 5)
    tracker.scalar("c", 3.0, 1, "task")  # a point on another axis
    tracker.scalar("a", 4.0, 6)
    tracker.image("picture", None)
    tracker.close("finished")
    assert tracker.sent == [({"a": 1.0, "b": 2.0}, "step", 5)]
    assert capsys.readouterr().err == "warning: --log_to failing failed (no): the run continues without it\n"


@pytest.mark.parametrize("content", ['{"failing": "known", "other": 1}', "[1]", "", '"text"', "3"])
def test_the_id_is_read_from_the_run_folder(content, tmp_path):
    (tmp_path / "tracker.json").write_text(content)
    written = {}
    folder = SimpleNamespace(path=tmp_path, write=lambda name, ids: written.update(ids))
    Failing(SimpleNamespace(), folder).begin()
    assert written["failing"] == ("known" if "known" in content else "id")


@pytest.mark.parametrize("name", sorted(trackers.TRACKERS))
def test_without_the_package_one_message_comes_before_any_work(name, plain, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert main([*ARGV, "--log_to", name, "--results_path", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --log_to {name} needs the package {name}, which is not installed.")
    assert f'pip install "flatcl[{name}]"' in line and not list(tmp_path.iterdir())
    assert main(["--resume", str(plain), "--log_to", name]) == 0, "a finished run needs none"


def test_a_wrong_name_and_no_run_folder_are_refused(capsys):
    assert main([*ARGV, "--log_to", "wanb"]) == 2
    assert "wandb" in capsys.readouterr().err
    assert main([*ARGV, "--log_to", "wandb", "--disable_log"]) == 2
    assert "--disable_log exclude each other" in capsys.readouterr().err
