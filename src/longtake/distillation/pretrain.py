"""Losses on clips: the codec's, the teacher's flow matching, and the same under the causal memory (teacher forcing)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from longtake.distillation.rollout import steps_in_windows
from longtake.flow import add_noise, guided, shift_level
from longtake.generation.blockwise import commit, view_for
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.memory.view import View
from longtake.models.light_codec import Reconstruction
from longtake.models.wan import PromptKeys, WanTransformer

CONTEXT_NOISE = 0.02  # deviation of what a clean past carries in teacher forcing


@dataclass(frozen=True)
class Clips:
    """A batch to learn from. Each latent frame has one of P prompts.

    latents [B, F, C, H, W]; text [B, P, L, E]; prompt [B, F] whole numbers below P; focus [B, F, H, W] how much more
    each latent cell matters, 0 or more, such as the share of it that the subject covers; below 0 for cells that do not
    count at all.
    """

    latents_BFCHW: Tensor
    text_BPLE: Tensor
    prompt_BF: Tensor
    focus_BFHW: Tensor


def codec_loss(made: Reconstruction, frames_BFCHW: Tensor, mask_BFHW: Tensor, kl_weight: float) -> dict[str, Tensor]:
    """Reconstruction, edges, motion and KL of whole clips in -1..1; the subject's pixels count six times.

    Returns the parts and their weighted sum under "loss".
    """
    mean, log_variance = made.mean_BFCHW.float(), made.log_variance_BFCHW.float()
    weight = (1 + 5 * mask_BFHW).unsqueeze(2)
    weight = weight / weight.mean()
    error = made.frames_BFCHW.float() - frames_BFCHW
    across, down, later = error.diff(dim=4), error.diff(dim=3), error.diff(dim=1)
    parts = {
        "l1": (weight * error.abs()).mean(),
        "mse": (weight * error.square()).mean(),
        "edges_l1": (weight[..., 1:] * across.abs()).mean() + (weight[..., 1:, :] * down.abs()).mean(),
        "edges_mse": (weight[..., 1:] * across.square()).mean() + (weight[..., 1:, :] * down.square()).mean(),
        "motion_l1": (weight[:, 1:] * later.abs()).mean(),
        "kl": 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(),
    }
    factors = {"l1": 0.5, "mse": 6.0, "edges_l1": 0.3, "edges_mse": 3.0, "motion_l1": 0.2, "kl": kl_weight}
    return {"loss": torch.stack([factors[name] * part for name, part in parts.items()]).sum(), **parts}


def flow_loss(
    network: WanTransformer, clips: Clips, shift: float, focus_weight: float, anchor: WanTransformer | None = None,
    nothing_BPLE: Tensor | None = None, guidance: float = 1.0,
) -> Tensor:  # fmt: skip
    """Velocity error of whole clips, each at one level (a uniform draw, shifted): flow matching (arXiv 2210.02747).

    anchor: a network whose velocity is aimed at, and not the clips' own, where it attends exactly in all its layers.
    nothing: the embedding of no prompt [B, 1, L, E]; given, the velocity is that of sampling under this guidance, which
    weighs what differs between a prompt and none, and so their errors (as 2210.03142 distils it).
    """
    clean = clips.latents_BFCHW
    draw = torch.rand(clean.shape[0], 1, device=clean.device)
    level_BF = shift_level(draw, shift).expand(clean.shape[:2])
    noise = torch.randn_like(clean)
    noisy = add_noise(clean, noise, level_BF)

    def answer(of: WanTransformer, view: View) -> Tensor:
        asked = Asking(noisy, level_BF, clips.text_BPLE, clips.prompt_BF)
        return velocity_asked(of, asked, view, nothing_BPLE, guidance)

    target = noise - clean
    if anchor is not None:
        with torch.no_grad():
            target = answer(anchor, anchor.exact_view(clean))
    return _focused_mse(answer(network, network.clip_view(clean)), target, clips.focus_BFHW, focus_weight)


class Asking(NamedTuple):
    """What a velocity is asked of: latents [B, F, C, H, W] at levels [B, F], prompts as in `Clips`."""

    noisy_BFCHW: Tensor
    level_BF: Tensor
    text_BPLE: Tensor
    prompt_BF: Tensor


def velocity_asked(
    network: WanTransformer, asked: Asking, view: View, nothing_BPLE: Tensor | None, guidance: float
) -> Tensor:
    """The velocity of whole clips [B, F, C, H, W], guided if the embedding of no prompt [B, 1, L, E] is given."""
    noisy, level_BF, text_BPLE, prompt_BF = asked
    velocity = network(noisy, level_BF, network.prompt_keys(text_BPLE), view, prompt_BF)
    if nothing_BPLE is None:
        return velocity
    return guided(velocity, network(noisy, level_BF, network.prompt_keys(nothing_BPLE), view), guidance)


def on_the_way_loss(
    network: WanTransformer, anchor: WanTransformer, asked: Asking, nothing_BPLE: Tensor, guidance: float
) -> tuple[Tensor, Tensor]:
    """Error of the guided velocity beside that of an anchor that attends exactly, where a sampling stands; and the
    velocity itself, by which that sampling may go on (as 1011.0686 has a learner meet its own states)."""
    velocity = velocity_asked(network, asked, network.clip_view(asked.noisy_BFCHW), nothing_BPLE, guidance)
    with torch.no_grad():
        target = velocity_asked(anchor, asked, anchor.exact_view(asked.noisy_BFCHW), nothing_BPLE, guidance)
    return functional.mse_loss(velocity.float(), target.float()), velocity.detach()


def teacher_forcing_loss(
    network: WanTransformer,
    clips: Clips,
    shift: float,
    focus_weight: float,
    *,
    block: int,
    memory: MemoryShape,
    by_block: bool = False,
    levels: Sequence[float] = (),
    offset: int | None = None,
    anchor: WanTransformer | None = None,
) -> Tensor:
    """Velocity error of noisy blocks, each at its own level and in front of the clean past that streaming would hold.

    The clean past carries a little noise, so that a stream's own small errors are not new to the network. What reads
    the past teaches what wrote it: keys learn to be found, in the window and in the far state. by_block: whether clips
    are walked block by block, which is slower and gives the same. levels: those that are drawn from; none given: all
    from 0 to 1, shifted. offset: blocks go together instead, by the windows that `rollout.windows` takes, each at the
    level of its step: rolling diffusion (arXiv 2402.09470) as the schedule that serves has blocks in flight. anchor: a
    network whose velocity is aimed at, and not the clips' own, where it sees all of its window: a lesson in staying as
    that one is (Learning without Forgetting, arXiv 1606.09282), whatever blocks of keys the memory leaves out and
    whichever layers are converted.
    """
    clean = clips.latents_BFCHW
    blocks = clean.shape[1] // block
    together: list[int] = []
    if offset is None:
        draw = torch.rand(clean.shape[0], blocks, device=clean.device)
        level = _one_of(levels, draw) if levels else shift_level(draw, shift)
    else:
        windows = steps_in_windows(blocks, len(levels), offset)
        together = [len(steps) for steps in windows]
        level = torch.stack([_all_at(levels[step], clean) for steps in windows for step in steps], dim=1)
    level_BF = level.repeat_interleave(block, dim=1)
    noise = torch.randn_like(clean)
    past = clean + CONTEXT_NOISE * torch.randn_like(clean)
    forced = forced_by_block if by_block else forced_in_one_pass
    noisy = add_noise(clean, noise, level_BF)

    def answer(of: WanTransformer, memory: MemoryShape) -> Tensor:
        prompts, own = of.prompt_keys(clips.text_BPLE), of.with_own_far(memory)
        return forced(of, past, noisy, level_BF, prompts, clips.prompt_BF, block, own, together)

    target = noise - clean
    if anchor is not None:
        with torch.no_grad():
            target = answer(anchor, replace(memory, near=MemoryShape.near, converted={}))
    return _focused_mse(answer(network, memory), target, clips.focus_BFHW, focus_weight)


def _all_at(level: float, clips_BFCHW: Tensor) -> Tensor:
    return torch.full(clips_BFCHW.shape[:1], level, device=clips_BFCHW.device)


def _one_of(levels: Sequence[float], draw: Tensor) -> Tensor:
    """The level that each draw in [0, 1) stands for, all alike likely; none has to travel to the device."""
    number = (draw * len(levels)).long()
    return torch.stack([(number == i) * level for i, level in enumerate(levels)]).sum(0)


def forced_in_one_pass(
    network: WanTransformer, past_BFCHW: Tensor, noisy_BFCHW: Tensor, level_BF: Tensor,
    prompts: PromptKeys, prompt_BF: Tensor, block: int, memory: MemoryShape, together: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """Velocity [B, F, C, H, W] of every noisy block in front of its past, all at once. Truth: `forced_by_block`.

    ValueError for a memory whose sink enters the far state as well, and for one whose policy has to be walked through.
    """
    require_one_pass(memory)
    frames = past_BFCHW.shape[1]
    view = network.teacher_forced_view(past_BFCHW, block, memory, together)
    velocity = network(
        torch.cat([past_BFCHW, noisy_BFCHW], dim=1),
        torch.cat([torch.zeros_like(level_BF), level_BF], dim=1),
        prompts,
        view,
        prompt_BF.repeat(1, 2),
    )
    return velocity[:, frames:]


def require_one_pass(memory: MemoryShape) -> None:
    """ValueError for a memory that cannot be shown in one pass."""
    if not memory.in_one_pass:
        raise ValueError("a memory with these rules can only be walked through block by block: set recompute=true")


def forced_by_block(
    network: WanTransformer, past_BFCHW: Tensor, noisy_BFCHW: Tensor, level_BF: Tensor,
    prompts: PromptKeys, prompt_BF: Tensor, block: int, memory: MemoryShape, together: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """Velocity [B, F, C, H, W] of every noisy block in front of the memory of a stream, whatever that is.

    A block is estimated, then the past's own block is committed, as streams go on from given blocks. Unlike
    theirs, commits keep their graph, and a change of prompt does nothing to the memory, under no policy. together: how
    many blocks, one after the other, are estimated in one call, before the first of them is committed; none given: one.
    """
    stream = StreamMemory(memory, network.config.layers, ring=False, keeps_graph=True)
    frames = past_BFCHW.shape[1]
    sizes = [count * block for count in together] or block
    parts = (x.split(sizes, dim=1) for x in (past_BFCHW, noisy_BFCHW, level_BF, prompt_BF))
    velocities = []
    for past, noisy, level, prompt in zip(*parts, strict=True):
        view = view_for(network, stream, noisy, prompts, prompt)
        velocities.append(network(noisy, level, prompts, view, prompt))
        if stream.frames + past.shape[1] < frames:
            own = view if past.shape[1] == block else None
            for one, its_prompt in zip(past.split(block, dim=1), prompt.split(block, dim=1), strict=True):
                commit(network, stream, one, prompts, own, its_prompt)
    return torch.cat(velocities, dim=1)


def _focused_mse(velocity: Tensor, target: Tensor, focus_BFHW: Tensor, focus_weight: float) -> Tensor:
    """Squared error in which the cells that matter count more, at any level: how a camera moves is decided in noise.

    Clips count alike, however much some of their cells do: else those made for memory would outweigh all the others.
    """
    weight = ((1 + focus_weight * focus_BFHW) * (focus_BFHW >= 0)).unsqueeze(2)
    weighed = weight * functional.mse_loss(velocity.float(), target.float(), reduction="none")
    return (weighed.flatten(1).mean(1) / weight.flatten(1).mean(1).clamp_min(1e-6)).mean()
