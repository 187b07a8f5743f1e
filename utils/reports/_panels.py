"""What the pictures of `plots` show: groups of runs, a panel for each dataset, buffer size and setting; their names."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatcl.utils.errors import UsageError
from flatcl.utils.registry import canonical, nearest
from flatcl.utils.reports._layout import Page, Style
from flatcl.utils.reports.groups import Group, check_mixtures, group_runs, mixtures, spread, written
from flatcl.utils.reports.labels import check_names, named, pair_of
from flatcl.utils.reports.runs import Run

BY = ("model", "optimizer")
PANELS = ("dataset", "buffer_size")
LETTER = 0.068  # inches: the mean width of a letter, rounded up
NAMES = {
    "final_average_accuracy": "final average accuracy",
    "final_overall_accuracy": "final overall accuracy",
    "average_incremental_accuracy": "average incremental accuracy",
    "forgetting_chaudhry18": "average forgetting",
    "forgetting_mammoth": "average forgetting, as in Mammoth",
    "bwt_gem17": "backward transfer",
    "fwt_gem17": "forward transfer",
    "train_s": "training time (s)",
    "eval_s": "evaluation time (s)",
    "wall_s": "wall time (s)",
    "peak_memory_mib": "peak memory (MiB)",
}


@dataclass(frozen=True)
class Request:
    """What `plots.figure` was asked for."""

    metric: str
    by: Sequence[str]
    setting: str | None
    order: Sequence[str]
    names: Mapping[str, str]
    width: str
    x: str
    costs: frozenset[str]
    mix: bool
    say: Callable[[str], None]

    @property
    def is_cost(self) -> bool:
        return self.metric in self.costs

    @property
    def scale(self) -> int:
        """Fractions are drawn in percent."""
        return 1 if self.is_cost else 100

    @property
    def lower_is_better(self) -> bool:
        return self.is_cost or self.metric.startswith("forgetting")

    @property
    def label(self) -> str:
        name = metric_label(self.metric, self.names)
        return name if self.is_cost else f"{name} (%)"

    def named(self, value: Any) -> str:
        return named(value, self.names)


@dataclass(frozen=True)
class Series:
    """One group in one panel. `place` counts labels: the same label has the same style in each panel."""

    label: str
    place: int
    group: Group

    @property
    def style(self) -> Style:
        return Style.number(self.place)


@dataclass(frozen=True)
class Panel:
    """`parts` of its title: what all of its runs share."""

    parts: tuple[str, ...]
    setting: str
    validation: bool
    series: tuple[Series, ...]

    def on_split(self, label: str) -> str:
        """Which images were evaluated is said where they are not the test set."""
        return f"{label},\nvalidation split" if self.validation else label


def panels_of(runs: Sequence[Run], request: Request) -> list[Panel]:
    """Runs of the validation split and of the test set never share a panel. Raises `UsageError` for an unknown setting,
    for a name of what is not there and, without `request.mix`, for groups whose runs differ in more than their seed."""
    settings = list(dict.fromkeys(name for run in runs for name in run.summary["metrics"]))
    if request.setting is not None and request.setting not in settings:
        raise UsageError(f"unknown setting: '{request.setting}'. {nearest(request.setting, settings)}")
    if not request.mix:
        keys = [*request.by, *(key for key in PANELS if key not in request.by)]
        check_mixtures(group_runs(runs, keys, request.setting), request.by)
    shared = shared_of([{key: run.get(key) for key in request.by if key != "dataset"} for run in runs])
    found = []
    for validation in (False, True):
        part = [run for run in runs if bool(run.get("validation")) == validation]
        found += _panels(part, request, validation, shared)
    rows = [series.group.by for panel in found for series in panel.series]
    others = [*PANELS, request.metric, *([request.x] if request.x in request.costs else [])]
    check_names(request.names, rows, [*others, *(panel.setting for panel in found)])
    labels = dict.fromkeys(series.label for panel in found for series in panel.series)
    places = {label: place for place, label in enumerate(labels)}
    return [
        dataclasses.replace(panel, series=tuple(dataclasses.replace(s, place=places[s.label]) for s in panel.series))
        for panel in found
    ]


def shared_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{key: value} of what all rows of keys have in common where they differ in something else: it belongs into the
    title, not into each label. The model or the optimizer does only where the rows differ in the other one."""
    values = {key: {written(row[key]) for row in rows} for key in rows[0]}
    alike = {key: rows[0][key] for key, found in values.items() if len(found) == 1}
    if len(alike) == len(values):
        return {}
    pair_varies = any(key in values and key not in alike for key in BY)
    return {key: value for key, value in alike.items() if value is not None and (pair_varies or key not in BY)}


