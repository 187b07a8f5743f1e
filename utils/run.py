"""argv in, run folder out. One way: resolve, open the folder, seed, build, train, summarize."""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils import launch
from utils.arguments import (
    MANY_TASKS,
    SELECTORS,
    Config,
    EngineArgs,
    Request,
    flags_of,
    resolve_request,
    schema,
)
from utils.console import complain, guarded, reason, say, silence
from utils.errors import RunFailed, UsageError
from utils.files import read_json
from utils.registry import load_plugin, nearest
from utils.saved import Parent, check_code, read_saved

OK, FAILED, USAGE, BUSY, INTERRUPTED = 0, 1, 2, 75, 130
PATIENCE_S = 10.0  # torchrun ends all processes of a run when one has ended


def main(argv: list[str]) -> int:
    """Runs a command line; returns the exit code: 0 finished, 1 failed, 2 bad input, 75 `--resume auto` of what another
    process is at, 128 + signal for what a signal has ended."""
    with guarded():
        is_first = launch.number() == 0
        if not is_first:  # rank 0 speaks for all
            silence("stdout")
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning if is_first else lambda *args, **kwargs: None
                return _main(argv)
        except UsageError as error:
            if not is_first:  # rank 0 has said it, and this process is ended meanwhile, unless it is not rank 0's error
                time.sleep(PATIENCE_S)
            for problem in error.problems:
                complain(f"error{'' if is_first else f' (rank {launch.number()})'}: {problem}")
            return USAGE
        except RunFailed as error:
            complain(f"failed: {error}")
            return FAILED
        except KeyboardInterrupt:
            complain("interrupted")
            return INTERRUPTED


def _show_warning(message, *_where) -> None:
    complain(f"warning: {message}")


def _main(argv: list[str]) -> int:
    request = Request.parse(argv)
    if request.listing is not None:
        return _shown(_list, request)
    if request.wants_help:
        return _shown(_help, request)
    if request.resume == "auto":
        if launch.size() > 1:
            raise UsageError("--resume auto is for one process: several cannot agree what to do. Use --resume RUN.")
        return _resume_auto(request)
    if request.resume is not None:
        return _resume(request)
    config = resolve_request(request)
    if config.dry_run:
        return _shown(_describe, config)
    return train(config)


def _shown(show: Callable[[Any], int], what: Any) -> int:
    """Of a command that only prints: it has failed where that is not possible."""
    try:
        code = show(what)
        print(end="", flush=True)
        return code
    except BrokenPipeError:  # whoever read our output has enough of it (`| head`)
        silence("stdout")
        return FAILED
    except OSError as error:
        silence("stdout")
        raise RunFailed(f"the output cannot be written ({reason(error)}).") from None


def train(config: Config) -> int:
    """One whole run, from an empty network."""
    from utils import ranks

    ranks.check(config)
    device = resolve_device(config.device)
    state = _state_of(config.continues)
    with computing(config, device), ranks.joined(device, config) as group, _new_folder(config, group) as folder:
        try:
            trainer = build(config, device, folder, group)
            _take_over(trainer, state)
            _begin(trainer)
        except BaseException:
            if folder is not None:
                folder.remove()
            raise
        say(describe(config))
        _hint_at_threads(trainer)
        return _train(trainer)


def _hint_at_threads(trainer) -> None:
    """One is the default, so that a run's numbers do not depend on the machine's cores; large networks are slow so."""
    from utils.layout import has_convolutions

    config, cores = trainer.config, os.cpu_count() or 1
    is_default = config.origins["threads"] == "default" and cores > config.threads
    if trainer.device.type == "cpu" and is_default and has_convolutions(trainer.method):
        say(
            f"note: convolutions on {config.threads} CPU thread of {cores}; --threads {cores} is faster, and another "
            "run: sums differ in the last digits"
        )


def _take_over(trainer, state: dict | None) -> None:
    """What the run that this one continues has left, if it continues one."""
    if state is not None:
        parent = trainer.config.continues
        with _fitting(parent.run):
            trainer.continue_from(state, same_optimizer=parent.optimizer == trainer.config.optimizer)


