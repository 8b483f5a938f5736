"""The stage `dmd`: teacher + student + prompts + clips -> few-step student, by distribution matching on its own
rollouts."""

import copy
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from longtake import parallel
from longtake.distillation import dmd
from longtake.distillation.low_rank import merge
from longtake.distillation.plan import Plan, Script, draw_plan, rolled_out
from longtake.distillation.regularized import regularized_loss, teacher_sample
from longtake.distillation.rollout import FirstNoise, FreshNoise
from longtake.distillation.stages.learners import at_rank, compile_for, dmd_adam, far_weights
from longtake.distillation.stages.settings import DmdStage
from longtake.distillation.stages.strips import stream_strips
from longtake.distillation.stages.teacher_forcing import forced_lesson
from longtake.distillation.stages.world import ClipSupply, Prompts, World, embed, parts_of, renew
from longtake.distillation.trainer import Dice, Learner, Run, train
from longtake.flow import even_levels
from longtake.generation.recipe import Recipe
from longtake.models.text import WordEncoder
from longtake.models.wan import WanTransformer


def train_dmd(
    text: WordEncoder, network: WanTransformer, teacher: WanTransformer, world: World, recipes: Sequence[Recipe],
    shift: float, stage: DmdStage, run: Run,
) -> dict[str, float]:  # fmt: skip
    _require_sense(stage, network, recipes)
    at_rank(network, stage.rank)
    critic = copy.deepcopy(teacher).requires_grad_(True).train()
    network.requires_grad_(True).train()
    student = Learner(network, [dmd_adam(network, stage.lr, stage.far_lr)], average=stage.average)
    judge = Learner(critic, [dmd_adam(critic, stage.critic_lr, stage.critic_lr)], average=None)
    compile_for(run, network, teacher, critic)
    parallel.record_calls([network, teacher, critic], ("forward", "keys_to_commit"))  # most of what rollouts do
    shared = Dice(stage.seed)
    supplies = supplies_for(stage, world, network.config.extent)
    clips = supplies.get("clips")
    real = supplies.get("real", clips) if stage.real_weight else None
    with torch.no_grad():
        nothing_BPLE = embed(text, text.no_prompt(stage.batch)[:, None])

    by_name = {recipe.name: recipe for recipe in recipes}

    @cache
    def real_lesson(name: str, count: int) -> Callable[..., Tensor]:
        recipe = by_name[name].with_levels(count)
        left_out = max(0, count - stage.last_exits) if stage.last_exits and not recipe.rolls else 0
        early = recipe.levels(shift)[:left_out]
        return forced_lesson(
            student, text, network, recipe, shift, stage.focus_weight, run,
            weight=stage.real_weight, by_block=not recipe.memory(network).in_one_pass, levels=early,
        )  # fmt: skip

    def critic_loss_of(sample: Tensor, text_BPLE: Tensor, prompt_BF: Tensor) -> Tensor:
        with run.autocast():
            return dmd.critic_loss(sample, critic, text_BPLE, prompt_BF, shift)

    criticised = judge.taught_by(critic_loss_of)

    def matched(recipe: Recipe, plan: Plan, script: Script) -> tuple[Tensor, dict[str, Tensor]]:
        """A rollout [B, F, C, H, W], and the student's loss on it under "loss", with its parts."""
        text_BPLE, prompt_BF, _ = script
        fresh = FreshNoise((stage.batch, recipe.block, *world.latent_size), run.device)
        pulled = stage.pull > 0 and plan.can_be_pulled
        first = [fresh(block, 0) for block in range(plan.blocks)] if pulled else []
        said = dmd.estimate_by(teacher, text_BPLE, prompt_BF)
        unsaid = dmd.estimate_by(teacher, nothing_BPLE, None)
        with run.autocast():
            noise = FirstNoise(first) if pulled else fresh
            sample = rolled_out(network, script, noise, recipe, plan, shift).float()
            guided = dmd.guided_estimate(said, unsaid, stage.guidance)
            by_critic = dmd.estimate_by(critic, text_BPLE, prompt_BF)
            matching = dmd.matching_loss(sample, guided, by_critic, shift, plan.learned_frames(run.device))
            if not pulled:
                return sample, {"loss": matching, "matching": matching}
            guided = dmd.guided_estimate(said, unsaid, stage.pull_guidance)
            target = teacher_sample(guided, torch.cat(first, dim=1), even_levels(stage.pull_steps, shift))
            return sample, regularized_loss(matching, sample, target, stage.pull)

    def turn(step: int) -> dict[str, Tensor]:
        recipe = recipes[step % len(recipes)]
        plan = draw_plan(
            shared, recipe, network.config.extent,
            levels=stage.levels_of(recipe), most_blocks=stage.most_blocks, most_given=stage.most_given,
            self_forcing_share=stage.self_forcing_share, last_exits=stage.last_exits,
        )  # fmt: skip
        for supply in supplies.values():
            renew(supply, step)
        taught = {}
        # First: while a rollout's graph holds the parameters, no lesson of theirs can be recorded.
        if real is not None:
            frames = stage.real_frames or real.frames - real.frames % recipe.block
            drawn = real.draw(stage.real_batch or stage.batch, frames)
            value = real_lesson(recipe.name, plan.levels[0])(*parts_of(drawn))
            taught = {"real": value / stage.real_weight}
        script = script_of(text, world, clips, plan, stage, step)
        sample, losses = matched(recipe, plan, script)
        norm = student.step(losses.pop("loss"))
        for _ in range(stage.critic_turns):
            critic_loss = criticised(sample.detach(), script.text_BPLE, script.prompt_BF)
            judge.step()
        learned = sample.detach()[:, plan.given * plan.block :]
        values = losses | taught | {"critic": critic_loss, "norm": norm, "motion": learned.diff(dim=1).abs().mean()}
        return {name: value.detach() for name, value in values.items()} | far_weights(network)

    shown = [recipe.with_levels(stage.levels_of(recipe)[0]) for recipe in recipes]
    look = stream_strips(text, network, student, world, shown, shift, run)
    learners = {"student": student, "critic": judge}
    keep = {"shared": shared, **supplies}
    spent = train(
        learners, turn, stage.budget(warmup=20), run, keep=keep, look=look, log_every=stage.log_every, rare=("pull",)
    )
    student.swap_average()
    merge(network)
    return spent


