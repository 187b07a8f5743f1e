"""Files that are damaged, foreign, endless or malicious end in one line for each problem, never in a traceback."""

import copy
import json
import os
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from flatcl.utils.commands import report, sweep
from flatcl.utils.commands.train import main
from flatcl.utils.engine.logs import Logs

ARGV = ("--model", "er", "--dataset", "seq-synth", "--debug_mode", "--n_tasks", "2", "--threads", "1")
WEIRD = (
    None, True, 0, -1, 0.5, 1e308, 10**400, -(10**400), "", "er", "nan", "\0", "a\0b", "\ud800", "~nobody/x", "\x1b\n",
    "../../etc", "x" * 5000, [], [[]], [None], {}, {"value": {}}, {"a": [{"b": None}]}, [0] * 2000, ["\udfff", 1, {}],
)  # fmt: skip
WORDS = (
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"\xef\xbb\xbf",
    b'"\\ud800"', b"'", b"\0", b"\r", b'"' + b"y" * 1_000_000 + b'"',
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, under a folder of its own."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Logs, "finish", lambda *_: [])
        assert main([*ARGV, "--device", "cpu", "--results_path", str(root)]) == 0
    (file,) = root.rglob("config.json")
    return file.parent


@pytest.fixture(autouse=True)
def unpictured(monkeypatch):
    """Drawing is not what is tested here."""
    monkeypatch.setattr(Logs, "finish", lambda *_, **__: [])


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def texts(content, rng):
    """Damages of a file's bytes, without end."""
    while True:
        at = rng.randrange(len(content))
        yield content[:at]
        yield content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        yield content[:at] + rng.choice(WORDS) + content[at + rng.randrange(9) :]
        yield content[:at] + content[at + rng.randrange(1, 200) :]
        yield content[:at] + rng.randbytes(rng.randrange(1, 20)) + content[at:]
        yield rng.choice((b"", b"null", b"[]", b"{}", b"0", b'"a"', *WORDS, bytes(1000), content + content))


def values(content, rng):
    """JSON in which something is of another type, or missing, without end."""
    while True:
        changed = json.loads(content)
        for _ in range(rng.choice((1, 1, 1, 3, 30))):
            parent = changed
            while True:
                keys = list(parent) if isinstance(parent, dict) else range(len(parent))
                if not keys:
                    break
                key = rng.choice(list(keys))
                if isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.8:
                    parent = parent[key]
                    continue
                if rng.random() < 0.1:
                    del parent[key]
                elif rng.random() < 0.1 and isinstance(parent, dict):
                    parent[rng.choice(("\0", "\ud800", "x\ny", "", "lr"))] = parent.pop(key)
                else:
                    parent[key] = copy.deepcopy(rng.choice(WEIRD))
                break
        yield json.dumps(changed).encode()


def entries_in_place_of(file):
    """What else can lie where a file should be: callables that put it there."""
    yield lambda: None  # nothing
    yield file.mkdir
    yield lambda: os.mkfifo(file)
    yield lambda: file.symlink_to("/dev/zero")
    yield lambda: file.symlink_to("/dev/full")
    yield lambda: file.symlink_to(file.with_name("nowhere"))
    yield lambda: file.symlink_to(file)

    def huge():
        with open(file, "wb") as opened:
            opened.truncate(2**40)

    yield huge


def remove(file):
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)


def damages(file, num, seed):
    """Puts `num` damages in the place of a file, one after the other, and at the end the file again."""
    content, rng = file.read_bytes(), random.Random(seed)
    kinds = [texts(content, rng)]
    if file.suffix == ".json":
        kinds += [values(content, rng)] * 2
    for number in range(num):
        damaged = next(kinds[number % len(kinds)])
        file.write_bytes(damaged)
        yield damaged[:300]
    for put in entries_in_place_of(file):
        remove(file)
        put()
        yield put
    remove(file)
    file.write_bytes(content)


COUNT = {}


def attempt(capsys, name, damage, call, codes=(0, 2)):
    """Runs a command; what it says must be lines of ours."""
    COUNT[name] = COUNT.get(name, 0) + 1
    capsys.readouterr()
    code = call()
    said = capsys.readouterr()
    assert code in codes, (damage, code, said)
    assert all(line.startswith(("error: ", "warning: ", "note: ", "failed: ")) for line in said.err.splitlines()), said
    assert code == 0 or said.err, (damage, said)
    assert "Traceback" not in said.err + said.out
    assert all(len(line) < 5000 for line in said.err.splitlines())
    return said


@pytest.mark.parametrize("seed", range(2))
def test_a_damaged_config(seed, folder, capsys):
    for damage in damages(folder / "config.json", 110, seed):
        attempt(capsys, "config --from", damage, lambda: main(["--from", str(folder), "--dry_run"]))
        attempt(capsys, "config --resume", damage, lambda: main(["--resume", str(folder), "--dry_run"]))


def test_a_damaged_summary_of_a_run_that_is_resumed(folder, capsys):
    """What is no summary is taken for one of a run that did not finish: the checkpoint writes it anew."""
    file = folder / "summary.json"
    for number, damage in enumerate(damages(file, 30, seed=2)):
        attempt(capsys, "summary --resume", damage, lambda: main(["--resume", str(folder)]), (0, 1, 2))
        if number == 0:  # cut
            assert json.loads(file.read_text())["status"] == "finished"


