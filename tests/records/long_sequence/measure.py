"""Sequences of 1,000 tasks of tiny images, and what a task costs as their number grows.

`python tests/records/long_sequence/measure.py --dataset long-classes [--tasks 1000] [flags of main.py]` prints a row at
tasks 10, 100, 500 and so on: medians over the ten tasks before, in CPU milliseconds of one thread, which depend less on
what else the machine does. The run folder is temporary.
"""

import argparse
import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from flatcl.datasets._benchmark import Benchmark, DomainBenchmark  # noqa: E402
from flatcl.utils.engine import seeding  # noqa: E402
from flatcl.utils.registry import DATASETS  # noqa: E402

NUM_TASKS = 1000
MARKS = (10, 20, 50, 100, 200, 300, 500, 1000)


def images(num_classes: int, per_class: int, shape: tuple[int, int, int], seed: int):
    """Noisy copies of one random image a class: uint8 (N, C, H, W), int64 (N,)."""
    patterns = torch.randint(0, 200, (num_classes, *shape), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(num_classes).repeat(per_class)
    noise = torch.randint(0, 56, (len(labels), *shape), generator=torch.Generator().manual_seed(seed))
    return (patterns[labels] + noise).to(torch.uint8), labels


@DATASETS.register("long-classes")
class LongClasses(Benchmark):
    """1,000 tasks of one class each: 40 images to learn, 5 to test."""

    num_classes = NUM_TASKS
    shape = (1, 4, 4)
    defaults = dict(n_tasks=NUM_TASKS, n_epochs=1, batch_size=10, minibatch_size=10, lr=0.05)

    def load(self, root):
        return images(NUM_TASKS, 40, self.shape, 1), images(NUM_TASKS, 5, self.shape, 2)


@DATASETS.register("long-domains")
class LongDomains(DomainBenchmark):
    """1,000 permutations of the pixels of ten classes: 200 images to learn, 100 to test."""

    num_classes = 10
    shape = (1, 8, 8)
    defaults = dict(n_tasks=NUM_TASKS, n_epochs=1, batch_size=10, minibatch_size=10, lr=0.05)

    def load(self, root):
        return images(10, 20, self.shape, 1), images(10, 10, self.shape, 2)

    def pixel_map(self, index):
        return torch.from_numpy(seeding.generator(self.config.seed, f"permutation {index}").permutation(64))


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(argv: list[str], num_tasks: int) -> None:
    from flatcl.utils.arguments import resolve
    from flatcl.utils.engine import build, trainer
    from flatcl.utils.engine.results import RunFolder

    say = functools.partial(print, file=sys.stderr, flush=True)
    seen: list[tuple[float, float, float]] = []  # of each task: seconds in all, of training, of evaluation

    class Watched(trainer.Trainer):
        def _train_task(self, task):
            start, train_s, eval_s = time.process_time(), self.cost.train_s, self.cost.eval_s
            super()._train_task(task)
            spent = time.process_time() - start
            seen.append((spent, self.cost.train_s - train_s, self.cost.eval_s - eval_s))
            count = len(seen)
            if count in MARKS or count == num_tasks:
                last = seen[-min(10, count) :]
                task_ms, train_ms, eval_ms = (1e3 * statistics.median(row[k] for row in last) for k in range(3))
                rest_ms, step_ms = task_ms - train_ms - eval_ms, train_ms * count / self.cost.steps
                mean_ms = 1e3 * statistics.fmean(row[0] for row in seen)
                cells = (f"{count}", f"{task_ms:.1f}", f"{step_ms:.2f}", f"{eval_ms:.1f}", f"{rest_ms:.1f}",
                         f"{mean_ms:.1f}", f"{rss_mib():.0f}")  # fmt: skip
                say(f"| {' | '.join(cells)} |")

    config = resolve([*argv, "--non_verbose", "--stop_after", str(num_tasks)])
    say("| task | a task | a step | evaluation | files and logs | mean task so far | memory, MiB |")
    say("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    torch.set_num_threads(1)
    build.Trainer = Watched
    trainer.time = types.SimpleNamespace(monotonic=time.process_time)
    run = build.build(config, torch.device("cpu"), RunFolder.create(config))
    start = time.monotonic()
    with contextlib.redirect_stdout(None):
        run.run()
    run.logs.close()
    size = sum(file.stat().st_size for file in run.folder.path.rglob("*") if file.is_file()) / 2**20
    say(f"{num_tasks} tasks in {time.monotonic() - start:.0f} s of wall time; run folder {size:.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", default="long-classes")
    parser.add_argument("--tasks", type=int, default=NUM_TASKS)
    own, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(
            ["--model", "er", "--buffer_size", "200", "--dataset", own.dataset, "--results_path", folder, *rest],
            own.tasks,
        )
