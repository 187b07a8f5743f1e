"""What a study file says: `read(path)` checks all of it, `Study.points()` are its runs.

The file's words mean what the same words of a command line mean; paths in it are relative to the working directory.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flatcl.utils import declared
from flatcl.utils.arguments import SEEDS, SELECTORS, flags_of_runs, known_flags, problem_of
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import METHODS, canonical, load_plugin, nearest
from flatcl.utils.studies import _tree
from flatcl.utils.studies._tree import Tree
from flatcl.utils.studies._tune_section import Section, TuneReader

AXES = {  # keys of a file that have a flag of a run each
    "models": "model", "datasets": "dataset", "optimizers": "optimizer", "backbones": "backbone",
    "buffer_sizes": "buffer_size", "seeds": "seed", "results_path": "results_path",
}  # fmt: skip
KEYS = ("name", *AXES, "grid", "flags", "fix", "vary", "cells", "tune")
OWN_KEYS = {flag: key for key, flag in AXES.items()}  # {flag: the key that it has in a study}
CHOOSES = ("model", "dataset", "optimizer", "buffer_size")  # what a cell is chosen by
SOURCES = tuple(name.removesuffix("_seed") for name in SEEDS)  # of what the seed decides
BESIDE_FLAGS = {"plugin", "from", "continue"}  # words of a run that are no flags with a value
NOT_OF_MANY = {"dry_run", "disable_log", "help", "list", "resume", "keep_changed"}
LARGEST = 2**32 - 1  # of seeds
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Cell:
    """Flags for a part of the runs: `chosen` {"model": ("derpp",), ...} says for which, `flags` what they get."""

    chosen: Mapping[str, tuple[str, ...]]
    flags: Mapping[str, str]

    def has(self, point: Mapping[str, str]) -> bool:
        """Whether a run is one of them. Its optimizer may be the method's default one."""
        return all(
            canonical(_value(point, name) or "") in map(canonical, choices) for name, choices in self.chosen.items()
        )


