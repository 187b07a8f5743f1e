"""A look at a benchmark's augmentations before training: does each image get a draw of its own, and nothing else?

The stream is augmented a chunk of the epoch at a time, hundreds of images in one call, whatever the batch size. A
transform that draws once a call, as torchvision's do and kornia's with `same_on_batch`, would thus give many batches
one draw. So each transform is shown copies of one image: if it draws and the copies come out alike, it is refused.
"""

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import kornia.augmentation as K
import numpy as np
import torch
from kornia.augmentation.auto import PolicyAugmentBase
from torch import Tensor, nn

from flatcl.utils.engine import seeding
from flatcl.utils.engine.augment import Augment
from flatcl.utils.errors import UsageError

ROWS = 16  # images of a look
CALLS = 30  # until a transform that draws, but has left all copies alike, counts as one that has no effect

Transform = Callable[[Tensor], Tensor]


def pipeline(benchmark: Any) -> list[Transform]:
    """What `augmentations` returns as a flat list: a single transform is a list of one, a `Compose` or
    `nn.Sequential` the list of its parts. Raises `UsageError` where something cannot be called."""
    return list(_flat(benchmark.name, benchmark.augmentations()))


def _flat(name: str, given: Any) -> Iterator[Transform]:
    if isinstance(given, list | tuple) or type(given) in (nn.Sequential, nn.ModuleList):
        parts = given
    elif _is_torchvision(given) and type(given).__name__ == "Compose":
        parts = given.transforms
    elif callable(given) and not isinstance(given, type):
        yield given
        return
    else:
        got = f"the class {given.__name__}" if isinstance(given, type) else repr(given)[:60]
        do = f"Write {given.__name__}(...)" if isinstance(given, type) else "Return [] for none"
        raise UsageError(f"{name}: augmentations must return a list of kornia augmentations, got {got}. {do}.")
    for part in parts:
        yield from _flat(name, part)


def look_at(augment: Augment, benchmark: Any) -> None:
    """Raises `UsageError` unless the transforms give as many images as they get, float32, finite, at the end of the
    benchmark's shape, each depending on its own image alone and on draws of its own from torch's global generators.

    Warns of a transform that always changes an image in the same way. A draw that all images share is not seen where
    the same module makes others for each image. The global generators go on as if nothing had been drawn.
    """
    shape = tuple(benchmark.shape)
    with _undisturbed():
        for transform in augment.transforms:
            shape = _Look(benchmark.name, augment, transform, shape).result
    if augment.transforms and shape != tuple(benchmark.shape):
        raise UsageError(
            f"{benchmark.name}: its augmentations make images of {shape}, and the network expects "
            f"{tuple(benchmark.shape)}. End with a crop or kornia's Resize to it."
        )


