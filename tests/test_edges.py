"""Sizes at the edge, one rule for each, over all methods and optimizers: a single image, one class a task, tasks of
unequal sizes, tasks and epochs without rows, frozen layers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flatcl.datasets._benchmark import Split
from flatcl.models._method import Block, Loss, Method, Objective
from flatcl.utils.arguments import flags_of, resolve
from flatcl.utils.commands.train import main
from flatcl.utils.engine import passes
from flatcl.utils.engine.build import build
from flatcl.utils.errors import DataError, UsageError
from flatcl.utils.optim._driver import batchnorms, frozen_statistics, normalise_single_values
from flatcl.utils.registry import DATASETS, METHODS, OPTIMIZERS

PLUGIN = '''"""Benchmarks of a few rows, and backbones with layers that are frozen or see one value per channel."""

import torch
from torch import nn
from torch.nn.functional import relu

from flatcl.datasets._benchmark import Benchmark, DomainBenchmark
from flatcl.utils.registry import BACKBONES, DATASETS


@DATASETS.register("edge-even")
class Even(Benchmark):
    """3 tasks of 2 classes, 16 rows each: with a batch size of 5, the last batch has one image."""

    num_classes = 6
    shape = (1, 8, 8)
    mean, std = (0.4,), (0.3,)
    rows_of_class = 8
    defaults = dict(n_tasks=3, n_epochs=1, batch_size=4, minibatch_size=4, buffer_size=12, lr=0.05)

    def load(self, root):
        draw = torch.Generator().manual_seed(0)
        patterns = torch.randint(0, 200, (6, 1, 8, 8), generator=draw)

        def images(number):
            labels = torch.arange(6).repeat_interleave(number)
            noise = torch.randint(0, 56, (len(labels), 1, 8, 8), generator=draw)
            return (patterns[labels] + noise).to(torch.uint8), labels

        return images(self.rows_of_class), images(2)


@DATASETS.register("edge-unequal")
class Unequal(Even):
    task_sizes = (1, 3, 2)


@DATASETS.register("edge-base")
class Base(Even):
    """A first task of half of the classes, the others one by one: by --n_tasks."""

    defaults = Even.defaults | dict(n_tasks=4)

    def classes_of(self, index):
        start = index + 2 if index else 0
        return range(start, index + 3 if index < self.num_tasks - 1 else 6)


@DATASETS.register("edge-hole")
class Hole(Even):
    empty_classes = (2, 3)

    def load(self, root):
        (x, y), test = super().load(root)
        kept = (y < 2) | (y > 3)
        return (x[kept], y[kept]), test


@DATASETS.register("edge-gaps")
class Gaps(Even):
    task_sizes = (3, 1)


@DATASETS.register("edge-overlap")
class Overlap(Even):
    def classes_of(self, index):
        return range(index, index + 2)


@DATASETS.register("edge-listed")
class Listed(Even):
    def classes_of(self, index):
        return [2 * index, 2 * index + 1]


@DATASETS.register("edge-one-row")
class OneRow(Even):
    rows_of_class = 1


@DATASETS.register("edge-domains")
class Domains(DomainBenchmark):
    num_classes, shape, mean, std, rows_of_class = 6, (1, 8, 8), (0.4,), (0.3,), 8
    defaults = Even.defaults
    load = Even.load

    def pixel_map(self, index):
        return torch.arange(64).roll(index)


@DATASETS.register("edge-stream")
class Stream(Even):
    setting = "general-continual"
    defaults = Even.defaults | dict(n_tasks=1)


@DATASETS.register("edge-dry-stream")
class DryStream(Stream):
    def train_split(self, index):
        return self._of_classes(self._train, range(6, 7))


@BACKBONES.register("edge-bn")
class EdgeBn(nn.Module):
    """Of one image, `wide` sees 16 values per channel, `narrow` and `flat` one."""

    num_features = 6

    def __init__(self, shape, num_classes, args=None):
        super().__init__()
        self.conv, self.wide = nn.Conv2d(shape[0], 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.shrink, self.narrow = nn.Conv2d(4, 5, 4), nn.BatchNorm2d(5)
        self.hidden, self.flat = nn.Linear(5, 6), nn.BatchNorm1d(6)
        self.classifier = nn.Linear(6, num_classes)

    @property
    def stages(self):
        return [
            (lambda x: self.wide(self.conv(x)), relu),
            (lambda x: self.narrow(self.shrink(x)), relu),
            (lambda x: self.flat(self.hidden(x.flatten(1))), relu),
            (self.classifier, nn.Identity()),
        ]

    def features(self, x):
        for weigh, activation in self.stages[:-1]:
            x = activation(weigh(x))
        return x

    def forward(self, x):
        return self.classifier(self.features(x))


@BACKBONES.register("edge-frozen")
class Frozen(EdgeBn):
    """Its body is fixed, as one that was trained before."""

    def __init__(self, *args):
        super().__init__(*args)
        self.requires_grad_(False)
        self.classifier.requires_grad_(True)


@BACKBONES.register("edge-frozen-norms")
class FrozenNorms(EdgeBn):
    def __init__(self, *args):
        super().__init__(*args)
        for norm in (self.wide, self.narrow, self.flat):
            norm.requires_grad_(False)


@BACKBONES.register("edge-frozen-head")
class FrozenHead(EdgeBn):
    def __init__(self, *args):
        super().__init__(*args)
        self.classifier.requires_grad_(False)


@BACKBONES.register("edge-fixed")
class Fixed(EdgeBn):
    def __init__(self, *args):
        super().__init__(*args)
        self.requires_grad_(False)
'''

NAMES, OPTIMIZERS_BY_NAME = METHODS.names(), OPTIMIZERS.names()
HAS_MEMORY = [name for name in NAMES if hasattr(METHODS.load(name).Args, "buffer_size")]
SHORT = dict(fitting_epochs=2, bic_epochs=2, steps_on_anchors=2, simclr_batch_size=4)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    file = tmp_path_factory.mktemp("plugins") / "edges.py"
    file.write_text(PLUGIN)
    return str(file)


@pytest.fixture
def begin(plugin):
    """`begin(model, flag=value, ...)` -> a trainer that writes nothing; flags that a method lacks are left out."""

    def begin(model, **flags):
        args = METHODS.load(model).Args
        own = flags_of(args, model) if args else {}
        short = {name: value for name, value in SHORT.items() if name in own}
        of_memory = {"minibatch_size", "buffer_size"} - own.keys()
        flags = {name: value for name, value in flags.items() if name not in of_memory}
        flags = {
            "model": model, "dataset": "edge-even", "backbone": "edge-bn", "device": "cpu", "threads": 1,
            "disable_log": 1, "non_verbose": 1, **short, **flags,
        }  # fmt: skip
        words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
        return build(resolve(["--plugin", plugin, *words]), torch.device("cpu"), None)

    return begin


def assert_trained(trainer, has_moved=True):
    """Runs it to its end: every task was finished, no step failed, and everything is finite."""
    before = {name: p.detach().clone() for name, p in trainer.method.named_parameters()}
    frozen = {name for name, p in trainer.method.named_parameters() if not p.requires_grad}
    summary = trainer.run()
    cost = summary["cost"]
    assert summary["status"] == "finished" and cost["steps"] > 0 and cost["skipped_steps"] == 0
    assert len(trainer.progress.tasks) == len(trainer._task_indices())
    for name, value in trainer.method.state_dict().items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert value.isfinite().all(), name
    after = dict(trainer.method.named_parameters())
    assert has_moved == any(not torch.equal(before[name], after[name]) for name in before if name not in frozen)
    return summary


def rest_of(trainer, index):
    """A task's training rows, cut to none."""
    train = trainer.benchmark[index].train
    return Split(train.images[:0], train.labels[:0], train.ids[:0])


