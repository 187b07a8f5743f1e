"""A whole run, new or gone on with: open its folder, build, train, write how it ended. Knows no command line."""

import os
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from flatcl.utils import launch
from flatcl.utils.arguments import Config
from flatcl.utils.console import again, complain, reason, say
from flatcl.utils.engine import checkpoint, predictions, ranks, results, trackers
from flatcl.utils.engine.board import entries
from flatcl.utils.engine.build import build, computing, resolve_device
from flatcl.utils.engine.callbacks import Callbacks
from flatcl.utils.engine.layout import has_convolutions
from flatcl.utils.engine.lock import Busy
from flatcl.utils.engine.logs import Logs
from flatcl.utils.engine.ranks import Ranks
from flatcl.utils.engine.results import RunFolder
from flatcl.utils.engine.texts import closing_table, describe
from flatcl.utils.engine.trainer import SignalWatch, Trainer
from flatcl.utils.errors import Diverged, Interrupted, RunFailed, UsageError
from flatcl.utils.files import read_json
from flatcl.utils.identity import DATA, data_of
from flatcl.utils.optim._driver import batchnorms
from flatcl.utils.protocols import Benchmark
from flatcl.utils.saved import Parent, read_saved

WEIGHTS = "model.pt"  # in the run folder: the weights alone, of --keep_checkpoint 0


def train(config: Config, callbacks: Callbacks | None = None) -> Trainer:
    """One whole run, from an empty network. Raises `Interrupted`, `RunFailed`, `UsageError`."""
    ranks.check(config)
    trackers.check(config)
    device = resolve_device(config.device)
    state = _state_of(config.continues)
    with computing(config, device), ranks.joined(device, config) as group, _new_folder(config, group) as folder:
        try:
            trainer = build(config, device, folder, group, is_new=state is None)
            _take_over(trainer, state)
            _begin(trainer)
        except BaseException:
            if folder is not None:
                folder.remove()
            raise
        say(describe(config))
        _hint_at_threads(trainer)
        return _train(trainer, callbacks or Callbacks())


def resume(
    config: Config, path: Path, changed_files: Sequence[str] = (), callbacks: Callbacks | None = None,
    keep_changed: bool = False,
) -> Trainer | None:  # fmt: skip
    """Goes on with the run of this configuration in the folder `path`. Of a finished one, draws and logs what is
    missing, and returns None. `changed_files`: those whose code is no longer what the run was made with.
    `keep_changed`: its images may have changed, too."""
    device = resolve_device(config.device)
    ranks.check(config, is_new=False)
    is_finished, is_first = is_done(path), launch.number() == 0
    if not is_finished:
        trackers.check(config)
    folder = RunFolder(path) if is_first else None
    holding = nullcontext() if folder is None else folder.held()
    with computing(config, device), ranks.joined(device, config) as group, holding:
        if is_finished and folder is not None:
            _settle_checkpoint(path, config.keep_checkpoint)
            _complete(config, folder)
        if is_finished:
            return None
        if group is not None and not is_first:
            group.wait()  # until what rank 0 mends is mended
        state = None if has_nothing(path) else checkpoint.load(path / "checkpoint", config.hash, repair=is_first)
        if is_first and group is not None:
            group.wait()
        parents = _state_of(config.continues) if state is None else None
        trainer = build(config, device, folder, group, is_new=state is None and parents is None)
        has_other_images = False
        if state is None:
            trainer.begin_anew()
            _take_over(trainer, parents)
        else:
            has_other_images = not _check_images(trainer.benchmark, path, keep_changed)
            with fitting(path):
                trainer.load_checkpoint(state)
        if group is not None:
            group.wait()  # until all have read what rank 0 will write anew
        if (changed_files or has_other_images) and folder is not None:
            folder.note_changed_code(trainer.cost.steps, {**config.code, **data_of(trainer.benchmark)})
        _begin(trainer, is_new=state is None)
        say(describe(config).splitlines()[0])
        say(f"resumed after step {trainer.cost.steps}, {len(trainer.progress.tasks)} task(s) finished")
        _say_fewer_threads(config.threads)
        return _train(trainer, callbacks or Callbacks())


