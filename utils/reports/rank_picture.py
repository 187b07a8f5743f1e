"""The picture of a critical difference (Demsar, JMLR 2006, figure 1): an axis of mean ranks, a name at each, and bars
that join the groups whose ranks differ by less than it."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flatcl.utils.errors import UsageError
from flatcl.utils.reports._layout import INK, PNG_DPI, ROW, WIDTHS, style
from flatcl.utils.reports._panels import broken, label_of, metric_label, part_of, shared_of
from flatcl.utils.reports.labels import check_names
from flatcl.utils.reports.ranks import Ranks, cliques

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ABOVE, GAP = 0.7, 0.13  # inches: above the axis up to the title, and from one bar to the next
SIDE, ELBOW = 0.05, 0.12  # inches: outside of the names, and between them and the axis
LONG_AXIS, SHORT_AXIS = 1.6, 0.7  # inches: names are broken to keep the first; less than the second cannot be read


def draw(ranks: Ranks, names: Mapping[str, str] = {}, width: str = "column") -> "Figure":
    """The best group is on the right, as in the paper. `names`: labels in place of names, as of `plots.figure`.
    `width`: column (3.5 inches) or page (7). Raises `UsageError` for a name of what is not there, and where the names
    leave no room for the axis."""
    check_names(names, ranks.groups, [ranks.metric])
    with style():
        return _draw(ranks, names, width)


def _draw(ranks: Ranks, names: Mapping[str, str], width: str) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order = sorted(range(len(ranks.means)), key=lambda i: ranks.means[i])
    means, shared = [ranks.means[i] for i in order], shared_of(ranks.groups)
    labels = [f"{label_of(ranks.groups[i], names, shared)} ({ranks.means[i]:.2f})" for i in order]
    figure = Figure(figsize=(WIDTHS[width], 1), dpi=PNG_DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    k, right = len(means), len(means) // 2  # half of the names, the best ones, are on the right
    labels, sides = _fitted(axes, labels, right, width)
    length = WIDTHS[width] - sum(sides)
    parts = [part_of(key, value, names) for key, value in shared.items()]
    title = broken(_title(ranks, parts, names), WIDTHS[width] - 0.1)
    bars = cliques(means, ranks.critical_difference)
    levels = [_levels(labels[:right]), _levels(labels[right:][::-1])[::-1]]
    first = 0.3 + GAP * len(bars)  # inches below the axis: the first name
    above = ABOVE + ROW * (1 + title.count("\n"))
    below = first + max(level for side in levels for level in side) + ROW * (1 + max(map(_breaks, labels))) / 2 + SIDE
    figure.set_figheight(above + below)
    inch = (k - 1) / length  # in ranks
    axes.set(xlim=(k + sides[0] * inch, 1 - sides[1] * inch), ylim=(-below, above))  # ranks fall; inches upwards
    _axis(axes, k, ranks.critical_difference, length)
    for i, (best, worst) in enumerate(bars):
        y, overhang = -0.12 - GAP * i, 0.01 * (k - 1)
        axes.plot([means[worst] + overhang, means[best] - overhang], [y, y], color=INK, linewidth=3.5,
                  solid_capstyle="butt")  # fmt: skip
    for i, (mean, label, level) in enumerate(zip(means, labels, [*levels[0], *levels[1]], strict=True)):
        _name(axes, mean, label, 1 - ELBOW * inch if i < right else k + ELBOW * inch, -first - level, i < right)
    axes.text(0.5, above - 0.03, title, ha="center", va="top", transform=axes.get_yaxis_transform())
    return figure


def _fitted(axes: "Axes", labels: list[str], right: int, width: str) -> tuple[list[str], tuple[float, float]]:
    """(the labels, broken where the axis would be short otherwise; inches that they take at the left and right)."""
    for form in (labels, [label.replace(" + ", " +\n").replace(", ", ",\n") for label in labels]):
        inches = [_inches(axes, label) for label in form]
        sides = tuple(SIDE + max(own) + 0.04 + ELBOW for own in (inches[right:], inches[:right]))
        if WIDTHS[width] - sum(sides) >= LONG_AXIS:
            break
    if WIDTHS[width] - sum(sides) < SHORT_AXIS:
        raise UsageError(
            f"--ranks: the names of the groups leave no room for the axis in {WIDTHS[width]:g} inches. Give --width "
            "page, shorter names with --names, or fewer keys with --by."
        )
    return form, (sides[0], sides[1])


def _inches(axes: "Axes", label: str) -> float:
    text = axes.text(0, 0, label)
    width = text.get_window_extent(axes.figure.canvas.get_renderer()).width
    text.remove()
    return float(width / axes.figure.dpi)


def _levels(labels: Sequence[str]) -> list[float]:
    """Inches from the first label to each one below it."""
    heights = [ROW * (1 + _breaks(label)) for label in labels]
    return [sum(heights[:i]) + (heights[i] - heights[0]) / 2 for i in range(len(labels))]


def _breaks(label: str) -> int:
    return label.count("\n")


def _axis(axes: "Axes", k: int, difference: float, inches: float) -> None:
    axes.plot([1, k], [0, 0], color=INK, linewidth=1)
    every = max(1, math.ceil(0.25 * (k - 1) / inches))
    for tick in range(1, k + 1):
        is_named = (tick - 1) % every == 0
        axes.plot([tick, tick], [0, 0.07 if is_named else 0.035], color=INK, linewidth=1)
        if is_named:
            axes.text(tick, 0.09, str(tick), ha="center", va="bottom")
    start, end = k, k - min(difference, k - 1)
    for x in (start, end):
        axes.plot([x, x], [0.35, 0.45], color=INK, linewidth=1)
    axes.plot([start, end], [0.4, 0.4], color=INK, linewidth=1)
    more = " (longer than the axis)" if difference > k - 1 else ""
    axes.text((start + end) / 2, 0.47, f"CD = {difference:.2f}{more}", ha="center", va="bottom")


def _name(axes: "Axes", mean: float, label: str, x: float, y: float, is_right: bool) -> None:
    axes.plot([mean, mean, x], [0, y, y], color=INK, linewidth=0.8)
    axes.annotate(label, (x, y), (3 if is_right else -3, 0), textcoords="offset points", va="center_baseline",
                  ha="left" if is_right else "right")  # fmt: skip


def _title(ranks: Ranks, shared: Sequence[str], names: Mapping[str, str]) -> str:
    test = [] if ranks.p is None else [f"Friedman p {'< 0.001' if ranks.p < 0.001 else f'= {ranks.p:.3f}'}"]
    what = f"mean rank of {metric_label(ranks.metric, names)} over {ranks.num_blocks} blocks"
    return ", ".join([*shared, what, *test, *ranks.split_notes])
