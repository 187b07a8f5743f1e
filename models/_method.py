"""The heart of the house: a method gives a loss, the engine owns the step.

A method has three rooms: `draw` (all randomness), `loss` (pure; called one to four times a step, at moved weights) and
`remember` (all side effects, from the clean pass). `observe` puts them together and is final. What lies between, the
gradients and the weights, belongs to the optimizer (`utils/optim/_sharpness.py`), which sees a method as an
`Objective`: a frozen function of the weights.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from utils import seeding

Grads = list[Tensor]  # aligned with the optimizer's params; a parameter without gradient has zeros

# (dataset, buffer size or None) -> {flag: (value, where it comes from)}
Published = Mapping[tuple[str, int | None], Mapping[str, tuple[Any, str]]]

SETTINGS = ("class-il", "domain-il", "general-continual")


class Block:
    """Rows that pass through the network together: one forward, hence one BatchNorm batch.

    `x` (N, C, H, W) float32 is augmented and normalised; further columns (`y` (N,) int64, `ids` (N,) int64,
    `logits` (N, K) float32, ...) are attributes. The last `memory` rows come from the buffer.
    """

    def __init__(self, x: Tensor, memory: int = 0, **columns: Tensor):
        self.x, self.memory, self.columns = x, memory, columns

    def __len__(self) -> int:
        return len(self.x)

    def __getattr__(self, name: str) -> Tensor:
        if name == "columns" or name not in self.columns:
            raise AttributeError(f"this block has no column '{name}'")
        return self.columns[name]


class Batch:
    """What the stream hands out: `x` (N, C, H, W) uint8 as stored, `inputs` its augmented and normalised form, float32;
    `y` (N,) int64; `ids` (N,) int64, unique over the benchmark.

    Where nothing is augmented, `inputs` is not given but converted from `x` when asked for.
    """

    def __init__(self, x: Tensor, y: Tensor, ids: Tensor, inputs: Tensor | None, augment: Any):
        self.x, self.y, self.ids, self._inputs, self._augment = x, y, ids, inputs, augment

    @property
    def inputs(self) -> Tensor:
        if self._inputs is None:
            self._inputs = self._augment(self.x)
        return self._inputs

    @property
    def block(self) -> Block:
        return Block(self.inputs, y=self.y, ids=self.ids)


class Loss:
    """What a method minimises, term by term.

    `rows[name]` (n,) holds a term's cost for each of its rows, weight included; the term is their mean.
    `penalties[name]` () are terms that belong to no row (a regulariser). `logits` (N, K) are the stream's.
    """

    def __init__(self, rows: Mapping[str, Tensor], logits: Tensor | None = None, penalties: Mapping[str, Tensor] = {}):
        self.rows, self.logits, self.penalties = rows, logits, penalties

    @cached_property
    def terms(self) -> dict[str, Tensor]:
        """{name: ()}; they sum to `total`."""
        return {**{name: rows.mean() for name, rows in self.rows.items()}, **self.penalties}

    @cached_property
    def total(self) -> Tensor:
        return reduce(operator.add, self.terms.values())

    def detach(self) -> "Loss":
        loss = Loss(
            {name: rows.detach() for name, rows in self.rows.items()},
            None if self.logits is None else self.logits.detach(),
            {name: term.detach() for name, term in self.penalties.items()},
        )
        loss.terms = {name: term.detach() for name, term in self.terms.items()}
        loss.total = self.total.detach()
        return loss


class Objective:
    """One step's loss as a function of the weights alone: blocks, targets and dropout noise are fixed.

    The first call of `gradient` is the clean pass: its loss stays in `loss`, the gradients of the method's guides in
    `guides`. With `trace`, the losses and gradients of all passes are kept in `passes` for diagnostics.
    """

    def __init__(self, method: "Method", blocks: tuple[Block, ...], params: list[nn.Parameter], trace: bool = False):
        self.method, self.blocks, self.params, self.trace = method, blocks, params, trace
        self.loss: Loss | None = None
        self.guides: dict[str, Grads] = {}
        self.used = [True] * len(params)  # which parameters the clean loss depends on; the others are not stepped
        self.passes: list[tuple[Loss, Grads]] = []
        self.forward_rows = self.backward_rows = 0
        self._rows = sum(len(block) for block in blocks)
        self._noise = seeding.global_state()  # a network may draw (dropout): every pass draws the same

    def __call__(self) -> Loss:
        """The loss at the present weights, with its graph."""
        if self.forward_rows:
            seeding.set_global_state(self._noise)
        self.forward_rows += self._rows
        return self.method.loss(*self.blocks)

    def gradient(self) -> Grads:
        """The gradient of the total loss at the present weights."""
        loss = self()
        self.backward_rows += self._rows
        if self.loss is None:
            gradient = self._clean_gradient(loss)
            self.loss = loss.detach()
        else:
            gradient = self._backward(loss.total)
        if self.trace:
            self.passes.append((loss.detach(), gradient))
        return gradient

    def _clean_gradient(self, loss: Loss) -> Grads:
        """Takes the guides' gradients apart from the rest. Blocks have forwards of their own, so this costs nothing."""
        guides, rest = {}, dict(loss.terms)
        for guide, names in self.method.guides.items():
            present = [rest.pop(name) for name in names if name in rest]
            if present:
                guides[guide] = reduce(operator.add, present)
        self.used = [False] * len(self.params)
        if not guides:
            return self._backward(loss.total, clean=True)
        gradient = None
        if rest:
            gradient = self._backward(reduce(operator.add, rest.values()), keep_graph=True, clean=True)
        for position, (guide, term) in enumerate(guides.items(), start=1):
            self.guides[guide] = self._backward(term, keep_graph=position < len(guides), clean=True)
            gradient = self.guides[guide] if gradient is None else torch._foreach_add(gradient, self.guides[guide])
        return gradient

    def _backward(self, term: Tensor, keep_graph: bool = False, clean: bool = False) -> Grads:
        grads = torch.autograd.grad(term, self.params, retain_graph=keep_graph, allow_unused=True)
        if clean:
            self.used = [used or grad is not None for used, grad in zip(self.used, grads, strict=True)]
        if any(grad is None for grad in grads):
            return [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, grads, strict=True)]
        return list(grads)

    def combine(self, update: Grads) -> Grads:
        return self.method.combine(update, self.guides)