def _state_of(parent: Parent | None) -> dict | None:
    """What a run that is to be continued has left."""
    from utils import checkpoint

    if parent is None:
        return None
    folder = Path(parent.run) / "checkpoint"
    if not checkpoint.exists(folder):
        raise UsageError(f"--continue: {parent.run} has no checkpoint to go on from. Run it with --keep_checkpoint 1.")
    state = checkpoint.load(folder, parent.config_hash)
    if state["stream"] is not None or len(state["progress"]["tasks"]) != parent.tasks:
        raise UsageError(
            f"--continue: {parent.run} was stopped inside a task, or has gone on since. Finish it by --resume."
        )
    return state


@contextmanager
def _fitting(folder) -> Iterator[None]:
    """What another version has saved can fail to load in many ways."""
    try:
        yield
    except Exception as error:
        raise UsageError(
            f"{folder}/checkpoint does not fit this program's network or method ({reason(error)}). Use the version "
            "that wrote it, or start a new run with --from."
        ) from error


@contextmanager
def _new_folder(config: Config, group) -> Iterator:
    """A run folder whose lock says, inside, that the run is alive; None for a run that writes nothing, and for all
    processes of a run but the first."""
    from utils.results import RunFolder

    is_silent = config.disable_log or (group is not None and group.number > 0)
    folder = None if is_silent else RunFolder.create(config)
    try:
        yield folder
    finally:
        if folder is not None:
            folder.lock.release()


def _begin(trainer, is_new: bool = True) -> None:
    """The first files of a run, its first checkpoint among them, so that it can be resumed whenever it is stopped.
    Refuses to train where they cannot be written: the results could not be either."""
    from utils import results

    folder = trainer.folder
    if folder is None:
        return
    try:
        folder.write("environment.json", results.environment(str(trainer.device)))
        _write_decided(trainer.benchmark, folder)
        if is_new:
            trainer.save_checkpoint()
    except OSError as error:
        raise UsageError(f"{folder.path}: cannot write there ({reason(error)}). Nothing was trained.") from None


@contextmanager
def computing(config: Config, device) -> Iterator[None]:
    """Inside, torch computes as this run wants it to: with its number of threads, and, where steps are recorded on a
    GPU, with convolutions whose kernels are chosen by measurement. Other runs of the process are not touched."""
    import torch

    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    is_chosen = cudnn.benchmark
    torch.set_num_threads(config.threads)
    cudnn.benchmark = is_chosen or (device.type == "cuda" and config.cuda_graph != "0")
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)
        cudnn.benchmark = is_chosen


def build(config: Config, device, folder, group=None):
    """Benchmark, network, method, optimizer: each built once. Returns the trainer. `group`: the processes that train
    this run, if there are several."""
    import torch

    from models._method import Context
    from utils import ranks, seeding
    from utils.augment import Augment
    from utils.augment_check import look_at, pipeline
    from utils.layout import lay_out, wants_channels_last
    from utils.registry import BACKBONES, OPTIMIZERS
    from utils.trainer import Trainer

    benchmark = config.benchmark(config, "cpu")
    benchmark.check_tasks()
    _place(benchmark, config.data_device, device)
    seeding.seed_everything(config.seed)
    augment = Augment(pipeline(benchmark) if config.augmentation else [], benchmark.mean, benchmark.std, device)
    look_at(augment, benchmark)
    backbone = BACKBONES.load(config.backbone)
    net = backbone(benchmark.shape, benchmark.num_classes, config.view(backbone))
    if config.sync_bn and group is not None:
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    channels_last = wants_channels_last(config.channels_last, net, benchmark.shape, device)
    context = Context(benchmark, augment, device, seeding.generator(config.seed, "buffer"), config)
    method = config.learner(net, config.view(config.learner), context).to(device)
    method.amp = torch.bfloat16 if config.amp == "bf16" else None
    method.channels_last = channels_last
    lay_out(method, channels_last)
    if group is not None:
        method.ranks = group
        ranks.check_network(method)
    optimizer_type = OPTIMIZERS.load(config.optimizer)
    optimizer = optimizer_type(
        method, config.lr, config.optim_wd, config.view(optimizer_type), seeding.generator(config.seed, "optimizer")
    )
    if not optimizer.params:
        raise UsageError(
            f"--backbone {config.backbone} leaves --model {config.model} nothing to train: each of its parameters has "
            "requires_grad False. Leave some of them to be trained."
        )
    if group is None:
        _record_steps(config.cuda_graph, method, optimizer, device)
    return Trainer(config, benchmark, method, optimizer, augment, folder)


