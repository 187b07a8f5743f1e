"""Tables, pictures and sweeps, on run folders made by hand; every expected number is worked out in the test."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from flatcl.utils import metrics
from flatcl.utils.arguments import resolve
from flatcl.utils.commands import report, sweep
from flatcl.utils.engine import pictures
from flatcl.utils.engine.memory import peak_memory_mib, reset_peak_memory
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import ROOT
from flatcl.utils.reports import _run_index as run_index
from flatcl.utils.reports import runs as finished
from flatcl.utils.reports import tables
from flatcl.utils.studies.engines.local import Local


def make_run(root, model="er", dataset="perm-mnist", seed=0, accuracy=0.8, forgetting=0.1, buffer_size=200,
             optimizer="sgd", time="20260101-120000", status="finished", settings=("domain-il",), **flags):  # fmt: skip
    """Writes a run folder as utils/engine/results.py lays it out; returns it."""
    given = {"model": model, "dataset": dataset, "optimizer": optimizer, "seed": seed, "lr": 0.1, **flags}
    if buffer_size is not None:
        given["buffer_size"] = buffer_size
    digest = "-".join(str(value) for value in given.values())
    folder = root / settings[0] / dataset / model / f"{time}-{digest}"
    folder.mkdir(parents=True)
    numbers = {"final_average_accuracy": accuracy, "forgetting_chaudhry18": forgetting}
    summary = {
        "model": model, "dataset": dataset, "optimizer": optimizer, "setting": settings[0], "seed": seed,
        "status": status, "metrics": dict.fromkeys(settings, numbers), "config_hash": digest,
        "cost": {"train_s": 10.0 + seed, "forward_rows": 2_400_512},
    }  # fmt: skip
    entries = {name: {"value": value, "origin": "argv"} for name, value in given.items()}
    config = {"protocol": 1, "config_hash": digest, "plugins": [], "flags": entries}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def three_seeds(tmp_path):
    """0.80, 0.82, 0.87: mean 0.83, deviations -.03 -.01 .04, variance .0026 / 2, std .0360555. Forgetting: std 0.1."""
    for seed, (accuracy, forgetting) in enumerate([(0.80, 0.1), (0.82, 0.2), (0.87, 0.3)]):
        make_run(tmp_path, seed=seed, accuracy=accuracy, forgetting=forgetting)
    return tmp_path


def test_markdown_gives_mean_and_sample_std_in_percent(three_seeds):
    assert tables.table(finished.load_runs([three_seeds])).splitlines() == [
        "| dataset | model | optimizer | buffer_size | setting | n | final_average_accuracy (%) "
        + "| forgetting_chaudhry18 (%) |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: |",
        "| perm-mnist | er | sgd | 200 | domain-il | 3 | 83.00 ± 3.61 | 20.00 ± 10.00 |",
        "",
        "mean ± sample standard deviation",
    ]


def test_costs_are_metrics_too_but_no_fractions(three_seeds):
    names = ["final_average_accuracy", "train_s", "forward_rows"]
    runs = finished.load_runs([three_seeds])
    head, _, row, *_ = tables.table(runs, metrics=names).splitlines()
    assert head.endswith("| final_average_accuracy (%) | train_s | forward_rows |")
    assert row.endswith("| 3 | 83.00 ± 3.61 | 11.0 ± 1.0 | 2,400,512 |")
    *_, row, _, footing = tables.table(runs, metrics=names, pivot=["dataset"]).splitlines()
    assert row.endswith("| 83.00 ± 3.61 / 11.0 ± 1.0 / 2,400,512 |")
    assert footing.startswith("final_average_accuracy in % / train_s / forward_rows; mean")
    assert tables.table(runs, metrics=["train_s"], format="csv").splitlines()[1].endswith(",11.0,1.0,3")


def test_one_run_has_no_std_and_a_missing_metric_is_a_dash(tmp_path):
    make_run(tmp_path, model="joint", buffer_size=None, accuracy=0.955, forgetting=None)
    last = tables.table(finished.load_runs([tmp_path]), setting="domain-il").splitlines()[-1]
    assert last == "| perm-mnist | joint | sgd | 1 | 95.50 | – |"


def test_csv_has_raw_fractions(three_seeds):
    make_run(three_seeds, model="joint", buffer_size=None, accuracy=0.5, forgetting=None)
    head, first, second = tables.table(finished.load_runs([three_seeds]), format="csv").splitlines()
    assert head == (
        "dataset,model,optimizer,buffer_size,setting,final_average_accuracy_mean,final_average_accuracy_std,"
        "final_average_accuracy_n,forgetting_chaudhry18_mean,forgetting_chaudhry18_std,forgetting_chaudhry18_n"
    )
    cells = first.split(",")
    assert cells[:5] == ["perm-mnist", "er", "sgd", "200", "domain-il"]
    assert [float(cell) for cell in cells[5:]] == pytest.approx([0.83, 0.0013**0.5, 3, 0.2, 0.1, 3])
    assert second == "perm-mnist,joint,sgd,,domain-il,0.5,,1,,,0"


def test_notes_count_the_runs_that_were_asked_for_alone(tmp_path, capsys):
    make_run(tmp_path, model="er", seed=0)
    make_run(tmp_path, model="er", seed=0, time="20260102-120000")  # once more
    make_run(tmp_path, model="derpp", seed=0)
    make_run(tmp_path, model="derpp", seed=1, status="interrupted")
    (make_run(tmp_path, model="derpp", seed=2) / "summary.json").unlink()  # in its first task
    assert report.main([str(tmp_path), "--where", "model=er"]) == 0
    assert capsys.readouterr().err.count("\n") == 1, "the repeated one"
    assert report.main([str(tmp_path), "--where", "model=derpp"]) == 0
    assert capsys.readouterr().err == (
        "note: left out, since they did not finish: 1 interrupted, 1 without a result yet.\n"
    )


def test_a_record_of_any_name_is_read_if_it_is_named(three_seeds, tmp_path, capsys):
    record = tmp_path / "mine.jsonl"
    assert report.main([str(three_seeds), "--record", str(record)]) == 0
    out, err = capsys.readouterr()
    assert "give this one by its name" in err
    assert report.main([str(record)]) == 0
    assert capsys.readouterr() == (out, "")


def test_unlike_runs_are_refused_with_the_fewest_keys_that_split_them(tmp_path, capsys):
    for optimizer in ("sgd", "sam"):
        for seed in (0, 1):
            own = {"rho": 0.05, "perturb": "all"} if optimizer == "sam" else {}
            make_run(tmp_path, optimizer=optimizer, seed=seed, **own)
    assert report.main([str(tmp_path), "--by", "model"]) == 2
    err = capsys.readouterr().err
    assert "(optimizer = sam, sgd): 'er'. Split them with --by model,optimizer, choose with --where" in err
    make_run(tmp_path, optimizer="sgd", seed=2, lr=0.3, validation=True)
    assert report.main([str(tmp_path), "--by", "model,optimizer"]) == 2
    err = capsys.readouterr().err
    assert "(split = test, validation): 'er sgd'. Split them with --by model,optimizer,split, choose" in err
    assert "choose with --where split=test, or show them apart with --mix" in err
    make_run(tmp_path, optimizer="sgd", seed=3, lr=0.2, validation=True)
    assert report.main([str(tmp_path), "--by", "model,optimizer"]) == 2
    err = capsys.readouterr().err
    assert "--by model,optimizer,split,lr or choose with --where split=test." in err and "--mix" not in err


def test_a_table_says_how_many_configurations_stand_behind_its_rows(tmp_path):
    for model, number in (("er", 9), ("derpp", 12), ("der", None)):
        for seed in (1, 2):
            notes = {"notes": f"tuned: {number} configurations, best_mean on validation"} if number else {}
            make_run(tmp_path, model=model, seed=seed, **notes)
    runs = finished.load_runs([tmp_path])
    (line,) = [line for line in tables.table(runs, by=["model", "lr"]).splitlines() if "search" in line]
    assert line == (
        "flags of each row chosen by a search (12 configurations, best_mean on validation: derpp lr 0.1; "
        "9 configurations, best_mean on validation: er lr 0.1)"
    )
    alone = tables.table(finished.select(runs, {"model": "er"}), by=["model"], format="latex")
    assert alone.splitlines()[1].startswith(
        r"% flags of each row chosen by a search (9 configurations, best\_mean on validation)"
    )
    assert "search" not in tables.table(finished.select(runs, {"model": "der"}), by=["model"])
    make_run(tmp_path, model="er", seed=3)  # a row with a run that nothing is known of
    assert "search" not in tables.table(finished.select(finished.load_runs([tmp_path]), {"model": "er"}), by=["model"])


def test_latex_is_booktabs_with_escapes(three_seeds):
    make_run(three_seeds, model="mgser_sam", optimizer="sam", accuracy=0.9, forgetting=-0.01)
    text = tables.table(finished.load_runs([three_seeds]), by=["dataset", "model"], setting="domain-il", format="latex")
    assert text.splitlines() == [
        r"% mean $\pm$ sample standard deviation",
        r"\begin{tabular}{llrrr}",
        r"\toprule",
        r"dataset & model & n & final\_average\_accuracy (\%) & forgetting\_chaudhry18 (\%) \\",
        r"\midrule",
        r"perm-mnist & er & 3 & 83.00 $\pm$ 3.61 & 20.00 $\pm$ 10.00 \\",
        r"perm-mnist & mgser\_sam & 1 & 90.00 & $-$1.00 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_names_give_labels_to_values_keys_and_metrics(three_seeds, capsys):
    make_run(three_seeds, model="mgser_sam", optimizer="sam", accuracy=0.9, forgetting=-0.01)
    labels = ["er=ER", "mgser-sam=MGSER-SAM,model=Method", "final-average-accuracy=FAA"]
    words = [str(three_seeds), "--by", "dataset,model,lr", "--names", *labels, "lr=η"]
    assert report.main([*words, "--format", "text"]) == 0
    head, _, first, second, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[:7] == ["dataset", "Method", "η", "setting", "n", "FAA", "(%)"]
    assert first.split()[1] == "ER" and second.split()[1] == "MGSER-SAM"
    assert report.main([*words, "--format", "latex", "--setting", "domain-il"]) == 0
    assert r"dataset & Method & $\eta$ & n & FAA (\%) & forgetting" in capsys.readouterr().out
    greek = ["--by", "model", "--names", "er=[1] ΔΑ", "mgser_sam=*Ω"]
    assert report.main([str(three_seeds), *greek, "--format", "latex", "--setting", "domain-il"]) == 0
    lines = capsys.readouterr().out.splitlines()  # neither [ nor * may follow the end of a line
    assert [line.split(" & ")[0] for line in lines[5:7]] == [r"{}[1] $\Delta$A", r"{}*$\Omega$"]
    pivot = ["--by", "model,buffer_size", "--pivot", "dataset,buffer-size", "--setting", "domain-il"]
    assert report.main([str(three_seeds), *pivot, "--names", *labels, "perm-mnist=P", "200=small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| Method | P, small |" and lines[3].startswith("| MGSER-SAM | 90.00 / -1.00 |")
    assert lines[-2].startswith("FAA / forgetting_chaudhry18 in %; ") and lines[-1] == "columns: dataset, buffer_size"
    assert report.main([str(three_seeds), "--names", *labels, "rot=Rot", "lr=η", "er+sgd=x"]) == 2
    err = capsys.readouterr().err
    assert (
        "--names: nothing here is called 'rot'." in err and "nothing here is called 'lr'." in err
    )  # which is no key of these rows
    assert "--names: 'er+sgd' is a pair, whose parts a table shows in two columns. Name the parts." in err


def test_text_columns_are_aligned(three_seeds):
    lines = tables.table(finished.load_runs([three_seeds]), by=["model"], format="text").splitlines()
    assert (
        lines[0].index("final_average_accuracy (%)") + len("final_average_accuracy (%)") == lines[2].index("3.61") + 4
    )
    assert lines[2].startswith("er     domain-il  3  ")


def test_equal_runs_count_once_and_the_newest_wins(tmp_path):
    make_run(tmp_path, accuracy=0.2, time="20260102-000000")
    make_run(tmp_path, accuracy=0.6, time="20260103-000000")
    make_run(tmp_path, accuracy=0.1, time="20260101-000000")
    said = []
    runs = finished.load_runs([tmp_path, tmp_path / "domain-il"], said.append)
    assert [run.summary["metrics"]["domain-il"]["final_average_accuracy"] for run in runs] == [0.6]
    assert len(said) == 1 and said[0].startswith("note: 2 run(s) repeat")


def test_only_finished_runs_count(three_seeds):
    for seed, status in ((7, "interrupted"), (8, "interrupted"), (9, "diverged")):
        make_run(three_seeds, seed=seed, accuracy=0.0, status=status)
    (three_seeds / "elsewhere").mkdir()
    (three_seeds / "elsewhere" / "summary.json").write_text("[1, 2]")
    said = []
    assert len(finished.load_runs([three_seeds], said.append)) == 3
    assert any("1 diverged, 2 interrupted" in line for line in said)
    assert any("not the summary of a run" in line and "elsewhere" in line for line in said)


@pytest.fixture
def grid(tmp_path):
    make_run(tmp_path, "sgd", buffer_size=None, accuracy=0.5, forgetting=0.4)
    make_run(tmp_path, "joint", buffer_size=None, accuracy=0.96, forgetting=None)
    for size, accuracies in ((200, (0.80, 0.84)), (1000, (0.90, 0.92))):
        for seed, accuracy in enumerate(accuracies):
            make_run(tmp_path, "er", seed=seed, buffer_size=size, accuracy=accuracy, forgetting=0.1)
    make_run(tmp_path, "derpp", buffer_size=1000, accuracy=0.93, forgetting=0.05)
    return tmp_path


def test_pivot_repeats_methods_without_a_buffer(grid):
    text = tables.table(finished.load_runs([grid]), pivot=["dataset", "buffer_size"], order=["sgd", "joint"])
    assert text.splitlines() == [
        "| model | perm-mnist, 200 | perm-mnist, 1000 |",
        "| --- | ---: | ---: |",
        "| sgd | 50.00 / 40.00 | 50.00 / 40.00 |",
        "| joint | 96.00 / – | 96.00 / – |",
        "| derpp |  | 93.00 / 5.00 |",
        "| er | 82.00 ± 2.83 / 10.00 ± 0.00 | 91.00 ± 1.41 / 10.00 ± 0.00 |",  # stds: 0.02 * sqrt(2), 0.01 * sqrt(2)
        "",
        "final_average_accuracy / forgetting_chaudhry18 in %; mean ± sample standard deviation, n = 1 to 2;",
        "columns: dataset, buffer_size",
    ]


def test_pivot_shows_every_group(tmp_path):
    """Of a key that only some runs have, nothing stands in the column of a value that it was not made with."""
    make_run(tmp_path, "er", accuracy=0.5)
    make_run(tmp_path, "er", optimizer="sam", accuracy=0.6, rho=0.1)
    make_run(tmp_path, "derpp", accuracy=0.7)
    runs = finished.load_runs([tmp_path])
    text = tables.table(runs, by=["model"], metrics=["final_average_accuracy"], pivot=["rho"])
    assert text.splitlines()[:4] == ["| model | – | 0.1 |", "| --- | ---: | ---: |", "| derpp | 70.00 |  |",
                                     "| er | 50.00 | 60.00 |"]  # fmt: skip
    make_run(tmp_path, "sgd", accuracy=0.3, buffer_size=None)
    runs = finished.load_runs([tmp_path], where={"model": "sgd,derpp"})
    text = tables.table(runs, by=["dataset"], metrics=["final_average_accuracy"], pivot=["buffer_size"])
    assert text.splitlines()[0::2][:2] == ["| dataset | – | 200 |", "| perm-mnist | 30.00 | 70.00 |"]


def test_pivot_keeps_optimizers_apart(grid):
    make_run(grid, "er", optimizer="sam", buffer_size=200, accuracy=0.99)
    lines = tables.table(finished.load_runs([grid]), pivot=["dataset", "buffer_size"]).splitlines()
    assert lines[0].startswith("| model | optimizer |")
    assert [line.split(" | ")[:2] for line in lines if line.startswith("| er ")] == [["| er", "sam"], ["| er", "sgd"]]


def test_class_incremental_runs_show_both_settings(tmp_path):
    make_run(tmp_path, dataset="seq-mnist", settings=("class-il", "task-il"))
    make_run(tmp_path, dataset="perm-mnist")
    runs = finished.load_runs([tmp_path])
    body = tables.table(runs).splitlines()[2:]
    assert [line.split(" | ")[4] for line in body] == ["domain-il", "class-il", "task-il"]
    head = tables.table(runs, pivot=["dataset", "buffer_size"]).splitlines()[0]
    assert head == "| model | perm-mnist, 200 | seq-mnist, 200, class-il | seq-mnist, 200, task-il |"
    assert "class-il" not in tables.table(runs, setting="task-il")


def test_rows_that_mix_other_flags_are_mentioned(three_seeds):
    make_run(three_seeds, seed=5, lr=0.3)
    said = []
    tables.table(finished.load_runs([three_seeds]), say=said.append)
    assert len(said) == 1 and "mixes runs of lr = 0.1, 0.3" in said[0]
    said.clear()
    tables.table(finished.load_runs([three_seeds]), by=["model", "lr"], say=said.append)
    assert said == []


def test_rows_that_mix_versions_of_the_numbers_are_mentioned(three_seeds):
    """The number in config.json, not the flag of the same name."""
    runs = finished.load_runs([three_seeds])
    newer = [dataclasses.replace(run, protocol=2 if run.flags["seed"] == 1 else 1) for run in runs]
    said = []
    tables.table(newer, say=said.append)
    assert len(said) == 1 and "mixes runs of protocol_version = 1, 2" in said[0]


def test_where_selects_by_summary_and_by_flag(grid):
    runs = finished.load_runs([grid])
    assert len(finished.select(runs, {"model": "er,derpp", "buffer_size": "1000"})) == 3
    assert len(finished.select(runs, {"lr": "0.10", "seed": "1"})) == 2
    with pytest.raises(UsageError, match="no run has buffer_size = 7. These occur: 1000, 200, none"):
        finished.select(runs, {"buffer_size": "7"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--metrics", "forgeting_chaudhry18"],
            "unknown metric: 'forgeting_chaudhry18'. Did you mean forgetting_chaudhry18",
        ),
        (["--by", "modle"], "unknown key: 'modle'. Did you mean model?"),
        (["--pivot", "bufer_size"], "unknown key: 'bufer_size'. Did you mean buffer_size?"),
        (["--setting", "class-li"], "unknown setting: 'class-li'."),
        (["--where", "model"], "--where expects key=value, got 'model'."),
        (
            ["--where", "model=er", "--where", "model=sgd"],
            "--where names model 2 times. Write model=er,sgd",
        ),
        (["--names", "er=A,er=B"], "--names gives er 2 labels. Give one."),
        (["--html", "x.html", "--against", "seed=0"], "--against is for the table, which --html replaces."),
        (["--html", "x.html", "--best"], "--best is for the table, which --html replaces."),
        (["--pivot", "dataset", "--format", "csv"], "--pivot cannot be used with --format csv"),
        (["--names", "er=ER", "--format", "csv"], "--names: CSV keeps the names that programs know."),
        (["--names", "er=ER", "--html", "x.html"], "--names is for the table, which --html replaces."),
        (["--nonsense"], "unknown flag: --nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(three_seeds, capsys, words, message):
    assert report.main([str(three_seeds), *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err
    assert said.err.count("\n") == 1 and said.out == ""


def test_no_runs_and_no_folder(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "no finished runs in" in capsys.readouterr().err
    assert report.main([str(tmp_path / "missing")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_a_record_that_cannot_be_written_leaves_the_old_one(three_seeds, tmp_path, capsys, monkeypatch):
    out = tmp_path / "record" / "runs.jsonl"
    out.parent.mkdir()
    assert report.main([str(three_seeds), "--record", str(out)]) == 0
    before, replace = out.read_bytes(), os.replace

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flatcl.utils.files.os.replace", full)
    for words in (["--record", str(out)], ["--out", str(out)]):
        capsys.readouterr()
        assert report.main([str(three_seeds), "--where", "seed=0", *words]) == 2
        assert f"cannot write {out}: No space left on device" in capsys.readouterr().err
    monkeypatch.setattr("flatcl.utils.files.os.replace", replace)
    assert out.read_bytes() == before and [file.name for file in out.parent.iterdir()] == ["runs.jsonl"]


def test_a_note_in_another_encoding_is_shown_with_a_question_mark(tmp_path):
    make_run(tmp_path / "runs", notes="caf\udce9")
    out = tmp_path / "table.md"
    assert report.main([str(tmp_path / "runs"), "--by", "model,notes", "--out", str(out)]) == 0
    assert "caf?" in out.read_text(encoding="utf-8")


def test_command_writes_the_table_into_a_file(grid, tmp_path, capsys):
    out = tmp_path / "table.md"
    assert report.main([str(grid), "--by", "model,buffer-size", "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert "| er | 200 | domain-il | 2 | 82.00 ± 2.83 |" in out.read_text(encoding="utf-8")


MATRIX = [[0.9, 0.25, None], [0.7, 0.8, 0.1], [0.75, 0.5, 0.95]]


def drawn(axes):
    return [text.get_text() for text in axes.texts]


def test_matrix_picture_shows_every_cell_in_percent():
    figure = pictures.accuracy_matrix(MATRIX, "er on perm-mnist")
    axes = figure.axes[0]
    assert axes.get_title() == "er on perm-mnist"
    assert drawn(axes) == ["90.0", "25.0", "70.0", "80.0", "10.0", "75.0", "50.0", "95.0"]
    image = axes.images[0]
    assert image.get_clim() == (0, 100)
    assert image.get_array()[2, 1] == pytest.approx(50) and image.get_array().mask.sum() == 1
    assert [patch.get_hatch() for patch in axes.patches] == ["////"]
    assert axes.patches[0].get_xy() == (1.5, -0.5)


def test_matrix_picture_of_many_tasks_and_of_a_joint_run():
    assert drawn(pictures.accuracy_matrix([[0.5] * 20] * 20, "").axes[0]) == []
    axes = pictures.accuracy_matrix([[0.5, 0.6, 0.7]], "joint").axes[0]
    assert drawn(axes) == ["50.0", "60.0", "70.0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["end of\ntraining"]


def test_curves_are_the_averages_and_the_forgetting():
    left, right = pictures.curves(MATRIX, "er", [2, 3, 4]).axes
    assert [label.get_text() for label in left.get_xticklabels()] == ["3", "4", "5"]
    assert {text.get_text() for text in left.texts} == {"3", "4", "5"}
    assert "task 3, 4, ..." in left.get_legend_handles_labels()[1]
    left, right = pictures.curves(MATRIX, "er").axes
    average = next(line for line in left.lines if line.get_label() == "average over tasks seen")
    assert average.get_ydata() == pytest.approx([90, 75, 100 * (0.75 + 0.5 + 0.95) / 3])
    # After task 2: .9 - .7. After task 3: (.9 - .75 + .8 - .5) / 2.
    assert right.lines[0].get_xdata() == pytest.approx([2, 3])
    assert right.lines[0].get_ydata() == pytest.approx([20, 22.5])


def test_lines_of_twenty_tasks_can_be_told_apart_and_are_numbered_at_their_ends():
    left, _ = pictures.curves(np.linspace(0.1, 0.9, 400).reshape(20, 20).tolist(), "er").axes
    lines = [line for line in left.lines if line.get_markevery() is None][:20]  # the others lead to the numbers
    styles = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines]
    assert len(set(styles)) == 20
    assert all(a != b for one, other in zip(styles, styles[1:], strict=False) for a, b in zip(one, other, strict=True))
    assert [text.get_text() for text in left.texts] == [str(task) for task in range(1, 21)]
    places = sorted(text.get_position()[1] for text in left.texts)
    assert min(b - a for a, b in zip(places, places[1:], strict=False)) > 4.9, "no number covers another one"
    for line, text in zip(lines, left.texts, strict=True):
        assert line.get_color() == text.get_color()


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ([50, 10, 90], [50, 10, 90]),
        ([50, 51], [45.5, 55.5]),
        ([0, 1, 2], [0, 10, 20]),  # not below the axis
        ([100, 100, 20], [90, 100, 20]),
        ([30, 41, 35], [25 + 1 / 3, 45 + 1 / 3, 35 + 1 / 3]),  # groups that touch become one
    ],
)
def test_labels_keep_their_distance_near_their_places(values, places):
    assert pictures._spread(values, 10, 0, 100) == pytest.approx(places)


def test_forgetting_ends_at_the_metric_of_that_name():
    matrix = np.random.default_rng(0).random((6, 6)).tolist()
    assert pictures.forgetting(matrix)[-1] == pytest.approx(metrics.forgetting_chaudhry18(matrix))


@pytest.mark.parametrize("matrix", [[[0.5]], [[0.5, 0.6, 0.7]], MATRIX, [[0.5], [None, 0.5], [None]]])
def test_curves_of_any_shape_can_be_drawn(matrix):
    assert pictures.to_array(pictures.curves(matrix, "any")).std() > 0


def long_matrix(tasks, kind):
    """Full, or of the tasks seen only (with a task that was not evaluated at all), or a joint run's row."""
    values = np.random.default_rng(0).random((1 if kind == "joint" else tasks, tasks)).tolist()
    if kind == "seen":
        values = [row[: t + 1] for t, row in enumerate(values)]
        values[tasks // 2] = [None] * (tasks // 2)
    return values


@pytest.mark.parametrize("tasks", [13, 60, 1000])
@pytest.mark.parametrize("kind", ["full", "seen", "joint"])
@pytest.mark.filterwarnings("error")
def test_pictures_of_long_sequences_stay_small(tasks, kind):
    cpu = torch.device("cpu")
    matrix = long_matrix(tasks, kind)
    for draw in (pictures.accuracy_matrix, pictures.curves):
        reset_peak_memory(cpu)
        before = peak_memory_mib(cpu)
        figure = draw(matrix, "er on perm-mnist")
        array = pictures.to_array(figure)
        assert max(array.shape) <= 2000 and array.std() > 0
        assert peak_memory_mib(cpu) - before < 300
        for axes in figure.axes:
            assert len(axes.get_xticklabels()) <= 21 and len(axes.get_yticklabels()) <= 21
            artists = len(axes.patches) + len(axes.lines) + len(axes.texts) + len(axes.collections)
            assert artists <= (20 if tasks > pictures.MAX_LINES else 3 * tasks + 5), "drawing takes time for each"


@pytest.mark.parametrize(
    ("tasks", "most", "labels"),
    [
        (range(3), 20, [1, 2, 3]),
        (range(20), 20, list(range(1, 21))),
        (range(21), 20, [1, *range(2, 21, 2)]),
        (range(200), 20, [1, *range(10, 201, 10)]),
        (range(1000), 12, [1, *range(100, 1001, 100)]),
        (range(2999), 20, [1, *range(200, 2999, 200)]),
        ([4, 5, 6], 20, [5, 6, 7]),
        (range(99, 150), 20, list(range(100, 151, 5))),
        (range(97, 148), 20, list(range(100, 149, 5))),
    ],
)
def test_labels_of_many_tasks_are_the_first_and_round_numbers(tasks, most, labels):
    places, names = pictures._task_ticks(tasks, most)
    assert [tasks[place] + 1 for place in places] == labels and names == [str(label) for label in labels]


def test_matrix_picture_of_many_tasks_hatches_what_is_missing():
    axes = pictures.accuracy_matrix(long_matrix(30, "seen"), "er").axes[0]
    (patch,) = axes.patches
    assert patch.get_hatch() == "////" and (patch.get_width(), patch.get_height()) == (30, 30)
    assert patch.get_zorder() < axes.images[0].get_zorder()
    assert axes.images[0].get_array().mask.sum() == 30 * 29 / 2 + 15 + 1
    assert list(pictures.accuracy_matrix(long_matrix(30, "full"), "er").axes[0].patches) == []


def test_matrix_picture_of_few_rows_of_many_tasks_has_rows_that_can_be_seen():
    figure = pictures.accuracy_matrix(long_matrix(1000, "full")[500:505], "er", list(range(500, 505)))
    axes = figure.axes[0]
    pictures.to_array(figure)
    assert axes.get_window_extent().height > 5 * 20 and axes.get_window_extent().width > 900
    assert [label.get_text() for label in axes.get_yticklabels()] == ["501", "502", "503", "504", "505"]


def test_curves_of_many_tasks_show_where_the_tasks_lie():
    matrix = long_matrix(40, "full")
    left, _ = pictures.curves(matrix, "er").axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "90 % of the tasks", "50 %", "average over tasks seen"
    ]  # fmt: skip
    wide, narrow = (area.get_paths()[0].vertices for area in left.collections)
    seen = 100 * np.array(matrix[29][:30])
    assert {y for x, y in wide if x == 30} == set(np.percentile(seen, [5, 95]))
    assert {y for x, y in narrow if x == 30} == set(np.percentile(seen, [25, 75]))


