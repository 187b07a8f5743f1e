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


def load(folder: Path, config_hash: str | None = None) -> dict[str, Any]:
    """The saved state; raises `UsageError` if there is none, or none of the configuration with this hash."""
    file = folder / FILE
    if not file.is_file():
        raise UsageError(
            f"{file} does not exist: this run was stopped before its first checkpoint. Repeat it with --from instead."
        )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        saved_hash = state["config_hash"]
    except Exception as error:  # a damaged file fails in many ways
        reason = str(error).split("\n")[0]
        raise UsageError(f"{file} is damaged ({reason}). Repeat the run with --from instead.") from error
    if config_hash not in (None, saved_hash):
        raise UsageError(
            f"{file} belongs to the configuration {saved_hash}, config.json is {config_hash}: it was edited. "
            "Start a new run with --from instead."
        )
    return state
