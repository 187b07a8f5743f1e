"""What only a GPU can tell: `python -m utils.gpu [--out FOLDER] [--device cuda] [--seconds N]`, under ten minutes.

1. Replays of recorded steps (CUDA graphs) against ordinary steps: each method under its default optimizer and `derpp`
   and `mgser_sam` under each optimizer, on seq-digits. The same run twice in the ordinary way and once recorded: final
   accuracies, and whether the recorded run is nearer to one of the two than these are to each other.
2. Milliseconds of a step, ordinary, recorded and bare (`utils/bench.py`), in turn in one process; goals beside them.
3. Several runs on one device: processes, and programs on streams of their own in one process.

A line for each measurement as it comes, a short table last; FOLDER gets all of it as gpu.json, written after each part.
Random images have the shapes of the benchmarks named; only part 1 trains on real data (seq-digits, no download).
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from utils import bench, results, run
from utils.arguments import resolve
from utils.errors import UsageError
from utils.files import write_json
from utils.registry import METHODS, OPTIMIZERS, ROOT

RESNET = {"dataset": "seq-cifar10", "backbone": "resnet18", "buffer_size": 500}
MLP = {"dataset": "perm-mnist", "buffer_size": 500}
TINY = {"dataset": "seq-tinyimg", "backbone": "resnet18", "buffer_size": 500}
SMALL, LARGE = {"batch_size": 32, "minibatch_size": 32}, {"batch_size": 256, "minibatch_size": 256}
BF16 = {"amp": "bf16", "channels_last": 1}

SPEEDS: list[tuple[str, str, dict[str, Any], float | None]] = [  # (what, model, flags, goal in ms of the recorded step)
    ("resnet18, 32 + 32", "er", RESNET | SMALL, 2.0),
    ("resnet18, 32 + 32", "derpp", RESNET | SMALL, 3.5),
    ("resnet18, 32 + 32", "derpp_sam", RESNET | SMALL, 7.0),
    ("resnet18, 32 + 32", "mgser_sam", RESNET | SMALL, 7.0),
    ("resnet18, 32 + 32, channels_last", "er", RESNET | SMALL | {"channels_last": 1}, None),
    ("resnet18, 32 + 32, bf16", "er", RESNET | SMALL | BF16, 1.3),
    ("resnet18, 32 + 32, bf16", "derpp", RESNET | SMALL | BF16, 2.3),
    ("resnet18, 32 + 32, bf16", "mgser_sam", RESNET | SMALL | BF16, 4.5),
    ("mnistmlp, 128 + 128", "er", MLP, 0.35),
    ("mnistmlp, 128 + 128", "mgser_sam", MLP, None),
    ("resnet18, 256 + 256", "er", RESNET | LARGE, None),
    ("resnet18, 256 + 256, channels_last", "er", RESNET | LARGE | {"channels_last": 1}, None),
    ("resnet18, 256 + 256, bf16", "er", RESNET | LARGE | BF16, None),
    ("resnet18, 64x64, 32 + 32", "mgser_sam", TINY | SMALL, 10.0),
    ("resnet18, 64x64, 32 + 32, bf16", "mgser_sam", TINY | SMALL | BF16, None),
    ("resnet18, 32 + 32, gradients apart", "mgser_sam under sgd", RESNET | SMALL | {"optimizer": "sgd"}, None),
    ("resnet18, 32 + 32", "er under sam", RESNET | SMALL | {"optimizer": "sam"}, None),
    ("resnet18, 32 + 32", "er under sampa", RESNET | SMALL | {"optimizer": "sampa"}, None),
    ("resnet18, 32 + 32, one stream", "er under sampa", RESNET | SMALL | {"optimizer": "sampa"}, None),
]
SEVERAL: list[tuple[str, dict[str, Any], int, int]] = [  # (what, flags, runs, turns of each)
    ("mnistmlp, 128 + 128", MLP, 10, 20),
    ("resnet18, 32 + 32", RESNET | SMALL, 4, 5),
]


class Report:
    """What was measured so far, on the console and in a file."""

    def __init__(self, folder: Path | None, device: torch.device):
        self.folder = folder
        self.found: dict[str, Any] = {"environment": results.environment(str(device)), "seconds": {}}

    def part(self, name: str, measure: Callable[[], Any]) -> None:
        """One measurement; what goes wrong in it is written down, and the next one begins."""
        start = time.monotonic()
        try:
            self.found[name] = measure()
        except Exception as error:
            self.found[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"{name}: failed: {type(error).__name__}: {error}", flush=True)
        self.found["seconds"][name] = round(time.monotonic() - start, 1)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "gpu.json", self.found)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# 1. the same run, ordinary and recorded


def pairs() -> list[tuple[str, str]]:
    found = [(model, METHODS.load(model).default_optimizer) for model in METHODS.names()]
    return found + [(model, optimizer) for model in ("derpp", "mgser_sam") for optimizer in OPTIMIZERS.names()]


def outcome(model: str, optimizer: str, device: torch.device, cuda_graph: str) -> tuple[list[float], torch.Tensor, str]:
    """(final average accuracies, weights, what was replayed) of a short run on seq-digits."""
    epochs = ["--fitting_epochs", "3"] if model == "gdumb" else ["--n_epochs", "1"]
    words = ["--model", model, "--optimizer", optimizer, "--dataset", "seq-digits", "--device", str(device), *epochs]
    words += ["--disable_log", "--non_verbose", "--cuda_graph", cuda_graph]
    trainer = run.build(resolve(words), device, None)
    with mock.patch("utils.logs.say", lambda text: None):
        metrics = trainer.run()["metrics"]
    weights = torch.cat([p.detach().flatten() for p in trainer.method.parameters()])
    return [m["final_average_accuracy"] for m in metrics.values()], weights, str(trainer.optimizer.programs)


def agreement(device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """As many pairs as the time allows; says how many are left."""
    start, found = time.monotonic(), []
    wanted = dict.fromkeys(pairs())
    for model, optimizer in wanted:
        if time.monotonic() - start > seconds:
            print(f"agreement: {len(wanted) - len(found)} of {len(wanted)} pairs not run, the time is up", flush=True)
            break
        found.append(line := {"model": model, "optimizer": optimizer})
        try:
            (first, w, _), (second, v, _) = (outcome(model, optimizer, device, "0") for _ in range(2))
            recorded, u, replayed = outcome(model, optimizer, device, "auto")
        except Exception as error:
            line |= {"failed": f"{type(error).__name__}: {error}"}
        else:
            spread = (w - v).abs().max().item()
            away = min((u - w).abs().max().item(), (u - v).abs().max().item())
            line |= {
                "ordinary": first, "again": second, "recorded": recorded, "spread of weights": spread,
                "recorded away": away, "replayed": replayed,
                "agrees": recorded in (first, second) or away <= max(2 * spread, 1e-6),
            }  # fmt: skip
        print(json.dumps(line), flush=True)
    return found


# 2. milliseconds of a step


def speeds(device: torch.device, rounds: int, count: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for what, name, flags, goal in SPEEDS:
        yield (
            f"{what}: {name}",
            lambda what=what, name=name, flags=flags, goal=goal: speed(what, name, flags, goal, device, rounds, count),
        )


class InTurn:
    """In place of `Beside`: one stream."""

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...


def speed(
    what: str, name: str, flags: dict[str, Any], goal: float | None, device: torch.device, rounds: int, count: int
) -> dict[str, Any]:
    model = name.split()[0]
    steps, line = {}, {"what": what, "model": name, "goal_ms": goal}
    for kind, wish in (("ordinary", "0"), ("recorded", "auto")):
        trainer = bench.build(model, device=device, cuda_graph=wish, num_images=4_000, **flags)
        steps[kind] = bench.Engine(trainer).step
    if "amp" not in flags and model in bench.METHODS and "optimizer" not in flags:
        steps["bare"] = bench.Bare(bench.build(model, device=device, num_images=4_000, **flags)).step
    with mock.patch("utils.optim.sampa.Beside", InTurn) if "one stream" in what else mock.patch.dict({}):
        times = bench.in_turn(steps, dict.fromkeys(steps, count), rounds, device)
    line |= {f"{kind}_ms": round(value, 3) for kind, value in times.items()}
    line["programs"] = str(trainer.optimizer.programs)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        steps["recorded"]()
        line["peak_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    print(json.dumps(line), flush=True)
    return line


# 3. several runs on one device


def worker(flags: dict[str, Any], count: int, device: torch.device) -> None:
    """Says when it is ready, waits for a line, trains `count` steps, and says how long they took."""
    engine = bench.Engine(bench.build("er", device=device, cuda_graph="auto", num_images=4_000, **flags))
    bench.time_steps(engine.step, 30, device)
    print("ready", flush=True)
    sys.stdin.readline()
    print(bench.time_steps(engine.step, count, device) * count / 1e3, flush=True)


def processes(number: int, flags: dict[str, Any], count: int, device: torch.device) -> float:
    """Seconds until the last of `number` processes has done its steps, all begun at once."""
    words = [sys.executable, "-m", "utils.gpu", "--device", str(device), "--worker", json.dumps([flags, count])]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(words, env=environment, **options) for _ in range(number)]
    for process in started:
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("a process has ended before its first step")
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    return max(float(process.communicate()[0]) for process in started)


def streams(number: int, flags: dict[str, Any], count: int, device: torch.device) -> float:
    """Seconds until as many programs in this process have done theirs, in turn, each on a stream of its own."""
    engines = [
        bench.Engine(bench.build("er", device=device, cuda_graph="auto", num_images=4_000, **flags))
        for _ in range(number)
    ]
    own = [torch.cuda.Stream(device) if device.type == "cuda" else None for _ in engines]

    def step() -> None:
        for engine, stream in zip(engines, own, strict=True):
            with torch.cuda.stream(stream):
                engine.step()

    bench.time_steps(step, 30, device)
    return bench.time_steps(step, count, device) * count / 1e3


def several(device: torch.device, count: int) -> list[dict[str, Any]]:
    found = []
    for what, flags, many, turns in SEVERAL:
        steps = turns * count
        one = median(processes(1, flags, steps, device) for _ in range(3))
        line = {"what": what, "steps": steps, "one_s": round(one, 3), "runs": many}
        line |= {"processes_s": round(processes(many, flags, steps, device), 3)}
        line |= {"streams_s": round(streams(many, flags, steps, device), 3)}
        print(json.dumps(line), flush=True)
        found.append(line)
    return found


def table(found: dict[str, Any]) -> str:
    lines = [f"{'':38}{'model':16}{'ordinary':>10}{'recorded':>10}{'bare':>8}{'goal':>7}{'MiB':>7}"]
    for line in found.values():
        if isinstance(line, dict) and "recorded_ms" in line:
            numbers = [line.get(name) for name in ("ordinary_ms", "recorded_ms", "bare_ms", "goal_ms", "peak_mib")]
            cells = ("–" if number is None else f"{number:g}" for number in numbers)
            columns = "".join(f"{cell:>{width}}" for cell, width in zip(cells, (10, 10, 8, 7, 7), strict=True))
            lines.append(f"{line['what']:38}{line['model']:16}{columns}")
    agreed = found.get("agreement", [])
    if isinstance(agreed, list):
        wrong = [f"{line['model']} under {line['optimizer']}" for line in agreed if not line.get("agrees")]
        numbers = f"{len(agreed) - len(wrong)} of {len(agreed)}"
        lines.append(f"recorded runs that agree with ordinary ones: {numbers}. Not: {', '.join(wrong) or 'none'}")
    for line in found.get("several", []) if isinstance(found.get("several"), list) else []:
        many = "".join(f", {name} {line[f'{name}_s'] / line['one_s']:.2f}" for name in ("processes", "streams"))
        lines.append(f"{line['what']}: {line['runs']} runs in times of one{many}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m utils.gpu", description="what only a GPU can tell")
    parser.add_argument("--out", type=Path, help="folder of gpu.json; default: none is written")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...")
    parser.add_argument("--seconds", type=float, default=200.0, help="for the comparison of runs (default 200)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that medians are taken over (default 5)")
    parser.add_argument("--count", type=int, default=20, help="steps of a turn (default 20)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        device = run.resolve_device(args.device)
    except UsageError as error:
        parser.error(str(error))
    torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark or device.type == "cuda"
    if args.worker:
        flags, count = json.loads(args.worker)
        worker(flags, count, device)
        return 0
    report = Report(args.out, device)
    report.part("agreement", lambda: agreement(device, args.seconds))
    for name, measure in speeds(device, args.rounds, args.count):
        report.part(name, measure)
    report.part("several", lambda: several(device, args.count))
    print(table(report.found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
