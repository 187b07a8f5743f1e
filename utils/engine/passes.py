"""Passes outside a step: a network in eval mode, and gradients of single rows.

Gradients of single rows are never formed for linear layers: their inner products and their squares follow from the
layer's inputs and output gradients (Goodfellow, 2015). Convolutions and BatchNorm form theirs from the same, one layer
at a time. Networks with layers of other kinds take them row by row (`torch.func`), in pieces.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy, instance_norm, unfold
from torch.nn.grad import conv2d_weight

from flatcl.utils.engine.layout import has_convolutions
from flatcl.utils.optim._driver import batchnorms, trainable

GRADIENT_FLOATS = 2**26  # of gradients of single rows at a time
ROWS = 64  # whose activations are kept at a time where only sums are asked for


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
    BatchNorm in train mode, whose running averages must be frozen; a single value per channel is normalised with them
    (`normalise_single_values`).
    """
    total: list[Tensor] | None = None
    for part in _parts(net, x, y):
        found = _layers(net, *part)
        if found is not None:
            layers, weights = found[0], weigh(found[1])
            sums = {p: s for layer in layers for p, s in _square_sums(*layer, weights)}
            pieces = [[sums[p] for p in trainable(net)]]
        else:
            pieces = (
                [torch.tensordot(weigh(costs), g.square(), 1) for g in gradients]
                for gradients, costs in row_gradients(net, *part)
            )
        for piece in pieces:
            total = piece if total is None else torch._foreach_add(total, piece)
    return total


