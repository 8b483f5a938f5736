"""A whole clip by a many-step sampler with guidance: the teacher's way, and ReHyAt's as published (2601.04342)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longtake.flow import euler_step, guided
from longtake.memory.view import View
from longtake.models.wan import PromptKeys, WanTransformer


@torch.no_grad()
def sample_clip(
    network: WanTransformer,
    noise_BFCHW: Tensor,
    prompts: PromptKeys,
    no_prompt: PromptKeys,
    levels: Sequence[float],
    guidance: float,
    prompt_BF: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] = lambda step, latents: None,
    view: View | None = None,
) -> Tensor:
    """Follow the guided velocity from pure noise through falling levels to 0 by Euler steps; returns clean latents.

    on_step: is told each step's number and the latents [B, F, C, H, W] it starts from. view: how the tokens of the clip
    see each other; by default all see all, but in converted layers (`WanTransformer.clip_view`).
    """
    view = view or network.clip_view(noise_BFCHW)
    latents = noise_BFCHW
    for step, (level, lower) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True)):
        on_step(step, latents)
        level_BF, lower_BF = (torch.full(latents.shape[:2], value, device=latents.device) for value in (level, lower))
        velocity = guided(
            network(latents, level_BF, prompts, view, prompt_BF),
            network(latents, level_BF, no_prompt, view),
            guidance,
        )
        latents = euler_step(latents, velocity, level_BF, lower_BF)
    return latents
