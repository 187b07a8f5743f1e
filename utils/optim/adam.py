"""Adam (Kingma & Ba, ICLR 2015), no ascent.

Passes: 1 forward, 1 backward
Memory: 2 P (both moments)
"""

from dataclasses import dataclass

from flatcl.utils.arguments import flag
from flatcl.utils.optim import _base
from flatcl.utils.optim._driver import Driver
from flatcl.utils.registry import OPTIMIZERS


@OPTIMIZERS.register("adam")
class Adam(Driver):
    defaults = {"lr": 1e-3}  # learning rates published for SGD do not carry over
    decoupled = False
    phase = Driver.phase

    @dataclass(frozen=True)
    class Args:
        optim_beta1: float = flag(0.9, "decay of Adam's first moment", low=0, below=1)
        optim_beta2: float = flag(0.999, "decay of Adam's second moment", low=0, below=1)

    def make_base(self, params, lr: float, weight_decay: float) -> _base.Base:
        return _base.Adam(params, lr, weight_decay, self.args.optim_beta1, self.args.optim_beta2, self.decoupled)
