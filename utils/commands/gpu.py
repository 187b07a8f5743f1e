"""Measurements on a GPU, in under ten minutes: `flatcl gpu [--out FOLDER] [--device cuda] [--seconds N]`.

1. Replays of recorded steps (CUDA graphs) against ordinary steps: `derpp` and `mgser_sam` under each optimizer, each
   method under its default one, and some with convolutions, BatchNorm and augmentation, by deterministic kernels. The
   same run twice in the ordinary way and once recorded: do the final accuracies agree, how many steps were replays,
   and why were others not.
2. Milliseconds of a step, ordinary, recorded and bare (see `bench.py`), in turn in one process; goals beside them.
3. Several runs on one device: processes, and programs on streams of their own in one process.

A line for each measurement as it comes, a short table last; FOLDER gets all of it as gpu.json, written after each line.
Random images have the shapes of the benchmarks named; only part 1 trains on real data (seq-digits, no download). Each
part is a process of its own: an error of the device ends it, and the next measurement begins in another.
"""

import gc
import json
import os
import queue
import subprocess
import sys
import threading
import time
from argparse import SUPPRESS
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from flatcl.utils.arguments import resolve
from flatcl.utils.commands import bench
from flatcl.utils.commands._parser import Parser
from flatcl.utils.engine import results
from flatcl.utils.engine.build import build, resolve_device
from flatcl.utils.files import write_json
from flatcl.utils.optim._driver import Driver
from flatcl.utils.registry import HOME, METHODS, OPTIMIZERS

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


PARTS = {"agreement": 0.35, "speed": 0.4, "several": 0.25}  # and their shares of the time
MARK = "line: "  # before what a process has measured
IMAGES = 2 / 160  # of a final average, by which runs that agree may differ: two test images of seq-synth
LIMIT_S = 120
SHARES = max(1, min(8, (os.cpu_count() or 1) // 2))  # processes that compare runs at once
MIB = 2**20


# 1. the same run, ordinary and recorded


def pairs() -> list[tuple[str, str, str]]:
    """(model, optimizer, benchmark and network)."""
    found = [(model, optimizer, "digits") for optimizer in OPTIMIZERS.names() for model in ("derpp", "mgser_sam")]
    convolutions = [("er", "esam"), ("er", "sampa"), ("mgser_sam", "sam"), ("derpp", "msam"), ("xder", "sgd")]
    found += [(model, optimizer, "convolutions") for model, optimizer in convolutions]
    return found + [(model, METHODS.load(model).default_optimizer, "digits") for model in METHODS.names()]


def outcome(model: str, optimizer: str, what: str, device: torch.device, cuda_graph: str) -> tuple[list[float], Any]:
    """(final average accuracies, programs) of a short run."""
    words = ["--model", model, "--optimizer", optimizer, "--device", str(device), "--cuda_graph", cuda_graph]
    words += ["--fitting_epochs", "3"] if model == "gdumb" else ["--n_epochs", "1" if what == "digits" else "2"]
    words += ["--dataset", "seq-digits"] if what == "digits" else ["--dataset", "seq-synth", "--backbone", "resnet32"]
    trainer = build(resolve([*words, "--disable_log", "--non_verbose"]), device, None)
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)  # or no two runs are the same
    with exact, mock.patch("flatcl.utils.engine.logs.say", lambda text: None):
        metrics = trainer.run()["metrics"]
    programs = trainer.optimizer.programs
    if programs is not None:
        programs.drop()
    return [metric["final_average_accuracy"] for metric in metrics.values()], programs


def agreements(device: torch.device, skip: int, every: int) -> Iterator[dict[str, Any]]:
    for model, optimizer, what in pairs()[skip::every]:
        (first, _), (again, _) = (outcome(model, optimizer, what, device, "0") for _ in range(2))
        recorded, programs = outcome(model, optimizer, what, device, "auto")
        spread = max(abs(a - b) for a, b in zip(first, again, strict=True))
        away = min(max(abs(a - b) for a, b in zip(recorded, other, strict=True)) for other in (first, again))
        why = dict(programs.ordinary) if programs is not None else {}
        has_failed = any("cannot be recorded" in reason or "new state" in reason for reason in why)
        replayed = 0 if programs is None else programs.replayed
        yield {
            "model": model, "optimizer": optimizer, "what": what, "ordinary": first, "again": again,
            "recorded": recorded, "replayed": replayed,
            "others": 0 if programs is None else programs.others, "why": why,
            "agrees": away <= max(spread, IMAGES) and not has_failed and (replayed > 0 or bool(why)),
        }  # fmt: skip
        gc.collect()


# 2. milliseconds of a step


def speeds(device: torch.device, skip: int, rounds: int, count: int) -> Iterator[dict[str, Any]]:
    for what, name, flags, goal in SPEEDS[skip:]:
        one_stream = mock.patch.object(Driver, "side_by_side", lambda self: nullcontext(nullcontext()))
        with one_stream if "one stream" in what else nullcontext():
            yield {"what": what, "model": name, "goal_ms": goal, **speed(name, flags, device, rounds, count)}
        gc.collect()


def speed(name: str, flags: dict[str, Any], device: torch.device, rounds: int, count: int) -> dict[str, Any]:
    """Medians of a step, in turn; before that, with nothing else there, the peak memory of recording and replaying."""
    model, is_gpu = name.split()[0], device.type == "cuda"
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # of what is reserved: a recording's memory stays so
    trainer = bench.build(model, device=device, cuda_graph="auto", num_images=4_000, **flags)
    steps = {"recorded": bench.Engine(trainer).step}
    bench.time_steps(steps["recorded"], 10, device)
    peak = round(torch.cuda.max_memory_reserved(device) / MIB) if is_gpu else None
    ordinary = bench.build(model, device=device, cuda_graph="0", num_images=4_000, **flags)
    steps["ordinary"] = bench.Engine(ordinary).step
    if "amp" not in flags and "optimizer" not in flags:
        steps["bare"] = bench.Bare(bench.build(model, device=device, num_images=4_000, **flags)).step
    times = bench.in_turn(steps, dict.fromkeys(steps, count), rounds, device)
    found = {f"{kind}_ms": round(value, 3) for kind, value in times.items()}
    return {**found, "peak_mib": peak, "programs": str(trainer.optimizer.programs)}


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
    words = [sys.executable, "-m", "flatcl", "gpu", "--device", str(device), "--worker", json.dumps([flags, count])]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": HOME}
    started = [subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options) for _ in range(number)]
    try:
        for process in started:
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError("a process has ended before its first step")
        for process in started:
            process.stdin.write("go\n")
            process.stdin.flush()
        return max(float(process.communicate(timeout=LIMIT_S)[0]) for process in started)
    finally:
        for process in started:
            process.kill()
            process.wait()


