"""Training on all tasks at once: the upper bound. The published runs use the settings of plain SGD."""

from flatcl.models.sgd import SGD
from flatcl.utils.registry import METHODS


@METHODS.register("joint")
class Joint(SGD):
    trains_jointly = True
