"""Noise by (seed, block, step): the same seed gives the same noise however a video is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """Gaussian noise of one block for one denoising step, [B, F, C, H, W]; step 0 is where the block starts."""

    def __call__(self, block: int, step: int) -> Tensor: ...


@dataclass(frozen=True)
class SeededNoise:
    """Noise for a batch of streams, one seed each; drawn on the host, so that every device sees the same numbers.

    shape: [F, C, H, W] of one block.
    """

    seeds: Sequence[int]
    shape: tuple[int, int, int, int]
    device: torch.device | str
    dtype: torch.dtype

    def __call__(self, block: int, step: int) -> Tensor:
        drawn = {seed: torch.randn(self.shape, generator=generator_for(seed, block, step)) for seed in set(self.seeds)}
        made = torch.stack([drawn[seed] for seed in self.seeds]).to(self.dtype)
        if torch.device(self.device).type == "cuda":  # from other memory a copy waits until the device is idle
            made = made.pin_memory()
        return made.to(self.device, non_blocking=True)


class DrawnAhead:
    """The same noise, some of it drawn before it is asked for: on the host, while the device is at work."""

    def __init__(self, noise: Noise):
        self._noise = noise
        self._ahead: tuple[int, int, Tensor] | None = None

    def draw(self, block: int, step: int) -> None:
        """Draw what will be asked for; in the place of what was drawn before."""
        self._ahead = block, step, self._noise(block, step)

    def __call__(self, block: int, step: int) -> Tensor:
        ahead, self._ahead = self._ahead, None
        return ahead[2] if ahead is not None and ahead[:2] == (block, step) else self._noise(block, step)


def generator_for(*key: int) -> torch.Generator:
    """A host generator whose state depends on every integer of the key and on their order: one of 2^32 states."""
    return torch.Generator().manual_seed(_mixed(key))


def _mixed(key: Sequence[int]) -> int:
    """Hash integers to 63 bits, of which host generators read the lower 32: the finaliser of SplitMix64 (Steele et al.,
    2014), chained.
    """
    state = 0
    for value in key:
        state = (state + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


_MASK = (1 << 64) - 1
