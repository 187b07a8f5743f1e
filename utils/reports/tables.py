"""Tables of runs. Runs that differ only in their seed make one row: mean ± sample standard deviation (n - 1)."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence

from flatcl.utils.console import complain
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import nearest
from flatcl.utils.reports import latex
from flatcl.utils.reports.cells import Cell, Number, plain
from flatcl.utils.reports.comparisons import mark_best
from flatcl.utils.reports.groups import (
    BY,
    METRICS,
    NOTHING,
    Group,
    check_metrics,
    costs_of,
    gaps,
    group_runs,
    keys_of,
    mixtures,
    split_notes,
    spread,
    written,
)
from flatcl.utils.reports.labels import check_names, named
from flatcl.utils.reports.runs import Run

FORMATS = ("markdown", "csv", "latex", "text")
Parts = tuple[list[str], list[list[Cell]], int, list[str]]  # head, body, number of key columns, footing


def table(
    runs: Sequence[Run],
    by: Sequence[str] | None = None,
    metrics: Sequence[str] = METRICS,
    setting: str | None = None,
    pivot: Sequence[str] = (),
    order: Sequence[str] = (),
    format: str = "markdown",
    say: Callable[[str], None] = complain,
    interval: bool = False,
    best: bool = False,
    options: latex.Options = latex.PLAIN,
    names: Mapping[str, str] = {},
) -> str:
    """The table of `runs` as text that ends in a newline.

    One row for each combination of the keys `by` and each setting. With `pivot`, these keys and the setting become
    columns, the other keys rows, and a cell holds all metrics, separated by slashes. `interval` adds the 95 % interval
    of each mean; `best` marks the best group of each column, if a test can tell which it is. `names`: labels in place
    of values, keys and metrics ({"er": "ER"}), which CSV has not.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format: '{format}'. {nearest(format, list(FORMATS))}")
    if pivot and format == "csv":
        raise UsageError("--pivot cannot be used with --format csv, whose cells are single numbers. Drop one of them.")
    check_metrics(metrics, runs)
    groups = group_runs(runs, keys_of(runs, by, pivot), setting, order)
    check_names_of(groups, metrics, names)
    for line in (*mixtures(groups), *gaps(groups, metrics)):
        say(line)
    if format == "csv":
        return _csv(groups, metrics, interval)
    costs = costs_of(runs)
    sign = ("*" if format == "text" else "bold") if best else ""
    if pivot:
        head, body, num_keys, footing = _pivoted(groups, metrics, costs, pivot, order, interval, sign, names)
    else:
        head, body, num_keys, footing = _flat(groups, metrics, costs, setting is None, interval, sign, names)
    return laid_out(
        head, body, num_keys, [*footing, *split_notes(groups), *tuning_note(groups, names)], format, options
    )


def _flat(
    groups: Sequence[Group], metrics: Sequence[str], costs: set[str], with_setting: bool, interval: bool, sign: str,
    names: Mapping[str, str],
) -> Parts:  # fmt: skip
    """A row for each group, a column for each metric; the best are marked where there is a `sign` for it."""
    numbers = [[Number.of(group.stat(metric), metric in costs, interval) for metric in metrics] for group in groups]
    footing = _spread_note(numbers, interval)
    if sign:
        marks, notes = mark_best(groups, [None] * len(groups), metrics, costs, sign=sign)
        numbers = _marked(numbers, marks)
        footing += notes
    shown = ["setting"] if with_setting else []
    keys = [named(key, names) for key in (*groups[0].by, *shown)]
    head = [*keys, "n", *(with_unit(metric, costs, names, "{} (%)") for metric in metrics)]
    body = [
        [*(named(value, names) for value in (*group.by.values(), *([group.setting] if with_setting else []))),
         str(len(group.runs)), *((number,) for number in own)]
        for group, own in zip(groups, numbers, strict=True)
    ]  # fmt: skip
    return head, body, len(keys), footing


def _pivoted(
    groups: Sequence[Group], metrics: Sequence[str], costs: set[str], pivot: Sequence[str], order: Sequence[str],
    interval: bool, sign: str, names: Mapping[str, str],
) -> Parts:  # fmt: skip
    """A row for the keys that are not pivot keys, a cell for all metrics of a group."""
    rows, columns, cells = spread(groups, pivot, order)
    labels = [", ".join(named(value, names) for value in column.values if value is not None) or NOTHING
              for column in columns]  # fmt: skip
    head = [*(named(key, names) for key in (rows[0] if rows else ())), *(
        f"{label}, {named(column.setting, names)}" if labels.count(label) > 1 else label
        for label, column in zip(labels, columns, strict=True)
    )]  # fmt: skip
    members = list(cells.values())
    numbers = [[Number.of(group.stat(metric), metric in costs, interval) for metric in metrics] for group in members]
    footing = [_pivot_footing(members, metrics, costs, _spread_note(numbers, interval), names)]
    if any(key not in BY[:3] for key in pivot):  # whose values do not say what they are of
        footing.append(f"columns: {', '.join(named(key, names) for key in pivot)}")
    if sign:
        marks, notes = mark_best(members, [column for _, column in cells], metrics, costs, pivot, sign)
        numbers = _marked(numbers, marks)
        footing += notes
    shown = dict(zip(cells, map(tuple, numbers), strict=True))
    body = [[*(named(value, names) for value in row.values()), *(shown.get((i, column), "") for column in columns)]
            for i, row in enumerate(rows)]  # fmt: skip
    return head, body, len(rows[0]), footing


