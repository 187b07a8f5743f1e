"""Which code made a run: digests of the files that define its method, benchmark, backbone, optimizer and buffer policy.

Counted are the files of these classes and of their bases, and what these import from the same folders; the engine
(the rest of `utils/`) is not: pinned accuracies and the protocol number speak for it. A digest is of what a file means:
comments, docstrings, layout, type hints, help texts and published values (flags, which a run's configuration has
anyway) do not change it. A plugin counts as it is, byte for byte, and so does a file of pretrained weights. A class may
name further sources (`sources(config) -> {name: digest}`), such as the package that its network comes from.
"""

import ast
import functools
import hashlib
import inspect
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from flatcl.utils.errors import UsageError
from flatcl.utils.files import open_regular, sha256_of, user_path
from flatcl.utils.registry import REGISTRIES, ROOT, Plugin, plugin_of

PROTOCOL = 1  # raised whenever the same flags would give another number than before

FOLDERS = ("flatcl.models", "flatcl.datasets", "flatcl.backbone", "flatcl.utils.optim", "flatcl.utils.engine.policies")
DATA = "data of "  # a benchmark's files, where they are not the official ones; known when they are read
BESIDE = "plugin's "  # in the name of a file that a plugin imports from its folder
DIGITS = 16  # hexadecimal, of a sha256


def code_of(classes: Iterable[type], plugins: Iterable[Plugin] = ()) -> dict[str, str]:
    """{file: digest} of these classes and of plugins; files of ours are named from the repository on.

    What counts is what the process has loaded, not what a file says by now. Of a plugin, what it imports of our folders
    and of its own counts too.
    """
    classes = list(classes)
    found = {f"plugin {name}": plugin.sha256 for name, plugin in named(plugins).items()}
    found |= {f"class {base.__name__}": digest_of_code(base) for cls in classes for base in cls.__mro__
              if base.__module__ == "__main__"}  # fmt: skip
    found |= {name: _read(module, file)[0] for name, module, file in _files(classes, plugins)}
    return dict(sorted(found.items()))


def digest_of_code(thing: type | FunctionType) -> str:
    """Of a class or function that a script or a notebook defines: its text, and nothing of the rest. Where its text
    cannot be had alone, as of a notebook's class or a lambda, what Python has made of it, which may be something else
    in another version of Python."""
    try:
        is_alone = thing.__name__ != "<lambda>"
        text = _dump(meaning(textwrap.dedent(inspect.getsource(thing)))) if is_alone else _compiled(thing)
    except (OSError, TypeError, SyntaxError):
        text = _compiled(thing)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _compiled(thing: Any) -> str:
    """Functions and constants that a class or a function is made of, the same in each process."""
    if isinstance(thing, type):
        own = [(name, value) for name, value in sorted(vars(thing).items())
               if isinstance(value, FunctionType) or not name.startswith("__")]  # fmt: skip
        return " ".join(f"{name}={_compiled(value) if _is_inside(value, thing) else value}" for name, value in own)
    if isinstance(thing, FunctionType):
        return _compiled((thing.__code__, thing.__defaults__, *sorted((thing.__kwdefaults__ or {}).items())))
    if isinstance(thing, staticmethod | classmethod):
        return _compiled(thing.__func__)
    if isinstance(thing, property):
        return f"{_compiled(thing.fget)} {_compiled(thing.fset)}"
    if isinstance(thing, CodeType):
        names = (thing.co_names, thing.co_varnames, thing.co_freevars)
        return f"{thing.co_code.hex()} {names} {_compiled(thing.co_consts)}"
    if isinstance(thing, tuple | list):
        return f"({', '.join(map(_compiled, thing))})"
    if isinstance(thing, dict):
        return _compiled(tuple(thing.items()))
    if isinstance(thing, set | frozenset):
        return f"set({sorted(map(_compiled, thing))})"
    return repr(thing) if isinstance(thing, bool | int | float | complex | str | bytes | None) else type(thing).__name__


def _is_inside(value: Any, cls: type) -> bool:
    """Whether a value in a class is its own, not another class that it names."""
    return not isinstance(value, type) or value.__qualname__.startswith(f"{cls.__qualname__}.")


def beside_plugins(plugins: Iterable[Plugin]) -> dict[str, Path]:
    """{path from its folder on: file} of what plugins import of their own folders."""
    files = _files((), plugins)
    return {name.removeprefix(BESIDE): file for name, _, file in files if name.startswith(BESIDE)}


def weights_of(file: str, then: Mapping[str, str] | None) -> dict[str, str]:
    """{'weights NAME': sha256} of --pretrained_weights. A run that goes on from a checkpoint has the weights that were
    in the file `then` (the code that made it), whatever has become of the file."""
    if then is not None:
        return {name: digest for name, digest in then.items() if name.startswith("weights ")}
    path = user_path(file)
    try:
        return {f"weights {path.name}": sha256_of(path)}
    except (OSError, ValueError) as error:
        raise UsageError(_unreadable_weights(file, error)) from None


