"""The stage `ode`: teacher + prompts -> causal student, by regression of the teacher's trajectories."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longtake.distillation import ode_init
from longtake.distillation.stages.guided_clips import start_of
from longtake.distillation.stages.learners import compile_for, learner_of
from longtake.distillation.stages.settings import OdeStage
from longtake.distillation.stages.strips import stream_strips
from longtake.distillation.stages.world import World, embed
from longtake.distillation.trainer import Run, train
from longtake.generation.recipe import Recipe
from longtake.models.text import WordEncoder
from longtake.models.wan import WanTransformer


def train_ode(
    text: WordEncoder, network: WanTransformer, teacher: WanTransformer, world: World, recipes: Sequence[Recipe],
    shift: float, stage: OdeStage, run: Run,
) -> dict[str, float]:  # fmt: skip
    if network.config.conversion or any(recipe.joint for recipe in recipes):
        raise ValueError("ode works under a mask, which converted layers cannot be given: take teacher_forcing")
    shown = [recipe.with_levels(stage.levels) for recipe in recipes]
    for recipe in shown:
        recipe.memory(network)  # refused before work begins
        if teacher.config.extent % recipe.block:
            raise ValueError(
                f"the teacher's clip, {teacher.config.extent} latent frames, must be whole blocks of {recipe.block}"
            )
    learner = learner_of(network, stage.lr, stage.lr, stage.average)
    compile_for(run, network, teacher)
    states, text_BPLE, prompt_BF = _trajectories(text, teacher, world, shift, stage, run)

    def turn(step: int) -> dict[str, Tensor]:
        recipe = recipes[step % len(recipes)]
        rows = torch.randint(len(states), (stage.batch,), device=run.device)
        with run.autocast():
            prompts = network.prompt_keys(text_BPLE[rows])
            window = recipe.memory(network).window
            loss = ode_init.regression_loss(
                network, states[rows].float(), prompts, prompt_BF[rows], shift=shift, block=recipe.block, window=window
            )
        return {"loss": loss.detach(), "norm": learner.step(loss)}

    look = stream_strips(text, network, learner, world, shown, shift, run)
    spent = train({"student": learner}, turn, stage.budget(warmup=50), run, look=look, log_every=stage.log_every)
    learner.swap_average()
    return spent


@torch.no_grad()
def _trajectories(
    text: WordEncoder, teacher: WanTransformer, world: World, shift: float, stage: OdeStage, run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    """States [pairs, K, F, C, H, W] in bfloat16, text embeddings and the prompt of each frame. They follow from the
    seed, so a run that goes on makes them again."""
    states, texts, numbers = [], [], []
    batches, frames = -(-stage.pairs // stage.batch), teacher.config.extent
    for number in range(batches):
        said = world.prompts(stage.batch, stage.seed * 1_000_000 + number, frames)
        first = stage.seed * 1_000_000_000 + (run.rank * batches + number) * stage.batch
        with run.autocast():
            text_BPLE = embed(text, said.tokens_BPL)
            start = start_of(text, teacher, text_BPLE, range(first, first + stage.batch), world)
            states.append(ode_init.trajectories(
                teacher, *start, said.prompt_BF[:, :frames],
                steps=stage.sampling_steps, stops=stage.levels, shift=shift, guidance=stage.guidance,
            ).bfloat16())  # fmt: skip
        texts.append(text_BPLE.float())
        numbers.append(said.prompt_BF[:, :frames])
    return torch.cat(states), torch.cat(texts), torch.cat(numbers)
