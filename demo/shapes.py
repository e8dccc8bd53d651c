"""The eight shapes as signed distances, and their anti-aliased coverage.

Distances are in units of the shape's radius: negative inside, positive outside,
y downwards. The star and the heart follow Inigo Quilez's 2D distance functions
(https://iquilezles.org/articles/distfunctions2d/).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.95


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.83


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    y = y - 0.18
    slope = math.sqrt(3) / 2 * x.abs() - 0.5 * y
    return torch.maximum(y, slope) - 0.58


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.72).abs() - 0.26


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() / 0.8 + y.abs() - 1.0) * 0.62


def _cross(x: Tensor, y: Tensor) -> Tensor:
    long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.maximum(long - 0.95, short - 0.32)


def _star(x: Tensor, y: Tensor) -> Tensor:
    radius, waist = 1.08, 0.45
    cos, sin = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x, y = x.abs(), 0.05 - y
    for side in (1.0, -1.0):  # fold the five points onto one
        overlap = torch.clamp(side * x * cos - y * sin, min=0)
        x, y = x - 2 * side * overlap * cos, y + 2 * overlap * sin
    x, y = x.abs(), y - radius
    edge_x, edge_y = waist * sin, waist * cos - 1.0
    along = ((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2)).clamp(0, radius)
    outside = torch.sign(y * edge_x - x * edge_y)
    return torch.hypot(x - edge_x * along, y - edge_y * along) * outside


def _heart(x: Tensor, y: Tensor) -> Tensor:
    scale = 1.75
    x, y = x.abs() / scale, (0.9 - y) / scale
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    diagonal = 0.5 * (x + y).clamp(min=0)
    tip = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - diagonal, y - diagonal))
    return torch.where(x + y > 1, lobe, tip * torch.sign(x - y)) * scale


DISTANCES: Final[dict[str, Distance]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "heart": _heart,
    "diamond": _diamond,
    "cross": _cross,
}


def coverage(
    shape: str, size: tuple[int, int], x: Tensor, y: Tensor, radius: Tensor, angle: Tensor | None
) -> Tensor:
    """The share of each pixel that N copies of a shape cover: (N, height, width), 0 to 1.

    `size` is (height, width) in pixels; centres and radii, (N,), are in units of
    the shorter side, from the top left corner; `angle` rotates the copies, in radians.
    """
    height, width = size
    side = min(size)
    x, y, radius = (value[:, None, None] for value in (x, y, radius))
    across = ((torch.arange(width) + 0.5) / side)[None, None, :] - x
    down = ((torch.arange(height) + 0.5) / side)[None, :, None] - y
    across, down = across / radius, down / radius
    if angle is not None:
        cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
        across, down = cos * across + sin * down, cos * down - sin * across
    return (0.5 - DISTANCES[shape](across, down) * radius * side).clamp(0, 1)
