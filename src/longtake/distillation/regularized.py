"""Hybrid Forcing's second stage (arXiv 2604.10103): distribution matching, and a pull to the teacher's own sample.

The student's estimate from pure noise is pulled to what the many-step teacher makes of the same noise, against mode
collapse. The released recipe has weight 0.05, 25 teacher steps under shift 5 and guidance 3.5, and applies the pull
only in roll-outs whose exit step is the first, where that estimate is also the sample.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from longtake.distillation.dmd import Estimate, masked_mse
from longtake.flow import euler_step, velocity_from_clean


def regularized_loss(
    matching: Tensor, first_BFCHW: Tensor, target_BFCHW: Tensor, weight: float, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """The generator's loss under "loss", with its parts "matching" and "pull"; scalars.

    matching: the matching loss, made with the same mask. first: the student's clean estimate at its first step.
    target: the teacher's sample from the noise that this step saw; no gradient reaches it. mask: see `masked_mse`.
    """
    pull = masked_mse(first_BFCHW, target_BFCHW.detach(), mask)
    return {"loss": matching + weight * pull, "matching": matching, "pull": pull}


@torch.no_grad()
def teacher_sample(
    teacher: Estimate, noise_BFCHW: Tensor, levels: Sequence[float], last: Estimate | None = None
) -> Tensor:
    """The teacher's clean sample [B, F, C, H, W]: Euler steps from pure noise, its clean estimate at the last level.

    levels: falling from 1, 0 not included; at least one. A list cut short stops the roll-out early (the partial
    roll-out). last: who makes the last estimate where that is not the teacher itself. The released partial roll-out
    guides it as c + w (c - u), so by weight 1 + w, against w in its steps, and converts it in the grid of shift 8.
    """
    latents = noise_BFCHW
    for level_BF, lower_BF in pairwise([latents.new_full(latents.shape[:2], level) for level in levels]):
        velocity = velocity_from_clean(latents, teacher(latents, level_BF), level_BF)
        latents = euler_step(latents, velocity, level_BF, lower_BF)
    return (last or teacher)(latents, latents.new_full(latents.shape[:2], levels[-1]))
