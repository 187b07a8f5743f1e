"""Stochastic gradient descent, no ascent. 1 forward, 1 backward."""

from utils.optim._sharpness import Grads, SharpnessAware
from utils.registry import OPTIMIZERS


@OPTIMIZERS.register("sgd")
class SGD(SharpnessAware):
    def direction(self, objective) -> Grads:
        return objective.gradient()
