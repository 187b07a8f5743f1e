"""Work is not lost when the machine fails: kills, signals, full disks, closed consoles, flipped bits."""

import contextlib
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_runs import assert_same_run, lines_of, read, refused, start, timeless

import flatcl
from flatcl.utils.commands import report
from flatcl.utils.commands.train import main
from flatcl.utils.console import again
from flatcl.utils.engine import checkpoint, memory, predictions, results, run, trainer
from flatcl.utils.engine.logs import Logs
from flatcl.utils.engine.trainer import Trainer
from flatcl.utils.errors import Diverged, Interrupted, UsageError
from flatcl.utils.registry import METHODS, ROOT, load_plugin

HOOKED = '''"""ER that calls a function after a step, and waits for a file to go before its first forward pass."""
import os, time
from flatcl.models.er import ER
from flatcl.utils.registry import METHODS

@METHODS.register("hooked")
class Hooked(ER):
    hooks = {}

    def remember(self, batch, loss):
        super().remember(batch, loss)
        Hooked.hooks.get(self.buffer.num_seen // 16, lambda: None)()

    def forward(self, x, task=None):
        while os.path.exists(os.environ.get("WAIT_FOR", "")):
            time.sleep(0.01)
        return super().forward(x, task)
'''
WORDS = ("--model", "hooked", "--dataset", "seq-synth", "--stop_after", "3", "--log_every", "1", "--threads", "1")


