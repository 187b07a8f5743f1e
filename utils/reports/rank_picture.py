"""The picture of a critical difference (Demsar, JMLR 2006, figure 1): an axis of mean ranks, a name at each, and bars
that join the groups whose ranks differ by less than it."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from flatcl.utils.reports.ranks import Ranks, cliques

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
AXIS, LINE, LETTER = 4.3, 0.24, 0.078  # inches: the axis, from one name to the next, a letter of a name
ABOVE, GAP = 0.95, 0.13  # inches above the axis, and between two bars


def draw(ranks: Ranks) -> "Figure":
    """The best group is on the right, as in the paper."""
    from matplotlib.figure import Figure

    order = sorted(range(len(ranks.means)), key=lambda i: ranks.means[i])
    means, labels = [ranks.means[i] for i in order], [ranks.labels[i] for i in order]
    bars = cliques(means, ranks.critical_difference)
    k, right = len(means), len(means) // 2
    top = 0.45 + GAP * len(bars)  # inches below the axis: the first name
    height = ABOVE + top + LINE * (k - right - 1) + 0.2
    margin = 0.35 + LETTER * max(len(f"{label} (0.00)") for label in labels)
    figure = Figure(figsize=(AXIS + 2 * margin, height))
    axes = figure.add_axes((0, 0, 1, 1))
    room = margin * (k - 1) / AXIS
    axes.set(xlim=(k + room, 1 - room), ylim=(ABOVE - height, ABOVE))  # ranks fall to the right; inches upwards
    axes.axis("off")
    _axis(axes, k, ranks.critical_difference)
    for i, (first, last) in enumerate(bars):
        y, overhang = -0.18 - GAP * i, 0.01 * (k - 1)
        axes.plot([means[last] + overhang, means[first] - overhang], [y, y], color="black", linewidth=3.5,
                  solid_capstyle="butt")  # fmt: skip
    for i, (mean, label) in enumerate(zip(means, labels, strict=True)):
        is_right = i < right
        level = i if is_right else k - 1 - i
        x = 1 - 0.15 * (k - 1) / AXIS if is_right else k + 0.15 * (k - 1) / AXIS
        _name(axes, mean, label, x, -top - LINE * level, is_right)
    axes.text((k + 1) / 2, 0.82, _title(ranks), ha="center", va="center", fontsize=8.5)
    return figure


def _axis(axes, k: int, difference: float) -> None:
    axes.plot([1, k], [0, 0], color="black", linewidth=1)
    every = max(1, math.ceil(k / 12))
    for tick in range(1, k + 1):
        is_named = (tick - 1) % every == 0
        axes.plot([tick, tick], [0, 0.08 if is_named else 0.04], color="black", linewidth=1)
        if is_named:
            axes.text(tick, 0.1, str(tick), ha="center", va="bottom", fontsize=8)
    start, end = k, k - min(difference, k - 1)
    for x in (start, end):
        axes.plot([x, x], [0.4, 0.5], color="black", linewidth=1)
    axes.plot([start, end], [0.45, 0.45], color="black", linewidth=1)
    more = " (longer than the axis)" if difference > k - 1 else ""
    axes.text((start + end) / 2, 0.52, f"CD = {difference:.2f}{more}", ha="center", va="bottom", fontsize=8)


def _name(axes, mean: float, label: str, x: float, y: float, is_right: bool) -> None:
    axes.plot([mean, mean, x], [0, y, y], color="black", linewidth=0.8)
    text = f" {label} ({mean:.2f})" if is_right else f"{label} ({mean:.2f}) "
    axes.text(x, y, text, ha="left" if is_right else "right", va="center", fontsize=8.5)


def _title(ranks: Ranks) -> str:
    test = "" if ranks.p is None else f", Friedman p {'< 0.001' if ranks.p < 0.001 else f'= {ranks.p:.3f}'}"
    return f"mean rank of {ranks.metric.replace('_', ' ')} over {ranks.num_blocks} blocks{test}"


def save(ranks: Ranks, path: str | Path) -> None:
    """Writes the picture in the format of the file's name (one of `FORMATS`), whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draw(ranks).savefig(temporary, format=path.suffix[1:].lower(), dpi=160)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
