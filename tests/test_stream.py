"""The stream of batches and its saved position; the evaluator against one image at a time; the learning rate."""

import json
from math import cos, pi
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from flatcl.datasets import _benchmark
from flatcl.datasets._benchmark import DomainBenchmark, Split
from flatcl.utils.arguments import resolve
from flatcl.utils.commands.train import main
from flatcl.utils.engine import evaluator, seeding
from flatcl.utils.engine.augment import Augment, CropFlip
from flatcl.utils.engine.build import build as build_trainer
from flatcl.utils.engine.evaluator import Evaluator
from flatcl.utils.engine.trainer import Stream, learning_rate
from flatcl.utils.errors import DataError

CPU = torch.device("cpu")
SHAPE, ROWS, BATCH = (3, 8, 8), 103, 10
IMAGE_BYTES = 4 * 3 * 8 * 8
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_split(rows=ROWS, lengths=None):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (rows, *SHAPE)).astype(np.uint8))
    labels = torch.from_numpy(rng.integers(0, 10, rows))
    return Split(images, labels, torch.arange(rows) + 1000, lengths)


def make_stream(transforms=(), seed=0, device=CPU, **keywords):
    augment = Augment(list(transforms), MEAN, STD, device)
    return Stream(augment, BATCH, seeding.generator(seed, "order"), **keywords)


def chunk_of(monkeypatch, rows):
    """Lets a chunk hold `rows` images."""
    monkeypatch.setattr(evaluator, "CPU_BYTES", rows * IMAGE_BYTES)


def ids_of(batches):
    return torch.cat([batch.ids for batch in batches])


