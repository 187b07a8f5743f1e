"""How the package finds its parts in a clone, where models/, datasets/, backbone/ and utils/ lie beside flatcl/.

They are parts of `flatcl` alone. At the top, where Python looks because of `main.py`, they are hidden: there, `import
datasets` is Hugging Face's and `import utils` a user's own, and no module of ours is loaded twice under two names.
"""

import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

PARTS = frozenset({"models", "datasets", "backbone", "utils"})


class _Finder:
    """Of a folder's modules those that are shown."""

    def __init__(self, folder: Path, is_shown: Callable[[str], bool]):
        self.files = FileFinder(str(folder), (SourceFileLoader, SOURCE_SUFFIXES))
        self.is_shown = is_shown

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        return self.files.find_spec(fullname, target) if self.is_shown(fullname.rpartition(".")[2]) else None

    def iter_modules(self, prefix: str = "") -> Iterator[tuple[str, bool]]:
        """(name, whether it is a package), for pkgutil."""
        modules = pkgutil.iter_importer_modules(self.files, "")
        return ((prefix + name, is_package) for name, is_package in modules if self.is_shown(name))

    def invalidate_caches(self) -> None:
        self.files.invalidate_caches()


def place_of_parts(root: Path) -> str:
    """An entry for `flatcl.__path__` where the parts, and nothing else of the clone, are found."""
    place = os.path.join(root, ".")

    def hook(entry: str) -> _Finder:
        if entry == place:
            return _Finder(root, PARTS.__contains__)
        if os.path.realpath(entry or ".") == str(root):
            return _Finder(root, lambda name: name not in PARTS)
        raise ImportError

    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.clear()
    return place
