"""Trackers that a run may log to besides TensorBoard (--log_to): Weights & Biases, MLflow.

A tracker is asked for what TensorBoard's file is asked for: `scalar`, `image`, `flush`, `close`, and `begin`. It may
fail without harm: the first failure is said, then the run goes on without it. No other module knows these packages, and
their settings are their own (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, ...).
"""

import contextlib
import logging
import os
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from flatcl.utils.arguments import Config, written
from flatcl.utils.console import complain, reason
from flatcl.utils.engine.labels import run_name
from flatcl.utils.engine.results import RunFolder
from flatcl.utils.extras import require
from flatcl.utils.files import read_json

FILE = "tracker.json"  # in the run folder: {tracker: the id of this run there}, with which a resumed run goes on
LONGEST_END_S = 300.0  # that a finished run waits until all is sent, where the network has gone
PROJECT = "flatcl"  # unless the tracker's own variable names another one


class Tracker:
    """What trackers have in common. A subclass starts or goes on with a run in `_start`, which returns its id, and
    sends what it is given in `_send`, `_picture` and `_end`."""

    name: str

    def __init__(self, config: Config, folder: RunFolder):
        self.config, self.folder = config, folder
        self._is_on = False
        self._values: dict[str, float] = {}  # of one point, which are sent together
        self._point = ("step", 0)

    def begin(self) -> None:
        self._is_on = True
        self._try(self._begin)

    def scalar(self, tag: str, value: float, step: int, axis: str = "step") -> None:
        """`axis`: what `step` counts, 'step' or 'task'."""
        if self._point != (axis, step):
            self.flush()
            self._point = (axis, step)
        self._values[tag] = value

    def image(self, tag: str, image: Any) -> None:
        """`image` is (H, W, 3) uint8."""
        self._try(self._picture, tag, image)

    def flush(self) -> None:
        values, self._values = self._values, {}
        if values:
            self._try(self._send, values, *self._point)

    def close(self, status: str) -> None:
        """`status`: how the run ended, as in summary.json; 'running' where another process has taken it over, whose run
        it is now in the tracker, too."""
        if status != "running":
            self.flush()
            self._try(self._end, status)
        self._is_on = False

    @property
    def flags(self) -> dict[str, Any]:
        """The flags that can change a number, and where the run is found by."""
        values = {name: self.config.values[name] for name, flag in self.config.flags.items() if flag.result}
        return {**values, "config_hash": self.config.hash, "run_folder": self.folder.path.name}

    def _begin(self) -> None:
        ids = {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            ids = dict(read_json(self.folder.path / FILE))
        ids[self.name] = self._start(ids.get(self.name))
        self.folder.write(FILE, ids)

    def _try(self, act: Callable[..., None], *given: Any) -> None:
        if not self._is_on:
            return
        try:
            act(*given)
        except Exception as error:  # whatever it is, it is not worth a run
            self._is_on = False
            complain(f"warning: --log_to {self.name} failed ({reason(error)}): the run continues without it")

    def _start(self, known: str | None) -> str:
        raise NotImplementedError

    def _send(self, values: dict[str, float], axis: str, step: int) -> None:
        raise NotImplementedError

    def _picture(self, tag: str, image: Any) -> None:
        raise NotImplementedError

    def _end(self, status: str) -> None:
        raise NotImplementedError


class Wandb(Tracker):
    """Weights & Biases. Its files lie in `wandb/` of the run folder; with WANDB_MODE=offline nothing is sent."""

    name = "wandb"

    def _start(self, known: str | None) -> str:
        import wandb

        number = known or uuid.uuid4().hex[:16]
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=number, resume="allow" if known else None,
            name=run_name(self.config), notes=self.config.notes or None, config=self.flags, dir=self.folder.path,
            reinit="create_new",  # leaves alone the run that a caller may have open
            settings=wandb.Settings(console="off", silent=True, finish_timeout=LONGEST_END_S),
        )  # fmt: skip
        self._wandb, self._axes = wandb, {}
        return number

    def _send(self, values: dict[str, float], axis: str, step: int) -> None:
        """With an axis of its own, a point may come twice, as it does when a run is resumed from a checkpoint."""
        for tag in values.keys() - self._axes.keys():
            self._axes[tag] = self._run.define_metric(tag, step_metric=axis)
        self._run.log({**values, axis: step})

    def _picture(self, tag: str, image: Any) -> None:
        self._run.log({tag: self._wandb.Image(image)})

    def _end(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == "finished" else 1)


class Mlflow(Tracker):
    """MLflow, by its client, which leaves alone the run that a caller may have open. Without MLFLOW_TRACKING_URI it
    writes a local store into the working directory."""

    name = "mlflow"

    def _start(self, known: str | None) -> str:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table of a new store
        from mlflow import MlflowClient, entities

        self._client, self._entities = MlflowClient(), entities
        if known is not None:
            self._id = self._client.get_run(known).info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return self._id
        tags = {"mlflow.note.content": self.config.notes} if self.config.notes else {}
        run = self._client.create_run(self._experiment(), tags=tags, run_name=run_name(self.config))
        self._id = run.info.run_id
        params = [entities.Param(name, written(value)) for name, value in self.flags.items()]
        for start in range(0, len(params), 100):  # the most that MLflow takes at once
            self._client.log_batch(self._id, params=params[start : start + 100])
        return self._id

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name)
            except MlflowException:  # another run has made it at the same time
                found = self._client.get_experiment_by_name(name)
        if found is None:
            raise RuntimeError(f"the experiment {name} cannot be made")
        return found.experiment_id

    def _send(self, values: dict[str, float], axis: str, step: int) -> None:
        now = int(1000 * time.time())
        named = {re.sub(r"[^\w\-. /]", "_", tag): value for tag, value in values.items()}  # what MLflow takes
        metrics = [self._entities.Metric(tag, value, now, step) for tag, value in named.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def _picture(self, tag: str, image: Any) -> None:
        self._client.log_image(self._id, image, artifact_file=f"{tag}.png")

    def _end(self, status: str) -> None:
        self._client.set_tag(self._id, "status", status)
        ends = {"finished": "FINISHED", "interrupted": "KILLED"}
        self._client.set_terminated(self._id, ends.get(status, "FAILED"))


TRACKERS = {tracker.name: tracker for tracker in (Wandb, Mlflow)}


def check(config: Config) -> None:
    """Raises `UsageError` where the package of the tracker of --log_to is not installed."""
    if config.log_to is not None:
        require(config.log_to, config.log_to, f"--log_to {config.log_to}")
