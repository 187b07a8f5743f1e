"""The Python API: the same runs as on the command line, objects of the user's own, and what runs have left."""

import builtins
import copy
import hashlib
import importlib
import json
import math
import re
import subprocess
import sys
import textwrap
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
from kornia.augmentation import AugmentationSequential, RandomHorizontalFlip
from torch import nn
from torch.nn.functional import gelu

import flatcl
from flatcl.datasets import Benchmark
from flatcl.models import Loss
from flatcl.models.er import ER
from flatcl.utils.commands.train import main
from flatcl.utils.contracts._tape import Tape
from flatcl.utils.engine import program
from flatcl.utils.errors import DataError, UsageError
from flatcl.utils.optim._driver import Driver
from flatcl.utils.registry import DATASETS, HOME, METHODS

QUICK = dict(model="er", dataset="seq-synth", debug_mode=True, device="cpu", non_verbose=True)


@pytest.fixture
def quick(tmp_path):
    return {**QUICK, "results_path": tmp_path / "results"}


def arrays(num_classes=5, per_class=24, shape=(1, 6, 6), seed=0):
    """(images, labels): a pattern for each class, under noise."""
    patterns = np.random.default_rng(99).uniform(0, 255, (num_classes, *shape))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(num_classes), per_class))
    images = patterns[labels] + rng.normal(0, 40, (len(labels), *shape))
    return images.clip(0, 255).astype(np.uint8), labels


def network(inputs=36, outputs=5):
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))


def digests(folder):
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


# runs


def test_a_run_from_python_is_the_run_of_the_command_line(quick, tmp_path):
    run = flatcl.train(**quick, seed=3, optimizer="sam", rho=0.1, stop_after=2)
    words = ["--model", "er", "--dataset", "seq-synth", "--debug_mode", "--device", "cpu", "--non_verbose", "--seed"]
    words += ["3", "--optimizer", "sam", "--rho", "0.1", "--stop_after", "2", "--results_path", str(tmp_path / "b")]
    assert main(words) == 0
    (folder,) = (tmp_path / "b").glob("*/*/*/*")
    other = json.loads((folder / "summary.json").read_text())
    assert other["config_hash"] == run.summary["config_hash"] and other["metrics"] == run.metrics
    assert run.accuracy["class-il"].tolist() == other["accuracy"]["class-il"]
    assert run.accuracy["class-il"].shape == (2, 5) and run.status == "finished"
    assert run.folder.parent == tmp_path / "results/class-il/seq-synth/er"


def test_a_loaded_run_has_all_and_nothing_is_written(quick):
    run = flatcl.train(**{**quick, "model": "derpp"}, permute_classes=True, buffer_size=30)
    before = digests(run.folder)
    old = flatcl.load(run.folder)
    assert repr(old) == repr(run) and "derpp on seq-synth, seed 0: finished, class-il" in repr(old)
    assert old.summary == json.loads((run.folder / "summary.json").read_text())
    test = old.benchmark[1].test
    assert torch.equal(old.logits(test.images), run.logits(test.images))
    assert old.logits(test.images).shape == (32, 10) and old.features(test.images.numpy()).shape[0] == 32
    assert torch.equal(old.model.net.classifier.weight, run.model.net.classifier.weight)
    assert old.buffer.all()["x"].shape == (30, 3, 8, 8) and repr(old.buffer).startswith("Buffer(30 of 30 rows: x")
    assert old.flags["buffer_size"] == 30 and old.flags["permute_classes"] is True
    assert digests(run.folder) == before


@pytest.mark.parametrize("keep", [True, False])
def test_a_run_of_a_larger_machine_with_a_gpu_is_read_here(quick, keep, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(program, "recorder", lambda device: Tape())
        patch.setattr("os.cpu_count", lambda: 4)
        run = flatcl.train(**quick, threads=2, cuda_graph="1", stop_after=1, keep_checkpoint=keep)
    counts = run.confusion_matrix()
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    loaded = flatcl.load(run.folder)
    assert np.array_equal(loaded.confusion_matrix(), counts)
    assert loaded.flags["threads"] == 2 and loaded.flags["cuda_graph"] == "1"


def test_a_run_of_a_larger_machine_goes_on_with_the_cores_that_are_there(quick, monkeypatch, capsys):
    class Stops(flatcl.Callback):
        def after_task(self, state):
            state.stop()

    with monkeypatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: 4)
        folder = flatcl.train(**quick, threads=2, stop_after=2, callbacks=[Stops()]).folder
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert flatcl.resume(folder).status == "finished"
    assert "note: this run has 2 CPU threads, and this machine 1 core(s): it goes on with 1" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"--threads must be at most .* cores 1, got 2. Give less"):
        flatcl.build(from_run=folder)  # another run


