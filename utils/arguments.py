"""Flags as dataclasses; layers with origins; every problem reported at once.

A flag is a field of a frozen dataclass made by `flag(default, help, bounds)`. The engine's flags are `EngineArgs`; a
method, an optimizer, a backbone and a benchmark may each bring an `Args` of their own. The value of a flag comes from
the last of these layers that has one, and the layer's name is kept as its origin:

    field default < dataset's default < published value (method, dataset, buffer size) < optimizer's default < argv

With --protocol, the flags of that protocol lie over the dataset's defaults and over the values published for its own.
The optimizer's layer holds only what a published SGD setting cannot speak for, such as the learning rate of Adam.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flatcl.utils import declared
from flatcl.utils.console import complain
from flatcl.utils.elsewhere import ELSEWHERE
from flatcl.utils.errors import UsageError, mistake
from flatcl.utils.files import is_writable
from flatcl.utils.identity import PROTOCOL, check_weights, code_of, named, weights_of
from flatcl.utils.protocols import Benchmark, Method
from flatcl.utils.registry import (
    BACKBONES,
    DATASETS,
    METHODS,
    OPTIMIZERS,
    POLICIES,
    Plugin,
    Registry,
    canonical,
    load_plugin,
    nearest,
)
from flatcl.utils.saved import Parent, Saved, check_plugin, other_code, parent_of, read_saved

DEBUG_BATCHES = 5  # of an epoch in debug mode
TOO_LARGE = "is a number that is too large"
MANY_TASKS = 50  # beyond them a run evaluates the tasks seen only, and logs no curve of its own for each task
SELECTORS: dict[str, Registry[Any]] = {
    "model": METHODS,
    "dataset": DATASETS,
    "backbone": BACKBONES,
    "optimizer": OPTIMIZERS,
}
SEEDS = ("class_order_seed", "data_order_seed", "init_seed")  # in place of --seed, for one source of random numbers


def flag(
    default: Any, help: str, *, low: float | None = None, high: float | None = None, above: float | None = None,
    below: float | None = None, choices: Iterable[str] | None = None, result: bool = True, fixed: bool = False,
) -> Any:  # fmt: skip
    """A dataclass field that is a flag.

    `low`, `high` are inclusive bounds, `above`, `below` exclusive ones; `result=False` marks a flag that cannot change
    a number (where files lie, what is printed), which is left out of the config's hash; `fixed` one that decides what
    the tasks are or what is kept of them, so that a run that continues another cannot change it.
    """
    bounds = {"low": low, "high": high, "above": above, "below": below}
    metadata = {"help": help, "bounds": bounds, "choices": choices, "result": result, "fixed": fixed}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class EngineArgs:
    """Flags that every run has."""

    model: str = flag(None, "the continual-learning method (see --list)", fixed=True)
    dataset: str = flag(None, "the benchmark (see --list)", fixed=True)
    backbone: str = flag(None, "the network; default: the benchmark's", fixed=True)
    optimizer: str = flag(None, "the optimizer, plain or sharpness-aware; default: the method's")
    protocol: str | None = flag(
        None, "another protocol of the benchmark: its network, epochs, batch sizes and learning rate, e.g. online; "
            "default: the published one",
        result=False,
    )  # fmt: skip
    lr: float = flag(0.1, "learning rate", above=0, high=1e6)
    n_epochs: int = flag(1, "epochs over each task", low=1, high=10**6)
    batch_size: int = flag(32, "images of the stream in a step", low=1, high=10**6)
    optim_wd: float = flag(0.0, "weight decay of the base optimizer", low=0, high=1e6)
    lr_scheduler: str = flag(
        "none",
        "learning rate schedule over the epochs of a task; restarts with each task",
        choices=("none", "multistep", "cosine"),
    )
    lr_milestones: tuple[int, ...] = flag((), "epochs at which 'multistep' multiplies the rate by --lr_gamma", low=1)
    lr_gamma: float = flag(0.1, "factor of 'multistep'", above=0)
    seed: int = flag(0, "seed of all random numbers", low=0, high=2**32 - 1, fixed=True)
    class_order_seed: int | None = flag(
        None,
        "seed of what the benchmark draws: the order of the classes (--permute_classes), the permutations or angles of "
        "its tasks, held-out images; default: --seed",
        low=0, high=2**32 - 1, fixed=True,
    )  # fmt: skip
    data_order_seed: int | None = flag(
        None, "seed of the order of the training images in each epoch; default: --seed",
        low=0, high=2**32 - 1, fixed=True,
    )  # fmt: skip
    init_seed: int | None = flag(
        None, "seed of the initial weights; default: --seed", low=0, high=2**32 - 1, fixed=True
    )
    n_tasks: int | None = flag(None, "number of tasks; default: the benchmark's", low=1, fixed=True)
    classes_per_task: tuple[int, ...] = flag(
        (), "classes of each task of a class-incremental benchmark, e.g. 50,10,10; decides --n_tasks", low=1, fixed=True
    )
    start_from: int = flag(
        0, "first task to train, counted from 0; the classes of earlier tasks count as learned", low=0, fixed=True
    )
    stop_after: int | None = flag(None, "number of tasks after which training stops; default: all", low=1)
    pretrained_weights: str | None = flag(
        None,
        "file of initial weights: safetensors, a state dict saved by torch, or the model.pt of a run; a classifier "
        "with another number of classes keeps its random weights",
        fixed=True,
    )
    freeze_backbone: bool = flag(
        False, "train only the classifier; BatchNorm and dropout of the other layers stay in eval mode", fixed=True
    )
    joint: bool = flag(False, "train on all tasks at once (upper bound)", fixed=True)
    validation: bool = flag(
        False, "hold out 10 %% of the training images and evaluate on them, not on the test set", fixed=True
    )
    permute_classes: bool = flag(
        False, "order the classes at random (by the seed) before they are split into tasks", fixed=True
    )
    custom_class_order: tuple[int, ...] = flag((), "order of the classes, e.g. 3,1,0,2", low=0, fixed=True)
    augmentation: bool = flag(True, "augment the training images as the benchmark declares")
    class_il_argmax: str = flag(
        "all",
        "class-il predicts over all outputs, as the published DER tables do, or over the classes seen so far",
        choices=("all", "seen"),
        fixed=True,
    )
    eval_tasks: str = flag(
        "auto",
        f"tasks to evaluate after each task: all, or those seen so far; auto: all if there are at most {MANY_TASKS} "
        "tasks, else seen",
        choices=("auto", "all", "seen"),
        fixed=True,
    )
    model_config: str = flag(
        "best", "'best' applies published hyperparameters, 'default' drops them", choices=("best", "default")
    )
    warmup_epochs: int = flag(
        0, "epochs at the start of each task in which the learning rate rises to its value, evenly from step to step",
        low=0, high=10**6,
    )  # fmt: skip
    clip_grad: float | None = flag(
        None, "largest norm of an update: a larger one is scaled down to it, after everything that method and "
            "optimizer do",
        above=0, high=1e30,
    )  # fmt: skip
    early_stop: int | None = flag(
        None, "a task ends when its accuracy on held-out images (10 %% of its training images) has not risen for this "
            "many epochs; training continues with the weights of its best epoch",
        low=1, high=10**6, fixed=True,
    )  # fmt: skip
    budget_rows: int | None = flag(
        None,
        "compute of the run, rows forward + 2 x rows backward, shared evenly by its tasks; instead of --n_epochs",
        low=1,
    )
    amp: str = flag("none", "the passes of a step in bfloat16 (autocast), weights in float32", choices=("none", "bf16"))
    channels_last: str = flag(
        "auto",
        "memory layout of convolutions, 1: channels last, faster on CPUs, or 0: as the network is made; sums differ in "
        "the last digits; auto: 1 on the CPU",
        choices=("auto", "0", "1"),
    )
    debug_mode: bool = flag(False, "a quick look: 1 epoch of 5 batches for each task")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps ...", result=False)
    data_device: str = flag(
        "auto", "where the images live: 'device', 'cpu', or auto (on the device where they fit)",
        choices=("auto", "cpu", "device"), result=False,
    )  # fmt: skip
    cuda_graph: str = flag(
        "auto", "on a GPU, record each kind of step once as a CUDA graph, then replay it; auto: where possible; 1: "
        "refuse methods none of whose steps can be; 0: never",
        choices=("auto", "0", "1"), result=False,
    )  # fmt: skip
    sync_bn: bool = flag(
        False, "in a run with several processes, BatchNorm uses the rows of all of them, not only its own (GPUs only)"
    )
    threads: int = flag(
        1, "CPU threads of a run; some sums, and so its numbers, depend on them in the last digits", low=1, high=4096
    )
    base_path: str = flag("./data", "folder of the data sets (default also from $FLATCL_DATA)", result=False)
    results_path: str = flag("./results", "folder in which each run makes its run folder", result=False)
    eval_every: int | None = flag(
        None, "epochs between evaluations inside a task, for metrics.jsonl and TensorBoard; default: none inside",
        low=1, result=False,
    )  # fmt: skip
    save_predictions: bool = flag(
        False, "keep the final network's logits of all test images, and a confusion matrix", result=False
    )
    notes: str = flag("", "free text, kept in the run's files", result=False)
    non_verbose: bool = flag(False, "no progress bar", result=False)
    disable_log: bool = flag(False, "write no run folder", result=False)
    log_every: int = flag(50, "steps between two points of the logged training curves", low=1, result=False)
    log_to: str | None = flag(
        None, "log to a tracker, too: its package must be installed, its own variables say where to",
        choices=("wandb", "mlflow"), result=False,
    )  # fmt: skip
    checkpoint_minutes: float = flag(
        10.0, "minutes between checkpoints inside a task (one is always written after a task); 0: only after tasks",
        low=0, result=False,
    )  # fmt: skip
    keep_checkpoint: bool = flag(
        True, "a finished run keeps its last checkpoint; 0: only its weights, as model.pt", result=False
    )
    dry_run: bool = flag(False, "resolve and print the configuration, then stop", result=False)


@dataclass(frozen=True)
class Flag:
    """One flag of a run: `kind` is its Python type, `owner` says whose it is ('engine', 'model er', ...)."""

    name: str
    kind: type
    default: Any
    optional: bool
    many: bool
    owner: str
    help: str
    bounds: dict[str, float | None]
    choices: Iterable[str] | None
    result: bool
    fixed: bool

    def parse(self, words: list[str]) -> Any:
        """The value of command-line words; raises ValueError with 'expected ...'."""
        if self.many and [word.lower() for word in words] == ["none"]:
            return ()
        if self.many:
            text = ",".join(words)  # an item that is a text may have spaces inside
            parts = map(str.strip, text.split(",")) if self.kind is str else text.replace(",", " ").split()
            return tuple(self._one(part) for part in parts if part)
        if self.kind is bool and not words:
            return True
        if len(words) != 1:
            raise ValueError(f"expects one value, got {len(words)}")
        if self.optional and words[0].lower() == "none":
            return None
        return self._one(words[0])

    def _one(self, word: str) -> Any:
        if self.kind is bool:
            if word.lower() not in ("0", "1", "true", "false"):
                raise ValueError(f"expects 0 or 1, got '{word}'")
            return word.lower() in ("1", "true")
        if self.kind is str:
            return self.choices.written(word) if isinstance(self.choices, Registry) else word
        try:
            value = self.kind(word)
        except ValueError:
            if self.kind is int and re.fullmatch(r"[+-]?\d+", word):  # of more digits than Python reads
                raise ValueError(TOO_LARGE) from None
            noun = "a whole number" if self.kind is int else "a number"
            raise ValueError(f"expects {noun}, got '{word}'") from None
        if self.kind is float and not math.isfinite(value):
            raise ValueError(f"expects a finite number, got '{word}'")
        return value

    def from_json(self, value: Any) -> Any:
        """A value that was read from a file; raises ValueError where its type is not the flag's."""
        if value is None and (self.optional or self.default is None):
            return None
        if self.many != isinstance(value, list):
            raise ValueError(f"expects {'a list' if self.many else 'one value'}, got {json.dumps(value)}")
        for item in value if self.many else [value]:
            if not self._is_one(item):
                raise ValueError(f"expects {self.kind.__name__}, got {json.dumps(item)}")
        return tuple(value) if self.many else self.kind(value)

    def _is_one(self, item: Any) -> bool:
        right = isinstance(item, int | float) if self.kind is float else isinstance(item, self.kind)
        return right and not (isinstance(item, bool) and self.kind is not bool) and not _is_beyond_float(item)

    def exact(self, value: Any) -> Any:
        """A value that fits, in the flag's own type: 1 is 1.0 for a flag that is a float, a list is a tuple."""
        if self.many:
            return tuple(map(self.kind, value))
        return float(value) if self.kind is float and isinstance(value, int) and not isinstance(value, bool) else value

    def fits(self, value: Any) -> bool:
        """Whether a value that a part of the program gives (a default, a published one) has the flag's type."""
        if value is None:
            return self.optional or self.default is None
        if self.many:
            return isinstance(value, tuple | list) and all(map(self._is_one, value))
        return self._is_one(value)

    def check(self, value: Any) -> str | None:
        """What is wrong with a value, or None."""
        if value is None:
            return None if self.optional or self.default is None else "needs a value"
        for item in value if self.many else (value,):
            if _is_beyond_float(item):
                return TOO_LARGE
            if self.kind is str and not is_writable(item):
                return f"has characters that cannot be written to files or to the console, got {ascii(item)}"
            if self.choices and item not in self.choices:
                return f"must be one of {', '.join(self.choices)}, got '{item}'"
            low, high, above, below = (self.bounds[key] for key in ("low", "high", "above", "below"))
            if low is not None and item < low:
                return f"must be at least {low:g}, got {item:g}"
            if high is not None and item > high:
                return f"must be at most {high:g}, got {item:g}"
            if above is not None and item <= above:
                return f"must be greater than {above:g}, got {item:g}"
            if below is not None and item >= below:
                return f"must be less than {below:g}, got {item:g}"
        return None


