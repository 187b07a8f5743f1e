"""Pictures of several methods, for papers: `flatcl report RESULTS --plot bars --out bars.pdf`.

Runs that differ only in their seed make one group; a group is a line, a point, a row or a cell. There is a panel for
each dataset, buffer size and setting; a method without a buffer is in the panels of all buffer sizes. Colours are those
of Okabe & Ito (2008); markers and dashes tell the groups apart too. What is left out or mixed is said by `say`.
"""

import itertools
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flatcl.utils import metrics
from flatcl.utils.console import complain
from flatcl.utils.engine import pictures
from flatcl.utils.errors import UsageError
from flatcl.utils.metrics import Matrix
from flatcl.utils.registry import canonical, nearest
from flatcl.utils.reports._layout import (
    COLOURS,
    GREY,
    INK,
    POINTS,
    ROW,
    SUFFIXES,
    WIDTHS,
    Page,
    Style,
    check_path,
    save,
    style,
    svg_text,
)
from flatcl.utils.reports._panels import (
    BY,
    LETTER,
    Panel,
    Request,
    Series,
    broken,
    head,
    listed,
    metric_label,
    panels_of,
    say_single,
    with_data,
)
from flatcl.utils.reports.groups import METRICS, Group, Stat, check_metrics, costs_of, gaps, sort_key, written
from flatcl.utils.reports.labels import named
from flatcl.utils.reports.runs import Run, check_key, load_matrices

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["KINDS", "SUFFIXES", "WIDTHS", "check_path", "figure", "save", "svg"]

KINDS = {
    "tasks": "average accuracy on the tasks learned so far, after each task",
    "forgetting": "average forgetting of the tasks learned so far, after each task from the second on",
    "compute": "the metric against the training cost, with the Pareto front",
    "bars": "the metric with 95 % t intervals, from the best to the worst",
    "matrix": "accuracy matrices side by side, means over the seeds",
    "heat": "the metric for each method and optimizer",
}
WITH_METRIC = ("compute", "bars", "heat")
OF_MATRICES = ("tasks", "forgetting", "matrix")
ROWS = "rows"
MANY = 10  # lines; more are hard to tell apart
BANDS = 6  # lines; the bands of more make one area
MARKED = 20  # tasks up to which each has a marker, and each cell a border
CELL = 1.15 * ROW  # inches: the height of a cell of a heat map
SPAN = 5  # percent from the lightest to the darkest cell of a heat map, at least
CMAP = "YlGnBu"  # light to dark, so that grey prints and the colour-blind have the same order


def figure(
    kind: str,
    runs: Sequence[Run],
    *,
    metric: str | None = None,
    by: Sequence[str] | None = None,
    setting: str | None = None,
    order: Sequence[str] = (),
    names: Mapping[str, str] = {},
    width: str = "column",
    x: str = ROWS,
    mix: bool = False,
    say: Callable[[str], None] = complain,
) -> "Figure":
    """The picture of `kind` (see `KINDS`), of its final size in inches, bound to the Agg canvas.

    `metric`: for compute, bars and heat, a metric or a cost (default: final_average_accuracy). `by`: the keys that make
    a group (default: model and optimizer). `order`: values of these keys in the order of drawing. `names`: labels in
    place of names ({"er": "ER"}), also of keys, metrics and pairs ({"er+sam": "ER-SAM"}). `width`: column (3.5 inches)
    or page (7). `x`: for compute, `rows` (forward + 2 x backward) or a cost, such as train_s. `mix`: also draw groups
    whose runs differ in more than their seed, with notes. Raises `UsageError` for what cannot be drawn, and for such
    groups.
    """
    problems = [] if kind in KINDS else [f"unknown kind of picture: '{kind}'. {nearest(kind, list(KINDS))}"]
    if width not in WIDTHS:
        problems.append(f"unknown width: '{width}'. {nearest(width, list(WIDTHS))}")
    if kind in KINDS and metric is not None and kind not in WITH_METRIC:
        problems.append(f"{kind} has no choice of a metric, got '{metric}'. Drop it, or draw {', '.join(WITH_METRIC)}.")
    if kind in KINDS and x != ROWS and kind != "compute":
        problems.append(f"{kind} has no choice of the x axis, got '{x}'. Drop it, or draw compute.")
    if problems:
        raise UsageError(*problems)
    for key in by or ():
        check_key(key, runs)
    keys = by or [key for key in BY if any(run.get(key) is not None for run in runs)]
    crossed = [key for key in keys if key != "dataset"]
    if kind == "heat" and len(crossed) != 2:
        raise UsageError(f"heat needs two keys, got {', '.join(crossed) or 'none'}. Example: --by model,optimizer.")
    costs = frozenset(costs_of(runs))
    request = Request(metric or METRICS[0], list(keys), setting, order, names, width, x, costs, mix, say)
    check_metrics([request.metric], runs)
    with style():
        panels = panels_of(runs, request)
        if kind in WITH_METRIC:
            for line in gaps([series.group for panel in panels for series in panel.series], [request.metric]):
                say(line)
        return DRAW[kind](panels, request)


