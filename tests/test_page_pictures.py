"""The pictures of the page of all runs: which there are, what is left out, and that the page says so."""

import json
import re
from base64 import b64decode

import pytest
from test_plots import MATRIX, SECOND, make_run

from flatcl.utils.commands import report
from flatcl.utils.errors import UsageError
from flatcl.utils.reports import page_pictures, plots
from flatcl.utils.reports.page_pictures import Choice, draw
from flatcl.utils.reports.runs import all_runs, load_runs, write_record


@pytest.fixture
def results(tmp_path):
    """Two methods with two optimizers each, two seeds."""
    for model in ("er", "derpp"):
        for optimizer in ("sgd", "sam"):
            for seed, matrix in enumerate((MATRIX, SECOND)):
                make_run(tmp_path / "results", model, optimizer, seed, matrix)
    return tmp_path / "results"


def drawn(folder, **choice):
    return draw(all_runs([folder]), [folder], Choice(**{"metric": "final_average_accuracy", **choice}))


def test_each_kind_is_drawn_once_with_ids_of_its_own(results):
    figures, notes = drawn(results)
    assert len(figures) == len(plots.KINDS) and notes == []
    titles = list(figures)
    assert titles[0] == "Average accuracy on the tasks learned so far, after each task"
    assert "Final average accuracy with 95 % t intervals, from the best to the worst" in titles
    ids = [set(re.findall(r'\bid="([^"]*)"', svg)) for svg in figures.values()]
    assert all(ids) and len(set.union(*ids)) == sum(map(len, ids))


def test_the_metric_is_the_one_that_was_asked_for(results):
    figures, _ = drawn(results, metric="forgetting_chaudhry18")
    assert "Average forgetting for each method and optimizer" in figures
    assert "average forgetting (%)" in figures["Average forgetting for each method and optimizer"]


def test_what_a_kind_needs_decides_whether_it_is_drawn(tmp_path):
    for seed in range(2):
        make_run(tmp_path / "one", seed=seed)
        make_run(tmp_path / "no matrix", "er", seed=seed, matrix=None)
        make_run(tmp_path / "no matrix", "derpp", seed=seed, matrix=None)
    words = [[title.split()[0] for title in drawn(tmp_path / name)[0]] for name in ("one", "no matrix")]
    assert words == [["Average", "Average", "Accuracy"], ["Final", "Final"]], "no heat map of one column"
    file = make_run(tmp_path / "stopped") / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "crashed"}))
    assert drawn(tmp_path / "stopped") == ({}, [])


def test_each_record_has_its_pictures_and_so_have_validation_splits(results, tmp_path):
    make_run(tmp_path / "held out", validation=True)
    for name, folder in (("first", results), ("second", tmp_path / "held out")):
        (tmp_path / "records" / name).mkdir(parents=True)
        (tmp_path / "records" / name / "README.md").write_text(f"# The {name} record\n")
        write_record(load_runs([folder]), tmp_path / "records" / name / "runs.jsonl")
    titles = list(drawn(tmp_path / "records")[0])
    assert sum(title.startswith("The first record: ") for title in titles) == len(plots.KINDS)
    others = [title for title in titles if title.startswith("The second record, validation split: ")]
    assert others and len(titles) == len(plots.KINDS) + len(others)


def test_groups_that_mix_unlike_runs_are_not_drawn_unless_asked(results):
    make_run(results, seed=5, lr=0.3)
    figures, (note,) = drawn(results)
    assert figures == {} and note.startswith("These runs: no pictures. 1 row(s) would be a mean over runs")
    figures, _ = drawn(results, by=["model", "optimizer", "lr"])
    assert len(figures) == len(plots.KINDS) - 1, "a heat map has two keys"
    figures, notes = drawn(results, mix=True)
    assert len(figures) == len(plots.KINDS) and any("mixes runs of lr" in line for line in notes)


@pytest.mark.parametrize(
    ("limit", "value", "left", "note"),
    [
        ("MOST_GROUPS", 3, 0, "no pictures of 4 groups in 1 combinations of benchmark, memory size and setting: drawn"),
        ("MOST_PANELS", 0, 0, "no pictures of 4 groups in 1 combinations"),
        ("MATRICES_OF", 7, 3, "accuracy matrices are read of at most 7 runs, here are 8."),
        ("MOST_MATRICES", 3, 5, None),
        ("MOST_BYTES", 1, 0, "not drawn, since all pictures together take at most 1e-06 MB."),
    ],
)
def test_large_results_have_fewer_pictures_and_a_note(results, monkeypatch, limit, value, left, note):
    monkeypatch.setattr(page_pictures, limit, value)
    figures, notes = drawn(results)
    assert len(figures) == left
    assert any(note in line for line in notes) if note else notes == []


def test_more_groups_than_can_be_told_apart_are_bars_alone(results, monkeypatch):
    monkeypatch.setattr(plots, "MANY", 3)
    figures, (note,) = drawn(results)
    assert [title.split()[-1] for title in figures] == ["worst", "optimizer"]
    assert "no lines and points of 4 groups: at most 3 can be told apart" in note


def test_notes_are_short(results, monkeypatch):
    for seed in range(100, 190):
        make_run(results, seed=seed, matrix=None)
    _, notes = drawn(results)
    assert notes and all(len(line) <= page_pictures.NOTE for line in notes)
    assert any(line.endswith(" ...") for line in notes)


def test_the_command_puts_them_into_the_page(results, tmp_path, capsys):
    make_run(results / "other", "old", matrix=None)
    for name in ("a.html", "b.html"):
        assert report.main([str(results), "--html", str(tmp_path / name)]) == 0
    assert capsys.readouterr().err == ""
    text = (tmp_path / "a.html").read_text()
    assert text == (tmp_path / "b.html").read_text()
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert len(images) == len(plots.KINDS) and all(b64decode(image).startswith(b"<svg ") for image in images)
    assert "left out, since they have no accuracy matrix: old on seq-digits with sgd (seeds 0)." in text


def test_unknown_words_are_the_errors_of_the_page(results, tmp_path, capsys):
    assert report.main([str(results), "--html", str(tmp_path / "a.html"), "--by", "modle"]) == 2
    assert capsys.readouterr().err.count("unknown key: 'modle'") == 1
    with pytest.raises(UsageError):
        plots.figure("bars", load_runs([results]), by=["modle"])
