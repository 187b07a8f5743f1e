"""Which code made a run: digests of the files that define its method, benchmark, backbone and optimizer.

Counted are the files of the four classes and of their bases, and what these import from the same folders; the engine
(the rest of `utils/`) is not: pinned accuracies and the protocol number speak for it. A digest is of what a file means:
comments, docstrings, layout, type hints, help texts and published values (flags, which a run's configuration has
anyway) do not change it. A plugin counts as it is, byte for byte.
"""

import ast
import functools
import hashlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from utils.registry import REGISTRIES, ROOT, Plugin, plugin_of

PROTOCOL = 1  # raised whenever the same flags would give another number than before

FOLDERS = ("models", "datasets", "backbone", "utils.optim")
DIGITS = 16  # hexadecimal, of a sha256


def code_of(classes: Iterable[type], plugins: Iterable[Plugin] = ()) -> dict[str, str]:
    """{file: digest} of these classes and of plugins; files of ours are named from the repository on.

    What counts is what the process has loaded, not what a file says by now.
    """
    found: dict[str, str] = {}
    waiting = [base.__module__ for cls in classes for base in cls.__mro__]
    done = set()
    while waiting:
        module = waiting.pop()
        if module in done:
            continue
        done.add(module)
        file = _file_of(module)
        if file is None:
            continue
        digest, imported = _read(module, file)
        found[_written(module, file)] = digest
        waiting += imported
    for name, plugin in named(plugins).items():
        found[f"plugin {name}"] = plugin.sha256
    return dict(sorted(found.items()))


def named(plugins: Iterable[Plugin]) -> dict[str, Plugin]:
    """Plugins by their files' names; those of one name are numbered."""
    found: dict[str, Plugin] = {}
    for plugin in plugins:
        stem, number, name = Path(plugin.path).stem, 1, plugin.name
        while name in found:
            number += 1
            name = f"{stem}_{number}.py"
        found[name] = plugin
    return found


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The files whose meaning differs, or that only one of the two has."""
    return sorted(file for file in old.keys() | new.keys() if old.get(file) != new.get(file))


def _file_of(module: str) -> Path | None:
    """The file of a module whose code counts; None for Python's own, torch's and the engine's."""
    loaded = sys.modules.get(module)
    if module.startswith(tuple(f"{folder}." for folder in FOLDERS)):
        file = getattr(loaded, "__file__", None) or ROOT / (module.replace(".", "/") + ".py")
        return Path(file) if Path(file).is_file() else None
    if loaded is None or plugin_of(module) is not None or module.split(".")[0] not in _foreign_packages():
        return None
    file = getattr(loaded, "__file__", None)
    return Path(file) if file and file.endswith(".py") else None


def _foreign_packages() -> set[str]:
    """Packages that have registered a class by an entry point."""
    return {package for registry in REGISTRIES for package in registry.foreign_packages()}


def _written(module: str, file: Path) -> str:
    """How a file is named: by its place in the repository, or by its module."""
    return file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else module


@functools.cache  # a module is not loaded again in a process, whatever happens to its file
def _read(module: str, file: Path) -> tuple[str, tuple[str, ...]]:
    """(digest, modules that are imported) of a file."""
    tree = meaning(file.read_text(encoding="utf-8"))
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            name = ".".join(filter(None, (base, node.module)))
            imported += [name] * bool(node.names)  # whose names all lack meaning: nothing is imported
            imported += [f"{name}.{alias.name}" for alias in node.names]  # the name may be a module's
    return hashlib.sha256(_dump(tree).encode()).hexdigest()[:DIGITS], tuple(imported)


def meaning(source: str) -> ast.Module:
    """The syntax tree without what changes no number."""
    tree = _Strip().visit(ast.parse(source))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):  # those that only the parts without meaning need
            node.names = [n for n in node.names if (n.asname or n.name).split(".")[0] in used or n.name == "*"]
            node.names.sort(key=lambda alias: (alias.name, alias.asname or ""))
    return tree


class _Strip(ast.NodeTransformer):
    def _body(self, node: Any) -> Any:
        """Without docstring."""
        self.generic_visit(node)
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            del node.body[0]
        return node

    visit_Module = _body

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        """Without published values too, which reach a run as its flags."""
        node.body = [item for item in node.body if not _assigns(item, "published")]
        return self._body(node)

    def visit_FunctionDef(self, node: Any) -> Any:
        node.returns = None
        return self._body(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        """`flag(default, help, ...)` without its help."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "flag":
            node.args = node.args[:1]
            node.keywords = [word for word in node.keywords if word.arg != "help"]
        return node


def _assigns(node: ast.stmt, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _dump(node: Any) -> str:
    """A tree as text, the same under every version of Python: fields that are empty, and those that later versions
    have added for them, are left out."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
        inner = ",".join(f"{name}={_dump(value)}" for name, value in fields if name not in ("ctx", "kind"))
        return f"{type(node).__name__}({inner})"
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    return f"{type(node).__name__}:{node!r}"
