"""What is printed. It may fail without harm: a run does not end because nobody can read its lines."""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from flatcl.utils import launch
from flatcl.utils.errors import RunFailed
from flatcl.utils.registry import IS_CLONE

LONGEST = 4000  # characters of a message
FROM_PYTHON = ContextVar("from Python", default=False)  # whether a run was started by a call, not by a command


@contextmanager
def guarded() -> Iterator[None]:
    """Inside, a console that cannot show a character (±, –) shows ? in its place, and a closed stdout or stderr is not
    taken for a file of ours."""
    _fill_standard_descriptors()
    changed = []
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # one that is full or closed, or no real one
            errors = stream.errors
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
            changed.append((stream, errors))
    try:
        yield
    finally:
        for stream, errors in changed:
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)


def say(text: str, file: Any = None, end: str = "\n") -> None:
    """Prints a line, on stdout or `file`; where stdout is full or closed, says so once on stderr, and is silent from
    then on."""
    try:
        print(text, file=file, end=end, flush=True)
    except (OSError, ValueError) as error:
        if file not in (None, sys.stdout):
            return
        silence("stdout")
        complain(f"nothing more can be printed ({reason(error)}): the run continues without output")


def complain(line: str) -> None:
    """Prints one line on stderr, if that is possible. What could confuse a terminal is written as escapes."""
    if len(line) > LONGEST:
        line = line[:LONGEST] + " ..."
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    if sys.stderr is None:  # print would take it for stdout
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        silence("stderr")


def silence(name: str) -> None:
    """From now on `sys.<name>` leads nowhere: what it still holds would fail again when Python exits."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, getattr(sys, name).fileno())
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):  # closed, or not a file
        setattr(sys, name, open(os.devnull, "w"))


def program() -> str:
    """How a run is started, in the way in which this program was."""
    called = Path(sys.argv[0] if sys.argv else "").name
    if called == "flatcl" or not IS_CLONE:
        words = "flatcl train" if launch.size() == 1 else "-m flatcl train"
    elif called == "__main__.py":
        words = "-m flatcl train"
    else:
        words = shlex.quote(sys.argv[0]) if called == "main.py" else "main.py"
    if launch.size() > 1:
        return f"torchrun ... {words}"
    return words if words == "flatcl train" else f"python {words}"


def again(run: str | os.PathLike) -> str:
    """The command that goes on with a run, or the call, where one was made from Python."""
    if FROM_PYTHON.get():
        return f"flatcl.resume({os.fspath(run)!r})"
    return f"{program()} --resume {shlex.quote(os.fspath(run))}"


def shown(show: Callable[[], None]) -> int:
    """The exit code of a command that only prints: it has failed where that is not possible."""
    try:
        show()
        print(end="", flush=True)
        return 0
    except BrokenPipeError:  # whoever read our output has enough of it (`| head`)
        silence("stdout")
        return 1
    except OSError as error:
        silence("stdout")
        raise RunFailed(f"the output cannot be written ({reason(error)}).") from None


def leave(code: int) -> NoReturn:
    """Ends the process. One of several that train a run skips the shutdown of the interpreter: torch has been seen to
    abort there, after all work was done (1 start in some 100), and torchrun then ends the other processes."""
    if launch.size() > 1:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def reason(error: BaseException) -> str:
    """Why something failed, in a few words."""
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


def have_standard_streams() -> None:
    """For a process that was started by one whose stdout or stderr is closed: it has none."""
    _fill_standard_descriptors()
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", errors="replace", closefd=False))


def _fill_standard_descriptors() -> None:
    """Where 0, 1 or 2 is closed, the next file that is opened would get that number, and what C libraries print."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # processes that are started need them as well
