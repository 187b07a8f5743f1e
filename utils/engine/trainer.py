"""The task loop: for each task begin, epochs of observe, end, evaluate one row of the matrix, write it down."""

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from math import cos, pi
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from flatcl.models._method import Batch, Method, Objective
from flatcl.utils import metrics
from flatcl.utils.arguments import DEBUG_BATCHES, MANY_TASKS
from flatcl.utils.console import reason
from flatcl.utils.engine import checkpoint, seeding
from flatcl.utils.engine.augment import Augment
from flatcl.utils.engine.callbacks import Callbacks, State
from flatcl.utils.engine.early_stop import EarlyStop
from flatcl.utils.engine.evaluator import Evaluator, rows_per_pass
from flatcl.utils.engine.logs import Logs
from flatcl.utils.engine.memory import peak_memory_mib, reset_peak_memory
from flatcl.utils.engine.results import RunFolder
from flatcl.utils.errors import Diverged, Interrupted, RunFailed
from flatcl.utils.optim._driver import Driver, Grads
from flatcl.utils.protocols import Benchmark, Config, Split, Task

SKIPS_IN_A_ROW = 20  # steps that may fail one after the other before the run stops
AGREED_EVERY = 20  # steps, after which several processes on GPUs agree whether they go on
PATIENCE_S = 15.0  # of a signal with an evaluation; Slurm and Kubernetes kill after 30
WRITING_SHARE = 0.05  # of the time, that a run of many tasks may spend on writing its matrix anew

Steps = Sequence[tuple[Objective, Grads]]  # on one batch


