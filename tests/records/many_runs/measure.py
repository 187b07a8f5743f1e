"""Seconds that a report and a sweep's skip check take over 5,000 run folders.

`python tests/records/many_runs/measure.py FOLDER [--runs 5000] [--rounds 3]` makes the folders in FOLDER if it is not
there, and measures: copies of five real runs with other seeds, with matrices of 20 tasks, the large files cut short.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from flatcl.utils.commands import report, sweep  # noqa: E402
from flatcl.utils.commands.train import main as run_main  # noqa: E402

MODELS = ("er", "derpp", "sgd", "er_ace", "agem")
FLAGS = ("--dataset", "seq-synth", "--debug_mode", "--non_verbose", "--device", "cpu", "--threads", "1")


def grid(num_runs: int) -> tuple[list[dict[str, str]], int]:
    """The axes of so many runs, and the seeds of each model."""
    seeds = num_runs // len(MODELS)
    return sweep.expand(MODELS, ["seq-synth"], seeds=range(seeds)), seeds


def make(folder: Path, num_runs: int) -> None:
    scratch = folder.with_name(folder.name + "-model")
    for model in MODELS:
        assert run_main(["--model", model, *FLAGS, "--results_path", str(scratch)]) == 0
    jobs = sweep.plan(grid(num_runs)[0], [*FLAGS, "--results_path", str(folder)])
    originals = {file.parent.parent.name: file.parent for file in scratch.rglob("summary.json")}
    for number, job in enumerate(jobs):
        source = originals[job.axes["model"]]
        target = folder / "class-il" / "seq-synth" / job.axes["model"] / f"20260101-{number:06d}-{job.hash}"
        (target / "checkpoint").mkdir(parents=True)
        for file in source.iterdir():
            if file.is_file():
                data = file.read_bytes()
                (target / file.name).write_bytes(data if file.suffix == ".json" else data[:1000])
        (target / "checkpoint" / "state.pt").write_bytes(b"cut short")
        summary = json.loads((source / "summary.json").read_text())
        matrix = [[(7 * number + 11 * t + 13 * j) % 997 / 997 for j in range(20)] for t in range(20)]
        summary |= {
            "seed": job.config.seed,
            "config_hash": job.hash,
            "accuracy": {"class-il": matrix, "task-il": matrix},
        }
        (target / "summary.json").write_text(json.dumps(summary, indent=1))
        (target / "config.json").write_text(json.dumps(job.config.to_json(), indent=1))
    shutil.rmtree(scratch)


def seconds(do) -> str:
    wall, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        do()
    return f"{time.perf_counter() - wall:.2f} s ({time.process_time() - cpu:.2f} s of CPU)"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not args.folder.exists():
        make(args.folder, args.runs)
    axes, seeds = grid(args.runs)
    some = [own for own in axes if int(own["seed"]) < 20 or int(own["seed"]) >= seeds - 20]
    words = [*FLAGS, "--results_path", str(args.folder)]
    jobs = sweep.plan(some, words)
    unknown = sweep.plan(some, [*words, "--lr", "0.123"])
    for _ in range(args.rounds):
        tables = seconds(lambda: report.main([str(args.folder)]))
        found = seconds(lambda: len(sweep.look(jobs).done) == len(jobs) or sys.exit("not found"))
        none = seconds(lambda: not sweep.look(unknown).done or sys.exit("found"))
        print(f"report {tables}, skip check of {len(jobs)} finished runs {found}, of new ones {none}")


if __name__ == "__main__":
    main()
