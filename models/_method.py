"""The core of the framework: a method gives a loss, the engine makes the optimizer step.

A method has three functions: `draw` (the blocks of a step), `loss` (pure; called several times in a step, also at
perturbed weights and on parts of the rows) and `remember` (what is kept, after the step). `observe` calls them and is
final. Methods that take several optimizer steps on one batch give the blocks of each step (`steps`). Methods that
project on the gradient of something that is not in their loss give it as a reference (`references`). Gradients and
weights belong to the optimizer (`utils/optim/_driver.py`). It sees a method as an `Objective` (`models/_objective.py`):
a function of the weights only.
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
from flatcl.utils.engine.layout import lay_out, rows_of_forward
from flatcl.utils.engine.passes import eval_mode
from flatcl.utils.errors import mistake
from flatcl.utils.optim._base import Grads
from flatcl.utils.protocols import Benchmark, Config, Ranks, Split, Task
from flatcl.utils.registry import BACKBONES

# (dataset, buffer size or None) -> {flag: (value, where it comes from)}
Published = Mapping[tuple[str, int | None], Mapping[str, tuple[Any, str]]]

SETTINGS = ("class-il", "domain-il", "general-continual")


class Batch:
    """One batch of the stream: `x` (N, C, H, W) uint8 as stored, `inputs` (N, C, H, W) float32, which is `x` augmented
    and normalised, `y` (N,) int64, and `ids` (N,) int64, unique over the benchmark.

    Without augmentation, `inputs` is computed from `x` at its first use. `labels` is `y` on the host, without waiting
    for the device.
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
        """(N,) int64: `y` on the host. If the batch was made without labels, this waits for the device."""
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
    """What a method gets when it is built, in addition to its network and its flags.

    `augment` turns stored images (N, C, H, W) uint8 into training inputs, float32; `rng` is the generator of the method
    and of its buffer; `config` has every flag of the run.
    """

    benchmark: Benchmark
    augment: Any
    device: torch.device
    rng: np.random.Generator
    config: Any = None  # `Config`; None in tests of a method alone