def svg(kind: str, runs: Sequence[Run], *, prefix: str = "", **options: Any) -> str:
    """The picture as an <svg> element for a page of HTML, without XML prolog. All ids in it begin with `prefix`, so
    that several can be on one page. `options`: those of `figure`."""
    return svg_text(figure(kind, runs, **options), prefix, KINDS[kind])


# accuracy matrices


def _matrices(panels: Sequence[Panel], request: Request, joint: bool) -> list[list[list[Matrix]]]:
    """Of each series of each panel, the matrices of its runs; says which runs lack it. Without `joint`, runs that have
    trained all tasks at once are left out as well: they have no course."""
    runs = list({id(run): run for panel in panels for series in panel.series for run in series.group.runs}.values())
    known = dict(zip(map(id, runs), load_matrices(runs), strict=True))
    lacking = [run for run in runs if not known[id(run)]]
    if len(lacking) == len(runs):
        raise UsageError(
            "no run has its accuracy matrix: records have it if they were written with a newer version, and for at "
            "most 50 tasks. Give the run folders, or write the record again with --record."
        )
    if lacking:
        request.say(f"note: left out, since they have no accuracy matrix: {listed(lacking)}.")
    at_once = [run for run in runs if known[id(run)] and _is_joint(next(iter(known[id(run)].values())))]
    if at_once and not joint:
        request.say(f"note: left out, since they have learned all tasks at once: {listed(at_once)}.")
        known |= {id(run): {} for run in at_once}
    return [
        [[known[id(run)][panel.setting] for run in series.group.runs if panel.setting in known[id(run)]]
         for series in panel.series]
        for panel in panels
    ]  # fmt: skip


def _is_joint(matrix: Matrix) -> bool:
    return len(matrix) == 1 < len(matrix[0])


# tasks, forgetting


def _tasks(panels: Sequence[Panel], request: Request) -> "Figure":
    def course(matrix: Matrix) -> dict[int, float]:
        return {seen: metrics.average_accuracy(row, seen) for seen, row in enumerate(matrix, start=1)}

    return _lines(panels, request, course, "average accuracy (%)", (0, 100))


def _forgetting(panels: Sequence[Panel], request: Request) -> "Figure":
    def course(matrix: Matrix) -> dict[int, float]:
        return dict(enumerate(pictures.forgetting(matrix), start=2))

    return _lines(panels, request, course, "average forgetting (%)", (-100, 100))


def _lines(
    panels: Sequence[Panel],
    request: Request,
    course: Callable[[Matrix], dict[int, float]],
    label: str,
    limits: tuple[float, float],
) -> "Figure":
    """Mean and sample standard deviation of `course` ({number of tasks learned: value}) over the runs of each group.
    `limits`: what the value can be, in percent; nothing is drawn beyond."""
    courses = [[[course(matrix) for matrix in own if len(matrix) > 1] for own in part]
               for part in _matrices(panels, request, joint=False)]  # fmt: skip
    panels, data = with_data(panels, courses)
    if not panels:
        raise UsageError("no run has learned two tasks one after the other, which a line needs.")
    with_bands = max(len(panel.series) for panel in panels) <= BANDS
    if with_bands:
        say_single(panels, "band", request)
    elif any(len(series.group.runs) > 1 for panel in panels for series in panel.series):
        request.say(f"note: no bands, since more than {BANDS} would cover each other. The tables have the spread.")
    _say_many(panels, "lines", request)
    page = Page(request.width, len(panels), _most_across(len(panels), request))
    handles: dict[str, Any] = {}
    for axes, panel, own in zip(page.axes, panels, data, strict=True):
        for series, values in zip(panel.series, own, strict=True):
            handles.setdefault(series.label, _line(axes, series.style, values, limits, with_bands))
        longest = max(max(values) for item in own for values in item)
        _task_axis(axes, min(min(values) for item in own for values in item), longest)
        _value_ticks(axes.yaxis)
        axes.set_ylim(np.clip(axes.get_ylim(), *limits))
        axes.grid(axis="y")
    head(page, panels)
    _name_axes(page, panels, "tasks learned", label)
    page.legend(list(handles.values()), _in_legend(handles, request))
    return page.fit(lambda width: min(max(0.62 * width, 1.3), 2.0))


