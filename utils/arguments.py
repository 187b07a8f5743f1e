"""Flags as dataclasses; layers with origins; every problem reported at once.

A flag is a field of a frozen dataclass made by `flag(default, help, bounds)`. The engine's flags are `EngineArgs`; a
method, an optimizer, a backbone and a benchmark may each bring an `Args` of their own. The value of a flag comes from
the last of these layers that has one, and the layer's name is kept as its origin:

    field default < dataset's default < published value (method, dataset, buffer size) < optimizer's default < argv

The optimizer's layer holds only what a published SGD setting cannot speak for, such as the learning rate of Adam.
"""

import dataclasses
import hashlib
import json
import math
import os
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.errors import UsageError
from utils.files import is_writable, read_json, user_path
from utils.registry import BACKBONES, DATASETS, METHODS, OPTIMIZERS, canonical, load_plugin, nearest

PROTOCOL = 1  # raised whenever the same flags would give another number than before
DEBUG_BATCHES = 5  # of an epoch in debug mode
SELECTORS = {"model": METHODS, "dataset": DATASETS, "backbone": BACKBONES, "optimizer": OPTIMIZERS}


def flag(default, help, *, low=None, high=None, above=None, below=None, choices=None, result=True):
    """A dataclass field that is a flag.

    `low`, `high` are inclusive bounds, `above`, `below` exclusive ones; `result=False` marks a flag that cannot change
    a number (where files lie, what is printed), which is left out of the config's hash.
    """
    bounds = {"low": low, "high": high, "above": above, "below": below}
    metadata = {"help": help, "bounds": bounds, "choices": choices, "result": result}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class EngineArgs:
    """Flags that every run has."""

    model: str = flag(None, "the continual-learning method (see --list)")
    dataset: str = flag(None, "the benchmark (see --list)")
    backbone: str = flag(None, "the network; default: the benchmark's")
    optimizer: str = flag(None, "the optimizer, plain or sharpness-aware; default: the method's")
    lr: float = flag(0.1, "learning rate", above=0, high=1e6)
    n_epochs: int = flag(1, "epochs over each task", low=1, high=10**6)
    batch_size: int = flag(32, "images of the stream in a step", low=1, high=10**6)
    optim_wd: float = flag(0.0, "weight decay of the base optimizer", low=0, high=1e6)
    lr_scheduler: str = flag(
        "none",
        "learning rate over a task's epochs; starts anew with each task",
        choices=("none", "multistep", "cosine"),
    )
    lr_milestones: tuple[int, ...] = flag((), "epochs at which 'multistep' multiplies the rate by --lr_gamma", low=1)
    lr_gamma: float = flag(0.1, "factor of 'multistep'", above=0)
    seed: int = flag(0, "seed of everything random", low=0, high=2**32 - 1)
    n_tasks: int | None = flag(None, "number of tasks; default: the benchmark's", low=1)
    start_from: int = flag(
        0, "first task to train, counted from 0; the classes of those before count as learned", low=0
    )
    stop_after: int | None = flag(None, "number of tasks after which training stops; default: all", low=1)
    joint: bool = flag(False, "train on all tasks at once (upper bound)")
    validation: bool = flag(False, "hold out 10 %% of the training images and evaluate on them, not on the test set")
    permute_classes: bool = flag(False, "order the classes at random (by the seed) before they are split into tasks")
    custom_class_order: tuple[int, ...] = flag((), "order of the classes, e.g. 3,1,0,2", low=0)
    augmentation: bool = flag(True, "augment the training images as the benchmark declares")
    class_il_argmax: str = flag(
        "all",
        "class-il predicts over all outputs, as the published DER tables do, or over the classes seen so far",
        choices=("all", "seen"),
    )
    model_config: str = flag(
        "best", "'best' applies published hyperparameters, 'default' drops them", choices=("best", "default")
    )
    budget_rows: int | None = flag(
        None,
        "compute of the run, rows forward + 2 x rows backward, shared evenly by its tasks; in place of --n_epochs",
        low=1,
    )
    amp: str = flag("none", "the passes of a step in bfloat16 (autocast), weights in float32", choices=("none", "bf16"))
    debug_mode: bool = flag(False, "a quick look: 1 epoch of 5 batches for each task")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps ...", result=False)
    data_device: str = flag(
        "auto", "where the images live: 'device', 'cpu', or auto (on the device where they fit)",
        choices=("auto", "cpu", "device"), result=False,
    )  # fmt: skip
    threads: int = flag(0, "CPU threads of a run; 0 leaves it to torch", low=0, high=4096, result=False)
    base_path: str = flag("./data", "folder of the data sets (default also from $CONTINUAL_DATA)", result=False)
    results_path: str = flag("./results", "folder of the run folders", result=False)
    notes: str = flag("", "free text, kept in the run's files", result=False)
    non_verbose: bool = flag(False, "no progress bar", result=False)
    disable_log: bool = flag(False, "write no run folder", result=False)
    log_every: int = flag(50, "steps between two points of the logged training curves", low=1, result=False)
    checkpoint_minutes: float = flag(
        10.0, "minutes between checkpoints inside a task (one is always written after a task); 0: only those",
        low=0, result=False,
    )  # fmt: skip
    keep_checkpoint: bool = flag(
        True, "a finished run keeps its last checkpoint; 0: its weights alone, as model.pt", result=False
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
    bounds: dict
    choices: tuple | None
    result: bool

    def parse(self, words: list[str]) -> Any:
        """The value of command-line words; raises ValueError with 'expected ...'."""
        if self.many:
            return tuple(self._one(part) for word in words for part in word.replace(",", " ").split())
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
            return word
        try:
            value = self.kind(word)
        except ValueError:
            noun = "a whole number" if self.kind is int else "a number"
            raise ValueError(f"expects {noun}, got '{word}'") from None
        if not math.isfinite(value):
            raise ValueError(f"expects a finite number, got '{word}'")
        return value

    def from_json(self, value: Any) -> Any:
        """A value that was read from a file; raises ValueError where its type is not the flag's."""
        if value is None and (self.optional or self.default is None):
            return None
        if self.many != isinstance(value, list):
            raise ValueError(f"expects {'a list' if self.many else 'one value'}, got {json.dumps(value)}")
        for item in value if self.many else [value]:
            right = isinstance(item, int | float) if self.kind is float else isinstance(item, self.kind)
            if not right or (isinstance(item, bool) and self.kind is not bool) or _is_beyond_float(item):
                raise ValueError(f"expects {self.kind.__name__}, got {json.dumps(item)}")
        return tuple(value) if self.many else self.kind(value)

    def check(self, value: Any) -> str | None:
        """What is wrong with a value, or None."""
        if value is None:
            return None if self.optional or self.default is None else "needs a value"
        for item in value if self.many else (value,):
            if _is_beyond_float(item):
                return "is a number beyond all bounds"
            if self.kind is str and not is_writable(item):
                return f"has characters that no file name and no console knows, got {ascii(item)}"
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


def _is_beyond_float(value: Any) -> bool:
    return isinstance(value, int | float) and not abs(value) <= sys.float_info.max


def flags_of(args_type: type, owner: str) -> dict[str, Flag]:
    """The flags that a dataclass declares."""
    hints = typing.get_type_hints(args_type)
    found = {}
    for field in dataclasses.fields(args_type):
        kind, optional, many = hints[field.name], False, False
        if isinstance(kind, types.UnionType):
            optional = True
            kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
        if typing.get_origin(kind) is tuple:
            many, kind = True, typing.get_args(kind)[0]
        assert field.metadata, f"{owner}: '{field.name}' must be made by flag(default, help)"
        found[field.name] = Flag(field.name, kind, field.default, optional, many, owner, **field.metadata)
    return found


def args_of(cls: type) -> type | None:
    """The `Args` dataclass of a method, optimizer, benchmark or backbone, if it has one."""
    return getattr(cls, "Args", None)


@dataclass(frozen=True)
class Config:
    """A run's resolved flags: `values`, and `origins` (which layer each came from)."""

    values: dict[str, Any]
    origins: dict[str, str]
    plugins: tuple[str, ...] = ()
    flags: dict[str, Flag] = dataclasses.field(default_factory=dict, repr=False)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def view(self, cls: type) -> Any:
        """The `Args` of a method, optimizer, backbone or benchmark, filled in; None if it declares none."""
        args_type = args_of(cls)
        if args_type is None:
            return None
        return args_type(**{field.name: self.values[field.name] for field in dataclasses.fields(args_type)})

    @property
    def hash(self) -> str:
        """12 hexadecimal digits over everything that can change a number."""
        content = {name: self.values[name] for name, flag in sorted(self.flags.items()) if flag.result}
        text = json.dumps({"protocol": PROTOCOL, **content}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_json(self) -> dict:
        flags = {name: {"value": self.values[name], "origin": self.origins[name]} for name in self.values}
        return {"protocol": PROTOCOL, "config_hash": self.hash, "plugins": list(self.plugins), "flags": flags}

    @property
    def learner(self) -> type:
        return METHODS.load(self.model)

    @property
    def benchmark(self) -> type:
        return DATASETS.load(self.dataset)


@dataclass(frozen=True)
class Request:
    """argv, cut into words. `words[name]` are the strings after `--name`."""

    words: dict[str, list[str]]
    plugins: tuple[str, ...]
    wants_help: bool = False
    listing: str | None = None
    source: str | None = None  # --from
    resume: str | None = None

    @classmethod
    def parse(cls, argv: list[str]) -> "Request":
        words: dict[str, list[str]] = {}
        plugins: list[str] = []
        current: list[str] | None = None
        problems = []
        for token in argv:
            if token in ("-h", "--help"):
                words["help"] = current = []
            elif token.startswith("--") and len(token) > 2:
                name, _, value = token[2:].partition("=")
                current = [value] if "=" in token else []
                name = canonical(name)
                if name == "plugin":
                    plugins.append(current)
                else:
                    words[name] = current
            elif current is None:
                problems.append(f"'{token}' is not a flag. Flags look like --name value.")
            else:
                current.append(token)
        if problems:
            raise UsageError(*problems)
        single = {name: words.pop(name, None) for name in ("help", "list", "from", "resume")}
        for name in ("from", "resume"):
            if single[name] is not None and len(single[name]) != 1:
                problems.append(f"--{name} expects one path, got {len(single[name])}. Give a run's folder.")
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
        )


def read_config_file(path: str) -> tuple[dict[str, Any], tuple[str, ...], str]:
    """(values, plugins, file) of a run's config.json; `path` is the file or its run folder."""
    file = user_path(path)
    file = file / "config.json" if os.path.isdir(file) else file
    try:
        content = read_json(file)
        values = {name: entry["value"] for name, entry in content["flags"].items()}
        protocol, plugins = content["protocol"], tuple(content["plugins"])
        if not all(isinstance(plugin, str) for plugin in plugins) or isinstance(content["plugins"], str):
            raise ValueError
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}. Give a run folder or its config.json.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{file} is not a run's config.json. Give a run folder or its config.json.") from None
    if protocol != PROTOCOL:
        raise UsageError(
            f"{file} was written under protocol {protocol}, this program runs protocol {PROTOCOL}: the same flags "
            "would give other numbers. Use the version that wrote it, or give the flags anew."
        )
    return values, plugins, str(file)