def test_predictions_are_classes_of_the_data_set(quick):
    run = flatcl.train(**quick, permute_classes=True, seed=5, stop_after=2)
    order, images = run.benchmark.class_order(), run.benchmark[1].test.images
    classes = torch.tensor(order)[run.benchmark[1].test.labels]
    predicted, in_task = run.predict(images), run.predict(images, task=1)
    assert (predicted == classes).float().mean().item() == pytest.approx(run.accuracy["class-il"][1, 1])
    assert (in_task == classes).float().mean().item() == pytest.approx(run.accuracy["task-il"][1, 1])
    assert {*in_task.tolist()} <= {order[2], order[3]}


def test_the_confusion_matrix_counts_every_test_image_once(quick):
    run = flatcl.train(**quick, permute_classes=True, seed=5)
    counts = run.confusion_matrix()
    assert counts.shape == (10, 10) and counts.dtype == np.int64 and (counts.sum(1) == 16).all()
    right = counts.diagonal().sum() / counts.sum()
    assert right == pytest.approx(run.metrics["class-il"]["final_overall_accuracy"])
    assert run.class_accuracy().tolist() == (counts.diagonal() / 16).tolist()
    order, last = run.benchmark.class_order(), run.accuracy["class-il"][-1]
    assert run.class_accuracy()[order[:2]].mean() == pytest.approx(last[0])


@pytest.mark.parametrize("flag", ["save_predictions", "disable_log", "start_from", "joint"])
def test_predictions_over_the_classes_seen_are_those_of_the_reported_accuracy(quick, flag):
    flags = {flag: 1} | ({} if flag == "joint" else {"stop_after": 2})
    run = flatcl.train(**quick, permute_classes=True, seed=5, class_il_argmax="seen", lr=1e-6, **flags)
    order, last = run.benchmark.class_order(), run.accuracy["class-il"][-1]
    assert run.class_accuracy()[order].reshape(5, 2).mean(1) == pytest.approx(last) and last.max() > 0
    for own in [run] if run.folder is None else [run, flatcl.load(run.folder)]:
        predicted = torch.cat([own.predict(task.test.images) for task in run.benchmark])
        assert {*predicted.tolist()} <= {*(order if flag == "joint" else order[:4])}
        assert own.confusion_matrix()[:, order[4:]].any() == (flag == "joint")


def test_a_run_without_a_folder_has_its_summary(quick):
    run = flatcl.train(**quick, disable_log=True, stop_after=1)
    assert run.folder is None and run.status == "finished" and run.accuracy["task-il"].shape == (1, 5)
    assert "no folder" in repr(run) and run.confusion_matrix().sum() == 160


def test_a_networks_module_named_features_is_no_function_of_features():
    """As in torchvision's networks, where it gives maps."""

    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.stages = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3)), torch.nn.ModuleList()
            self.classifier = torch.nn.Linear(4, 10)

        def forward(self, x):
            return self.classifier(self.features(x).mean((2, 3)))

    for model, needs in (("icarl", "`features`"), ("lwf", "`features`"), ("pnn", "`stages`")):
        with pytest.raises(UsageError, match=f"--model {model} needs a backbone with {needs}"):
            flatcl.build(model=model, dataset="seq-digits", backbone=Named())


def test_what_only_the_command_line_has_is_refused_with_what_to_use():
    for name, instead in (("dry_run", "flatcl.build"), ("resume", "flatcl.resume"), ("keep_changed", "flatcl.resume")):
        with pytest.raises(UsageError, match=f"{name} is not for build: .*{instead}"):
            flatcl.train(model="er", dataset="seq-synth", **{name: True})