def _most_across(panels: int, request: Request) -> int:
    """How many panels of lines or points stand side by side at most."""
    return (1 if panels <= 2 else 2) if request.width == "column" else 3


def _value_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _line(
    axes: "Axes", look: Style, courses: Sequence[Mapping[int, float]], limits: tuple[float, float], with_band: bool
) -> Any:
    """A line, and its band inside the limits; the handle for the legend."""
    places = sorted(set().union(*courses))
    stats = [Stat.of(course.get(place) for course in courses) for place in places]
    means = np.array([100 * stat.mean for stat in stats])  # type: ignore[operator]
    stds = np.array([100 * (stat.std or 0) for stat in stats])
    if with_band and stds.any():
        low, high = np.clip([means - stds, means + stds], *limits)
        axes.fill_between(places, low, high, color=look.colour, alpha=0.1, lw=0)
    every = 1 if len(places) <= MARKED else 0.125  # of a long line, a few markers tell it from the others
    (line,) = axes.plot(
        places, means, color=look.colour, ls=look.dashes, lw=1.2, marker=look.marker, ms=3.8, mec="white", mew=0.3,
        markevery=every, clip_on=False,
    )  # fmt: skip
    return line


def _task_axis(axes: "Axes", first: int, last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(first - 0.02 * (last - first) - 0.1, last + 0.02 * (last - first) + 0.1)
    if last - first < 10:
        axes.set_xticks(range(first, last + 1))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))


def _name_axes(page: Page, panels: Sequence[Panel], x: str, y: str) -> None:
    """Labels at the left and below, and wherever the split differs from that beside it."""
    count = len(page.axes)
    for place, (axes, panel) in enumerate(zip(page.axes, panels, strict=True)):
        if place + page.across >= count:
            axes.set_xlabel(x)
        if place % page.across == 0 or panel.validation != panels[place - 1].validation:
            axes.set_ylabel(panel.on_split(y))


# compute


@dataclass(frozen=True)
class Point:
    """A group's mean cost, and its metric, whose mean is a number."""

    series: Series
    x: float
    y: Stat

    @property
    def mean(self) -> float:
        assert self.y.mean is not None
        return self.y.mean


def _compute(panels: Sequence[Panel], request: Request) -> "Figure":
    cost, unit = _cost(request, [series.group for panel in panels for series in panel.series])
    points = [[_point(series, cost, request) for series in panel.series] for panel in panels]
    lost = dict.fromkeys(series.label for panel, own in zip(panels, points, strict=True)
                         for series, point in zip(panel.series, own, strict=True) if point is None)  # fmt: skip
    panels, data = with_data(panels, points)
    if not panels:
        raise UsageError(f"no run has both {request.metric} and {request.x}. Choose another --metrics or --x.")
    if lost:
        request.say(f"note: left out, without {request.metric} or {request.x}: {', '.join(lost)}.")
    _say_many(panels, "points", request)
    page = Page(request.width, len(panels), _most_across(len(panels), request))
    handles: dict[str, Any] = {}
    fronts = [_pareto(own, request.lower_is_better) for own in data]
    for axes, own, front in zip(page.axes, data, fronts, strict=True):
        line = _front(axes, front, request.scale)
        for point in own:
            handles.setdefault(point.series.label, _dot(axes, point, request.scale))
        _cost_axis(axes, own)
        axes.set_ylim(_within(request, axes.get_ylim()))
        axes.grid(axis="y")
    head(page, panels)
    _name_axes(page, panels, _cost_label(unit, page.panel_inches), request.label)
    page.legend([*handles.values(), line], [*_in_legend(handles, request), "Pareto front"], handlelength=1.4)
    made = page.fit(lambda width: min(max(0.72 * width, 1.6), 2.2))
    for axes, own, front in zip(page.axes, data, fronts, strict=True):
        _name_points(axes, own, front, request.scale)
    return made


def _say_many(panels: Sequence[Panel], what: str, request: Request) -> None:
    count = len({series.label for panel in panels for series in panel.series})
    if count > MANY:
        request.say(f"note: {count} {what}; a picture with at most {MANY} is easier to read: choose with --where.")


