"""Accuracy on the tasks, in batches that suit the device; class-il and task-il from one forward, waited for once."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from flatcl.utils.engine.augment import Augment
from flatcl.utils.engine.layout import rows_of_forward
from flatcl.utils.engine.passes import eval_mode
from flatcl.utils.errors import DataError
from flatcl.utils.protocols import Benchmark, Ranks, Split, Task

CPU_BYTES, DEVICE_BYTES = 4 * 2**20, 64 * 2**20  # of a batch of inputs: what stays in a CPU's cache, what fills a GPU


def rows_per_pass(shape: tuple[int, ...], device: torch.device, low: int = 1) -> int:
    """Images of this shape (C, H, W) that are best handled in one call on this device."""
    budget = CPU_BYTES if device.type == "cpu" else DEVICE_BYTES
    return max(low, budget // (4 * shape[0] * shape[1] * shape[2]))


class Evaluator:
    """Measures a method on the tasks of a benchmark. `sizes`: the number of test images of each task."""

    def __init__(
        self, benchmark: Benchmark, augment: Augment, class_il_argmax: str = "all", needs_task: bool = False,
        ranks: Ranks | None = None,
    ):  # fmt: skip
        """`needs_task`: the method is told the task of each image; then only task-il is defined. `ranks`: the processes
        that share the images, if there are several."""
        self.ranks = ranks
        self.benchmark, self.augment, self.argmax, self.needs_task = benchmark, augment, class_il_argmax, needs_task
        both = benchmark.setting == "class-il"
        self.settings = ("class-il", "task-il") if both else (benchmark.setting,)
        if needs_task:
            self.settings = ("task-il",)
        self.sizes = [benchmark.test_size(index) for index in range(len(benchmark))]
        if 0 in self.sizes:
            raise DataError(
                f"{benchmark.name}: task {self.sizes.index(0) + 1} has no test images. Use larger data, or no "
                "--validation."
            )

    @torch.no_grad()
    def __call__(
        self, method: nn.Module, classes_seen: int, num_tasks: int | None = None
    ) -> dict[str, list[float | None]]:
        """{setting: accuracy of each task, a fraction}. The method is in eval mode meanwhile.

        `classes_seen` outputs compete in class-il if the evaluator was built with class_il_argmax 'seen'. The first
        `num_tasks` tasks are evaluated (default: all); the accuracy on the others is None.
        """
        num_tasks = len(self.benchmark) if num_tasks is None else num_tasks
        with eval_mode(method):
            counts = torch.cat([self._count(method, tasks, classes_seen) for tasks in self._passes(num_tasks)])
        correct = counts.tolist()  # (num_tasks, settings); the one wait for the device
        rest: list[float | None] = [None] * (len(self.benchmark) - num_tasks)
        return {
            setting: [row[column] / size for row, size in zip(correct, self.sizes, strict=False)] + rest
            for column, setting in enumerate(self.settings)
        }

    def _passes(self, num_tasks: int) -> Iterator[range]:
        """Tasks that are evaluated together: one, or as many small ones as fit into a pass."""
        room = 0 if self.needs_task else rows_per_pass(self.benchmark.shape, self.augment.device)
        first, images = 0, 0
        for index in range(num_tasks):
            if first < index and images + self.sizes[index] > room:
                yield range(first, index)
                first, images = index, 0
            images += self.sizes[index]
        yield range(first, num_tasks)

    @torch.no_grad()
    def held_out(self, method: nn.Module, task: Task, split: Split, classes_seen: int) -> float:
        """Accuracy, a fraction, on other images of one task, in the first of the settings."""
        owners = torch.zeros(len(split), dtype=torch.int64, device=self.augment.device)
        with eval_mode(method):
            counts = self._correct(method, [task], (split.images, split.labels, owners), classes_seen)
        return counts[0, 0].item() / len(split)

    @torch.no_grad()
    def logits(self, method: nn.Module, images: Tensor, task: int | None = None) -> Tensor:
        """Stored images (N, C, H, W) uint8, on any device -> logits (N, K) on the method's, in eval mode. `task` is for
        methods that must be told it, and for nothing else."""
        with eval_mode(method):
            return torch.cat([self._forward(method, rows, task) for rows in images.split(self._step(method, images))])

    def predictions(self, method: nn.Module) -> dict[str, Tensor]:
        """Of all test images, in the order of their tasks, on the CPU: `logits` (N, K) float32, `labels` (N,) int64
        (the output that stands for the class) and `tasks` (N,) int64."""
        parts: dict[str, list[Tensor]] = {"logits": [], "labels": [], "tasks": []}
        for task in self.benchmark:
            parts["logits"].append(self.logits(method, task.test.images, task.index).float().cpu())
            parts["labels"].append(task.test.labels.cpu())
            parts["tasks"].append(torch.full((len(task.test),), task.index))
        return {name: torch.cat(columns) for name, columns in parts.items()}

    def _step(self, method: nn.Module, images: Tensor) -> int:
        """Images of one forward."""
        shape, device = images.shape[1:], self.augment.device
        return rows_of_forward(method, shape, device, rows_per_pass(shape, device))

    def _forward(self, method: nn.Module, images: Tensor, task: int | None) -> Tensor:
        inputs = self.augment.plain(images)
        return method(inputs, task) if self.needs_task else method(inputs)

    def _count(self, method: nn.Module, indices: range, classes_seen: int) -> Tensor:
        """(tasks, settings) int64: images that are classified correctly."""
        tasks = [self.benchmark[index] for index in indices]
        return self._correct(method, tasks, self._images(tasks), classes_seen)

    def _correct(
        self, method: nn.Module, tasks: Sequence[Task], rows_of_tasks: tuple[Tensor, Tensor, Tensor], classes_seen: int
    ) -> Tensor:
        """(tasks, settings) int64: of these images, labels, and positions in `tasks`, those classified correctly."""
        images, labels, owners = rows_of_tasks
        device = self.augment.device
        step = self._step(method, images)
        first = torch.tensor([task.classes.start for task in tasks], device=device)
        last = torch.tensor([task.classes.stop - 1 for task in tasks], device=device)
        width = torch.arange(max(len(task.classes) for task in tasks), device=device)
        correct = torch.zeros(len(tasks), len(self.settings), dtype=torch.int64, device=device)
        starts = range(0, len(labels), step)
        for start in starts if self.ranks is None else starts[self.ranks.number :: self.ranks.size]:
            rows = slice(start, start + step)
            y, owner = labels[rows].to(device, non_blocking=True), owners[rows]
            logits = self._forward(method, images[rows], tasks[0].index)
            right = []
            if not self.needs_task:
                competing = logits[:, :classes_seen] if self.argmax == "seen" else logits
                right.append(competing.argmax(1) == y)
            if "task-il" in self.settings:
                own = torch.minimum(first[owner, None] + width, last[owner, None])  # outputs of the image's task
                right.append(own.gather(1, logits.gather(1, own).argmax(1, keepdim=True)).squeeze(1) == y)
            correct.index_add_(0, owner, torch.stack(right, 1).long())
        return correct if self.ranks is None else self.ranks.sum([correct])[0]

    def _images(self, tasks: Sequence[Task]) -> tuple[Tensor, Tensor, Tensor]:
        """The tasks' test images, their labels, and the position in `tasks` that each belongs to."""
        splits = [task.test for task in tasks]
        for task, split in zip(tasks, splits, strict=True):
            if len(split) != self.sizes[task.index]:
                raise DataError(
                    f"{self.benchmark.name}: task {task.index + 1} has {len(split)} test images, its `num_rows` says "
                    f"{self.sizes[task.index]}. Define `num_rows` together with `make_test`."
                )
        device = self.augment.device
        sizes = [self.sizes[task.index] for task in tasks]
        places = torch.arange(len(tasks), device=device)
        owners = places.repeat_interleave(torch.tensor(sizes, device=device), output_size=sum(sizes))  # given: no wait
        if len(splits) == 1:
            return splits[0].images, splits[0].labels, owners
        return torch.cat([split.images for split in splits]), torch.cat([split.labels for split in splits]), owners
