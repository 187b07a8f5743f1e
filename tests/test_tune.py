"""flatcl tune: each choice is worked out again from the summaries of the runs."""

import json
import math
import multiprocessing
import os
import sqlite3
import statistics
import sys
import time
from dataclasses import replace

import pytest

from flatcl.utils import studies
from flatcl.utils.arguments import resolve
from flatcl.utils.commands import train, tune
from flatcl.utils.engine import run
from flatcl.utils.engine.lock import Lock
from flatcl.utils.engine.trainer import Trainer
from flatcl.utils.errors import RunFailed
from flatcl.utils.registry import ROOT
from flatcl.utils.reports.runs import find_runs
from flatcl.utils.studies import _pruning, _tpe
from flatcl.utils.studies._tune_section import Range, Section
from flatcl.utils.studies.engines import BUSY, INTERRUPTED
from flatcl.utils.studies.engines.local import Local
from flatcl.utils.studies.tune import (
    Cell,
    Trial,
    cells_of,
    choose,
    configurations,
    ends,
    entry_of,
    read_record,
    update_record,
)

TUNE = """
models: [er, sgd]
datasets: [seq-synth]
seeds: 1
flags: {n_tasks: 2}
tune:
  space: {minibatch_size: [1, 16]}
  seeds: [0, 3]
"""
TPE = """
models: [er]
datasets: [seq-synth]
seeds: 1
flags: {n_tasks: 2}
tune:
  space: {lr: {low: 0.001, high: 0.1, log: true}, minibatch_size: {low: 4, high: 16}}
  method: tpe
  trials: TRIALS
"""


class Here(Local):
    """An engine that makes the runs in this process, since each worker would import torch anew."""

    def run(self, jobs, on_end, extra, runner, on_wait):
        for job in jobs:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            while (code := runner([*job.argv, *extra])) == BUSY:
                time.sleep(0.05)
            job.log.write_text(f"the last words of {job.hash}\nexit code {code}\n")
            on_end(job, code, "")


def waiting(argv):
    """`train` in a worker, where a run with a tiny rate waits after its first task until it is stopped."""
    train_task, end = Trainer._train_task, time.monotonic() + 60

    def wait(self, task):
        while self.progress.tasks and self.config.lr < 1e-6 and self._stop_signal is None and time.monotonic() < end:
            time.sleep(0.02)
        return train_task(self, task)

    Trainer._train_task = wait
    try:
        return train.main(argv)
    finally:
        Trainer._train_task = train_task


@pytest.fixture
def study(tmp_path):
    """Writes a study; returns the words of a command whose runs go to tmp_path/results."""

    def write(text, name="study.yaml"):
        (tmp_path / name).write_text(text)
        return [str(tmp_path / name), "--", "--results_path", str(tmp_path / "results")]

    return write


@pytest.fixture
def here(monkeypatch):
    """Runs are made in this process; returns the command lines of those that were begun."""
    begun = []

    def runner(argv):
        begun.append(argv)
        return train.main(argv)

    monkeypatch.setattr(tune, "chosen", lambda args: Here(args.jobs or 1))
    monkeypatch.setattr(run, "_draw", lambda draw: None)  # pictures take most of the time of so short a run
    return lambda argv: (tune.main(argv, runner), begun)[0], begun


def runs_of(results):
    return find_runs([results], lambda line: None)


def record_of(results, name="study"):
    return json.loads((results / "tune" / f"{name}.json").read_text())


def accuracy(run):
    return run.summary["metrics"]["class-il"]["final_average_accuracy"]


def test_the_choice_is_the_argmax_of_the_validation_runs_and_the_test_runs_have_it(study, here, tmp_path, capsys):
    main, begun = here
    words, results = study(TUNE), tmp_path / "results"
    assert main([words[0], "--until", "search", *words[1:]]) == 0
    searched = runs_of(results)
    assert len(searched) == len(begun) == 4  # 2 sizes, 2 seeds; sgd has no such flag
    assert all(run.get("validation") and run.get("seed") in (0, 3) and run.get("model") == "er" for run in searched)
    values = {}
    for one in searched:
        values.setdefault(str(one.get("minibatch_size")), []).append(accuracy(one))
    best = max(values, key=lambda size: statistics.fmean(values[size]))
    before = record_of(results)
    er, sgd = before["cells"]
    assert er["chosen"]["flags"] == {"minibatch_size": best} and before["commit"]
    assert er["chosen"]["value"] == pytest.approx(statistics.fmean(values[best]))
    assert er["num_configurations"] == 2 and (sgd["num_configurations"], sgd["chosen"]["flags"]) == (1, {})

    assert main(words) == 0
    assert record_of(results) == before
    tested = {run.get("model"): run for run in runs_of(results) if not run.get("validation")}
    assert len(begun) == 6, "something was run twice"
    assert [tested[model].get("seed") for model in ("er", "sgd")] == [1, 1]
    assert str(tested["er"].get("minibatch_size")) == best
    assert tested["er"].get("notes") == "tuned: 2 configurations, best_mean on validation"
    assert tested["sgd"].get("notes") == ""
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["er", "seq-synth", "2", "minibatch_size", best, f"{100 * er['chosen']['value']:.2f}"] in rows

    assert main([words[0], "--show", *words[1:]]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("er ")]
    means = sorted(((100 * statistics.fmean(own), size) for size, own in values.items()), reverse=True)
    assert [(row[3], row[4]) for row in rows] == [(size, f"{mean:.2f}") for mean, size in means]
    assert ["chosen" in row for row in rows] == [True, False]

    for old, new, said in (  # under the same name
        ("[1, 16]", "[1, 8]", 'tune.space was {"minibatch_size": ["1", "16"]} and is {"minibatch_size": ["1", "8"]}'),
        ("n_tasks: 2", "n_tasks: 5", "--n_tasks was 2 and is 5"),
    ):
        assert main(study(TUNE.replace(old, new))) == 2
        assert said in capsys.readouterr().err
    assert main(study(TUNE.replace("[er, sgd]", "[er, sgd, ewc_on]"))) == 0 and len(begun) == 7
    assert record_of(results)["cells"][:2] == before["cells"], "a further model changes what was chosen"


