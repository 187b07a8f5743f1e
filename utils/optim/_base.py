"""Base optimizers: what turns an update direction into a step. Equal to torch.optim's, bit for bit on the CPU.

They take gradients as a list instead of reading `.grad`, work on the whole model in one call, and start without
torch.optim, whose first use imports a compiler (1.3 s and 149 MiB with torch 2.15).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Grads = list[Tensor] | tuple[Tensor, ...]  # aligned with the optimizer's params; a parameter without gradient has zeros
Numbers = list[list[float]]  # rows of one number for each parameter; as a tensor (rows, parameters) on the device


class Base:
    """Steps `params` with a learning rate `lr`. Parameters that are not `used` are left alone, weight decay too."""

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float):
        self.params, self.lr, self.weight_decay = params, lr, weight_decay
        self.state: dict[str, list[Any]] = {}  # name -> one entry for each parameter, None before its first step

    def step(self, grads: Grads, used: list[bool]) -> None:
        self.advance(used)
        self.apply(grads, used, self.numbers())

    @torch.no_grad()
    def apply(self, grads: Grads, used: list[bool], numbers: Any) -> None:
        """The arithmetic of a step, after the host has counted it (`advance`)."""
        rows = range(len(self.params)) if all(used) else [i for i, is_used in enumerate(used) if is_used]
        if len(rows) > 0:
            self.update([self.params[i] for i in rows], [grads[i] for i in rows], rows, numbers)

    def advance(self, used: list[bool]) -> None:
        """Counts a step, where a rule needs the number of steps."""

    def numbers(self) -> Numbers:
        """What the arithmetic needs of the host and is another number in each step, for each parameter. A step that is
        recorded reads them from tensors of the device."""
        return []

    def update(self, params: list[Tensor], grads: Grads, rows: Sequence[int], numbers: Any) -> None:
        """Steps these parameters, which are `rows` of all."""
        raise NotImplementedError

    def forget(self) -> None:
        """As before the first step."""
        self.state = {name: [None] * len(self.params) for name in self.state}

    def state_dict(self) -> dict[str, list[Any]]:
        return {name: list(entries) for name, entries in self.state.items()}

    def load_state_dict(self, state: dict[str, list[Any]]) -> None:
        for name, entries in state.items():
            self.state[name] = [
                entry.to(p.device).clone() if isinstance(entry, Tensor) else entry
                for entry, p in zip(entries, self.params, strict=True)
            ]


class SGD(Base):
    """d = g + wd * w;  b = d at first, then momentum * b + d;  w -= lr * b (Nesterov: d + momentum * b)."""

    def __init__(
        self, params: list[Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.0, nesterov: bool = False
    ):
        super().__init__(params, lr, weight_decay)
        self.momentum, self.nesterov = momentum, nesterov
        if momentum:
            self.state["momentum"] = [None] * len(params)

    def update(self, params: list[Tensor], grads: Grads, rows: Sequence[int], numbers: Any) -> None:
        if self.weight_decay:
            grads = torch._foreach_add(grads, params, alpha=self.weight_decay)
        if self.momentum:
            buffers = self._accumulate(grads, rows)
            grads = torch._foreach_add(grads, buffers, alpha=self.momentum) if self.nesterov else buffers
        torch._foreach_add_(params, grads, alpha=-self.lr)

    @torch.no_grad()
    def look_ahead(self, grads: Grads, used: list[bool]) -> Grads:
        """The offset that a step with these gradients would move the weights by; changes nothing."""
        if self.weight_decay:
            grads = torch._foreach_add(grads, self.params, alpha=self.weight_decay)
        if self.momentum:
            old = [torch.zeros_like(g) if b is None else b for b, g in zip(self.state["momentum"], grads, strict=True)]
            buffers = torch._foreach_add(grads, old, alpha=self.momentum)
            grads = torch._foreach_add(grads, buffers, alpha=self.momentum) if self.nesterov else buffers
        offset = torch._foreach_mul(grads, -self.lr)
        return [move if is_used else torch.zeros_like(move) for move, is_used in zip(offset, used, strict=True)]

    def _accumulate(self, grads: Grads, rows: Sequence[int]) -> Grads:
        buffers = self.state["momentum"]
        old = [position for position, i in enumerate(rows) if buffers[i] is not None]
        if old:
            known = [buffers[rows[position]] for position in old]
            torch._foreach_mul_(known, self.momentum)
            torch._foreach_add_(known, [grads[position] for position in old])
        for position, i in enumerate(rows):
            if buffers[i] is None:
                buffers[i] = grads[position].clone()
        return [buffers[i] for i in rows]


class Adam(Base):
    """Adam (Kingma & Ba, 2015); with `decoupled`, AdamW (Loshchilov & Hutter, 2019)."""

    eps = 1e-8

    def __init__(
        self, params: list[Tensor], lr: float, weight_decay: float, beta1: float, beta2: float, decoupled: bool = False
    ):
        super().__init__(params, lr, weight_decay)
        self.beta1, self.beta2, self.decoupled = beta1, beta2, decoupled
        for name in ("step", "mean", "square"):
            self.state[name] = [None] * len(params)

    def advance(self, used: list[bool]) -> None:
        steps, means, squares = (self.state[name] for name in ("step", "mean", "square"))
        for i, (p, is_used) in enumerate(zip(self.params, used, strict=True)):
            if is_used and steps[i] is None:
                steps[i], means[i], squares[i] = 0, torch.zeros_like(p), torch.zeros_like(p)
            if is_used:
                steps[i] += 1

    def numbers(self) -> Numbers:
        """Both corrections of the averages' bias: what the root is divided by, and the size of the step."""
        steps = [step or 1 for step in self.state["step"]]
        roots = {step: (1 - self.beta2**step) ** 0.5 for step in {*steps}}
        sizes = {step: -self.lr / (1 - self.beta1**step) for step in {*steps}}
        return [[roots[step] for step in steps], [sizes[step] for step in steps]]

    def update(self, params: list[Tensor], grads: Grads, rows: Sequence[int], numbers: Any) -> None:
        roots, sizes = ([of_each[i] for i in rows] for of_each in numbers)
        if self.weight_decay and self.decoupled:
            torch._foreach_mul_(params, 1 - self.lr * self.weight_decay)
        elif self.weight_decay:
            grads = torch._foreach_add(grads, params, alpha=self.weight_decay)
        mean, square = ([self.state[name][i] for i in rows] for name in ("mean", "square"))
        torch._foreach_lerp_(mean, grads, 1 - self.beta1)
        torch._foreach_mul_(square, self.beta2)
        torch._foreach_addcmul_(square, grads, grads, 1 - self.beta2)
        denominator = torch._foreach_sqrt(square)
        torch._foreach_div_(denominator, roots)
        torch._foreach_add_(denominator, self.eps)
        if not isinstance(sizes[0], Tensor):
            torch._foreach_addcdiv_(params, mean, denominator, sizes)
            return
        moves = torch._foreach_mul(mean, sizes)  # the same, in this order bit for bit, by sizes on the device
        torch._foreach_div_(moves, denominator)
        torch._foreach_add_(params, moves)