class _Look:
    """One transform; `result` is the shape of its images."""

    def __init__(self, benchmark: str, augment: Augment, transform: Transform, shape: tuple[int, ...]):
        self.name = getattr(transform, "__name__", type(transform).__name__)
        self.benchmark, self.is_on_bytes = benchmark, any(transform is other for other in augment.on_bytes)
        self.is_torchvision = _is_torchvision(transform)
        self.call = transform.on_bytes if self.is_on_bytes else transform
        parts = list(transform.modules())[1:] if isinstance(transform, nn.Module) else []
        self._check_kornia([transform, *parts])
        pixels = np.random.default_rng(0).integers(0, 200, (ROWS, *shape), dtype=np.uint8)
        images = torch.from_numpy(pixels).to(augment.device)
        self.images = images if self.is_on_bytes else images.float().div_(255)
        self.result = tuple(self._run(self.images[:1]).shape[1:])
        self._check_rows_apart()
        self._check_draws()
        for part in filter(_is_torchvision, parts):
            _Look(benchmark, augment, part, shape)

    def _refuse(self, problem: str) -> UsageError:
        return UsageError(f"{self.benchmark}: the augmentation {self.name} {problem}")

    def _run(self, images: Tensor) -> Tensor:
        """What the transform makes of a copy of these images."""
        try:
            out = self.call(images.clone())
        except Exception as error:  # a foreign module may fail in any way; the user needs its name and the reason
            reason = str(error).strip().split("\n")[0][:200]
            raise self._refuse(
                f"fails on images {tuple(images.shape)} {_dtype(images)}: {type(error).__name__}: {reason}. It must "
                "take and return such a tensor."
            ) from error
        if not isinstance(out, Tensor) or out.ndim != 4 or len(out) != len(images) or out.dtype != images.dtype:
            got = f"{tuple(out.shape)} {_dtype(out)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise self._refuse(
                f"turns images {tuple(images.shape)} {_dtype(images)} into {got}. It must return as many images, of "
                "the same dtype."
            )
        if not out.isfinite().all():
            raise self._refuse("makes pixels that are not finite. Correct it.")
        return out

    def _check_kornia(self, parts: list[Any]) -> None:
        """Draws for a whole call that kornia makes where it is told to, beside others for each image."""
        for part in parts:
            shared = None
            if getattr(part, "same_on_batch", None) is True and "same_on_batch" in signature(type(part)).parameters:
                shared, do = "same_on_batch=True", "Leave it out"
            elif isinstance(part, PolicyAugmentBase):
                shared, do = "its policy", "Write its augmentations out, each with a p below 1"
            elif getattr(part, "random_apply", False):
                shared, do = "random_apply", "Give each augmentation a p below 1"
            elif isinstance(part, nn.Module) and 0 < getattr(part, "p_batch", 1) < 1:
                shared, do = f"p_batch={part.p_batch:g}", "Give p=1, or another augmentation"
            if shared:
                raise self._refuse(
                    f"draws once for all images of a call, not for each ({type(part).__name__} with {shared}). {do}."
                )

    def _check_rows_apart(self) -> None:
        """Half of the images are exchanged: with the same draws, the others must come out as before."""
        half = ROWS // 2
        dark, bright = self.images.clone(), self.images.clone()
        dark[:half], bright[:half] = 0, 255 if self.is_on_bytes else 1
        state = seeding.global_state()
        first = self._run(dark)
        seeding.set_global_state(state)
        if torch.allclose(first[half:].float(), self._run(bright)[half:].float(), atol=1e-4):
            return
        seeding.set_global_state(state)
        if torch.allclose(first.float(), self._run(dark).float(), atol=1e-4):
            raise self._refuse("mixes images of a call with each other. Each must depend on its own image alone.")
        raise self._draws_elsewhere()

    def _draws_once(self) -> UsageError:
        """torchvision's transforms draw once a call, by whatever generator."""
        return self._refuse(f"of torchvision draws once for all images of a call, not for each. {_instead(self.name)}")

    def _draws_elsewhere(self) -> UsageError:
        if self.is_torchvision:
            return self._draws_once()
        return self._refuse(
            "draws from other generators than torch's global one (Python's, NumPy's, its own), which a resumed run "
            "would not repeat. Draw with torch.rand and similar functions."
        )

    def _check_draws(self) -> None:
        copies = self.images[:1].expand(ROWS, -1, -1, -1)
        before, elsewhere = _torch_state(), _other_state()
        first = self._run(copies)
        draws, draws_elsewhere = _torch_state() != before, _other_state() != elsewhere
        if not _is_alike(first) and not draws_elsewhere:
            return
        if self.is_torchvision and draws:
            raise self._draws_once()
        if draws_elsewhere:
            raise self._draws_elsewhere()
        for _ in range(CALLS if draws else 0):
            again = self._run(copies)
            if not _is_alike(again):
                return
            if not torch.equal(again, first):
                raise self._refuse(
                    "draws once for all images of a call, not for each. Draw as many numbers as there are images, as "
                    "kornia.augmentation does."
                )
        if first.shape == copies.shape and not torch.allclose(first.float(), copies.float(), atol=1e-4):
            warnings.warn(
                f"{self.benchmark}: the augmentation {self.name} changes training images always in the same way, and "
                "test images not at all. Do it in load, to both; declare mean and std to normalise.",
                stacklevel=2,
            )


def _is_torchvision(transform: Any) -> bool:
    return type(transform).__module__.startswith("torchvision.transforms")


def _is_alike(rows: Tensor) -> bool:
    return torch.equal(rows, rows[:1].expand_as(rows))


def _instead(name: str) -> str:
    """What kornia has in place of torchvision's transform of this name."""
    known = {other.lower(): other for other in dir(K)}
    like = known.get(name.lower()) or known.get(f"random{name.lower()}")
    return f"Use kornia.augmentation.{like}." if like else "Use the corresponding class of kornia.augmentation."


def _dtype(images: Tensor) -> str:
    return str(images.dtype).removeprefix("torch.")


def _torch_state() -> list[bytes]:
    state = seeding.global_state()
    return [item.cpu().numpy().tobytes() for item in (state["cpu"], *state.get("cuda", ()), *state.get("mps", ()))]


def _other_state() -> str:
    return repr((random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2:]))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The global generators of torch, NumPy and Python go on from where they stood before."""
    state, numpy_state, python_state = seeding.global_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        seeding.set_global_state(state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
