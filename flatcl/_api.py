"""The Python API: runs with the same flags as on the command line, and their results as objects.

Wrong arguments raise `flatcl.utils.errors.UsageError` (a `ValueError`); training that cannot continue raises
`flatcl.utils.errors.RunFailed`. Both say in one line what is wrong, what was got, and what to do.
"""

import copy
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from flatcl.datasets._arrays import benchmark_from_arrays, laid_out
from flatcl.datasets._benchmark import Benchmark
from flatcl.models._method import Method
from flatcl.utils.arguments import SELECTORS, Config, Request, resolve_request
from flatcl.utils.console import FROM_PYTHON
from flatcl.utils.engine import checkpoint, predictions, run, seeding
from flatcl.utils.engine.buffer import Buffer
from flatcl.utils.engine.build import build as build_parts
from flatcl.utils.engine.build import computing, resolve_device
from flatcl.utils.engine.callbacks import Callback, Callbacks, State
from flatcl.utils.engine.passes import eval_mode
from flatcl.utils.engine.texts import describe
from flatcl.utils.engine.trainer import Trainer
from flatcl.utils.errors import Interrupted, UsageError
from flatcl.utils.files import read_json
from flatcl.utils.objects import Description
from flatcl.utils.optim._driver import Driver
from flatcl.utils.registry import Registry
from flatcl.utils.saved import Saved, check_code, read_saved

__all__ = ["Callback", "Experiment", "Run", "State", "benchmark_from_arrays", "build", "load", "resume", "train"]

BASES = {"model": Method, "dataset": Benchmark, "backbone": nn.Module, "optimizer": Driver}
NOT_OF_BUILD = {
    "dry_run": "it starts nothing, and print(flatcl.build(...)) shows the flags",
    "resume": "flatcl.resume(folder) continues a run",
    "keep_changed": "it belongs to flatcl.resume(folder, keep_changed=True)",
}
WHENCE = "Give a name (see python -m flatcl list), a class, or, as a backbone, a network."


def train(*, callbacks: Sequence[Any] = (), **given: Any) -> "Run":
    """Trains a method on a benchmark, as `flatcl train` does, and returns the run: `build(**given).run(callbacks)`.

    >>> run = flatcl.train(model="mgser_sam", dataset="seq-digits", buffer_size=200, seed=1)
    >>> run.accuracy["class-il"][-1]  # after the last task, on each task

    Raises `UsageError` as `build` does, and `RunFailed` and `KeyboardInterrupt` as `Experiment.run` does.
    """
    return build(**given).run(callbacks)


def build(
    *,
    model: str | type[Method] | None = None,
    dataset: str | type[Benchmark] | None = None,
    backbone: str | type[nn.Module] | nn.Module | None = None,
    optimizer: str | type[Driver] | None = None,
    plugins: str | os.PathLike | Sequence[str | os.PathLike] = (),
    from_run: str | os.PathLike | None = None,
    continue_run: bool = False,
    **flags: Any,
) -> "Experiment":
    """Checks the arguments and returns a run that has not been started (`Experiment`).

    model, dataset, backbone, optimizer: names, as on the command line, or your own classes; a class that is not
    registered is named after its class. dataset: also the result of `benchmark_from_arrays`. backbone: also a network
    (`nn.Module`) that takes (N, C, H, W) float32 and gives logits (N, K) for all K classes; each run trains a copy of
    it, starting from its current weights, which do not depend on the seed. Methods that need features use its
    `features(x)` (N, F) and `num_features`.
    plugins: Python files that register more names. from_run: a run folder whose flags are used as defaults;
    continue_run: also continue from the end of that run.
    flags: all flags of the command line, by their names and with the same defaults: numbers, texts, True and False,
    tuples or lists for flags with several values, None for "none".

    Raises `UsageError`, which lists all problems.
    """
    if "plugin" in flags:
        raise UsageError("--plugin is `plugins` here: plugins=['my_method.py'].")
    elsewhere = [f"{name} is not for build: {instead}." for name, instead in NOT_OF_BUILD.items() if name in flags]
    if elsewhere:
        raise UsageError(*elsewhere)
    if continue_run and from_run is None:
        raise UsageError("continue_run=True starts from the end of another run. Give that run by from_run.")
    chosen = dict(model=model, dataset=dataset, backbone=backbone, optimizer=optimizer)
    words = _selected(chosen) | {name: [_word(name, value)] for name, value in flags.items()}
    request = Request(
        words=words,
        plugins=tuple(os.fspath(file) for file in ([plugins] if isinstance(plugins, str | os.PathLike) else plugins)),
        source=None if from_run is None else os.fspath(from_run),
        continues=continue_run,
    )
    return Experiment(resolve_request(request))


