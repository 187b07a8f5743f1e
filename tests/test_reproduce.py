"""Published tables: the data file, the comparison, and the command from end to end, stopped and continued."""

import csv
import io
import json
import os
import signal
import statistics
import time

import pytest
from made import make_cifar10, make_mnist
from PIL import Image
from scipy import stats

from flatcl.utils.arguments import resolve
from flatcl.utils.commands import reproduce, sweep
from flatcl.utils.commands.train import main
from flatcl.utils.engine.results import RunFolder
from flatcl.utils.errors import DataError
from flatcl.utils.registry import DATASETS, METHODS
from flatcl.utils.reports.groups import Stat

TARGETS = reproduce.read_targets()
KEYS = """sgd joint ewc_on si lwf lwf_mc pnn er mer gem agem agem_r icarl fdr gss hal der derpp er_ace gdumb lucir bic
xder cls_er""".split()
HEAD = "table,model,dataset,buffer_size,setting,mean,std,runs,source,confirmed,confirmed_by,flags,protocol\n"
SMALL = HEAD + (
    "small,sgd,seq-synth,,class-il,19.94,0.05,10,a paper,1,a second paper,,\n"
    "small,sgd,seq-synth,,task-il,61.00,,,a paper,0,,,\n"
    "small,er,seq-synth,100,class-il,50.00,2.00,10,a paper,1,a second paper,--n_tasks 2,\n"
    "small,er,seq-synth,100,task-il,80.00,2.00,10,a paper,1,a second paper,--n_tasks 2,\n"
    "small,er,seq-synth,200,class-il,50.00,2.00,10,a paper,1,a second paper,,another stream\n"
    "small,er,seq-mnist,200,class-il,80.43,1.89,10,a paper,0,,,\n"
    "small,not_written,seq-synth,200,class-il,30.00,1.00,10,a paper,1,a second paper,,\n"
    "other,er,seq-synth,200,class-il,50.00,2.00,10,a paper,1,a second paper,,\n"
)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The data file of a small table; the working folder has neither data nor results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLATCL_DATA", raising=False)
    file = tmp_path / "targets.csv"
    file.write_text(SMALL)
    return file


def put(accuracy, *words, root="results"):
    """A finished run with that accuracy in every setting, as a run would leave it."""
    config = resolve([*words, "--results_path", str(root)])
    folder = RunFolder.create(config)
    numbers = {"final_average_accuracy": accuracy}
    settings = ("class-il", "task-il") if config.benchmark.setting == "class-il" else (config.benchmark.setting,)
    summary = {
        "model": config.model, "dataset": config.dataset, "seed": config.seed, "status": "finished",
        "metrics": dict.fromkeys(settings, numbers), "config_hash": config.hash, "cost": {"wall_s": 30.0},
    }  # fmt: skip
    folder.write("summary.json", summary)
    return folder.path


def put_cell(accuracies, *words, root="results"):
    return [put(value, *words, "--seed", str(seed), root=root) for seed, value in enumerate(accuracies)]


SGD = ("--model", "sgd", "--dataset", "seq-synth")
ER = ("--model", "er", "--dataset", "seq-synth", "--buffer_size", "100", "--n_tasks", "2")


