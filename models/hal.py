"""HAL, Hindsight Anchor Learning (Chaudhry et al., AAAI 2021), eq. 4 and 5, as the code behind the DER paper does it.

    theta~ = theta - lr * gradient of CE(f(x), y) over stream and memory
    step on CE + hal_lambda * mean (f_theta(e) - f_theta~(e))^2      e: the anchors, targets fixed
    phi <- beta * phi + (1 - beta) * mean features(x)                within a task

At a task's end each of its classes k gets an anchor e, by 100 steps of SGD from uniform noise on
-CE(f_M(e), k) + CE(f(e), k) + gamma * |features(e) - phi|^2, f_M one SGD step on a draw from the memory ahead. These
steps have the rate --lr, whatever a schedule has made of it; the look-ahead of a training step has that step's rate.

The memory is a reservoir, as the code of that time reads, or a ring for each task with its last buffer_size / number of
tasks images, as in its later versions. The DER paper's figures are nearer to those of rings, and on perm-mnist at 200
and 500 agree with no others (tests/records/published): its rows have `--hal_memory ring`.

The look-ahead's gradient is a pass of its own here, so that the step can be any optimizer's. Passes for look-ahead and
anchors leave BatchNorm's running averages alone; the pass for the mean features, after each step, moves them once more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flatcl.models._method import Batch, Block, Loss, published
from flatcl.models._passes import check_shares
from flatcl.models._replay import ReplayMethod
from flatcl.models.der import logit_distance
from flatcl.models.sgd import DER
from flatcl.utils.arguments import flag
from flatcl.utils.optim._driver import frozen_statistics
from flatcl.utils.registry import METHODS


@METHODS.register("hal")
class HAL(ReplayMethod):
    settings = ("class-il", "domain-il")
    needs_features = True

    @dataclass(frozen=True)
    class Args(ReplayMethod.Args):
        hal_lambda: float = flag(0.1, "weight of the anchors' term", low=0)
        beta: float = flag(0.5, "decay of the mean feature", low=0, below=1)
        gamma: float = flag(0.1, "weight of the mean feature in an anchor", low=0)
        steps_on_anchors: int = flag(100, "gradient steps on an anchor", low=1, high=10**6)
        hal_memory: str = flag(
            "reservoir",
            "the memory: one for all tasks, filled by --buffer_policy, or a ring for each",
            choices=("reservoir", "ring"),
            fixed=True,
        )

    published = published(
        DER,
        {
            (dataset, size): dict(
                lr=lr,
                batch_size=batch,
                minibatch_size=batch,
                n_epochs=epochs,
                hal_lambda=weight,
                beta=beta,
                gamma=gamma,
                hal_memory="ring",
            )
            for dataset, lr, batch, epochs, gamma, rows in (
                ("perm-mnist", 0.1, 128, 1, 0.1, {200: (0.1, 0.5), 500: (0.1, 0.3), 5120: (0.1, 0.5)}),
                ("rot-mnist", 0.1, 128, 1, 0.1, {200: (0.2, 0.5), 500: (0.1, 0.5), 5120: (0.1, 0.3)}),
                ("seq-mnist", 0.1, 128, 1, 0.5, {200: (0.1, 0.7), 500: (0.1, 0.2), 5120: (0.1, 0.7)}),
                ("seq-cifar10", 0.03, 32, 50, 0.1, {200: (0.2, 0.5), 500: (0.1, 0.3), 5120: (0.1, 0.3)}),
            )
            for size, (weight, beta) in rows.items()
        },
    )

    @classmethod
    def check(cls, config, benchmark) -> list[str]:
        problems = super().check(config, benchmark)
        if config.hal_memory == "ring":
            problems += check_shares(config)
            if config.buffer_policy != "reservoir":
                problems.append(
                    "--buffer_policy has no effect with --hal_memory ring, which has a ring for each task. Drop it, or "
                    "give --hal_memory reservoir."
                )
        return problems

    def __init__(self, net, args, context):
        super().__init__(net, args, context)
        self.first, self.seen = 0, 0  # where this task's ring begins, and how many images it has been shown
        self.register_buffer("phi", torch.zeros(net.num_features))
        self.anchors = torch.empty(0, *context.benchmark.shape, device=context.device)

    def begin_task(self, task) -> None:
        self.phi.zero_()
        self.first, self.seen = len(self.buffer), 0

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        joint = self.replay_jointly(batch)
        if len(self.anchors) == 0:
            return (joint,)
        return (joint, Block(self.anchors, len(self.anchors), targets=self._outputs_ahead(joint)))

    def _outputs_ahead(self, joint: Block) -> Tensor:
        """The anchors' logits (E, K) after one SGD step on this block."""
        self.count(forward=len(joint) + len(self.anchors), backward=len(joint))
        with frozen_statistics(self.net):
            ahead = self._ahead(joint.x, joint.y, self.lr)
            with torch.no_grad():
                return torch.func.functional_call(self.net, ahead, (self.anchors,))

    def _ahead(self, x: Tensor, y: Tensor, lr: float) -> dict[str, Tensor]:
        """The weights, by name, after one SGD step on these rows."""
        params = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        cost = cross_entropy(self.net(x), y)
        grads = torch.autograd.grad(cost, list(params.values()), allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            return dict(zip(params, torch._foreach_add(list(params.values()), grads, alpha=-lr), strict=True))

    phase = ReplayMethod.phase

    def loss(self, joint: Block, anchors: Block | None = None) -> Loss:
        rows = {"replay": (joint, cross_entropy(self.net(joint.x), joint.y, reduction="none"))}
        if anchors is not None:
            distance = logit_distance(self.net(anchors.x), anchors.targets)
            rows["anchors"] = (anchors, self.args.hal_lambda * distance)
        return Loss(rows)

    @torch.no_grad()
    def remember(self, batch: Batch, loss: Loss) -> None:
        if self.args.hal_memory == "ring":
            self._into_ring(self.columns(batch.x, batch.y, batch.ids, None))
        else:
            super().remember(batch, loss)
        self.phi.lerp_(self.net.features(batch.inputs).mean(0).float(), 1 - self.args.beta)
        self.count(forward=len(batch.y))

    def _into_ring(self, rows: dict[str, Tensor]) -> None:
        """The last images take the places of the oldest ones of this task."""
        share = self.buffer.capacity // len(self.context.benchmark)
        self.seen += len(rows["y"])
        kept = min(len(rows["y"]), share)
        slots = [self.first + count % share for count in range(self.seen - kept, self.seen)]
        self.buffer.write(slots, **{name: column[-kept:] for name, column in rows.items()})

    def end_task(self, task) -> None:
        super().end_task(task)
        config = self.context.config
        rows = self.buffer.draw(config.batch_size)
        with frozen_statistics(self.net):
            ahead = self._ahead(self.context.augment(rows["x"]), rows["y"], config.lr)
            anchors = self._anchors(torch.arange(task.classes.start, task.classes.stop), ahead)
        self.count(forward=len(rows["y"]), backward=len(rows["y"]))
        self.anchors = torch.cat((self.anchors, anchors))

    @torch.no_grad()  # the gradients are torch.func's; a graph of the weights would grow with each step
    def _anchors(self, classes: Tensor, ahead: dict[str, Tensor]) -> Tensor:
        """An anchor for each class (n,), each passing alone."""
        lr = self.context.config.lr

        def cost(e: Tensor, y: Tensor) -> Tensor:
            forgotten = cross_entropy(torch.func.functional_call(self.net, ahead, (e[None],)), y[None])
            distance = (self.net.features(e[None])[0] - self.phi).square().sum()
            return cross_entropy(self.net(e[None]), y[None]) - forgotten + self.args.gamma * distance

        gradient = torch.func.vmap(torch.func.grad(cost), randomness="different")
        e = torch.rand(len(classes), *self.anchors.shape[1:]).to(self.anchors)
        y = classes.to(e.device)
        for _ in range(self.args.steps_on_anchors):
            e = e - lr * gradient(e, y)
        rows = len(e) * self.args.steps_on_anchors
        self.count(forward=3 * rows, backward=3 * rows)
        return e

    def get_extra_state(self) -> dict:
        return {**super().get_extra_state(), "anchors": self.anchors, "ring": [self.first, self.seen]}

    def set_extra_state(self, state: dict) -> None:
        super().set_extra_state(state)
        self.anchors = state["anchors"].to(self.context.device)
        self.first, self.seen = state["ring"]
