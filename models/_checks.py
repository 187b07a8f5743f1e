"""What a method hands to the engine, checked in words: what is wrong, in one line, or None.

Types, shapes and numbers of rows only, so that no check waits for the device. Each is made once for each form of a step
(names of the terms, sizes of the blocks); those of gradients in the first steps of a task.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def shown(thing: Any) -> str:
    """A thing that should not be there: what it is, and of which shape."""
    if isinstance(thing, Tensor):
        return f"a tensor of shape {tuple(thing.shape)} and {thing.dtype}"
    return "None" if thing is None else f"a {type(thing).__name__}"


def not_steps(thing: Any) -> str:
    return f"steps() must yield the blocks of each step, got {shown(thing)}. Write: yield self.draw(batch)."


def of_blocks(blocks: Any, block_type: type, device: torch.device) -> str | None:
    """`blocks` is what `draw` gave, or `steps`."""
    if not isinstance(blocks, tuple | list):
        return f"draw() must return a tuple of blocks, and steps() yield them, got {shown(blocks)}. Write: (block,)."
    for block in blocks:
        if not isinstance(block, block_type):
            return f"draw() must return a tuple of blocks, got {shown(block)} in it. Write: Block(x, y=y)."
    if all(block.reference for block in blocks):
        return "draw() has given no block for the loss. Return at least one, such as batch.block."
    for number, block in enumerate(blocks):
        what = f"block {number} of draw()"
        if not isinstance(block.x, Tensor) or not block.x.is_floating_point():
            return (
                f"{what} must have inputs x of floats, got {shown(block.x)}. Use batch.inputs, or "
                "self.context.augment(images)."
            )
        if not 0 <= block.memory <= len(block):
            return f"{what} has {len(block)} rows, but memory={block.memory} of them. Give the number of rows."
        for name, column in {"x": block.x, **block.columns}.items():
            if not isinstance(column, Tensor) or column.ndim == 0 or len(column) != len(block):
                return f"{what} has {len(block)} rows, its column '{name}' is {shown(column)}. Give it as many rows."
            if column.device != device:
                return f"{what} has '{name}' on {column.device}, the weights are on {device}. Move it there."
    return None


def of_call(method_loss: Callable, number: int) -> str | None:
    """Whether `method_loss` can be called with so many blocks."""
    signature = inspect.signature(method_loss)
    try:
        signature.bind(*range(number))
    except TypeError:
        return f"draw() has given {number} block(s) for the loss, which loss{signature} cannot take. Make them agree."
    return None


def of_guides(guides: Any) -> str | None:
    """`guides` is what the method has under this name."""
    if not isinstance(guides, Mapping) or any(isinstance(terms, str) for terms in guides.values()):
        return f"guides must be a dict of tuples of terms, got {guides!r}. Write: {{'name': ('term',)}}."
    terms = list(chain(*guides.values()))
    for term in terms:
        if terms.count(term) > 1:
            return f"guides has the term '{term}' twice, got {guides!r}. Its gradient can belong to one guide only."
    return None


def of_update(what: str, update: Any, params: Sequence[Tensor]) -> str | None:
    """`update` is what an optimizer or `combine` makes of gradients."""
    if not isinstance(update, list | tuple) or len(update) != len(params):
        got = f"{len(update)} entries" if isinstance(update, list | tuple) else shown(update)
        return f"{what} must be a list of {len(params)} tensors, one for each parameter, got {got}."
    for part, param in zip(update, params, strict=True):
        if not isinstance(part, Tensor) or part.shape != param.shape:
            return f"{what} must have the shapes of the parameters, {tuple(param.shape)} here, got {shown(part)}."
    return None


def not_a_loss(thing: Any) -> str:
    return (
        f"loss() must return a Loss, got {shown(thing)}. Write: return Loss({{'current': costs}}, logits), with a cost "
        "for each row (reduction='none')."
    )


def of_loss(loss: Any, blocks: tuple, method_loss: Callable) -> str | None:
    """`loss` is what `method_loss` gave for these blocks."""
    about = [*inspect.signature(method_loss).parameters.values()]
    about = ", ".join(f"*{one.name}" if one.kind is one.VAR_POSITIONAL else one.name for one in about)
    for name in loss.unknown:
        remedy = "Its arguments are rows, logits, penalties and outputs."
        if name == "blocks":
            remedy = f"Each term names its own block (one of {about}): Loss({{'name': (block, costs), ...}}, logits)."
        return f"Loss() has no argument '{name}'. {remedy}"
    for kind, given in (("rows", loss.rows), ("penalties", loss.penalties), ("outputs", loss.outputs)):
        if not isinstance(given, Mapping):
            return f"Loss({kind}=...) must be a dict, {{'name': ...}}, got {shown(given)}."
    if not loss.rows and not loss.penalties:
        return "the loss has no terms. Give at least one: Loss({'current': costs}, logits)."
    for name in loss.rows.keys() & loss.penalties.keys():
        return f"'{name}' is a term of the loss's rows and one of its penalties. Rename one of them."
    for what, terms in (("loss term", loss.rows), ("output", loss.outputs)):
        for name, of in terms.items():
            problem = _of_rows(f"the {what} '{name}'", of, blocks, about, is_cost=terms is loss.rows)
            if problem:
                return problem
    for name, term in loss.penalties.items():
        if not isinstance(term, Tensor) or term.ndim or not term.is_floating_point():
            return f"the penalty '{name}' must be a scalar tensor of floats, got {shown(term)}. Sum it up."
    if loss.logits is not None and (not isinstance(loss.logits, Tensor) or loss.logits.ndim != 2):
        return f"Loss(logits=...) must be the stream's logits (N, K), got {shown(loss.logits)}."
    if torch.is_grad_enabled() and not any(term.requires_grad for term in loss.terms.values()):
        return (
            "no term of the loss depends on a weight that is trained: nothing would be learned. Compute the loss "
            "from self.net(block.x), without detach() and no_grad()."
        )
    return None


def _of_rows(what: str, of: Any, blocks: tuple, about: str, is_cost: bool) -> str | None:
    """`of` is the `(block, tensor)` of a term or an output, or the tensor alone where there is only one block."""
    if isinstance(of, tuple):
        if len(of) != 2 or not hasattr(of[0], "memory") or not isinstance(of[1], Tensor):
            return f"{what} must be a pair (block, tensor), got ({', '.join(map(shown, of))})."
        block, tensor = of
        if not any(block is one for one in blocks):
            return f"{what} names a block that loss() was not given. Name one of its arguments ({about}), not a copy."
    elif not isinstance(of, Tensor):
        return f"{what} must be a pair (block, tensor), got {shown(of)}."
    elif len(blocks) > 1:
        return (
            f"{what} does not say which block it is about, and the step has {len(blocks)}. Write the block (one of "
            f"{about}) in each term: {{'name': (block, costs), ...}}."
        )
    else:
        (block,), tensor = blocks, of
    n = len(block)
    if is_cost and tensor.ndim == 0:
        return f"{what} must have a cost for each of the {n} rows of its block, got one number. Use reduction='none'."
    if (is_cost and tensor.ndim != 1) or len(tensor) != n:
        shape = f"({n},)" if is_cost else f"({n}, ...)"
        return f"{what} must have the shape {shape}, with the rows of its block, got {shown(tensor)}."
    if is_cost and not tensor.is_floating_point():
        return f"{what} must be floats, got {shown(tensor)}. It has no gradient."
    return None