def test_a_task_that_is_not_there_and_tasks_that_are_none_are_refused(quick):
    run = flatcl.train(**quick, disable_log=True, stop_after=1)
    for task in (5, -1):
        with pytest.raises(UsageError, match=f"task must be 0 to 4, got {task}"):
            run.predict(run.benchmark[0].test.images, task=task)
    pair = (np.zeros((5, 1, 8, 8), np.uint8), np.arange(5))
    with pytest.raises(UsageError, match=r"tasks must be the classes of each task, .* got \[2, 3\]"):
        flatcl.benchmark_from_arrays(pair, pair, tasks=[2, 3])


def test_a_callback_gets_the_terms_of_all_steps_of_a_batch(quick):
    seen = {}

    class Watch(flatcl.Callback):
        def after_step(self, state):
            seen.setdefault(state.model.name, []).append((state.loss, set(state.terms)))

    for model in ("fdr", "gdumb"):
        flags = {"fitting_epochs": 1, "n_epochs": None} if model == "gdumb" else {}
        flags = {**quick, **flags, "model": model}
        flatcl.build(**{name: value for name, value in flags.items() if value is not None}).run([Watch()])
    assert {"current", "function"} in [terms for _, terms in seen["fdr"]]
    assert seen["gdumb"][0] == (None, set()) and seen["gdumb"][-1][0].isfinite()


def test_weights_alone_predict_but_have_no_memory(quick):
    run = flatcl.train(**quick, keep_checkpoint=False, stop_after=1)
    old, images = flatcl.load(run.folder), run.benchmark[0].test.images
    assert torch.equal(old.logits(images), run.logits(images))
    with pytest.raises(UsageError, match="keep_checkpoint 0"):
        _ = old.buffer
    plain = {name: value for name, value in quick.items() if name not in ("model", "buffer_size", "minibatch_size")}
    run = flatcl.train(model="sgd", **plain, keep_checkpoint=False, stop_after=1)
    assert flatcl.load(run.folder).buffer is None


@pytest.mark.parametrize("model", ["pnn", "icarl"])
def test_weights_alone_predict_where_a_method_needs_more_than_a_network(quick, model):
    backbone = {} if model == "pnn" else {"backbone": "reduced-resnet18"}
    run = flatcl.train(**{**quick, "model": model}, **backbone, keep_checkpoint=False, stop_after=2)
    old = flatcl.load(run.folder)
    for task in range(2):
        images, known = run.benchmark[task].test.images, task if model == "pnn" else None
        assert torch.equal(old.logits(images, known), run.logits(images, known))


def test_what_a_run_gives_can_be_changed_and_trained_on(quick):
    run = flatcl.train(**quick, stop_after=1)
    images = run.benchmark[0].test.images
    run.logits(images)[:, 0] = 0
    probe = nn.Linear(run.features(images).shape[1], 2)
    probe(run.features(images)).sum().backward()
    assert probe.weight.grad.abs().sum() > 0


def test_a_method_without_memory_has_no_buffer(quick):
    assert flatcl.train(**{**quick, "model": "sgd"}, stop_after=1).buffer is None


@pytest.mark.parametrize("model", ["pnn", "icarl", "lucir", "bic", "xder", "cls_er"])
def test_methods_with_more_than_a_network_are_loaded_as_they_were(quick, model):
    backbone = {} if model == "pnn" else {"backbone": "reduced-resnet18"}
    run = flatcl.train(**{**quick, "model": model}, **backbone, stop_after=2)
    task, images = (1 if model == "pnn" else None), run.benchmark[1].test.images
    assert torch.equal(flatcl.load(run.folder).logits(images, task), run.logits(images, task))


def test_the_callers_random_numbers_are_left_alone(quick):
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    run = flatcl.train(**quick, stop_after=1)
    flatcl.load(run.folder).predict(run.benchmark[0].test.images)
    assert torch.equal(torch.rand(3), expected[0]) and np.random.rand() == expected[1]


def test_continue_and_repeat_from_a_run(quick):
    first = flatcl.train(**quick, stop_after=2)
    repeated = flatcl.train(from_run=first.folder)
    assert repeated.metrics == first.metrics and repeated.folder != first.folder
    more = flatcl.train(from_run=first.folder, continue_run=True, stop_after=3)
    assert more.accuracy["class-il"].shape == (3, 5)
    assert more.accuracy["class-il"][:2].tolist() == first.accuracy["class-il"].tolist()