def load(
    folder: str | os.PathLike,
    *,
    device: str = "auto",
    base_path: str | os.PathLike | None = None,
    **objects: Any,
) -> "Run":
    """Opens an existing run, finished or not, for its results and for predictions. Writes nothing.

    folder: the run folder. device: the device of its network. base_path: the folder of the data sets, if it has
    changed. objects: `model`, `dataset`, `backbone`, `optimizer`, if the run was made with classes or a network of your
    own that are in no file. Executes the plugins of the run, if there are any.

    Raises `UsageError` where there is no run that can be read.
    """
    saved = read_saved(os.fspath(folder))
    words = _selected(objects) | {"device": [device]}
    if base_path is not None:
        words["base_path"] = [os.fspath(base_path)]
    config = resolve_request(_of_saved(saved, words, keep_changed=True))
    return Run(config, saved.folder)


def resume(
    folder: str | os.PathLike, *, callbacks: Sequence[Any] = (), keep_changed: bool = False, **objects: Any
) -> "Run":
    """Continues a run that was stopped, to its end. A finished run is returned as by `load`.

    objects: as for `load`. keep_changed: continue although the code of the run, or your images, have changed since.

    Raises `UsageError` where the run cannot be continued, and `RunFailed` and `KeyboardInterrupt` as `Experiment.run`.
    """
    saved = read_saved(os.fspath(folder))
    config = resolve_request(_of_saved(saved, _selected(objects), keep_changed))
    changed = [] if run.is_done(saved.folder) else check_code(saved, config, keep_changed)
    told = Callbacks(callbacks)
    with _ending(told):
        run.resume(config, saved.folder, changed, told, keep_changed)
    return Run(config, saved.folder, told.trainer)


class Experiment:
    """A run that can be started: `config` has every flag's value and origin (`Config`)."""

    def __init__(self, config: Config):
        self.config, self._parts = config, _Parts(config)
        _ = config.code  # by now: later, a part's name may be another object's

    @property
    def flags(self) -> dict[str, Any]:
        """Every flag's value."""
        return dict(self.config.values)

    def run(self, callbacks: Sequence[Any] = ()) -> "Run":
        """Trains from the start, into a new run folder (none with disable_log=True). Each call repeats the same run.

        callbacks: objects with some of the methods of `Callback`. Raises `RunFailed` if training cannot continue
        (finished tasks are kept), and `KeyboardInterrupt` after Ctrl-C, with a checkpoint for `resume`. If a callback
        stops the run, it is returned with the status 'interrupted'.
        """
        told = Callbacks(callbacks)
        with self._parts.entered(), _ending(told):
            run.train(self.config, told)
        trainer = told.trainer
        return Run(self.config, None if trainer.folder is None else trainer.folder.path, trainer)

    def __repr__(self) -> str:
        before = FROM_PYTHON.set(True)
        try:
            return f"Experiment({describe(self.config)})"
        finally:
            FROM_PYTHON.reset(before)


