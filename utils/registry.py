"""Names <-> files. A registry lists a package's files by their names and imports only the one that is asked for.

`@METHODS.register("er_ace")` in `models/er_ace.py` makes the name `er_ace`; nothing else has to be edited.
Plugins (`--plugin FILE`) and installed packages (entry points `flatcl.models`, ...) add names without a fork.

A family stands for many: `timm:resnet18` is the class that the family `timm` gives for `resnet18`, by its class method
`variant(name)`: the same class for the same name, and a `UsageError` for a name that it does not know. Its file's
docstring has a line `Variants: ...` that says what the names are.
"""

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any, Generic, TypeVar

from flatcl._clone import PARTS
from flatcl.utils.errors import UsageError
from flatcl.utils.files import user_path
from flatcl.utils.protocols import Benchmark, Method, Optimizer

ROOT = Path(__file__).resolve().parent.parent  # of the folders that the registries look into
IS_CLONE = (ROOT / "flatcl").is_dir()  # or else an installed package
HOME = ROOT if IS_CLONE else None  # the working directory in which `python -m flatcl` is found; None: in any


def canonical(name: str) -> str:
    """`mgser-sam` and `mgser_sam` are one name."""
    return name.strip().lower().replace("-", "_")


T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """The names of one kind (method, dataset, ...) and the objects behind them.

    `folder` is the package's path below `flatcl`; `separator` is how names are written for people.
    """

    def __init__(self, kind: str, folder: str, group: str, separator: str = "_"):
        self.kind, self.folder, self.group, self.separator = kind, folder, group, separator
        self._objects: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator that enters an object under `name`. A name can be taken only once."""

        def enter(obj: Any) -> Any:
            key = canonical(name)
            if not key or set(key) & set("/\\:") or not key.strip("."):
                raise UsageError(
                    f"{self.kind} {name!r}: a name is a part of file names. Use letters, numbers, _ and -."
                )
            known = self._objects.get(key)
            owner = known.__module__ if known is not None else self._module(key) if key in self._files() else None
            if owner not in (None, obj.__module__):
                raise UsageError(
                    f"{self.kind} '{name}' is registered twice: by {owner} and by {obj.__module__}. Rename one of them."
                )
            obj.name = self.written(key)
            self._objects[key] = obj
            return obj

        return enter

    def written(self, name: str) -> str:
        return canonical(name).replace("_", self.separator)

    def has(self, name: str, obj: object) -> bool:
        """Whether `name` stands for this object."""
        return self._objects.get(canonical(name)) is obj

    @contextmanager
    def standing_for(self, name: str, obj: Any) -> Iterator[None]:
        """Inside, `name` stands for this object, whatever it stands for outside."""
        key = canonical(name)
        before = self._objects.get(key)
        self._objects[key] = obj
        try:
            yield
        finally:
            if before is None:
                del self._objects[key]
            else:
                self._objects[key] = before

    def __iter__(self) -> Iterator[str]:
        """The names, so that a registry can be the `choices` of a flag."""
        return iter(self.names())

    def names(self) -> list[str]:
        """All names in writing form, sorted, without those of families; imports nothing."""
        return sorted(self.written(key) for key in self._keys() if not self._is_family(key))

    def choices(self) -> list[str]:
        """What a user can write: the names, and `timm:NAME` for a family, sorted; imports nothing."""
        families = (f"{self.written(key)}:NAME" for key in self._keys() if self._is_family(key))
        return sorted([*self.names(), *families])

    def file(self, name: str) -> Path | None:
        """The file of ours that has this name, or the name of its family."""
        return self._files().get(_split(name)[0])

    def check(self, name: str) -> None:
        """Raises `UsageError` with the nearest names where there is neither such a name nor such a family; imports
        nothing."""
        key, colon, _ = _split(name)
        if key not in self._keys():
            hint = nearest(self.written(key) + colon, self.choices())
            own = "" if hint.startswith("Choose") else f" Your own {self.kind} needs --plugin FILE."
            raise UsageError(f"unknown {self.kind}: '{name}'. {hint}{own}")

    def load(self, name: str) -> type[T]:
        """The object behind `name`, for `family:variant` the family's; raises `UsageError` with the nearest names when
        there is none."""
        key, colon, variant = _split(name)
        if key not in self._objects:
            self.check(name)
        if key not in self._objects and key in self._files():
            importlib.import_module(self._module(key))
            if key not in self._objects:
                raise UsageError(f"{self.folder}/{key}.py does not register the {self.kind} '{key}'.")
        if key not in self._objects and key in self._entry_points():
            self._load_entry_point(key)
        found: Any = self._objects[key]
        if not self._is_family(key):
            if colon:
                raise UsageError(f"unknown {self.kind}: '{name}'. {found.name} is not a family: write it without ':'.")
            return found
        if not variant:
            raise UsageError(
                f"{self.kind} '{found.name}' is a family: give one of its names too, {found.name}:NAME. "
                f"{self.summary(key)}"
            )
        return found.variant(variant)

    def summary(self, name: str) -> str:
        """The first line of the file's docstring, read without importing it."""
        return self._docstring(name).split("\n")[0]

    def note(self, name: str, label: str) -> str:
        """What the docstring's line `label: ...` says; empty where it has none."""
        lines = (line.strip() for line in self._docstring(name).splitlines())
        return next((line.removeprefix(f"{label}:").strip() for line in lines if line.startswith(f"{label}:")), "")

    def _keys(self) -> set[str]:
        return set(self._files()) | set(self._objects) | set(self._entry_points())

    def _is_family(self, key: str) -> bool:
        if key in self._objects:
            return isinstance(getattr(self._objects[key], "variant", None), MethodType)
        return self.note(key, "Variants") != ""

    def _docstring(self, name: str) -> str:
        key, path = _split(name)[0], self.file(name)
        doc = _docstring_of(path) if path else None
        if doc is None and key in self._objects:
            known = self._objects[key]
            doc = known.__doc__ or sys.modules[known.__module__].__doc__
        return (doc or "").strip()

    def foreign_packages(self) -> set[str]:
        """The installed packages whose objects have been loaded."""
        owners = {key: obj.__module__ for key, obj in self._objects.items()}
        return {module.split(".")[0] for key, module in owners.items()
                if module != self._module(key) and plugin_of(module) is None}  # fmt: skip

    def forget(self, module: str) -> None:
        """Drops the names that a module has registered."""
        for key in [key for key, obj in self._objects.items() if obj.__module__ == module]:
            del self._objects[key]

    def _module(self, key: str) -> str:
        return f"flatcl.{self.folder.replace('/', '.')}.{key}"

    def _files(self) -> Mapping[str, Path]:
        return parts(self.folder)

    def _entry_points(self) -> dict:
        return _installed(self.group, tuple(sys.path))

    def _load_entry_point(self, key: str) -> None:
        point = self._entry_points()[key]
        try:
            obj = point.load()
        except (Exception, SystemExit) as error:  # a foreign package may fail in any way; the user needs its name
            raise UsageError(
                f"{self.kind} '{key}' comes from the installed package '{point.value}': {_why(error)}. "
                "Repair or uninstall that package."
            ) from error
        if key not in self._objects:
            self.register(key)(obj)


