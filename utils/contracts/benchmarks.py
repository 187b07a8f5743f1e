"""What every benchmark must keep. They are asked for of its own data, which is loaded, and never downloaded."""

import json
from typing import Any

import torch

from flatcl.datasets import Benchmark, Split
from flatcl.utils.arguments import resolve
from flatcl.utils.contracts._runs import Broken, Skipped, difference, expect, global_generators, start
from flatcl.utils.engine import seeding
from flatcl.utils.engine.augment import Augment
from flatcl.utils.engine.augment_check import look_at, pipeline
from flatcl.utils.engine.trainer import Stream
from flatcl.utils.files import user_path
from flatcl.utils.registry import DATASETS

DRAW = "Draw from flatcl.utils.engine.seeding.generator(self.config.seed, 'name of what is drawn')"


def subject(name: str) -> Benchmark:
    """The benchmark with its data, from the folder of `$FLATCL_DATA` or ./data. Raises `Skipped` where that is missing,
    `UsageError` where it, or what `load` returns, is not as it must be."""
    config = resolve(["--model", "sgd", "--dataset", name, "--model_config", "default"])
    missing = DATASETS.load(name).missing(user_path(config.base_path))
    if missing is not None:
        raise Skipped(f"data missing: {missing}")
    benchmark = config.benchmark(config)
    benchmark.check_tasks()
    return benchmark


def _again(benchmark: Benchmark) -> Benchmark:
    return type(benchmark)(benchmark.config)


def _columns(split: Split) -> dict[str, Any]:
    return dict(vars(split))


def tasks_are_as_declared(benchmark: Benchmark) -> None:
    """As many as n_tasks, their images of the declared shape, their labels of the declared classes."""
    number = benchmark.config.n_tasks
    expect(len(benchmark) == len(list(benchmark)) == number, f"it has {len(benchmark)} tasks, n_tasks says {number}")
    covered = []
    for index, task in enumerate(benchmark):
        expect(task.index == index, f"task {index} has the index {task.index}")
        covered += task.classes
        for part in ("train", "test"):
            _check_split(benchmark, getattr(task, part), task.classes, f"task {index}'s {part} split")
    classes = list(range(benchmark.num_classes))
    wanted = classes if benchmark.setting == "class-il" else number * classes
    expect(covered == wanted, "the tasks must part the classes, in order; in other settings each has all of them")


def _check_split(benchmark: Benchmark, split: Split, classes: range, what: str) -> None:
    sizes = {name: len(getattr(split, name)) for name in ("images", "labels", "ids")}
    expect(
        len(set(sizes.values())) == 1 and sizes["labels"] > 0, f"{what} has {sizes}: equal numbers, above 0, must be"
    )
    images, labels, ids = split.images, split.labels, split.ids
    is_right = images.dtype == torch.uint8 and tuple(images.shape[1:]) == benchmark.shape
    wanted = f"(N, {', '.join(map(str, benchmark.shape))}) uint8"
    expect(is_right, f"{what} has images {tuple(images.shape)} {images.dtype}, they must be {wanted}")
    for name, column in (("labels", labels), ("ids", ids)):
        is_right = column.dtype == torch.int64 and column.ndim == 1
        expect(is_right, f"{what} has {name} {tuple(column.shape)} {column.dtype}, they must be (N,) int64")
    present, named = set(labels.tolist()), {*classes} - {*benchmark.empty_classes}
    expect(
        present <= set(classes), f"{what} has the labels {sorted(present - set(classes))}, which are not its classes"
    )
    if benchmark.setting != "general-continual":
        expect(present >= named, f"{what} has no image of the classes {sorted(named - present)}")
        expect(split.batch_lengths is None, f"{what} has batch_lengths, which are for general-continual streams")


def ids_are_unique(benchmark: Benchmark) -> None:
    """Over all tasks, in training and in testing."""
    for part in ("train", "test"):
        ids = torch.cat([getattr(task, part).ids for task in benchmark])
        twice = len(ids) - len(ids.unique())
        expect(not twice, f"{twice} ids of {part} images are there twice. Give the copies of another task other ids")


def indexing_advances_nothing(benchmark: Benchmark) -> None:
    """A task is the same whenever it is asked for, and no global generator is drawn from."""
    twin, last, before = _again(benchmark), len(benchmark) - 1, global_generators()
    backwards = [_columns(twin[index].train) for index in (last, 0)]
    for index, found in ((0, backwards[1]), (last, backwards[0]), (0, _columns(twin[0].train))):
        differs = difference(_columns(benchmark[index].train), found, f"task {index}'s train split")
        expect(not differs, f"{differs} when tasks are asked for in another order. {DRAW}")
    differs = difference(_columns(benchmark[0].test), _columns(twin[0].test), "task 0's test split")
    expect(not differs, f"{differs} when it is asked for again")
    drawn = difference(before, global_generators(), "the global generator")
    expect(not drawn, f"{drawn}: it is drawn from. {DRAW}")


def ends_where_it_ends(benchmark: Benchmark) -> None:
    """An index outside the tasks raises IndexError."""
    for index in (-1, len(benchmark), len(benchmark) + 5):
        try:
            benchmark[index]
        except IndexError:
            continue
        raise Broken(f"there is a task {index} of {len(benchmark)}. Raise IndexError there")


def augments_each_image(benchmark: Benchmark) -> None:
    """Each image has draws of its own, from torch's global generators."""
    if not benchmark.augmentations():
        raise Skipped("it has no augmentations")
    augment = Augment(pipeline(benchmark), benchmark.mean, benchmark.std, torch.device("cpu"))
    look_at(augment, benchmark)


def seed_makes_the_order(benchmark: Benchmark) -> None:
    """The same seed gives the same tasks and the same batches in the same order."""
    plain, config = Augment([], None, None, torch.device("cpu")), benchmark.config
    found = []
    for one in (benchmark, _again(benchmark)):
        stream = Stream(plain, config.batch_size, seeding.generator(config.seed, "order"), max_batches=5)
        found.append([(batch.ids, batch.y, batch.x) for batch in stream.epoch(one[0].train)])
    differs = difference(*found, "the first batches")
    expect(not differs, f"{differs} with the same seed. {DRAW}")


def tells_what_it_decided(benchmark: Benchmark) -> None:
    """`decided` is what JSON can hold, and the same for the same seed."""
    first, again = (json.dumps(one.decided()) for one in (benchmark, _again(benchmark)))
    expect(first == again, "decided() differs with the same seed")


def trains_a_task(benchmark: Benchmark) -> None:
    """A few steps of er under sam, and an evaluation."""
    flags = {"base_path": benchmark.config.base_path, "eval_tasks": "seen", "optimizer": "sam"}
    trainer = start("er", dataset=benchmark.name, debug_mode=1, stop_after=1, **flags)
    accuracy = trainer.run()["accuracy"]
    expect(benchmark.setting in accuracy, f"there is no accuracy of its setting {benchmark.setting}")


CONTRACTS = {
    "tasks are as the class declares": tasks_are_as_declared,
    "ids are unique": ids_are_unique,
    "indexing advances nothing": indexing_advances_nothing,
    "an index outside the tasks is an error": ends_where_it_ends,
    "augmentations draw for each image": augments_each_image,
    "same seed, same batches in the same order": seed_makes_the_order,
    "what the seed decided can be written down": tells_what_it_decided,
    "trains a task": trains_a_task,
}
