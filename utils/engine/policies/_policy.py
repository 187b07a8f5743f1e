"""What a memory keeps, a policy in each file: `--buffer_policy NAME`.

A policy that looks at the stream says in `place` which slots its rows take; one that chooses when a task ends does it
in `end_task`. It must decide in a resumed run as in the one that was stopped, and on a GPU as on the CPU: it draws from
the buffer's generator alone, and `state_dict` has all that it keeps.
"""

from typing import Any

import numpy as np


class Policy:
    """How a memory (`flatcl.utils.engine.buffer.Buffer`) is filled. Labels are 0 ... num_classes - 1."""

    name: str
    needs_labels = False  # `place` looks at the labels

    def __init__(self, num_classes: int = 0):
        self.num_classes = num_classes

    @classmethod
    def check(cls, config: Any, benchmark: type) -> list[str]:
        """Problems of this policy with a configuration, one line each; called before any data is loaded."""
        return []

    def place(self, buffer: Any, n: int, labels: np.ndarray | None) -> np.ndarray:
        """The slots (n,) int64 that n rows of the stream take; `buffer.capacity` or more: the row is not kept.

        Of rows that take one slot, the last one stays. Empty slots are taken in order: the next one is `len(buffer)`.
        `labels` (n,) int64 is given where `needs_labels` says so.
        """
        raise NotImplementedError

    def end_task(self, method: Any, task: Any) -> None:
        """Called when a task ends, before the evaluation. Here nothing: the memory fills while the stream passes."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed policy needs: tensors, numbers, strings, lists and dicts only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from such a state. That of a checkpoint which is older than policies is empty."""
