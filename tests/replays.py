"""Are steps that were recorded once and replayed (`utils/engine/program.py`) those that they stand for, bit for bit?

    python tests/replays.py --record tests/records/replays             # every method under every optimizer
    python tests/replays.py --record FOLDER --pairs er:sgd derpp:sam   # these
    python tests/replays.py --summarize tests/records/replays          # the table of a record

For each pair, small runs on seq-synth (two tasks of three epochs, augmented; a network with BatchNorm): one in the
ordinary way, one with steps recorded by `utils/contracts/_tape.py`, which does on the CPU what a CUDA graph does on a
GPU, and one like the second that is stopped in its last task and resumed. At their ends the last checkpoints (weights,
memory, optimizer, generators, progress), accuracies and logged curves are compared. CPU, one thread. A pair that
FOLDER's record has already is skipped.
"""

import argparse
import contextlib
import io
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import kills  # noqa: E402

from flatcl.models._method import Method  # noqa: E402
from flatcl.utils.commands.train import main as run_main  # noqa: E402
from flatcl.utils.contracts._tape import Tape  # noqa: E402
from flatcl.utils.engine import program, results  # noqa: E402
from flatcl.utils.engine.logs import Logs  # noqa: E402
from flatcl.utils.registry import METHODS, OPTIMIZERS, load_plugin  # noqa: E402

FILE = "replays.jsonl"
FLAGS = {"n_epochs": 3, "log_every": 10}  # a step that is logged is no replay
STOP_BEHIND = 7  # steps before the end of a run that is stopped


def words(model: str, optimizer: str, plugin: str) -> list[str]:
    given = [word for word in kills.words(model, optimizer, [plugin]) if not word.startswith("--log_every")]
    if model not in kills.REFUSED or "n_epochs" not in kills.REFUSED[model]:
        given = [word for word in given if not word.startswith("--n_epochs")] + [f"--n_epochs={FLAGS['n_epochs']}"]
    return [*given, f"--log_every={FLAGS['log_every']}"]


class Watched:
    """Sees a run's trainer, and stops it after so many batches."""

    def __init__(self, stop_after: int | None = None):
        self.stop_after, self.optimizer, self.batches = stop_after, None, 0
        self.observe = Method.observe

    def __call__(self, method: Method, batch: Any, optimizer: Any, trace: bool = False):
        done = self.observe(method, batch, optimizer, trace)
        self.optimizer, self.batches = optimizer, self.batches + 1
        if self.batches == self.stop_after:
            signal.raise_signal(signal.SIGTERM)
        return done


def called(argv: list[str], stop_after: int | None = None) -> tuple[int, str, Watched]:
    """(exit code, what was printed, what was seen) of a run."""
    watched, out = Watched(stop_after), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        mock.patch.object(Method, "observe", lambda *args, **kwargs: watched(*args, **kwargs)),
        mock.patch.object(Logs, "finish", lambda *args: None),  # drawing takes longer than all the rest
        mock.patch.object(program, "recorder", lambda device: Tape()),
        mock.patch.object(results, "environment", lambda *args: {}),
    ):
        return run_main(argv), out.getvalue(), watched


def check_pair(model: str, optimizer: str, plugin: str, *more: str) -> dict[str, Any]:
    """A line of the record; `more` are further words of the command line."""
    start = time.monotonic()
    line: dict[str, Any] = {"model": model, "optimizer": optimizer}
    with tempfile.TemporaryDirectory(prefix="replays-") as parent:
        argv = [*words(model, optimizer, plugin), *more]
        folders = {kind: Path(parent) / kind for kind in ("ordinary", "replayed", "resumed")}
        code, printed, seen = called([*argv, f"--results_path={folders['ordinary']}"])
        if code != 0:
            return {**line, "failed": printed.strip().splitlines()[-1]}
        code, printed, replayed = called([*argv, "--cuda_graph=auto", f"--results_path={folders['replayed']}"])
        if code != 0:
            return {**line, "failed": printed.strip().splitlines()[-1]}
        stop = seen.batches - STOP_BEHIND
        begin = [*argv, "--cuda_graph=auto", f"--results_path={folders['resumed']}"]
        code, printed, _ = called(begin, stop)
        if code != 128 + signal.SIGTERM:
            return {**line, "failed": f"stopped, exit code {code}: {printed.strip().splitlines()[-1]}"}
        path = kills._run_folder(folders["resumed"])
        code, printed, resumed = called(["--resume", str(path), "--cuda_graph=auto"])
        if code != 0:
            return {**line, "failed": f"resumed: {printed.strip().splitlines()[-1]}"}
        problems = [
            f"{kind}: {problem}"
            for kind in ("replayed", "resumed")
            for problem in kills.differences(*(kills._run_folder(folders[k]) for k in ("ordinary", kind)))
            if "'noise'" not in problem and "replayed_steps" not in problem
        ]
    programs = replayed.optimizer.programs
    line |= {
        "steps": programs.replayed + programs.others,
        "replayed": programs.replayed,
        "why": dict(programs.ordinary),
    }
    line |= {"resumed": resumed.optimizer.programs.replayed, "equal": not problems, "differences": problems[:10]}
    return {**line, "seconds": round(time.monotonic() - start, 2)}


