"""Flat minima for continual learning: replay methods and sharpness-aware optimizers, freely combined.

From Python: `flatcl.train(model="mgser_sam", dataset="seq-digits")`; see `flatcl.train`, `flatcl.build`, `flatcl.load`,
`flatcl.resume`, `flatcl.benchmark_from_arrays`, `flatcl.Callback`. A new method, benchmark, network or optimizer is
written with what `flatcl.models`, `flatcl.datasets`, `flatcl.utils.registry` and `flatcl.utils.optim` have.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0.dev0"
__all__ = ["Callback", "Experiment", "Run", "State", "benchmark_from_arrays", "build", "load", "resume", "train"]

_HERE = Path(__file__).resolve().parent
if not (_HERE / "models").is_dir() and (_HERE.parent / "models").is_dir():
    from flatcl import _clone

    __path__.append(_clone.place_of_parts(_HERE.parent))

if TYPE_CHECKING:
    from flatcl._api import Callback, Experiment, Run, State, benchmark_from_arrays, build, load, resume, train


def __getattr__(name: str) -> Any:
    """The public names, imported when one is used: torch takes seconds to import, and not all need it."""
    if name in __all__:
        from flatcl import _api

        return getattr(_api, name)
    raise AttributeError(f"module 'flatcl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
