"""Which of the processes of a run this is, as torchrun says in the environment. Imports nothing."""

import os


def number() -> int:
    """0 where there is only one."""
    return _environment("RANK", 0) if size() > 1 else 0


def number_here() -> int:
    """Among those on this machine."""
    return _environment("LOCAL_RANK", 0)


def size() -> int:
    """How many processes train the run."""
    return _environment("WORLD_SIZE", 1)


def _environment(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else otherwise
