"""Every registered benchmark: its tasks, labels, ids and flags; and the four MNIST protocols against Pillow."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from made import (
    declared,
    make_cifar10,
    make_cifar100,
    make_eurosat,
    make_gtsrb,
    make_mnist,
    make_svhn,
    make_tinyimagenet,
)
from PIL import Image

from flatcl.datasets import _files
from flatcl.datasets._rotation import rotation_maps
from flatcl.utils.arguments import resolve
from flatcl.utils.contracts import benchmarks
from flatcl.utils.contracts._runs import Skipped
from flatcl.utils.engine.build import build as build_trainer
from flatcl.utils.errors import DataError, UsageError
from flatcl.utils.registry import DATASETS

pytestmark = pytest.mark.filterwarnings("ignore:.*not the official data set")

NAMES = declared()
SETTINGS = {name: DATASETS.load(name).setting for name in NAMES}
CLASS_IL = [name for name in NAMES if SETTINGS[name] == "class-il"]
NOT_AUGMENTED = {"mnist-360", "perm-mnist", "rot-mnist", "seq-digits", "seq-fmnist", "seq-mnist"}
DOMAIN_IL = [name for name in NAMES if SETTINGS[name] == "domain-il"]
KNOWN = {
    "mnist-360", "perm-mnist", "rot-mnist", "seq-cifar10", "seq-cifar100", "seq-digits", "seq-eurosat", "seq-fmnist",
    "seq-gtsrb", "seq-mnist", "seq-svhn", "seq-synth", "seq-tinyimg",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_mnist(folder, n_train=350, n_test=120)
    make_mnist(folder, "FashionMNIST", n_train=350, n_test=120, seed=1)
    make_cifar10(folder)
    make_cifar100(folder)
    make_tinyimagenet(folder)
    make_svhn(folder)
    make_gtsrb(folder)
    make_eurosat(folder)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A benchmark whose data is not made here is skipped, never downloaded."""

    def refuse(urls, path, md5, what):
        raise DataError(f"would download {path}")

    monkeypatch.setattr(_files, "fetch", refuse)


def configure(name, *words):
    return resolve(["--model", "sgd", "--dataset", name, "--model_config", "default", *map(str, words)])


def build(root, name, *words):
    config = configure(name, *words, "--base_path", root)
    try:
        return config.benchmark(config)
    except DataError as error:
        assert name not in KNOWN, error
        pytest.skip(f"{name} needs data of its own: {error}")


def base_of(benchmark):
    return benchmark.load(Path(benchmark.config.base_path))


def rows_of(ids):
    """Domain benchmarks number the images of task t from t * 10**7."""
    return ids % 10**7


def assert_same(split, other):
    assert torch.equal(split.images, other.images)
    assert torch.equal(split.labels, other.labels)
    assert torch.equal(split.ids, other.ids)
    assert split.batch_lengths == other.batch_lengths


def refused(name, *words):
    with pytest.raises(UsageError) as caught:
        configure(name, *words)
    return list(caught.value.problems)


def test_the_known_benchmarks_are_registered():
    assert set(NAMES) >= KNOWN


@pytest.mark.parametrize("title", benchmarks.CONTRACTS)
@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_contracts(root, name, title):
    try:
        benchmarks.CONTRACTS[title](build(root, name))
    except Skipped as why:
        assert name in NOT_AUGMENTED and str(why) == "it has no augmentations"


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_has_the_tasks_of_its_defaults(root, name):
    assert len(build(root, name)) == DATASETS.load(name).defaults["n_tasks"]


