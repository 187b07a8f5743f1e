"""Runs that differ only in their seed, as groups: what a table shows, a picture draws and a test compares."""

import dataclasses
import math
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatcl.utils.arguments import SEEDS, EngineArgs
from flatcl.utils.errors import UsageError
from flatcl.utils.identity import differences
from flatcl.utils.registry import canonical, nearest
from flatcl.utils.reports.runs import TEST, VALIDATION, Run, Seeds, check_key, comparable

TUNED = "tuned: "  # with which the notes of runs begin whose flags `flatcl tune` has chosen
BY = ("dataset", "model", "optimizer", "buffer_size")
METRICS = ("final_average_accuracy", "forgetting_chaudhry18")
NOTHING = "–"
NOT_TEST = "validation split, not the test set"
LEVEL = 0.95  # of intervals


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation over n runs, fractions; `mean` is None for n = 0, `std` for n < 2."""

    mean: float | None
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Stat":
        values = [value for value in values if value is not None]
        mean = statistics.fmean(values) if values else None
        return cls(mean, statistics.stdev(values) if len(values) > 1 else None, len(values))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean by Student's t with n - 1 degrees of freedom; None for n < 2."""
        from scipy.stats import t

        if self.mean is None or self.std is None or self.n < 2:
            return None
        half = float(t.ppf((1 + LEVEL) / 2, self.n - 1)) * self.std / math.sqrt(self.n)
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Group:
    """The runs that agree in the keys `by`, seen in one setting: one row of the table."""

    by: Mapping[str, Any]
    setting: str
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        return " ".join(written(value) for value in self.by.values() if value is not None)

    @property
    def sources(self) -> tuple[str, ...]:
        """The flags of seeds that its runs may differ in, beside the seed."""
        return tuple(name for name in SEEDS if name not in self.by)

    @property
    def tuned(self) -> str:
        """How the flags were chosen, in the words of `flatcl tune`; empty where not all runs say the same."""
        said = {str(run.summary.get("notes") or run.get("notes") or "") for run in self.runs}
        text = said.pop() if len(said) == 1 else ""
        return text.removeprefix(TUNED) if text.startswith(TUNED) else ""

    def stat(self, metric: str) -> Stat:
        """Of a metric in this setting, or of a cost."""
        return Stat.of(self._value(run, metric) for run in self.runs)

    def of_seeds(self, metric: str) -> dict[Seeds, float]:
        """{seeds: value} of the runs that have the metric. Seeds that several runs have are left out: which of them to
        pair would be arbitrary."""
        counts = Counter(run.seeds(self.sources) for run in self.runs)
        values = {run.seeds(self.sources): self._value(run, metric) for run in self.runs}
        return {seeds: value for seeds, value in values.items() if value is not None and counts[seeds] == 1}

    def _value(self, run: Run, metric: str) -> float | None:
        return {**run.summary.get("cost", {}), **run.summary["metrics"][self.setting]}.get(metric)

    def common(self, key: str) -> Any:
        """The value of a key, if all runs have the same one; a set of words if not."""
        values = {comparable(run.get(key)) for run in self.runs}
        return _hashable(self.runs[0].get(key)) if len(values) == 1 else frozenset(values)


def group_runs(
    runs: Sequence[Run], by: Sequence[str], setting: str | None = None, order: Sequence[str] = ()
) -> list[Group]:
    """Rows in the order of their keys; models in the order of `order`, then by name."""
    check_setting(setting, runs)
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        for name in run.summary["metrics"]:
            if setting in (None, name):
                key = tuple(_hashable(run.get(key)) for key in by)
                groups.setdefault((key, name), []).append(run)
    ranks = {canonical(name): rank for rank, name in enumerate(order)}

    def place(item: tuple) -> tuple:
        (values, name), _ = item
        return (
            *(sort_key(value, ranks if key == "model" else {}) for key, value in zip(by, values, strict=True)),
            name,
        )

    return [
        Group(dict(zip(by, values, strict=True)), name, tuple(members))
        for (values, name), members in sorted(groups.items(), key=place)
    ]


def sort_key(value: Any, ranks: Mapping[str, int] = {}) -> tuple:
    """Orders values of mixed kinds: ranked names, nothing, numbers, words."""
    if isinstance(value, str) and canonical(value) in ranks:
        return (0, ranks[canonical(value)], "")
    if value is None:
        return (1, 0, "")
    return (2, value, "") if isinstance(value, int | float) else (3, 0, str(value))


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Mixture:
    """In what the runs of one row differ besides their seed: `keys` {name: values}, and `files` of different code."""

    label: str
    keys: Mapping[str, tuple[str, ...]]
    files: tuple[str, ...]

    @classmethod
    def of(cls, group: Group) -> "Mixture":
        values = result_flags(group.runs)
        keys = {name: tuple(sorted(found)) for name, found in values.items() if len(found) > 1}
        histories = [run.codes for run in group.runs if run.codes]
        files = {file for codes in histories for file in differences(histories[0][0], codes[0])}
        if any(len(codes) != len(histories[0]) or codes[1:] != histories[0][1:] for codes in histories):
            files |= {file for codes in histories for later in codes[1:] for file in differences(codes[0], later)}
        return cls(group.label, keys, tuple(sorted(files)))

    def __bool__(self) -> bool:
        return bool(self.keys or self.files)

    def __str__(self) -> str:
        parts = [f"{name} = {', '.join(found)}" for name, found in self.keys.items()]
        return "; ".join([*parts, *([f"different code or data: {', '.join(self.files)}"] if self.files else [])])