def cells_of(text):
    """{(model, buffer, setting): the row's cells} of the text table."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    start = next(number for number, line in enumerate(lines) if line and line[0].startswith("---")) + 1
    end = next(number for number, line in enumerate(lines) if number > start and not line)
    return {(line[0], line[2], line[3]): line[4:] for line in lines[start:end] if line[1] == "seq-synth"}


# ------------------------------------------------------------------------------------------------- the data file


@pytest.mark.parametrize(
    ("table", "label", "setting", "mean", "std", "confirmed"),
    [
        ("der-perm-mnist", "er:200", "domain-il", 72.37, 0.87, False),
        ("der-perm-mnist", "gss:5120", "domain-il", 82.22, 1.14, False),
        ("der-rot-mnist", "sgd", "domain-il", 67.66, 8.53, False),
        ("der-rot-mnist", "agem:500", "domain-il", 80.31, 6.29, True),
        ("der-rot-mnist", "derpp:5120", "domain-il", 94.65, 0.33, False),
        ("der-seq-cifar10", "joint", "class-il", 92.20, 0.15, True),
        ("der-seq-cifar10", "joint", "task-il", 98.31, 0.12, False),
        ("der-seq-cifar10", "pnn", "task-il", 95.13, 0.72, True),
        ("der-seq-cifar10", "gem:500", "task-il", 92.16, 0.69, True),
        ("der-seq-cifar10", "icarl:200", "class-il", 49.02, 3.20, True),
        ("der-seq-cifar10", "derpp:5120", "class-il", 85.24, 0.49, True),
        ("der-seq-cifar10", "hal:5120", "task-il", 88.51, 3.32, False),
        ("der-seq-tinyimg", "si", "task-il", 36.32, 0.13, True),
        ("der-seq-tinyimg", "derpp:500", "class-il", 19.38, 1.41, True),
        ("der-seq-tinyimg", "fdr:5120", "task-il", 68.01, 0.42, False),
        ("der-mnist-360", "agem_r:500", "general-continual", 28.13, 2.62, True),
        ("der-mnist-360", "derpp:1000", "general-continual", 76.03, 1.61, False),
        ("der-seq-mnist", "icarl:500", "class-il", 70.10, None, False),
        ("der-seq-mnist", "mer:5120", "class-il", 94.57, 0.18, False),
        ("xder-seq-cifar100", "xder:2000", "class-il", 59.14, None, True),
        ("xder-seq-cifar100", "lwf_mc", "class-il", 16.22, None, True),
    ],
)
def test_figures_are_those_published(table, label, setting, mean, std, confirmed):
    (target,) = (one for one in TARGETS if (one.table, one.label, one.setting) == (table, label, setting))
    assert (target.mean, target.std) == pytest.approx((mean / 100, std and std / 100), abs=1e-9)
    assert bool(target.confirmed_by) == confirmed
    assert target.runs == (None if table.startswith("xder") else 10)


def test_figures_of_cls_er_have_their_own_protocol():
    found = {(one.dataset, one.buffer_size, one.setting): one for one in TARGETS if one.table == "cls-er"}
    cifar100 = found["seq-cifar100", "500", "task-il"]
    assert (cifar100.mean, cifar100.std, cifar100.runs) == (0.7812, 0.0024, None)
    assert dict(cifar100.flags) == {"n_tasks": "5"} and cifar100.protocol
    assert dict(found["seq-tinyimg", "200", "class-il"].flags) == {"n_epochs": "50"}
    assert found["rot-mnist", "500", "domain-il"].mean == 0.9406 and len(found) == 30


def test_every_row_is_well_formed():
    with open(reproduce.TARGETS, newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    assert ",".join(lines[0]) + "\n" == HEAD and {len(line) for line in lines} == {13}
    places = {(one.table, one.model, one.dataset, one.buffer_size, one.setting) for one in TARGETS}
    assert len(places) == len(TARGETS) == len(lines) - 1
    for line, target in zip(lines[1:], TARGETS, strict=True):
        assert target.dataset in DATASETS.names() and target.model in KEYS, line
        setting = DATASETS.load(target.dataset).setting
        assert target.setting == setting or (target.setting, setting) == ("task-il", "class-il"), line
        assert 0 < target.mean < 1 and (target.std is None or 0 < target.std < 0.1) and target.source, line
        assert target.buffer_size is None or target.buffer_size.isdecimal(), line
        assert target.runs is None or target.runs > 1, line
        assert line[9] == str(int(bool(target.confirmed_by))) == str(int(bool(line[10]))), line


def test_each_cell_runs_with_published_values_or_says_that_it_does_not():
    for target in TARGETS:
        if target.model in METHODS.names():
            config = resolve(sweep.words_of(dict(target.cell)))
            assert target.protocol or any(origin.startswith("published") for origin in config.origins.values()), target


# ------------------------------------------------------------------------------------------------ the comparison


def target(mean, std, runs, protocol=""):
    return reproduce.Target("t", "er", "seq-synth", None, "class-il", mean, std, runs, "a paper", "", (), protocol)


@pytest.mark.parametrize(("theirs", "n"), [((0.80, 0.02), 10), ((0.86, 0.005), 2), ((0.7, 0.2), 30)])
def test_interval_is_welchs(theirs, n):
    ours = Stat.of([0.80, 0.82, 0.87])
    found = reproduce.compare(ours, target(*theirs, n))
    assert not found.constant and found.mean == pytest.approx(ours.mean - theirs[0])
    for end in (found.low, found.high):  # what the interval's end leaves out has a p-value of 5 %
        shifted = stats.ttest_ind_from_stats(
            ours.mean - end, ours.std, 3, 0.0 + theirs[0], theirs[1], n, equal_var=False
        )
        assert shifted.pvalue == pytest.approx(0.05)
    p = stats.ttest_ind_from_stats(ours.mean, ours.std, 3, *theirs, n, equal_var=False).pvalue
    assert (reproduce.judge(found, "") == "agrees") == (p >= 0.05)


@pytest.mark.parametrize(("std", "runs"), [(None, 10), (0.02, None), (None, None)])
def test_interval_against_a_constant(std, runs):
    values = [0.80, 0.82, 0.87]
    found = reproduce.compare(Stat.of(values), target(0.9, std, runs))
    interval = stats.ttest_1samp(values, 0.9).confidence_interval(0.95)
    assert found.constant
    assert (found.low, found.high) == pytest.approx((interval.low - 0.9, interval.high - 0.9))


def test_verdicts():
    def verdict(values, published, protocol=""):
        return reproduce.judge(reproduce.compare(Stat.of(values), target(*published, protocol)), protocol)

    assert verdict([0.80, 0.81, 0.82], (0.80, 0.01, 10)) == "agrees"
    assert verdict([0.80, 0.81, 0.82], (0.70, 0.01, 10)) == "differs (+)"
    assert verdict([0.80, 0.81, 0.82], (0.90, 0.01, 10)) == "differs (-)"
    assert verdict([0.80, 0.81, 0.82], (0.90, 0.01, 10), "other data") == "protocol differs"
    assert verdict([0.80], (0.90, 0.01, 10)) == "too few runs"
    assert verdict([0.5, 0.5], (0.5, None, 10)) == "agrees"  # no spread at all: the interval is a point
    assert verdict([0.5, 0.5], (0.4, None, 10)) == "differs (+)"


# --------------------------------------------------------------------------------------------------- the command


def test_list_says_what_is_here(small, capsys):
    make_mnist(small.parent / "data")
    assert reproduce.main([], file=small) == 0
    plain = capsys.readouterr().out
    assert reproduce.main(["list", "--format", "csv", "--", "--base_path", "nowhere"], file=small) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["table"] for row in rows] == ["small", "other"]
    assert (rows[0]["cells"], rows[0]["with data"], rows[0]["with method"]) == ("5", "4", "4")
    assert plain.splitlines()[2].split()[-3:] == ["5", "5", "4"]
    assert reproduce.main(["LIST"]) == 0 and "xder-seq-cifar100" in capsys.readouterr().out


def test_seeds_go_round_and_one_run_serves_both_settings(small):
    table = reproduce.Table(reproduce.pick_table(reproduce.read_targets(small), "small"), [0, 1], [])
    order = [(job.axes["seed"], job.axes["model"], job.axes.get("buffer_size")) for job in table.jobs]
    first = [("0", "sgd", None), ("0", "er", "100"), ("0", "er", "200"), ("0", "er", "200")]
    assert order == [*first, *(("1", *rest) for _, *rest in first)]
    assert table.jobs[1].config.n_tasks == 2 and list(table.missing) == ["seq-mnist"]


def test_show_compares_what_is_finished(small, capsys):
    put_cell([0.19, 0.20, 0.21], *SGD)
    put_cell([0.60], *ER)
    put_cell([0.51, 0.52], "--model", "er", "--dataset", "seq-synth", "--buffer_size", "200")
    put_cell([0.9] * 3, *SGD, "--lr", "0.001")  # another configuration: none of this table's
    assert reproduce.main(["small", "--show", "--times", "--picture", "bars.png"], file=small) == 0
    said = capsys.readouterr()
    found = cells_of(said.out)
    welch = reproduce.compare(Stat.of([0.19, 0.20, 0.21]), target(0.1994, 0.0005, 10))
    interval = f"+0.06 [{100 * welch.low:+.2f}, {100 * welch.high:+.2f}]"
    assert found["sgd", "–", "class-il"] == ["20.00 ± 1.00 (3)", "19.94 ± 0.05 (10)", interval, "agrees", "90"]
    one = stats.ttest_1samp([19.0, 20.0, 21.0], 61.0).confidence_interval(0.95)
    interval = f"-41.00 [{one.low - 61:+.2f}, {one.high - 61:+.2f}]†"
    assert found["sgd", "–", "task-il"] == ["20.00 ± 1.00 (3)", "61.00 (?)*", interval, "differs (-)", "90"]
    assert found["er", "100", "class-il"] == ["60.00 (1)", "50.00 ± 2.00 (10)", "–", "too few runs", "30"]
    assert found["er", "200", "class-il"][-2:] == ["protocol differs", "60"]
    assert found["not_written", "200", "class-il"][-2:] == ["method missing", "–"]
    assert "protocol differs: er:200: another stream" in said.out and "method missing: not_written" in said.out
    assert "wall time of these runs: 180 s; most of it: sgd 90 s (50%)" in said.out
    assert "data missing: seq-mnist: put train-images-idx3-ubyte.gz" in said.err and "--download" in said.err
    assert Image.open("bars.png").format == "PNG"


def test_csv_and_latex_can_be_read_again(small, capsys):
    put_cell([0.19, 0.20, 0.21], *SGD, root="elsewhere")
    assert reproduce.main(["small", "--show", "elsewhere", "--format", "csv", "--out", "table.csv"], file=small) == 0
    with open("table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 and capsys.readouterr().out == ""
    assert [float(rows[0][key]) for key in ("mean", "std", "n", "published_mean")] == pytest.approx(
        [0.2, 0.01, 3, 0.1994]
    )
    assert float(rows[0]["difference"]) == pytest.approx(0.0006) and rows[0]["test"] == "welch"
    assert (rows[1]["test"], rows[1]["published_std"], rows[1]["verdict"]) == ("one-sample", "", "differs (-)")
    assert (rows[2]["mean"], rows[2]["low"], rows[2]["verdict"]) == ("", "", "not run")
    assert reproduce.main(["small", "--show", "elsewhere", "--format", "latex"], file=small) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index(r"\begin{tabular}{llllrrrr}")
    assert all(line.startswith("% ") for line in lines[:begin]) and lines[-1] == r"\end{tabular}"
    body = [line for line in lines[begin:] if line.endswith(r" \\")]
    assert len(body) == 8 and {line.count("&") for line in body} == {7}
    assert reproduce.main(["small", "--show", "elsewhere", "--format", "markdown"], file=small) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in lines if line.startswith("|")} == {9}
    assert any(line.startswith(r"- \* published figure from memory") for line in lines)


def test_flags_that_change_the_run_change_the_verdict(small, capsys):
    put_cell([0.19, 0.20, 0.21], *SGD, "--lr", "0.5")
    argv = ["small", "--show", "--cells", "sgd", "--", "--lr", "0.5", "--device", "cpu"]
    assert reproduce.main(argv, file=small) == 0
    assert "protocol differs: sgd: --lr after -- changes what is run\n" in capsys.readouterr().out


def test_cells_are_patterns(small):
    targets = reproduce.pick_table(reproduce.read_targets(small), "small")

    def labels(*patterns):
        return [f"{one.label}:{one.dataset}" for one in reproduce.pick_cells(targets, patterns)]

    assert labels("sgd") == ["sgd:seq-synth"] * 2
    assert labels("er:200", "SGD") == ["sgd:seq-synth"] * 2 + ["er:200:seq-synth", "er:200:seq-mnist"]
    assert labels("*:*:seq_mnist") == ["er:200:seq-mnist"]
    assert len(labels("*:200")) == 3 and len(labels("er:*")) == 4 and len(labels("*")) == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smal"], "unknown table: 'smal'. Did you mean small?"),
        (["small", "--cells", "err:100"], "no cell 'err:100'. Did you mean er:100"),
        (["small", "--cells", "er:1:2:3"], "no cell 'er:1:2:3'"),
        (["small", "--cells", ","], "no cell ''"),
        (["small", "--seeds", "2-0"], "--seeds expects numbers and ranges, got '2-0'"),
        (["small", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["small", "--show", "nowhere"], "cannot read nowhere"),
        (["small", "--show", "--download"], "--show runs nothing"),
        (["small", "--picture", "bars.pdf"], "--picture expects a file that ends in .png"),
        (["small", "--out", "no/where.txt"], "--out: cannot write no/where.txt"),
        (["small", "--nonsense"], "unknown flag: --nonsense"),
        (["small", "--", "--seed", "1"], "--seed after -- is an axis"),
        (["small", "--", "--n_tasks", "5"], "--n_tasks after -- is an axis"),
        (["small", "--", "--lr", "x"], "--lr expects a number, got 'x'"),
        (["small", "--", "--disable_log"], "--disable_log leaves no result"),
        (["LIST", "--times"], "--times needs a table, got LIST"),
    ],
)
def test_bad_input_is_one_line_before_any_work(small, capsys, words, message):
    assert reproduce.main(words, file=small, runner=fails) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1 and said.out == ""
    assert os.listdir() == ["targets.csv"]


def fails(argv):
    """Stands for `main` of a run in a worker."""
    return 1 if "200" in argv else 0


def test_failed_runs_are_named_and_data_is_not_fetched(small, capsys, monkeypatch):
    words = ["small", "--cells", "er:200", "--seeds", "0"]
    assert reproduce.main(words, file=small, runner=fails) == 1
    said = capsys.readouterr()
    assert "2 run(s), 0 of them already finished, 1 without their data" in said.err
    assert "1 run(s) failed" in said.err and "er seq-synth 200 seed 0 (exit code 1)" in said.err
    assert "not run" in said.out and "data missing" in said.out
    assert not os.path.exists("data")

    def fetch(urls, path, md5, what):
        raise DataError(f"{what}: asked for")

    monkeypatch.setattr("flatcl.datasets._files.fetch", fetch)
    assert reproduce.main([*words, "--download"], file=small, runner=fails) == 2
    assert "error: MNIST (4 missing" in capsys.readouterr().err
    assert reproduce.main(["small", "--cells", "er:*:seq-mnist"], file=small, runner=fails) == 0  # only data is missing


def test_what_is_missing_is_known_without_reading(tmp_path):
    assert {name: DATASETS.load(name).missing(tmp_path) is None for name in ("seq-synth", "seq-digits")} == {
        "seq-synth": True, "seq-digits": True,
    }  # fmt: skip
    for name in ("seq-mnist", "seq-fmnist", "rot-mnist", "mnist-360", "seq-cifar10", "seq-cifar100", "seq-tinyimg"):
        remedy = DATASETS.load(name).missing(tmp_path / "empty")
        assert name == "seq-fmnist" or remedy.startswith("put ") and str(tmp_path / "empty") in remedy
    make_mnist(tmp_path, gz=True)
    make_cifar10(tmp_path)
    (tmp_path / "cifar-100-python.tar.gz").touch()
    (tmp_path / "tiny-imagenet-200.zip").touch()
    for name in ("perm-mnist", "mnist-360", "seq-cifar10", "seq-cifar100", "seq-tinyimg"):
        assert DATASETS.load(name).missing(tmp_path) is None
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte.gz").unlink()
    assert DATASETS.load("seq-mnist").missing(tmp_path) == f"put t10k-labels-idx1-ubyte.gz into {tmp_path}/MNIST/raw"


def test_runs_from_before_a_flag_existed_are_recognised(small):
    (job,) = sweep.plan([{**dict(zip(("model", "dataset"), SGD[1::2], strict=True)), "seed": "0"}])
    config_file = put(0.2, *SGD) / "config.json"
    summary_file = config_file.with_name("summary.json")
    summary_file.write_text(summary_file.read_text().replace(job.hash, "0" * 12))
    config = json.loads(config_file.read_text())

    def known(flags, protocol=config["protocol"]):
        content = {**config, "protocol": protocol, "flags": flags}
        config_file.write_text(json.dumps(content))
        return job.hash in sweep.look([job]).done

    older = {name: entry for name, entry in config["flags"].items() if name != "amp"}
    assert known(config["flags"]) and known(older)
    assert known({**older, "device": {"value": "cuda", "origin": "argv"}})  # changes no number
    assert not known(older, protocol=0)
    assert not known({**older, "lr": {"value": 0.7, "origin": "argv"}})
    assert not known({name: entry for name, entry in older.items() if name != "lr"})  # not at the field's default now
    assert not known({**older, "forgotten": {"value": 1, "origin": "argv"}})


def stopped(argv):
    """A worker's run that is real for seed 0; with seed 1 a scheduler stops the table."""
    if argv[argv.index("--seed") + 1] == "0":
        return main(argv)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(10)  # the command asks this run to end
    return 1