def assert_batches(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        for column in ("x", "y", "ids", "inputs"):
            assert torch.equal(getattr(one, column), getattr(other, column)), column


# ----------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("transforms", [(), (CropFlip(1),)], ids=["plain", "augmented"])
def test_every_image_comes_once_an_epoch(transforms):
    split, stream = make_split(), make_stream(transforms)
    orders = []
    for _ in range(3):
        batches = list(stream.epoch(split))
        assert [len(batch.y) for batch in batches] == [10] * 10 + [3], "the last, smaller batch is kept"
        assert stream.num_batches(split) == 11
        orders.append(ids_of(batches))
        assert torch.equal(orders[-1].sort().values, split.ids)
        for batch in batches:
            rows = batch.ids - 1000
            assert torch.equal(batch.x, split.images[rows]) and torch.equal(batch.y, split.labels[rows])
            assert batch.x.dtype == torch.uint8 and batch.inputs.dtype == torch.float32
            assert batch.inputs.shape == batch.x.shape
            if not transforms:
                assert torch.equal(batch.inputs, stream.augment.plain(batch.x))
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    assert not torch.equal(orders[0], split.ids)


def test_the_order_follows_the_seed_and_nothing_else():
    split = make_split()
    torch.manual_seed(0)
    first = [ids_of(make_stream().epoch(split))]
    torch.manual_seed(1)
    first.append(ids_of(make_stream([CropFlip(1)]).epoch(split)))
    assert torch.equal(*first)
    assert not torch.equal(first[0], ids_of(make_stream(seed=1).epoch(split)))


def test_a_stream_with_its_own_batches_is_not_shuffled():
    lengths = (4, 1, 10, 7, 2)
    split, stream = make_split(24, lengths), make_stream()
    for _ in range(2):
        batches = list(stream.epoch(split))
        assert tuple(len(batch.y) for batch in batches) == lengths
        assert torch.equal(ids_of(batches), split.ids)


@pytest.mark.parametrize("limit", [1, 5, 11, 50])
def test_max_batches(limit):
    split, stream = make_split(), make_stream(max_batches=limit)
    assert len(list(stream.epoch(split))) == stream.num_batches(split) == min(limit, 11)


@pytest.mark.parametrize("rows", [1, 9, 10, 20])
def test_small_splits(rows):
    batches = list(make_stream().epoch(make_split(rows)))
    assert sum(len(batch.y) for batch in batches) == rows and len(batches) == -(-rows // BATCH)


@pytest.mark.parametrize("rows", [1, 10, 25, 30, 103, 10**6])
def test_chunks_change_nothing(monkeypatch, rows):
    """Whatever is handled in one call, the batches are the same; augmented ones at least have the same images."""
    split = make_split()
    expected = [list(make_stream(transforms).epoch(split)) for transforms in ((), [CropFlip(1)])]
    chunk_of(monkeypatch, rows)
    plain, augmented = ([*make_stream(transforms).epoch(split)] for transforms in ((), [CropFlip(1)]))
    assert_batches(plain, expected[0])
    assert torch.equal(ids_of(augmented), ids_of(expected[1]))
    assert all(torch.equal(one.x, other.x) for one, other in zip(augmented, expected[1], strict=True))


def test_a_chunk_is_augmented_in_one_call(monkeypatch):
    calls = []

    class Counting(CropFlip):
        def on_bytes(self, images):
            calls.append(len(images))
            return super().on_bytes(images)

    chunk_of(monkeypatch, 35)
    list(make_stream([Counting(1)]).epoch(make_split()))
    assert calls == [30, 30, 30, 13]


# -------------------------------------------------------------------------------------------- saving and restoring


def consume(batches, log, count=None):
    """A learner that draws from the global generator at each step, as replay and dropout do."""
    for batch in batches:
        log.append((batch, torch.rand(3)))
        if count is not None and len(log) == count:
            return


def assert_logs(got, expected):
    assert_batches([batch for batch, _ in got], [batch for batch, _ in expected])
    for step, ((_, one), (_, other)) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(one, other), f"global generator, {step} steps after the restart"


@pytest.mark.parametrize("transforms", [(), (CropFlip(1),)], ids=["plain", "augmented"])
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("done", range(1, 12))
def test_a_restored_stream_goes_on_to_the_bit(monkeypatch, transforms, epoch, done):
    """Chunks end after batches 3, 6, 9 and 11: `done` lies inside a chunk, at its end, and at the epoch's end."""
    chunk_of(monkeypatch, 35)
    split = make_split()

    stream, log = make_stream(transforms), []
    torch.manual_seed(5)
    for _ in range(epoch):
        consume(stream.epoch(split), [])
    batches = stream.epoch(split)
    consume(batches, log, count=done)
    saved = stream.state_dict()
    expected = []
    consume(batches, expected)
    consume(stream.epoch(split), expected)
    assert len(expected) == 11 - done + 11
    final_torch, final_order = torch.get_rng_state(), seeding.generator_state(stream.rng)

    torch.manual_seed(999)
    fresh, got = make_stream(transforms, seed=77), []
    fresh.load_state_dict(saved)
    for _ in range(2):
        consume(fresh.epoch(split), got)
    assert_logs(got, expected)
    assert torch.equal(torch.get_rng_state(), final_torch)
    assert seeding.generator_state(fresh.rng) == final_order


@pytest.mark.parametrize("first, second", [(1, 2), (2, 3), (3, 4), (4, 8), (5, 6)])
def test_a_restored_stream_can_be_saved_again(monkeypatch, first, second):
    chunk_of(monkeypatch, 35)
    split, expected = make_split(), []
    torch.manual_seed(5)
    stream = make_stream([CropFlip(1)])
    batches = stream.epoch(split)
    consume(batches, expected, count=first)
    state = stream.state_dict()
    consume(batches, expected)
    final = torch.get_rng_state()

    got = expected[:first]
    for stop in (second, None):
        torch.manual_seed(1)
        stream = make_stream([CropFlip(1)], seed=3)
        stream.load_state_dict(state)
        consume(stream.epoch(split), got, count=stop)
        state = stream.state_dict()
    assert_logs(got, expected)
    assert torch.equal(torch.get_rng_state(), final)


def test_the_saved_position_survives_a_checkpoint_file(tmp_path):
    split, stream = make_split(), make_stream([CropFlip(1)])
    torch.manual_seed(2)
    batches = stream.epoch(split)
    for _ in range(4):
        next(batches)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    rest = list(batches)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = make_stream([CropFlip(1)])
    fresh.load_state_dict(state)
    assert_batches(list(fresh.epoch(split)), rest)


# ---------------------------------------------------------------------------------------------- on an accelerator


@needs_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
@pytest.mark.parametrize("transforms", [(), (CropFlip(1),)], ids=["plain", "augmented"])
def test_host_and_device_memory_give_the_same_batches(monkeypatch, name, transforms):
    monkeypatch.setattr(evaluator, "DEVICE_BYTES", 35 * IMAGE_BYTES)
    device, host = torch.device(name), make_split()
    resident = Split(host.images.to(device), host.labels.to(device), host.ids.to(device))
    results = []
    for split in (host, resident):
        torch.manual_seed(0)
        results.append(list(make_stream(transforms, device=device).epoch(split)))
        assert all(batch.inputs.is_cuda and batch.y.is_cuda for batch in results[-1])
    assert_batches(*results)
    assert torch.equal(ids_of(results[0]).cpu(), ids_of(make_stream().epoch(host)))


@needs_gpu
@pytest.mark.parametrize("where", ["auto", "cpu", "device"])
def test_a_run_on_the_accelerator(tmp_path, where):
    words = ["--model", "er", "--dataset", "seq-synth", "--device", "cuda", "--data_device", where, "--debug_mode"]
    assert main([*words, "--non_verbose", "--results_path", str(tmp_path)]) == 0


# -------------------------------------------------------------------------------------------------------- evaluator


def build(*words):
    base = ["--model", "sgd", "--dataset", "seq-synth", "--disable_log", "--non_verbose"]
    config = resolve([*base, *map(str, words)])
    return build_trainer(config, CPU, None)


def one_by_one(trainer, outputs):
    """(accuracy over `outputs` outputs, accuracy over the task's outputs) of each task, an image at a time."""
    method, benchmark = trainer.method, trainer.benchmark
    method.eval()
    rows = []
    for index in range(len(benchmark)):
        task, right, right_in_task = benchmark[index], 0, 0
        for image, label in zip(task.test.images, task.test.labels.tolist(), strict=True):
            inputs = image.float()[None] / 255
            if benchmark.mean is not None:
                inputs = (inputs - torch.tensor(benchmark.mean).view(-1, 1, 1)) / torch.tensor(benchmark.std).view(
                    -1, 1, 1
                )
            with torch.no_grad():
                scores = method(inputs)[0].tolist()
            right += max(range(outputs), key=scores.__getitem__) == label
            right_in_task += max(task.classes, key=scores.__getitem__) == label
        rows.append((right / len(task.test), right_in_task / len(task.test)))
    method.train()
    return [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("words", [(), ("--dataset", "seq-digits"), ("--backbone", "resnet32", "--n_tasks", 2)])
def test_class_and_task_accuracy_equal_one_image_at_a_time(monkeypatch, words):
    trainer = build(*words, "--debug_mode", "--lr", 0.05)
    trainer.run()
    channels, height, width = trainer.benchmark.shape
    tests = [len(task.test) for task in trainer.benchmark]
    expected = one_by_one(trainer, 10)
    for rows in (7, 10**6):
        monkeypatch.setattr(evaluator, "CPU_BYTES", rows * 4 * channels * height * width)
        assert rows > 7 or any(size % rows for size in tests), "the last batch must be a smaller one"
        found = trainer.evaluate(trainer.method, 10)
        assert list(found) == ["class-il", "task-il"]
        assert found["class-il"] == pytest.approx(expected[0]) and found["task-il"] == pytest.approx(expected[1])
    assert all(task_il >= class_il for class_il, task_il in zip(*expected, strict=True))
    assert sum(expected[1]) > sum(expected[0]) > 0, "a case that tells the two apart"
    json.dumps(found)


@pytest.mark.parametrize("seen", [2, 4, 10])
def test_the_classes_seen_compete_where_that_is_asked_for(seen):
    trainer = build("--debug_mode", "--class_il_argmax", "seen")
    trainer.run()
    with torch.no_grad():
        trainer.method.net.classifier.bias[4:] += 100.0
    found = trainer.evaluate(trainer.method, seen)
    expected = one_by_one(trainer, seen)
    assert found["class-il"] == pytest.approx(expected[0]) and found["task-il"] == pytest.approx(expected[1])
    everything = Evaluator(trainer.benchmark, trainer.augment)(trainer.method, seen)
    assert everything["class-il"] == pytest.approx(one_by_one(trainer, 10)[0])
    assert everything["task-il"] == found["task-il"]
    assert everything["class-il"][:2] == [0, 0] and (seen == 10 or max(found["class-il"][:2]) > 0)
    if seen < 10:
        assert found["class-il"][seen // 2 :] == [0] * (5 - seen // 2), "an output that does not compete is never right"


def test_seen_grows_with_the_tasks_of_a_run():
    trainer, asked = build("--debug_mode", "--class_il_argmax", "seen"), []
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *given: (asked.append(given[1:]), evaluate(*given))[1]
    trainer.run()
    assert asked == [(10, None), (2, None), (4, None), (6, None), (8, None), (10, None)]


@pytest.mark.parametrize("words", [(), ("--dataset", "seq-digits"), ("--n_tasks", 10)])
def test_small_tasks_share_a_pass_and_change_no_number(monkeypatch, words):
    """Tasks of 32 or 16 images (or about 72), in passes of all tasks, of two, and of parts of one."""
    trainer = build(*words, "--debug_mode", "--lr", 0.05)
    trainer.run()
    channels, height, width = trainer.benchmark.shape
    size, passes = max(trainer.sizes), []
    trainer.method.register_forward_hook(lambda module, inputs, logits: passes.append(len(logits)))
    found = {}
    for rows in (10**6, 2 * size, size, size - 1, 5):
        passes.clear()
        monkeypatch.setattr(evaluator, "CPU_BYTES", rows * 4 * channels * height * width)
        found[rows] = trainer.evaluate(trainer.method, 10)
        assert sum(passes) == sum(trainer.sizes) and max(passes) <= rows
        if rows == 10**6:
            assert len(passes) == 1, "a pass for each small task costs a thousand of them their time"
    assert all(other == found[10**6] for other in found.values())
    for count in range(1, len(trainer.sizes) + 1):
        part = trainer.evaluate(trainer.method, 10, count)
        for setting, row in found[5].items():
            assert part[setting] == row[:count] + [None] * (len(row) - count)


def test_a_task_may_have_more_classes_than_another(monkeypatch):
    """task-il is over the outputs of each image's own task, also where tasks share a pass."""
    trainer = build("--debug_mode", "--lr", 0.05)
    trainer.run()
    cut = [range(0, 1), range(1, 5), range(5, 7), range(7, 9), range(9, 10)]
    monkeypatch.setattr(trainer.benchmark, "classes_of", lambda index: cut[index])
    trainer.benchmark._tests.clear()
    uneven = Evaluator(trainer.benchmark, trainer.augment)
    assert len(set(uneven.sizes)) > 1
    found, expected = uneven(trainer.method, 10), one_by_one(trainer, 10)
    assert found["class-il"] == pytest.approx(expected[0]) and found["task-il"] == pytest.approx(expected[1])
    assert found["task-il"][0] == found["task-il"][4] == 1.0, "one class is always right"


def test_other_settings_have_one_accuracy():
    config = resolve(["--model", "sgd", "--dataset", "rot-mnist", "--disable_log"])
    cls = config.benchmark
    made = make_split(30)
    images = torch.nn.functional.interpolate(made.images[:, :1].float(), (28, 28)).to(torch.uint8)

    class Small(cls):
        def load(self, root):
            return (images, made.labels), (images, made.labels)

    benchmark = Small(config)
    augment = Augment([], None, None, CPU)
    torch.manual_seed(0)
    method = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    found = Evaluator(benchmark, augment)(method, 10)
    assert list(found) == ["domain-il"] and len(found["domain-il"]) == 20
    for index in (0, 7, 19):
        test = benchmark[index].test
        right = (method(test.images.float() / 255).argmax(1) == test.labels).float().mean()
        assert found["domain-il"][index] == pytest.approx(right.item())


class Domains(DomainBenchmark):
    """Six rolls of ten images of 16 pixels."""

    name, num_classes, shape = "six-domains", 10, (1, 4, 4)
    made = ()

    def load(self, root):
        images = torch.arange(160, dtype=torch.uint8).reshape(10, *self.shape)
        return (images, torch.arange(10)), (images, torch.arange(10))

    def pixel_map(self, index):
        return torch.arange(16).roll(index)

    def num_rows(self, index):
        return len(self._train), len(self._test)

    def make_test(self, index):
        self.made = (*self.made, index)
        return super().make_test(index)


def domains(cls=Domains):
    return cls(
        SimpleNamespace(
            n_tasks=6,
            base_path=".",
            validation=False,
            early_stop=None,
            custom_class_order=(),
            permute_classes=False,
            classes_per_task=(),
        )
    )


def test_transformed_test_sets_are_made_when_evaluated_and_kept_as_far_as_there_is_room(monkeypatch):
    """A thousand permutations of MNIST's test set are 7.8 GB."""
    monkeypatch.setattr(_benchmark, "KEPT_BYTES", 2 * 160 + 159)
    monkeypatch.setattr(evaluator, "CPU_BYTES", 10 * 4 * 16)  # a task is a pass
    method, results = nn.Sequential(nn.Flatten(), nn.Linear(16, 10)), []
    benchmark = domains()
    measure = Evaluator(benchmark, Augment([], None, None, CPU))
    assert measure.sizes == [10] * 6 and benchmark.made == (), "sizes are known without the images"
    for _ in range(2):
        results.append(measure(method, 10))
    assert benchmark.made == (0, 1, 2, 3, 4, 5, 2, 3, 4, 5) and list(benchmark._tests) == [0, 1]
    monkeypatch.undo()
    assert results == 2 * [Evaluator(domains(), Augment([], None, None, CPU))(method, 10)]


def test_a_test_set_of_another_size_than_said_is_refused():
    class Halved(Domains):
        def make_test(self, index):
            split = super().make_test(index)
            return Split(split.images[::2], split.labels[::2], split.ids[::2])

    measure = Evaluator(domains(Halved), Augment([], None, None, CPU))
    with pytest.raises(DataError, match="task 1 has 5 test images, its `num_rows` says 10. Define `num_rows`"):
        measure(nn.Flatten(), 10)


class Noisy(nn.Module):
    """BatchNorm and dropout, which a wrong mode would move or let speak."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 10))
        self.modes, self.rows = [], 0

    def forward(self, x):
        self.modes.append((self.training, torch.is_grad_enabled()))
        self.rows += len(x)
        return self.body(x)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_method_as_it_was(monkeypatch, training):
    trainer, method = build(), Noisy()
    method.train()
    method(torch.randn(50, *SHAPE))  # running averages of their own
    method.train(training)
    method.modes, method.rows = [], 0
    before = {key: tensor.clone() for key, tensor in method.state_dict().items()}
    random = torch.get_rng_state()
    chunk_of(monkeypatch, 5)
    first = trainer.evaluate(method, 10)
    assert method.training == training and all(module.training == training for module in method.modules())
    assert set(method.modes) == {(False, False)}, "eval mode and no graph"
    assert method.rows == sum(len(task.test) for task in trainer.benchmark)
    assert first == trainer.evaluate(method, 10)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[key], tensor) for key, tensor in method.state_dict().items())
    assert all(parameter.grad is None for parameter in method.parameters())


def test_training_goes_on_as_if_there_had_been_no_evaluation():
    """The untrained row and the rows after each task must not shift what is drawn for training."""
    trainers = [build("--debug_mode", "--backbone", "resnet32") for _ in range(2)]
    weights = []
    for trainer, silent in zip(trainers, (False, True), strict=True):
        if silent:
            trainer.evaluate = lambda *_: {"class-il": [0.0] * 5, "task-il": [0.0] * 5}
        torch.manual_seed(0)
        trainer.run()
        weights.append(trainer.method.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


# ------------------------------------------------------------------------------------- debug mode, learning rate


def test_debug_mode_takes_five_batches_of_one_epoch():
    trainer = build("--debug_mode", "--n_epochs", 3)
    trainer.run()
    assert trainer.cost.steps == 5 * 5 and trainer.n_epochs == 1
    assert trainer.cost.forward_rows == trainer.cost.backward_rows == 25 * 16
    whole = build("--n_epochs", 2, "--stop_after", 1)
    whole.run()
    assert whole.cost.steps == 2 * 8 and whole.cost.forward_rows == 2 * 128


def rates(*words, epochs):
    config = resolve(["--model", "sgd", "--dataset", "seq-cifar100", "--n_epochs", str(epochs), *map(str, words)])
    return [learning_rate(config, epoch) for epoch in range(epochs)]


def test_learning_rates_by_hand():
    assert rates("--lr_scheduler", "none", "--lr", 0.3, epochs=3) == [0.3] * 3
    multistep = rates("--lr_scheduler", "multistep", "--lr_milestones", "2,4", "--lr_gamma", 0.1, "--lr", 1, epochs=6)
    assert multistep == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    cosine = rates("--lr_scheduler", "cosine", "--lr", 0.2, epochs=4)
    assert cosine == pytest.approx([0.2, 0.2 * 0.8535533905932737, 0.1, 0.2 * 0.14644660940672624])
    assert rates("--lr_scheduler", "cosine", "--lr", 1, epochs=50)[49] == pytest.approx(0.5 * (1 + cos(pi * 49 / 50)))


def test_the_published_schedule_of_seq_cifar100():
    found = rates(epochs=50)
    assert found == pytest.approx([0.03] * 35 + [0.006] * 10 + [0.0012] * 5)


def test_the_learning_rate_starts_anew_with_each_task():
    trainer = build(
        *("--n_epochs", 3, "--stop_after", 2, "--batch_size", 64, "--lr", 0.4),
        *("--lr_scheduler", "multistep", "--lr_milestones", "1,2", "--lr_gamma", 0.5),
    )
    used, step, weights = [], trainer.optimizer.step, trainer.method.net.classifier.weight

    def measured(objective):
        before = weights.detach().clone()
        update = step(objective)
        position = [parameter is weights for parameter in trainer.optimizer.params].index(True)
        used.append((torch.linalg.norm(before - weights) / torch.linalg.norm(update[position])).item())
        return update

    trainer.optimizer.step = measured
    trainer.run()
    one_task = [0.4] * 2 + [0.2] * 2 + [0.1] * 2  # two batches an epoch
    assert used == pytest.approx(2 * one_task, rel=1e-3)
