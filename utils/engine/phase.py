"""What methods and optimizers say about their steps, so that a step can be recorded once and replayed.

A replay (`utils/engine/program.py`) does what the recorded step did, with other rows and other weights. So a part says
in one line, `phase`, what its Python code may decide anew from step to step within a task. Most have nothing to say:
blocks and weights decide all.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ordinary:
    """A phase whose steps cannot be replayed, and why; `for_good` where the part has no other."""

    why: str
    for_good: bool = True


def _base_with_phase(cls: type) -> str:
    return next(base.__name__ for base in cls.__mro__[1:] if hasattr(base, "phase"))


def phase_of(part: object, functions: Iterable[str]) -> Hashable:
    """The phase of a method or optimizer; `Ordinary` where the class that fills one of the `functions`, those that
    make a step, does not say what its phase is: it may depend on anything."""
    for cls in type(part).__mro__:
        if "phase" in vars(cls):
            return part.phase()
        if any(function in vars(cls) for function in functions):
            return Ordinary(
                f"{part.name} does not say what its steps depend on. If, within a task, they depend only on the "
                f"blocks and the weights, write in class {cls.__name__}: phase = {_base_with_phase(cls)}.phase"
            )
    raise AssertionError(f"{part} has no phase")
