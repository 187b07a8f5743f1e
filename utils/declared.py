"""What the files of methods, benchmarks, networks and optimizers declare, read without importing them.

Importing a part takes seconds, since it imports torch. So what is wrong with a command line is found out of the files
as far as possible: which flags a part has, and which network or optimizer it chooses by default. A class is rebuilt as
a skeleton that has its bases, its constants and its inner classes; Python's own rules then say what is inherited.

What a file says in another way, and what comes from plugins and installed packages, is loaded as ever.
"""

import ast
import functools
import sys
from pathlib import Path
from typing import Any

from flatcl.utils.registry import ROOT, Registry, canonical

WITHOUT_FLAGS = {*sys.stdlib_module_names, "torch"}  # packages whose classes bring nothing that is asked for here


class _Unclear(TypeError):
    """Only Python could say what the file means."""


def flags(registry: Registry, name: str) -> set[str]:
    """The names of the flags that a part has of its own (`Args`). Raises `UsageError` where it has to be loaded, and
    that fails."""
    args = attribute(registry, name, "Args")
    if args is None:
        return set()
    return {field for cls in args.__mro__ for field in getattr(cls, "__annotations__", {})}


def attribute(registry: Registry, name: str, attribute: str) -> Any:
    """A constant or an inner class of a part, its own or inherited; None if it has none. Of an inner class, what counts
    is `__annotations__` of it and its bases."""
    file = registry.file(name)
    if file is not None:
        try:
            value = getattr(_registered(file, canonical(name.partition(":")[0])), attribute, None)
            if value is not _Unclear:
                return value
        except (TypeError, ValueError, SyntaxError, OSError):  # loading says what is wrong, if anything is
            pass
    return getattr(registry.load(name), attribute, None)


@functools.cache  # a module is not loaded again in a process either
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8-sig"))


def _registered(file: Path, key: str) -> type:
    """The skeleton of the class with the decorator `@....register("key")`."""
    for node in _classes(_tree(file)):
        for call in node.decorator_list:
            is_call = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and len(call.args) == 1
            if is_call and call.func.attr == "register" and canonical(ast.literal_eval(call.args[0])) == key:
                return _named(file, node.name)
    raise _Unclear


def _classes(tree: ast.Module) -> list[ast.ClassDef]:
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


@functools.cache
def _named(file: Path, name: str) -> type:
    """The class of this name in a file, or that which the file imports under this name."""
    for node in _tree(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _skeleton(node, file)
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            if (alias.asname or alias.name.split(".")[0]) == name:
                module = node.module if isinstance(node, ast.ImportFrom) else alias.name
                return _imported(module or "", alias.name)
    raise _Unclear


def _imported(module: str, name: str) -> type:
    if module.split(".")[0] in WITHOUT_FLAGS:
        return object
    place = ROOT.joinpath(*module.split(".")[1:])
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if module.split(".")[0] != "flatcl" or not file.is_file():
        raise _Unclear
    return _named(file, name)


def _skeleton(node: ast.ClassDef, file: Path) -> type:
    content: dict[str, Any] = {"__annotations__": {}}
    for part in node.body:
        if isinstance(part, ast.ClassDef):
            content[part.name] = _skeleton(part, file)
        elif isinstance(part, ast.AnnAssign):
            content["__annotations__"][part.target.id] = None
            content[part.target.id] = _constant(part.value, file)
        elif isinstance(part, ast.Assign):
            content |= {
                target.id: _constant(part.value, file) for target in part.targets if isinstance(target, ast.Name)
            }
        elif not isinstance(part, ast.FunctionDef | ast.Expr | ast.Pass):
            raise _Unclear
    bases = dict.fromkeys(_base(base, file) for base in node.bases)
    return type(node.name, tuple(base for base in bases if base is not object), content)


def _base(node: ast.expr, file: Path) -> type:
    if isinstance(node, ast.Subscript):  # Sequence[Task]
        return _base(node.value, file)
    if isinstance(node, ast.Name):
        return _named(file, node.id)
    owner = _base(node.value, file) if isinstance(node, ast.Attribute) else None  # nn.Module, ReplayMethod.Args
    found = object if owner is object else getattr(owner, node.attr, None) if owner else None
    if not isinstance(found, type) or found is _Unclear:
        raise _Unclear
    return found


def _constant(node: ast.expr | None, file: Path) -> Any:
    """The value of a constant, or another class (`Args = ReplayMethod.Args`)."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        pass
    try:
        return _base(node, file) if isinstance(node, ast.Name | ast.Attribute) else _Unclear
    except _Unclear:
        return _Unclear
