"""Benchmarks: a data set split into a sequence of tasks. Knows the order of the classes and the tasks, but no method.

A new benchmark is a file with one class that says where its data is (`load`), how it is normalised and augmented, and
which defaults its protocol has. `Benchmark` is class-incremental; in a `DomainBenchmark` each task has all classes and
transforms the images in its own way.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatcl.datasets._checks import Arrays, check_declared, check_pixel_map, checked_arrays, digest_of
from flatcl.utils.engine import seeding
from flatcl.utils.errors import DataError, UsageError, mistake
from flatcl.utils.files import user_path
from flatcl.utils.protocols import Config

KEPT_BYTES = 2**30  # of the tasks' test images, made once; beyond, they are made for each evaluation


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) uint8, labels (N,) int64 and ids (N,) int64, unique over the benchmark.

    `batch_lengths`, if given: the order of the rows and the sizes of the batches are part of the data (a stream).
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    batch_lengths: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Split({len(self):,} images {'x'.join(map(str, self.images.shape[1:]))}, uint8)"


def joined(parts: list[Split]) -> Split:
    """The rows of these splits, one after the other."""
    images, labels, ids = ([getattr(part, name) for part in parts] for name in ("images", "labels", "ids"))
    return Split(torch.cat(images), torch.cat(labels), torch.cat(ids))


class Task:
    """One task: `index`, `classes` (the outputs that it uses), and the splits `train` and `test`, made at first use."""

    def __init__(self, benchmark: "Benchmark", index: int, classes: range):
        self.benchmark, self.index, self.classes = benchmark, index, classes

    @cached_property
    def train(self) -> Split:
        return self.benchmark.train_split(self.index)

    @cached_property
    def monitor(self) -> Split:
        """The images that --early_stop holds out."""
        return self.benchmark.monitor_split(self.index)

    @cached_property
    def test(self) -> Split:
        return self.benchmark.test_split(self.index)

    def __repr__(self) -> str:
        return f"task {self.index + 1} of {self.benchmark.name}: outputs {self.classes.start}..{self.classes.stop - 1}"


class JointTask(Task):
    """All tasks as one, for upper bounds."""

    def __init__(self, benchmark: "Benchmark"):
        super().__init__(benchmark, 0, range(benchmark.num_classes))

    @cached_property
    def train(self) -> Split:
        return self.benchmark.joint_split()

    @cached_property
    def test(self) -> Split:
        return joined([task.test for task in self.benchmark])

    @cached_property
    def monitor(self) -> Split:
        parts = [task.monitor for task in self.benchmark] if self.benchmark.setting != "class-il" else []
        return joined(parts) if parts else self.benchmark._held_out


class Benchmark(Sequence[Task]):
    """A class-incremental benchmark: task t has the classes t * k ... t * k + k - 1 of the class order.

    Labels are positions in the class order, so a label is also the number of its output. Building a benchmark loads its
    data to `device`; indexing it changes no state.

    Tasks of unequal sizes: a user gives --classes_per_task. A protocol with such tasks has it in its `defaults`, or, if
    users may not change it, sets `task_sizes = (50, 10, 10, 10, 10, 10)` (then `n_tasks` is not needed in `defaults`).
    If the sizes depend on flags, override `classes_of` and read `self.num_tasks`, which is --n_tasks. In all cases each
    task has at least one class, and the classes of the tasks follow one another from 0 to num_classes - 1: all classes
    before those of a task are old.

    If the number of classes or the shape of the images is known only from the data, override `declared`.
    """

    name: str
    setting = "class-il"
    num_classes: int
    empty_classes: tuple[int, ...] = ()  # classes that have an output but, on purpose, no image
    shape: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...] | None = None  # of pixels in 0..1; None: no normalisation
    std: tuple[float, ...] | None = None
    default_backbone = "mnistmlp"
    defaults: dict[str, Any] = {}  # flags of the protocol: n_tasks, batch_size, n_epochs, lr ...
    protocols: dict[str, dict[str, Any]] = {}  # what --protocol chooses instead: {name: {flag: value}}, backbone too
    task_sizes: tuple[int, ...] | None = None  # classes of each task, where they are not equal
    unofficial: str | None = None  # a digest of its data, where files that should be official have other rows
    draws_tasks = False  # the seed decides what its tasks, or its stream, are
    published_as: str | None = None  # benchmark whose published values serve for this one too, marked as ours

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if cls.task_sizes:
            cls.defaults = {**cls.defaults, "n_tasks": len(cls.task_sizes)}

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        self.config = config
        assert config.n_tasks is not None  # `check` has seen to it
        self.num_tasks: int = config.n_tasks
        if config.classes_per_task:
            self.task_sizes = config.classes_per_task
        loaded = self.load(user_path(config.base_path))
        check_declared(self)
        train, test = checked_arrays(self, loaded)
        if not getattr(loaded, "is_official", True):
            self.unofficial = digest_of(train, test)
        order = self.class_order()
        self._train = self._base(train, order, device)
        self._test = self._base(test, order, device)
        if config.validation:
            self._test = self._take_out("validation")
        self._monitor = self._take_out("early stop") if config.early_stop is not None else None
        self._tests: dict[int, Split] = {}
        self._kept_bytes = 0

    @classmethod
    def _can_monitor(cls) -> bool:
        """Whether `monitor_split` belongs to what makes the training images."""
        train, monitor = (
            next(base for base in cls.__mro__ if name in vars(base)) for name in ("train_split", "monitor_split")
        )
        return cls.setting != "general-continual" and issubclass(monitor, train)

    def to(self, device: torch.device) -> None:
        """Moves the images to a device."""
        for name in ("_train", "_test", "_monitor"):
            split = getattr(self, name)
            if split is not None:
                setattr(self, name, Split(split.images.to(device), split.labels.to(device), split.ids.to(device)))

    @property
    def num_bytes(self) -> int:
        """Of its images in memory."""
        return self._train.images.nbytes + self._test.images.nbytes

    def load(self, root: Path) -> tuple[Arrays, Arrays]:
        """(train, test), each images (N, C, H, W) uint8 in 0..255 and labels (N,) int64 in 0..num_classes - 1, with at
        least one row, and one training image of each class that is not in `empty_classes`. Raises `DataError`.

        What has only one possible meaning is converted: NumPy arrays, labels of other integer types. Everything else
        is refused, with the line to write: images of other dtypes or with another order of axes, labels from 1.
        """
        raise UsageError(f"{self.name} has no `load`. Give it a method load(root) that returns its images and labels.")

    @classmethod
    def missing(cls, root: Path) -> str | None:
        """What `load` would have to download, and where to put it by hand; None if nothing. Opens no file."""
        return None

    @classmethod
    def declared(cls, config: Config) -> type["Benchmark"]:
        """This class, or a subclass (`with_declared`) with the attributes that depend on the data of this
        configuration: num_classes and shape, and n_tasks in `defaults` if the data decides it.

        Called before the checks, so read only what is needed for this; `load` can set mean and std on `self`. Raises
        `UsageError` if the data is missing.
        """
        return cls

    @classmethod
    def with_declared(cls, **attributes: Any) -> type["Benchmark"]:
        """A subclass of the same name."""
        return type(cls.__name__, (cls,), {"__module__": cls.__module__, **attributes})

    @classmethod
    def sources(cls, config: Config) -> dict[str, str]:
        """{name: digest} of files of the user that change the numbers of a run: part of its identity, like code."""
        return {}

    def augmentations(self) -> list[nn.Module]:
        """kornia augmentations of the training images (N, C, H, W) float32 in 0..1, applied in order, before
        normalisation. Each draws separately for each image, from torch's global generators. One call has images of
        many batches, so draws that are shared by its images (kornia's `same_on_batch`, torchvision's transforms) are
        refused."""
        return []

    @classmethod
    def check(cls, config: Config) -> list[str]:
        """Problems of this benchmark with a configuration, one line each; called before any data is loaded."""
        undeclared = [name for name in ("num_classes", "shape") if not hasattr(cls, name)]
        if undeclared:
            return [f"{cls.name} has no `{undeclared[0]}`. Set it in its class."]
        if config.n_tasks is None:
            own, ours = (getattr(one.declared, "__func__", None) for one in (cls, Benchmark))
            is_own_data = own is not ours
            hint = "." if is_own_data else "; its author can set one of them in its `defaults`."
            return [
                f"{cls.name} does not say into how many tasks its {cls.num_classes} classes are split. Give "
                f"--classes_per_task or --n_tasks{hint}"
            ]
        if config.classes_per_task and not cls._takes_task_sizes():
            return [f"--classes_per_task has no effect on {cls.name}, which defines its own tasks. Drop it."]
        problems = []
        if cls.augmentations is Benchmark.augmentations and config.origins["augmentation"] == "argv":
            if not config.augmentation:  # no mistake where it is given for the runs of several benchmarks
                warnings.warn(f"--augmentation 0 has no effect on {cls.name}, which has none", stacklevel=2)
        if config.start_from >= config.n_tasks:
            problems.append(
                f"--start_from must be less than the number of tasks {config.n_tasks}, got {config.start_from}. Give "
                "less."
            )
        if config.stop_after is not None and not config.start_from < config.stop_after <= config.n_tasks:
            problems.append(
                f"--stop_after must lie between start_from + 1 = {config.start_from + 1} and the number of tasks "
                f"{config.n_tasks}, got {config.stop_after}. Give a number in between."
            )
        if config.early_stop is not None and not cls._can_monitor():
            problems.append(
                f"--early_stop cannot be used with {cls.name}, which makes its own training images for each task and "
                "has no `monitor_split`. Drop it."
            )
        return problems + cls.check_classes(config)

    @classmethod
    def _takes_task_sizes(cls) -> bool:
        return cls.setting == "class-il" and not cls.task_sizes and cls.classes_of is Benchmark.classes_of

    @classmethod
    def check_classes(cls, config: Config) -> list[str]:
        problems, sizes = [], config.classes_per_task
        if sizes:
            if sum(sizes) != cls.num_classes:
                problems.append(
                    f"--classes_per_task must add up to the {cls.num_classes} classes of {cls.name}, got {sum(sizes)} "
                    f"({' + '.join(map(str, sizes))}). Give sizes that have this sum."
                )
        elif cls.task_sizes:
            if config.n_tasks != len(cls.task_sizes):
                problems.append(
                    f"--n_tasks must be {len(cls.task_sizes)} on {cls.name}, whose tasks have "
                    f"{', '.join(map(str, cls.task_sizes))} classes, got {config.n_tasks}. Drop it."
                )
        elif config.n_tasks and cls.classes_of is Benchmark.classes_of and cls.num_classes % config.n_tasks:
            problems.append(
                f"--n_tasks must divide the {cls.num_classes} classes of {cls.name}, got {config.n_tasks}. "
                f"Choose from: {', '.join(str(n) for n in range(1, cls.num_classes + 1) if cls.num_classes % n == 0)}; "
                "or give tasks of unequal sizes by --classes_per_task."
            )
        order = config.custom_class_order
        if order and sorted(order) != list(range(cls.num_classes)):
            problems.append(
                f"--custom_class_order must name each class 0..{cls.num_classes - 1} of {cls.name} once, "
                f"got {len(order)} numbers. Give all {cls.num_classes}."
            )
        return problems

    def class_order(self) -> list[int]:
        """The classes of the data set in the order in which they appear."""
        if self.config.custom_class_order:
            return list(self.config.custom_class_order)
        if self.config.permute_classes:
            return seeding.generator(self.config.seed, "class order").permutation(self.num_classes).tolist()
        return list(range(self.num_classes))

    def decided(self) -> dict[str, Any]:
        """What the seed and the flags decided, in types of JSON: the content of benchmark.json in the run folder.

        class_order: the class of the data set behind each output. held_out: with --validation, the rows of the
        training images of `load` that are used for testing. monitored: with --early_stop, the rows that decide when to
        stop. tasks: the classes, as numbered in the data set, and the rows of each task. A benchmark that
        decides more adds to it: `super().decided() | {"angles": [...]}`. `pixels`, where a benchmark adds it, is a
        digest of the images: with others, a run is not resumed. Of files that should be official and have other rows,
        the engine adds it.
        """
        order, tasks = self.class_order(), []
        for index in range(self.num_tasks):
            train_rows, test_rows = self.num_rows(index) or (None, None)
            classes = [order[output] for output in self.classes_of(index)]
            tasks.append({"classes": classes, "train_rows": train_rows, "test_rows": test_rows})
        held_out = {"held_out": self._test.ids.tolist()} if self.config.validation else {}
        if self._monitor is not None:
            held_out["monitored"] = self._monitor.ids.tolist()
        return {"class_order": order, **held_out, "tasks": tasks}

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        return (
            f"{self.name}: {self.num_tasks} task(s), {self.setting}, {self.num_classes} classes, images {size}, "
            f"{len(self._train):,} to train on, {len(self._test):,} to test on"
        )

    def num_rows(self, index: int) -> tuple[int, int] | None:
        """(training rows, test rows) of a task; None if they are not known before its images are made.

        Counted from the labels if the splits are made by this class. If a class-incremental subclass makes its own
        splits and does not override this, they are made once and counted, which costs at most a copy of the data set;
        not in other settings, where each task may be as large as the data set.
        """
        mine, cls = Benchmark, type(self)
        if (cls.train_split, cls.test_split, cls.make_test) == (mine.train_split, mine.test_split, mine.make_test):
            classes = slice(self.classes_of(index).start, self.classes_of(index).stop)
            train, test = (int(counts[classes].sum()) for counts in self._rows_of_classes)
            return train, test
        if self.setting != "class-il":
            return None
        return len(self.train_split(index)), len(self.test_split(index))

    @cached_property
    def _rows_of_classes(self) -> tuple[Tensor, ...]:
        """Training and test rows (num_classes,) of each output."""
        return tuple(torch.bincount(s.labels, minlength=self.num_classes).cpu() for s in (self._train, self._test))

    def __len__(self) -> int:
        return self.num_tasks

    def __getitem__(self, index: int) -> Task:  # type: ignore[override]  # there are no slices
        if not 0 <= index < self.num_tasks:
            raise IndexError(index)
        return Task(self, index, self.classes_of(index))

    @property
    def joint_task(self) -> Task:
        return JointTask(self)

    def classes_of(self, index: int) -> range:
        """The outputs that a task uses; those of later tasks come after them."""
        if self.task_sizes:
            start = sum(self.task_sizes[:index])
            return range(start, start + self.task_sizes[index])
        size = self.num_classes // self.num_tasks
        return range(index * size, (index + 1) * size)

    def check_tasks(self) -> None:
        """Called once, before any work: the classes of the tasks must be as declared, and each task needs images.

        Raises `UsageError`, `DataError`.
        """
        end = 0
        for index in range(self.num_tasks if self.setting == "class-il" else 0):
            classes = self.classes_of(index)
            is_next = isinstance(classes, range) and classes == range(end, end + len(classes)) and len(classes) > 0
            if not is_next:
                raise UsageError(
                    f"{self.name}: the classes of task {index + 1} must be a range that is not empty and begins with "
                    f"{end}, got {classes}. Correct its `task_sizes` or `classes_of`."
                )
            end = classes.stop
        if end not in (0, self.num_classes):
            raise UsageError(
                f"{self.name}: its tasks must have {self.num_classes} classes in total, got {end}. Correct its "
                "`task_sizes` or `classes_of`."
            )
        empty = next((index for index in range(self.num_tasks) if self._num_train_rows(index) == 0), None)
        if empty is not None:
            raise DataError(
                f"{self.name}: task {empty + 1} has no training images. Use larger data, fewer tasks, or no "
                "--validation and no --early_stop."
            )

    def _num_train_rows(self, index: int) -> int:
        rows = self.num_rows(index)
        return len(self.train_split(index)) if rows is None else rows[0]

    def train_split(self, index: int) -> Split:
        return self._of_classes(self._train, self.classes_of(index))

    def monitor_split(self, index: int) -> Split:
        """With --early_stop, the images of a task that are not trained on and decide when to stop."""
        return self._of_classes(self._held_out, self.classes_of(index))

    @property
    def _held_out(self) -> Split:
        assert self._monitor is not None, "it is there with --early_stop only"
        return self._monitor

    def test_split(self, index: int) -> Split:
        if index in self._tests:
            return self._tests[index]
        made = self.make_test(index)
        if self._kept_bytes + made.images.nbytes <= KEPT_BYTES:  # the first ones stay: all are visited in turn
            self._kept_bytes += made.images.nbytes
            self._tests[index] = made
        return made

    def test_size(self, index: int) -> int:
        """The number of test images of a task."""
        rows = self.num_rows(index)
        return len(self.test_split(index)) if rows is None else rows[1]

    def make_test(self, index: int) -> Split:
        return self._of_classes(self._test, self.classes_of(index))

    def joint_split(self) -> Split:
        return self._train

    @staticmethod
    def _of_classes(split: Split, classes: range) -> Split:
        rows = ((split.labels >= classes.start) & (split.labels < classes.stop)).nonzero().squeeze(1)
        return Split(split.images[rows], split.labels[rows], split.ids[rows])

    def _base(self, arrays: Arrays, order: list[int], device: torch.device | str) -> Split:
        images, labels = arrays
        position = torch.empty(self.num_classes, dtype=torch.int64)
        position[torch.tensor(order)] = torch.arange(self.num_classes)
        return Split(images.to(device), position[labels].to(device), torch.arange(len(labels), device=device))

    def _take_out(self, purpose: str) -> Split:
        """10 % of the training images, drawn at random; the others are trained on."""
        rng = seeding.generator(self.config.seed, purpose)
        order = torch.from_numpy(rng.permutation(len(self._train))).to(self._train.labels.device)
        cut = max(1, len(order) // 10)
        held, kept = order[:cut].sort().values, order[cut:].sort().values
        full = self._train
        self._train = Split(full.images[kept], full.labels[kept], full.ids[kept])
        return Split(full.images[held], full.labels[held], full.ids[held])


class DomainBenchmark(Benchmark):
    """A domain-incremental benchmark: each task has all classes and all images, transformed in its own way."""

    setting = "domain-il"

    @classmethod
    def check_classes(cls, config: Config) -> list[str]:
        return [
            f"--{name} has no effect on {cls.name}: each of its tasks has all classes. Drop it."
            for name in ("permute_classes", "custom_class_order")
            if getattr(config, name)
        ] + (
            [f"--class_il_argmax has no effect on {cls.name}, which is domain-incremental. Drop it."]
            if config.class_il_argmax != "all"
            else []
        )

    def pixel_map(self, index: int) -> Tensor:
        """(H * W,) int64: pixel p of task `index` is pixel map[p] of the stored image; H * W means black."""
        raise mistake(
            self,
            "it has no `pixel_map`, which says how a task's images differ from the stored ones. Write it, or, where "
            "each domain has images of its own, num_rows, train_split, monitor_split, make_test and joint_split.",
        )

    def classes_of(self, index: int) -> range:
        return range(self.num_classes)

    def num_rows(self, index: int) -> tuple[int, int] | None:
        mine, cls = DomainBenchmark, type(self)
        if (cls.train_split, cls.test_split, cls.make_test) == (mine.train_split, mine.test_split, mine.make_test):
            return len(self._train), len(self._test)
        return None

    def train_split(self, index: int) -> Split:
        return self._transformed(self._train, index)

    def monitor_split(self, index: int) -> Split:
        return self._transformed(self._held_out, index)

    def make_test(self, index: int) -> Split:
        return self._transformed(self._test, index)

    def joint_split(self) -> Split:
        parts = [self.train_split(index) for index in range(self.num_tasks)]
        return joined(parts)

    def _transformed(self, split: Split, index: int) -> Split:
        pixel_map = self.pixel_map(index)
        check_pixel_map(self.name, index, pixel_map, self.shape)
        images = gather_pixels(split.images, pixel_map)
        # ids stay unique over the benchmark: the tasks' copies of an image are images of their own
        return Split(images, split.labels, split.ids + index * 10**7)


def gather_pixels(images: Tensor, pixel_map: Tensor) -> Tensor:
    """Images (N, C, H, W) uint8 with pixels rearranged by one map (H * W,), or by one for each image (N, H * W)."""
    n, channels, height, width = images.shape
    black = height * width
    padded = torch.nn.functional.pad(images.reshape(n, channels, black), (0, 1)) if pixel_map.max() == black else None
    flat = images.reshape(n, channels, black) if padded is None else padded
    if pixel_map.ndim == 2:
        index = pixel_map.to(images.device)[:, None, :].expand(n, channels, black)
        return flat.gather(2, index).reshape(images.shape)
    if images.device.type == "cpu":  # four times as fast as torch's index_select along a row
        return torch.from_numpy(flat.numpy().take(pixel_map.numpy(), axis=2)).reshape(images.shape)
    return flat.index_select(2, pixel_map.to(images.device)).reshape(images.shape)