@functools.lru_cache(maxsize=32)
def _installed(group: str, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """{name: entry point} of the packages on this path. To look through all packages takes 10 ms, and each run of a
    large study asks for it several times; what is installed meanwhile is seen by the next process."""
    return {canonical(point.name): point for point in entry_points(group=group)}


def parts(folder: str) -> Mapping[str, Path]:
    """{name: file} of what a user can name in a folder: the files whose names have no _ in front."""
    path = os.path.join(ROOT, folder)
    return _listed(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _listed(folder: str, changed: int) -> Mapping[str, Path]:
    """A large study asks for this tens of times for each run. `changed`: when the folder has got its newest file."""
    return {path.stem: path for path in Path(folder).glob("*.py") if not path.stem.startswith(("_", "."))}


def summary_of(file: Path) -> str:
    """The first line of a file's docstring, read without importing it."""
    return (_docstring_of(file) or "").split("\n")[0]


def _split(name: str) -> tuple[str, str, str]:
    """(key, ':' or nothing, the variant as it is written) of a name."""
    key, colon, variant = name.partition(":")
    return canonical(key), colon, variant.strip()


@functools.cache
def _docstring_of(file: Path) -> str | None:
    """None also for a file that cannot be read: loading it says what is wrong, and others do not suffer from it."""
    try:
        return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"), filename=str(file)))
    except (OSError, SyntaxError, ValueError):
        return None


def nearest(name: str, names: list[str], otherwise: str | None = None, family: str = "") -> str:
    """`Did you mean ...?`, or, when none is near, all names, unless there is something else to say. `family` stands
    before the names that are suggested."""
    close = [family + other for other in difflib.get_close_matches(name, names, n=3, cutoff=0.55)]
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return otherwise or f"Choose from: {', '.join(names)}."


@dataclass(frozen=True)
class Plugin:
    """A file that a process has loaded: where it lay, and its bytes as they were then."""

    path: str
    source: bytes

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest()


PLUGIN = "flatcl_plugin_"  # the modules of plugins begin so


def read_plugin(path: str) -> Plugin:
    """A file that could be a plugin, not loaded yet."""
    file = Path(os.path.realpath(user_path(path)))
    try:
        source = file.read_bytes() if file.is_file() else None
    except (OSError, ValueError) as error:
        raise UsageError(f"--plugin {path!r}: it cannot be read ({error}). Give the path of a Python file.") from None
    if source is None:
        raise UsageError(f"--plugin {path}: there is no such file. Give the path of a Python file.")
    if file.suffix != ".py":
        raise UsageError(f"--plugin {path}: this is not a Python file (its name must end in .py).")
    return Plugin(str(file), source)


def load_plugin(plugin: Plugin | str) -> Plugin:
    """Import a file that registers names, and again where its text has changed. The same text under another path, such
    as the copy in a run's folder, is the same plugin."""
    new = read_plugin(plugin) if isinstance(plugin, str) else plugin
    for module in _plugin_modules():
        if module.__plugin__.source == new.source:
            return new
        if module.__plugin__.path == new.path:
            _unload(module.__name__)
    _execute(new)
    return new


def plugin_of(module: str) -> Plugin | None:
    """The plugin that a module is, if it is one."""
    return getattr(sys.modules.get(module), "__plugin__", None)


def _plugin_modules() -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if name.startswith(PLUGIN)]


def _execute(plugin: Plugin) -> None:
    name = f"{PLUGIN}{Path(plugin.path).stem}_{hashlib.sha256(plugin.path.encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, plugin.path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    vars(module)["__plugin__"] = plugin
    sys.modules[name] = module
    beside = Path(plugin.path).parent
    if str(beside) not in sys.path:  # it finds what lies beside it, and before that what is installed
        sys.path.append(str(beside))
    try:
        exec(compile(plugin.source, plugin.path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # whatever a plugin does wrong, the user needs the file and the reason
        _unload(name)
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"--plugin {plugin.path}: {_why(error)}. Correct the file and try again.") from error
    problem = _hidden(plugin, beside)
    if problem is not None:
        _unload(name)
        raise UsageError(problem)


def _hidden(plugin: Plugin, beside: Path) -> str | None:
    """What is wrong where a plugin has got another module than the one that lies beside it."""
    if beside == ROOT:
        return None
    nodes = list(ast.walk(ast.parse(plugin.source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    for name in sorted({name.split(".")[0] for name in names} - sys.stdlib_module_names):
        own = [file for file in (beside / f"{name}.py", beside / name / "__init__.py") if file.is_file()]
        got = getattr(sys.modules.get(name), "__file__", None)
        if own and got and os.path.realpath(got) not in map(os.path.realpath, own):
            return (
                f"--plugin {plugin.path}: it imports '{name}' and gets {got}, not {own[0]} in its own folder. Rename "
                "the file in its folder."
            )
    return None


def _why(error: BaseException) -> str:
    """Why an import failed, in one line."""
    if isinstance(error, SystemExit):
        return f"it ends the program while it is imported (sys.exit({error.code!r}))"
    if isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] in PARTS:
        return f"it does not import: {error} (in this package it is flatcl.{error.name})"
    return " ".join(f"it does not import: {type(error).__name__}: {error}".split())


def _unload(module: str) -> None:
    del sys.modules[module]
    for registry in REGISTRIES:
        registry.forget(module)


METHODS: Registry[Method] = Registry("model", "models", "flatcl.models")
DATASETS: Registry[Benchmark] = Registry("dataset", "datasets", "flatcl.datasets", separator="-")
BACKBONES: Registry[Any] = Registry("backbone", "backbone", "flatcl.backbones", separator="-")
OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", "utils/optim", "flatcl.optimizers")
POLICIES: Registry[Any] = Registry("buffer policy", "utils/engine/policies", "flatcl.policies")
REGISTRIES: tuple[Registry[Any], ...] = (METHODS, DATASETS, BACKBONES, OPTIMIZERS, POLICIES)
