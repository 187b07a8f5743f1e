"""Reservoir sampling (Vitter, 1985): each image of the stream is in the memory with the same probability."""

import numpy as np

from flatcl.utils.engine.policies._policy import Policy
from flatcl.utils.registry import POLICIES


@POLICIES.register("reservoir")
class Reservoir(Policy):
    """Needs no data, so that a rejected row is never copied."""

    def place(self, buffer, n, labels=None):
        """A row after c earlier ones takes slot c while c < capacity, then the slot
        r = floor(u * (c + 1)), u ~ U[0, 1), if r < capacity."""
        slots = np.arange(buffer.num_seen, buffer.num_seen + n)
        late = max(0, min(n, buffer.capacity - buffer.num_seen))  # the first row that needs a random slot
        if late < n:
            slots[late:] = buffer.rng.random(n - late) * (slots[late:] + 1)  # cut off to whole numbers
        return slots