def test_unequal_budgets_are_noted(study, capsys):
    text = TUNE.replace("[er, sgd]", "[er, derpp]").replace("space: {", "space: {alpha: [0.1, 0.2, 0.3], ")
    _, tuning = tune._prepare(study(text), train.main)
    tuning._say_budget(tuning.cells)
    out, error = capsys.readouterr()
    assert "er seq-synth: 2 trials" in out and "derpp seq-synth: 6 trials" in out
    assert "unequal numbers of trials" in error
    drawn = text.replace("minibatch_size: [1, 16]", "minibatch_size: [1]") + "  method: random\n  trials: 3\n"
    _, tuning = tune._prepare(study(drawn), train.main)
    tuning._say_budget(tuning.cells)
    out, error = capsys.readouterr()
    assert "er seq-synth: 1 trial\n" in out and "derpp seq-synth: 3 trials\n" in out
    assert error == "note: the space of er seq-synth has only 1 configuration\n"


def test_draws_are_reproducible_and_the_same_for_all_cells():
    space = {"lr": Range(0.001, 0.1, log=True), "rho": ("0.05", "0.1")}
    section = Section(space, "random", trials=8, random_seed=3)
    er, sam = Cell({"model": "er"}, {"lr": space["lr"]}, ()), Cell({"model": "sam"}, space, ())
    plain, both = configurations(section, er, ()), configurations(section, sam, ())
    assert plain == configurations(section, er, ()) and len(plain) == len(both) == 8
    assert [flags["lr"] for flags in plain] == [flags["lr"] for flags in both]
    assert all(0.001 <= float(flags["lr"]) <= 0.1 for flags in plain)
    assert {flags["rho"] for flags in both} == {"0.05", "0.1"}
    other = Section(space, "random", trials=8, random_seed=4)
    assert configurations(other, er, ()) != plain
    few = Cell({"model": "er"}, {"rho": ("1", "2", "3")}, ())
    assert sorted(flags["rho"] for flags in configurations(section, few, ())) == ["1", "2", "3"]
    whole = Cell({}, {"minibatch_size": Range(1, 5)}, ())
    assert {flags["minibatch_size"] for flags in configurations(section, whole, {"minibatch_size"})} <= set("12345")
    assert ends(sam, ()) == [{"lr": "0.001", "rho": "0.05"}, {"lr": "0.1", "rho": "0.1"}]


def test_a_log_range_is_even_in_the_logarithm():
    cell = Cell({}, {"lr": Range(1e-4, 1.0, log=True)}, ())
    drawn = configurations(Section(cell.space, "random", trials=1000), cell, ())
    logs = [math.log10(float(flags["lr"])) for flags in drawn]
    # uniform on [-4, 0]: mean -2, standard error 4 / sqrt(12) / sqrt(1000) = 0.037
    assert abs(statistics.fmean(logs) + 2) < 4 * 0.037


def trial(number, value, **flags):
    return Trial(number, flags, "finished" if value is not None else "failed", {} if value is None else {0: value})


def test_a_shared_flag_has_the_highest_mean_over_the_models():
    section = Section({"lr": ("1", "2"), "alpha": ("3", "4")}, share=("lr",))
    a, b = (Cell({"model": name}, dict(section.space), (("dataset", "d"),)) for name in "ab")
    trials = {
        a: [trial(0, 0.9, lr="1", alpha="3"), trial(1, 0.1, lr="1", alpha="4"), trial(2, 0.7, lr="2", alpha="3")],
        b: [trial(0, 0.1, lr="1", alpha="3"), trial(1, 0.6, lr="2", alpha="3"), trial(2, 0.65, lr="2", alpha="4")],
    }
    # lr 1: (0.9 + 0.1) / 2 = 0.5; lr 2: (0.7 + 0.65) / 2 = 0.675
    assert {cell.axes["model"]: own.number for cell, own in choose(section, trials).items()} == {"a": 2, "b": 2}
    alone = choose(Section(section.space), trials)
    assert {cell.axes["model"]: own.number for cell, own in alone.items()} == {"a": 0, "b": 2}
    with pytest.raises(RunFailed, match="no trial to choose for b"):
        choose(Section(section.space), {b: [trial(0, None, lr="1", alpha="3")]})


def test_cells_share_what_they_have_in_common_but_their_model(study):
    text = "models: [er, derpp]\ndatasets: [seq-synth]\nbuffer_sizes: [50, 100]\nseeds: 1\n"
    text += "tune: {space: {lr: [0.1, 0.2], alpha: [0.1]}, share: [lr]}\n"
    cells = cells_of(studies.read(study(text)[0]))
    assert [cell.label for cell in cells] == [f"{m} seq-synth {n}" for m in ("er", "derpp") for n in (50, 100)]
    assert cells[0].group == cells[2].group != cells[1].group == cells[3].group
    assert [list(cell.space) for cell in cells] == [["lr"], ["lr"], ["lr", "alpha"], ["lr", "alpha"]]