def _cost(request: Request, groups: Sequence[Group]) -> tuple[Callable[[Run], float | None], str]:
    """(cost of a run, the axis' label)."""
    if request.x == ROWS:
        largest = max((_rows(run) or 0 for group in groups for run in group.runs), default=0)
        unit, word = (10**6, "million") if largest >= 10**6 else (10**3, "thousand")
        label = f"training cost ({word} images, forward + 2 × backward)"
        return lambda run: None if _rows(run) is None else _rows(run) / unit, label
    if request.x not in request.costs:
        known = [ROWS, *sorted(request.costs)]
        raise UsageError(f"--x: unknown cost: '{request.x}'. {nearest(request.x, known)}")
    name = request.x
    return lambda run: run.summary.get("cost", {}).get(name), metric_label(name, request.names)


def _cost_label(label: str, inches: float) -> str:
    """In as many lines as an axis of this length needs."""
    halves = broken(label, inches).split("\n")
    return "\n".join(part if len(part) * LETTER <= inches else part.replace(" (", "\n(") for part in halves)


def _rows(run: Run) -> float | None:
    """Forward + 2 x backward: a backward pass computes two products of matrices for each one of a forward pass."""
    cost = run.summary.get("cost", {})
    if cost.get("forward_rows") is None or cost.get("backward_rows") is None:
        return None
    return cost["forward_rows"] + 2 * cost["backward_rows"]


def _point(series: Series, cost: Callable[[Run], float | None], request: Request) -> Point | None:
    """Of the runs that have both."""
    xs = [cost(run) for run in series.group.runs]
    x, y = Stat.of(xs).mean, series.group.stat(request.metric)
    return None if x is None or y.mean is None else Point(series, x, y)


def _pareto(points: Sequence[Point], lower_is_better: bool) -> list[Point]:
    """The points that no other one beats: as cheap and as good, and better in one of the two. By rising cost."""
    sign = -1 if lower_is_better else 1

    def beats(one: Point, other: Point) -> bool:
        mine, its = (one.x, -sign * one.mean), (other.x, -sign * other.mean)
        return mine[0] <= its[0] and mine[1] <= its[1] and mine != its

    kept = [point for point in points if not any(beats(other, point) for other in points)]
    return sorted(kept, key=lambda point: point.x)


def _dot(axes: "Axes", point: Point, scale: int) -> Any:
    look, mean = point.series.style, scale * point.mean
    if point.y.std:
        axes.errorbar(point.x, mean, yerr=scale * point.y.std, color=look.colour, lw=0.6, alpha=0.5, fmt="none")
    (dot,) = axes.plot([point.x], [mean], color=look.colour, marker=look.marker, ms=4.5, mec="white", mew=0.3, ls="",
                       clip_on=False)  # fmt: skip
    return dot


def _front(axes: "Axes", front: Sequence[Point], scale: int) -> Any:
    """A step at each point: between two of them nothing better than the first is known. Behind all points: a step may
    pass one that is not on the front."""
    ys = [scale * point.mean for point in front]
    (line,) = axes.step(
        [point.x for point in front], ys, where="post", color=GREY, lw=0.8, ls=(0, (3, 2)), zorder=1.2, marker="o",
        mfc="none", mec=INK, mew=0.7, ms=7.5, clip_on=False, label="Pareto front",
    )  # fmt: skip
    return line


