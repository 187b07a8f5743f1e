"""Kills runs and resumes them: is a run that was killed and resumed, bit for bit, the run that nobody stopped?

    python tests/kills.py --record tests/records/kills             # every method under every optimizer
    python tests/kills.py --record FOLDER --sample 27              # each method and each optimizer at least once
    python tests/kills.py --summarize tests/records/kills          # the tables of a record

For each pair, small runs on seq-synth (two tasks of two epochs, augmented; a network with BatchNorm and dropout): one
to its end, and one that is ended by SIGKILL at least once inside its last task, after steps that its last checkpoint
does not have, and as a rule once more, before or after that: in a step, while a checkpoint is written, in an
evaluation, or in what the method does at the end of a task. Each time it goes on with `--resume`, in a new process. At
its end the two are compared: the last checkpoint (weights, memory, optimizer, generators, progress), accuracies, and
logged curves, all but what was timed. A moment is drawn by --seed, but the signal comes from another process: no two
calls hit quite the same place.

Each run is a fork of this process, which has imported everything and computed nothing. Linux only, CPU, one thread. A
pair that FOLDER's record has already is skipped, so a call that was stopped can be repeated.
"""

import argparse
import collections
import gc
import importlib
import json
import mmap
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flatcl.models._method import Method
from flatcl.utils.arguments import schema
from flatcl.utils.commands.train import USAGE
from flatcl.utils.commands.train import main as run_main
from flatcl.utils.engine import checkpoint, evaluator, results
from flatcl.utils.engine.logs import Logs
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import BACKBONES, DATASETS, METHODS, OPTIMIZERS, load_plugin

LIMIT_S = 300  # of one process: what takes longer hangs
ATTEMPTS = 8  # to hit the inside of the last task
PATIENCE = 3  # batches; see `Plan`
PLACES = ("between steps", "step", "checkpoint", "end of a task", "evaluation")
OTHER = {"step": 4, "checkpoint": 3, "end of a task": 1, "evaluation": 2}  # how often the other kill aims there
FILE = "kills.jsonl"
ENVIRONMENT: dict[str, Any] = {}  # what environment.json says: asked for once, not in each run
SLOW_IMPORTS = (  # once, not in each run
    "flatcl.utils.engine.trainer", "torch.utils.tensorboard", "torch._dynamo", "torch.fx.experimental.symbolic_shapes",
    "torch._decomp", "scipy.optimize",
)  # fmt: skip

BACKBONE = '''"""A convolution, BatchNorm, dropout and a linear layer."""

from torch import nn
from torch.nn.functional import relu

from flatcl.utils.registry import BACKBONES


@BACKBONES.register("killable")
class Killable(nn.Module):
    def __init__(self, shape, num_classes, args=None):
        super().__init__()
        channels, height, width = shape
        self.num_features = 4 * ((height + 1) // 2) * ((width + 1) // 2)
        self.body = nn.Sequential(nn.Conv2d(channels, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4))
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(self.num_features, num_classes)

    @property
    def stages(self):
        return [(self.body, lambda x: self.dropout(relu(x))), (lambda x: self.classifier(x.flatten(1)), nn.Identity())]

    def features(self, x):
        return self.dropout(relu(self.body(x))).flatten(1)

    def forward(self, x):
        return self.classifier(self.features(x))
'''

# of these, a pair gets the flags that it has: small, and such that all state is in use when the run is killed
FLAGS = {
    "n_epochs": 2, "stop_after": 2, "lr": 0.02, "log_every": 1, "buffer_size": 48, "minibatch_size": 8,
    "optim_mom": 0.9, "optim_wd": 0.001, "batch_num": 2, "fitting_epochs": 3, "steps_on_anchors": 3, "bic_epochs": 3,
    "simclr_batch_size": 8, "saf_start": 0, "saf_lag": 1, "mesa_decay": 0.9, "mesa_carry": 1, "looksam_every": 8,
    "sparse_mask": "dynamic", "cutmix_alpha": 1.0,
}  # fmt: skip
REFUSED = {"gdumb": ["n_epochs"], "joint": ["stop_after"]}  # methods that have no use for a flag above
SEEN_IN_CHUNKS = 50 * 4 * 3 * 8 * 8  # bytes of 50 images: an epoch of 128 is augmented in three calls


@dataclass(frozen=True)
class Plan:
    """A moment to kill: `delay_s` after the run enters the place for the `number`-th time; in a step: `number` counts
    the run's batches, and `behind` says how many of them should not be in the last checkpoint (a wish: up to `PATIENCE`
    batches are waited for it). That checkpoint must be one from inside the task, however long it takes.
    """

    place: str
    number: int
    delay_s: float
    behind: int = 0


