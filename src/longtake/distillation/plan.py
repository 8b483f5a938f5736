"""Rollouts to learn on: their shape, drawn from dice that all processes share, and what they are to show."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.distillation.rollout import rollout, windows
from longtake.distillation.trainer import Dice
from longtake.generation.blockwise import blockwise
from longtake.generation.noise import Noise
from longtake.generation.recipe import Recipe, Schedule
from longtake.memory.policies import PLAIN
from longtake.models.wan import PromptKeys, WanTransformer


@dataclass(frozen=True)
class Plan:
    """The shape of one rollout, alike in every process: levels down to its exit, and lengths in blocks."""

    levels: tuple[int, int]
    """How many there are, and how many of them are used."""
    blocks: int
    learned: int
    block: int
    given: int = 0
    """Blocks of a real clip that it goes on from; those that learn follow at once."""
    offset: int | None = None
    """Of the windows that it goes by, see `rollout.windows`; None: it goes block by block."""

    @property
    def judged(self) -> int:
        """The last blocks, those that teacher and critic see."""
        return self.given + self.learned

    @property
    def can_be_pulled(self) -> bool:
        """Whether it is made in one step from noise alone and as long as the teacher's clip, as its sample would be."""
        return self.levels[1] == 1 and not self.given and self.blocks == self.judged

    def learned_frames(self, device: torch.device) -> Tensor | None:
        """1 for the judged frames that learn, [1, F, 1, 1, 1]; None where all do."""
        if not self.given:
            return None
        return (torch.arange(self.judged * self.block, device=device) >= self.given * self.block).view(1, -1, 1, 1, 1)

    def prompts_of_judged(self, prompt_BF: Tensor) -> Tensor:
        """The prompt of each judged frame [B, F], in a clip that holds as many: of given frames as it is, of learned
        ones that of their block's first.

        A rollout of more than the judged part may have come to any moment of the clip by then, but not beyond a change:
        a second prompt may name nothing but what changes, by which alone no clip can be judged.
        """
        frames, batch = self.judged * self.block, prompt_BF.shape[0]
        latest = prompt_BF.shape[1] - frames + 1 if self.blocks > self.judged else 1
        starts = torch.randint(latest, (batch, 1), device=prompt_BF.device)
        last_before = (prompt_BF == 0).sum(1, keepdim=True) - self.block
        starts = torch.minimum(starts, last_before.clamp_min(0))
        firsts = starts + torch.arange(0, frames, self.block, device=prompt_BF.device)
        by_block_BF = prompt_BF.gather(1, firsts).repeat_interleave(self.block, dim=1)
        given = self.given * self.block
        return torch.cat([prompt_BF[:, :given], by_block_BF[:, given:]], dim=1)


def draw_plan(
    shared: Dice, recipe: Recipe, clip: int, *,
    levels: tuple[int, ...], most_blocks: int, most_given: int, self_forcing_share: float,
    last_exits: int,
) -> Plan:  # fmt: skip
    """Draw the shape of a rollout under a recipe; for the settings see `stages.DmdStage`.

    clip: latent frames of the teacher's clip, whole blocks of the recipe's.
    """
    count = levels[shared.below(len(levels))]
    judged = clip // recipe.block
    # Half the rollouts go on from given blocks, to the end of the clip.
    most_given = min(most_given, judged - 1)
    given = shared.below(2) * (1 + shared.below(most_given)) if most_given else 0
    # Half of those that begin with nothing are as long as the clip, the others may be longer.
    longer = 0 if given else shared.below(2) * shared.below(most_blocks - judged + 1)
    by_windows = recipe.rolls and not shared.happens(self_forcing_share)
    # What learns: calls at the exit step, or windows with an offset, in which all steps are made.
    if by_windows:
        used, offset = count, shared.below(count)
    else:
        exits = min(last_exits or count, count)
        used, offset = count - exits + 1 + shared.below(exits), None
    return Plan((count, used), judged + longer, judged - given, recipe.block, given, offset)


class Script(NamedTuple):
    """What a rollout is to show: P prompts a clip, and the number of the one that each judged frame stands under."""

    text_BPLE: Tensor
    prompt_BF: Tensor
    given: tuple[Tensor, ...] = ()
    """Latent blocks [B, F, C, H, W] that it goes on from."""


def rolled_out(
    network: WanTransformer, script: Script, noise: Noise, recipe: Recipe, plan: Plan, shift: float
) -> Tensor:
    """The judged part of a rollout, [B, F, C, H, W]; what comes before it stands under the first prompt."""
    keys = network.prompt_keys(script.text_BPLE)
    by_block = [keys.select(number_B) for number_B in script.prompt_BF[:, :: recipe.block].unbind(1)]
    before = keys.select(torch.zeros_like(script.prompt_BF[:, 0]))
    early = plan.blocks - plan.judged

    def prompts(block: int) -> PromptKeys:
        return by_block[block - early] if block >= early else before

    count, used = plan.levels
    recipe = recipe.with_levels(count)
    levels = recipe.levels(shift)[:used]
    learned_BFCHW = rollout(
        _schedule(recipe, plan), network, recipe.memory(network), prompts, noise, levels,
        blocks=plan.blocks, learning=plan.learned, given=script.given, redirected=_redirected(recipe, script, early),
    )  # fmt: skip
    return torch.cat([*script.given, learned_BFCHW], dim=1)


def _redirected(recipe: Recipe, script: Script, early: int) -> list[int]:
    """The blocks that begin under another prompt than the one before, in any clip of the batch: streams that move in
    step are redirected together. None where a memory makes nothing of it, since to look costs time on a GPU."""
    if recipe.policy == PLAIN:
        return []
    numbers = script.prompt_BF[:, :: recipe.block].unbind(1)
    before = [torch.zeros_like(numbers[0]) if early else numbers[0], *numbers]
    return [early + i for i, (old, new) in enumerate(pairwise(before)) if not torch.equal(old, new)]


def _schedule(recipe: Recipe, plan: Plan) -> Schedule:
    """The recipe's own. One that rolls is learned by its windows, or block by block over the same memory."""
    if not recipe.rolls:
        return recipe.schedule
    return blockwise if plan.offset is None else partial(windows, offset=plan.offset)
