"""Pictures of several methods, read back from the figure's artists; every expected number is worked out in the test."""

import itertools
import json
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from flatcl.utils import metrics
from flatcl.utils.commands import report
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import ROOT
from flatcl.utils.reports import _layout, plots
from flatcl.utils.reports import runs as finished

MATRIX = [[0.9, 0.0, 0.0], [0.7, 0.8, 0.0], [0.6, 0.5, 0.7]]  # averages .9 .75 .6; forgetting .2, (.3 + .3) / 2
SECOND = [[1.0, 0.0, 0.0], [0.8, 0.9, 0.0], [0.8, 0.9, 1.0]]  # averages 1 .85 .9; forgetting .2, (.2 + 0) / 2


def make_run(root, model="er", optimizer="sgd", seed=0, matrix=MATRIX, settings=("class-il",), dataset="seq-digits",
             buffer_size=100, cost=None, metric=None, **flags):  # fmt: skip
    """A run folder as the trainer lays it out; `matrix` None: from before matrices were kept."""
    values = {"model": model, "dataset": dataset, "optimizer": optimizer, "seed": seed, **flags}
    if buffer_size:
        values["buffer_size"] = buffer_size
    name = "-".join(map(str, values.values()))
    folder = root / dataset / name
    folder.mkdir(parents=True)
    numbers = {"final_average_accuracy": 0.6, "forgetting_chaudhry18": 0.3, "average_incremental_accuracy": 0.75}
    summary = {
        "model": model, "dataset": dataset, "optimizer": optimizer, "setting": settings[0], "seed": seed,
        "status": "finished", "metrics": dict.fromkeys(settings, numbers | (metric or {})), "config_hash": name,
        "cost": cost or {"train_s": 10.0, "forward_rows": 10**6, "backward_rows": 10**6},
    }  # fmt: skip
    if matrix is not None:
        summary["accuracy"] = dict.fromkeys(settings, matrix)
    (folder / "summary.json").write_text(json.dumps(summary))
    entries = {key: {"value": value, "origin": "argv"} for key, value in values.items()}
    (folder / "config.json").write_text(json.dumps({"protocol": 1, "flags": entries}))
    return folder


@pytest.fixture
def two_by_two(tmp_path):
    for model, optimizer in itertools.product(("er", "derpp"), ("sgd", "sam")):
        for seed, matrix in enumerate((MATRIX, SECOND)):
            make_run(tmp_path / "results", model, optimizer, seed, matrix)
    return tmp_path / "results"


def draw(kind, folder, **options):
    said = []
    figure = plots.figure(kind, finished.load_runs([folder]), say=said.append, **options)
    return figure, said


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def cells(axes):
    """{(row, column): text} of the texts in cells."""
    return {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}


# accuracy matrices of runs


def test_matrices_come_from_run_folders_of_either_file(tmp_path):
    make_run(tmp_path, seed=0)
    make_run(tmp_path, seed=1, matrix=None)
    both = make_run(tmp_path, seed=2, matrix=SECOND)
    (both / "accuracy.json").write_text(json.dumps({"tasks": [0, 1, 2], "accuracy": {"class-il": MATRIX}}))
    runs = finished.load_runs([tmp_path])
    assert not any("accuracy" in run.summary for run in runs)
    assert finished.load_matrices(runs) == [{"class-il": MATRIX}, {}, {"class-il": MATRIX}]


def test_matrices_have_the_columns_of_the_trained_tasks(tmp_path):
    wide = [[0.1, *row, 0.2] for row in MATRIX]
    make_run(tmp_path, seed=0, matrix=wide, start_from=1)
    make_run(tmp_path, seed=1, matrix=[[0.5, 0.6, 0.7]], metric={"average_incremental_accuracy": None})  # joint
    make_run(tmp_path, seed=2, matrix=[[0.5, 0.6, 0.7]])  # stopped after its first task
    found = [own["class-il"] for own in finished.load_matrices(finished.load_runs([tmp_path]))]
    assert found == [MATRIX, [[0.5, 0.6, 0.7]], [[0.5]]]


@pytest.mark.parametrize("content", [[[0.5, 1.5]], [["a"]], [[True]], [[0.1], [0.1, 0.2]], 7, None, [], [5]])
def test_what_is_no_matrix_counts_as_none(content, tmp_path):
    make_run(tmp_path, matrix=content)
    assert finished.load_matrices(finished.load_runs([tmp_path])) == [{}]