def schema(engine: dict[str, type | None]) -> dict[str, Flag]:
    """All flags of a run. `engine` maps 'model', 'dataset', 'backbone', 'optimizer' to classes (or None)."""
    flags = flags_of(EngineArgs, "engine")
    for selector, cls in engine.items():
        args_type = args_of(cls) if cls is not None else None
        if args_type is None:
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
    file_values, plugins, file = {}, request.plugins, ""
    if request.source is not None:
        file_values, file_plugins, file = read_config_file(request.source)
        plugins = file_plugins + plugins
    plugins = tuple(dict.fromkeys(os.path.realpath(user_path(plugin)) for plugin in plugins))
    for plugin in plugins:
        load_plugin(plugin)
    chosen, problems = _choose(request, file_values)
    if problems:
        raise UsageError(*(problems + _unknown_words(request, chosen)))
    flags = schema(chosen)
    given, problems = _given(request, flags)

    layers = _Layers(flags)
    _put_defaults(layers, chosen, known={**file_values, **given})
    problems += _put_file(layers, chosen, file_values, file)
    layers.put({name: value for name, value in given.items() if name not in SELECTORS}, "argv")
    for name in SELECTORS:
        if name in request.words:
            layers.origins[name] = "argv"
        elif name in file_values:
            layers.origins[name] = f"from {file}"

    config = Config(layers.values, layers.origins, plugins, flags)
    problems += _check_each(config, reported={line.split()[0] for line in problems})
    problems = problems or _check_together(config)
    problems = problems or [
        *chosen["dataset"].check(config),
        *chosen["model"].check(config, chosen["dataset"]),
        *chosen["optimizer"].check(config, chosen["model"]),
    ]
    if problems:
        raise UsageError(*problems)
    return config