def _record_steps(wish: str, method, optimizer, device) -> None:
    """From now on the optimizer's steps are recorded and replayed, if that is wished for and possible."""
    from utils import program

    recorder = program.recorder(device) if wish != "0" else None
    if wish == "1" and recorder is None:
        raise UsageError(f"--cuda_graph 1 needs a CUDA device, this run is on {device}. Use auto or 0.")
    if recorder is not None:
        optimizer.programs = program.Programs(method, optimizer, recorder)
        if wish == "1":
            optimizer.programs.check()


def _write_decided(benchmark, folder) -> None:
    """benchmark.json. Raises `OSError`, and `UsageError` for a benchmark that hands over something else."""
    decided = benchmark.decided()
    try:
        folder.write("benchmark.json", decided)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{benchmark.name}: decided must return a dict of what JSON can hold, got one that it cannot ({error}). "
            "Make plain numbers, lists and texts of it, as by .tolist()."
        ) from None


def _train(trainer) -> int:
    """Runs a trainer to its end and writes how it ended, whatever that is."""
    from utils import ranks
    from utils.lock import Busy
    from utils.trainer import Interrupted, SignalWatch

    folder, status = trainer.folder, "crashed"
    with SignalWatch(trainer):
        try:
            summary = trainer.run()
            status = "finished"
            return _finish(trainer, summary)
        except Interrupted as stop:
            status = "interrupted"
            where = f" Continue with: python main.py --resume {folder.path}" if folder else ""
            if launch.number() == 0:
                complain(f"interrupted at step {trainer.cost.steps}.{where}")
            return 128 + stop.args[0]
        except Busy as error:
            status = None  # the folder is another process's
            raise RunFailed(str(error)) from None
        except ranks.Lost as error:
            status = "interrupted"
            where = f" Continue with: torchrun ... main.py --resume {folder.path}" if folder else ""
            raise RunFailed(f"{error}{where}") from None
        except RunFailed:
            status = "diverged" if status == "crashed" else status
            raise
        except KeyboardInterrupt:
            status = "interrupted" if status == "crashed" else status
            raise
        finally:
            if folder is not None and status not in ("finished", None) and folder.path.is_dir():
                _write_status(trainer, status)
            trainer.logs.close()


def _write_status(trainer, status: str) -> None:
    """How a run ended that did not finish."""
    try:
        if trainer.progress.tasks:
            trainer.write_results(status)
        else:
            trainer.folder.write("summary.json", trainer.summary(status), durable=True)
    except OSError as error:
        complain(f"warning: that the run is {status} cannot be written into its folder ({reason(error)})")


def _finish(trainer, summary: dict) -> int:
    """The result first, then everything that could go wrong."""
    folder, logs, tasks = trainer.folder, trainer.logs, trainer.progress.tasks
    unwritten = None
    if folder is not None:
        try:
            trainer.write_results("finished")
        except OSError as error:
            unwritten = error
        else:
            _settle_checkpoint(trainer)
            _draw(lambda: logs.finish(summary, tasks, trainer.joint))
    say(closing_table(summary, tasks, folder))
    if trainer.optimizer.programs is not None:
        say(str(trainer.optimizer.programs))
    if unwritten is not None:
        raise RunFailed(
            f"the results cannot be written to {folder.path} ({reason(unwritten)}): they stand only on the console. "
            f"Mend that, then: python main.py --resume {folder.path}"
        )
    return OK


def _draw(draw):
    """A picture is not worth a result."""
    try:
        return draw()
    except Exception as error:
        complain(
            f"warning: the pictures could not be drawn ({type(error).__name__}: {reason(error)}); the results are "
            "complete, and --resume draws what is missing"
        )


