"""One seed, many independent streams of random numbers.

Data order, task transforms, validation split and buffer have generators of their own, so that switching one of them
off does not shift the others. Augmentation (kornia), dropout and initial weights use torch's global generators.
--class_order_seed, --data_order_seed and --init_seed each take one source out of the run's --seed.
"""

import json
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from flatcl.utils.protocols import Config


def seed_of(config: Config, source: str) -> int:
    """The seed of one source of random numbers ('class_order', 'data_order', 'init'): its own, else the run's."""
    own = config.values[f"{source}_seed"]
    return config.seed if own is None else own


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def generator(seed: int, purpose: str) -> np.random.Generator:
    """NumPy generator for one purpose ('order', 'buffer', 'permutation', ...); independent of all others."""
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]))


def generator_state(rng: np.random.Generator) -> str:
    """State of a NumPy generator as JSON text (safe to load without unpickling)."""
    return json.dumps(rng.bit_generator.state)


def set_generator_state(rng: np.random.Generator, state: str) -> None:
    rng.bit_generator.state = json.loads(state)


def global_state() -> dict:
    """States of torch's global generators, of the current device's and the CPU's. Methods and augmentations draw from
    nothing else that is global."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = [torch.cuda.get_rng_state()]
    if torch.backends.mps.is_available():
        state["mps"] = [torch.mps.get_rng_state()]
    return state


def set_global_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0].cpu())
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"][0].cpu())


@contextmanager
def untouched() -> Iterator[None]:
    """Afterwards, the global generators of Python, NumPy and torch stand where they stood before."""
    before, of_python, of_numpy = global_state(), random.getstate(), np.random.get_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        set_global_state(before)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def differ(before: dict, after: dict) -> bool:
    """Whether torch's global generators have been drawn from."""
    pairs = zip(_states(before), _states(after), strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)


def _states(state: dict) -> list[torch.Tensor]:
    return [state["cpu"], *state.get("cuda", []), *state.get("mps", [])]
