"""iCaRL, incremental classifier and representation learning (Rebuffi et al., CVPR 2017).

The loss is that of `lwf_mc`, on the task's rows and the exemplars, mixed. When a task ends, buffer_size // (classes
seen) exemplars of each new class are chosen by herding and those of old classes cut to as many; an image then belongs
to the class whose exemplars have the nearest mean of features.

As in the code behind the DER paper's figures: features are not normalised (the paper's are), class means are of the
exemplars, un-augmented and not flipped. Other than there, exemplars go back among the training rows as they were: that
code distorted those of CIFAR and Tiny ImageNet (wrong pixel values, height and width swapped), for which its figures
are lower; on MNIST they do not depend on the size of the memory, as with `--replay_exemplars 0` here. There is no
replay minibatch, since exemplars are a part of the stream. On CIFAR-100, X-DER's code has no |theta|^2 in the loss, but
the weight decay of SGD. Its class means are averaged batch by batch, so that of a class with more than 32 exemplars the
last batch has half of the weight; here all exemplars weigh the same. In an evaluation inside a task (--eval_every) the
means are those of the last task's end, with the network as it was then.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatcl.models._incremental import WithExemplars
from flatcl.models._method import published
from flatcl.models.lwf_mc import LwfMc
from flatcl.models.sgd import DER, XDER
from flatcl.utils.arguments import flag
from flatcl.utils.registry import METHODS


@METHODS.register("icarl")
class ICaRL(WithExemplars, LwfMc):
    needs_features = True

    @dataclass(frozen=True)
    class Args(WithExemplars.Args):
        wd_reg: float = flag(0.00001, "weight of |theta|^2 in the loss", low=0)
        replay_exemplars: bool = flag(True, "exemplars join the training rows of later tasks")

    published = published(
        DER,
        {
            ("seq-mnist", 200, 500, 5120): dict(lr=0.1, batch_size=10, n_epochs=1, wd_reg=0.0),
            ("seq-cifar10", 200, 500): dict(lr=0.1, batch_size=32, n_epochs=50, wd_reg=0.00001),
            ("seq-cifar10", 5120): dict(lr=0.03, batch_size=32, n_epochs=50, wd_reg=0.00001),
            ("seq-tinyimg", 200, 500, 5120): dict(lr=0.03, batch_size=32, n_epochs=100, wd_reg=0.00001),
        },
    ) | published(
        XDER,
        {("seq-cifar100", 500, 2000): dict(lr=0.3, batch_size=32, n_epochs=50, optim_wd=0.00001, wd_reg=0.0)},
    )

    def __init__(self, net, args, context):
        super().__init__(net, args, context)
        num_classes = context.benchmark.num_classes
        self.register_buffer("means", torch.zeros(num_classes, net.num_features))
        self.register_buffer("has_mean", torch.zeros(num_classes, dtype=torch.bool))
        self.has_means = False  # of any class

    @classmethod
    def check(cls, config: Any, benchmark: type) -> list[str]:
        problems = super().check(config, benchmark)
        if config.early_stop is not None:
            problems.append(
                f"--early_stop cannot be used with {cls.name}: it predicts new classes only after their task. Drop it."
            )
        return problems

    def train_split(self, task: Any, epoch: int) -> Any:
        return super().train_split(task, epoch) if self.args.replay_exemplars else task.train

    def end_task(self, task: Any) -> None:
        super().end_task(task)  # the teacher
        self.herd_exemplars(task)
        exemplars = self.buffer.all()
        features = self.outputs_of(self.net.features, exemplars["x"])
        numbers = torch.bincount(exemplars["y"], minlength=len(self.means))
        sums = torch.zeros_like(self.means).index_add_(0, exemplars["y"], features)
        self.means.copy_(sums / numbers.clamp(min=1)[:, None])
        self.has_mean.copy_(numbers > 0)
        self.has_means = True

    def load_state_dict(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found = super().load_state_dict(state, *args, **kwargs)
        self.has_means = bool(self.has_mean.any())
        return found

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """(N, C, H, W) -> (N, K): minus the distance to each class's mean, the least number for a class without
        exemplars. While there are none at all, the network's logits."""
        if not self.has_means:
            return self.net(x)
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(self.net.features(x), self.means, compute_mode=exact)
        return (-distances).masked_fill(~self.has_mean, torch.finfo(distances.dtype).min)
