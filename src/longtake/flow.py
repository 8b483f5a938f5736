"""Rectified-flow arithmetic: noise levels, interpolation, velocity and clean estimate, guidance.

A *level* is the share of noise in a sample, 0 (clean) to 1 (pure noise):

    noisy = (1 - level) * clean + level * noise          velocity = noise - clean

Levels are float32 or float64 and exact; only `nearest_level`, there for comparison with published numbers, looks them
up in a table of timesteps. Published code counts timesteps t = 1000 * level.
"""

from typing import TypeVar

import torch
from torch import Tensor

Level = TypeVar("Level", float, Tensor)

TIMESTEPS = 1000  # published step lists, timesteps and training grids count levels in thousandths


def shift_level(level: Level, shift: float) -> Level:
    """Move levels towards noise: s -> k s / (1 + (k - 1) s); k = 1 changes nothing (SD3, arXiv 2403.03206, Eq. 23)."""
    return shift * level / (1 + (shift - 1) * level)


def warped_levels(nominal: list[float], shift: float) -> tuple[float, ...]:
    """Levels of a published step list such as [1000, 750, 500, 250] under a shift."""
    return tuple(shift_level(step / TIMESTEPS, shift) for step in nominal)


def even_levels(steps: int, shift: float) -> tuple[float, ...]:
    """`steps` levels from 1 downwards, evenly spaced before the shift, 0 not included."""
    return tuple(shift_level(1 - i / steps, shift) for i in range(steps))


def nearest_level(level: Tensor, shift: float) -> Tensor:
    """The point nearest to each level in the published grid of 1000 levels under a shift; shape and dtype stay.

    Published code converts with this level instead of the exact one. The grid ends above 0: under shift 5 it turns
    level 0 into 0.00498.
    """
    grid = torch.tensor(even_levels(TIMESTEPS, shift), dtype=torch.float64, device=level.device)
    return grid[(grid - level.unsqueeze(-1)).abs().argmin(dim=-1)].to(level.dtype)


def per_frame(level_BF: Tensor, like: Tensor) -> Tensor:
    """Levels [B, F] shaped to multiply a [B, F, C, H, W] tensor, in its dtype."""
    return level_BF.reshape(*level_BF.shape, *(1,) * (like.ndim - level_BF.ndim)).to(like.dtype)


def add_noise(clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """Place a clean sample at a level: the straight path between clean and noise."""
    level = per_frame(level, clean)
    return (1 - level) * clean + level * noise


def clean_from_velocity(noisy: Tensor, velocity: Tensor, level: Tensor) -> Tensor:
    """The clean estimate that a predicted velocity stands for."""
    return noisy - per_frame(level, noisy) * velocity


def velocity_from_clean(noisy: Tensor, clean: Tensor, level: Tensor) -> Tensor:
    """The inverse of `clean_from_velocity`; undefined at level 0."""
    return (noisy - clean) / per_frame(level, noisy)


def euler_step(noisy: Tensor, velocity: Tensor, level: Tensor, next_level: Tensor) -> Tensor:
    """Follow the velocity from one level to the next."""
    return noisy + per_frame(next_level - level, noisy) * velocity


def guided(with_prompt: Tensor, without_prompt: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): weight 1 is the prompt alone.

    The DMD papers write c + s (c - u); that is this form with weight 1 + s.
    """
    return without_prompt + weight * (with_prompt - without_prompt)


def matching_level(draw: Tensor, shift: float) -> Tensor:
    """Level of a uniform draw in [0, 1) for distribution matching: shifted, within 0.02 to 0.98 (DMD2, 2405.14867)."""
    return shift_level(draw, shift).clamp(0.02, 0.98)


def pretraining_weights(levels: Tensor) -> Tensor:
    """Loss weights of diffusion pre-training over a grid of levels: a bell around 0.5, mean 1, 0 at its least.

    From the training code of Self Forcing (2506.08009); the grid's smallest bell value is subtracted.
    """
    bell = torch.exp(-2 * (levels - 0.5) ** 2)
    weights = bell - bell.min()
    return weights * (len(levels) / weights.sum())
