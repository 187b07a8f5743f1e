"""LUCIR, learning a unified classifier incrementally via rebalancing (Hou et al., CVPR 2019).

    z = sigma * cos(features, weights)    one weight matrix per task; sigma is learned
    L = CE(z, y) + lam * mean of (1 - cos(features, old features))
      + lamda_mr * mean over rows of old classes of sum_k max(0, mr_margin - cos_y + cos_k)

over the k_mr new classes k with the largest cosines (at most as many as there are); lam = lamda_base * sqrt(old classes
/ new classes), which for equal tasks is the root of the number of past tasks, as in X-DER's code. A task's weights
begin as the mean L2-normalised features of its classes, un-augmented, scaled to the mean norm of the old weights, which
are frozen. When a task ends, exemplars are chosen by herding on normalised features, and the classifier alone (weights
of all classes seen, and sigma) is trained on them: fitting_epochs passes of SGD with cross entropy, momentum 0.9, the
rate lr_finetune divided by 10 after 10 passes, the network in eval mode.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize, relu

from models._incremental import WithExemplars, classifier_of
from models._method import Batch, Block, Loss, published
from models._passes import shuffled
from models.sgd import XDER
from utils.arguments import flag
from utils.optim._base import SGD
from utils.passes import eval_mode
from utils.registry import METHODS

NOT_YET = -1e4  # logit of a class that has not come; its probability is exactly 0


class CosineNet(nn.Module):
    """A backbone with cosines in place of its classifier. Classes that have not come cannot win and get no gradient."""

    def __init__(self, body: nn.Module, tasks: Iterable[range]):
        super().__init__()
        name, _ = classifier_of(body)
        body.set_submodule(name, nn.Identity())
        self.body, self.tasks, self.num_features = body, list(tasks), body.num_features
        bound = self.num_features**-0.5
        self.weights = nn.ParameterList(
            torch.empty(len(classes), self.num_features).uniform_(-bound, bound) for classes in self.tasks
        )
        self.sigma = nn.Parameter(torch.ones(()))
        self.register_buffer("come", torch.ones(self.tasks[-1].stop, dtype=torch.bool))

    def learn(self, classes: range) -> None:
        """The weights of these classes are trained, those of all others are not."""
        for own, weights in zip(self.tasks, self.weights, strict=True):
            weights.requires_grad_(own.start < classes.stop and classes.start < own.stop)

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, num_features)."""
        return self.body.features(x)

    def cosines(self, features: Tensor) -> Tensor:
        """(N, num_features) -> (N, K)."""
        return linear(normalize(features.float()), torch.cat([normalize(weights) for weights in self.weights]))

    def scaled(self, cosines: Tensor) -> Tensor:
        """Cosines (N, K) -> logits (N, K)."""
        return torch.where(self.come, self.sigma * cosines, NOT_YET)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K)."""
        return self.scaled(self.cosines(self.features(x)))


@METHODS.register("lucir")
class Lucir(WithExemplars):
    needs_features = True

    @dataclass(frozen=True)
    class Args(WithExemplars.Args):
        lamda_base: float = flag(5.0, "weight of the distance to the old features, in the second task", low=0)
        lamda_mr: float = flag(1.0, "weight of the margin between old and new classes", low=0)
        k_mr: int = flag(2, "new classes that each row of an old class is kept apart from", low=1)
        mr_margin: float = flag(0.5, "the margin, in cosines", low=0)
        fitting_epochs: int = flag(20, "passes over the exemplars after a task", low=0, high=10**6)
        lr_finetune: float = flag(0.01, "learning rate of these passes", above=0)

    published = published(
        XDER,
        {
            ("seq-cifar100", 500, 2000): dict(
                lr=0.03, batch_size=32, n_epochs=50, optim_mom=0.9, lamda_base=5.0, lamda_mr=1.0, k_mr=2,
                mr_margin=0.5, fitting_epochs=20, lr_finetune=0.01,
            )
        },
    )  # fmt: skip

    def __init__(self, net, args, context):
        benchmark = context.benchmark
        super().__init__(CosineNet(net, map(benchmark.classes_of, range(len(benchmark)))), args, context)

    def begin_task(self, task: Any) -> None:
        super().begin_task(task)
        self.net.come.copy_(torch.arange(len(self.net.come)) < self.seen)
        self.net.learn(task.classes)
        if not self.is_first(task):
            self._imprint(task)

    @torch.no_grad()
    def _imprint(self, task: Any) -> None:
        norm = torch.cat([*self.net.weights[: task.index]]).norm(dim=1).mean()
        for row, label in enumerate(task.classes):
            images = task.train.images[task.train.labels == label]
            if len(images) == 0:  # --validation holds out all of them: the weights stay as they were drawn
                continue
            mean = normalize(self.outputs_of(self.net.features, images)).mean(0)
            self.net.weights[task.index][row] = norm * normalize(mean, dim=0)

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        if self.teacher is None:
            return (batch.block,)
        self.count(forward=len(batch.y))
        with torch.no_grad():
            old = normalize(self.teacher.net.features(batch.inputs))
        return (Block(batch.inputs, y=batch.y, ids=batch.ids, old=old),)

    def loss(self, stream: Block) -> Loss:
        features = normalize(self.net.features(stream.x).float())
        cosines = self.net.cosines(features)
        logits = self.net.scaled(cosines)
        rows = {"current": cross_entropy(logits, stream.y, reduction="none")}
        if "old" in stream.columns:
            lam = self.args.lamda_base * (self.past / (self.seen - self.past)) ** 0.5
            rows["features"] = lam * (1 - (features * stream.old).sum(1))
            rows["margin"] = self.args.lamda_mr * self._margins(cosines.float(), stream.y)
        return Loss(rows, logits)

    def _margins(self, cosines: Tensor, y: Tensor) -> Tensor:
        """(n, K), (n,) -> (n,): the mean over all is the mean over the rows of old classes."""
        new = cosines[:, self.past : self.seen]
        hardest = new.topk(min(self.args.k_mr, new.shape[1]), 1).values
        costs = relu(self.args.mr_margin - cosines.gather(1, y[:, None]) + hardest).sum(1)
        is_old = y < self.past
        return costs * is_old * (len(y) / is_old.sum().clamp(min=1))

    def end_task(self, task: Any) -> None:
        self.keep_teacher()
        self.herd_exemplars(task, normalised=True)
        self.net.learn(range(self.seen))
        with eval_mode(self.net):
            self._fit_classifier(task)
        self.net.learn(task.classes)

    def _fit_classifier(self, task: Any) -> None:
        exemplars, config = self.buffer.all(), self.context.config
        split = replace(task.train, images=exemplars["x"], labels=exemplars["y"], ids=exemplars["ids"])
        params = [self.net.sigma, *(weights for weights in self.net.weights if weights.requires_grad)]
        optimizer = SGD(params, self.args.lr_finetune, momentum=0.9)
        for epoch in range(self.args.fitting_epochs):
            if epoch == 10:
                optimizer.lr /= 10
            for images, labels, _ in shuffled(self, split, config.batch_size):
                self.count(forward=len(labels))
                with torch.no_grad():
                    features = self.net.features(self.context.augment(images))
                cost = cross_entropy(self.net.scaled(self.net.cosines(features)), labels)
                optimizer.step(torch.autograd.grad(cost, params), [True] * len(params))

    def set_extra_state(self, state: dict) -> None:
        super().set_extra_state(state)
        self.net.learn(range(self.past, self.seen))
