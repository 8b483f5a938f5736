"""Levels of latent frames as tensors: the same tensor for the same levels, so that what is made of it may be kept."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor


def level_tensor(levels: Sequence[float], latents_BFCHW: Tensor) -> Tensor:
    """A level for each frame of these latents, [B, F], on their device: do not write to it."""
    batch, device = latents_BFCHW.shape[0], latents_BFCHW.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # what a graph makes belongs to it
        return _made(tuple(levels), batch, device)
    return _latest(tuple(levels), batch, device)


@torch.inference_mode(False)  # what is remembered may come to be needed for a gradient
def _made(levels: tuple[float, ...], batch: int, device: torch.device) -> Tensor:
    """Made on the device: a copy from the host waits until it is idle."""
    parts = [
        torch.full((len(list(alike)),), level, dtype=torch.float32, device=device) for level, alike in groupby(levels)
    ]
    return torch.cat(parts).repeat(batch, 1)


_latest = lru_cache(maxsize=64)(_made)
