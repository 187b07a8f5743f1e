"""What a memory keeps, a policy in each file: `--buffer_policy NAME`.

A policy that chooses during the stream returns from `place` the slots of the rows; one that chooses at the end of a
task does so in `end_task`. It must decide in a resumed run as in one that was not stopped, and on a GPU as on the CPU:
it draws only from the buffer's generator, and `state_dict` has everything that it keeps.
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
        """The slots (n,) int64 of n rows of the stream; a row whose slot is `buffer.capacity` or more is not kept.

        If several rows take the same slot, the last one stays. Empty slots are filled in order: the next one is
        `len(buffer)`. `labels` (n,) int64 is given if `needs_labels` is True.
        """
        raise NotImplementedError

    def end_task(self, method: Any, task: Any) -> None:
        """Called when a task ends, before the evaluation. By default does nothing: the memory is filled in `place`."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed policy needs: tensors, numbers, strings, lists and dicts only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from such a state. The state in a checkpoint that is older than policies is empty."""
