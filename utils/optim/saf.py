"""SAF (Du et al., NeurIPS 2022): no ascent; the loss keeps outputs close to those of earlier visits.

    loss + saf_lambda * tau^2 * mean KL(softmax(z_past / tau) || softmax(z / tau))
    z_past: this row's logits, as they were saf_lag visits ago, in train mode, before the update

The factor tau^2 is the authors' code's, not the paper's. Its clock is the epoch; here it is the row's own visits, which
for a stream is the same: rows are known by their id over the whole benchmark, and rows in the memory, which are seen
more often, go on where the stream has left them. It begins once a row has had more than saf_start visits, as it does
there once the epoch, from 0, is more than that. In tasks of one epoch only replayed rows get so far. The mean is over
all rows of a step. A task keeps the records of its own rows and of those remembered; a row from before the head has
grown is compared on the classes that it knew.

Passes: 1 forward, 1 backward
Memory: saf_lag + 1 logits for each row of task and memory
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatcl.utils.arguments import flag
from flatcl.utils.optim._driver import Driver, Grads
from flatcl.utils.registry import OPTIMIZERS

UNKNOWN = -1e4  # logit of a class that there was not; its probability is exactly 0


@OPTIMIZERS.register("saf")
class SAF(Driver):
    @dataclass(frozen=True)
    class Args(Driver.Args):
        saf_lambda: float = flag(0.3, "weight of the distance to past outputs", low=0)
        saf_tau: float = flag(5.0, "temperature of both outputs", above=0)
        saf_start: int = flag(5, "used for rows that have been visited more often than this", low=0)
        saf_lag: int = flag(3, "the past outputs are those of this many visits ago", low=1, high=1000)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.ids = torch.empty(0, dtype=torch.int64, device=self.device)  # (M,) sorted
        # one row more than there are ids: what is written there belongs to rows that are not known
        self.visits = torch.zeros(1, dtype=torch.int64, device=self.device)  # (M + 1,)
        self.logits = torch.zeros(1, self.args.saf_lag + 1, 0, device=self.device)  # (M + 1, saf_lag + 1, K)

    @classmethod
    def check(cls, config, method) -> list[str]:
        visits = config.n_epochs
        is_known = config.budget_rows is None and not method.has_memory and not method.revisits
        if is_known and visits <= max(config.saf_start + 1, config.saf_lag):
            warnings.warn(
                f"saf has no effect in this run: rows are visited {visits} time(s), and it begins after "
                f"{max(config.saf_start + 1, config.saf_lag)} visits (--saf_start, --saf_lag).",
                stacklevel=2,
            )
        return []

    def phase(self) -> torch.Size:
        """The room in the records: they are new ones when there are more classes."""
        return self.logits.shape

    def direction(self, objective) -> Grads:
        known = [index for index, block in enumerate(objective.blocks) if "ids" in block.columns]
        slots = {index: self._slots(objective.blocks[index].ids) for index in known}
        shares, self._seen = objective.shares, (slots, {})

        def term(logits: list[Tensor]) -> list[Tensor]:
            self._seen = slots, {index: logits[index].detach() for index in known}
            return [
                self._rows(slots[index], z, shares[index]) if index in slots else torch.zeros_like(z[:, 0])
                for index, z in enumerate(logits)
            ]

        objective.add("saf", term)
        return objective.gradient()

    def settle(self, objective) -> None:
        """Records the clean pass. Of an image that was there twice, one visit and its last logits."""
        if not self._seen[1]:
            return
        slots, z = (torch.cat([*objective.of_all_rows(parts).values()]) for parts in self._seen)
        self._seen = {}, {}
        self._widen(z.shape[1], z.dtype)
        last = torch.zeros_like(self.visits).scatter_reduce_(
            0, slots, torch.arange(len(slots), device=slots.device), "amax", include_self=False
        )
        visits = self.visits[slots]
        self.logits[slots, visits % (self.args.saf_lag + 1)] = z.nan_to_num()[last[slots]]
        self.visits[slots] = visits + 1

    def begin_task(self, task) -> None:
        super().begin_task(task)
        ids = task.train.ids.to(self.device)
        remembered = self.method.remembered_ids()
        if remembered is not None:
            ids = torch.cat((ids, self.ids[torch.isin(self.ids, remembered.to(self.device))]))
        ids = ids.unique()
        slots = self._slots(ids)  # of the old table; what is new finds its last row
        fresh = slots == len(self.ids)
        self.logits = torch.cat((self.logits[slots], torch.zeros_like(self.logits[:1])))
        self.visits = torch.cat((self.visits[slots].masked_fill(fresh, 0), torch.zeros_like(self.visits[:1])))
        self.ids = ids

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ids": self.ids, "visits": self.visits.clone(), "logits": self.logits.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.ids, self.visits, self.logits = (state[k].to(self.device).clone() for k in ("ids", "visits", "logits"))

    def _slots(self, ids: Tensor) -> Tensor:
        """Where each id is in the table; the last row for those that are not."""
        if len(self.ids) == 0:
            return torch.zeros_like(ids)
        slots = torch.searchsorted(self.ids, ids).clamp_(max=len(self.ids) - 1)
        return torch.where(self.ids[slots] == ids, slots, len(self.ids))

    def _rows(self, slots: Tensor, z: Tensor, share: float) -> Tensor:
        lag, visits = self.args.saf_lag, self.visits[slots]
        if self.logits.shape[2] == 0:
            return torch.zeros_like(z[:, 0])
        active = (slots < len(self.ids)) & (visits > self.args.saf_start) & (visits >= lag)
        past = self.logits[slots, (visits - lag) % (lag + 1)]
        known = z[:, : past.shape[1]].masked_fill(past == UNKNOWN, UNKNOWN)
        return divergence(past, known, self.args.saf_tau) * (self.args.saf_lambda * share) * active

    def _widen(self, num_classes: int, dtype: torch.dtype) -> None:
        """Room for the logits of more classes."""
        shape = (*self.logits.shape[:2], num_classes)
        if self.logits.shape != shape:
            wider = torch.full(shape, UNKNOWN, dtype=dtype, device=self.logits.device)
            wider[..., : self.logits.shape[2]] = self.logits
            self.logits = wider


def divergence(past: Tensor, z: Tensor, tau: float) -> Tensor:
    """tau^2 * KL(softmax(past / tau) || softmax(z / tau)) of each row: logits (n, K), (n, K) -> (n,)."""
    log_p, log_q = (past / tau).log_softmax(1), (z / tau).log_softmax(1)
    return tau**2 * (log_p.exp() * (log_p - log_q)).sum(1)