def written(value: Any) -> str:
    """A flag's value, for people."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_beyond_float(value: Any) -> bool:
    return isinstance(value, int | float) and not abs(value) <= sys.float_info.max


def flags_of(args_type: type, owner: str) -> dict[str, Flag]:
    """The flags that a dataclass declares. Raises `UsageError` where they are not declared as flags are."""
    if "__dataclass_fields__" not in vars(args_type):
        raise mistake(args_type, f"the flags of {owner} must be a dataclass. Write @dataclass(frozen=True) above it.")
    hints = typing.get_type_hints(args_type)
    found = {}
    for field in dataclasses.fields(args_type):
        kind, optional, many = hints[field.name], False, False
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            optional = True
            kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
        if typing.get_origin(kind) is tuple:
            many, kind = True, typing.get_args(kind)[0]
        if "bounds" not in field.metadata:
            raise mistake(
                args_type, f"'{field.name}' of {owner} is not a flag. Write: {field.name}: ... = flag(default, help)."
            )
        if kind not in (int, float, str, bool):
            raise mistake(
                args_type,
                f"the flag '{field.name}' of {owner} cannot be of the type {hints[field.name]}. Use int, float, str or "
                "bool, tuple[...] of one of them, or one of them | None.",
            )
        found[field.name] = new = Flag(field.name, kind, field.default, optional, many, owner, **field.metadata)
        if not new.fits(new.default):
            raise mistake(
                args_type,
                f"the flag '{new.name}' of {owner} must have a default of {kind.__name__}, got {new.default!r}.",
            )
    return found


def args_of(cls: type) -> type | None:
    """The `Args` dataclass of a method, optimizer, benchmark or backbone, if it has one."""
    return getattr(cls, "Args", None)


@dataclass(frozen=True)
class Config:
    """A run's resolved flags: `values`, and `origins` (which layer each came from)."""

    values: dict[str, Any]
    origins: dict[str, str]
    plugins: tuple[Plugin, ...] = ()
    continues: Parent | None = None
    flags: dict[str, Flag] = dataclasses.field(default_factory=dict, repr=False)
    begun_by: Mapping[str, str] | None = None  # the code of the run whose checkpoint this one goes on from

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __repr__(self) -> str:
        given = (f"{name}={written(value)}" for name, value in self.values.items()
                 if self.origins[name] == "argv" and name not in SELECTORS)  # fmt: skip
        return f"Config({', '.join([f'{self.model} on {self.dataset}', *given])}; {self.hash})"

    def view(self, cls: type) -> Any:
        """The `Args` of a method, optimizer, backbone or benchmark, filled in; None if it declares none."""
        args_type = args_of(cls)
        if args_type is None:
            return None
        return args_type(**{field.name: self.values[field.name] for field in dataclasses.fields(args_type)})

    @property
    def hash(self) -> str:
        """12 hexadecimal digits over everything that can change a number: a flag that is added later, at its default,
        leaves the hash as it is; one whose default changes raises PROTOCOL."""
        content = {
            name: self.values[name]
            for name, flag in sorted(self.flags.items())
            if flag.result and self.values[name] != flag.default
        }
        if self.continues is not None:
            content["continues"] = [self.continues.config_hash, self.continues.tasks]
        text = json.dumps({"protocol": PROTOCOL, **content}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def code(self) -> dict[str, str]:
        """{file: digest} of what defines the four chosen classes, and of plugins (see `utils/identity.py`); of the data
        and packages that a class names in its `sources`; and of pretrained weights."""
        chosen = [SELECTORS[name].load(self.values[name]) for name in SELECTORS]
        if "buffer_policy" in self.values:
            chosen.append(POLICIES.load(self.values["buffer_policy"]))
        found = code_of(chosen, self.plugins)
        for cls in chosen:
            found |= cls.sources(self) if hasattr(cls, "sources") else {}
        if self.pretrained_weights is not None:
            found |= weights_of(self.pretrained_weights, self.begun_by)
        return dict(sorted(found.items()))

    def to_json(self) -> dict:
        flags = {name: {"value": self.values[name], "origin": self.origins[name]} for name in self.values}
        plugins = [
            {"path": plugin.path, "sha256": plugin.sha256, "copy": f"plugins/{name}"}
            for name, plugin in named(self.plugins).items()
        ]
        parent = {} if self.continues is None else {"continues": dataclasses.asdict(self.continues)}
        return {
            "protocol": PROTOCOL, "config_hash": self.hash, **parent, "plugins": plugins, "code": self.code,
            "flags": flags,
        }  # fmt: skip

    @property
    def evaluated(self) -> str:
        """'all' or 'seen': what --eval_tasks stands for in this run."""
        if self.eval_tasks != "auto":
            return self.eval_tasks
        return "all" if self.n_tasks <= MANY_TASKS else "seen"

    @property
    def learner(self) -> type[Method]:
        return METHODS.load(self.model)

    @cached_property
    def benchmark(self) -> type[Benchmark]:
        """The benchmark's class, with what its data alone says. Raises `UsageError` where that data is not there."""
        return DATASETS.load(self.dataset).declared(self)


@dataclass(frozen=True)
class Request:
    """argv, cut into words. `words[name]` are the strings after `--name`."""

    words: dict[str, list[str]]
    plugins: tuple[str, ...]
    wants_help: bool = False
    listing: str | None = None
    source: str | None = None  # --from
    resume: str | None = None  # from its checkpoint
    continues: bool = False  # the run of --from, from where it ended
    keep_changed: bool = False  # a run's plugin, or with --resume its code, may differ from what it was made with

    @classmethod
    def parse(cls, argv: list[str]) -> "Request":
        words: dict[str, list[str]] = {}
        plugins: list[list[str]] = []
        current: list[str] | None = None
        problems = []
        for token in argv:
            if token in ("-h", "--help"):
                words["help"] = current = []
            elif token.startswith("--") and len(token) > 2:
                name, _, value = token[2:].partition("=")
                current = given = [value] if "=" in token else []
                name = canonical(name)
                if name == "plugin":
                    plugins.append(given)
                else:
                    words[name] = given
            elif current is None:
                problems.append(f"'{token}' is not a flag. Flags look like --name value.")
            else:
                current.append(token)
        if problems:
            raise UsageError(*problems)
        single = {name: words.pop(name, None) for name in ("help", "list", "from", "resume")}
        for name in ("from", "resume"):
            paths = single[name]
            if paths is not None and len(paths) != 1:
                problems.append(f"--{name} expects one path, got {len(paths)}. Give a run's folder.")
        continues = _switch("continue", words.pop("continue", None), problems)
        if continues and single["from"] is None:
            problems.append("--continue starts from the end of another run. Name that run by --from.")
        if single["resume"] not in (None, ["auto"]) and single["from"] is not None:
            problems.append("--resume RUN and --from exclude each other: a run is resumed as it was. Give one of them.")
        keep_changed = _switch("keep_changed", words.pop("keep_changed", None), problems)
        if keep_changed and single["from"] is None and single["resume"] is None:
            problems.append("--keep_changed has no effect without --resume or --from. Drop it.")
        for plugin in plugins:
            if len(plugin) != 1:
                problems.append(f"--plugin expects one path, got {len(plugin)}. Repeat the flag for more files.")
        if problems:
            raise UsageError(*problems)
        return cls(
            words=words,
            plugins=tuple(plugin[0] for plugin in plugins),
            wants_help=single["help"] is not None,
            listing=None if single["list"] is None else " ".join(single["list"]),
            source=None if single["from"] is None else single["from"][0],
            resume=None if single["resume"] is None else single["resume"][0],
            continues=continues,
            keep_changed=keep_changed,
        )


def _switch(name: str, words: list[str] | None, problems: list[str]) -> bool:
    """0 or 1, or nothing for 1; a flag that is no value of a run."""
    if words is None:
        return False
    if words not in ([], ["0"], ["1"]):
        problems.append(f"--{name} expects 0 or 1, got '{' '.join(words)}'.")
    return words != ["0"]


def schema(engine: Mapping[str, type[Any] | None]) -> dict[str, Flag]:
    """All flags of a run. `engine` maps 'model', 'dataset', 'backbone', 'optimizer' to classes (or None)."""
    flags = flags_of(EngineArgs, "engine")
    for selector, cls in engine.items():
        args_type = args_of(cls) if cls is not None else None
        if cls is None or args_type is None:
            continue
        owner = f"{selector} {cls.name}"
        for name, new in flags_of(args_type, owner).items():
            if name in flags:
                raise UsageError(
                    f"the flag --{name} of {owner} is already a flag of {flags[name].owner}. Rename it in {owner}."
                )
            flags[name] = new
    return flags


def resolve(argv: list[str]) -> Config:
    """argv -> the run's configuration. Raises `UsageError` with every problem that was found."""
    return resolve_request(Request.parse(argv))


def resolve_request(request: Request) -> Config:
    saved = None if request.source is None else read_saved(request.source)
    file_values, file = (saved.values, str(saved.file)) if saved else ({}, "")
    plugins = _load_plugins(request, saved)
    names, problems = _names(request, file_values)
    problems += _unknown_flags(request, names)
    if problems:  # said before anything is imported, which takes seconds
        engine = {name: flag_ for name, flag_ in flags_of(EngineArgs, "engine").items() if name not in SELECTORS}
        raise UsageError(*problems, *_given(request, engine)[1])
    chosen = _load(names)
    flags = schema(chosen)
    given, problems = _given(request, flags)

    layers = _Layers(flags)
    problems += _put_defaults(layers, chosen, known={**file_values, **given})
    problems += _put_file(layers, chosen, file_values, file, given)
    layers.put({name: value for name, value in given.items() if name not in SELECTORS}, "argv")
    for name in SELECTORS:
        if name in request.words:
            layers.origins[name] = "argv"
        elif name in file_values:
            layers.origins[name] = f"from {file}"

    parent = (parent_of(saved) if request.continues else saved.continues) if saved else None
    begun_by = saved.code if saved and request.resume else parent.code if parent else None
    config = Config(layers.values, layers.origins, plugins, parent, flags, begun_by)
    problems += _check_each(config, reported={line.split()[0] for line in problems})
    config = config if problems else _with_number_of_tasks(config)
    problems = problems or _check_together(config, goes_on=request.resume is not None)
    if parent is not None:
        problems = problems or _check_continued(config, parent, saved, is_new=request.continues)
    problems = problems or _check_parts(config, chosen)
    if problems:
        raise UsageError(*problems)
    changed = other_code([parent.code], parent.code, config) if request.continues and parent else []
    if parent is not None and changed:
        complain(f"note: {parent.run} was made by other code or data: {', '.join(changed)} changed since")
    return config


def _with_number_of_tasks(config: Config) -> Config:
    """Where only a benchmark's data says how many tasks there are."""
    number = config.benchmark.defaults.get("n_tasks") if config.n_tasks is None else None
    if number is None:
        return config
    origins = {**config.origins, "n_tasks": f"dataset {config.benchmark.name}"}
    return dataclasses.replace(config, values={**config.values, "n_tasks": number}, origins=origins)


def _check_parts(config: Config, chosen: dict[str, Any]) -> list[str]:
    """What benchmark, method and optimizer say; only the benchmark, if the number of tasks is not known."""
    problems = list(config.benchmark.check(config))
    if config.n_tasks is not None:
        problems += chosen["model"].check(config, config.benchmark)
        problems += chosen["optimizer"].check(config, chosen["model"])
    return problems


def _check_continued(config: Config, parent: Parent, saved: Saved | None, is_new: bool) -> list[str]:
    """What a run that continues another (`parent`) cannot have. `saved`: the other one, or, where the run is not
    `is_new`, a run that continues it."""
    assert saved is not None  # as it has a parent
    problems = []
    for name, flag_ in config.flags.items():
        is_fixed = flag_.fixed or flag_.owner.startswith(("backbone ", "dataset "))
        if not is_fixed:
            continue
        now, then = config.values[name], saved.values.get(name, flag_.default)
        now, then = (canonical(value) if name in SELECTORS else value for value in (now, then))
        if now != (tuple(then) if flag_.many else then):
            problems.append(f"--{name} must be {then}, as in the run that is continued, got {now}. Drop it.")
    if config.budget_rows is not None:
        problems.append(
            "--budget_rows cannot be used with --continue: it is shared by all tasks of a run from its start. Give "
            "--budget_rows none and --n_epochs."
        )
    if config.joint or config.learner.trains_jointly:
        problems.append("--continue: a joint run has trained all tasks, none is left. Drop it.")
    if config.learner.learns_at_the_end and is_new:
        problems.append(
            f"--continue: {config.model} learns only at the end of a run, from new weights, so there is nothing to "
            "continue. Start a new run with a larger --stop_after."
        )
    done, stop = config.start_from + parent.tasks, config.stop_after or config.n_tasks
    if stop <= done and not problems:
        remedy = "Give a larger --stop_after" if done < config.n_tasks else "There are no more"
        problems.append(f"--continue: {done} task(s) of {parent.run} are trained already. {remedy}.")
    return problems


def _load_plugins(request: Request, saved: Saved | None) -> tuple[Plugin, ...]:
    """Those of the saved run, wherever they are now, and those of the command line, each once."""
    given = dict.fromkeys(request.plugins)
    loaded: dict[Any, Plugin] = {}
    if saved is not None:
        for entry in saved.plugins:
            plugin = check_plugin(entry, saved, list(given), request.keep_changed)
            loaded.setdefault(plugin.source, load_plugin(plugin))
    for path in given:
        plugin = load_plugin(path)
        loaded.setdefault(plugin.source, plugin)
    return tuple(loaded.values())


def known_flags(argv: list[str]) -> set[str]:
    """The names of the flags that a run with these selectors has. Unknown selectors bring none."""
    names, _ = _names(Request.parse(argv), {})
    return set().union(*_flags_by_part(names).values())


def problem_of(name: str, word: str) -> str | None:
    """What is wrong with a word for a flag that all runs have; None for flags of methods, optimizers, ..., whose
    classes are not loaded for it."""
    engine = {own: flag_ for own, flag_ in flags_of(EngineArgs, "engine").items() if own not in SELECTORS}
    _, problems = _given(Request({name: [word]}, plugins=()), engine)
    return problems[0] if problems else None


class _Layers:
    """Values and their origins; each layer that is put covers those before it, where it has a value."""

    def __init__(self, flags: dict[str, Flag]):
        self.flags = flags
        self.values = {name: flag_.default for name, flag_ in flags.items()}
        self.origins = dict.fromkeys(flags, "default")

    def put(self, layer: Mapping[str, Any], origin: str) -> None:
        for name in self.flags.keys() & layer.keys():
            self.values[name], self.origins[name] = self.flags[name].exact(layer[name]), origin
        self._agree_on_tasks(layer)

    def _agree_on_tasks(self, layer: Mapping[str, Any]) -> None:
        """--classes_per_task decides --n_tasks; of the two, the one in the upper layer counts. If one layer has both,
        `_check_together` compares them."""
        sizes, number = self.values["classes_per_task"], layer.get("n_tasks")
        if sizes and number is None and ("n_tasks" in layer or "classes_per_task" in layer):
            self.values["n_tasks"], self.origins["n_tasks"] = len(sizes), "--classes_per_task"
        is_agreed = number == len(sizes) and self.origins["classes_per_task"].startswith(("dataset ", "protocol "))
        if number is not None and sizes and "classes_per_task" not in layer and not is_agreed:
            self.values["classes_per_task"], self.origins["classes_per_task"] = (), "--n_tasks"


def _put_defaults(layers: _Layers, chosen: dict[str, type[Any]], known: dict[str, Any]) -> list[str]:
    """Everything below the command line; returns problems with it. `known`: the values that the user has given."""
    dataset, model, optimizer = chosen["dataset"], chosen["model"], chosen["optimizer"]
    protocol = next(
        (name for name in dataset.protocols if canonical(name) == canonical(str(known.get("protocol")))), None
    )
    own = {} if protocol is None else dataset.protocols[protocol]
    problems = _check_layer(dataset, "defaults", dataset.defaults, layers.flags)
    problems += _check_layer(dataset, f"protocols['{protocol}']", own, layers.flags)
    problems += _check_layer(optimizer, "defaults", optimizer.defaults, layers.flags)
    if problems:
        return problems
    layers.put(dataset.defaults, f"dataset {dataset.name}")
    layers.put(own, f"protocol {protocol} of {dataset.name}")
    of_backbone = layers.origins["backbone"] if "backbone" in own else f"dataset {dataset.name}"
    layers.put({name: cls.name for name, cls in chosen.items()}, "argv")
    layers.origins |= {"backbone": of_backbone, "optimizer": f"model {model.name}"}
    if os.environ.get("FLATCL_DATA"):
        layers.put({"base_path": os.environ["FLATCL_DATA"]}, "$FLATCL_DATA")
    if known.get("model_config", "best") == "best":
        buffer_size = known.get("buffer_size", layers.values.get("buffer_size"))
        if not isinstance(buffer_size, int | None):
            buffer_size = None  # of a damaged file, which is reported with the flag
        row, problems = _published(chosen, buffer_size, protocol, layers.flags)
        for name, (value, origin) in row.items():
            layers.put({name: value}, origin)
    layers.put(optimizer.defaults, f"optimizer {optimizer.name}")
    return problems


def _check_layer(owner: type[Any], what: str, layer: Mapping[str, Any], flags: dict[str, Flag]) -> list[str]:
    """Values that a class gives to flags: of the right types, and to flags that this run has or another one could."""
    problems = []
    for name, value in layer.items():
        if name in flags and not flags[name].fits(value):
            problems.append(f"its {what} must give {name} a value of {flags[name].kind.__name__}, got {value!r}.")
        elif name not in flags and next(_owners(name), None) is None:
            problems.append(f"its {what} name '{name}', which is not a flag. {nearest(name, sorted(flags))}")
    return [line for problem in problems for line in mistake(owner, problem).problems]


def _put_file(
    layers: _Layers, chosen: dict[str, type[Any]], values: Mapping[str, Any], file: str, given: Mapping[str, Any]
) -> list[str]:
    """The layer of --from. `given`: the values of the command line. Flags that the file's model had and the chosen one
    lacks are dropped; those that are younger than the file have their defaults, which is what the program did then."""
    problems: list[str] = []
    good: dict[str, Any] = {}
    fits = {name: canonical(str(values.get(name))) == canonical(cls.name) for name, cls in chosen.items()}
    same = all(fits.values())
    if values and given.get("model_config", values.get("model_config")) != values.get("model_config"):
        problems.append(
            f"--model_config {given['model_config']} cannot be given with the file of a run, which has all values of "
            f"its own ({values.get('model_config')}). Drop it, or start a run without --from."
        )
    for name in sorted(values.keys() - SELECTORS.keys()):
        if name not in layers.flags:
            if same:
                problems.append(f"{file} has the flag '{name}', which does not exist (any more). Remove it there.")
            continue
        if (
            not fits["optimizer"]
            and layers.flags[name].owner.startswith("optimizer ")
            and not name.startswith("optim_")
        ):
            continue  # a radius or a weight that was another optimizer's
        try:
            good[name] = layers.flags[name].from_json(values[name])
        except ValueError as error:
            problems.append(f"{file}: '{name}' {error}. {_remedy(layers.flags[name])}")
    layers.put(good, f"from {file}")
    for name, flag_ in layers.flags.items() if values else ():
        part = flag_.owner.partition(" ")[0]
        if name not in values and name not in SELECTORS and fits.get(part, same):
            layers.values[name], layers.origins[name] = flag_.default, "default"
    return problems


def _check_each(config: Config, reported: set[str]) -> list[str]:
    """Bounds and choices of each flag, unless there is a problem with it already."""
    problems = []
    for name, flag_ in config.flags.items():
        value = config.values[name]
        wrong = None if f"--{name}" in reported else flag_.check(value)
        if wrong:
            problems.append(f"--{name} {wrong}. {_remedy(flag_, value)}")
    return problems


def _names(request: Request, file_values: Mapping[str, Any]) -> tuple[dict[str, str | None], list[str]]:
    """({selector: the name that is chosen, None where it is wrong}, what is wrong). Model and dataset must be named;
    the other two have defaults."""
    names: dict[str, str | None] = dict.fromkeys(SELECTORS)
    problems: list[str] = []

    def choose(selector: str, name: str) -> None:
        try:
            SELECTORS[selector].check(name)
            names[selector] = name
        except UsageError as error:
            problems.extend(error.problems)

    for selector, registry in SELECTORS.items():
        words = request.words.get(selector)
        if words is not None and len(words) != 1:
            problems.append(f"--{selector} expects one name, got {len(words)}. See --list.")
        elif words is not None:
            choose(selector, words[0])
        elif selector in file_values:
            choose(selector, str(file_values[selector]))
        elif selector in ("model", "dataset"):
            problems.append(f"--{selector} is missing. Choose from: {', '.join(registry.choices())}.")
    protocol, problem = _protocol(request, file_values, names["dataset"])
    problems += problem
    for selector, owner in (("backbone", "dataset"), ("optimizer", "model")):
        known = names[owner]
        if known and names[selector] is None and selector not in request.words and selector not in file_values:
            default = declared.attribute(SELECTORS[owner], known, f"default_{selector}")
            choose(selector, protocol.get(selector, default) if owner == "dataset" else default)
    return names, problems


def _protocol(
    request: Request, file_values: Mapping[str, Any], dataset: str | None
) -> tuple[Mapping[str, Any], list[str]]:
    """(the flags of the protocol that is asked for, none for the benchmark's first; what is wrong with it)."""
    words, before = request.words.get("protocol"), file_values.get("protocol")
    name = before if words is None else words[0] if len(words) == 1 else None
    is_same = canonical(str(file_values.get("dataset"))) == canonical(str(dataset))
    leaves_it = not is_same and canonical(str(name)) == "none"  # the other benchmark has no such protocol
    if words is not None and file_values and canonical(str(name)) != canonical(str(before)) and not leaves_it:
        return {}, [
            f"--protocol {name} cannot be given with the file of a run, which has all values of its own protocol "
            f"({before or 'the published one'}). Drop it, or start a run without --from."
        ]
    if not isinstance(name, str) or dataset is None or name.lower() == "none":  # or `_given` says what is wrong
        return {}, []
    protocols = declared.attribute(DATASETS, dataset, "protocols")
    if not _are_protocols(protocols):
        return {}, [
            f"protocols of {dataset} must be {{name: {{flag: value}}}}, for other flags than model, dataset, optimizer "
            f"and protocol, got {protocols!r}. Correct it in its class."
        ]
    chosen = next((flags for own, flags in protocols.items() if canonical(own) == canonical(name)), None)
    if chosen is not None:
        return chosen, []
    if not protocols:
        remedy = "Drop it" if words else "Give --protocol none"
        return {}, [f"--protocol {name} cannot be used with {dataset}, which has only its own. {remedy}."]
    return {}, [f"--protocol must be one of {', '.join(protocols)}, got '{name}'. {nearest(name, list(protocols))}"]


def _are_protocols(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and canonical(name) != "none"
        and isinstance(flags, dict)
        and isinstance(flags.get("backbone", ""), str)
        and not flags.keys() & {"model", "dataset", "optimizer", "protocol"}
        for name, flags in value.items()
    )


def _load(names: Mapping[str, str | None]) -> dict[str, type[Any]]:
    """The four classes. Raises `UsageError` with all that cannot be imported."""
    chosen: dict[str, type[Any]] = {}
    problems: list[str] = []
    for selector, name in names.items():
        assert name is not None  # or `_names` has found a problem
        try:
            chosen[selector] = SELECTORS[selector].load(name)
        except UsageError as error:
            problems.extend(error.problems)
    if problems:
        raise UsageError(*problems)
    return chosen


def _unknown_flags(request: Request, names: dict[str, str | None]) -> list[str]:
    """Where a selector is wrong, only flags that no part has: the others may be right once it is mended."""
    parts = _flags_by_part(names)
    known, problems = set().union(*parts.values()), []
    for name in request.words:
        fixed = (
            names["model"] and name == "buffer_policy" and declared.attribute(METHODS, names["model"], "fixed_policy")
        )
        if fixed:
            problems.append(
                f"--buffer_policy has no effect on --model {names['model']}, whose paper fixes its memory ({fixed}). "
                "Drop it."
            )
            continue
        owners = [] if name in known else list(_owners(name))
        if name not in known and (all(names.values()) or not owners):
            near = known if all(names.values()) else flags_of_runs()
            problems.append(f"unknown flag: --{name}. {_about(name, owners, near)}")
    return problems


def _flags_by_part(names: dict[str, str | None]) -> dict[str, set[str]]:
    """The flags of the engine and of the parts that are chosen."""
    own = {kind: declared.flags(SELECTORS[kind], name) for kind, name in names.items() if name}
    return {"engine": {field.name for field in dataclasses.fields(EngineArgs)}, **own}


def _given(request: Request, flags: dict[str, Flag]) -> tuple[dict[str, Any], list[str]]:
    """(the values of the command line, what is wrong with them); of flags that are not among these, nothing."""
    given: dict[str, Any] = {}
    problems: list[str] = []
    for name, words in request.words.items():
        if name not in flags:
            continue
        try:
            value = flags[name].parse(words)
            wrong = flags[name].check(value)
        except ValueError as error:
            wrong = str(error)
        if wrong:
            problems.append(f"--{name} {wrong}. {_remedy(flags[name], *words[:1])}")
        else:
            given[name] = value
    return given, problems


def _about(name: str, owners: list[str], flags: Iterable[str]) -> str:
    """What a user who has written this flag needs to know, where the run does not have it."""
    if owners:
        shown = ", ".join(owners[:3]) + (f" and {len(owners) - 3} more" if owners[3:] else "")
        return f"It belongs to {shown}, which this run does not use."
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    hint = nearest(f"--{name}", [f"--{flag_}" for flag_ in sorted(flags)])
    if hint.startswith("Did"):
        return hint
    return "See --model M --dataset D --help for the flags of a pair."


def flags_of_runs() -> set[str]:
    """The names of all flags that some run has; nothing is imported for them."""
    parts = (_flags_of_another(registry, name) for registry in SELECTORS.values() for name in registry.names())
    return {field.name for field in dataclasses.fields(EngineArgs)}.union(*parts)


def _owners(name: str) -> Iterator[str]:
    """The parts, chosen or not, that have this flag."""
    for kind, registry in reversed(SELECTORS.items()):
        for other in registry.names():
            if name in _flags_of_another(registry, other):
                yield f"{kind} {other}"


def _flags_of_another(registry: Registry, name: str) -> set[str]:
    """The flags of a part that may not be this run's; none if it comes from an installed package that is broken."""
    try:
        return declared.flags(registry, name)
    except UsageError:
        return set()


def _remedy(flag_: Flag, value: Any = None) -> str:
    """What to give in place of a value."""
    if flag_.choices and isinstance(value, str):
        return nearest(value, list(flag_.choices))
    if flag_.choices:
        return f"Choose from: {', '.join(flag_.choices)}."
    return f"It is: {flag_.help.replace('%%', '%')}."


def _published(
    chosen: dict[str, type[Any]], buffer_size: int | None, protocol: str | None, flags: dict[str, Flag]
) -> tuple[dict[str, tuple[Any, str]], list[str]]:
    """({flag: (value, origin)} published for exactly this method, dataset and buffer size, problems with it).

    The optimizer's own flags (rho) were chosen for the method's default optimizer; another one keeps its defaults. For
    another protocol than the dataset's first, what the protocol itself does not say is taken from the dataset's, as
    ours, below the row of `dataset:protocol`.
    """
    dataset = chosen["dataset"]
    row, problems = _row(chosen, (dataset.name, dataset.published_as), buffer_size, flags)
    if protocol is None or problems:
        return row, problems
    names = (f"{name}:{protocol}" for name in (dataset.name, dataset.published_as) if name is not None)
    own, problems = _row(chosen, names, buffer_size, flags)
    kept = {name: entry for name, entry in row.items() if name not in dataset.protocols[protocol]}
    return {**_as_ours(kept, dataset.name), **own}, problems


def _as_ours(row: dict[str, tuple[Any, str]], name: str) -> dict[str, tuple[Any, str]]:
    """Values that were published for another benchmark or protocol."""
    return {
        flag_: (value, f"ours: as on {name} ({origin.removeprefix('ours: ')})")
        for flag_, (value, origin) in row.items()
    }


def _row(
    chosen: dict[str, type[Any]], names: Iterable[str | None], buffer_size: int | None, flags: dict[str, Flag]
) -> tuple[dict[str, tuple[Any, str]], list[str]]:
    """The first row that the method has for one of these names, and this buffer size or none."""
    method, dataset, optimizer = chosen["model"], chosen["dataset"], chosen["optimizer"]
    keys = [(name, size) for name in names for size in (buffer_size, None)]
    key = next((key for key in keys if key in method.published), None)
    if key is None:
        return {}, []
    what = f"published values for {key[0]}"
    row = method.published[key]
    if not all(isinstance(entry, tuple) and len(entry) == 2 for entry in row.values()):
        return {}, [*mistake(method, f"its {what} must be (value, source). Use published(source, table).").problems]
    problems = _check_layer(method, what, {name: value for name, (value, _) in row.items()}, flags)
    row = {} if problems else {name: entry for name, entry in row.items() if name in flags}
    if canonical(optimizer.name) != canonical(method.default_optimizer):
        row = {name: entry for name, entry in row.items() if not flags[name].owner.startswith("optimizer ")}
    name = str(key[0])
    return row if name.partition(":")[0] == dataset.name else _as_ours(row, name), problems


def _check_together(config: Config, goes_on: bool) -> list[str]:
    """Flags that are right one by one but not together. `goes_on`: they are those of a run that is there already, which
    may have been made on another machine."""
    problems = []

    def argv(name: str) -> bool:
        return config.origins[name] == "argv"

    if config.lr_scheduler == "multistep" and not config.lr_milestones:
        problems.append("--lr_scheduler multistep needs --lr_milestones, got none. Give epochs, e.g. 35,45.")
    late = [epoch for epoch in config.lr_milestones if epoch >= config.n_epochs]
    if late and argv("lr_milestones") and config.lr_scheduler == "multistep" and config.budget_rows is None:
        problems.append(
            f"--lr_milestones {late[0]} is never reached: --n_epochs is {config.n_epochs}. Give earlier ones."
        )
    if config.lr_scheduler == "cosine" and config.n_epochs == 1 and config.budget_rows is None:
        problems.append("--lr_scheduler cosine has no effect in 1 epoch. Give a larger --n_epochs.")
    if config.budget_rows is not None:
        if argv("n_epochs"):
            problems.append(
                "--n_epochs and --budget_rows exclude each other: the budget ends a task. Give one of them."
            )
        if config.debug_mode:
            problems.append(
                "--debug_mode and --budget_rows exclude each other: both set the length of a task. Drop one of them."
            )
        if config.lr_scheduler == "cosine":
            problems.append(
                "--lr_scheduler cosine needs a number of epochs, which is not known with --budget_rows. Use multistep."
            )
    if config.warmup_epochs > config.n_epochs and config.budget_rows is None:
        problems.append(
            f"--warmup_epochs must be at most --n_epochs {config.n_epochs}, got {config.warmup_epochs}. Give less."
        )
    if config.early_stop is not None and config.budget_rows is not None:
        problems.append("--early_stop and --budget_rows exclude each other: both end a task. Give one of them.")
    elif config.early_stop is not None and config.n_epochs == 1:
        problems.append("--early_stop has no effect in 1 epoch. Give a larger --n_epochs.")
    fitting = config.values.get("fitting_epochs") if config.learner.learns_at_the_end else None
    length, what = (config.n_epochs, "--n_epochs") if fitting is None else (fitting, "--fitting_epochs")
    if config.eval_every is not None and config.eval_every >= length and config.budget_rows is None:
        problems.append(
            f"--eval_every must be less than {what} {length}, since the end of a task is evaluated anyway, got "
            f"{config.eval_every}. Give less, or drop it."
        )
    for name in ("lr_milestones", "lr_gamma"):
        if config.lr_scheduler != "multistep" and argv(name):
            problems.append(f"--{name} has no effect with --lr_scheduler {config.lr_scheduler}. Use multistep.")
    if config.threads > (cores := os.cpu_count() or 1) and not goes_on:
        problems.append(
            f"--threads must be at most the number of this machine's cores {cores}, got {config.threads}. Give less."
        )
    if config.values.get("optim_nesterov") and not config.values["optim_mom"]:
        problems.append("--optim_nesterov 1 needs --optim_mom greater than 0, got 0. Give both.")
    if config.classes_per_task and config.n_tasks != len(config.classes_per_task):
        problems.append(
            f"--n_tasks {config.n_tasks} does not match --classes_per_task {written(config.classes_per_task)}, which "
            f"are {len(config.classes_per_task)} tasks. Drop --n_tasks."
        )
    if config.permute_classes and config.custom_class_order:
        problems.append("--permute_classes and --custom_class_order exclude each other. Give one of them.")
    if config.pretrained_weights is not None and config.begun_by is None:
        problems += check_weights(config.pretrained_weights)
    if config.log_to is not None and config.disable_log:
        problems.append(
            f"--log_to {config.log_to} and --disable_log exclude each other: the tracker's id is kept in the run "
            "folder. Drop one of them."
        )
    jointly = config.joint or config.learner.trains_jointly
    problems += _check_seeds(config, jointly)
    if jointly and (config.start_from or config.stop_after):
        given = "--joint" if config.joint else f"--model {config.model}"
        problems.append(f"{given} trains all tasks at once: --start_from and --stop_after cannot be used. Drop them.")
    return problems


def _check_seeds(config: Config, jointly: bool) -> list[str]:
    """Seeds of what the benchmark does not draw. Of a benchmark of others, only its code says that."""
    if DATASETS.file(config.dataset) is None:
        return []
    problems, dataset = [], DATASETS.load(config.dataset)
    draws = config.permute_classes or config.validation or config.early_stop is not None or dataset.draws_tasks
    if config.class_order_seed is not None and not draws and config.origins["class_order_seed"] == "argv":
        is_class_il = dataset.setting == "class-il"
        what = "whose classes have a fixed order" if is_class_il else "whose tasks no seed decides"
        remedy = "Add --permute_classes 1, or drop it." if is_class_il else "Drop it."
        problems.append(f"--class_order_seed has no effect on {config.dataset}, {what}. {remedy}")
    if config.data_order_seed is not None and dataset.setting == "general-continual" and not jointly:
        problems.append(
            f"--data_order_seed has no effect on {config.dataset}, whose stream the benchmark draws. Use "
            "--class_order_seed."
        )
    return problems