# objects of the user's own


def test_arrays_a_network_and_classes_of_the_users_own(quick):
    class Mine(ER):
        def loss(self, joint):
            return Loss({"twice": 2 * super().loss(joint).rows["replay"]})

    class Plain(Driver):
        phase = Driver.phase

    benchmark = flatcl.benchmark_from_arrays(
        arrays(), arrays(seed=1), tasks=[[0, 1], [4, 2, 3]], lr=0.05, n_epochs=3, batch_size=8
    )
    net = network()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    given = dict(model=Mine, dataset=benchmark, backbone=net, optimizer=Plain, results_path=quick["results_path"])
    experiment = flatcl.build(**given)
    assert "mine on arrays-" in repr(experiment) and experiment.flags["lr"] == 0.05
    first, second = experiment.run(), experiment.run()
    assert first.accuracy["class-il"].tolist() == second.accuracy["class-il"].tolist()
    assert first.metrics["task-il"]["final_average_accuracy"] > 0.7
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not torch.equal(first.model.net[1].weight, before["1.weight"])
    assert [task["classes"] for task in first.benchmark.decided()["tasks"]] == [[0, 1], [4, 2, 3]]
    assert list(first.benchmark[1].classes) == [2, 3, 4] and len(first.benchmark) == 2
    code = json.loads((first.folder / "config.json").read_text())["code"]
    assert {"models/er.py", f"arrays of {benchmark.name}"} <= code.keys()
    assert sum(name.startswith("network sequential-") for name in code) == 1
    assert flatcl.load(first.folder).predict(arrays()[0]).shape == (120,)


def test_other_arrays_and_other_weights_are_other_runs(quick):
    one, two = (flatcl.benchmark_from_arrays(arrays(seed=seed), arrays(), tasks=5) for seed in (1, 2))
    augmented = flatcl.benchmark_from_arrays(arrays(seed=1), arrays(), tasks=5, augmentations=lambda: [nn.Identity()])
    assert len({one.name, two.name, augmented.name}) == 3
    again = flatcl.benchmark_from_arrays(arrays(seed=1), arrays(), tasks=5)
    assert again.name == one.name and DATASETS.load(one.name) is again
    nets = network(), network()
    with torch.no_grad():
        nets[1][3].bias += 1
    built = [flatcl.build(model="er", dataset=again, backbone=net).config for net in (*nets, network())]
    assert built[0].hash != built[1].hash and built[0].hash == built[2].hash and built[0].code == built[2].code


def test_frozen_parts_augmentations_and_code_are_parts_of_the_identity():
    from flatcl.utils.engine.augment import CropFlip

    data = arrays(), arrays()
    made = flatcl.benchmark_from_arrays(*data)
    nets = network(), network()
    nets[1][1].requires_grad_(False)
    assert len({flatcl.build(model="er", dataset=made, backbone=net).config.hash for net in nets}) == 2

    class Shift(nn.Module):
        __repr__ = object.__repr__

        def __init__(self, by):
            super().__init__()
            self.by = by

    lists = [[CropFlip(1)], [CropFlip(3, flip=0.0)], [Shift(1)], [Shift(2)]]
    names = [flatcl.benchmark_from_arrays(*data, augmentations=lambda own=own: own).name for own in lists * 2]
    assert len({*names}) == 4 and names[:4] == names[4:]
    typed = [flatcl.benchmark_from_arrays(*data, mean=mean, std=(1,)).name for mean in ([0.5], (np.float64(0.5),))]
    assert typed[0] == typed[1]
    used = AugmentationSequential(RandomHorizontalFlip(p=0.5))
    before = flatcl.benchmark_from_arrays(*data, augmentations=lambda: [used]).name
    used(torch.rand(2, 1, 6, 6))
    assert flatcl.benchmark_from_arrays(*data, augmentations=lambda: [used]).name == before


class Slotted:
    __slots__ = "by"

    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return self.by * x


class Scaled(nn.Module):
    """One set of weights, several functions: what it computes is in attributes that its repr does not show."""

    def __init__(self, scale=1, act=torch.relu, more=None):
        super().__init__()
        torch.manual_seed(7)
        self.scale, self.act, self.more, self.layer = scale, act, more, nn.Linear(36, 5)

    def forward(self, x):
        return self.scale * self.act(self.layer(x.flatten(1)))


