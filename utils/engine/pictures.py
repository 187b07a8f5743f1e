"""Pictures of runs, as figures that know nothing of each other, of at most `MAX_PIXELS` in either direction.

Only matplotlib's object API and its Agg canvas: no pyplot, so no window, no global figure list, no leak in long runs.
Accuracies come in as fractions and are drawn in percent; tasks are counted from 1. `None` is "not evaluated".
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Matrix = Sequence[Sequence[float | None]]  # [t][j]: after task t, on task j, 0..1

INK, FAINT, GREY = "#222222", "#9aa5b1", "#e4e4e4"
SERIES = ("#2b6cb0", "#dd8452", "#4c9f70", "#8c6bb1", "#c44e52", "#64748b")
MAX_NUMBERED = 12  # tasks up to which a cell is wide enough for its number
MAX_LINES = 20  # tasks up to which each has a line of its own
MAX_PIXELS = 2000
DPI = 120
MATRIX_INCHES = 8.4  # width and height of a matrix of many tasks; 1000 tasks have a pixel each
BORDERED_INCHES = 0.1  # cells from this size on have borders


def accuracy_matrix(matrix: Matrix, title: str, tasks: Sequence[int] | None = None) -> "Figure":
    """The matrix as a heat map, 0..100 %. `tasks` (counted from 0) are those that the rows stand for, if not the first
    ones; without it a 1xT matrix is a joint run's."""
    percent = _percent(matrix)
    rows, columns = percent.shape
    is_numbered = max(rows, columns) <= MAX_NUMBERED
    largest = 0.62 if is_numbered else 0.34
    width, height = (min(largest, MATRIX_INCHES / count) for count in (columns, rows))  # of a cell
    figure = _figure(max(width * columns + 1.9, 4.2), max(height * rows + 1.2, 1.9))
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(percent), cmap="YlGnBu", vmin=0, vmax=100, aspect=height / width)
    _hatch_missing(axes, np.isnan(percent), is_numbered)
    if is_numbered:
        for t, j in np.argwhere(~np.isnan(percent)):
            colour = "white" if percent[t, j] > 60 else INK
            axes.text(j, t, f"{percent[t, j]:.1f}", ha="center", va="center", color=colour, fontsize=9)
    _cell_borders(axes, *((rows, columns) if min(width, height) >= BORDERED_INCHES else (1, 1)))
    size = 9 if is_numbered else 8
    axes.set_xticks(*_task_ticks(range(columns)), fontsize=size)
    axes.set_xlabel("accuracy on task")
    if rows == 1 and columns > 1 and tasks is None:
        axes.set_yticks([0], ["end of\ntraining"], fontsize=size)
    else:
        axes.set_yticks(*_task_ticks(range(rows) if tasks is None else tasks), fontsize=size)
        axes.set_ylabel("after training task")
    axes.set_title(title, fontsize=11, wrap=True)
    beside = axes.inset_axes([1 + 0.18 / (width * columns), 0, 0.16 / (width * columns), 1])  # as high as the matrix
    bar = figure.colorbar(image, cax=beside, label="%", ticks=(0, 100) if rows < 3 else range(0, 101, 20))
    bar.outline.set_visible(False)
    return figure