# --------------------------------------------------------------------------------- a single image, over all methods


SINGLE = {
    "one image left over": dict(batch_size=5),
    "one image a batch": dict(batch_size=1, debug_mode=True),
    "one image of the memory": dict(minibatch_size=1),
}


@pytest.mark.parametrize("flags", SINGLE.values(), ids=SINGLE.keys())
@pytest.mark.parametrize("name", NAMES)
def test_a_single_image_is_normalised(begin, name, flags):
    assert_trained(begin(name, **flags))


@pytest.mark.parametrize("name", HAS_MEMORY)
def test_a_memory_of_one_image(begin, name):
    """Or a refusal, where a method's memory has a share for each task or class."""
    try:
        trainer = begin(name, buffer_size=1)
    except UsageError as error:
        assert "--buffer_size must" in str(error) and len(error.problems) == 1
        trainer = begin(name, buffer_size=6)  # of each class one image
    assert_trained(trainer)


@pytest.mark.parametrize("name", ("derpp", "ewc_on", "hal"))
def test_a_resnet_on_small_images(begin, name):
    """Whose last maps have one place: derpp's last batch has one image, the others pass images one by one."""
    assert_trained(begin(name, backbone="reduced-resnet18", debug_mode=True, batch_size=5))


@pytest.mark.parametrize("name", ("derpp", "er", "ewc_on", "gss"))
def test_a_single_image_in_low_precision(begin, name):
    assert_trained(begin(name, amp="bf16", minibatch_size=1))


