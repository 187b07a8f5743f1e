"""What a person sees while a run goes on: progress bar, lines after each task, TensorBoard.

All of it may fail without harm: what cannot be logged is said once, and the run goes on.
"""

import contextlib
import sys
import time
from collections.abc import Set
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from flatcl.utils import launch
from flatcl.utils.arguments import MANY_TASKS
from flatcl.utils.console import complain, reason, say
from flatcl.utils.engine.board import HPARAMS, Board, board_folder, hparams, layout
from flatcl.utils.engine.labels import title
from flatcl.utils.engine.results import RunFolder
from flatcl.utils.engine.trackers import TRACKERS
from flatcl.utils.protocols import Config

WRITTEN = {"class-il": "Class-IL", "task-il": "Task-IL", "domain-il": "Domain-IL", "general-continual": "Stream"}


class Logs:
    """Console, metrics.jsonl, TensorBoard and tracker of one run."""

    def __init__(self, config: Config, folder: RunFolder | None, device: torch.device | None):
        self.config, self.folder, self.device = config, folder, device
        self.bar: tqdm | None = None
        self.board = None if folder is None else Board(board_folder(folder.path, config))
        tracker = None if folder is None or config.log_to is None else TRACKERS[config.log_to]
        self.tracker = None if tracker is None else tracker(config, folder)
        self._images, self._since = 0, time.monotonic()
        self._said: set[str] = set()

    def begin(self) -> None:
        """Training is about to begin, or to go on."""
        if self.tracker is not None:
            self.tracker.begin()

    def resume(self, steps: int, tasks: int) -> None:
        """TensorBoard forgets what was logged after the checkpoint: after so many steps, and tasks, which are more than
        the steps where a method learns at the end."""
        if self.folder is not None:
            self.board = Board(board_folder(self.folder.path, self.config), purge_step=max(steps, tasks) + 1)

    def warn_once(self, what: str, text: str) -> None:
        if what not in self._said:
            complain(f"warning: {what} {text}")
        self._said.add(what)

    def open_bar(self, task: int, num_tasks: int, steps: int | None, done: int) -> None:
        self._images, self._since = 0, time.monotonic()
        is_silent = self.config.non_verbose or sys.stderr is None or launch.number() > 0
        hidden = True if is_silent else None  # None: unless a person is looking
        try:
            self.bar = tqdm(
                total=steps, initial=done, desc=f"Task {task + 1}", unit="step", disable=hidden, leave=False,
                file=sys.stderr, mininterval=0.5,
            )  # fmt: skip
        except (OSError, ValueError):  # a terminal that is gone
            self.bar = tqdm(disable=True)

    def advance(self, images: int) -> None:
        self._images += images
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            self.bar.update()

    def close_bar(self) -> None:
        if self.bar is not None:
            with contextlib.suppress(OSError, ValueError):
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
            self._scalar(tag, value, step)
        finite = {
            tag: value if value == value and abs(value) != float("inf") else None for tag, value in scalars.items()
        }
        self._append({"step": step, **finite})

    def task(self, count: int, task: int, cost: Any, row: dict, averages: dict, forgetting: dict) -> None:
        """A task has ended: its line in metrics.jsonl, its points in TensorBoard. `forgetting`: {setting: fraction}."""
        if self.folder is None:
            return
        self._append({"task": task, "step": cost.steps, "accuracy": row, "average_accuracy": averages})
        if count == 1 + (self.config.continues.tasks if self.config.continues else 0):
            self.board.add(layout(list(row), has_each_task=len(next(iter(row.values()))) <= MANY_TASKS), 0)
        for setting, value in forgetting.items():
            self._scalar(f"forgetting/{setting}", value, count, "task")
        for setting, values in row.items():
            self._scalar(f"accuracy/{setting}", averages[setting], count, "task")
            if len(values) > MANY_TASKS:
                continue  # a thousand curves show nothing, and cost more with each task
            for index, value in enumerate(values):
                if value is not None:
                    self._scalar(f"accuracy/{setting}/task_{index + 1:02d}", value, count, "task")
        self.flush()

    def epoch(self, epochs: int, task: int, cost: Any, row: dict, averages: dict) -> None:
        """An evaluation inside a task, after so many of its epochs."""
        if self.folder is None:
            return
        line = {"task": task, "epochs": epochs, "step": cost.steps}
        self._append({**line, "accuracy_inside": row, "average_accuracy_inside": averages})
        for setting, value in averages.items():
            self._scalar(f"accuracy_inside/{setting}", value, cost.steps)

    def custom(self, name: str, value: float, step: int) -> None:
        """A number that a callback or the engine logs by its name."""
        if self.folder is None:
            return
        self._scalar(name, value, step)
        self._append({"step": step, name: value if abs(value) < float("inf") else None})

    def print_task(self, seen: int, averages: dict) -> None:
        """The line that everybody waits for."""
        parts = " ".join(f"[{WRITTEN[setting]}]: {100 * value:.2f} %" for setting, value in averages.items())
        say(f"Accuracy for {seen} task(s): {parts}")

    def _append(self, line: dict[str, Any]) -> None:
        try:
            self.folder.append_metrics(line)
        except OSError as error:
            self.warn_once(
                "metrics.jsonl", f"cannot be written ({reason(error)}): the run continues, lines are missing"
            )

    def finish(
        self, summary: dict[str, Any], tasks: list[int], joint: bool, there: Set[str] = frozenset()
    ) -> list[str]:
        """Pictures, hparams and final metrics into the folder and TensorBoard, but for those that are `there` (see
        `entries`). Returns what was written. `tasks`: those trained, from 0."""
        if self.folder is None:
            return []
        from flatcl.utils.engine import pictures  # matplotlib is slow to import

        finals, done = {}, []
        for setting, values in summary["metrics"].items():
            prefix = "metrics" if len(summary["metrics"]) == 1 else f"metrics/{setting}"
            finals |= {f"{prefix}/{name}": value for name, value in values.items() if value is not None}
        for tag in sorted(finals.keys() - there):
            self._scalar(tag, finals[tag], len(next(iter(summary["accuracy"].values()))), "task")
            done.append(tag)
        if self.tracker is not None:  # TensorBoard's curves are of accuracies and losses; costs are in summary.json
            for name, value in summary["cost"].items():
                if value is not None:
                    self.tracker.scalar(f"cost/{name}", value, len(tasks), "task")
        if HPARAMS not in there:
            for part in hparams(self.config, self.folder.neighbours(self.config), finals):
                self.board.add(part, 0)
            done.append("hparams")
        for index, (setting, matrix) in enumerate(summary["accuracy"].items()):
            suffix = "" if index == 0 else f"_{setting}"
            heading = title(self.config, WRITTEN[setting])
            figures = {
                f"accuracy_matrix{suffix}": partial(pictures.accuracy_matrix, matrix, heading, None if joint else tasks)
            }
            if len(matrix) > 1:
                trained = [[row[task] for task in tasks] for row in matrix]
                figures[f"curves{suffix}"] = partial(pictures.curves, trained, heading, None if joint else tasks)
            for name, draw in figures.items():
                missing = {name, f"{name}.png"} - there
                figure = draw() if missing else None
                if f"{name}.png" in missing:
                    pictures.save(figure, self.folder.path / f"{name}.png")
                if name in missing:
                    self._image(name, pictures.to_array(figure))
                done += sorted(missing)
        return done

    def confusion(self, counts: Any) -> None:
        """The picture of a confusion matrix (K, K)."""
        from flatcl.utils.engine import pictures

        figure = pictures.confusion(counts, title(self.config, "confusion matrix"))
        pictures.save(figure, self.folder.path / "confusion_matrix.png")
        self._image("confusion_matrix", pictures.to_array(figure))

    def close(self, status: str = "finished") -> None:
        """`status`: how the run ended."""
        self.close_bar()
        if self.board is not None:
            self.board.close()
        if self.tracker is not None:
            self.tracker.close(status)

    def _scalar(self, tag: str, value: float, step: int, axis: str = "step") -> None:
        """A point for TensorBoard and for the tracker. `axis`: what `step` counts, 'step' or 'task'."""
        self.board.scalar(tag, value, step)
        if self.tracker is not None:
            self.tracker.scalar(tag, value, step, axis)

    def _image(self, tag: str, image: Any) -> None:
        self.board.image(tag, image)
        if self.tracker is not None:
            self.tracker.image(tag, image)

    def flush(self) -> None:
        """What was logged so far is out of this process, whatever becomes of it."""
        if self.board is not None:
            self.board.flush()
        if self.tracker is not None:
            self.tracker.flush()
