"""A-GEM-R (Buzzega et al., NeurIPS 2020): A-GEM whose memory is a reservoir, so that it needs no task boundaries.

As in the code behind the paper, replayed images are neither augmented nor normalised.
"""

from flatcl.models._method import Batch, Block, published
from flatcl.models._replay import ReplayMethod
from flatcl.models.agem import AGem
from flatcl.models.sgd import DER
from flatcl.utils.registry import METHODS


@METHODS.register("agem_r")
class AGemR(AGem):
    settings = ReplayMethod.settings
    fixed_policy = None
    Args = ReplayMethod.Args
    own_memory = False
    replays_as_stored = True
    published = AGem.published | published(
        DER,
        {
            ("mnist-360", 200, 500): dict(lr=0.1, batch_size=16, minibatch_size=128, n_epochs=1),
            ("mnist-360", 1000): dict(lr=0.1, batch_size=4, minibatch_size=128, n_epochs=1),
        },
    )

    def draw(self, batch: Batch) -> tuple[Block, ...]:
        if len(self.buffer) == 0:
            return (batch.block,)
        rows = self.buffer.draw(self.args.minibatch_size)
        pixels = rows["x"].float().div_(255)
        return (batch.block, Block(pixels, len(pixels), reference=True, y=rows["y"], ids=rows["ids"]))

    phase = AGem.phase

    remember = ReplayMethod.remember
    end_task = ReplayMethod.end_task
