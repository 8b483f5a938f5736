"""The next latent blocks of several streams in one pass, as rows of a batch: each as it is alone, but for rounding."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.generation.noise import Noise
from longtake.generation.recipe import Recipe
from longtake.generation.rolling import InFlight, begins_next
from longtake.memory.rows import Rows
from longtake.memory.stream_memory import StreamMemory
from longtake.models.wan import PromptKeys, WanTransformer


@dataclass(frozen=True)
class Making:
    """What the next latents of one stream are made from. prompts: of blocks that begin, by number, the same object for
    the same prompt. in_flight: kept up to date, as by `rolling`."""

    memory: StreamMemory
    prompts: Callable[[int], PromptKeys]
    in_flight: list[InFlight]
    noise: Noise

    def phase(self, block: int) -> Hashable:
        """What streams of one recipe have in common that can be made together, in blocks of so many latent frames."""
        begins = self.prompts(begins_next(self.in_flight, self.memory))
        prompts = list(dict.fromkeys(id(one) for one in (begins, *(one.prompt for one in self.in_flight))))
        flight = tuple((one.step, prompts.index(id(one.prompt))) for one in self.in_flight)
        return self.memory.phase(block), flight, begins.layers[0][0].shape[2]


def next_latents(
    network: WanTransformer, recipe: Recipe, levels: Sequence[float], several: Sequence[Making],
    commits: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """The next block of each, [B, F, C, H, W]; their memories and blocks in flight go on. They are of one phase.

    commits: as for a schedule.
    """
    prompts, later = _Prompts(), [one.memory.blocks - several[0].memory.blocks for one in several]
    flight = [
        InFlight(
            rows[0].block, rows[0].step, torch.cat([one.noisy_BFCHW for one in rows]),
            prompts.joined([one.prompt for one in rows]),
        )
        for rows in zip(*(one.in_flight for one in several), strict=True)
    ]  # fmt: skip

    def prompt(block: int) -> PromptKeys:
        return prompts.joined([one.prompts(block + ahead) for one, ahead in zip(several, later, strict=True)])

    def noise(block: int, step: int) -> Tensor:
        return torch.cat([one.noise(block + ahead, step) for one, ahead in zip(several, later, strict=True)])

    made = next(
        recipe.schedule_with(flight)(
            network, Rows([one.memory for one in several]), prompt, noise, levels,
            commits=commits,
        )
    )  # fmt: skip
    for row, (one, ahead) in enumerate(zip(several, later, strict=True)):
        one.in_flight[:] = [
            InFlight(
                both.block + ahead, both.step, both.noisy_BFCHW[row : row + 1].clone(), prompts.of_row(both.prompt, row)
            )
            for both in flight
        ]
    return made


class _Prompts:
    """Prompts of several streams as rows of one, and the way back; which of them are the same stays so."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, ...], tuple[PromptKeys, Sequence[PromptKeys]]] = {}

    def joined(self, rows: Sequence[PromptKeys]) -> PromptKeys:
        key = tuple(map(id, rows))
        if key not in self._rows:
            self._rows[key] = PromptKeys.joined(rows, dim=0), rows
        return self._rows[key][0]

    def of_row(self, joined: PromptKeys, row: int) -> PromptKeys:
        return next(rows[row] for one, rows in self._rows.values() if one is joined)