def test_forgetting_passes_over_what_was_not_evaluated():
    matrix = [[0.9, None, 0.1], [None, 0.8, None], [0.5, 0.4, None]]
    # After task 2 nothing is known of task 1; after task 3: (.9 - .5 + .8 - .4) / 2.
    assert pictures.forgetting(matrix) == pytest.approx([np.nan, 0.4], nan_ok=True)


@pytest.mark.parametrize(("panels", "methods"), [(1, 50), (8, 12)])
def test_comparison_of_many_stays_small(panels, methods):
    rows = [
        {"panel": f"panel {panel}", "method": f"method {method}", "series": series, "mean": 0.5, "std": None}
        for panel in range(panels)
        for method in range(methods)
        for series in ("class-il", "task-il")
    ]
    figure = pictures.comparison(rows)
    assert max(figure.get_size_inches()) * figure.dpi <= 2000
    assert figure.dpi > 60, "letters of 8 points have 7 pixels"
    assert sum(len(axes.patches) for axes in figure.axes) == len(rows)


def test_comparison_has_a_panel_each_and_bars_with_their_values():
    rows = [
        {"panel": panel, "method": method, "series": "class-il", "mean": mean, "std": std}
        for panel, method, mean, std in (("a", "er", 0.5, 0.1), ("a", "sgd", 0.25, None), ("b", "er", None, None))
    ]
    first, second = pictures.comparison(rows).axes
    assert [axes.get_title() for axes in (first, second)] == ["a", "b"]
    assert [bar.get_width() for bar in first.patches] == pytest.approx([50, 25])
    assert drawn(first) == ["50.0", "25.0"] and len(second.patches) == 0
    assert len(first.containers) == 3  # two bars, one error bar