@pytest.fixture
def own_sigterm():
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_stopped_table_is_continued_by_the_same_command(small, capsys, own_sigterm):
    words = [
        "small",
        "--cells",
        "sgd,er:100,not*,er:*:seq-mnist",
        "--seeds",
        "0-1",
        "--",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    assert reproduce.main(words, file=small, runner=stopped) == 130
    said = capsys.readouterr()
    assert "6 run(s), 0 of them already finished, 2 without their data" in said.err
    assert "interrupted: this is what is finished; the same command does the rest" in said.err
    before = finished_runs(small.parent)
    assert sorted(before) == [("er", 0), ("sgd", 0)]  # something of each cell
    assert cells_of(said.out)["sgd", "–", "class-il"][0] == f"{100 * before['sgd', 0]:.2f} (1)"

    assert reproduce.main(words, file=small) == 0
    said = capsys.readouterr()
    assert "6 run(s), 2 of them already finished, 2 without their data" in said.err
    after = finished_runs(small.parent)
    assert len(after) == 4 and before.items() <= after.items()  # nothing was repeated
    own = [value for (model, _), value in after.items() if model == "er"]
    shown = f"{100 * statistics.fmean(own):.2f} ± {100 * statistics.stdev(own):.2f} (2)"
    assert cells_of(said.out)["er", "100", "class-il"][0] == shown
    assert "data missing" in said.out and "method missing" in said.out


def finished_runs(folder):
    """{(model, seed): class-incremental accuracy} of the finished run folders, each of which must be there once."""
    found = {}
    for file in folder.glob("results/*/*/*/*/summary.json"):
        summary = json.loads(file.read_text())
        if summary["status"] == "finished":
            key = summary["model"], summary["seed"]
            assert key not in found
            found[key] = summary["metrics"]["class-il"]["final_average_accuracy"]
    return found
