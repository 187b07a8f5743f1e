"""What a person sees while a run goes on: progress bar, lines after each task, TensorBoard."""

import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from utils.arguments import MANY_TASKS, Config
from utils.results import RunFolder

WRITTEN = {"class-il": "Class-IL", "task-il": "Task-IL", "domain-il": "Domain-IL", "general-continual": "Stream"}


class Logs:
    """Console, metrics.jsonl and TensorBoard of one run."""

    def __init__(self, config: Config, folder: RunFolder | None, device: torch.device):
        self.config, self.folder, self.device = config, folder, device
        self.bar: tqdm | None = None
        self.writer = None
        self._images, self._since = 0, time.monotonic()
        if folder is not None:
            self._open_writer(purge_step=None)

    def resume(self, steps: int) -> None:
        """TensorBoard forgets what was logged after the checkpoint."""
        if self.folder is not None:
            self.writer.close()
            self._open_writer(purge_step=steps + 1)

    def _open_writer(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.writer = SummaryWriter(str(self.folder.path), purge_step=purge_step)

    def open_bar(self, task: int, num_tasks: int, steps: int, done: int) -> None:
        self._images, self._since = 0, time.monotonic()
        hidden = True if self.config.non_verbose else None  # None: hidden unless a person is looking
        self.bar = tqdm(
            total=steps, initial=done, desc=f"Task {task + 1}", unit="step", disable=hidden, leave=False,
            file=sys.stderr, mininterval=0.5,
        )  # fmt: skip

    def advance(self, images: int) -> None:
        self._images += images
        self.bar.update()

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def step(self, step: int, values: dict[str, float], lr: float) -> None:
        """A point of the training curves."""
        now = time.monotonic()
        speed = self._images / max(now - self._since, 1e-9)
        self._images, self._since = 0, now
        self.bar.set_postfix_str(f"loss {values['train/loss']:.4f}, {speed:,.0f} images/s", refresh=False)
        if self.folder is None:
            return
        scalars = {**values, "train/lr": lr, "train/images_per_s": speed}
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step)
        finite = {
            tag: value if value == value and abs(value) != float("inf") else None for tag, value in scalars.items()
        }
        self.folder.append_metrics({"step": step, **finite})

    def task(self, count: int, task: int, cost: Any, row: dict, averages: dict, joint: bool) -> None:
        """A task has ended: the line that everybody waits for."""
        seen = len(next(iter(row.values()))) if joint else count
        parts = " ".join(f"[{WRITTEN[setting]}]: {100 * value:.2f} %" for setting, value in averages.items())
        print(f"Accuracy for {seen} task(s): {parts}", flush=True)
        if self.folder is None:
            return
        for setting, values in row.items():
            self.writer.add_scalar(f"accuracy/{setting}", averages[setting], count)
            if len(values) > MANY_TASKS:
                continue  # a thousand curves show nothing, and cost more with each task
            for index, value in enumerate(values):
                if value is not None:
                    self.writer.add_scalar(f"accuracy/{setting}/task_{index + 1:02d}", value, count)
        self.folder.append_metrics({"task": task, "step": cost.steps, "accuracy": row, "average_accuracy": averages})

    def finish(self, summary: dict[str, Any], tasks: list[int], joint: bool) -> None:
        """Pictures, hparams and final metrics into the folder and TensorBoard. `tasks`: those trained, from 0."""
        if self.folder is None:
            return
        from utils import pictures  # matplotlib is slow to import

        finals = {}
        for setting, values in summary["metrics"].items():
            prefix = "metrics" if len(summary["metrics"]) == 1 else f"metrics/{setting}"
            finals |= {f"{prefix}/{name}": value for name, value in values.items() if value is not None}
        for tag, value in finals.items():
            self.writer.add_scalar(tag, value, len(next(iter(summary["accuracy"].values()))))
        title = f"{summary['model']} on {summary['dataset']}"
        for index, (setting, matrix) in enumerate(summary["accuracy"].items()):
            suffix = "" if index == 0 else f"_{setting}"
            figure = pictures.accuracy_matrix(matrix, f"{title}, {WRITTEN[setting]}", None if joint else tasks)
            pictures.save(figure, self.folder.path / f"accuracy_matrix{suffix}.png")
            image = pictures.to_array(figure)
            self.writer.add_image(f"accuracy_matrix{suffix}", image, dataformats="HWC")
            if len(matrix) > 1:
                trained = [[row[task] for task in tasks] for row in matrix]
                figure = pictures.curves(trained, f"{title}, {WRITTEN[setting]}")
                pictures.save(figure, self.folder.path / f"curves{suffix}.png")
                self.writer.add_image(f"curves{suffix}", pictures.to_array(figure), dataformats="HWC")
        self._hparams(finals)

    def _hparams(self, finals: dict[str, float]) -> None:
        """hparams into this run's own event file (the writer's `add_hparams` would open a second run)."""
        from torch.utils.tensorboard.summary import hparams

        given = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in self.config.values.items()
        }
        for part in hparams(given, finals):
            self.writer.file_writer.add_summary(part)

    def close(self) -> None:
        self.close_bar()
        if self.writer is not None:
            self.writer.close()