def test_networks_that_differ_in_attributes_only_are_other_runs(quick):
    given = {**quick, "dataset": flatcl.benchmark_from_arrays(arrays(), arrays()), "stop_after": 1}
    more = [
        {"a": (1, [None])},
        {"a": (1, [2])},
        torch.zeros(2),
        torch.ones(2),
        nn.Dropout(0.1),
        nn.Dropout(0.2).forward,
        Slotted(1),
        Slotted(2),
        lru_cache(Slotted(3)),
        lru_cache(Slotted(4)),
    ]
    nets = [Scaled(), Scaled(10), Scaled(act=gelu), *(Scaled(more=value) for value in more)]
    built = [flatcl.build(**given, backbone=net) for net in nets]
    assert len({experiment.config.backbone for experiment in built}) == len(nets)
    again = flatcl.build(**given, backbone=copy.deepcopy(nets[4])).config
    assert again.hash == built[4].config.hash and again.code == built[4].config.code
    assert [experiment.run().model.net.scale for experiment in built[:2]] == [1, 10]


def test_an_experiment_keeps_the_objects_that_it_was_given(quick):
    def build(number):
        class Net(Scaled):
            made = number

        class Twin(ER):
            made = number

        data = flatcl.benchmark_from_arrays(arrays(seed=number), arrays(), name="of-one-name")
        return flatcl.build(**{**quick, "dataset": data, "model": Twin}, backbone=Net(), stop_after=1), data

    (one, first), (two, second) = build(1), build(2)
    assert one.config.backbone == two.config.backbone and one.config.code != two.config.code
    for experiment, data, number in ((one, first, 1), (two, second, 2), (one, first, 1)):
        run = experiment.run()
        assert run.model.made == run.model.net.made == number and run.benchmark.arrays is data.arrays
        assert json.loads((run.folder / "config.json").read_text())["code"] == experiment.config.code
        assert METHODS.load("twin").made == 2 and DATASETS.load("of-one-name") is second, "names are the newest's"
    old = flatcl.load(run.folder, model=type(run.model), dataset=first, backbone=run.model.net.__class__())
    build(2)
    assert old.model.made == old.model.net.made == 1