def test_array_and_file_have_the_size_of_the_figure(tmp_path):
    figure = pictures.accuracy_matrix(MATRIX, "er")
    array = pictures.to_array(figure)
    width, height = (int(inches * figure.dpi) for inches in figure.get_size_inches())
    assert array.shape == (height, width, 3) and array.dtype == np.uint8
    pictures.save(figure, tmp_path / "deep" / "matrix.png")
    with Image.open(tmp_path / "deep" / "matrix.png") as image:
        assert image.size == (width, height)
        assert np.array_equal(np.asarray(image.convert("RGB")), array)
    assert os.listdir(tmp_path / "deep") == ["matrix.png"]
    assert type(figure.canvas).__name__ == "FigureCanvasAgg"


@pytest.mark.parametrize(("text", "seeds"), [("0", [0]), ("0-2,5", [0, 1, 2, 5]), ("3,1-3", [3, 1, 2])])
def test_seeds(text, seeds):
    assert sweep.parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["2-0", "-1", "a", "1-", "0-x"])
def test_bad_seeds(text):
    with pytest.raises(UsageError, match="--seeds expects"):
        sweep.parse_seeds(text)


def expand(**options):
    def known(axes):
        return {"model", "dataset", "lr", *(["buffer_size"] if axes["model"] == "er" else [])}

    return sweep.expand(["sgd", "er"], ["perm-mnist", "seq-mnist"], known=known, **options)


