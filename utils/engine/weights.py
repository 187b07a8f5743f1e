"""Weights that a network begins with (--pretrained_weights), and parts of it that stay as they are (--freeze_backbone).

A file of weights is read without running any code that it may hold.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatcl.models._incremental import classifier_of
from flatcl.utils.console import reason
from flatcl.utils.errors import UsageError
from flatcl.utils.extras import require
from flatcl.utils.files import open_regular, user_path

BEFORE = {"module", "net", "backbone", "body"}  # words that stand before the names of a network within another
SHOWN = 5  # names of a kind in a message


def read(file: str) -> dict[str, Tensor]:
    """The state dict of a safetensors file, or of one that torch has saved, alone or as the entry `state_dict` or
    `model` of a checkpoint. Raises `UsageError`."""
    what = f"--pretrained_weights {file}"
    path = user_path(file)
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except UsageError:
        raise
    except Exception as error:  # damaged and foreign files fail in many ways
        raise UsageError(
            f"{what}: {_why(error)}. Give a state dict that has only tensors, or a safetensors file."
        ) from None
    for entry in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
    if not isinstance(content, dict) or not content:
        raise UsageError(f"{what}: it must be a state dict, got {type(content).__name__}. Save net.state_dict().")
    odd = [name for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if odd:
        raise UsageError(
            f"{what}: not a state dict, since {_some(odd)} is not a tensor with a name. Save net.state_dict()."
        )
    return content


def _read_torch(path: Any) -> Any:
    with open_regular(path) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it doubts of a foreign file, it refuses in the end
        return torch.load(opened, map_location="cpu", weights_only=True)


def _read_safetensors(path: Any) -> dict[str, Tensor]:
    require("safetensors", "timm", f"--pretrained_weights {path}")
    from safetensors.torch import load_file

    return load_file(path)


def _why(error: Exception) -> str:
    """In a few words; torch's own message advises to run the code."""
    if "weights_only" in str(error) or "Weights only" in str(error):
        return "it is damaged, or it has objects whose code would have to be run, which is refused"
    return f"it cannot be read as weights ({reason(error).split('. ')[0]})"


def put(state: Mapping[str, Tensor], net: nn.Module, file: str, backbone: str) -> str:
    """Loads a state dict into a network; returns a note of what was loaded. Names may be the network's own or, of a
    network of another package (`published_names`), those that it has there, below a common prefix of `BEFORE`.

    A classifier that is missing or of another shape is left as drawn. Raises `UsageError` for all else that misfits.
    """
    own, adapted = net.state_dict(), getattr(net, "adapted", None)
    state = state if adapted is None else adapted(state)
    prefix, names = max(
        ((prefix, names) for prefix in sorted(_prefixes(state)) for names in _namings(net, own)),
        key=lambda pair: (sum(pair[0] + name in state for name in pair[1].values()), -len(pair[0])),
    )
    found = {name: state[prefix + there] for name, there in names.items() if prefix + there in state}
    fresh = _fresh(net, own, found)
    missing = [names[name] for name in own if name not in found and name not in fresh and not _counts(name)]
    others = {name.removeprefix(prefix) for name in state if name.startswith(prefix)} - {*names.values()}
    reshaped = [
        f"{names[name]} {_shape(value)}, here {_shape(own[name])}"
        for name, value in found.items()
        if name not in fresh and value.shape != own[name].shape
    ]
    kinds = {"missing": missing, "unexpected": sorted(others), "of another shape": reshaped}
    misfits = [f"{len(odd)} {kind} ({_some(odd)})" for kind, odd in kinds.items() if odd]
    if misfits:
        raise UsageError(
            f"--pretrained_weights {file} does not match --backbone {backbone}: {'; '.join(misfits)}. Give weights "
            "of this network."
        )
    loaded = {name: value for name, value in found.items() if name not in fresh}
    net.load_state_dict(loaded, strict=False)
    outside = sum(not name.startswith(prefix) for name in state)
    rest = f"; {outside} tensors of the file are not used" if outside else ""
    return f"note: {len(loaded)} tensors of {file} loaded into {backbone}" + _left(own, found, fresh) + rest


def _prefixes(names: Iterable[str]) -> set[str]:
    """'', 'module.', 'module.net.' ...: all that stand before names."""
    found = {""}
    for name in names:
        prefix = ""
        for word in name.split("."):
            if word not in BEFORE:
                break
            prefix += f"{word}."
            found.add(prefix)
    return found


def _namings(net: nn.Module, own: Iterable[str]) -> Iterator[Mapping[str, str]]:
    """{name in the network: name in a file}, each way of naming."""
    yield {name: name for name in own}
    published: Any = getattr(net, "published_names", None)
    if published is not None:
        yield published


def _fresh(net: nn.Module, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """The names of the classifier, where not all of it can be loaded."""
    layer, classifier = _classifier(net)
    names = [f"{layer}.{name}" for name in classifier.state_dict()]
    fits = all(name in found and found[name].shape == own[name].shape for name in names)
    return [] if fits else names


def _classifier(net: nn.Module) -> tuple[str, nn.Module]:
    """(name, layer) of the classifier; an empty layer where a network has none."""
    has_linear = any(isinstance(layer, nn.Linear) for layer in net.modules())
    return classifier_of(net) if has_linear else ("", nn.Identity())


def _counts(name: str) -> bool:
    """Whether it is BatchNorm's counter, which old files lack."""
    return name.endswith("num_batches_tracked")


def _left(own: Mapping[str, Tensor], found: Mapping[str, Tensor], fresh: list[str]) -> str:
    if not fresh:
        return ""
    there = _shape(found[fresh[0]]) if fresh[0] in found else "none"
    return f"; the classifier keeps its random weights (in the file {there}, here {_shape(own[fresh[0]])})"


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a number"


def _some(names: list[Any]) -> str:
    return ", ".join(map(str, names[:SHOWN])) + (" ..." if names[SHOWN:] else "")


def freeze(net: nn.Module) -> None:
    """From now on the classifier alone is trained. All else is marked `is_frozen`: it stays in eval mode while a method
    is in train mode (`Method.train`), and so do its copies. Raises `UsageError` where there is no classifier."""
    _, classifier = _classifier(net)
    if not [*classifier.parameters()]:
        raise UsageError("--freeze_backbone 1 needs a network with a Linear layer, its classifier. Choose another.")
    net.requires_grad_(False)
    classifier.requires_grad_(True)
    kept = {*classifier.modules()}
    for part in net.modules():
        vars(part)["is_frozen"] = part not in kept
