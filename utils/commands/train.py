"""Train a method on a benchmark: `flatcl train --model mgser_sam --dataset seq-digits`, also `python main.py ...`."""

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flatcl.utils import launch
from flatcl.utils.arguments import SELECTORS, Config, EngineArgs, Request, flags_of, resolve_request, schema, written
from flatcl.utils.commands.list import show
from flatcl.utils.console import complain, guarded, program, say, shown, silence
from flatcl.utils.errors import Interrupted, RunFailed, UsageError
from flatcl.utils.registry import load_plugin
from flatcl.utils.saved import check_code, read_saved
from flatcl.utils.studies.engines import ALREADY

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
        return shown(lambda: show(request.listing, request.plugins))
    if request.wants_help:
        return shown(lambda: _help(request))
    if request.resume == "auto":
        if launch.size() > 1:
            raise UsageError("--resume auto is for one process: several cannot agree what to do. Use --resume RUN.")
        return _resume_auto(request)
    if request.resume is not None:
        return _resume(request)
    config = resolve_request(request)
    if config.dry_run:
        return shown(lambda: _describe(config))
    from flatcl.utils.engine import run

    return _run(lambda: run.train(config))


def _run(start: Callable[[], Any]) -> int:
    """A run, to its end or until a signal stops it."""
    try:
        start()
        return OK
    except Interrupted as stop:
        return 128 + stop.args[0]


def _resume(request: Request) -> int:
    """Goes on with a run as it was; of a finished one, draws what is missing."""
    from flatcl.utils.engine import run

    saved = read_saved(request.resume)
    changed = [name for name in request.words if name not in _without_result()]
    if changed:
        raise UsageError(
            f"--resume continues a run as it was: --{', --'.join(changed)} cannot be changed. "
            "Use --from to start a new run with other values."
        )
    goes_on = None if run.has_nothing(saved.folder) else request.resume
    config = resolve_request(replace(request, source=str(saved.file), resume=goes_on))
    changed_files = [] if run.is_done(saved.folder) else check_code(saved, config, request.keep_changed)
    if config.dry_run:
        return shown(lambda: _describe(config))
    return _run(lambda: run.resume(config, saved.folder, changed_files, keep_changed=request.keep_changed))


def _resume_auto(request: Request) -> int:
    """Goes on with the newest unfinished run of this configuration, or starts it: what a job that is requeued needs.
    Where the newest one is finished, nothing is left to be done. 75 where another process is at it: try again."""
    from flatcl.utils.engine import run
    from flatcl.utils.engine.lock import Busy
    from flatcl.utils.engine.results import RunFolder

    config = resolve_request(replace(request, resume=None))
    if config.dry_run:
        return shown(lambda: _describe(config))
    if config.disable_log:
        raise UsageError("--resume auto looks for run folders, --disable_log writes none. Drop one of them.")
    try:
        with RunFolder.claimed(config):
            path = run.unfinished(config, request.keep_changed)
            if path is None:
                return _run(lambda: run.train(config))
            if run.is_done(path):
                say(f"{ALREADY}: {path}")
                return OK
            words = {name: words for name, words in request.words.items() if name in _without_result()}
            return _resume(Request(words, request.plugins, resume=str(path), keep_changed=request.keep_changed))
    except Busy as error:
        complain(f"error: {error}")
        return BUSY


def _without_result() -> set[str]:
    """Flags that may differ when a run goes on."""
    flags = flags_of(EngineArgs, "engine")
    return {name for name, flag in flags.items() if not flag.result} - {"results_path", "disable_log"}


def _describe(config: Config) -> None:
    from flatcl.utils.engine.texts import describe

    print(describe(config))


def _help(request: Request) -> None:
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
    print(f"usage: {program()} --model M --dataset D [--flag value ...]\n")
    print("  --list [models|datasets|backbones|optimizers|policies]   print what can be chosen")
    print("  --model M --dataset D --help                    print the flags of that pair")
    print("  --plugin FILE                                   add names from a file (repeatable)")
    print("  --from RUN                                      repeat a run; further flags override its values")
    print("  --resume RUN                                    continue a run that was stopped")
    print("  --resume auto                                   the newest unfinished run of these flags, or a new one")
    print("  --from RUN --continue 1 --stop_after N          go on from the end of a run: more tasks, other flags")
    print("  --keep_changed 1                                although code or images of the run have changed since")
    owner = None
    for flag in schema(chosen).values():
        if flag.owner != owner:
            owner = flag.owner
            print(f"\nflags of the {owner}:")
        limits = f" [{'|'.join(flag.choices)}]" if flag.choices else ""
        default = chosen["dataset"].defaults.get(flag.name, flag.default) if chosen["dataset"] else flag.default
        end = "" if default is None or default == "" or default == () else f" (default {written(default)})"
        print(f"  --{flag.name:20} {flag.help.replace('%%', '%')}{limits}{end}")
