"""Runs that are killed by SIGKILL inside a task and resumed: a sample of what `tests/kills.py` does for all pairs."""

import copy
import json
import subprocess
import sys

import kills
import pytest
import torch

from flatcl.utils.registry import METHODS, OPTIMIZERS

PLUGIN = """
import numpy as np

from flatcl.models.er import ER
from flatcl.utils.registry import METHODS
from flatcl.utils.engine.seeding import generator_state


@METHODS.register("forgetful")
class Forgetful(ER):
    def get_extra_state(self):
        return {**super().get_extra_state(), "rng": generator_state(np.random.default_rng(0))}


@METHODS.register("picky")
class Picky(ER):
    @classmethod
    def check(cls, config, benchmark):
        return ["--model picky cannot learn anything."]
"""


def called(*words, code):
    """What the script prints; it must end with this exit code."""
    done = subprocess.run([sys.executable, kills.__file__, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_killed_and_resumed_runs_are_the_uninterrupted_ones(tmp_path):
    """Each method and each optimizer at least once."""
    number = max(len(METHODS.names()), len(OPTIMIZERS.names()))
    called("--record", tmp_path, "--sample", number, code=0)
    lines = kills.read(tmp_path)
    assert len(lines) == number
    assert {line["model"] for line in lines} == {*METHODS.names()}
    assert {line["optimizer"] for line in lines} == {*OPTIMIZERS.names()}
    assert all(line["equal"] and any(map(kills.costs_steps, line["kills"])) for line in lines)
    table = kills.summarize(tmp_path)
    assert f"{number} pairs bit-equal, 0 refused, 0 not equal" in table
    assert all(f"\n| {name} |" in table for name in METHODS.names())


def test_what_is_not_saved_is_found_what_is_refused_is_listed_and_what_is_done_is_skipped(tmp_path):
    plugin = tmp_path / "more.py"
    plugin.write_text(PLUGIN)
    kept = {"model": "er", "optimizer": "sgd", "commit": "0000000", "kills": [], "equal": True, "seconds": 1.0}
    (tmp_path / kills.FILE).write_text(json.dumps(kept) + "\n")
    pairs = ("er:sgd", "forgetful:sgd", "picky:sam")
    out = called("--record", tmp_path, "--plugin", plugin, "--pairs", *pairs, code=1)
    first, forgetful, picky = kills.read(tmp_path)
    assert first == kept and "3/3" in out
    assert not forgetful["equal"] and forgetful["differences"]
    assert picky["refused"] == "--model picky cannot learn anything."
    table = kills.summarize(tmp_path)
    assert "forgetful under sgd: DIFFERS: " in table and "picky under sam: refused: " in table


STATE = {"a": [torch.zeros(2), torch.tensor(float("nan"))], "b": {"c": 1, "d": 0.0}, "train_s": 1.0, "metrics_size": 3}


@pytest.mark.parametrize(
    "change, where",
    [
        (lambda state: state.update(train_s=2.0, metrics_size=4), None),
        (lambda state: state["a"][0].__setitem__(0, -0.0), "it['a'][0]: values"),
        (
            lambda state: state["a"].__setitem__(0, torch.zeros(2, dtype=torch.float64)),
            "it['a'][0]: torch.float32 (2,)",
        ),
        (lambda state: state["a"].pop(), "it['a']: length 2, 1"),
        (lambda state: state["b"].update(c=2), "it['b']['c']: 1, 2"),
        (lambda state: state["b"].update(d=-0.0), "it['b']['d']: 0.0, -0.0"),
        (lambda state: state["b"].pop("c"), "it['b']: keys ['c']"),
    ],
)
def test_states_are_compared_bit_for_bit_but_for_what_was_timed(change, where):
    other, found = copy.deepcopy(STATE), []
    change(other)
    kills._compare(STATE, other, "it", found)
    assert [where is None, *(where in text for text in found)] == ([True] if where is None else [False, True])


def test_a_sample_has_every_method_and_every_optimizer():
    pairs = kills.sample(40, seed=1)
    assert len({*pairs}) == 40 and {*pairs} <= {*kills.all_pairs()}
    assert [{*names} for names in zip(*pairs, strict=True)] == [{*METHODS.names()}, {*OPTIMIZERS.names()}]
    assert pairs == kills.sample(40, seed=1) != kills.sample(40, seed=2)
