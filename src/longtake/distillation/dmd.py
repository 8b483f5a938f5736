"""Distribution matching (DMD, arXiv 2311.18828; DMD2, 2405.14867): the student's gradient and the critic's loss.

`matching_loss` and `critic_loss` draw a level and noise themselves; `matching_loss_at` and `velocity_loss` are the same
losses of a sample already renoised. Levels are exact here. Released code (Self Forcing, 2506.08009) looks them up in
shifted grids, noise in one and the scores in another: the arguments named `grid` repeat that.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from longtake.flow import add_noise, clean_from_velocity, guided, matching_level, nearest_level
from longtake.models.wan import WanTransformer

Estimate = Callable[[Tensor, Tensor], Tensor]
"""(noisy [B, F, C, H, W], level [B, F] in 0..1) -> the clean estimate [B, F, C, H, W]."""


class Renoised(NamedTuple):
    """A sample, noise of its shape [B, F, C, H, W], a level per frame [B, F] in 0..1, and the sample at that level."""

    sample: Tensor
    noise: Tensor
    level_BF: Tensor
    noisy: Tensor


def estimate_by(
    network: WanTransformer, text_BPLE: Tensor, prompt_BF: Tensor | None, grid: float | None = None
) -> Estimate:
    """A bidirectional network as an estimator of clips under their prompts.

    grid: the shift of the grid in which released code looks the level up when it converts velocity (8 in the score
    networks of Self Forcing and Hybrid Forcing); None converts with the exact level.
    """

    def estimate(noisy_BFCHW: Tensor, level_BF: Tensor) -> Tensor:
        prompts = network.prompt_keys(text_BPLE)
        velocity = network(noisy_BFCHW, level_BF, prompts, network.clip_view(noisy_BFCHW), prompt_BF)
        return clean_from_velocity(noisy_BFCHW, velocity.float(), _looked_up(level_BF, grid))

    return estimate


def guided_estimate(with_prompt: Estimate, without_prompt: Estimate, weight: float) -> Estimate:
    """Two estimators under classifier-free guidance; the scale s of the DMD papers is weight 1 + s."""
    return lambda noisy, level: guided(with_prompt(noisy, level), without_prompt(noisy, level), weight)


def matching_gradient(sample: Tensor, critic_clean: Tensor, teacher_clean: Tensor) -> Tensor:
    """Away from where the student is denser than the teacher, in steps of the remaining error (DMD, Eq. 7 and 8).

    All [B, F, C, H, W]. The error is a mean over the whole clip, also where a mask hides part of it from the loss;
    where it is 0 the gradient is 0.
    """
    size = (sample - teacher_clean).abs().mean(dim=tuple(range(1, sample.ndim)), keepdim=True)
    return torch.nan_to_num((critic_clean - teacher_clean) / size, posinf=0.0, neginf=0.0)


def matching_loss(
    sample_BFCHW: Tensor, teacher: Estimate, critic: Estimate, shift: float, mask: Tensor | None = None
) -> Tensor:
    """A loss whose gradient by the sample is the matching gradient over its number of elements.

    mask: 1 for the elements that count, 0 for the others, of any shape that broadcasts to the sample's; the gradient
    is then divided by their number alone, and 0 elsewhere.
    """
    return matching_loss_at(renoised(sample_BFCHW, shift), teacher, critic, mask)


def matching_loss_at(at: Renoised, teacher: Estimate, critic: Estimate, mask: Tensor | None = None) -> Tensor:
    """The matching loss of a sample already renoised."""
    with torch.no_grad():
        gradient = matching_gradient(at.sample, critic(at.noisy, at.level_BF), teacher(at.noisy, at.level_BF))
    return 0.5 * masked_mse(at.sample, at.sample.detach() - gradient, mask)


def critic_loss(
    sample_BFCHW: Tensor, critic: WanTransformer, text_BPLE: Tensor, prompt_BF: Tensor | None, shift: float
) -> Tensor:
    """Flow matching of the critic on the student's samples, which it sees as data."""
    at = renoised(sample_BFCHW.detach(), shift)
    velocity = critic(at.noisy, at.level_BF, critic.prompt_keys(text_BPLE), critic.clip_view(at.noisy), prompt_BF)
    return velocity_loss(velocity, at)


def velocity_loss(velocity_BFCHW: Tensor, at: Renoised) -> Tensor:
    """Velocity error of a sample already renoised, unweighted (flow matching, arXiv 2210.02747)."""
    return functional.mse_loss(velocity_BFCHW.float(), at.noise - at.sample)


def renoised(sample_BFCHW: Tensor, shift: float) -> Renoised:
    """The sample at one random level a clip, under random noise."""
    draw_B1 = torch.rand(sample_BFCHW.shape[0], 1, device=sample_BFCHW.device)
    return renoised_by(sample_BFCHW, draw_B1, torch.randn_like(sample_BFCHW), shift)


@torch.no_grad()
def renoised_by(
    sample_BFCHW: Tensor, draw_B1: Tensor, noise_BFCHW: Tensor, shift: float, grid: float | None = None
) -> Renoised:
    """The sample under given noise, at the levels of given draws in [0, 1).

    grid: the shift of the grid in which released code looks the level up when it adds noise (its `shift`); the level
    that the networks are told stays exact.
    """
    level_BF = matching_level(draw_B1, shift).expand(sample_BFCHW.shape[:2])
    noisy = add_noise(sample_BFCHW, noise_BFCHW, _looked_up(level_BF, grid))
    return Renoised(sample_BFCHW, noise_BFCHW, level_BF, noisy)


def masked_mse(x: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error over the elements where the mask is 1, over all without one; a mask of zeros gives nan.

    Raises RuntimeError for a mask that does not broadcast to the shape of x.
    """
    if mask is None:
        return functional.mse_loss(x, target)
    counted = mask.to(x.dtype).expand_as(x)
    return (counted * (x - target).square()).sum() / counted.sum()


def _looked_up(level_BF: Tensor, grid: float | None) -> Tensor:
    return level_BF if grid is None else nearest_level(level_BF, grid)
