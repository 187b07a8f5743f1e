"""What a run is called where many runs stand beside each other: in TensorBoard, in trackers, in the titles of pictures.

Everything follows from the values of the flags, not from where they came from: a run that is resumed keeps its names.
"""

from typing import Any

from flatcl.utils.arguments import SELECTORS, Config, written
from flatcl.utils.registry import canonical

HASH_DIGITS = 6  # of 12: enough to find the run folder by, whose name ends with the whole hash
MOST = 5  # further flags in a title


def run_name(config: Config) -> str:
    """`er-looksam-500-s1-3f2a9c`: model, optimizer unless it is the method's default, buffer size, seed, hash."""
    parts = [config.model, *_optimizer(config), *_memory(config), f"s{config.seed}", config.hash[:HASH_DIGITS]]
    return "-".join(map(str, parts))


def title(config: Config, of: str) -> str:
    """Two lines for a picture `of` something: method and benchmark; what differs from the defaults, and the seed."""
    further = [f"{name} {written(value)}" for name, value in changed(config).items()
               if name not in (*SELECTORS, "seed", "buffer_size")]  # fmt: skip
    if len(further) > MOST:
        further = [*further[:MOST], "..."]
    parts = [*_optimizer(config), *(f"memory {size}" for size in _memory(config)), f"seed {config.seed}", *further]
    return f"{config.model} on {config.dataset}, {of}\n{', '.join(parts)}"


def changed(config: Config) -> dict[str, Any]:
    """The flags that can change a number and have another value than benchmark, protocol, method and optimizer give by
    default. Not the method and the benchmark, which have none."""
    benchmark = config.benchmark
    defaults = {name: flag.default for name, flag in config.flags.items()}
    defaults |= {"backbone": benchmark.default_backbone, "optimizer": config.learner.default_optimizer}
    defaults |= benchmark.defaults | benchmark.protocols.get(config.protocol or "", {})
    defaults |= SELECTORS["optimizer"].load(config.optimizer).defaults
    found = {}
    for name, flag in config.flags.items():
        default, value = defaults[name], config.values[name]
        default = tuple(default) if isinstance(default, list) else default
        is_same = canonical(value) == canonical(default) if name == "optimizer" else value == default
        if flag.result and not is_same and name not in ("model", "dataset"):
            found[name] = value
    return found


def _optimizer(config: Config) -> list[str]:
    return [config.optimizer] if "optimizer" in changed(config) else []


def _memory(config: Config) -> list[int]:
    """[images in memory]; [] for a method without one."""
    size = config.values.get("buffer_size")
    return [] if size is None else [size]
