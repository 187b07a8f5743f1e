"""Pictures of runs, as figures that know nothing of each other.

Only matplotlib's object API and its Agg canvas: no pyplot, so no window, no global figure list, no leak in long runs.
Accuracies come in as fractions and are drawn in percent; tasks are counted from 1. `None` is "not evaluated".
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Matrix = Sequence[Sequence[float | None]]  # [t][j]: after task t, on task j, 0..1

INK, FAINT, GREY = "#222222", "#9aa5b1", "#e4e4e4"
SERIES = ("#2b6cb0", "#dd8452", "#4c9f70", "#8c6bb1", "#c44e52", "#64748b")
MAX_NUMBERED = 12  # tasks up to which a cell is wide enough for its number


def accuracy_matrix(matrix: Matrix, title: str, tasks: Sequence[int] | None = None) -> "Figure":
    """The matrix as a heat map, 0..100 %. `tasks` (counted from 0) are those that the rows stand for, if not the first
    ones; without it a 1xT matrix is a joint run's."""
    from matplotlib.patches import Rectangle

    percent = _percent(matrix)
    rows, columns = percent.shape
    cell = 0.62 if columns <= MAX_NUMBERED else 0.34
    figure = _figure(max(cell * columns + 1.9, 4.2), max(cell * rows + 1.2, 1.9))
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(percent), cmap="YlGnBu", vmin=0, vmax=100)
    for t, j in np.argwhere(np.isnan(percent)):
        axes.add_patch(Rectangle((j - 0.5, t - 0.5), 1, 1, facecolor=GREY, edgecolor="#c4c4c4", hatch="////", lw=0))
    if columns <= MAX_NUMBERED:
        for t, j in np.argwhere(~np.isnan(percent)):
            colour = "white" if percent[t, j] > 60 else INK
            axes.text(j, t, f"{percent[t, j]:.1f}", ha="center", va="center", color=colour, fontsize=9)
    _cell_borders(axes, rows, columns)
    size = 9 if columns <= MAX_NUMBERED else 8
    axes.set_xticks(range(columns), [str(j + 1) for j in range(columns)], fontsize=size)
    axes.set_xlabel("accuracy on task")
    if rows == 1 and columns > 1 and tasks is None:
        axes.set_yticks([0], ["end of\ntraining"], fontsize=size)
    else:
        axes.set_yticks(range(rows), [str(t + 1) for t in (range(rows) if tasks is None else tasks)], fontsize=size)
        axes.set_ylabel("after training task")
    axes.set_title(title, fontsize=11, wrap=True)
    beside = axes.inset_axes([1 + 0.18 / (cell * columns), 0, 0.16 / (cell * columns), 1])  # as high as the matrix
    bar = figure.colorbar(image, cax=beside, label="%", ticks=(0, 100) if rows < 3 else range(0, 101, 20))
    bar.outline.set_visible(False)
    return figure


