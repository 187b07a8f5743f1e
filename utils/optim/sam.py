"""SAM (Foret et al., ICLR 2021), eq. 2 and 3: a step with the gradient at the worst point in a ball around the weights.

    e = rho * g / (|g| + 1e-12)    u = gradient at w + e

Weight decay acts in the base step only, not in the ascent.

Passes: 2 forward, 2 backward
Memory: 2 P (perturbed weights, clean gradient)
"""

from flatcl.utils.optim._sharpness import SharpnessAware
from flatcl.utils.registry import OPTIMIZERS


@OPTIMIZERS.register("sam")
class SAM(SharpnessAware):
    """The skeleton as it stands."""