def _spread_note(numbers: Sequence[Sequence[Number]], interval: bool) -> list[str]:
    """What stands behind ±, where there is one."""
    if not any(number.std for own in numbers for number in own):
        return []
    return [f"mean ± sample standard deviation{' [95 % t interval of the mean]' if interval else ''}"]


def _pivot_footing(
    members: Sequence[Group], metrics: Sequence[str], costs: set[str], spread_note: Sequence[str],
    names: Mapping[str, str],
) -> str:  # fmt: skip
    counts = sorted({len(group.runs) for group in members})
    runs = f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "")
    form = "{} in %" if costs & {*metrics} else "{}"
    parts = " / ".join(with_unit(metric, costs, names, form) for metric in metrics)
    unit = "" if costs & {*metrics} else " in %"
    return f"{parts}{unit}; {', '.join((*spread_note, runs))}"


def check_names_of(groups: Sequence[Group], metrics: Sequence[str], names: Mapping[str, str]) -> None:
    rows = [{**group.by, "setting": group.setting} for group in groups]
    check_names(names, rows, metrics, has_pairs=False)


def with_unit(metric: str, costs: set[str], names: Mapping[str, str], form: str = "{} in %") -> str:
    """The name of a metric as `form`, in percent; of a cost alone."""
    name = named(metric, names)
    return name if metric in costs else form.format(name)


def _marked(numbers: list[list[Number]], marks: Sequence[Sequence[str | None]]) -> list[list[Number]]:
    return [[number.marked(mark) for number, mark in zip(*pair, strict=True)]
            for pair in zip(numbers, marks, strict=True)]  # fmt: skip


def tuning_note(groups: Sequence[Group], names: Mapping[str, str] = {}) -> list[str]:
    """How many configurations stand behind the numbers of each row."""
    labels: dict[str, dict[str, None]] = {}
    for group in groups:
        words = (named(value, names) if key in BY[:3] else f"{named(key, names)} {named(value, names)}"
                 for key, value in group.by.items() if value is not None)  # fmt: skip
        labels.setdefault(group.tuned, {})[" ".join(words)] = None
    lines = [f"{said}: {', '.join(own)}" if len(labels) > 1 else said for said, own in labels.items() if said]
    return [f"flags of each row chosen by a search ({'; '.join(lines)})"] if lines else []


def laid_out(
    head: list[str], body: list[list[Cell]], num_keys: int, footing: Sequence[str], format: str, options: latex.Options
) -> str:
    """A table of any kind in one of the formats but csv, with what its reader has to know below it."""
    if format == "latex":
        return latex.document(head, body, num_keys, footing, options)
    text = RENDER[format](head, body, num_keys)
    return text + ("\n" + ";\n".join(footing) + "\n" if footing else "")


def _csv(groups: Sequence[Group], metrics: Sequence[str], interval: bool) -> str:
    parts = ("mean", "std", "n", *(("low", "high") if interval else ()))
    rows = []
    for group in groups:
        stats = [group.stat(metric) for metric in metrics]
        cells = ((stat.mean, stat.std, stat.n, *((stat.interval or (None, None)) if interval else ()))
                 for stat in stats)  # fmt: skip
        rows.append([*csv_keys(group), group.setting, *(cell for own in cells for cell in own)])
    return csv_text([*groups[0].by, "setting", *(f"{m}_{part}" for m in metrics for part in parts)], rows)


def csv_keys(group: Group) -> list[str]:
    return ["" if value is None else written(value) for value in group.by.values()]


def csv_text(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    return out.getvalue()


def _markdown(head: list[str], body: Sequence[Sequence[Cell]], num_keys: int) -> str:
    rule = ["---"] * num_keys + ["---:"] * (len(head) - num_keys)
    rows = [head, rule, *([plain(cell, "**{}**") for cell in row] for row in body)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)


def _text(head: list[str], body: Sequence[Sequence[Cell]], num_keys: int) -> str:
    rows = [[plain(cell, "{}*") for cell in row] for row in body]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [cell.ljust(width) if i < num_keys else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


RENDER = {"markdown": _markdown, "text": _text, "latex": latex.tabular}
