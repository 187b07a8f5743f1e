"""Flat minima for continual learning: replay methods and sharpness-aware optimizers, freely combined."""

from pathlib import Path

__version__ = "0.2.0.dev0"

_HERE = Path(__file__).resolve().parent
if not (_HERE / "models").is_dir() and (_HERE.parent / "models").is_dir():
    from flatcl import _clone

    __path__.append(_clone.place_of_parts(_HERE.parent))
