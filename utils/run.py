"""argv in, run folder out. One way: resolve, open the folder, seed, build, train, summarize."""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.arguments import (
    SELECTORS,
    Config,
    EngineArgs,
    Request,
    flags_of,
    read_config_file,
    resolve_request,
    schema,
)
from utils.errors import RunFailed, UsageError
from utils.registry import load_plugin, nearest

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: list[str]) -> int:
    """Runs a command line; returns the exit code: 0 finished, 1 failed, 2 bad input, 130 interrupted."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _main(argv)
    except UsageError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return USAGE
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has enough of it (`| head`)
        sys.stdout = open(os.devnull, "w")
        return FAILED


def _show_warning(message, *_where) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _main(argv: list[str]) -> int:
    request = Request.parse(argv)
    if request.listing is not None:
        return _list(request)
    if request.wants_help:
        return _help(request)
    if request.resume is not None:
        return _resume(request)
    config = resolve_request(request)
    if config.dry_run:
        print(describe(config))
        return OK
    return train(config)


def train(config: Config) -> int:
    """One whole run, from an empty network."""
    from utils.results import RunFolder

    device = resolve_device(config.device)
    folder = None if config.disable_log else RunFolder.create(config)
    with cpu_threads(config.threads):
        try:
            trainer = build(config, device, folder)
        except BaseException:
            if folder is not None:  # nothing has been computed: no trace of a run that never began
                _remove_empty_run(folder.path)
            raise
        print(describe(config))
        return _train(trainer)


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """torch computes with so many threads inside; 0 leaves it to torch. Other runs of the process are not touched."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build(config: Config, device, folder):
    """Benchmark, network, method, optimizer: each built once. Returns the trainer."""
    import torch

    from models._method import Context
    from utils import results, seeding
    from utils.augment import Augment
    from utils.registry import BACKBONES, OPTIMIZERS
    from utils.trainer import Trainer

    benchmark = config.benchmark(config, "cpu")
    _place(benchmark, config.data_device, device)
    seeding.seed_everything(config.seed)
    augment = Augment(benchmark.augmentations() if config.augmentation else [], benchmark.mean, benchmark.std, device)
    backbone = BACKBONES.load(config.backbone)
    net = backbone(benchmark.shape, benchmark.num_classes, config.view(backbone))
    context = Context(benchmark, augment, device, seeding.generator(config.seed, "buffer"), config)
    method = config.learner(net, config.view(config.learner), context).to(device)
    method.amp = torch.bfloat16 if config.amp == "bf16" else None
    optimizer_type = OPTIMIZERS.load(config.optimizer)
    optimizer = optimizer_type(
        method, config.lr, config.optim_wd, config.view(optimizer_type), seeding.generator(config.seed, "optimizer")
    )
    if folder is not None:
        folder.write("environment.json", results.environment(str(device)))
    return Trainer(config, benchmark, method, optimizer, augment, folder)


def _train(trainer) -> int:
    """Runs a trainer to its end and writes how it ended, whatever that is."""
    from utils.trainer import Interrupted

    folder, logs = trainer.folder, trainer.logs
    status = "crashed"
    try:
        summary = trainer.run()
        status = "finished"
    except Interrupted as stop:
        status = "interrupted"
        where = f" Continue with: python main.py --resume {folder.path}" if folder else ""
        print(f"\ninterrupted at step {trainer.cost.steps}.{where}", file=sys.stderr)
        return 128 + stop.args[0]
    except RunFailed:
        status = "diverged"
        raise
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        if status != "finished":
            if folder is not None:
                folder.write("summary.json", trainer.summary(status))
            logs.close()
    if folder is not None:  # the result first, then everything that could go wrong
        folder.write("summary.json", summary)
    try:
        logs.finish(summary, trainer.progress.tasks, trainer.joint)
    except Exception:  # a picture is not worth a result
        traceback.print_exc()
        print("the pictures could not be drawn; the results are complete", file=sys.stderr)
    logs.close()
    print(closing_table(summary, trainer.progress.tasks, folder))
    return OK


