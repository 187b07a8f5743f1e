"""GSS-greedy, Gradient-based Sample Selection (Aljundi et al., NeurIPS 2019), algorithm 2: diverse gradients.

    step on CE of stream and the next minibatch_size rows of the memory, in a random cyclic order, batch_num times
    c = 1 + max_j cos(g(batch), g(j)), j over gss_minibatch_size random rows of the memory; 0.1 for the first batch
    not full: store the batch with score c.  full and c < 1: for each row i of it a candidate j ~ scores is replaced
    with probability s_j / (s_j + c_i),  s_j = c_i

Gradients are of images that are neither augmented nor normalised, in eval mode, over all weights. Rows that do not fit
into the room that is left are dropped. All rows of a batch choose their candidates by the scores before it; where two
take one place, the later one stays. A cyclic order lasts over many stream batches, until all rows have been shown; the
code behind the DER paper's figures begins a new one with each stream batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flatcl.models._method import Batch, Block, Loss, published
from flatcl.models._replay import MemoryArgs
from flatcl.models.er import ER
from flatcl.models.sgd import DER
from flatcl.utils.arguments import flag
from flatcl.utils.engine.passes import eval_mode, gram
from flatcl.utils.registry import METHODS

FIRST_SCORE = 0.1


@METHODS.register("gss")
class GSS(ER):
    fixed_policy = "diverse gradients"
    own_memory = True
    phase = ER.phase

    @dataclass(frozen=True)
    class Args(MemoryArgs):
        gss_minibatch_size: int = flag(32, "rows of the memory that a batch is compared with", low=1, high=10**6)
        batch_num: int = flag(1, "steps on each batch", low=1, high=1000)

    published = published(
        DER,
        {
            ("perm-mnist", 200): dict(lr=0.2, batch_size=128, minibatch_size=10, n_epochs=1, gss_minibatch_size=128),
            ("perm-mnist", 500): dict(lr=0.1, batch_size=128, minibatch_size=128, n_epochs=1, gss_minibatch_size=10),
            ("perm-mnist", 5120): dict(lr=0.03, batch_size=128, minibatch_size=128, n_epochs=1, gss_minibatch_size=10),
            ("rot-mnist", 200): dict(lr=0.2, batch_size=128, minibatch_size=10, n_epochs=1, gss_minibatch_size=128),
            ("rot-mnist", 500, 5120): dict(
                lr=0.2, batch_size=128, minibatch_size=128, n_epochs=1, gss_minibatch_size=128
            ),
            ("seq-mnist", 200, 500): dict(lr=0.1, batch_size=128, minibatch_size=10, n_epochs=1, gss_minibatch_size=10),
            ("seq-mnist", 5120): dict(lr=0.1, batch_size=128, minibatch_size=128, n_epochs=1, gss_minibatch_size=10),
            ("seq-cifar10", 200, 500): dict(
                lr=0.03, batch_size=32, minibatch_size=32, n_epochs=50, gss_minibatch_size=32
            ),
            ("seq-cifar10", 5120): dict(lr=0.03, batch_size=32, minibatch_size=32, n_epochs=1, gss_minibatch_size=32),
        },
    )

    def __init__(self, net, args, context):
        super().__init__(net, args, context)
        self.order = np.arange(0)  # of the memory's rows that this round has still to show

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        if len(self.buffer) == 0:
            return (batch.block,)
        rows = self.buffer.take(self._next_rows())
        return (self.joined(batch, rows),)

    def steps(self, batch: Batch) -> Iterator[tuple[Block, ...]]:
        for _ in range(self.args.batch_num):
            yield self.draw(batch)

    def _next_rows(self) -> np.ndarray:
        """The next rows of the memory; after the last one, a new random order begins."""
        size, filled = min(self.args.minibatch_size, len(self.buffer)), len(self.buffer)
        if len(self.order) < size:
            self.order = np.concatenate((self.order, self.context.rng.permutation(filled)))
        rows, self.order = self.order[:size], self.order[size:]
        return rows

    def remember(self, batch: Batch, loss: Loss) -> None:
        buffer, n = self.buffer, len(batch.y)
        if len(buffer) == 0:
            scores = torch.full((n,), FIRST_SCORE, device=batch.y.device)
            of_batch = scores[0]
        else:
            of_batch, scores = (part + 1 for part in self._cosines(batch))
        room = buffer.capacity - len(buffer)
        if room:
            buffer.append(**self._rows(batch, of_batch.expand(n), slice(0, room)))
        else:
            self._compete(batch, of_batch, scores)

    def _compete(self, batch: Batch, of_batch: Tensor, scores: Tensor) -> None:
        """Each row of the batch against a row of the memory that is drawn in proportion to the scores there."""
        kept = self.buffer.all()["score"]
        drawn = torch.from_numpy(self.context.rng.random((2, len(batch.y)))).to(kept.dtype)
        place, chance = self.buffer.on_device(drawn)
        levels = kept.cumsum(0)
        places = torch.searchsorted(levels, place * levels[-1]).clamp_(max=len(kept) - 1)
        wins = (chance < kept[places] / (kept[places] + scores)) & (of_batch < 1)
        self.buffer.overwrite(places, wins, **self._rows(batch, scores))

    def _rows(self, batch: Batch, scores: Tensor, part: slice = slice(None)) -> dict[str, Tensor]:
        return {"x": batch.x[part], "y": batch.y[part], "ids": batch.ids[part], "score": scores[part].contiguous()}

    def _cosines(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(), (N,): the greatest cosine that the batch's gradient, and those of its rows, have with the gradients of
        random rows of the memory."""
        size = min(self.args.gss_minibatch_size, len(self.buffer))
        others = self.buffer.take(self.context.rng.choice(len(self.buffer), size, replace=False))
        n = len(batch.y)
        x = torch.cat((batch.x, others["x"])).float().div_(255)
        with eval_mode(self.net):
            products = gram(self.net, x, torch.cat((batch.y, others["y"])))
        self.count(forward=len(x), backward=len(x))
        norms = products.diagonal().sqrt()
        own = torch.cat((products[:n, :n].mean().clamp(min=0).sqrt()[None], norms[:n]))
        cross = torch.cat((products[:n, n:].mean(0, keepdim=True), products[:n, n:]))
        cosines = (cross / (own[:, None] * norms[n:] + 1e-12)).amax(1)
        return cosines[0], cosines[1:]

    def get_extra_state(self) -> dict:
        return {**super().get_extra_state(), "order": torch.from_numpy(self.order)}

    def set_extra_state(self, state: dict) -> None:
        super().set_extra_state(state)
        self.order = state["order"].numpy()
