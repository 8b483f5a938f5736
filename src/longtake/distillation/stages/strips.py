"""Strips of pictures on the way: what an averaged network makes of held-out prompts."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice

import torch
from torch import Tensor

from longtake.distillation.stages.guided_clips import start_of
from longtake.distillation.stages.learners import resting
from longtake.distillation.stages.settings import AttentionMatchingStage, FinetuneStage, TeacherStage
from longtake.distillation.stages.world import World, embed
from longtake.distillation.trainer import Learner, Run
from longtake.flow import even_levels
from longtake.generation.clip import sample_clip
from longtake.generation.noise import SeededNoise
from longtake.generation.recipe import Recipe
from longtake.memory.stream_memory import StreamMemory
from longtake.models.text import WordEncoder
from longtake.models.wan import WanTransformer

LOOKED_AT = 12  # clips on a strip
LOOKED_AT_BLOCKS = 20


def clip_strips(
    text: WordEncoder, network: WanTransformer, learners: Sequence[Learner], world: World, shift: float,
    stage: TeacherStage | AttentionMatchingStage | FinetuneStage, run: Run,
) -> Callable[[str], None]:  # fmt: skip
    """Shows whole clips of held-out prompts that the averaged network makes under guidance."""

    def look(name: str) -> None:
        with ExitStack() as at_rest, run.autocast():
            for learner in learners:
                at_rest.enter_context(resting(learner))
            text_BPLE = embed(text, world.held_out(LOOKED_AT)[:, None])
            start = start_of(text, network, text_BPLE, range(LOOKED_AT), world)
            levels = even_levels(stage.sampling_steps, shift)
            world.show(name, sample_clip(network, *start, levels, stage.guidance))

    return look


def stream_strips(
    text: WordEncoder, network: WanTransformer, learner: Learner, world: World, recipes: Sequence[Recipe],
    shift: float, run: Run,
) -> Callable[[str], None]:  # fmt: skip
    """Shows what the averaged student streams under each recipe."""

    def look(name: str) -> None:
        with resting(learner):
            for recipe in {recipe.name: recipe for recipe in recipes}.values():
                latents = stream_latents(text, network, world, recipe, shift, run)
                world.show(f"{name}_{recipe.file_name}", latents)

    return look


@torch.no_grad()
def stream_latents(
    text: WordEncoder, network: WanTransformer, world: World, recipe: Recipe, shift: float, run: Run
) -> Tensor:
    """Streams of the first held-out prompts, [B, F, C, H, W], their noise by seeds 0, 1, ..."""
    with run.autocast():
        keys = network.prompt_keys(embed(text, world.held_out(LOOKED_AT)[:, None]))
        noise = SeededNoise(range(LOOKED_AT), (recipe.block, *world.latent_size), run.device, torch.float32)
        memory = StreamMemory(recipe.memory(network), network.config.layers, ring=True)
        made = recipe.schedule(network, memory, lambda block: keys, noise, recipe.levels(shift))
        return torch.cat(list(islice(made, LOOKED_AT_BLOCKS)), dim=1).float()