@dataclass
class Outcome:
    """How a process ended: exit code, negative for a signal; where it was, and after how many batches of the run."""

    code: int
    place: str
    batches: int
    last_line: str
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each stay in a place, if it came to its end
    ends: list[int] = field(default_factory=list)  # batches before each evaluation


class Probe:
    """Inside a run: writes where it stands into memory that the parent shares, and says when the plan's moment is."""

    def __init__(self, shared: memoryview, pipe: int, plan: Plan | None, inside: bool):
        self.shared, self.pipe, self.plan = shared, pipe, plan
        self.inside = inside  # the last checkpoint is one from inside a task
        self.saved = shared[1]  # batches in it
        self.since = 0  # batches since the last evaluation
        self.entries: collections.Counter = collections.Counter()
        self.seconds: dict[str, list[float]] = {place: [] for place in PLACES}
        self.ends: list[int] = []

    def install(self, model: str) -> None:
        """Into the engine's places, in this process only."""
        method = METHODS.load(model)
        self._watch(Method, "observe", "step", self._stepped)
        self._watch(checkpoint, "save", "checkpoint", self._saved)
        self._watch(evaluator.Evaluator, "__call__", "evaluation", self._evaluated)
        self._watch(method, "end_task", "end of a task", lambda: None)
        Logs.finish = lambda *args: None  # drawing takes longer than all the rest
        results.environment = lambda *args: ENVIRONMENT
        evaluator.CPU_BYTES = SEEN_IN_CHUNKS

    def _watch(self, owner: Any, name: str, place: str, after: Any) -> None:
        inner = getattr(owner, name)

        def watched(*args, **kwargs):
            with self._at(place):
                found = inner(*args, **kwargs)
                after()
            return found

        setattr(owner, name, watched)

    @contextmanager
    def _at(self, place: str):
        outer, self.shared[0] = self.shared[0], PLACES.index(place)
        if self.inside:
            self.entries[place] += 1
            self._call(place)
        start = time.perf_counter()
        yield
        self.seconds[place].append(time.perf_counter() - start)
        self.shared[0] = outer

    def _call(self, place: str) -> None:
        """Tells the parent if this is the plan's moment."""
        plan, batches = self.plan, self.shared[1]
        if plan is None or plan.place != place:
            return
        if place == "step":
            is_now = batches >= plan.number + (PATIENCE if batches - self.saved < plan.behind else 0)
        else:
            is_now = self.entries[place] >= plan.number
        if is_now:
            self.plan = None
            os.write(self.pipe, b"k")

    def _stepped(self) -> None:
        self.shared[1] += 1
        self.since += 1

    def _saved(self) -> None:
        self.inside, self.saved = self.since > 0, self.shared[1]

    def _evaluated(self) -> None:
        self.ends.append(self.shared[1])
        self.since = 0


def process(argv: list[str], model: str, log: Path, plan: Plan | None = None, last: dict | None = None) -> Outcome:
    """`main(argv)` in a fork of this process, killed by the plan. `last`: the checkpoint that it goes on from."""
    sys.stdout.flush()
    with mmap.mmap(-1, mmap.PAGESIZE) as memory, memoryview(memory) as raw, raw.cast("q") as shared:
        shared[1] = last["cost"]["batches"] if last else 0
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT_S)
            os.close(reader)
            inside = last is not None and last["stream"] is not None
            _live(argv, model, log, Probe(shared, writer, plan, inside))
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            if pipe.read(1):  # nothing comes from a run that ends before the moment
                time.sleep(plan.delay_s)
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        lines = log.read_text(errors="replace").strip().splitlines()
        outcome = Outcome(code, PLACES[shared[0]], shared[1], lines[-1] if lines else "")
    if code == 0:
        vars(outcome).update(json.loads(log.with_suffix(".json").read_text()))
    return outcome


def _live(argv: list[str], model: str, log: Path, probe: Probe) -> None:
    """The child's whole life."""
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        probe.install(model)
        code = run_main(argv)
        log.with_suffix(".json").write_text(json.dumps({"seconds": probe.seconds, "ends": probe.ends}))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def words(model: str, optimizer: str, plugins: list[str]) -> list[str]:
    """The command line of a pair's runs."""
    chosen = {"model": model, "optimizer": optimizer, "dataset": "seq-synth", "backbone": "killable"}
    registries = {"model": METHODS, "optimizer": OPTIMIZERS, "dataset": DATASETS, "backbone": BACKBONES}
    known = schema({kind: registries[kind].load(name) for kind, name in chosen.items()})
    given = {name: value for name, value in FLAGS.items() if name in known}
    if optimizer in ("adam", "adamw"):
        given["lr"] = 0.002
    for name in REFUSED.get(model, ()):
        del given[name]
    given |= chosen | {"device": "cpu", "threads": 1, "non_verbose": 1}
    return [f"--plugin={plugin}" for plugin in plugins] + [f"--{name}={value}" for name, value in given.items()]


