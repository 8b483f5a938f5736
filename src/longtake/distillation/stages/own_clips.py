"""Clips that a student streams itself: in front of these it answers in streams, not in front of the world's."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtake import parallel
from longtake.distillation.plan import Plan, Script, rolled_out
from longtake.distillation.stages.world import World, embed
from longtake.distillation.trainer import Run
from longtake.generation.noise import SeededNoise
from longtake.generation.recipe import Recipe
from longtake.memory.stream_memory import MemoryShape
from longtake.models.text import WordEncoder
from longtake.models.wan import WanTransformer

AT_ONCE = 64


class _Clips(NamedTuple):
    """As `world.LatentClips`."""

    latents_BFCHW: Tensor
    tokens_BPL: Tensor
    prompt_BF: Tensor
    focus_BFHW: Tensor


class OwnClips:
    """So many clips of `frames` latent frames, whole blocks, streamed under a recipe by prompts of the world, with all
    of the window attended to; `renew` streams some anew in place of the oldest.

    network: for it alone, for its calls are recorded where there is a GPU. Clips follow from seed and number, on one
    machine. Every cell counts alike: nobody knows what it shows. looks_away: see `World.prompts`.
    """

    def __init__(
        self, text: WordEncoder, network: WanTransformer, world: World, recipe: Recipe, shift: float, run: Run, *,
        size: int, seed: int, frames: int, looks_away: bool = True,
    ):  # fmt: skip
        parallel.record_calls([network], ("forward", "keys_to_commit"))
        self.frames = frames
        self._text, self._network, self._world, self._run = text, network, world, run
        self._recipe, self._shift = replace(recipe, near=MemoryShape.near), shift
        self._size, self._seed, self._at_once, self._made = size, seed, min(AT_ONCE, size), 0
        self._looks_away = looks_away
        self._pool: _Clips | None = None

    def renew(self) -> None:
        new = self._streamed()
        if self._pool is None:
            self._pool = _Clips(*(x.new_empty(self._size, *x.shape[1:]) for x in new))
        rows = [i % self._size for i in range(self._made, self._made + self._at_once)]
        for kept, few in zip(self._pool, new, strict=True):
            kept[rows] = few
        self._made += self._at_once

    def draw(self, count: int, frames: int) -> _Clips:
        """Some of them, whole."""
        assert frames == self.frames
        while self._pool is None or self._made < self._size:
            self.renew()
        rows = torch.randint(self._size, (count,), device=self._run.device)
        return _Clips(*(x[rows] for x in self._pool))

    def state_dict(self) -> dict[str, Any]:
        """How many clips were made."""
        return {"made": self._made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stream those again that were held when so many had been made."""
        made = int(state["made"])
        self._made = max(0, made - self._size) // self._at_once * self._at_once
        while self._made < made:
            self.renew()

    @torch.no_grad()
    def _streamed(self) -> _Clips:
        recipe, count, device = self._recipe, self._at_once, self._run.device
        first = self._seed * 1_000_000 + self._made
        said = self._world.prompts(count, first, self.frames, self._looks_away)
        levels, blocks = len(recipe.steps), self.frames // recipe.block
        plan = Plan((levels, levels), blocks=blocks, learned=blocks, block=recipe.block)
        prompt_BF = plan.prompts_of_judged(said.prompt_BF)
        seeds = range(first, first + count)
        noise = SeededNoise(seeds, (recipe.block, *self._world.latent_size), device, torch.float32)
        with self._run.autocast():
            script = Script(embed(self._text, said.tokens_BPL), prompt_BF)
            latents = rolled_out(self._network, script, noise, recipe, plan, self._shift).float()
        alike = latents.new_zeros(count, self.frames, *self._world.latent_size[1:])
        return _Clips(latents, said.tokens_BPL, prompt_BF, alike)