WRONG = """
models: [er]
datasets: [seq-synth]
flags: {n_epochs: 2, validation: 1}
tune:
  space:
    lr: {low: 0.1, high: 0.01}
    n_epochs: [1, zwei]
    rho: [0.1]
    larning_rate: [1]
    seed: [1]
  method: tpee
  metric: accuracy
  trials: 0
  share: [alpha]
  serch: 1
"""


def test_all_mistakes_are_said_at_once_with_line_and_key(study, here, capsys):
    main, begun = here
    assert main(study(WRONG)) == 2 and not begun
    error = capsys.readouterr().err
    for said in (
        "line 7, tune.space.lr: low must be less than high, got 0.1 and 0.01",
        "line 8, tune.space.n_epochs: --n_epochs is also given at",
        "line 8, tune.space.n_epochs[1]: --n_epochs expects a whole number, got 'zwei'.",
        "line 10, tune.space.larning_rate: unknown flag",
        "line 11, tune.space.seed: --seed cannot be searched",
        "line 12, tune.method: expects one of grid, random, tpe, got 'tpee'. Did you mean",
        "line 13, tune.metric: expects one of",
        "line 14, tune.trials: expects a whole number from 1",
        "line 15, tune.share: 'alpha' is not in the space",
        "line 16, tune.serch: unknown key",
        "--validation is set by the search, and also at",
    ):
        assert said in error, said


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("minibatch_size: [1, 16]", "rho: [0.1]", "tune.space.rho: none of the runs has this flag"),
        ("minibatch_size: [1, 16]", "lr: [-1, 0.05]", "--lr must be greater than 0, got -1"),
        ("seeds: [0, 3]", "seeds: [0, 1]", "line 8, tune.seeds: seed 1 is both of the search (tune.seeds: 0, 1) and of "
         "the study (seeds: 1). Give others, or same_seeds: true."),
        ("seeds: 1\n", "", "seed 0 is both of the search (tune.seeds: 0, 3) and of the study (seeds: 0, by default)."),
        ("seeds: 1\nflags: {n_tasks: 2}\ntune:\n  space: {minibatch_size: [1, 16]}\n  seeds: [0, 3]",
         "seeds: 0-2\ntune: {space: {minibatch_size: [1, 16]}}",
         "seed 0 is both of the search (tune.seeds: 0, by default) and of the study (seeds: 0-2). Give"),
        ("seeds: [0, 3]", "setting: domain-il", "tune.setting is domain-il, its runs have class-il"),
        ("seeds: [0, 3]", "prune: true", "a grid tries all of its values"),
        ("seeds: [0, 3]", "method: random", "needs the number of trials"),
        ("[1, 16]", "{low: 0.1, high: 1}", "a grid needs a list of values"),
        ("models:", "name: a/b\nmodels:", "names a file of the search"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_before_any_work(old, new, said, study, here, tmp_path, capsys):
    main, begun = here
    assert main(study(TUNE.replace(old, new))) == 2 and not begun
    assert said in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_what_does_not_fit_is_refused(study, tmp_path, capsys):
    words = study(TUNE)
    for flag in ("--dry_run", "--status"):
        assert tune.main([words[0], flag]) == 2
        said = f"error: unknown flag: {flag}. It is a flag of flatcl sweep. flatcl tune STUDY --show prints what was "
        assert said in capsys.readouterr().err
    assert tune.main([words[0], "--engine", "slurm", *words[1:]]) == 2
    assert "--engine slurm: a search waits for its runs" in capsys.readouterr().err
    assert tune.main([*words, "--minibatch_size", "8"]) == 2
    assert "--minibatch_size after -- is an axis of the grid" in capsys.readouterr().err
    plain = study(TUNE.partition("tune:")[0], "plain.yaml")
    assert tune.main(plain) == 2 and "has no section tune" in capsys.readouterr().err
    (tmp_path / "results/tune").mkdir(parents=True)
    (tmp_path / "results/tune/study.json").write_text("{}")
    assert tune.main(words) == 2 and "cannot be read as the record of a search" in capsys.readouterr().err


def test_without_optuna_one_message_says_what_to_install(study, here, tmp_path, monkeypatch, capsys):
    main, begun = here
    monkeypatch.setattr("flatcl.utils.extras.find_spec", lambda name: None if name == "optuna" else name)
    assert main(study(TPE.replace("TRIALS", "2"))) == 2 and not begun
    assert 'pip install "flatcl[tune]"' in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_run_that_diverges_is_a_trial_without_a_value_and_is_not_tried_again(study, here, tmp_path, capsys):
    main, begun = here
    text = TUNE.replace("minibatch_size: [1, 16]", "lr: [1e6, 0.05]").replace("[0, 3]", "0").replace("er, ", "")
    words = study(text)
    argv = [words[0], "--until", "search", *words[1:]]
    assert main(argv) == 0
    cell = record_of(tmp_path / "results")["cells"][0]
    assert [own["state"] for own in cell["trials"]] == ["diverged", "finished"], capsys.readouterr().err
    assert cell["chosen"]["flags"] == {"lr": "0.05"}
    number = len(begun)
    os.remove(tmp_path / "results/tune/study.json")
    assert main(argv) == 0 and len(begun) == number


def test_tpe_goes_on_where_a_process_was_killed_and_two_share_the_rest(study, here, tmp_path, capsys):
    pytest.importorskip("optuna", reason="optuna does not install here")
    main, begun = here
    words, results = study(TPE.replace("TRIALS", "5")), tmp_path / "results"
    start = multiprocessing.get_context("fork").Process
    first = start(target=main, args=(words,))
    first.start()
    end = time.monotonic() + 120
    while not runs_of(results) if results.exists() else True:
        assert time.monotonic() < end and first.is_alive()
        time.sleep(0.02)
    first.kill()
    first.join()
    before = {run.summary["config_hash"] for run in runs_of(results)}

    other = start(target=lambda: os._exit(main(words)))
    other.start()
    assert main(words) == 0
    other.join(120)
    assert other.exitcode == 0
    cell = record_of(results)["cells"][0]
    assert [(own["number"], own["state"]) for own in cell["trials"]] == [(i, "finished") for i in range(5)]
    hashes = {hash for own in cell["trials"] for hash in own["runs"]}
    assert before <= hashes == {run.summary["config_hash"] for run in runs_of(results) if run.get("validation")}
    assert cell["chosen"]["value"] == max(own["value"] for own in cell["trials"])
    assert all(own["flags"]["minibatch_size"].isdecimal() for own in cell["trials"])
    folders = [json.loads(file.read_text())["config_hash"] for file in results.glob("*/*/*/*/config.json")]
    assert len(folders) == len(set(folders)) == 6, "a run was begun twice"


def test_a_run_below_the_median_is_stopped_between_tasks(study, tmp_path, monkeypatch, capsys):
    """Trials in order: a good one finishes, then one with a tiny rate is stopped; it keeps its files."""
    monkeypatch.setattr(_pruning, "PRUNE_AFTER", 1)
    monkeypatch.setattr(_pruning, "POLL_S", 0.02)
    text = "models: [er]\ndatasets: [seq-synth]\nseeds: 1\nflags: {n_tasks: 5}\n"
    text += "tune: {space: {lr: [0.05, 1e-9]}, method: random, trials: 2, prune: true, random_seed: SEED}\n"
    seed = next(
        seed for seed in range(99)
        if configurations(Section({"lr": ("0.05", "1e-9")}, "random", trials=2, random_seed=seed),
                          Cell({}, {"lr": ("0.05", "1e-9")}, ()), ())[0] == {"lr": "0.05"}
    )  # fmt: skip
    words, results = study(text.replace("SEED", str(seed))), tmp_path / "results"
    assert tune.main([words[0], "--until", "search", *words[1:]], waiting) == 0
    out = capsys.readouterr().out
    assert "pruned: below the median" in out
    good, bad = record_of(results)["cells"][0]["trials"]
    assert (good["state"], bad["state"], bad["value"]) == ("finished", "pruned", None)
    (mark,) = (results / "tune/study.pruned").glob("*/*.json")
    why = json.loads(mark.read_text())
    assert mark.stem == bad["runs"][0] and why["value"] < why["median"] and why["tasks"] == 1
    (folder,) = results.glob(f"class-il/*/*/*{mark.stem}*")
    assert len(json.loads((folder / "accuracy.json").read_text())["tasks"]) == 1
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    number = len(list(results.glob("*/*/*/*/summary.json")))
    os.remove(results / "tune/study.json")
    assert tune.main([words[0], "--until", "search", *words[1:]]) == 0
    assert len(list(results.glob("*/*/*/*/summary.json"))) == number, "it was begun again"


def broken(monkeypatch, *words):
    """Runs whose command line has these words end with exit code 1."""
    real = train.main
    monkeypatch.setattr(train, "main", lambda argv: 1 if {*words} <= {*argv} else real(argv))


def test_a_run_that_fails_is_named_and_made_again_before_anything_is_chosen_for_its_cell(
    study, here, tmp_path, monkeypatch, capsys
):
    main, begun = here
    words, results = study(TUNE), tmp_path / "results"
    with monkeypatch.context() as now:
        broken(now, "16", "3")  # minibatch_size 16, seed 3
        assert main(words) == 1 and len(begun) == 4
    out, error = capsys.readouterr()
    (log,) = (own for own in (results / "logs").glob("*.log") if own.read_text().endswith("exit code 1\n"))
    assert "note: er seq-synth: of 2 trials, 1 failed" in error
    assert "nothing is chosen for er seq-synth yet. The same command makes these runs of the search again:" in error
    assert f"er seq-synth minibatch_size 16 seed 3 validation 1: exit code 1, the last words of {log.stem}" in error
    assert f"see {log}" in error
    (row,) = (
        line
        for line in out.splitlines()
        if line.startswith("er ") and " 1 " in line and " 16 " in line and ">" not in line
    )
    assert row.split()[-1] == "failed"
    assert [cell["axes"]["model"] for cell in record_of(results)["cells"]] == ["sgd"], "the others are chosen for"
    assert all(run.get("validation") for run in runs_of(results)), "the test set was read"
    assert main(words) == 0 and len(begun) == 4 + 1 + 2
    er = record_of(results)["cells"][1]
    assert [own["state"] for own in er["trials"]] == ["finished"] * 2


def test_tpe_makes_a_trial_again_that_failed_and_proposes_no_other_in_its_place(
    study, here, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("optuna", reason="optuna does not install here")
    main, begun = here
    words = study(TPE.replace("TRIALS", "3"))
    argv = [words[0], "--until", "search", *words[1:]]
    with monkeypatch.context() as now:
        real = train.main
        now.setattr(train, "main", lambda argv: 1 if len(begun) == 2 else real(argv))
        assert main(argv) == 1 and len(begun) == 3
    assert "of 3 trials, 1 failed" in capsys.readouterr().err
    assert main(argv) == 0 and begun[3] == begun[1] and len(begun) == 4
    (cell,) = record_of(tmp_path / "results")["cells"]
    assert [own["state"] for own in cell["trials"]] == ["finished"] * 3


def test_tpe_another_search_of_the_same_name_never_meets_old_trials(study, here, tmp_path, capsys):
    pytest.importorskip("optuna", reason="optuna does not install here")
    main, begun = here
    text = TPE.replace("TRIALS", "2").replace("minibatch_size: {low: 4, high: 16}", "batch_size: [16, 32]")
    folder = tmp_path / "results/tune"
    words = study(text)
    argv = [words[0], "--until", "search", *words[1:]]
    assert main(argv) == 0 and len(begun) == 2
    other = text.replace("{low: 0.001, high: 0.1, log: true}", "[0.2, 0.3]")
    assert main([study(other)[0], *argv[1:]]) == 2
    error = capsys.readouterr().err
    assert (
        f"move away what belongs to the search: {folder}/study.json, {folder}/study.db, {folder}/study.locks" in error
    )
    for number, new in enumerate((other, text.replace("low: 0.001, high: 0.1", "low: 0.2, high: 0.9")), 2):
        os.remove(folder / "study.json")
        assert main([study(new)[0], *argv[1:]]) == 0 and len(begun) == 2 * number
        (cell,) = record_of(tmp_path / "results")["cells"]
        assert len(cell["trials"]) == 2 and all(float(own["flags"]["lr"]) >= 0.2 for own in cell["trials"])


def test_tpe_a_trial_that_was_stopped_before_it_had_its_flags_is_no_trial(study, here, tmp_path, monkeypatch, capsys):
    optuna = pytest.importorskip("optuna", reason="optuna does not install here")
    main, begun = here
    words = study(TPE.replace("TRIALS", "2"))
    argv = [words[0], "--until", "search", *words[1:]]
    with monkeypatch.context() as now:
        real = optuna.trial.Trial._suggest

        def stop(self, name, distribution):
            if name == "minibatch_size":
                raise KeyboardInterrupt
            return real(self, name, distribution)

        now.setattr(optuna.trial.Trial, "_suggest", stop)
        assert main(argv) == INTERRUPTED and not begun
    assert main([words[0], "--show", *words[1:]]) == 0
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("er ")]
    assert main(argv) == 0 and len(begun) == 2
    (cell,) = record_of(tmp_path / "results")["cells"]
    assert all({*own["flags"]} == {"lr", "minibatch_size"} for own in cell["trials"]) and len(cell["trials"]) == 2


def test_tpe_trials_of_other_code_are_made_again_and_said(study, here, tmp_path, capsys):
    pytest.importorskip("optuna", reason="optuna does not install here")
    main, begun = here
    words, results = study(TPE.replace("TRIALS", "2")), tmp_path / "results"
    argv = [words[0], "--until", "search", *words[1:]]
    assert main(argv) == 0 and len(begun) == 2
    for file in results.glob("*/*/*/*/config.json"):
        config = json.loads(file.read_text())
        config["code"]["models/er.py"] = "0" * len(config["code"]["models/er.py"])
        file.write_text(json.dumps(config))
    before = record_of(results)
    os.remove(results / "tune/study.json")
    capsys.readouterr()
    assert main([words[0], "--show", *words[1:]]) == 0
    assert "2 finished run(s) were made by other code or data (models/er.py changed since)" in capsys.readouterr().err
    assert main(argv) == 0 and sorted(begun[2:]) == sorted(begun[:2])
    out = capsys.readouterr().out
    assert "2 run(s) of the search, 0 of them already finished" in out and "(models/er.py changed since)" in out
    assert record_of(results)["cells"] == before["cells"]


def test_two_processes_lose_nothing_of_the_record(study, here, tmp_path):
    """Both have read it before either writes, as two commands that are started at the same time do."""
    record = lambda: {entry["axes"]["model"]: entry for entry in record_of(tmp_path / "results")["cells"]}  # noqa: E731
    text = TUNE.replace("[1, 16]", "[8]").replace("[0, 3]", "0")
    tunings = {
        models: tune._prepare(study(text.replace("[er, sgd]", models)), train.main)[1]
        for models in ("[er]", "[derpp]", "[er, derpp]")
    }
    for tuning in tunings.values():
        tuning.engine = Here(1)
        tuning.runner = lambda argv: train.main(argv)
    assert tunings["[er]"].run("search") == 0
    first = record()
    assert tunings["[derpp]"].run("search") == 0
    assert {*record()} == {"er", "derpp"} and record()["er"] == first["er"]
    late = tunings["[er, derpp]"]
    cell = late.cells[0]
    late._update([entry_of(cell, [], Trial(7, {"minibatch_size": "1"}, "finished"))])
    assert record()["er"] == first["er"] == late._entry(cell), "what was chosen is fixed"


def test_changes_of_the_record_by_many_processes_at_once_are_all_kept(tmp_path):
    file, number = tmp_path / "tune/study.json", 8
    start = multiprocessing.get_context("fork").Process
    processes = [start(target=add_cells, args=(file, f"m{i}")) for i in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    models = [entry["axes"]["model"] for entry in read_record(file)["cells"]]
    assert sorted(models) == sorted(f"m{i}" for i in range(number) for _ in range(3))
    assert [file.name for file in file.parent.iterdir()] == ["study.json"], "a lock is left"


def add_cells(file, model):
    entry = entry_of(Cell({"model": model}, {}, ()), [], Trial(0, {}, "finished"))

    def changed(record):
        return {"tune": {}, "begun": [], "cells": [*(record["cells"] if record else ()), entry]}

    for _ in range(3):
        update_record(file, changed)


def test_tpe_optuna_is_needed_only_for_what_is_still_searched(study, here, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna", reason="optuna does not install here")
    main, begun = here
    text = TPE.replace("TRIALS", "1").replace("lr: {low: 0.001, high: 0.1, log: true}, ", "")
    words = study(text)
    assert main([words[0], "--until", "search", *words[1:]]) == 0
    monkeypatch.setattr("flatcl.utils.extras.find_spec", lambda name: None if name == "optuna" else name)
    monkeypatch.setitem(sys.modules, "optuna", None)  # an import fails
    assert main([words[0], "--show", *words[1:]]) == 0 and "chosen" in capsys.readouterr().out
    assert main(words) == 0 and len(begun) == 2
    assert main(study(text.replace("[er]", "[er, sgd]"))) == 0 and len(begun) == 3  # sgd has no such flag
    assert main(study(text.replace("[er]", "[er, derpp]"))) == 2 and "flatcl[tune]" in capsys.readouterr().err


def test_tpe_the_database_is_in_the_results_whatever_their_name(study, here, tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="optuna does not install here")
    main, begun = here
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "50%20?mode=ro{0}#a"
    words = [*study(TPE.replace("TRIALS", "1"))[:2], "--results_path", str(results)]
    assert main([words[0], "--until", "search", *words[1:]]) == 0
    assert (results / "tune/study.db").stat().st_size > 0
    assert {file.name for file in tmp_path.iterdir()} == {"study.yaml", results.name}


def test_tpe_show_reads_only_and_a_database_that_cannot_be_used_is_one_message(
    study, here, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("optuna", reason="optuna does not install here")
    main, begun = here
    monkeypatch.setattr(_tpe, "LOCKED_S", 0.1)
    text, database = TPE.replace("TRIALS", "1"), tmp_path / "results/tune/study.db"
    words = study(text)
    assert main([words[0], "--until", "search", *words[1:]]) == 0
    words = study(text.replace("[er]", "[er, derpp]"))
    before = database.read_bytes(), {file.name for file in database.parent.iterdir()}
    assert main([words[0], "--show", *words[1:]]) == 0
    assert before == (database.read_bytes(), {file.name for file in database.parent.iterdir()})
    capsys.readouterr()
    other = sqlite3.connect(database)
    other.execute("BEGIN EXCLUSIVE")
    assert main(words) == 2 and len(begun) == 1
    other.close()
    assert f"error: {database} cannot be used: database is locked. Give" in capsys.readouterr().err
    database.write_text("no database " * 100)
    assert main(words) == 2
    assert "cannot be used: file is not a database. Give" in capsys.readouterr().err


def test_tpe_a_database_that_is_locked_while_a_run_ends_loses_nothing(study, here, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna", reason="optuna does not install here")
    main, begun = here
    monkeypatch.setattr(_tpe, "LOCKED_S", 0.1)
    words, held, real = study(TPE.replace("TRIALS", "1")), [], train.main

    def locking(argv):
        code = real(argv)
        held.append(sqlite3.connect(tmp_path / "results/tune/study.db"))
        held[0].execute("BEGIN EXCLUSIVE")
        return code

    argv = [words[0], "--until", "search", *words[1:]]
    with monkeypatch.context() as now:
        now.setattr(train, "main", locking)
        assert main(argv) == 2
    held[0].close()
    assert "study.db cannot be used: database is locked" in capsys.readouterr().err
    assert main(argv) == 0 and len(begun) == 1
    (cell,) = record_of(tmp_path / "results")["cells"]
    assert [own["state"] for own in cell["trials"]] == ["finished"]


def test_a_run_that_a_stop_for_another_one_has_hit_is_made_again(study, here, tmp_path, monkeypatch, capsys):
    main, begun = here

    def pruner(*given):
        found = _pruning.Pruner(*given)
        found.has_stopped = True
        return found

    monkeypatch.setattr(tune, "Pruner", pruner)
    real = train.main
    monkeypatch.setattr(train, "main", lambda argv: INTERRUPTED if len(begun) == 2 else real(argv))
    text = TUNE.replace("[er, sgd]", "[er]").replace("[0, 3]", "0")
    words = study(text + "  method: random\n  trials: 2\n  prune: true\n")
    assert main([words[0], "--until", "search", *words[1:]]) == 0, capsys.readouterr().err
    assert begun[1] == begun[2] and len(begun) == 3
    assert "it is made again" in capsys.readouterr().out


def test_of_a_trial_that_was_pruned_no_other_run_is_begun(study, here, tmp_path, monkeypatch, capsys):
    main, begun = here
    text = TUNE.replace("[er, sgd]", "[er]") + "  method: random\n  trials: 2\n  prune: true\n"
    words = study(text)
    _, tuning = tune._prepare(words, train.main)
    bad, _ = tuning._jobs_of(tuning.cells[0], {"minibatch_size": "16"})  # of seeds 0 and 3
    real = train.main

    def stopped(argv):
        if argv[: len(bad.argv)] != [*bad.argv]:
            return real(argv)
        tuning.pruned.mkdir(parents=True)
        (tuning.pruned / f"{bad.hash}.json").write_text("{}")
        return INTERRUPTED

    monkeypatch.setattr(train, "main", stopped)
    assert main([words[0], "--until", "search", *words[1:]]) == 0
    sizes = [[argv[argv.index(f"--{name}") + 1] for name in ("minibatch_size", "seed")] for argv in begun]
    assert sorted(sizes[:2]) == [["1", "0"], ["16", "0"]] and sizes[2:] == [["1", "3"]]
    trials = record_of(tmp_path / "results")["cells"][0]["trials"]
    assert {own["flags"]["minibatch_size"]: own["state"] for own in trials} == {"1": "finished", "16": "pruned"}


def test_no_run_is_stopped_that_has_no_task_left(study, tmp_path, monkeypatch):
    """A process that is at the run is stopped after the first of two tasks, and not after the last one."""
    monkeypatch.setattr(_pruning, "PRUNE_AFTER", 1)
    text = TUNE.replace("[er, sgd]", "[er]").replace("[0, 3]", "0")
    _, tuning = tune._prepare(study(text + "  method: random\n  trials: 2\n  prune: true\n"), train.main)
    good, bad = (tuning._jobs_of(tuning.cells[0], {"minibatch_size": size})[0] for size in ("1", "16"))
    for number, (job, value) in enumerate(((good, 0.9), (bad, 0.1))):
        folder = tuning.results / f"class-il/seq-synth/er/2026010{number}-000000-{job.hash}"
        folder.mkdir(parents=True)
        rows = [[value, value], [value, value]]
        (folder / "accuracy.json").write_text(json.dumps({"tasks": [0, 1], "accuracy": {"class-il": rows}}))
        (folder / "config.json").write_text(json.dumps(job.config.to_json()))
        if job is good:
            (folder / "summary.json").write_text('{"status": "finished"}')
    process = multiprocessing.get_context("fork").Process(target=hold, args=(bad.log.with_suffix(".lock"),))
    process.start()
    try:
        while not bad.log.with_suffix(".lock").exists():
            time.sleep(0.01)
        pruner = _pruning.Pruner([[good, bad]], "class-il", tuning.pruned)
        pruner._look([good, bad])
        assert not pruner.has_stopped and not tuning.pruned.exists()
        (folder / "accuracy.json").write_text(json.dumps({"tasks": [0], "accuracy": {"class-il": rows[:1]}}))
        pruner._look([good, bad])
        assert pruner.has_stopped and _pruning.marked(tuning.pruned, bad, keep_changed=False)
        process.join(30)
        assert process.exitcode == INTERRUPTED
    finally:
        process.kill()
    _, other = tune._prepare(study(text + "  method: random\n  trials: 3\n  prune: true\n"), train.main)
    assert not _pruning.marked(other.pruned, bad, False), "a search meets the marks of another one of its name"
    edited = replace(bad, config=resolve(list(bad.argv)))
    edited.config.code["models/er.py"] = "0" * 16
    assert not _pruning.marked(tuning.pruned, edited, False) and _pruning.marked(tuning.pruned, edited, True)
    good_folder = next(tuning.results.glob(f"*/*/*/*{good.hash}"))
    edited = replace(good, config=resolve(list(good.argv)))
    edited.config.code["models/er.py"] = "0" * 16
    assert _pruning._curve(good, "class-il", False) == ([0.9, 0.9], True) and good_folder.is_dir()
    assert _pruning._curve(edited, "class-il", False) == ([], False), "it will be made again"


def hold(lock):
    """Holds a lock until Ctrl-C."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with Lock(lock, "a run"):
            time.sleep(60)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)


def test_words_that_mean_the_same_value_are_one_trial(study):
    text = TUNE.replace("minibatch_size: [1, 16]", "lr: [0.1, 1e-1, 0.05], minibatch_size: [8, 08]")
    _, tuning = tune._prepare(study(text.replace("[er, sgd]", "[er]")), train.main)
    (cell,) = tuning.cells
    assert configurations(tuning.section, cell, ()) == [
        {"lr": "0.1", "minibatch_size": "8"}, {"lr": "0.05", "minibatch_size": "8"},
    ]  # fmt: skip


def test_a_shared_flag_must_be_one_of_all_that_share_it(study, here, capsys):
    main, begun = here
    text = TUNE.replace("[er, sgd]", "[er, derpp]").replace("minibatch_size: [1, 16]", "lr: [0.1], alpha: [0.1]")
    assert main(study(text + "  share: [lr, alpha]\n")) == 2 and not begun
    error = capsys.readouterr().err
    assert "line 9, tune.share: er on seq-synth has no --alpha, so it cannot share one with derpp. Drop" in error
    assert "--lr" not in error


def test_a_shared_flag_is_the_best_one_for_all_and_a_model_that_is_added_has_it(study, here, tmp_path, capsys):
    main, begun = here
    text = TUNE.replace("[er, sgd]", "[er, derpp]").replace("[0, 3]", "0") + "  share: [minibatch_size]\n"
    words, results = study(text), tmp_path / "results"
    argv = [words[0], "--until", "search", *words[1:]]
    assert main(argv) == 0 and len(begun) == 4
    cells = record_of(results)["cells"]
    values = {size: statistics.fmean(own["value"] for cell in cells for own in cell["trials"]
                                     if own["flags"]["minibatch_size"] == size) for size in ("1", "16")}  # fmt: skip
    best = max(values, key=values.__getitem__)
    assert [cell["chosen"]["flags"]["minibatch_size"] for cell in cells] == [best] * 2
    assert main([study(text.replace("[er, derpp]", "[er, derpp, er_ace]"))[0], *argv[1:]]) == 0 and len(begun) == 5
    added = record_of(results)["cells"][2]
    assert added["chosen"]["flags"] == {"minibatch_size": best} and len(added["trials"]) == 1

    (worse,) = {"1", "16"} - {best}  # which another process chooses for er alone, after this one has looked
    late, first = (
        tune._prepare(study(own, "other.yaml"), train.main)[1] for own in (text, text.replace(", derpp", ""))
    )
    first._update([entry_of(first.cells[0], [], Trial(0, {"minibatch_size": worse}, "finished", {0: 0.5}))])
    with pytest.raises(RunFailed, match="derpp seq-synth yet: another process has chosen --minibatch_size"):
        late.run("search")
    assert main([study(text, "other.yaml")[0], *argv[1:]]) == 0
    cells = record_of(results, "other")["cells"]
    assert [cell["chosen"]["flags"]["minibatch_size"] for cell in cells] == [worse] * 2


SEEDED = """
models: [er]
datasets: [seq-synth]
seeds: 1-2
flags: {n_tasks: 2, permute_classes: 1}
tune: {space: {minibatch_size: [8]}}
"""


def test_a_seed_is_an_axis_unless_the_seeds_of_the_study_decide_it(study, here, tmp_path, capsys):
    main, begun = here
    words = study(SEEDED + "vary: [init]\ngrid: {class_order_seed: [5, 6]}\n")
    _, tuning = tune._prepare(words, train.main)
    assert [dict(cell.axes) for cell in tuning.cells] == [
        {"model": "er", "dataset": "seq-synth", "class_order_seed": order} for order in ("5", "6")
    ]
    for cell in tuning.cells:
        (job,) = tuning._jobs_of(cell, {"minibatch_size": "8"})
        values = (job.config.seed, job.config.init_seed, job.config.class_order_seed)
        assert values == (0, 0, int(cell.axes["class_order_seed"]))
    _, tuning = tune._prepare(study(SEEDED + "cells: [{model: er, data_order_seed: 7}]\n", "b.yaml"), train.main)
    (job,) = tuning._jobs_of(tuning.cells[0], {"minibatch_size": "8"})
    assert (job.config.seed, job.config.data_order_seed) == (0, 7)
    assert main(words) == 0
    seeds = {
        (run.get("init_seed"), run.get("class_order_seed")) for run in runs_of(tmp_path) if not run.get("validation")
    }
    assert seeds == {(1, 5), (2, 5), (1, 6), (2, 6)}


def test_another_seed_of_the_file_is_another_search(study, here, capsys):
    main, begun = here
    words = study(SEEDED + "fix: {class_order: 3}\n")
    assert main([words[0], "--until", "search", *words[1:]]) == 0
    assert main(study(SEEDED + "fix: {class_order: 4}\n")) == 2 and len(begun) == 1
    assert "--class_order_seed was 3 and is 4" in capsys.readouterr().err


def test_test_runs_read_the_test_set_whatever_the_flags_come_from(study, here, tmp_path):
    main, begun = here
    text = TUNE.replace("[er, sgd]", "[er]").replace("[0, 3]", "0").replace("[1, 16]", "[16]")
    words = study(text)
    assert main([words[0], "--until", "search", *words[1:]]) == 0
    (searched,) = runs_of(tmp_path)
    words = study(text.replace("{n_tasks: 2}", f"{{from: {searched.path}/config.json}}"), "b.yaml")
    assert main(words) == 0
    assert [(run.get("seed"), run.get("validation")) for run in runs_of(tmp_path)] == [(0, True), (1, False)]


def test_joint_runs_have_no_incremental_accuracy_to_choose_by(study, here, capsys):
    main, begun = here
    text = TUNE.replace("[er, sgd]", "[er, joint]").replace("minibatch_size: [1, 16]", "lr: [0.1]")
    assert main(study(text + "  metric: average_incremental_accuracy\n")) == 2
    error = capsys.readouterr().err
    assert "joint seq-synth: tune.metric is average_incremental_accuracy, which a run on all tasks" in error
    assert not begun and "er seq-synth:" not in error


def test_notes_of_a_cell_are_kept(study, here, tmp_path):
    main, begun = here
    text = TUNE.replace("[er, sgd]", "[er, derpp]").replace("[0, 3]", "0").replace("[1, 16]", "[16]")
    assert main(study(text + "cells: [{model: er, notes: mine}]\n")) == 0
    notes = {run.get("model"): run.get("notes") for run in runs_of(tmp_path) if not run.get("validation")}
    assert notes == {"er": "mine", "derpp": "tuned: 1 configuration, best_mean on validation"}


def test_budget_and_stop_are_those_of_the_search_alone(study, here, tmp_path, capsys):
    main, begun = here
    text = TUNE.replace("[er, sgd]", "[er]").replace("[0, 3]", "0").replace("{n_tasks: 2}", "{n_tasks: 5}")
    words = study(text + "  budget_rows: 200\n  stop_after: 2\n")
    for name, value in (("budget_rows", "100"), ("validation", "1")):
        assert main([*words, f"--{name}", value, "--seed", "3"]) == 2 and not begun
        error = capsys.readouterr().err
        assert f"error: --{name} is set by the search, and also given after --. Drop it." in error
        assert "--seed after -- is an axis" in error, "not all problems at once"
    assert main(words) == 0
    tested, *searched = sorted(runs_of(tmp_path), key=lambda run: run.get("validation"))
    assert [(run.get("budget_rows"), run.get("stop_after")) for run in searched] == [(200, 2)] * 2
    assert (tested.get("budget_rows"), tested.get("stop_after"), tested.get("validation")) == (None, None, False)
    assert "after 2 task(s)" in capsys.readouterr().out


def test_the_example_is_the_one_of_the_page():
    page, file = (ROOT / "docs/tuning.md").read_text(), ROOT / "examples/tune.yaml"
    assert f"```yaml\n{file.read_text()}```" in page
    study = studies.read(file)
    assert len(cells_of(study)) == 3 and study.tune.space["alpha"] == ("0.1", "0.3")