class Method(nn.Module):
    """A continual learner. Subclasses define `draw`, `loss` and `remember`, flags (`Args`) and published values.

    `net` is the network that is trained: `net(x)` gives the logits of all heads; `forward` may change them for the
    evaluator. A method that lets `net` grow, or freezes parts of it, in `begin_task` does the same to a new network in
    `load_state_dict`, before it loads the state.
    """

    name: str
    Args: type | None = None
    published: Published = {}
    default_optimizer = "sgd"
    settings: tuple[str, ...] = SETTINGS  # the settings that this method can learn in
    trains_jointly = False  # sees all tasks at once: an upper bound, not a continual learner
    has_memory = False  # rows of the memory are part of its loss
    fixed_policy: str | None = None  # if its paper says how the memory is filled: then there is no --buffer_policy
    revisits = False  # uses some rows of the stream more often than --n_epochs
    needs_features = False  # asks its backbone for `features`
    needs_task = False  # must know the task at test time, so class-il is not defined for it
    new_optimizer = False  # a new base optimizer for each task: momentum and other averages are reset
    rows_are_independent = True  # a row's cost depends on no other row, except in BatchNorm
    learns_at_the_end = False  # takes no step before the end of the last task
    loss_needs_task = False  # its loss depends on the task that was given to `begin_task` last
    own_memory = False  # its memory is not one reservoir of all images of the stream
    replays_as_stored = False  # replayed images are not augmented
    references_first = False  # computed before the loss, so that the loss updates BatchNorm's averages last
    lr: float  # the current learning rate, set by the engine
    ranks: Ranks | None = None  # where several processes train this run; set by the engine
    channels_last = False  # the memory layout of its convolutions (`utils/engine/layout.py`); set by the engine
    amp: torch.dtype | None = None  # dtype of autocast in the passes of a step; set by the engine
    guides: Mapping[str, tuple[str, ...]] = {}  # name -> terms of the loss; `combine` gets their clean gradient
    guides_last = False  # or their gradient in the last pass of the step, which most optimizers make perturbed

    def __init__(self, net: nn.Module, args: Any, context: Context):
        super().__init__()
        self.net, self.args, self.context = net, args, context
        self.rows = [0, 0]  # forward and backward of passes that no optimizer makes; see `count`
        self.checked_blocks: set[tuple] = set()  # (shape, memory, reference) of each block of a step, once looked at
        self.checked_rows: set[tuple] = set()  # forms of blocks whose rows are known to be independent
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
        """Everything that decides, within a task, which operations `loss`, `references` and `combine` run, except the
        shapes of the blocks: two steps of the same phase run the same operations. By default nothing. A class that
        overrides one of these functions, or `draw`, `steps`, `remember` or `begin_epoch`, which may change what they
        depend on, defines `phase` too; otherwise its steps are not recorded as CUDA graphs
        (`utils/engine/program.py`).
        """
        return ()

    def begin_task(self, task: Task) -> None:
        """Called before a task's first batch. On a general-continual stream: once, at its start."""

    def num_epochs(self, task: Task, n_epochs: int) -> int:
        """Number of epochs of this task, if the run asks for `n_epochs` (--n_epochs)."""
        return n_epochs

    def begin_epoch(self, task: Task, epoch: int) -> None:
        """Called before the first batch of an epoch, counted from 0 in each task."""

    def train_split(self, task: Task, epoch: int) -> Split:
        """The rows (`Split`) that this epoch trains on. Called several times, first before `begin_epoch`, and again
        when a run resumes: always with the same rows in the same order."""
        return task.train

    def learning_rate(self, task: Task, epoch: int, lr: float) -> float:
        """The learning rate of this epoch, if the flags of the run ask for `lr`."""
        return lr

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        """The blocks of one step. Random numbers of a step are drawn here: `loss` draws none."""
        return (batch.block,)

    def steps(self, batch: Batch) -> Iterator[tuple[Block, ...]]:
        """Yields the blocks of each optimizer step on one batch; code after a `yield` runs after that step."""
        yield self.draw(batch)

    def loss(self, *blocks: Block) -> Loss:
        """The loss of these blocks at the current weights. Pure: no random numbers, no side effects.

        With several blocks, each term names its block (`Loss`).
        """
        raise mistake(self, "it has no loss(). Write: def loss(self, stream): ..., which returns a Loss.")

    def references(self, *blocks: Block) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, loss) for the reference blocks, each loss a scalar tensor. `combine` gets their gradients, the
        reference gradients, in `guides`.

        Called once in a step, after the clean pass, or before it with `references_first`. Each gradient is computed
        before the next loss is asked for.
        """
        raise mistake(
            self,
            "it draws reference blocks, but has no references(). Write: def references(self, *blocks): ..., which "
            "yields (name, loss).",
        )

    def combine(self, update: Grads, guides: Mapping[str, Grads]) -> Grads:
        """Changes the update after the optimizer has computed it (gradient surgery).

        `update` is a list of tensors, one for each parameter; `guides` has such lists by name: gradients of terms
        (`Method.guides`), clean ones or, with `guides_last`, those of the step's last pass, and reference gradients. It
        is empty while there is no memory. Returns a new list; `update` and `guides` may not be changed in place.
        """
        return update

    def remember(self, batch: Batch, loss: Loss) -> None:
        """All side effects of a batch (filling the buffer), after its steps. `loss` is that of the first clean pass,
        detached. On the CPU it is not called if no step was taken, because no loss or update was finite. On other
        devices the host does not know this; there, NaN in the logits of the loss is replaced by 0."""

    def end_task(self, task: Task) -> None:
        """Called after a task's last batch, before the evaluation. Not called on a general-continual stream."""

    def remembered_ids(self) -> Tensor | None:
        """Ids (M,) int64 of the rows in the memory, if it keeps them."""

    def diagnose(self, objective: Objective, update: Grads) -> dict[str, Tensor]:
        """{name: scalar tensor} for TensorBoard, on logged steps only; `objective.passes` are all passes of it."""
        return {}

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """(N, C, H, W) float32 -> logits (N, K), for the evaluator. `task` is None if the task is not known."""
        return self.net(x)

    def train(self, mode: bool = True) -> "Method":
        """Parts that are frozen (`utils/engine/weights.py`) stay in eval mode."""
        super().train(mode)
        for part in self.modules():
            part.training = part.training and not getattr(part, "is_frozen", False)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Networks that have grown to take the state get the memory layout of the others, and so the same sums."""
        found = super().load_state_dict(state_dict, strict, assign)
        lay_out(self, self.channels_last)
        return found

    def count(self, forward: int, backward: int = 0) -> None:
        """Adds rows to the cost of the run, for passes that no optimizer makes, e.g. those of a teacher."""
        self.rows = [self.rows[0] + forward, self.rows[1] + backward]

    @torch.no_grad()
    def outputs_of(self, part: Callable[[Tensor], Tensor], images: Tensor, convert: Callable | None = None) -> Tensor:
        """The outputs of a part of the network for stored images (N, C, H, W) uint8, not augmented, in eval mode.
        The rows are counted.

        `convert` turns a chunk of images into inputs; by default as for evaluation.
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
        """Trains on one batch. Returns the objective and the update of each optimizer step."""
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
            problem = (
                f"Loss(logits=...) must have only the {len(batch.y)} rows of the stream, got {shown(loss.logits)}."
            )
            raise mistake(self, problem)
        if not done or not all(objective.skipped for objective, _ in done):
            self.remember(batch, loss)
        return done

    def _check(self, blocks: Any, params: list[Tensor]) -> None:
        """Refuses blocks that are none, once for each form of a step."""
        form = None
        if isinstance(blocks, tuple | list) and all(isinstance(block, Block) for block in blocks):
            form = tuple((getattr(block.x, "shape", None), block.memory, block.reference) for block in blocks)
            if form in self.checked_blocks:
                return
        device = params[0].device if params else self.context.device
        problem = of_blocks(blocks, Block, device) or of_guides(self.guides)
        problem = problem or of_call(self.loss, sum(not block.reference for block in blocks))
        if problem:
            raise mistake(self, problem)
        assert form is not None
        self.checked_blocks.add(form)

    def likely_mistakes(self) -> list[str]:
        """Likely mistakes of the method, one line each; asked for after two tasks (general-continual: after one)."""
        terms = {name for names, _ in self.checked_losses for name in names}
        found = [
            f"{self.name}: the guide '{guide}' names the term '{term}', which the loss has not had so far. Its terms "
            f"are {', '.join(sorted(terms))}."
            for guide, members in self.guides.items()
            for term in members
            if terms and term not in terms
        ]
        if self.has_memory and terms and not any(memory for form in self.checked_blocks for _, memory, _ in form):
            found.append(
                f"{self.name}: `has_memory` is True, but no block has had rows of the memory so far: optimizers "
                "treat all rows as those of the stream. Write: Block(x, memory=number of rows, ...)."
            )
        return found


def published(source: str, table: Mapping[tuple, dict]) -> Published:
    """{(dataset, buffer size, ...): {flag: value}}, all from one source; `(dataset,)` is without a buffer."""
    return {
        (dataset, size): {name: (value, f"published: {source}") for name, value in values.items()}
        for (dataset, *sizes), values in table.items()
        for size in (sizes or [None])
    }


def ours(base: Published, why: str, **values: Any) -> Published:
    """The published values of another method, with values added that are marked as ours."""
    added = {name: (value, f"ours: {why}") for name, value in values.items()}
    return {key: {**row, **added} for key, row in base.items()}


ONLINE = ("seq-cifar10", "seq-cifar100", "seq-tinyimg")  # benchmarks with the protocol `online`


def ours_online(why: str, **values: Any) -> Published:
    """Values for `--protocol online` with a memory of any size, marked as ours."""
    return ours({(f"{dataset}:online", None): {} for dataset in ONLINE}, why, **values)
