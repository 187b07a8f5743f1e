"""Networks of torchvision: residual networks, vision transformers and more, as torchvision makes them.

Variants: each name of torchvision.models.list_models(torchvision.models), as in resnet18 or vit_b_16.
All see RGB: grey images are repeated. Only those that end in a Linear layer are taken.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from torchvision import models

from flatcl.backbone._packaged import Packaged
from flatcl.utils.registry import BACKBONES

AUXILIARY = {"googlenet", "inception_v3"}  # have classifiers half way too, unless told otherwise
HALF_WAY = ("aux1.", "aux2.", "AuxLogits.")  # their names in torchvision's files


@BACKBONES.register("torchvision")
class Torchvision(Packaged):
    package = "torchvision"
    num_channels = 3

    @classmethod
    def variants(cls) -> list[str]:
        return models.list_models(models)

    def adapted(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A file of torchvision's with the names that its networks have now: without the classifiers half way, and
        `norm1` where files of DenseNets say `norm.1`."""
        if self.variant_name in AUXILIARY:
            return {name: value for name, value in state.items() if not name.startswith(HALF_WAY)}
        old = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
        return {old.sub(r"\1\2.", name): value for name, value in state.items()}

    def make(self, channels: int, num_classes: int) -> tuple[nn.Module, Any]:
        plain = dict(aux_logits=False, init_weights=True) if self.variant_name in AUXILIARY else {}
        net = models.get_model(self.variant_name, weights=None, num_classes=num_classes, **plain)
        if isinstance(net, models.VisionTransformer):
            self.resizes_to = (net.image_size, net.image_size)
        return net, next((layer for layer in reversed([*net.modules()]) if isinstance(layer, nn.Linear)), None)
