"""Training on all tasks at once: the upper bound. The published runs use the settings of plain SGD."""

from models.sgd import SGD
from utils.registry import METHODS


@METHODS.register("joint")
class Joint(SGD):
    trains_jointly = True
