"""Rotation of small images by nearest neighbour as a map of pixels, equal to Pillow's `Image.rotate` to the pixel.

The published rotated-MNIST runs rotate with Pillow: centre pivot, no expansion, black outside, and coordinates in
16.16 fixed point, which decides ties. A map serves a whole data set, on any device.
"""

import numpy as np


def rotation_maps(angles: np.ndarray, size: int) -> np.ndarray:
    """Angles (N,) in degrees, counter-clockwise -> maps (N, size * size) int64.

    Pixel p of the rotated image is pixel map[p] of the original; size * size stands for black.
    """
    # Pillow rounds the matrix to 15 digits, so that right angles are exact, and samples at pixel centres.
    radians = -np.deg2rad(np.asarray(angles, dtype=np.float64) % 360.0)
    cos, sin = np.round(np.cos(radians), 15), np.round(np.sin(radians), 15)
    centre = size / 2.0
    x0 = centre - cos * centre - sin * centre
    y0 = centre + sin * centre - cos * centre
    fixed = [np.floor(v * 65536.0 + 0.5).astype(np.int64) for v in (cos, sin, -sin, cos)]
    a, b, d, e = (v[:, None, None] for v in fixed)
    c = np.floor((x0 + 0.5 * (cos + sin)) * 65536.0 + 0.5).astype(np.int64)[:, None, None]
    f = np.floor((y0 + 0.5 * (cos - sin)) * 65536.0 + 0.5).astype(np.int64)[:, None, None]
    column, row = np.arange(size)[None, None, :], np.arange(size)[None, :, None]
    x = (c + a * column + b * row) >> 16
    y = (f + d * column + e * row) >> 16
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    return np.where(inside, y * size + x, size * size).reshape(len(x), size * size)