def test_a_record_keeps_matrices_of_few_tasks_in_five_decimals(tmp_path):
    make_run(tmp_path / "a", seed=0, matrix=[[1 / 3, None], [2 / 3, 1.0]])
    make_run(tmp_path / "a", seed=1, matrix=[[0.5] * 51] * 51)
    make_run(tmp_path / "a", seed=2, matrix=None)
    (tmp_path / "b").mkdir()
    finished.write_record(finished.load_runs([tmp_path / "a"]), tmp_path / "b" / "runs.jsonl")
    lines = [json.loads(line)["summary"] for line in (tmp_path / "b" / "runs.jsonl").read_text().splitlines()]
    assert [line.get("accuracy") for line in lines] == [{"class-il": [[0.33333, None], [0.66667, 1.0]]}, None, None]
    runs = finished.load_runs([tmp_path / "b"])
    assert not any("accuracy" in run.summary for run in runs), "tables of many runs need no matrices"
    assert finished.load_matrices(runs) == [{"class-il": [[0.33333, None], [0.66667, 1.0]]}, {}, {}]
    finished.write_record(runs, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "b" / "runs.jsonl").read_bytes()


def test_a_record_that_changed_since_gives_no_other_runs_matrix(tmp_path):
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "a", seed=1, matrix=SECOND)
    file = tmp_path / "b" / "runs.jsonl"
    file.parent.mkdir()
    finished.write_record(finished.load_runs([tmp_path / "a"]), file)
    runs = finished.load_runs([file.parent])
    file.write_text("".join(line + "\n" for line in reversed(file.read_text().splitlines())))
    assert finished.load_matrices(runs) == [{}, {}]


# what is drawn


def test_tasks_are_the_means_of_average_accuracies_with_a_band(two_by_two):
    figure, said = draw("tasks", two_by_two)
    (axes,) = figure.axes
    assert axes.get_title() == "seq-digits, buffer 100, class-il" and said == []
    assert legend_of(figure) == ["derpp + sam", "derpp + sgd", "er + sam", "er + sgd"]
    for line, band in zip(axes.lines, axes.collections, strict=True):
        assert line.get_xdata() == pytest.approx([1, 2, 3])
        assert line.get_ydata() == pytest.approx([95, 80, 75])
        outline = band.get_paths()[0].vertices
        spread = 100 * statistics.stdev([0.6, 0.9])
        assert {round(y, 6) for x, y in outline if x == 3} == {round(75 - spread, 6), round(75 + spread, 6)}
    assert axes.get_xlabel() == "tasks learned" and axes.get_ylabel() == "average accuracy (%)"


@pytest.mark.parametrize("kind", ["tasks", "bars", "compute"])
def test_accuracies_end_at_0_and_100(kind, tmp_path):
    for place, low in enumerate((0.96, 0.0)):  # means 98 and 2, standard deviations 2.8
        for seed, value in enumerate((low, low + 0.04)):
            cost = {"forward_rows": 10**6, "backward_rows": 10**6}
            make_run(tmp_path / str(place), seed=seed, matrix=[[value, 0.0], [value, value]],
                     metric={"final_average_accuracy": value}, cost=cost)  # fmt: skip
        (axes,) = draw(kind, tmp_path / str(place))[0].axes
        ends = axes.get_xlim() if kind == "bars" else axes.get_ylim()
        assert ends[1 - place] == (100, 0)[place] and 0 <= min(ends) and max(ends) <= 100
        if kind == "tasks":
            outline = axes.collections[0].get_paths()[0].vertices[:, 1]
            assert (outline.max(), outline.min())[place] == (100, 0)[place]
        points = [line for line in axes.lines if line.get_marker() not in ("", "None")]
        assert points and not any(line.get_clip_on() for line in points), "a point at the end is drawn whole"


def test_many_lines_have_no_bands_and_a_note_says_so(tmp_path):
    for number, (seed, matrix) in itertools.product(range(7), enumerate((MATRIX, SECOND))):
        make_run(tmp_path, f"m{number}", seed=seed, matrix=matrix)
    for kind in ("tasks", "forgetting"):
        figure, said = draw(kind, tmp_path)
        assert not figure.axes[0].collections and len(figure.axes[0].lines) == 7
        assert "note: no bands, since more than 6 would cover each other. The tables have the spread." in said
    runs = finished.select(finished.load_runs([tmp_path]), {"model": "m0,m1,m2,m3,m4,m5"})
    said = []
    assert len(plots.figure("tasks", runs, say=said.append).axes[0].collections) == 6 and said == []


def test_forgetting_is_the_metric_after_each_task(two_by_two):
    figure, _ = draw("forgetting", two_by_two)
    expected = [[metrics.forgetting_chaudhry18(matrix[:t]) for t in (2, 3)] for matrix in (MATRIX, SECOND)]
    assert expected == [pytest.approx([0.2, 0.3]), pytest.approx([0.2, 0.1])]
    for line in figure.axes[0].lines:
        assert line.get_xdata() == pytest.approx([2, 3]) and line.get_ydata() == pytest.approx([20, 20])