def gram(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(N, N): inner products of the gradients of the rows' cross entropies, over all trainable parameters.

    For BatchNorm as in `square_sums`.
    """
    found = _layers(net, x, y)
    if found is not None:
        return sum(_products(*layer) for layer in found[0])
    pieces = [gradients for gradients, _ in row_gradients(net, x, y)]
    rows = (torch.cat(of_one) if len(of_one) > 1 else of_one[0] for of_one in zip(*pieces, strict=True))
    return sum(g.flatten(1) @ g.flatten(1).T for g in rows)


def _parts(net: nn.Module, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """All rows at once where that is cheap, else what a network of convolutions can keep of one pass."""
    size = ROWS if has_convolutions(net) else len(x)
    yield from zip(x.split(size), y.split(size), strict=True)


def _layers(net: nn.Module, x: Tensor, y: Tensor) -> tuple[list[tuple[nn.Module, Tensor, Tensor]], Tensor] | None:
    """([(layer, its inputs (N, ...), gradients of its outputs (N, ...))], costs (N,)), by one pass of all rows.

    None where gradients of single rows do not follow from these: layers of other kinds, weights that two layers share
    or one layer uses twice, activations that are overwritten. Nothing but BatchNorm may mix rows.
    """
    layers = [part for part in net.modules() if any(p.requires_grad for p in part.parameters(recurse=False))]
    norms = batchnorms(net)
    params = [p for layer in layers for p in layer.parameters(recurse=False)]
    if len(set(params)) != len(params) or not all(_is_known(part) for part in (*layers, *norms)):
        return None
    seen: list[tuple[nn.Module, Tensor, Tensor, int, int]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if layer in norms and _takes_statistics(layer):  # each row alone
            output = _normalised(layer, inputs[0], layer.weight, layer.bias)
        if layer in layers:
            seen.append((layer, inputs[0], output, inputs[0]._version, output._version))
        return output

    handles = [layer.register_forward_hook(note) for layer in {*layers, *norms}]
    try:
        with torch.enable_grad():
            costs = cross_entropy(net(x), y, reduction="none")
    finally:
        for handle in handles:
            handle.remove()
    passed = [layer for layer, *_ in seen]
    if len(passed) != len(layers) or {*passed} != {*layers}:
        return None
    for layer, inputs, output, *versions in seen:
        is_flat = inputs.ndim == 2 or type(layer) is not nn.Linear
        if not is_flat or [inputs._version, output._version] != versions:
            return None
    deltas = torch.autograd.grad(costs.sum(), [output for _, _, output, *_ in seen])
    found = [(layer, inputs.detach(), delta) for (layer, inputs, *_), delta in zip(seen, deltas, strict=True)]
    return found, costs.detach()


def _is_known(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) in (nn.Linear, nn.BatchNorm2d)


def _takes_statistics(norm: nn.BatchNorm2d) -> bool:
    return norm.training or norm.running_mean is None


def _normalised(norm: nn.BatchNorm2d, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """(N, C, H, W): by the statistics of each row alone, where BatchNorm would take those of its batch and there is
    more than one value."""
    if _takes_statistics(norm) and x[0, 0].numel() > 1:
        return instance_norm(x, weight=weight, bias=bias, eps=norm.eps)
    return batch_norm(x, norm.running_mean, norm.running_var, weight, bias, eps=norm.eps)


def _square_sums(
    layer: nn.Module, inputs: Tensor, deltas: Tensor, weights: Tensor
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(parameter, sum over rows of weight * gradient^2) for the layer's parameters."""
    if type(layer) is nn.Linear:
        squares = deltas.square() * weights[:, None]
        if _is_trained(layer.weight):
            yield layer.weight, squares.T @ inputs.square()
        if _is_trained(layer.bias):
            yield layer.bias, squares.sum(0)
        return
    for parameter, pieces in _gradients(layer, inputs, deltas):
        yield parameter, torch.cat([torch.tensordot(weights, g.square_(), 1) for g in pieces]).view_as(parameter)


def _products(layer: nn.Module, inputs: Tensor, deltas: Tensor) -> Tensor:
    """(N, N): inner products of the rows' gradients, over the layer's parameters."""
    if type(layer) is nn.Linear:
        of_weight = inputs @ inputs.T if _is_trained(layer.weight) else 0.0
        return (of_weight + _is_trained(layer.bias)) * (deltas @ deltas.T)
    pieces = (g.flatten(1) for _, pieces in _gradients(layer, inputs, deltas) for g in pieces)
    return sum(g @ g.T for g in pieces)


def _gradients(layer: nn.Module, inputs: Tensor, deltas: Tensor) -> Iterator[tuple[nn.Parameter, Iterator[Tensor]]]:
    """(parameter, the rows' gradients (N, channels, ...), some output channels at a time) of a map's layer."""
    if _is_trained(layer.weight):
        if type(layer) is nn.Conv2d:
            yield layer.weight, _kernel_gradients(layer, inputs, deltas)
        else:
            yield layer.weight, iter([(deltas * _normalised(layer, inputs)).sum((2, 3))])
    if _is_trained(layer.bias):
        yield layer.bias, iter([deltas.sum((2, 3))])


def _is_trained(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _kernel_gradients(conv: nn.Conv2d, inputs: Tensor, deltas: Tensor) -> Iterator[Tensor]:
    """Gradients (N, channels, in * k * k) of the kernels from those of the outputs (N, out, H, W)."""
    size, positions = conv.weight[0].numel(), deltas[0, 0].numel()
    by_group = positions > 64 and inputs.device.type == "cpu"  # the faster way there, and far the slower on a GPU
    rows = len(inputs) if by_group else max(1, GRADIENT_FLOATS // (size * positions))
    for part in deltas.split(max(1, GRADIENT_FLOATS // (len(inputs) * size)), 1):
        pairs = zip(part.split(rows), inputs.split(rows), strict=True)
        pieces = [(_by_group if by_group else _by_window)(conv, x, d) for d, x in pairs]
        yield torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _by_group(conv: nn.Conv2d, x: Tensor, deltas: Tensor) -> Tensor:
    """Each row as a group of one convolution."""
    n, channels = deltas.shape[:2]
    kernels = (n * channels, *conv.weight.shape[1:])
    x, deltas = x.flatten(0, 1)[None], deltas.flatten(0, 1)[None]
    found = conv2d_weight(x, kernels, deltas, conv.stride, conv.padding, conv.dilation, groups=n)
    return found.view(n, channels, -1)


def _by_window(conv: nn.Conv2d, x: Tensor, deltas: Tensor) -> Tensor:
    """The outputs' gradients times the windows of the input that the outputs saw."""
    windows = unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return deltas.flatten(2) @ windows.transpose(1, 2)


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
