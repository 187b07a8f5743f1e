"""What every network must keep: shapes, gradients, the seed, and copies."""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flatcl.utils.arguments import args_of
from flatcl.utils.contracts import methods
from flatcl.utils.contracts._runs import Skipped, difference, expect
from flatcl.utils.registry import BACKBONES

SHAPES = ((1, 28, 28), (3, 32, 32), (3, 64, 64))  # grey and in colour
CLASSES = 10


def subject(name: str) -> str:
    BACKBONES.load(name)
    return name


def make(name: str, shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = CLASSES, seed: int = 0) -> nn.Module:
    cls = BACKBONES.load(name)
    torch.manual_seed(seed)
    return cls(shape, num_classes, args_of(cls)() if args_of(cls) else None)


def made(name: str) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """(network in eval mode, three images) of each shape."""
    for shape in SHAPES:
        yield make(name, shape).eval(), torch.rand(3, *shape)


@torch.no_grad()
def has_shapes(name: str) -> None:
    """(N, C, H, W) to (N, classes), float32 and finite; in eval mode an image stands for itself."""
    for net, x in made(name):
        logits, what = net(x), f"of images {tuple(x.shape)}"
        is_right = logits.shape == (3, CLASSES) and logits.dtype == torch.float32
        expect(is_right, f"logits {what} must be (3, 10) float32, got {tuple(logits.shape)} {logits.dtype}")
        expect(logits.isfinite().all(), f"logits {what} are not finite")
        alone = torch.allclose(net(x[1:2]), logits[1:2], atol=1e-4)
        expect(alone, f"in eval mode the logits {what} depend on the other images. Use BatchNorm's averages there")


@torch.no_grad()
def has_features(name: str) -> None:
    """`features` gives (N, num_features), and `classifier` makes the logits of them."""
    if not hasattr(BACKBONES.load(name), "features"):
        raise Skipped("it has no `features`, which some methods need")
    for net, x in made(name):
        size = getattr(net, "num_features", None)
        expect(isinstance(size, int), f"num_features must be the number of features, got {size}")
        features = net.features(x)
        expect(features.shape == (3, size), f"features must be (3, {size}), got {tuple(features.shape)}")
        if isinstance(getattr(net, "classifier", None), nn.Module):
            expect(torch.equal(net.classifier(features), net(x)), "classifier(features(x)) must be forward(x)")


def has_gradients(name: str) -> None:
    """Each parameter that is to be trained gets a gradient."""
    net = make(name)
    cross_entropy(net(torch.rand(8, 3, 32, 32)), torch.arange(8)).backward()
    for key, parameter in net.named_parameters():
        if parameter.requires_grad:
            is_used = parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0
            expect(is_used, f"{key} has no gradient. Use it in forward(), or leave it out")


def is_made_by_the_seed(name: str) -> None:
    one, same, other = (make(name, seed=seed).state_dict() for seed in (0, 0, 1))
    found = difference(one, same, "weights")
    expect(not found, f"the same seed makes other weights: {found}. Draw from torch's generator alone")
    expect(difference(one, other), "another seed makes the same weights")


def can_be_copied(name: str) -> None:
    """A copy gives the same, and goes its own way."""
    for net, x in made(name):
        twin = copy.deepcopy(net)
        expect(torch.equal(net(x), twin(x)), "a copy (copy.deepcopy) gives other logits")
        before = net(x).detach()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        expect(torch.equal(net(x), before), "a copy (copy.deepcopy) shares weights with its original")


CONTRACTS = {
    "logits have their shapes, grey and in colour": has_shapes,
    "features are what the classifier sees": has_features,
    "each parameter has a gradient": has_gradients,
    "the seed makes the weights": is_made_by_the_seed,
    "copies are equal and apart": can_be_copied,
    "trains two tasks of derpp under sam": lambda name: methods.trains_two_tasks("derpp", "sam", backbone=name),
    "same seed, same run, also where it was stopped and resumed": (
        lambda name: methods.goes_on_where_it_was_stopped("er", backbone=name)
    ),
}
