"""Self Forcing's schedule (arXiv 2506.08009, Algorithm 2): finish one block, commit it clean, begin the next."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from longtake.flow import add_noise, clean_from_velocity
from longtake.generation.noise import Noise
from longtake.memory.stream_memory import StreamMemory
from longtake.memory.view import View
from longtake.models.wan import PromptKeys, WanTransformer


def blockwise(
    network: WanTransformer,
    memory: StreamMemory,
    prompts: Callable[[int], PromptKeys],
    noise: Noise,
    levels: Sequence[float],
    learns: Callable[[int], bool] = lambda block: False,
    end: int | None = None,
) -> Iterator[Tensor]:
    """Yield finished latent blocks [B, F, C, H, W], going on from what the memory holds, without end or before `end`.

    prompts: the prompt of a block by its number, asked for when the block begins. levels: falling, the first is where
    noise starts; the estimate made at the last one is the result. learns: whether a block's last estimate keeps its
    graph (training unrolls this very generator); nothing else ever does.
    """
    while end is None or memory.blocks < end:
        block = memory.blocks
        prompt = prompts(block)
        noisy = noise(block, 0)
        with torch.no_grad():
            view = network.memory_view(memory, noisy)
            for step, (level, lower) in enumerate(pairwise(levels)):
                clean = clean_estimate(network, noisy, level, prompt, view)
                noisy = add_noise(clean, noise(block, step + 1), _levels(clean, lower))
        with torch.set_grad_enabled(learns(block)):
            clean = clean_estimate(network, noisy, levels[-1], prompt, view)
        commit(network, memory, clean, prompt, view)
        yield clean


def clean_estimate(
    network: WanTransformer, noisy_BFCHW: Tensor, level: float, prompt: PromptKeys, view: View
) -> Tensor:
    """What the network takes the clean block to be, seen at one level."""
    level_BF = _levels(noisy_BFCHW, level)
    return clean_from_velocity(noisy_BFCHW, network(noisy_BFCHW, level_BF, prompt, view), level_BF)


def commit(
    network: WanTransformer, memory: StreamMemory, clean_BFCHW: Tensor, prompt: PromptKeys, view: View | None = None,
    prompt_BF: Tensor | None = None,
) -> None:  # fmt: skip
    """Write a finished block into memory: one pass over it at level 0, with a graph only if the memory keeps graphs.

    view: that of the block's denoising passes, where there is one already. It serves again, unless the memory shows
    commits something else. prompt_BF: numbers each frame's prompt, where there are several. The block itself is cut
    from its graph in any case.
    """
    clean = clean_BFCHW.detach()
    with torch.set_grad_enabled(memory.keeps_graph and torch.is_grad_enabled()):
        if view is None or not memory.shape.commits_keep_sink:
            view = network.memory_view(memory, clean, commits=True)
        keys = network.keys_to_commit(clean, _levels(clean, 0.0), prompt, view, prompt_BF)
        memory.commit(keys, clean.shape[1], network.grid(clean))


def _levels(latents_BFCHW: Tensor, level: float) -> Tensor:
    return torch.full(latents_BFCHW.shape[:2], level, device=latents_BFCHW.device)
