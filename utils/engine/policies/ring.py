"""A ring for each class (Chaudhry et al., 2019, "On tiny episodic memories"): the last rows, as many for each class.

Each class has room for buffer_size // (classes of the benchmark) rows, seen or not: the remainder of the
division, and the room of classes that have not appeared, stay empty.
"""

import numpy as np

from flatcl.utils.engine.policies._policy import Policy
from flatcl.utils.registry import POLICIES


@POLICIES.register("ring")
class Ring(Policy):
    needs_labels = True

    def __init__(self, num_classes=0):
        super().__init__(num_classes)
        self.rings: dict[int, list[int]] = {}  # class -> its slots, in the order in which they were first filled
        self.seen: dict[int, int] = {}  # class -> presentations

    @classmethod
    def check(cls, config, benchmark):
        if config.buffer_size >= benchmark.num_classes:
            return []
        return [
            f"--buffer_policy ring needs room for one image of each of the {benchmark.num_classes} classes of "
            f"{benchmark.name}, got --buffer_size {config.buffer_size}. Give more."
        ]

    def place(self, buffer, n, labels):
        """A row takes an empty slot while its class has room, then that of the oldest row of its class."""
        room, free = buffer.capacity // self.num_classes, len(buffer)
        slots = np.empty(n, np.int64)
        for row, label in enumerate(labels.tolist()):
            ring, count = self.rings.setdefault(label, []), self.seen.get(label, 0)
            if len(ring) < room:
                ring.append(free)
                free += 1
            slots[row] = ring[count % room]
            self.seen[label] = count + 1
        return slots

    def state_dict(self):
        return {"rings": {label: list(ring) for label, ring in self.rings.items()}, "seen": dict(self.seen)}

    def load_state_dict(self, state):
        self.rings = {label: list(ring) for label, ring in state["rings"].items()}
        self.seen = dict(state["seen"])