def result_flags(runs: Sequence[Run]) -> dict[str, set[str]]:
    """{name: values} of what can change a number and is no seed: flags, protocol version and split. Of an engine's flag
    that a run is from before, its default, which is what the program did then."""
    skipped = harmless() | {"validation"}
    defaults = {field.name: field.default for field in dataclasses.fields(EngineArgs)}
    own = [{**(defaults if run.flags else {}), **run.flags} for run in runs]
    names = dict.fromkeys(name for flags in own for name in flags if name not in skipped)
    distinct = {name: {_hashable(flags.get(name)) for flags in own} for name in names}
    distinct = {name: found for name, found in distinct.items() if name not in SEEDS or None in found}  # or all vary
    values = {name: {comparable(value) for value in found} for name, found in distinct.items()}
    values["protocol_version"] = {comparable(run.protocol) for run in runs}
    values["continues"] = {comparable(run.continues) for run in runs}
    return {**values, "split": {run.split for run in runs}}


def harmless() -> set[str]:
    """Flags in which the runs of a row may differ: the seed, and those that change no number."""
    return {field.name for field in dataclasses.fields(EngineArgs) if not field.metadata["result"]} | {"seed"}


def mixtures(groups: Sequence[Group]) -> list[str]:
    """Groups whose runs differ in more than the seed, and in what: their mean is over unlike things."""
    found = [mixture for mixture in map(Mixture.of, groups) if mixture]
    lines = [f"note: {own.label} mixes runs of {own}. Split them with --by or --where." for own in found]
    return list(dict.fromkeys(lines))


def check_mixtures(groups: Sequence[Group], by: Sequence[str]) -> None:
    """Raises `UsageError` where a row would be a mean over runs that differ in more than the seed: one problem for all
    rows that differ in the same things. `by`: the keys that make the rows now."""
    kinds: dict[tuple, list[Group]] = {}
    for group in groups:
        mixture = Mixture.of(group)
        if mixture:
            kinds.setdefault((*mixture.keys, bool(mixture.files)), []).append(group)
    problems = [_refusal(alike, by) for alike in kinds.values()]
    if problems:
        raise UsageError(*problems)


def _refusal(alike: Sequence[Group], by: Sequence[str]) -> str:
    """What rows are refused with whose runs differ in the same keys, and how to split them."""
    names = _splitting(alike)
    mixed = [Mixture.of(group) for group in alike]
    keys = {name: sorted({value for own in mixed for value in own.keys.get(name, ())}) for name in names}
    files = sorted({file for own in mixed for file in own.files}) if "code_version" in names else []
    merged = Mixture("", {name: _few(values) for name, values in keys.items() if values}, _few(files))
    labels = [f"'{label}'" for label in dict.fromkeys(group.label for group in alike)]
    if "split" in names:  # which are never averaged
        where, mix = f"split={TEST}", "show them apart with --mix" if names == ["split"] else ""
    else:
        where = shlex.quote(f"{names[0]}={keys[names[0]][0]}") if keys[names[0]] else "code_version=DIGEST"
        mix = "average them all with --mix"
    ways = [f"Split them with --by {','.join((*by, *names))}", f"choose with --where {where}", *([mix] if mix else [])]
    return (
        f"{len(labels)} row(s) would be a mean over runs that differ in more than the seed ({merged}): "
        f"{', '.join(_few(labels, most=3))}. {', '.join(ways[:-1])}{',' * (len(ways) > 2)} or {ways[-1]}."
    )


def _splitting(groups: Sequence[Group]) -> list[str]:
    """Keys by which these rows fall into rows that mix nothing: the usual ones as far as they do, then others."""
    found: list[str] = []
    while True:
        parts: dict[tuple, list[Run]] = {}
        for i, group in enumerate(groups):
            for run in group.runs:
                parts.setdefault((i, *(comparable(run.get(key)) for key in found)), []).append(run)
        mixed = [mixture for own in parts.values() if (mixture := Mixture.of(Group({}, "", tuple(own))))]
        left = list(dict.fromkeys(key for mixture in mixed for key in mixture.keys if key not in found))
        if not left:
            return [*found, "code_version"] if any(mixture.files for mixture in mixed) else found
        found.append(next((key for key in ("split", *BY) if key in left), left[0]))


def _few(words: Sequence[str], most: int = 6) -> tuple[str, ...]:
    return (*words[:most], *([f"{len(words) - most} more"] if len(words) > most else []))