def _resume(request: Request) -> int:
    from utils.results import RunFolder

    _, _, file = read_config_file(request.resume)
    path = Path(file).parent
    if _status(path) == "finished":
        raise UsageError(f"--resume {path}: this run is finished. Use --from to repeat it, or to change its flags.")
    hidden = {name for name, flag in flags_of(EngineArgs, "engine").items() if not flag.result}
    changed = [name for name in request.words if name not in hidden - {"results_path", "disable_log"}]
    if changed:
        raise UsageError(
            f"--resume continues a run as it was: --{', --'.join(changed)} cannot be changed. "
            "Use --from to start a new run with other values."
        )
    request = Request(request.words, request.plugins, source=file)
    config = resolve_request(request)
    if config.dry_run:
        print(describe(config))
        return OK
    device = resolve_device(config.device)
    folder = RunFolder(path)
    if not os.access(path, os.W_OK):
        raise UsageError(f"--resume {path}: cannot write there. Copy the folder to where you can.")
    from utils import checkpoint

    checkpoint.load(path / "checkpoint", config.hash)  # before any work: is there anything to go on from?
    with cpu_threads(config.threads):
        trainer = build(config, device, folder)
        try:
            trainer.load_checkpoint()
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise UsageError(
                f"{path}/checkpoint does not fit this program's network or method ({reason}). Use the version that "
                "wrote it, or start a new run with --from."
            ) from error
        print(describe(config).splitlines()[0])
        print(f"resumed after step {trainer.cost.steps}, {len(trainer.progress.tasks)} task(s) finished")
        return _train(trainer)


def _status(path: Path) -> str | None:
    try:
        return json.loads((path / "summary.json").read_text())["status"]
    except (OSError, ValueError, KeyError):
        return None


