"""Everything that a run needs to go on, in one file; written atomically, read without unpickling foreign code."""

import os
from pathlib import Path
from typing import Any

import torch

from utils.errors import UsageError

FILE = "state.pt"


def save(folder: Path, state: dict[str, Any]) -> None:
    """`state` holds tensors, numbers, strings, lists and dicts only."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f"{FILE}.new"
    torch.save(state, fresh)
    os.replace(fresh, folder / FILE)


def load(folder: Path) -> dict[str, Any]:
    file = folder / FILE
    if not file.is_file():
        raise UsageError(
            f"{file} does not exist: this run was stopped before its first checkpoint. Repeat it with --from instead."
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        reason = str(error).split("\n")[0]
        raise UsageError(f"{file} is damaged ({reason}). Repeat the run with --from instead.") from error