@pytest.fixture
def unpictured(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr(Logs, "finish", lambda *_: [])


@pytest.fixture
def hooked(tmp_path, unpictured):
    """The command line of a run (8 steps a task, 24 in all), and the class whose `hooks[step]` are called."""
    file = tmp_path / "hooked.py"
    file.write_text(HOOKED)
    load_plugin(str(file))
    METHODS.load("hooked").hooks = {}
    return (*WORDS, "--plugin", str(file), "--device", "cpu"), METHODS.load("hooked").hooks


@pytest.fixture
def whole(hooked, tmp_path):
    """The same run, undisturbed."""
    return start(tmp_path / "whole", *hooked[0])


def nothing_half_written(folder):
    names = [path.name for path in folder.rglob("*")]
    return not [name for name in names if name.endswith((".tmp", ".new")) or name.startswith("lock")]


# the checkpoint


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return {"config_hash": "abc", "method": {"weight": torch.randn(40, 20)}, "steps": 3, "order": "text", "list": [1.5]}


def test_of_600_flipped_bits_600_are_noticed_and_the_generation_before_is_used(state, tmp_path, assert_same, capsys):
    checkpoint.save(tmp_path, {**state, "steps": 2})
    checkpoint.save(tmp_path, state)
    file, rng, noticed = tmp_path / "state.pt", random.Random(0), 0
    content = file.read_bytes()
    for _ in range(600):
        bit = rng.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        found = checkpoint.load(tmp_path, "abc")
        (line,) = capsys.readouterr().err.splitlines()
        assert found["steps"] == 2 and str(file) in line and "is damaged" in line and "state.before.pt" in line
        noticed += 1
    assert noticed == 600
    file.write_bytes(content)
    found = checkpoint.load(tmp_path, "abc")
    assert found.pop("format") == checkpoint.FORMAT and capsys.readouterr().err == ""
    assert_same(found, state)


@pytest.mark.parametrize("name", ["state.pt", "state.before.pt"])
def test_bytes_that_are_missing_or_too_many_are_noticed(name, state, tmp_path, capsys):
    checkpoint.save(tmp_path, state)
    content = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").unlink()
    for damaged in (b"", content[:-1], content[:-99], content[:99], content + b"\0", bytes(len(content)), content[1:]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(checkpoint.UsageError, match=f"{name} is damaged .* Repeat the run with --from"):
            checkpoint.load(tmp_path)


def test_a_checkpoint_of_before_there_was_a_digest_is_read_and_verified(state, tmp_path):
    file = tmp_path / "state.pt"
    torch.save(state, file)
    content = file.read_bytes()
    assert checkpoint.load(tmp_path, "abc")["steps"] == 3
    at = content.index(state["method"]["weight"].numpy().tobytes()) + 100
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(checkpoint.UsageError, match=r"damaged \(its content does not match its CRC\)"):
        checkpoint.load(tmp_path)


def test_after_damage_the_whole_generation_is_not_pushed_out(state, tmp_path, capsys):
    for steps in (1, 2):
        checkpoint.save(tmp_path, {**state, "steps": steps})
    (tmp_path / "state.pt").write_bytes(b"damaged")
    assert checkpoint.load(tmp_path, repair=True)["steps"] == 1
    checkpoint.save(tmp_path, {**state, "steps": 3})
    (tmp_path / "state.pt").write_bytes(b"damaged")
    assert checkpoint.load(tmp_path)["steps"] == 1


def test_both_generations_damaged_is_one_line_that_names_both(hooked, tmp_path, capsys):
    argv, hooks = hooked
    hooks[10] = lambda: signal.raise_signal(signal.SIGTERM)
    folder = start(tmp_path / "out", *argv, code=143)
    for name in ("state.pt", "state.before.pt"):
        (folder / "checkpoint" / name).write_bytes(b"damaged")
    line = refused(capsys, "--resume", str(folder))
    assert "state.pt is damaged" in line and "state.before.pt is damaged" in line and "--from" in line


@pytest.mark.parametrize("bit", [1, 100_001, -1])
def test_a_run_whose_last_checkpoint_is_damaged_resumes_from_the_one_before(bit, hooked, whole, tmp_path, capsys):
    argv, hooks = hooked
    hooks[10] = lambda: signal.raise_signal(signal.SIGTERM)
    folder = start(tmp_path / "out", *argv, code=143)
    hooks.clear()
    file = folder / "checkpoint" / "state.pt"
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    capsys.readouterr()
    assert main(["--resume", str(folder)]) == 0
    said = capsys.readouterr()
    assert "resumed after step 8, 1 task(s)" in said.out and "state.pt is damaged" in said.err
    assert len(said.err.splitlines()) == 2 and said.err.startswith("note: plugin")
    assert_same_run(whole, folder)


def test_a_kill_while_a_checkpoint_is_written_costs_at_most_that_one(tmp_path):
    """Thirty kills at any moment; what was reported as saved is there."""
    rng, weights = random.Random(1), torch.zeros(300_000)
    for number in range(30):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            for steps in range(100_000):
                state = {"config_hash": "abc", "steps": steps, "weights": weights + steps}
                checkpoint.save(tmp_path / str(number % 2), state)
                os.write(writer, b"%d " % steps)
        os.close(writer)
        said = os.read(reader, 99)
        time.sleep(rng.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reader, "rb") as pipe:
            said += pipe.read()
        found = checkpoint.load(tmp_path / str(number % 2))
        assert found["steps"] >= int(said.split()[-1]) and found["weights"].eq(found["steps"]).all()


@pytest.mark.parametrize("links", [True, False])
def test_the_newest_state_keeps_its_name_until_the_next_one_takes_it(links, state, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    def replace(source, target, replace=os.replace):
        if Path(target).name == "state.pt":
            refuse()
        replace(source, target)

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for steps in (1, 2):
        checkpoint.save(tmp_path, {**state, "steps": steps})
    for _ in range(2):  # the second time, both names are those of one file already
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(OSError, match="not permitted"):
                checkpoint.save(tmp_path, {**state, "steps": 3})
        assert (tmp_path / "state.pt").exists() == links and checkpoint.load(tmp_path)["steps"] == 2
        assert nothing_half_written(tmp_path)
    checkpoint.keep_last(tmp_path)
    assert checkpoint.load(tmp_path)["steps"] == 2, "the only one that is left stays"
    checkpoint.save(tmp_path, {**state, "steps": 4})
    assert checkpoint.load(tmp_path)["steps"] == 4 and nothing_half_written(tmp_path)
    (tmp_path / "state.pt").write_bytes(b"damaged")
    assert checkpoint.load(tmp_path)["steps"] == 2


def test_a_finished_run_keeps_its_last_checkpoint_alone(whole):
    assert [path.name for path in (whole / "checkpoint").iterdir()] == ["state.pt"]
    assert checkpoint.load(whole / "checkpoint")["cost"]["steps"] == 24 and nothing_half_written(whole)


# killed at once; the lock


@pytest.fixture
def waiting(hooked, tmp_path):
    """A process whose run waits in its first evaluation, and the run's folder."""
    gate = tmp_path / "gate"
    gate.touch()
    argv = [sys.executable, "main.py", *hooked[0], "--results_path", str(tmp_path / "part")]
    process = subprocess.Popen(argv, cwd=ROOT, env={**os.environ, "WAIT_FOR": str(gate)}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (found := list((tmp_path / "part").rglob("state.pt"))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    yield process, found[0].parent.parent
    process.kill()
    process.wait()


def test_a_run_that_is_alive_is_not_resumed_and_one_that_was_killed_at_once_is(waiting, whole, capsys):
    process, folder = waiting
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    line = refused(capsys, "--resume", str(folder))
    assert f"is in use by process {process.pid} on {os.uname().nodename}" in line
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    process.kill()
    process.wait()
    assert (folder / "lock").exists()
    assert main(["--resume", str(folder)]) == 0
    assert "resumed after step 0, 0 task(s) finished" in capsys.readouterr().out
    assert_same_run(whole, folder)
    assert nothing_half_written(folder)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(hooked, whole, tmp_path, capsys):
    """As in the seconds in which the data is read; here also with what an older version logged before its first one."""
    argv, hooks = hooked
    folder = start(tmp_path / "part", *argv)
    for name in ("summary.json", "accuracy.json", "checkpoint/state.pt"):
        (folder / name).unlink()
    assert main(["--resume", str(folder)]) == 0
    assert_same_run(whole, folder)


def test_a_run_that_another_process_took_over_stops_and_leaves_the_folder_alone(hooked, tmp_path, capsys):
    argv, hooks = hooked

    def take_over():
        (lock,) = (tmp_path / "out").rglob("lock")
        lock.write_text(json.dumps({**json.loads(lock.read_text()), "host": "far", "place": "far", "pid": 7}))
        lock.with_name("summary.json").write_text("theirs")

    hooks[10] = take_over
    folder = start(tmp_path / "out", *argv, code=1)
    assert "was taken over by process 7 on far" in capsys.readouterr().err
    assert (folder / "summary.json").read_text() == "theirs" and (folder / "lock").exists()


def test_the_error_of_a_run_is_not_hidden_by_a_folder_that_another_process_took_over(hooked, tmp_path, capsys):
    argv, hooks = hooked

    def fail():
        (lock,) = (tmp_path / "out").rglob("lock")
        lock.write_text(json.dumps({**json.loads(lock.read_text()), "host": "far", "place": "far", "pid": 7}))
        raise Diverged("the weights are not finite")

    hooks[10] = fail
    start(tmp_path / "out", *argv, code=1)
    *_, warning, error = capsys.readouterr().err.splitlines()
    assert error == "failed: the weights are not finite"
    assert warning.startswith("warning: the status of the run (diverged)") and "taken over by process 7" in warning


# signals


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGXCPU", "SIGTERM", "SIGINT"])
def test_a_signal_ends_a_run_with_a_checkpoint_and_the_resume_command(name, hooked, whole, tmp_path, capsys):
    argv, hooks = hooked
    number = getattr(signal, name)
    handler = signal.getsignal(number)
    hooks[11] = lambda: signal.raise_signal(number)
    folder = start(tmp_path / "out", *argv, code=128 + number)
    assert capsys.readouterr().err == f"interrupted at step 11. Continue with: {again(folder)}\n"
    assert read(folder)["status"] == "interrupted" and checkpoint.load(folder / "checkpoint")["cost"]["steps"] == 11
    assert signal.getsignal(number) == handler and nothing_half_written(folder)
    hooks.clear()
    assert main(["--resume", str(folder)]) == 0
    assert_same_run(whole, folder)


@pytest.mark.parametrize(("name", "kept"), [("forward", 0), ("end_task", 0), ("begin_task", 8)])
@pytest.mark.parametrize("is_slow", [True, False])
def test_a_signal_while_there_is_no_step_waits_a_while_then_the_last_checkpoint_serves(
    name, kept, is_slow, hooked, whole, tmp_path, monkeypatch, capsys
):
    """In the evaluation or the work of a method at the end of the first task, or before the second one."""
    argv, _ = hooked
    cls, sent = METHODS.load("hooked"), []
    method = getattr(cls, name)

    def slow(self, *given):
        if self.buffer.num_seen == 128 and not (name == "forward" and self.training) and not sent:
            sent.append(signal.raise_signal(signal.SIGTERM))
            for _ in range(300 if is_slow else 0):
                time.sleep(0.01)
        return method(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "PATIENCE_S", 0.1 if is_slow else 60)
        patch.setattr(cls, name, slow)
        folder = start(tmp_path / "out", *argv, code=143)
    since = ", with the checkpoint of step 0: what came after it is done again" if is_slow and kept == 0 else ""
    reached = 8 if is_slow or name != "begin_task" else 9  # the step after it
    assert capsys.readouterr().err == f"interrupted at step {reached}{since}. Continue with: {again(folder)}\n"
    assert checkpoint.load(folder / "checkpoint")["cost"]["steps"] == (kept if is_slow else reached)
    assert read(folder)["status"] == "interrupted" and nothing_half_written(folder)
    assert main(["--resume", str(folder)]) == 0
    assert_same_run(whole, folder)


def test_a_signal_that_came_outside_is_remembered_in_the_next_evaluation(monkeypatch):
    """After the first reminder, for which there was a step under way."""
    monkeypatch.setattr(trainer, "PATIENCE_S", 0.1)
    watched, threads = SimpleNamespace(_stop_signal=None, has_no_step=False), threading.active_count()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted), trainer.SignalWatch(watched):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.25)
        assert watched._stop_signal == signal.SIGTERM
        watched.has_no_step = True
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == before and threading.active_count() == threads


def test_what_nohup_ignores_stays_ignored(hooked, tmp_path):
    argv, hooks = hooked
    hooks[11] = lambda: signal.raise_signal(signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert read(start(tmp_path / "out", *argv))["status"] == "finished"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_handler_that_is_not_pythons_is_left_alone(hooked, tmp_path, monkeypatch):
    """Python says None of one that a program around it has put in."""
    get, put = signal.getsignal, signal.signal
    before = get(signal.SIGHUP)
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGHUP else get(number))
    monkeypatch.setattr(
        signal,
        "signal",
        lambda number, new: (put(number, new), None)[1] if number == signal.SIGHUP else put(number, new),
    )
    assert read(start(tmp_path / "out", *hooked[0], "--stop_after", "1"))["status"] == "finished"
    assert get(signal.SIGHUP) == before


def test_signals_that_come_in_numbers_wait_for_the_checkpoint(hooked, tmp_path, capsys):
    """A limit of CPU time sends one a second, a shell and its terminal one each."""
    argv, hooks = hooked

    def many():
        for number in (signal.SIGXCPU, signal.SIGXCPU, signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)
        time.sleep(1.1)
        signal.raise_signal(signal.SIGXCPU)

    hooks[11] = many
    folder = start(tmp_path / "out", *argv, code=128 + signal.SIGXCPU)
    assert checkpoint.load(folder / "checkpoint")["cost"]["steps"] == 11


def test_a_second_ctrl_c_ends_a_run_at_once(hooked, tmp_path, capsys):
    argv, hooks = hooked

    def twice():
        signal.raise_signal(signal.SIGINT)
        time.sleep(1.1)
        signal.raise_signal(signal.SIGINT)

    hooks[11] = twice
    folder = start(tmp_path / "out", *argv, code=130)
    assert read(folder)["status"] == "interrupted" and nothing_half_written(folder)
    assert checkpoint.load(folder / "checkpoint")["cost"]["steps"] == 8


# consoles


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


@pytest.mark.parametrize("kind", ["full", "pipe", "closed", "none"])
def test_a_console_that_cannot_be_written_costs_no_run(kind, hooked, whole, tmp_path, monkeypatch, capsys):
    argv, _ = hooked
    stdout = {"full": lambda: open("/dev/full", "w"), "pipe": closed_pipe, "closed": io.StringIO, "none": lambda: None}
    stream = stdout[kind]()
    if kind == "closed":
        stream.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        folder = start(tmp_path / "out", *argv)
    said = capsys.readouterr().err
    assert ("nothing more can be printed (" in said) == (kind != "none") and len(said.splitlines()) <= 1
    assert_same_run(whole, folder)


def test_a_stderr_that_is_gone_costs_no_run(hooked, whole, tmp_path, monkeypatch):
    argv, hooks = hooked
    for number, stream in enumerate((None, open("/dev/full", "w"), closed_pipe())):
        hooks[10] = lambda: signal.raise_signal(signal.SIGHUP)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            folder = start(tmp_path / str(number), *argv, code=129)
            hooks.clear()
            assert main(["--resume", str(folder)]) == 0
        assert_same_run(whole, folder)


@pytest.mark.parametrize("encoding", ["latin-1", "cp932", "ascii"])
def test_a_console_that_cannot_show_every_character_costs_no_run(encoding, tmp_path, monkeypatch, unpictured):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        words = ("--model", "sgd", "--dataset", "seq-synth", "--n_tasks", "1", "--debug_mode", "--notes", "größe 学習")
        folder = start(tmp_path / "é–±", *words)
        assert report.main([str(folder), "--metrics", "final_average_accuracy,forgetting_chaudhry18"]) == 0
        out.flush()
    text = out.buffer.getvalue().decode(encoding)
    assert "forgetting_chaudhry18" in text and "run folder: " in text and out.errors == "strict"


def test_a_real_process_whose_stdout_is_full_or_closed_ends_as_its_run_did(hooked, tmp_path):
    """Python itself would end with 120, since it cannot write what is left at its exit."""
    command = f"{sys.executable} main.py --model sgd --dataset seq-synth --debug_mode --device cpu --results_path "
    shell = "bash", "-c"
    head = f"{command} {tmp_path / 'head'} | head -n 1; exit ${{PIPESTATUS[0]}}"
    full = f"{command} {tmp_path / 'full'} > /dev/full 2> /dev/full"
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([*shell, line], **options) for line in (head, full)]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert said[0][0].count("\n") == 1 and said[0][1].count("\n") <= 1, said
    for name in ("head", "full"):
        (summary,) = (tmp_path / name).rglob("summary.json")
        assert read(summary.parent)["status"] == "finished"


def test_results_are_on_disk_before_anything_is_printed(hooked, tmp_path, monkeypatch):
    argv, _ = hooked
    seen = []

    class Watching(io.StringIO):
        def write(self, text):
            if text.startswith("Accuracy for "):
                (folder,) = [path.parent for path in (tmp_path / "out").rglob("accuracy.json")]
                count = int(text.split()[2])
                assert len(read(folder, "accuracy.json")["tasks"]) == len(read(folder)["accuracy"]["class-il"]) == count
                assert sum("task" in line for line in lines_of(folder)) == count
                assert checkpoint.load(folder / "checkpoint")["progress"]["tasks"] == list(range(count))
                seen.append(count)
            elif "metric  " in text:
                assert read(next((tmp_path / "out").rglob("summary.json")).parent)["status"] == "finished"
                seen.append("end")
            return super().write(text)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Watching())
        start(tmp_path / "out", *argv)
    assert seen == [1, 2, 3, "end"]


def test_a_list_that_cannot_be_printed_has_failed(monkeypatch, capsys):
    for words in (["--list"], ["--model", "er", "--dataset", "seq-synth", "--dry_run"]):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", open("/dev/full", "w"))
            assert main(words) == 1
        assert capsys.readouterr().err == "failed: the output cannot be written (No space left on device).\n"
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", closed_pipe())
            assert main(words) == 1
        assert capsys.readouterr().err == ""


# full disks, folders that are gone


@contextlib.contextmanager
def lifted_at_the_end():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield limits
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def full_disk():
    """`full_disk(True)`: from now on no file can grow beyond some bytes, as under `ulimit -f` or a full quota."""
    with lifted_at_the_end() as limits:
        yield lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]) if full else limits)


