"""Passes outside a step: a network in eval mode, and gradients of single rows.

Gradients of single rows are never formed for networks of linear layers alone: their inner products and their squares
follow from each layer's inputs and output gradients. Other networks take them row by row (`torch.func`), in pieces.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

GRADIENT_FLOATS = 2**26  # of gradients of single rows at a time


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Inside, the module and its parts are in eval mode; afterwards, each is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, was_training in modes:
            part.training = was_training


def square_sums(net: nn.Module, x: Tensor, y: Tensor, weigh: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Sum over rows of weight * (gradient of their cross entropy)^2, one tensor for each trainable parameter.

    x (N, C, H, W), y (N,) int64; `weigh` maps the costs (N,) to the weights (N,). Each row is a batch of its own for
    BatchNorm in train mode, whose running averages must be frozen.
    """
    found = _linear_factors(net, x, y)
    if found is not None:
        factors, costs = found
        weights = weigh(costs)
        sums = {}
        for layer, inputs, deltas in factors:
            squares = deltas.square() * weights[:, None]
            sums[layer.weight] = squares.T @ inputs.square()
            if layer.bias is not None:
                sums[layer.bias] = squares.sum(0)
        return [sums[p] for p in net.parameters() if p.requires_grad]
    total: list[Tensor] | None = None
    for gradients, costs in row_gradients(net, x, y):
        part = [torch.tensordot(weigh(costs), g.square(), 1) for g in gradients]
        total = part if total is None else torch._foreach_add(total, part)
    return total


def gram(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(N, N): inner products of the gradients of the rows' cross entropies, over all trainable parameters."""
    found = _linear_factors(net, x, y)
    if found is not None:
        return sum(
            (inputs @ inputs.T + (layer.bias is not None)) * (deltas @ deltas.T) for layer, inputs, deltas in found[0]
        )
    pieces = [gradients for gradients, _ in row_gradients(net, x, y)]
    rows = (torch.cat(of_one) if len(of_one) > 1 else of_one[0] for of_one in zip(*pieces, strict=True))
    return sum(g.flatten(1) @ g.flatten(1).T for g in rows)


def _linear_factors(
    net: nn.Module, x: Tensor, y: Tensor
) -> tuple[list[tuple[nn.Linear, Tensor, Tensor]], Tensor] | None:
    """([(layer, its inputs (N, in), gradients of its outputs (N, out))], costs (N,)); None where the network is not of
    linear layers alone, each of them passed once and with weights of its own, or where BatchNorm mixes the rows."""
    layers = [part for part in net.modules() if any(True for _ in part.parameters(recurse=False))]
    params = [p for layer in layers for p in layer.parameters(recurse=False)]
    plain = all(p.requires_grad for p in params) and len(set(params)) == len(params)
    mixes = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in net.modules())
    if not plain or mixes or any(type(layer) is not nn.Linear for layer in layers):
        return None
    seen: list[tuple[nn.Linear, Tensor, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda layer, inputs, output: seen.append((layer, inputs[0], output)))
        for layer in layers
    ]
    try:
        with torch.enable_grad():
            costs = cross_entropy(net(x), y, reduction="none")
    finally:
        for handle in handles:
            handle.remove()
    passed = [layer for layer, *_ in seen]
    if len(passed) != len(layers) or {*passed} != {*layers} or any(inputs.ndim != 2 for _, inputs, _ in seen):
        return None
    deltas = torch.autograd.grad(costs.sum(), [output for *_, output in seen])
    return [(layer, inputs.detach(), delta) for (layer, inputs, _), delta in zip(seen, deltas, strict=True)], (
        costs.detach()
    )


def row_gradients(net: nn.Module, x: Tensor, y: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
    """(gradients (n, ...) of each trainable parameter, costs (n,)) of n rows at a time."""
    params = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}

    def cost(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(net, params, (x[None],)), y[None])

    of_rows = torch.func.vmap(torch.func.grad_and_value(cost), in_dims=(None, 0, 0), randomness="different")
    size = max(1, GRADIENT_FLOATS // max(1, sum(p.numel() for p in params.values())))
    for start in range(0, len(x), size):
        gradients, costs = of_rows(params, x[start : start + size], y[start : start + size])
        yield list(gradients.values()), costs
