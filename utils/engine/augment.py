"""Augmentation on the device: kornia pipelines from what a benchmark declares, one call on many images.

kornia's cost is milliseconds a call, whatever the batch; so the stream is augmented a chunk of the epoch ahead, and
all replay draws of a step in one call. Where kornia's own crop still dominates, `CropFlip` below replaces it.
"""

from collections.abc import Callable

import torch
from kornia.augmentation import GeometricAugmentationBase2D
from torch import Tensor, nn

from flatcl.utils.engine.buffer import check_stored


class CropFlip(GeometricAugmentationBase2D):
    """Zero padding, random crop back to the old size, and horizontal flip with probability `flip`, by gathering.

    A kornia augmentation: composes with others, draws from torch's global generator, gives its transformation matrix.
    Offsets are uniform over the (2 * padding + 1)^2 positions. Also works on bytes (`on_bytes`), where it is cheapest.
    """

    def __init__(self, padding: int, flip: float = 0.5):
        super().__init__(p=1.0)
        self.padding, self.flip_rate = padding, flip

    def __repr__(self) -> str:
        return f"CropFlip(padding={self.padding}, flip={self.flip_rate})"

    def generate_parameters(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """'top', 'left' (N,) int64 offsets in the padded image, and 'flip' (N,) bool."""
        n = shape[0]
        top, left = torch.randint(0, 2 * self.padding + 1, (2, n), device=self.device)
        return {"top": top, "left": left, "flip": torch.rand(n, device=self.device) < self.flip_rate}

    def apply_transform(self, input, params, flags, transform=None) -> Tensor:
        return self._gather(input, params)

    def on_bytes(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 -> the same, with parameters drawn as in a call on floats."""
        return self._gather(images, self.generate_parameters(images.shape))

    def compute_transformation(self, input, params, flags) -> Tensor:
        """(N, 3, 3): pixel coordinates of the input -> of the output."""
        width = input.shape[-1]
        sign = torch.where(params["flip"], -1.0, 1.0).to(input)
        matrix = torch.eye(3, device=input.device, dtype=input.dtype).repeat(len(input), 1, 1)
        matrix[:, 0, 0] = sign
        matrix[:, 0, 2] = torch.where(params["flip"], float(width - 1), 0.0) + self.padding - params["left"]
        matrix[:, 1, 2] = self.padding - params["top"]
        return matrix

    def _gather(self, images: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Flip, then crop. A window of the padded image is one run of memory, so a crop is one row of an overlapping
        view, whose surplus columns are cut off."""
        n, c, h, w = images.shape
        p, device = self.padding, images.device
        top, left, flip = (params[name].to(device) for name in ("top", "left", "flip"))
        padded_h, padded_w = h + 2 * p, w + 2 * p
        size = n * c * padded_h * padded_w
        flat = images.new_zeros(size + padded_w)  # the last window's surplus runs past the end
        inner = flat[:size].view(n, c, padded_h, padded_w)[:, :, p : p + h, p : p + w]
        both = torch.cat((images, images.flip(-1)))  # picking rows is ten times as fast as torch.where on bytes
        inner.copy_(both.index_select(0, torch.arange(n, device=device) + n * flip))
        windows = flat.as_strided((size + padded_w - h * padded_w + 1, h * padded_w), (1, 1))
        first = torch.arange(n * c, device=device).view(n, c) * (padded_h * padded_w)
        starts = (first + (top * padded_w + left)[:, None]).view(-1)
        return windows.index_select(0, starts).view(n, c, h, padded_w)[..., :w]


class Augment:
    """Stored images (N, C, H, W) uint8 -> network inputs float32, augmented (call) or not (`plain`).

    `transforms` are kornia augmentations of images in 0..1; those that can work on bytes and come first do so. Images
    of another dtype raise `UsageError`: they would be divided by 255 a second time.
    """

    def __init__(
        self,
        transforms: list[Callable[[Tensor], Tensor]],
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        device: torch.device | str,
    ):
        self.transforms = transforms
        lead = 0
        while lead < len(transforms) and hasattr(transforms[lead], "on_bytes"):
            lead += 1
        self.on_bytes, self.on_floats = transforms[:lead], transforms[lead:]
        for transform in self.on_floats:
            if isinstance(transform, nn.Module):
                transform.to(device)
        for transform in self.on_bytes:
            transform.to(device)
            transform.set_rng_device_and_dtype(torch.device(device), torch.float32)
        self.device = torch.empty(0, device=device).device  # with its index, as tensors name it
        self.mean = None if mean is None else torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = None if std is None else torch.tensor(std, device=device).view(1, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        images = self._stored(images)
        for transform in self.on_bytes:
            images = transform.on_bytes(images)
        inputs = images.float().div_(255)
        for transform in self.on_floats:
            inputs = transform(inputs)
        return self._normalise(inputs)

    def plain(self, images: Tensor) -> Tensor:
        """Inputs for evaluation: pixels in 0..1, normalised as the benchmark says."""
        return self._normalise(self._stored(images).float().div_(255))

    def _stored(self, images: Tensor) -> Tensor:
        check_stored("the augmentation", images)
        return images.to(self.device, non_blocking=True)

    def _normalise(self, inputs: Tensor) -> Tensor:
        if self.mean is None:
            return inputs
        return inputs.sub_(self.mean).div_(self.std)
