"""The landscape of the toy world: three layers, each the area below a line, with the line of every place.

Shapes: N pictures, W columns of a picture.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.toy.scenes import WIDTH

PERIOD = 480.0  # pixels after which the landscape repeats


def _wave(u: Tensor, length: float, phase: float = 0.0) -> Tensor:
    return torch.sin(2 * math.pi * u / length + phase)


def _cell(u: Tensor, width: float, count: int) -> tuple[Tensor, Tensor]:
    """Cut a line into cells: the distance to the middle of each, and its own random number in 0..1."""
    number = torch.floor(u / width)
    return u - (number + 0.5) * width, noise_at(torch.remainder(number, count))


def noise_at(number: Tensor, other: Tensor | float = 0.0) -> Tensor:
    """A well-spread number in 0..1 for small whole numbers (interleaved gradient noise; no large factors, so the same
    on every device)."""
    return torch.frac(52.9829189 * torch.frac(0.06711056 * (number + 5.0) + 0.00583715 * (other + 3.0)))


def _roofs(u: Tensor, width: float, count: int, low: float, high: float) -> Tensor:
    """The skyline of a row of buildings, its steps softened over a pixel and a half."""
    across = u / width
    number, part = torch.floor(across), torch.frac(across)
    height, neighbour = noise_at(torch.remainder(number, count)), noise_at(torch.remainder(number + 1, count))
    step = ((part - 1) * width / 1.5 + 1).clamp(0, 1)
    return low + (high - low) * torch.lerp(height, neighbour, step)


def _teeth(u: Tensor, width: float, count: int, low: float, high: float, slope: float) -> Tensor:
    """A row of triangles of different heights: firs, pyramids, peaks."""
    offset, noise = _cell(u, width, count)
    return (low + (high - low) * noise - slope * offset.abs()).clamp(min=0)


def domes(u: Tensor, width: float, count: int, radius: float) -> Tensor:
    """A row of half-discs of different sizes: bushes."""
    offset, noise = _cell(u, width, count)
    size = radius * (0.55 + 0.45 * noise)
    return torch.sqrt((size * size - offset * offset).clamp(min=1e-6))


class Layer(NamedTuple):
    """A layer of the landscape; `lines` gives, by PLACES, the y of its upper edge along u pixels."""

    period: float
    speed: float  # pixels for one pixel of the camera
    lines: tuple[Callable[[Tensor], Tensor], ...]


FAR = Layer(
    0.4 * PERIOD,
    0.4,
    (
        lambda u: 58 - 7 * _wave(u, 192) - 4 * _wave(u, 64, 1.0),
        lambda u: 72 - _teeth(u, 96, 2, 24, 38, 0.8),
        lambda u: 60 + 0 * u,
        lambda u: 70 - _teeth(u, 16, 12, 14, 34, 2.4),
        lambda u: 70 - _roofs(u, 16, 12, 10, 46),
        lambda u: 72 - torch.maximum(_teeth(u, 96, 2, 40, 58, 1.0), _teeth(u + 40, 64, 3, 22, 40, 0.9)),
    ),
)
MIDDLE = Layer(
    0.7 * PERIOD,
    0.7,
    (
        lambda u: 75 - 5 * _wave(u, 168, 0.5) - domes(u, 48, 7, 13),
        lambda u: 84 - 13 * _wave(u, 336).abs() - 3 * _wave(u, 112, 2.0),
        lambda u: 71 + 1.3 * _wave(u, 42),
        lambda u: 86 - _teeth(u, 28, 12, 26, 46, 2.6),
        lambda u: 84 - _roofs(u, 28, 12, 12, 48),
        lambda u: 77 - 4 * _wave(u, 336) - _teeth(u, 14, 24, 4, 15, 2.2),
    ),
)
NEAR = Layer(
    PERIOD,
    1.0,
    (
        lambda u: 86 - 2.0 * _wave(u, 240),
        lambda u: 87 - 2.5 * _wave(u, 160),
        lambda u: 87 - 2.0 * _wave(u, 120),
        lambda u: 85 - 1.5 * _wave(u, 120) - 0.8 * _wave(u, 32),
        lambda u: 86 + 0 * u,
        lambda u: 86 - 2.0 * _wave(u, 160),
    ),
)


class Ridge(NamedTuple):
    """A layer as it stands in pictures, by column: [N, 1, W]."""

    u: Tensor
    line: Tensor
    softness: Tensor  # pixels over which the edge fades, along y: more where it is steep


def ridge(layer: Layer, shift: Tensor, camera: Tensor, place: Tensor) -> Ridge:
    """The layer's line, mixed between places while they fade into each other. Inputs [N, 1, 1], place [N, PLACES]."""
    column = torch.arange(-1, WIDTH + 1, device=shift.device) + 0.5
    u = column + shift + layer.speed * camera
    line = torch.zeros_like(u)
    for index, shape in enumerate(layer.lines):
        line = line + place[:, index, None, None] * shape(u)
    slope = (line[..., 2:] - line[..., :-2]) / 2
    return Ridge(u[..., 1:-1], line[..., 1:-1], torch.sqrt(1 + slope * slope))