class Run:
    """A run and its results. `folder`: its run folder, or None without one; `config`: its flags."""

    def __init__(self, config: Config, folder: Path | None, trainer: Trainer | None = None):
        self.config, self.folder, self._trainer, self._parts = config, folder, trainer, _Parts(config)

    @property
    def flags(self) -> dict[str, Any]:
        """Every flag's value."""
        return dict(self.config.values)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json: status, metrics, accuracy, cost, ... Fractions are in 0..1."""
        if self.folder is None:
            return self._built.summary(self._built.status)
        try:
            return read_json(self.folder / "summary.json")
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{self.folder}/summary.json cannot be read ({error}): this run has finished no task, or the file is "
                "damaged."
            ) from None

    @property
    def status(self) -> str:
        """'finished', 'running', 'interrupted', 'diverged' or 'crashed'."""
        return self.summary["status"]

    @property
    def metrics(self) -> dict[str, dict[str, float | None]]:
        """{setting: {metric: fraction}}; `flatcl.utils.metrics` has the definitions."""
        return self.summary["metrics"]

    @property
    def accuracy(self) -> dict[str, np.ndarray]:
        """{setting: (tasks trained, T) float64}: [i, j] is the accuracy, a fraction, on task j, counted from 0, after
        the i-th task that was trained, which is task i, or start_from + i; NaN if it was not measured."""
        return {setting: np.array(rows, dtype=np.float64) for setting, rows in self.summary["accuracy"].items()}

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark with its data: a sequence of tasks, each with `classes`, `train` and `test`."""
        return cast(Benchmark, self._built.benchmark)

    @property
    def model(self) -> Method:
        """The trained method, an `nn.Module`: `model.net` is the network, `model(x)` gives its logits."""
        return self._built.method

    @property
    def buffer(self) -> Buffer | None:
        """The memory: `buffer.all()` gives its columns {name: (rows, ...)}. None for a method without one. Raises
        `UsageError` where the run has kept its weights alone."""
        is_gone = self.folder is not None and not checkpoint.exists(self.folder / "checkpoint")
        if is_gone and hasattr(self.model, "buffer"):
            raise UsageError(
                f"{self.folder} has only the weights (--keep_checkpoint 0), not the memory. Repeat the run without "
                "this flag."
            )
        return getattr(self.model, "buffer", None)

    def logits(self, images: Any, task: int | None = None) -> Tensor:
        """Images (N, C, H, W) uint8 as the benchmark stores them -> logits (N, K) float32, on the CPU.

        Column k is the k-th class that was learned: `benchmark.class_order()[k]` of the data set. task: counted from 0,
        for methods that must know it (`pnn`). Raises `UsageError` for other images, and for a task that is not there.
        """
        images = self._images(images)
        if task is not None and not (isinstance(task, Integral) and 0 <= task < len(self.benchmark)):
            raise UsageError(f"task must be 0 to {len(self.benchmark) - 1}, got {task!r}. Tasks are counted from 0.")
        with self._computing():
            return self._built.evaluate.logits(self.model, images, task).float().cpu()

    def predict(self, images: Any, task: int | None = None) -> Tensor:
        """Images (N, C, H, W) uint8 -> the predicted classes (N,) int64, numbered as in the data set.
        With `task`, counted from 0, only the classes of that task are predicted (task-il); without it all, or, in a run
        with --class_il_argmax seen, those of the tasks that are finished (class-il). Raises `UsageError` as `logits`
        does."""
        logits = self.logits(images, task)
        order = torch.tensor(self.benchmark.class_order())
        if task is None:
            return order[logits[:, : self._competing].argmax(1)]
        outputs = self.benchmark[task].classes
        return order[outputs.start : outputs.stop][logits[:, outputs.start : outputs.stop].argmax(1)]

    def features(self, images: Any) -> Tensor:
        """Images (N, C, H, W) uint8 -> features (N, F) float32, the input of the last layer, on the CPU. Raises
        `UsageError` for other images, and for a network without `features`."""
        net: Any = self.model.net
        if not hasattr(net, "features"):
            raise UsageError(f"the network {self.config.backbone} has no `features`. Use a network that has.")
        images, augment = self._images(images), self._built.augment
        with self._computing(), eval_mode(net), torch.no_grad():
            return torch.cat([net.features(augment.plain(rows)).float().cpu() for rows in images.split(256)])

    def confusion_matrix(self) -> np.ndarray:
        """(K, K) int64: the number of test images of the class of the row that were predicted as the class of the
        column, both numbered as in the data set; over all tasks, and the classes that `predict` has without a task (for
        `pnn`: by the network of the task)."""
        return predictions.confusion_matrix(self._predictions, self._decided["class_order"], self._competing)

    def class_accuracy(self) -> np.ndarray:
        """(K,) float64, fractions: the accuracy on each class of the data set; NaN for a class without test images."""
        return predictions.class_accuracy(self.confusion_matrix())

    def __repr__(self) -> str:
        config = self.config
        try:
            status = self.status
            scores = (f"{setting} {100 * values['final_average_accuracy']:.2f} %" for setting, values in
                      self.summary["metrics"].items())  # fmt: skip
            end = f"{status}, {', '.join(scores)}"
        except UsageError:
            end = "no task finished"
        return f"Run({config.model} on {config.dataset}, seed {config.seed}: {end}; {self.folder or 'no folder'})"

    @cached_property
    def _built(self) -> Trainer:
        """The parts of the run: those that it was trained with, or built anew and put where the run has left them."""
        if self._trainer is not None:
            return self._trainer
        folder = self.folder
        assert folder is not None  # a run without one has its trainer
        device, weights = resolve_device(self.config.device), folder / run.WEIGHTS
        config = replace(self.config, values={**self.config.values, "cuda_graph": "0"})  # no step is taken
        with self._parts.entered(), seeding.untouched(), computing(config, device):
            if checkpoint.exists(folder / "checkpoint") or not weights.is_file():
                state = checkpoint.load(folder / "checkpoint", self.config.hash)
                run.check_end(folder, state)
                trainer = build_parts(config, device, None, is_new=False)
                with run.fitting(folder):
                    trainer.load_checkpoint(state)
            else:
                trainer = build_parts(config, device, None, is_new=False)
                with run.fitting(folder):
                    _load_weights(trainer.method, weights)
        return trainer

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with seeding.untouched(), computing(self.config, self._built.device):
            yield

    @cached_property
    def _predictions(self) -> dict[str, np.ndarray]:
        found = None if self.folder is None else predictions.load(self.folder)
        if found is not None:
            return found
        with self._computing():
            return {name: column.numpy() for name, column in self._built.evaluate.predictions(self.model).items()}

    @cached_property
    def _decided(self) -> dict[str, Any]:
        """From the run folder, so that a confusion matrix that is there needs no data; else from the benchmark."""
        if self.folder is not None:
            with suppress(TypeError, OSError, ValueError, KeyError):
                found = read_json(self.folder / "benchmark.json")
                return {name: found[name] for name in ("class_order", "tasks")}
        return self.benchmark.decided()

    @cached_property
    def _competing(self) -> int:
        """Outputs, from the first on, that class-il predicts over."""
        rows: list[Any] = []
        with suppress(UsageError):  # of a run that was stopped in its first task
            rows = next(iter(self.summary["accuracy"].values()), [])
        return predictions.num_competing(self.config, self._decided, len(rows))

    def _images(self, images: Any) -> Tensor:
        """Checked, as a tensor (N, C, H, W) uint8."""
        images, shape = torch.as_tensor(laid_out(images)), tuple(self.benchmark.shape)
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != shape or len(images) == 0:
            raise UsageError(
                f"images must be uint8 (N, C, H, W) with (C, H, W) = {shape} and at least one, got "
                f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}. Give them as the benchmark stores "
                "them, neither scaled nor normalised."
            )
        return images