def check_pair(model: str, optimizer: str, plugins: list[str], seed: int) -> dict[str, Any]:
    """A line of the record: the kills of this pair, and what differs from the uninterrupted run."""
    start = time.monotonic()
    line = {"model": model, "optimizer": optimizer}
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        line |= _check_pair(model, optimizer, plugins, random.Random(f"{seed} {model} {optimizer}"), Path(folder))
    return {**line, "seconds": round(time.monotonic() - start, 2)}


def _check_pair(model: str, optimizer: str, plugins: list[str], rng: random.Random, folder: Path) -> dict[str, Any]:
    argv, log = words(model, optimizer, plugins), folder / "log"
    whole = process([*argv, f"--results_path={folder / 'whole'}", "--checkpoint_minutes=0"], model, log)
    if whole.code == USAGE:
        return {"refused": whole.last_line.removeprefix("error: ")}
    if whole.code != 0:
        return {"failed": f"uninterrupted, exit code {whole.code}: {whole.last_line}"}
    typical = {place: statistics.median(found or [0.0]) for place, found in whole.seconds.items()}
    line: dict[str, Any] = {"commit": _commit(_run_folder(folder / "whole")), "batches": whole.batches, "kills": []}
    for attempt in range(ATTEMPTS):
        part = folder / f"part{attempt}"
        minutes = rng.uniform(3, 7) * typical["step"] / 60  # between checkpoints: some steps are lost with each kill
        begin = [*argv, f"--results_path={part}", f"--checkpoint_minutes={minutes:.12f}"]
        kills, problem = _kill_and_resume(begin, part, model, log, whole, typical, rng)
        line["kills"] += kills
        problem = problem or differences(_run_folder(folder / "whole"), _run_folder(part))
        if problem:
            return {**line, "equal": False, "differences": problem}
        if any(costs_steps(kill) and kill["task"] == len(whole.ends) - 1 for kill in kills):
            return {**line, "equal": True}
    return {**line, "failed": f"no kill inside the last task in {ATTEMPTS} attempts"}


def costs_steps(kill: dict[str, Any]) -> bool:
    """Whether it hit the inside of a task, and there are steps of that task that have to be done again."""
    return kill["inside"] and kill["batches"] > kill["of_checkpoint"]


def _kill_and_resume(
    argv: list[str], parent: Path, model: str, log: Path, whole: Outcome, typical: dict[str, float], rng: random.Random
) -> tuple[list[dict[str, Any]], list[str]]:
    """One run to its end with two kills on the way, if they hit: (the kills, problems)."""
    tasks = list(zip(whole.ends, whole.ends[1:], strict=False))  # batches before and after each

    def plan(place: str, task: int) -> Plan:
        first, end = tasks[task]
        number = rng.randint(first + 2, max(first + 2, end - 2)) if place == "step" else 1
        if place == "checkpoint":
            number = rng.randint(1, 3)
        return Plan(place, number, rng.uniform(0, typical[place]), behind=rng.randint(1, 3))

    place = rng.choices(list(OTHER), list(OTHER.values()))[0]
    plans = [plan(place, 0), plan("step", -1)] if rng.random() < 0.5 else [plan("step", -1), plan(place, -1)]
    kills: list[dict[str, Any]] = []
    last = None
    while True:
        outcome = process(argv, model, log, plans.pop(0) if plans else None, last)
        if outcome.code == 0:
            return kills, []
        if outcome.code != -signal.SIGKILL:
            return kills, [f"after {len(kills)} kills: exit code {outcome.code}: {outcome.last_line}"]
        path = _run_folder(parent)
        if _is_finished(path):
            return kills, []  # it came too late, everything was there
        last = checkpoint.load(path / "checkpoint")
        task, in_task = len(last["progress"]["tasks"]), last["stream"] is not None
        kill = {"place": outcome.place, "task": task + 1, "batches": outcome.batches}
        kill |= {"of_checkpoint": last["cost"]["batches"], "checkpoint_in_task": in_task}
        kills.append({**kill, "inside": in_task and outcome.batches < tasks[task][1]})
        argv = ["--resume", str(path)]


