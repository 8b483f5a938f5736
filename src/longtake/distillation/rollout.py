"""The student's own video: the serving schedule itself, with chosen calls kept on the graph."""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from longtake.generation.blockwise import commit, redirect
from longtake.generation.noise import Noise
from longtake.generation.recipe import Schedule
from longtake.generation.rolling import InFlight, calls
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.models.wan import PromptKeys, WanTransformer


@dataclass(frozen=True)
class FreshNoise:
    """New noise at every call, from torch's own generator of the device. shape: [B, F, C, H, W] of a block."""

    shape: tuple[int, int, int, int, int]
    device: torch.device

    def __call__(self, block: int, step: int) -> Tensor:
        return torch.randn(self.shape, device=self.device)


@dataclass(frozen=True)
class FirstNoise:
    """Noise of a rollout of one step, known beforehand: block by block, [B, F, C, H, W] each."""

    blocks: Sequence[Tensor]

    def __call__(self, block: int, step: int) -> Tensor:
        assert step == 0, "later steps have no noise here"
        return self.blocks[block]


def windows(
    network: WanTransformer,
    memory: StreamMemory,
    prompts: Callable[[int], PromptKeys],
    noise: Noise,
    levels: Sequence[float],
    learns: Callable[[int], bool] = lambda block: False,
    end: int | None = None,
    *,
    offset: int,
) -> Iterator[Tensor]:
    """Yield blocks [B, F, C, H, W] as Rolling Forcing learns them (arXiv 2509.25161), by windows that do not overlap.

    The calls are those of `rolling`. Of every so many as there are levels T one is taken, whose number leaves `offset`,
    0 to T - 1, when it is divided by T: the blocks in flight in these calls are all blocks, each once. What is yielded
    of a block is the estimate made there, at any level, not the finished block, which goes into memory as it does in
    streams. learns: a call that is taken keeps its graph if one of its blocks does; nothing else ever does.
    """

    def taken(number: int) -> bool:
        return number % len(levels) == offset

    def keeps_graph(flight: Sequence[InFlight]) -> bool:
        return taken(flight[0].call) and any(learns(one.block) for one in flight)

    for call in calls(network, memory, prompts, noise, levels, keeps_graph, end):
        if taken(call.number):
            yield from call.clean


def steps_in_windows(blocks: int, levels: int, offset: int) -> list[list[int]]:
    """The steps of the blocks in flight in each call that `windows` takes of a clip: of all blocks, in order."""
    steps = [(offset - block) % levels for block in range(blocks)]  # a call's number is that of a block and its step
    return [[steps[block] for block in one] for _, one in groupby(range(blocks), lambda block: block + steps[block])]


def rollout(
    schedule: Schedule,
    network: WanTransformer,
    memory: MemoryShape,
    prompts: Callable[[int], PromptKeys],
    noise: Noise,
    levels: Sequence[float],
    *,
    blocks: int,
    learning: int,
    given: Sequence[Tensor] = (),
    redirected: Container[int] = (),
) -> Tensor:
    """Latents [B, F, C, H, W] of the last `learning` of so many blocks, each with the graph of its estimate.

    given: clean latents [B, F, C, H, W] of the first blocks, which the rollout goes on from: they count among the
    blocks and are remembered under their own prompts, as if they had just been made. levels end at the exit step (Self
    Forcing, arXiv 2506.08009, Algorithm 1): the estimate made there is the result, and what later blocks remember. No
    gradient passes through memory. redirected: the blocks before which the stream is redirected to their own prompt.
    """
    stream = StreamMemory(memory, network.config.layers, ring=False)

    def told(block: int) -> PromptKeys:
        if block in redirected:
            redirect(network, stream, prompts(block))
        return prompts(block)

    for latents_BFCHW in given:
        commit(network, stream, latents_BFCHW, told(stream.blocks))
    made = schedule(network, stream, told, noise, levels, lambda block: block >= blocks - learning, blocks)
    return torch.cat(list(made)[-learning:], dim=1)
