"""Progressive Neural Networks (Rusu et al., 2016): a column for each task, connected to the earlier, frozen ones.

    h_i = act(W_i h_{i-1} + U_i relu(V_i [alpha_j h_{i-1}^(j), j = the columns before]))        (eq. 2)

W_i is stage i of the backbone: every backbone that shows its `stages` makes columns. V_i reduces what earlier columns
give to the width of one, U_i brings it to stage i. On maps both are 1x1 convolutions, and U_i sees the map averaged
down to the size of the stage's output. A task is answered by its own column, so it must be known.

Deviates: the head of each column has all classes, as in the published code; frozen columns are in eval mode. What they
give is computed once a step, whatever the optimizer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, relu

from flatcl.models._method import Batch, Block, Context, Loss, Method, published
from flatcl.models.sgd import DER
from flatcl.utils.engine.passes import eval_mode
from flatcl.utils.registry import BACKBONES, METHODS


class Lateral(nn.Module):
    """U relu(V [alpha_j h_j]): (N, columns, *before) -> (N, *after), for one stage of a new column."""

    def __init__(self, columns: int, before: torch.Size, after: torch.Size):
        super().__init__()
        self.after = after
        self.alpha = nn.Parameter(0.1 * torch.rand(columns))  # small and random, as in the paper
        width = before[0]
        is_map = len(before) == 3
        self.reduce = nn.Conv2d(columns * width, width, 1) if is_map else nn.Linear(columns * width, width)
        self.expand = nn.Conv2d(width, after[0], 1) if len(after) == 3 else nn.Linear(width, after[0])

    def forward(self, past: Tensor) -> Tensor:
        scaled = past * self.alpha.view(1, -1, *[1] * (past.ndim - 2))
        reduced = relu(self.reduce(scaled.flatten(1, 2)))
        if reduced.ndim == 4:
            reduced = adaptive_avg_pool2d(reduced, self.after[1:] or 1)
        return self.expand(reduced if len(self.after) == 3 else reduced.flatten(1))


class Columns(nn.Module):
    """Networks of one kind; the last one learns, those before it are frozen."""

    def __init__(self, first: nn.Module):
        super().__init__()
        self.columns, self.laterals = nn.ModuleList([first]), nn.ModuleList([nn.ModuleList()])

    def grow(self, column: nn.Module, shape: tuple[int, ...]) -> None:
        """Freezes what there is, for a new column of images of this shape."""
        self.requires_grad_(False)
        with eval_mode(column), torch.no_grad():
            sizes = [h.shape[1:] for h in _chain(column, next(column.parameters()).new_zeros(1, *shape))]
        number, device = len(self.columns), next(column.parameters()).device
        laterals = [Lateral(number, *pair) for pair in zip(sizes, sizes[1:], strict=False)]
        self.columns.append(column)
        self.laterals.append(nn.ModuleList(laterals).to(device))
        self.train(self.training)

    def train(self, mode: bool = True) -> "Columns":
        super().train(mode)
        self.columns[:-1].eval()
        return self

    @torch.no_grad()
    def past(self, x: Tensor, number: int | None = None) -> list[Tensor]:
        """Of each stage but the last: what the first `number` columns give (N, columns, ...); by default the frozen."""
        number = len(self.columns) - 1 if number is None else number
        found: list[list[Tensor]] = []  # column, stage
        for index in range(number):
            found.append(self._outputs(index, x, _by_stage(found))[:-1])
        return _by_stage(found)

    def forward(self, x: Tensor, past: list[Tensor] | None = None, index: int = -1) -> Tensor:
        """The logits (N, K) of a column, the newest by default. `past`: what those before it give, if it is known."""
        index = range(len(self.columns))[index]
        return self._outputs(index, x, self.past(x, index) if past is None else past)[-1]

    def _outputs(self, index: int, x: Tensor, past: list[Tensor]) -> list[Tensor]:
        return _chain(self.columns[index], x, list(zip(self.laterals[index], past, strict=True)))


def _chain(column: nn.Module, x: Tensor, sides: list[tuple[Lateral, Tensor]] = []) -> list[Tensor]:
    """The outputs of a column's stages; from the second on, each has one more input from the side."""
    outputs = []
    for stage, (weigh, activation) in enumerate(column.stages):
        x = weigh(x)
        if sides and stage > 0:
            lateral, past = sides[stage - 1]
            x = x + lateral(past)
        x = activation(x)
        outputs.append(x)
    return outputs


