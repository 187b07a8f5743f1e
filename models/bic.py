"""BiC, bias correction (Wu et al., CVPR 2019): distillation, and then a correction of the new classes' logits.

    L = (1 - lam) * CE(f(x)[:seen], y) + lam * temp^2 * mean of -sum q_old log q
    q = softmax(logits of past classes / temp), the old ones bias-corrected

From the second task on, `valset_split` of the exemplars, drawn at random, and as many of the task's images are held out
of its training rows. When the task ends, the network is fixed and the new classes' logits become scale * z + shift, the
two numbers fitted on the rows held out by Adam: `bic_epochs` passes, learning rate 1e-3, cross entropy over the classes
seen. Past classes are as they were: the correction of a task ends with the next one, but for the teacher.

With t tasks learned before, lam is 1 / (t + 1) in X-DER's code, which made the published figures, and the share of old
classes in the paper. The memory has buffer_size // (t + 1) images of each task, drawn at random from the task's own
images, without those held out. Exemplars that were held out stay in the memory; the next task draws anew which are held
out. Held out rows pass the network once, un-augmented.

X-DER's code differs in three points. A task's share of the memory is drawn from its images mixed with the exemplars,
without what is held out: old exemplars among them count as images of the new task. Held out rows are augmented anew in
each pass of the fit. Each exemplar is held out with probability `valset_split`, so that their number varies.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flatcl.models._incremental import WithExemplars
from flatcl.models._method import Batch, Block, Loss, published
from flatcl.models.sgd import XDER
from flatcl.utils.arguments import flag
from flatcl.utils.optim._base import Adam
from flatcl.utils.registry import METHODS


@METHODS.register("bic")
class BiC(WithExemplars):
    fixed_policy = "as many exemplars of each task, drawn at random"

    @dataclass(frozen=True)
    class Args(WithExemplars.Args):
        temp: float = flag(2.0, "temperature of both outputs", above=0)
        distill_weight: str = flag(
            "one_task",
            "weight of the distillation: one task's share of those seen, or the share of the old classes",
            choices=("one_task", "old_classes"),
        )
        valset_split: float = flag(
            0.1, "share of the exemplars that is held out to fit the correction", above=0, below=1
        )
        bic_epochs: int = flag(250, "passes over the held-out rows", low=0, high=10**6)

    published = published(XDER, {("seq-cifar100", 500, 2000): dict(lr=0.03, batch_size=32, n_epochs=50)})

    def __init__(self, net, args, context):
        super().__init__(net, args, context)
        num_classes = context.benchmark.num_classes
        for owner in ("", "old_"):  # the corrections of the network and of the teacher
            self.register_buffer(f"{owner}scale", torch.ones(num_classes))
            self.register_buffer(f"{owner}shift", torch.zeros(num_classes))
        self.held = torch.empty(0, dtype=torch.int64, device=context.device)  # ids
        self.tasks_seen = self._count_tasks()

    def begin_task(self, task: Any) -> None:
        super().begin_task(task)
        self.tasks_seen = self._count_tasks()
        self.old_scale.copy_(self.scale), self.old_shift.copy_(self.shift)
        self.scale.fill_(1.0), self.shift.zero_()
        if not self.is_first(task):
            number = max(1, int(self.args.valset_split * len(self.buffer)))
            held = (self._some(self.buffer.all()["ids"], number), self._some(task.train.ids, number))
            self.held = torch.cat([ids.to(self.context.device) for ids in held])

    def _count_tasks(self) -> int:
        """Those whose classes have been seen, the present one included."""
        benchmark = self.context.benchmark
        return sum(benchmark.classes_of(index).start < self.seen for index in range(len(benchmark)))

    def _some(self, column: Tensor, number: int) -> Tensor:
        """So many of its entries, drawn at random."""
        rows = self.context.rng.permutation(len(column))[:number]
        return column[torch.from_numpy(rows).to(column.device)]

    def with_exemplars(self, split: Any) -> Any:
        return self._parted(split, held=False)

    def _parted(self, split: Any, held: bool) -> Any:
        """The rows of a split and the exemplars that are held out, or all others."""
        rows = super().with_exemplars(split)
        if len(self.held) == 0:
            return rows
        picked = (torch.isin(rows.ids, self.held.to(rows.ids.device)) == held).nonzero().squeeze(1)
        return type(rows)(rows.images[picked], rows.labels[picked], rows.ids[picked])

    @property
    def lam(self) -> float:
        """One of the tasks seen, or the share of the old classes."""
        if self.args.distill_weight == "one_task":
            return 1 / self.tasks_seen
        return 1 - (self.seen - self.past) / self.seen

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        if self.teacher is None:
            return (batch.block,)
        old = self.taught(batch.inputs) * self.old_scale + self.old_shift
        soft = (old[:, : self.past] / self.args.temp).softmax(1)
        return (Block(batch.inputs, y=batch.y, ids=batch.ids, old=soft),)

    phase = WithExemplars.phase

    def loss(self, stream: Block) -> Loss:
        logits = self.net(stream.x)
        costs = cross_entropy(logits[:, : self.seen], stream.y, reduction="none")
        if "old" not in stream.columns:
            return Loss({"current": costs}, logits)
        new = (logits[:, : self.past].float() / self.args.temp).log_softmax(1)
        distance = self.args.temp**2 * -(stream.old * new).sum(1)
        return Loss({"current": (1 - self.lam) * costs, "past": self.lam * distance}, logits)

    def end_task(self, task: Any) -> None:
        if len(self.held):
            self._fit_correction(self._parted(task.train, held=True))
        self.keep_teacher()
        self._keep_exemplars(task)
        self.held = self.held[:0]

    def _fit_correction(self, held: Any) -> None:
        device = self.context.device
        logits = self.outputs_of(self.net, held.images)[:, : self.seen]
        labels = held.labels.to(device)
        factors = [nn.Parameter(torch.ones((), device=device)), nn.Parameter(torch.zeros((), device=device))]
        optimizer = Adam(factors, lr=1e-3, weight_decay=0.0, beta1=0.9, beta2=0.999)
        for _ in range(self.args.bic_epochs):
            order = torch.from_numpy(self.context.rng.permutation(len(labels))).to(device)
            for rows in order.split(self.context.config.batch_size):
                old, new = logits[rows].split((self.past, self.seen - self.past), 1)
                cost = cross_entropy(torch.cat((old, factors[0] * new + factors[1]), 1), labels[rows])
                optimizer.step(torch.autograd.grad(cost, factors), [True, True])
        for target, factor in zip((self.scale, self.shift), factors, strict=True):
            target[self.past : self.seen] = factor.detach()

    def _keep_exemplars(self, task: Any) -> None:
        """As many of each task: an old one keeps its first, which are in random order."""
        number = self.buffer.capacity // (task.index - self.context.config.start_from + 1)
        new, old = task.train, self.buffer.all()
        trained = (~torch.isin(new.ids, self.held.to(new.ids.device))).nonzero().squeeze(1)
        rows = self._some(trained, number)
        parts = [dict(x=new.images[rows], y=new.labels[rows], ids=new.ids[rows], task=rows * 0 + task.index)]
        for index in range(self.context.config.start_from, task.index):
            kept = (old["task"] == index).nonzero().squeeze(1)[:number]
            parts.insert(-1, {name: column[kept] for name, column in old.items()})
        self.buffer.replace(
            **{name: torch.cat([part[name].to(self.context.device) for part in parts]) for name in parts[0]}
        )
        self._rows = None

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        return self.net(x) * self.scale + self.shift

    def get_extra_state(self) -> dict:
        return {**super().get_extra_state(), "held": self.held}

    def set_extra_state(self, state: dict) -> None:
        super().set_extra_state(state)
        self.tasks_seen = self._count_tasks()
        self.held = state["held"].to(self.context.device).clone()