def unfinished(config: Config, keep_changed: bool) -> Path | None:
    """The folder of the newest run of this configuration that can go on, or that is finished."""
    for path in RunFolder.of(config):
        try:
            saved = read_saved(str(path))
            changed = saved.differs_from(config)
            if changed and not keep_changed:
                say(
                    f"note: {path} was made by other code or data ({', '.join(changed)} changed since): it is not "
                    "continued"
                )
                continue
            if not is_done(path) and not has_nothing(path):
                checkpoint.load(path / "checkpoint", config.hash)
            return path
        except UsageError as error:
            say(f"note: not continued: {error}")
    return None


def has_nothing(path: Path) -> bool:
    """Whether a run was stopped before its first checkpoint: it begins anew."""
    return not checkpoint.exists(path / "checkpoint") and not (path / "accuracy.json").exists()


def _hint_at_threads(trainer: Trainer) -> None:
    """One is the default, so that a run's numbers do not depend on the machine's cores; large networks are slow so."""
    config, cores = trainer.config, os.cpu_count() or 1
    is_default = config.origins["threads"] == "default" and cores > config.threads
    if trainer.device.type == "cpu" and is_default and has_convolutions(trainer.method):
        say(
            f"note: this run uses {config.threads} of {cores} CPU threads for its convolutions; --threads {cores} is "
            "faster, but it is a different run: sums differ in the last digits"
        )


def _say_fewer_threads(threads: int) -> None:
    """A run that was begun on a larger machine."""
    cores = os.cpu_count() or 1
    if threads > cores:
        say(
            f"note: this run has {threads} CPU threads, and this machine {cores} core(s): it goes on with {cores}; "
            "sums differ in the last digits"
        )


def _take_over(trainer: Trainer, state: dict | None) -> None:
    """What the run that this one continues has left, if it continues one."""
    if state is not None:
        parent = trainer.config.continues
        with fitting(parent.run):
            trainer.continue_from(state, same_optimizer=parent.optimizer == trainer.config.optimizer)
        then = {name: digest for name, digest in (parent.code or {}).items() if name.startswith(DATA)}
        if parent.code is not None and then != data_of(trainer.benchmark):
            complain(f"note: {parent.run} was made with other data of {trainer.benchmark.name}")


def _state_of(parent: Parent | None) -> dict | None:
    """What a run that is to be continued has left."""
    if parent is None:
        return None
    folder = Path(parent.run) / "checkpoint"
    if not checkpoint.exists(folder):
        raise UsageError(
            f"--continue: {parent.run} has no checkpoint to continue from. Run it with --keep_checkpoint 1."
        )
    state = checkpoint.load(folder, parent.config_hash)
    check_end(Path(parent.run), state)
    if state["stream"] is not None or len(state["progress"]["tasks"]) != parent.tasks:
        raise UsageError(
            f"--continue: {parent.run} was stopped inside a task, or was continued since then. Finish it by --resume."
        )
    return state


def check_end(path: Path, state: dict) -> None:
    """Raises `UsageError` where the run in this folder is finished, but `state`, its checkpoint, is of before its
    end, which could not be written."""
    if not is_done(path):
        return
    try:
        rows = len(read_json(path / "accuracy.json")["tasks"])
    except (OSError, ValueError, KeyError, TypeError):  # without a matrix, there is nothing to compare with
        return
    done = len(state["progress"]["tasks"])
    if done < rows:
        raise UsageError(
            f"{path}: this run is finished, with {rows} task(s), but its checkpoint is of after {done}: the weights of "
            "the end could not be written. Its results are complete; repeat it with --from to get the weights."
        )


