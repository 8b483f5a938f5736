"""Rolling Forcing's schedule (arXiv 2509.25161): a block at every level in flight, one finished by each call.

Blocks in flight see each other and all that fits the extent of what is remembered. A call brings each of them a level
down; then the oldest, if that was its last level, is committed, and a new one enters as noise. So a stream begins with
calls over 1, 2, ... blocks that finish none, and a clip ends with calls over ever fewer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.flow import add_noise, clean_from_velocity
from longtake.generation.blockwise import commit
from longtake.generation.levels import level_tensor
from longtake.generation.noise import Noise
from longtake.memory.rows import Memory
from longtake.models.wan import PromptKeys, WanTransformer


@dataclass(frozen=True)
class InFlight:
    """A block between noise and clean: the latents at the level of its step, and the prompt that it began under."""

    block: int
    step: int
    noisy_BFCHW: Tensor
    prompt: PromptKeys

    @property
    def call(self) -> int:
        """The number of the call that it goes through next. A call has the number of the block that enters in it."""
        return self.block + self.step


def begins_next(in_flight: Sequence[InFlight], memory: Memory) -> int:
    """The number of the block that begins next, behind those in flight or else behind all that are finished."""
    return in_flight[-1].block + 1 if in_flight else memory.blocks


class Call(NamedTuple):
    """What one call made of the blocks in flight, oldest first: their numbers, levels and clean estimates."""

    number: int
    blocks: tuple[int, ...]
    levels: tuple[float, ...]
    clean: tuple[Tensor, ...]
    finishes: bool
    """Whether the estimate of the oldest is final, and committed."""


def rolling(
    network: WanTransformer,
    memory: Memory,
    prompts: Callable[[int], PromptKeys],
    noise: Noise,
    levels: Sequence[float],
    learns: Callable[[int], bool] = lambda block: False,
    end: int | None = None,
    in_flight: list[InFlight] | None = None,
    *,
    commits: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Yield finished latent blocks [B, F, C, H, W], as `blockwise`, with as many in flight as there are levels.

    A block goes on under the prompt that it began with. learns: whether the call that finishes a block keeps its graph.
    After a cut of the memory the blocks in flight are dropped, and the new scene begins as a stream does.
    in_flight: the blocks to go on with; it is kept up to date. A fork needs a copy of it beside that of the memory;
    without, it begins as after given blocks: with calls that finish none. commits: as for `blockwise`.
    """

    def keeps_graph(flight: Sequence[InFlight]) -> bool:
        return flight[0].step + 1 == len(levels) and learns(flight[0].block)

    going_on = calls(network, memory, prompts, noise, levels, keeps_graph, end, in_flight, commits=commits)
    for call in going_on:
        if call.finishes:
            yield call.clean[0]


def calls(
    network: WanTransformer,
    memory: Memory,
    prompts: Callable[[int], PromptKeys],
    noise: Noise,
    levels: Sequence[float],
    keeps_graph: Callable[[Sequence[InFlight]], bool],
    end: int | None = None,
    in_flight: list[InFlight] | None = None,
    *,
    commits: Callable[[], None] = lambda: None,
) -> Iterator[Call]:
    """The calls of `rolling`, those included that finish no block. keeps_graph: whether a call over these does."""
    flight = [] if in_flight is None else in_flight
    while True:
        block = begins_next(flight, memory)
        if end is None or block < end:
            flight.append(InFlight(block, 0, noise(block, 0), prompts(block)))
        if not flight:
            return
        with torch.set_grad_enabled(keeps_graph(flight)):
            clean = _estimates(network, memory, flight, levels)
        call = Call(
            number=flight[0].call,
            blocks=tuple(one.block for one in flight),
            levels=tuple(levels[one.step] for one in flight),
            clean=clean,
            finishes=flight[0].step + 1 == len(levels),
        )
        if call.finishes:
            commits()
            commit(network, memory, clean[0], flight[0].prompt)
        flight[:] = [
            _lowered(one, estimate, noise, levels)
            for one, estimate in zip(flight, clean, strict=True)
            if one.step + 1 < len(levels)
        ]
        remembered = memory.frames
        yield call
        if memory.frames < remembered:  # the scene was cut
            flight.clear()


def _estimates(
    network: WanTransformer, memory: Memory, flight: Sequence[InFlight], levels: Sequence[float]
) -> tuple[Tensor, ...]:
    """What the network takes the clean blocks to be, [B, F, C, H, W] each, seen together and each at its level."""
    sizes = [one.noisy_BFCHW.shape[1] for one in flight]
    noisy = torch.cat([one.noisy_BFCHW for one in flight], dim=1)
    level_BF = level_tensor(
        [levels[one.step] for one, size in zip(flight, sizes, strict=True) for _ in range(size)], noisy
    )
    prompt, prompt_BF = _prompts(flight, sizes)
    view = network.memory_view(memory, noisy)
    velocity = network(noisy, level_BF, prompt, view, prompt_BF)
    return clean_from_velocity(noisy, velocity, level_BF).split(sizes, dim=1)


def _prompts(flight: Sequence[InFlight], sizes: Sequence[int]) -> tuple[PromptKeys, Tensor | None]:
    """The prompts in flight, and which of them is whose; None if there is only one."""
    prompts = list({id(one.prompt): one.prompt for one in flight}.values())
    if len(prompts) == 1:
        return prompts[0], None
    numbers = [next(i for i, prompt in enumerate(prompts) if prompt is one.prompt) for one in flight]
    return PromptKeys.joined(prompts), _by_frame(numbers, sizes, flight[0].noisy_BFCHW)


@torch.no_grad()
def _lowered(one: InFlight, clean_BFCHW: Tensor, noise: Noise, levels: Sequence[float]) -> InFlight:
    """The block at its next level, with new noise."""
    step = one.step + 1
    level_BF = level_tensor([levels[step]] * clean_BFCHW.shape[1], clean_BFCHW)
    return replace(one, step=step, noisy_BFCHW=add_noise(clean_BFCHW, noise(one.block, step), level_BF))


def _by_frame(numbers: Sequence[int], sizes: Sequence[int], latents_BFCHW: Tensor) -> Tensor:
    """Numbers of blocks of so many frames, [B, F]. Made on the device: a copy from the host waits until it is idle."""
    device = latents_BFCHW.device
    parts = [torch.full((size,), number, device=device) for number, size in zip(numbers, sizes, strict=True)]
    return torch.cat(parts).expand(latents_BFCHW.shape[0], -1)