def test_each_dataset_buffer_and_setting_has_a_panel_and_equal_labels_equal_styles(tmp_path):
    for dataset, settings in (("seq-digits", ("class-il", "task-il")), ("perm-mnist", ("domain-il",))):
        for model, buffer_size in (("er", 100), ("er", 200), ("sgd", None)):
            make_run(tmp_path, model, dataset=dataset, settings=settings, buffer_size=buffer_size)
    figure, said = draw("tasks", tmp_path, width="page", names={"seq_digits": "Digits", "200": "M = 200"})
    titles = [axes.get_title().replace("\n", ", ") for axes in figure.axes]
    assert [title.removeprefix("sgd, ") for title in titles] == [
        "perm-mnist, buffer 100, domain-il", "perm-mnist, M = 200, domain-il", "Digits, buffer 100, class-il",
        "Digits, buffer 100, task-il", "Digits, M = 200, class-il", "Digits, M = 200, task-il",
    ]  # fmt: skip
    assert legend_of(figure) == ["er", "sgd"], "the method without a buffer is in each panel"
    looks = [[(line.get_color(), line.get_marker()) for line in axes.lines] for axes in figure.axes]
    assert len(looks[0]) == 2 and all(own == looks[0] for own in looks)
    assert said == ["note: no band where there is one run only: er, sgd."]


def test_lines_differ_without_colour_and_many_lines_are_said(tmp_path):
    for number in range(25):
        make_run(tmp_path, f"m{number:02}")
    figure, said = draw("tasks", tmp_path)
    looks = {(line.get_marker(), str(line._dash_pattern)) for line in figure.axes[0].lines}
    assert len(looks) == 25
    assert any(line.startswith("note: 25 lines; a picture with at most 10 is easier to read") for line in said)
    assert len({(style.marker, style.dashes) for style in map(plots.Style.number, range(60))}) == 60
    assert "#F0E442" not in _layout.COLOURS and len(set(_layout.COLOURS)) == 7


