"""How a backbone shows its layers, to methods that need more of it than `features` (progressive networks).

`net.stages` are pairs (map, activation) from the images to the logits: `forward` is the one after the other. What is
added between the two enters a stage as one more input of its last layer would.
"""

from collections.abc import Callable

from torch import Tensor, nn

Stage = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def without_last_relu(blocks: nn.Sequential, x: Tensor) -> Tensor:
    """Residual blocks in turn, the last one before its activation."""
    return blocks[-1].before_relu(blocks[:-1](x))
