"""Parts of a step's rows, and what they give together: the shards of mSAM, and the rows of one of several processes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flatcl.models._blocks import Block, Loss, Of, changed, place_of, tensor_of

Blocks = tuple[Block, ...]


class Part:
    """Some rows of each of the `whole` blocks: `pieces[i]` has those of block i, a range for each of its sources.

    `weights`, one for each block's terms, make up for blocks that are cut unevenly; None where all are 1.
    """

    def __init__(self, whole: Blocks, pieces: list[list[range]]):
        self.whole, self.pieces = whole, pieces
        self.blocks = tuple(_taken(block, rows) for block, rows in zip(whole, pieces, strict=True))
        self.weights: list[float] | None = None

    @classmethod
    def shard(cls, whole: Blocks, index: int, number: int) -> "Part":
        """The index-th of `number` disjoint shards, each with every block's mix of sources."""
        part = cls(whole, [[piece_of(rows, index, number) for rows in block.sources] for block in whole])
        share = part.share
        part._weigh([len(own) / len(block) / share for own, block in zip(part.blocks, whole, strict=True)])
        return part

    @classmethod
    def of_process(cls, whole: Blocks, number: int, size: int) -> "Part":
        """The rows of one of `size` processes; all of a block that has fewer, from the stream or from the memory, than
        there are processes. With the weights, the mean over the processes is the whole loss."""
        is_cut = [all(len(rows) >= size for rows in block.sources) for block in whole]
        part = cls(
            whole,
            [
                [piece_of(rows, number, size) for rows in block.sources] if cut else block.sources
                for block, cut in zip(whole, is_cut, strict=True)
            ],
        )
        part._weigh(
            [
                len(own) * size / len(block) if cut else 1.0
                for own, block, cut in zip(part.blocks, whole, is_cut, strict=True)
            ]
        )
        return part

    def _weigh(self, weights: list[float]) -> None:
        self.weights = weights if any(weight != 1 for weight in weights) else None

    @property
    def share(self) -> float:
        """Of all rows, the part that is here."""
        return sum(map(len, self.blocks)) / sum(map(len, self.whole))

    def weighted(self, loss: Loss) -> Loss:
        """The loss of these rows with each term weighted."""
        weights = self.weights
        if weights is None:
            return loss

        def weighted(of: Of) -> Of:
            weight = weights[place_of(of, self.blocks)]
            return changed(of, lambda cost: weight * cost)

        rows = {name: weighted(of) for name, of in loss.rows.items()}
        return Loss(rows, loss.logits, loss.penalties, loss.outputs)


def joined(parts: list[tuple[Part, Loss]]) -> Loss:
    """The loss of all rows, from the losses of parts of them: zeros for rows that are in none."""
    part, first = parts[0]

    def joined_columns(columns: list[Mapping[str, Of]]) -> dict[str, Of]:
        found: dict[str, Of] = {}
        for name, of in columns[0].items():
            index = place_of(of, part.blocks)
            block, pieces = part.whole[index], [one.pieces[index] for one, _ in parts]
            values = _placed(pieces, [tensor_of(column[name]) for column in columns], len(block))
            found[name] = (block, values) if isinstance(of, tuple) else values
        return found

    rows = joined_columns([loss.rows for _, loss in parts])
    outputs = joined_columns([loss.outputs for _, loss in parts])
    logits = None
    if first.logits is not None:  # of the stream's block, of its rows of the stream or of all
        index = place_of_stream(part.whole)
        sources = part.whole[index].sources[: 1 if len(first.logits) < len(part.blocks[index]) else None]
        pieces = [one.pieces[index][: len(sources)] for one, _ in parts]
        logits = _placed(pieces, [loss.logits for _, loss in parts], sum(map(len, sources)))
    return Loss(rows, logits, first.penalties, outputs)


def _placed(pieces: list[list[range]], tensors: list[Any], number: int) -> Tensor:
    """Rows (number, ...), from tensors that each have some pieces of them."""
    found = tensors[0].new_zeros(number, *tensors[0].shape[1:])
    for own, values in zip(pieces, tensors, strict=True):
        for rows, piece in zip(own, values.split([*map(len, own)]), strict=True):
            found[rows.start : rows.stop] = piece
    return found


def place_of_stream(blocks: Blocks) -> int:
    """The position of the first block with rows of the stream."""
    return next((i for i, block in enumerate(blocks) if block.memory < len(block)), 0)


def piece_of(rows: range, index: int, number: int) -> range:
    """The index-th of `number` even pieces; the first ones are larger by one where it does not divide."""
    size, rest = divmod(len(rows), number)
    start = index * size + min(index, rest)
    return rows[start : start + size + (index < rest)]


def _taken(block: Block, pieces: list[range]) -> Block:
    if pieces == block.sources:
        return block
    slices = [slice(piece.start, piece.stop) for piece in pieces]
    memory = sum(len(piece) for piece in pieces if piece.start >= len(block) - block.memory)
    if len(slices) == 1:
        return block.take(lambda column: column[slices[0]], memory)
    return block.take(lambda column: torch.cat([column[rows] for rows in slices]), memory)
