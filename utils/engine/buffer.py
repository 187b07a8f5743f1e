"""The memory: named columns on the device, filled by a policy (`utils/engine/policies/`), by default a reservoir.

The columns are on the device; the decisions (which slot, which rows) are made on the host, with the buffer's own
generator. They need only the labels, which the stream has on the host. So nothing waits for the device, the same seed
gives the same memory on every device, and a rejected row is never copied. The cost of an operation does not depend on
the size of the buffer.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatcl.utils.engine.policies._policy import Policy
from flatcl.utils.engine.policies.reservoir import Reservoir
from flatcl.utils.engine.seeding import generator_state, set_generator_state
from flatcl.utils.errors import UsageError, mistake


class Buffer:
    """`capacity` rows of named columns. The first rows decide the names, shapes and dtypes of the columns.

    A column `x` holds images as a benchmark stores them, uint8; others raise `UsageError`.
    """

    def __init__(
        self, capacity: int, device: torch.device | str, rng: np.random.Generator, policy: Policy | None = None
    ):
        self.capacity, self.device, self.rng = capacity, torch.device(device), rng
        self.policy = policy or Reservoir()
        self.num_seen = 0  # presentations so far; every epoch presents an image again
        self.filled = 0  # slots, from the first one on
        self.columns: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return self.filled

    def __repr__(self) -> str:
        shapes = (f"{name} {tuple(part.shape[1:])} {str(part.dtype)[6:]}" for name, part in self.columns.items())
        return f"Buffer({len(self):,} of {self.capacity:,} rows{': ' if self.columns else ''}{', '.join(shapes)})"

    def add(self, labels: np.ndarray | None = None, /, **columns: Tensor) -> None:
        """Gives n rows, in order, to the policy. `columns[name]` (n, ...), on the buffer's device. If two rows
        take the same slot, the later one stays.

        `labels` (n,) int64 is the column `y` on the host (`Batch.labels`). If a policy needs labels and they are
        not given, it waits for the device and copies them from there.
        """
        self._check_images(columns)
        n = len(next(iter(columns.values())))
        if labels is None and self.policy.needs_labels:
            if "y" not in columns:
                raise UsageError(
                    f"--buffer_policy {self.policy.name} needs labels, but the rows that are added have no column "
                    "`y`. Add it, or choose another policy."
                )
            labels = columns["y"].cpu().numpy()
        slots = self.policy.place(self, n, labels)
        if not (isinstance(slots, np.ndarray) and slots.shape == (n,) and slots.dtype.kind in "iu"):
            got = f"{slots.dtype} {slots.shape}" if isinstance(slots, np.ndarray) else type(slots).__name__
            raise mistake(self.policy, f"place() must return an array of {n} whole numbers, the slots, got {got}.")
        self.num_seen += n
        kept = np.flatnonzero(slots < self.capacity).tolist()
        if not kept:
            return
        winner = dict(zip(slots[kept].tolist(), kept, strict=True))
        rows = self._index(list(winner.values()))
        self.write(list(winner), **{name: column.index_select(0, rows) for name, column in columns.items()})

    def replace(self, **columns: Tensor) -> None:
        """Replaces all rows by these, at most `capacity`; the columns may change."""
        self.columns, self.num_seen, self.filled = {}, 0, 0
        self.append(**columns)

    def write(self, slots: list[int], **columns: Tensor) -> None:
        """Writes n rows into these n slots; empty slots must be filled in order."""
        self._check_images(columns)
        if not self.columns:
            self._allocate(columns)
        index = self._index(slots)
        for name, column in self.columns.items():
            column.index_copy_(0, index, columns[name])
        self.filled = max(self.filled, max(slots) + 1)
        self.num_seen = max(self.num_seen, self.filled)

    def append(self, **columns: Tensor) -> None:
        """Adds rows after the present ones, in order; there must be enough empty slots."""
        n = len(next(iter(columns.values())))
        assert len(self) + n <= self.capacity, f"{len(self)} + {n} rows of {self.capacity}"
        if n:
            self.write(list(range(self.filled, self.filled + n)), **columns)

    def draw(self, size: int, draws: int = 1) -> dict[str, Tensor]:
        """`draws` independent uniform draws of min(size, filled) distinct rows, one after the other in each column."""
        filled = len(self)
        size = min(size, filled)
        picks = [self.rng.choice(filled, size, replace=False) for _ in range(draws)]
        return self.take(picks[0] if draws == 1 else np.concatenate(picks))

    def take(self, rows: np.ndarray) -> dict[str, Tensor]:
        """These rows (n,) of each column."""
        index = self._index(rows)
        return {name: column.index_select(0, index) for name, column in self.columns.items()}

    def overwrite(self, slots: Tensor, wins: Tensor, **columns: Tensor) -> None:
        """Writes row i of `columns` to slot `slots[i]` (n,) if `wins[i]` (n,) is True; of equal slots, the last row.

        `slots` and `wins` are on the device, and nothing waits for it.
        """
        self._check_images(columns)
        rows = torch.arange(len(slots), device=slots.device)
        last = torch.full((len(self),), -1, device=slots.device)
        last.scatter_reduce_(0, slots, torch.where(wins, rows, -1), "amax")
        winner = last[slots]  # equal slots get equal rows, in whatever order they are written
        for name, column in self.columns.items():
            is_new = (winner >= 0).view(-1, *[1] * (column.ndim - 1))
            column.index_copy_(0, slots, torch.where(is_new, columns[name][winner.clamp(min=0)], column[slots]))

    def all(self) -> dict[str, Tensor]:
        """Every filled row of each column (views)."""
        return {name: column[: len(self)] for name, column in self.columns.items()}

    def state_dict(self) -> dict[str, Any]:
        """Data, counter, generator and the policy's state: a resumed memory continues as if it had not been stopped."""
        columns = {name: column.clone() for name, column in self.all().items()}
        policy = self.policy.state_dict()
        return {"columns": columns, "num_seen": self.num_seen, "rng": generator_state(self.rng), "policy": policy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_seen = state["num_seen"]
        set_generator_state(self.rng, state["rng"])
        self.policy.load_state_dict(state.get("policy", {}))
        self.columns, self.filled = {}, 0
        if state["columns"]:
            self.filled = len(next(iter(state["columns"].values())))
            self._allocate(state["columns"])
            for name, column in self.all().items():
                column.copy_(state["columns"][name])

    @staticmethod
    def _check_images(columns: dict[str, Tensor]) -> None:
        if "x" in columns:
            check_stored("the memory", columns["x"])

    def _allocate(self, like: dict[str, Tensor]) -> None:
        try:
            self.columns = {
                name: torch.empty((self.capacity, *rows.shape[1:]), dtype=rows.dtype, device=self.device)
                for name, rows in like.items()
            }
        except RuntimeError:  # torch's way of saying that memory is short
            size = sum(rows[:1].nbytes for rows in like.values()) * self.capacity / 2**30
            raise UsageError(
                f"--buffer_size {self.capacity} needs {size:,.1f} GiB on {self.device}, more than is available. Give "
                "less."
            ) from None

    def _index(self, positions: Any) -> Tensor:
        return self.on_device(torch.as_tensor(positions, dtype=torch.int64))

    def on_device(self, numbers: Tensor) -> Tensor:
        """Copies what was drawn on the host to the buffer's device, without waiting."""
        if self.device.type == "cuda":
            return numbers.pin_memory().to(self.device, non_blocking=True)
        return numbers.to(self.device)


def check_stored(where: str, images: Tensor) -> None:
    """Raises `UsageError` if images are not as a benchmark stores them. Checks only the dtype."""
    if images.dtype != torch.uint8:
        got = str(images.dtype).removeprefix("torch.")
        raise UsageError(
            f"images given to {where} must be uint8 as they are stored, got {got}: they would be divided by 255 twice. "
            "Give batch.x, or rows of the memory's column x, not inputs."
        )
