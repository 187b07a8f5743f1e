"""MNISTMLP: two hidden layers of 100 ReLU units (Lopez-Paz & Ranzato, 2017; DER paper). 89,610 parameters on MNIST.

Weights are Xavier-uniform, biases zero.
"""

from dataclasses import dataclass
from math import prod

from torch import Tensor, nn
from torch.nn.functional import relu

from flatcl.backbone._stages import Stage
from flatcl.utils.arguments import flag
from flatcl.utils.registry import BACKBONES


@BACKBONES.register("mnistmlp")
class MnistMlp(nn.Module):
    @dataclass(frozen=True)
    class Args:
        hidden: int = flag(100, "units of each hidden layer of the MLP", low=1, high=10**5)

    def __init__(self, shape: tuple[int, int, int], num_classes: int, args: Args):
        super().__init__()
        self.num_features = args.hidden
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(prod(shape), args.hidden), nn.ReLU(), nn.Linear(args.hidden, args.hidden), nn.ReLU()
        )
        self.classifier = nn.Linear(args.hidden, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    @property
    def stages(self) -> list[Stage]:
        first, second = self.body[:2], self.body[3]
        return [(first, relu), (second, relu), (self.classifier, nn.Identity())]

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, num_features)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K)."""
        return self.classifier(self.features(x))
