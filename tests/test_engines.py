"""What executes the runs of a sweep: a Ray cluster of two nodes on this machine, and Slurm, for which small scripts
stand in. Each study must end with the results of one that was made here by worker processes, to the last bit."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flatcl.utils.commands import sweep, worker
from flatcl.utils.engine.lock import Lock, holder
from flatcl.utils.registry import ROOT
from flatcl.utils.studies.engines import ray as ray_engine
from flatcl.utils.studies.engines import slurm

START = ["--models", "er", "--datasets", "seq-digits", "--seeds", "0-2"]
RUN = ["--n_epochs", "4", "--checkpoint_minutes", "0.0005", "--threads", "1"]
LONG_S = 240  # for a machine that does other things as well


def command(results, *flags, run=()):
    return [sys.executable, "-m", "flatcl", "sweep", *START, *flags, "--", *RUN, *run, "--results_path", str(results)]


def start(results, *flags, run=(), **options):
    line = command(results, *flags, run=run)
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def ended(process):
    out, error = process.communicate(timeout=LONG_S)
    return process.returncode, out, error


def wait_for(is_so, what):
    deadline = time.monotonic() + LONG_S
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def folders(results):
    return [file.parent for file in results.glob("*/*/*/*/config.json")]


def num_under_way(results):
    """Runs that a living process is at, and that have a checkpoint of their training."""
    held = [folder / "checkpoint" for folder in folders(results) if holder(folder / "lock")]
    return sum(len(list(folder.iterdir())) > 1 for folder in held if folder.is_dir())


def outcome(results):
    """{seed: accuracy.json}, of runs that are all finished and that were all made once."""
    found = {}
    for folder in folders(results):
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["status"] == "finished" and summary["seed"] not in found
        found[summary["seed"]] = json.loads((folder / "accuracy.json").read_text())
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The study by local workers."""
    results = tmp_path_factory.mktemp("local")
    code, _, error = ended(start(results))
    assert code == 0, error
    found = outcome(results)
    assert found.keys() == {0, 1, 2} and found[0] != found[1]
    return found


# flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "rai"], "invalid choice: 'rai'"),
        (["--partition", "gpu"], "--partition is for --engine slurm, not local"),
        (["--engine", "slurm", "--jobs", "2"], "--jobs is for --engine local and ray, not slurm"),
        (["--engine", "ray", "--gpus_per_run", "1.5"], "--gpus_per_run must be whole above 1, got 1.5"),
        (["--engine", "slurm", "--gpus_per_run", "0.5"], "--gpus_per_run must be a whole number"),
        (["--engine", "ray", "--cpus_per_run", "0"], "--cpus_per_run must be more than 0"),
        (["--engine", "slurm", "--array", "0"], "--array must be at least 1, got 0"),
        (["--engine", "slurm", "--time", "4"], "at least 5 minutes, got '4'"),
        (["--engine", "slurm", "--time", "soon"], "--time expects minutes"),
        (["--engine", "slurm", "--gres", "gpu:1", "--gpus_per_run", "1"], "Give one of them"),
        (["--engine", "slurm", "--slurm_args", "array=0-9"], "--slurm_args array: that is set by this program"),
        (["--engine", "slurm", "--slurm_args", "Mem=4G"], "--slurm_args expects KEY=VALUE"),
        (["--engine", "slurm", "--slurm_args", "comment=a\nb"], "cannot hold"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_any_work(flags, message, tmp_path, capsys):
    assert sweep.main([*START, *flags, "--", "--results_path", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_all_problems_are_told_at_once(capsys):
    assert sweep.main([*START, "--engine", "slurm", "--array", "0", "--address", "a:1", "--cpus_per_run", "1.5"]) == 2
    assert capsys.readouterr().err.count("error: ") == 3


# Ray


def test_without_ray_one_message_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert sweep.main([*START, "--engine", "ray", "--", "--results_path", str(tmp_path)]) == 2
    assert 'not installed. Install it: pip install "flatcl[ray]"' in capsys.readouterr().err and not list(
        tmp_path.iterdir()
    )


@pytest.fixture(scope="module")
def ray():
    return pytest.importorskip("ray", reason="ray does not install here")


@pytest.mark.parametrize("is_silent", [False, True])
def test_an_address_that_does_not_answer_is_refused_within_seconds(is_silent, ray, tmp_path, capsys, monkeypatch):
    """Nobody listens, or somebody who does not speak as Ray does."""
    monkeypatch.setattr(ray_engine, "ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if not is_silent:
            server.close()
        since = time.monotonic()
        assert sweep.main([*START, "--engine", "ray", "--address", address, "--", "--results_path", str(tmp_path)]) == 2
    assert f"no Ray cluster answers at {address}" in capsys.readouterr().err
    assert time.monotonic() - since < 30


@pytest.fixture(scope="module")
def cluster(ray):
    """A head without CPUs, and two nodes with one CPU each."""
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 100 * 2**20}
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    folder = found.head_node.get_session_dir_path()
    try:
        found.workers = [found.add_node(num_cpus=1, **small) for _ in range(2)]
        yield found
    finally:
        found.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_run_that_no_node_has_room_for_is_refused(cluster, tmp_path):
    code, _, error = ended(start(tmp_path, "--engine", "ray", "--address", cluster.address, "--cpus_per_run", "3"))
    assert code == 2 and "Traceback" not in error
    assert "asks for 3 CPUs and 0 GPUs" in error and "the nodes have 0 CPUs and 0 GPUs, 1 CPUs and 0 GPUs" in error
    code, _, error = ended(start(tmp_path, "--engine", "ray", "--address", cluster.address, "--gpus_per_run", "0.5"))
    assert code == 2 and "asks for 1 CPUs and 0.5 GPUs" in error


def test_a_study_survives_its_driver_and_a_node(cluster, expected, tmp_path):
    """The driver is killed while two runs are under way, and started again; then a node is."""
    flags = ("--engine", "ray", "--address", cluster.address)
    driver = start(tmp_path, *flags)
    wait_for(lambda: num_under_way(tmp_path) == 2, "two runs at the same time")
    driver.kill()
    driver.communicate()
    wait_for(lambda: num_under_way(tmp_path) == 0, "the runs end with their driver")
    driver = start(tmp_path, *flags)
    wait_for(lambda: num_under_way(tmp_path) == 2, "two runs at the same time")
    cluster.remove_node(cluster.workers.pop(), allow_graceful=False)
    code, out, error = ended(driver)
    assert code == 0, error
    assert "its node or worker was lost; it goes on from its checkpoint" in out
    assert "resumed after step" in "".join(log.read_text() for log in (tmp_path / "logs").glob("*.log"))
    assert outcome(tmp_path) == expected


def test_an_interrupted_driver_leaves_checkpoints_and_no_lock(cluster, tmp_path):
    long = ("--n_epochs", "400")  # no run is finished before the signal arrives
    driver = start(tmp_path, "--engine", "ray", "--address", cluster.address, run=long)
    wait_for(lambda: num_under_way(tmp_path) >= 1, "a run")
    driver.send_signal(signal.SIGTERM)
    code, _, error = ended(driver)
    assert code == 130 and "the same command does the rest" in error
    ends = [json.loads(file.read_text())["status"] for file in tmp_path.glob("*/*/*/*/summary.json")]
    assert ends and set(ends) == {"interrupted"}
    assert not list(tmp_path.rglob("*lock"))


def test_a_cluster_of_its_own_leaves_nothing_behind(ray, tmp_path):
    before = set(Path("/tmp").glob("ray*"))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = start(tmp_path, "--engine", "ray", "--cpus_per_run", "1000", env=environment)
    code, _, error = ended(process)
    assert code == 2 and "asks for 1000 CPUs" in error
    assert set(Path("/tmp").glob("ray*")) <= before


# Slurm

STARTS = """#!{python}
import os, pathlib, re, subprocess
HERE = pathlib.Path(__file__).resolve().parent

def begin(number):
    script = (HERE / "submitted").read_text()
    output = re.search(r"--output=(\\S+)", pathlib.Path(script).read_text())[1].replace("%a", number)
    ids = {{"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": number}}
    with open(output, "ab") as file:
        task = subprocess.Popen(["bash", script], env=os.environ | ids, stdin=subprocess.DEVNULL,
                                stdout=file, stderr=file, start_new_session=True)
    (HERE / f"task_{{number}}").write_text(str(task.pid))
"""
SBATCH = """#!{python}
import re, sys
from starts import HERE, begin
(HERE / "submitted").write_text(sys.argv[2])
assert sys.argv[1] == "--parsable"
for number in range(int(re.search(r"--array=0-(\\d+)", open(sys.argv[2]).read())[1]) + 1):
    begin(str(number))
print("42;here")
"""
SCONTROL = """#!{python}
import sys
from starts import HERE, begin
if sys.argv[1] == "show":
    print("JobId=9 JobState=" + (HERE / "state").read_text())
else:
    assert sys.argv[1] == "requeue"
    with open(HERE / "requeued", "a") as file:
        file.write(sys.argv[2] + "\\n")
    begin(sys.argv[2].removeprefix("42_"))
"""
SRUN = """#!{python}
import os, sys
words = [word for word in sys.argv[1:]]
while words[0].startswith("--"):
    words.pop(0)
os.execvp(words[0], words)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Commands of Slurm's that run the tasks of one array job as processes; the folder where they keep their state."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"starts.py": STARTS, "sbatch": SBATCH, "scontrol": SCONTROL, "srun": SRUN}.items():
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod(0o755)
    (folder / "state").write_text("RUNNING")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    yield folder
    for file in folder.glob("task_*"):
        if is_alive(file):
            os.kill(int(file.read_text()), signal.SIGKILL)


def is_alive(file):
    """Whether a task's process is; those of dead parents are waited for by nobody."""
    try:
        return Path(f"/proc/{file.read_text()}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def are_gone(folder):
    return not any(is_alive(file) for file in folder.glob("task_*"))


def test_a_study_of_an_array_job_survives_a_stop_of_a_task(stand_in, expected, tmp_path):
    results = tmp_path / "results"
    code, out, error = ended(start(results, "--engine", "slurm", "--array", "2", "--time", "1:00:00"))
    assert code == 0, error
    assert "submitted job 42: 2 task(s) for 3 run(s)" in out and "squeue -j 42" in out
    wait_for(lambda: num_under_way(results) == 2, "two runs at the same time")
    os.kill(int((stand_in / "task_0").read_text()), signal.SIGTERM)
    (submission,) = (results / "slurm").iterdir()
    wait_for(lambda: (stand_in / "requeued").exists(), "put back into the queue")
    wait_for(lambda: len(list((submission / "ended").iterdir())) == 3 and are_gone(stand_in), "the end")
    assert (stand_in / "requeued").read_text() == "42_0\n"
    logs = {number: (submission / f"task_{number}.log").read_text() for number in (0, 1)}
    assert "stopped with a checkpoint, and put back into the queue" in logs[0]
    assert sum(log.count(": finished") for log in logs.values()) == 3, "each run was made once"
    assert outcome(results) == expected
    code, out, _ = ended(start(results, "--engine", "slurm"))
    assert code == 0 and "3 of them already finished" in out and "submitted" not in out and "class-il" in out


def fail_or_pass(argv):
    """Stands for a run: seed 1 fails, seed 2 is killed."""
    seed = argv[argv.index("--seed") + 1]
    if seed == "2":
        os.kill(os.getpid(), signal.SIGKILL)
    return int(seed == "1")


def submission(results, seeds="0-2"):
    """The folder of a submission that no task is at yet."""
    jobs, engine, _ = sweep._prepare(
        [*START[:4], "--seeds", seeds, "--engine", "slurm", "--", "--results_path", results]
    )
    engine.submit(jobs, ["--notes", "x"])
    (folder,) = (Path(results) / "slurm").iterdir()
    return folder, jobs


@pytest.fixture
def quiet_sbatch(stand_in):
    (stand_in / "sbatch").write_text("#!/bin/sh\necho 42\n")


def test_a_failed_run_is_not_made_again_by_another_task(quiet_sbatch, tmp_path, capfd):
    folder, jobs = submission(str(tmp_path / "results"))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    try:
        assert worker.main([str(folder)], fail_or_pass) == 1
        said = capfd.readouterr().out
        assert "seed 0: finished" in said and "seed 1: FAILED (1)" in said and "seed 2: FAILED (-9)" in said
        assert worker.main([str(folder)], fail_or_pass) == 0
        assert capfd.readouterr().out == ""
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGUSR1, before[1])
    assert {file.name: file.read_text() for file in (folder / "ended").iterdir()} == {
        job.hash: text for job, text in zip(jobs, ("0\n", "1\n", "-9\n"), strict=True)
    }


def test_a_task_leaves_runs_to_executors_that_live(quiet_sbatch, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(slurm, "PATIENCE_S", 1.0)
    monkeypatch.setattr(slurm, "RETRY_S", 0.1)
    folder, (job,) = submission(str(tmp_path / "results"), seeds="0")
    job.log.parent.mkdir(parents=True)
    with Lock(job.log.with_suffix(".lock"), "the run"):
        assert slurm.Task(slurm.read(folder), [job], fail_or_pass).run() == 0
    assert "1 run(s) are left to others" in capfd.readouterr().out and not list((folder / "ended").iterdir())


def test_a_cancelled_task_is_not_put_back(stand_in, monkeypatch, capfd):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "42")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    (stand_in / "state").write_text("CANCELLED by 1000")
    slurm.requeue()
    assert "the job was cancelled" in capfd.readouterr().out and not (stand_in / "requeued").exists()


def test_dry_run_shows_the_script(tmp_path, capsys):
    flags = ["--engine", "slurm", "--array", "8", "--partition", "gpu", "--time", "1-0", "--gpus_per_run", "2"]
    flags += ["--cpus_per_run", "4"]
    more = ["--slurm_args", "mem=8G", "--slurm-args", "comment=two words", "--slurm_args", "exclusive", "--dry_run"]
    assert sweep.main([*START, *flags, *more, "--", "--results_path", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "3 run(s), 0 of them finished" in lines and not list(tmp_path.iterdir())
    for line in (
        "array=0-2", "ntasks=1", "cpus-per-task=4", "partition=gpu", "time=1-0", "gres=gpu:2", f"chdir={os.getcwd()}",
        "open-mode=append", "signal=USR1@120", "mem=8G", 'comment="two words"', "exclusive", "requeue",
    ):  # fmt: skip
        assert f"#SBATCH --{line}" in lines
    assert lines[-1].startswith(f"exec srun --ntasks=1 --cpus-per-task=4 {sys.executable} -m flatcl worker {tmp_path}")


def test_what_slurm_refuses_is_told_in_its_words(stand_in, tmp_path, capsys, monkeypatch):
    (stand_in / "sbatch").write_text("#!/bin/sh\necho 'invalid partition specified: gpuu' >&2\nexit 1\n")
    words = [*START, "--engine", "slurm", "--partition", "gpuu", "--", "--results_path", str(tmp_path / "results")]
    assert sweep.main(words) == 2
    assert "invalid partition specified: gpuu. Correct the flags" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sweep.main(words) == 2
    assert "sbatch, which is not found" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "{", '{"runs": [{"axes": {}, "argv": "x"}], "tasks": 1, "extra": []}'])
def test_a_folder_that_is_no_submission_is_refused(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(slurm, "catch_stops", lambda: None)
    if text is not None:
        (tmp_path / "runs.json").write_text(text)
    assert worker.main([str(tmp_path)]) == 2
    assert "is no folder of a submission: runs.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 600), ("5:30", 330), ("2:00:01", 7201), ("1-0", 86400), ("1-2:3", 93780), ("1-2:3:4", 93784), ("x", None)],
)
def test_time_limits_are_read_as_slurm_does(text, seconds):
    assert slurm._seconds(text) == seconds
