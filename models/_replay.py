"""What replay methods share: the buffer, how it is filled, and draws from it, augmented in each step."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatcl.models._method import Batch, Block, Context, Loss, Method
from flatcl.utils.arguments import flag
from flatcl.utils.engine.buffer import Buffer
from flatcl.utils.errors import mistake
from flatcl.utils.protocols import Benchmark, Config, Task
from flatcl.utils.registry import POLICIES


@dataclass(frozen=True)
class MemoryArgs:
    """The flags of a memory that is filled as the paper says (`fixed_policy`)."""

    buffer_size: int = flag(500, "images that the memory can hold", low=1, high=10**9, fixed=True)
    minibatch_size: int = flag(32, "images of one draw from the memory", low=1, high=10**6)


class ReplayMethod(Method):
    """A method with a memory of past images (uint8, without augmentation). --buffer_policy chooses which rows are kept,
    `columns` what is kept of them.

    If the paper says how the memory is filled, the method has a `fixed_policy` and `Args` derived from `MemoryArgs`,
    and fills the buffer in its own `remember` or `end_task`. Optimizers that keep records of single images need a
    column `ids` to recognise replayed images.
    """

    has_memory = True
    keeps_logits = False  # the memory has a column `logits`
    phase = Method.phase

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
        """What the memory keeps of n rows: {column: (n, ...)}.

        `logits` (n, K) are those of the clean pass (`Loss.logits`). With a policy that chooses rows at the end of a
        task, they are those of the images without augmentation at that time, in eval mode, or None without
        `keeps_logits`.
        """
        kept = {"x": x, "y": y, "ids": ids}
        if not self.keeps_logits:
            return kept
        if logits is None:
            raise mistake(
                self,
                "`keeps_logits` is True, but there are no logits of these rows. Write: Loss(rows, logits), with the "
                "logits of the stream's rows, or, where `steps` makes no step for a batch, override `columns`.",
            )
        return {**kept, "logits": logits}

    def remember(self, batch: Batch, loss: Loss | None) -> None:
        """Gives the batch to the policy. `loss` is None if `steps` made no step for this batch."""
        labels = batch.labels if self.buffer.policy.needs_labels else None
        logits = None if loss is None else loss.logits
        self.buffer.add(labels, **self.columns(batch.x, batch.y, batch.ids, logits))

    def end_task(self, task: Task) -> None:
        """Lets the policy choose rows. A subclass that overrides this calls it first."""
        self.buffer.policy.end_task(self, task)

    def likely_mistakes(self) -> list[str]:
        if len(self.buffer) > 0:
            return super().likely_mistakes()
        return [
            f"{self.name}: its memory is still empty. `remember` and `end_task` of ReplayMethod fill it: a class that "
            "overrides them calls super().remember(batch, loss) and super().end_task(task)."
        ]

    def replay(self, draws: int = 1) -> tuple[Block, ...]:
        """A block for each of `draws` independent draws of min(minibatch_size, filled) rows; an empty tuple while the
        memory is empty.

        All draws are gathered and augmented in one call.
        """
        if len(self.buffer) == 0:
            return ()
        columns: dict[str, Any] = self._drawn(draws)
        inputs = self.context.augment(columns.pop("x"))
        size = len(inputs) // draws
        parts = [slice(i * size, (i + 1) * size) for i in range(draws)]
        return tuple(
            Block(inputs[part], memory=size, **{name: column[part] for name, column in columns.items()})
            for part in parts
        )

    def replay_jointly(self, batch: Batch) -> Block:
        """One block with the rows of the stream and, after them, those of one draw, with the columns `y` and, if the
        memory has it, `ids`. While the memory is empty, it has only the rows of the stream."""
        if len(self.buffer) == 0:
            return batch.block
        return self.joined(batch, self._drawn())

    def _drawn(self, draws: int = 1) -> dict[str, Tensor]:
        if "x" not in self.buffer.columns:
            raise mistake(
                self,
                f"its memory has no column `x`, only {', '.join(self.buffer.columns)}. Write: "
                "self.buffer.add(x=batch.x, y=batch.y, ids=batch.ids).",
            )
        return self.buffer.draw(self.args.minibatch_size, draws)

    def joined(self, batch: Batch, rows: dict[str, Tensor]) -> Block:
        """One block with the rows of the stream and, after them, these rows of the memory."""
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
