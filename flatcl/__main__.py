"""The command `flatcl`, also `python -m flatcl`: `flatcl train ...`, `flatcl sweep ...`; each command is a file."""

import importlib
import shlex
import sys
from typing import NoReturn

from flatcl import __version__
from flatcl.utils.console import complain, guarded, leave, shown
from flatcl.utils.errors import RunFailed, UsageError
from flatcl.utils.registry import nearest, summary_of
from flatcl.utils.registry import parts as files_of

COMMANDS = "utils/commands"


def main(argv: list[str]) -> int:
    """Runs the command that the first word names; returns the exit code."""
    with guarded():
        try:
            return _main(argv)
        except UsageError as error:
            for problem in error.problems:
                complain(f"error: {problem}")
            return 2
        except RunFailed as error:
            complain(f"failed: {error}")
            return 1


def command() -> NoReturn:
    """The installed program."""
    leave(main(sys.argv[1:]))


def _main(argv: list[str]) -> int:
    commands = files_of(COMMANDS)
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        lines = [f"  {command:10} {summary_of(file)}" for command, file in sorted(commands.items())]
        last = "flatcl COMMAND --help says more. In a clone, python -m flatcl is the same."
        return shown(lambda: print("usage: flatcl COMMAND ...\n", *lines, f"\n{last}", sep="\n"))
    if name == "--version":
        return shown(lambda: print(f"flatcl {__version__}"))
    if name.startswith("-"):
        raise UsageError(f"the first word must be a command, got '{name}'. To train: flatcl train {shlex.join(argv)}.")
    if name not in commands:
        raise UsageError(f"there is no command '{name}'. {nearest(name, sorted(commands))}")
    return importlib.import_module(f"flatcl.utils.commands.{name}").main(argv[1:])


if __name__ == "__main__":
    command()