@contextmanager
def fitting(folder: Path | str) -> Iterator[None]:
    """Inside, what a run folder has is loaded; what another version has saved can fail to in many ways."""
    try:
        yield
    except Exception as error:
        raise UsageError(
            f"the checkpoint of {folder} does not match this program's network or method ({reason(error)}). Use the "
            "version that wrote it, or start a new run with --from."
        ) from error


@contextmanager
def _new_folder(config: Config, group: Ranks | None) -> Iterator[RunFolder | None]:
    """A run folder whose lock says, inside, that the run is alive; None for a run that writes nothing, and for all
    processes of a run but the first."""
    is_silent = config.disable_log or (group is not None and group.number > 0)
    folder = None if is_silent else RunFolder.create(config)
    try:
        yield folder
    finally:
        if folder is not None:
            folder.lock.release()


def _begin(trainer: Trainer, is_new: bool = True) -> None:
    """The first files of a run, its first checkpoint among them, so that it can be resumed whenever it is stopped.
    Refuses to train where they cannot be written: the results could not be either."""
    folder, steps = trainer.folder, trainer.cost.steps
    if folder is None:
        return
    try:
        before = folder.note_environment(results.environment(str(trainer.device)), None if is_new else steps)
        _write_decided(trainer.benchmark, folder)
        if is_new:
            folder.note_data(data_of(trainer.benchmark))
            trainer.save_checkpoint()
    except OSError as error:
        raise UsageError(f"{folder.path}: cannot write there ({reason(error)}). Nothing was trained.") from None
    then, now = before.get("processes"), launch.size()
    if then not in (None, now) and batchnorms(trainer.method) and not trainer.config.sync_bn:
        say(
            f"note: this run had {then} process(es) and now has {now}: BatchNorm normalises over the rows of one "
            "process, which are others now"
        )


def _check_images(benchmark: Benchmark, path: Path, keep_changed: bool) -> bool:
    """Whether the images are those that the run was begun with; raises `UsageError` where they are not, unless
    `keep_changed`."""
    try:
        then = read_json(path / "benchmark.json").get("pixels")
    except (OSError, ValueError, AttributeError):
        return True
    now = _decided(benchmark).get("pixels")
    is_unknown = then is None and benchmark.unofficial is None  # a version, or a benchmark, that did not write it down
    if now == then or is_unknown:
        return True
    digests = f"({then or 'official, or not noted'}) than there are now ({now or 'official'})"
    problem = f"{path} was begun with other images of {benchmark.name} {digests}"
    if not keep_changed:
        raise UsageError(
            f"{problem}: files were changed, or are decoded by another version of Pillow. Put the images of that time "
            "back, or give --keep_changed 1 to go on with the present ones, or start a new run with --from."
        )
    complain(f"note: {problem}: it goes on with the present ones")
    return False


def _decided(benchmark: Benchmark) -> dict[str, Any]:
    return benchmark.decided() | ({} if benchmark.unofficial is None else {"pixels": benchmark.unofficial})


def _write_decided(benchmark: Benchmark, folder: RunFolder) -> None:
    """benchmark.json. Raises `OSError`, and `UsageError` for a benchmark that hands over something else."""
    try:
        folder.write("benchmark.json", _decided(benchmark))
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{benchmark.name}: decided must return a dict that can be written as JSON, got one that cannot "
            f"({error}). Convert its values to numbers, lists and texts, e.g. by .tolist()."
        ) from None


