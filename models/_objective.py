"""What lies between a method and an optimizer: a loss over blocks of rows, as a function of the weights alone.

A method gives `Block`s and a `Loss`; an optimizer sees an `Objective`: images, targets and dropout noise are fixed for
a step, and only the weights move. It can be asked for the whole loss, for its rows that come from the stream or from
the memory, for shards of its rows, or for those that have become worst. How rows are cut into parts and put together
again is in `_shards.py`, what several processes exchange in `_shared_rows.py`, and terms of the optimizer's own in
`_added_terms.py`.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from flatcl.models._added_terms import AddedTerm, Costs
from flatcl.models._blocks import Block, Loss, place_of, tensor_of, worst_of
from flatcl.models._checks import not_a_loss, of_loss, of_update, shown
from flatcl.models._shards import Part, joined
from flatcl.models._shared_rows import SharedRows, refuse_drawn
from flatcl.utils.engine import seeding
from flatcl.utils.errors import mistake
from flatcl.utils.optim._base import Grads
from flatcl.utils.optim._driver import Wanted


class Key(NamedTuple):
    """What a part of the loss is for: a guide, the gradient of the ascent, and passes at perturbed weights."""

    guide: str | None
    climbed: bool
    sharp: bool


@dataclass
class Sums:
    """Gradients of one pass, each a sum over those parts of the loss that it is of."""

    whole: Grads | None = None
    climbed: Grads | None = None  # of what the perturbation increases; None too where that is the whole loss
    guides: dict[str, Grads] = field(default_factory=dict)
    total: Tensor | None = None  # of the loss

    def add(self, key: Key, grads: Grads, wanted: np.ndarray | None) -> None:
        """Only guides have the gradients of parameters that are not wanted."""
        if key.guide is not None:
            self.guides[key.guide] = _sum(self.guides.get(key.guide), grads)
        if wanted is not None:
            grads = [g if w else torch.zeros_like(g) for g, w in zip(grads, wanted, strict=True)]
        self.whole = _sum(self.whole, grads)
        if key.climbed:
            self.climbed = _sum(self.climbed, grads)

    def plus(self, other: "Sums") -> "Sums":
        guides = {name: _sum(other.guides.get(name), grads) for name, grads in self.guides.items()}
        return Sums(_both(self.whole, other.whole), _both(self.climbed, other.climbed), guides)

    @property
    def lists(self) -> list[Grads]:
        return [grads for grads in (self.whole, self.climbed, *self.guides.values()) if grads is not None]

    def take(self, lists: list[Grads]) -> None:
        """New values for `lists`, in their order; they leave the given list."""
        self.whole = None if self.whole is None else lists.pop(0)
        self.climbed = None if self.climbed is None else lists.pop(0)
        self.guides = {name: lists.pop(0) for name in self.guides}


@dataclass
class Tally:
    """What the passes of one step leave behind, those over a part of the rows too."""

    used: list[bool]  # which parameters the loss depends on; the others are not stepped
    forward_rows: int = 0
    backward_rows: int = 0
    totals: list[Tensor] = field(default_factory=list)  # the loss of each pass with gradients


class Objective:
    """One step's loss as a function of the weights alone: blocks, targets and dropout noise are fixed.

    The first pass with gradients is the clean one: its loss stays in `loss`, its gradient in `clean` (None where not
    all of it was wanted), the gradients of the method's guides and references in `guides`. With `trace`, the losses and
    gradients of all passes are kept in `passes`.
    With `sharp_on`, later passes, at perturbed weights, go back only through the rows that it says. The gradient of the
    others is that of the clean pass, `still`, and is part of what these passes give.
    Gradients are handed out, not copied: whoever gets one must not change it in place. One that is `recorded`, to be
    replayed, is of a network that draws nothing.

    Where several processes train a run (`utils/engine/ranks.py`), `blocks` are this one's rows of the `whole` blocks.
    What an objective gives, gradients and the clean loss, is of all rows. One that is not `split` is a shard.
    """

    def __init__(
        self, method: Any, blocks: tuple[Block, ...], params: list[Tensor], trace: bool = False,
        recorded: bool = False, split: bool = True,
    ):  # fmt: skip
        self.method, self.params, self.trace, self.recorded = method, params, trace, recorded
        self.whole = tuple(block for block in blocks if not block.reference)
        self.reference_blocks = tuple(block for block in blocks if block.reference)
        self.loss: Any = None  # `Loss`, after the first pass with gradients
        self.clean: Grads | None = None
        self.guides: dict[str, Grads] = {}
        self.sharp_on = "all"
        self.still = Sums()
        self.handed: list[tuple[Callable, int]] | None = None  # see `watch`
        self.passes: list[tuple[Loss, Grads]] = []
        self.tally = Tally([False] * len(params))
        self.skipped = False  # set by an optimizer that did not take the step
        self.added: AddedTerm | None = None  # see `add`
        self.shared = SharedRows(method, method.ranks, self.whole) if split and method.ranks is not None else None
        self.part: Part | None = None if self.shared is None else self.shared.part  # which rows are here, of how many
        self.blocks = self.whole if self.part is None else self.part.blocks
        self.noise = self._generators()  # a network may draw (dropout): every pass draws the same
        self._has_drawn, self._is_clean = False, True

    def _generators(self) -> dict:
        return {} if self.recorded else seeding.global_state()

    @property
    def num_rows(self) -> int:
        return sum(len(block) for block in self.whole)

    @property
    def shares(self) -> list[float]:
        """Of all rows, the part that each block has."""
        return [len(block) / self.num_rows for block in self.whole]

    @property
    def form(self) -> tuple:
        return tuple(block.form for block in self.whole)

    @property
    def used(self) -> list[bool]:
        return self.tally.used

    @property
    def forward_rows(self) -> int:
        return self.tally.forward_rows

    @property
    def backward_rows(self) -> int:
        return self.tally.backward_rows

    def __call__(self) -> Loss:
        """The loss at the present weights, with its graph."""
        watch: AbstractContextManager[dict[int, Tensor]]
        watch = nullcontext({}) if self.added is None else self.added.watch(self.blocks)
        with self._same_noise(), self._precision(), watch as seen:
            loss = self.method.loss(*self.blocks)
            self._check(loss)
            self.tally.forward_rows += self.num_rows
            if self.added is not None:
                self.tally.forward_rows += sum(len(block) for i, block in enumerate(self.whole) if i not in seen)
                loss = self.added.add_to(loss, self.blocks, seen)
        return loss if self.method.amp is None else loss.mapped(_in_float)

    def gradient(self) -> Grads:
        """The gradient of the whole loss at the present weights."""
        return self.gradients()[0]

    def gradients(self, climb: str = "all", wanted: Wanted = None) -> tuple[Grads, Grads]:
        """(gradient of the whole loss, gradient for the ascent), at the present weights, in one forward.

        `climb` says of what the second one is: 'all', 'current' (the stream's rows) or 'memory' (the memory's rows, and
        the penalties, which speak of the past). Parameters that are not `wanted` (P,) bool have zeros and, if the host
        knows which, cost no weight gradient, except in guides.
        """
        clean, self._is_clean = self._is_clean, False
        if clean and self.method.references_first:
            self._refer()
        loss = self()
        weighted = loss if self.part is None else self.part.weighted(loss)
        known = None if isinstance(wanted, Tensor) else wanted
        found = self._backward_parts(self._parts(weighted, climb, clean), known, clean)
        self.tally.totals.append(weighted.total.detach() if found.total is None else found.total)
        if clean or self.trace or self.shared is not None:
            loss = loss.detach()
        if self.method.ranks is not None:
            refuse_drawn(self.method, self.noise)
        if self.shared is not None:
            loss = self._share(self.shared, loss, found, clean)
        if not clean:
            found = found.plus(self.still)
        self.guides |= found.guides
        gradient = found.whole or [torch.zeros_like(p) for p in self.params]
        climbed = gradient if climb == "all" else found.climbed or [torch.zeros_like(p) for p in self.params]
        if isinstance(wanted, Tensor):
            gradient, climbed = (
                [torch.where(is_wanted, g, 0.0) for g, is_wanted in zip(part, wanted.unbind(), strict=True)]
                for part in (gradient, climbed)
            )
        if self.handed is not None:
            self._hand_out(gradient, climbed, *self.guides.values())
        if clean:
            self.loss = loss
            self.clean = gradient if wanted is None or (known is not None and all(known)) else None
            if not self.method.references_first:
                self._refer()
        if self.trace:
            self.passes.append((loss, gradient))
        return gradient, climbed

    def values(self) -> Loss:
        """The loss of all rows at the present weights, without its graph."""
        with torch.no_grad():
            loss = self()
            return loss if self.shared is None else self.shared.of_rows(loss)

    def _refer(self) -> None:
        """The gradients of the references, at the present weights."""
        if not self.reference_blocks:
            return
        rows = sum(len(block) for block in self.reference_blocks)
        references = self.method.references(*self.reference_blocks)
        if not hasattr(references, "__next__"):
            raise mistake(self.method, f"references() must yield (name, loss), it returns {shown(references)}.")
        while True:
            with self._precision():
                found = next(references, None)
            if found is None:
                break
            name, reference = self._named(found)
            self.guides[name] = self._backward(reference.float() if self.method.amp else reference, None, False)
        self.tally.forward_rows += rows
        self.tally.backward_rows += rows
        if self.shared is not None:  # each has passed all of them
            names = [name for name in self.guides if name not in self.method.guides]
            means = self.shared.mean([grad for name in names for grad in self.guides[name]])
            self.guides |= {name: [means.pop(0) for _ in self.params] for name in names}
        if not self._has_drawn:
            self.noise = self._generators()  # what the clean pass draws

    def _named(self, found: Any) -> tuple[str, Tensor]:
        """What `references` has yielded, if it is a name and a loss ()."""
        is_pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Tensor)
        if not is_pair or found[1].ndim:
            got = ", ".join(map(shown, found)) if isinstance(found, tuple) else shown(found)
            raise mistake(self.method, f"references() must yield (name, loss), the loss one number, got {got}.")
        if found[0] in self.method.guides:
            raise mistake(self.method, f"'{found[0]}' is a guide and a reference. Rename one of them.")
        return found

    def watch(self) -> None:
        """From now on it is noticed when somebody changes a gradient in place that this step hands out. What nobody
        keeps is not kept here either."""
        self.handed = []

    def _hand_out(self, *gradients: Grads) -> None:
        assert self.handed is not None
        self.handed += [(ref(part), part._version) for gradient in gradients for part in gradient]

    def check_update(self, optimizer: Any, update: Any) -> None:
        """Refuses, in a step that is watched, an update that is none, and gradients changed in place."""
        self._refuse_changes(optimizer, "a gradient of the objective's")
        problem = of_update("its update", update, self.params)
        if problem:
            raise mistake(optimizer, problem)

    def combine(self, update: Grads) -> Grads:
        if self.handed is None:
            return self.method.combine(update, self.guides)
        self._hand_out(update, *self.guides.values())
        before = [*update]
        combined = self.method.combine(update, self.guides)
        is_changed = [*map(id, update)] != [*map(id, before)]
        self._refuse_changes(self.method, "the update or a guide", is_changed)
        problem = of_update("what combine() returns", combined, self.params)
        if problem:
            raise mistake(self.method, problem)
        return combined

    def forget_gradients(self) -> None:
        """After a step: nobody reads them any more, and each is as large as the weights."""
        self.clean, self.guides, self.still = None, {}, Sums()

    def scale_last_guides(self, scale: Tensor) -> None:
        """Where the guides are of the pass that the update is of, an update that is scaled has scaled ones."""
        if self.method.guides_last:
            own = {name: grads for name, grads in self.guides.items() if name in self.method.guides}
            self.guides |= {name: torch._foreach_mul(grads, scale) for name, grads in own.items()}

    def _refuse_changes(self, part: Any, what: str, is_changed: bool = False) -> None:
        kept = ((gradient(), version) for gradient, version in self.handed or ())
        if is_changed or any(tensor is not None and tensor._version != version for tensor, version in kept):
            raise mistake(part, f"it changes {what} in place. Make a new list, as torch._foreach_add(a, b) does.")

    def has(self, climb: str) -> bool:
        """Whether there are rows of this kind: 'all', 'current' or 'memory'."""
        memory = sum(block.memory for block in self.whole)
        return {"all": True, "current": memory < self.num_rows, "memory": memory > 0}[climb]

    def add(self, name: str, term: Costs) -> None:
        """Adds a term of the optimizer's own: the logits (n, K) of each block -> costs (n,) of each block's rows."""
        self.added = AddedTerm(self.method, name, term)

    def outputs_of(self, net: nn.Module) -> list[Tensor]:
        """Another network's logits (n, K) for each block, without gradient."""
        self.tally.forward_rows += self.num_rows
        with torch.no_grad(), self._precision():
            return [net(block.x).to(self.params[0].dtype) for block in self.blocks]

    def snapshot(self) -> dict[str, Any]:
        """Blocks, noise and used parameters as plain data, from which `later` makes an objective again."""
        blocks = [{"x": block.x, "memory": block.memory, "columns": block.columns} for block in self.whole]
        return {"form": self.form, "blocks": blocks, "noise": self.noise, "used": self.used}

    def later(self, snapshot: dict[str, Any], still: Grads | None = None) -> "Objective":
        """The same loss on the blocks of an earlier step, with their noise; its passes count for this step. `still` is
        the gradient that those rows had there which are not taken at perturbed weights."""
        blocks = (Block(block["x"], block["memory"], **block["columns"]) for block in snapshot["blocks"])
        other = self._on(tuple(blocks), snapshot["noise"])
        other.still = Sums(still)
        return other

    def _on(self, blocks: tuple[Block, ...], noise: dict | None = None, split: bool = True) -> "Objective":
        """The same loss on other blocks. With `noise`, its passes draw what a first pass has drawn; without, its first
        pass is a clean one."""
        other = Objective(self.method, blocks, self.params, recorded=self.recorded, split=split)
        other.tally, other.handed, other.sharp_on = self.tally, self.handed, self.sharp_on
        if noise is not None:
            other.noise, other._has_drawn, other._is_clean = {} if self.recorded else noise, True, False
            other.guides = self.guides
        return other

    def num_shards(self, number: int, least: int = 1) -> int:
        """`number`, or as many as the smallest source of any block has rows, and as leave `least` rows to a forward."""
        rows = [len(rows) for block in self.whole for rows in block.sources]
        return max(1, min(number, *rows, *(len(block) // least for block in self.whole)))

    def shards(self, number: int) -> Iterator[tuple[float, "Objective"]]:
        """(share, objective) of disjoint shards, one after the other, each with every block's mix of sources.

        There are `number` of them, at most `num_shards`. The shares, parts of all rows, sum to 1, and the losses
        weighted with them to the whole loss. After the last one, `loss` and `guides` are those of all. Each rank has
        its own (`own_shards`), or all where they are fewer than the ranks; `of_all_shards` sums what it makes of them.
        """
        if self.method.references_first:
            self._refer()
        done: list[tuple[Part, Objective]] = []
        before = [self.tally.forward_rows, self.tally.backward_rows]
        for index in self.own_shards(number):
            part = Part.shard(self.whole, index, number)
            shard = self._on(part.blocks, split=False)
            shard.part = part
            yield part.share, shard
            done.append((part, shard))
        self._join(done, number, before)

    def own_shards(self, number: int) -> range:
        """Which of so many shards are this rank's."""
        return range(number) if self.shared is None else self.shared.own_shards(number)

    def of_all_shards(self, parts: Grads, number: int) -> Grads:
        """The sums over all of `number` shards, from those over this rank's."""
        return parts if self.shared is None else self.shared.of_all_shards(parts, number)

    def of_all_rows(self, parts: dict[int, Tensor]) -> dict[int, Tensor]:
        """{block: (n, ...) of its rows}, from what `blocks` have."""
        if self.shared is None:
            return parts
        loss = self.shared.of_rows(Loss({str(index): (self.blocks[index], part) for index, part in parts.items()}))
        return {int(name): tensor_of(of) for name, of in loss.rows.items()}

    def hardest(self, fraction: float, before: Loss, after: Loss, least: int = 1) -> "Objective":
        """The same loss on the rows whose cost has grown most from `before` to `after`: of each block's rows of the
        stream, and of those of the memory, this fraction, at least one, and at least `least` in a forward.

        A network that draws (dropout) draws for them from the start of the step's noise, not what each row had.
        """
        growth: list[Tensor | None] = [None] * len(self.blocks)
        for name, cost in after.costs.items():
            index = place_of(after.rows[name], self.whole)
            rise = cost.detach() - before.costs[name].detach()
            so_far = growth[index]
            growth[index] = rise if so_far is None else so_far + rise
        worst = tuple(worst_of(block, rise, fraction, least) for block, rise in zip(self.whole, growth, strict=True))
        other = self._on(worst, self.noise)
        other.still = self.still
        return other

    def _check(self, loss: Any) -> None:
        """Refuses a loss that is not one of these blocks, once for each form of a step: terms and sizes of blocks."""
        form = None
        if isinstance(loss, Loss) and isinstance(loss.rows, dict) and isinstance(loss.penalties, dict):
            form = ((*loss.rows, *loss.penalties), tuple(map(len, self.blocks)))
            if form in self.method.checked_losses:
                return
        is_loss = isinstance(loss, Loss)
        problem = of_loss(loss, self.blocks, self.method.loss) if is_loss else not_a_loss(loss)
        if problem:
            raise mistake(self.method, problem)
        if form is not None:
            self.method.checked_losses.add(form)

    @contextmanager
    def _same_noise(self) -> Iterator[None]:
        """Every pass draws what the first one drew, and leaves the generators where the first one left them."""
        if not self._has_drawn or not self.noise:
            self._has_drawn = True
            yield
            return
        present = seeding.global_state()
        seeding.set_global_state(self.noise)
        try:
            yield
        finally:
            seeding.set_global_state(present)

    def _precision(self) -> AbstractContextManager[Any]:
        """Autocast of one pass. Casts of weights are not kept: weights move between passes, gradients of several blocks
        add up in float32, and a recorder cannot know what was cast before."""
        if self.method.amp is None:
            return nullcontext()
        return torch.autocast(self.params[0].device.type, self.method.amp, cache_enabled=False)

    def _parts(self, loss: Loss, climb: str, clean: bool) -> dict[Key, tuple[Tensor, int]]:
        """{key: (sum of the pieces, rows behind them)}; what belongs to no guide comes first."""
        names = [*loss.rows, *loss.penalties]
        guide_of = {}
        if clean or self.method.guides_last:
            guide_of = {term: guide for guide, terms in self.method.guides.items() for term in terms if term in names}
        is_split = climb != "all" or self.sharp_on != "all"
        if not guide_of and not is_split:
            return {Key(None, False, True): (loss.total, self.num_rows)}
        pieces: dict[Key, list[tuple[Tensor, int | None]]] = {}
        for name in sorted(names, key=lambda name: name in guide_of):
            for piece, source, block in self._pieces(loss, name, is_split):
                key = Key(guide_of.get(name), climb == source, self.sharp_on in ("all", source))
                pieces.setdefault(key, []).append((piece, block))
        return {
            key: (
                reduce(operator.add, [piece for piece, _ in group]),
                sum(len(self.whole[block]) for block in {block for _, block in group if block is not None}),
            )
            for key, group in pieces.items()
        }

    def _pieces(self, loss: Loss, name: str, is_split: bool) -> list[tuple[Tensor, str, int | None]]:
        """(piece of a term, whether it is of 'current' or 'memory' rows, if that is asked for, its block). Penalties
        speak of the past."""
        if name in loss.penalties:
            return [(loss.penalties[name], "memory", None)]
        index, term = place_of(loss.rows[name], self.blocks), loss.terms[name]
        if not is_split:
            return [(term, "", index)]
        block = self.blocks[index]
        if block.memory in (0, len(block)):
            return [(term, "memory" if block.memory else "current", index)]
        stream, memory = loss.costs[name].split((len(block) - block.memory, block.memory))
        return [(stream.sum() / len(block), "current", index), (memory.sum() / len(block), "memory", index)]

    def _backward_parts(self, parts: dict[Key, tuple[Tensor, int]], wanted: np.ndarray | None, clean: bool) -> Sums:
        """Takes the gradients of the parts apart. Blocks have forwards of their own, so guides cost nothing. In a pass
        that is not the clean one, only what is sharp."""
        found, still = Sums(), Sums()
        if self.sharp_on != "all":
            sharp, others = (
                [part.detach() for key, (part, _) in parts.items() if key.sharp == is_sharp]
                for is_sharp in (True, False)
            )
            zero = self.params[0].new_zeros(())
            if clean:
                still.total = reduce(operator.add, others, zero)
            else:
                found.total = reduce(operator.add, sharp, zero if self.still.total is None else self.still.total)
        used = {
            key: (part, rows)
            for key, (part, rows) in parts.items()
            if (clean or key.sharp) and part.requires_grad  # else it has no gradient
        }
        for position, (key, (part, rows)) in enumerate(used.items(), start=1):
            is_complete = key.guide is not None or not key.sharp
            own = self._backward(part, None if is_complete else wanted, keep_graph=position < len(used))
            self.tally.backward_rows += rows
            found.add(key, own, wanted if is_complete else None)
            if not key.sharp:
                still.add(key, own, None)
        if clean:
            self.still = still
        return found

    def _backward(self, part: Tensor, wanted: np.ndarray | None, keep_graph: bool) -> Grads:
        grads: list[Tensor | None] = [None] * len(self.params)
        if part.requires_grad:  # else a reference that no weight has a say in
            rows = [i for i in range(len(self.params)) if wanted is None or wanted[i]]
            inputs = [self.params[i] for i in rows]
            found = torch.autograd.grad(part, inputs, retain_graph=keep_graph, allow_unused=True)
            for i, grad in zip(rows, found, strict=True):
                grads[i] = grad
                self.tally.used[i] |= grad is not None
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, grads, strict=True)]

    def _share(self, shared: SharedRows, loss: Loss, found: Sums, clean: bool) -> Loss:
        """The loss of all rows from that of the ranks' rows, only of the clean pass and for `passes`; the gradients of
        all rows take the place of those found."""
        if clean:
            shared.refuse_mixed_rows(self.form)
        sums = [found, self.still] if clean else [found]
        gradients = [grads for one in sums for grads in one.lists]
        is_read = clean or self.trace
        total = self.tally.totals.pop()
        whole, total, gradients = shared.of_pass(loss if is_read else None, total, gradients, clean)
        self.tally.totals.append(total)
        for one in sums:
            one.take(gradients)
        return whole or loss

    def _join(self, done: list[tuple[Part, "Objective"]], number: int, before: list[int]) -> None:
        """Clean loss and guides of all rows, from those of the shards done here, of `number`; rows counted `before`."""
        loss = joined([(part, shard.loss) for part, shard in done])
        guides: dict[str, Grads] = {}
        for part, shard in done:
            for guide, grads in shard.guides.items():
                guides[guide] = _sum(guides.get(guide), torch._foreach_mul(grads, part.share))
        if self.shared is not None:
            tally = self.tally
            rows = [tally.forward_rows - before[0], tally.backward_rows - before[1]]
            loss, total, rows, gradients = self.shared.of_shards(
                loss, reduce(operator.add, tally.totals), rows, [*guides.values()], is_complete=len(done) == number
            )
            tally.totals[:] = [total]
            tally.forward_rows, tally.backward_rows = before[0] + rows[0], before[1] + rows[1]
            guides = dict(zip(guides, gradients, strict=True))
        self.loss = loss
        self.guides |= guides
        if not self.method.references_first:
            self._refer()


def _in_float(tensor: Tensor) -> Tensor:
    """In float32, unless it holds something else, such as indices or flags of rows."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _sum(so_far: Grads | None, grads: Grads) -> Grads:
    return grads if so_far is None else torch._foreach_add(so_far, grads)


def _both(a: Grads | None, b: Grads | None) -> Grads | None:
    return a if b is None else _sum(a, b)