def read(folder: Path) -> list[dict[str, Any]]:
    file = folder / FILE
    return [json.loads(line) for line in file.open()] if file.exists() else []


def verdict(line: dict[str, Any]) -> str:
    if "failed" in line:
        return f"failed: {line['failed']}"
    if not line["equal"]:
        return f"DIFFERS: {'; '.join(line['differences'])}"
    why = "".join(f", {number}: {reason}" for reason, number in line["why"].items())
    return f"bit-equal, {line['replayed']} of {line['steps']} steps replayed{why}"


def summarize(folder: Path) -> str:
    """The table of a record, in Markdown."""
    lines = read(folder)
    found = {(line["model"], line["optimizer"]): line for line in lines}
    equal = [line for line in lines if line.get("equal")]
    never = [line for line in equal if not line["replayed"]]
    text = [
        f"{len(found)} of {len(kills.all_pairs())} pairs: {len(equal)} bit-equal, {len(lines) - len(equal)} not; "
        f"{sum(line['replayed'] for line in equal)} of {sum(line['steps'] for line in equal)} steps were replays. "
        f"Never replayed: {len(never)} pairs.",
    ]
    optimizers = sorted({optimizer for _, optimizer in found})
    text += ["", f"| method | {' | '.join(optimizers)} |", f"| --- |{' ---: |' * len(optimizers)}"]
    for model in sorted({model for model, _ in found}):
        lines_of = (found.get((model, optimizer)) for optimizer in optimizers)
        cells = ("" if line is None else str(line["replayed"]) if line.get("equal") else "**no**" for line in lines_of)
        text.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(text)


def main(argv: list[str]) -> int:
    """0: every pair is bit-equal; 1: one is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help=f"folder of {FILE}, a line a pair; pairs that it has are skipped")
    parser.add_argument("--summarize", type=Path, metavar="FOLDER", help="print the table of a record, and stop")
    parser.add_argument("--pairs", nargs="+", metavar="MODEL:OPTIMIZER", help="these pairs; default: all")
    args = parser.parse_args(argv)
    if args.summarize:
        print(summarize(args.summarize))
        return 0
    if args.record is None:
        parser.error("give --record FOLDER, or --summarize FOLDER")
    torch.set_num_threads(1)
    args.record.mkdir(parents=True, exist_ok=True)
    pairs = [tuple(pair.split(":")) for pair in args.pairs] if args.pairs else kills.all_pairs()
    done = {(line["model"], line["optimizer"]) for line in read(args.record)}
    with tempfile.TemporaryDirectory(prefix="replays-") as folder:
        plugin = Path(folder) / "killable.py"
        plugin.write_text(kills.BACKBONE.replace("nn.Dropout(0.1)", "nn.Identity()"))
        load_plugin(str(plugin))
        for model, optimizer in pairs:
            METHODS.load(model), OPTIMIZERS.load(optimizer)
            if (model, optimizer) in done:
                continue
            line = check_pair(model, optimizer, str(plugin))
            with (args.record / FILE).open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{model} under {optimizer}: {verdict(line)}", flush=True)
    lines = [line for line in read(args.record) if (line["model"], line["optimizer"]) in pairs]
    return 0 if len(lines) == len(pairs) and all(line.get("equal") for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
