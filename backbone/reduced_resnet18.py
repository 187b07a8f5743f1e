"""Reduced ResNet-18 (Lopez-Paz & Ranzato, 2017): ResNet-18 with 20 planes instead of 64."""

from flatcl.backbone.resnet18 import ResNet18
from flatcl.utils.registry import BACKBONES


@BACKBONES.register("reduced-resnet18")
class ReducedResNet18(ResNet18):
    width = 20
