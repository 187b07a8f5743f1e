"""Rows that several processes share: an objective of one's own that gives what is of all (`utils/engine/ranks.py`)."""

from typing import Any

import torch
from torch import Tensor

from flatcl.models._blocks import Block, Loss, changed, piece_of, place_of, take_pieces
from flatcl.utils.engine import seeding
from flatcl.utils.engine.passes import eval_mode
from flatcl.utils.engine.ranks import Ranks, refuse_draws
from flatcl.utils.errors import mistake
from flatcl.utils.optim._base import Grads
from flatcl.utils.optim._driver import batchnorms


class SharedRows:
    """The part of an `Objective` that exchanges. `blocks` are this process's rows of the `whole` blocks, `pieces` says
    which; `ranks` is None where there is one process, or where the rows are a shard's."""

    method: Any
    whole: tuple[Block, ...]
    ranks: Ranks | None

    def own_shards(self, number: int) -> range:
        """Which of so many shards are this rank's."""
        if self.ranks is None or number < self.ranks.size:
            return range(number)
        return range(self.ranks.number, number, self.ranks.size)

    def of_all_shards(self, parts: list[Tensor], number: int) -> list[Tensor]:
        """The sums over all of `number` shards, from those over this rank's."""
        if self.ranks is None:
            return parts
        if len(self.own_shards(number)) == number:  # each rank has done all of them
            parts = torch._foreach_mul(parts, 1 / self.ranks.size)
        return self.ranks.sum(parts)

    def of_all_rows(self, parts: dict[int, Tensor]) -> dict[int, Tensor]:
        """{block: (n, ...) of its rows}, from what `blocks` have."""
        if self.ranks is None:
            return parts
        rows = {str(index): (self.blocks[index], part) for index, part in parts.items()}
        loss, _ = self._exchanged(self._placed([(self, Loss(rows))]), self.is_own, [])
        return {int(name): values for name, (_, values) in loss.rows.items()}

    def _take_own_rows(self) -> None:
        """Of each block this rank's rows; all of one that has fewer than there are ranks, from the stream or from the
        memory. Terms are weighted so that the mean over the ranks is the whole loss."""
        number, size, parts = self.ranks.number, self.ranks.size, []
        self.pieces, self.is_own, weights = [], [], []
        for block in self.whole:
            is_cut = all(len(rows) >= size for rows in block.sources)
            pieces = [piece_of(rows, number, size) for rows in block.sources] if is_cut else block.sources
            parts.append(take_pieces(block, pieces) if is_cut else block)
            self.pieces.append(pieces)
            self.is_own.append(is_cut or number == 0)  # whose rows of results are taken
            weights.append(len(parts[-1]) * size / len(block) if is_cut else 1.0)
        self.blocks = tuple(parts)
        self.weights = weights if any(weight != 1 for weight in weights) else None

    @property
    def _of_stream(self) -> int:
        """The first block with rows of the stream."""
        return next((i for i, block in enumerate(self.whole) if block.memory < len(block)), 0)

    @torch.no_grad()
    def _refuse_mixed_rows(self) -> None:
        """Where the rows of a block cost something else without the others; looked at once for each form of blocks."""
        if self.form in self.method.checked_rows:
            return
        self.method.checked_rows.add(self.form)
        with eval_mode(self.method):
            whole, own = self.method.loss(*self.whole), self.method.loss(*self.blocks)
        for name, cost in whole.costs.items():
            index = place_of(whole.rows[name], self.whole)
            rows = torch.cat([cost[rows.start : rows.stop] for rows in self.pieces[index]])
            if not torch.allclose(rows.float(), own.costs[name].float(), rtol=1e-3, atol=1e-5, equal_nan=True):
                raise mistake(
                    self.method,
                    f"the cost of a row in the term '{name}' depends on other rows of its block, so several "
                    "processes cannot share the rows. Write in its class: rows_are_independent = False, and start "
                    "one process.",
                )

    def _refuse_draws(self) -> None:
        """Where the first pass of a run has drawn."""
        if self.method.has_drawn is None:
            self.method.has_drawn = seeding.differ(self.noise, seeding.global_state())
            if self.method.has_drawn:
                refuse_draws("in its forward")

    @torch.no_grad()
    def _meet(self, loss: Loss, gradient: Grads, climbed: Grads, clean: bool) -> tuple[Loss, Grads, Grads]:
        """The loss of all rows and its gradients, from those of the ranks' rows, in one exchange. The loss only of the
        clean pass and for `passes`."""
        names = [name for name in self.guides if name in self.method.guides] if clean else []
        lists = [gradient, *([] if climbed is gradient else [climbed]), *(self.guides[name] for name in names)]
        sums = [self.tally.totals.pop(), *(grad for grads in lists for grad in grads)]
        sums = torch._foreach_mul([*sums, *(self._averages() if clean else [])], 1 / self.ranks.size)
        if clean or self.trace:
            loss, sums = self._exchanged(self._placed([(self, loss)]), self.is_own, sums)
        else:
            sums = self.ranks.sum(sums)
        self.tally.totals.append(sums.pop(0).clone())  # or all that was exchanged would stay until the step's end
        found = [[sums.pop(0) for _ in grads] for grads in lists]
        self.guides |= dict(zip(names[::-1], found[::-1], strict=False))
        if clean:
            self._keep_averages(sums)
        return loss, found[0], found[0] if climbed is gradient else found[1]

    def _join_ranks(self, guides: dict[str, Grads], before: tuple[int, int], is_complete: bool) -> dict[str, Grads]:
        """The same from the shards of all ranks. `is_complete`: each of them has done all."""
        tally, part = self.tally, 1 / self.ranks.size if is_complete else 1.0
        rows = torch.tensor([tally.forward_rows - before[0], tally.backward_rows - before[1]], dtype=torch.float64)
        sums = [
            sum(tally.totals),
            rows.to(self.params[0].device),
            *(grad for grads in guides.values() for grad in grads),
        ]
        sums = [*torch._foreach_mul(sums, part), *(average / self.ranks.size for average in self._averages())]
        is_own = not is_complete or self.ranks.number == 0
        self.loss, (total, rows, *sums) = self._exchanged(self.loss, [is_own] * len(self.whole), sums)
        tally.totals[:] = [total]
        tally.forward_rows, tally.backward_rows = (round(a + b) for a, b in zip(before, rows.tolist(), strict=True))
        found = {name: [sums.pop(0) for _ in grads] for name, grads in guides.items()}
        self._keep_averages(sums)
        return found

    def _averages(self) -> list[Tensor]:
        """BatchNorm's running averages, where a pass has moved them."""
        layers = [layer for layer in batchnorms(self.method) if layer.training and layer.track_running_stats]
        return [average for layer in layers for average in (layer.running_mean, layer.running_var)]

    def _keep_averages(self, found: list[Tensor]) -> None:
        if found:
            torch._foreach_copy_(self._averages(), found)

    def _exchanged(self, loss: Loss, is_own: list[bool], sums: list[Tensor]) -> tuple[Loss, list[Tensor]]:
        """A loss whose rows are those of all ranks, zeros where they are another's, and the sums over all."""
        given = [*loss.rows.values(), *loss.outputs.values(), *([] if loss.logits is None else [loss.logits])]
        tensors = []
        for of in given:
            values = of[1] if isinstance(of, tuple) else of
            index = place_of(of, self.whole) if of is not loss.logits else self._of_stream
            tensors.append(values if is_own[index] else torch.zeros_like(values))
        found = self.ranks.sum([*tensors, *sums])
        loss = loss.mapped(lambda values: values)
        for column in (loss.rows, loss.outputs):
            column.update({name: changed(of, lambda _: found.pop(0)) for name, of in column.items()})
        if loss.logits is not None:
            loss.logits = found.pop(0)
        return loss, found