def _cost_axis(axes: "Axes", points: Sequence[Point]) -> None:
    """Logarithmic where the largest cost is more than ten times the smallest; plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    xs = [point.x for point in points]
    if min(xs) > 0 and max(xs) > 10 * min(xs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(min(xs) / 1.3, max(xs) * 1.3)
    else:
        _value_ticks(axes.xaxis)
        room = 0.08 * (max(xs) - min(xs)) or 0.1 * abs(max(xs)) or 1
        axes.set_xlim(min(xs) - room, max(xs) + room)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    _value_ticks(axes.yaxis)


OFFSETS = (
    ((6, 4), "left", "bottom"),
    ((-6, 4), "right", "bottom"),
    ((6, -4), "left", "top"),
    ((-6, -4), "right", "top"),
    ((0, 7), "center", "bottom"),
    ((0, -7), "center", "top"),
)  # of a name from its point: points, and how the text is aligned


def _name_points(axes: "Axes", points: Sequence[Point], front: Sequence[Point], scale: int) -> None:
    """Names at the points of the front, where there is room that nothing else takes; the legend has all of them."""
    taken = [box for point in points for box in _covered(axes, point, scale)]
    taken += [box for one, other in itertools.pairwise(front) for box in _steps(axes, one, other, scale)]
    inside = axes.get_window_extent()
    for point in front:
        for offset, ha, va in OFFSETS:
            text = axes.annotate(
                point.series.label, (point.x, scale * point.mean), offset, textcoords="offset points", ha=ha, va=va,
            )  # fmt: skip
            text.set_in_layout(False)
            box = text.get_window_extent(axes.figure.canvas.get_renderer())
            fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if fits and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()


def _covered(axes: "Axes", point: Point, scale: int) -> list[Any]:
    """What a marker and its error bar take, in pixels."""
    from matplotlib.transforms import Bbox

    pixel, std = axes.figure.dpi / 72, point.y.std or 0.0
    x, y = axes.transData.transform((point.x, scale * point.mean))
    (_, low), (_, high) = axes.transData.transform([(point.x, scale * (point.mean + sign * std)) for sign in (-1, 1)])
    marker = Bbox.from_extents(x - 4 * pixel, y - 4 * pixel, x + 4 * pixel, y + 4 * pixel)
    return [marker, Bbox.from_extents(x - pixel, low, x + pixel, high)]


def _steps(axes: "Axes", one: Point, other: Point, scale: int) -> list[Any]:
    """What the front's line takes from one of its points to the next, in pixels."""
    from matplotlib.transforms import Bbox

    left, low = axes.transData.transform((one.x, scale * one.mean))
    right, high = axes.transData.transform((other.x, scale * other.mean))
    low_end, high_end = sorted((low, high))
    return [
        Bbox.from_extents(left, low - 1, right, low + 1),
        Bbox.from_extents(right - 1, low_end, right + 1, high_end),
    ]


# bars


def _bars(panels: Sequence[Panel], request: Request) -> "Figure":
    values = [[_values(series.group, request) for series in panel.series] for panel in panels]
    panels, data = with_data(panels, values)
    if not panels:
        raise UsageError(f"no run has a value of {request.metric}. Choose another --metrics.")
    say_single(panels, "interval", request)
    width = WIDTHS[request.width]
    labels = {series.label: broken(series.label, width / 2) for panel in panels for series in panel.series}
    lines = [line for label in labels.values() for line in label.split("\n")]
    longest = LETTER * max(map(len, lines))
    page = Page(request.width, len(panels), max(1, int(width / (longest + 1.3))))
    page.panel_inches = width / page.across - longest - 0.1
    most = max(len(panel.series) for panel in panels)
    for axes, panel, own in zip(page.axes, panels, data, strict=True):
        pairs = sorted(
            zip(panel.series, own, strict=True),
            key=lambda pair: (statistics.fmean(pair[1]) * (1 if request.lower_is_better else -1), pair[0].label),
        )
        for row, (_, numbers) in enumerate(pairs):
            _interval(axes, row, numbers)
        axes.set_yticks(range(len(pairs)), [labels[series.label] for series, _ in pairs])
        axes.set_ylim((most if page.across > 1 else len(pairs)) - 0.4, -0.6)
        _value_axis(axes, own, request)
    head(page, panels)
    for axes, panel in zip(page.axes, panels, strict=True):
        axes.set_xlabel(panel.on_split(textwrap.fill(request.label, int(page.panel_inches / LETTER))))
    intervals = [t_interval(numbers) for own in data for numbers in own]
    key = _interval_key(any(high > low for low, high in intervals))
    page.legend(list(key.values()), list(key), handlelength=1.4)
    row = ROW * max(1 + label.count("\n") for label in labels.values())
    heights = [max(row * len(panel.series), 2 * ROW) for panel in panels]
    return _fit_rows(page, heights)


def _fit_rows(page: Page, heights: Sequence[float]) -> "Figure":
    """Panels of these heights (inches); those side by side are as high as the highest of them."""
    rows = [max(heights[start : start + page.across]) for start in range(0, len(heights), page.across)]
    page.axes[0].get_gridspec().set_height_ratios(rows)
    return page.fit(lambda _: rows[0])


