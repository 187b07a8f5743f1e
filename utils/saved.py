"""What a run's config.json says: its flags, its plugins, and the code that made it."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatcl.utils.console import complain
from flatcl.utils.errors import UsageError
from flatcl.utils.files import read_json, user_path
from flatcl.utils.identity import DATA, PROTOCOL, differences
from flatcl.utils.registry import Plugin, read_plugin


@dataclass(frozen=True)
class SavedPlugin:
    """A plugin of a run: where it lay, its sha256, and its copy relative to the run folder. Runs of before the copies
    have the path alone."""

    path: str
    sha256: str | None = None
    copy: str | None = None


@dataclass(frozen=True)
class Parent:
    """The run that another one continues, as it was then: its folder, the hash of its configuration, how many tasks it
    had finished, its optimizer, and the code that made it (None where that was not written down)."""

    run: str
    config_hash: str
    tasks: int
    optimizer: str
    code: Mapping[str, str] | None


@dataclass(frozen=True)
class Saved:
    """A run's config.json. `code`: what made it, None in runs of before; `changed_code`: what it later went on with."""

    file: Path
    config_hash: str
    values: Mapping[str, Any]
    plugins: tuple[SavedPlugin, ...]
    code: Mapping[str, str] | None
    changed_code: tuple[Mapping[str, str], ...]
    continues: Parent | None

    @property
    def folder(self) -> Path:
        return self.file.parent

    def differs_from(self, config: Any) -> list[str]:
        """The files of other code than the present one (of `config`, a `Config`) that the run was made with."""
        return other_code([self.code, *self.changed_code], self.continues.code if self.continues else None, config)


def read_saved(path: str) -> Saved:
    """`path` is a run folder or its config.json. Raises `UsageError`."""
    file = user_path(path)
    file = file / "config.json" if os.path.isdir(file) else file
    try:
        content = read_json(file)
        values = {name: entry["value"] for name, entry in content["flags"].items()}
        plugins = tuple(map(_saved_plugin, _checked(content["plugins"], list)))
        protocol, config_hash = content["protocol"], _checked(content["config_hash"], str)
        code, continues = _code(content.get("code")), content.get("continues")
        changed_code = tuple(_code(entry["code"]) for entry in content.get("changed_code", ()))
        if continues is not None:
            kinds = {"run": str, "config_hash": str, "tasks": int, "optimizer": str}
            given = {name: _checked(continues[name], kind) for name, kind in kinds.items()}
            continues = Parent(**given, code=_code(continues["code"]))
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}. Give a run folder or its config.json.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{file} is not a run's config.json. Give a run folder or its config.json.") from None
    if protocol != PROTOCOL:
        raise UsageError(
            f"{file} was written under protocol {protocol}, this program runs protocol {PROTOCOL}: the same flags "
            "would give other numbers. Use the version that wrote it, or give the flags again."
        )
    return Saved(file, config_hash, values, plugins, code, changed_code, continues)


def parent_of(saved: Saved) -> Parent:
    """A run as the start of another. Raises `UsageError` where it has finished no task."""
    try:
        tasks = len(_checked(read_json(saved.folder / "accuracy.json")["tasks"], list))
    except (OSError, ValueError, KeyError, TypeError):
        tasks = 0
    if tasks == 0:
        raise UsageError(f"--continue: {saved.folder} has finished no task. Finish one by --resume.")
    optimizer = _checked(saved.values.get("optimizer"), str)
    return Parent(str(saved.folder.resolve()), saved.config_hash, tasks, optimizer, saved.code)


def _saved_plugin(entry: Any) -> SavedPlugin:
    if isinstance(entry, str):
        return SavedPlugin(entry)
    return SavedPlugin(*(_checked(entry[name], str) for name in ("path", "sha256", "copy")))


def _code(value: Any) -> Mapping[str, str] | None:
    if value is None:
        return None
    return {_checked(name, str): _checked(digest, str) for name, digest in value.items()}


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def check_plugin(entry: SavedPlugin, saved: Saved, given: Sequence[str], keep_changed: bool) -> Plugin:
    """The plugin of a run, read but not loaded: from its new place if --plugin names one, from where it lay, or else
    its copy in the run folder. Says which file it is, since its code is about to be executed. Raises `UsageError` where
    its text is not what the run was made with, unless `keep_changed`."""
    copy = _copy(entry, saved)
    moved = _original(entry, given) or [path for path in given if Path(path).name == Path(entry.path).name]
    path = moved[0] if moved else entry.path
    if copy is not None and not moved and not Path(entry.path).is_file():
        path = str(copy)
    plugin = read_plugin(path)
    if entry.sha256 not in (None, plugin.sha256) and not keep_changed:
        remedy = "--keep_changed 1 uses it as it is" + (f", --plugin {copy} uses the original" if copy else "")
        raise UsageError(f"the plugin {plugin.path} is not the one that {saved.file} was made with. {remedy}.")
    complain(f"note: plugin {plugin.path}, named by {saved.file}")
    return plugin


def _original(entry: SavedPlugin, given: Sequence[str]) -> list[str]:
    """Of the given files, whatever their names, the one that is the run's plugin: two of its plugins may have one
    name."""
    found = []
    for path in given:
        with suppress(UsageError):
            found += [path] if entry.sha256 and read_plugin(path).sha256 == entry.sha256 else []
    return found[:1]


def _copy(entry: SavedPlugin, saved: Saved) -> Path | None:
    """The copy in the run folder, if it is there. It cannot lie anywhere else, whatever the file says."""
    if entry.copy is None:
        return None
    file = saved.folder / "plugins" / Path(entry.copy).name
    return file if file.is_file() else None


def check_code(saved: Saved, config: Any, keep_changed: bool) -> list[str]:
    """The files whose meaning has changed since the run was made; raises `UsageError` where there are some, unless
    `keep_changed`. `config` (`Config`): the run as it would be made now."""
    if saved.code is None:
        complain(f"note: {saved.file} does not say which code made it; it counts as the present one")
    changed = saved.differs_from(config)
    if changed and not keep_changed:
        raise UsageError(
            f"{saved.folder} was made by other code or data: {', '.join(changed)} changed since. Use what was there "
            "then, or give --keep_changed 1 to continue with what is there now, or start a new run with --from."
        )
    return changed


def other_code(codes: Sequence[Mapping[str, str] | None], parent: Mapping[str, str] | None, config: Any) -> list[str]:
    """The files in which a run differs from `config` (`Config`) that was made with `codes`, one after the other, and
    whose parent, if it continues one, was made with `parent`. What is None was not written down, and fits; so does what
    is known only when the data has been read."""
    pairs = [(code, config.code) for code in codes]
    if config.continues is not None:
        pairs.append((parent, config.continues.code))
    files = {file for old, new in pairs if None not in (old, new) for file in differences(old, new)}
    return sorted(file for file in files if not file.startswith(DATA))
