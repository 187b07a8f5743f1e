"""Blocks of rows, and a loss over them, term by term: what a method hands to the engine."""

import operator
from collections.abc import Callable, Mapping
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor


class Block:
    """Rows that pass through the network together: one forward, hence one BatchNorm batch.

    `x` (N, C, H, W) float32 is augmented and normalised; further columns (`y` (N,) int64, `ids` (N,) int64,
    `logits` (N, K) float32, ...) are attributes. The last `memory` rows come from the buffer. A block that is `apart`
    is not in the loss: the method gives its gradient as a reference.
    """

    def __init__(self, x: Tensor, memory: int = 0, apart: bool = False, **columns: Tensor):
        self.x, self.memory, self.apart, self.columns = x, memory, apart, columns

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
        """All but the numbers in it: steps on blocks of equal forms run the same operations."""
        columns = {"x": self.x, **self.columns}
        return (
            self.memory, self.apart, *((name, tuple(part.shape), str(part.dtype)) for name, part in columns.items())
        )  # fmt: skip

    def map(self, change: Callable[[Tensor], Tensor]) -> "Block":
        """Each column changed by the same function, which keeps the rows."""
        columns = {name: change(column) for name, column in self.columns.items()}
        return Block(change(self.x), self.memory, self.apart, **columns)

    def take(self, pick: Callable[[Tensor], Tensor], memory: int) -> "Block":
        """The block of the rows that `pick` takes out of every column; the last `memory` are the memory's."""
        return Block(pick(self.x), memory, self.apart, **{name: pick(column) for name, column in self.columns.items()})

    def set_apart(self) -> "Block":
        """The same rows, as a reference."""
        return Block(self.x, self.memory, True, **self.columns)


Of = tuple[Block, Tensor] | Tensor  # a tensor (n, ...) of a block's rows, and which block; alone where there is one


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
    rows, weight included; where there is only one block, the cost alone will do. The term is the mean. One that speaks
    of k of the n rows has n / k times their cost there, and zeros elsewhere; the method then says `rows_are_apart =
    False`, since processes that share the rows would count k in their own. `penalties[name]` () are terms that belong
    to no row (a regulariser). `logits` (N, K) are the stream's; `outputs[name]`, written as the terms are, with tensors
    (n, ...), are what else `remember` needs.
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
        """{name: ()}; they sum to `total`."""
        return {**{name: cost.mean() for name, cost in self.costs.items()}, **self.penalties}

    @cached_property
    def total(self) -> Tensor:
        return reduce(operator.add, self.terms.values())

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Loss":
        """Costs, logits, penalties and outputs, each changed by the same function."""
        return Loss(
            {name: changed(cost, change) for name, cost in self.rows.items()},
            None if self.logits is None else change(self.logits),
            {name: change(term) for name, term in self.penalties.items()},
            {name: changed(output, change) for name, output in self.outputs.items()},
        )

    def copied(self) -> "Loss":
        """The same in tensors of its own, and the blocks too."""
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