def test_grid_gives_buffer_sizes_to_methods_that_have_them():
    grid = expand(buffer_sizes=["200", "500"], seeds=[0, 1], grid={"lr": ["0.1", "0.2"]})
    assert len(grid) == 2 * (2 * 2 + 2 * 2 * 2)  # datasets * (sgd: rates * seeds + er: sizes * rates * seeds)
    assert all(("buffer_size" in axes) == (axes["model"] == "er") for axes in grid)
    assert len({tuple(axes.items()) for axes in grid}) == len(grid)
    assert grid[4] == {"model": "er", "dataset": "perm-mnist", "buffer_size": "200", "lr": "0.1", "seed": "0"}


def test_grid_knows_the_buffers_of_real_methods():
    sizes = [axes.get("buffer_size") for axes in sweep.expand(["er", "sgd", "none"], ["perm-mnist"], ["200"])]
    assert sizes == ["200", None, None]
    with pytest.raises(UsageError, match="unknown model: 'err'"):
        sweep.expand(["err"], ["perm-mnist"], buffer_sizes=["200"])
    with pytest.raises(UsageError, match="none of sgd has a buffer"):
        sweep.expand(["sgd"], ["perm-mnist"], buffer_sizes=["200"])


def test_an_axis_is_for_the_runs_that_have_its_flag(capsys):
    words = ["--models", "er", "--datasets", "seq-digits", "--seeds", "0-1", "--grid", "rho=0.05,0.1"]
    jobs, *_ = sweep._prepare([*words, "--grid", "optimizer=sgd,sam"])
    assert [job.axes for job in jobs] == [
        {"model": "er", "dataset": "seq-digits", **parts, "seed": seed}
        for parts in (
            {"optimizer": "sgd"}, {"rho": "0.05", "optimizer": "sam"}, {"rho": "0.1", "optimizer": "sam"}
        )
        for seed in "01"
    ]  # fmt: skip
    assert "only for the runs that have them: --rho" in capsys.readouterr().out
    with pytest.raises(UsageError, match="unknown flag: --rho"):
        sweep._prepare(words)
    jobs, *_ = sweep._prepare([*words, "--", "--optimizer", "sam"])
    assert [job.axes["rho"] for job in jobs] == ["0.05", "0.05", "0.1", "0.1"]


