"""Flat minima for continual learning: replay methods and sharpness-aware optimizers, freely combined."""

from pathlib import Path

__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent
if not (_HERE / "models").is_dir():
    from flatcl import _clone

    __path__.append(_clone.place_of_parts(_HERE.parent))
