"""CBRS, class-balancing reservoir sampling (Chrysakis & Moens, ICML 2020), algorithm 1: classes in balance.

While there is room, every row is stored. Then, with m of the n rows that its class c has shown in the memory:

    c is full:      the row replaces any one of the m rows of its class with probability m / n
    c is not full:  it replaces any one of the rows of the largest classes

A class is full once it has been a largest one. Deviates: only in a memory without room, which is where the algorithm
needs it. The text of the paper also covers ties among the first rows, but these would keep classes small for ever.
"""

import numpy as np

from flatcl.utils.engine.policies._policy import Policy
from flatcl.utils.registry import POLICIES


@POLICIES.register("class_balanced")
class ClassBalanced(Policy):
    needs_labels = True

    def __init__(self, num_classes=0):
        super().__init__(num_classes)
        self.slots: dict[int, list[int]] = {}  # class -> those of its rows
        self.seen: dict[int, int] = {}  # class -> presentations
        self.full: set[int] = set()  # classes that have been a largest one
        self.largest: list[int] = []  # classes, once there is no room

    def place(self, buffer, n, labels):
        """One random number for each row that comes when there is no room."""
        free, capacity = len(buffer), buffer.capacity
        late = min(n, capacity - free)
        draws = buffer.rng.random(n - late).tolist()
        labels = labels.tolist()
        slots = np.arange(free, free + n)
        for row, label in enumerate(labels[:late]):
            self._count(label).append(free + row)
        if late and free + late == capacity:
            self._find_largest()
        for row, label, u in zip(range(late, n), labels[late:], draws, strict=True):
            slots[row] = self._slot(label, u, capacity)
        return slots

    def _count(self, label: int) -> list[int]:
        """The slots of a class, of which one more row has come."""
        self.seen[label] = self.seen.get(label, 0) + 1
        return self.slots.setdefault(label, [])

    def _slot(self, label: int, u: float, capacity: int) -> int:
        """What a row replaces, by u ~ U[0, 1); `capacity`: nothing."""
        own = self._count(label)
        if label in self.full:
            place = int(u * self.seen[label])
            return own[place] if place < len(own) else capacity
        size = len(self.slots[self.largest[0]])
        index, place = divmod(int(u * (size * len(self.largest))), size)
        losing = self.slots[self.largest.pop(index)]
        losing[place], losing[-1] = losing[-1], losing[place]
        own.append(losing.pop())
        if len(own) == size:
            self.full.add(label)
            self.largest.append(label)
        if not self.largest:
            self._find_largest()
        return own[-1]

    def _find_largest(self) -> None:
        size = max(map(len, self.slots.values()))
        self.largest = [label for label, slots in self.slots.items() if len(slots) == size]
        self.full.update(self.largest)

    def state_dict(self):
        return {
            "slots": {label: list(slots) for label, slots in self.slots.items()},
            "seen": dict(self.seen), "full": sorted(self.full), "largest": list(self.largest),
        }  # fmt: skip

    def load_state_dict(self, state):
        self.slots = {label: list(slots) for label, slots in state["slots"].items()}
        self.seen, self.full, self.largest = dict(state["seen"]), set(state["full"]), list(state["largest"])