def test_settings_and_code_of_augmentations_are_parts_of_the_identity():
    class Noise(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.size = size

        def forward(self, x):
            return x + self.size * torch.randn_like(x)

    def noisy(x, size):
        return x + size * torch.randn_like(x)

    def closure(size):
        return lambda x: noisy(x, size)

    transforms = [
        make(size) for make in (Noise, lambda size: partial(noisy, size=size), closure) for size in (0.01, 0.9)
    ]
    made = [flatcl.benchmark_from_arrays(arrays(), arrays(), augmentations=lambda own=own: [own]) for own in transforms]
    assert len({benchmark.name for benchmark in made}) == len(made)
    again = flatcl.benchmark_from_arrays(arrays(), arrays(), augmentations=lambda: [Noise(0.01)])
    assert again.name == made[0].name and again.sources(None) == made[0].sources(None)
    pair = [flatcl.benchmark_from_arrays(arrays(), arrays(), augmentations=lambda own=own: [own]) for own in (
        lambda x: x + 1 * torch.rand_like(x), lambda x: x + 2 * torch.rand_like(x))]  # fmt: skip
    codes = [flatcl.build(model="er", dataset=benchmark).config.code for benchmark in (made[0], *pair)]
    assert codes[1] != codes[2] and [name for name in codes[0] if name.endswith("Noise")]


def test_arrays_that_the_caller_goes_on_using_are_not_those_of_the_benchmark(quick):
    images, labels = arrays()
    made = flatcl.benchmark_from_arrays((images, labels), (images, labels), tasks=np.int64(5))
    before = made.arrays[0][0].clone()
    images[:] = 0
    assert torch.equal(made.arrays[0][0], before) and len(made.task_sizes) == 5


@pytest.mark.parametrize("layout", ["(N, H, W)", "(N, H, W, C)", "tensors"])
def test_layouts_of_arrays(layout, quick):
    (images, labels), shape = arrays(), (1, 6, 6)
    if layout == "(N, H, W)":
        images = images[:, 0]
    elif layout == "(N, H, W, C)":
        images, shape = np.repeat(images.transpose(0, 2, 3, 1), 3, axis=3), (3, 6, 6)
    else:
        images, labels = torch.from_numpy(images), torch.from_numpy(labels)
    made = flatcl.benchmark_from_arrays((images, labels), (images, labels))
    assert made.shape == shape and made.task_sizes == (1,) * 5 and issubclass(made, Benchmark)
    assert flatcl.train(**{**quick, "dataset": made}, stop_after=1).status == "finished"


def test_augmentations_mean_and_std_of_arrays_are_used():
    from flatcl.utils.engine.augment import CropFlip

    made = flatcl.benchmark_from_arrays(
        arrays(), arrays(), augmentations=lambda: [CropFlip(padding=2)], mean=(0.5,), std=(0.25,), name="mine-too"
    )
    benchmark = made(flatcl.build(model="er", dataset=made).config)
    assert benchmark.name == "mine-too" and benchmark.mean == (0.5,) and benchmark.std == (0.25,)
    (crop,) = benchmark.augmentations()
    assert crop.padding == 2


WRONG = {
    "floats": (lambda x, y: ((x / 255, y), {}), "must be uint8 in 0..255"),
    "labels": (lambda x, y: ((x, y + 1), {}), "no training image"),
    "lengths": (lambda x, y: ((x, y[1:]), {}), "120 training images and 119 training labels"),
    "no pair": (lambda x, y: (x, {}), "must be a pair"),
    "two dimensions": (lambda x, y: ((x.reshape(120, -1), y), {}), "images must be"),
    "tasks": (lambda x, y: ((x, y), {"tasks": [[0, 1], [2, 3]]}), "each of the classes 0..4 once"),
    "number of tasks": (lambda x, y: ((x, y), {"tasks": 2}), "must divide the 5 classes"),
    "labels with a large gap": (lambda x, y: ((x, np.where(y == 4, 10**9, y)), {}), "got up to 1000000000"),
    "one mean for all": (lambda x, y: ((x, y), {"mean": 0.5, "std": 0.5}), "mean must have one number for each"),
    "a name that is a path": (lambda x, y: ((x, y), {"name": "../mine"}), "a part of file names"),
    "a name that is taken": (lambda x, y: ((x, y), {"name": "seq-mnist"}), "registered twice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arrays_that_do_not_fit(case):
    change, message = WRONG[case]
    train, given = change(*arrays())
    with pytest.raises(UsageError, match=message) as caught:
        flatcl.benchmark_from_arrays(train, arrays(), **given)
    assert "\n" not in str(caught.value)


def test_networks_and_names_that_do_not_fit(quick):
    benchmark = flatcl.benchmark_from_arrays(arrays(), arrays())
    given = {**quick, "dataset": benchmark}
    with pytest.raises(UsageError, match=r"gives \(2, 4\). Give its last layer 5 outputs"):
        flatcl.train(**given, backbone=network(outputs=4))
    with pytest.raises(UsageError, match="it fails"):
        flatcl.train(**given, backbone=network(inputs=12))
    with pytest.raises(UsageError, match="must be a name or a class derived from flatcl.models"):
        flatcl.train(**{**given, "model": network()})
    with pytest.raises(UsageError, match="Did you mean er"):
        flatcl.train(**{**given, "model": "err"})
    with pytest.raises(UsageError, match="buffer_size"):
        flatcl.train(**given, bufer_size=3)
    with pytest.raises(UsageError, match="--lr must be greater than 0.*\n.*n_epochs"):
        flatcl.train(**given, lr=-1, n_epochs=0)
    with pytest.raises(UsageError, match="continue_run=True starts from the end of another run"):
        flatcl.build(**quick, continue_run=True)
    with pytest.raises(UsageError, match=r"plugins=\['my_method.py'\]"):
        flatcl.build(**quick, plugin="mine.py")
    with pytest.raises(UsageError, match="seed must be a number"):
        flatcl.train(**given, seed={})
    assert not quick["results_path"].exists() or not list(quick["results_path"].glob("*/*/*/*"))


def test_predictions_of_images_that_do_not_fit(quick):
    run = flatcl.train(**quick, stop_after=1)
    for images in (torch.zeros(2, 3, 8, 8), np.zeros((2, 3, 9, 9), np.uint8), np.zeros((0, 3, 8, 8), np.uint8)):
        with pytest.raises(UsageError, match="must be uint8"):
            run.predict(images)


def test_objects_are_asked_for_where_a_process_does_not_have_them(quick, tmp_path):
    benchmark = flatcl.benchmark_from_arrays(arrays(), arrays(), n_epochs=1)
    run = flatcl.train(**{**quick, "dataset": benchmark}, stop_after=1)
    images = run.benchmark[0].test.images
    expected = run.logits(images)
    del DATASETS._objects[benchmark.name.replace("-", "_")]
    with pytest.raises(UsageError, match=f"unknown dataset: '{benchmark.name}'"):
        flatcl.load(run.folder)
    again = flatcl.benchmark_from_arrays(arrays(), arrays(), n_epochs=1)
    assert torch.equal(flatcl.load(run.folder, dataset=again).logits(images), expected)


class Placed(nn.Module):
    """A backbone that makes a table in its first forward."""

    def __init__(self, shape, num_classes, args=None):
        super().__init__()
        self.layer, self.table = nn.Linear(math.prod(shape), num_classes), None

    def forward(self, x):
        x = x.flatten(1)
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[1], device=x.device)
        return self.layer(x) * (x * self.table).mean(1, keepdim=True)


def test_what_an_evaluation_makes_can_be_trained_through(quick):
    class Probe(flatcl.Callback):
        grads = []

        def after_task(self, state):
            test, weights = state.benchmark[0].test, torch.zeros(3, requires_grad=True)
            loss = nn.functional.nll_loss((test.images.float().mean((2, 3)) * weights), test.labels)
            loss.backward()
            self.grads.append(weights.grad)

    run = flatcl.build(**quick, backbone=Placed, stop_after=1).run([Probe()])
    assert run.model.net.table is not None and Probe.grads[0].abs().sum() > 0
    assert not any(tensor.is_inference() for tensor in (run.benchmark[0].test.images, run.benchmark[4].test.labels))


# callbacks


class Notes(flatcl.Callback):
    def __init__(self):
        self.seen = []

    def after_step(self, state):
        self.seen.append(("step", state.task, state.epoch, state.step))
        assert state.loss.ndim == 0 and set(state.terms) == {"replay"}
        torch.rand(5)  # which changes nothing

    def after_epoch(self, state):
        self.seen.append(("epoch", state.task, state.epoch))

    def after_evaluation(self, state):
        self.seen.append(("evaluation", state.task, state.epoch, len(state.accuracy["class-il"])))
        state.log("mine/total", torch.tensor(2.5))

    def after_task(self, state):
        self.seen.append(("task", state.task))
        assert state.logits(state.benchmark[0].test.images).shape == (32, 10) and state.model.training


def test_callbacks_see_everything_and_change_nothing(quick):
    flags = {**quick, "debug_mode": False, "n_epochs": 2, "stop_after": 2, "backbone": "reduced-resnet18"}
    notes = Notes()
    run = flatcl.build(**flags, eval_every=1).run([notes])
    batches = 128 // 16
    assert [entry for entry in notes.seen if entry[0] == "step"] == [
        ("step", task, epoch, (2 * task + epoch) * batches + batch + 1)
        for task in range(2) for epoch in range(2) for batch in range(batches)
    ]  # fmt: skip
    others = [("epoch", 0), ("evaluation", 0, 5), ("epoch", 1), ("evaluation", 1, 5)]
    expected = [(kind, task, *rest) for task in range(2) for kind, *rest in [*others, ("task",)]]
    assert [entry for entry in notes.seen if entry[0] != "step"] == expected
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["mine/total"] for line in lines if "mine/total" in line] == [2.5] * 4
    plain = flatcl.train(**flags)
    weights = zip(plain.model.state_dict().values(), run.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights if isinstance(a, torch.Tensor))
    assert plain.accuracy["class-il"].tolist() == run.accuracy["class-il"].tolist()


@pytest.mark.parametrize("event", ["after_step", "after_epoch", "after_task", "after_evaluation"])
def test_a_callback_stops_a_run_which_can_be_resumed(quick, event):
    class Stop:
        def stop(self, state):
            if state.task == 1:
                state.stop()

    setattr(Stop, event, Stop.stop)
    stopped = flatcl.build(**quick, seed=2).run([Stop()])
    assert stopped.status == "interrupted" and 1 <= len(stopped.accuracy["class-il"]) <= 2
    done = flatcl.resume(stopped.folder)
    assert done.folder == stopped.folder and done.status == "finished"
    assert done.accuracy["class-il"].tolist() == flatcl.train(**quick, seed=2).accuracy["class-il"].tolist()
    assert flatcl.resume(stopped.folder).metrics == done.metrics  # of a finished run


def test_what_callbacks_log_after_a_task_is_there_after_a_resume(quick):
    class Log:
        def after_task(self, state):
            state.log("mine/task", state.task)
            if state.task == 1:
                state.stop()

    stopped = flatcl.build(**quick).run([Log()])
    done = flatcl.resume(stopped.folder)
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["mine/task"] for line in lines if "mine/task" in line] == [0, 1] and done.status == "finished"

    class Reserved:
        def after_task(self, state):
            state.log("step", 1)

    with pytest.raises(UsageError, match="cannot log 'step'"):
        flatcl.build(**quick).run([Reserved()])


