"""What methods share that pass over data by themselves, or learn from the network as it was."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flatcl.models._method import Batch, Loss, Method
from flatcl.models._replay import MemoryArgs, ReplayMethod
from flatcl.utils.arguments import DEBUG_BATCHES, Config
from flatcl.utils.engine.seeding import generator_state, set_generator_state


class Frozen(nn.Module):
    """A copy of a network as it is now: never trained, in eval mode for good."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Frozen":
        return self

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class WithTeacher(Method):
    """A method that learns from `teacher`, the network as it was at the end of the last task; None in the first."""

    teacher: Frozen | None  # no value here: a value of the class would hide the module of an instance

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.teacher = None

    def keep_teacher(self) -> None:
        self.teacher = Frozen(self.net)

    def taught(self, x: Tensor) -> Tensor:
        """The teacher's logits (N, K) for these inputs; counted."""
        self.count(forward=len(x))
        return self.teacher(x)

    def load_state_dict(self, state: dict[str, Any], *args, **kwargs):
        if any(name.startswith("teacher.") for name in state):
            self.keep_teacher()
        return super().load_state_dict(state, *args, **kwargs)


class SharedMemory(ReplayMethod):
    """A memory that the tasks share evenly, filled at their ends, unless a subclass has no `fixed_policy`."""

    Args = MemoryArgs
    fixed_policy = "as many images of each task, chosen at its end"
    phase = ReplayMethod.phase

    @classmethod
    def check(cls, config: Any, benchmark: type) -> list[str]:
        return super().check(config, benchmark) + (check_shares(config) if cls.fixed_policy else [])

    def remember(self, batch: Batch, loss: Loss) -> None:
        """Nothing: the memory is filled when a task ends."""

    def store_share(self, task: Any) -> None:
        """Adds this task's part of the memory: random images, as they are stored."""
        share = self.args.buffer_size // len(self.context.benchmark)
        x, y, ids = next(shuffled(self, task.train, share))
        self.buffer.append(x=x, y=y, ids=ids)


def check_shares(config: Any) -> list[str]:
    """A problem where the memory has no image for each of the tasks, which share it evenly."""
    if config.buffer_size >= config.n_tasks:
        return []
    return [
        f"--buffer_size must be at least the number of tasks {config.n_tasks}, which share it, "
        f"got {config.buffer_size}. Give more."
    ]


class Drawing:
    """Mixed into a method without a buffer that draws from its own generator: the generator is in the checkpoint."""

    def get_extra_state(self) -> dict:
        return {"rng": generator_state(self.context.rng)}

    def set_extra_state(self, state: dict) -> None:
        set_generator_state(self.context.rng, state["rng"])


def shuffled(method: Method, split: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One pass over a split in random order: images (N, C, H, W) uint8 as stored, labels and ids (N,), on the device.

    In debug mode it has as few batches as an epoch.
    """
    config: Config = method.context.config
    order = torch.from_numpy(method.context.rng.permutation(len(split))).to(split.labels.device)
    rows_of = order.split(batch_size)
    for rows in rows_of[: DEBUG_BATCHES if config.debug_mode else None]:
        columns = (split.images.index_select(0, rows), split.labels[rows], split.ids[rows])
        yield tuple(column.to(method.context.device) for column in columns)