def test_compute_marks_what_nothing_else_beats(tmp_path):
    points = {"a": (1, 0.5), "b": (2, 0.8), "c": (3, 0.7), "d": (4, 0.9), "e": (5, 0.9)}
    for model, (cost, accuracy) in points.items():
        rows = {"forward_rows": cost * 10**6, "backward_rows": cost * 10**6, "train_s": 60 / cost}
        make_run(tmp_path, model, cost=rows, metric={"final_average_accuracy": accuracy})
    make_run(tmp_path, "old", cost={"train_s": 5.0})
    figure, said = draw("compute", tmp_path)
    (axes,) = figure.axes
    front = next(line for line in axes.lines if line.get_label() == "Pareto front")
    assert front.get_xdata() == pytest.approx([3, 6, 12]) and front.get_ydata() == pytest.approx([50, 80, 90])
    dots = {(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines if line is not front}
    assert sorted(dots) == [pytest.approx((3 * cost, 100 * accuracy)) for cost, accuracy in points.values()]
    assert axes.get_xlabel() == "training cost (million images,\nforward + 2 × backward)"
    assert legend_of(figure)[-1] == "Pareto front" and "old" not in legend_of(figure)
    assert "note: left out, without final_average_accuracy or rows: old." in said
    assert front.is_dashed() and all(front.zorder < line.zorder for line in axes.lines if line is not front)
    figure, _ = draw("compute", tmp_path, x="train_s", metric="forgetting_chaudhry18")
    front = next(line for line in figure.axes[0].lines if line.get_label() == "Pareto front")
    assert front.get_xdata() == pytest.approx([5]), "all forget the same: the fastest is the front"
    assert figure.axes[0].get_xlabel() == "training time (s)"


def test_bars_are_sorted_by_merit_with_t_intervals_and_seeds(tmp_path):
    for model, values in {"low": (0.5, 0.6, 0.7), "high": (0.8, 0.8, 0.8), "one": (0.65,)}.items():
        for seed, value in enumerate(values):
            metric = {"final_average_accuracy": value, "forgetting_chaudhry18": value}
            make_run(tmp_path, model, seed=seed, metric=metric)
    figure, said = draw("bars", tmp_path)
    (axes,) = figure.axes
    assert ticks(axes.yaxis) == ["high", "one", "low"] and axes.yaxis_inverted()
    drawn = {name: [line for line in axes.lines if line.get_label() == name] for name in ("mean", "interval", "seeds")}
    assert [line.get_xdata()[0] for line in drawn["mean"]] == pytest.approx([80, 65, 60])
    half = 4.302653 * 10 / 3**0.5  # t(.975, 2), standard deviation 10
    (interval,) = drawn["interval"]
    assert interval.get_xdata() == pytest.approx([60 - half, 60 + half])
    assert sorted(drawn["seeds"][2].get_xdata()) == pytest.approx([50, 60, 70])
    assert said == ["note: no interval where there is one run only: one."]
    figure, _ = draw("bars", tmp_path, metric="forgetting_chaudhry18")
    assert ticks(figure.axes[0].yaxis) == ["low", "one", "high"]
    assert figure.axes[0].get_xlabel() == "average forgetting (%)"


def test_bars_of_single_runs_have_no_interval_in_the_legend(tmp_path):
    for model in ("er", "derpp"):
        make_run(tmp_path, model, metric={"final_average_accuracy": 0.5})
    assert legend_of(draw("bars", tmp_path)[0]) == ["mean", "each seed"]
    make_run(tmp_path, "er", seed=1, metric={"final_average_accuracy": 0.6})
    assert legend_of(draw("bars", tmp_path)[0]) == ["mean", "95 % t interval", "each seed"]


def test_matrices_stand_side_by_side_with_values_on_one_scale(two_by_two):
    figure, _ = draw("matrix", two_by_two, width="page")
    *panels, bar = figure.axes
    assert [axes.get_title() for axes in panels] == ["derpp + sam", "derpp + sgd", "er + sam", "er + sgd"]
    for axes in panels:
        (mesh,) = axes.collections
        assert mesh.get_clim() == (0, 100)
        assert np.asarray(mesh.get_array()).reshape(3, 3)[2] == pytest.approx([70, 70, 85])
        assert cells(axes)[2, 2] == "85.0" and cells(axes)[0, 1] == "0.0" and len(cells(axes)) == 9
    assert bar.get_ylabel() == "accuracy (%)"


def test_matrices_have_above_them_what_all_share(tmp_path):
    for model in ("er", "derpp"):
        make_run(tmp_path, model, settings=("class-il", "task-il"))
    figure, _ = draw("matrix", tmp_path, width="page")
    assert figure.get_suptitle() == "sgd, seq-digits, buffer 100"
    titles = [axes.get_title() for axes in figure.axes[:-1]]
    assert sorted(titles) == ["derpp\nclass-il", "derpp\ntask-il", "er\nclass-il", "er\ntask-il"]
    runs = finished.select(finished.load_runs([tmp_path]), {"model": "er"})
    figure = plots.figure("matrix", runs)
    assert figure.get_suptitle() == "er + sgd, seq-digits, buffer 100"
    assert [axes.get_title() for axes in figure.axes[:-1]] == ["class-il", "task-il"]
    figure = plots.figure("matrix", runs, setting="class-il")
    assert (figure.get_suptitle(), figure.axes[0].get_title()) == ("seq-digits, buffer 100, class-il", "er + sgd")


@pytest.mark.parametrize("width", plots.WIDTHS)
def test_matrices_of_up_to_10_tasks_have_all_ticks_where_they_fit(width, tmp_path):
    for model in ("er", "derpp"):
        make_run(tmp_path, model, matrix=[[0.5] * 10] * 10, settings=("class-il", "task-il"))
    figure, _ = draw("matrix", tmp_path, width=width)
    figure.draw_without_rendering()
    for axes in figure.axes[:-1]:
        assert ticks(axes.yaxis) == [str(task) for task in range(1, 11)]
        assert ticks(axes.xaxis) == ["2", "4", "6", "8", "10"]
    figure, _ = draw("matrix", tmp_path, width="page", setting="class-il")
    figure.draw_without_rendering()
    for axes in figure.axes[:-1]:
        assert ticks(axes.xaxis) == ticks(axes.yaxis) == [str(task) for task in range(1, 11)]
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


def test_matrices_of_many_tasks_have_no_values_and_no_missing_ones(tmp_path):
    seen = [[0.5 if j <= t else None for j in range(30)] for t in range(30)]
    make_run(tmp_path, matrix=seen)
    figure, _ = draw("matrix", tmp_path)
    axes = figure.axes[0]
    assert not list(axes.texts) and axes.images[0].get_array().mask.sum() == 30 * 29 / 2
    assert len(ticks(axes.xaxis)) <= 10 and ticks(axes.xaxis)[-1] == "30"


def test_heat_has_the_mean_of_each_pair(tmp_path):
    for place, (model, optimizer) in enumerate(itertools.product(("er", "derpp"), ("sgd", "sam", "asam"))):
        if (model, optimizer) != ("er", "asam"):
            make_run(tmp_path, model, optimizer, metric={"final_average_accuracy": 0.5 + place / 10})
    figure, _ = draw("heat", tmp_path, order=["sgd", "er"], names={"er": "ER"})
    (axes,) = figure.axes
    assert ticks(axes.yaxis) == ["sgd", "asam", "sam"] and ticks(axes.xaxis) == ["ER", "derpp"]
    assert cells(axes) == {(0, 0): "50.0", (0, 1): "80.0", (2, 0): "60.0", (2, 1): "90.0", (1, 1): "100.0"}


@pytest.mark.parametrize("width", plots.WIDTHS)
def test_heat_names_axes_of_other_keys_and_orders_numbers(width, tmp_path):
    for model, n_epochs in itertools.product(("er", "derpp"), (2, 10, 30)):
        make_run(tmp_path, model, n_epochs=n_epochs, settings=("class-il", "task-il"))
    figure, _ = draw("heat", tmp_path, by=["model", "n_epochs"], width=width)
    first = figure.axes[0]
    assert first.get_ylabel().replace("\n", " ") == "n epochs" and ticks(first.yaxis) == ["2", "10", "30"]
    assert {axes.get_xlabel() for axes in figure.axes} == {""}
    figure, _ = draw("heat", tmp_path, by=["n_epochs", "buffer_size"], mix=True)
    assert figure.axes[0].get_xlabel() == "buffer size"


def test_heat_shows_small_differences_small_and_says_that_panels_have_their_own_colours(tmp_path):
    for model, optimizer in itertools.product(("er", "derpp"), ("sgd", "sam")):
        value = {"er": 0.978, "derpp": 0.985}[model]
        make_run(tmp_path / "a", model, optimizer, metric={"final_average_accuracy": value})
        make_run(tmp_path / "b", model, optimizer, metric={"final_average_accuracy": value - (model == "er") / 2})
    limits = {}
    for name in "ab":
        figure, _ = draw("heat", tmp_path / name)
        limits[name] = figure.axes[0].collections[0].get_clim()
        assert figure.get_suptitle() == "final average accuracy (%)", "one panel needs no more words"
    assert limits == {"a": pytest.approx((98.15 - 2.5, 98.15 + 2.5)), "b": pytest.approx((47.8, 98.5))}
    for model, optimizer in itertools.product(("er", "derpp"), ("sgd", "sam")):
        make_run(tmp_path / "a", model, optimizer, dataset="perm-mnist", cost={"train_s": 1.0 + (model == "er")})
    figure, _ = draw("heat", tmp_path / "a")
    assert figure.get_suptitle().replace("\n", " ") == "final average accuracy (%), each panel with its own colours"
    figure, _ = draw("heat", tmp_path / "a", metric="train_s")
    assert figure.axes[0].collections[0].get_clim() == (1, 2), "costs are not percentages"


@pytest.mark.parametrize("width", plots.WIDTHS)
@pytest.mark.parametrize("kind", ["bars", "heat"])
def test_seventeen_optimizers_can_be_read(kind, width):
    runs = finished.select(finished.load_runs([ROOT / "tests/records/sharpness/perm-mnist"]), {"model": "er,derpp"})
    figure = plots.figure(kind, runs if kind == "heat" else finished.select(runs, {"model": "er"}), width=width)
    (axes,) = figure.axes
    assert len(ticks(axes.yaxis)) == 17
    figure.draw_without_rendering()
    boxes = sorted((label.get_window_extent() for label in axes.get_yticklabels()), key=lambda box: box.y0)
    assert all(one.y1 < other.y1 and one.y1 - other.y0 < 0.1 * one.height for one, other in itertools.pairwise(boxes))
    assert all(box.x0 >= 0 for box in boxes)
    if kind == "heat":
        assert len(axes.texts) == 34 and all(re.fullmatch(r"\d\d\.\d", text.get_text()) for text in axes.texts)


# sizes, labels, files


@pytest.mark.parametrize(("width", "inches"), [("column", 3.5), ("page", 7.0)])
@pytest.mark.parametrize("kind", plots.KINDS)
@pytest.mark.filterwarnings("error")
def test_pictures_have_their_width_and_8_point_text_inside_the_page(kind, width, inches, two_by_two):
    figure, _ = draw(kind, two_by_two, width=width)
    figure.draw_without_rendering()
    assert figure.get_size_inches()[0] == inches and 0.8 < figure.get_size_inches()[1] < 9
    assert {text.get_fontsize() for text in figure.findobj(Text) if text.get_text()} == {8}
    boxes = [artist.get_tightbbox() for artist in (*figure.axes, *figure.legends)]
    assert all(box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1 for box in boxes)
    assert all(box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1 for box in boxes)
    for legend in figure.legends:
        below = legend.get_window_extent()
        assert all(below.y1 <= axes.get_tightbbox().y0 + 1 for axes in figure.axes), "the legend covers data"


@pytest.mark.parametrize("width", plots.WIDTHS)
@pytest.mark.parametrize("kind", ["tasks", "compute", "bars", "matrix"])
def test_long_labels_are_broken_so_that_nothing_is_cut(kind, width, tmp_path):
    by = ["model", "optimizer", "buffer_size", "lr", "rho", "alpha", "guide_mode"]
    for rho, seed in itertools.product((0.02, 0.05), (0, 1)):
        flags = {"lr": 0.003 + rho, "rho": rho, "alpha": 0.1, "guide_mode": "align" if rho < 0.03 else "add"}
        make_run(
            tmp_path, "mgser_sam", "friendly_sam", seed, cost={"forward_rows": 10**6, "backward_rows": 10**6}, **flags
        )
    figure, _ = draw(kind, tmp_path, by=by, width=width)
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert any("guide mode align" in text.get_text().replace("\n", " ") for text in texts)
    boxes = [artist.get_tightbbox() for artist in (*figure.axes, *figure.legends)]
    assert all(box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1 for box in boxes)
    assert all(box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1 for box in boxes)


def test_names_label_values_and_pairs_and_are_checked(two_by_two):
    names = {"er": "ER", "sam": "SAM $x$", "derpp+sgd": "DER++"}
    assert legend_of(draw("tasks", two_by_two, names=names)[0]) == [
        "derpp + SAM $x$",
        "DER++",
        "ER + SAM $x$",
        "ER + sgd",
    ]
    figure, _ = draw("bars", two_by_two, names={"final_average_accuracy": "FAA", "buffer_size": "memory"})
    (axes,) = figure.axes
    assert axes.get_xlabel() == "FAA (%)" and "memory 100" in axes.get_title()
    figure, _ = draw("heat", two_by_two, by=["seed", "model"], mix=True, names={"seed": "repeat", "er": "ER"})
    assert "repeat" in (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel())
    with pytest.raises(UsageError, match="nothing here is called 'derp'. Did you mean derpp"):
        draw("tasks", two_by_two, names={"derp": "DER"})


def test_what_all_groups_share_is_in_the_title(tmp_path):
    for optimizer, lr in itertools.product(("sgd", "sam"), (0.1, 0.2)):
        make_run(tmp_path, optimizer=optimizer, lr=lr)
    figure, _ = draw("bars", tmp_path, by=["model", "optimizer", "lr"])
    assert sorted(ticks(figure.axes[0].yaxis)) == ["sam, lr 0.1", "sam, lr 0.2", "sgd, lr 0.1", "sgd, lr 0.2"]
    assert figure.axes[0].get_title().startswith("er, ")
    runs = finished.select(finished.load_runs([tmp_path]), {"lr": "0.1"})
    figure = plots.figure("bars", runs, by=["model", "optimizer", "lr"])
    assert sorted(ticks(figure.axes[0].yaxis)) == ["sam", "sgd"]
    assert figure.axes[0].get_title().replace("\n", ", ").startswith("er, lr 0.1, ")
    runs = finished.select(runs, {"optimizer": "sam"})
    figure = plots.figure("bars", runs, by=["model", "optimizer", "lr"])
    assert ticks(figure.axes[0].yaxis) == ["er + sam, lr 0.1"], "one group keeps its name"


@pytest.mark.parametrize("kind", ["tasks", "compute", "bars", "matrix"])
def test_labels_name_the_optimizers_where_each_method_has_its_own(kind, tmp_path):
    for model, optimizer in (("er", "sgd"), ("mgser_sam", "sam")):
        make_run(tmp_path, model, optimizer)
    figure, _ = draw(kind, tmp_path)
    words = {text.get_text() for text in figure.findobj(Text)}
    assert {"er + sgd", "mgser_sam + sam"} <= words and not {"er", "mgser_sam"} & words


@pytest.mark.parametrize("kind", ["tasks", "bars", "matrix", "heat"])
def test_the_validation_split_is_said_and_shares_no_panel(kind, tmp_path):
    for validation, optimizer in itertools.product((False, True), ("sgd", "sam")):
        make_run(tmp_path / str(validation), optimizer=optimizer, validation=validation)
    figure, _ = draw(kind, tmp_path / "True")
    words = " ".join(text.get_text() for text in figure.findobj(Text))
    assert "validation split" in words
    if kind == "tasks":
        labels = [axes.get_xlabel() + axes.get_ylabel() for axes in draw(kind, tmp_path, mix=True)[0].axes]
        assert ["validation" in label for label in labels] == [False, True]


def test_matplotlib_settings_of_the_user_change_nothing_and_come_back(two_by_two, tmp_path):
    plots.save(draw("heat", two_by_two)[0], tmp_path / "a.svg")
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "lines.linewidth": 9}):
        plots.save(draw("heat", two_by_two)[0], tmp_path / "b.svg")
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_equal_runs_give_equal_files(two_by_two, tmp_path):
    for name in ("a", "b"):
        figure, _ = draw("tasks", two_by_two)
        for suffix in ("pdf", "svg", "png"):
            plots.save(figure, tmp_path / f"{name}.{suffix}")
    files = {suffix: (tmp_path / f"a.{suffix}").read_bytes() for suffix in ("pdf", "svg", "png")}
    assert all((tmp_path / f"b.{suffix}").read_bytes() == content for suffix, content in files.items())
    assert not list(tmp_path.glob(".*")), "nothing half written is left"
    assert b"/CIDFontType2" in files["pdf"] and b"/Type3" not in files["pdf"], "fonts are embedded as Type 42"
    assert b"CreationDate" not in files["pdf"] and b"dc:date" not in files["svg"]
    assert re.search(rb"/MediaBox \[\s*0 0 252 ", files["pdf"]), "3.5 inches are 252 points"
    assert b">derpp + sam</text>" in files["svg"]
    assert Image.open(tmp_path / "a.png").size[0] == 1050


