"""AdamW (Loshchilov & Hutter, ICLR 2019): Adam with decoupled weight decay, no ascent.

Passes: 1 forward, 1 backward
Memory: 2 P (both moments)
"""

from flatcl.utils.optim.adam import Adam
from flatcl.utils.registry import OPTIMIZERS


@OPTIMIZERS.register("adamw")
class AdamW(Adam):
    decoupled = True
