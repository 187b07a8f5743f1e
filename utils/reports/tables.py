"""Tables of runs. Runs that differ only in their seed make one row: mean ± sample standard deviation (n - 1)."""

import csv
import dataclasses
import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatcl.utils.arguments import SEEDS, EngineArgs
from flatcl.utils.console import complain
from flatcl.utils.errors import UsageError
from flatcl.utils.identity import differences
from flatcl.utils.registry import canonical, nearest
from flatcl.utils.reports.runs import Run, check_key, comparable

BY = ("dataset", "model", "optimizer", "buffer_size")
METRICS = ("final_average_accuracy", "forgetting_chaudhry18")
FORMATS = ("markdown", "csv", "latex", "text")
NOTHING = "–"


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


@dataclass(frozen=True)
class Group:
    """The runs that agree in the keys `by`, seen in one setting: one row of the table."""

    by: Mapping[str, Any]
    setting: str
    runs: tuple[Run, ...]

    def stat(self, metric: str) -> Stat:
        """Of a metric in this setting, or of a cost."""
        found = ({**run.summary.get("cost", {}), **run.summary["metrics"][self.setting]} for run in self.runs)
        return Stat.of(values.get(metric) for values in found)


def group_runs(
    runs: Sequence[Run], by: Sequence[str], setting: str | None = None, order: Sequence[str] = ()
) -> list[Group]:
    """Rows in the order of their keys; models in the order of `order`, then by name."""
    settings = list(dict.fromkeys(name for run in runs for name in run.summary["metrics"]))
    if setting is not None and setting not in settings:
        raise UsageError(f"unknown setting: '{setting}'. {nearest(setting, settings)}")
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


def mixtures(groups: Sequence[Group]) -> list[str]:
    """Groups whose runs differ in more than the seed, and in what: their mean is over unlike things."""
    harmless = {field.name for field in dataclasses.fields(EngineArgs) if not field.metadata["result"]} | {"seed"}
    defaults = {
        field.name: field.default for field in dataclasses.fields(EngineArgs)
    }  # of flags that a run is from before
    lines = []
    for group in groups:
        flags = [{**(defaults if run.flags else {}), **run.flags, "protocol": run.protocol} for run in group.runs]
        flag_names = dict.fromkeys(name for own in flags for name in own if name not in harmless)
        values = {name: {_hashable(own.get(name)) for own in flags} for name in flag_names}
        values = {name: found for name, found in values.items() if name not in SEEDS or None in found}  # or all vary
        several = {name: {comparable(value) for value in found} for name, found in values.items() if len(found) > 1}
        mixed = [f"{name} = {', '.join(sorted(found))}" for name, found in several.items() if len(found) > 1]
        known = [run.code for run in group.runs if run.code is not None]
        files = sorted({file for code in known for file in differences(known[0], code)})
        if files:
            mixed.append(f"different code in {', '.join(files)}")
        if mixed:
            label = " ".join(written(value) for value in group.by.values() if value is not None)
            lines.append(f"note: {label} mixes runs of {'; '.join(mixed)}. Split them with --by or --where.")
    return list(dict.fromkeys(lines))


def gaps(groups: Sequence[Group], metrics: Sequence[str]) -> list[str]:
    """Means over fewer runs than their row counts: of runs from before a metric, or that did not measure it."""
    lines = []
    for group in groups:
        label = " ".join(written(value) for value in group.by.values() if value is not None)
        for metric in metrics:
            has, of = group.stat(metric).n, len(group.runs)
            if 0 < has < of:
                lines.append(f"note: {label}: {has} of {of} runs have {metric} ({group.setting}), its mean is theirs.")
    return lines