def known_flags(argv: list[str]) -> set[str]:
    """The names of the flags that a run with these selectors has. Unknown selectors bring none."""
    chosen, _ = _choose(Request.parse(argv), {})
    return set(schema(chosen))


class _Layers:
    """Values and their origins; each layer that is put covers those before it, where it has a value."""

    def __init__(self, flags: dict[str, Flag]):
        self.flags = flags
        self.values = {name: flag_.default for name, flag_ in flags.items()}
        self.origins = dict.fromkeys(flags, "default")

    def put(self, layer: Mapping[str, Any], origin: str) -> None:
        for name in self.flags.keys() & layer.keys():
            self.values[name], self.origins[name] = layer[name], origin


def _put_defaults(layers: _Layers, chosen: dict[str, type], known: dict[str, Any]) -> None:
    """Everything below the command line. `known` are the values that the user has given so far."""
    dataset, model, optimizer = chosen["dataset"], chosen["model"], chosen["optimizer"]
    layers.put(dataset.defaults, f"dataset {dataset.name}")
    layers.put({name: cls.name for name, cls in chosen.items()}, "argv")
    layers.origins |= {"backbone": f"dataset {dataset.name}", "optimizer": f"model {model.name}"}
    if os.environ.get("CONTINUAL_DATA"):
        layers.put({"base_path": os.environ["CONTINUAL_DATA"]}, "$CONTINUAL_DATA")
    if known.get("model_config", "best") == "best":
        buffer_size = known.get("buffer_size", layers.values.get("buffer_size"))
        if not isinstance(buffer_size, int | None):
            buffer_size = None  # of a damaged file, which is reported with the flag
        for name, (value, origin) in _published(chosen, buffer_size, layers.flags).items():
            layers.put({name: value}, origin)
    layers.put(optimizer.defaults, f"optimizer {optimizer.name}")


