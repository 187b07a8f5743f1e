"""GEM, Gradient Episodic Memory (Lopez-Paz & Ranzato, NeurIPS 2017), eq. 11.

    min_v 1/2 v' (G G' + 1e-3 I) v + (G g)' v    subject to v >= gamma    u = g + G' v

The rows of G are the gradients on the memories of the past tasks, all of them in each step; u is taken only where some
g_k . g < 0. The update that the optimizer found is what is projected. The memory has buffer_size / number of tasks
images of each task, drawn at random at its end, and the ridge is 1e-3, as in the code behind the DER paper (the paper's
own memory is filled while the stream passes). As in that code, the memories pass the network before the stream does,
which matters to BatchNorm's running averages. The programme is solved exactly, as non-negative least squares, in
float64 on the host, which is the one wait for the device in a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn.functional import cross_entropy

from flatcl.models._method import Batch, Block, Grads, published
from flatcl.models.agem import AGem
from flatcl.models.sgd import DER
from flatcl.utils.arguments import flag
from flatcl.utils.engine.phase import Ordinary
from flatcl.utils.optim._driver import flat
from flatcl.utils.registry import METHODS

RIDGE = 1e-3


def solve_dual(gram: np.ndarray, products: np.ndarray, margin: float) -> np.ndarray:
    """argmin_v 1/2 v' A v + b' v with v >= margin, A = gram + RIDGE * I: (T, T), (T,) float64 -> (T,).

    With A = L L' and v = margin + s it is min |L' s + L^-1 (b + A margin)| over s >= 0. L is made of the eigenvectors:
    rounding in the products of large gradients may exceed the ridge, and a Cholesky factor would not exist.
    """
    values, vectors = np.linalg.eigh(gram)
    roots = np.sqrt(values.clip(min=0) + RIDGE)
    slope = products + margin * (gram.sum(1) + RIDGE)
    return nnls(roots[:, None] * vectors.T, -(vectors.T @ slope) / roots)[0] + margin


@METHODS.register("gem")
class Gem(AGem):
    references_first = True

    @dataclass(frozen=True)
    class Args:
        buffer_size: int = flag(500, "images that the memory can hold", low=1, high=10**9, fixed=True)
        gamma: float = flag(0.5, "margin: the least weight of a past task's gradient", low=0)

    published = published(
        DER,
        {
            ("perm-mnist", 200, 500, 5120): dict(lr=0.1, batch_size=128, n_epochs=1, gamma=0.5),
            ("rot-mnist", 200, 500, 5120): dict(lr=0.01, batch_size=128, n_epochs=1, gamma=0.5),
            ("seq-mnist", 200): dict(lr=0.01, batch_size=10, n_epochs=1, gamma=1.0),
            ("seq-mnist", 500): dict(lr=0.03, batch_size=10, n_epochs=1, gamma=0.5),
            ("seq-mnist", 5120): dict(lr=0.1, batch_size=10, n_epochs=1, gamma=1.0),
            ("seq-cifar10", 200, 500, 5120): dict(lr=0.03, batch_size=32, n_epochs=50, gamma=0.5),
        },
    )

    def __init__(self, net, args, context):
        super().__init__(net, args, context)
        self.ends: list[int] = []  # where each task's rows end in the memory

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        if len(self.buffer) == 0:
            return (batch.block,)
        rows = self.buffer.all()
        inputs = self.context.augment(rows["x"])
        parts = [slice(start, end) for start, end in pairwise((0, *self.ends))]
        memories = (
            Block(inputs[part], part.stop - part.start, reference=True, y=rows["y"][part], ids=rows["ids"][part])
            for part in parts
        )
        return (batch.block, *memories)

    def references(self, *memories: Block) -> Iterator[tuple[str, Tensor]]:
        for k, memory in enumerate(memories):
            yield f"task {k}", cross_entropy(self.net(memory.x), memory.y)

    def phase(self) -> Ordinary:
        return Ordinary("gem solves its quadratic program on the host, in the middle of a step")

    def combine(self, update: Grads, guides: dict[str, Grads]) -> Grads:
        if not guides:  # the first task
            return update
        memories = torch.stack([flat(guide) for guide in guides.values()])
        g = flat(update)
        values = torch.cat(((memories @ g)[:, None], memories @ memories.T), 1).cpu().double()
        products, gram = values[:, 0], values[:, 1:]
        is_finite = values.isfinite().all()  # if not, the step will be refused
        if not is_finite or not (products < 0).any():
            return update
        v = torch.from_numpy(solve_dual(gram.numpy(), products.numpy(), self.args.gamma))
        projected = g + memories.T @ self.buffer.on_device(v.to(g.dtype))
        sizes = [part.numel() for part in update]
        return [piece.view_as(part) for piece, part in zip(projected.split(sizes), update, strict=True)]

    def end_task(self, task) -> None:
        super().end_task(task)
        self.ends.append(len(self.buffer))

    def get_extra_state(self) -> dict:
        return {**super().get_extra_state(), "ends": list(self.ends)}

    def set_extra_state(self, state: dict) -> None:
        super().set_extra_state(state)
        self.ends = list(state["ends"])