class Stream:
    """The batches of one task's epochs, fetched and augmented a chunk ahead; its position can be saved and restored."""

    def __init__(self, augment: Augment, batch_size: int, rng: np.random.Generator, max_batches: int | None = None):
        self.augment, self.batch_size, self.rng, self.max_batches = augment, batch_size, rng, max_batches
        self._resume: dict[str, Any] | None = None
        self._position: dict[str, Any] = {}

    def epoch(self, split: Split) -> Iterator[Batch]:
        """One pass over a split. An ordinary split is shuffled and its last, smaller batch kept."""
        first = self.batches_to_skip
        resume, self._resume = self._resume, None
        if resume:
            seeding.set_generator_state(self.rng, resume["order"])
        order_state = seeding.generator_state(self.rng)
        shuffled, ends = self._plan(split)
        order = torch.from_numpy(shuffled).to(split.labels.device)
        labels = cache(lambda: split.labels.cpu().numpy()[shuffled])  # a copy for an epoch, where one is asked for
        chunks = [chunk for chunk in self._chunks(ends, split.images.shape[1:]) if chunk[-1] >= first]
        raw: Any = self._fetch(split, order, ends, chunks[0]) if chunks else None
        if resume:  # a chunk that was under way is augmented again as it was, then the generators go on from where
            under_way = chunks and chunks[0].start < first  # they stood
            seeding.set_global_state(resume["chunk_random" if under_way else "random"])
        for position, chunk in enumerate(chunks):
            x, y, ids = raw
            chunk_random = seeding.global_state()
            # without augmentation a batch is converted when it is due, while it is in the cache
            inputs = self.augment(x) if self.augment.transforms else None
            if resume and chunk.start < first:
                seeding.set_global_state(resume["random"])
            raw = self._fetch(split, order, ends, chunks[position + 1]) if position + 1 < len(chunks) else None
            for batch in range(max(chunk.start, first), chunk.stop):
                self._position = {"order": order_state, "batches": batch + 1, "chunk_random": chunk_random}
                rows = slice(ends[batch] - ends[chunk.start], ends[batch + 1] - ends[chunk.start])
                batch_inputs = None if inputs is None else inputs[rows]
                on_host = partial(_part_of, labels, ends[batch], ends[batch + 1])
                yield Batch(x[rows], y[rows], ids[rows], batch_inputs, self.augment, on_host)

    @property
    def batches_to_skip(self) -> int:
        """Batches of the next epoch that were done before a restored position."""
        return self._resume["batches"] if self._resume else 0

    def num_batches(self, split: Split) -> int:
        return len(self._lengths(split))

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch under way stands, and the global generators, now and when its chunk was augmented."""
        return {**self._position, "random": seeding.global_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resume = state

    def _lengths(self, split: Split) -> list[int]:
        if split.batch_lengths is not None:
            lengths = list(split.batch_lengths)
        else:
            full, rest = divmod(len(split), self.batch_size)
            lengths = [self.batch_size] * full + ([rest] if rest else [])
        return lengths[: self.max_batches]

    def _plan(self, split: Split) -> tuple[np.ndarray, list[int]]:
        """(order of the rows; where each batch starts and the last one ends)."""
        shuffled = self.rng.permutation(len(split)) if split.batch_lengths is None else np.arange(len(split))
        ends = [0, *np.cumsum(self._lengths(split)).tolist()]
        return shuffled[: ends[-1]], ends

    def _chunks(self, ends: list[int], shape: tuple[int, ...]) -> list[range]:
        """Ranges of batches that are handled in one call."""
        budget = rows_per_pass(shape, self.augment.device)
        chunks, first = [], 0
        for batch in range(len(ends) - 1):
            if ends[batch + 1] - ends[first] > budget and batch > first:
                chunks.append(range(first, batch))
                first = batch
        if first < len(ends) - 1:
            chunks.append(range(first, len(ends) - 1))
        return chunks

    def _fetch(self, split: Split, order: Tensor, ends: list[int], chunk: range) -> tuple[Tensor, Tensor, Tensor]:
        """Raw rows on the training device; from host memory they are copied while the device still works."""
        rows = order[ends[chunk.start] : ends[chunk.stop]]
        columns = (split.images.index_select(0, rows), split.labels[rows], split.ids[rows])
        device = self.augment.device
        if split.labels.device == device:
            return columns
        pinned = (column.pin_memory() if device.type == "cuda" else column for column in columns)
        x, y, ids = (column.to(device, non_blocking=True) for column in pinned)
        return x, y, ids


def _part_of(array: Callable[[], np.ndarray], start: int, end: int) -> np.ndarray:
    return array()[start:end]


@dataclass
class Cost:
    """What a run has used. Rows count images: one row forward is one image through the network. A method may take
    several optimizer steps on a batch, or none."""

    batches: int = 0
    steps: int = 0
    skipped_steps: int = 0
    forward_rows: int = 0
    backward_rows: int = 0
    train_s: float = 0.0
    eval_s: float = 0.0
    wall_s: float = 0.0

    def to_json(self, device: torch.device) -> dict[str, float | None]:
        rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in vars(self).items()}
        peak = peak_memory_mib(device)
        return {**rounded, "peak_memory_mib": None if peak is None else round(peak, 1)}


@dataclass
class Progress:
    """Where a run stands: the tasks finished (rows of the matrices) and the epoch under way. None: not evaluated."""

    tasks: list[int] = field(default_factory=list)
    epoch: int = 0
    accuracy: dict[str, list[list[float | None]]] = field(default_factory=dict)
    untrained: dict[str, list[float | None]] = field(default_factory=dict)


class Trainer:
    """Trains a method on a benchmark. `folder` is None if nothing is to be written."""

    def __init__(
        self, config: Config, benchmark: Benchmark, method: Method, optimizer: Driver, augment: Augment,
        folder: RunFolder | None,
    ):  # fmt: skip
        self.config, self.benchmark, self.method, self.optimizer = config, benchmark, method, optimizer
        self.augment, self.folder, self.device = augment, folder, augment.device
        self.ranks = method.ranks
        self.evaluate = Evaluator(benchmark, augment, config.class_il_argmax, method.needs_task, self.ranks)
        self.sizes = self.evaluate.sizes  # test images of each task
        rng = seeding.generator(seeding.seed_of(config, "data_order"), "order")
        self.stream = Stream(augment, config.batch_size, rng, DEBUG_BATCHES if config.debug_mode else None)
        self.n_epochs = 1 if config.debug_mode else config.n_epochs
        self.joint = config.joint or method.trains_jointly
        self.has_boundaries = benchmark.setting != "general-continual"
        self.cost, self.progress = Cost(), Progress()
        self._rows: dict[str, list[Tensor]] = {}  # the matrices' measured values, as checkpoints keep them
        self._written, self._writing_s = 0.0, 0.0  # when it was last written, and how long that took
        self.early = None if config.early_stop is None else EarlyStop(config.early_stop)
        method.lr = config.lr
        self.logs, self.callbacks, self.status = Logs(config, folder, self.device), Callbacks(), "running"
        self._stop_signal: int | None = None
        self._mid_epoch = False
        self.has_no_step = False  # inside an evaluation, or what a method does before or after a task
        self.saved = self.reached  # by the last checkpoint
        self._started = self._saved = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Trains what is left to train; returns the summary. Raises `RunFailed` or `Interrupted`."""
        reset_peak_memory(self.device)
        self._started, self._saved = time.monotonic() - self.cost.wall_s, time.monotonic()
        if not self.progress.untrained and self.config.evaluated == "all":
            self.progress.untrained = self._evaluation(classes_seen=self.benchmark.num_classes)
        try:
            for index in self._task_indices()[len(self.progress.tasks) :]:
                if self._stop_signal is not None and self.ranks is None:  # asked for when no step was under way
                    raise Interrupted(self._stop_signal)
                self._train_task(self.benchmark.joint_task if self.joint else self.benchmark[index])
        finally:
            self.cost.wall_s = time.monotonic() - self._started
            self.logs.close_bar()
        return self.summary("finished")

    @contextmanager
    def _without_step(self) -> Iterator[None]:
        """Inside, no step ends, and nothing is written: a signal that has waited long enough ends the run as it is."""
        self.has_no_step = self.ranks is None  # several processes would have to end at the same place
        try:
            yield
        finally:
            self.has_no_step = False

    @property
    def reached(self) -> tuple[int, int]:
        """Steps, and tasks that are finished."""
        return self.cost.steps, len(self.progress.tasks)

    def stop(self, number: int) -> None:
        """Ends the run after the step under way, as the signal with this number does."""
        self._stop_signal = self._stop_signal or number

    def summary(self, status: str) -> dict[str, Any]:
        """The content of summary.json; metrics speak of the tasks that are finished."""
        config, accuracy = self.config, self.progress.accuracy
        self.cost.wall_s = time.monotonic() - self._started
        return {
            "model": config.model,
            "dataset": config.dataset,
            "optimizer": config.optimizer,
            "backbone": config.backbone,
            "setting": self.benchmark.setting,
            "seed": config.seed,
            "status": status,
            "metrics": {setting: self._metrics(setting) for setting in accuracy},
            "accuracy": accuracy,
            "eval_tasks": config.evaluated,
            "cost": self.cost.to_json(self.device),
            "config_hash": config.hash,
            "notes": config.notes,
        }

    def save_checkpoint(self) -> None:
        """Raises `OSError`, or `Busy` where another process has taken the run over."""
        if self.folder is None:
            return
        self.folder.lock.check()
        self.logs.flush()  # a resume writes again only what was logged after the checkpoint
        checkpoint.save(self.folder.path / "checkpoint", self.state_dict())
        self.saved = self.reached
        self._saved = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        self.cost.wall_s = time.monotonic() - self._started
        return {
            "config_hash": self.config.hash,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": {
                **vars(self.progress),
                "accuracy": {name: [torch.cat(rows), list(map(len, rows))] for name, rows in self._rows.items()},
            },
            "cost": vars(self.cost),
            "order": seeding.generator_state(self.stream.rng),
            "stream": self.stream.state_dict() if self._mid_epoch else None,
            "early_stop": None if self.early is None else self.early.state_dict(),
            "random": seeding.global_state(),
            "metrics_size": 0 if self.folder is None else self.folder.metrics_size(),
        }

    def load_checkpoint(self, state: dict[str, Any]) -> None:
        """Puts the run where its last checkpoint left it."""
        self._take_over(state, with_optimizer=True)
        if state["stream"] is not None:
            self.stream.load_state_dict(state["stream"])
            self._mid_epoch = True
            if self.early is not None:
                self.early.load_state_dict(state["early_stop"], self.device)
        if self.folder is not None:
            self.folder.truncate_metrics(state["metrics_size"])
        self.logs.resume(self.cost.steps, len(self.progress.tasks))

    def continue_from(self, state: dict[str, Any], same_optimizer: bool) -> None:
        """Takes over weights, memory and generators, and the matrix and costs so far, of another run, which has ended
        with a task. Another optimizer begins anew."""
        self._take_over(state, with_optimizer=same_optimizer)

    def _take_over(self, state: dict[str, Any], with_optimizer: bool) -> None:
        self.method.load_state_dict(state["method"])
        if with_optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.optimizer.begin_anew(state["cost"].get("skipped_steps", 0))
        self.progress, self.cost = Progress(**state["progress"]), Cost(**state["cost"])
        self.progress.accuracy = {}
        for setting, (values, lengths) in state["progress"]["accuracy"].items():
            self._rows[setting] = list(values.split(lengths))
            self.progress.accuracy[setting] = [
                row.tolist() + [None] * (len(self.benchmark) - len(row)) for row in self._rows[setting]
            ]
        seeding.set_generator_state(self.stream.rng, state["order"])
        seeding.set_global_state(state["random"])
        self._started = time.monotonic() - self.cost.wall_s
        self.saved = self.reached

    def begin_anew(self) -> None:
        """In a folder whose run was stopped before its first checkpoint."""
        if self.folder is not None:
            self.folder.truncate_metrics(0)
        self.logs.resume(steps=-1, tasks=-1)

    def _task_indices(self) -> range:
        if self.joint:
            return range(1)
        stop = self.config.stop_after or len(self.benchmark)
        return range(self.config.start_from, stop)

    def _train_task(self, task: Task) -> None:
        self.method.train()
        if not self._mid_epoch:
            start = time.monotonic()
            with self._without_step():
                self.method.begin_task(task)
                self.optimizer.begin_task(task)
            self.cost.train_s += time.monotonic() - start
            if self.early is not None:
                self.early.begin()
        n_epochs = self.method.num_epochs(task, self.n_epochs)
        batches = self.stream.num_batches(self.method.train_split(task, self.progress.epoch))
        done = batches * self.progress.epoch + (self.stream.batches_to_skip if self._mid_epoch else 0)
        steps = None if self.config.budget_rows or n_epochs != self.n_epochs else batches * n_epochs
        self.logs.open_bar(task.index, len(self._task_indices()), steps, done)
        for epoch in self._epochs(n_epochs):
            self.progress.epoch = epoch
            self.method.lr = self.method.learning_rate(task, epoch, learning_rate(self.config, epoch))
            self.optimizer.set_lr(self.method.lr)
            if not self._mid_epoch:
                self.method.begin_epoch(task, epoch)
                self.optimizer.begin_epoch(epoch, None if self.config.budget_rows else n_epochs)
            split = self.method.train_split(task, epoch)
            self.optimizer.lr_rises = epoch < self.config.warmup_epochs
            self._train_epoch(split, task)
            self._tell("after_epoch", task, epoch)
            if self.config.budget_rows is not None and len(split) == 0:
                break  # such epochs never spend it
            if self.early is not None and self._is_best_past(self.early, task):
                break
            self._evaluate_inside(task, epoch + 1, n_epochs)
        if self.early is not None:
            self.early.restore(self.method)
        self.logs.close_bar()
        if self.has_boundaries:
            start = time.monotonic()
            with self._without_step():
                self.method.end_task(task)
                self.optimizer.follow()
            self.cost.train_s += time.monotonic() - start
            self._count_rows()
        self._finish_task(task)

    def _is_best_past(self, early: EarlyStop, task: Task) -> bool:
        """Whether the held-out images have not been classified better for --early_stop epochs."""
        split = task.monitor
        if len(split) == 0:  # of a small task, none was drawn
            return False
        start = time.monotonic()
        with self._without_step():
            accuracy = self.evaluate.held_out(self.method, task, split, task.classes.stop)
        self.cost.eval_s += time.monotonic() - start
        self.logs.custom("accuracy/held_out", accuracy, self.cost.steps)
        return early.note(accuracy, self.method)

    def _evaluate_inside(self, task: Task, epochs: int, n_epochs: int) -> None:
        """What --eval_every asks for after so many epochs of a task; its end is evaluated anyway."""
        every = self.config.eval_every
        if every is None or epochs % every or (epochs == n_epochs and self.config.budget_rows is None):
            return
        row = self._evaluate_row(task)
        columns = range(len(self.benchmark)) if self.joint else [*self.progress.tasks, task.index]
        averages = {name: metrics.average_accuracy(_measured(values, columns), len(columns))
                    for name, values in row.items()}  # fmt: skip
        self.logs.epoch(epochs, task.index, self.cost, row, averages)
        self._tell("after_evaluation", task, epochs - 1, accuracy=row)

    def _evaluate_row(self, task: Task) -> dict[str, list[float | None]]:
        """{setting: accuracy on each task}, with what is learned up to this task."""
        seen = self.benchmark.num_classes if self.joint else task.classes.stop
        only_seen = self.config.evaluated == "seen" and not self.joint
        return self._evaluation(classes_seen=seen, num_tasks=task.index + 1 if only_seen else None)

    def _tell(self, event: str, task: Task, epoch: int, done: Steps = (), accuracy: dict | None = None) -> None:
        """Calls the callbacks, if there are any."""
        if not self.callbacks.given:
            return
        state = State(self, task.index, epoch)
        if done:
            state.loss = done[0][0].loss.total
            for objective, _ in done[::-1]:
                state.terms |= objective.loss.terms
        if accuracy is not None:
            state.accuracy = accuracy
        self.callbacks.tell(event, state)

    def _count_rows(self) -> None:
        """Takes over the rows of passes that the method has made by itself."""
        forward, backward = self.method.rows
        self.cost.forward_rows += forward
        self.cost.backward_rows += backward
        self.method.rows = [0, 0]

    def _epochs(self, n_epochs: int) -> Iterator[int]:
        """The epochs of the task under way that are left; with a budget, until the task's share is spent."""
        epoch = self.progress.epoch
        passes_once = not (self.has_boundaries or self.joint)  # a stream
        is_open = self.config.budget_rows is not None and not passes_once
        while self._mid_epoch or epoch == 0 or (not self._is_spent() if is_open else epoch < n_epochs):
            yield epoch
            epoch += 1

    def _is_spent(self) -> bool:
        """Whether the tasks up to this one have had their share of --budget_rows."""
        if self.config.budget_rows is None:
            return False
        share = self.config.budget_rows * (len(self.progress.tasks) + 1) / len(self._task_indices())
        return self.cost.forward_rows + 2 * self.cost.backward_rows >= share

    def _train_epoch(self, split: Split, task: Task) -> None:
        start, log_every = time.monotonic(), self.config.log_every
        most = 1  # steps on a batch
        rate, num_batches, batch_number = self.method.lr, self.stream.num_batches(split), self.stream.batches_to_skip
        for batch in self.stream.epoch(split):
            if self._mid_epoch and self._is_spent():
                break
            self._mid_epoch = True
            self.cost.batches += 1
            batch_number += 1
            if self.optimizer.lr_rises:
                risen = (self.progress.epoch * num_batches + batch_number) / (self.config.warmup_epochs * num_batches)
                self.method.lr = rate * risen
                self.optimizer.set_lr(self.method.lr)
            logged = self.cost.batches % log_every == 0
            done = self.method.observe(batch, self.optimizer, trace=logged)
            self.cost.steps += len(done)
            most = max(most, len(done))
            for objective, _ in done:
                self.cost.forward_rows += objective.forward_rows
                self.cost.backward_rows += objective.backward_rows
            self._count_rows()
            if logged and done:
                self._log_step(done)
            if logged or self.device.type == "cpu":
                self._check_skips()
            self.logs.advance(len(batch.y))
            self._tell("after_step", task, self.progress.epoch, done)
            stop = self._signal()
            if stop is not None or self._checkpoint_is_due():
                self.cost.train_s += time.monotonic() - start
                start = time.monotonic()
                self._try_to_keep(self.save_checkpoint, "a checkpoint")
                if stop is not None:
                    raise Interrupted(stop)
        self._mid_epoch = False
        self._check_weights()
        if len(split) > 0:  # an epoch without rows takes no step, and none has failed
            self._check_skips(limit=most * num_batches)
        self.cost.train_s += time.monotonic() - start

    def _signal(self) -> int | None:
        """The signal that ends the run after this step. Several processes end it after the same one."""
        if self.ranks is None:
            return self._stop_signal
        if self.cost.batches % AGREED_EVERY == 0 or self.device.type == "cpu":  # elsewhere it is a wait for the device
            return self.ranks.greatest(self._stop_signal or 0) or None
        return None

    def _check_weights(self) -> None:
        """Once an epoch; also waits for the device, so that training time is all there."""
        norms = torch.stack(torch._foreach_norm(self.optimizer.params))
        if self.ranks is not None and not self.ranks.are_equal(norms.nan_to_num()):
            raise RunFailed(f"the processes' weights are no longer the same after step {self.cost.steps}.")
        if self.ranks is not None and not self.ranks.have_equal_generators():
            raise RunFailed(
                f"the processes no longer draw the same after step {self.cost.steps}: something in the network or in "
                "the method draws random numbers for its own rows. Start one process."
            )
        if not norms.isfinite().all():
            raise Diverged(
                f"the weights are not finite after step {self.cost.steps}. Try a smaller --lr (now "
                f"{self.config.lr:g}). Finished tasks are kept."
            )

    def _check_skips(self, limit: int = SKIPS_IN_A_ROW) -> None:
        """Counts the steps that the optimizer has not taken, and ends a run that gets nowhere."""
        self.cost.skipped_steps, in_a_row = self.optimizer.skips.tolist()
        if in_a_row >= min(limit, SKIPS_IN_A_ROW):
            raise Diverged(
                f"the loss or the update was not finite in {in_a_row} steps in a row (step {self.cost.steps}): they "
                f"were not taken. Try a smaller {self._steps_by()}. Finished tasks are kept."
            )

    def _steps_by(self) -> str:
        """The flags that say how far a step goes, and their values."""
        rho = self.config.values.get("rho")
        return f"--lr (now {self.config.lr:g})" + ("" if rho is None else f" or --rho (now {rho:g})")

    def _log_step(self, done: Steps) -> None:
        """The only place in training where the host waits for the device. Of several steps on a batch, the first one's
        loss and diagnosis, and the terms of all."""
        objective, update = done[0]
        scalars = {"train/loss": objective.loss.total}
        for other, _ in done[::-1]:
            scalars |= {f"train/loss_{name}": term for name, term in other.loss.terms.items()}
        scalars["train/skipped_steps"] = self.optimizer.skips[0]
        scalars |= {f"gradients/{name}": value for name, value in self.method.diagnose(objective, update).items()}
        values = dict(zip(scalars, torch.stack([v.float() for v in scalars.values()]).tolist(), strict=True))
        self.logs.step(self.cost.steps, values, self.optimizer.base.lr)

    def _checkpoint_is_due(self) -> bool:
        minutes = self.config.checkpoint_minutes
        return bool(minutes) and time.monotonic() - self._saved > 60 * minutes

    def _finish_task(self, task: Task) -> None:
        row = self._evaluate_row(task)
        for setting, values in row.items():
            self.progress.accuracy.setdefault(setting, []).append(values)
            measured = [value for value in values if value is not None]
            self._rows.setdefault(setting, []).append(torch.tensor(measured, dtype=torch.float64))
        self.progress.tasks.append(task.index)
        if len(self.progress.tasks) == (2 if self.has_boundaries else 1):
            for problem in self.method.likely_mistakes():
                warnings.warn(problem, stacklevel=2)
        epoch, self.progress.epoch = self.progress.epoch, 0
        averages = {setting: self._average(setting) for setting in row}
        if self.folder is not None:
            self._try_to_keep(self._write_results_so_far, "the results so far")
        forgetting = {setting: value for setting in row if (value := self._forgetting(setting)) is not None}
        self.logs.task(len(self.progress.tasks), task.index, self.cost, row, averages, forgetting)
        self._try_to_keep(self.save_checkpoint, "a checkpoint")
        self.logs.print_task(len(self.benchmark) if self.joint else len(self.progress.tasks), averages)
        if self.callbacks.given:
            for event in ("after_evaluation", "after_task"):
                self._tell(event, task, epoch, accuracy=row)
            self._try_to_keep(self.save_checkpoint, "a checkpoint")  # which knows what they have logged

    def write_results(self, status: str) -> None:
        """accuracy.json and summary.json; raises `OSError`. The last ones are on the disk when this returns."""
        durable = status != "running"
        assert self.folder is not None
        self.folder.lock.check()
        self.folder.write("accuracy.json", vars(self.progress), durable)
        self.folder.write("summary.json", self.summary(status), durable)

    def _try_to_keep(self, write: Callable[[], None], what: str) -> None:
        """A full disk does not end a training that can go on: there is a next time. A folder that is gone does."""
        try:
            write()
        except OSError as error:
            assert self.folder is not None
            if not self.folder.path.is_dir():
                raise RunFailed(
                    f"the run folder {self.folder.path} was deleted or moved. The run ends here, since its results "
                    "could not be kept."
                ) from None
            self._saved = time.monotonic()
            self.logs.warn_once(
                what,
                f"cannot be written ({reason(error)}): the run continues and tries again; the previous one is kept",
            )

    def _write_results_so_far(self) -> None:
        """Not after each of many tasks, since a matrix takes longer with each. What the files lack meanwhile is in
        metrics.jsonl and in the checkpoint."""
        start = time.monotonic()
        if len(self.benchmark) > MANY_TASKS and self._writing_s > WRITING_SHARE * (start - self._written):
            return
        self.write_results("running")
        self._written = time.monotonic()
        self._writing_s = self._written - start

    def _evaluation(self, classes_seen: int, num_tasks: int | None = None) -> dict[str, list[float | None]]:
        start = time.monotonic()
        with self._without_step():
            accuracy = self.evaluate(self.method, classes_seen, num_tasks)
        self.cost.eval_s += time.monotonic() - start
        return accuracy

    @property
    def _columns(self) -> Sequence[int]:
        """The tasks that are trained; a joint run trains all."""
        return range(len(self.benchmark)) if self.joint else self.progress.tasks

    def _average(self, setting: str) -> float:
        row = self.progress.accuracy[setting][-1]
        return metrics.average_accuracy(_measured(row, self._columns), len(self._columns))

    def _forgetting(self, setting: str) -> float | None:
        """So far; None after one task, and of many tasks, whose matrix takes longer to look through with each."""
        if self.joint or len(self.benchmark) > MANY_TASKS:
            return None
        rows = self.progress.accuracy[setting]
        return metrics.forgetting_chaudhry18([[row[column] for column in self._columns] for row in rows])

    def _metrics(self, setting: str) -> dict[str, float | None]:
        def trained(row: list) -> list:
            return [row[column] for column in self._columns]

        is_measured = bool(self.progress.untrained) and (setting, self.config.class_il_argmax) != ("class-il", "seen")
        untrained = trained(self.progress.untrained[setting]) if is_measured else None
        rows = [trained(row) for row in self.progress.accuracy[setting]]
        return metrics.summarize(rows, untrained, trained(self.sizes), self.joint)


