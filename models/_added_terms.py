"""Terms that an optimizer adds to a method's loss (SAF, MESA), made of the network's logits for each block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from flatcl.models._blocks import Block, Loss
from flatcl.utils.errors import mistake
from flatcl.utils.optim._driver import frozen_statistics

Costs = Callable[[list[Tensor]], list[Tensor]]


class AddedTerm:
    """A term with the name `name`; `costs`: the logits (n, K) of each block -> costs (n,) of each block's rows."""

    def __init__(self, method: Any, name: str, costs: Costs):
        self.method, self.name, self.costs = method, name, costs

    @contextmanager
    def watch(self, blocks: tuple[Block, ...]) -> Iterator[dict[int, Tensor]]:
        """Inside, the network's output for each block that passes through it as a whole is kept: {block: logits}."""
        seen: dict[int, Tensor] = {}

        def keep(net: nn.Module, inputs: tuple, output: Tensor) -> None:
            for index, block in enumerate(blocks):
                if inputs and inputs[0] is block.x:
                    seen[index] = output

        handle = self.method.net.register_forward_hook(keep)
        try:
            yield seen
        finally:
            handle.remove()

    def add_to(self, loss: Loss, blocks: tuple[Block, ...], seen: dict[int, Tensor]) -> Loss:
        """The loss with this term, one for each block. A block that was not `seen`, because the method reaches its
        logits in another way, costs a forward."""
        logits = [self._forward(block) if index not in seen else seen[index] for index, block in enumerate(blocks)]
        if self.method.amp:
            logits = [part.float() for part in logits]
        names = [self.name] if len(blocks) == 1 else [f"{self.name}_{index}" for index in range(len(blocks))]
        own = dict(zip(names, zip(blocks, self.costs(logits), strict=True), strict=True))
        for name in own.keys() & {*loss.rows, *loss.penalties}:
            raise mistake(self.method, f"'{name}' is a term of the optimizer's. Rename the method's.")
        return Loss({**loss.rows, **own}, loss.logits, loss.penalties, loss.outputs)

    def _forward(self, block: Block) -> Tensor:
        with frozen_statistics(self.method):
            return self.method.net(block.x)
