"""Reads the pickled batches of CIFAR without running them.

A pickle is a program for a small stack machine that can call any function of Python. NumPy's constructors alone, called
with odd arguments, read and write memory at any address. So this is that machine with only the instructions that
CIFAR's files need, as Python 2 and 3 and NumPy 1 and 2 write them (protocols 2 to 5), and it calls nothing: NumPy's
names are marks, and an array is a record of its shape and its bytes. Source: Python's `pickletools`.
"""

import enum
import math
import pickle
import struct
from dataclasses import dataclass
from typing import Any

NEWEST_PROTOCOL = 5
MAX_STEPS = 2_000_000  # instructions; CIFAR-100's train, the longest official one, has 200 000. None makes two objects.
MAX_NAME_BYTES = 100


class Refused(ValueError):
    """A pickle that is damaged, or that asks for what no CIFAR file needs. One line."""


@dataclass(eq=False)
class Array:
    """What a file says of an array of uint8. `data` has as many bytes as `shape` asks for; None: not filled in yet."""

    shape: tuple[int, ...] = ()
    order: str = "C"  # or "F"
    data: bytes | None = None


class _Name(enum.Enum):
    ARRAY = enum.auto()
    DTYPE = enum.auto()
    RECONSTRUCT = enum.auto()
    FROMBUFFER = enum.auto()
    ENCODE = enum.auto()


_UINT8 = object()  # stands for numpy.dtype("uint8")
_UINT8_STATE = (3, "|", None, None, None, -1, -1, 0)
_NAMES = {
    ("numpy", "ndarray"): _Name.ARRAY,
    ("numpy", "dtype"): _Name.DTYPE,
    ("numpy.core.multiarray", "_reconstruct"): _Name.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _Name.RECONSTRUCT,  # NumPy 2
    ("numpy.core.numeric", "_frombuffer"): _Name.FROMBUFFER,  # protocol 5
    ("numpy._core.numeric", "_frombuffer"): _Name.FROMBUFFER,
    ("_codecs", "encode"): _Name.ENCODE,  # how Python 3 writes bytes under protocol 2
}
_CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}
_NUMBERS = {pickle.BININT: (4, True), pickle.BININT1: (1, False), pickle.BININT2: (2, False)}  # bytes, signed
_BYTES = {  # bytes of the length that stands before them
    pickle.SHORT_BINSTRING: 1, pickle.BINSTRING: 4, pickle.SHORT_BINBYTES: 1, pickle.BINBYTES: 4,
    pickle.BINBYTES8: 8, pickle.BYTEARRAY8: 8,
}  # fmt: skip
_TEXTS = {pickle.SHORT_BINUNICODE: 1, pickle.BINUNICODE: 4, pickle.BINUNICODE8: 8}
_TUPLES = {pickle.EMPTY_TUPLE: 0, pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}


def read(data: bytes) -> Any:
    """The value of a pickle: None, numbers, text, bytes (also for Python 2's strings), tuples, lists, dicts with keys
    of text or bytes, and `Array`. Raises `Refused`.

    Memory is bounded by the file's length and `MAX_STEPS`. Values may be nested to any depth and contain themselves, so
    whoever gets them must not print, compare or hash what is nested.
    """
    machine = _Machine(data)
    try:
        for _ in range(MAX_STEPS):
            code = machine.take(1)
            if code == pickle.STOP:
                return machine.stack.pop()
            machine.step(code)
    except IndexError:
        raise Refused("takes a value where there is none") from None
    except UnicodeError:
        raise Refused("has text in an unknown encoding") from None
    raise Refused(f"has more than {MAX_STEPS:,} instructions")