@contextmanager
def _ending(told: Callbacks) -> Iterator[None]:
    """How a run may end, for a caller in Python. What it draws leaves the caller's random numbers alone."""
    before = FROM_PYTHON.set(True)
    try:
        with seeding.untouched():
            yield
    except Interrupted:
        if not told.have_stopped:
            raise KeyboardInterrupt from None
    finally:
        FROM_PYTHON.reset(before)


def _of_saved(saved: Saved, words: dict[str, list[str]], keep_changed: bool) -> Request:
    """The request for a run as it was. From its checkpoint on, its pretrained weights are not needed."""
    goes_on = checkpoint.exists(saved.folder / "checkpoint") or run.is_done(saved.folder)
    resume = str(saved.folder) if goes_on else None
    return Request(words=words, plugins=(), source=str(saved.file), resume=resume, keep_changed=keep_changed)


def _load_weights(method: Method, file: Path) -> None:
    weights = torch.load(file, map_location="cpu", weights_only=True)
    missing, unexpected = method.load_state_dict(weights, strict=False)
    odd = [*unexpected, *(name for name in missing if not name.endswith("_extra_state"))]
    if odd:
        raise ValueError(f"other parameters: {', '.join(odd[:3])}")


def _selected(chosen: Mapping[str, Any]) -> dict[str, list[str]]:
    """{selector: [name]}; classes and networks are entered into the registries."""
    odd = chosen.keys() - SELECTORS.keys()
    if odd:
        raise UsageError(f"unknown argument: {', '.join(sorted(odd))}. Choose from: {', '.join(SELECTORS)}.")
    return {kind: [_name(kind, value)] for kind, value in chosen.items() if value is not None}


