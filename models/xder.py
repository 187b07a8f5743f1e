"""X-DER, eXtended Dark Experience Replay (Boschini et al., TPAMI 2022), as in the code published with the paper.

P classes are past, those up to S are seen, the K - S after them have heads that prepare for the future. With f the
logits, D1 and D2 two draws from the memory (z: their stored logits) and views of a third one and of the stream:

    CE(f(x)[P:S], y) + alpha * mean (f(D1) - z)^2 + beta * CE(f(D2)[:P], y)
    + lambd * SupCon(views), a mean over the future heads and over images, of an image over its views, on each head's
      normalised logits                                                                           (not in the last task)
    + eta * mean over violators of max f[future] + m - max f[own task's head], on x, D1 and D2       (future)
    + eta * mean over violators of max p[past] (constant) + m - max p[current], p = softmax of f(x)[:S]      (past)

Memory: new logits enter a stored row by the rule U (`transplanted`), which keeps them below the true class's. In each
step, those of the heads from P on, in the rows drawn, with probability 1 / (times drawn in this task). At the end of a
task the memory makes room for the new classes, and all older rows' heads from P on are renewed.

Deviates: where rows of D1 and D2 coincide, the second ones are masked, not removed; U does not scale where the true
class's logit is negative, where the published quotient has no sense and no bound; a pass over the memory has batches of
even size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot, pad

from flatcl.models._method import Batch, Block, Context, Loss, published
from flatcl.models._passes import shuffled
from flatcl.models._replay import MemoryArgs, ReplayMethod
from flatcl.models._views import strong_views, supcon
from flatcl.models.der import logit_distance
from flatcl.models.sgd import XDER
from flatcl.utils.arguments import flag
from flatcl.utils.optim._driver import frozen_statistics
from flatcl.utils.registry import METHODS


def transplanted(old: Tensor, new: Tensor, y: Tensor, heads: slice, gamma: float) -> Tensor:
    """The rule U: `old` (n, K) with the logits of `heads` from `new`; where their maximum is above the true class's old
    logit, they are scaled so that it is gamma times that."""
    part, truth = new[:, heads], old.gather(1, y[:, None])
    peak = part.amax(1, keepdim=True)
    scale = torch.where((peak > truth) & (truth > 0), gamma * truth / peak, 1.0)
    result = old.clone()
    result[:, heads] = part * scale
    return result


def places(y: Tensor) -> Tensor:
    """(n,) -> (n,): how many rows of the same class come before each."""
    before = one_hot(y).cumsum(0) - 1
    return before.gather(1, y[:, None])[:, 0]


@METHODS.register("xder")
class XDer(ReplayMethod):
    settings = ("class-il",)
    fixed_policy = "as many images of each class, chosen when a task ends"
    loss_needs_task = True
    own_memory = True
    rows_are_independent = False  # constraints are means over violators, views are compared with each other
    published = published(
        XDER,
        {
            ("seq-cifar100", size): dict(
                lr=0.03, batch_size=32, minibatch_size=32, n_epochs=50, gamma=0.85, lambd=0.05, simclr_temp=5.0,
                simclr_batch_size=64, simclr_num_aug=2, **own,
            )
            for size, own in (
                (500, dict(m=0.7, alpha=0.3, beta=0.8, eta=0.001)), (2000, dict(m=0.2, alpha=0.6, beta=0.9, eta=0.01))
            )
        },
    )  # fmt: skip

    @dataclass(frozen=True)
    class Args(MemoryArgs):
        alpha: float = flag(0.3, "weight of the replayed logits", low=0)
        beta: float = flag(0.8, "weight of the replayed labels", low=0)
        gamma: float = flag(0.85, "stored logits are limited to gamma times the logit of the true class", low=0)
        lambd: float = flag(0.05, "weight of the views' consistency on the future heads", low=0)
        eta: float = flag(0.001, "weight of the past and future constraints", low=0)
        m: float = flag(0.7, "margin of the constraints", low=0)
        simclr_temp: float = flag(5.0, "temperature of the views' consistency", above=0)
        simclr_batch_size: int = flag(
            64, "images of the memory that are augmented as views in each step", low=1, high=10**6
        )
        simclr_num_aug: int = flag(2, "strongly augmented views of each image", low=1, high=1000)

    @classmethod
    def check(cls, config: Any, benchmark: type) -> list[str]:
        problems = super().check(config, benchmark)
        if config.buffer_size < benchmark.num_classes:
            problems.append(
                f"--buffer_size must have room for one image of each of the {benchmark.num_classes} classes of "
                f"{benchmark.name}, got {config.buffer_size}. Give more."
            )
        return problems

    def __init__(self, net, args, context: Context):
        super().__init__(net, args, context)
        self.heads = [context.benchmark.classes_of(index) for index in range(len(context.benchmark))]
        sizes = torch.tensor([len(head) for head in self.heads])
        self.head_of = torch.arange(len(sizes)).repeat_interleave(sizes).to(context.device)  # (K,): of each class
        self.classes = self.heads[0]  # of the present task

    def begin_task(self, task: Any) -> None:
        self.classes = task.classes

    # the rooms

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        replayed = self.replay(draws=2)  # D1 and D2
        again = torch.zeros(0, dtype=torch.int64, device=batch.y.device)
        for block in replayed:
            fresh = (block.slot[:, None] != again).all(1)  # `isin` would wait for the device
            due = torch.rand(len(block), device=fresh.device) * (block.drawn + 1) < 1
            block.columns.update(fresh=fresh, due=due & fresh)
            again = block.slot
        views = (self._views(batch),) if self.classes.stop < self.context.benchmark.num_classes else ()
        return (batch.block, *replayed, *views)

    def _views(self, batch: Batch) -> Block:
        """Strong views of the stream's images and of the memory's, those of one image side by side. They have no `ids`:
        what the network gives for them is not what an optimizer may record as an image's output."""
        memory = self.buffer.draw(self.args.simclr_batch_size) if len(self.buffer) else {}
        x, y = (
            torch.cat((getattr(batch, name), memory[name])) if memory else getattr(batch, name) for name in ("x", "y")
        )
        number, augment = self.args.simclr_num_aug, self.context.augment
        x, y = (column.repeat_interleave(number, 0) for column in (x, y))
        views = strong_views(x.float() / 255)
        if augment.mean is not None:
            views = (views - augment.mean) / augment.std
        return Block(views, memory=len(y) - number * len(batch.y), y=y)

    phase = ReplayMethod.phase

    def loss(self, stream: Block, *others: Block) -> Loss:
        replayed, views = (others[:2], others[2:]) if len(others) > 1 else ((), others)
        args, past, seen = self.args, self.classes.start, self.classes.stop
        blocks = [stream, *replayed]
        f = [self.net(block.x) for block in blocks]
        rows = {"current": (stream, cross_entropy(f[0][:, past:seen], stream.y - past, reduction="none"))}
        if replayed:
            for_logits, for_labels = replayed
            rows["logits"] = (for_logits, args.alpha * logit_distance(f[1], for_logits.logits))
            costs = cross_entropy(f[2][:, :past], for_labels.y, reduction="none")
            rows["labels"] = (for_labels, args.beta * costs)
        if past:
            p = f[0][:, :seen].softmax(1)
            (costs,) = _violation([p[:, :past].amax(1).detach() + args.m - p[:, past:].amax(1)])
            rows["past"] = (stream, args.eta * costs)
        if views:
            gaps = [self._gap(logits, block) for logits, block in zip(f, blocks, strict=True)]
            names = ("future", "future_logits", "future_labels")
            for name, block, costs in zip(names, blocks, _violation(gaps), strict=False):
                rows[name] = (block, args.eta * costs)
            rows["views"] = (views[0], args.lambd * self._consistency(views[0]))
        outputs = {"logits": (replayed[0], f[1]), "labels": (replayed[1], f[2])} if replayed else {}
        return Loss(rows, f[0], outputs=outputs)

    def _gap(self, logits: Tensor, block: Block) -> Tensor:
        """(n,): max f[future] + m - max f[own head]; -1 for a row that is there twice."""
        is_other = self.head_of != self.head_of[block.y][:, None]
        own = logits.masked_fill(is_other, -torch.inf).amax(1)
        gap = logits[:, self.classes.stop :].amax(1) + self.args.m - own
        return torch.where(block.fresh, gap, -1.0) if block.memory else gap

    def _consistency(self, views: Block) -> Tensor:
        """(n,): of each view, averaged over the future heads; their mean is that over images of the views' means."""
        with frozen_statistics(self.net):
            logits = self.net(views.x).float()
        future = [logits[:, head.start : head.stop] for head in self.heads if head.start >= self.classes.stop]
        widest = max(part.shape[1] for part in future)
        heads = torch.stack([pad(part, (0, widest - part.shape[1])) for part in future])  # zeros change no product
        return supcon(normalize(heads, dim=2), views.y, self.args.simclr_temp).mean(0)

    def remember(self, batch: Batch, loss: Loss) -> None:
        columns, heads = self.buffer.columns, slice(self.classes.start, None)
        for block, output in loss.outputs.values():
            old = columns["logits"].index_select(0, block.slot)
            new = transplanted(old, output, block.y, heads, self.args.gamma)
            due = block.due & new.isfinite().all(1)
            columns["logits"].index_copy_(0, block.slot, torch.where(due[:, None], new, old))
            columns["drawn"].index_add_(0, block.slot, block.fresh.long())

    # the end of a task

    @torch.no_grad()
    def end_task(self, task: Any) -> None:
        with frozen_statistics(self.net):
            rows = self._cut_down(task)
            rows = [*rows, *self._collect(task, self.buffer.capacity - sum(len(part["y"]) for part in rows))]
            merged = {name: torch.cat([part[name] for part in rows]) for name in ("x", "y", "ids", "logits")}
            slot = torch.arange(len(merged["y"]), device=merged["y"].device)
            self.buffer.replace(**merged, slot=slot, drawn=torch.zeros_like(slot))
            if task.classes.start:
                self._renew()

    def _cut_down(self, task: Any) -> list[dict[str, Tensor]]:
        """The first rows of each past class, as many as leave the new classes their share."""
        if len(self.buffer) == 0:
            return []
        rows = self.buffer.all()
        kept = places(rows["y"]) < self.buffer.capacity // task.classes.stop
        return [{name: column[kept] for name, column in rows.items()}]

    def _collect(self, task: Any, room: int) -> list[dict[str, Tensor]]:
        """Rows of the new classes, evenly, from one pass; logits of the augmented images."""
        past, device, parts = task.classes.start, self.context.device, []
        each, rest = divmod(room, len(task.classes))
        extra = self.context.rng.permutation(len(task.classes)) < rest
        quota = torch.zeros(task.classes.stop, dtype=torch.int64, device=device)
        quota[past:] = each + torch.from_numpy(extra).to(device)
        for x, y, ids in shuffled(self, task.train, self.context.config.batch_size):
            logits = self._outputs(x)
            if past:
                logits = transplanted(logits, logits, y, slice(0, past), self.args.gamma)
            taken = places(y) < quota[y]
            parts.append({"x": x[taken], "y": y[taken], "ids": ids[taken], "logits": logits[taken]})
            quota -= torch.bincount(y[taken], minlength=len(quota))
            if not quota.any():
                break
        return parts

    def _renew(self) -> None:
        """The heads from P on of all past rows, by one augmented pass over the memory in random order."""
        columns, past = self.buffer.all(), self.classes.start
        order = torch.from_numpy(self.context.rng.permutation(len(self.buffer))).to(self.context.device)
        for slots in order.tensor_split(-(-len(order) // self.context.config.batch_size)):
            x, y, old = (columns[name][slots] for name in ("x", "y", "logits"))
            new = transplanted(old, self._outputs(x), y, slice(past, None), self.args.gamma)
            columns["logits"][slots] = torch.where((y < past)[:, None], new, old)

    def _outputs(self, images: Tensor) -> Tensor:
        self.count(forward=len(images))
        return self.net(self.context.augment(images))

    # its state

    def get_extra_state(self) -> dict:
        return {**super().get_extra_state(), "classes": [self.classes.start, self.classes.stop]}

    def set_extra_state(self, state: dict) -> None:
        super().set_extra_state(state)
        self.classes = range(*state["classes"])


def _violation(gaps: list[Tensor]) -> list[Tensor]:
    """Of each block's gaps (n,), what is above 0 as rows of a term; the terms sum to the mean over all violators."""
    number = sum((gap > 0).sum() for gap in gaps).clamp(min=1)
    return [gap.clamp(min=0) * (len(gap) / number) for gap in gaps]
