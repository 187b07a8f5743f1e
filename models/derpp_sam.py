"""DER++ under sharpness-aware minimization of the joint loss (Li & Tang, 2024).

Nothing but `derpp` with the optimizer `sam` as its default.
"""

from flatcl.models._method import ours, ours_online
from flatcl.models.derpp import DerPP
from flatcl.utils.registry import METHODS


@METHODS.register("derpp_sam")
class DerPPSam(DerPP):
    default_optimizer = "sam"
    published = {
        **ours(DerPP.published, "one rho for all methods under SAM", rho=0.1),
        **ours_online("validation split of seq-cifar10, tests/records/cifar10_online", rho=0.01),
    }