def _train(trainer: Trainer, callbacks: Callbacks) -> Trainer:
    """Runs a trainer to its end and writes how it ended, whatever that is."""
    folder, trainer.callbacks = trainer.folder, callbacks
    status: str | None = "crashed"
    callbacks.trainer = trainer
    programs = trainer.optimizer.programs
    if programs is not None:
        programs.copies_losses = bool(callbacks.given)
    with SignalWatch(trainer):
        try:
            trainer.logs.begin()
            summary = trainer.run()
            made = _make_last(trainer)
            status = "finished"
            _finish(trainer, summary, made)
            return trainer
        except Interrupted:
            status = "interrupted"
            where = f" Continue with: {again(folder.path)}" if folder else ""
            if launch.number() == 0:
                complain(f"interrupted at step {trainer.cost.steps}{_since(trainer)}.{where}")
            raise
        except Busy as error:
            status = None  # the folder is another process's
            raise RunFailed(str(error)) from None
        except ranks.Lost as error:
            status = "interrupted"
            where = f" Continue with: {again(folder.path)}" if folder else ""
            raise RunFailed(f"{error}{where}") from None
        except Diverged:
            status = "diverged"
            raise
        except KeyboardInterrupt:
            status = "interrupted" if status == "crashed" else status
            raise
        finally:
            trainer.status = status or "running"
            if folder is not None and status is not None and status != "finished" and folder.path.is_dir():
                _write_status(trainer, folder, status)
            trainer.logs.close(trainer.status)
            if programs is not None:
                programs.drop()  # a run that is kept needs their memory no more


def _since(trainer: Trainer) -> str:
    """What the steps of a run that has ended outside a step have come to."""
    if trainer.folder is None or trainer.cost.steps == trainer.saved[0]:
        return ""
    return f", with the checkpoint of step {trainer.saved[0]}: what came after it is done again"


def _write_status(trainer: Trainer, folder: RunFolder, status: str) -> None:
    """How a run ended that did not finish; what stops that is said, and does not stand in the way of its error."""
    try:
        if trainer.progress.tasks:
            trainer.write_results(status)
        else:
            folder.write("summary.json", trainer.summary(status), durable=True)
    except (OSError, Busy) as error:
        complain(f"warning: the status of the run ({status}) cannot be written into its folder ({reason(error)})")


Made = tuple[str | None, np.ndarray | None]  # what is lost of the weights, the confusion matrix


def _make_last(trainer: Trainer) -> Made:
    """What is made of the last network, before the run is called finished: one that is killed meanwhile goes on from
    its checkpoint, and makes all of it."""
    folder = trainer.folder
    if folder is None:
        return None, None
    folder.lock.check()
    unsaved = _keep_network(trainer, folder.path)
    return unsaved, _save_predictions(trainer, folder.path) if trainer.config.save_predictions else None


def _finish(trainer: Trainer, summary: dict, made: Made) -> None:
    """The result, which says that the run is finished, then everything that could go wrong."""
    folder, logs, tasks = trainer.folder, trainer.logs, trainer.progress.tasks
    (unsaved, counts), unwritten = made, None
    if folder is not None:
        try:
            trainer.write_results("finished")
        except OSError as error:
            unwritten = error
        else:
            if unsaved is not None:
                complain(unsaved)
            _settle_checkpoint(folder.path, trainer.config.keep_checkpoint)
            if counts is not None:
                _draw(lambda: logs.confusion(counts))
            _draw(lambda: logs.finish(summary, tasks, trainer.joint))
    say(closing_table(summary, tasks, folder))
    if trainer.optimizer.programs is not None:
        say(str(trainer.optimizer.programs))
    if folder is not None and unwritten is not None:
        raise RunFailed(
            f"the results cannot be written to {folder.path} ({reason(unwritten)}): they are only on the console. "
            f"Correct this, then: {again(folder.path)}"
        )


def _keep_network(trainer: Trainer, path: Path) -> str | None:
    """The weights alone, as --keep_checkpoint 0 asks for; else, or where they cannot be written, the last checkpoint,
    once more if it could not be written. Returns what is lost."""
    if not trainer.config.keep_checkpoint:
        state = trainer.method.state_dict()
        weights = {name: value.cpu() for name, value in state.items() if not name.endswith("_extra_state")}
        try:
            checkpoint.save_weights(path / WEIGHTS, weights)
            return None
        except OSError as error:
            complain(f"warning: {WEIGHTS} cannot be written ({reason(error)}): the checkpoint is kept in its place")
    if trainer.saved == trainer.reached:
        return None
    try:
        checkpoint.keep_last(path / "checkpoint")  # room on a full disk
        trainer.save_checkpoint()
        return None
    except OSError as error:
        return (
            f"warning: the weights of the end of the run are lost, since they cannot be written ({reason(error)}): the "
            "checkpoint that is kept is of before its end. The results are complete; to get the weights, repeat the "
            "run with --from"
        )