def check_weights(file: str) -> list[str]:
    """A problem where --pretrained_weights is no file that can be read."""
    try:
        open_regular(user_path(file)).close()
        return []
    except UsageError as error:
        return [f"--pretrained_weights: {problem}" for problem in error.problems]
    except (OSError, ValueError) as error:
        return [_unreadable_weights(file, error)]


def _unreadable_weights(file: str, error: Exception) -> str:
    why = getattr(error, "strerror", None) or error
    return f"--pretrained_weights {file}: it cannot be read ({why}). Give a file of weights."


def _files(classes: Iterable[type], plugins: Iterable[Plugin]) -> Iterator[tuple[str, str, Path]]:
    """(name, module, file) of each file that counts."""
    plugins = list(plugins)
    beside = [Path(plugin.path).parent for plugin in plugins]
    waiting = [base.__module__ for cls in classes for base in cls.__mro__]
    waiting += [module for plugin in plugins for module in _imports(ast.parse(plugin.source), "")]
    done = set()
    while waiting:
        module = waiting.pop()
        if module in done:
            continue
        done.add(module)
        name, file = _file_of(module, beside)
        if file is not None:
            yield name, module, file
            waiting += _read(module, file)[1]


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


def data_of(benchmark: Any) -> dict[str, str]:
    """{'data of NAME': digest} of a benchmark whose data is not the official one, else nothing. It is added to the code
    of a run when the data has been read."""
    return {} if benchmark.unofficial is None else {f"{DATA}{benchmark.name}": benchmark.unofficial}


def digest_of(code: Mapping[str, str]) -> str:
    """Of {file: digest}, in hexadecimal."""
    return hashlib.sha256(json.dumps(dict(code), sort_keys=True).encode()).hexdigest()


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The files whose meaning differs, or that only one of the two has. A plugin is known by its text, not its name."""
    texts = [Counter(digest for name, digest in code.items() if name.startswith("plugin ")) for code in (old, new)]
    return sorted(
        file
        for file in old.keys() | new.keys()
        if old.get(file) != new.get(file) and not (file.startswith("plugin ") and texts[0] == texts[1])
    )


def _file_of(module: str, beside: Iterable[Path]) -> tuple[str, Path | None]:
    """(name, file) of a module whose code counts: of our folders, of an installed package that has registered a class,
    or from the folder of a plugin (`beside`). No file for Python's own, torch's and the engine's."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module.startswith(tuple(f"{folder}." for folder in FOLDERS)):
        name = module.removeprefix("flatcl.").replace(".", "/") + ".py"
        file = Path(file or ROOT / name)
        return name, file if file.is_file() else None
    is_counted_elsewhere = module.split(".")[0] in ("__main__", "flatcl") or plugin_of(module) is not None
    if file is None or not file.endswith(".py") or is_counted_elsewhere:
        return module, None
    if module.split(".")[0] in _foreign_packages():
        return module, Path(file)
    for folder in beside:
        below = Path(file).relative_to(folder).parts if Path(file).is_relative_to(folder) else (".",)
        if not any(part.startswith(".") or part == "site-packages" for part in below):
            return BESIDE + "/".join(below), Path(file)
    return module, None


def _foreign_packages() -> set[str]:
    """Packages that have registered a class by an entry point."""
    return {package for registry in REGISTRIES for package in registry.foreign_packages()}


@functools.cache  # a module is not loaded again in a process, whatever happens to its file
def _read(module: str, file: Path) -> tuple[str, tuple[str, ...]]:
    """(digest, modules that are imported) of a file."""
    tree = meaning(file.read_text(encoding="utf-8-sig"))
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    return hashlib.sha256(_dump(tree).encode()).hexdigest()[:DIGITS], tuple(_imports(tree, package))


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """What a file of a package imports; of the names that it takes out of a module, any may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.names:
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            name = ".".join(filter(None, (base, node.module)))
            yield from (name, *(f"{name}.{alias.name}" for alias in node.names))


def meaning(source: str) -> ast.Module:
    """The syntax tree without what changes no number."""
    tree = ast.parse(source)
    before = _names(tree)
    tree = _Strip().visit(tree)
    after = _names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):  # without what only the parts without meaning need
            whole = isinstance(node, ast.Import)  # that nothing names: it is imported for what it does
            names = {alias: (alias.asname or alias.name).split(".")[0] for alias in node.names}
            kept = [
                alias for alias, name in names.items() if name in after or name == "*" or whole and name not in before
            ]
            node.names = sorted(kept, key=lambda alias: (alias.name, alias.asname or ""))
    return tree


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


class _Strip(ast.NodeTransformer):
    depth = 0  # of functions

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
        self.depth += 1
        node = self._body(node)
        self.depth -= 1
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | None:
        """Inside functions without its type; in a class, it may be a flag."""
        self.generic_visit(node)
        if self.depth == 0:
            return node
        return None if node.value is None else ast.Assign([node.target], node.value)

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
        items = (item for item in node if not isinstance(item, ast.Import | ast.ImportFrom) or item.names)
        return f"[{','.join(map(_dump, items))}]"
    return f"{type(node).__name__}:{node!r}"