def _run_folder(parent: Path) -> Path:
    (config,) = parent.rglob("config.json")
    return config.parent


def _is_finished(path: Path) -> bool:
    file = path / "summary.json"
    return file.exists() and json.loads(file.read_text())["status"] == "finished"


def _commit(path: Path) -> str:
    found = json.loads((path / "environment.json").read_text())
    return f"{(found['commit'] or 'unknown')[:7]}{'+' if found['uncommitted_changes'] else ''}"


def differences(a: Path, b: Path) -> list[str]:
    """What differs between two finished run folders, but for times: at most 10 places."""
    found: list[str] = []
    _compare(checkpoint.load(a / "checkpoint"), checkpoint.load(b / "checkpoint"), "checkpoint", found)
    for name in ("summary.json", "accuracy.json"):
        _compare(*(json.loads((folder / name).read_text()) for folder in (a, b)), name, found)
    lines = ([json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (a, b))
    _compare(*lines, "metrics.jsonl", found)
    return found[:10]


def _compare(a: Any, b: Any, where: str, found: list[str]) -> None:
    """Nested containers, bit for bit."""
    if type(a) is not type(b):
        found.append(f"{where}: {type(a).__name__}, {type(b).__name__}")
    elif isinstance(a, dict):
        if a.keys() != b.keys():
            found.append(f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))}")
        for key in a:
            if key in b and not _is_timed(key, a[key]):
                _compare(a[key], b[key], f"{where}[{key!r}]", found)
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            found.append(f"{where}: length {len(a)}, {len(b)}")
        for position, (left, right) in enumerate(zip(a, b, strict=False)):
            _compare(left, right, f"{where}[{position}]", found)
    elif isinstance(a, torch.Tensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            found.append(f"{where}: {a.dtype} {tuple(a.shape)}, {b.dtype} {tuple(b.shape)}")
        elif not torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (a, b))):
            found.append(f"{where}: values")
    elif repr(a) != repr(b):  # NaN is NaN, 0.0 is not -0.0
        found.append(f"{where}: {a!r:.60}, {b!r:.60}")


def _is_timed(key: Any, value: Any) -> bool:
    seconds = isinstance(value, float) and str(key).endswith("_s")
    return seconds or key in ("metrics_size", "peak_memory_mib")


def all_pairs() -> list[tuple[str, str]]:
    return [(model, optimizer) for model in METHODS.names() for optimizer in OPTIMIZERS.names()]


def sample(number: int, seed: int) -> list[tuple[str, str]]:
    """So many pairs, each method and each optimizer at least once."""
    rng = random.Random(seed)
    models, optimizers = METHODS.names(), OPTIMIZERS.names()
    least, most = max(len(models), len(optimizers)), len(models) * len(optimizers)
    if not least <= number <= most:
        raise UsageError(f"--sample must be {least} to {most}, got {number}. Give such a number.")
    rng.shuffle(models)
    rng.shuffle(optimizers)
    pairs = [(models[i % len(models)], optimizers[i % len(optimizers)]) for i in range(least)]
    return pairs + rng.sample(sorted(set(all_pairs()) - set(pairs)), number - least)


def read(folder: Path) -> list[dict[str, Any]]:
    file = folder / FILE
    return [json.loads(line) for line in file.open()] if file.exists() else []


def work(pairs: list[tuple[str, str]], folder: Path, plugins: list[str], seed: int, total: int) -> None:
    """Checks these pairs, one after the other; adds a line to the record for each."""
    for model, optimizer in pairs:
        line = check_pair(model, optimizer, plugins, seed)
        with (folder / FILE).open("a") as file:  # one write: other processes add to it too
            file.write(json.dumps(line) + "\n")
        places = ", ".join(f"{k['place']} (task {k['task']}, batch {k['batches']})" for k in line.get("kills", []))
        print(f"{len(read(folder)):>3}/{total} {model} under {optimizer}: {places} {verdict(line)}", flush=True)


def verdict(line: dict[str, Any]) -> str:
    for word in ("refused", "failed"):
        if word in line:
            return f"{word}: {line[word]}"
    return "bit-equal" if line["equal"] else f"DIFFERS: {'; '.join(line['differences'])}"


def cell(line: dict[str, Any] | None) -> str:
    if line is None:
        return ""
    if "refused" in line:
        return "refused"
    return str(len(line["kills"])) if line.get("equal") else "**not equal**"