def test_a_damaged_matrix(folder, capsys, monkeypatch):
    monkeypatch.undo()  # this draws
    monkeypatch.setattr("flatcl.utils.engine.pictures.save", lambda figure, path: None)
    monkeypatch.setattr(
        "flatcl.utils.engine.pictures.to_array", lambda figure: torch.zeros(9, 9, 3, dtype=torch.uint8).numpy()
    )
    for name in ("accuracy.json", "summary.json"):
        for damage in damages(folder / name, 12, seed=3):
            attempt(capsys, f"{name} drawn", damage, lambda: main(["--resume", str(folder)]), (0, 1, 2))


def test_damaged_metrics(folder, capsys):
    """They are never read again; only their length counts."""
    for damage in damages(folder / "metrics.jsonl", 20, seed=4):
        (folder / "summary.json").unlink(missing_ok=True)
        attempt(capsys, "metrics --resume", damage, lambda: main(["--resume", str(folder)]))


def test_a_damaged_checkpoint(folder, capsys):
    file = folder / "checkpoint" / "state.pt"
    for number, damage in enumerate(damages(file, 60, seed=5)):
        (folder / "summary.json").unlink(missing_ok=True)
        said = attempt(capsys, "checkpoint", damage, lambda: main(["--resume", str(folder)]))
        if number < 60:
            assert len(said.err.splitlines()) == 1 and str(file) in said.err, (damage, said)


NESTED = []
for _ in range(100):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    "state",
    [
        None, [], torch.zeros(3), {"method": {}}, {"config_hash": 3}, {"config_hash": "x"}, {"format": 99}, NESTED,
        {"format": "new"}, {"progress": {"tasks": 3, "colour": 1}}, {"cost": {"steps": "many"}},
        {"random": {"cpu": torch.zeros(3, dtype=torch.uint8)}}, {"order": "[" * 100_000}, {"order": "{}"}, {"order": 1},
        {"method": {"net.0.weight": torch.zeros(1)}}, {"method": {}}, {"method": []}, {"optimizer": {"state": 3}},
        {"metrics_size": "long"}, {"method": None},
    ],
    ids=lambda state: ascii(state)[:40],
)  # fmt: skip
def test_a_whole_checkpoint_of_something_else(state, folder, capsys):
    from flatcl.utils.engine import checkpoint

    path = folder / "checkpoint"
    known = checkpoint.load(path)
    remove(folder / "summary.json")
    if isinstance(state, dict):
        remove(path / "state.pt")
        torch.save({**known, **state} if state != {"method": {}} else state, path / "state.pt")
    else:
        torch.save(state, path / "state.pt")
    said = attempt(capsys, "foreign checkpoint", state, lambda: main(["--resume", str(folder)]), codes=(2,))
    assert len(said.err.splitlines()) == 1
    assert not (folder / "lock").exists() and not list(folder.rglob("*.tmp"))


def test_a_damaged_lock(folder, capsys):
    file = folder / "lock"
    file.write_text('{"pid": 1, "host": "far", "place": "far", "started": 1, "token": "a"}')
    for damage in damages(file, 20, seed=6):
        attempt(capsys, "lock", damage, lambda: main(["--resume", str(folder)]))


def test_damaged_runs_in_reports_and_in_the_skip_check_of_sweeps(folder, capsys):
    argv = ["--models", "er", "--datasets", "seq-synth", "--", "--debug_mode", "--n_tasks", "2"]
    jobs, _, _ = sweep._prepare(argv)
    for name in ("summary.json", "config.json", "environment.json"):
        for damage in damages(folder / name, 40, seed=7):
            attempt(capsys, f"report {name}", damage, lambda: report.main([str(folder)]))
            sweep.look(jobs, [folder])
            COUNT["skip check"] = COUNT.get("skip check", 0) + 1
    assert sweep.look(jobs, [folder]).done, "an undamaged run counts"


def test_damaged_records(folder, tmp_path, capsys):
    record = tmp_path / "record" / "runs.jsonl"
    record.parent.mkdir()
    assert report.main([str(folder), "--record", str(record)]) == 0
    content = json.loads(record.read_text())
    rng = random.Random(8)
    kinds = values(json.dumps(content).encode(), rng)
    for _ in range(60):
        record.write_bytes(next(kinds) + b"\n" + json.dumps(content).encode() + b"\n")
        attempt(
            capsys, "record, line", None, lambda: report.main([str(record.parent), "--pivot", "dataset"]), codes=(0,)
        )
    record.write_text(json.dumps(content))
    for damage in damages(record, 40, seed=9):
        attempt(capsys, "record", damage, lambda: report.main([str(record.parent)]))


@pytest.mark.parametrize("flag", ["--from", "--resume", "--plugin", "--results_path", "--base_path", "--notes"])
def test_paths_that_cannot_be(flag, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").symlink_to("/dev/zero")
    words = [*ARGV, "--model", "sgd"] if flag not in ("--from", "--resume") else []
    codes = (0, 2) if flag in ("--notes", "--base_path", "--results_path") else (2,)
    for path in ("\0", "a\0b", "\ud800", "~nobody/x", "y" * 5000, "/dev/zero", "/dev/null/x", "", " ", "."):
        attempt(capsys, f"path of {flag}", path, partial(main, [*words, flag, path]), codes)


def test_at_least_500_damages_were_tried(capsys):
    """All of the above, counted; alone, this test has nothing to count."""
    if len(COUNT) < 10:
        pytest.skip("the tests above did not run in this process")
    with capsys.disabled():
        print(f"\n{sum(COUNT.values())} damaged inputs, no traceback: {COUNT}")
    assert sum(COUNT.values()) >= 500