def resolve_device(name: str):
    """torch.device of --device, with its index, as tensors name it; raises `UsageError` if it is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            there.append("mps")
        raise UsageError(f"--device {name} is not there. Choose from: auto, {', '.join(there)}.") from None
    if device.type == "meta":
        raise UsageError("--device meta cannot train. Choose from: auto, cpu, cuda.")
    return device


def _place(benchmark, where: str, device) -> None:
    """Moves the images to the device unless they would fill it; then they stay in host memory."""
    import torch

    if device.type == "cpu" or where == "cpu":
        return
    if where == "auto" and device.type == "cuda":
        needed = sum(split.images.nbytes for split in (benchmark._train, benchmark._test))
        if 3 * needed > torch.cuda.mem_get_info(device)[0]:  # the set, a task's copy, and room for the network
            return
    benchmark.to(device)


def _remove_empty_run(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def describe(config: Config) -> str:
    """Every flag that differs from its default, and where it came from; seed and rho always."""
    lines = [f"{config.model} on {config.dataset} ({config.benchmark.setting}), config {config.hash}"]
    for name in sorted(config.values):
        if name == "n_epochs" and config.budget_rows is not None:
            continue
        if config.origins[name] != "default" or name in ("seed", "rho"):
            lines.append(f"  {name:18} {_written(config.values[name]):14} {config.origins[name]}")
    return "\n".join(lines)


def _written(value) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def closing_table(summary: dict, tasks: list[int], folder) -> str:
    """The end of a run on the console: matrix (of more than 10 tasks its last row), metrics, cost, and where the files
    are. `tasks`: those trained."""
    from utils.logs import WRITTEN

    def cells(values) -> str:
        return "".join("      –" if value is None else f"{100 * value:7.2f}" for value in values)

    lines, is_cut = [], False
    for setting, matrix in summary["accuracy"].items():
        heading, last = f"\nAccuracy in % [{WRITTEN[setting]}]", matrix[-1]
        if len(last) <= 10:
            lines.append(f"{heading}, after task (row) on task (column)")
            lines.append("      " + "".join(f"{task:>7}" for task in range(1, len(last) + 1)))
            lines += [f"{task + 1:>4}  {cells(row)}" for task, row in zip(tasks, matrix, strict=True)]
        else:
            is_cut = True
            lines.append(f"{heading}, at the end of training")
            for start in range(0, len(last), 10):
                end = min(start + 10, len(last))
                lines.append(f"{f'task {start + 1}-{end}':>16}  {cells(last[start:end])}")
    if is_cut and folder is not None:
        lines.append(f"\nAccuracy after every task: {folder.path / 'accuracy.json'}")
    lines.append("")
    names = list(next(iter(summary["metrics"].values())))
    lines.append(f"{'metric':30}" + "".join(f"{WRITTEN[setting]:>11}" for setting in summary["metrics"]))
    for name in names:
        values = [metrics[name] for metrics in summary["metrics"].values()]
        cells = ("          –" if value is None else f"{100 * value:9.2f} %" for value in values)
        lines.append(f"{name:30}" + "".join(cells))
    cost = summary["cost"]
    lines.append(
        f"\n{cost['steps']:,} steps, {cost['forward_rows']:,} rows forward, {cost['backward_rows']:,} rows backward; "
        f"{cost['train_s']:.1f} s training, {cost['eval_s']:.1f} s evaluation, {cost['wall_s']:.1f} s in all; "
        f"peak memory {cost['peak_memory_mib']:,.0f} MiB"
    )
    if cost["skipped_steps"]:
        lines.append(f"{cost['skipped_steps']:,} steps were not taken: a loss or an update was not finite")
    if folder is not None:
        lines.append(f"run folder: {folder.path}")
    return "\n".join(lines)


def _list(request: Request) -> int:
    """The registries, without importing what is in them."""
    for plugin in request.plugins:
        load_plugin(plugin)
    kinds = {"models": "model", "datasets": "dataset", "backbones": "backbone", "optimizers": "optimizer"}
    wanted = request.listing.replace("-", "_") if request.listing else ""
    if wanted and wanted not in kinds:
        raise UsageError(f"--list {wanted}: there is no such registry. {nearest(wanted, list(kinds))}")
    if wanted == "optimizers":
        print(_optimizer_table())
        return OK
    for plural, kind in kinds.items():
        if wanted in ("", plural):
            print(f"{plural}:")
            for name in SELECTORS[kind].names():
                print(f"  {name:18} {SELECTORS[kind].summary(name)}")
    return OK


def _optimizer_table() -> str:
    """Each optimizer's costs beside its paper, as its file states them."""
    registry = SELECTORS["optimizer"]
    rows = [("name", "passes a step", "extra memory", "paper")]
    for name in registry.names():
        rows.append((name, registry.note(name, "Passes"), registry.note(name, "Memory"), registry.summary(name)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["optimizers:"]
    lines += ["  " + "  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows]
    lines.append("\nP: one number for each parameter. A backward pass takes about as long as two forward passes.")
    return "\n".join(lines)


def _help(request: Request) -> int:
    """The engine's flags; those of a pair too when --model and --dataset are given."""
    for plugin in request.plugins:
        load_plugin(plugin)
    chosen = {}
    for kind, registry in SELECTORS.items():
        words = request.words.get(kind)
        chosen[kind] = registry.load(words[0]) if words else None
    if chosen["dataset"] and not chosen["backbone"]:
        chosen["backbone"] = SELECTORS["backbone"].load(chosen["dataset"].default_backbone)
    if chosen["model"] and not chosen["optimizer"]:
        chosen["optimizer"] = SELECTORS["optimizer"].load(chosen["model"].default_optimizer)
    print("usage: python main.py --model M --dataset D [--flag value ...]\n")
    print("  --list [models|datasets|backbones|optimizers]   print what can be chosen")
    print("  --model M --dataset D --help                    print the flags of that pair")
    print("  --plugin FILE                                   add names from a file (repeatable)")
    print("  --from RUN                                      repeat a run; further flags override its values")
    print("  --resume RUN                                    continue a run that was stopped")
    owner = None
    for flag in schema(chosen).values():
        if flag.owner != owner:
            owner = flag.owner
            print(f"\nflags of the {owner}:")
        limits = f" [{'|'.join(flag.choices)}]" if flag.choices else ""
        default = chosen["dataset"].defaults.get(flag.name, flag.default) if chosen["dataset"] else flag.default
        shown = "" if default is None or default == "" or default == () else f" (default {_written(default)})"
        print(f"  --{flag.name:20} {flag.help.replace('%%', '%')}{limits}{shown}")
    return OK