def _put_file(layers: _Layers, chosen: dict[str, type], values: dict[str, Any], file: str) -> list[str]:
    """The layer of --from. Flags that the file's model had and the chosen one lacks are dropped."""
    problems, good = [], {}
    fits = {name: canonical(str(values.get(name))) == canonical(cls.name) for name, cls in chosen.items()}
    same = all(fits.values())
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
    return problems


def _check_each(config: Config, reported: set[str]) -> list[str]:
    """Bounds and choices of each flag, unless there is a problem with it already."""
    problems = []
    for name, flag_ in config.flags.items():
        wrong = None if f"--{name}" in reported else flag_.check(config.values[name])
        if wrong:
            problems.append(f"--{name} {wrong}. {_remedy(flag_)}")
    return problems


def _choose(request: Request, file_values: dict) -> tuple[dict[str, type], list[str]]:
    """The four classes. Model and dataset must be named; the other two have defaults."""
    chosen: dict[str, Any] = dict.fromkeys(SELECTORS)
    problems = []

    def load(selector: str, name: str | None) -> None:
        try:
            chosen[selector] = SELECTORS[selector].load(name)
        except UsageError as error:
            problems.extend(error.problems)

    for selector, registry in SELECTORS.items():
        words = request.words.get(selector)
        if words is not None and len(words) != 1:
            problems.append(f"--{selector} expects one name, got {len(words)}. See --list.")
        elif words is not None:
            load(selector, words[0])
        elif selector in file_values:
            load(selector, str(file_values[selector]))
        elif selector in ("model", "dataset"):
            problems.append(f"--{selector} is missing. Choose from: {', '.join(registry.names())}.")
    if chosen["dataset"] and chosen["backbone"] is None and "backbone" not in request.words:
        load("backbone", chosen["dataset"].default_backbone)
    if chosen["model"] and chosen["optimizer"] is None and "optimizer" not in request.words:
        load("optimizer", chosen["model"].default_optimizer)
    return chosen, problems


