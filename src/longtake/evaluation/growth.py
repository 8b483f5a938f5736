"""How an error grows: one block of a stream is changed a little before it is committed, and the difference followed.

A twin leaves each stream when its window is about to be full: its next block is the stream's own, plus noise of a
given size. Memory and codec take the changed block for the truth; from then on both go on by the same schedule, under
the same prompt and with the same noise. A method that corrects itself brings the twin back, one that accumulates
errors loses it. Blocks in flight saw the block as it was; they go on alike in both, and see it changed from then on.

Shapes: B streams, K blocks from the changed one on, F latent frames, C channels, H W height and width.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.generation.blockwise import commit
from longtake.generation.noise import SeededNoise, generator_for
from longtake.generation.rolling import InFlight
from longtake.generation.stream import Engine, to_uint8
from longtake.memory.stream_memory import StreamMemory
from longtake.models.wan import PromptKeys

PERTURBING = -1  # the step whose noise changes a block: no schedule asks for it
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's t, 97.5 %, 1 to 10 degrees


class Growth(NamedTuple):
    """Differences of twins from their streams, on the host; the first is that of the changed block itself.

    latents_BK: |twin - stream| / |stream| in L2 over a block's latents. pictures_BK: root mean square of the difference
    of its pictures, where 1 is from black to white. unrelated_*: the same between different streams of the batch,
    which share nothing: where a difference ends that grows for ever; nan for a batch of one.
    """

    latents_BK: Tensor
    pictures_BK: Tensor
    unrelated_latents_BK: Tensor
    unrelated_pictures_BK: Tensor


@torch.no_grad()
def error_growth(engine: Engine, prompts: Sequence[str], seeds: Sequence[int], *, blocks: int, size: float) -> Growth:
    """Run streams and their twins.

    Args:
        engine: the loaded model and recipe.
        prompts: one a stream.
        seeds: of each stream's noise, and of its change.
        blocks: how many follow the changed one.
        size: of the change, beside the block's own norm; 0 changes nothing, and nothing differs ever after.
    """
    network, prompt = engine.network, engine.prompt_keys(*prompts)
    memory = StreamMemory(engine.recipe.memory(network), network.config.layers, ring=True)
    in_flight: list[InFlight] = []
    stream = latents_of(engine, memory, prompt, seeds, in_flight)
    first, state = changed_block(engine), None
    for latents_BFCHW in islice(stream, first):
        _, state = engine.codec.decode(latents_BFCHW.to(engine.dtype), state)
    other, states = memory.fork(), [state, state]
    clean_BFCHW = next(stream)
    changed_BFCHW = perturbed(clean_BFCHW, seeds, first, size)
    commit(network, other, changed_BFCHW, prompt)
    twin = latents_of(engine, other, prompt, seeds, list(in_flight))

    found = []
    for pair in islice(chain([(clean_BFCHW, changed_BFCHW)], zip(stream, twin, strict=True)), 1 + blocks):
        decoded = [engine.codec.decode(x.to(engine.dtype), old) for x, old in zip(pair, states, strict=True)]
        states = [new for _, new in decoded]
        shown = [to_uint8(frames).float() / 255 for frames, _ in decoded]
        found.append(
            [
                _relative(*pair),
                _root_mean_square(*shown),
                _relative(pair[0], _neighbours(pair[0])),
                _root_mean_square(shown[0], _neighbours(shown[0])),
            ]
        )
    return Growth(*(torch.stack(parts, 1).cpu() for parts in zip(*found, strict=True)))


def latents_of(
    engine: Engine, memory: StreamMemory, prompt: PromptKeys, seeds: Sequence[int],
    in_flight: list[InFlight] | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Latent blocks by the engine's schedule, going on from what a memory holds, with the noise of these streams.

    in_flight: the blocks that it goes on with, if any; see `rolling`.
    """
    recipe = engine.recipe
    noise = SeededNoise(seeds, (recipe.block, *engine.latent_size), engine.device, torch.float32)
    schedule = recipe.schedule_with([] if in_flight is None else in_flight)
    return schedule(engine.network, memory, lambda block: prompt, noise, recipe.levels(engine.shift))


def changed_block(engine: Engine) -> int:
    """The number of the block that is changed: the first behind sink and past, so that it is never part of the sink."""
    return (engine.recipe.sink + engine.recipe.past) // engine.recipe.block


def perturbed(latents_BFCHW: Tensor, seeds: Sequence[int], block: int, size: float) -> Tensor:
    """A block with Gaussian noise whose norm is `size` times the block's own, drawn for each stream by its seed."""
    drawn = [torch.randn(latents_BFCHW.shape[1:], generator=generator_for(seed, block, PERTURBING)) for seed in seeds]
    noise_BFCHW = torch.stack(drawn).to(latents_BFCHW)
    scale_B = size * _size(latents_BFCHW) / _size(noise_BFCHW)
    return latents_BFCHW + scale_B.view(-1, 1, 1, 1, 1).to(latents_BFCHW) * noise_BFCHW


def interval_95(values: Tensor) -> tuple[float, float]:
    """The 95 % interval of the mean of two or more values, by Student's t."""
    degrees = len(values) - 1
    t = T_95[degrees - 1] if degrees <= len(T_95) else 1.96 + 2.37 / degrees + 2.8 / degrees**2
    mean, half = values.mean().item(), t * values.std().item() / math.sqrt(len(values))
    return mean - half, mean + half


def _relative(one: Tensor, other: Tensor) -> Tensor:
    return _size(other - one) / _size(one)


def _root_mean_square(one: Tensor, other: Tensor) -> Tensor:
    return (other - one).flatten(1).square().mean(1).sqrt()


def _size(x: Tensor) -> Tensor:
    return x.float().flatten(1).norm(dim=1)


def _neighbours(x: Tensor) -> Tensor:
    return x.roll(1, 0) if len(x) > 1 else torch.full_like(x, torch.nan)