def stub_resolver(tmp_path):
    """Takes any flag; the lr 9 is wrong."""

    def resolver(argv):
        if "9" in argv:
            raise UsageError("--lr is too high.")
        return SimpleNamespace(hash="".join(argv[1::2]), results_path=str(tmp_path))

    return resolver


def test_plan_makes_argv_and_takes_equal_runs_once(tmp_path):
    grid = expand(seeds=[0])
    jobs = sweep.plan([*grid, *grid], ["--n_epochs", "2"], stub_resolver(tmp_path))
    assert jobs[0].argv == (
        "--model", "sgd", "--dataset", "perm-mnist", "--seed", "0", "--n_epochs", "2",
    )  # fmt: skip
    assert len(jobs) == 4
    assert jobs[0].label == "sgd perm-mnist seed 0"


def test_plan_reports_each_problem_once_before_any_work(tmp_path):
    with pytest.raises(UsageError) as error:
        sweep.plan(expand(grid={"lr": ["0.1", "9"]}), [], stub_resolver(tmp_path))
    assert error.value.problems == ("sgd on perm-mnist: --lr is too high.",)


def test_a_flag_that_only_some_optimizers_have_goes_to_these(capsys):
    grid = ["--grid", "optimizer=sgd,sam,gsam", "--", "--lr", "0.2", "--rho", "0.1", "--base_path=x"]
    jobs, *_ = sweep._prepare(["--models", "er", "--datasets", "perm-mnist", *grid])
    found = {
        job.axes["optimizer"]: [word for word in job.argv if word in ("--rho", "--lr", "--base_path=x")] for job in jobs
    }
    assert found == {
        "sgd": ["--lr", "--base_path=x"],
        "sam": ["--lr", "--rho", "--base_path=x"],
        "gsam": ["--lr", "--rho", "--base_path=x"],
    }
    assert "only for the runs that have them: --rho" in capsys.readouterr().out
    with pytest.raises(UsageError, match="unknown flag: --rho"):  # none of these has it
        sweep._prepare(["--models", "er", "--datasets", "perm-mnist", "--", "--rho", "0.1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "er"], "required: --datasets"),
        (["--models", "er", "--datasets", "perm-mnist", "--jobs", "0"], "--jobs must be at least 1"),
        (["--models", "er", "--datasets", "perm-mnist", "--grid", "rho"], "--grid expects flag=value"),
        (["--models", "er", "--datasets", "perm-mnist", "--grid", "buffer_size=1,2"], "Give --buffer_sizes 1,2."),
        (
            ["--models", "er", "--datasets", "perm-mnist", "--grid", "lr=1", "--grid", "lr=2"],
            "--grid lr: that axis is given twice",
        ),
        (["--models", "er", "--datasets", "perm-mnist", "--", "--seed", "1"], "--seed after -- is an axis"),
        (["--models", "er", "--datasets", "perm-mnist", "--", "--dry_run"], "--dry_run leaves no result"),
        (["--models", "er,erp", "--datasets", "perm-mnist"], "unknown model: 'erp'"),
        (["--models", "er", "--datasets", "perm-mnist", "--", "--lr", "x"], "--lr expects a number"),
    ],
)
def test_sweep_refuses_before_any_work(words, message, capsys):
    assert sweep.main(words, runner=run_stub) == 2
    assert message in capsys.readouterr().err


