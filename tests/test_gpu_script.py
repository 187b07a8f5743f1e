"""The script for a GPU, rehearsed on the CPU with a tape in place of graphs: it ends, and writes its record."""

import json

import pytest
import torch
from tape import Tape

from utils import gpu, program

SMALL = {"dataset": "seq-synth", "buffer_size": 40}


@pytest.fixture
def rehearsal(monkeypatch):
    monkeypatch.setattr(program, "recorder", lambda device: Tape())
    monkeypatch.setattr(gpu, "SEVERAL", [("small", SMALL, 2, 1)])
    monkeypatch.setattr(gpu, "pairs", lambda: [("er", "sgd"), ("gem", "sgd"), ("mgser_sam", "sampa")])
    speeds = [
        ("small", "er", SMALL, 0.5),
        ("small, bf16", "mgser_sam", SMALL | {"amp": "bf16"}, None),
        ("small, one stream", "er under sampa", SMALL | {"optimizer": "sampa"}, None),
        ("impossible", "er", SMALL | {"buffer_size": -1}, None),
    ]
    monkeypatch.setattr(gpu, "SPEEDS", speeds)


def test_the_whole_script(rehearsal, tmp_path, capsys):
    cudnn, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    assert gpu.main(["--device", "cpu", "--rounds", "1", "--count", "12", "--out", str(tmp_path)]) == 0
    assert (torch.backends.cudnn.benchmark, torch.get_num_threads()) == (cudnn, threads)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [line["agrees"] for line in found["agreement"]] == [True] * 3
    assert all(line["recorded"] == line["ordinary"] == line["again"] for line in found["agreement"])
    er = found["small: er"]
    assert min(er["ordinary_ms"], er["recorded_ms"], er["bare_ms"]) > 0 and er["goal_ms"] == 0.5
    assert "steps were replays" in er["programs"] and not er["programs"].startswith("0 of")
    assert "bare_ms" not in found["small, bf16: mgser_sam"]
    assert "buffer_size" in found["impossible: er"]["failed"]  # and what comes after it was measured
    assert all(line["one_s"] > 0 and line["processes_s"] > 0 and line["streams_s"] > 0 for line in found["several"])
    out = capsys.readouterr().out
    assert "recorded runs that agree with ordinary ones: 3 of 3. Not: none" in out
    assert "runs in times of one, processes" in out


def test_a_device_that_is_not_there_is_said(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2
    assert "--device cuda" in capsys.readouterr().err


def test_each_method_and_each_optimizer_is_compared():
    assert {model for model, _ in gpu.pairs()} == {*gpu.METHODS.names()}
    assert {optimizer for _, optimizer in gpu.pairs()} == {*gpu.OPTIMIZERS.names()}
