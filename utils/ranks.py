"""Several processes that train one run together, started by torchrun: who this one is, and what they exchange.

Each process, a rank, has the whole benchmark and the whole memory, and draws the same blocks from generators of the
same seed. It passes its part of their rows; gradients and results are then summed over all, so that weights and memory
stay the same everywhere, bit for bit, and the run is the one that a single process makes, up to the order of sums. Only
BatchNorm sees a part of the rows (`--sync_bn 1`: all of them); its running averages are the mean of the ranks'.

Rank 0 writes and prints. Where a rank dies, the others end with a message.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from utils.errors import RunFailed, UsageError


def number() -> int:
    """Of this process; 0 where there is only one."""
    return _environment("RANK", 0)


def size() -> int:
    """How many processes train this run; torchrun says so."""
    return _environment("WORLD_SIZE", 1)


def device_of(device: torch.device) -> torch.device:
    """The one of several GPUs that is this process's."""
    if size() > 1 and device.type == "cuda" and device.index is None:
        return torch.device("cuda", _environment("LOCAL_RANK", 0))
    return device


def _environment(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else otherwise


class Ranks:
    """What the processes exchange. Each call is made by all of them, in the same order.

    Raises `RunFailed` where one of them is no longer there.
    """

    def __init__(self, device: torch.device):
        self.number, self.size, self.device = distributed.get_rank(), distributed.get_world_size(), device

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """Each tensor summed over the ranks: one exchange for each type of number."""
        found: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            places = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = torch.cat([tensors[i].reshape(-1) for i in places])
            self._reduce(flat, distributed.ReduceOp.SUM)
            parts = flat.split([tensors[i].numel() for i in places])
            found |= {i: part.view(tensors[i].shape) for i, part in zip(places, parts, strict=True)}
        return [found[i] for i in range(len(tensors))]

    def greatest(self, value: int) -> int:
        """The greatest of the ranks' values; waits for the device."""
        tensor = torch.tensor(value, device=self.device)
        self._reduce(tensor, distributed.ReduceOp.MAX)
        return int(tensor)

    def are_equal(self, tensor: Tensor) -> bool:
        """Whether it is the same on all ranks."""
        both = torch.stack((tensor, -tensor))
        self._reduce(both, distributed.ReduceOp.MAX)
        return torch.equal(both[0], -both[1])

    def _reduce(self, tensor: Tensor, how: Any) -> None:
        try:
            distributed.all_reduce(tensor, how)
        except RuntimeError as error:
            raise RunFailed(
                f"rank {self.number} of {self.size} has lost the others: one of them has ended "
                f"({str(error).splitlines()[0][:200]})."
            ) from None


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks | None]:
    """Inside, this process exchanges with the others of its run; None where it is the only one."""
    if size() == 1:
        yield None
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"{size()} processes were to train this run, and cannot find each other ({str(error).splitlines()[0]}). "
            "Start them by torchrun, or unset WORLD_SIZE and RANK."
        ) from None
    try:
        yield Ranks(device)
    finally:
        distributed.destroy_process_group()
