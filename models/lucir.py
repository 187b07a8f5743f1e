"""LUCIR, learning a unified classifier incrementally via rebalancing (Hou et al., CVPR 2019).

    z = sigma * cos(features, weights)    one weight matrix per task; sigma is learned
    L = CE(z, y) + lam * mean of (1 - cos(features, old features))
      + lamda_mr * mean over rows of old classes, and over k, of max(0, mr_margin - cos_y + cos_k)

over the k_mr new classes k with the largest cosines (at most as many as there are); lam = lamda_base * sqrt(old classes
/ new classes), which for equal tasks is the root of the number of past tasks. A task's weights begin as the mean
L2-normalised features of its classes, of augmented images in eval mode, scaled to the mean norm of the old weights,
which are frozen; its optimizer is a new one. When a task ends, exemplars are chosen by herding, and the task's weights
and sigma alone are trained on them: fitting_epochs passes of SGD with the whole loss (the features' term does not
depend on them), momentum 0.9, the rate lr_finetune divided by 10 after 10 steps, and batch statistics, which leave
BatchNorm's running averages as they are.

But for two points, this is as in X-DER's code, which made the published figures. That code differs from the paper: the
margin is a mean over k, where the paper has a sum; the softmax is over all heads, those of classes that have not come
too, whose weights are still as they were drawn; features are not normalised for herding; the weights of old classes are
not trained on the exemplars.

The two points: that code seeks the margin's k in the outputs of all heads but the old ones, those of classes to come
too; here they are new classes that have been seen, as in the paper. It takes momentum and weight decay of the fit after
a task from the command line, 0.9 and 0 in the published runs; here they are always 0.9 and 0.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize, relu

from flatcl.models._incremental import WithExemplars, classifier_of
from flatcl.models._method import Batch, Block, Loss, published
from flatcl.models._passes import shuffled
from flatcl.models.sgd import XDER
from flatcl.utils.arguments import flag
from flatcl.utils.optim._base import SGD
from flatcl.utils.optim._driver import frozen_statistics
from flatcl.utils.registry import METHODS

FULL_RATE_STEPS = 10  # of the fit after a task, before its rate is divided by 10


class CosineNet(nn.Module):
    """A backbone with cosines in place of its classifier."""

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

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K)."""
        return self.sigma * self.cosines(self.features(x))


@METHODS.register("lucir")
class Lucir(WithExemplars):
    needs_features = True
    new_optimizer = True
    rows_are_independent = False  # margins are a mean over the rows of old classes

    @dataclass(frozen=True)
    class Args(WithExemplars.Args):
        lamda_base: float = flag(5.0, "weight of the distance to the old features, in the second task", low=0)
        lamda_mr: float = flag(1.0, "weight of the margin between old and new classes", low=0)
        k_mr: int = flag(
            2, "number of new classes that each row of an old class is separated from, by the margin", low=1
        )
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
            mean = normalize(self.outputs_of(self.net.features, images, self.context.augment)).mean(0)
            self.net.weights[task.index][row] = norm * normalize(mean, dim=0)

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        if self.teacher is None:
            return (batch.block,)
        self.count(forward=len(batch.y))
        with torch.no_grad():
            old = normalize(self.teacher.net.features(batch.inputs))
        return (Block(batch.inputs, y=batch.y, ids=batch.ids, old=old),)

    phase = WithExemplars.phase

    def loss(self, stream: Block) -> Loss:
        features = normalize(self.net.features(stream.x).float())
        rows, logits = self._costs_of(features, stream.y)
        if "old" in stream.columns:
            lam = self.args.lamda_base * (self.past / (self.seen - self.past)) ** 0.5
            rows["features"] = lam * (1 - (features * stream.old).sum(1))
        return Loss(rows, logits)

    def _costs_of(self, features: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Features (n, num_features) of unit length -> the terms (n,) that depend on the classifier, logits (n, K)."""
        cosines = self.net.cosines(features)
        logits = self.net.sigma * cosines
        rows = {"current": cross_entropy(logits, y, reduction="none")}
        if self.teacher is not None:
            rows["margin"] = self.args.lamda_mr * self._margins(cosines.float(), y)
        return rows, logits

    def _margins(self, cosines: Tensor, y: Tensor) -> Tensor:
        """(n, K), (n,) -> (n,): the mean over all is the mean over the rows of old classes. Heads of classes to come
        are no candidates."""
        new = cosines[:, self.past : self.seen]
        hardest = new.topk(min(self.args.k_mr, new.shape[1]), 1).values
        costs = relu(self.args.mr_margin - cosines.gather(1, y[:, None]) + hardest).mean(1)
        is_old = y < self.past
        return costs * is_old * (len(y) / is_old.sum().clamp(min=1))

    def end_task(self, task: Any) -> None:
        self.herd_exemplars(task)
        with frozen_statistics(self.net):
            self._fit_classifier(task)
        self.keep_teacher()

    def _fit_classifier(self, task: Any) -> None:
        exemplars, config = self.buffer.all(), self.context.config
        split = replace(task.train, images=exemplars["x"], labels=exemplars["y"], ids=exemplars["ids"])
        params = [self.net.sigma, *(weights for weights in self.net.weights if weights.requires_grad)]
        optimizer, steps = SGD(params, self.args.lr_finetune, momentum=0.9), 0
        for _ in range(self.args.fitting_epochs):
            for images, labels, _ in shuffled(self, split, config.batch_size):
                optimizer.lr = self.args.lr_finetune / (1 if steps < FULL_RATE_STEPS else 10)
                self.count(forward=len(labels))
                with torch.no_grad():
                    features = normalize(self.net.features(self.context.augment(images)))
                rows, _ = self._costs_of(features, labels)
                cost = sum(costs.mean() for costs in rows.values())
                optimizer.step(torch.autograd.grad(cost, params), [True] * len(params))
                steps += 1

    def set_extra_state(self, state: dict) -> None:
        super().set_extra_state(state)
        self.net.learn(range(self.past, self.seen))