def run_stub(argv):
    """Stands for `main` of a run in a worker; the seed says what happens: 1 fails, 2 raises, 3 dies."""
    given = dict(zip(argv[::2], argv[1::2], strict=True))
    print("printed by the run", given["--threads"])
    seed = int(given["--seed"])
    if seed == 2:
        raise RuntimeError("broken on purpose")
    if seed == 3:
        os._exit(7)
    if seed == 0:
        make_run(Path(given["--results_path"]), given["--model"], given["--dataset"], seed, 0.75, buffer_size=None)
    return 1 if seed == 1 else 0


def test_sweep_goes_on_after_failures_and_skips_what_is_finished(tmp_path, capsys):
    def resolver(argv):  # the hash that make_run gives
        given = dict(zip(argv[::2], argv[1::2], strict=True))
        digest = f"{given['--model']}-{given['--dataset']}-sgd-{given['--seed']}-0.1"
        values = {name: given[f"--{name}"] for name in ("model", "dataset", "seed")}
        return SimpleNamespace(
            hash=digest, results_path=str(tmp_path), values=values, flags={}, code={}, continues=None, joint=True,
            model=given["--model"], dataset=given["--dataset"],
        )  # fmt: skip

    make_run(tmp_path, "sgd", "perm-mnist", 4, 0.25, buffer_size=None)
    grid = sweep.expand(["sgd"], ["perm-mnist"], seeds=[4, 2, 3, 1, 0])
    jobs = sweep.plan(grid, ["--results_path", str(tmp_path)], resolver)
    assert sweep.sweep(jobs, Local(1), ["--threads", "1"], run_stub) == 1
    said = capsys.readouterr()
    assert "5 run(s), 1 of them already finished and skipped" in said.out
    assert "sgd perm-mnist seed 0 -> domain-il 75.00 %" in said.out
    assert "50.00 ± 35.36" in said.out  # the closing table: 0.25 and 0.75, std 0.5 / sqrt(2)
    assert "3 run(s) failed" in said.err
    assert "sgd perm-mnist seed 3 (exit code 7)" in said.err
    logs = {job.axes["seed"]: job.log.read_text() if job.log.exists() else None for job in jobs}
    assert logs["4"] is None and "printed by the run 1" in logs["0"]
    assert "RuntimeError: broken on purpose" in logs["2"]


# an index of the run folders


@pytest.fixture
def indexed(tmp_path, monkeypatch):
    """Twelve runs, seven days old, in a folder whose index is written whatever their number."""
    monkeypatch.setattr(run_index, "WORTHWHILE", 1)
    monkeypatch.setattr(run_index, "RECENT_NS", -(10**12))  # as if the runs had been written long before
    for seed in range(12):
        make_run(tmp_path, seed=seed, accuracy=0.5 + seed / 100)
    return tmp_path


