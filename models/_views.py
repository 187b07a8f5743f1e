"""Strongly augmented views, and a loss that draws views of one class together (SimCLR's recipe, SupCon's loss).

Whole-tensor code: kornia takes up to nine times as long on small images, and its colour jitter refuses one channel.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample


def strong_views(images: Tensor) -> Tensor:
    """(N, C, H, W) in 0..1 -> the same: flip, random resized crop (area .2 to 1), colour jitter (.4, .4, .4, .1) with
    probability .8, grey with probability .2. Images of one channel have no colour: jitter of light and contrast only.
    Draws from torch's global generators."""
    views = _cropped(images)
    jittered = views
    for change in torch.randperm(4).tolist():
        jittered = (_light, _contrast, _saturation, _hue)[change](jittered)
    views = torch.where(_coin(views, 0.8), jittered, views)
    return torch.where(_coin(views, 0.2), _grey(views).expand_as(views), views)


def _uniform(like: Tensor, low: float, high: float, *size: int) -> Tensor:
    return torch.rand(len(like), *size, device=like.device) * (high - low) + low


def _coin(like: Tensor, probability: float) -> Tensor:
    """(N, 1, 1, 1) bool."""
    return _uniform(like, 0, 1, 1, 1, 1) < probability


def _cropped(images: Tensor) -> Tensor:
    """A box of 20 to 100 % of the area and of proportions 3:4 to 4:3, somewhere, back at the old size; half are
    flipped. Of ten boxes the first that fits; else the whole image."""
    n, _, height, width = images.shape
    area = _uniform(images, 0.2, 1.0, 10) * (height * width)
    ratio = _uniform(images, math.log(3 / 4), math.log(4 / 3), 10).exp()
    w, h = (area * ratio).sqrt() / width, (area / ratio).sqrt() / height  # as parts of the image's
    fits = (w <= 1) & (h <= 1)
    first = fits.int().argmax(1, keepdim=True)
    w, h = (torch.where(fits.any(1), side.gather(1, first)[:, 0], 1.0) for side in (w, h))
    centre_x, centre_y = ((1 - side) * _uniform(images, -1, 1) for side in (w, h))
    flipped = torch.where(torch.rand(n, device=images.device) < 0.5, -1.0, 1.0)
    matrix = images.new_zeros(n, 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 2] = w * flipped, centre_x
    matrix[:, 1, 1], matrix[:, 1, 2] = h, centre_y
    grid = affine_grid(matrix, list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="border", align_corners=False)


def _grey(images: Tensor) -> Tensor:
    """(N, 1, H, W): the brightness that people see."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _blend(images: Tensor, other: Tensor) -> Tensor:
    share = _uniform(images, 0.6, 1.4, 1, 1, 1)
    return (share * images + (1 - share) * other).clamp(0, 1)


def _light(images: Tensor) -> Tensor:
    return _blend(images, torch.zeros_like(images))


def _contrast(images: Tensor) -> Tensor:
    return _blend(images, _grey(images).mean((2, 3), keepdim=True))


def _saturation(images: Tensor) -> Tensor:
    return _blend(images, _grey(images)) if images.shape[1] == 3 else images


def _hue(images: Tensor) -> Tensor:
    """Turned by up to a tenth of the circle, value and saturation (of HSV) as they are."""
    if images.shape[1] != 3:
        return images
    r, g, b = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1.0)
    sextant = torch.where(
        value == r, (g - b) / safe % 6, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    )
    turned = sextant + _uniform(images, -0.6, 0.6, 1, 1)
    position = torch.stack([turned + shift for shift in (5, 3, 1)], 1) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(position, 4 - position).clamp(0, 1)


def supcon(features: Tensor, y: Tensor, temperature: float) -> Tensor:
    """(..., N, D) of unit length, labels (N,) -> (..., N): -mean over the others of the same label of
    log(exp(f_i f_j / t) / sum over all others k of exp(f_i f_k / t)); 0 where there is none (Khosla et al., 2020)."""
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    same = (y[:, None] == y) & ~itself
    log_p = (features @ features.mT / temperature).masked_fill(itself, -torch.inf).log_softmax(-1)
    return -log_p.masked_fill(~same, 0.0).sum(-1) / same.sum(1).clamp(min=1)
