"""How the tensors of a network with convolutions lie in memory, and how many images it takes at a time.

Both are chosen here, once, by measurement on a CPU (tests/records/bench): with channels last, a training step takes two
thirds to nine tenths of the time; without gradients, 64 images of 32x32 at a time pass faster than hundreds, whose maps
leave the cache. On a GPU nothing is changed unless it is asked for (tests/records/gpu has measurements). Networks
without convolutions are left alone. Last digits differ more than by another order of sums: torch's BatchNorm sums in
float32 in this layout, and in float64 otherwise.
"""

import copy
from math import prod

import torch
from torch import nn

from flatcl.utils.errors import UsageError

CPU_PIXELS = 64 * 32 * 32  # of the images of one forward without gradients, where there are convolutions
FEWEST = 32  # of these images: where cores are busy with other work, two threads take turns with each small piece


def has_convolutions(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) for part in module.modules())


def wants_channels_last(choice: str, net: nn.Module, shape: tuple[int, int, int], device: torch.device) -> bool:
    """What --channels_last stands for with this network, still on the CPU, and images (C, H, W). Raises `UsageError`
    where it is asked for and there is nothing to lay out."""
    if choice == "1" and not has_convolutions(net):
        raise UsageError("--channels_last 1 has no effect on a network without convolutions. Drop it.")
    if choice != "auto":
        return choice == "1"
    return device.type == "cpu" and has_convolutions(net) and _bears_channels_last(net, shape)


def _bears_channels_last(net: nn.Module, shape: tuple[int, int, int]) -> bool:
    """Whether a copy of the network passes images in this layout: one that takes a `view` of a map does not."""
    try:
        trial = copy.deepcopy(net).eval()
        lay_out(trial, channels_last=True)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            trial(torch.zeros(2, *shape))
    except Exception:  # code of users, which fails in many ways; what is wrong anyway is said where it trains
        return False
    return True


def lay_out(module: nn.Module, channels_last: bool) -> None:
    """Puts the weights of all Conv2d layers into channels_last where that is wanted; maps and gradients follow them.

    The parameters stay the same objects with the same values. To be called again when a network has grown.
    """
    if not channels_last:
        return
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            for p in layer.parameters(recurse=False):
                if p.ndim == 4:
                    p.data = p.data.to(memory_format=torch.channels_last)


def rows_of_forward(module: nn.Module, shape: tuple[int, ...], device: torch.device, most: int) -> int:
    """Images of this shape (C, H, W) that pass the module at a time where no gradient is asked for: at most `most`, and
    fewer where its network enlarges them (`resizes_to`)."""
    given = shape[1] * shape[2]
    pixels = max(given, *(prod(part.resizes_to) for part in module.modules() if getattr(part, "resizes_to", None)), 0)
    most = max(1, most * given // pixels)
    if device.type != "cpu" or not has_convolutions(module):
        return most
    return min(most, max(FEWEST, CPU_PIXELS // pixels))