def test_a_disk_that_is_full_for_a_while_costs_no_result(full_disk, hooked, whole, tmp_path, capsys):
    argv, hooks = hooked
    hooks[5], hooks[20] = (lambda: full_disk(True)), (lambda: full_disk(False))
    capsys.readouterr()
    folder = start(tmp_path / "out", *argv, "--checkpoint_minutes", "1e-9")
    lines = capsys.readouterr().err.splitlines()
    for what in ("a checkpoint", "the results so far", "metrics.jsonl", "TensorBoard"):
        assert sum(line.startswith(f"warning: {what}") for line in lines) == 1, lines
    assert len(lines) == 4
    for name in ("accuracy.json", "summary.json"):
        assert read(folder, name)["accuracy"] == read(whole, name)["accuracy"]
    kept = [line for line in timeless(whole) if "task" not in line and not 5 <= line["step"] < 20]
    assert [line for line in timeless(folder) if "task" not in line] == kept, "whole lines, those of the time left out"
    assert nothing_half_written(folder) and checkpoint.load(folder / "checkpoint")["cost"]["steps"] == 24


def test_a_disk_that_stays_full_is_one_sentence_and_the_run_can_be_resumed(full_disk, hooked, whole, tmp_path, capsys):
    argv, hooks = hooked
    hooks[12] = lambda: full_disk(True)
    capsys.readouterr()
    folder = start(tmp_path / "out", *argv, code=1)
    full_disk(False)
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith(f"failed: the results cannot be written to {folder} (File too large)") and "--resume" in last
    assert "final_average_accuracy" in said.out, "they are only on the console"
    assert nothing_half_written(folder) and read(folder)["status"] == "running"
    hooks.clear()
    assert main(["--resume", str(folder)]) == 0
    assert_same_run(whole, folder)