def _panels(runs: Sequence[Run], request: Request, validation: bool, shared: Mapping[str, Any]) -> list[Panel]:
    runs = [run for run in runs if request.setting is None or request.setting in run.summary["metrics"]]
    if not runs:
        return []
    by = [key for key in request.by if key != "dataset"]
    pivot = [key for key in PANELS if key not in by and any(run.get(key) is not None for run in runs)]
    groups = group_runs(runs, [*by, *pivot], request.setting, request.order)
    for line in mixtures(groups):
        request.say(line)
    rows, columns, cells = spread(groups, pivot, request.order)
    panels = []
    for column in columns:
        values = dict(zip(pivot, column.values, strict=True))
        parts = [part_of(key, value, request.names) for key, value in shared.items()]
        parts += [part_of(key, value, request.names) for key, value in values.items() if value is not None]
        own = [cells[i, column] for i in range(len(rows)) if (i, column) in cells]
        keys = [{key: group.by[key] for key in by} for group in own]  # also an optimizer that `spread` leaves out
        series = tuple(Series(label_of(row, request.names, shared), 0, group)
                       for row, group in zip(keys, own, strict=True))  # fmt: skip
        panels.append(Panel((*parts, request.named(column.setting)), column.setting, validation, series))
    return panels


def metric_label(name: str, names: Mapping[str, str]) -> str:
    """Of a metric or a cost."""
    return named(name, names, NAMES.get(name, name.replace("_", " ")))


def key_label(key: str, names: Mapping[str, str]) -> str:
    return named(key, names, "buffer" if key == "buffer_size" else key.replace("_", " "))


def part_of(key: str, value: Any, names: Mapping[str, str]) -> str:
    """A part of a title: `er`, `lr 0.1`."""
    text = named(value, names)
    if key in (*BY, "dataset") or text != written(value):
        return text
    return f"{key_label(key, names)} {text}"


def label_of(row: Mapping[str, Any], names: Mapping[str, str], shared: Mapping[str, Any]) -> str:
    """`er + sam, lr 0.1`, with `names` in place of words; a name of the pair comes first."""
    words = {key: written(value) for key, value in row.items() if value is not None}
    pair = names.get(canonical(pair_of(words)))
    main = [named(words[key], names) for key in BY if key in words and key not in shared]
    rest = [names.get(canonical(word), f"{named(key, names, key.replace('_', ' '))} {word}")
            for key, word in words.items() if key not in BY and key not in shared]  # fmt: skip
    text = pair or " + ".join(main)
    return ", ".join([*([text] if text else []), *rest]) or "all runs"


def listed(runs: Sequence[Run]) -> str:
    """`er on seq-digits with sgd (seeds 0, 1, 2); ...`"""
    seeds: dict[str, set[str]] = {}
    for run in runs:
        name = f"{run.get('model')} on {run.get('dataset')} with {run.get('optimizer')}"
        seeds.setdefault(name, set()).add(written(run.get("seed")))
    return "; ".join(
        f"{name} (seeds {', '.join(sorted(own, key=lambda word: (len(word), word)))})" for name, own in seeds.items()
    )


def with_data(panels: Sequence[Panel], data: Sequence[Sequence[Any]]) -> tuple[list[Panel], list[list[Any]]]:
    """The series that have something to draw, and the panels that have such series."""
    kept, values = [], []
    for panel, own in zip(panels, data, strict=True):
        pairs = [(series, item) for series, item in zip(panel.series, own, strict=True) if item]
        if pairs:
            kept.append(dataclasses.replace(panel, series=tuple(series for series, _ in pairs)))
            values.append([item for _, item in pairs])
    return kept, values


def say_single(panels: Sequence[Panel], what: str, request: Request) -> None:
    alone = dict.fromkeys(series.label for panel in panels for series in panel.series if len(series.group.runs) == 1)
    if alone:
        request.say(f"note: no {what} where there is one run only: {', '.join(alone)}.")


def titles(panels: Sequence[Panel], inches: float) -> list[str]:
    """In as few lines as this width allows, broken in the same places where all have as many parts."""
    alike = len({len(panel.parts) for panel in panels}) == 1
    widest = [max(map(len, column)) for column in zip(*(panel.parts for panel in panels), strict=False)]
    return [_broken(panel.parts, widest if alike else list(map(len, panel.parts)), inches) for panel in panels]


def broken(label: str, inches: float) -> str:
    """In lines of this width, as far as it has commas to break it at."""
    parts = label.split(", ")
    return _broken(parts, list(map(len, parts)), inches).replace("\n", ",\n")


def _broken(parts: Sequence[str], lengths: Sequence[int], inches: float) -> str:
    text, used = parts[0], lengths[0]
    for part, length in zip(parts[1:], lengths[1:], strict=True):
        fits = (used + 2 + length) * LETTER <= inches
        text += f", {part}" if fits else f"\n{part}"
        used = used + 2 + length if fits else length
    return text


def head(page: Page, panels: Sequence[Panel]) -> None:
    """A title above each panel."""
    for axes, title in zip(page.axes, titles(panels, page.panel_inches), strict=True):
        axes.set_title(title)
