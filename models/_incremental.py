"""What methods share that learn classes task by task: which classes are old, and exemplars of them.

Exemplars are chosen when a task ends, and join the training rows of the next one. They are mixed with the task's own
rows, so that an optimizer cannot tell them apart: to it, such a method has no memory.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatcl.datasets._benchmark import Split as Rows
from flatcl.models._herding import herded
from flatcl.models._method import Context, Method
from flatcl.models._passes import WithTeacher
from flatcl.utils.arguments import flag
from flatcl.utils.engine.buffer import Buffer
from flatcl.utils.optim._driver import trainable
from flatcl.utils.protocols import Benchmark, Config, Split, Task


class Incremental(Method):
    """Classes of earlier tasks are 0 ... past - 1, those of the present task past ... seen - 1."""

    settings = ("class-il",)

    def __init__(self, net: nn.Module, args: Any, context: Context):
        super().__init__(net, args, context)
        self.past, self.seen = 0, context.benchmark.num_classes  # until a task begins

    def begin_task(self, task: Task) -> None:
        self.past, self.seen = task.classes.start, task.classes.stop

    def is_first(self, task: Task) -> bool:
        """Whether nothing has been learned before this task."""
        return task.index == self.context.config.start_from

    def get_extra_state(self) -> dict:
        return {"past": self.past, "seen": self.seen}

    def set_extra_state(self, state: dict) -> None:
        self.past, self.seen = state["past"], state["seen"]


class WithExemplars(WithTeacher, Incremental):
    """A method with a memory of exemplars: the columns `x`, `y`, `ids`, in the order in which they were chosen."""

    revisits = True
    fixed_policy = "exemplars by herding"

    @dataclass(frozen=True)
    class Args:
        buffer_size: int = flag(500, "exemplars that the memory can hold", low=1, high=10**9, fixed=True)

    def __init__(self, net: nn.Module, args: Any, context: Context):
        super().__init__(net, args, context)
        self.buffer = Buffer(args.buffer_size, context.device, context.rng)
        self._rows: Split | None = None  # of the task under way, with the exemplars

    @classmethod
    def check(cls, config: Config, benchmark: type[Benchmark]) -> list[str]:
        problems = super().check(config, benchmark)
        if config.buffer_size < benchmark.num_classes:
            problems.append(
                f"--buffer_size must have room for one exemplar of each of the {benchmark.num_classes} classes of "
                f"{benchmark.name}, got {config.buffer_size}. Give more."
            )
        return problems

    def train_split(self, task: Task, epoch: int) -> Split:
        if self._rows is None:
            self._rows = self.with_exemplars(task.train)
        return self._rows

    def with_exemplars(self, split: Split) -> Split:
        """The rows of a split (`Split`), then the exemplars."""
        if len(self.buffer) == 0:
            return split
        old = {name: column.to(split.labels.device) for name, column in self.buffer.all().items()}
        columns = ((split.images, old["x"]), (split.labels, old["y"]), (split.ids, old["ids"]))
        images, labels, ids = map(torch.cat, columns)
        return Rows(images, labels, ids, split.batch_lengths)

    def herd_exemplars(self, task: Task) -> None:
        """buffer_size // seen exemplars of each class: an old one keeps its first, a new one's are chosen by herding
        from all its rows, by features that are not normalised."""
        number, new = self.buffer.capacity // self.seen, task.train
        parts: dict[str, list[Tensor]] = {"x": [], "y": [], "ids": []}

        def keep(rows: Tensor, **columns: Tensor) -> None:
            for name, column in columns.items():
                parts[name].append(column.index_select(0, rows).to(self.context.device))

        old = self.buffer.all()
        for label in range(self.past if old else 0):
            keep((old["y"] == label).nonzero().squeeze(1)[:number], **old)
        for label in task.classes:
            keep(herded(self, new, label, number), x=new.images, y=new.labels, ids=new.ids)
        self.buffer.replace(**{name: torch.cat(columns) for name, columns in parts.items()})
        self._rows = None

    def remembered_ids(self) -> Tensor | None:
        return self.buffer.all().get("ids")

    def get_extra_state(self) -> dict:
        return {**super().get_extra_state(), "buffer": self.buffer.state_dict()}

    def set_extra_state(self, state: dict) -> None:
        super().set_extra_state(state)
        self.buffer.load_state_dict(state["buffer"])
        self._rows = None


def classifier_of(net: nn.Module) -> tuple[str, nn.Linear]:
    """(name, layer) that makes the logits of a backbone's `features`: its `classifier`, else its last linear layer."""
    classifier = getattr(net, "classifier", None)
    if isinstance(classifier, nn.Linear):
        return "classifier", classifier
    return [(name, layer) for name, layer in net.named_modules() if isinstance(layer, nn.Linear)][-1]


def decay(net: nn.Module, weight: float) -> dict[str, Tensor]:
    """The penalty weight * |theta|^2 over what is trained; its gradient is 2 * weight * theta. None for weight 0."""
    if not weight:
        return {}
    squares: Any = sum(p.square().sum() for p in trainable(net))
    return {"decay": weight * squares}
