"""`flatcl export`: runs as tidy tables and as Mammoth's lines, on run folders made by hand; the numbers are worked out
here."""

import ast
import csv
import json
import sys

import pytest

from flatcl.__main__ import main
from flatcl.utils.registry import ROOT

MATRIX = [[0.9, 0.25, None], [0.5, 0.75, 0.125], [0.25, 0.5, 1.0]]


def make_run(root, seed=0, status="finished", matrix=MATRIX, commit="c0ffee", time="120000", notes="", **flags):
    """A run folder as a run leaves it: three tasks, class-il and task-il."""
    given = {"model": "er", "dataset": "seq-synth", "optimizer": "sgd", "seed": seed, "lr": 0.1, "buffer_size": 200,
             "lr_milestones": [1, 2], "base_path": f"/secret/{seed}", **flags}  # fmt: skip
    digest = f"{seed:04d}{len(json.dumps(flags)):08d}"
    folder = root / "class-il" / "seq-synth" / "er" / f"20260101-{time}-{digest}"
    folder.mkdir(parents=True)
    is_joint = len(matrix) == 1
    numbers = {"final_average_accuracy": 0.5, "average_incremental_accuracy": None if is_joint else 0.6,
               "forgetting_mammoth": 0.25, "bwt_gem17": -0.25, "fwt_gem17": None}  # fmt: skip
    summary = {
        "model": "er", "dataset": "seq-synth", "optimizer": "sgd", "setting": "class-il", "seed": seed,
        "status": status, "metrics": {"class-il": numbers, "task-il": {**numbers, "final_average_accuracy": 0.75}},
        "config_hash": digest, "cost": {"train_s": 10.5}, "notes": notes,
    }  # fmt: skip
    flags = {name: {"value": value, "origin": "argv"} for name, value in given.items()}
    config = {"protocol": 1, "config_hash": digest, "plugins": [], "flags": flags}
    tasks = [0] if is_joint else list(range(len(matrix)))
    accuracy = {"tasks": tasks, "epoch": 0, "accuracy": {"class-il": matrix, "task-il": matrix}, "untrained": {}}
    lines = [{"step": 5, "train/loss": 1.5, "train/lr": 0.1}, {"task": 0, "step": 8, "accuracy": {}},
             {"step": 10, "train/loss": None}]  # fmt: skip
    environment = {"commit": commit, "uncommitted_changes": False}
    for name, content in (("summary", summary), ("config", config), ("accuracy", accuracy)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 11, "tr')
    return folder


def rows(file):
    with open(file, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def two(tmp_path):
    return [make_run(tmp_path, seed=seed, lr=0.1 * (seed + 1)) for seed in (0, 1)]


def exported(runs, file, *words, code=0):
    assert main(["export", str(runs), "--out", str(file), *words]) == code
    return file


def test_a_row_is_a_number_of_a_run_in_a_setting(two, tmp_path, out, capsys):
    found = rows(exported(tmp_path, out / "runs.csv"))
    assert "runs.csv: 22 rows of 2 runs" in capsys.readouterr().out  # 5 metrics in 2 settings, and a cost
    assert len(found) == 2 * (5 * 2 + 1)
    (row,) = [
        row
        for row in found
        if (row["seed"], row["setting"], row["metric"]) == ("1", "task-il", "final_average_accuracy")
    ]
    assert row == {
        "run": two[1].name, "config_hash": two[1].name.rpartition("-")[2], "commit": "c0ffee",
        "uncommitted_changes": "false", "status": "finished", "dataset": "seq-synth", "model": "er",
        "optimizer": "sgd", "buffer_size": "200", "seed": "1", "lr": "0.2", "setting": "task-il",
        "metric": "final_average_accuracy", "value": "0.75",
    }  # fmt: skip
    assert {row["metric"] for row in found if row["setting"] == ""} == {"train_s"}
    assert [row["value"] for row in found if row["metric"] == "fwt_gem17"] == [""] * 4


def test_columns_are_the_flags_that_vary_but_not_where_files_lie(tmp_path, out):
    make_run(tmp_path, seed=0)
    assert "lr" not in rows(exported(tmp_path, out / "one.csv"))[0], "it does not vary"
    make_run(tmp_path, seed=1, lr_milestones=[3], alpha=0.5)
    found = rows(exported(tmp_path, out / "runs.csv"))
    assert {(row["seed"], row["lr_milestones"], row["alpha"]) for row in found} == {("0", "1 2", ""), ("1", "3", "0.5")}
    assert "base_path" not in found[0]


def test_the_matrix_has_a_row_for_each_accuracy_that_was_measured(tmp_path, out):
    make_run(tmp_path)
    found = rows(exported(tmp_path, out / "matrix.csv", "--what", "matrix", "--setting", "class-il"))
    cells = {(row["after_task"], row["on_task"]): float(row["accuracy"]) for row in found}
    assert len(found) == len(cells) == 8 and cells["1", "0"] == 0.5 and cells["2", "2"] == 1.0
    assert ("0", "2") not in cells and {row["setting"] for row in found} == {"class-il"}


def test_curves_are_the_points_between_tasks(tmp_path, out):
    make_run(tmp_path)
    found = rows(exported(tmp_path, out / "curves.csv", "--what", "curves"))
    assert [(row["step"], row["metric"], row["value"]) for row in found] == [
        ("5", "train/loss", "1.5"), ("5", "train/lr", "0.1"), ("10", "train/loss", "")
    ]  # fmt: skip


def test_all_runs_are_there_and_of_equal_ones_a_finished_one(tmp_path, out, capsys):
    make_run(tmp_path, seed=0, time="100000")
    make_run(tmp_path, seed=0, status="interrupted", time="110000")
    make_run(tmp_path, seed=1, status="crashed")
    found = rows(exported(tmp_path, out / "runs.csv"))
    assert {(row["seed"], row["status"]) for row in found} == {("0", "finished"), ("1", "crashed")}
    err = capsys.readouterr().err
    assert "1 run(s) repeat another one's flags" in err
    assert "note: 1 crashed: their metrics are of the tasks so far. --where status=finished leaves them out." in err
    exported(tmp_path, out / "whole.csv", "--where", "status=finished")
    assert "of the tasks so far" not in capsys.readouterr().err


@pytest.mark.parametrize("note", ["=1+1", "+1", "-1+2", "@SUM(A1)", "\t=1", " \r\n=cmd|' /C calc'!A0", "＝1+1"])
def test_a_note_is_no_formula_for_a_spreadsheet(note, tmp_path, out):
    make_run(tmp_path, seed=0, notes=note)
    make_run(tmp_path, seed=1, notes='a, "b"\n=c')
    found = {row["seed"]: row["notes"] for row in rows(exported(tmp_path, out / "runs.csv"))}
    assert found == {"0": f"'{note}", "1": 'a, "b"\n=c'}
    (line, _) = map(ast.literal_eval, exported(tmp_path, out / "runs.pyd").read_text().splitlines())
    assert line["notes"] == note, "no spreadsheet reads it"


def test_negative_numbers_stay_numbers(tmp_path, out):
    make_run(tmp_path)
    found = rows(exported(tmp_path, out / "runs.csv"))
    assert {row["value"] for row in found if row["metric"] == "bwt_gem17"} == {"-0.25"}


def test_mammoths_lines(tmp_path, out):
    make_run(tmp_path, n_epochs=2, batch_size=10)
    (line,) = exported(tmp_path, out / "logs.pyd").read_text().splitlines()
    found = ast.literal_eval(line)
    assert {key: found[key] for key in ("dataset", "model", "buffer_size", "seed", "lr", "batch_size", "n_epochs")} == {
        "dataset": "seq-synth", "model": "er", "buffer_size": 200, "seed": 0, "lr": 0.1, "batch_size": 10,
        "n_epochs": 2,
    }  # fmt: skip
    results = {key: value for key, value in found.items() if "_task" in key or key.endswith("ing") or "transfer" in key}
    assert results == {
        "setting": "class-il", "forgetting": 25.0, "backward_transfer": -25.0,
        "accmean_task1": 90.0, "accmean_task2": 62.5, "accmean_task3": pytest.approx(175 / 3),
        "accuracy_1_task1": 90.0, "accuracy_1_task2": 50.0, "accuracy_2_task2": 75.0,
        "accuracy_1_task3": 25.0, "accuracy_2_task3": 50.0, "accuracy_3_task3": 100.0,
    }  # fmt: skip
    assert found["lr_milestones"] == [1, 2] and found["status"] == "finished" and "base_path" not in found


def test_a_method_without_results_in_the_setting_of_the_benchmark_has_a_line(tmp_path, out):
    """pnn must know the task, and has task-il alone."""
    folder = make_run(tmp_path)
    for name in ("summary.json", "accuracy.json"):
        content = json.loads((folder / name).read_text())
        for part in ("metrics", "accuracy"):
            content.get(part, {}).pop("class-il", None)
        (folder / name).write_text(json.dumps(content))
    exported(tmp_path, out / "logs.pyd")
    line = ast.literal_eval((out / "logs.pyd").read_text())
    assert line["setting"] == "task-il" and "accmean_task3" in line


def test_a_note_in_another_encoding_stops_no_export(tmp_path, out):
    make_run(tmp_path, seed=0, notes="caf\udce9")
    make_run(tmp_path, seed=1)
    exported(tmp_path, out / "a.csv")
    assert {row["notes"] for row in rows(out / "a.csv")} == {"caf?", ""}


def test_a_joint_run_has_trained_all_tasks(tmp_path, out):
    make_run(tmp_path, matrix=[[0.5, 0.25, 0.75]], joint=True)
    (line,) = exported(tmp_path, out / "logs.pyd").read_text().splitlines()
    found = ast.literal_eval(line)
    assert found["accmean_task3"] == 50.0 and found["accuracy_2_task3"] == 25.0 and "accmean_task1" not in found
    cells = rows(exported(tmp_path, out / "matrix.csv", "--what", "matrix"))
    assert {row["after_task"] for row in cells} == {"2"}


def test_parquet_has_the_types_of_the_values(two, tmp_path, out):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra 'export' (pyarrow) is not installed")
    make_run(tmp_path, seed=2, lr=1, notes="=1", nesterov=True)
    table = parquet.read_table(exported(tmp_path, out / "runs.parquet"))
    types = {field.name: str(field.type) for field in table.schema}
    assert (types["seed"], types["lr"], types["nesterov"], types["notes"], types["value"]) == (
        "int64", "double", "bool", "string", "double"
    )  # fmt: skip
    content = table.to_pylist()
    assert len(content) == 33 and {row["lr"] for row in content} == {0.1, 0.2, 1.0}
    assert {row["notes"] for row in content} == {"", "=1"} and {row["nesterov"] for row in content} == {None, True}


def test_without_pyarrow_one_message_says_what_to_install(two, tmp_path, out, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    exported(tmp_path / "nowhere", out / "runs.parquet", code=2)  # before the runs are looked for
    (line,) = capsys.readouterr().err.splitlines()
    assert 'pip install "flatcl[export]"' in line and "pip install pyarrow" in line


@pytest.mark.parametrize(
    ("file", "words", "said"),
    [
        ("runs.xlsx", (), "--out must end in .csv, .parquet or .pyd"),
        ("runs.pyd", ("--what", "curves"), "no effect on a .pyd file"),
        ("no/runs.csv", (), "there is no folder"),
        ("runs.csv", ("--what", "matrx"), "matrix"),
        ("runs.csv", ("--setting", "clas-il"), "class-il"),
        ("runs.csv", ("--what", "curves", "--setting", "class-il"), "have none"),
        ("runs.csv", ("--where", "model=derpp"), "no run has model = derpp"),
        ("runs.csv", ("--where", "seed"), "--where expects key=value"),
    ],
)
def test_what_cannot_be_done_is_said_and_writes_nothing(file, words, said, two, tmp_path, out, capsys):
    exported(tmp_path, out / file, *words, code=2)
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and not list(out.iterdir())


def test_records_have_metrics_and_no_matrix(out, capsys):
    record = ROOT / "tests/records/mnistmlp"
    found = rows(exported(record, out / "runs.csv", "--where", "model=er", "seed=0"))
    assert found and len({row["commit"] for row in found}) == 1 and all(row["value"] for row in found[:3])
    exported(record, out / "matrix.csv", "--what", "matrix", code=2)
    err = capsys.readouterr().err
    assert "left out" in err and "no run has what is asked for" in err and len(err.splitlines()) == 2
    assert [path.name for path in out.iterdir()] == ["runs.csv"]


def test_records_have_the_matrices_of_their_runs(two, tmp_path, out):
    kept = out / "kept"
    kept.mkdir()
    words = ["--mix", "--metrics", "final_average_accuracy"]
    code = main(["report", str(tmp_path), *words, "--record", str(kept / "runs.jsonl")])
    assert code == 0
    cells = ("config_hash", "setting", "after_task", "on_task", "accuracy")
    found = [
        [
            tuple(row[name] for name in cells)
            for row in rows(exported(runs, out / f"{runs.name}.csv", "--what", "matrix"))
        ]
        for runs in (tmp_path, kept)
    ]
    assert found[0] == found[1] and len(found[0]) == 2 * 2 * 8
    (lines, kept_lines) = (
        [ast.literal_eval(line) for line in exported(runs, out / f"{runs.name}.pyd").read_text().splitlines()]
        for runs in (tmp_path, kept)
    )
    assert [line["accmean_task3"] for line in kept_lines] == [line["accmean_task3"] for line in lines]


def test_damaged_files_of_a_run_cost_only_its_rows(two, tmp_path, out, capsys):
    for damage in ("", "[]", '{"tasks": [0], "accuracy": {"class-il": [[0.5], [1]]}}', '{"tasks": 1, "accuracy": {}}',
                   '{"tasks": ["=1"], "accuracy": {"class-il": [[0.5]]}}'):  # fmt: skip
        (two[0] / "accuracy.json").write_text(damage)
        found = rows(exported(tmp_path, out / "matrix.csv", "--what", "matrix"))
        assert {row["seed"] for row in found} == {"1"} and "1 run(s) left out" in capsys.readouterr().err
