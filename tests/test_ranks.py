"""Several processes that train one run: it is the run of one process, and a rank that dies is said."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rank_worker
import torch

from flatcl.utils import launch
from flatcl.utils.arguments import resolve
from flatcl.utils.commands.train import main
from flatcl.utils.engine import ranks
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import METHODS, OPTIMIZERS, POLICIES

ROOT = Path(__file__).resolve().parent.parent
BASE = ["--dataset", "seq-synth", "--backbone", "smooth", "--n_epochs", "3"]
UNEVEN = ["--batch_size", "15", "--minibatch_size", "7"]
REFUSED = {"lucir", "xder"}
LATE = {"gdumb"}  # learns after the last task

# the comparison: one start of two processes for all of it


def command_lines():
    models = [name for name in METHODS.names() if name not in REFUSED | LATE]
    lines = [["--model", name, "--optimizer", "sgd"] for name in models]
    lines += [["--model", "mgser_sam", "--optimizer", name] for name in OPTIMIZERS.names()]
    lines += [
        ["--model", "derpp", "--optimizer", "msam", "--msam_shards", "3", *UNEVEN],
        ["--model", "mgser_sam", "--optimizer", "esam", *UNEVEN],
        ["--model", "er", "--optimizer", "sam", "--ascent_on", "memory", *UNEVEN],
        ["--model", "er", "--optimizer", "sampa", "--batch_size", "1"],  # rows that cannot be shared
        ["--model", "gem", "--optimizer", "msam"],
        *(["--model", "derpp", "--optimizer", "sgd", "--buffer_policy", name] for name in POLICIES.names()),
        ["--model", "si", "--optimizer", "msam", "--si_gradient", "task"],
    ]
    own = {
        "saf": ["--lr", "0.03", "--saf_start", "0", "--saf_lag", "1"],
        "adam": ["--lr", "0.001"],
        "adamw": ["--lr", "0.001"],
    }
    return [line + BASE + own.get(line[3], ["--lr", "0.03"]) for line in lines]


def launched(processes, *words, env=os.environ):
    """`--standalone` takes a free port: nothing else on the machine can be met there. A rank that aborts says where."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [*torchrun, *map(str, words)]
    env = {**env, "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)


def said_by_the_ranks(err):
    """What they have printed, before torchrun's table of who has failed."""
    return err.split("failed (exitcode:")[0][-6000:]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """{command line: what two processes have after 50 steps}."""
    file = tmp_path_factory.mktemp("ranks") / "lines.json"
    lines = command_lines()
    file.write_text(json.dumps(lines))
    process = launched(2, rank_worker.__file__, file)
    _, err = process.communicate()
    assert process.returncode == 0, said_by_the_ranks(err)
    return {tuple(line): found for line, found in zip(lines, torch.load(f"{file}.pt"), strict=True)}


@pytest.mark.parametrize("line", command_lines(), ids=lambda line: "-".join(line[1:8:2]))
def test_two_processes_train_the_run_of_one(line, of_two):
    one, two = rank_worker.trained(line), of_two[tuple(line)]
    assert one["steps"] == two["steps"] == rank_worker.STEPS
    assert (one["weights"] - two["weights"]).abs().max() < 1e-5
    assert one["rows"] == two["rows"] and one["accuracy"] == two["accuracy"]
    assert one["memory"].keys() == two["memory"].keys()
    for name, column in one["memory"].items():
        assert torch.allclose(column.float(), two["memory"][name].float(), atol=1e-4)


# runs of main.py

DYING = """
import os, signal
from flatcl.models.derpp import DerPP
from flatcl.utils.registry import METHODS


@METHODS.register("dying")
class Dying(DerPP):
    def remember(self, batch, loss):
        super().remember(batch, loss)
        self.calls = getattr(self, "calls", 0) + 1
        if os.environ.get("DIES", "nobody") == os.environ.get("RANK") and self.calls == 12:
            os.kill(os.getpid(), signal.SIGKILL)
"""


MIXED = """
from flatcl.models.er import ER
from flatcl.models._method import Loss
from flatcl.utils.registry import METHODS


@METHODS.register("mixed")
class Mixed(ER):
    def loss(self, joint):
        costs = super().loss(joint).costs["replay"]
        even = joint.y % 2 == 0
        return Loss({"even": costs * even * (len(costs) / even.sum().clamp(min=1))})
"""


DRAWING = """
import os
import torch
from flatcl.models.er import ER
from flatcl.utils.registry import METHODS


@METHODS.register("drawing")
class Drawing(ER):
    def remember(self, batch, loss):
        super().remember(batch, loss)
        if os.environ.get("RANK") == "1":
            torch.rand(1)
"""


def argv(tmp_path, *words, code=DYING, model="dying"):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(code)
    flags = ["--plugin", plugin, "--model", model, "--dataset", "seq-synth", "--n_epochs", "2", "--device", "cpu"]
    return ["main.py", *flags, "--stop_after", "2", "--results_path", tmp_path / "results", *words]


def summary(tmp_path):
    (file,) = (tmp_path / "results").rglob("summary.json")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of one process, that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    assert subprocess.run([sys.executable, *map(str, argv(folder))], capture_output=True, cwd=ROOT).returncode == 0
    return summary(folder)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_rank_that_dies_ends_the_run_and_it_goes_on_with_as_many_or_fewer(processes, tmp_path, whole):
    dying = launched(2, *argv(tmp_path, "--checkpoint_minutes", "0.00001"), env={**os.environ, "DIES": "1"})
    out, err = dying.communicate(timeout=120)
    assert dying.returncode != 0
    assert re.search(r"failed: rank 0 of 2 has lost the connection to the others.*--resume \S+", err), err[-2000:]
    assert summary(tmp_path)["status"] == "interrupted"
    (folder,) = (path.parent for path in (tmp_path / "results").rglob("config.json"))
    more = launched(processes, "main.py", "--resume", folder)
    out, err = more.communicate(timeout=120)
    assert more.returncode == 0, err[-2000:]
    assert out.count("resumed after step") == 1  # rank 0 speaks for all
    assert re.search(r"resumed after step [1-9]", out)
    found = summary(tmp_path)
    assert found["status"] == "finished" and found["cost"]["steps"] == whole["cost"]["steps"]
    assert found["cost"]["forward_rows"] == whole["cost"]["forward_rows"]
    ours, theirs = (one["metrics"]["class-il"]["final_average_accuracy"] for one in (found, whole))
    assert ours == pytest.approx(theirs, abs=3 / 64)  # test images


def test_a_signal_ends_all_after_the_same_step(tmp_path):
    process = launched(2, *argv(tmp_path, "--n_epochs", "2000"))
    while not list(tmp_path.rglob("*.pt")) and process.poll() is None:
        time.sleep(0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert len(re.findall(r"interrupted at step [1-9]\d*\. Continue with", err)) == 1, err[-2000:]
    assert "has lost the connection to the others" not in err
    assert summary(tmp_path)["status"] == "interrupted"


def test_bad_input_is_said_once(tmp_path):
    process = launched(2, *argv(tmp_path, "--model", "xder", "--sync_bn", "1"))
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and not (tmp_path / "results").exists()
    assert err.count("error: --model xder cannot be trained by several processes") == 1
    assert err.count("error: --sync_bn 1 needs GPUs") == 1


def test_rows_that_depend_on_each_other_are_noticed_in_the_first_step(tmp_path):
    process = launched(2, *argv(tmp_path, code=MIXED, model="mixed"))
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("the cost of a row in the term 'even' depends on other rows") == 1, err[-2000:]
    assert summary(tmp_path)["cost"]["steps"] == 0


def test_processes_that_draw_differently_end_the_run_which_has_not_diverged(tmp_path):
    process = launched(2, *argv(tmp_path, code=DRAWING, model="drawing"))
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "failed: the processes no longer draw the same after step" in err, err[-2000:]
    assert summary(tmp_path)["status"] == "crashed"


def test_processes_that_are_to_make_different_runs_say_so(tmp_path):
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\nsys.path.insert(0, os.getcwd())\nfrom flatcl.utils.commands.train import main\n"
        "sys.exit(main([*sys.argv[1:], '--lr', '0.1' + os.environ['RANK']]))\n"
    )
    process = launched(2, script, *argv(tmp_path)[1:])
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("the processes have different runs") == 1, err[-2000:]


# what is refused, without starting anything


@pytest.fixture
def as_if_two(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "1")


@pytest.mark.parametrize(
    "words, says",
    [
        (("--model", "lucir"), "--model lucir cannot be trained by several processes"),
        (("--model", "er", "--cuda_graph", "1"), "--cuda_graph 1 is for one process"),
        (("--model", "er", "--device", "cpu", "--sync_bn", "1"), "--sync_bn 1 needs GPUs"),
        (("--model", "er", "--optimizer", "msam", "--sync_bn", "1"), "--sync_bn 1 cannot be used with msam"),
        (("--model", "er", "--device", "cuda:0"), "--device cuda:0 is one GPU for all processes"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(words, says, as_if_two):
    config = resolve([*words, "--dataset", "seq-synth"])
    with pytest.raises(UsageError, match=says):
        ranks.check(config)


def test_resume_auto_is_for_one_process(as_if_two, capsys):
    assert main(["--model", "er", "--dataset", "seq-synth", "--resume", "auto"]) == 2
    assert "--resume auto is for one process" in capsys.readouterr().err


def test_networks_that_draw_are_refused():
    with pytest.raises(UsageError, match="its 1 .dropout|its 1\\)"):
        ranks.check_network(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.5)))
    ranks.check_network(torch.nn.Sequential(torch.nn.Dropout(0.0)))


def test_a_rank_without_a_number_of_processes_is_the_only_one(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (launch.number(), launch.size()) == (0, 1)


def test_which_process_this_is(as_if_two):
    assert (launch.number(), launch.size(), launch.number_here()) == (0, 2, 1)
    assert ranks.device_of(torch.device("cuda")) == torch.device("cuda:1")
    assert ranks.device_of(torch.device("cuda:0")) == torch.device("cuda:0")
    assert ranks.device_of(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("processes, code", [(2, 3), (1, -signal.SIGABRT)])
def test_one_of_several_processes_skips_the_shutdown_of_the_interpreter(processes, code):
    """What aborts there would make torchrun end the others, though all is done."""
    lines = "import atexit, os; from flatcl.utils.console import leave; atexit.register(os.abort); print(1); leave(3)"
    env = {**os.environ, "WORLD_SIZE": str(processes)}
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == code and (done.stdout == "1\n" or processes == 1)
