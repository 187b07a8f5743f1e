"""The script for a GPU, rehearsed on the CPU with a tape in place of graphs: it ends, and writes its record."""

import json

import pytest
import torch

from flatcl.__main__ import main as command
from flatcl.utils.arguments import resolve
from flatcl.utils.commands import gpu
from flatcl.utils.contracts._tape import Tape
from flatcl.utils.engine import program

SMALL = {"dataset": "seq-synth", "buffer_size": 40}


@pytest.fixture
def rehearsal(monkeypatch):
    """Small parts, in this process."""
    monkeypatch.setattr(program, "recorder", lambda device: Tape())
    monkeypatch.setattr(gpu, "SHARES", 1)
    monkeypatch.setattr(gpu, "SEVERAL", [("small", SMALL, 2, 1)])
    pairs = [("er", "sgd", "digits"), ("gem", "sgd", "digits"), ("er", "esam", "digits")]
    monkeypatch.setattr(gpu, "pairs", lambda: pairs)
    speeds = [
        ("small", "er", SMALL, 0.5),
        ("small, bf16", "mgser_sam", SMALL | {"amp": "bf16"}, None),
        ("small, one stream", "er under sampa", SMALL | {"optimizer": "sampa"}, None),
    ]
    monkeypatch.setattr(gpu, "SPEEDS", speeds)
    here = torch.device("cpu")
    monkeypatch.setattr(gpu, "lines_of", lambda part, *rest, **shares: gpu.measured(part, 0, 1, here, 1, 12))


def test_the_whole_script(rehearsal, tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--rounds", "1", "--count", "12", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [line["agrees"] for line in found["agreement"]] == [True] * 3
    assert all(line["recorded"] == line["ordinary"] == line["again"] for line in found["agreement"])
    assert [line["replayed"] > 0 for line in found["agreement"]] == [True, False, True]
    er, mgser, sampa = found["speed"]
    assert min(er["ordinary_ms"], er["recorded_ms"], er["bare_ms"]) > 0 and er["goal_ms"] == 0.5
    assert not er["programs"].startswith("0 of") and "bare_ms" not in mgser | sampa
    (several,) = found["several"]
    assert min(several["one_s"], several["processes_s"], several["streams_s"]) > 0
    out = capsys.readouterr().out
    assert "recorded runs that agree with ordinary ones: 3 of 3. Not: none" in out
    assert "runs, time relative to one run, processes" in out


CHILD = """
import sys, json
skip, every = (int(sys.argv[sys.argv.index(name) + 1]) for name in ("--skip", "--every"))
for number in range(skip, 5, every):
    if number == 2:
        print("CUDA error: an illegal memory access was encountered", flush=True)
        sys.exit(3)
    print("noise", flush=True)
    print("line: " + json.dumps({"number": number}), flush=True)
"""


def test_what_fails_ends_its_process_and_the_next_goes_on_behind_it(tmp_path):
    file = tmp_path / "child.py"
    file.write_text(CHILD)
    lines = list(gpu.lines_of("speed", 5, [], 60.0, (str(file),)))
    assert [line.get("number") for line in lines] == [0, 1, None, 3, 4]
    assert lines[2] == {"failed": "line 3 of 5, exit code 3: CUDA error: an illegal memory access was encountered"}
    table = gpu.table({"speed": lines[2:3], "agreement": [], "several": []})
    assert "speed: line 3 of 5, exit code 3" in table


def test_shares_of_a_part_are_all_of_it(tmp_path, monkeypatch):
    file = tmp_path / "child.py"
    file.write_text(CHILD)
    alone = gpu.lines_of
    monkeypatch.setattr(gpu, "lines_of", lambda *rest, **shares: alone(*rest, command=(str(file),), **shares))
    lines = list(gpu.in_shares("agreement", 5, [], 60.0, 2))
    assert sorted(line["number"] for line in lines if "failed" not in line) == [0, 1, 3, 4]
    assert [line["failed"] for line in lines if "failed" in line] == [
        "line 2 of 3, exit code 3: CUDA error: an illegal memory access was encountered"
    ]


def test_a_part_that_takes_too_long_is_cut_off(tmp_path):
    file = tmp_path / "child.py"
    file.write_text("import time\nprint('line: {}', flush=True)\ntime.sleep(60)")
    assert list(gpu.lines_of("speed", 5, [], 1.5, (str(file),))) == [
        {},
        {"left": 4, "failed": "this part has reached its limit of 2 seconds"},
    ]


def test_a_device_that_is_not_there_is_said(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command(["gpu"]) == 2
    assert capsys.readouterr().err.startswith("error: --device cuda is not available. Choose from: auto, cpu")


def test_each_method_and_each_optimizer_is_compared():
    assert {model for model, *_ in gpu.pairs()} == {*gpu.METHODS.names()}
    assert {optimizer for _, optimizer, _ in gpu.pairs()} == {*gpu.OPTIMIZERS.names()}


def test_runs_with_convolutions_are_on_a_network_that_has_them(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "build", lambda config, *rest: seen.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpu.outcome("er", "esam", "convolutions", torch.device("cpu"), "0")
    assert (seen[0].backbone, seen[0].dataset, seen[0].n_epochs) == ("resnet32", "seq-synth", 2)


@pytest.mark.parametrize("what, name, flags, goal", gpu.SPEEDS)
def test_what_is_timed_has_flags_that_there_are(what, name, flags, goal):
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    config = resolve(["--model", name.split()[0], *words])
    assert goal is None or config.backbone in ("resnet18", "mnistmlp")