class _Machine:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}
        self.encoded = 0

    def take(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise Refused("ends too early")
        return self.data[start : self.at]

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def step(self, code: bytes) -> None:
        stack = self.stack
        if code in _BYTES:
            stack.append(self.take(self.number(_BYTES[code])))
        elif code in _TEXTS:
            stack.append(self.take(self.number(_TEXTS[code])).decode())
        elif code in _NUMBERS:
            stack.append(self.number(*_NUMBERS[code]))
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _TUPLES:
            stack.append(tuple([stack.pop() for _ in range(_TUPLES[code])][::-1]))
        else:
            self.step_rarely(code)

    def step_rarely(self, code: bytes) -> None:
        stack, memo = self.stack, self.memo
        match code:
            case pickle.BINPUT:
                memo[self.number(1)] = stack[-1]
            case pickle.LONG_BINPUT:
                memo[self.number(4)] = stack[-1]
            case pickle.MEMOIZE:
                memo[len(memo)] = stack[-1]
            case pickle.BINGET:
                stack.append(self.remembered(self.number(1)))
            case pickle.LONG_BINGET:
                stack.append(self.remembered(self.number(4)))
            case pickle.MARK:
                self.marks.append(len(stack))
            case pickle.EMPTY_LIST:
                stack.append([])
            case pickle.EMPTY_DICT:
                stack.append({})
            case pickle.TUPLE:
                stack.append(tuple(self.since_mark()))
            case pickle.APPEND:
                self.extend([stack.pop()])
            case pickle.APPENDS:
                self.extend(self.since_mark())
            case pickle.SETITEM:
                self.set([stack.pop(), stack.pop()][::-1])
            case pickle.SETITEMS:
                self.set(self.since_mark())
            case pickle.GLOBAL:
                stack.append(self.name(self.line(), self.line()))
            case pickle.STACK_GLOBAL:
                name, module = stack.pop(), stack.pop()
                stack.append(self.name(module, name))
            case pickle.REDUCE:
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.call(function, arguments))
            case pickle.BUILD:
                state = stack.pop()
                self.build(stack[-1], state)
            case pickle.LONG1:
                stack.append(self.number(self.number(1), signed=True))
            case pickle.BINFLOAT:
                stack.append(struct.unpack(">d", self.take(8))[0])
            case pickle.PROTO:
                if (protocol := self.number(1)) > NEWEST_PROTOCOL:
                    raise Refused(f"has protocol {protocol}, newer than {NEWEST_PROTOCOL}")
            case pickle.FRAME:
                self.take(8)  # the length of what follows, for readers of streams
            case _:
                raise Refused(f"has instruction {code!r}, which no CIFAR file of the protocols 2 to 5 needs")

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + MAX_NAME_BYTES)
        if end < 0:
            raise Refused("has a name without end")
        return self.take(end + 1 - self.at)[:-1].decode()

    def remembered(self, key: int) -> Any:
        if key not in self.memo:
            raise Refused("asks for a value that it did not keep")
        return self.memo[key]

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise Refused("appends to something that is not a list")
        self.stack[-1].extend(values)

    def set(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or len(items) % 2:
            raise Refused("sets items of something that is not a dict")
        keys, values = items[::2], items[1::2]
        if not all(isinstance(key, str | bytes) for key in keys):  # the hash of nested tuples can take for ever
            raise Refused("has a key that is not text")
        self.stack[-1].update(zip(keys, values, strict=True))

    def name(self, module: Any, name: Any) -> _Name:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Refused("asks for a name that is not text")
        if (module, name) not in _NAMES:
            raise Refused(f"asks for {f'{module}.{name}'[: 2 * MAX_NAME_BYTES]!r}, which no CIFAR file needs")
        return _NAMES[module, name]

    def call(self, function: Any, arguments: Any) -> Any:
        """What the function would return, of a few forms of arguments."""
        match function, arguments:
            case (_Name.RECONSTRUCT, (_Name.ARRAY, (0,), "b" | b"b")):
                return Array()
            case (_Name.DTYPE, ("u1" | b"u1", 0, 1)):
                return _UINT8
            case (_Name.DTYPE, (str() | bytes() as other, _, _)):
                raise Refused(f"has an array of type {other[:20]!r}, not a uint8 array")
            case (_Name.FROMBUFFER, (bytes() as data, dtype, tuple() as shape, "C" | "F" as order)) if dtype is _UINT8:
                return _filled(Array(), shape, order, data)
            case (_Name.ENCODE, (str() as text, "latin1")):
                self.encoded += len(text)
                if self.encoded > len(self.data):  # one text, encoded again and again
                    raise Refused("would need more memory than its length")
                return text.encode("latin-1")
        raise Refused("makes an array in a way that no CIFAR file does")

    def build(self, target: Any, state: Any) -> None:
        """What `__setstate__` would do."""
        if target is _UINT8:
            if not isinstance(state, tuple) or (*state[:1], *map(_text, state[1:2]), *state[2:]) != _UINT8_STATE:
                raise Refused("has an array of a type other than plain uint8")
            return
        match target, state:
            case (Array(data=None), (1, tuple() as shape, dtype, 0 | 1 as is_fortran, bytes() as data)):
                if dtype is _UINT8:
                    _filled(target, shape, "F" if is_fortran else "C", data)
                    return
        raise Refused("fills an array in a way that no CIFAR file does")


def _filled(array: Array, shape: tuple, order: str, data: bytes) -> Array:
    if len(shape) > 4 or not all(isinstance(size, int) and 0 <= size <= len(data) for size in shape):
        raise Refused(f"has an array whose shape does not fit its {len(data)} bytes")
    if math.prod(shape) != len(data):
        raise Refused(f"has an array of shape {shape} with {len(data)} bytes")
    array.shape, array.order, array.data = shape, order, data
    return array


def _text(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value
