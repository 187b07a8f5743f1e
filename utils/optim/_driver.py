"""The base class of all optimizers: weights, state, and steps that are taken completely or not at all.

A step computes a direction from a fixed objective and gives it to a base optimizer. If there is an exception, or a loss
is not finite, then weights, state and BatchNorm statistics are as before the step. The operations that all variants
share are here: passes at perturbed weights, global norms and dot products, frozen BatchNorm statistics.

On the CPU the host sees whether a step is finite, and does not take it otherwise. On other devices the device decides,
so that the host does not wait for it: what a step changes is kept for a short time (about four times the size of the
weights), counters on the host continue, and images of such a step are remembered, with zeros for logits that are not
finite.
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
    """Global L2 norm of a list of tensors: a scalar tensor."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(vector)))


def flat(vector: Grads) -> Tensor:
    """A list of tensors as one vector (P,)."""
    return torch.cat([part.reshape(-1) for part in vector])


def dot(a: Grads, b: Grads) -> Tensor:
    """Inner product of two lists of tensors of the same shapes: a scalar tensor."""
    return flat(torch._foreach_mul(a, b)).sum()


@contextmanager
def frozen_statistics(module: nn.Module | list[BatchNorm]) -> Iterator[None]:
    """BatchNorm layers normalise with the batch, but their running averages and counters stay as they are.

    Takes a module or a list of its BatchNorm layers. It may be nested, and an exception ends it like a return.
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
    """Changes BatchNorm layers: if one in training mode gets a single value per channel (one image, with a map of
    one pixel), it normalises with its running averages and does not update them, as in eval mode. Returns the layers.

    Other layers of the same pass, with several values, are not affected. The rule is for a last batch of one image,
    `--minibatch_size 1`, and methods that pass single images; torch raises an error there. Copies of a layer keep the
    rule, and it adds nothing to the state_dict.
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

    A variant keeps its state in `state[name]`, a list of tensors, one for each of `params`, and in `clock[name]`, a
    whole number; it draws from `rng`. All three are in the checkpoint, and a state grows with its parameters (new
    entries are 0, or `fill[name]`). A step reads `state` but writes `pending[name]`, which is copied to `state` only if
    the step is taken; `tick` advances the clock. Anything else that a variant keeps is written in `settle`, in place,
    and added to `state_dict` by the variant.

    A step may be recorded once and replayed (`utils/engine/program.py`): then only `phase`, `draw` and `tick` of the
    variant's Python code run.
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
        """Whether the next step is one of the first of a task, in which gradients are observed."""
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
        """The direction, with the changes that all variants of a family make to it."""
        return self.direction(objective)

    def phase(self) -> Hashable:
        """Everything that decides which operations a step runs, except the shapes of the blocks: two steps of the same
        phase run the same operations. By default nothing. A class that overrides `direction`, `update`, ... defines
        `phase` too.
        """
        return ()

    def draw(self, objective: Any) -> dict[str, np.ndarray]:
        """The variant's random numbers for a step, by name: the same number of them in each step of a phase."""
        return {}

    def tick(self, objective: Any) -> None:
        """Called on the host after a step that was taken; mostly advances the clock."""

    def step(self, objective: Any) -> Grads:
        """One update of the weights; returns the update that was given to the base optimizer.

        A step whose losses or update are not finite is not taken. On the CPU the objective is then marked as `skipped`;
        on other devices the device decides, and the host does not wait for it.
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
                self.skip()
            if not objective.skipped:
                self.settle(objective)
                self.tick(objective)
        return update

    @torch.no_grad()
    def record(self, objective: Any, numbers: Any) -> Grads:
        """Only the operations of a step, for a recorder: what the host decides and counts in a step is done before.
        `numbers` are those of the base optimizer."""
        update, finite, before = self._find(objective)
        self._step_where(finite, update, objective, before, numbers)
        self.settle(objective)
        return update

    @torch.enable_grad()
    def _find(self, objective: Any) -> tuple[Grads, Tensor, Grads]:
        """(update, whether the step is finite (), BatchNorm's statistics before it)."""
        self.pending = {}
        statistics = self._statistics()
        before = [copy for (part,) in _by_dtype(statistics) for copy in torch._foreach_mul(part, 1)]
        try:
            if self._to_watch:
                objective.watch()
            update = self.update(objective)
            if self._to_watch:
                objective.check_update(self, update)
                self._to_watch -= 1
            update = objective.combine(update)
            update = self.clipped(update)
        except BaseException:
            self._restore_statistics(before)
            raise
        with torch.no_grad():
            finite = (torch.stack(torch._foreach_norm(update)).sum() + sum(objective.tally.totals)).isfinite()
        return update, finite, before

    def settle(self, objective: Any) -> None:
        """Other effects of a step that was taken, without gradients: averages of the weights, records of the outputs.
        On devices other than the CPU it is also called after a step that was not finite."""

    @contextmanager
    def at(self, offset: Grads, frozen: bool = True) -> Iterator[None]:
        """Inside this context, parameters are perturbed by `offset`, and BatchNorm statistics are frozen if `frozen`.
        The weights themselves are not changed: other tensors take their place, and are removed even after an error."""
        with torch.no_grad():
            perturbed = torch._foreach_add(self.params, offset)
        del offset  # as large as the weights, and not needed any more
        weights = [param.data for param in self.params]
        try:
            for param, there in zip(self.params, perturbed, strict=True):
                param.data = there
            with frozen_statistics(self._batchnorms if frozen else []):
                yield
        finally:
            for param, here in zip(self.params, weights, strict=True):
                param.data = here

    @contextmanager
    def side_by_side(self) -> Iterator[Any]:
        """Yields a second context whose operations do not depend on the other operations in this one. If a step is
        recorded on a GPU, both run in parallel, and later operations wait for both. Otherwise nothing changes."""
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
        """Resets a variant's state for a new task. The base optimizer continues, unless the method wants a new one."""
        self.follow()
        self._drop_programs()
        self._to_watch = WATCHED
        self.clock["task"] = task.index
        if self.method.new_optimizer:
            self.base.forget()

    def begin_epoch(self, epoch: int, n_epochs: int | None = None) -> None:
        """For variants that count epochs: from 0 in each task, up to `n_epochs` if that is known."""
        self.clock["epoch"] = epoch

    def forget(self, *names: str) -> None:
        for name in names:
            self.state.pop(name, None)

    def skip(self) -> None:
        """Called on the CPU after a step that was not taken, whose state stays as it was."""

    def clipped(self, update: Grads) -> Grads:
        """Shortened to the greatest norm that --clip_grad allows, if it allows one."""
        return update if self.clip is None else torch._foreach_mul(update, (self.clip / norm(update)).clamp(max=1))

    def begin_anew(self, num_skipped: int) -> None:
        """The method has got the weights of a run that had another optimizer, and had skipped so many steps: nothing of
        that optimizer is taken over."""
        self.follow()
        self.skips[0] = num_skipped

    def follow(self) -> bool:
        """Follows changes of the method's parameters: added, replaced, enlarged, removed. Returns whether any changed.
        A parameter is identified by its name; its state keeps the old entries at the lowest indices."""
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
        """Raises ValueError if the state belongs to other trainable parameters than those of the method."""
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
            assert len(value) == len(self.params), f"pending['{name}'] must have one entry for each parameter"
            if name in self.state:
                torch._foreach_copy_(self.state[name], value)
            else:
                self.state[name] = torch._foreach_mul(value, 1)  # it may share memory with a gradient

    def _statistics(self) -> list[Tensor]:
        """One type of number after the other: averages, then counters."""
        buffers = (buffer for layer in self._batchnorms for buffer in layer.buffers(recurse=False))
        return sorted(buffers, key=lambda buffer: str(buffer.dtype))

    def _restore_statistics(self, before: Grads) -> None:
        for into, values in _by_dtype(self._statistics(), before):
            torch._foreach_copy_(into, values)

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
    """A tensor of the shape of `like`: the entries of `old` at the lowest indices, `fill` elsewhere."""
    if old is not None and old.shape == like.shape:
        return old
    return keep_corner(old, torch.full_like(like, fill, requires_grad=False))


def keep_corner(old: Tensor | None, new: Tensor) -> Tensor:
    """Copies the entries of `old` to the same indices of `new`; returns `new`."""
    if old is not None and old.ndim == new.ndim:
        corner = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
        new[corner] = old[corner]
    return new


def _by_dtype(*lists: Grads) -> Iterator[tuple[Grads, ...]]:
    """Lists of tensors, cut into those of each type of number (of the first list): on a GPU, an operation on a list of
    several types takes one kernel for each tensor."""
    dtypes = [tensor.dtype for tensor in lists[0]]
    for wanted in dict.fromkeys(dtypes):
        yield tuple([t for t, dtype in zip(tensors, dtypes, strict=True) if dtype == wanted] for tensors in lists)


def _write_where(condition: Tensor, into: Grads, values: Grads) -> None:
    """Writes `values` into `into` if `condition` () is true; one call for each type of number."""
    for targets, sources in _by_dtype(into, values):
        old = torch.cat([a.reshape(-1) for a in targets])
        new = torch.cat([b.reshape(-1) for b in sources])
        parts = torch.where(condition, new, old).split([a.numel() for a in targets])
        torch._foreach_copy_(targets, [part.view_as(a) for part, a in zip(parts, targets, strict=True)])