def test_task_counts_of_the_published_protocols():
    counts = {name: configure(name).n_tasks for name in KNOWN}
    assert counts == {
        "mnist-360": 1, "perm-mnist": 20, "rot-mnist": 20, "seq-cifar10": 5, "seq-cifar100": 10, "seq-digits": 5,
        "seq-eurosat": 5, "seq-fmnist": 5, "seq-gtsrb": 6, "seq-mnist": 5, "seq-svhn": 5, "seq-synth": 5,
        "seq-tinyimg": 10,
    }  # fmt: skip


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("name", NAMES)
def test_ids_are_unique_and_name_the_row_of_the_data(root, name, part):
    benchmark = build(root, name)
    images, labels = base_of(benchmark)[("train", "test").index(part)]
    splits = [getattr(task, part) for task in benchmark]
    ids = torch.cat([split.ids for split in splits])
    assert len(ids.unique()) == len(ids)
    for split in splits:
        if benchmark.setting == "class-il":
            assert torch.equal(images[split.ids], split.images) and torch.equal(labels[split.ids], split.labels)
        elif benchmark.setting == "domain-il":
            assert torch.equal(rows_of(split.ids), torch.arange(len(labels)))
            assert torch.equal(labels[rows_of(split.ids)], split.labels)
    if benchmark.setting == "class-il":
        assert torch.equal(ids.sort().values, torch.arange(len(labels))), "every image belongs to one task"