def test_the_command_writes_a_picture_and_no_table(two_by_two, tmp_path, capsys):
    words = ["--plot", "heat", "--out", str(tmp_path / "x.svg"), "--width", "page", "--names", "er=ER,derpp=DER++"]
    assert report.main([str(two_by_two), *words, "--record", str(tmp_path / "runs.jsonl")]) == 0
    assert capsys.readouterr() == ("", "")
    text = (tmp_path / "x.svg").read_text()
    assert 'width="504pt"' in text and ">DER++</text>" in text
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 8


def test_svg_text_can_stand_twice_in_a_page(two_by_two):
    runs = finished.load_runs([two_by_two])
    first, second = (plots.svg("tasks", runs, prefix=prefix) for prefix in ("a-", "b-"))
    assert first.startswith("<svg ") and "<style" not in first and "<metadata" not in first
    ids = [re.findall(r'\bid="([^"]*)"', text) for text in (first, second)]
    assert all(name.startswith("a-") for name in ids[0]) and not set(ids[0]) & set(ids[1])
    used = set(re.findall(r"url\(#([^)]*)\)", first)) | set(re.findall(r'href="#([^"]*)"', first))
    assert used and used <= set(ids[0])
    root = ElementTree.fromstring(first)
    assert root.find("{http://www.w3.org/2000/svg}title").text == plots.KINDS["tasks"]
    assert first.replace('"a-', '"b-').replace("#a-", "#b-") == second