def streams(number: int, flags: dict[str, Any], count: int, device: torch.device) -> float:
    """Seconds until as many programs in this process have done theirs, in turn, each on a stream of its own."""
    engines = [
        bench.Engine(bench.build("er", device=device, cuda_graph="auto", num_images=4_000, **flags))
        for _ in range(number)
    ]
    own = [torch.cuda.Stream(device) if device.type == "cuda" else None for _ in engines]
    if device.type == "cuda":
        torch.cuda.synchronize(device)

    def step() -> None:
        for engine, stream in zip(engines, own, strict=True):
            with torch.cuda.stream(stream):
                engine.step()

    bench.time_steps(step, 30, device)
    return bench.time_steps(step, count, device) * count / 1e3


def several(device: torch.device, skip: int, count: int) -> Iterator[dict[str, Any]]:
    for what, flags, many, turns in SEVERAL[skip:]:
        steps = turns * count
        one = median(processes(1, flags, steps, device) for _ in range(3))
        line = {"what": what, "steps": steps, "runs": many, "one_s": round(one, 3)}
        line |= {"processes_s": round(processes(many, flags, steps, device), 3)}
        yield {**line, "streams_s": round(streams(many, flags, steps, device), 3)}


# all of it


def measured(
    part: str, skip: int, every: int, device: torch.device, rounds: int, count: int
) -> Iterator[dict[str, Any]]:
    """The lines of a part, without the first `skip`; of the agreement, each `every`-th of them."""
    if part == "agreement":
        return agreements(device, skip, every)
    return speeds(device, skip, rounds, count) if part == "speed" else several(device, skip, count)


