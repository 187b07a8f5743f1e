"""The heart of the house: a method gives a loss, the engine owns the step.

A method has three rooms: `draw` (all randomness), `loss` (pure; called several times a step, at moved weights) and
`remember` (all side effects, from the clean pass). `observe` puts them together and is final. Methods that take several
optimizer steps on one batch give the blocks of each (`steps`); those that project on the gradient of something that is
not in their loss give it apart (`references`). What lies between, the gradients and the weights, belongs to the
optimizer (`utils/optim/_driver.py`), which sees a method as an `Objective` (`models/_objective.py`): a frozen function
of the weights.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from flatcl.models._blocks import Block, Loss
from flatcl.models._checks import not_steps, of_blocks, of_call, of_guides, shown
from flatcl.models._objective import Objective
from flatcl.utils.engine.evaluator import rows_per_pass
from flatcl.utils.engine.layout import rows_of_forward
from flatcl.utils.engine.passes import eval_mode
from flatcl.utils.errors import mistake
from flatcl.utils.optim._base import Grads
from flatcl.utils.protocols import Benchmark, Config, Ranks, Split, Task
from flatcl.utils.registry import BACKBONES

# (dataset, buffer size or None) -> {flag: (value, where it comes from)}
Published = Mapping[tuple[str, int | None], Mapping[str, tuple[Any, str]]]

SETTINGS = ("class-il", "domain-il", "general-continual")


class Batch:
    """What the stream hands out: `x` (N, C, H, W) uint8 as stored, `inputs` its augmented and normalised form, float32;
    `y` (N,) int64; `ids` (N,) int64, unique over the benchmark.

    Where nothing is augmented, `inputs` is not given but converted from `x` when asked for. `labels` gives what `y` is,
    on the host, without a wait for the device.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor,
        inputs: Tensor | None,
        augment: Any,
        labels: Callable[[], np.ndarray] | None = None,
    ):
        self.x, self.y, self.ids, self._inputs, self._augment, self._labels = x, y, ids, inputs, augment, labels

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64: `y` on the host. A batch that is made without them waits for the device."""
        return self.y.cpu().numpy() if self._labels is None else self._labels()

    @property
    def inputs(self) -> Tensor:
        if self._inputs is None:
            self._inputs = self._augment(self.x)
        return self._inputs

    @property
    def block(self) -> Block:
        return Block(self.inputs, y=self.y, ids=self.ids)


@dataclass(frozen=True)
class Context:
    """What a method is built with, besides its network and its flags.

    `augment` turns stored images (uint8) into training inputs; `rng` is the method's generator, its buffer's too;
    `config` has every flag of the run.
    """

    benchmark: Benchmark
    augment: Any
    device: torch.device
    rng: np.random.Generator
    config: Any = None  # `Config`; None in tests of a method alone


class Method(nn.Module):
    """A continual learner. Subclasses fill the three rooms and declare flags (`Args`) and published values.

    `net` is what is trained: `net(x)` gives the logits of all heads, whatever `forward` makes of them for the
    evaluator. It may grow or be frozen in `begin_task`; such a method does the same to a fresh network in
    `load_state_dict`, before it loads.
    """

    name: str
    Args: type | None = None
    published: Published = {}
    default_optimizer = "sgd"
    settings: tuple[str, ...] = SETTINGS  # the settings that this method can learn in
    trains_jointly = False  # sees all tasks at once: an upper bound, not a continual learner
    has_memory = False  # rows of the past are part of its loss
    fixed_policy: str | None = None  # how its paper fills its memory: it has no --buffer_policy
    revisits = False  # passes over some rows of the stream more often than --n_epochs
    needs_features = False  # asks its backbone for `features`
    needs_task = False  # must be told the task at test time, so that class-il is not defined for it
    new_optimizer = False  # a new base optimizer with each task: momentum and other averages start from nothing
    rows_are_apart = True  # a row's cost depends on no other row (but in BatchNorm), so that processes can share them
    learns_at_the_end = False  # takes no step before the last task's images have passed
    loss_needs_task = False  # its loss is of the task that `begin_task` named last, and of no other batch
    own_memory = False  # is filled in another way than as one reservoir of all images that have passed
    replays_as_stored = False  # replayed images are not augmented
    references_first = False  # pass before the loss does, so that BatchNorm's averages end with the loss's rows
    lr: float  # the present learning rate, set by the engine
    ranks: Ranks | None = None  # where several processes train this run; set by the engine
    channels_last = False  # the memory layout of its convolutions (`utils/engine/layout.py`); set by the engine
    amp: torch.dtype | None = None  # the passes of a step are autocast to it; set by the engine
    guides: Mapping[str, tuple[str, ...]] = {}  # name -> the loss terms whose clean gradient `combine` gets

    def __init__(self, net: nn.Module, args: Any, context: Context):
        super().__init__()
        self.net, self.args, self.context = net, args, context
        self.rows = [0, 0]  # forward and backward of passes that no optimizer makes; see `count`
        self.checked_blocks: set[tuple] = set()  # (shape, memory, apart) of each block of a step, once looked at
        self.checked_rows: set[tuple] = set()  # forms of blocks of which it is known that their rows are apart
        self.has_drawn: bool | None = None  # whether the network draws (dropout); asked for where it matters
        self.checked_losses: set[tuple] = set()  # (terms, sizes of the blocks) of a loss, once looked at

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.observe is not Method.observe:
            raise mistake(
                cls,
                "observe() belongs to the engine and cannot be overridden. Write draw() for what is random, loss() for "
                "the loss, and remember() for what is kept.",
            )
        if isinstance(cls.settings, str) or not {*cls.settings} <= {*SETTINGS}:
            raise mistake(cls, f"settings must be a tuple of some of {', '.join(SETTINGS)}, got {cls.settings!r}.")

    @classmethod
    def check(cls, config: Config, benchmark: type[Benchmark]) -> list[str]:
        """Problems of this method with a configuration, one line each; called before any data is loaded."""
        problems = []
        if benchmark.setting not in cls.settings:
            problems.append(
                f"--model {cls.name} cannot learn {benchmark.name}: it needs the setting "
                f"{' or '.join(cls.settings)}, got {benchmark.setting}. Choose another model or dataset."
            )
        if cls.needs_features and not hasattr(BACKBONES.load(config.backbone), "features"):
            problems.append(
                f"--model {cls.name} needs a backbone with `features`, {config.backbone} has none. Choose another."
            )
        return problems

    def phase(self) -> Hashable:
        """What the host may decide anew from step to step, within a task, about what `loss`, `references` and `combine`
        do, beside the blocks' columns: two steps of one phase run the same operations. Here nothing. A class that
        overrides one of these has a `phase` of its own, or its steps are not recorded (`utils/engine/program.py`).
        """
        return ()

    def begin_task(self, task: Task) -> None:
        """Called before a task's first batch. On a general-continual stream: once, at its start."""

    def num_epochs(self, task: Task, n_epochs: int) -> int:
        """How many epochs this task gets, where --n_epochs are asked for."""
        return n_epochs

    def begin_epoch(self, task: Task, epoch: int) -> None:
        """Called before the first batch of an epoch, counted from 0 in each task."""

    def train_split(self, task: Task, epoch: int) -> Split:
        """The rows (`Split`) that this epoch passes over."""
        return task.train

    def learning_rate(self, task: Task, epoch: int, lr: float) -> float:
        """The rate of this epoch, where the run's flags ask for `lr`."""
        return lr

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        """The blocks of one step. The only place that may use randomness."""
        return (batch.block,)

    def steps(self, batch: Batch) -> Iterator[tuple[Block, ...]]:
        """The blocks of each optimizer step on one batch; what comes after a `yield` is done after that step."""
        yield self.draw(batch)

    def loss(self, *blocks: Block) -> Loss:
        """The loss of these blocks at the present weights. Pure: no randomness, no side effect.

        Where there are several blocks, each term names the one that it is about (`Loss`).
        """
        raise mistake(self, "it has no loss(). Write: def loss(self, stream): ..., which returns a Loss.")

    def references(self, *blocks: Block) -> Iterator[tuple[str, Tensor]]:
        """(name, loss ()) of the blocks that are `apart`, whose gradients `combine` gets among its guides.

        Taken once a step, after the clean pass or, with `references_first`, before it, and each gradient before the
        next loss is asked for.
        """
        raise mistake(self, "it draws blocks that are apart, but has no references() that gives their losses.")

    def combine(self, update: Grads, guides: Mapping[str, Grads]) -> Grads:
        """Gradient surgery, after the optimizer has found its direction. `guides` is empty while there is no memory.

        Returns a list like `update`; neither that nor the guides may be changed in place.
        """
        return update

    def remember(self, batch: Batch, loss: Loss) -> None:
        """Side effects of a batch (the buffer), after its steps, from the first clean pass's detached loss. On the CPU
        not called where no step was taken because none was finite; elsewhere the host does not know, and NaN in the
        loss's logits is 0."""

    def end_task(self, task: Task) -> None:
        """Called after a task's last batch, before the evaluation. Not called on a general-continual stream."""

    def remembered_ids(self) -> Tensor | None:
        """Ids (M,) int64 of the rows that may be replayed, if the memory keeps them."""

    def diagnose(self, objective: Objective, update: Grads) -> dict[str, Tensor]:
        """{name: ()} for TensorBoard, on logged steps only; `objective.passes` holds every pass of the step."""
        return {}

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """(N, C, H, W) float32 -> logits (N, K), for the evaluator. `task` is None unless the task is known."""
        return self.net(x)

    def train(self, mode: bool = True) -> "Method":
        """Parts that are frozen (`utils/engine/weights.py`) stay in eval mode."""
        super().train(mode)
        for part in self.modules():
            part.training = part.training and not getattr(part, "is_frozen", False)
        return self

    def count(self, forward: int, backward: int = 0) -> None:
        """Adds rows to the run's cost: a teacher's forward, passes at the end of a task, ..."""
        self.rows = [self.rows[0] + forward, self.rows[1] + backward]

    @torch.no_grad()
    def outputs_of(self, part: Callable[[Tensor], Tensor], images: Tensor, convert: Callable | None = None) -> Tensor:
        """What a part of the network gives for stored images (N, C, H, W) uint8, un-augmented, in eval mode; counted.

        `convert` makes its inputs of them, a chunk at a time: as for evaluation unless told otherwise.
        """
        convert = convert or self.context.augment.plain
        self.count(forward=len(images))
        shape, device = images.shape[1:], self.context.device
        chunk = rows_per_pass(shape, device)
        step = rows_of_forward(self.net, shape, device, chunk)
        with eval_mode(self.net):
            return torch.cat([part(x) for raw in images.split(chunk) for x in convert(raw).split(step)])

    @final
    def observe(self, batch: Batch, optimizer: Any, trace: bool = False) -> list[tuple[Objective, Grads]]:
        """Everything that is learned from one batch: an objective and its update for each optimizer step."""
        done: list[tuple[Objective, Grads]] = []
        loss: Any = None  # of the first step, if there is one
        steps = self.steps(batch)
        if not hasattr(steps, "__next__"):
            raise mistake(self, not_steps(steps))
        for blocks in steps:
            self._check(blocks, optimizer.params)
            if optimizer.programs is None:
                objective = Objective(self, blocks, optimizer.params, trace)
                update = optimizer.step(objective)
            else:
                if len(done) == 1:  # a program has its results where its next step writes them
                    loss = loss.copied()
                objective, update = optimizer.programs.step(blocks, trace)
            loss = loss or objective.loss
            done.append((objective, update))
        if loss is not None and loss.logits is not None and len(loss.logits) != len(batch.y):
            problem = f"Loss(logits=...) must have the stream's {len(batch.y)} rows alone, got {shown(loss.logits)}."
            raise mistake(self, problem)
        if not done or not all(objective.skipped for objective, _ in done):
            self.remember(batch, loss)
        return done

    def _check(self, blocks: Any, params: list[Tensor]) -> None:
        """Refuses blocks that are none, once for each make of a step."""
        make = None
        if isinstance(blocks, tuple | list) and all(isinstance(block, Block) for block in blocks):
            make = tuple((getattr(block.x, "shape", None), block.memory, block.apart) for block in blocks)
            if make in self.checked_blocks:
                return
        device = params[0].device if params else self.context.device
        problem = of_blocks(blocks, Block, device) or of_guides(self.guides)
        problem = problem or of_call(self.loss, sum(not block.apart for block in blocks))
        if problem:
            raise mistake(self, problem)
        assert make is not None
        self.checked_blocks.add(make)

    def doubts(self) -> list[str]:
        """What looks like a mistake when two tasks are over (on a general-continual stream: one), one line each."""
        terms = {name for names, _ in self.checked_losses for name in names}
        found = [
            f"{self.name}: the guide '{guide}' is of the term '{term}', which its loss has not had so far. "
            f"It had {', '.join(sorted(terms))}."
            for guide, members in self.guides.items()
            for term in members
            if terms and term not in terms
        ]
        if self.has_memory and terms and not any(memory for make in self.checked_blocks for _, memory, _ in make):
            found.append(
                f"{self.name}: no block has had rows of the memory so far, though `has_memory` says so: "
                "optimizers take all rows for the stream's. Write: Block(x, memory=number of rows, ...)."
            )
        return found


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
