"""GDumb (Prabhu et al., ECCV 2020): fill a memory, then train only on it.

While the stream passes, images are only collected; there are no steps. After one pass over the last task the network,
which is still as it was drawn, is trained on the memory for `fitting_epochs`. What is measured before is chance.

    rate: .1 maxlr for one epoch, then cosines from maxlr towards minlr, over 1, 2, 4, ... epochs; the first of them,
          which has one epoch only, is an epoch at maxlr
    CutMix (Yun et al., 2019), for a share cutmix_prob of the batches: a box of the batch in another order, and its part
          of the loss

Sampler: the paper's (Algorithm 1) keeps the classes balanced; the code behind the published figures (the X-DER paper)
has a reservoir, which is the default here. That code mixes every batch, since it does not read its probability of 0.5;
the rows of seq-cifar100 have cutmix_prob 1. Deviates: the peak is --lr unless --maxlr says otherwise, so that
optimizers with a rate of their own have it here too (published rows: their maxlr as --lr). A debug run fits for one
epoch.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flatcl.datasets._benchmark import Split
from flatcl.models._method import Batch, Block, Context, Loss, Method, published
from flatcl.models.sgd import XDER
from flatcl.utils.arguments import flag
from flatcl.utils.engine.buffer import Buffer
from flatcl.utils.registry import METHODS


@METHODS.register("gdumb")
class GDumb(Method):
    revisits = True
    fixed_policy = "greedy, or a reservoir: --gdumb_sampler"
    learns_at_the_end = True

    @dataclass(frozen=True)
    class Args:
        buffer_size: int = flag(500, "images that the memory can hold", low=1, high=10**9, fixed=True)
        gdumb_sampler: str = flag("reservoir", "how the memory is filled", choices=("reservoir", "greedy"))
        fitting_epochs: int = flag(256, "epochs over the memory, after the last task", low=1, high=10**6)
        maxlr: float | None = flag(None, "highest rate of the fit; default: --lr", above=0, high=1e6)
        minlr: float = flag(5e-4, "lowest rate of the fit, before each restart", low=0, high=1e6)
        cutmix_alpha: float | None = flag(None, "CutMix shares are of Beta(alpha, alpha); default: no CutMix", above=0)
        cutmix_prob: float = flag(0.5, "probability that a batch of the fit is mixed by CutMix", low=0, high=1)

    published = published(
        XDER,
        {
            ("seq-cifar100", size): dict(
                lr=0.05, minlr=0.0005, cutmix_alpha=1.0, cutmix_prob=1.0, fitting_epochs=250, batch_size=32, **base
            )
            for size, base in ((500, dict(optim_mom=0.9, optim_wd=1e-6)), (2000, dict(optim_wd=1e-6)))
        },
    ) | published(
        "Mammoth's configuration of gdumb",
        {("seq-cifar10", 500): dict(lr=0.05, minlr=0.0005, cutmix_alpha=1.0, fitting_epochs=256, batch_size=32)},
    )

    def __init__(self, net, args, context: Context):
        super().__init__(net, args, context)
        self.buffer = Buffer(args.buffer_size, context.device, context.rng)
        self.is_fitting = False

    @classmethod
    def check(cls, config: Any, benchmark: type) -> list[str]:
        problems = super().check(config, benchmark)
        if config.budget_rows is not None:
            problems.append(
                "--budget_rows has no effect on gdumb, which learns after the last task. Use --fitting_epochs."
            )
        if config.n_epochs != 1 and config.origins["n_epochs"] == "argv":
            problems.append(
                f"--n_epochs has no effect on gdumb, which passes once over each task, got {config.n_epochs}. "
                "Use --fitting_epochs."
            )
        if config.lr_scheduler != "none" and config.origins["lr_scheduler"] == "argv":
            problems.append(
                f"--lr_scheduler has no effect on gdumb, whose fit has its own, got {config.lr_scheduler}. "
                "Use --maxlr and --minlr."
            )
        if config.cutmix_alpha is None and config.origins["cutmix_prob"] == "argv":
            problems.append("--cutmix_prob has no effect without CutMix. Give --cutmix_alpha too, e.g. 1, or drop it.")
        for name, value in (("warmup_epochs", config.warmup_epochs), ("early_stop", config.early_stop)):
            if value:
                problems.append(f"--{name} has no effect on gdumb, which learns after the last task. Drop it.")
        peak = config.maxlr or config.lr
        if config.minlr > peak:
            name = "lr" if config.maxlr is None else "maxlr"
            problems.append(f"--minlr must be at most --{name} {peak:g}, got {config.minlr:g}. Give less.")
        return problems

    # the engine's hooks: one pass over each task, and epochs over the memory after the last one

    def num_epochs(self, task: Any, n_epochs: int) -> int:
        config = self.context.config
        last = 0 if config.joint else (config.stop_after or config.n_tasks) - 1
        return 1 if task.index < last else 2 if config.debug_mode else 1 + self.args.fitting_epochs

    def begin_task(self, task: Any) -> None:
        self.is_fitting = False

    def begin_epoch(self, task: Any, epoch: int) -> None:
        self.is_fitting = epoch > 0

    def train_split(self, task: Any, epoch: int) -> Split:
        if epoch == 0:
            return task.train
        rows = self.buffer.all()
        return Split(rows["x"], rows["y"], rows["ids"])

    def learning_rate(self, task: Any, epoch: int, lr: float) -> float:
        top, low = self.args.maxlr or self.context.config.lr, self.args.minlr
        if epoch < 2:
            return 0.1 * top
        period = 1 << ((epoch - 1).bit_length() - 1)  # 1, 2, 4, ..., beginning in epochs 2, 3, 5, ...
        return low + (top - low) * (1 + cos(pi * (epoch - 1 - period) / period)) / 2

    # the rooms

    def steps(self, batch: Batch) -> Iterator[tuple[Block, ...]]:
        if self.is_fitting:
            yield self.draw(batch)

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        alpha, rng = self.args.cutmix_alpha, self.context.rng
        if alpha is None or rng.random() < 1 - self.args.cutmix_prob:
            return (batch.block,)
        height, width = batch.inputs.shape[2:]
        side = (1 - rng.beta(alpha, alpha)) ** 0.5  # of the box, a fraction of the image's
        rows, columns = (_interval(rng, size, side) for size in (height, width))
        order = torch.randperm(len(batch.y), device=batch.y.device)
        mixed = batch.inputs.clone()
        mixed[:, :, rows, columns] = batch.inputs[order][:, :, rows, columns]
        box = len(range(height)[rows]) * len(range(width)[columns]) / (height * width)
        share = torch.full_like(mixed[:, 0, 0, 0], box)
        return (Block(mixed, y=batch.y, other=batch.y[order], share=share),)  # without ids: these are no single images

    phase = Method.phase

    def loss(self, stream: Block) -> Loss:
        logits = self.net(stream.x)
        rows = cross_entropy(logits, stream.y, reduction="none")
        if "share" in stream.columns:
            rows = (1 - stream.share) * rows + stream.share * cross_entropy(logits, stream.other, reduction="none")
        return Loss({"memory": rows}, logits)

    def remember(self, batch: Batch, loss: Loss | None) -> None:
        if self.is_fitting:
            return
        rows = {"x": batch.x, "y": batch.y, "ids": batch.ids}
        if self.args.gdumb_sampler == "reservoir":
            self.buffer.add(**rows)
        else:
            self._add_greedily(rows)

    def _add_greedily(self, rows: dict[str, Tensor]) -> None:
        """A row is taken while its class has less than its share; in a full memory, in place of any one of the largest
        class. Waits for the labels: nothing is computed while the memory is filled."""
        kept = self.buffer.all()["y"].tolist() if len(self.buffer) else []
        counts, capacity = Counter(kept), self.buffer.capacity
        taken: dict[int, int] = {}  # slot -> the row that it gets
        for row, label in enumerate(rows["y"].tolist()):
            counts[label] += 0  # from now on it is one of the classes
            if counts[label] >= capacity / len(counts):
                continue
            slot = len(kept)
            if slot == capacity:
                largest = max(sorted(counts), key=counts.get)
                slot = self.context.rng.choice([i for i, other in enumerate(kept) if other == largest]).item()
                counts[largest] -= 1
                kept.pop(slot)
            kept.insert(slot, label)
            counts[label] += 1
            taken[slot] = row
        if taken:
            index = torch.tensor(list(taken.values()), device=rows["y"].device)
            self.buffer.write(list(taken), **{name: column[index] for name, column in rows.items()})

    # its state

    def remembered_ids(self) -> Tensor | None:
        return self.buffer.all().get("ids")

    def get_extra_state(self) -> dict:
        return {**self.buffer.state_dict(), "is_fitting": self.is_fitting}

    def set_extra_state(self, state: dict) -> None:
        self.buffer.load_state_dict(state)
        self.is_fitting = state["is_fitting"]


def _interval(rng: Any, size: int, fraction: float) -> slice:
    """A piece of 0..size of this fraction, centred anywhere and cut off at the ends."""
    half, centre = int(size * fraction) // 2, int(rng.integers(size))
    return slice(max(0, centre - half), min(size, centre + half))
