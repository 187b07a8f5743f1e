"""Accuracy on all tasks, in large batches; class-il and task-il from one forward, one wait for the device."""

import torch
from torch import Tensor

from utils.augment import Augment
from utils.errors import DataError

CPU_BYTES, DEVICE_BYTES = 4 * 2**20, 64 * 2**20  # of a batch of inputs: what stays in a CPU's cache, what fills a GPU


def rows_per_pass(shape: tuple[int, ...], device: torch.device, low: int = 1) -> int:
    """Images of this shape (C, H, W) that are best handled in one call on this device."""
    budget = CPU_BYTES if device.type == "cpu" else DEVICE_BYTES
    return max(low, budget // (4 * shape[0] * shape[1] * shape[2]))


class Evaluator:
    """Measures a method on every task of a benchmark, those that it has not seen too."""

    def __init__(self, benchmark, augment: Augment, class_il_argmax: str = "all", needs_task: bool = False):
        """`needs_task`: the method is told the task of each image; then only task-il is defined."""
        self.benchmark, self.augment, self.argmax, self.needs_task = benchmark, augment, class_il_argmax, needs_task
        both = benchmark.setting == "class-il"
        self.settings = ("class-il", "task-il") if both else (benchmark.setting,)
        if needs_task:
            self.settings = ("task-il",)
        empty = [task.index + 1 for task in benchmark if len(task.test) == 0]
        if empty:
            raise DataError(
                f"{benchmark.name}: task {empty[0]} has no test images. Use larger data, or no --validation."
            )

    @torch.inference_mode()
    def __call__(self, method, classes_seen: int) -> dict[str, list[float]]:
        """{setting: accuracy of each task, a fraction}. The method is in eval mode meanwhile.

        `classes_seen` outputs compete in class-il if the evaluator was built with class_il_argmax 'seen'.
        """
        modes = [(module, module.training) for module in method.modules()]
        method.eval()
        counts = [self._count(method, task, classes_seen) for task in self.benchmark]
        for module, was_training in modes:  # one by one: a frozen teacher stays in eval mode
            module.training = was_training
        correct = torch.stack(counts).tolist()  # (T, settings); the one wait for the device
        sizes = [len(task.test) for task in self.benchmark]
        return {
            setting: [row[column] / size for row, size in zip(correct, sizes, strict=True)]
            for column, setting in enumerate(self.settings)
        }

    def _count(self, method, task, classes_seen: int) -> Tensor:
        split, classes = task.test, task.classes
        step = rows_per_pass(split.images.shape[1:], self.augment.device)
        correct = torch.zeros(len(self.settings), dtype=torch.int64, device=self.augment.device)
        for start in range(0, len(split), step):
            labels = split.labels[start : start + step].to(self.augment.device, non_blocking=True)
            inputs = self.augment.plain(split.images[start : start + step])
            logits = method(inputs, task.index) if self.needs_task else method(inputs)
            if not self.needs_task:
                competing = logits[:, :classes_seen] if self.argmax == "seen" else logits
                correct[0] += (competing.argmax(1) == labels).sum()
            if "task-il" in self.settings:
                correct[-1] += (logits[:, classes.start : classes.stop].argmax(1) + classes.start == labels).sum()
        return correct
