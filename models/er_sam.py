"""ER-SAM (Li & Tang, 2024): Experience Replay under sharpness-aware minimization of the joint loss.

Nothing but `er` with the optimizer `sam` as its default.
"""

from flatcl.models._method import ours, ours_online
from flatcl.models.er import ER
from flatcl.utils.registry import METHODS


@METHODS.register("er_sam")
class ErSam(ER):
    default_optimizer = "sam"
    published = {
        **ours(ER.published, "one rho for all methods under SAM", rho=0.1),
        **ours_online("that of derpp_sam", rho=0.01),
    }
