"""A recorder for the CPU that does what a CUDA graph does: it keeps the operations with the memory that they read and
write, and a replay repeats them there, without the Python code that made them. As with a graph, numbers that Python
passed are a part of it, a tensor that is made anew for each step is not seen, and nothing may wait for a value.

Recording computes; what it has written into memory that was there before is put back, since a graph records without
computing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
WAITS = {  # what a GPU could not do without asking the host, or being asked by it
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.lift_fresh.default,
    aten._unique2.default, aten.equal.default, aten.repeat_interleave.Tensor, aten.bincount.default,
}  # fmt: skip
SILENT = {aten.native_batch_norm.default}  # writes running averages, which its schema does not say


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _own(thing: Any) -> Any:
    """A tensor at its present memory: the parameter itself may be elsewhere when it is replayed."""
    return thing.detach() if isinstance(thing, Tensor) else thing


class Tape(TorchDispatchMode):
    """`Tape()(operations)` records what the function does and returns a function that repeats it."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple[Callable, tuple, dict, list[Tensor]]] = []
        self.made: set[int] = set()  # memory of the tape's own
        self.alive: list[Tensor] = []  # so that no memory is used twice
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # memory that was there: (all of it, what it held)

    def __call__(self, operations: Callable[[], Any]) -> Callable[[], None]:
        tape = Tape()
        try:
            with tape:
                operations()
        finally:
            for whole, content in tape.before.values():
                whole.copy_(content)
        return tape.replay

    def renew(self) -> None:
        """Nothing is shared."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for position, argument in enumerate(func._schema.arguments):
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(given):
                    self._keep(tensor)
        if func in SILENT:
            self._keep(args[3]), self._keep(args[4])
        inputs = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        here = tree_map(_own, (args, kwargs))
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        fresh = [output.detach() for output in outputs if _memory(output) not in inputs]
        self.made |= set(map(_memory, fresh))
        self.alive += fresh
        if fresh or func._schema.is_mutable:
            self.operations.append((func, *here, [output.detach() for output in outputs]))
        return result

    def _keep(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor) and _memory(tensor) not in self.made and _memory(tensor) not in self.before:
            storage = tensor.untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (len(storage),))
            self.before[_memory(tensor)] = (whole, whole.clone())

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.operations:
            result = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for old, new in zip(outputs, result, strict=True):
                if _memory(old) != _memory(new):
                    old.copy_(new)
