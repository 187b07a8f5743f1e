"""The engine's benchmark on this machine: `flatcl bench [--rounds N] [--device D] [--quick 1]`.

For each method and network it measures, in turn in one run,
  step        a whole training step of the engine,
  pipeline    the same step with the network stubbed out: data, augmentation, replay, insertion, bookkeeping,
  bare        a loop that does only the same forwards, backwards and updates, on tensors already in place,
and prints medians over the rounds and the efficiency, bare / step. For each optimizer it measures a step of `er` over
one with SGD, beside the factor that counting its passes gives, a backward taken as two forwards. Images are random
bytes; shapes, sizes and flags are those of the benchmarks named. Absolute times depend on the machine and the minute;
the ratios hold.
"""

import subprocess
import sys
import time
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flatcl.models._method import Batch
from flatcl.utils.arguments import resolve
from flatcl.utils.commands._parser import Parser
from flatcl.utils.engine.build import build as build_trainer
from flatcl.utils.engine.build import resolve_device
from flatcl.utils.optim._sharpness import frozen_statistics, norm
from flatcl.utils.registry import HOME, OPTIMIZERS

METHODS = ("er", "derpp", "derpp_sam", "mgser_sam")


def made(real: type, num_images: int) -> type:
    """A benchmark with random images in place of its files."""

    def load(self, root):
        draw = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (num_images, *self.shape), dtype=torch.uint8, generator=draw)
        labels = torch.arange(num_images) % self.num_classes
        return (images, labels), (images[: num_images // 6], labels[: num_images // 6])

    return type(f"Made{real.__name__}", (real,), {"load": load})


def build(model: str, dataset: str, device: torch.device, num_images: int = 20_000, **flags: Any):
    """A trainer on random images, its memory filled as in mid-run."""
    trainer = fresh(model, dataset, device, num_images, **flags)
    fill_memory(trainer)
    return trainer


def fresh(model: str, dataset: str, device: torch.device, num_images: int, **flags: Any):
    """A trainer on random images, before its first step."""
    flags = {"cuda_graph": "0", **flags}  # ordinary steps, which `flatcl gpu` compares with recorded ones
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    config = resolve(["--model", model, "--dataset", dataset, "--disable_log", "1", "--non_verbose", "1", *words])
    benchmark = made(config.benchmark, num_images)
    config = SimpleNamespace(
        **config.values, view=config.view, learner=config.learner, benchmark=benchmark, hash=config.hash,
        values=config.values,
    )  # fmt: skip
    return build_trainer(config, device, None)


def fill_memory(trainer) -> None:
    """The reservoir as late in a run, 600 presentations a slot: full, and nearly every row is turned away."""
    method, batch = trainer.method, next(trainer.stream.epoch(trainer.benchmark[0].train))
    method.train()
    method.observe(batch, trainer.optimizer)  # makes the columns
    seen = max(300_000, 600 * method.buffer.capacity)
    method.buffer._allocate(method.buffer.columns)
    for column in method.buffer.columns.values():
        column.zero_()
    method.buffer.num_seen, method.buffer.filled = seen, method.buffer.capacity


class Engine:
    """The engine's own loop over an endless stream."""

    def __init__(self, trainer):
        self.trainer, self.batches = trainer, self._endless(trainer)

    @staticmethod
    def _endless(trainer):
        task = trainer.benchmark[0]
        while True:
            yield from trainer.stream.epoch(task.train)

    def step(self) -> None:
        self.trainer.method.observe(next(self.batches), self.trainer.optimizer)


class StubNet(nn.Module):
    """A network that costs nothing: the same logits for every image."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def stubbed(trainer):
    """The same trainer with its network stubbed out."""
    trainer.method.net = StubNet(trainer.benchmark.num_classes).to(trainer.device)
    trainer.optimizer = type(trainer.optimizer)(trainer.method, 0.1, 0.0, trainer.optimizer.args)
    return trainer


class Bare:
    """Forwards, backwards and updates of a method on fixed tensors, written by hand with torch.optim.SGD."""

    def __init__(self, trainer):
        self.net = trainer.method.net
        self.name = trainer.config.model
        self.args = trainer.method.args
        self.rho = getattr(trainer.optimizer.args, "rho", None)
        self.params = list(self.net.parameters())
        self.base = torch.optim.SGD(self.params, trainer.config.lr)
        batch: Batch = next(trainer.stream.epoch(trainer.benchmark[0].train))
        self.blocks = [(block.x.clone(), block.y.clone()) for block in trainer.method.draw(batch)]
        self.z = torch.zeros(len(self.blocks[-1][0]), trainer.benchmark.num_classes, device=trainer.device)

    def loss(self) -> Tensor:
        if self.name == "er":
            ((x, y),) = self.blocks
            return cross_entropy(self.net(x), y)
        (x, y), (x1, _), (x2, y2) = self.blocks
        current = cross_entropy(self.net(x), y)
        logits = self.args.alpha * (self.net(x1) - self.z).square().mean()
        return current + logits + self.args.beta * cross_entropy(self.net(x2), y2)

    def step(self) -> None:
        self.base.zero_grad()
        self.loss().backward()
        if self.rho is not None:
            grads = [p.grad for p in self.params]
            with torch.no_grad():
                saved = [p.clone() for p in self.params]
                torch._foreach_add_(self.params, torch._foreach_mul(grads, self.rho / (norm(grads) + 1e-12)))
            self.base.zero_grad()
            with frozen_statistics(self.net):
                self.loss().backward()
            with torch.no_grad():
                torch._foreach_copy_(self.params, saved)
                if self.name == "mgser_sam":
                    torch._foreach_add_([p.grad for p in self.params], grads, alpha=self.args.guide)
        self.base.step()


def time_steps(step, count: int, device: torch.device) -> float:
    """Mean milliseconds of `count` steps."""
    start = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start) / count


def in_turn(steps: dict[str, Any], counts: dict[str, int], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds a step of several loops, run in turn A B C A B C ..."""
    for name, step in steps.items():
        time_steps(step, max(2, counts[name] // 2), device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(time_steps(step, counts[name], device))
    return {name: median(values) for name, values in times.items()}


def bench_steps(dataset: str, device: torch.device, rounds: int, count: int, **flags: Any) -> dict[str, float]:
    """Prints the table of one benchmark's shape; returns the medians."""
    steps, counts, images = {}, {}, {}
    for model in METHODS:
        trainer = build(model, dataset, device, **flags)
        images[model] = trainer.config.batch_size
        steps[f"{model} step"] = Engine(trainer).step
        steps[f"{model} bare"] = Bare(build(model, dataset, device, **flags)).step
        steps[f"{model} pipeline"] = Engine(stubbed(build(model, dataset, device, **flags))).step
        counts |= {f"{model} step": count, f"{model} bare": count, f"{model} pipeline": max(10, count)}
    times = in_turn(steps, counts, rounds, device)
    batch = next(iter(images.values()))
    print(
        f"\n{dataset}, {trainer.config.backbone}, stream {batch} + replay {trainer.method.args.minibatch_size} images"
    )
    print(f"{'method':12}{'step ms':>10}{'images/s':>12}{'pipeline ms':>13}{'bare ms':>10}{'efficiency':>12}")
    for model in METHODS:
        step, bare, pipeline = (times[f"{model} {kind}"] for kind in ("step", "bare", "pipeline"))
        speed = 1e3 * images[model] / step
        print(f"{model:12}{step:10.2f}{speed:12,.0f}{pipeline:13.2f}{bare:10.2f}{bare / step:12.2f}")
    ratio = times["mgser_sam step"] / times["derpp_sam step"]
    print(f"mgser_sam / derpp_sam, a step: {ratio:.3f}")
    return times


def bench_optimizers(dataset: str, device: torch.device, rounds: int, count: int, **flags: Any) -> None:
    """Prints each optimizer's step of `er` over SGD's, and over its ideal."""
    steps, counts, ideal = {}, {}, {}
    for name in OPTIMIZERS.names():
        trainer = build("er", dataset, device, optimizer=name, **flags)
        trainer.optimizer.begin_task(trainer.benchmark[0])
        trainer.optimizer.begin_epoch(0, 1)
        steps[name] = Engine(trainer).step
        cycle = getattr(trainer.optimizer.args, "looksam_every", 1)  # whole ones, since its steps are not all alike
        counts[name] = -(-count // cycle) * cycle
        ideal[name] = compute_of(trainer, 2 * cycle)
    times = in_turn(steps, counts, rounds, device)
    print(
        f"\n{dataset}, {trainer.config.backbone}, er: a step of each optimizer over one of SGD ({times['sgd']:.2f} ms)"
    )
    print(f"{'optimizer':14}{'step ms':>10}{'factor':>9}{'ideal':>8}{'factor / ideal':>16}")
    for name in sorted(times, key=lambda name: times[name]):
        factor, best = times[name] / times["sgd"], ideal[name] / ideal["sgd"]
        print(f"{name:14}{times[name]:10.2f}{factor:9.2f}{best:8.2f}{factor / best:16.2f}")


def compute_of(trainer, count: int) -> float:
    """Rows forward + 2 x rows backward of a step, averaged over some, after a task's first one."""
    batches = Engine._endless(trainer)
    trainer.method.observe(next(batches), trainer.optimizer)
    objectives = [trainer.method.observe(next(batches), trainer.optimizer)[0][0] for _ in range(count)]
    return sum(objective.forward_rows + 2 * objective.backward_rows for objective in objectives) / count


def bench_pipeline(dataset: str, device: torch.device, rounds: int) -> None:
    trainer = stubbed(build("er", dataset, device, num_images=4_000, backbone="reduced-resnet18", batch_size=32))
    times = in_turn({"pipeline": Engine(trainer).step}, {"pipeline": 50}, rounds, device)
    shape = "x".join(map(str, trainer.benchmark.shape))
    print(f"pipeline of er, 32 + 32 images of {shape}: {times['pipeline']:.2f} ms")


def bench_buffer(device: torch.device, rounds: int) -> None:
    """A step must not cost more as the memory grows."""
    small, large = (
        Engine(build("er", "perm-mnist", device, batch_size=128, minibatch_size=128, buffer_size=size)).step
        for size in (200, 1_000_000)
    )
    times = in_turn({"small": small, "large": large}, {"small": 20, "large": 20}, 6 * rounds, device)
    print(f"a step of er with a buffer of 1,000,000 / of 200: {times['large'] / times['small']:.3f}")


def bench_evaluation(dataset: str, num_images: int, device: torch.device, rounds: int, **flags: Any) -> None:
    trainer = build("er", dataset, device, num_images, **flags)
    images = sum(len(task.test) for task in trainer.benchmark)
    times = in_turn({"e": lambda: trainer.evaluate(trainer.method, 10)}, {"e": 1}, max(3, rounds // 2), device)
    shape = "x".join(map(str, trainer.benchmark.shape))
    print(f"evaluation, {trainer.config.backbone}: {1e3 * images / times['e']:,.0f} images/s of {shape}")


def whole_run(device: torch.device) -> None:
    """All of perm-mnist under er, in a process of its own, evaluations included."""
    trainer = fresh("er", "perm-mnist", device, 60_000, buffer_size=500)
    cost = trainer.run()["cost"]
    print(
        f"er on 20 tasks of perm-mnist's size: {cost['wall_s']:.1f} s ({cost['train_s']:.1f} s training, "
        f"{cost['eval_s']:.1f} s for {len(trainer.benchmark) * 21} evaluations of 10,000 images), "
        f"peak memory {cost['peak_memory_mib'] or float('nan'):,.0f} MiB"
    )


def bench_start_up() -> None:
    for words in (["--list"], ["--help"]):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "flatcl", "train", *words], check=True, capture_output=True, cwd=HOME)
            seconds.append(time.perf_counter() - start)
        print(f"start-up of {words[0]}: {median(seconds):.2f} s")


def main(argv: list[str]) -> int:
    parser = Parser(prog="flatcl bench", description="benchmark of the engine")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that the medians are taken over (default 9)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda ...")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves it to torch")
    parser.add_argument("--whole_run", type=int, default=0, help="1: only time a whole run of er on perm-mnist")
    parser.add_argument("--quick", type=int, default=0, help="1: one round, a few steps, to see that it runs")
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.whole_run:
        whole_run(device)
        return 0
    rounds, scale = (1, 0.05) if args.quick else (args.rounds, 1)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} CPU threads, medians of {rounds} rounds")
    # many short turns where steps are short: the machine's speed drifts within seconds
    bench_steps("perm-mnist", device, 4 * rounds, max(3, int(20 * scale)), buffer_size=500)
    if device.type == "cuda":
        for batch in (32, 256):
            sizes = dict(batch_size=batch, minibatch_size=batch, buffer_size=500, backbone="resnet18")
            bench_steps("seq-cifar10", device, rounds, max(3, int(20 * scale)), **sizes)
    sizes = dict(buffer_size=500, backbone="reduced-resnet18")
    bench_steps("seq-cifar10", device, rounds, 1 if device.type == "cpu" else max(3, int(20 * scale)), **sizes)
    bench_optimizers("perm-mnist", device, 4 * rounds, max(3, int(20 * scale)), buffer_size=500)
    bench_optimizers("seq-cifar10", device, rounds, 1 if device.type == "cpu" else max(3, int(20 * scale)), **sizes)
    print()
    bench_pipeline("seq-cifar10", device, rounds)
    bench_pipeline("seq-tinyimg", device, rounds)
    bench_buffer(device, rounds)
    bench_evaluation("perm-mnist", 50_000, device, rounds)
    bench_evaluation("seq-cifar10", 12_000, device, rounds, backbone="reduced-resnet18")
    if not args.quick:
        words = ["--whole_run", "1", "--device", args.device, "--threads", str(args.threads)]
        done = subprocess.run(
            [sys.executable, "-m", "flatcl", "bench", *words], capture_output=True, text=True, cwd=HOME
        )
        print(done.stdout.splitlines()[-1] if done.returncode == 0 else done.stderr)
    bench_start_up()
    return 0
