"""Flags that every method takes: clipping, warm-up, early stopping, evaluation inside a task, kept predictions."""

import json
import shutil

import numpy as np
import pytest
import torch
from made import make_mnist
from PIL import Image

import flatcl
from flatcl.utils.arguments import resolve
from flatcl.utils.contracts._tape import Tape
from flatcl.utils.engine import predictions, seeding
from flatcl.utils.engine.board import entries
from flatcl.utils.engine.early_stop import EarlyStop
from flatcl.utils.engine.evaluator import Evaluator
from flatcl.utils.engine.program import Programs
from flatcl.utils.errors import Interrupted, UsageError
from flatcl.utils.optim._driver import norm

FLAGS = dict(model="er", dataset="seq-synth", device="cpu", non_verbose=True, n_epochs=4, stop_after=2)


@pytest.fixture
def train(tmp_path):
    """`train(flag=value, ...)` -> a finished `Run`."""
    return lambda **flags: flatcl.train(**{**FLAGS, "results_path": tmp_path / "results", **flags})


def lines_of(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(module):
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# clipping


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "gsam"])
@pytest.mark.parametrize("model", ["er", "mgser_sam", "agem"])
def test_an_update_is_as_long_as_allowed_and_else_untouched(start, model, optimizer):
    trainer = start(model, optimizer=optimizer, seed=1, clip_grad=0.5)
    free = start(model, optimizer=optimizer, seed=1)
    lengths = []
    for batch in trainer.stream.epoch(trainer.benchmark[0].train):  # both learn from it, from equal weights and memory
        free.method.load_state_dict(trainer.method.state_dict())
        free.optimizer.load_state_dict(trainer.optimizer.state_dict())
        with seeding.untouched():
            ((_, plain),) = free.method.observe(batch, free.optimizer)
        ((_, update),) = trainer.method.observe(batch, trainer.optimizer)
        lengths.append((norm(update).item(), norm(plain).item()))
        for short, long in zip(update, plain, strict=True):
            torch.testing.assert_close(short, long * min(1.0, 0.5 / lengths[-1][1]))
    assert max(length for length, _ in lengths) <= 0.5 * (1 + 1e-5) and max(long for _, long in lengths) > 0.5


def test_a_bound_that_is_never_reached_changes_no_bit(start):
    done = []
    for flags in ({}, {"clip_grad": 1e6}):
        trainer = start("derpp", optimizer="sam", seed=2, stop_after=2, **flags)
        done.append((trainer.run()["accuracy"], weights_of(trainer.method)))
    assert done[0][0] == done[1][0] and equal(done[0][1], done[1][1])


def test_an_update_that_is_not_finite_is_still_not_taken(start, monkeypatch):
    trainer = start("er", clip_grad=0.1)
    before = weights_of(trainer.method)
    monkeypatch.setattr(trainer.optimizer, "direction", lambda objective: [
        torch.full_like(g, float("inf")) for g in objective.gradient()])  # fmt: skip
    batch = next(trainer.stream.epoch(trainer.benchmark[0].train))
    ((objective, _),) = trainer.method.observe(batch, trainer.optimizer)
    assert objective.skipped and equal(before, weights_of(trainer.method))


# warm-up


def test_the_rate_rises_evenly_from_step_to_step_in_each_task(start):
    trainer = start("er", n_epochs=3, warmup_epochs=2, stop_after=2, lr=0.08, lr_scheduler="multistep", lr_milestones=2)
    rates, observe = [], trainer.method.observe

    def noted(batch, optimizer, trace=False):
        rates.append((optimizer.base.lr, trainer.method.lr))
        return observe(batch, optimizer, trace)

    object.__setattr__(trainer.method, "observe", noted)
    trainer.run()
    expected = [*(0.08 * (step + 1) / 16 for step in range(16)), *[0.008] * 8] * 2
    np.testing.assert_allclose(rates, np.transpose([expected, expected]), rtol=1e-12)


def test_steps_of_the_warm_up_are_not_recorded_and_the_others_are(start):
    flags = dict(n_epochs=3, warmup_epochs=1, stop_after=1)
    plain = start("er", **flags)
    plain.run()
    trainer = start("er", **flags)
    trainer.optimizer.programs = programs = Programs(trainer.method, trainer.optimizer, Tape())
    trainer.run()
    assert programs.replayed > 8 and equal(weights_of(trainer.method), weights_of(plain.method))
    assert any("rises from step to step" in why and count == 8 for why, count in programs.ordinary.items())