def curves(matrix: Matrix, title: str) -> "Figure":
    """Average accuracy over the tasks seen so far (and each task's own), and forgetting, after each task."""
    percent = _percent(matrix)
    rows, columns = percent.shape
    joint = rows == 1 and columns > 1
    figure = _figure(9.6, 3.9)
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=11)

    steps = np.arange(1, rows + 1)
    for j in range(columns):
        own = percent[:, j].copy()
        own[: 0 if joint else j] = np.nan  # before its own training a task is not yet learned
        left.plot(steps, own, color=FAINT, lw=0.9, marker=".", ms=3, label="each task" if j == 0 else None)
    average = [_mean(percent[t] if joint else percent[t, : t + 1]) for t in range(rows)]
    left.plot(steps, average, color=SERIES[0], lw=2.4, marker="o", ms=5, label="average over tasks seen")
    left.set_ylim(-2, 102)
    left.set_ylabel("accuracy (%)")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False, fontsize=9)

    right.plot(steps[1:], 100 * np.array(forgetting(matrix)), color=SERIES[1], lw=2.4, marker="o", ms=5)
    right.axhline(0, color=INK, lw=0.8)
    right.set_ylabel("forgetting (%)")
    if rows < 2:
        right.set_ylim(-1, 1)
        right.set_yticks([0])
        right.text(0.5, 0.5, "needs two tasks", transform=right.transAxes, ha="center", va="bottom", color=FAINT)
    for axes in (left, right):
        _plain(axes)
        axes.set_xlabel("after training task" if not joint else "after training on all tasks")
        shown = steps if rows <= 20 else steps[:: rows // 10]
        axes.set_xticks(shown, ["end"] if joint else [str(step) for step in shown], fontsize=8 if rows > 12 else 9)
        axes.set_xlim(0.6, rows + 0.4)
    return figure


def forgetting(matrix: Matrix) -> list[float]:
    """After each task from the second on: mean over the old tasks of the best accuracy before minus the one now,
    as `metrics.forgetting_chaudhry18` defines it; the last value is that metric."""
    values = _percent(matrix) / 100
    found = []
    for t in range(1, len(values)):
        drops = [_best(values[:t, j]) - values[t, j] for j in range(min(t, values.shape[1]))]
        found.append(_mean(np.array(drops)))
    return found


def comparison(rows: Sequence[Mapping], label: str = "final average accuracy (%)") -> "Figure":
    """Bars with error bars. `rows`: mappings with `panel`, `method`, `series` (the setting; bars of one method that
    stand together), `mean` (0..1, None leaves a gap) and `std` (0..1 or None), in the order of drawing."""
    panels = {row["panel"]: [other for other in rows if other["panel"] == row["panel"]] for row in rows}
    series = list(dict.fromkeys(row["series"] for row in rows))
    across = 2 if len(panels) == 4 else min(3, len(panels))
    down = -(-len(panels) // across)
    slots = max(len({row["method"] for row in own}) for own in panels.values())
    height = slots * (0.16 + 0.18 * len(series)) + 0.85
    longest = max(len(row["method"]) for row in rows)
    figure = _figure(across * (3.1 + 0.075 * longest), down * height + 0.35 * (len(series) > 1))
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, (panel, own) in zip(grid, panels.items(), strict=False):
        _bars(axes, own, series)
        axes.set_title(panel, fontsize=10)
        axes.set_xlabel(label, fontsize=9)
    for axes in grid[len(panels) :]:
        axes.remove()
    if len(series) > 1:
        figure.legend(*_handles(series), loc="outside upper center", ncols=len(series), frameon=False, fontsize=9)
    return figure


def save(figure: "Figure", path: str | os.PathLike) -> None:
    """Write a PNG; a reader sees the old file or the new one, never half of it."""
    _settle(figure)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            figure.canvas.print_png(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_array(figure: "Figure") -> np.ndarray:
    """(H, W, 3) uint8, as TensorBoard's `add_image(..., dataformats="HWC")` wants it."""
    _settle(figure)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, bound to the Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09)
    FigureCanvasAgg(figure)
    return figure


def _settle(figure: "Figure") -> None:
    """Lays the figure out once: each further draw would move things by a pixel, and file and array would differ."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _percent(matrix: Matrix) -> np.ndarray:
    """(rows, tasks) float64 in percent; nan where the matrix has None. Rows may be ragged, as after an early stop."""
    width = max(len(row) for row in matrix)
    padded = [[*row, *[None] * (width - len(row))] for row in matrix]
    return 100 * np.array(padded, dtype=float)


def _mean(values: np.ndarray) -> float:
    """The mean without nan; nan where nothing is left (numpy would warn)."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def _best(values: np.ndarray) -> float:
    return float(np.fmax.reduce(values))  # fmax passes over nan, without a warning where all are


def _cell_borders(axes, rows: int, columns: int) -> None:
    """White lines between the cells, drawn as the grid of minor ticks; no frame, no tick marks."""
    axes.set_xticks(np.arange(columns - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(rows - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GREY, lw=0.8)
    axes.set_axisbelow(True)


def _bars(axes, rows: list[Mapping], series: list[str]) -> None:
    """Horizontal bars, so that long names of methods stay readable; the first method is on top."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    own = [name for name in series if any(row["series"] == name for row in rows)]
    thick = 0.8 / len(own)
    ends = [0.0]
    for row in rows:
        if row["mean"] is None:
            continue
        mean, std = 100 * row["mean"], 100 * (row["std"] or 0)
        at = methods.index(row["method"]) + (own.index(row["series"]) - (len(own) - 1) / 2) * thick
        axes.barh(at, mean, 0.92 * thick, color=SERIES[series.index(row["series"]) % len(SERIES)])
        if row["std"] is not None:
            axes.errorbar(mean, at, xerr=std, color=INK, lw=1, capsize=2)
        end = mean + std if mean >= 0 else mean - std
        axes.annotate(f"{mean:.1f}", (end, at), (4 if mean >= 0 else -4, 0), textcoords="offset points", fontsize=8,
                      va="center", ha="left" if mean >= 0 else "right")  # fmt: skip
        ends.append(end)
    low, high = min(ends), max(ends)
    room = 0.16 * (high - low)  # for the numbers at the bars' ends
    axes.set_xlim(low - room if low < 0 else 0, high + room if high > 0 or low < 0 else 1)
    axes.set_yticks(range(len(methods)), methods, fontsize=9)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=GREY, lw=0.8)
    axes.set_axisbelow(True)


def _handles(series: list[str]) -> tuple[list, list[str]]:
    from matplotlib.patches import Patch

    return [Patch(color=SERIES[place % len(SERIES)]) for place in range(len(series))], series
