"""What rehearsal methods share: the buffer, and draws from it that are freshly augmented."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flatcl.models._method import Batch, Block, Context, Method
from flatcl.utils.arguments import flag
from flatcl.utils.engine.buffer import Buffer


class ReplayMethod(Method):
    """A method with a reservoir of past images (uint8, un-augmented) and whatever columns `remember` adds to it.

    With a column `ids`, optimizers that keep records of single images know the replayed ones too.
    """

    has_memory = True

    @dataclass(frozen=True)
    class Args:
        buffer_size: int = flag(500, "images that the memory can hold", low=1, high=10**9, fixed=True)
        minibatch_size: int = flag(32, "images of one draw from the memory", low=1, high=10**6)

    def __init__(self, net, args, context: Context):
        super().__init__(net, args, context)
        self.buffer = Buffer(args.buffer_size, context.device, context.rng)

    def replay(self, draws: int = 1) -> tuple[Block, ...]:
        """`draws` independent draws of min(minibatch_size, filled) rows each, as blocks; () while the memory is empty.

        All draws are gathered and augmented in one call.
        """
        if len(self.buffer) == 0:
            return ()
        columns = self.buffer.draw(self.args.minibatch_size, draws)
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
        columns = {name: torch.cat((getattr(batch, name), rows[name])) for name in ("y", "ids") if name in rows}
        return Block(inputs, memory=len(rows["y"]), **columns)

    def remembered_ids(self) -> Tensor | None:
        return self.buffer.all().get("ids")

    def get_extra_state(self) -> dict:
        return self.buffer.state_dict()

    def set_extra_state(self, state: dict) -> None:
        self.buffer.load_state_dict(state)