# early stopping


def test_a_task_ends_after_its_best_epoch_whose_weights_come_back(start, monkeypatch):
    trainer = start("er", n_epochs=9, early_stop=2, stop_after=1, backbone="reduced-resnet18")
    scores, seen = iter([0.5, 0.7, 0.7, 0.6, 0.9]), []

    def scored(method, task, split, classes_seen):
        seen.append(weights_of(method.net))
        return next(scores)

    monkeypatch.setattr(trainer.evaluate, "held_out", scored)
    trainer.run()
    assert len(seen) == 4 and trainer.cost.batches == 4 * 8  # the second epoch is the best, two more are not better
    assert equal(weights_of(trainer.method.net), seen[1]) and not equal(seen[1], seen[3])


def test_a_task_that_gets_better_is_trained_to_its_end(start, monkeypatch):
    trainer = start("er", n_epochs=3, early_stop=1, stop_after=2)
    scores = iter([0.1, 0.2, 0.3] * 2)
    monkeypatch.setattr(trainer.evaluate, "held_out", lambda *_: next(scores))
    trainer.run()
    assert trainer.cost.batches == 2 * 3 * 8 and next(scores, None) is None


def test_held_out_images_are_of_the_task_and_are_not_trained_on(start):
    trainer = start("er", n_epochs=2, early_stop=1)
    benchmark = trainer.benchmark
    whole = start("er").benchmark
    for index in range(5):
        train, monitor = benchmark[index].train, benchmark[index].monitor
        assert not {*train.ids.tolist()} & {*monitor.ids.tolist()}
        assert {*train.ids.tolist()} | {*monitor.ids.tolist()} == {*whole[index].train.ids.tolist()}
        assert {*monitor.labels.tolist()} <= {*benchmark[index].classes}
    assert sum(len(benchmark[index].monitor) for index in range(5)) == 64 == len(benchmark.decided()["monitored"])
    other = start("er", n_epochs=2, early_stop=1, validation=1).benchmark
    assert not {*other._test.ids.tolist()} & {*other._monitor.ids.tolist()}


def test_the_score_is_the_accuracy_on_these_images(start):
    trainer = start("er", n_epochs=2, early_stop=1, stop_after=1)
    trainer.run()
    task = trainer.benchmark[0]
    predicted = trainer.evaluate.logits(trainer.method, task.monitor.images).argmax(1)
    right = (predicted == task.monitor.labels).float().mean().item()
    assert trainer.evaluate.held_out(trainer.method, task, task.monitor, 2) == pytest.approx(right)


@pytest.mark.parametrize("flags", [
    dict(dataset="rot-mnist"), dict(joint=True, stop_after=None), dict(model="pnn", backbone="mnistmlp"),
], ids=str)  # fmt: skip
def test_early_stop_in_other_settings(train, flags, tmp_path):
    if flags.get("dataset") == "rot-mnist":
        make_mnist(tmp_path / "data")
        flags = {**flags, "base_path": tmp_path / "data"}
    run = train(early_stop=1, **flags)
    assert run.status == "finished" and any("accuracy/held_out" in line for line in lines_of(run))


@pytest.mark.parametrize("dataset", ["mnist-360"])
def test_streams_have_no_task_to_end(dataset):
    with pytest.raises(UsageError, match="--early_stop cannot be used with mnist-360"):
        resolve(["--model", "er", "--dataset", dataset, "--early_stop", "2", "--n_epochs", "3"])


def test_patience_counts_epochs_without_a_better_one():
    net, early = torch.nn.Linear(2, 2), EarlyStop(2)
    assert [early.note(score, net) for score in (0.5, 0.5, 0.6, 0.1, 0.6)] == [False, False, False, False, True]
    early.begin()
    before = weights_of(net)
    early.restore(net)  # nothing was noted yet
    assert equal(before, weights_of(net))


@pytest.mark.parametrize("stop_at", [3, 8, 11, 20, 29])
def test_resuming_with_all_of_it_is_exact(train, stop_at, assert_same):
    """A run that is stopped inside and between epochs, under early stopping, warm-up and clipping."""
    flags = dict(model="derpp", optimizer="sam", early_stop=1, warmup_epochs=2, clip_grad=0.7, eval_every=1, seed=4)

    class Stop:
        def after_step(self, state):
            if state.step == stop_at:
                state.stop()

    whole, stopped = train(**flags), train(**flags, callbacks=[Stop()])
    assert stopped.status == "interrupted"
    resumed = flatcl.resume(stopped.folder)
    assert_same(weights_of(whole.model), weights_of(resumed.model))
    assert whole.summary["accuracy"] == resumed.summary["accuracy"]
    times = {"train/images_per_s"}
    notes = [[{k: v for k, v in line.items() if k not in times} for line in lines_of(r)] for r in (whole, resumed)]
    assert notes[0] == notes[1]