def lines_of(
    part: str,
    total: int,
    words: list[str],
    seconds: float,
    command: tuple[str, ...] = ("-m", "flatcl", "gpu"),
    first: int = 0,
    every: int = 1,
) -> Iterator[dict[str, Any]]:
    """The lines of a part from processes of their own: where one ends early, another goes on behind what has failed.
    Of the part's lines each `every`-th, from `first` on: `total` in all."""
    end, done = time.monotonic() + seconds, 0
    while done < total:
        place = ["--part", part, "--skip", str(first + done * every), "--every", str(every)]
        process = subprocess.Popen(
            [sys.executable, *command, *place, *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HOME, start_new_session=True,
        )  # fmt: skip
        timer = threading.Timer(max(1.0, end - time.monotonic()), process.kill)
        timer.start()
        last, found = "", 0
        for text in process.stdout:
            last = text.strip() or last
            if text.startswith(MARK):
                found += 1
                yield json.loads(text.removeprefix(MARK))
        process.wait()
        timer.cancel()
        done += found
        if done < total and time.monotonic() > end:
            yield {"left": total - done, "failed": f"this part has reached its limit of {seconds:.0f} seconds"}
            return
        if done < total:
            done += 1
            yield {"failed": f"line {done} of {total}, exit code {process.returncode}: {last[:300]}"}


def in_shares(part: str, total: int, words: list[str], seconds: float, shares: int) -> Iterator[dict[str, Any]]:
    """The lines of a part as they come, from `shares` processes at once: for what no clock is read in."""
    ended, lines = object(), queue.SimpleQueue()

    def collect(first: int) -> None:
        own = len(range(first, total, shares))
        for line in lines_of(part, own, words, seconds, first=first, every=shares):
            lines.put(line)
        lines.put(ended)

    for first in range(shares):
        threading.Thread(target=collect, args=(first,), daemon=True).start()
    while shares:
        line = lines.get()
        if line is ended:
            shares -= 1
        else:
            yield line


def table(found: dict[str, Any]) -> str:
    lines = [f"{'':38}{'model':22}{'ordinary':>10}{'recorded':>10}{'bare':>8}{'goal':>7}{'MiB':>7}"]
    for line in found["speed"]:
        if "failed" not in line:
            numbers = [line.get(name) for name in ("ordinary_ms", "recorded_ms", "bare_ms", "goal_ms", "peak_mib")]
            cells = ("–" if number is None else f"{number:g}" for number in numbers)
            columns = "".join(f"{cell:>{width}}" for cell, width in zip(cells, (10, 10, 8, 7, 7), strict=True))
            lines.append(f"{line['what']:38}{line['model']:22}{columns}")
    compared = [line for line in found["agreement"] if "failed" not in line]
    wrong = [f"{line['model']} under {line['optimizer']}" for line in compared if not line["agrees"]]
    numbers = f"{len(compared) - len(wrong)} of {len(compared)}"
    lines.append(f"recorded runs that agree with ordinary ones: {numbers}. Not: {', '.join(wrong) or 'none'}")
    replayed, others = (sum(line[name] for line in compared) for name in ("replayed", "others"))
    lines.append(f"of their steps {replayed:,} of {replayed + others:,} were replays")
    for line in found["several"]:
        if "failed" not in line:
            many = "".join(f", {name} {line[f'{name}_s'] / line['one_s']:.2f}" for name in ("processes", "streams"))
            lines.append(f"{line['what']}: {line['runs']} runs, time relative to one run{many}")
    lines += [f"{part}: {line['failed']}" for part in PARTS for line in found[part] if "failed" in line]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = Parser(prog="flatcl gpu", description="Measurements that need a GPU.")
    parser.add_argument("--out", type=Path, help="folder of gpu.json; default: none is written")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...")
    parser.add_argument("--seconds", type=float, default=570.0, help="time limit of all measurements (default 570)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that medians are taken over (default 5)")
    parser.add_argument("--count", type=int, default=20, help="steps in each round (default 20)")
    for name in ("part", "skip", "every", "worker"):  # for processes that this one starts
        parser.add_argument(f"--{name}", help=SUPPRESS)
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark or device.type == "cuda"
    if args.worker:
        worker(*json.loads(args.worker), device)
        return 0
    if args.part:
        for line in measured(args.part, int(args.skip), int(args.every), device, args.rounds, args.count):
            print(f"{MARK}{json.dumps(line)}", flush=True)
        return 0
    found: dict[str, Any] = {"environment": results.environment(str(device)), **{part: [] for part in PARTS}}
    words = ["--device", str(device), "--rounds", str(args.rounds), "--count", str(args.count)]
    totals = {"agreement": len(pairs()), "speed": len(SPEEDS), "several": len(SEVERAL)}
    for part, share in PARTS.items():
        shares = SHARES if part == "agreement" else 1
        for line in in_shares(part, totals[part], words, share * args.seconds, shares):
            print(json.dumps(line), flush=True)
            found[part].append(line)
            if args.out is not None:
                args.out.mkdir(parents=True, exist_ok=True)
                write_json(args.out / "gpu.json", found)
    print(table(found))
    return 0