def table(
    runs: Sequence[Run],
    by: Sequence[str] | None = None,
    metrics: Sequence[str] = METRICS,
    setting: str | None = None,
    pivot: Sequence[str] = (),
    order: Sequence[str] = (),
    format: str = "markdown",
    say: Callable[[str], None] = complain,
) -> str:
    """The table of `runs` as text that ends in a newline.

    One row for each combination of the keys `by` and each setting. With `pivot`, these keys and the setting become
    columns, the other keys rows, and a cell holds all metrics, separated by slashes.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format: '{format}'. {nearest(format, list(FORMATS))}")
    if pivot and format == "csv":
        raise UsageError("--pivot cannot be used with --format csv, whose cells are single numbers. Drop one of them.")
    check_metrics(metrics, runs)
    groups = group_runs(runs, keys_of(runs, by, pivot), setting, order)
    for line in (*mixtures(groups), *gaps(groups, metrics)):
        say(line)
    if format == "csv":
        return _csv(groups, metrics)
    if pivot:
        return _pivot_table(groups, metrics, costs_of(runs), pivot, order, format)
    shown = [] if setting else ["setting"]
    costs = costs_of(runs)
    head = [*groups[0].by, *shown, "n", *(metric if metric in costs else f"{metric} (%)" for metric in metrics)]
    body = [
        [*map(written, group.by.values()), *([] if setting else [group.setting]), str(len(group.runs)),
         *(_cell(group.stat(metric), metric in costs) for metric in metrics)]
        for group in groups
    ]  # fmt: skip
    return RENDER[format](head, body, len(groups[0].by) + len(shown))


def keys_of(runs: Sequence[Run], by: Sequence[str] | None, pivot: Sequence[str] = ()) -> list[str]:
    """The keys to group by. Of the default ones, those that no run has are dropped."""
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


def costs_of(runs: Sequence[Run]) -> set[str]:
    """Names that are no fractions: seconds, rows, MiB."""
    return {name for run in runs for name in run.summary.get("cost", {})}


@dataclass(frozen=True)
class Column:
    """Where a group stands in a pivoted table: the values of the pivot keys, and the setting."""

    values: tuple
    setting: str

    @property
    def label(self) -> str:
        return ", ".join(written(value) for value in self.values if value is not None)

    def covers(self, other: "Column") -> bool:
        """Whether a number of this column holds for `other` too: a method without a buffer, for every buffer size."""
        pairs = zip(self.values, other.values, strict=True)
        return self.setting == other.setting and all(mine in (None, its) for mine, its in pairs)


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
        found.setdefault(row, {})[Column(tuple(group.by[key] for key in pivot), group.setting)] = group
    columns = {column for cells in found.values() for column in cells}
    columns = [one for one in columns if not any(one.covers(other) for other in columns if other != one)]
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


def _pivot_table(groups, metrics, costs, pivot, order, format) -> str:
    rows, columns, cells = spread(groups, pivot, order)
    labels = [column.label for column in columns]
    head = [*(rows[0] if rows else ()), *(
        f"{column.label}, {column.setting}" if labels.count(column.label) > 1 else column.label for column in columns
    )]  # fmt: skip
    body = []
    for i, row in enumerate(rows):
        stats = [[cells[i, column].stat(metric) for metric in metrics] if (i, column) in cells else None
                 for column in columns]  # fmt: skip
        shown = (
            " / ".join(_cell(stat, metric in costs) for stat, metric in zip(own, metrics, strict=True)) if own else ""
            for own in stats
        )
        body.append([*map(written, row.values()), *shown])
    counts = sorted({len(group.runs) for group in cells.values()})
    runs = f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "")
    names = " / ".join(metric if metric in costs or not costs & {*metrics} else f"{metric} in %" for metric in metrics)
    unit = "" if costs & {*metrics} else " in %"
    footing = f"{names}{unit}; mean ± sample standard deviation, {runs}"
    text = RENDER[format](head, body, len(rows[0]))
    return f"% {latex_text(footing)}\n{text}" if format == "latex" else f"{text}\n{footing}\n"


def _cell(stat: Stat, is_cost: bool) -> str:
    if not is_cost or stat.mean is None:
        return percent(stat)
    places = 0 if stat.mean >= 100 else 1
    return f"{stat.mean:,.{places}f}" + ("" if not stat.std else f" ± {stat.std:,.{places}f}")


def percent(stat: Stat) -> str:
    """`87.29 ± 0.46`; no ± for a single run, a dash for what is not defined."""
    if stat.mean is None:
        return NOTHING
    mean = f"{round(100 * stat.mean, 2) + 0.0:.2f}"  # + 0.0 turns -0.0 into 0.0
    return mean if stat.std is None else f"{mean} ± {100 * stat.std:.2f}"


def written(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(written, value))
    if value is None or isinstance(value, bool):
        return NOTHING if value is None else str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _csv(groups: Sequence[Group], metrics: Sequence[str]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*groups[0].by, "setting", *(f"{m}_{part}" for m in metrics for part in ("mean", "std", "n"))])
    for group in groups:
        stats = [group.stat(metric) for metric in metrics]
        keys = ["" if value is None else written(value) for value in group.by.values()]
        writer.writerow([*keys, group.setting, *(cell for stat in stats for cell in (stat.mean, stat.std, stat.n))])
    return out.getvalue()


def _markdown(head: list[str], body: list[list[str]], num_keys: int) -> str:
    rule = ["---"] * num_keys + ["---:"] * (len(head) - num_keys)
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, rule, *body)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _text(head: list[str], body: list[list[str]], num_keys: int) -> str:
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = []
    for row in (head, ["-" * width for width in widths], *body):
        cells = [cell.ljust(width) if i < num_keys else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def _latex(head: list[str], body: list[list[str]], num_keys: int) -> str:
    def line(row: list[str], minus: str = "$-$") -> str:
        numbers = (latex_text(cell.replace("-", minus)) for cell in row[num_keys:])
        return " & ".join([*map(latex_text, row[:num_keys]), *numbers]) + r" \\" + "\n"

    columns = "l" * num_keys + "r" * (len(head) - num_keys)
    return "".join([
        rf"\begin{{tabular}}{{{columns}}}", "\n\\toprule\n", line(head, minus="-"), "\\midrule\n",
        *map(line, body), "\\bottomrule\n\\end{tabular}\n",
    ])  # fmt: skip


def latex_text(text: str) -> str:
    for char in "_%&#":
        text = text.replace(char, f"\\{char}")
    return text.replace("±", r"$\pm$").replace("†", r"$\dagger$").replace(NOTHING, "--")


RENDER = {"markdown": _markdown, "text": _text, "latex": _latex}


def picture(
    runs: Sequence[Run],
    path: str | Path,
    by: Sequence[str] | None = None,
    metric: str = METRICS[0],
    setting: str | None = None,
    pivot: Sequence[str] = (),
    order: Sequence[str] = (),
) -> None:
    """Writes bars of one metric as a PNG: a panel for each value of the pivot keys (dataset and buffer size)."""
    from flatcl.utils.engine import pictures

    check_metrics([metric], runs)
    keys = keys_of(runs, by, pivot)
    pivot = pivot or [key for key in ("dataset", "buffer_size") if key in keys]
    rows, columns, cells = spread(group_runs(runs, keys, setting, order), pivot, order)
    bars = []
    for (i, column), group in cells.items():
        stat = group.stat(metric)
        method = " ".join(written(value) for value in rows[i].values() if value is not None)
        bars.append(
            {"panel": column.label, "method": method, "series": column.setting, "mean": stat.mean, "std": stat.std}
        )
    panels = {column.label: rank for rank, column in enumerate(columns)}
    bars.sort(key=lambda bar: panels[bar["panel"]])
    pictures.save(pictures.comparison(bars, f"{metric.replace('_', ' ')} (%)"), path)
