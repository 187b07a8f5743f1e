"""Adam (Kingma & Ba, ICLR 2015), no ascent. 1 forward, 1 backward."""

from dataclasses import dataclass

from utils.arguments import flag
from utils.optim import _base
from utils.optim._sharpness import Grads, SharpnessAware
from utils.registry import OPTIMIZERS


@OPTIMIZERS.register("adam")
class Adam(SharpnessAware):
    defaults = {"lr": 1e-3}  # learning rates published for SGD do not carry over
    decoupled = False

    @dataclass(frozen=True)
    class Args:
        optim_beta1: float = flag(0.9, "decay of Adam's first moment", low=0, below=1)
        optim_beta2: float = flag(0.999, "decay of Adam's second moment", low=0, below=1)

    def make_base(self, params, lr: float, weight_decay: float) -> _base.Base:
        return _base.Adam(params, lr, weight_decay, self.args.optim_beta1, self.args.optim_beta2, self.decoupled)

    def direction(self, objective) -> Grads:
        return objective.gradient()
