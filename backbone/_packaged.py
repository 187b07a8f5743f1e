"""Networks of other packages as backbones: all but the last layer of such a network, and that layer, the classifier.

A family (`timm:NAME`) says which names there are and makes the network; the rest is the same for all. Weights are drawn
as the package draws them, and never downloaded: `--pretrained_weights FILE` brings others.
"""

import functools
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from flatcl.utils.console import reason
from flatcl.utils.engine.passes import eval_mode
from flatcl.utils.errors import UsageError
from flatcl.utils.registry import nearest


class Packaged(nn.Module):
    """A family registers a subclass, which gives the classes of single networks (`variant`).

    A network that demands images of one size gets them resized, bilinearly, on the device (`resizes_to`); any other
    gets them as they are. One that knows only RGB gets grey images as three equal channels.
    """

    name: str
    package: str  # which makes the networks, as pip knows it
    variant_name: str  # the network's name there
    resizes_to: tuple[int, int] | None = None  # (height, width)
    num_channels: int | None = None  # that the network sees, where it cannot be made for other images

    @classmethod
    def variants(cls) -> list[str]:
        """The names of the networks."""
        raise NotImplementedError

    def make(self, channels: int, num_classes: int) -> tuple[nn.Module, Any]:
        """(network, its last layer); may set `resizes_to` and `num_channels`."""
        raise NotImplementedError

    @classmethod
    @functools.cache
    def variant(cls, name: str) -> type["Packaged"]:
        """The class of one network. Raises `UsageError` with the nearest names when there is none."""
        full, names = f"{cls.name}:{name}", cls.variants()
        if name not in names:
            hint = nearest(name, names, f"{cls.package} has {len(names)} names, such as {names[0]}.", f"{cls.name}:")
            raise UsageError(f"unknown backbone: '{full}'. {hint}")
        return type(cls.__name__, (cls,), {"name": full, "variant_name": name, "__module__": cls.__module__})

    @classmethod
    def sources(cls, config: Any) -> dict[str, str]:
        """{package: version}: what defines the network beside this code."""
        return {cls.package: version(cls.package).partition("+")[0]}

    def __init__(self, shape: tuple[int, int, int], num_classes: int, args: None = None):
        super().__init__()
        self.body, last = self.make(shape[0], num_classes)
        if not isinstance(last, nn.Linear):
            raise UsageError(
                f"--backbone {self.name} does not end in a Linear layer, which is needed as the classifier. Choose "
                "another."
            )
        if shape[0] not in (1, self.num_channels or shape[0]):
            raise UsageError(
                f"--backbone {self.name} takes images of {self.num_channels} channels, got {shape[0]}. Choose another."
            )
        self._last = next(name for name, layer in self.body.named_modules() if layer is last)
        self.body.set_submodule(self._last, nn.Identity())
        self.classifier, self.num_features = last, last.in_features
        self._try(shape)

    def _try(self, shape: tuple[int, int, int]) -> None:
        """Refuses images that the network cannot take."""
        try:
            with eval_mode(self), torch.no_grad():
                size = self.features(torch.zeros(1, *shape)).shape
        except Exception as error:  # each network fails in its own way
            raise UsageError(
                f"--backbone {self.name} cannot take images of {shape} ({reason(error)}). Choose another."
            ) from error
        if size != (1, self.num_features):
            raise UsageError(
                f"--backbone {self.name} must give a feature vector for each image, got the shape {tuple(size)}. "
                "Choose another."
            )

    @property
    def published_names(self) -> dict[str, str]:
        """{name in the state_dict: name in that of the package's own network}."""
        inner = {f"body.{name}": name for name in self.body.state_dict()}
        return inner | {f"classifier.{name}": f"{self._last}.{name}" for name in self.classifier.state_dict()}

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, num_features): what goes into the last layer."""
        if self.num_channels is not None and x.shape[1] == 1:
            x = x.repeat(1, self.num_channels, 1, 1)
        if self.resizes_to not in (None, tuple(x.shape[2:])):
            x = interpolate(x, self.resizes_to, mode="bilinear", antialias=True)
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K)."""
        return self.classifier(self.features(x))
