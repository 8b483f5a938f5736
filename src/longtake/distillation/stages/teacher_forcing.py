"""The stage `teacher_forcing`: teacher or student + clips -> causal student, by flow matching in front of the clean
past."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longtake import parallel
from longtake.distillation.low_rank import merge
from longtake.distillation.pretrain import Clips, require_one_pass, teacher_forcing_loss
from longtake.distillation.stages.learners import at_rank, compile_for, far_weights, learner_of
from longtake.distillation.stages.own_clips import OwnClips
from longtake.distillation.stages.settings import TeacherForcingStage
from longtake.distillation.stages.strips import stream_strips
from longtake.distillation.stages.world import ClipSupply, World, drawn, embed, parts_of
from longtake.distillation.trainer import Learner, Run, train
from longtake.generation.recipe import Recipe
from longtake.models.text import WordEncoder
from longtake.models.wan import WanTransformer


def train_teacher_forcing(
    text: WordEncoder, network: WanTransformer, world: World, recipes: Sequence[Recipe], shift: float,
    stage: TeacherForcingStage, run: Run,
) -> dict[str, float]:  # fmt: skip
    _require_sense(stage, network, recipes)
    anchor, streamer = (
        copy.deepcopy(network).requires_grad_(False) if wanted else None
        for wanted in (stage.anchor_weight, stage.anchor_streams)
    )
    at_rank(network, stage.rank)
    learner = learner_of(network, stage.lr, stage.far_lr, stage.average, far_only=stage.far_only)
    compile_for(run, network, *([anchor] if anchor else []))  # the calls of what streams are recorded as they are
    if stage.recompute:
        parallel.checkpoint_layers([network], ("forward", "keys_to_commit"))

    supplies: dict[str, ClipSupply] = {}
    lessons: dict[str, Callable[[int], Tensor]] = {}

    def learn(
        name: str, weight: float, clips: ClipSupply, frames: int,
        levels: Callable[[Recipe], Sequence[float]], **aim: Any,
    ) -> None:  # fmt: skip
        """Add a lesson that has clips of its own, of so many latent frames; what it returns is not weighed."""
        supplies[name] = clips
        of_recipe = {
            recipe.name: forced_lesson(
                learner, text, network, recipe, shift, stage.focus_weight, run,
                weight=weight, by_block=stage.recompute, levels=levels(recipe), **aim,
            )
            for recipe in {recipe.name: recipe for recipe in recipes}.values()
        }  # fmt: skip

        def lesson(step: int) -> Tensor:
            parts = parts_of(drawn(supplies[name], step, stage.batch, frames))
            return of_recipe[recipes[step % len(recipes)].name](*parts) / weight

        lessons[name] = lesson

    clips: ClipSupply
    if stage.real_weight:
        clips = world.clips(stage.pool, stage.seed, stage.frames, stage.memory_share, stage.looks_soon)
        learn("loss", stage.real_weight, clips, stage.frames, lambda recipe: recipe.levels(shift)[: stage.first_steps])
    if anchor is not None:
        frames = stage.anchor_frames or stage.frames
        if streamer is None:
            clips = world.clips(stage.pool, stage.seed, frames)
        else:
            clips = OwnClips(
                text, streamer, world, recipes[0], shift, run,
                size=stage.pool, seed=stage.seed, frames=frames, looks_away=not stage.looks_soon,
            )  # fmt: skip
        learn("anchor", stage.anchor_weight, clips, frames, lambda recipe: recipe.levels(shift), anchor=anchor)

    def turn(step: int) -> dict[str, Tensor]:
        values = {name: lesson(step) for name, lesson in lessons.items()}
        return {**values, "norm": learner.step(), **far_weights(network)}

    look = stream_strips(text, network, learner, world, recipes, shift, run)
    spent = train(
        {"student": learner}, turn, stage.budget(warmup=50), run, keep=supplies, look=look, log_every=stage.log_every
    )
    learner.swap_average()
    merge(network)
    return spent


def _require_sense(stage: TeacherForcingStage, network: WanTransformer, recipes: Sequence[Recipe]) -> None:
    """ValueError, before work begins, for settings that do not go with what is trained."""
    for recipe in recipes:
        for name, frames in {"frames": stage.frames, "anchor_frames": stage.anchor_frames}.items():
            if frames % recipe.block:
                raise ValueError(f"{name} ({frames}) must be whole blocks of {recipe.block}")
        if stage.first_steps > len(recipe.steps):
            raise ValueError(f"{recipe.name} has {len(recipe.steps)} steps: first_steps cannot be {stage.first_steps}")
        if stage.first_steps and recipe.rolls:
            raise ValueError(f"{recipe.name} has blocks at all its steps in flight: first_steps is not for it")
        if stage.anchor_streams and (recipe.rolls or recipe.joint):
            raise ValueError(f"{recipe.name} is not streamed block by block with exact attention: no anchor_streams")
        memory = recipe.memory(network)
        if not stage.recompute:
            require_one_pass(memory)


def forced_lesson(
    learner: Learner, text: WordEncoder, network: WanTransformer, recipe: Recipe, shift: float, focus_weight: float,
    run: Run, *, weight: float = 1.0, by_block: bool = False, levels: Sequence[float] = (),
    anchor: WanTransformer | None = None,
) -> Callable[..., Tensor]:  # fmt: skip
    """Teacher forcing under a recipe's memory, of the `parts_of` of clips; of its weight for the learner.

    levels, anchor: see `teacher_forcing_loss`. A recipe that rolls is learned by windows at its own levels, whose
    offset is drawn for each batch.
    """
    memory = recipe.memory(network)
    if recipe.rolls:
        levels = recipe.levels(shift)

    def loss(
        latents_BFCHW: Tensor, tokens_BPL: Tensor, prompt_BF: Tensor, focus_BFHW: Tensor, offset: int | None
    ) -> Tensor:  # fmt: skip
        with run.autocast():
            clips = Clips(latents_BFCHW, embed(text, tokens_BPL), prompt_BF, focus_BFHW)
            found = teacher_forcing_loss(
                network, clips, shift, focus_weight,
                block=recipe.block, memory=memory, by_block=by_block, levels=levels, offset=offset, anchor=anchor,
            )  # fmt: skip
        return weight * found

    taught = learner.taught_by(loss, recorded=not (by_block or memory.converted))

    def lesson(*parts: Tensor) -> Tensor:
        return taught(*parts, int(torch.randint(len(levels), ())) if recipe.rolls else None)

    return lesson
