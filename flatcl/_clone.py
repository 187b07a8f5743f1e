"""How the package finds its parts in a clone, where models/, datasets/, backbone/ and utils/ lie beside flatcl/.

They are parts of `flatcl` alone. At the top, where Python looks because of `main.py`, they are hidden: there, `import
datasets` is Hugging Face's and `import utils` a user's own, and no module of ours is loaded twice under two names.
"""

import contextlib
import os
import pkgutil
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

PARTS = frozenset({"models", "datasets", "backbone", "utils"})


class _Finder:
    """Of a folder's modules: the parts as those of `flatcl`, all others at the top."""

    def __init__(self, files: Any, has_parts: bool):
        self.files, self.has_parts = files, has_parts

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return self.files.find_spec(fullname, target) if (package == "flatcl") == (name in PARTS) else None

    def iter_modules(self, prefix: str = "") -> Iterator[tuple[str, bool]]:
        """(name, whether it is a package), for pkgutil."""
        modules = pkgutil.iter_importer_modules(self.files, "")
        return ((prefix + name, is_package) for name, is_package in modules if self.has_parts == (name in PARTS))

    def invalidate_caches(self) -> None:
        self.files.invalidate_caches()


def place_of_parts(root: Path) -> str:
    """An entry for `flatcl.__path__` where the parts, and nothing else of the clone, are found."""
    place = os.path.join(root, ".")

    def hook(entry: str) -> _Finder:
        try:
            is_root = os.path.realpath(entry or ".") == str(root)
        except OSError:  # a relative path in a working directory that is gone
            is_root = False
        if not is_root:
            raise ImportError
        for other in sys.path_hooks:
            if other is not hook:
                with contextlib.suppress(ImportError):
                    return _Finder(other(entry), entry == place)
        raise ImportError

    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.clear()
    return place
