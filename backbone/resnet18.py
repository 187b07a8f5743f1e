"""ResNet-18 for small images (He et al., 2016, as iCaRL and DER use it): 3x3 stem, no max-pooling.

11,173,962 parameters with 10 classes, 11,220,132 with 100, 11,271,432 with 200. torch's default initialisation.
"""

from functools import partial

from torch import Tensor, nn
from torch.nn.functional import relu

from flatcl.backbone._stages import Stage, without_last_relu
from flatcl.utils.registry import BACKBONES


class BasicBlock(nn.Module):
    """conv3x3-BN-ReLU-conv3x3-BN plus the input (through conv1x1-BN where the shape changes), then ReLU."""

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Identity()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def before_relu(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out)) + self.shortcut(x)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.before_relu(x))


@BACKBONES.register("resnet18")
class ResNet18(nn.Module):
    width = 64  # planes of the first stage; each later one has twice as many

    def __init__(self, shape: tuple[int, int, int], num_classes: int, args: None = None):
        super().__init__()
        w = self.width
        self.conv1 = nn.Conv2d(shape[0], w, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(w)
        planes, layers = w, []
        for stage, stride in enumerate((1, 2, 2, 2)):
            for block_stride in (stride, 1):
                layers.append(BasicBlock(planes, w * 2**stage, block_stride))
                planes = w * 2**stage
        self.layers = nn.Sequential(*layers)
        self.num_features = planes
        self.classifier = nn.Linear(planes, num_classes)

    @property
    def stages(self) -> list[Stage]:
        pairs = [self.layers[i : i + 2] for i in range(0, len(self.layers), 2)]
        return [
            (lambda x: self.bn1(self.conv1(x)), relu),
            *((partial(without_last_relu, pair), relu) for pair in pairs),
            (lambda x: self.classifier(x.mean((2, 3))), nn.Identity()),
        ]

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, num_features): the globally averaged last map."""
        return self.layers(relu(self.bn1(self.conv1(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K)."""
        return self.classifier(self.features(x))