def test_a_signal_on_a_full_disk_keeps_the_checkpoint_before(full_disk, hooked, whole, tmp_path, capsys):
    argv, hooks = hooked
    hooks[12] = lambda: (full_disk(True), signal.raise_signal(signal.SIGUSR1))
    folder = start(tmp_path / "out", *argv, code=128 + signal.SIGUSR1)
    full_disk(False)
    hooks.clear()
    assert nothing_half_written(folder) and "the previous one is kept" in capsys.readouterr().err
    assert main(["--resume", str(folder)]) == 0
    assert_same_run(whole, folder)


def test_a_disk_that_is_full_at_the_start_is_said_before_any_work(full_disk, hooked, tmp_path, capsys):
    full_disk(True)
    try:
        code = main([*hooked[0], "--results_path", str(tmp_path / "out")])
    finally:
        full_disk(False)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and "cannot write there (File too large)" in line
    assert not list((tmp_path / "out").rglob("*.json"))


@pytest.fixture
def full_for_checkpoints():
    """From this call on checkpoints cannot be written, smaller files can; the next call ends that."""
    with lifted_at_the_end() as limits:
        yield lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]) if full else limits)


def test_a_last_checkpoint_that_could_not_be_written_is_tried_again(
    full_for_checkpoints, hooked, whole, tmp_path, monkeypatch
):
    argv, hooks = hooked

    def make(*given, make=run._make_last):
        full_for_checkpoints(False)
        return make(*given)

    monkeypatch.setattr(run, "_make_last", make)
    hooks[20] = lambda: full_for_checkpoints(True)
    folder = start(tmp_path / "out", *argv)
    assert_same_run(whole, folder)
    assert [path.name for path in (folder / "checkpoint").iterdir()] == ["state.pt"]


