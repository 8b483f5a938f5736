"""Distribution matching (DMD, arXiv 2311.18828; DMD2, 2405.14867): the student's gradient and the critic's loss."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from longtake.flow import add_noise, clean_from_velocity, guided, matching_level
from longtake.models.wan import WanTransformer

Estimate = Callable[[Tensor, Tensor], Tensor]
"""(noisy [B, F, C, H, W], level [B, F]) -> the clean estimate."""


def estimate_by(network: WanTransformer, text_BPLE: Tensor, prompt_BF: Tensor | None) -> Estimate:
    """A bidirectional network as an estimator of clips under their prompts."""

    def estimate(noisy_BFCHW: Tensor, level_BF: Tensor) -> Tensor:
        prompts = network.prompt_keys(text_BPLE)
        velocity = network(noisy_BFCHW, level_BF, prompts, network.clip_view(noisy_BFCHW), prompt_BF)
        return clean_from_velocity(noisy_BFCHW, velocity.float(), level_BF)

    return estimate


def guided_estimate(with_prompt: Estimate, without_prompt: Estimate, weight: float) -> Estimate:
    """Two estimators under classifier-free guidance."""
    return lambda noisy, level: guided(with_prompt(noisy, level), without_prompt(noisy, level), weight)


def matching_gradient(sample: Tensor, critic_clean: Tensor, teacher_clean: Tensor) -> Tensor:
    """Away from where the student is denser than the teacher, in steps of the remaining error (DMD, Eq. 7 and 8)."""
    size = (sample - teacher_clean).abs().mean(dim=tuple(range(1, sample.ndim)), keepdim=True)
    return torch.nan_to_num((critic_clean - teacher_clean) / size, posinf=0.0, neginf=0.0)


def matching_loss(sample_BFCHW: Tensor, teacher: Estimate, critic: Estimate, shift: float) -> Tensor:
    """A loss whose gradient by the sample is the matching gradient over its number of elements."""
    with torch.no_grad():
        noisy, level_BF, _ = _renoised(sample_BFCHW, shift)
        gradient = matching_gradient(sample_BFCHW, critic(noisy, level_BF), teacher(noisy, level_BF))
    return 0.5 * functional.mse_loss(sample_BFCHW, (sample_BFCHW - gradient).detach())


def critic_loss(
    sample_BFCHW: Tensor, critic: WanTransformer, text_BPLE: Tensor, prompt_BF: Tensor | None, shift: float
) -> Tensor:
    """Flow matching of the critic on the student's samples (velocity error, unweighted)."""
    sample = sample_BFCHW.detach()
    noisy, level_BF, noise = _renoised(sample, shift)
    velocity = critic(noisy, level_BF, critic.prompt_keys(text_BPLE), critic.clip_view(noisy), prompt_BF)
    return functional.mse_loss(velocity.float(), noise - sample)


def _renoised(sample: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sample at one random level a clip, the levels [B, F], and the noise."""
    level_BF = matching_level(torch.rand(sample.shape[0], 1, device=sample.device), shift).expand(sample.shape[:2])
    noise = torch.randn_like(sample)
    return add_noise(sample, noise, level_BF), level_BF, noise
