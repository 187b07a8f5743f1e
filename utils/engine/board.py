"""TensorBoard's event file of a run: where it lies, what is written into it, and what is there already."""

import contextlib
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flatcl.utils.arguments import Config
from flatcl.utils.console import complain, reason
from flatcl.utils.engine.labels import changed, run_name

HPARAMS = "_hparams_/session_end_info"  # the last of TensorBoard's entries
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
FLUSH_S = 30.0


def board_folder(folder: Path, config: Config) -> Path:
    """Where a run folder has its event files: `tensorboard/<name of the run>/`, or where they are already.

    TensorBoard shows a run by the path of its event files from --logdir on, and by nothing else: with the file in the
    run folder itself, all names end in a time and a hash, and begin alike. The file lies in the run folder all the
    same, so that a run that is moved, copied or deleted is moved, copied or deleted whole. A folder of links beside the
    runs would have shorter names, but links break when runs are moved, and Windows lets no ordinary user make them.
    """
    there = {file.parent for file in event_files(folder)}
    return min(there) if there else folder / "tensorboard" / run_name(config)


def event_files(folder: Path) -> list[Path]:
    """The event files of a run folder; runs of before `tensorboard/` have them in the folder itself."""
    found = [*folder.glob("tensorboard/*/*tfevents*"), *folder.glob("*tfevents*")]
    return sorted(path for path in found if path.is_file())


class Board:
    """TensorBoard's event file, opened with the first entry. `purge_step`: what the folder's other files say from this
    step on does not count. (`SummaryWriter` writes in a thread, whose failure would be a traceback.)"""

    def __init__(self, folder: Path, purge_step: int | None = None):
        self.folder, self.purge_step = folder, purge_step
        self._file: Any = None
        self._failed = False
        self._flushed = time.monotonic()

    def scalar(self, tag: str, value: float, step: int) -> None:
        from torch.utils.tensorboard.summary import scalar  # slow to import

        self.add(scalar(tag, value), step)

    def image(self, tag: str, image: Any) -> None:
        """`image` is (H, W, 3) uint8."""
        from torch.utils.tensorboard.summary import image as summary

        self.add(summary(tag, image, dataformats="HWC"), 0)

    def add(self, summary: Any, step: int) -> None:
        """A `Summary` of TensorBoard."""
        if self._failed:
            return
        with self._harmless():
            if self._file is None:
                self._open()
            self._write(step=step, summary=summary)
            if time.monotonic() - self._flushed > FLUSH_S:
                self.flush()

    def flush(self) -> None:
        with self._harmless():
            if self._file is not None:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        with self._harmless():
            if self._file is not None:
                self._file.close()
        self._file = None

    @contextlib.contextmanager
    def _harmless(self):
        """After the first failure nothing more is written: readers stop at the first damaged entry anyway."""
        try:
            yield
        except Exception as error:  # whatever it is, it is not worth a run
            self._failed, self._file = True, None
            complain(f"warning: TensorBoard's file cannot be written ({reason(error)}): the run continues without it")

    def _open(self) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        for folder in (self.folder.parent, self.folder):  # not the run folder: one that is gone stays away
            folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{platform.node()}.{os.getpid()}"
        self._file = RecordWriter(open(self.folder / name, "xb"))
        self._write(file_version="brain.Event:2")
        if self.purge_step is not None:
            self._write(step=self.purge_step, file_version="brain.Event:2")
            self._write(step=self.purge_step, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._file.write(Event(wall_time=time.time(), **content).SerializeToString())


def layout(settings: Sequence[str], has_each_task: bool) -> Any:
    """The summary that lays out TensorBoard's page Custom Scalars: what belongs together in one chart, on one axis.
    Charts name their curves by regular expressions. `has_each_task`: whether each task has a curve of its own."""
    from torch.utils.tensorboard.summary import custom_scalars

    charts: dict[str, dict[str, list]] = {"accuracy": {}, "forgetting": {}, "gradients": {}}
    for setting in settings:
        charts["accuracy"][f"{setting}: average over the tasks seen"] = ["Multiline", [f"accuracy/{setting}$"]]
        if has_each_task:
            charts["accuracy"][f"{setting}: each task"] = ["Multiline", [rf"accuracy/{setting}/task_\d+"]]
            charts["forgetting"][f"{setting}: forgetting_chaudhry18"] = ["Multiline", [f"forgetting/{setting}"]]
    charts["gradients"]["cosines"] = ["Multiline", [r"gradients/cos_.*"]]
    charts["gradients"]["norms"] = ["Multiline", [r"gradients/norm_.*"]]
    charts["gradients"]["loss and its terms"] = ["Multiline", [r"train/loss.*"]]
    return custom_scalars({category: own for category, own in charts.items() if own})


def hparams(config: Config, others: Iterable[Mapping[str, Any]], metrics: Iterable[str]) -> list[Any]:
    """The summaries of TensorBoard's page HParams: the flags that can change a number, in this run's own event file
    (`SummaryWriter.add_hparams` would open a second run). `others`: {flag: value} of other runs in the results folder.

    TensorBoard shows first, and at the start only, what is marked as differing. It takes the marks and the columns from
    one run alone, whichever comes first: so each run marks what has another value than by default, what differs from
    one of the others, and the flags that a run is known by; and has a column for the other runs' flags, too.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    given = {name: _plain(config.values[name]) for name, flag in config.flags.items() if flag.result}
    columns, differing = dict(given), {"model", "optimizer", "buffer_size", "seed"} | changed(config).keys()
    for other in others:
        for name, value in other.items():
            columns.setdefault(name, _plain(value))
        differing |= {name for name in columns if _plain(other.get(name)) != given.get(name)}
    experiment = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(name=name, type=_kind(value), differs=name in differing)
            for name, value in columns.items()
        ],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics],
    )
    start = plugin_data_pb2.SessionStartInfo(group_name=run_name(config), start_time_secs=time.time())
    for name, value in given.items():
        if value is not None:
            field = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
            setattr(start.hparams[name], field, value)
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.Value("STATUS_SUCCESS"), end_time_secs=time.time())
    parts = {
        metadata.EXPERIMENT_TAG: {"experiment": experiment},
        metadata.SESSION_START_INFO_TAG: {"session_start_info": start},
        HPARAMS: {"session_end_info": end},
    }
    return [
        Summary(
            value=[
                Summary.Value(
                    tag=tag,
                    metadata=metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content)),
                    tensor=metadata.NULL_TENSOR,
                )
            ]
        )
        for tag, content in parts.items()
    ]


def _plain(value: Any) -> Any:
    """A flag's value as TensorBoard takes it: a number, a text, True or False, or None."""
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else value


def _kind(value: Any) -> int:
    from tensorboard.plugins.hparams.api_pb2 import DataType

    kinds = {bool: "DATA_TYPE_BOOL", int: "DATA_TYPE_FLOAT64", float: "DATA_TYPE_FLOAT64"}
    return DataType.Value(kinds.get(type(value), "DATA_TYPE_STRING"))


def entries(folder: Path) -> set[str]:
    """What `Logs.finish` has left in a run folder: names of pictures that are whole, tags in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    found = {path.name for path in folder.glob("*.png") if path.is_file() and path.read_bytes().endswith(PNG_END)}
    for path in event_files(folder):
        with contextlib.suppress(Exception):  # a file that is damaged: what stands behind the damage is missing
            for raw in RawEventFileLoader(str(path)).Load():
                found |= {value.tag for value in Event.FromString(raw).summary.value}
    return found
