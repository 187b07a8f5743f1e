"""Tests whether your own method, optimizer, network or benchmark works: `flatcl check my_method.py`.

Runs the contracts of utils/contracts on what the file registers, in small runs in memory: under two minutes a part.
"""

import io
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any

from flatcl.utils.arguments import SELECTORS
from flatcl.utils.commands._parser import Parser
from flatcl.utils.console import guarded, say
from flatcl.utils.errors import RunFailed, UsageError
from flatcl.utils.registry import BACKBONES, POLICIES, canonical, load_plugin, nearest

KINDS = {**SELECTORS, "policy": POLICIES}
OK, FAILED = 0, 1


def main(argv: Sequence[str]) -> int:
    """0: everything is kept, or skipped; 1: something is not."""
    with guarded():
        args = _parser().parse_args(argv)
        parts = _parts(args.part)
        with _one_thread():
            results = Counter(result for kind, name in parts for result in _check(kind, name))
        say(f"{results['ok']} ok, {results['FAIL']} failed, {results['skip']} skipped")
        return FAILED if results["FAIL"] else OK


def _parser() -> Parser:
    parser = Parser(
        prog="flatcl check",
        description="Tests what a file registers: methods, optimizers, networks, benchmarks, memory policies.\n"
        "Exit code: 0 where all are kept, 1 where one is not, 2 for bad input.",
        epilog="example: flatcl check my_method.py",
    )
    parser.add_argument("part", metavar="FILE.py", help="a plugin; or the name of a part, e.g. er, sam or seq-digits")
    return parser


def _parts(given: str) -> list[tuple[str, str]]:
    """(kind, name) of what a file registers, or of the parts with a name."""
    if given.endswith(".py") or os.sep in given or os.path.exists(given):
        before = {kind: set(registry.names()) for kind, registry in KINDS.items()}
        _load(given)
        found = [(kind, name) for kind, known in before.items() for name in KINDS[kind].names() if name not in known]
        if not found:
            raise UsageError(
                f"{given} registers nothing. Write above a class: @METHODS.register('name'), or DATASETS, BACKBONES, "
                "OPTIMIZERS, POLICIES of flatcl.utils.registry."
            )
        return found
    if ":" in given:  # of a family of networks
        BACKBONES.check(given)
        return [("backbone", given)]
    found = [(kind, registry.written(given)) for kind, registry in KINDS.items()]
    found = [(kind, name) for kind, name in found if name in KINDS[kind].names()]
    if not found:
        names = sorted({canonical(name) for registry in KINDS.values() for name in registry.names()})
        raise UsageError(f"there is no file '{given}', and no part with that name. {nearest(canonical(given), names)}")
    return found


def _load(file: str) -> None:
    try:
        load_plugin(file)
    except UsageError as error:  # there is no flag here
        raise UsageError(*(problem.removeprefix("--plugin ") for problem in error.problems)) from None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums, and so the equality of runs, depend on the number of threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check(kind: str, name: str) -> Iterator[str]:
    """Runs the contracts of a part; says and yields how each one ends: 'ok', 'FAIL' or 'skip'."""
    contracts, subject = _contracts(kind), []
    say(f"{kind} {name}")
    result = _run("it can be loaded", lambda: subject.append(contracts.subject(name)), file="", known={})
    yield result
    if result == "ok":
        file = getattr(sys.modules[KINDS[kind].load(name).__module__], "__file__", "")
        known: dict[str, str] = {}
        for title, contract in contracts.CONTRACTS.items():
            yield _run(title, partial(contract, *subject), file, known)


def _contracts(kind: str) -> Any:
    from flatcl.utils.contracts import backbones, benchmarks, methods, optimizers, policies

    modules = {"model": methods, "dataset": benchmarks, "backbone": backbones, "optimizer": optimizers}
    return {**modules, "policy": policies}[kind]


def _run(title: str, contract: Callable[[], str | None], file: str, known: dict[str, str]) -> str:
    """How a contract ends, which is said in a line. `file` is the part's."""
    from flatcl.utils.contracts._runs import Broken, Skipped

    start, said = time.monotonic(), None
    with warnings.catch_warnings(record=True) as warned, redirect_stdout(io.StringIO()):
        warnings.simplefilter("always", UserWarning)
        try:
            result, said = "ok", contract()
        except Skipped as why:
            result, said = "skip", str(why)
        except (Broken, UsageError, RunFailed) as error:
            result, said = "FAIL", str(error)
        except (Exception, SystemExit) as error:  # whatever it does wrong, the other contracts are asked for too
            result, said = "FAIL", f"{type(error).__name__}: {error} ({_place(error, file)})"
    if result == "FAIL" and known.setdefault(said, title) != title:
        said = f"as in '{known[said]}'"
    seconds = f" ({time.monotonic() - start:.1f} s)" if result == "ok" else ""
    say(f"{result:4}  {title}{f': {said}' if said else ''}{seconds}")
    for warning in {str(one.message): one for one in warned if issubclass(one.category, UserWarning)}:
        say(f"      warning: {warning}")
    return result


def _place(error: BaseException, file: str) -> str:
    """Where an exception arose: the last line of the part's file that it came through, or else where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = ([frame for frame in frames if frame.filename == file] or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}"
