"""Rows that several processes share (`utils/engine/ranks.py`): what each gives of its own becomes what is of all."""

from typing import Any

import torch
from torch import Tensor, nn

from flatcl.models._blocks import Block, Loss, changed, place_of, tensor_of
from flatcl.models._shards import Part, joined, place_of_stream
from flatcl.utils.engine import seeding
from flatcl.utils.engine.passes import eval_mode
from flatcl.utils.engine.ranks import refuse_draws
from flatcl.utils.errors import mistake
from flatcl.utils.optim._base import Grads
from flatcl.utils.optim._driver import batchnorms
from flatcl.utils.protocols import Ranks


class SharedRows:
    """The exchange of one step. `part` has this process's rows; all processes make the same calls in the same order."""

    def __init__(self, method: Any, ranks: Ranks, whole: tuple[Block, ...]):
        self.method, self.ranks = method, ranks
        self.part = Part.of_process(whole, ranks.number, ranks.size)

    def own_shards(self, number: int) -> range:
        """Which of so many shards are this rank's: all where they are fewer than the ranks."""
        if number < self.ranks.size:
            return range(number)
        return range(self.ranks.number, number, self.ranks.size)

    def of_all_shards(self, parts: Grads, number: int) -> list[Tensor]:
        """The sums over all of `number` shards, from those over this rank's."""
        if len(self.own_shards(number)) == number:  # each rank has done all of them
            parts = torch._foreach_mul(parts, 1 / self.ranks.size)
        return self.ranks.sum([*parts])

    def mean(self, tensors: list[Tensor]) -> list[Tensor]:
        """The mean over the ranks of what all of them have computed, which may round otherwise on another GPU."""
        return self.ranks.sum([tensor / self.ranks.size for tensor in tensors])

    def of_rows(self, loss: Loss) -> Loss:
        """The loss of all rows, from that of this rank's."""
        return self._of_part(loss, [])[0]

    @torch.no_grad()
    def of_pass(
        self, loss: Loss | None, total: Tensor, gradients: list[Grads], clean: bool
    ) -> tuple[Loss | None, Tensor, list[Grads]]:
        """Loss, total and gradients of all rows, from those of the ranks' rows, in one exchange. `loss` is None where
        nobody reads it."""
        averages = _averages(self.method) if clean else []
        given = [total, *(grad for grads in gradients for grad in grads), *averages]
        sums = [*torch._foreach_mul(given, 1 / self.ranks.size)]
        if loss is None:
            sums = self.ranks.sum(sums)
        else:
            loss, sums = self._of_part(loss, sums)
        total = sums.pop(0).clone()  # or all that was exchanged would stay until the step's end
        found = _like(gradients, sums)
        _keep(averages, sums)
        return loss, total, found

    @torch.no_grad()
    def of_shards(
        self, loss: Loss, total: Tensor, rows: list[int], gradients: list[Grads], is_complete: bool
    ) -> tuple[Loss, Tensor, list[int], list[Grads]]:
        """The same, and the numbers of rows, from the shards of all ranks. `is_complete`: each of them has done all."""
        part, averages = 1 / self.ranks.size if is_complete else 1.0, _averages(self.method)
        numbers = torch.tensor(rows, dtype=torch.float64).to(total.device)
        own = torch._foreach_mul([total, numbers, *(grad for grads in gradients for grad in grads)], part)
        sums = [*own, *(average / self.ranks.size for average in averages)]
        is_own = not is_complete or self.ranks.number == 0
        loss, (total, numbers, *sums) = self._exchanged(loss, [is_own] * len(self.part.whole), sums)
        found = _like(gradients, sums)
        _keep(averages, sums)
        return loss, total, [round(number) for number in numbers.tolist()], found

    @torch.no_grad()
    def refuse_mixed_rows(self, form: tuple) -> None:
        """Where the rows of a block cost something else without the others; looked at once for each form of blocks."""
        if form in self.method.checked_rows:
            return
        self.method.checked_rows.add(form)
        part = self.part
        with eval_mode(self.method):
            whole, own = self.method.loss(*part.whole), self.method.loss(*part.blocks)
        for name, cost in whole.costs.items():
            index = place_of(whole.rows[name], part.whole)
            rows = torch.cat([cost[rows.start : rows.stop] for rows in part.pieces[index]])
            if not torch.allclose(rows.float(), own.costs[name].float(), rtol=1e-3, atol=1e-5, equal_nan=True):
                raise mistake(
                    self.method,
                    f"the cost of a row in the term '{name}' depends on other rows of its block, so several "
                    "processes cannot share the rows. Write in its class: rows_are_independent = False, and start "
                    "one process.",
                )

    def _of_part(self, loss: Loss, sums: list[Tensor]) -> tuple[Loss, list[Tensor]]:
        """From the loss of this rank's rows. A block that each rank has whole is rank 0's."""
        part, is_first = self.part, self.ranks.number == 0
        is_own = [is_first or part.blocks[i] is not block for i, block in enumerate(part.whole)]
        return self._exchanged(joined([(part, loss)]), is_own, sums)

    def _exchanged(self, loss: Loss, is_own: list[bool], sums: list[Tensor]) -> tuple[Loss, list[Tensor]]:
        """A loss whose rows are those of all ranks, zeros where they are another's, and the sums over all."""
        whole = self.part.whole
        given = [*loss.rows.values(), *loss.outputs.values(), *([] if loss.logits is None else [loss.logits])]
        tensors = []
        for of in given:
            index = place_of_stream(whole) if of is loss.logits else place_of(of, whole)
            values = tensor_of(of)
            tensors.append(values if is_own[index] else torch.zeros_like(values))
        found = self.ranks.sum([*tensors, *sums])
        rows, outputs = (
            {name: changed(of, lambda _: found.pop(0)) for name, of in column.items()}
            for column in (loss.rows, loss.outputs)
        )
        logits = None if loss.logits is None else found.pop(0)
        return Loss(rows, logits, loss.penalties, outputs), found


def refuse_drawn(method: Any, noise: dict) -> None:
    """Where the first pass of a run has drawn since its generators stood at `noise`."""
    if method.has_drawn is None:
        method.has_drawn = seeding.differ(noise, seeding.global_state())
        if method.has_drawn:
            refuse_draws("in its forward")


def _averages(method: nn.Module) -> list[Tensor]:
    """BatchNorm's running averages, where a pass has moved them."""
    layers = [layer for layer in batchnorms(method) if layer.training and layer.track_running_stats]
    found = [average for layer in layers for average in (layer.running_mean, layer.running_var)]
    return [average for average in found if average is not None]


def _keep(averages: list[Tensor], found: list[Tensor]) -> None:
    if averages:
        torch._foreach_copy_(averages, found)


def _like(lists: list[Grads], flat: list[Tensor]) -> list[Grads]:
    """The first of `flat`, which leave it, in lists as long as these."""
    return [[flat.pop(0) for _ in grads] for grads in lists]
