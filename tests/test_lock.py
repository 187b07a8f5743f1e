"""The lock of a folder: one holder at a time, with real processes that are really killed."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from flatcl.utils.engine import lock
from flatcl.utils.engine.lock import Busy, Lock, holder
from flatcl.utils.registry import ROOT

HOLD = """
import sys, time
from flatcl.utils.engine.lock import Lock
with Lock(sys.argv[1], "it"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Starts processes that hold a lock until their stdin is closed."""
    started = []

    def start(file, code=HOLD):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(file)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def age(file, seconds):
    """Makes a file older, as if nobody had touched it for so long."""
    now = file.stat().st_mtime
    os.utime(file, (now - seconds, now - seconds))


def foreign(file, **changed):
    """Lets the lock that lies there look as if another machine had written it."""
    file.write_text(json.dumps({**json.loads(file.read_text()), "host": "far", "place": "far away", **changed}))


def test_who_holds_it_is_known_and_nobody_else_gets_it(tmp_path, hold):
    file = tmp_path / "lock"
    assert holder(file) is None
    process = hold(file)
    found = holder(file)
    assert (found.pid, found.host) == (process.pid, os.uname().nodename)
    with pytest.raises(Busy, match=f"^the run is in use by process {process.pid} on {found.host}. Wait "):
        Lock(file, "the run").acquire()
    process.communicate()
    assert holder(file) is None and list(tmp_path.iterdir()) == []
    with Lock(file, "the run"):
        assert holder(file).pid == os.getpid()
        with pytest.raises(Busy, match=f"process {os.getpid()} on "):
            Lock(file, "a thread of the same process").acquire()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, hold):
    file = tmp_path / "lock"
    process = hold(file)
    os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.1)
    assert file.exists() and holder(file) is None, "dead, also while its parent has not asked for its end"
    with Lock(file, "it"):
        assert holder(file).pid == os.getpid() and [path.name for path in tmp_path.iterdir()] == ["lock"]
    process.wait()


def test_a_process_number_that_was_given_to_another_process_does_not_count(tmp_path, hold):
    file = tmp_path / "lock"
    process = hold(file)
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "started": content["started"] - 1}))
    assert holder(file) is None and process.poll() is None
    with Lock(file, "it"):
        pass


@pytest.mark.parametrize("text", [None, "", "{", "[]", "[" * 4000, '{"pid": 1}', "\0\0\0"])
def test_of_a_lock_that_cannot_be_asked_only_the_age_counts(text, tmp_path, hold):
    """One of another machine, and one that is torn."""
    file = tmp_path / "lock"
    process = hold(file)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    foreign(file) if text is None else file.write_text(text)
    age(file, lock.STALE_S - 20)
    with pytest.raises(Busy, match=f"process {process.pid} on far" if text is None else "cannot be read"):
        Lock(file, "it").acquire()
    assert (holder(file) is None) == (text is not None)
    age(file, 40)
    assert holder(file) is None
    with Lock(file, "it"):
        assert holder(file).pid == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_living_holder_touches_its_file_and_no_other_one(tmp_path, hold):
    file = tmp_path / "lock"
    process = hold(
        file, HOLD.replace("with Lock", "from flatcl.utils.engine import lock; lock.HEARTBEAT_S = 0.05\nwith Lock")
    )
    age(file, 10_000)
    deadline = time.monotonic() + 10
    while time.time() - file.stat().st_mtime > 100:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    foreign(file)  # taken over by somebody else
    age(file, 10_000)
    time.sleep(0.3)
    assert time.time() - file.stat().st_mtime > 100
    process.communicate()
    assert file.exists(), "only one's own lock is given back"


def test_who_lost_its_lock_is_told(tmp_path):
    file = tmp_path / "lock"
    with Lock(file, "the run") as mine:
        mine.check()
        foreign(file)
        with pytest.raises(Busy, match=r"the run was taken over by process \d+ on far"):
            mine.check()
        file.unlink()
        mine.check()


RACE = """
import sys, time
from flatcl.utils.engine.lock import Busy, Lock
print("held", flush=True)
sys.stdin.readline()
lock = Lock(sys.argv[1], "it")
try:
    lock.acquire()
    print("won", flush=True)
except Busy as error:
    print("lost", flush=True)
sys.stdin.read()
"""


def test_of_processes_that_take_over_at_the_same_time_one_wins(tmp_path, hold):
    file = tmp_path / "lock"
    for number in range(3):
        dead = hold(file)
        dead.kill()
        dead.wait()
        if number == 2:  # whoever took over last time died in the middle of it
            os.link(file, tmp_path / "lock.takeover")
        racers = [hold(file, RACE) for _ in range(6)]
        for racer in racers:
            racer.stdin.write("\n")
            racer.stdin.flush()
        said = [racer.stdout.readline().strip() for racer in racers]
        assert sorted(said) == ["lost"] * 5 + ["won"]
        assert holder(file).pid == racers[said.index("won")].pid
        for racer in racers:
            racer.kill()
            racer.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("links", [True, False])
def test_of_many_threads_one_at_a_time_is_inside(links, tmp_path, monkeypatch):
    """With and without hard links, each lock given back and taken again and again."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no hard links here")))
    inside, most, turns = [], [], []

    def work():
        while len(turns) < 60:
            try:
                with Lock(tmp_path / "lock", "it"):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.001)
                    inside.pop()
                    turns.append(1)
            except Busy:
                time.sleep(0.0005)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result()
    assert set(most) == {1} and list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_or_cannot_be_written_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        Lock(tmp_path / "gone" / "lock", "it").acquire()
    held = Lock(tmp_path / "lock", "it")
    held.acquire()
    (tmp_path / "lock").unlink()
    held.release()