class SignalWatch:
    """Signals that ask a run to end (Ctrl-C, a scheduler's, a dropped connection's, a limit's) end it after the step
    under way, with a checkpoint; where none is under way for `PATIENCE_S`, as the last checkpoint has it. Inside `with`
    it looks out for them; `nohup` and the like stay in force."""

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU", "SIGBREAK")  # those that the system has

    def __init__(self, trainer: Trainer):
        self.trainer, self.since = trainer, 0.0
        self.previous: dict[int, Any] = {}  # {signal: its handler}
        self._is_over, self._is_reminder = threading.Event(), False
        self._reminder: threading.Thread | None = None

    def __enter__(self) -> None:
        numbers = [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]
        try:
            for number in numbers:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not Python's, nor to be put back
                    self.previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not in the main thread: signals are somebody else's business
            pass

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        if self._reminder is not None:
            self._reminder.join()  # what it may send now still finds our handler
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        """A second Ctrl-C or SIGTERM, a second later, ends the run at once; other signals come more than once by
        themselves."""
        if self.trainer._stop_signal is None:
            self.trainer._stop_signal, self.since = number, time.monotonic()
            if not self._is_over.is_set():
                self._reminder = threading.Thread(target=self._remind, args=(number,), daemon=True)
                self._reminder.start()
        elif self._is_reminder:
            self._is_reminder = False
            if self.trainer.has_no_step:
                raise Interrupted(number)
        elif number in (signal.SIGINT, signal.SIGTERM) and time.monotonic() - self.since > 1:
            raise KeyboardInterrupt

    def _remind(self, number: int) -> None:
        """In a thread: the signal comes again and again, since only the main thread can end what it is at."""
        while not self._is_over.wait(PATIENCE_S):
            self._is_reminder = True
            signal.raise_signal(number)


def _measured(row: list[float | None], columns: Sequence[int]) -> list[float]:
    """The accuracies on these tasks, which were evaluated."""
    return cast(list[float], [row[column] for column in columns])


def learning_rate(config: Config, epoch: int) -> float:
    """The rate in an epoch (counted from 0) of any task, by --lr_scheduler."""
    if config.lr_scheduler == "multistep":
        return config.lr * config.lr_gamma ** sum(epoch >= milestone for milestone in config.lr_milestones)
    if config.lr_scheduler == "cosine":
        return config.lr * 0.5 * (1 + cos(pi * epoch / config.n_epochs))
    return config.lr
