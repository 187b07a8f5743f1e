"""Names <-> files. A registry lists a package's files by their names and imports only the one that is asked for.

`@METHODS.register("er_ace")` in `models/er_ace.py` makes the name `er_ace`; nothing else has to be edited.
Plugins (`--plugin FILE`) and installed packages (entry points `continual.models`, ...) add names without a fork.
"""

import ast
import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

from utils.errors import UsageError
from utils.files import user_path

ROOT = Path(__file__).resolve().parent.parent


def canonical(name: str) -> str:
    """`mgser-sam` and `mgser_sam` are one name."""
    return name.strip().lower().replace("-", "_")


class Registry:
    """The names of one kind (method, dataset, ...) and the objects behind them.

    `folder` is the package's path relative to the repository; `separator` is how names are written for people.
    """

    def __init__(self, kind: str, folder: str, group: str, separator: str = "_"):
        self.kind, self.folder, self.group, self.separator = kind, folder, group, separator
        self._objects: dict[str, object] = {}

    def register(self, name: str):
        """Class decorator that enters an object under `name`. A name can be taken only once."""

        def enter(obj):
            key = canonical(name)
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

    def names(self) -> list[str]:
        """All names in writing form, sorted; imports nothing."""
        keys = set(self._files()) | set(self._objects) | set(self._entry_points())
        return sorted(self.written(key) for key in keys)

    def load(self, name: str):
        """The object behind `name`; raises `UsageError` with the nearest names when there is none."""
        key = canonical(name)
        if key not in self._objects and key in self._files():
            importlib.import_module(self._module(key))
            if key not in self._objects:
                raise UsageError(f"{self.folder}/{key}.py does not register the {self.kind} '{key}'.")
        if key not in self._objects and key in self._entry_points():
            self._load_entry_point(key)
        if key not in self._objects:
            raise UsageError(f"unknown {self.kind}: '{name}'. {nearest(self.written(key), self.names())}")
        return self._objects[key]

    def summary(self, name: str) -> str:
        """The first line of the file's docstring, read without importing it."""
        return self._docstring(name).split("\n")[0]

    def note(self, name: str, label: str) -> str:
        """What the docstring's line `label: ...` says; empty where it has none."""
        lines = (line.strip() for line in self._docstring(name).splitlines())
        return next((line.removeprefix(f"{label}:").strip() for line in lines if line.startswith(f"{label}:")), "")

    def _docstring(self, name: str) -> str:
        path = self._files().get(canonical(name))
        doc = ast.get_docstring(ast.parse(path.read_text())) if path else None
        if doc is None and canonical(name) in self._objects:
            known = self._objects[canonical(name)]
            doc = known.__doc__ or sys.modules[known.__module__].__doc__
        return (doc or "").strip()

    def forget(self, module: str) -> None:
        """Drops the names that a module has registered."""
        for key in [key for key, obj in self._objects.items() if obj.__module__ == module]:
            del self._objects[key]

    def _module(self, key: str) -> str:
        return f"{self.folder.replace('/', '.')}.{key}"

    def _files(self) -> dict[str, Path]:
        return {p.stem: p for p in (ROOT / self.folder).glob("*.py") if not p.stem.startswith("_")}

    def _entry_points(self) -> dict:
        return {canonical(point.name): point for point in entry_points(group=self.group)}

    def _load_entry_point(self, key: str) -> None:
        point = self._entry_points()[key]
        try:
            obj = point.load()
        except Exception as error:  # a foreign package may fail in any way; the user needs its name
            raise UsageError(
                f"{self.kind} '{key}' comes from the installed package '{point.value}', which does not import: "
                f"{type(error).__name__}: {error}. Repair or uninstall that package."
            ) from error
        if key not in self._objects:
            self.register(key)(obj)


def nearest(name: str, names: list[str]) -> str:
    """`Did you mean ...?`, or all names when none is near."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.55)
    return f"Did you mean {' or '.join(close)}?" if close else f"Choose from: {', '.join(names)}."


def load_plugin(path: str) -> None:
    """Import a file that registers names; importing the same file again is harmless."""
    file = Path(os.path.realpath(user_path(path)))
    if not os.path.isfile(file):
        raise UsageError(f"--plugin {path}: there is no such file. Give the path of a Python file.")
    module_name = f"continual_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None:
        raise UsageError(f"--plugin {path}: this is not a Python file (its name must end in .py).")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a plugin does wrong, the user needs the file and the reason
        del sys.modules[module_name]
        for registry in (METHODS, DATASETS, BACKBONES, OPTIMIZERS):
            registry.forget(module_name)
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"--plugin {path}: it does not import: {type(error).__name__}: {error}. Mend the file and try again."
        ) from error


METHODS = Registry("model", "models", "continual.models")
DATASETS = Registry("dataset", "datasets", "continual.datasets", separator="-")
BACKBONES = Registry("backbone", "backbone", "continual.backbones", separator="-")
OPTIMIZERS = Registry("optimizer", "utils/optim", "continual.optimizers")
