"""Small runs in memory, for the contracts: on seq-synth, with a tiny network that has BatchNorm."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from flatcl.datasets import DomainBenchmark
from flatcl.models import Batch, Block, Method
from flatcl.utils.arguments import args_of, flags_of, resolve
from flatcl.utils.engine.build import build
from flatcl.utils.engine.trainer import Trainer
from flatcl.utils.registry import BACKBONES, DATASETS, METHODS


class Skipped(Exception):
    """A contract that cannot be asked for here, and why."""


class Broken(AssertionError):
    """A contract that is not kept: what is wrong, and what to do."""


def expect(is_so: Any, otherwise: str) -> None:
    if not is_so:
        raise Broken(otherwise)


def difference(a: Any, b: Any, where: str = "it") -> str | None:
    """Where nested containers of tensors and plain values are not equal bit for bit; None: nowhere."""
    if type(a) is not type(b):
        return f"{where} is a {type(a).__name__}, and a {type(b).__name__}"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where} has other keys: {', '.join(map(str, sorted(a.keys() ^ b.keys(), key=str)))}"
        pairs = [(a[key], b[key], f"{where}[{key!r}]") for key in a]
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{where} has {len(a)} entries, and {len(b)}"
        pairs = [(left, right, f"{where}[{i}]") for i, (left, right) in enumerate(zip(a, b, strict=True))]
    else:
        return None if _are_equal(a, b) else f"{where} differs"
    return next((found for pair in pairs if (found := difference(*pair))), None)


def _are_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


class TinyBn(nn.Sequential):
    """A convolution with bias, BatchNorm and a linear layer."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int, args: Any = None):
        channels, height, width = shape
        super().__init__(
            nn.Conv2d(channels, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * ((height + 1) // 2) * ((width + 1) // 2), num_classes),
        )
        self.num_features = self[-1].in_features

    @property
    def stages(self) -> list[tuple[Callable, Callable]]:
        conv, norm, _, flatten, classifier = self
        return [(lambda x: norm(conv(x)), relu), (lambda x: classifier(flatten(x)), nn.Identity())]

    def features(self, x: Tensor) -> Tensor:
        for layer in list(self)[:-1]:
            x = layer(x)
        return x


def start(model: str, **flags: Any) -> Trainer:
    """A trainer that writes nothing, as the command line would build it."""
    _register_parts()
    flags = {
        "model": model, "dataset": "seq-synth", "backbone": "tiny-bn", "device": "cpu", "threads": 1,
        "disable_log": 1, "non_verbose": 1, **flags,
    }  # fmt: skip
    config = resolve([f"--{name}={value}" for name, value in flags.items()])
    return build(config, torch.device("cpu"), None)


def _register_parts() -> None:
    """The network, and seq-synth with tasks of unequal size and as domains, under names that can be chosen."""
    synth = DATASETS.load("seq-synth")

    class Unequal(synth):
        task_sizes = (2, 5, 3)

    class Domains(DomainBenchmark):
        num_classes, shape, mean, std, defaults = synth.num_classes, synth.shape, synth.mean, synth.std, synth.defaults
        load, augmentations = synth.load, synth.augmentations

        def pixel_map(self, index: int) -> Tensor:
            return torch.arange(self.shape[1] * self.shape[2]).roll(index)

    BACKBONES.register("tiny-bn")(TinyBn)
    DATASETS.register("unequal-synth")(Unequal)
    DATASETS.register("domain-synth")(Domains)


def setting_of(name: str) -> dict[str, str]:
    """Flags of a small benchmark that the method can learn."""
    settings = METHODS.load(name).settings
    if "class-il" in settings:
        return {}
    if "domain-il" in settings:
        return {"dataset": "domain-synth"}
    raise Skipped(f"it learns {', '.join(settings)} alone, for which there is no benchmark in memory")


def begin(name: str, **flags: Any) -> Trainer:
    """`start` on a benchmark that the method can learn."""
    return start(name, **setting_of(name), **flags)


def quick(name: str) -> dict[str, int]:
    """Flags of a run over two tasks of five batches; of a joint one, over all at once."""
    return {"debug_mode": 1} if METHODS.load(name).trains_jointly else {"debug_mode": 1, "stop_after": 2}


def flags_for(name: str, **flags: Any) -> dict[str, Any]:
    """Those flags that the method has."""
    args = args_of(METHODS.load(name))
    known = flags_of(args, name) if args else {}
    return {key: value for key, value in flags.items() if key in known}


def next_batch(trainer: Trainer, task: int = 1) -> Batch:
    if trainer.method.loss_needs_task:  # the one after those that are done
        task += 1
        trainer.method.begin_task(trainer.benchmark[task])
    return next(trainer.stream.epoch(trainer.benchmark[task].train))


def last_step(method: Method, batch: Batch) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """The blocks of the last optimizer step on a batch: those of its loss, and those that are apart."""
    *_, blocks = method.steps(batch)
    return tuple(b for b in blocks if not b.apart), tuple(b for b in blocks if b.apart)


def global_generators() -> dict[str, Any]:
    """States of the global generators of torch, Python and NumPy."""
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}


def set_global_generators(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