def _require_sense(stage: DmdStage, network: WanTransformer, recipes: Sequence[Recipe]) -> None:
    """ValueError, before work begins, for settings that do not go together or with what is trained."""
    for recipe in recipes:
        if network.config.extent % recipe.block or stage.most_blocks * recipe.block < network.config.extent:
            raise ValueError(
                f"rollouts of up to {stage.most_blocks} blocks of {recipe.block} latent frames must hold the teacher's "
                f"clip, {network.config.extent} frames, in whole blocks"
            )
        if stage.real_frames % recipe.block:
            raise ValueError(f"real_frames ({stage.real_frames}) must be whole blocks of {recipe.block}")
        for count in stage.levels_of(recipe):
            recipe.with_levels(count).memory(network)  # refused before work begins
    if stage.pull and stage.last_exits and min(min(stage.levels_of(recipe)) for recipe in recipes) > stage.last_exits:
        raise ValueError(
            "only rollouts that exit at the first step are pulled, and last_exits leaves that out: drop one"
        )


def supplies_for(stage: DmdStage, world: World, clip: int) -> dict[str, ClipSupply]:
    """By the names that they are saved under: "clips", which blocks are given from, and "real", the clips of teacher
    forcing where the former will not do. clip: latent frames of the teacher's."""
    own = bool(stage.real_frames or stage.memory_share)
    supplies = {}
    if own:  # first, for these may be refused as too short
        supplies["real"] = world.clips(stage.pool, stage.seed, stage.real_frames or clip, stage.memory_share)
    if stage.most_given or (stage.real_weight and not own):
        supplies["clips"] = world.clips(stage.pool, stage.seed, clip)
    return supplies


@torch.no_grad()
def script_of(
    text: WordEncoder, world: World, supply: ClipSupply | None, plan: Plan, stage: DmdStage, step: int
) -> Script:
    """Real clips with their prompts, where blocks are given; else prompts alone."""
    said: Prompts
    if supply is not None and plan.given:
        said = clips = supply.draw(stage.batch, plan.judged * plan.block)
        given = clips.latents_BFCHW.split(plan.block, dim=1)[: plan.given]
    else:
        said, given = world.prompts(stage.batch, stage.seed * 1_000_000 + step, plan.judged * plan.block), ()
    return Script(embed(text, said.tokens_BPL), plan.prompts_of_judged(said.prompt_BF), given)