def accuracies(folder):
    runs = finished.find_runs([folder], say=lambda line: None)
    return {run.flags["seed"]: run.summary["metrics"]["domain-il"]["final_average_accuracy"] for run in runs}


@pytest.fixture
def reads(monkeypatch):
    """The run folders whose files are read."""
    contents, found = finished._contents, []
    monkeypatch.setattr(finished, "_contents", lambda folder: (found.append(folder), contents(folder))[1])
    return found


def test_what_the_index_has_is_not_read_again(indexed, reads):
    first = finished.load_runs([indexed])
    assert len(reads) == 12 and (indexed / run_index.FILE).is_file()
    reads.clear()
    again = finished.load_runs([indexed])
    assert reads == [] and again == first and [run.content for run in again] == [run.content for run in first]
    assert [run.path for run in again] == [run.path for run in first]
    assert tables.table(again) == tables.table(first)
    finished.write_record(again, indexed / "a")
    finished.write_record(first, indexed / "b")
    assert (indexed / "a").read_bytes() == (indexed / "b").read_bytes()
    assert not list(indexed.glob("*.new")) and not list(indexed.glob(".*.new"))


def replaced(file, text):
    fresh = file.with_name("fresh")
    fresh.write_text(text)
    os.replace(fresh, file)


@pytest.mark.parametrize("name", ["summary.json", "config.json", "environment.json"])
@pytest.mark.parametrize("how", ["in place", "replaced", "with its old times"])
def test_a_changed_file_is_read_anew(indexed, reads, name, how):
    """Of equal length too, and with the times of before put back."""
    folder = next(indexed.rglob("*-er-perm-mnist-sgd-3-*"))
    (folder / "environment.json").write_text('{"cpus": 2}')
    before = accuracies(indexed)
    reads.clear()
    file = folder / name
    status = file.stat()
    text = file.read_text().replace('"final_average_accuracy": 0.53', '"final_average_accuracy": 0.93')
    text = text.replace('"value": 3,', '"value": 7,').replace('"cpus": 2', '"cpus": 4')
    assert len(text) == status.st_size and text != file.read_text()
    if how == "replaced":
        replaced(file, text)
    else:
        file.write_text(text)
    if how == "with its old times":
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = accuracies(indexed)
    assert reads == [folder]
    if name == "summary.json":
        assert after == {**before, 3: 0.93}
    if name == "config.json":
        assert 3 not in after, "its seed is 7 now"
    (run,) = [run for run in finished.load_runs([indexed]) if run.path == folder]
    assert run.content["environment"] == {"cpus": 4 if name == "environment.json" else 2}


def test_folders_come_and_go(indexed, reads):
    accuracies(indexed)
    make_run(indexed, seed=12, accuracy=0.25)
    gone = next(indexed.rglob("*-er-perm-mnist-sgd-3-*"))
    for file in gone.iterdir():
        file.unlink()
    gone.rmdir()
    moved = next(indexed.rglob("*-er-perm-mnist-sgd-4-*"))
    moved.rename(moved.with_name("moved"))
    reads.clear()
    found = accuracies(indexed)
    assert sorted(found) == [0, 1, 2, *range(4, 13)] and found[12] == 0.25
    assert {folder.name for folder in reads} == {"moved", next(indexed.rglob("*-er-perm-mnist-sgd-12-*")).name}
    index = (indexed / run_index.FILE).read_text()
    assert "sgd-3-" not in index and "sgd-12-" in index


def test_files_that_may_change_unseen_are_read_each_time(indexed, reads, monkeypatch):
    """Within a tick of the file system's clock a file can change and look the same."""
    monkeypatch.setattr(run_index, "RECENT_NS", 10**12)
    accuracies(indexed)
    accuracies(indexed)
    assert len(reads) == 24
    assert run_index.FILE not in os.listdir(indexed) or run_index._load(indexed) == {}


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "one bit": lambda data: data.replace(b'"final_average_accuracy": 0.53', b'"final_average_accuracy": 0.73'),
    "no header": lambda data: data.partition(b"\n")[2],
    "another format": lambda data: data.replace(b'"format": 1', b'"format": 0', 1),
    "not JSON": lambda data: b"\x00\xff" * 100,
    "foreign": lambda data: signed(b'{"a": [1, 2]}'),
    "of other shape": lambda data: signed(b'[["er", 1]]'),
    "no list": lambda data: signed(b"3"),
    "unhashable": lambda data: signed(b"[[[], [], []]]"),
    "nested": lambda data: signed(b"[" * 100_000),
}


def signed(body):
    header = {"format": run_index.FORMAT, "crc32": zlib.crc32(body)}
    return json.dumps(header).encode() + b"\n" + body


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_index_is_rebuilt_without_a_word(indexed, reads, how, capsys):
    expected = accuracies(indexed)
    file = indexed / run_index.FILE
    whole = file.read_bytes()
    damaged = DAMAGE[how](whole)
    assert damaged != whole
    file.write_bytes(damaged)
    reads.clear()
    assert report.main([str(indexed)]) == 0
    assert len(reads) == 12 and capsys.readouterr().err == ""
    assert accuracies(indexed) == expected and len(reads) == 12, "from the new index"


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "link to an endless file"])
def test_what_lies_in_the_place_of_the_index_does_no_harm(indexed, reads, kind, monkeypatch):
    expected, file = accuracies(indexed), indexed / run_index.FILE
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero" if "endless" in kind else "nowhere")
    assert accuracies(indexed) == expected == accuracies(indexed)
    assert not list(indexed.glob(".*.new"))


def test_too_large_an_index_is_not_read(indexed, reads, monkeypatch):
    accuracies(indexed)
    monkeypatch.setattr(run_index, "MOST_BYTES", 100)
    reads.clear()
    assert len(accuracies(indexed)) == 12 == len(reads)