def _by_stage(found: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(outputs, 1) for outputs in zip(*found, strict=True)]


@METHODS.register("pnn")
class PNN(Method):
    settings = ("class-il",)
    needs_task = True
    published = published(
        DER,
        {
            ("seq-mnist",): dict(lr=0.1, batch_size=10, n_epochs=1),
            ("seq-cifar10",): dict(lr=0.03, batch_size=32, n_epochs=50),
            ("seq-tinyimg",): dict(lr=0.03, batch_size=32, n_epochs=100),
        },
    )

    def __init__(self, net: nn.Module, args: Any, context: Context):
        super().__init__(Columns(net), args, context)
        self.tasks: list[int] = []  # whose column is which

    @classmethod
    def check(cls, config: Any, benchmark: type) -> list[str]:
        problems = super().check(config, benchmark)
        if config.class_il_argmax != "all":
            problems.append("--class_il_argmax has no effect on pnn, for which class-il is not defined. Drop it.")
        if config.sync_bn:
            problems.append("--sync_bn 1 cannot be used with pnn, whose later columns it would not reach. Drop it.")
        if config.freeze_backbone:
            problems.append(
                "--freeze_backbone cannot be used with pnn, which trains a new network for each task. Drop it."
            )
        if config.pretrained_weights is not None:
            problems.append(
                "--pretrained_weights cannot be used with pnn, which draws a new network for each task. Drop it."
            )
        if not hasattr(BACKBONES.load(config.backbone), "stages"):
            problems.append(f"--model pnn needs a backbone with `stages`, {config.backbone} has none. Choose another.")
        return problems

    def begin_task(self, task: Any) -> None:
        if self.tasks:
            self._grow()
        self.tasks.append(task.index)

    def _grow(self) -> None:
        config, benchmark = self.context.config, self.context.benchmark
        backbone = BACKBONES.load(config.backbone)
        column = backbone(benchmark.shape, benchmark.num_classes, config.view(backbone)).to(self.context.device)
        self.net.grow(column, benchmark.shape)

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        past = self.net.past(batch.inputs)
        self.count(forward=len(batch.y) * (len(self.net.columns) - 1))
        return (Block(batch.inputs, y=batch.y, ids=batch.ids, **{f"past_{i}": h for i, h in enumerate(past)}),)

    phase = Method.phase

    def loss(self, stream: Block) -> Loss:
        past = [column for name, column in stream.columns.items() if name.startswith("past_")]
        logits = self.net(stream.x, past)
        return Loss({"current": cross_entropy(logits, stream.y, reduction="none")}, logits)

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """The logits of the task's own column; of the newest one where the task is not known or not trained."""
        return self.net(x, index=self.tasks.index(task) if task in self.tasks else -1)

    def get_extra_state(self) -> dict:
        return {"tasks": list(self.tasks)}

    def set_extra_state(self, state: dict) -> None:
        self.tasks = list(state["tasks"])

    def load_state_dict(self, state: dict[str, Any], *args, **kwargs):
        while any(name.startswith(f"net.columns.{len(self.net.columns)}.") for name in state):
            self._grow()
        found = super().load_state_dict(state, *args, **kwargs)
        if not any(name.endswith("_extra_state") for name in state):  # weights alone
            start = self.context.config.start_from
            self.tasks = list(range(start, start + len(self.net.columns)))
        return found
