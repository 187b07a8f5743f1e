"""Networks of timm (Wightman, 2019): residual networks, vision transformers and more, as timm makes them.

Variants: each name of timm.list_models(), with or without the tag of pretrained weights, as in resnet18.a1_in1k.
Needs the package timm (the extra flatcl[timm]). Networks are made without weights of timm: a tag decides the size of
the images alone, where the network demands one. Only those that end in one Linear layer are taken.
"""

from typing import Any

from torch import nn

from flatcl.backbone._packaged import Packaged
from flatcl.utils.extras import require
from flatcl.utils.registry import BACKBONES

require("timm", "timm", "--backbone timm:NAME")
import timm  # noqa: E402


@BACKBONES.register("timm")
class Timm(Packaged):
    package = "timm"

    @classmethod
    def variants(cls) -> list[str]:
        return [*timm.list_models(), *timm.list_models(pretrained=True)]

    def make(self, channels: int, num_classes: int) -> tuple[nn.Module, Any]:
        net: Any = timm.create_model(self.variant_name, pretrained=False, num_classes=num_classes, in_chans=channels)
        if net.pretrained_cfg.get("fixed_input_size"):
            self.resizes_to = tuple(net.pretrained_cfg["input_size"][1:])
        return net, net.get_classifier()