def test_weights_of_the_end_that_are_lost_are_said_and_older_ones_are_not_taken_for_them(
    full_for_checkpoints, hooked, tmp_path, capsys
):
    argv, hooks = hooked
    hooks[20] = lambda: full_for_checkpoints(True)
    folder = start(tmp_path / "out", *argv)
    full_for_checkpoints(False)
    hooks.clear()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("warning: the weights of the end of the run are lost") and "File too large" in last
    assert read(folder)["status"] == "finished" and len(read(folder)["accuracy"]["class-il"]) == 3
    assert checkpoint.load(folder / "checkpoint")["cost"]["steps"] == 16 and nothing_half_written(folder)
    says = f"{folder}: this run is finished, with 3 task(s), but its checkpoint is of after 2: "
    with pytest.raises(UsageError, match=re.escape(says)):
        flatcl.load(folder).confusion_matrix()
    line = refused(capsys, "--from", str(folder), "--continue", "1", "--stop_after", "4")
    assert says in line and "repeat it with --from" in line and "--resume" not in line


def test_weights_that_cannot_be_written_leave_the_checkpoint_in_their_place(hooked, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_weights", fail)
    folder = start(tmp_path / "out", *hooked[0], "--keep_checkpoint", "0")
    assert "warning: model.pt cannot be written (No space left on device)" in capsys.readouterr().err
    assert checkpoint.load(folder / "checkpoint")["cost"]["steps"] == 24
    assert flatcl.load(folder).confusion_matrix().sum() == 160


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_that_is_killed_when_it_says_that_it_is_finished_is_made_whole(moment, hooked, whole, tmp_path):
    child = os.fork()
    if child == 0:

        def write(trainer, status, write=Trainer.write_results):
            if status != "finished" or moment == "after":
                write(trainer, status)
            if status == "finished":
                os.kill(os.getpid(), signal.SIGKILL)

        Trainer.write_results = write
        main([*hooked[0], "--keep_checkpoint=0", "--save_predictions=1", "--results_path", str(tmp_path / "out")])
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (folder,) = (file.parent for file in (tmp_path / "out").rglob("config.json"))
    assert (read(folder)["status"] == "finished") == (moment == "after")
    assert main(["--resume", str(folder)]) == 0
    assert read(folder)["status"] == "finished" and not (folder / "checkpoint").exists()
    assert (folder / "confusion_matrix.png").is_file() and nothing_half_written(folder)
    weights, of_whole = torch.load(folder / "model.pt"), checkpoint.load(whole / "checkpoint")["method"]
    assert weights and all(of_whole[name].equal(value) for name, value in weights.items())
    counts = predictions.confusion_matrix(predictions.load(folder), list(range(10)))
    assert np.array_equal(counts, flatcl.load(whole).confusion_matrix())


def test_a_run_that_is_interrupted_while_it_makes_its_predictions_says_so(hooked, tmp_path, monkeypatch, capsys):
    def interrupted(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predictions, "save", interrupted)
        folder = start(tmp_path / "out", *hooked[0], "--save_predictions", "1", code=130)
    assert read(folder)["status"] == "interrupted"
    assert main(["--resume", str(folder)]) == 0
    assert read(folder)["status"] == "finished" and predictions.load(folder) is not None


def test_a_run_whose_folder_is_gone_stops_with_one_sentence(hooked, tmp_path, capsys):
    argv, hooks = hooked
    kept = []

    def move():
        (file,) = (tmp_path / "out").rglob("config.json")
        kept.append(file.parent.rename(tmp_path / "elsewhere"))

    hooks[10] = move
    capsys.readouterr()
    assert main([*argv, "--results_path", str(tmp_path / "out")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("failed: the run folder ") and "was deleted or moved" in last
    assert not list((tmp_path / "out").rglob("*.*")), "nothing is made anew"
    assert read(kept[0])["accuracy"]["class-il"], "what was written is there"


# logs


def test_metrics_that_lost_lines_are_not_padded(hooked, whole, tmp_path, capsys):
    argv, hooks = hooked
    hooks[20] = lambda: signal.raise_signal(signal.SIGTERM)
    folder = start(tmp_path / "out", *argv, code=143)
    hooks.clear()
    file = folder / "metrics.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert main(["--resume", str(folder)]) == 0
    _, line = capsys.readouterr().err.splitlines()  # the first one names the plugin
    assert line.startswith(f"warning: {file} has {len(content) // 2:,} bytes, but had {len(content):,}")
    whole_lines, lines = timeless(whole), timeless(folder)
    assert b"\0" not in file.read_bytes() and all(line in whole_lines for line in lines)
    assert lines[-4:] == whole_lines[-4:] and read(folder)["accuracy"] == read(whole)["accuracy"]


def test_what_was_logged_before_a_checkpoint_is_in_tensorboards_file_after_a_kill(hooked, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv, hooks = hooked
    child = os.fork()
    if child == 0:
        hooks[7] = lambda: os.kill(os.getpid(), signal.SIGKILL)
        main([*argv, "--checkpoint_minutes", "1e-9", "--results_path", str(tmp_path)])
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (file,) = tmp_path.rglob("*tfevents*")
    points = EventAccumulator(str(file.parent), size_guidance={"scalars": 0}).Reload().Scalars("train/loss")
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]


def test_a_system_that_does_not_tell_the_memory_costs_no_run(hooked, tmp_path, monkeypatch, capsys):
    """As Windows, which has no `resource`."""
    monkeypatch.setattr(memory, "STATUS", tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "resource", None)
    folder = start(tmp_path / "out", *hooked[0])
    assert read(folder)["cost"]["peak_memory_mib"] is None and "peak memory not known" in capsys.readouterr().out
    assert report.main([str(folder), "--metrics", "peak_memory_mib"]) == 0


def test_the_environments_of_a_run_that_goes_on_somewhere_else_are_all_kept(hooked, tmp_path, monkeypatch):
    argv, hooks = hooked
    hooks |= {step: lambda: signal.raise_signal(signal.SIGTERM) for step in (5, 11, 20)}
    folder = start(tmp_path / "part", *argv, code=143)
    here, resume = read(folder, "environment.json"), ["--resume", str(folder)]
    assert main(resume) == 143 and read(folder, "environment.json") == here
    there = {**here, "commit": "0" * 40, "device_name": "other"}
    with monkeypatch.context() as patch:
        patch.setattr(results, "environment", lambda device: there)
        assert main(resume) == 143
    assert main(resume) == 0
    assert read(folder, "environment.json") == {
        **here, "resumed": [{"after_step": 11, **there}, {"after_step": 20, **here}]
    }  # fmt: skip


@pytest.mark.parametrize(("backbone", "says"), [("tiny-bn", True), ("mnistmlp", False)])
def test_batchnorm_under_another_number_of_processes_is_said(backbone, says, hooked, tiny_bn, tmp_path, capsys):
    argv, hooks = hooked
    hooks[5] = lambda: signal.raise_signal(signal.SIGTERM)
    folder = start(tmp_path, *argv, "--plugin", tiny_bn, "--backbone", backbone, code=143)
    hooks.clear()
    file = folder / "environment.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "processes": 2}))
    capsys.readouterr()
    assert main(["--resume", str(folder)]) == 0
    assert ("had 2 process(es) and now has 1: BatchNorm normalises" in capsys.readouterr().out) == says


PICTURES = ["accuracy_matrix.png", "accuracy_matrix_task-il.png", "curves.png", "curves_task-il.png"]


def test_resume_of_a_finished_run_writes_the_pictures_and_entries_that_are_missing(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = start(tmp_path, "--model", "er", "--dataset", "seq-synth", "--debug_mode", "--n_tasks", "2")

    def final_entries():
        (place,) = (folder / "tensorboard").iterdir()
        events = EventAccumulator(str(place), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
        scalars = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if tag.startswith("metrics/")}
        images = {tag: events.Images(tag)[-1].encoded_image_string for tag in events.Tags()["images"]}
        return scalars, images, "_hparams_/session_end_info" in events.summary_metadata

    def resumed():
        capsys.readouterr()
        assert main(["--resume", str(folder)]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        return said.out

    pictures = {name: (folder / name).read_bytes() for name in PICTURES}
    entries, files = final_entries(), sorted(path.name for path in folder.iterdir())
    assert len(entries[0]) == 16 and len(entries[1]) == 4 and entries[2]
    assert "this run is finished; no file is missing" in resumed()
    assert sorted(path.name for path in folder.iterdir()) == files

    (folder / "curves.png").write_bytes(pictures["curves.png"][:500])  # half written
    out = resumed()
    assert "what was missing is written: curves.png. Use" in out
    for path in (*folder.glob("*.png"), *folder.rglob("*tfevents*")):
        path.unlink()
    out = resumed()
    assert all(name in out for name in (*PICTURES, "hparams", "metrics/class-il/final_average_accuracy"))
    assert final_entries() == entries and nothing_half_written(folder)
    assert {name: (folder / name).read_bytes() for name in PICTURES} == pictures
    assert "no file is missing" in resumed()


def test_a_finished_run_is_not_trained_with_other_flags(hooked, whole, capsys):
    before = (whole / "summary.json").read_bytes()
    assert "--lr cannot be changed" in refused(capsys, "--resume", str(whole), "--lr", "0.5")
    assert (whole / "summary.json").read_bytes() == before


def test_files_that_a_killed_process_left_half_written_are_removed(hooked, whole, tmp_path):
    argv, hooks = hooked
    hooks[10] = lambda: signal.raise_signal(signal.SIGTERM)
    folder = start(tmp_path / "out", *argv, code=143)
    hooks.clear()
    for name in ("summary.json.99.tmp", ".curves.png.99.tmp", "checkpoint/state.pt.99.tmp", "checkpoint/state.pt.new"):
        (folder / name).write_text("half")
    assert main(["--resume", str(folder)]) == 0
    assert nothing_half_written(folder)
    assert Path(folder / "checkpoint" / "state.pt").exists()
