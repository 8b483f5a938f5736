"""Samplings under way: what a network that makes whole clips meets itself, between noise and a clip."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtake.distillation.stages.world import World
from longtake.distillation.trainer import Run


class Steps(NamedTuple):
    """The next step of B samplings: from latents [B, F, C, H, W] at a level [B, F] to a lower one, under P prompts."""

    noisy_BFCHW: Tensor
    level_BF: Tensor
    lower_BF: Tensor
    tokens_BPL: Tensor
    prompt_BF: Tensor


class Walks:
    """So many samplings of `frames` latent frames, all levels among them, taken step by step from outside.

    One that has arrived begins anew, with other noise and another prompt of the world. All begin at once, but end their
    first ways one after the other, so that from then on they are apart.
    """

    def __init__(self, world: World, levels: Sequence[float], count: int, frames: int, seed: int, run: Run):
        self._world, self._seed, self._frames, self._run = world, seed, frames, run
        self._ends = [*levels, 0.0]
        self._size = (frames, *world.latent_size)
        self._begun = 0
        self._step = [0] * count
        self._left = [1 + row * len(levels) // count for row in range(count)]
        self._noisy, self._tokens, self._prompt = self._beginning(count)

    def steps(self) -> Steps:
        level, lower = (
            torch.tensor([[self._ends[step + later]] * self._frames for step in self._step]).to(self._noisy.device)
            for later in (0, 1)
        )
        return Steps(self._noisy, level, lower, self._tokens, self._prompt)

    def go_on(self, noisy_BFCHW: Tensor) -> None:
        """Where the steps led: latents at the lower levels."""
        self._noisy = noisy_BFCHW.clone()
        self._step = [step + 1 for step in self._step]
        self._left = [left - 1 for left in self._left]
        arrived = [row for row, left in enumerate(self._left) if not left]
        if arrived:
            beginning = self._beginning(len(arrived))
            for kept, new in zip((self._noisy, self._tokens, self._prompt), beginning, strict=True):
                kept[arrived] = new
        for row in arrived:
            self._step[row], self._left[row] = 0, len(self._ends) - 1

    def _beginning(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noise, tokens and prompt numbers of samplings that begin."""
        said = self._world.prompts(count, self._seed * 1_000_000 + self._begun, self._frames)
        self._begun += count
        noise = torch.randn(count, *self._size, device=self._run.device)
        return noise, said.tokens_BPL.clone(), said.prompt_BF[:, : self._frames].clone()

    def state_dict(self) -> dict[str, Any]:
        return {
            "begun": self._begun, "step": self._step, "left": self._left,
            "noisy": self._noisy, "tokens": self._tokens, "prompt": self._prompt,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begun, self._step, self._left = state["begun"], list(state["step"]), list(state["left"])
        self._noisy, self._tokens, self._prompt = (
            state[name].to(self._run.device) for name in ("noisy", "tokens", "prompt")
        )
