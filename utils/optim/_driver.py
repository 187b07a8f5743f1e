"""The driver of all optimizers: weights, state, and steps that are taken as a whole or not at all.

A step is a direction, found over a frozen objective, that goes to a base optimizer. Whatever happens on the way, an
exception or a loss that is not finite, weights, state and BatchNorm statistics are then what they were before. The
primitives are here once: passes at moved weights, global norms and dot products, frozen statistics.

On the CPU the host sees whether a step is finite and does not take it. Elsewhere the device decides, so that the host
need not wait for it: what a step changes is kept beside it for a moment (about four times the weights), whole numbers
that the host counts go on, and images of a bad step are remembered, with zeros for logits that are not finite.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flatcl.utils.arguments import flag
from flatcl.utils.engine import seeding
from flatcl.utils.engine.layout import lay_out
from flatcl.utils.optim._base import SGD, Base, Grads
from flatcl.utils.protocols import Config, Method, Task

Wanted = np.ndarray | Tensor | None  # (P,) bool: the parameters whose gradients are asked for; None: all

BatchNorm = nn.modules.batchnorm._BatchNorm  # all of torch's

WATCHED = 3  # first steps of a task in which it is checked what is made of the gradients


def norm(vector: Grads) -> Tensor:
    """Global L2 norm () of a list of tensors."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(vector)))


def flat(vector: Grads) -> Tensor:
    """A list of tensors as one vector (P,)."""
    return torch.cat([part.reshape(-1) for part in vector])


def dot(a: Grads, b: Grads) -> Tensor:
    """Inner product () of two aligned lists of tensors."""
    return flat(torch._foreach_mul(a, b)).sum()


@contextmanager
def frozen_statistics(module: nn.Module | list[BatchNorm]) -> Iterator[None]:
    """BatchNorm layers normalise with the batch, but their running averages and counters stay as they are.

    Takes a module or its list of BatchNorm layers. Safe to nest, and left behind by an exception as by a return.
    """
    layers = batchnorms(module) if isinstance(module, nn.Module) else module
    tracked = [layer.track_running_stats for layer in layers]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer, was_tracked in zip(layers, tracked, strict=True):
            layer.track_running_stats = was_tracked


def batchnorms(module: nn.Module) -> list[BatchNorm]:
    return [m for m in module.modules() if isinstance(m, BatchNorm)]


def normalise_single_values(module: nn.Module) -> list[BatchNorm]:
    """From now on, BatchNorm layers in train mode that get a single value per channel (one image whose map has one
    place) normalise it with their running averages and leave these as they are: for that call they are in eval mode.

    Others of the same pass, which have several values, are not touched. This is the one rule for a last batch of one
    image, `--minibatch_size 1`, and methods that pass images one by one; torch raises there. Copies of a layer keep it,
    and nothing of it is in the state_dict. Returns the layers.
    """
    layers = batchnorms(module)
    for layer in layers:
        if isinstance(layer, nn.SyncBatchNorm):  # whose values are those of all processes
            continue
        if "forward" not in vars(layer):  # of the layer itself, or of the one that it is a copy of
            vars(layer)["forward"] = partial(_forward_of_batchnorm, layer)
    return layers


