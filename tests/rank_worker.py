"""One of several processes that train small runs together, for `tests/test_ranks.py`: torchrun ... rank_worker.py FILE.

FILE holds a list of command lines, as JSON. Of each, rank 0 adds what a trainer has after so many steps to FILE.pt: its
weights, BatchNorm's averages, the memory's columns, the costs. Called without torchrun, it is a single process.
"""

import json
import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flatcl.utils import launch
from flatcl.utils.arguments import resolve
from flatcl.utils.console import leave
from flatcl.utils.engine import ranks
from flatcl.utils.engine.build import build
from flatcl.utils.registry import BACKBONES

STEPS = 50


class Smooth(nn.Module):
    """No kinks: where an input of ReLU is next to 0, another order of sums is another gradient."""

    def __init__(self, shape, num_classes, args=None):
        super().__init__()
        self.num_features = 20
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 20), nn.Tanh())
        self.classifier = nn.Linear(20, num_classes)

    @property
    def stages(self):
        return [(self.body[:2], torch.tanh), (self.classifier, nn.Identity())]

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.classifier(self.body(x))


def trained(argv, group=None):
    """What is left of 50 steps: two tasks, so that there is a memory in those methods that fill it at a task's end."""
    BACKBONES.register("smooth")(Smooth)
    config = resolve([*argv, "--disable_log", "--non_verbose"])
    trainer = build(config, torch.device("cpu"), None, group)
    observe, done = trainer.method.observe, []

    def counted(batch, optimizer, trace=False):
        done.append(observe(batch, optimizer, trace))
        if len(done) == STEPS:
            raise StopIteration
        return done[-1]

    trainer.method.observe = counted
    try:
        trainer.run()
    except StopIteration:
        pass
    buffer = getattr(trainer.method, "buffer", None)
    if group is not None:  # the memory is the same everywhere, not only the weights
        for column in buffer.all().values() if buffer is not None else ():
            assert group.are_equal(column.double().flatten())
    return {
        "weights": torch.cat([p.detach().flatten() for p in trainer.method.parameters()]),
        "averages": [b.clone() for b in trainer.method.net.buffers() if b.is_floating_point()],
        "memory": {} if buffer is None else {name: column.clone() for name, column in buffer.all().items()},
        "rows": [trainer.cost.forward_rows, trainer.cost.backward_rows],
        "accuracy": trainer.progress.accuracy,
        "steps": len(done),
    }


def main(file):
    torch.set_num_threads(1)
    with ranks.joined(torch.device("cpu")) as group:
        found = [trained(argv, group) for argv in json.loads(Path(file).read_text())]
    if launch.number() == 0:
        torch.save(found, f"{file}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
    leave(0)