def _save_predictions(trainer: Trainer, path: Path) -> np.ndarray | None:
    """predictions.npz; returns the confusion matrix, None where the predictions cannot be made."""
    try:
        found = {name: column.numpy() for name, column in trainer.evaluate.predictions(trainer.method).items()}
        counts = _confusion(found, trainer.config, trainer.benchmark.decided(), len(trainer.progress.tasks))
    except Exception as error:  # such as a lack of memory: not worth a result
        complain(f"warning: {predictions.FILE} cannot be made ({type(error).__name__}: {reason(error)})")
        return None
    try:
        predictions.save(path, found)
    except OSError as error:
        complain(f"warning: {predictions.FILE} cannot be written ({reason(error)})")
    return counts


def _confusion(found: dict[str, np.ndarray], config: Any, decided: dict[str, Any], num_tasks: int) -> np.ndarray:
    competing = predictions.num_competing(config, decided, num_tasks)
    return predictions.confusion_matrix(found, decided["class_order"], competing)


def _draw(draw: Callable[[], object]) -> None:
    """A picture is not worth a result."""
    try:
        draw()
    except Exception as error:
        complain(
            f"warning: the pictures could not be drawn ({type(error).__name__}: {reason(error)}); the results are "
            "complete, and --resume draws what is missing"
        )


def _settle_checkpoint(path: Path, keep: bool) -> None:
    """What stays of the checkpoints of a run that is finished: the last one, or the weights alone."""
    try:
        if keep or not (path / WEIGHTS).is_file():
            checkpoint.keep_last(path / "checkpoint")
        else:
            checkpoint.remove(path / "checkpoint")
    except OSError as error:
        complain(f"warning: the checkpoint is left as it is ({reason(error)})")


def _complete(config: Config, folder: RunFolder) -> None:
    """What is missing of a finished run's pictures and of TensorBoard's last entries."""
    try:
        summary, progress = (read_json(folder.path / name) for name in ("summary.json", "accuracy.json"))
        logs = Logs(config, folder, None)
        joint, there = config.joint or config.learner.trains_jointly, entries(folder.path)
        done = logs.finish(summary, progress["tasks"], joint, there)
        done += _complete_confusion(config, folder.path, logs, there, len(progress["tasks"]))
        logs.close()
    except Exception as error:
        raise UsageError(
            f"{folder.path}: this run is finished, but its pictures cannot be drawn from its summary.json and "
            f"accuracy.json ({type(error).__name__}: {reason(error)}). Use --from to repeat it."
        ) from error
    what = f"what was missing is written: {', '.join(done)}" if done else "no file is missing"
    say(f"{folder.path}: this run is finished; {what}. Use --from to repeat it, or to change its flags.")


def _complete_confusion(config: Config, path: Path, logs: Logs, there: Set[str], num_tasks: int) -> list[str]:
    """The picture of the confusion matrix, where it is missing and the predictions are there."""
    found = predictions.load(path) if config.save_predictions else None
    if found is None or {"confusion_matrix", "confusion_matrix.png"} <= there:
        return []
    logs.confusion(_confusion(found, config, read_json(path / "benchmark.json"), num_tasks))
    return ["confusion_matrix.png"]


def is_done(path: Path) -> bool:
    """Whether the run in this folder is finished."""
    try:
        return read_json(path / "summary.json")["status"] == "finished"
    except (OSError, ValueError, KeyError, TypeError):
        return False
