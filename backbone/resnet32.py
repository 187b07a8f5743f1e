"""ResNet-32 as iCaRL and BiC use it (Rebuffi et al., 2017): 3 stages of 5 blocks with 16, 32 and 64 channels.

Conv-ReLU-BN in the stem; shortcuts without parameters (strided, new channels zero); no ReLU after the last block;
He-normal convolutions, BatchNorm eps 1e-4, classifier weights normal with variance 1/64.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from flatcl.backbone._stages import Stage, without_last_relu
from flatcl.utils.registry import BACKBONES

EPS = 1e-4


class Block(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int, last: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes, eps=EPS)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes, eps=EPS)
        self.stride, self.new_planes, self.last = stride, planes - in_planes, last

    def before_relu(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new_planes:
            shortcut = pad(shortcut, (0, 0, 0, 0, 0, self.new_planes))
        return self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))) + shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.before_relu(x)
        return out if self.last else relu(out)


@BACKBONES.register("resnet32")
class ResNet32(nn.Module):
    num_features = 64

    def __init__(self, shape: tuple[int, int, int], num_classes: int, args: None = None):
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16, eps=EPS)
        planes, layers = 16, []
        for stage, width in enumerate((16, 32, 64)):
            for block in range(5):
                stride = 2 if stage and not block else 1
                layers.append(Block(planes, width, stride, last=stage == 2 and block == 4))
                planes = width
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(self.num_features, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        with torch.no_grad():
            self.classifier.weight.normal_(0.0, (1 / self.num_features) ** 0.5)
            self.classifier.bias.zero_()

    @property
    def stages(self) -> list[Stage]:
        norm, (low, middle, high) = self.bn1, (self.layers[i : i + 5] for i in (0, 5, 10))
        return [
            (self.conv1, lambda x: norm(relu(x))),
            (partial(without_last_relu, low), relu),
            (partial(without_last_relu, middle), relu),
            (high, nn.Identity()),
            (lambda x: self.classifier(x.mean((2, 3))), nn.Identity()),
        ]

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 64): the globally averaged last map."""
        return self.layers(self.bn1(relu(self.conv1(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K)."""
        return self.classifier(self.features(x))
