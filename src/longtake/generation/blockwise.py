"""Self Forcing's schedule (arXiv 2506.08009, Algorithm 2): finish one block, commit it clean, begin the next."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from longtake.flow import add_noise, clean_from_velocity
from longtake.generation.levels import level_tensor
from longtake.generation.noise import Noise
from longtake.memory.rows import Memory
from longtake.memory.stream_memory import StreamMemory
from longtake.memory.view import MemoryView, View
from longtake.models.wan import PromptKeys, WanTransformer


def blockwise(
    network: WanTransformer,
    memory: Memory,
    prompts: Callable[[int], PromptKeys],
    noise: Noise,
    levels: Sequence[float],
    learns: Callable[[int], bool] = lambda block: False,
    end: int | None = None,
    *,
    commits: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Yield finished latent blocks [B, F, C, H, W], going on from what the memory holds, without end or before `end`.

    prompts: the prompt of a block by its number, asked for when the block begins. levels: falling, the first is where
    noise starts; the estimate made at the last one is the result. learns: whether a block's last estimate keeps its
    graph (training unrolls this very generator); nothing else ever does. commits: told before each commit.
    """
    while end is None or memory.blocks < end:
        block = memory.blocks
        prompt = prompts(block)
        noisy = noise(block, 0)
        with torch.no_grad():
            view = view_for(network, memory, noisy, prompt)
            for step, (level, lower) in enumerate(pairwise(levels)):
                clean = clean_estimate(network, noisy, level, prompt, view)
                noisy = add_noise(clean, noise(block, step + 1), _levels(clean, lower))
        with torch.set_grad_enabled(learns(block)):
            clean = clean_estimate(network, noisy, levels[-1], prompt, view)
        commits()
        commit(network, memory, clean, prompt, view)
        del view  # its rotated keys would live on beside those of the next
        yield clean


def clean_estimate(
    network: WanTransformer, noisy_BFCHW: Tensor, level: float, prompt: PromptKeys, view: View
) -> Tensor:
    """What the network takes the clean block to be, seen at one level."""
    level_BF = _levels(noisy_BFCHW, level)
    return clean_from_velocity(noisy_BFCHW, network(noisy_BFCHW, level_BF, prompt, view), level_BF)


def view_for(
    network: WanTransformer, memory: Memory, latents_BFCHW: Tensor, prompt: PromptKeys,
    prompt_BF: Tensor | None = None, *, commits: bool = False,
) -> MemoryView:  # fmt: skip
    """What the passes of the next frames under a prompt read of a memory, or what their commit does."""
    text = prompt.means(prompt_BF) if memory.shape.policy.bank else ()
    return network.memory_view(memory, latents_BFCHW, commits=commits, text=text)


def commit(
    network: WanTransformer, memory: Memory, clean_BFCHW: Tensor, prompt: PromptKeys, view: View | None = None,
    prompt_BF: Tensor | None = None, *, again: bool = False,
) -> None:  # fmt: skip
    """Write a finished block into memory: one pass over it at level 0, with a graph only if the memory keeps graphs.

    view: that of the block's denoising passes, where there is one already. It serves again, unless the memory shows
    commits something else. prompt_BF: numbers each frame's prompt, where there are several. again: whether these frames
    had been committed before. The block itself is cut from its graph in any case.
    """
    clean = clean_BFCHW.detach()
    with torch.set_grad_enabled(memory.keeps_graph and torch.is_grad_enabled()):
        if view is None or not memory.shape.commits_keep_sink:
            view = view_for(network, memory, clean, prompt, prompt_BF, commits=True)
        keys = network.keys_to_commit(clean, _levels(clean, 0.0), prompt, view, prompt_BF)
        text = prompt.means(prompt_BF) if memory.shape.policy.bank else ()
        memory.commit(keys, clean.shape[1], network.grid(clean), latents=clean, text=text, again=again)
        if memory.clip_is_full and not again:
            recache(network, memory, prompt, prompt_BF)


def redirect(network: WanTransformer, memory: StreamMemory, prompt: PromptKeys) -> None:
    """What a memory's policy makes of it at a change of prompt: nothing, a flush, or a recache under the new one."""
    memory.flush()
    if memory.shape.policy.recache:
        recache(network, memory, prompt)


def recache(network: WanTransformer, memory: Memory, prompt: PromptKeys, prompt_BF: Tensor | None = None) -> None:
    """Commit the latest finished frames once more, under another prompt; for the forms of it see `policies.Recache`.

    prompt_BF: where there are several prompts, the last frame's is taken for all. A memory without a single frame is
    left as it is.
    """
    rule = memory.shape.policy.recache
    assert rule is not None, "this memory commits nothing once more"
    if not memory.latents:
        return
    block = memory.latents[-1].shape[1]
    latents = torch.cat(memory.latents, dim=1)[:, -rule.frames :]
    keeps_sink = rule.sink == "kept" and memory.frames > latents.shape[1]
    if keeps_sink:  # its slots are not written, so the first of the frames have none to go to
        latents = latents[:, memory.shape.window.sink :]
    memory.unwind(latents.shape[1], keep_sink=keeps_sink)
    for part in latents.split(block if rule.mask == "block_causal" else latents.shape[1], dim=1):
        number_BF = None if prompt_BF is None else prompt_BF[:, -1:].expand(-1, part.shape[1])
        commit(network, memory, part, prompt, prompt_BF=number_BF, again=True)


def _levels(latents_BFCHW: Tensor, level: float) -> Tensor:
    return level_tensor([level] * latents_BFCHW.shape[1], latents_BFCHW)
