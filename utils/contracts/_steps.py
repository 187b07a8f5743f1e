"""Single steps of an optimizer over a small network, for the contracts: no benchmark, no run."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

from flatcl.models import Block, Loss, Method
from flatcl.models._objective import Objective
from flatcl.utils.registry import OPTIMIZERS

CLASSES, LR, DECAY = 3, 0.1, 5e-4
SIZES = (12, 12, 9, 12, 12, 5, 12)  # rows of the seven batches
TASK = SimpleNamespace(index=0, classes=range(CLASSES), train=SimpleNamespace(ids=torch.arange(100)))


def conv_bn_linear(momentum: float | None = 0.1, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """(N, 2, 6, 6) -> (N, 3), from a fixed seed."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)
    )
    nn.init.uniform_(net[1].weight, 0.5, 1.5)
    nn.init.uniform_(net[1].bias, -0.5, 0.5)
    return net.to(dtype)


def batches(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = SIZES) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for n in sizes:
        x = torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
        yield x, torch.randint(0, CLASSES, (n,), generator=generator)


class TwoHeads(nn.Module):
    """Two linear heads of which one is in use, and a scale that the loss never depends on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.heads = nn.ModuleList(nn.Linear(72, CLASSES) for _ in range(2))
        self.spare_weight = nn.Parameter(torch.tensor([1.0, -0.0]))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)
        self.head, self.seen = 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(copies(self))
        return self.heads[self.head](x.flatten(1))


class Noisy(nn.Module):
    """Dropout as a module or as a function; keeps the inputs and masks of its forwards."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(6)
        self.linear, self.passes = nn.Linear(72, CLASSES), []
        self.dropout = nn.Dropout(0.5) if kind == "module" else None

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones_like(x)
        mask = self.dropout(ones) if self.dropout else dropout(ones, 0.5, self.training)
        if self.training:  # not what an optimizer looks at without noise
            self.passes.append((x.clone(), mask))
        return self.linear((x * mask).flatten(1))


class Watched(Method):
    """Cross entropy over a net; calls `watch` with the pass's number after each forward."""

    watch = staticmethod(lambda number, logits: None)

    def loss(self, stream: Block) -> Loss:
        logits = self.net(stream.x)
        self.passes = getattr(self, "passes", 0) + 1
        self.watch(self.passes, logits)
        return Loss({"current": cross_entropy(logits, stream.y, reduction="none")}, logits)


def make(name: str, net: nn.Module, lr: float = LR, weight_decay: float = DECAY, **flags: Any) -> tuple[Method, Any]:
    """A method over `net` and an optimizer of the registry, at the start of a task."""
    kind = OPTIMIZERS.load(name)
    method = Watched(net, None, None).train()
    optimizer = kind(method, lr, weight_decay, kind.Args(**flags))
    optimizer.begin_task(TASK)
    optimizer.begin_epoch(0)
    return method, optimizer


def momentum_of(name: str) -> dict[str, float]:
    """The flag of momentum, where the optimizer has it."""
    return {"optim_mom": 0.9} if hasattr(OPTIMIZERS.load(name).Args(), "optim_mom") else {}


def step(method: Method, optimizer: Any, x: Tensor, y: Tensor, trace: bool = False) -> tuple[Objective, list[Tensor]]:
    block = Block(x, y=y, ids=torch.arange(len(y)))
    objective = Objective(method, (block,), optimizer.params, trace)
    update = optimizer.step(objective)
    return objective, update


def flat(net: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in net.parameters()]).clone()


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}
