"""Callbacks: code of a user that is called during a run. It can read, log and stop, but changes nothing.

A callback is any object with some of the methods of `Callback`. Each gets the run's `State`.
"""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from flatcl.models._method import Method
from flatcl.utils.engine import seeding
from flatcl.utils.errors import UsageError
from flatcl.utils.optim._driver import Driver
from flatcl.utils.protocols import Benchmark, Config

RESERVED = ("step", "task", "epochs")  # keys of metrics.jsonl
EVENTS = ("after_step", "after_epoch", "after_task", "after_evaluation")


class Callback:
    """Override the methods that you need; any object with some of these methods works, too. Random numbers that a
    callback draws from torch's global generators do not change the run."""

    def after_step(self, state: "State") -> None:
        """After each batch of the stream; `state.loss` is set, unless the method took no step for it."""

    def after_epoch(self, state: "State") -> None:
        """After each epoch of a task."""

    def after_evaluation(self, state: "State") -> None:
        """After an evaluation, at the end of a task or inside it (--eval_every); `state.accuracy` is set."""

    def after_task(self, state: "State") -> None:
        """After a task, when it is evaluated and its results are written."""


class State:
    """The present state of a run, to be read, not changed. `trainer`: the `Trainer` of the run.

    model: the method (`Method`), in training mode; optimizer, benchmark, config (`Config`); folder: the run folder
    (`pathlib.Path`), None if nothing is written. task, epoch: counted from 0; step: optimizer steps so far.
    loss, a scalar tensor, is that of the last batch, of its first step where the method takes several (`fdr`); terms
    {name: scalar tensor} are those of all its steps. Both are on the device (reading a value waits for it), and None
    and {} outside `after_step` and where there was no step (`gdumb`, while it collects). accuracy {setting: [fraction
    of each task]}: of the last evaluation.
    """

    def __init__(self, trainer: Any, task: int, epoch: int):
        self._trainer = trainer
        self.model: Method = trainer.method
        self.optimizer: Driver = trainer.optimizer
        self.benchmark: Benchmark = trainer.benchmark
        self.config: Config = trainer.config
        self.folder: Path | None = None if trainer.folder is None else trainer.folder.path
        self.task, self.epoch, self.step = task, epoch, trainer.cost.steps
        self.loss: Tensor | None = None
        self.terms: dict[str, Tensor] = {}
        self.accuracy: dict[str, list[float | None]] = {}

    def logits(self, images: Tensor, task: int | None = None) -> Tensor:
        """Stored images (N, C, H, W) uint8 -> logits (N, K) of the current network, in eval mode; see `Run.logits`."""
        return self._trainer.evaluate.logits(self.model, images, task)

    def log(self, name: str, value: float | Tensor) -> None:
        """Writes a number (or scalar tensor) to TensorBoard, under `name`, and to metrics.jsonl."""
        if name in RESERVED:
            raise UsageError(f"a callback cannot log {name!r}, which is a part of each line. Use another name.")
        self._trainer.logs.custom(name, float(value), self.step)

    def stop(self) -> None:
        """Ends the run after the current step, or after the next one if none is under way, with a checkpoint from which
        it can be resumed."""
        self._trainer.stop(signal.SIGINT)
        self._trainer.callbacks.have_stopped = True

    def __repr__(self) -> str:
        return f"State(task={self.task}, epoch={self.epoch}, step={self.step}, of {self.model.name})"


class Callbacks:
    """The callbacks of a run, in the order in which they were given. Raises `UsageError` for other objects.
    `trainer`: that of the run, once it has begun; `have_stopped`: whether one of them has stopped the run."""

    def __init__(self, given: Sequence[Any] = ()):
        self.given = tuple(given)
        self.trainer: Any = None
        self.have_stopped = False
        for callback in self.given:
            if isinstance(callback, type) or not any(callable(getattr(callback, event, None)) for event in EVENTS):
                raise UsageError(
                    f"a callback must be an object with some of the methods {', '.join(EVENTS)}, got {callback!r}. "
                    "Derive its class from flatcl.Callback, and give an object of it."
                )

    def tell(self, event: str, state: State) -> None:
        """Calls the method of this name of each callback that has it."""
        hooks = [getattr(callback, event) for callback in self.given if hasattr(callback, event)]
        if not hooks:
            return
        before = seeding.global_state()
        try:
            for hook in hooks:
                hook(state)
        finally:
            seeding.set_global_state(before)