def _settle_checkpoint(trainer) -> None:
    """What stays of the checkpoints of a run that is finished: the last one, or the weights alone."""
    from utils import checkpoint

    path = trainer.folder.path
    try:
        if trainer.config.keep_checkpoint:
            checkpoint.keep_last(path / "checkpoint")
            return
        state = trainer.method.state_dict()
        weights = {name: value.cpu() for name, value in state.items() if not name.endswith("_extra_state")}
        checkpoint.save_weights(path / "model.pt", weights)
        checkpoint.remove(path / "checkpoint")
    except OSError as error:
        complain(f"warning: the checkpoint is left as it is ({reason(error)})")


def _resume_auto(request: Request) -> int:
    """Goes on with the newest unfinished run of this configuration, or starts it: what a job that is requeued needs.
    Where the newest one is finished, nothing is left to be done. 75 where another process is at it: try again."""
    from utils.lock import Busy
    from utils.results import RunFolder

    config = resolve_request(replace(request, resume=None))
    if config.dry_run:
        return _shown(_describe, config)
    if config.disable_log:
        raise UsageError("--resume auto looks for run folders, --disable_log writes none. Drop one of them.")
    try:
        with RunFolder.claimed(config):
            path = _unfinished(config, request.keep_changed)
            if path is None:
                return train(config)
            if _status(path) == "finished":
                say(f"already finished: {path}")
                return OK
            words = {name: words for name, words in request.words.items() if name in _without_result()}
            return _resume(Request(words, request.plugins, resume=str(path), keep_changed=request.keep_changed))
    except Busy as error:
        complain(f"error: {error}")
        return BUSY


def _unfinished(config: Config, keep_changed: bool) -> Path | None:
    """The folder of the newest run of this configuration that can go on, or that is finished."""
    from utils import checkpoint
    from utils.results import RunFolder

    for path in RunFolder.of(config):
        try:
            saved = read_saved(str(path))
            changed = saved.differs_from(config)
            if changed and not keep_changed:
                say(f"note: {path} was made by other code ({', '.join(changed)} changed since): left alone")
                continue
            if _status(path) != "finished" and not _has_nothing(path):
                checkpoint.load(path / "checkpoint", config.hash)
            return path
        except UsageError as error:
            say(f"note: left alone: {error}")
    return None


def _has_nothing(path: Path) -> bool:
    """Whether a run was stopped before its first checkpoint: it begins anew."""
    from utils import checkpoint

    return not checkpoint.exists(path / "checkpoint") and not (path / "accuracy.json").exists()


def _without_result() -> set[str]:
    """Flags that may differ when a run goes on."""
    flags = flags_of(EngineArgs, "engine")
    return {name for name, flag in flags.items() if not flag.result} - {"results_path", "disable_log"}


def _resume(request: Request) -> int:
    """Goes on with a run. Of a finished one, draws and logs what is missing; 0 too where that is nothing."""
    from utils import checkpoint, ranks
    from utils.results import RunFolder

    saved = read_saved(request.resume)
    path = saved.folder
    changed = [name for name in request.words if name not in _without_result()]
    if changed:
        raise UsageError(
            f"--resume continues a run as it was: --{', --'.join(changed)} cannot be changed. "
            "Use --from to start a new run with other values."
        )
    config = resolve_request(replace(request, source=str(saved.file), resume=None))
    changed_files = [] if _status(path) == "finished" else check_code(saved, config, request.keep_changed)
    if config.dry_run:
        return _shown(_describe, config)
    device = resolve_device(config.device)
    ranks.check(config, is_new=False)
    is_finished, is_first = _status(path) == "finished", launch.number() == 0
    folder = RunFolder(path) if is_first else None
    holding = folder.held() if is_first else nullcontext()
    with computing(config, device), ranks.joined(device, config) as group, holding:
        if is_finished and is_first:
            checkpoint.keep_last(path / "checkpoint")
            return _complete(config, folder)
        if is_finished:
            return OK
        if not is_first:
            group.wait()  # until what rank 0 mends is mended
        state = None if _has_nothing(path) else checkpoint.load(path / "checkpoint", config.hash, mend=is_first)
        if is_first and group is not None:
            group.wait()
        parents = _state_of(config.continues) if state is None else None
        trainer = build(config, device, folder, group)
        if state is None:
            trainer.begin_anew()
            _take_over(trainer, parents)
        else:
            with _fitting(path):
                trainer.load_checkpoint(state)
        if group is not None:
            group.wait()  # until all have read what rank 0 will write anew
        if changed_files and is_first:
            folder.note_changed_code(trainer.cost.steps, config.code)
        _begin(trainer, is_new=state is None)
        say(describe(config).splitlines()[0])
        say(f"resumed after step {trainer.cost.steps}, {len(trainer.progress.tasks)} task(s) finished")
        return _train(trainer)