# evaluation inside a task


def test_evaluations_inside_a_task_are_written_and_change_nothing(train):
    plain, looked = train(model="icarl", stop_after=3), train(model="icarl", stop_after=3, eval_every=2, n_epochs=4)
    assert plain.summary["config_hash"] == looked.summary["config_hash"]
    assert equal(weights_of(plain.model), weights_of(looked.model))
    inside = [line for line in lines_of(looked) if "accuracy_inside" in line]
    assert [(line["task"], line["epochs"]) for line in inside] == [(0, 2), (1, 2), (2, 2)]
    assert all(len(line["accuracy_inside"]["class-il"]) == 5 for line in inside)
    later = inside[2]["accuracy_inside"]["class-il"]
    assert inside[2]["average_accuracy_inside"]["class-il"] == pytest.approx(sum(later[:3]) / 3)
    assert "accuracy_inside/class-il" in entries(looked.folder) - entries(plain.folder)


# predictions


def test_kept_predictions_are_those_of_the_final_network(train):
    run = train(save_predictions=True, permute_classes=True)
    with np.load(run.folder / "predictions.npz", allow_pickle=False) as content:
        kept = {name: content[name] for name in content.files}
    assert kept["logits"].shape == (160, 10) and kept["logits"].dtype == np.float32
    for task in range(5):
        own = kept["tasks"] == task
        right = (kept["logits"][own].argmax(1) == kept["labels"][own]).mean()
        assert right == pytest.approx(run.accuracy["class-il"][-1, task])
    with Image.open(run.folder / "confusion_matrix.png") as picture:
        assert min(picture.size) > 300
    counts = flatcl.load(run.folder).confusion_matrix()
    shutil.rmtree(run.folder / "checkpoint")  # it needs neither network nor data
    assert np.array_equal(flatcl.load(run.folder).confusion_matrix(), counts)


def test_damaged_predictions_count_as_none(train):
    run = train(save_predictions=True)
    counts = run.confusion_matrix()
    file = run.folder / predictions.FILE
    for content in (b"", b"PK", file.read_bytes()[:-40]):
        file.write_bytes(content)
        assert predictions.load(run.folder) is None
        assert np.array_equal(flatcl.load(run.folder).confusion_matrix(), counts)


def test_predictions_that_cannot_be_written_do_not_harm_a_result(train, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predictions, "save", full)
    assert train(save_predictions=True).status == "finished"
    assert "predictions.npz cannot be written (No space left" in capsys.readouterr().err


def test_predictions_that_cannot_be_made_do_not_harm_a_result(train, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Evaluator, "predictions", fail)
    run = train(save_predictions=True)
    assert run.status == "finished" and not (run.folder / predictions.FILE).exists()
    assert "predictions.npz cannot be made (OutOfMemoryError: out of memory)" in capsys.readouterr().err


def test_predictions_of_methods_that_are_told_the_task(train):
    run = train(model="pnn", save_predictions=True, stop_after=None, n_epochs=6)
    counts = run.confusion_matrix()
    assert counts.diagonal().sum() / counts.sum() > 0.3  # each task by its own network


def test_class_accuracy_of_a_class_without_images():
    counts = np.array([[3, 1, 0], [0, 0, 0], [0, 2, 2]])
    assert np.array_equal(predictions.class_accuracy(counts), [0.75, np.nan, 0.5], equal_nan=True)
    found = predictions.confusion_matrix(
        {"logits": np.eye(3)[[0, 2, 1]], "labels": np.array([0, 2, 2])}, class_order=[2, 0, 1]
    )
    assert found.tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_a_stop_between_tasks_takes_no_further_step(start):
    trainer = start("er", stop_after=2)
    finish = trainer._finish_task

    def finish_and_stop(task):
        finish(task)
        trainer.stop(15)

    trainer._finish_task = finish_and_stop
    with pytest.raises(Interrupted):
        trainer.run()
    assert trainer.cost.batches == 8
