"""SGD: stochastic gradient descent, no ascent.

Passes: 1 forward, 1 backward
Memory: none
"""

from flatcl.utils.optim._driver import Driver
from flatcl.utils.registry import OPTIMIZERS


@OPTIMIZERS.register("sgd")
class SGD(Driver):
    """The driver's own direction: the gradient."""
