"""What rehearsal methods share: the buffer, how it is filled, and draws from it that are freshly augmented."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from flatcl.models._method import Batch, Block, Context, Loss, Method
from flatcl.utils.arguments import flag
from flatcl.utils.engine.buffer import Buffer
from flatcl.utils.protocols import Benchmark, Config, Task
from flatcl.utils.registry import POLICIES


@dataclass(frozen=True)
class MemoryArgs:
    """The flags of a memory whose policy is not the user's choice (`fixed_policy`)."""

    buffer_size: int = flag(500, "images that the memory can hold", low=1, high=10**9, fixed=True)
    minibatch_size: int = flag(32, "images of one draw from the memory", low=1, high=10**6)


class ReplayMethod(Method):
    """A method with a memory of past images (uint8, un-augmented), which --buffer_policy fills with `columns`.

    One whose paper says how its memory is filled has a `fixed_policy`, `Args` that build on `MemoryArgs`, and fills
    the buffer itself: in a `remember` or an `end_task` of its own. With a column `ids`, optimizers that keep records of
    single images know the replayed ones too.
    """

    has_memory = True
    keeps_logits = False  # the memory has a column `logits`

    @dataclass(frozen=True)
    class Args(MemoryArgs):
        buffer_policy: str = flag("reservoir", "what the memory keeps", choices=POLICIES, fixed=True)

    @classmethod
    def check(cls, config: Config, benchmark: type[Benchmark]) -> list[str]:
        problems = super().check(config, benchmark)
        policy = getattr(config, "buffer_policy", None)  # the flag may be missing: `fixed_policy`
        return problems + (POLICIES.load(policy).check(config, benchmark) if policy else [])

    def __init__(self, net: nn.Module, args: Any, context: Context):
        super().__init__(net, args, context)
        policy = POLICIES.load(getattr(args, "buffer_policy", "reservoir"))(context.benchmark.num_classes)
        self.buffer = Buffer(args.buffer_size, context.device, context.rng, policy)

    def columns(self, x: Tensor, y: Tensor, ids: Tensor, logits: Tensor | None) -> dict[str, Tensor]:
        """What the memory keeps of n rows, whoever chooses them: {column: (n, ...)}.

        `logits` (n, K) are those of the clean pass (`Loss.logits`), and with a policy that chooses when a task ends,
        those of the un-augmented images then, in eval mode; these are None unless `keeps_logits`.
        """
        kept = {"x": x, "y": y, "ids": ids}
        return {**kept, "logits": cast(Tensor, logits)} if self.keeps_logits else kept

    def remember(self, batch: Batch, loss: Loss | None) -> None:
        """Shows the batch to the policy. `loss` is None where `steps` had no step for it."""
        labels = batch.labels if self.buffer.policy.needs_labels else None
        logits = None if loss is None else loss.logits
        self.buffer.add(labels, **self.columns(batch.x, batch.y, batch.ids, logits))

    def end_task(self, task: Task) -> None:
        """Lets the policy choose; where it is overridden, call it first."""
        self.buffer.policy.end_task(self, task)

    def replay(self, draws: int = 1) -> tuple[Block, ...]:
        """`draws` independent draws of min(minibatch_size, filled) rows each, as blocks; () while the memory is empty.

        All draws are gathered and augmented in one call.
        """
        if len(self.buffer) == 0:
            return ()
        columns: dict[str, Any] = self.buffer.draw(self.args.minibatch_size, draws)
        inputs = self.context.augment(columns.pop("x"))
        size = len(inputs) // draws
        parts = [slice(i * size, (i + 1) * size) for i in range(draws)]
        return tuple(
            Block(inputs[part], memory=size, **{name: column[part] for name, column in columns.items()})
            for part in parts
        )

    def replay_jointly(self, batch: Batch) -> Block:
        """The stream's rows and, after them, one draw's, in one block with `y` and, where the memory has them, `ids`;
        the stream alone while the memory is empty."""
        if len(self.buffer) == 0:
            return batch.block
        return self.joined(batch, self.buffer.draw(self.args.minibatch_size))

    def joined(self, batch: Batch, rows: dict[str, Tensor]) -> Block:
        """The stream's rows and, after them, these of the memory."""
        augment = self.context.augment
        if augment.transforms:
            inputs = torch.cat((batch.inputs, augment(rows["x"])))
        else:  # bytes are cheaper to move than floats
            inputs = augment(torch.cat((batch.x, rows["x"])))
        columns: Any = {name: torch.cat((getattr(batch, name), rows[name])) for name in ("y", "ids") if name in rows}
        return Block(inputs, memory=len(rows["y"]), **columns)

    def remembered_ids(self) -> Tensor | None:
        return self.buffer.all().get("ids")

    def get_extra_state(self) -> dict:
        return self.buffer.state_dict()

    def set_extra_state(self, state: dict) -> None:
        self.buffer.load_state_dict(state)
