"""Several processes that train one run together, started by torchrun: who this one is, and what they exchange.

Each process, a rank, has the whole benchmark and the whole memory, and draws the same blocks from generators of the
same seed. It passes its part of their rows; gradients and results are then summed over all, so that weights and memory
stay the same everywhere, bit for bit, and the run is the one that a single process makes, up to the order of sums. Only
BatchNorm sees a part of the rows (`--sync_bn 1`: all of them); its running averages are the mean of the ranks'.

Rank 0 writes and prints. Where a rank dies, the others end with a message.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, distributed, nn

from flatcl.utils import launch
from flatcl.utils.engine import seeding
from flatcl.utils.errors import Interrupted, RunFailed, UsageError


def device_of(device: torch.device) -> torch.device:
    """Of several GPUs, this process's."""
    if launch.size() > 1 and device.type == "cuda" and device.index is None:
        return torch.device("cuda", launch.number_here())
    return device


class Lost(RunFailed):
    """Another process of the run has ended."""


class Ranks:
    """What the processes exchange. Each call is made by all of them, in the same order; it raises `Lost` where one of
    them is no longer there."""

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

    def wait(self) -> None:
        """Until all are here."""
        self.greatest(0)

    def leave(self) -> None:
        """The last exchange: rank 0 may still be writing, and torchrun ends it where another one ends with an error.
        Not for a rank that has failed, which could wait for what the others never send."""
        with suppress(Lost):
            self.wait()
        distributed.destroy_process_group()

    def have_equal_generators(self) -> bool:
        """Whether torch's global generators stand at the same place on all ranks."""
        state = seeding.global_state()
        parts = [state["cpu"], *state.get("cuda", [])]
        return self.are_equal(torch.cat([_numbers(part.cpu().numpy().tobytes()) for part in parts]))

    def are_equal(self, tensor: Tensor) -> bool:
        """Whether it is the same on all ranks."""
        tensor = tensor.to(self.device)
        both = torch.stack((tensor, -tensor))
        self._reduce(both, distributed.ReduceOp.MAX)
        return torch.equal(both[0], -both[1])

    def _reduce(self, tensor: Tensor, how: Any) -> None:
        try:
            distributed.all_reduce(tensor, how)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise Lost(
                f"rank {self.number} of {self.size} has lost the connection to the others: one of them has ended or "
                f"failed ({str(error).splitlines()[0][:200]})."
            ) from error


def check(config: Any, is_new: bool = True) -> None:
    """Raises `UsageError` where several processes cannot train this run, or where it `is_new` and needs several."""
    if launch.size() == 1:
        if config.sync_bn and is_new:
            raise UsageError("--sync_bn 1 has no effect in one process. Start several by torchrun, or drop it.")
        return
    problems = []
    if not config.learner.rows_are_independent:
        problems.append(
            f"--model {config.model} cannot be trained by several processes: a row's cost depends on other rows of its "
            "step, and each process has only some. Start one process."
        )
    if config.cuda_graph == "1":
        problems.append(
            "--cuda_graph 1 is for one process: the exchange between several processes cannot be recorded. Use auto "
            "or 0."
        )
    if config.sync_bn and not torch.cuda.is_available() or config.sync_bn and config.device == "cpu":
        problems.append("--sync_bn 1 needs GPUs, as torch's SyncBatchNorm does, and this run is on the CPU. Drop it.")
    if config.sync_bn and config.optimizer == "msam":
        problems.append("--sync_bn 1 cannot be used with msam, whose shards have their own forward passes. Drop it.")
    if config.device.startswith("cuda:"):
        problems.append(f"--device {config.device} is one GPU for all processes. Use cuda: each takes its own.")
    if problems:
        raise UsageError(*problems)


def check_network(net: nn.Module) -> None:
    """Raises `UsageError` where a network draws: each rank would draw for its own rows, and generators part."""
    draws = [name for name, part in net.named_modules() if isinstance(part, nn.modules.dropout._DropoutNd) and part.p]
    if draws:
        refuse_draws(f"its {', '.join(draws[:3])}")


def refuse_draws(what: str) -> None:
    raise UsageError(
        f"a network that draws random numbers ({what}) cannot be trained by several processes: each would draw for "
        "its own rows, and then no longer the same blocks. Start one process, or remove the dropout."
    )


@contextmanager
def joined(device: torch.device, config: Any = None) -> Iterator[Ranks | None]:
    """Inside, this process exchanges with the others of its run; None where it is the only one. Raises `UsageError`
    where they cannot find each other, or are to make another run, of other flags or other code, than this one."""
    if launch.size() == 1:
        yield None
        return
    try:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UsageError(
            f"this run has {launch.size()} processes, but they cannot connect to each other ({why}). Start them by "
            "torchrun, or unset WORLD_SIZE and RANK."
        ) from None
    ranks = Ranks(device)
    if config is not None and not ranks.are_equal(_numbers(f"{config.hash} {sorted(config.code.items())}".encode())):
        raise UsageError(
            "the processes have different runs: their flags or their code differ. Start all of them with the same."
        )
    try:
        yield ranks
    except Interrupted:  # all of them, after the same step
        ranks.leave()
        raise
    ranks.leave()


def _numbers(content: bytes) -> Tensor:
    """A digest (1,) of bytes that can be compared."""
    return torch.tensor([zlib.crc32(content)], dtype=torch.float64)