def confusion(counts: np.ndarray, title: str) -> "Figure":
    """A confusion matrix (K, K) of counts as a heat map: of each true class (row), the share of its images, in %, that
    was taken for each class (column)."""
    totals = counts.sum(1, keepdims=True)
    percent = np.divide(100.0 * counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    size = len(counts)
    cell = min(0.5 if size <= MAX_NUMBERED else 0.3, MATRIX_INCHES / size)
    figure = _figure(max(cell * size + 1.9, 4.2), max(cell * size + 1.2, 2.9))
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(percent), cmap="YlGnBu", vmin=0, vmax=100)
    if size <= MAX_NUMBERED:
        for row, column in np.argwhere(percent >= 0.5):
            colour = "white" if percent[row, column] > 60 else INK
            axes.text(column, row, f"{percent[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    _cell_borders(axes, *((size, size) if cell >= BORDERED_INCHES else (1, 1)))
    places = range(0, size, max(1, -(-size // 20)))
    for ticks in (axes.set_xticks, axes.set_yticks):
        ticks(places, [str(place) for place in places], fontsize=8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("class")
    axes.set_title(title, fontsize=11, wrap=True)
    figure.colorbar(image, ax=axes, label="% of the class's images").outline.set_visible(False)
    return figure


def curves(matrix: Matrix, title: str, tasks: Sequence[int] | None = None) -> "Figure":
    """Average accuracy over the tasks seen so far, and forgetting, after each task. Beside the average each task's own
    accuracy, its number at its end, or, of many tasks, between which accuracies half and 90 % of those seen so far
    lie. `tasks`: which tasks (from 0) rows and columns are, by default the first."""
    percent = _percent(matrix)
    rows, columns = percent.shape
    joint = rows == 1 and columns > 1
    tasks = range(columns) if tasks is None else tasks
    figure = _figure(10.6, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.45, 1))
    figure.suptitle(title, fontsize=11)

    steps = np.arange(1, rows + 1)
    seen = percent.copy()
    if not joint:
        seen[np.arange(columns) > np.arange(rows)[:, None]] = np.nan  # before its training a task is not yet learned
    left.set_ylim(-2, 102 if np.isnan(seen).all() else _top(np.nanmax(seen)))
    if columns <= MAX_LINES:
        _task_lines(left, seen, tasks)
    elif not joint:
        low, lower, upper, high = np.array([_percentiles(row, (5, 25, 75, 95)) for row in seen]).T
        left.fill_between(steps, low, high, color="#dbe4ee", lw=0, label="90 % of the tasks")
        left.fill_between(steps, lower, upper, color="#b4c7dc", lw=0, label="50 %")
    style = {"lw": 2.6, "marker": "o", "ms": 5.5} if rows <= MAX_LINES else {"lw": 1.6}
    average = [_mean(row) for row in seen]
    left.plot(steps, average, color=INK, label="average over tasks seen", zorder=3, **style)
    left.set_ylabel("accuracy (%)")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize=9)

    right.plot(steps[1:], 100 * np.array(forgetting(matrix)), color=SERIES[1], **style)
    right.axhline(0, color=INK, lw=0.8)
    right.set_ylabel("forgetting (%)")
    if rows < 2:
        right.set_ylim(-1, 1)
        right.set_yticks([0])
        right.text(0.5, 0.5, "needs two tasks", transform=right.transAxes, ha="center", va="bottom", color=FAINT)
    places, names = _task_ticks(tasks[:rows], MAX_LINES if rows <= MAX_LINES else 12)
    for axes in (left, right):
        _plain(axes)
        axes.set_xlabel("after training task" if not joint else "after training on all tasks")
        axes.set_xticks(np.array(places) + 1, ["end"] if joint else names, fontsize=8 if rows > 12 else 9)
        axes.set_xlim(1 - 0.4 * max(1, rows / 40), rows + 0.4 * max(1, rows / 40))
    return figure


def _task_lines(axes, seen: np.ndarray, tasks: Sequence[int]) -> None:
    """A line for each of these tasks (a column), told apart by colour, marker and dashes together, and its number at
    its end: the colours of 20 lines alone cannot be, least of all in print or by colour-blind readers."""
    rows, columns = seen.shape
    ends = []
    for j, style in zip(range(columns), _line_styles(), strict=False):
        there = np.flatnonzero(~np.isnan(seen[:, j]))
        if len(there) == 0:
            continue
        name = f"task {tasks[0] + 1}, {tasks[0] + 2}, ..." if j == 0 else None
        axes.plot(there + 1, seen[there, j], lw=1.1, ms=4.5, label=name, mfc="white", mew=1.1, **style)
        ends.append((seen[there[-1], j], there[-1] + 1, f"{tasks[j] + 1}", style))
    top = axes.get_ylim()[1]
    places = _spread([end for end, _, _, _ in ends], apart=top / MAX_LINES, low=0, high=top)
    beside = rows + 0.05 * max(rows, 2)  # right of the frame
    for (end, step, number, style), place in zip(ends, places, strict=True):
        axes.plot((step, beside), (end, place), lw=0.5, ms=4, markevery=[1], mfc="white", clip_on=False,
                  **{**style, "ls": "-"})  # fmt: skip
        axes.text(beside + 0.02 * max(rows, 2), place, number, color=style["color"], fontsize=8, va="center")


def _top(highest: float) -> float:
    """Where an axis of accuracies in percent ends: lines that are all low would lie on each other."""
    return next(1.02 * end for end in (25, 50, 100) if highest <= end)


def _line_styles() -> Iterator[dict]:
    """Styles of which neighbours share nothing, and no two are equal; 30 of them."""
    colours, markers, dashes = SERIES, "os^Dv", ("-", "--", ":", "-.")
    for number in range(len(colours) * len(markers)):
        yield {"color": colours[number % len(colours)], "marker": markers[number % len(markers)],
               "ls": dashes[number % len(dashes)]}  # fmt: skip


def _spread(values: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Places near these values, in their order, at least `apart` from each other, in low..high where that is possible:
    labels that do not cover each other. Groups of labels that touch are centred on their values' mean."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    groups: list[list[int]] = []
    centres: list[float] = []
    for index in order:
        groups.append([index])
        centres.append(values[index])
        while True:
            half = (len(groups[-1]) - 1) * apart / 2
            centres[-1] = min(max(centres[-1], low + half), high - half)
            if len(groups) < 2 or centres[-1] - half - centres[-2] - (len(groups[-2]) - 1) * apart / 2 >= apart:
                break
            last, _ = groups.pop(), centres.pop()
            groups[-1] += last
            centres[-1] = sum(values[own] for own in groups[-1]) / len(groups[-1])
    places = [0.0] * len(values)
    for own, centre in zip(groups, centres, strict=True):
        for rank, index in enumerate(own):
            places[index] = centre + (rank - (len(own) - 1) / 2) * apart
    return places


def forgetting(matrix: Matrix) -> list[float]:
    """After each task from the second on: mean over the old tasks of the best accuracy before minus the one now,
    as `metrics.forgetting_chaudhry18` defines it; the last value is that metric."""
    values = _percent(matrix) / 100
    best = np.fmax.accumulate(values)  # fmax passes over nan
    return [_mean(best[t - 1, :t] - values[t, :t]) for t in range(1, len(values))]


def comparison(rows: Sequence[Mapping], label: str = "final average accuracy (%)") -> "Figure":
    """Bars with error bars. `rows`: mappings with `panel`, `method`, `series` (the setting; bars of one method that
    stand together), `mean` (0..1, None leaves a gap) and `std` (0..1 or None), in the order of drawing. What would be
    too large stands closer together, with as many panels beside each other as make the picture smallest."""
    panels = {row["panel"]: [other for other in rows if other["panel"] == row["panel"]] for row in rows}
    series = list(dict.fromkeys(row["series"] for row in rows))
    across = 2 if len(panels) == 4 else min(3, len(panels))
    slots = max(len({row["method"] for row in own}) for own in panels.values())
    height = slots * (0.16 + 0.18 * len(series)) + 0.85
    width = 3.1 + 0.075 * max(len(row["method"]) for row in rows)

    def size(across: int) -> tuple[float, float]:
        return across * width, -(-len(panels) // across) * height + 0.35 * (len(series) > 1)

    if max(size(across)) > MAX_PIXELS / DPI:
        height = slots * (0.04 + 0.13 * len(series)) + 0.85
        across = min(range(1, len(panels) + 1), key=lambda number: max(size(number)))
    down = -(-len(panels) // across)
    figure = _figure(*size(across))
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
    """An empty figure of this size in inches, bound to the Agg canvas; drawn smaller where it would be too large."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dpi = min(DPI, MAX_PIXELS / max(width, height))
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
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


def _percentiles(values: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """The percentiles without nan, one for each of `shares` (0..100); nan where nothing is left."""
    values = values[~np.isnan(values)]
    return np.percentile(values, shares) if len(values) else np.full(len(shares), np.nan)


def _task_ticks(tasks: Sequence[int], most: int = 20) -> tuple[list[int], list[str]]:
    """Places and labels for an axis whose k-th place stands for `tasks[k]` (from 0): all of them, or, where they are
    more than `most`, the first and each round number."""
    numbers = [task + 1 for task in tasks]
    step = next(step for step in _round_numbers() if len(numbers) <= most * step)
    places = [place for place, number in enumerate(numbers) if number % step == 0 or place == 0]
    if len(places) > 1 and places[1] - places[0] < step / 2:
        del places[0]  # its label would touch the next one
    return places, [str(numbers[place]) for place in places]


def _round_numbers() -> Iterator[int]:
    for power in itertools.count():
        yield from (10**power, 2 * 10**power, 5 * 10**power)


def _hatch_missing(axes, is_missing: np.ndarray, is_each: bool) -> None:
    """Hatches the cells without a value; `is_each`: a patch for each of them, else one behind the whole matrix."""
    from matplotlib.patches import Rectangle

    rows, columns = is_missing.shape
    style = {"facecolor": GREY, "edgecolor": "#c4c4c4", "hatch": "////", "lw": 0}
    if is_each:
        for t, j in np.argwhere(is_missing):
            axes.add_patch(Rectangle((j - 0.5, t - 0.5), 1, 1, **style))
    elif is_missing.any():
        axes.add_patch(Rectangle((-0.5, -0.5), columns, rows, zorder=-1, **style))


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