def test_what_is_no_callback_is_refused(quick):
    for wrong in (Notes, object(), print):
        with pytest.raises(UsageError, match="a callback must be an object"):
            flatcl.build(**quick).run([wrong])


def test_ctrl_c_reaches_the_caller(quick):
    class Press:
        def after_step(self, state):
            import signal

            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        flatcl.build(**quick).run([Press()])
    (folder,) = quick["results_path"].glob("*/*/*/*")
    assert flatcl.load(folder).status == "interrupted" and "no task finished" not in repr(flatcl.load(folder))


# the package


def test_importing_flatcl_imports_no_torch_and_names_what_it_has():
    code = "import sys, flatcl; assert 'torch' not in sys.modules; print(*dir(flatcl)); flatcl.train; import torch"
    done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True)
    assert done.returncode == 0 and {*flatcl.__all__} <= {*done.stdout.split()}, done.stderr
    with pytest.raises(AttributeError):
        _ = flatcl.nothing


def test_a_script_names_the_call_that_goes_on_and_its_classes_count_by_their_own_text(tmp_path):
    script = tmp_path / "study.py"
    script.write_text(
        textwrap.dedent("""
        import sys

        import flatcl
        from flatcl.models.er import ER

        class Mine(ER):
            phase = ER.phase

        class Stop:
            def after_step(self, state):
                state.stop()

        run = flatcl.train(model=Mine, dataset="seq-synth", debug_mode=True, results_path=sys.argv[1],
                           callbacks=[Stop()] if len(sys.argv) > 2 else ())
        print(sorted(run.config.code.items()))
    """)
    )

    def start(*words):
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path / "out"), *words], capture_output=True, text=True,
            env={"PYTHONPATH": str(HOME), "PATH": ""}, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done

    first = start("stop")
    assert "Continue with: flatcl.resume('" in first.stderr
    script.write_text(script.read_text().replace("debug_mode=True", "debug_mode=True, seed=2"))
    code = start().stdout.splitlines()[-1]
    assert code == first.stdout.splitlines()[-1] and "'class Mine'" in code and "study" not in code
    script.write_text(script.read_text().replace("phase = ER.phase", "phase = ER.phase; other = 1"))
    assert start().stdout.splitlines()[-1] != code


def test_a_data_error_is_a_usage_error_and_a_value_error():
    assert issubclass(DataError, UsageError) and issubclass(UsageError, ValueError)


def test_the_page_says_where_each_error_is_and_what_it_is():
    page = " ".join((HOME / "docs/python.md").read_text(encoding="utf-8").split())
    named = re.findall(r"raises `(?:([\w.]+)\.)?(\w*(?:Error|Failed))`, a `(\w+)`", page)
    assert [name for _, name, _ in named] == ["UsageError", "RunFailed"] and page.count("`RunFailed`") == 0
    for module, name, base in named:
        assert issubclass(getattr(importlib.import_module(module), name), getattr(builtins, base))