def _unknown_words(request: Request, chosen: dict[str, type | None]) -> list[str]:
    """When a selector is wrong, still say what is wrong with the engine's own flags."""
    flags = schema(chosen)
    complete = all(chosen.values())
    return _given(request, flags)[1] if complete else _given(request, flags, only_known=True)[1]


def _given(request: Request, flags: dict[str, Flag], only_known: bool = False) -> tuple[dict[str, Any], list[str]]:
    given, problems = {}, []
    for name, words in request.words.items():
        if name not in flags:
            if not only_known:
                problems.append(f"unknown flag: --{name}. {_near_flag(name, flags)}")
            continue
        try:
            given[name] = flags[name].parse(words)
        except ValueError as error:
            problems.append(f"--{name} {error}. {_remedy(flags[name])}")
    return given, problems


def _near_flag(name: str, flags: dict[str, Flag]) -> str:
    owners = [
        f"{kind} {other}"
        for kind, registry in SELECTORS.items()
        for other in registry.names()
        if name in _own_flags(registry.load(other))
    ]
    if owners:
        shown = ", ".join(owners[:3]) + (f" and {len(owners) - 3} more" if owners[3:] else "")
        return f"It belongs to {shown}, which this run does not use."
    hint = nearest(name, sorted(flags))
    if hint.startswith("Did"):
        return hint
    return "See --model M --dataset D --help for the flags of a pair."


def _own_flags(cls: type) -> set[str]:
    args_type = args_of(cls)
    return {field.name for field in dataclasses.fields(args_type)} if args_type else set()


def _remedy(flag_: Flag) -> str:
    if flag_.choices:
        return f"Choose from: {', '.join(flag_.choices)}."
    return f"It is: {flag_.help.replace('%%', '%')}."


def _published(chosen: dict[str, type], buffer_size: int | None, flags: dict[str, Flag]) -> dict[str, tuple[Any, str]]:
    """{flag: (value, origin)} published for exactly this method, dataset and buffer size.

    The optimizer's own flags (rho) were chosen for the method's default optimizer; another one keeps its defaults.
    """
    method, dataset, optimizer = chosen["model"], chosen["dataset"], chosen["optimizer"]
    keys = [(name, size) for name in (dataset.name, dataset.published_as) for size in (buffer_size, None)]
    key = next((key for key in keys if key in method.published), None)
    if key is None:
        return {}
    row = {name: entry for name, entry in method.published[key].items() if name in flags}
    if canonical(optimizer.name) != canonical(method.default_optimizer):
        row = {name: entry for name, entry in row.items() if not flags[name].owner.startswith("optimizer ")}
    if key[0] != dataset.name:
        row = {name: (value, f"ours: as on {key[0]} ({origin})") for name, (value, origin) in row.items()}
    return row


def _check_together(config: Config) -> list[str]:
    """Flags that are right one by one but not together."""
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
            problems.append("--debug_mode has a length of its own: --budget_rows does not fit. Drop one of them.")
        if config.lr_scheduler == "cosine":
            problems.append(
                "--lr_scheduler cosine needs a number of epochs, which --budget_rows leaves open. Use multistep."
            )
    for name in ("lr_milestones", "lr_gamma"):
        if config.lr_scheduler != "multistep" and argv(name):
            problems.append(f"--{name} has no effect with --lr_scheduler {config.lr_scheduler}. Use multistep.")
    if config.values.get("optim_nesterov") and not config.values["optim_mom"]:
        problems.append("--optim_nesterov 1 needs --optim_mom greater than 0, got 0. Give both.")
    if config.permute_classes and config.custom_class_order:
        problems.append("--permute_classes and --custom_class_order exclude each other. Give one of them.")
    jointly = config.joint or config.learner.trains_jointly
    if jointly and (config.start_from or config.stop_after):
        given = "--joint" if config.joint else f"--model {config.model}"
        problems.append(f"{given} trains all tasks at once: --start_from and --stop_after do not fit. Drop them.")
    return problems
