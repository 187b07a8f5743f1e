"""The pictures of the page of all runs: which there are, what is left out, and that the page says so."""

import json
import re
from base64 import b64decode

import pytest
from test_plots import MATRIX, SECOND, make_run

from flatcl.utils.commands import report
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import ROOT
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
        make_run(tmp_path / "no matrix", "derpp", "sam", seed=seed, matrix=None)
    words = [[title.split()[0] for title in drawn(tmp_path / name)[0]] for name in ("one", "no matrix")]
    assert words == [["Average", "Average", "Accuracy"], ["Final", "Final"]], "no heat map of one cell a row"
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
    assert note == (
        "These runs: not drawn, since their runs differ in more than the seed (lr = 0.1, 0.3): er sgd seq-digits 100. "
        "Split them with --by, or give --mix."
    )
    bars = next(svg for title, svg in figures.items() if "intervals" in title)
    assert "derpp + sgd" in bars and "er + sam" in bars and ">er + sgd" not in bars
    kinds = page_pictures._kinds(load_runs([results]), Choice("", by=["model", "optimizer", "lr"]))
    assert kinds == (
        [kind for kind in plots.KINDS if kind != "heat"],
        ["no heat map: it needs two keys, --by has 3: model, optimizer, lr."],
    )
    figures, notes = drawn(results, mix=True)
    bars = next(svg for title, svg in figures.items() if "intervals" in title)
    assert ">er + sgd" in bars and any("mixes runs of lr" in line for line in notes)


@pytest.mark.parametrize(
    ("limit", "value", "left", "note"),
    [
        ("MOST_GROUPS", 3, [], "no pictures of 4 groups in 1 combinations of benchmark, memory size and setting"),
        ("MOST_PANELS", 0, [], "no pictures of 4 groups in 1 combinations of benchmark, memory size and setting"),
        ("MATRICES_OF", 7, ["compute", "bars", "heat"], "accuracy matrices are read of at most 7 runs, here are 8."),
        (
            "MOST_MATRICES",
            3,
            ["tasks", "forgetting", "compute", "bars", "heat"],
            "no accuracy matrices: drawn are at most 3, here are 4. Choose with --where.",
        ),
        ("MANY", 3, ["bars", "heat"], "no lines, points and matrices of 4 groups: at most 3 can be told apart."),
    ],
)
def test_large_results_have_fewer_pictures_and_a_note(results, monkeypatch, limit, value, left, note):
    monkeypatch.setattr(plots if limit == "MANY" else page_pictures, limit, value)
    kinds, (said,) = page_pictures._kinds(load_runs([results]), Choice("final_average_accuracy"))
    assert kinds == left and said.startswith(note)


@pytest.mark.parametrize(
    ("by", "said"), [(["model"], "has 1: model."), (["model", "optimizer", "lr"], "has 3: model,")]
)
def test_a_heat_map_of_other_than_two_keys_is_missing_with_a_note(results, by, said):
    for seed in range(2):
        make_run(results, "er", "adam", seed, lr=0.3)
    runs = drawn(results, by=by, mix=True)
    assert not any("for each method and optimizer" in title for title in runs[0])
    assert any("no heat map: it needs two keys" in note and said in note for note in runs[1])
    assert "A heat map needs two keys" in (ROOT / "docs/html_report.md").read_text()


def test_the_limits_of_the_pictures_are_those_that_the_page_says():
    text = " ".join((ROOT / "docs/html_report.md").read_text().split())
    assert (
        f"are drawn of at most {plots.MANY} groups, bars and heat maps of at most {page_pictures.MOST_GROUPS};" in text
    )
    assert f"at most {page_pictures.MOST_MATRICES} matrices" in text
    assert f"more than {page_pictures.MOST_PANELS} of these combinations" in text


def test_pictures_have_limited_room_and_notes_are_short(results, monkeypatch):
    figures, _ = drawn(results / "seq-digits")
    monkeypatch.setattr(page_pictures, "MOST_BYTES", len(next(iter(figures.values()))))
    monkeypatch.setattr(page_pictures, "NOTE", 40)
    figures, notes = drawn(results)
    assert len(figures) == 1 and len(notes) == len(plots.KINDS) - 1
    assert all(len(line) <= 40 and line.endswith(" ...") for line in notes)


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
