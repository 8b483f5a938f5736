"""The time of the toy world's pictures, and what runs by it: cycles, and the fade of a change.

Shapes: B scenes, F pictures of a scene.
"""

import math

import torch
from torch import Tensor

from longtake.toy.scenes import RATE, Scenes

FADE_SECONDS = 1.25  # the time a change of time, weather, colour or place takes


def picture_seconds(scenes: Scenes, pictures: int, first: int | Tensor) -> Tensor:
    """The time of every picture: [B, F] in float64, which tells neighbouring pictures apart for centuries."""
    device = scenes.subject.device
    numbers = torch.arange(pictures, device=device).expand(len(scenes), -1)
    return (numbers + (first[:, None] if isinstance(first, Tensor) else first)).double() / RATE


def cycle(seconds: Tensor, period: Tensor | float, offset: Tensor | float = 0.0) -> Tensor:
    """Time as a fraction of a period, in 0..1: what is periodic is computed from this, so hours cost no precision."""
    return torch.remainder(seconds / period + offset, 1.0)


def sine(cycles: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * cycles)


def smooth(x: Tensor) -> Tensor:
    """From 0 to 1 as x goes from 0 to 1, and level at both ends."""
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def fade(scenes: Scenes, pictures: int, first: int | Tensor = 0) -> Tensor:
    """How far each picture has gone from "before" to "after": [B, F] in 0..1."""
    seconds = picture_seconds(scenes, pictures, first)
    return smooth((seconds - scenes.change_seconds[:, None]) / FADE_SECONDS).float()
