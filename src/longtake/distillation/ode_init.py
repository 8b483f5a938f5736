"""ODE regression (CausVid, arXiv 2412.07772, section 4.3): the teacher's trajectories under the causal mask."""

import torch
from torch import Tensor

from longtake.flow import clean_from_velocity, even_levels
from longtake.generation.clip import sample_clip
from longtake.memory.window import WindowShape
from longtake.models.wan import PromptKeys, WanTransformer


def trajectories(
    teacher: WanTransformer,
    noise_BFCHW: Tensor,
    prompts: PromptKeys,
    no_prompt: PromptKeys,
    prompt_BF: Tensor | None,
    *,
    steps: int,
    stops: int,
    shift: float,
    guidance: float,
) -> Tensor:
    """The teacher's way from noise to a clip by Euler steps: states [B, stops + 1, F, C, H, W].

    The states stand at `stops` even levels, 1 the first, which are those of a student of so many steps; the clean
    clip is the last. ValueError if the stops do not fall on steps.
    """
    if steps % stops:
        raise ValueError(f"{stops} stops do not fall on {steps} steps: take a multiple")
    states: list[Tensor] = []

    def stop(step: int, latents: Tensor) -> None:
        if step % (steps // stops) == 0:
            states.append(latents)

    levels = even_levels(steps, shift)
    clean = sample_clip(teacher, noise_BFCHW, prompts, no_prompt, levels, guidance, prompt_BF, on_step=stop)
    return torch.stack([*states, clean], dim=1)


def regression_loss(
    network: WanTransformer,
    states_BKFCHW: Tensor,
    prompts: PromptKeys,
    prompt_BF: Tensor | None,
    *,
    shift: float,
    block: int,
    window: WindowShape,
) -> Tensor:
    """Squared error of the clean estimates of blocks, each at a stop of its own, in front of noisy and clean past.

    states: as from `trajectories`. Blocks that drew the clean state are context only and carry no loss, as where the
    published list of levels ends in 0.
    """
    batch, count, frames = states_BKFCHW.shape[:3]
    stop_BF = torch.randint(count, (batch, frames // block), device=states_BKFCHW.device)
    stop_BF = stop_BF.repeat_interleave(block, dim=1)
    rows, columns = torch.arange(batch)[:, None], torch.arange(frames)
    noisy = states_BKFCHW[rows.to(stop_BF), stop_BF, columns.to(stop_BF)]
    level_BF = torch.tensor([*even_levels(count - 1, shift), 0.0], device=stop_BF.device)[stop_BF]
    view = network.clip_view(noisy, block_causal(frames, block, window).to(stop_BF.device))
    estimate = clean_from_velocity(noisy, network(noisy, level_BF, prompts, view, prompt_BF).float(), level_BF)
    error_BF = (estimate - states_BKFCHW[:, -1]).square().mean(dim=(2, 3, 4))
    learns = level_BF > 0
    return (error_BF * learns).sum() / learns.sum().clamp_min(1)


def block_causal(frames: int, block: int, window: WindowShape) -> Tensor:
    """Which frame (row) sees which (column): its own block, the sink, and the past before its block."""
    number = torch.arange(frames)
    begins = number // block * block
    key = number[None, :]
    recent = key >= begins[:, None] - window.past
    return (key < begins[:, None] + block) & (recent | (key < window.sink))