def _forward_of_batchnorm(layer: BatchNorm, x: Tensor) -> Tensor:
    if not layer.training or x.numel() > layer.num_features:
        return type(layer).forward(layer, x)
    layer.training = False
    try:
        return type(layer).forward(layer, x)
    finally:
        layer.training = True


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained; those with `requires_grad` False stay as they are."""
    return [p for p in module.parameters() if p.requires_grad]


class Driver:
    """Steps the parameters of a method by the gradient of its loss. Subclasses override `direction`.

    What a variant keeps from step to step is in `state[name]`, a list of tensors aligned with `params`, and in
    `clock[name]`, a whole number; it draws from `rng`. All three are in the checkpoint, and a state grows with its
    parameters (new entries are 0, or `fill[name]`). A step reads them, but writes `pending[name]`, which is copied over
    only if the step is taken; the clock goes on in `tick`. Whatever else a variant keeps, it writes in `settle`, in
    place, and adds to `state_dict` itself.

    A step may be recorded once and replayed (`utils/engine/program.py`): of the variant's Python code only `phase`,
    `draw` and `tick` run then.
    """

    name: str
    defaults: dict[str, Any] = {}  # values that a published SGD setting cannot speak for
    fill: dict[str, float] = {}
    in_shards = False  # its passes are over shards of the rows, each with a clean pass of its own

    @dataclass(frozen=True)
    class Args:
        optim_mom: float = flag(0.0, "momentum of the base SGD", low=0, below=1)
        optim_nesterov: bool = flag(False, "Nesterov momentum in the base SGD")

    def __init__(
        self, method: nn.Module, lr: float, weight_decay: float, args: Any, rng: np.random.Generator | None = None
    ):
        """`rng` is for the optimizer's own random choices."""
        self.method: Any = method  # a `Method`, whose file needs this one
        self.args = args
        self.rng = np.random.default_rng(0) if rng is None else rng
        self.names, self.params = _trainable(method)
        self.base = self.make_base(self.params, lr, weight_decay)
        self.state: dict[str, Grads] = {}
        self.clock: dict[str, int] = {"task": 0, "epoch": 0}
        self.pending: dict[str, Grads] = {}
        self.drawn: dict[str, Any] = {}  # what `draw` gave for this step; in one that is recorded, as tensors
        self.device = self.params[0].device if self.params else torch.device("cpu")
        self.skips = torch.zeros(2, dtype=torch.int64, device=self.device)  # steps not taken: in all, now in a row
        self._batchnorms = normalise_single_values(method)
        self._to_watch = WATCHED
        self._side: Any = None  # a second stream
        self.clip: float | None = None  # greatest norm of an update
        self.lr_rises = False  # the learning rate is another one in each step
        self.programs: Any = None  # `flatcl.utils.engine.program.Programs`, where steps are recorded

    @property
    def is_watching(self) -> bool:
        """Whether the next step is one of a task's first ones, in which gradients are watched."""
        return self._to_watch > 0

    @classmethod
    def check(cls, config: Config, method: type[Method]) -> list[str]:
        """Problems of this optimizer with a configuration, one line each; called before any data is loaded."""
        return []

    def make_base(self, params: list[Tensor], lr: float, weight_decay: float) -> Base:
        return SGD(params, lr, weight_decay, self.args.optim_mom, self.args.optim_nesterov)

    def direction(self, objective: Any) -> Grads:
        """The update, before the method's own surgery."""
        return objective.gradient()

    def update(self, objective: Any) -> Grads:
        """The direction, and what all variants of a family do to it."""
        return self.direction(objective)

    def phase(self) -> Hashable:
        """What the variant's code may decide anew from step to step, beside the blocks' shapes: two steps of one phase
        run the same operations. Here nothing. A class that overrides `direction` and the like has a `phase` of its own.
        """
        return ()

    def draw(self, objective: Any) -> dict[str, np.ndarray]:
        """The variant's random numbers for a step, by name: the same number of them in each step of a phase."""
        return {}

    def tick(self, objective: Any) -> None:
        """What the host notes after a step that was taken: on the clock, for the most part."""

    def step(self, objective: Any) -> Grads:
        """One update of the weights; returns it as it went into the base optimizer.

        A step whose losses or update are not finite is not taken. On the CPU the objective is then marked as `skipped`;
        elsewhere the device decides by itself, since the host does not wait for it.
        """
        self.drawn = self.draw(objective)
        update, finite, before = self._find(objective)
        with torch.no_grad():
            if self.device.type != "cpu":
                self.base.advance(objective.used)
                self._step_where(finite, update, objective, before, self.base.numbers())
            elif finite:
                self.skips[1] = 0
                self.base.step(update, objective.used)
                self._commit()
            else:
                self.skips += 1
                objective.skipped = True
                self._restore_statistics(before)
            if not objective.skipped:
                self.settle(objective)
                self.tick(objective)
        return update

    @torch.no_grad()
    def record(self, objective: Any, numbers: Any) -> Grads:
        """The operations of a step and nothing else, for a recorder: what the host decides and counts in a step was
        done before it. `numbers` are the base's."""
        update, finite, before = self._find(objective)
        self._step_where(finite, update, objective, before, numbers)
        self.settle(objective)
        return update

    @torch.enable_grad()
    def _find(self, objective: Any) -> tuple[Grads, Tensor, Grads]:
        """(update, whether the step is finite (), BatchNorm's statistics before it)."""
        self.pending = {}
        statistics = self._statistics()
        before: Grads = torch._foreach_mul(statistics, 1) if statistics else []
        try:
            if self._to_watch:
                objective.watch()
            update = self.update(objective)
            if self._to_watch:
                objective.check_update(self, update)
                self._to_watch -= 1
            update = objective.combine(update)
            if self.clip is not None:
                update = torch._foreach_mul(update, (self.clip / norm(update)).clamp(max=1))
        except BaseException:
            self._restore_statistics(before)
            raise
        with torch.no_grad():
            finite = (torch.stack(torch._foreach_norm(update)).sum() + sum(objective.tally.totals)).isfinite()
        return update, finite, before

    def settle(self, objective: Any) -> None:
        """What else a step that was taken leaves behind, without gradients: averages of the weights, records of the
        outputs. Elsewhere than on the CPU also called after one that was not finite."""

    @contextmanager
    def at(self, offset: Grads, frozen: bool = True) -> Iterator[None]:
        """Inside, the parameters are at the weights moved by `offset`, and BatchNorm statistics are frozen unless told
        otherwise. The weights themselves are not touched: moved ones take their place, and leave it in any case."""
        with torch.no_grad():
            moved = torch._foreach_add(self.params, offset)
        del offset  # as large as the weights, and not needed any more
        weights = [param.data for param in self.params]
        try:
            for param, there in zip(self.params, moved, strict=True):
                param.data = there
            with frozen_statistics(self._batchnorms if frozen else []):
                yield
        finally:
            for param, here in zip(self.params, weights, strict=True):
                param.data = here

    @contextmanager
    def side_by_side(self) -> Iterator[Any]:
        """Gives a context; what is in there need not wait for the rest of this one. Where a step is recorded on a GPU,
        both then run at once, and what follows waits for both. Elsewhere nothing is changed."""
        if self.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            yield nullcontext()
            return
        here = torch.cuda.current_stream()
        self._side = self._side or torch.cuda.Stream(self.device)
        self._side.wait_stream(here)
        try:
            yield torch.cuda.stream(self._side)
        finally:
            here.wait_stream(self._side)

    def set_lr(self, lr: float) -> None:
        self.base.lr = lr

    def begin_task(self, task: Task) -> None:
        """What a variant forgets at a task boundary. The base optimizer goes on, unless the method wants a new one."""
        self.follow()
        self._drop_programs()
        self._to_watch = WATCHED
        self.clock["task"] = task.index
        if self.method.new_optimizer:
            self.base.forget()

    def begin_epoch(self, epoch: int, n_epochs: int | None = None) -> None:
        """Clock of variants that count epochs: from 0 in each task, up to `n_epochs` if that is known."""
        self.clock["epoch"] = epoch

    def forget(self, *names: str) -> None:
        for name in names:
            self.state.pop(name, None)

    def follow(self) -> bool:
        """Takes in what the method has done to its parameters since: added, replaced, enlarged, dropped. Returns
        whether it has. A parameter is known by its name; its state keeps the old entries in their corner."""
        lay_out(self.method, self.method.channels_last)
        self._batchnorms = normalise_single_values(self.method)
        names, params = _trainable(self.method)
        if len(params) == len(self.params) and all(a is b for a, b in zip(params, self.params, strict=True)):
            return False
        place = {name: i for i, name in enumerate(self.names)}
        old = [place.get(name) for name in names]

        def carried(entries: Sequence[Any], fill: float | None) -> list[Any]:
            kept = [None if i is None else entries[i] for i in old]
            return [
                grown(entry, p, fill or 0.0)
                if isinstance(entry, Tensor) or (entry is None and fill is not None)
                else entry
                for entry, p in zip(kept, params, strict=True)
            ]

        self.base.params = params
        self.base.state = {name: carried(entries, None) for name, entries in self.base.state.items()}
        self.state = {name: carried(entries, self.fill.get(name, 0.0)) for name, entries in self.state.items()}
        self.names, self.params = names, params
        self._drop_programs()
        return True

    def _drop_programs(self) -> None:
        if self.programs is not None:
            self.programs.drop()

    def state_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "base": self.base.state_dict(),
            "state": {name: list(entries) for name, entries in self.state.items()},
            "clock": dict(self.clock),
            "skips": self.skips.clone(),
            "rng": seeding.generator_state(self.rng),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the method's trainable parameters are not those that the state is of."""
        self.follow()
        odd = sorted({*state["names"]} ^ {*self.names})
        if odd:
            raise ValueError(f"it trains other parameters: {', '.join(odd[:3])}{' ...' if odd[3:] else ''}")
        self.base.load_state_dict(state["base"])
        self.state = {
            name: [entry.to(p.device).clone() for entry, p in zip(entries, self.params, strict=True)]
            for name, entries in state["state"].items()
        }
        self.clock = dict(state["clock"])
        self.skips = state["skips"].to(self.device).clone()
        self._drop_programs()
        seeding.set_generator_state(self.rng, state["rng"])

    def _commit(self) -> None:
        """Each state stays in its tensors, which a recorded step has in use."""
        for name, value in self.pending.items():
            assert len(value) == len(self.params), f"pending['{name}'] is no list for params"
            if name in self.state:
                torch._foreach_copy_(self.state[name], value)
            else:
                self.state[name] = torch._foreach_mul(value, 1)  # it may share memory with a gradient

    def _statistics(self) -> list[Tensor]:
        return [buffer for layer in self._batchnorms for buffer in layer.buffers(recurse=False)]

    def _restore_statistics(self, before: Grads) -> None:
        if before:
            torch._foreach_copy_(self._statistics(), before)

    def _step_where(self, finite: Tensor, update: Grads, objective: Any, statistics: Grads, numbers: Any) -> None:
        """The step, then everything that it changed put back where `finite` is false, without a wait for the device."""
        base = {name: [*entries] for name, entries in self.base.state.items()}
        tensors = [entry for entries in base.values() for entry in entries if isinstance(entry, Tensor)]
        before = [*torch._foreach_mul([*self.params, *tensors], 1), *statistics]
        self.base.apply(update, objective.used, numbers)
        new = [  # what the base optimizer has made in this step starts from zero
            entry
            for name, entries in self.base.state.items()
            for entry, old in zip(entries, base[name], strict=True)
            if isinstance(entry, Tensor) and old is None
        ]
        before += [torch.zeros_like(entry) for entry in new]
        _write_where(~finite, [*self.params, *tensors, *self._statistics(), *new], before)
        for name, value in self.pending.items():
            if name not in self.state:
                self.state[name] = [torch.full_like(part, self.fill.get(name, 0.0)) for part in value]
            _write_where(finite, self.state[name], value)
        skipped = (~finite).long()
        self.skips.copy_(torch.stack((self.skips[0] + skipped, (self.skips[1] + 1) * skipped)))
        if objective.loss.logits is not None:
            objective.loss.logits = objective.loss.logits.nan_to_num(0.0, 0.0, 0.0)