def _values(group: Group, request: Request) -> list[float]:
    """Of each run, times `request.scale`."""
    found = ({**run.summary.get("cost", {}), **run.summary["metrics"][group.setting]} for run in group.runs)
    numbers = (values.get(request.metric) for values in found)
    return [request.scale * value for value in numbers if value is not None]


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """(low, high) of the mean at 95 %; of one value, which has no interval, the value twice."""
    stat = Stat.of(values)
    return stat.interval or (stat.mean or 0.0, stat.mean or 0.0)


def _in_legend(labels: Iterable[str], request: Request) -> list[str]:
    return [broken(label, WIDTHS[request.width] - 0.5) for label in labels]


SEEDS: dict[str, Any] = {"color": GREY, "marker": "o", "ms": 2.2, "alpha": 0.6, "mew": 0, "ls": "", "clip_on": False}


def _interval(axes: "Axes", row: int, values: Sequence[float]) -> None:
    low, high = t_interval(values)
    axes.plot(values, [row + 0.27] * len(values), **SEEDS, label="seeds")  # below, where the interval hides none
    if high > low:
        axes.plot([low, high], [row, row], color=COLOURS[0], lw=1, solid_capstyle="butt", label="interval")
    axes.plot([statistics.fmean(values)], [row], "o", color=COLOURS[0], ms=4.2, mec="white", mew=0.4, clip_on=False,
              label="mean")  # fmt: skip


def _within(request: Request, ends: tuple[float, float]) -> tuple[float, float]:
    """The ends of an axis; those of an accuracy are not beyond 0 and 100 %."""
    return (max(ends[0], 0.0), min(ends[1], 100.0)) if request.metric.endswith("accuracy") else ends


def _interval_key(with_interval: bool) -> dict[str, Any]:
    """{what is drawn: how it looks} for the legend."""
    from matplotlib.lines import Line2D

    mean = {"mean": Line2D([], [], color=COLOURS[0], marker="o", ms=4.2, ls="")}
    interval = {"95 % t interval": Line2D([], [], color=COLOURS[0], lw=1)} if with_interval else {}
    return {**mean, **interval, "each seed": Line2D([], [], **SEEDS)}


def _value_axis(axes: "Axes", data: Sequence[Sequence[float]], request: Request) -> None:
    """Limits from the intervals; an accuracy's axis ends at 0 and 100 %."""
    ends = [end for values in data for end in (*t_interval(values), *values)]
    room = 0.03 * (max(ends) - min(ends)) or 1.0
    axes.set_xlim(_within(request, (min(ends) - room, max(ends) + room)))
    _value_ticks(axes.xaxis)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


# matrix, heat


def _matrix(panels: Sequence[Panel], request: Request) -> "Figure":
    panels, data = with_data(panels, _matrices(panels, request, joint=True))
    cells = [(panel, series, _mean_of(own)) for panel, part in zip(panels, data, strict=True)
             for series, own in zip(panel.series, part, strict=True)]  # fmt: skip
    common, parts = _apart([(series.label, *panel.parts) for panel, series, _ in cells])
    widest = LETTER * max(len(part) for own in parts for part in own) + 0.1
    page = Page(request.width, len(cells), max(1, min(2 if request.width == "column" else 4,
                                                      int(WIDTHS[request.width] / widest))))  # fmt: skip
    for axes, (_, series, values), own in zip(page.axes, cells, parts, strict=True):
        first = series.group.runs[0].get("start_from") or 0
        image = _mesh(axes, values, 0, 100, CMAP)
        lines = [own[0], ", ".join(own[1:])] if len(own) > 1 else own
        axes.set_title("\n".join(broken(line, page.panel_inches) for line in lines))
        for axis, count in ((axes.xaxis, values.shape[1]), (axes.yaxis, values.shape[0])):
            _task_labels(axis, count, page.panel_inches, first)
    for place, axes in enumerate(page.axes):
        if place % page.across == 0:
            axes.set_ylabel("after task")
        if place + page.across >= len(cells):
            axes.set_xlabel("accuracy on task")
    _colour_bar(page, image, panels[0].on_split("accuracy (%)"))
    if common:
        page.figure.suptitle(broken(", ".join(common), WIDTHS[request.width] - 0.1))
    rows, columns = np.max([values.shape for _, _, values in cells], axis=0)
    made = page.fit(lambda width: max(min(width * rows / columns, 2.6), 0.3))
    _write_cells([(axes, values) for axes, (_, _, values) in zip(page.axes, cells, strict=True)], ("{:.1f}", "{:.0f}"))
    return made