@dataclass(frozen=True)
class Study:
    """A grid of runs. All values are words, as on a command line; those of `flags`, `fix` and `cells` by the flags'
    names. `fix`: sources of random numbers with a seed of their own; `vary`: the only ones that `seeds` decide, all
    else is that of seed 0. `tune`: what `flatcl tune` searches. `places`: where a flag's value stands in the file."""

    name: str
    models: tuple[str, ...]
    datasets: tuple[str, ...]
    optimizers: tuple[str, ...] = ()
    backbones: tuple[str, ...] = ()
    buffer_sizes: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    grid: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    fix: Mapping[str, int] = field(default_factory=dict)
    vary: tuple[str, ...] = ()
    cells: tuple[Cell, ...] = ()
    results_path: str | None = None
    tune: Section | None = None
    places: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def axes(self) -> set[str]:
        """The flags that differ between its runs by the grid."""
        named = {"optimizer": self.optimizers, "backbone": self.backbones, "buffer_size": self.buffer_sizes}
        given = (name for name, values in named.items() if values)
        return {"model", "dataset", *given, *self.grid, *self.seed_flags}

    @property
    def seed_flags(self) -> set[str]:
        """The flags that `seeds` decides: what tells the runs of one cell apart."""
        return {"seed", *(f"{source}_seed" for source in self.vary)}

    def group(self, point: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        """What a run has in common with those of other models: its axes without the model and the seeds."""
        names = self.axes - {"model"} - self.seed_flags
        return tuple((name, value) for name, value in point.items() if name in names)

    def words(self) -> list[str]:
        """The flags of all runs, as words of a command line. Those that only some runs have are among them."""
        pinned = {f"{source}_seed": str(seed) for source, seed in self.fix.items()}
        path = {} if self.results_path is None else {"results_path": self.results_path}
        values = {**self.flags, **pinned, **path}
        return [f"--plugin={path}" for path in self.plugins] + [f"--{name}={value}" for name, value in values.items()]

    def points(self) -> list[dict[str, str]]:
        """The axes of each run, {flag: word}, with the flags of its cells. An axis of `grid`, and the buffer sizes, are
        for the runs that have this flag; the others run once without it."""
        found = []
        parts = (self.datasets, self.models, self.optimizers or (None,), self.backbones or (None,))
        for dataset, model, optimizer, backbone in itertools.product(*parts):
            names = {"model": model, "dataset": dataset, "optimizer": optimizer, "backbone": backbone}
            chosen = {name: value for name, value in names.items() if value is not None}
            known = self._flags_of(chosen)
            sizes = self.buffer_sizes if "buffer_size" in known else ()
            grid = {**({"buffer_size": sizes} if sizes else {}), **self.grid}
            own = {name: values for name, values in grid.items() if name in known}
            for *values, seed in itertools.product(*own.values(), self.seeds):
                point = {**chosen, **dict(zip(own, values, strict=True))}
                extra = {name: value for cell in self.cells if cell.has(point) for name, value in cell.flags.items()
                         if name in known}  # fmt: skip
                found.append({**point, **extra, **self.seed_axes(seed)})
        return found

    def has_flag(self, point: Mapping[str, str], name: str) -> bool:
        """Whether a run, given by its axes, has this flag."""
        return name in self._flags_of({part: point[part] for part in SELECTORS if part in point})

    def _flags_of(self, chosen: Mapping[str, str]) -> set[str]:
        """The names of the flags of runs with these parts; also of the network that a protocol brings."""
        protocol = {name: value for name, value in self.flags.items() if name == "protocol"}
        return known_flags([f"--{name}={value}" for name, value in {**chosen, **protocol}.items()])

    def seed_axes(self, seed: int) -> dict[str, str]:
        """What a run with this seed is given."""
        if not self.vary:
            return {"seed": str(seed)}
        return {"seed": "0", **{f"{source}_seed": str(seed) for source in self.vary}}

    def without(self, names: Collection[str]) -> "Study":
        """This study without its values of these flags, which a command line gives."""

        def left(flags: Mapping[str, Any], suffix: str = "") -> dict[str, Any]:
            return {name: value for name, value in flags.items() if name + suffix not in names}

        cells = tuple(dataclasses.replace(cell, flags=left(cell.flags)) for cell in self.cells)
        path = None if "results_path" in names else self.results_path
        fix = left(self.fix, "_seed")
        return dataclasses.replace(self, flags=left(self.flags), fix=fix, cells=cells, results_path=path)

    def located(self, problem: str) -> str:
        """A problem of a run, with the places in the file of the first flag that it speaks of."""
        named = re.search(r"--(\w+)", problem)
        place = self.places.get(named[1]) if named else None
        return f"{place}: {problem}" if place else problem


def parse_seeds(text: str) -> list[int]:
    """`0-2,5` as [0, 1, 2, 5]. Raises `ValueError` for anything else."""
    seeds: list[int] = []
    for part in text.replace(",", " ").split():
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"expects numbers and ranges, got '{part}'. Example: 0-2,5.")
        if int(last or first) > LARGEST or int(last or first) - int(first) >= MOST_SEEDS:
            raise ValueError(f"expects seeds up to {LARGEST} and at most {MOST_SEEDS:,} of them, got '{part}'.")
        seeds += range(int(first), int(last or first) + 1)
    if not seeds:
        raise ValueError("expects numbers and ranges, got none. Example: 0-2,5.")
    return list(dict.fromkeys(seeds))


def read(path: str | Path) -> Study:
    """The study of a file of YAML, TOML or JSON; its plugins are loaded. Raises `UsageError` with every mistake that is
    found: in the file, in names, and flags that no run has. Values are checked when the runs are resolved."""
    tree = _tree.read(path)
    if not isinstance(tree.top, dict):
        raise UsageError(f"{tree.file}: expects keys such as models and datasets, got none. See docs/studies.md.")
    study = _Reader(tree).study()
    if tree.problems:
        raise UsageError(*tree.in_order())
    return study


def _value(point: Mapping[str, str], name: str) -> str | None:
    """What a run has been given by its axes, or the optimizer that its method brings."""
    if name == "optimizer" and name not in point:
        return declared.attribute(METHODS, point["model"], "default_optimizer")
    return point.get(name)