def _trainable(method: nn.Module) -> tuple[list[str], list[Tensor]]:
    named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    return [name for name, _ in named], [p for _, p in named]


def grown(old: Tensor | None, like: Tensor, fill: float = 0.0) -> Tensor:
    """A tensor of the shape of `like`, with the entries of `old` in their corner and `fill` elsewhere."""
    if old is not None and old.shape == like.shape:
        return old
    return keep_corner(old, torch.full_like(like, fill, requires_grad=False))


def keep_corner(old: Tensor | None, new: Tensor) -> Tensor:
    """Writes into `new` what `old` has at the same places; returns it."""
    if old is not None and old.ndim == new.ndim:
        corner = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
        new[corner] = old[corner]
    return new


def _write_where(condition: Tensor, into: Grads, values: Grads) -> None:
    """Writes `values` into `into` if `condition` () is true; one call for each type of number."""
    for dtype in {tensor.dtype for tensor in into}:
        pairs = [(a, b) for a, b in zip(into, values, strict=True) if a.dtype == dtype]
        old = torch.cat([a.reshape(-1) for a, _ in pairs])
        new = torch.cat([b.reshape(-1) for _, b in pairs])
        parts = torch.where(condition, new, old).split([a.numel() for a, _ in pairs])
        torch._foreach_copy_(
            [a for a, _ in pairs], [part.view_as(a) for part, (a, _) in zip(parts, pairs, strict=True)]
        )
