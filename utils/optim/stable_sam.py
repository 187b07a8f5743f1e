"""Stable SAM (Tan et al., JMLR 2025): SAM whose update has the length of the clean gradient.

    u = |g| / (|g~| + 1e-12) * g~    g~ = gradient at SAM's w + e

This is `--renormalize 1` on SAM, which the other variants can have too. No clamp of the ratio, as in the authors' code.
With `asam` the norms are plain ones too; the authors' adaptive variant weights both by |w|.

Passes: 2 forward, 2 backward
Memory: 2 P (perturbed weights, clean gradient)
"""

from dataclasses import dataclass

from flatcl.utils.arguments import flag
from flatcl.utils.optim._sharpness import SharpnessAware
from flatcl.utils.registry import OPTIMIZERS


@OPTIMIZERS.register("stable_sam")
class StableSAM(SharpnessAware):
    @dataclass(frozen=True)
    class Args(SharpnessAware.Args):
        renormalize: bool = flag(True, "scale the update to the norm of the clean gradient; 0 is SAM")
