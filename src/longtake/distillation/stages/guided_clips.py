"""Whole clips that a network makes under guidance: what they begin with."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.distillation.stages.world import World, embed
from longtake.generation.noise import SeededNoise
from longtake.models.text import WordEncoder
from longtake.models.wan import PromptKeys, WanTransformer


class Start(NamedTuple):
    """What `sample_clip` starts from: noise [B, F, C, H, W], the keys of what is said, and those of no prompt."""

    noise_BFCHW: Tensor
    said: PromptKeys
    nothing: PromptKeys


def start_of(
    text: WordEncoder, network: WanTransformer, text_BPLE: Tensor, seeds: Sequence[int], world: World
) -> Start:
    """The start of clips of text embeddings [B, P, L, E], as long as the network's extent, their noise by B seeds."""
    size = (network.config.extent, *world.latent_size)
    noise = SeededNoise(seeds, size, text_BPLE.device, torch.float32)(0, 0)
    nothing_BPLE = embed(text, text.no_prompt(len(text_BPLE))[:, None])
    return Start(noise, network.prompt_keys(text_BPLE), network.prompt_keys(nothing_BPLE))