@dataclass(frozen=True)
class Context:
    """What a method is built with, besides its network and its flags.

    `augment` turns stored images (uint8) into training inputs; `rng` is the buffer's generator.
    """

    benchmark: Any
    augment: Any
    device: torch.device
    rng: np.random.Generator


class Method(nn.Module):
    """A continual learner. Subclasses fill the three rooms and declare flags (`Args`) and published values."""

    name: str
    Args: type | None = None
    published: Published = {}
    default_optimizer = "sgd"
    settings: tuple[str, ...] = SETTINGS  # the settings that this method can learn in
    trains_jointly = False  # sees all tasks at once: an upper bound, not a continual learner
    guides: Mapping[str, tuple[str, ...]] = {}  # name -> the loss terms whose clean gradient `combine` gets

    def __init__(self, net: nn.Module, args: Any, context: Context):
        super().__init__()
        self.net, self.args, self.context = net, args, context

    @classmethod
    def check(cls, config: Any, benchmark: type) -> list[str]:
        """Problems of this method with a configuration, one line each; called before any data is loaded."""
        if benchmark.setting in cls.settings:
            return []
        return [
            f"--model {cls.name} cannot learn {benchmark.name}: it needs the setting "
            f"{' or '.join(cls.settings)}, got {benchmark.setting}. Choose another model or dataset."
        ]

    def begin_task(self, task: Any) -> None:
        """Called before a task's first batch. On a general-continual stream: once, at its start."""

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        """The blocks of one step. The only place that may use randomness."""
        return (batch.block,)

    def loss(self, *blocks: Block) -> Loss:
        """The loss of these blocks at the present weights. Pure: no randomness, no side effect."""
        raise NotImplementedError

    def combine(self, update: Grads, guides: Mapping[str, Grads]) -> Grads:
        """Gradient surgery, after the optimizer has found its direction. `guides` is empty while there is no memory."""
        return update

    def remember(self, batch: Batch, loss: Loss) -> None:
        """Side effects of a step (the buffer), after the update, from the clean pass's detached loss."""

    def end_task(self, task: Any) -> None:
        """Called after a task's last batch, before the evaluation. Not called on a general-continual stream."""

    def diagnose(self, objective: Objective, update: Grads) -> dict[str, Tensor]:
        """{name: ()} for TensorBoard, on logged steps only; `objective.passes` holds every pass of the step."""
        return {}

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """(N, C, H, W) float32 -> logits (N, K), for the evaluator. `task` is None unless the task is known."""
        return self.net(x)

    @final
    def observe(self, batch: Batch, optimizer: Any, trace: bool = False) -> tuple[Objective, Grads]:
        """One training step on one batch."""
        objective = Objective(self, self.draw(batch), optimizer.params, trace)
        update = optimizer.step(objective)
        self.remember(batch, objective.loss)
        return objective, update


def published(source: str, table: Mapping[tuple, dict]) -> Published:
    """Rows {(dataset, buffer size, ...): values}, all from one source; `(dataset,)` has no buffer."""
    return {
        (dataset, size): {name: (value, f"published: {source}") for name, value in values.items()}
        for (dataset, *sizes), values in table.items()
        for size in (sizes or [None])
    }


def ours(base: Published, why: str, **values: Any) -> Published:
    """Another method's rows with values added that are ours, and marked so."""
    added = {name: (value, f"ours: {why}") for name, value in values.items()}
    return {key: {**row, **added} for key, row in base.items()}
