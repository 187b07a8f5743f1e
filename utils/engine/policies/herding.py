"""Herding (iCaRL, Rebuffi et al., CVPR 2017, algorithm 4): when a task ends, the rows nearest to the class means.

Each class has room for buffer_size // (classes seen) rows. Those of a new class are chosen from all its rows of the
task, by features of the un-augmented images in eval mode, which are not normalised; old classes keep their first. If
classes come back (domain-il), those of each task count as new classes. Stored logits are of the un-augmented
images in eval mode, of the network as it is when the task ends, unlike those of streaming policies. The passes are
counted. Until the first task ends, the memory is empty.
"""

import numpy as np
import torch

from flatcl.models._herding import herded
from flatcl.utils.engine.policies._policy import Policy
from flatcl.utils.registry import BACKBONES, POLICIES


@POLICIES.register("herding")
class Herding(Policy):
    def __init__(self, num_classes=0):
        super().__init__(num_classes)
        self.sizes: list[int] = []  # rows of each class of each task, as they lie in the memory

    @classmethod
    def check(cls, config, benchmark):
        problems = []
        if benchmark.setting == "general-continual" or config.joint:
            what = "a joint run" if config.joint else benchmark.name
            problems.append(
                f"--buffer_policy herding chooses images when a task ends, to replay them in the next one: {what} has "
                "one task only. Choose another policy."
            )
        if not hasattr(BACKBONES.load(config.backbone), "features"):
            problems.append(
                f"--buffer_policy herding needs a backbone with `features`, {config.backbone} has none. Choose another."
            )
        needed = benchmark.num_classes * (config.n_tasks if benchmark.setting == "domain-il" else 1)
        if config.buffer_size < needed and not problems:
            problems.append(
                f"--buffer_policy herding needs room for one image of each of the {needed} classes of all tasks of "
                f"{benchmark.name}, got --buffer_size {config.buffer_size}. Give more."
            )
        return problems

    def place(self, buffer, n, labels=None):
        return np.full(n, buffer.capacity)

    @torch.no_grad()
    def end_task(self, method, task):
        buffer, split, device = method.buffer, task.train, method.context.device
        number = buffer.capacity // (len(self.sizes) + len(task.classes))
        starts = np.cumsum([0, *self.sizes])
        sizes = [min(number, size) for size in self.sizes]
        kept = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        parts = [buffer.take(np.concatenate(kept))] if len(buffer) else []
        for label in task.classes:
            rows = herded(method, split, label, number)
            sizes.append(len(rows))
            if len(rows):
                x, y, ids = (column[rows].to(device) for column in (split.images, split.labels, split.ids))
                logits = method.outputs_of(method.net, x) if method.keeps_logits else None
                parts.append(method.columns(x, y, ids, logits))
        buffer.replace(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        self.sizes = sizes

    def state_dict(self):
        return {"sizes": list(self.sizes)}

    def load_state_dict(self, state):
        self.sizes = list(state["sizes"])