class _Reader(TuneReader):
    """Collects what is wrong in `tree.problems` and goes on."""

    def __init__(self, tree: Tree):
        self.tree, self.top = tree, tree.top
        self.places: dict[str, str] = {}
        self.values: list[tuple[_tree.Path_, str, str]] = []  # (path, flag, word), of those that could be taken

    def study(self) -> Study:
        top = self.top
        flags, plugins = self._flags()
        for key in top:
            if key not in KEYS:
                self.tree.complain((key,), f"unknown key. {self._about_key(key)}")
        for key in ("models", "datasets"):
            if key not in top:
                self.tree.complain((), f"the key '{key}' is missing. Give a list of names.")
        lists = {key: self._names(key) for key in ("models", "datasets", "optimizers", "backbones", "buffer_sizes")}
        study = Study(
            name=self._text("name") or Path(self.tree.file).stem,
            results_path=self._text("results_path"),
            **lists,
            seeds=self._seeds(),
            grid=self._grid(flags),
            flags=flags,
            plugins=plugins,
            fix=self._fix(flags),
            vary=self._vary(),
            cells=self._cells(),
            tune=self._tune(),
            places=self.places,
        )
        if self.tree.problems:
            self._check_values()
        else:
            self._check_use(study)
        return study

    def _check_values(self) -> None:
        """Values of flags that all runs have, where other mistakes keep the runs from being resolved."""
        for path, name, value in self.values:
            problem = problem_of(name, value)
            if problem is not None:
                self.tree.complain(path, problem)

    def _about_key(self, key: str) -> str:
        if canonical(key) in flags_of_runs():
            own = OWN_KEYS.get(canonical(key))
            return f"Did you mean {own}?" if own else "It is a flag of a run: write it below flags."
        if canonical(key) in ("jobs", "keep_changed"):
            return f"Give --{canonical(key)} on the command line."
        return nearest(key, list(KEYS))

    def _load(self, plugins: Sequence[str]) -> None:
        for plugin in plugins:
            try:
                load_plugin(plugin)
            except UsageError as error:
                for problem in error.problems:
                    self.tree.complain(("flags", "plugin"), problem)

    def _text(self, key: str) -> str | None:
        value = self.top.get(key)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            self.tree.complain((key,), f"expects a text, got {_kind(value)}.")
            return None
        self.places[key] = self.tree.where((key,))
        return value

    def _list(self, path: _tree.Path_, value: Any) -> list[tuple[_tree.Path_, str]]:
        """[(path, word)] of a list, of `a,b`, or of one word; each word once."""
        if isinstance(value, str):
            items = [(path, word) for word in value.replace(",", " ").split()]
        elif isinstance(value, list):
            items = [((*path, i), item) for i, item in enumerate(value)]
        else:
            self.tree.complain(path, f"expects a list, got {_kind(value)}.")
            return []
        if not items:
            self.tree.complain(path, "expects at least one value, got none. Drop the key, or give some.")
        found: dict[str, _tree.Path_] = {}
        for own, item in items:
            if not isinstance(item, str):
                if item is not None:  # or it has been complained of
                    self.tree.complain(own, f"expects one value, got {_kind(item)}.")
            elif canonical(item) in map(canonical, found):
                self.tree.complain(own, f"'{item}' is given twice. Give it once.")
            else:
                found[item] = own
        return [(own, item) for item, own in found.items()]

    def _names(self, key: str) -> tuple[str, ...]:
        if key not in self.top:
            return ()
        items = self._list((key,), self.top[key])
        registry = SELECTORS.get(AXES[key])
        for path, item in items if registry else ():
            self._try(path, registry.check, item)
        self.places[AXES[key]] = self.tree.where((key,))
        return tuple(item for _, item in items)

    def _try(self, path: _tree.Path_, check: Callable[[str], Any], value: str) -> None:
        try:
            check(value)
        except UsageError as error:
            for problem in error.problems:
                self.tree.complain(path, problem)

    def _seeds(self) -> tuple[int, ...]:
        return self._seeds_of(("seeds",), self.top["seeds"]) if "seeds" in self.top else (0,)

    def _seeds_of(self, own: _tree.Path_, value: Any) -> tuple[int, ...]:
        found: list[int] = []
        for path, item in self._list(own, value):
            try:
                found += parse_seeds(item)
            except ValueError as error:
                self.tree.complain(path, str(error))
        return tuple(dict.fromkeys(found))

    def _mapping(self, path: _tree.Path_, value: Any) -> Iterator[tuple[_tree.Path_, str, Any]]:
        """(path, the key in its one spelling, value) of each entry."""
        if not isinstance(value, dict):
            self.tree.complain(path, f"expects keys and values, got {_kind(value)}.")
            return
        seen: set[str] = set()
        for key, item in value.items():
            name = canonical(key.removeprefix("--"))
            if name in seen:
                self.tree.complain((*path, key), f"--{name} is given twice. Give it once.")
            else:
                seen.add(name)
                yield (*path, key), name, item

    def _flag_is_known(self, path: _tree.Path_, name: str, also: Iterable[str] = ()) -> bool:
        if name in NOT_OF_MANY:
            self.tree.complain(path, f"--{name} does not fit many runs. Drop it.")
        elif name in OWN_KEYS:
            self.tree.complain(path, f"--{name} has a key of its own. Write: {OWN_KEYS[name]}: ...")
        elif name in also or name in flags_of_runs():
            return True
        elif _is_number(path[-1]):  # YAML reads {lr: 0,1} as two keys
            hint = "Write numbers with a point (0.1, not 0,1), and lists in [ ]."
            self.tree.complain(path, f"expects the name of a flag, got the number {path[-1]}. {hint}")
        else:
            hint = nearest(name, sorted(flags_of_runs()), "See flatcl train --model M --dataset D --help.")
            self.tree.complain(path, f"unknown flag: {name}. {hint}")
        return False

    def _flags(self) -> tuple[dict[str, str], tuple[str, ...]]:
        """(the flags of all runs, files of plugins)."""
        flags: dict[str, str] = {}
        plugins: tuple[str, ...] = ()
        entries = list(self._mapping(("flags",), self.top.get("flags", {})))
        for path, name, value in entries:
            if name == "plugin":
                plugins = tuple(item for _, item in self._list(path, [value] if isinstance(value, str) else value))
        self._load(plugins)
        for path, name, value in entries:
            if name != "plugin" and self._flag_is_known(path, name, BESIDE_FLAGS):
                self.places[name] = self.tree.where(path)
                flags[name] = self._value(path, name, value)
        return flags, plugins

    def _value(self, path: _tree.Path_, name: str, value: Any) -> str:
        """One value of a flag; a list is one of a flag that takes several numbers."""
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            kind = next(_kind(item) for item in items if not isinstance(item, str))
            if None not in items:
                self.tree.complain(path, f"expects a value, got {kind}.")
            return ""
        self.values.append((path, name, ",".join(items) or "none"))
        return self.values[-1][-1]

    def _choices(self, path: _tree.Path_, name: str, value: Any) -> tuple[str, ...]:
        """Several values of a flag."""
        if isinstance(value, list) and any(isinstance(item, list) for item in value):
            return tuple(self._value((*path, i), name, item) for i, item in enumerate(value))
        items = self._list(path, value)
        self.values += [(own, name, item) for own, item in items]
        return tuple(item for _, item in items)

    def _grid(self, flags: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
        grid: dict[str, tuple[str, ...]] = {}
        for path, name, value in self._mapping(("grid",), self.top.get("grid", {})):
            if not self._flag_is_known(path, name):
                continue
            if name in flags:
                self.tree.complain(path, f"--{name} also stands below flags. Give it in one place.")
            self.places[name] = self.tree.where(path)
            grid[name] = self._choices(path, name, value)
        return grid

    def _fix(self, flags: Mapping[str, str]) -> dict[str, int]:
        fix: dict[str, int] = {}
        for path, source, value in self._mapping(("fix",), self.top.get("fix", {})):
            if not self._is_source(path, source):
                continue
            self.places[f"{source}_seed"] = self.tree.where(path)
            if f"{source}_seed" in flags:
                self.tree.complain(path, f"--{source}_seed also stands below flags. Give it in one place.")
            if isinstance(value, str) and value.isdecimal() and int(value) <= LARGEST:
                fix[source] = int(value)
            else:
                got = f"'{value}'" if isinstance(value, str) else _kind(value)
                self.tree.complain(path, f"expects one seed, a whole number from 0 to {LARGEST}, got {got}.")
        return fix

    def _vary(self) -> tuple[str, ...]:
        if "vary" not in self.top:
            return ()
        if "fix" in self.top:
            self.tree.complain(("vary",), "fix and vary exclude each other. Give one of them.")
        items = self._list(("vary",), self.top["vary"])
        for path, source in items:
            if self._is_source(path, source):
                self.places[f"{source}_seed"] = self.tree.where(path)
        return tuple(source for _, source in items)

    def _is_source(self, path: _tree.Path_, source: str) -> bool:
        if source not in SOURCES:
            self.tree.complain(path, f"unknown source of random numbers: '{source}'. {nearest(source, list(SOURCES))}")
        return source in SOURCES

    def _cells(self) -> tuple[Cell, ...]:
        cells, found = self.top.get("cells", []), []
        if not isinstance(cells, list):
            self.tree.complain(("cells",), f"expects a list of mappings, got {_kind(cells)}.")
            return ()
        for i, entry in enumerate(cells):
            chosen: dict[str, tuple[str, ...]] = {}
            flags: dict[str, str] = {}
            for path, name, value in self._mapping(("cells", i), entry):
                if name in CHOOSES:
                    chosen[name] = tuple(item for _, item in self._list(path, value))
                elif self._flag_is_known(path, name):
                    self.places.setdefault(name, self.tree.where(path))
                    flags[name] = self._value(path, name, value)
            if isinstance(entry, dict) and (not chosen or not flags):
                names = f"{', '.join(CHOOSES[:-1])} or {CHOOSES[-1]}"
                missing = "sets no flag. Add one, such as lr: 0.03" if chosen else f"names no {names}. Add one"
                self.tree.complain(("cells", i), f"this cell {missing}.")
            found.append(Cell(chosen, flags))
        return tuple(found)

    def _check_use(self, study: Study) -> None:
        """Axes, cells and searched flags that no run has, and cells that move an axis."""
        plain = dataclasses.replace(study, cells=())
        points, complain = plain.points(), self.tree.complain
        for name in study.grid:
            if name in study.seed_flags:
                complain(("grid", self._as_written(("grid",), name)), "the seeds decide it, by vary. Drop it.")
            elif not any(name in point for point in points):
                complain(("grid", self._as_written(("grid",), name)), "none of the runs has this flag. Drop it.")
        if study.buffer_sizes and not any("buffer_size" in point for point in points):
            complain(("buffer_sizes",), f"none of {', '.join(study.models)} has a buffer. Drop it.")
        for i, cell in enumerate(study.cells):
            own = [point for point in points if cell.has(point)]
            if not own:
                wanted = ", ".join(f"{name} {' or '.join(words)}" for name, words in cell.chosen.items())
                complain(("cells", i), f"no run has {wanted}. Correct it, or drop the cell.")
            for name in cell.flags:
                path = ("cells", i, self._as_written(("cells", i), name))
                if any(name in point for point in own):
                    complain(path, f"--{name} is an axis of the study. Give it in one place.")
                elif own and not any(study.has_flag(point, name) for point in own):
                    complain(path, "none of the runs of this cell has this flag. Drop it.")
        if study.tune is not None:
            self._check_tune_use(study)

    def _check_tune_use(self, study: Study) -> None:
        """Searched flags that no run has, shared ones that only some have, seeds of the search on the test set, and a
        name that no file can have."""
        complain, section, points = self.tree.complain, study.tune, study.points()
        for name in section.space if section else ():
            if not any(study.has_flag(point, name) for point in points):
                key = self._as_written(("tune", "space"), name)
                complain(("tune", "space", key), "none of the runs has this flag. Drop it.")
        for name in section.share if section else ():
            having = {study.group(point): point["model"] for point in points if study.has_flag(point, name)}
            without = (point for point in points if study.group(point) in having and not study.has_flag(point, name))
            point = next(without, None)
            if point is not None:
                complain(
                    ("tune", "share"),
                    f"{point['model']} on {point['dataset']} has no --{name}, so it cannot share one with "
                    f"{having[study.group(point)]}. Drop it here, or give such models a study of their own.",
                )
        both = sorted({*section.seeds} & {*study.seeds}) if section and not section.same_seeds else ()
        if both:
            of_search, of_study = map(self._seeds_as_given, (self.top["tune"], self.top))
            complain(
                ("tune", "seeds") if "seeds" in self.top["tune"] else ("tune",),
                f"seed {', '.join(map(str, both))} is both of the search (tune.seeds: {of_search}) and of the study "
                f"(seeds: {of_study}). Give others, or same_seeds: true.",
            )
        if not re.fullmatch(r"\w[\w.-]*", study.name):
            complain(("name",), f"names a file of the search: letters, digits and ._- only, got '{study.name}'.")

    def _seeds_as_given(self, section: Mapping[str, Any]) -> str:
        given = section.get("seeds", "0, by default")
        return given if isinstance(given, str) else ", ".join(given)

    def _as_written(self, path: _tree.Path_, name: str) -> str:
        entry: Any = self.top
        for part in path:
            entry = entry[part]
        return next(key for key in entry if canonical(key.removeprefix("--")) == name)


def _is_number(key: Any) -> bool:
    try:
        return math.isfinite(float(key))
    except ValueError:
        return False


def _kind(value: Any) -> str:
    return {dict: "keys and values", list: "a list", str: "a text", type(None): "nothing"}[type(value)]