@pytest.mark.parametrize("name", CLASS_IL)
def test_n_tasks_must_divide_the_classes(root, name):
    classes = DATASETS.load(name).num_classes
    divisors = [n for n in range(1, classes + 1) if classes % n == 0]
    for n_tasks in divisors[:2] + divisors[-1:]:
        benchmark = build(root, name, "--n_tasks", n_tasks)
        assert [len(task.classes) for task in benchmark] == [classes // n_tasks] * n_tasks
        task = benchmark[n_tasks - 1]
        assert set(task.train.labels.tolist()) == set(range(classes - classes // n_tasks, classes))
    (problem,) = refused(name, "--n_tasks", classes - 1)
    assert "--n_tasks" in problem and f"got {classes - 1}" in problem and ", ".join(map(str, divisors)) in problem
    assert "--n_tasks" in refused(name, "--n_tasks", 2 * classes)[0]


@pytest.mark.parametrize("name", DOMAIN_IL)
def test_a_domain_benchmark_has_as_many_tasks_as_wanted(root, name):
    few, many = build(root, name, "--n_tasks", 3), build(root, name, "--n_tasks", 23)
    assert len(few) == 3 and len(many) == 23
    for index in range(3):
        assert torch.equal(few[index].train.images, many[index].train.images), "more tasks must not change the first"


@pytest.mark.parametrize("name", CLASS_IL)
def test_custom_class_order_is_honoured(root, name):
    classes = DATASETS.load(name).num_classes
    order = np.random.default_rng(5).permutation(classes).tolist()
    assert order != sorted(order)
    benchmark = build(root, name, "--custom_class_order", ",".join(map(str, order)))
    for part, (images, labels) in zip(("train", "test"), base_of(benchmark), strict=True):
        for task in benchmark:
            split = getattr(task, part)
            original = labels[split.ids]
            assert torch.equal(images[split.ids], split.images)
            assert set(original.tolist()) == set(order[task.classes.start : task.classes.stop])
            assert original.tolist() == [order[label] for label in split.labels.tolist()]
            assert len(split) == sum((labels == wanted).sum() for wanted in set(original.tolist()))


@pytest.mark.parametrize("order", ["0,1,2", "0,1,2,3,4,5,6,7,8,8", "1,2,3,4,5,6,7,8,9,10", "0,1,2,3,4,5,6,7,8,9,0"])
def test_a_wrong_class_order_is_refused(order):
    (problem,) = refused("seq-digits", "--custom_class_order", order)
    assert "--custom_class_order" in problem and "0..9" in problem and "seq-digits" in problem


@pytest.mark.parametrize("name", CLASS_IL)
def test_permute_classes_follows_the_seed(root, name):
    def order_of(seed):
        benchmark = build(root, name, "--permute_classes", "--seed", seed)
        found = {}
        for part, (_, labels) in zip(("train", "test"), base_of(benchmark), strict=True):
            for task in benchmark:
                split = getattr(task, part)
                for label, original in zip(split.labels.tolist(), labels[split.ids].tolist(), strict=True):
                    assert found.setdefault(label, original) == original, "one class, one label, in train and test"
        return [found[label] for label in range(benchmark.num_classes)]

    classes = list(range(DATASETS.load(name).num_classes))
    first, again, other = order_of(3), order_of(3), order_of(4)
    assert sorted(first) == classes and first == again
    assert first != classes and other != classes and first != other


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CLASS_IL])
def test_class_orders_have_no_meaning_without_class_increments(name):
    order = "9,8,7,6,5,4,3,2,1,0"
    for words in (("--permute_classes",), ("--custom_class_order", order), ("--class_il_argmax", "seen")):
        (problem,) = refused(name, *words)
        assert words[0] in problem and name in problem


@pytest.mark.parametrize("name", NAMES)
def test_joint_has_everything(root, name):
    benchmark = build(root, name, "--joint")
    task = benchmark.joint_task
    split, (images, labels) = task.train, base_of(benchmark)[0]
    assert set(task.classes) == set(range(benchmark.num_classes)) and split.batch_lengths is None
    assert torch.equal(task.test.ids, torch.cat([part.test.ids for part in benchmark]))
    assert len(split.ids.unique()) == len(split)
    if benchmark.setting == "class-il":
        assert torch.equal(split.images[split.ids.argsort()], images)
        assert torch.equal(split.labels[split.ids.argsort()], labels)
    elif benchmark.setting == "domain-il":
        parts = [task.train for task in benchmark]
        assert len(split) == len(benchmark) * len(labels)
        assert torch.equal(split.images, torch.cat([part.images for part in parts]))
        assert torch.equal(split.ids, torch.cat([part.ids for part in parts]))
    else:
        assert Counter(split.labels.tolist()) == Counter(labels.tolist()), "each image once"


@pytest.mark.parametrize("name", [*CLASS_IL, *DOMAIN_IL])
def test_validation_holds_out_a_tenth_of_the_training_images(root, name):
    benchmark = build(root, name, "--validation")
    images, labels = base_of(benchmark)[0]
    parts = {}
    for part in ("train", "test"):
        splits = [getattr(task, part) for task in benchmark]
        parts[part] = torch.cat([split.ids for split in splits])
        for split in splits:
            rows = rows_of(split.ids)
            assert torch.equal(labels[rows], split.labels), "held-out images are training images"
            if benchmark.setting == "class-il":
                assert torch.equal(images[rows], split.images)
    copies = len(benchmark) if benchmark.setting == "domain-il" else 1
    assert len(parts["test"]) == copies * (len(labels) // 10)
    assert len(parts["train"]) == copies * (len(labels) - len(labels) // 10)
    assert not set(parts["train"].tolist()) & set(parts["test"].tolist())
    assert len({*parts["train"].tolist(), *parts["test"].tolist()}) == copies * len(labels)
    assert not set(rows_of(parts["train"]).tolist()) & set(rows_of(parts["test"]).tolist())
    if benchmark.setting == "class-il":
        held = torch.cat([task.test.ids for task in build(root, name, "--validation")])
        other = torch.cat([task.test.ids for task in build(root, name, "--validation", "--seed", 1)])
        assert torch.equal(held, parts["test"]) and set(other.tolist()) != set(held.tolist())
        assert len(benchmark.joint_task.train) == len(parts["train"]), "joint training must not see them either"
        assert held.sort().values.tolist() != list(range(len(held))), "drawn at random, not cut off"


# ---------------------------------------------------------------------------------------- permuted and rotated MNIST


def permutation_of(base, shown):
    """map with shown[:, p] == base[:, map[p]]; the made images' pixel columns are all different."""
    columns = {column.tobytes(): number for number, column in enumerate(np.ascontiguousarray(base.T))}
    assert len(columns) == base.shape[1]
    return [columns[column.tobytes()] for column in np.ascontiguousarray(shown.T)]


def flat(images):
    return images.flatten(1).numpy()


def test_perm_mnist_permutes_the_pixels_of_each_task_its_own_way(root):
    benchmark = build(root, "perm-mnist", "--n_tasks", 4)
    (train, _), (test, _) = base_of(benchmark)
    maps = [permutation_of(flat(train), flat(task.train.images)) for task in benchmark]
    for task, found in zip(benchmark, maps, strict=True):
        assert sorted(found) == list(range(784)) and found != sorted(found), "the first task is permuted too"
        assert np.mean(np.array(found) == np.arange(784)) < 0.02
        assert np.array_equal(flat(task.test.images), flat(test)[:, found]), "one permutation for train and test"
    assert len({tuple(found) for found in maps}) == 4
    again, other = (build(root, "perm-mnist", "--n_tasks", 4, "--seed", seed) for seed in (0, 1))
    assert torch.equal(again[2].train.images, benchmark[2].train.images)
    for index in range(4):
        assert permutation_of(flat(train), flat(other[index].train.images)) not in maps


def turned(image, angle):
    """uint8 (28, 28), by Pillow, as torchvision's `rotate` does it by default."""
    return np.asarray(Image.fromarray(image).rotate(angle))


def angle_of(images, shown):
    """The angle in 0..360 at which Pillow turns each of `images` into its like in `shown`, found by search."""

    def agreement(angle):
        return sum((turned(image, angle) == other).sum() for image, other in zip(images, shown, strict=True))

    def best(angles):
        return max(angles, key=agreement)

    near = best(np.arange(0.0, 360.0, 0.5))
    near = best(np.arange(near - 0.6, near + 0.6, 0.02))
    return best(np.arange(near - 0.03, near + 0.03, 0.0005))


def test_rot_mnist_is_what_pillow_makes(root):
    benchmark = build(root, "rot-mnist", "--n_tasks", 3)
    (train, _), (test, _) = base_of(benchmark)
    angles = []
    for task in benchmark:
        angle = angle_of(train[:1, 0].numpy(), task.train.images[:1, 0].numpy())
        for base, split in ((train, task.train), (test, task.test)):
            expected = np.stack([turned(image, angle) for image in base[:100, 0].numpy()])
            assert np.array_equal(split.images[:100, 0].numpy(), expected), f"angle {angle}"
        angles.append(angle)
    assert len({round(angle, 1) for angle in angles}) == 3
    other = build(root, "rot-mnist", "--n_tasks", 3, "--seed", 1)
    again = build(root, "rot-mnist", "--n_tasks", 3)
    assert torch.equal(again[1].train.images, benchmark[1].train.images)
    assert not torch.equal(other[1].train.images, benchmark[1].train.images)


def test_rot_mnist_angles_fill_the_half_turn(root):
    benchmark = build(root, "rot-mnist", "--n_tasks", 40)
    image = base_of(benchmark)[0][0][0, 0].numpy()
    candidates = np.arange(0.0, 360.0, 1.0)
    pictures = np.stack([turned(image, angle) for angle in candidates])
    found = []
    for task in benchmark:
        agreement = (pictures == task.train.images[0, 0].numpy()).mean((1, 2))
        found.append(candidates[agreement.argmax()])
    assert 0 <= min(found) < 30 and 150 < max(found) <= 180
    assert 60 < np.mean(found) < 120 and found != sorted(found)


@pytest.mark.parametrize("size", [8, 28])
def test_rotation_maps_equal_pillow_at_any_angle(size):
    special = [1e-9, 1e-3, 89.99, 90.01, 179.99, 179.999999, 180.01, 359.99, -60, 725.5]
    angles = np.concatenate([np.arange(0, 361, 15), special, np.random.default_rng(0).uniform(0.0, 360.0, 300)])
    pixels = np.arange(1, size * size + 1).reshape(size, size)  # 0 is left for black
    low, high = (pixels % 256).astype(np.uint8), (pixels // 256).astype(np.uint8)
    maps = rotation_maps(angles, size)
    assert maps.shape == (len(angles), size * size) and maps.dtype == np.int64
    for angle, found in zip(angles, maps, strict=True):
        shown = turned(low, angle).astype(int) + 256 * turned(high, angle).astype(int)
        expected = np.where(shown == 0, size * size, shown - 1).ravel()
        assert np.array_equal(found, expected), f"angle {angle!r}: {(found != expected).sum()} pixels differ"


# ------------------------------------------------------------------------------------------------------ MNIST-360

PAIRS = 3 * [(digit, (digit + 1) % 9) for digit in range(9)]


def chunk_sizes(n):
    """Six consecutive chunks, in the order in which the stream takes them: from the last to the first."""
    size = n // 6 + 1
    return [len(range(n)[start : start + size]) for start in range(0, 6 * size, size)][::-1]


def check_stream(labels, lengths, per_digit, batch_size):
    """Walks the batches through the 27 pairs; asserts order, proportion, and that each pair uses up a chunk."""
    sizes = {digit: chunk_sizes(n) for digit, n in per_digit.items()}
    batches = iter(np.split(labels, np.cumsum(lengths)[:-1]))
    for pair in PAIRS:
        left = [sizes[digit].pop(0) for digit in pair]
        while all(left):
            batch = next(batches).tolist()
            counts = [batch.count(digit) for digit in pair]
            assert sum(counts) == len(batch) <= batch_size, f"{set(batch)} in the pair {pair}"
            assert all(count <= rest for count, rest in zip(counts, left, strict=True))
            share = batch_size * left[0] / sum(left)
            assert abs(counts[0] - share) <= 0.5 + 1e-9 or counts[0] == left[0]
            if sum(left) >= batch_size and counts[1] != left[1]:
                assert len(batch) == batch_size
            left = [rest - count for rest, count in zip(left, counts, strict=True)]
    assert next(batches, None) is None, "the stream ends with the 27th pair"


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_mnist_360_streams_27_pairs_in_proportion(root, batch_size):
    benchmark = build(root, "mnist-360", "--batch_size", batch_size)
    (task,) = benchmark
    labels, split = base_of(benchmark)[0][1], task.train
    assert sum(split.batch_lengths) == len(split) and max(split.batch_lengths) <= batch_size
    assert len(split) <= len(labels) and set(split.labels.tolist()) == set(range(9))
    per_digit = {digit: int((labels == digit).sum()) for digit in range(9)}
    check_stream(split.labels.numpy(), split.batch_lengths, per_digit, batch_size)


def test_mnist_360_turns_each_digit_on_as_it_is_drawn(root):
    benchmark = build(root, "mnist-360", "--batch_size", 4)
    images, labels = (array.numpy() for array in base_of(benchmark)[0])
    split = benchmark[0].train
    drawn, used = Counter(), {digit: [] for digit in range(9)}
    for shown, digit in zip(split.images[:, 0].numpy(), split.labels.tolist(), strict=True):
        own = images[labels == digit, 0]
        angle = (digit - 1) * 60 + 360 / len(own) * drawn[digit]
        (source,) = [k for k, image in enumerate(own) if np.array_equal(turned(image, angle), shown)]
        used[digit].append(source)
        drawn[digit] += 1
    for digit, sources in used.items():
        n = int((labels == digit).sum())
        size = n // 6 + 1
        visited = [source // size for source in sources]
        assert visited == sorted(visited, reverse=True) and set(visited) == set(range(6)), "chunks, last to first"
        assert len(set(sources)) < len(sources), "drawn with replacement"


def test_mnist_360_tests_each_image_once_through_a_full_turn(root):
    benchmark = build(root, "mnist-360")
    images, labels = (array.numpy() for array in base_of(benchmark)[1])
    split = benchmark[0].test
    assert split.batch_lengths is None and Counter(split.labels.tolist()) == Counter(labels.tolist())
    assert 9 not in split.labels
    for digit in range(9):
        own = images[labels == digit, 0]
        shown = split.images[split.labels == digit, 0].numpy()
        expected = [turned(image, 360 / len(own) * k) for k, image in enumerate(own)]
        assert np.array_equal(shown, expected)


def test_mnist_360_stream_follows_the_seed(root):
    first, again, other = (build(root, "mnist-360", "--seed", seed)[0].train for seed in (0, 0, 1))
    assert_same(first, again)
    assert torch.equal(first.labels, other.labels) and not torch.equal(first.images, other.images)


def test_mnist_360_validation_holds_out_training_images(root):
    benchmark = build(root, "mnist-360", "--validation")
    n = len(base_of(benchmark)[0][1])
    split = benchmark[0].test
    assert len(split) == n // 10
    per_digit = Counter(build(root, "mnist-360", "--validation", "--joint").joint_task.train.labels.tolist())
    assert sum(per_digit.values()) == n - n // 10
    labels = benchmark[0].train.labels
    check_stream(labels.numpy(), benchmark[0].train.batch_lengths, per_digit, benchmark.config.batch_size)


def test_mnist_360_refuses_what_a_stream_cannot_do():
    words = ("--n_epochs", 2, "--permute_classes", "--n_tasks", 2, "--class_il_argmax", "seen")
    problems = refused("mnist-360", *words)
    for flag in ("--n_epochs", "--permute_classes", "--n_tasks", "--class_il_argmax"):
        assert sum(problem.startswith(flag) and "mnist-360" in problem for problem in problems) == 1, flag
    assert configure("mnist-360", "--n_epochs", 2, "--joint").n_epochs == 2
    assert "--start_from" in refused("mnist-360", "--start_from", 1)[0]


@pytest.mark.parametrize("name, boundaries", [("mnist-360", []), ("seq-digits", [0, 1, 2, 3, 4])])
def test_a_method_learns_of_boundaries_only_where_there_are_any(root, name, boundaries):
    config = configure(name, "--base_path", root, "--disable_log", "--non_verbose", "--debug_mode")
    trainer = build_trainer(config, torch.device("cpu"), None)
    begun, ended = [], []
    trainer.method.begin_task = lambda task: begun.append(task.index)
    trainer.method.end_task = lambda task: ended.append(task.index)
    trainer.run()
    assert ended == boundaries and begun == (boundaries or [0])


# ------------------------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def real():
    for folder in (os.environ.get("FLATCL_DATA"), Path(__file__).parents[2] / "shared" / "data"):
        if folder and any((Path(folder) / "MNIST" / "raw").glob("t10k-labels-idx1-ubyte*")):
            return Path(folder)
    pytest.skip("the real MNIST is not on this machine")


def test_seq_mnist_has_the_published_sizes(real):
    benchmark = build(real, "seq-mnist")
    assert [len(task.train) for task in benchmark] == [12665, 12089, 11263, 12183, 11800]
    assert [len(task.test) for task in benchmark] == [2115, 2042, 1874, 1986, 1983]


def test_rot_mnist_on_the_real_digits(real):
    benchmark = build(real, "rot-mnist")
    (train, labels), (test, _) = base_of(benchmark)
    task = benchmark[7]
    assert len(benchmark) == 20 and len(task.train) == 60000 and len(task.test) == 10000
    assert torch.equal(task.train.labels, labels)
    shown = task.train.images[:40, 0].numpy()
    angle = angle_of(train[:40, 0].numpy(), shown)
    assert np.array_equal(shown, [turned(image, angle) for image in train[:40, 0].numpy()])
    assert np.array_equal(task.test.images[-40:, 0].numpy(), [turned(image, angle) for image in test[-40:, 0].numpy()])


def test_mnist_360_on_the_real_digits(real):
    benchmark = build(real, "mnist-360", "--batch_size", 16)
    labels = base_of(benchmark)[0][1]
    assert len(labels) == 54051
    split, test = benchmark[0].train, benchmark[0].test
    per_digit = {digit: int((labels == digit).sum()) for digit in range(9)}
    check_stream(split.labels.numpy(), split.batch_lengths, per_digit, 16)
    # What a pair leaves of its longer chunk is lost, and nothing else.
    lost = 0
    sizes = {digit: chunk_sizes(n) for digit, n in per_digit.items()}
    for first, second in PAIRS:
        left = [sizes[first].pop(0), sizes[second].pop(0)]
        while all(left):
            a = min(round(left[0] / sum(left) * 16), left[0])
            left = [left[0] - a, left[1] - min(16 - a, left[1])]
        lost += sum(left)
    assert len(split) == sum(split.batch_lengths) == 54051 - lost and lost < 27 * 16
    assert len(test) == 8991 and set(test.labels.tolist()) == set(range(9))


def test_seq_digits_tests_on_every_fifth_image_of_each_digit(root):
    from sklearn.datasets import load_digits

    digits = load_digits()
    benchmark = build(root, "seq-digits")
    (train, train_y), (test, test_y) = base_of(benchmark)
    assert len(train) + len(test) == 1797 and benchmark.num_classes == 10
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)
    for digit in range(10):
        own = pixels[digits.target == digit]
        held = np.arange(len(own)) % 5 == 4
        assert np.array_equal(test[test_y == digit, 0].numpy(), own[held])
        assert np.array_equal(train[train_y == digit, 0].numpy(), own[~held])
    assert train.max() == 255 and train.min() == 0