# ------------------------------------------------------------------------------------- sizes of tasks, over all methods


@pytest.mark.parametrize("name", NAMES)
def test_one_class_a_task(begin, name):
    trainer = begin(name, n_tasks=6)
    summary = assert_trained(trainer)
    if "task-il" in summary["accuracy"]:
        assert {value for row in summary["accuracy"]["task-il"] for value in row} == {1.0}


@pytest.mark.parametrize("dataset, n_tasks, sizes", [("edge-unequal", 3, [1, 3, 2]), ("edge-base", 4, [3, 1, 1, 1])])
@pytest.mark.parametrize("name", NAMES)
def test_unequal_tasks(begin, name, dataset, n_tasks, sizes):
    trainer = begin(name, dataset=dataset)
    assert [len(task.classes) for task in trainer.benchmark] == sizes and len(trainer.benchmark) == n_tasks
    assert [len(task.train) for task in trainer.benchmark] == [8 * size for size in sizes]
    assert_trained(trainer)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_without_images_is_refused(begin, name):
    with pytest.raises(DataError, match="edge-hole: task 2 has no training images") as caught:
        begin(name, dataset="edge-hole")
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_without_rows_takes_no_step_and_is_no_failure(begin, name):
    trainer = begin(name)
    own, taken = trainer.method.train_split, {}

    def train_split(task, epoch):
        return rest_of(trainer, task.index) if task.index == 1 and epoch == 0 else own(task, epoch)

    def finish(task):
        taken[task.index] = trainer.cost.batches
        finish_task(task)

    trainer.method.train_split, finish_task, trainer._finish_task = train_split, trainer._finish_task, finish
    if trainer.joint:
        assert_trained(trainer)
        return
    assert_trained(trainer)
    assert taken[0] == taken[1] < taken[2]


# -------------------------------------------------------------------------------------- frozen layers, over all methods


FROZEN = {  # backbone: the layers whose weights stay
    "edge-frozen": (".conv.", ".wide.", ".shrink.", ".narrow.", ".hidden.", ".flat."),
    "edge-frozen-norms": (".wide.", ".narrow.", ".flat."),
    "edge-frozen-head": (".classifier.",),
}