def _name(kind: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if kind == "backbone" and isinstance(value, nn.Module):
        value = _copies_of(value)
    if not isinstance(value, type) or not issubclass(value, BASES[kind]):
        what = f"{BASES[kind].__module__}.{BASES[kind].__name__}"
        raise UsageError(f"{kind} must be a name or a class derived from {what}, got {value!r}. {WHENCE}")
    return _registered(SELECTORS[kind], value)


def _registered(registry: Registry[Any], cls: type[Any]) -> str:
    own = vars(cls).get("name")
    if own is None or not registry.has(own, cls):
        registry.register(own or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__))(cls)
    return cls.name


class _Parts:
    """The classes of a run, which is built of them even if others have got their names since: those of a network with
    the same digest, of a class that a notebook has defined anew, of other arrays that were given the same name."""

    def __init__(self, config: Config):
        names = {kind: config.values[kind] for kind in SELECTORS}
        self.classes = {kind: SELECTORS[kind].load(name) for kind, name in names.items() if ":" not in name}

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, their names stand for them."""
        with ExitStack() as stack:
            for kind, cls in self.classes.items():
                stack.enter_context(SELECTORS[kind].standing_for(cls.name, cls))
            yield


def _copies_of(net: nn.Module) -> type[nn.Module]:
    """A backbone that is a copy of this network; its name has a digest of its settings and weights."""
    found = Description(net)
    digest = hashlib.sha256(found.text.encode()).hexdigest()[:12]
    content: dict[str, Any] = {"net": copy.deepcopy(net).cpu(), "digest": digest, "code": found.code}
    has_features = callable(getattr(type(net), "features", None)) and isinstance(
        getattr(net, "num_features", None), int
    )  # not a module of this name, as torchvision's networks have
    has = {"features": has_features, "stages": isinstance(getattr(type(net), "stages", None), property)}
    content |= {name: getattr(type(net), name) for name, is_there in has.items() if is_there}
    content["name"] = f"{type(net).__name__.lower()}-{digest[:8]}"
    return type("GivenNetwork", (_Given,), {**content, "__module__": __name__, "__doc__": f"A {type(net).__name__}."})


class _Given(nn.Module):
    """What stands for a network that was given as an object: called like a backbone's class, it returns a copy."""

    name: str
    net: nn.Module
    digest: str
    code: dict[str, str]

    def __new__(cls, shape: tuple[int, int, int], num_classes: int, args: None = None) -> nn.Module:  # type: ignore[misc]
        net = copy.deepcopy(cls.net)
        problem = _misfit(net, shape, num_classes)
        if problem is not None:
            raise UsageError(
                f"the network that was given must take {(2, *shape)} float32 and give logits {(2, num_classes)}, but "
                f"{problem}. Give its last layer {num_classes} outputs."
            )
        return net

    @classmethod
    def sources(cls, config: Any) -> dict[str, str]:
        """Settings and weights, and the code of the classes and functions of the network that are not a library's."""
        return {f"network {cls.name}": cls.digest} | cls.code


def _misfit(net: nn.Module, shape: tuple[int, int, int], num_classes: int) -> str | None:
    """What is wrong with a network for images (C, H, W), if something is."""
    try:
        with seeding.untouched(), torch.no_grad(), eval_mode(net):
            out = net(torch.zeros(2, *shape, device=next(net.parameters()).device))
    except Exception as error:  # code of the user, which may fail in any way
        return f"it fails ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
    if isinstance(out, Tensor) and tuple(out.shape) == (2, num_classes):
        return None
    return f"it gives {tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__}"


def _word(name: str, value: Any) -> str:
    """A keyword's value, as it would be typed."""
    if value is None:
        return "none"
    if isinstance(value, bool | np.bool_):
        return str(int(value))
    if isinstance(value, int | float | np.integer | np.floating):
        return repr(value.item() if isinstance(value, np.generic) else value)
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return ",".join(_word(name, item) for item in value)
    raise UsageError(f"{name} must be a number, a text, True or False, or a list of these, got {value!r}.")