def _apart(headings: Sequence[tuple[str, ...]]) -> tuple[list[str], list[list[str]]]:
    """(what all headings have, the rest of each). A single heading keeps its first part, the group's label."""
    common = [part for part in headings[0][len(headings) == 1 :] if all(part in other for other in headings)]
    return common, [[part for part in heading if part not in common] for heading in headings]


def _mean_of(matrices: Sequence[Matrix]) -> np.ndarray:
    """(rows, tasks) in percent: the mean over those that have a value there; nan where none has."""
    shape = (max(map(len, matrices)), max(len(matrix[0]) for matrix in matrices))
    stack = np.full((len(matrices), *shape), np.nan)
    for place, matrix in enumerate(matrices):
        stack[place, : len(matrix), : len(matrix[0])] = 100 * np.array(matrix, dtype=float)
    counts = (~np.isnan(stack)).sum(0)
    return np.divide(np.nansum(stack, 0), counts, out=np.full(shape, np.nan), where=counts > 0)


def _mesh(axes: "Axes", values: np.ndarray, low: float, high: float, cmap: str) -> Any:
    """The first row on top. Cells as vectors; of many tasks an image, which takes less time and room."""
    rows, columns = values.shape
    shown: dict[str, Any] = {"cmap": cmap, "vmin": low, "vmax": high}
    if max(rows, columns) > MARKED:
        image: Any = axes.imshow(np.ma.masked_invalid(values), aspect="auto", interpolation="nearest", **shown)
    else:
        edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
        image = axes.pcolormesh(*edges, np.ma.masked_invalid(values), edgecolors="white", linewidth=0.5, **shown)
        axes.set_ylim(rows - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _task_labels(axis: Any, count: int, inches: float, first: int = 0) -> None:
    """Of all tasks (counted from 0 in `first`) up to ten, if they have room; else of each second, fifth, tenth, ..."""
    letters = len(str(count)) if axis.axis_name == "x" else 1  # side by side, or one below the other
    most = int(inches / (0.3 if count > 10 else 0.08 + 0.035 * letters))
    step = next(
        digit * 10**power for power in itertools.count() for digit in (1, 2, 5) if count <= most * digit * 10**power
    )
    places = [place for place in range(count) if (first + place + 1) % step == 0]
    axis.set_ticks(places, [str(first + place + 1) for place in places])


def _colour_bar(page: Page, image: Any, label: str) -> None:
    bar = page.figure.colorbar(image, ax=page.axes, fraction=0.04, pad=0.02, aspect=30, label=label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.solids.set(rasterized=False, edgecolor="face", linewidth=0)


def _write_cells(cells: Sequence[tuple["Axes", np.ndarray]], formats: Sequence[str]) -> None:
    """Each value in its cell, in the first of the formats that all cells of the picture have room for, if there is
    one."""
    for form in formats:
        if all(_has_room(axes, values, form) for axes, values in cells):
            for axes, values in cells:
                _write_values(axes, values, form)
            return


def _has_room(axes: "Axes", values: np.ndarray, form: str) -> bool:
    """For the longest of the values."""
    longest = max((_number(value, form) for value in values[~np.isnan(values)]), key=len, default="")
    text = axes.text(0, 0, longest)
    width = text.get_window_extent(axes.figure.canvas.get_renderer()).width
    text.remove()
    box, height = axes.get_window_extent(), 1.15 * POINTS * axes.figure.dpi / 72
    return width <= 0.92 * box.width / values.shape[1] and height <= box.height / values.shape[0]


def _write_values(axes: "Axes", values: np.ndarray, form: str) -> None:
    """White on dark cells, dark on light ones."""
    (mesh,) = [*axes.collections, *axes.images]
    for row, column in np.argwhere(~np.isnan(values)):
        red, green, blue, _ = mesh.cmap(mesh.norm(values[row, column]))
        is_dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
        axes.text(
            column, row, _number(values[row, column], form), ha="center", va="center_baseline",
            color="white" if is_dark else INK,
        ).set_in_layout(False)  # fmt: skip


def _number(value: float, form: str) -> str:
    text = form.format(value)
    return text.lstrip("-") if not text.strip("-0.") else text  # no -0.0


@dataclass(frozen=True)
class Crossed:
    """A panel of a heat map: `keys` of its rows and columns as they are written beside and below it (empty where the
    labels are names that say it themselves), and (rows, columns) values in the metric's unit, nan where there is
    none."""

    panel: Panel
    keys: tuple[str, str]
    rows: list[str]
    columns: list[str]
    values: np.ndarray

    @property
    def names(self) -> list[str]:
        """Of the vertical axis, broken where it is short, and of the horizontal one."""
        beside, below = self.keys
        is_short = LETTER * len(beside) > CELL * len(self.rows)
        return [beside.replace(" ", "\n") if is_short else beside, below]


def _heat(panels: Sequence[Panel], request: Request) -> "Figure":
    keys = [key for key in request.by if key != "dataset"]
    crossed = [_crossed(panel, keys, request) for panel in panels]
    shown = [own for own in crossed if not np.isnan(own.values).all()]
    if not shown:
        raise UsageError(f"no run has a value of {request.metric}. Choose another --metrics.")
    share = all((own.keys, own.rows) == (shown[0].keys, shown[0].rows) for own in shown)
    longest = LETTER * max(len(name) for own in shown for name in own.rows)
    longest += ROW * max(len(own.names[0].split("\n")) if own.names[0] else 0 for own in shown)
    title = LETTER * max(len(part) for own in shown for part in own.panel.parts)
    columns = max(0.36 * max(len(own.columns) for own in shown), title) + 0.15
    room = WIDTHS[request.width] - (longest if share else 0)
    page = Page(request.width, len(shown), max(1, int(room / (columns + (0 if share else longest)))))
    page.panel_inches = room / page.across - (0.1 if share else longest)
    for place, (axes, own) in enumerate(zip(page.axes, shown, strict=True)):
        low, high = _colour_ends(own.values, request)
        _mesh(axes, own.values, low, high, f"{CMAP}_r" if request.lower_is_better else CMAP)
        has_rows = not share or place % page.across == 0
        axes.set_yticks(range(len(own.rows)), own.rows if has_rows else [])
        axes.set_ylabel(own.names[0] if has_rows else "")
        axes.set_xticks(range(len(own.columns)), own.columns)
        axes.set_xlabel(own.names[1])
        too_long = LETTER * max(map(len, own.columns)) > page.panel_inches / len(own.columns)
        axes.tick_params(axis="x", rotation=90 if too_long else 0)
    head(page, [own.panel for own in shown])
    said = f"{request.label}, each panel with its own colours" if len(shown) > 1 else request.label
    page.figure.suptitle(shown[0].panel.on_split(broken(said, WIDTHS[request.width] - 0.1)))
    made = _fit_rows(page, [CELL * len(own.rows) for own in shown])
    forms = ("{:,.4g}", "{:.2g}") if request.is_cost else ("{:.1f}", "{:.0f}")
    _write_cells([(axes, own.values) for axes, own in zip(page.axes, shown, strict=True)], forms)
    return made


def _colour_ends(values: np.ndarray, request: Request) -> tuple[float, float]:
    """The values of the lightest and the darkest colour: of percentages at least `SPAN` apart, so that small
    differences look small."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if request.is_cost or high - low >= SPAN:
        return low, high
    return (low + high - SPAN) / 2, (low + high + SPAN) / 2


def _crossed(panel: Panel, keys: Sequence[str], request: Request) -> Crossed:
    """The key with more values makes the rows, so that all labels can be read."""
    groups = {tuple(written(series.group.by[key]) for key in keys): series.group for series in panel.series}
    ranks = {canonical(name): rank for rank, name in enumerate(request.order)}

    def place(word: str, value: Any) -> tuple:
        return ranks.get(canonical(word), len(ranks)), sort_key(value)

    known = [{written(series.group.by[key]): series.group.by[key] for series in panel.series} for key in keys]
    names = [sorted(own, key=lambda word, own=own: place(word, own[word])) for own in known]  # type: ignore[misc]
    row, column = (1, 0) if len(names[0]) <= len(names[1]) else (0, 1)
    values = np.full((len(names[row]), len(names[column])), np.nan)
    for pair, group in groups.items():
        mean = group.stat(request.metric).mean
        if mean is not None:
            values[names[row].index(pair[row]), names[column].index(pair[column])] = request.scale * mean
    labels = [[request.named(word) for word in own] for own in names]
    titles = [named(key, request.names, "" if key in BY else key.replace("_", " ")) for key in keys]
    return Crossed(panel, (titles[row], titles[column]), labels[row], labels[column], values)


DRAW: Mapping[str, Callable[[Sequence[Panel], Request], "Figure"]] = {
    "tasks": _tasks,
    "forgetting": _forgetting,
    "compute": _compute,
    "bars": _bars,
    "matrix": _matrix,
    "heat": _heat,
}
