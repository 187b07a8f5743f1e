"""The errors that a user is meant to read: one message that says what, got, and what to do."""

import sys
from typing import Any


class UsageError(ValueError):
    """The user asked for something that cannot be done. The command line prints it and exits with 2.

    `problems` holds one line for each thing that is wrong, so that all of them are reported at once.
    """

    def __init__(self, *problems: str):
        self.problems = problems
        super().__init__("\n".join(problems))


class DataError(UsageError):
    """A data set is missing, incomplete or damaged; the message names the file and the remedy."""


class RunFailed(RuntimeError):
    """Training cannot go on. What was finished is kept; exit code 1."""


class Diverged(RunFailed):
    """The loss, an update or the weights are not finite."""


class Interrupted(Exception):
    """A signal asked a run to stop, and it has done so; it can go on from its last checkpoint. Its argument is the
    signal's number."""


def mistake(part: Any, problem: str) -> UsageError:
    """The error that names a method, an optimizer, ... (or its class), its file, and what is wrong with it."""
    kind = part if isinstance(part, type) else type(part)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or kind.__module__
    return UsageError(f"{vars(kind).get('name', kind.__name__)} ({file}): {problem}")
