"""Blocks of rows, and a loss over them, term by term: what a method gives to the engine."""

import operator
from collections.abc import Callable, Mapping
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor


class Block:
    """Rows that pass through the network together: one forward pass, and so one batch for BatchNorm.

    `x` (N, C, H, W) float32 is augmented and normalised; further columns (`y` (N,) int64, `ids` (N,) int64,
    `logits` (N, K) float32, ...) are attributes. The last `memory` rows come from the buffer. A reference block
    (`reference=True`) is not in the loss: the method gives its loss in `references`.
    """

    def __init__(self, x: Tensor, memory: int = 0, reference: bool = False, **columns: Tensor):
        self.x, self.memory, self.reference, self.columns = x, memory, reference, columns

    def __len__(self) -> int:
        return len(self.x)

    def __getattr__(self, name: str) -> Tensor:
        if name == "columns" or name not in self.columns:
            raise AttributeError(f"this block has no column '{name}'")
        return self.columns[name]

    @property
    def sources(self) -> list[range]:
        """The rows of the stream, then those of the memory; a source without rows is left out."""
        cut = len(self) - self.memory
        return [rows for rows in (range(cut), range(cut, len(self))) if rows]

    @property
    def form(self) -> tuple:
        """Shapes and dtypes, without the values: steps on blocks of equal forms run the same operations."""
        columns = {"x": self.x, **self.columns}
        return (
            self.memory, self.reference, *((name, tuple(part.shape), str(part.dtype)) for name, part in columns.items())
        )  # fmt: skip

    def map(self, change: Callable[[Tensor], Tensor]) -> "Block":
        """A block with `change` applied to each column; `change` keeps the number of rows."""
        columns = {name: change(column) for name, column in self.columns.items()}
        return Block(change(self.x), self.memory, self.reference, **columns)

    def take(self, pick: Callable[[Tensor], Tensor], memory: int) -> "Block":
        """A block of the rows that `pick` selects from every column; the last `memory` rows come from the buffer."""
        return Block(
            pick(self.x), memory, self.reference, **{name: pick(column) for name, column in self.columns.items()}
        )

    def as_reference(self) -> "Block":
        """The same rows as a reference block."""
        return Block(self.x, self.memory, True, **self.columns)


Of = tuple[Block, Tensor] | Tensor  # (block, tensor (n, ...) of its rows); the block may be left out if there is one


def tensor_of(of: Of) -> Tensor:
    return of[1] if isinstance(of, tuple) else of


def changed(of: Of, change: Callable[[Tensor], Tensor]) -> Of:
    return (of[0], change(of[1])) if isinstance(of, tuple) else change(of)


def place_of(of: Of, blocks: tuple[Block, ...]) -> int:
    """The position of the block that a term is about; `_checks.of_loss` makes sure that there is one."""
    return next(i for i, block in enumerate(blocks) if block is of[0]) if isinstance(of, tuple) else 0


class Loss:
    """What a method minimises, term by term.

    `rows[name]` is a term, `(block, cost)`: one of the blocks that `loss` was given, and the cost (n,) of each of its
    rows, multiplied by the term's weight. If there is only one block, `cost` is enough. The value of a term is the mean
    of its costs. For a mean over only k of the n rows, multiply the costs of these rows by n / k and give zeros for the
    others; the method then sets `rows_are_independent = False`, because each of several processes would count k in its
    own rows. `penalties[name]`, a scalar tensor, is a term that belongs to no row (a regulariser). `logits` (N, K) are
    those of the stream's rows. `outputs[name]`, in the same form as `rows[name]`, with tensors (n, ...), is anything
    else that `remember` needs.
    """

    def __init__(
        self,
        rows: Mapping[str, Of],
        logits: Tensor | None = None,
        penalties: Mapping[str, Tensor] = {},
        outputs: Mapping[str, Of] = {},
        **unknown: Any,
    ):
        self.rows, self.logits, self.penalties, self.outputs = rows, logits, penalties, outputs
        self.unknown = unknown  # arguments that there are not, for the message that says so

    @cached_property
    def costs(self) -> dict[str, Tensor]:
        """{name: (n,)} of the terms in `rows`."""
        return {name: tensor_of(cost) for name, cost in self.rows.items()}

    @cached_property
    def terms(self) -> dict[str, Tensor]:
        """{name: scalar tensor}; they sum to `total`."""
        return {**{name: cost.mean() for name, cost in self.costs.items()}, **self.penalties}

    @cached_property
    def total(self) -> Tensor:
        return reduce(operator.add, self.terms.values())

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Loss":
        """A loss with `change` applied to all costs, logits, penalties and outputs."""
        return Loss(
            {name: changed(cost, change) for name, cost in self.rows.items()},
            None if self.logits is None else change(self.logits),
            {name: change(term) for name, term in self.penalties.items()},
            {name: changed(output, change) for name, output in self.outputs.items()},
        )

    def copied(self) -> "Loss":
        """A copy of the loss and of its blocks, in new tensors."""
        blocks: dict[int, Block] = {}

        def copy(of: Of) -> Of:
            if not isinstance(of, tuple):
                return of.clone()
            if id(of[0]) not in blocks:
                blocks[id(of[0])] = of[0].map(torch.clone)
            return blocks[id(of[0])], of[1].clone()

        return Loss(
            {name: copy(cost) for name, cost in self.rows.items()},
            None if self.logits is None else self.logits.clone(),
            {name: term.clone() for name, term in self.penalties.items()},
            {name: copy(output) for name, output in self.outputs.items()},
        )

    def detach(self) -> "Loss":
        loss = self.mapped(Tensor.detach)
        loss.terms = {name: term.detach() for name, term in self.terms.items()}
        loss.total = self.total.detach()
        return loss


def worst_of(block: Block, growth: Tensor | None, fraction: float, least: int) -> Block:
    if growth is None:  # no term speaks of it
        return block
    picks = []
    for rows in block.sources:
        fewest = -(-least // len(block.sources))
        number = min(len(rows), max(fewest, int(fraction * len(rows) + 1e-9)))
        worst = growth[rows.start : rows.stop].topk(number).indices
        picks.append(worst.sort().values + rows.start)
    index = torch.cat(picks)
    return block.take(lambda column: column.index_select(0, index), len(picks[-1]) if block.memory else 0)