def gaps(groups: Sequence[Group], metrics: Sequence[str]) -> list[str]:
    """Means over fewer runs than their row counts: of runs from before a metric, or that did not measure it."""
    lines = []
    for group in groups:
        for metric in metrics:
            has, of = group.stat(metric).n, len(group.runs)
            if 0 < has < of:
                lines.append(
                    f"note: {group.label}: {has} of {of} runs have {metric} ({group.setting}), its mean is theirs."
                )
    return lines


def split_notes(groups: Sequence[Group], what: str = "rows") -> list[str]:
    """Says which numbers are not of the test set; `what` they are of, where only some are not."""
    splits = {run.split for group in groups for run in group.runs}
    if VALIDATION not in splits:
        return []
    return [NOT_TEST if len(splits) == 1 else f"{what} of split = {VALIDATION}: {NOT_TEST}"]


def keys_of(runs: Sequence[Run], by: Sequence[str] | None, pivot: Sequence[str] = ()) -> list[str]:
    """The keys to group by. Of the default ones, those that no run has are dropped. Where there are runs with
    `--validation`, `split` is one of them: those runs are never averaged with others, and the table says so."""
    keys = asked_keys(runs, by, pivot)
    is_said = {"split", "validation"} & {*keys} or not any(run.split == VALIDATION for run in runs)
    return keys if is_said else [*keys, "split"]


def asked_keys(runs: Sequence[Run], by: Sequence[str] | None, pivot: Sequence[str] = ()) -> list[str]:
    """The keys that a user groups by, named or by default."""
    for key in (*(by or ()), *pivot):
        check_key(key, runs)
    keys = by or [key for key in BY if any(run.get(key) is not None for run in runs)]
    return list(dict.fromkeys((*keys, *pivot)))


def check_metrics(metrics: Sequence[str], runs: Sequence[Run]) -> None:
    known = sorted(
        {name for run in runs for values in run.summary["metrics"].values() for name in values} | costs_of(runs)
    )
    problems = [f"unknown metric: '{name}'. {nearest(name, known)}" for name in metrics if name not in known]
    if problems:
        raise UsageError(*problems)


def check_setting(setting: str | None, runs: Sequence[Run]) -> None:
    settings = list(dict.fromkeys(name for run in runs for name in run.summary["metrics"]))
    if setting is not None and setting not in settings:
        raise UsageError(f"unknown setting: '{setting}'. {nearest(setting, settings)}")


def costs_of(runs: Sequence[Run]) -> set[str]:
    """Names that are no fractions: seconds, rows, MiB."""
    return {name for run in runs for name in run.summary.get("cost", {})}


@dataclass(frozen=True)
class Column:
    """Where a group stands in a pivoted table: the values of the pivot keys `keys`, and the setting."""

    keys: tuple[str, ...]
    values: tuple
    setting: str

    @property
    def label(self) -> str:
        return ", ".join(written(value) for value in self.values if value is not None)

    def covers(self, other: "Column") -> bool:
        """Whether a number of this column holds for `other` too: a method without a buffer, for every buffer size."""
        parts = zip(self.keys, self.values, other.values, strict=True)
        return self.setting == other.setting and all(
            mine == its or (mine is None and key == "buffer_size") for key, mine, its in parts
        )


def spread(
    groups: Sequence[Group], pivot: Sequence[str], order: Sequence[str] = ()
) -> tuple[list[dict], list[Column], dict[tuple[int, Column], Group]]:
    """(rows, columns, cells) of a pivoted table; `cells[i, column]` is the group in row i."""
    names = [key for key in groups[0].by if key not in pivot]
    if "model" in names and "optimizer" in names:
        pairs = {(group.by["model"], group.by["optimizer"]) for group in groups}
        if len(pairs) == len({model for model, _ in pairs}):
            names.remove("optimizer")  # each model has one: its column would say nothing
    found: dict[tuple, dict[Column, Group]] = {}
    for group in groups:
        row = tuple(group.by[name] for name in names)
        column = Column(tuple(pivot), tuple(group.by[key] for key in pivot), group.setting)
        found.setdefault(row, {})[column] = group
    every = {column for cells in found.values() for column in cells}

    def is_shown(one: Column) -> bool:
        """Not where its numbers stand in all the columns that it covers."""
        covered = {other for other in every if other != one and one.covers(other)}
        return not covered or any(one in cells and covered & cells.keys() for cells in found.values())

    columns = [column for column in every if is_shown(column)]
    columns.sort(key=lambda column: (*map(sort_key, column.values), column.setting))
    ranks = {canonical(name): rank for rank, name in enumerate(order)}
    rows = sorted(found, key=lambda row: [sort_key(value, ranks) for value in row])
    cells = {}
    for i, row in enumerate(rows):
        for column in columns:
            fitting = [own for own in found[row] if own.covers(column)]
            if fitting:  # the most special one: the fewest open places
                cells[i, column] = found[row][min(fitting, key=lambda own: own.values.count(None))]
    return [dict(zip(names, row, strict=True)) for row in rows], columns, cells


def written(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(written, value))
    if value is None or isinstance(value, bool):
        return NOTHING if value is None else str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)
