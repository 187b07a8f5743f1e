"""A file of YAML, TOML or JSON as a tree of mappings, lists and words, with the line of each entry where it is known.

A value becomes the word that stands for it on the command line: true is 1, null is none, 0.10 stays 0.10. So what a
file says and what a command line says is read by the same code. Keys that are given twice are refused in all three
formats.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flatcl.utils.errors import UsageError
from flatcl.utils.extras import require
from flatcl.utils.files import read_text, user_path

LONGEST = 2**20  # bytes of a study file
MOST = 100_000  # entries; a YAML file of a few lines can stand for more by its aliases
SUFFIXES = (".yaml", ".yml", ".toml", ".json")

PLAIN = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")  # of collections in YAML

Path_ = tuple[str | int, ...]  # of keys and positions, from the top


@dataclass
class Tree:
    """`top`: what the file says. `lines`: the line of an entry, by its path. `problems`: what could not be taken."""

    file: str
    top: Any = None
    lines: dict[Path_, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)  # (line or 0, what is wrong)

    def where(self, path: Path_, line: int = 0) -> str:
        """`study.yaml, line 7, flags.lr`, as far as that is known."""
        line = line or self.lines.get(path, 0) if path else line
        return ", ".join([self.file, *([f"line {line}"] if line else []), *([_written(path)] if path else [])])

    def complain(self, path: Path_, problem: str, line: int = 0) -> None:
        self.problems.append((line or self.lines.get(path, 0), f"{self.where(path, line)}: {problem}"))

    def in_order(self) -> list[str]:
        """The problems by their lines; those without a line come last."""
        return [text for line, text in sorted(self.problems, key=lambda found: found[0] or MOST)]


def _written(path: Path_) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read(path: str | Path) -> Tree:
    """Raises `UsageError` for what is no file of these formats. Entries that cannot be taken are among `problems`."""
    file = user_path(path)
    if file.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"'{path}' is not a study file: its name must end in {', '.join(SUFFIXES)}. (Names of models and data sets "
            "are joined by commas: --models er,derpp.)"
        )
    try:
        text = read_text(file, LONGEST)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}. Give a study file.") from None
    except ValueError as error:
        raise UsageError(f"cannot read {file}: {error}. Give a text file in UTF-8.") from None
    tree = Tree(str(file))
    reader = {".toml": _toml, ".json": _json}.get(file.suffix.lower(), _yaml)
    try:
        tree.top = reader(tree, text)
    except RecursionError:
        raise UsageError(f"{file}: its entries are nested too deeply. Write it as in docs/studies.md.") from None
    return tree


def _word(tree: Tree, path: Path_, value: Any) -> str | None:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int | float | str):
        return str(value)
    tree.complain(path, f"expects a number or a text, got a {type(value).__name__}. Put it into quotes.")
    return None


def _words(tree: Tree, path: Path_, value: Any) -> Any:
    """The tree of what `json` and `tomllib` have read."""
    if isinstance(value, Mapping):
        return {str(key): _words(tree, (*path, str(key)), item) for key, item in value.items()}
    if isinstance(value, list):
        return [_words(tree, (*path, i), item) for i, item in enumerate(value)]
    return _word(tree, path, value)


def _json(tree: Tree, text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in sorted({key for key in keys if keys.count(key) > 1}):
            tree.complain((), f"the key '{key}' is given {keys.count(key)} times in one mapping. Give it once.")
        return dict(pairs)

    try:
        return _words(tree, (), json.loads(text, object_pairs_hook=once))
    except json.JSONDecodeError as error:
        raise UsageError(f"{tree.file}, line {error.lineno}: not JSON ({error.msg}). Correct this line.") from None


def _toml(tree: Tree, text: str) -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:
        raise UsageError(
            f"{tree.file}: this Python reads no TOML (3.11 and later do). Write the study as YAML or JSON."
        ) from None
    try:
        return _words(tree, (), tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{tree.file}: not TOML ({error}). Correct this line.") from None


def _yaml(tree: Tree, text: str) -> Any:
    require("yaml", "study", str(tree.file), package="PyYAML", otherwise="or write the study as JSON")
    import yaml

    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return None if node is None else _Yaml(tree, loader, yaml).taken((), node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{tree.file}{line}: not YAML ({error.problem or error}). Correct this line.") from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise UsageError(f"{tree.file}: not YAML ({' '.join(str(error).split())}). Correct it.") from None
    finally:
        if loader is not None:
            loader.dispose()


class _Yaml:
    """The tree of YAML's nodes. Numbers stay as they are written: 010 is not 8, 1:30 is not 90."""

    def __init__(self, tree: Tree, loader: Any, yaml: Any):
        self.tree, self.loader, self.yaml, self.number = tree, loader, yaml, 0

    def taken(self, path: Path_, node: Any) -> Any:
        self.number += 1
        if self.number > MOST:
            raise UsageError(f"{self.tree.file}: it has more than {MOST:,} entries. Split the study.")
        self.tree.lines.setdefault(path, node.start_mark.line + 1)
        if not isinstance(node, self.yaml.ScalarNode) and node.tag not in PLAIN:
            self.tree.complain(path, f"expects a plain mapping or list, got {node.tag}. Write it without a tag.")
            return None
        if isinstance(node, self.yaml.MappingNode):
            return dict(self._items(path, node))
        if isinstance(node, self.yaml.SequenceNode):
            return [self.taken((*path, i), item) for i, item in enumerate(node.value)]
        try:
            value = self.loader.construct_object(node)
        except ValueError:  # what looks like a date and is none
            value = node.value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return _word(self.tree, path, node.value if is_number else value)

    def _items(self, path: Path_, node: Any) -> Iterator[tuple[str, Any]]:
        seen: dict[str, int] = {}
        for key_node, value in node.value:
            if not isinstance(key_node, self.yaml.ScalarNode):
                self.tree.complain(path, "a key must be a name, got a collection.", key_node.start_mark.line + 1)
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            own = (*path, key)
            if key in seen:
                self.tree.complain(own, f"the key is given twice, first in line {seen[key]}. Give it once.", line)
                continue
            seen[key] = self.tree.lines[own] = line
            yield key, self.taken(own, value)