def summarize(folder: Path) -> str:
    """The tables of a record, in Markdown."""
    lines = read(folder)
    found = {(line["model"], line["optimizer"]): line for line in lines}
    kills = [kill for line in lines for kill in line.get("kills", [])]
    in_task = [kill for kill in kills if kill["checkpoint_in_task"]]
    redone = [kill["batches"] - kill["of_checkpoint"] for kill in in_task]
    equal = sum(bool(line.get("equal")) for line in lines)
    refused = [line for line in lines if "refused" in line]
    text = [
        f"{len(found)} of {len(all_pairs())} pairs, {len(kills)} kills; {equal} pairs bit-equal, {len(refused)} "
        f"refused, {len(lines) - equal - len(refused)} not equal.",
        f"Killed inside a task: {sum(kill['inside'] for kill in kills)}, and {sum(map(costs_steps, kills))} of them "
        f"after steps that the last checkpoint did not have. Resumed "
        f"from a checkpoint inside a task: {len(in_task)}; then {sum(redone)} batches were done again "
        f"({statistics.mean(redone or [0]):.1f} a kill, at most {max(redone or [0])}).",
        f"{statistics.mean([line['seconds'] for line in lines] or [0]):.1f} s a pair. "
        f"Commits: {', '.join(sorted({line['commit'] for line in lines if 'commit' in line}))}.",
        "",
        "| killed in | kills | task 1 | task 2 | after both |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for place in PLACES:
        of_place = [kill["task"] for kill in kills if kill["place"] == place]
        counts = (len(of_place), *map(of_place.count, (1, 2, 3)))
        text.append(f"| {place} | {' | '.join(map(str, counts))} |")
    optimizers = sorted({optimizer for _, optimizer in found})
    text += ["", f"| method | {' | '.join(optimizers)} |", f"| --- |{' ---: |' * len(optimizers)}"]
    for model in sorted({model for model, _ in found}):
        cells = (cell(found.get((model, optimizer))) for optimizer in optimizers)
        text.append(f"| {model} | {' | '.join(cells)} |")
    text += [f"\n{line['model']} under {line['optimizer']}: {verdict(line)}" for line in lines if not line.get("equal")]
    return "\n".join(text)


def main(argv: list[str]) -> int:
    """0: every pair bit-equal or refused; 1: one is not; 2: bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help=f"folder of {FILE}, a line a pair; pairs that it has are skipped")
    parser.add_argument("--summarize", type=Path, metavar="FOLDER", help="print the tables of a record, and stop")
    parser.add_argument("--sample", type=int, help="so many pairs, each method and each optimizer at least once")
    parser.add_argument("--pairs", nargs="+", metavar="MODEL:OPTIMIZER", help="these pairs; default: all")
    parser.add_argument("--plugin", action="append", default=[], help="a file that registers more names (repeatable)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample and of the moments")
    parser.add_argument("--jobs", type=int, default=1, help="processes that work at the same time")
    args = parser.parse_args(argv)
    if args.summarize:
        print(summarize(args.summarize))
        return 0
    if args.record is None:
        parser.error("give --record FOLDER, or --summarize FOLDER")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        backbone = Path(folder) / "killable.py"
        backbone.write_text(BACKBONE)
        plugins = [str(backbone), *(str(Path(plugin).resolve()) for plugin in args.plugin)]
        for plugin in plugins:
            load_plugin(plugin)
        pairs = all_pairs() if args.sample is None else sample(args.sample, args.seed)
        if args.pairs:
            pairs = [tuple(pair.partition(":")[::2]) for pair in args.pairs]
        for model, optimizer in pairs:
            METHODS.load(model), OPTIMIZERS.load(optimizer)
        for module in SLOW_IMPORTS:
            importlib.import_module(module)
        ENVIRONMENT.update(results.environment("cpu"))
        gc.freeze()  # or each fork would copy what its collector looks at
        args.record.mkdir(parents=True, exist_ok=True)
        done = {(line["model"], line["optimizer"]) for line in read(args.record)}
        left = [pair for pair in pairs if pair not in done]
        workers = []
        for job in range(args.jobs):
            sys.stdout.flush()
            worker = os.fork()
            if worker == 0:
                code = 1
                try:
                    work(left[job :: args.jobs], args.record, plugins, args.seed, len(done) + len(left))
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            workers.append(worker)
        statuses = [os.waitpid(worker, 0)[1] for worker in workers]
    lines = [line for line in read(args.record) if (line["model"], line["optimizer"]) in pairs]
    good = len(lines) == len(pairs) and all("refused" in line or line.get("equal") for line in lines)
    return 0 if good and not any(statuses) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        sys.exit(USAGE)