def test_texts_for_tex_are_escaped_and_come_back(two_by_two):
    figure, _ = draw("bars", two_by_two, names={"er": "E_R & co"})
    label = "E_R & co + sam"
    with _layout._escaped(figure):
        assert r"E\_R \& co + sam" in ticks(figure.axes[0].yaxis)
        assert figure.axes[0].get_xlabel() == r"final average accuracy (\%)"
    assert label in ticks(figure.axes[0].yaxis) and figure.axes[0].get_xlabel() == "final average accuracy (%)"


# mistakes


@pytest.mark.parametrize(
    ("kind", "words", "flags", "config"),
    [
        ("tasks", "lr = 0.1, 0.3", {"lr": 0.3}, {}),
        ("bars", "split = test, validation", {"validation": True}, {}),
        ("heat", "protocol_version = 1, 2", {}, {"protocol": 2}),
        ("matrix", "different code or data: models/er.py", {}, {"code": {"models/er.py": "12ab"}}),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_tables_refuse_to_average_is_not_drawn_either(kind, words, flags, config, two_by_two, tmp_path, capsys):
    file = make_run(two_by_two, seed=7, **flags) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if "code" in config:
        file = make_run(two_by_two, seed=8) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"code": {"models/er.py": "34cd"}}))
    said = []
    for more in ([], ["--plot", kind, "--out", str(tmp_path / "x.svg")]):
        assert report.main([str(two_by_two), "--by", "model,optimizer", *more]) == 2
        said.append(capsys.readouterr().err)
    table, picture = said
    assert words in table and picture.count("error: ") == 1
    assert picture.replace("'er sgd seq-digits 100'", "'er sgd'") == table, "a panel is of one benchmark and memory"
    assert not (tmp_path / "x.svg").exists()
    assert report.main([str(two_by_two), "--mix", "--plot", kind, "--out", str(tmp_path / "x.svg")]) == 0
    assert (tmp_path / "x.svg").exists()
    assert ("mixes runs of" in capsys.readouterr().err) == ("validation" not in flags), "they have panels of their own"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "taks", "--out", "x.pdf"], "--plot: unknown kind: 'taks'. Did you mean tasks?"),
        (["--plot", "tasks"], "--plot needs a file. Add --out FILE that ends in .pdf, .svg, .png, .pgf."),
        (["--plot", "tasks", "--out", "x.gif"], "a picture's name ends in .pdf, .svg, .png, .pgf, got '.gif'"),
        (["--plot", "tasks", "--out", "nowhere/x.pdf"], "nowhere/x.pdf: cannot write there"),
        (["--out", "x.pdf"], "--out x.pdf is a picture's name. Add --plot KIND"),
        (["--width", "page"], "--width is for pictures. Add --plot KIND"),
        (["--plot", "bars", "--out", "x.pdf", "--pivot", "dataset"], "--pivot is for tables."),
        (["--plot", "bars", "--out", "x.pdf", "--metrics", "train_s,wall_s"], "--plot draws one metric"),
        (["--plot", "bars", "--out", "x.pdf", "--metrics", "trains_s"], "unknown metric: 'trains_s'. Did you mean"),
        (["--plot", "tasks", "--out", "x.pdf", "--metrics", "train_s"], "tasks has no choice of a metric"),
        (["--plot", "bars", "--out", "x.pdf", "--x", "train_s"], "bars has no choice of the x axis"),
        (["--plot", "compute", "--out", "x.pdf", "--x", "trains_s"], "--x: unknown cost: 'trains_s'. Did you mean"),
        (["--plot", "heat", "--out", "x.pdf", "--by", "model"], "heat needs two keys, got model."),
        (["--plot", "bars", "--out", "x.pdf", "--by", "modle"], "unknown key: 'modle'. Did you mean model?"),
        (["--plot", "bars", "--out", "x.pdf", "--setting", "task"], "unknown setting: 'task'."),
        (["--plot", "bars", "--out", "x.pdf", "--names", "er"], "--names expects name=label, got 'er'."),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(two_by_two, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert report.main([str(two_by_two), *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1 and said.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_names_of_the_command_keep_commas_in_labels():
    assert report._labels(["er=ER, ours,derpp=DER++", "mgser-sam=MGSER-SAM"]) == {
        "er": "ER, ours", "derpp": "DER++", "mgser_sam": "MGSER-SAM"
    }  # fmt: skip


def test_pgf_needs_tex(two_by_two, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"\.pgf needs a TeX installation \(pdflatex, xelatex, lualatex\)"):
        plots.save(draw("bars", two_by_two)[0], tmp_path / "x.pgf")


def test_runs_without_a_matrix_are_named_and_left_out(two_by_two, tmp_path, capsys):
    for seed in (3, 12):
        make_run(two_by_two, "er", "sam", seed, matrix=None)
    figure, said = draw("tasks", two_by_two)
    assert "note: left out, since they have no accuracy matrix: er on seq-digits with sam (seeds 3, 12)." in said
    assert figure.axes[0].lines[2].get_ydata() == pytest.approx([95, 80, 75])
    for kind in ("tasks", "forgetting", "matrix"):
        make_run(tmp_path / kind, matrix=None)
        words = [str(tmp_path / kind), "--plot", kind, "--out", str(tmp_path / "x.pdf")]
        assert report.main(words) == 2
        assert "error: no run has its accuracy matrix" in capsys.readouterr().err


def test_joint_runs_have_no_course_but_a_matrix(two_by_two, tmp_path):
    joint = {"average_incremental_accuracy": None, "forgetting_chaudhry18": None}
    make_run(two_by_two, "joint", matrix=[[0.9, 0.9, 0.9]], metric=joint, buffer_size=None)
    figure, said = draw("tasks", two_by_two)
    assert "joint" not in " ".join(legend_of(figure))
    assert any("have learned all tasks at once: joint on seq-digits" in line for line in said)
    titles = [axes.get_title() for axes in draw("matrix", two_by_two)[0].axes]
    assert "joint + sgd" in titles
    make_run(tmp_path / "alone", "joint", matrix=[[0.9, 0.9, 0.9]], metric=joint)
    with pytest.raises(UsageError, match="no run has learned two tasks one after the other"):
        draw("tasks", tmp_path / "alone")
    with pytest.raises(UsageError, match="no run has a value of forgetting_chaudhry18"):
        draw("bars", tmp_path / "alone", metric="forgetting_chaudhry18")


def test_tables_need_no_matplotlib(two_by_two):
    code = (
        "import sys; from flatcl.utils.commands import report\n"
        "report.main(sys.argv[1:])\n"
        "print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(two_by_two)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
