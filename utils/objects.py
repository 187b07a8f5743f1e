"""What an object of a user's own is: its settings as a text that is the same in each process, and its code.

A network or an augmentation that is given as an object has no file that says what it is. It is described by its
attributes, and those of all that it holds: two objects of one class that compute other things have other texts.
"""

import functools
import hashlib
import re
import sys
from collections.abc import Callable, Iterable
from enum import Enum
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flatcl.utils.identity import DIGITS, digest_of_code

LIBRARIES = sys.stdlib_module_names | {"torch", "kornia", "numpy"}  # whose code does not count
BASE = vars(nn.Module()).keys()  # attributes of every module: described otherwise, or of no effect on a run
PLAIN = (bool, int, float, complex, str, bytes, Enum, torch.dtype)


class Description:
    """`text`: settings. `code`: {'class NAME' or 'function NAME': digest} of what no library brings, by which the
    object computes."""

    def __init__(self, value: Any):
        self._seen: dict[int, tuple[int, Any]] = {}  # by id; kept, so that no id is given twice
        self._digests: dict[str, list[str]] = {}
        self.text = self._of(value)

    @property
    def code(self) -> dict[str, str]:
        return {name: found[0] if len(found) == 1 else _digest(" ".join(found)) for name, found in
                sorted(self._digests.items())}  # fmt: skip

    def _of(self, value: Any) -> str:
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, PLAIN):
            return repr(value)
        if isinstance(value, Tensor | np.ndarray):
            return _numbers(value)
        if isinstance(value, torch.device):
            return "device"  # where something lies changes no number
        if isinstance(value, tuple):
            return f"{type(value).__name__}({self._all(value)})"
        if isinstance(value, set | frozenset):
            return f"set({sorted(map(self._of, value))})"
        if isinstance(value, type):
            return self._class(value)
        if id(value) in self._seen:
            return f"#{self._seen[id(value)][0]}"  # it may hold itself
        self._seen[id(value)] = len(self._seen), value
        return self._object(value)

    def _object(self, value: Any) -> str:
        """Of something that may hold itself."""
        if isinstance(value, list):
            return f"[{self._all(value)}]"
        if isinstance(value, dict):
            return f"{{{', '.join(sorted(f'{self._of(key)}: {self._of(item)}' for key, item in value.items()))}}}"
        if isinstance(value, functools.partial):
            return f"partial({self._all((value.func, value.args, value.keywords))})"
        if isinstance(value, MethodType):
            return f"method({self._all((value.__func__, value.__self__))})"
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, ModuleType):
            return value.__name__
        if isinstance(value, nn.Module):
            return self._module(value)
        if hasattr(value, "__wrapped__"):
            return f"{type(value).__name__}({self._of(value.__wrapped__)})"
        attributes = _attributes_of(value)
        if _is_of_library(type(value)) or attributes is None:
            return _shown(value)
        return f"{self._class(type(value))} {self._attributes(attributes)}"

    def _all(self, values: Iterable[Any]) -> str:
        return ", ".join(map(self._of, values))

    def _attributes(self, attributes: dict[str, Any]) -> str:
        return ", ".join(f"{name}={self._of(value)}" for name, value in sorted(attributes.items()))

    def _module(self, net: nn.Module) -> str:
        """With its parts, their attributes, parameters and buffers."""
        lines = [_shown(net)]
        for name, part in net.named_modules():
            lines.append(f"{name}: {self._class(type(part))} {self._attributes(_settings(part))}")
        lines += [f"{name} {p.requires_grad} {_numbers(p)}" for name, p in net.named_parameters()]
        lines += [f"{name} {_numbers(buffer)}" for name, buffer in net.named_buffers()]
        return "\n".join(lines)

    def _class(self, cls: type) -> str:
        """Its code, and that of its bases, is noted."""
        for base in cls.__mro__:
            if not _is_of_library(base):
                self._note(f"class {base.__qualname__}", digest_of_code(base))
        return _name(cls)

    def _function(self, function: FunctionType) -> str:
        """With what it has from where it was made."""
        if _is_of_library(function):
            return _name(function)
        self._note(f"function {function.__qualname__}", digest_of_code(function))
        cells = [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
        return f"{_name(function)} {self._all((function.__defaults__, function.__kwdefaults__, cells))}"

    def _note(self, name: str, digest: str) -> None:
        known = self._digests.setdefault(name, [])
        if digest not in known:
            known.append(digest)


def _attributes_of(value: Any) -> dict[str, Any] | None:
    """Also those that its class names in `__slots__`; None for what keeps its state elsewhere."""
    slots = [vars(base).get("__slots__", ()) for base in type(value).__mro__]
    names = [name for own in slots for name in ([own] if isinstance(own, str) else own)]
    found = {name: getattr(value, name) for name in names if hasattr(value, name)}
    return {**found, **vars(value)} if hasattr(value, "__dict__") else found if names else None


def _settings(part: nn.Module) -> dict[str, Any]:
    """Attributes of a module, without what it holds as a module. Names with _ are those under which torch and kornia
    keep what a call has drawn or computed; kornia's containers keep the type of what they were called with."""
    own = {name: value for name, value in vars(part).items() if name not in BASE and name != "input_dtype"}
    if not _is_of_library(type(part)) and not any(_root(base) == "kornia" for base in type(part).__mro__):
        return own
    kept = () if _is_of_library(type(part)) else PLAIN
    return {name: value for name, value in own.items() if not name.startswith("_") or isinstance(value, kept)}


def _root(thing: Any) -> str:
    return str(thing.__module__).partition(".")[0]


def _is_of_library(thing: type | Callable) -> bool:
    return _root(thing) in LIBRARIES


def _name(thing: Any) -> str:
    """Of a class or function. A user's may lie in `__main__` in one process and in a module in another."""
    return f"{thing.__module__}.{thing.__qualname__}" if _is_of_library(thing) else thing.__qualname__


def _shown(value: Any) -> str:
    """Its repr without where it lies in the memory of this process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _numbers(array: Tensor | np.ndarray) -> str:
    """Type, shape and, where they can be read, a digest of the values of an array, on whichever device."""
    text = f"{array.dtype} {tuple(array.shape)}"
    if isinstance(array, Tensor):
        if array.layout != torch.strided or array.is_meta:
            return text
        array = array.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
    elif array.dtype.hasobject:
        return text
    return f"{text} {hashlib.sha256(array.tobytes()).hexdigest()}"


def _is_empty(cell: Any) -> bool:
    """Whether what it stands for is not there yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
