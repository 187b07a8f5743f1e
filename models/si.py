"""Synaptic Intelligence (Zenke, Poole & Ganguli, ICML 2017), as the code behind the DER paper does it.

    L = CE(f(x), y) + c * sum Omega (theta - theta*)^2
    omega <- omega + g * (theta_before - theta_after)     in each step
    Omega <- Omega + omega / ((theta - theta*)^2 + xi)    at the end of a task; then theta* = theta, omega = 0

The update is clipped to [-1, 1], element by element, and g is this clipped update, penalty included: under plain SGD
omega grows by lr * g^2. `--si_gradient task` takes the clean gradient of the task's own loss instead (eq. 3).
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from flatcl.models._method import Batch, Block, Grads, Loss, Method, published
from flatcl.models.sgd import DER
from flatcl.utils.arguments import flag
from flatcl.utils.optim._driver import flat, trainable
from flatcl.utils.registry import METHODS


@METHODS.register("si")
class SI(Method):
    settings = ("class-il", "domain-il")

    @dataclass(frozen=True)
    class Args:
        c: float = flag(0.5, "weight of the penalty", low=0)
        xi: float = flag(1.0, "damping of the importance", above=0)
        si_gradient: str = flag("total", "gradient of the path integral", choices=("total", "task"))

    published = published(
        DER,
        {
            ("perm-mnist",): dict(lr=0.1, batch_size=128, n_epochs=1, c=0.5, xi=1.0),
            ("rot-mnist",): dict(lr=0.1, batch_size=128, n_epochs=1, c=1.0, xi=1.0),
            ("seq-mnist",): dict(lr=0.1, batch_size=10, n_epochs=1, c=1.0, xi=0.9),
            ("seq-cifar10",): dict(lr=0.03, batch_size=32, n_epochs=50, c=0.5, xi=1.0),
            ("seq-tinyimg",): dict(lr=0.03, batch_size=32, n_epochs=100, c=0.5, xi=1.0),
        },
    )

    def __init__(self, net, args, context):
        super().__init__(net, args, context)
        self.params = trainable(net)
        for name in ("importance", "path", "anchor"):  # Omega, omega, theta*
            self.register_buffer(name, torch.zeros(sum(p.numel() for p in self.params)))
        for name in ("gradient", "before"):  # of the step under way, for `remember`, which is called after it
            self.register_buffer(name, torch.zeros_like(self.path), persistent=False)
        if args.si_gradient == "task":
            self.guides = {"task": ("current",)}

    def begin_task(self, task) -> None:
        self.path.zero_()
        self.anchor.copy_(flat(self.params).detach())

    phase = Method.phase

    def loss(self, stream: Block) -> Loss:
        logits = self.net(stream.x)
        penalty = self.args.c * (self.importance * (flat(self.params) - self.anchor).square()).sum()
        return Loss({"current": cross_entropy(logits, stream.y, reduction="none")}, logits, {"si": penalty})

    def combine(self, update: Grads, guides: dict[str, Grads]) -> Grads:
        update = torch._foreach_clamp_max(torch._foreach_clamp_min(update, -1.0), 1.0)
        self.gradient.copy_(flat(guides.get("task", update)))
        self.before.copy_(flat(self.params).detach())
        return update

    def remember(self, batch: Batch, loss: Loss) -> None:
        change = self.before - flat(self.params).detach()
        # a step that was not taken on a GPU moves nothing
        self.path += (self.gradient * change).nan_to_num(0.0, 0.0, 0.0)

    def end_task(self, task) -> None:
        theta = flat(self.params).detach()
        self.importance += self.path / ((theta - self.anchor).square() + self.args.xi)