@pytest.mark.parametrize("backbone", FROZEN)
@pytest.mark.parametrize("name", NAMES)
def test_frozen_layers(begin, name, backbone):
    trainer = begin(name, backbone=backbone)
    before = {key: p.detach().clone() for key, p in trainer.method.named_parameters()}
    assert_trained(trainer)
    after = dict(trainer.method.named_parameters())
    fixed = [key for key in before if any(layer in key for layer in FROZEN[backbone])]
    assert len(fixed) >= 2 or name == "lucir"  # has a classifier of its own
    assert all(torch.equal(before[key], after[key]) for key in fixed)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_with_nothing_to_train_is_refused(begin, name):
    if name == "lucir":  # has weights of its own
        assert_trained(begin(name, backbone="edge-fixed"))
        return
    with pytest.raises(UsageError, match=f"--backbone edge-fixed has nothing to train for --model {name}"):
        begin(name, backbone="edge-fixed")


# ---------------------------------------------------------------------------------------------- over all optimizers


EDGES = {
    "one image left over": dict(batch_size=5),
    "one image of the memory": dict(minibatch_size=1, buffer_size=1),
    "one image a batch": dict(batch_size=1, debug_mode=True),
    "one class a task": dict(n_tasks=6),
    "unequal tasks": dict(dataset="edge-unequal"),
    "frozen body": dict(backbone="edge-frozen"),
    "frozen norms": dict(backbone="edge-frozen-norms"),
}


@pytest.mark.parametrize("flags", EDGES.values(), ids=EDGES.keys())
@pytest.mark.parametrize("optimizer", OPTIMIZERS_BY_NAME)
def test_every_optimizer(begin, optimizer, flags):
    assert_trained(begin("derpp", optimizer=optimizer, **flags))


@pytest.mark.parametrize("optimizer", OPTIMIZERS_BY_NAME)
def test_every_optimizer_without_rows(begin, optimizer):
    trainer = begin("derpp", optimizer=optimizer)
    own = trainer.method.train_split
    trainer.method.train_split = lambda task, epoch: rest_of(trainer, 1) if task.index == 1 else own(task, epoch)
    assert_trained(trainer)


# ------------------------------------------------------------------------------------------------------ and resumed


