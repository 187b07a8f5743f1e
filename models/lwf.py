"""LwF, learning without forgetting (Li & Hoiem, TPAMI 2018), as in the code behind the DER paper.

    L = CE(f(x)[:seen], y) + alpha * mean of -sum q_old log q_new + wd_reg * |theta|^2
    q = softmax(logits of past classes / softmax_temp)

Before each task but the first the classifier alone is warmed up on the new classes, for as many epochs as the task has,
by SGD with the run's learning rate, the network in eval mode. q_old is then recorded once for each image of the task,
from the image as it is stored (pixels in 0..1, not normalised, not augmented), and looked up by id; q_new is of the
augmented image. The code's smoothing, softmax^(1/T) normalised again, is the softmax of logits / T.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flatcl.models._incremental import Incremental, classifier_of, decay
from flatcl.models._method import Batch, Block, Loss, published
from flatcl.models._passes import shuffled
from flatcl.models.sgd import DER
from flatcl.utils.arguments import flag
from flatcl.utils.engine.passes import eval_mode
from flatcl.utils.engine.seeding import generator_state, set_generator_state
from flatcl.utils.optim._base import SGD
from flatcl.utils.optim._driver import trainable
from flatcl.utils.registry import METHODS


@METHODS.register("lwf")
class LwF(Incremental):
    needs_features = True

    @dataclass(frozen=True)
    class Args:
        alpha: float = flag(1.0, "weight of the distance to the recorded outputs", low=0)
        softmax_temp: float = flag(2.0, "temperature of both outputs", above=0)
        wd_reg: float = flag(0.0005, "weight of |theta|^2 in the loss", low=0)

    published = published(
        DER,
        {
            ("seq-mnist",): dict(lr=0.03, batch_size=10, n_epochs=1, alpha=1.0, softmax_temp=2.0, wd_reg=0.0005),
            ("seq-cifar10",): dict(lr=0.01, batch_size=32, n_epochs=50, alpha=3.0, softmax_temp=2.0, wd_reg=0.0005),
            ("seq-tinyimg",): dict(lr=0.01, batch_size=32, n_epochs=100, alpha=1.0, softmax_temp=2.0, wd_reg=0.0005),
        },
    )

    def __init__(self, net, args, context):
        super().__init__(net, args, context)
        self.ids = torch.empty(0, dtype=torch.int64, device=context.device)  # (M,) sorted: the task's rows
        self.logits = torch.empty(0, 0, device=context.device)  # (M, past): what f_old gave for them

    @classmethod
    def check(cls, config: Any, benchmark: type) -> list[str]:
        problems = super().check(config, benchmark)
        if config.budget_rows is not None:
            problems.append(
                "--budget_rows cannot be used with lwf, whose warm-up needs the number of epochs of a task. Use "
                "--n_epochs."
            )
        return problems

    def begin_task(self, task: Any) -> None:
        super().begin_task(task)
        if self.is_first(task):
            return
        with eval_mode(self.net):
            self._warm_up(task)
        rows = task.train.ids.argsort()
        raw = self.outputs_of(self.net, task.train.images, lambda images: images.to(self.context.device).float() / 255)
        self.ids = task.train.ids[rows].to(self.context.device)
        self.logits = raw[rows.to(self.context.device), : self.past]

    def _warm_up(self, task: Any) -> None:
        config = self.context.config
        _, classifier = classifier_of(self.net)
        weights = trainable(classifier)
        if not weights:  # a frozen classifier
            return
        optimizer = SGD(weights, config.lr)
        for _ in range(1 if config.debug_mode else config.n_epochs):
            for images, labels, _ in shuffled(self, task.train, config.batch_size):
                with torch.no_grad():
                    features = self.net.features(self.context.augment(images))
                self.count(forward=len(images))
                cost = cross_entropy(classifier(features)[:, self.past : self.seen], labels - self.past)
                optimizer.step(torch.autograd.grad(cost, weights), [True] * len(weights))

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        if len(self.ids) == 0:
            return (batch.block,)
        return (Block(batch.inputs, y=batch.y, ids=batch.ids, past=self.logits[self._rows(batch.ids)]),)

    def _rows(self, ids: Tensor) -> Tensor:
        return torch.searchsorted(self.ids, ids).clamp_(max=len(self.ids) - 1)

    phase = Incremental.phase

    def loss(self, stream: Block) -> Loss:
        logits = self.net(stream.x)
        rows = {"current": cross_entropy(logits[:, : self.seen], stream.y, reduction="none")}
        if "past" in stream.columns:
            temperature = self.args.softmax_temp
            old = (stream.past / temperature).softmax(1)
            new = (logits[:, : self.past].float() / temperature).log_softmax(1)
            rows["past"] = self.args.alpha * -(old * new).sum(1)
        return Loss(rows, logits, decay(self.net, self.args.wd_reg))

    def get_extra_state(self) -> dict:
        table = {"ids": self.ids, "logits": self.logits, "rng": generator_state(self.context.rng)}
        return {**super().get_extra_state(), **table}

    def set_extra_state(self, state: dict) -> None:
        super().set_extra_state(state)
        self.ids, self.logits = (state[name].to(self.context.device).clone() for name in ("ids", "logits"))
        set_generator_state(self.context.rng, state["rng"])