@pytest.mark.parametrize("when", ["it is made", "it is written", "it is put in place"])
def test_a_folder_that_cannot_be_written_works_without_an_index(indexed, reads, when, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if when == "it is made":
        monkeypatch.setattr(run_index, "open", full, raising=False)
    elif when == "it is written":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        monkeypatch.setattr(os, "replace", full)
    assert len(accuracies(indexed)) == 12 and len(accuracies(indexed)) == 12 and len(reads) == 24
    assert [path.name for path in indexed.iterdir()] == ["domain-il"]


def test_an_interrupt_leaves_no_half_index(indexed, monkeypatch):
    def stop(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(finished, "_contents", stop)
    with pytest.raises(KeyboardInterrupt):
        accuracies(indexed)
    assert [path.name for path in indexed.iterdir()] == ["domain-il"]


def test_two_processes_may_write_the_index_at_once(indexed):
    """Whichever comes last wins; both know all runs, and neither sees half an index."""
    code = (
        "import sys; from flatcl.utils.reports import _run_index, runs\n"
        "_run_index.WORTHWHILE, _run_index.RECENT_NS = 1, -10**12\n"
        "for _ in range(20):\n"
        "    assert len(runs.find_runs([sys.argv[1]], say=print)) == 12\n"
        "    _run_index.WORTHWHILE = 0\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(indexed)], cwd=ROOT) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(run_index._load(indexed)) == 12 and not list(indexed.glob(".*.new"))


def test_few_runs_leave_no_index(three_seeds):
    assert len(finished.load_runs([three_seeds])) == 3
    assert [path.name for path in three_seeds.iterdir()] == ["domain-il"]


def test_unfinished_and_foreign_folders_are_said_each_time(indexed):
    make_run(indexed, seed=20, status="interrupted")
    (indexed / "elsewhere" / "deep").mkdir(parents=True)
    (indexed / "elsewhere" / "summary.json").write_text("[1, 2]")
    make_run(indexed / "elsewhere" / "deep", seed=30)
    said = []
    for _ in range(2):
        assert len(finished.load_runs([indexed], said.append)) == 13, "runs below a foreign summary.json are found"
    assert said[: len(said) // 2] == said[len(said) // 2 :] and len(said) == 4
    assert any("1 interrupted" in line for line in said) and any("elsewhere" in line for line in said)


def test_nested_nonsense_in_a_run_folder_is_said_and_harms_nothing(indexed):
    """Some depths can be read and not be written, others not even read."""
    for seed, depth in enumerate((100, *range(900, 1000, 10), 10**5), start=50):
        folder = make_run(indexed, seed=seed)
        (folder / "environment.json").write_text("[" * depth + "]" * depth)
    for _ in range(2):
        said = []
        found = finished.load_runs([indexed], said.append)
        assert 50 in {run.flags["seed"] for run in found} and len(found) >= 13
        assert len(found) + len(said) == 24 and any("-61-" in line for line in said)


def test_run_folders_are_not_searched_for_runs(indexed, monkeypatch):
    """They hold most of the files: checkpoints, pictures, TensorBoard's."""
    searched, scandir = [], os.scandir
    monkeypatch.setattr(run_index.os, "scandir", lambda path: (searched.append(Path(path)), scandir(path))[1])
    finished.load_runs([indexed])
    assert searched == [
        indexed,
        indexed / "domain-il",
        indexed / "domain-il/perm-mnist",
        indexed / "domain-il/perm-mnist/er",
    ]


def test_the_matrix_is_not_kept_of_runs(indexed):
    folder = make_run(indexed, seed=40)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "accuracy": {"domain-il": [[0.5]]}}))
    for _ in range(2):
        runs = finished.load_runs([indexed])
        assert len(runs) == 13 and not any("accuracy" in run.summary for run in runs)


def test_the_outcome_of_a_run_is_looked_for_where_runs_lie(tmp_path, monkeypatch):
    """After each run of a sweep: not all folders are searched for it."""
    folder = make_run(tmp_path, seed=0, accuracy=0.625)
    make_run(folder / "checkpoint", seed=0, accuracy=0.1, time="20270101-000000")
    (digest,) = [run.summary["config_hash"] for run in finished.find_runs([folder])]
    job = SimpleNamespace(results_path=tmp_path, hash=digest, log="log")
    monkeypatch.setattr(Path, "rglob", None)
    assert sweep._outcome(job) == "domain-il 62.50 %"


# runs from before a flag or a metric


def test_a_metric_that_older_runs_lack_is_a_dash_and_a_mean_over_fewer_is_said(three_seeds):
    make_run(three_seeds, model="derpp", accuracy=0.5)
    for number, file in enumerate(sorted(three_seeds.rglob("*-er-*/summary.json"))[:2]):
        summary = json.loads(file.read_text())
        summary["metrics"]["domain-il"]["final_overall_accuracy"] = 0.5 + number / 10
        file.write_text(json.dumps(summary))
    said = []
    lines = tables.table(
        finished.load_runs([three_seeds]), by=["model"], metrics=["final_overall_accuracy"], say=said.append
    ).splitlines()
    assert lines[2:4] == ["| derpp | domain-il | 1 | – |", "| er | domain-il | 3 | 55.00 ± 7.07 |"]
    assert said == ["note: er: 2 of 3 runs have final_overall_accuracy (domain-il), its mean is theirs."]


def test_runs_from_before_an_engine_flag_are_not_a_mixture(three_seeds):
    """A flag's default is what the program did before it had the flag."""
    make_run(three_seeds, seed=5, eval_tasks="auto")
    said = []
    tables.table(finished.load_runs([three_seeds]), say=said.append)
    assert said == []
    make_run(three_seeds, seed=6, eval_tasks="seen")
    tables.table(finished.load_runs([three_seeds]), say=said.append)
    assert said == [
        "note: perm-mnist er sgd 200 mixes runs of eval_tasks = auto, seen. Split them with --by or --where."
    ]


def test_records_from_before_eval_tasks_are_the_runs_of_today(tmp_path):
    """tests/records/mnistmlp was written without the flag; a sweep need not run it again."""
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "tests/records/mnistmlp/runs.jsonl", tmp_path / "results")
    lines = [json.loads(line) for line in (tmp_path / "results/runs.jsonl").read_text().splitlines()]
    assert not any("eval_tasks" in line["config"]["flags"] for line in lines)
    line = next(line for line in lines if line["summary"]["dataset"] == "perm-mnist" and line["summary"]["seed"] == 0)
    flags = {name: entry["value"] for name, entry in line["config"]["flags"].items()}
    words = [f"--{name}={str(flags[name])}" for name in ("model", "dataset", "seed", "optimizer") if name in flags]
    words += [f"--buffer_size={flags['buffer_size']}"] if "buffer_size" in flags else []

    def done(*more):
        config = resolve([*words, "--results_path", str(tmp_path / "results"), *more])
        job = sweep.Job({}, (), config)
        return job.hash in sweep.look([job]).done

    assert done() and not done("--eval_tasks", "seen") and not done("--lr", "0.123")


def test_a_shared_optimizer_takes_its_shared_flags_along():
    """derpp's own optimizer has no --rho, the one that is given to all has."""
    words = ["--models", "derpp,mgser_sam", "--datasets", "seq-synth", "--", "--optimizer", "sam", "--rho", "0.13"]
    jobs, _, _ = sweep._prepare(words)
    assert [job.config.rho for job in jobs] == [0.13, 0.13]


def test_flags_of_a_run_that_a_sweep_is_given_say_where_they_go(capsys):
    start = ["--models", "er", "--datasets", "seq-synth"]
    for flag, hint in (
        ("--base_path", "-- --base_path VALUE"),
        ("--optimizer", "--grid optimizer="),
        ("--model", "--models"),
    ):
        assert sweep.main([*start, flag, "x"]) == 2
        assert hint in capsys.readouterr().err
    assert sweep.main([*start, "--seeds", "0-1", "--dry_run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and all(line.startswith("to do") for line in out[:2]) and out[2].startswith("2 run(s), 0")