def _complete(config: Config, folder) -> int:
    """What is missing of a finished run's pictures and of TensorBoard's last entries."""
    from utils.logs import Logs, entries

    try:
        summary, progress = (read_json(folder.path / name) for name in ("summary.json", "accuracy.json"))
        logs = Logs(config, folder, None)
        joint = config.joint or config.learner.trains_jointly
        done = logs.finish(summary, progress["tasks"], joint, there=entries(folder.path))
        logs.close()
    except Exception as error:
        raise UsageError(
            f"{folder.path}: this run is finished, but its pictures cannot be drawn from its summary.json and "
            f"accuracy.json ({type(error).__name__}: {reason(error)}). Use --from to repeat it."
        ) from error
    what = f"what was missing is written: {', '.join(done)}" if done else "and nothing of it is missing"
    say(f"{folder.path}: this run is finished; {what}. Use --from to repeat it, or to change its flags.")
    return OK


def _status(path: Path) -> str | None:
    try:
        return read_json(path / "summary.json")["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def resolve_device(name: str):
    """torch.device of --device, with its index, as tensors name it; raises `UsageError` if it is not there."""
    import torch

    from utils import ranks

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=ranks.device_of(torch.device(name))).device
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


def _describe(config: Config) -> int:
    print(describe(config))
    return OK


def describe(config: Config) -> str:
    """Every flag that differs from its default, and where it came from; seed and rho always."""
    lines = [f"{config.model} on {config.dataset} ({config.benchmark.setting}), config {config.hash}"]
    if config.continues is not None:
        lines.append(f"  continues {config.continues.run} after {config.continues.tasks} task(s)")
    for name in sorted(config.values):
        if name == "n_epochs" and config.budget_rows is not None:
            continue
        is_default = config.origins[name] == "default" or (
            config.origins[name].startswith("from ") and config.values[name] == config.flags[name].default
        )
        if not is_default or name in ("seed", "rho"):
            lines.append(f"  {name:18} {_written(config.values[name]):14} {config.origins[name]}")
    if config.evaluated == "seen" and config.eval_tasks == "auto":
        lines.append(f"  {'eval_tasks':18} {'seen':14} auto, since there are more than {MANY_TASKS} tasks")
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
        unmeasured = name == "fwt_gem17" and summary["eval_tasks"] == "seen" and len(tasks) > 1
        note = "  not measured: only tasks seen are evaluated (--eval_tasks)" if unmeasured else ""
        lines.append(f"{name:30}" + "".join(cells) + note)
    cost = summary["cost"]
    peak = "not known" if cost["peak_memory_mib"] is None else f"{cost['peak_memory_mib']:,.0f} MiB"
    lines.append(
        f"\n{cost['steps']:,} steps, {cost['forward_rows']:,} rows forward, {cost['backward_rows']:,} rows backward; "
        f"{cost['train_s']:.1f} s training, {cost['eval_s']:.1f} s evaluation, {cost['wall_s']:.1f} s in all; "
        f"peak memory {peak}"
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
    print("  --resume auto                                   the newest unfinished run of these flags, or a new one")
    print("  --from RUN --continue 1 --stop_after N          go on from the end of a run: more tasks, other flags")
    print("  --keep_changed 1                                although the code of the run has changed since")
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
