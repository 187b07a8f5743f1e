"""AdamW (Loshchilov & Hutter, ICLR 2019): Adam with decoupled weight decay, no ascent. 1 forward, 1 backward."""

from utils.optim.adam import Adam
from utils.registry import OPTIMIZERS


@OPTIMIZERS.register("adamw")
class AdamW(Adam):
    decoupled = True