@pytest.mark.parametrize(
    "flags", (dict(dataset="edge-unequal"), dict(backbone="edge-frozen"), dict(n_tasks=6, batch_size=2))
)
@pytest.mark.parametrize(
    "name, optimizer", [*((name, "sam") for name in NAMES), *(("er", other) for other in OPTIMIZERS_BY_NAME)]
)
def test_inside_a_task_it_goes_on_to_the_bit(begin, assert_same, tmp_path, name, optimizer, flags):
    """Saved after two batches of the second task and loaded into a fresh trainer, it ends the task in the same way."""

    def batches(trainer):
        task = trainer.benchmark.joint_task if trainer.joint else trainer.benchmark[1]
        return task, list(trainer.stream.epoch(trainer.method.train_split(task, 0)))[:4]

    def go_on(trainer, task, rest):
        torch.manual_seed(3)
        for batch in rest:
            trainer.method.observe(batch, trainer.optimizer)
        trainer.method.end_task(task)
        trainer.optimizer.follow()
        return {"method": trainer.method.state_dict(), "optimizer": trainer.optimizer.state_dict()}

    trainer = begin(name, optimizer=optimizer, **flags)
    if not trainer.joint:
        trainer._train_task(trainer.benchmark[0])
    task, found = batches(trainer)
    trainer.method.begin_task(task)
    trainer.optimizer.begin_task(task)
    for batch in found[:2]:
        trainer.method.observe(batch, trainer.optimizer)
    state = {"method": trainer.method.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    expected = go_on(trainer, task, found[2:])

    fresh = begin(name, optimizer=optimizer, seed=1, **flags)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh.method.load_state_dict(state["method"])
    fresh.optimizer.load_state_dict(state["optimizer"])
    fresh.method.lr = trainer.method.lr
    assert_same(expected, go_on(fresh, task, found[2:]))


# ------------------------------------------------------------------------------------------- the rule for BatchNorm


def layers(channels, momentum=0.1):
    """A layer as torch makes it, and one that keeps the rule, with the same weights and averages."""
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[channels]
    torch.manual_seed(0)
    plain = kind(3, momentum=momentum)
    nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
    plain.running_mean.normal_(), plain.running_var.uniform_(0.5, 2.0)
    ruled = copy.deepcopy(plain)
    assert normalise_single_values(ruled) == [ruled]
    return plain, ruled


def passed(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    return [y.detach(), *gradients, *(buffer.clone() for buffer in layer.buffers())]


@pytest.mark.parametrize(
    "shape", [(2, 3), (7, 3), (1, 3, 2), (2, 3, 1), (1, 3, 1, 2), (2, 3, 1, 1), (2, 3, 1, 1, 1)], ids=str
)
@pytest.mark.parametrize("momentum", (0.1, None))
def test_several_values_are_normalised_as_ever(assert_same, shape, momentum):
    plain, ruled = layers(len(shape), momentum)
    x = torch.randn(shape)
    for mode in ("train", "frozen", "train", "eval"):
        found = []
        for layer in (plain, ruled):
            layer.train(mode != "eval")
            with frozen_statistics(layer if mode == "frozen" else []):
                found.append(passed(layer, x))
        assert_same(*found)
    assert_same(plain.state_dict(), ruled.state_dict())


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("frozen", (False, True))
def test_a_single_value_is_normalised_by_the_running_averages(assert_same, shape, frozen):
    plain, ruled = layers(len(shape))
    x, before = torch.randn(shape), copy.deepcopy(ruled.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        copy.deepcopy(plain)(x)
    expected = passed(plain.eval(), x)
    for layer in (ruled, copy.deepcopy(ruled), copy.deepcopy(nn.Sequential(ruled))[0]):
        with frozen_statistics(layer if frozen else []):
            assert_same(expected, passed(layer, x))
        assert_same(before, layer.state_dict())
        assert layer.training and layer.track_running_stats
    ruled.weight.requires_grad_(False)
    other = copy.deepcopy(ruled)
    nn.init.zeros_(other.weight)
    assert torch.equal(other(x).flatten(), other.bias) and not torch.equal(ruled(x).flatten(), ruled.bias)


def test_the_rule_is_put_on_once_and_left_by_an_exception():
    _, layer = layers(4)
    forward = layer.forward
    normalise_single_values(layer)
    assert layer.forward is forward
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.randn(1, 3))
    assert layer.training


def test_the_rule_holds_in_functional_calls_and_for_rows_apart():
    _, layer = layers(4)
    net = nn.Sequential(layer, nn.Flatten())
    x, weight = torch.randn(5, 3, 1, 1), torch.randn(3)
    before = layer.running_mean.clone()

    def output(weight, row):
        return torch.func.functional_call(net, {"0.weight": weight}, (row[None],))[0]

    found = torch.func.vmap(output, in_dims=(None, 0))(weight, x)
    net.eval()
    assert torch.allclose(found, torch.func.functional_call(net, {"0.weight": weight}, (x,)), atol=1e-6)
    assert torch.equal(before, layer.running_mean)


def test_layers_with_several_values_learn_from_a_single_image(begin):
    trainer = begin("sgd", batch_size=1)
    net, batch = trainer.method.net, next(trainer.stream.epoch(trainer.benchmark[0].train))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    trainer.method.observe(batch, trainer.optimizer)
    moved = {name for name, buffer in net.named_buffers() if not torch.equal(before[name], buffer)}
    assert moved == {f"wide.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_grown_networks_and_copies_keep_the_rule(begin):
    trainer = begin("pnn")
    trainer.run()
    found = batchnorms(trainer.method)
    assert len(found) == 9 and all("forward" in vars(layer) for layer in found)
    assert all(layer.forward.args[0] is layer for layer in batchnorms(copy.deepcopy(trainer.method.net)))
    assert trainer.optimizer._batchnorms == found


# ------------------------------------------------------------------------------------------- gradients of single rows


class Maps(nn.Sequential):
    """Layers of known kinds, a BatchNorm on maps with one place, and what is frozen."""

    def __init__(self, frozen=(), norm=nn.BatchNorm2d):
        torch.manual_seed(1)
        super().__init__(
            nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(),
            nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip
        for name, p in self.named_parameters():
            p.requires_grad_(name not in frozen)
        for layer in batchnorms(self):
            nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
            layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2.0)
        normalise_single_values(self)


FREEZES = {
    "nothing": (), "norms": ("1.weight", "1.bias", "4.weight", "4.bias"), "biases": ("0.bias", "1.bias", "7.bias"),
    "weights": ("0.weight", "1.weight", "4.weight", "7.weight"),
    "the body": ("0.weight", "0.bias", "1.weight", "1.bias"),
}  # fmt: skip


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("frozen", FREEZES.values(), ids=FREEZES.keys())
def test_rows_apart_keep_the_rules(frozen, training):
    net, x, y = Maps(frozen).train(training), torch.randn(5, 1, 7, 7), torch.tensor([0, 1, 2, 0, 1])
    params, rows = [p for p in net.parameters() if p.requires_grad], []
    with frozen_statistics(net):
        for i in range(5):
            rows.append(torch.autograd.grad(cross_entropy(net(x[i : i + 1]), y[i : i + 1]), params))
        assert passes._layers(net, x, y) is not None  # the short way
        sums = passes.square_sums(net, x, y, torch.ones_like)
        products = passes.gram(net, x, y)
    assert len(sums) == len(params)
    for p, found, own in zip(params, sums, zip(*rows, strict=True), strict=True):
        assert found.shape == p.shape and torch.allclose(found, sum(g.square() for g in own), rtol=1e-4, atol=1e-6)
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    assert torch.allclose(products, flat @ flat.T, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- unequal tasks


def problem_of(caught):
    (problem,) = caught.value.problems
    return problem


def test_the_number_of_tasks_follows_from_their_sizes(begin):
    with pytest.raises(UsageError) as caught:
        begin("sgd", dataset="edge-unequal", n_tasks=2)
    assert problem_of(caught).startswith(
        "--n_tasks must be 3 on edge-unequal, whose tasks have 1, 3, 2 classes, got 2."
    )
    benchmark = begin("sgd", dataset="edge-unequal").benchmark
    assert DATASETS.load("edge-unequal").defaults["n_tasks"] == 3
    assert [task.classes for task in benchmark] == [range(1), range(1, 4), range(4, 6)]
    assert [task.test.labels.unique().tolist() for task in benchmark] == [[0], [1, 2, 3], [4, 5]]
    benchmark = begin("sgd", dataset="edge-base", n_tasks=2).benchmark
    assert [task.classes for task in benchmark] == [range(3), range(3, 6)]


@pytest.mark.parametrize(
    "dataset, words",
    [
        ("edge-gaps", "edge-gaps: its tasks must have 6 classes in total, got 4"),
        (
            "edge-overlap",
            "edge-overlap: the classes of task 2 must be a range that is not empty and begins with 2, got r",
        ),
        (
            "edge-listed",
            "edge-listed: the classes of task 1 must be a range that is not empty and begins with 0, got [",
        ),
    ],
)
def test_classes_that_do_not_follow_one_another_are_refused(begin, dataset, words):
    with pytest.raises(UsageError) as caught:
        begin("sgd", dataset=dataset)
    assert problem_of(caught).startswith(words)


@pytest.mark.parametrize("words", [["--joint"], ["--start_from", "1"], ["--stop_after", "2"], ["--permute_classes"]])
def test_unequal_tasks_and_the_engines_flags(begin, words):
    value = words[1] if len(words) > 1 else True
    assert_trained(begin("derpp", dataset="edge-unequal", **{words[0].strip("-"): value}))


def test_bics_weight_is_one_of_the_tasks_or_the_share_of_the_old_classes(begin):
    for weight, expected in (("one_task", [1, 1 / 2, 1 / 3]), ("old_classes", [0, 1 / 4, 4 / 6])):
        method = begin("bic", dataset="edge-unequal", distill_weight=weight).method
        for task, lam in zip(method.context.benchmark, expected, strict=True):
            method.begin_task(task) if task.index == 0 else super(type(method), method).begin_task(task)
            method.set_extra_state(method.get_extra_state())  # what it knows after a resume
            assert method.lam == pytest.approx(lam)


def test_xders_heads_are_those_of_the_tasks(begin):
    """Own head and future heads by hand, from the classes of the tasks."""
    trainer = begin("xder", dataset="edge-unequal", batch_size=16)
    method, benchmark = trainer.method, trainer.benchmark
    heads = [[0], [1, 2, 3], [4, 5]]
    for index, y in enumerate(([0, 0, 0], [0, 3, 1], [5, 2, 0])):
        logits = torch.randn(3, 6)
        method.begin_task(benchmark[index])
        later = heads[index + 1 :]
        if not later:
            break
        gaps = method._gap(logits, Block(torch.zeros(3, 1), y=torch.tensor(y)))
        for row in range(3):
            own = max(logits[row, k] for k in next(head for head in heads if y[row] in head))
            highest = max(logits[row, k] for head in later for k in head)
            assert gaps[row].item() == pytest.approx((highest + method.args.m - own).item(), abs=1e-6)
        views = method._views(next(trainer.stream.epoch(benchmark[index].train)))
        with frozen_statistics(method), torch.no_grad():
            logits, found = method.net(views.x), method._consistency(views)
        expected = sum(supcon_by_hand(logits[:, head], views.y, method.args.simclr_temp) for head in later)
        assert torch.allclose(found / found.sum(), expected / expected.sum(), rtol=1e-4)


def supcon_by_hand(f, y, t):
    f, n = f / f.norm(dim=1, keepdim=True), len(y)
    costs = torch.zeros(n)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        log_all = torch.stack([f[i] @ f[j] / t for j in others]).logsumexp(0)
        same = [log_all - f[i] @ f[j] / t for j in others if y[j] == y[i]]
        costs[i] = sum(same) / len(same)
    return costs


# ---------------------------------------------------------------------------------------------------- empty tasks


def test_a_benchmark_knows_its_rows_without_making_them(begin):
    for dataset in ("edge-even", "edge-domains"):
        benchmark = begin("sgd", dataset=dataset).benchmark
        expected = [len(task.train) for task in benchmark]
        benchmark._train = Split(None, benchmark._train.labels, None)
        assert [benchmark.num_rows(index)[0] for index in range(3)] == expected


@pytest.mark.parametrize("flags", (dict(), dict(joint=True), dict(debug_mode=True), dict(stop_after=1)), ids=str)
def test_empty_tasks_are_refused_whatever_the_flags(begin, flags):
    with pytest.raises(DataError, match="edge-hole: task 2 has no training images"):
        begin("sgd", dataset="edge-hole", **flags)


def test_a_stream_without_images_is_refused(begin):
    with pytest.raises(DataError, match="edge-dry-stream: task 1 has no training images"):
        begin("er", dataset="edge-dry-stream")
    assert_trained(begin("er", dataset="edge-stream"))


def test_a_validation_split_may_leave_nothing(begin):
    """Six images, one of them held out: its task has none to train on, or the others none to be tested with."""
    with pytest.raises(DataError) as caught:
        begin("sgd", dataset="edge-one-row", n_tasks=6, validation=True)
    assert "has no t" in problem_of(caught) and "no --validation" in problem_of(caught)


@pytest.mark.parametrize("name", NAMES)
def test_tasks_of_one_image(begin, name):
    """bic holds out what the later tasks have: it learns from the first one alone, in which one class is certain."""
    trainer = begin(name, dataset="edge-one-row", n_tasks=6)
    assert_trained(trainer, has_moved=name != "bic")


def test_a_budget_ends_where_there_are_no_rows(begin):
    trainer = begin("derpp", budget_rows=300)
    own = trainer.method.train_split
    trainer.method.train_split = lambda task, epoch: rest_of(trainer, 1) if task.index == 1 else own(task, epoch)
    assert_trained(trainer)


@pytest.mark.parametrize("name", ("icarl", "lucir", "bic", "xder"))
def test_a_class_whose_images_are_all_held_out(begin, name):
    """As --validation may: the others of its task are learned."""
    trainer = begin(name)
    train = trainer.benchmark._train
    kept = train.labels != 3
    trainer.benchmark._train = Split(train.images[kept], train.labels[kept], train.ids[kept])
    assert_trained(trainer)


# ------------------------------------------------------------------------------------- losses that are partly constant


class HalfConstant(Method):
    """Of each kind of term one that no weight has a say in, and such a reference."""

    guides = {"fixed": ("flat",), "moving": ("current",)}

    def loss(self, stream):
        logits = self.net(stream.x)
        costs = cross_entropy(logits, stream.y, reduction="none")
        rows = {"current": costs, "flat": torch.ones_like(costs)}
        return Loss(rows, logits, {"also flat": torch.ones(())})

    def references(self, *blocks):
        yield "fixed too", torch.ones(())
        yield "moving too", self.net(blocks[0].x).sum()


@pytest.mark.parametrize("optimizer", OPTIMIZERS_BY_NAME)
def test_constant_terms_have_no_gradient(begin, optimizer):
    trainer = begin("sgd", optimizer=optimizer)
    method = HalfConstant(trainer.method.net, None, trainer.method.context)
    trainer.optimizer.method = method
    batch = next(trainer.stream.epoch(trainer.benchmark[0].train))
    blocks = (batch.block, batch.block.as_reference())
    objective = Objective(method, blocks, trainer.optimizer.params)
    trainer.optimizer.begin_task(trainer.benchmark[0])
    trainer.optimizer.step(objective)
    assert not objective.skipped and objective.guides.keys() == {"fixed too", "moving", "moving too"}
    assert not any(part.any() for part in objective.guides["fixed too"])
    assert any(part.any() for part in objective.guides["moving"])


# ------------------------------------------------------------------------------------------- what a user reads


@pytest.mark.parametrize(
    "words, line",
    [
        (["--dataset", "edge-hole"], "error: edge-hole: task 2 has no training images."),
        (["--backbone", "edge-fixed"], "error: --backbone edge-fixed has nothing to train for --model er:"),
        (["--dataset", "edge-gaps"], "error: edge-gaps: its tasks must have 6 classes in total, got 4."),
        (
            ["--backbone", "edge-frozen-norms", "--optimizer", "sam", "--perturb", "norm_only"],
            "error: --perturb norm_only needs normalisation layers to train, the backbone edge-frozen-norms has none.",
        ),
    ],
    ids=("no images", "nothing to train", "classes left out", "nothing to move"),
)
def test_one_line_and_no_run_folder(plugin, tmp_path, capsys, words, line):
    argv = ["--plugin", plugin, "--model", "er", "--dataset", "edge-even", "--backbone", "edge-bn", *words]
    assert main([*argv, "--device", "cpu", "--results_path", str(tmp_path / "results")]) == 2
    (found,) = capsys.readouterr().err.splitlines()
    assert found.startswith(line) and not [path for path in tmp_path.rglob("*") if path.is_file()]
