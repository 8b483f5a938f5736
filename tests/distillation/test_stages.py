"""What a step of distribution matching is made of: the shape of rollouts and the prompts of their blocks."""

import torch
from tests import tiny

from longtake.distillation import stages
from longtake.distillation.stages import DmdStage
from longtake.distillation.trainer import Dice, Run
from longtake.recipes import self_forcing_sink

CLIP = 9
RECIPE = self_forcing_sink()


def plans(**settings) -> list[stages._Plan]:
    dice, stage = Dice(1), DmdStage(**settings)
    return [stages._plan(dice, RECIPE, stage, CLIP) for _ in range(400)]


def test_rollouts_have_every_length_and_every_exit() -> None:
    made = plans(most_blocks=5, levels=(4, 2))
    assert {plan.levels for plan in made} == {(4, 1), (4, 2), (4, 3), (4, 4), (2, 1), (2, 2)}
    assert {plan.blocks for plan in made} == {3, 4, 5} and all(plan.learned == 3 for plan in made)
    assert 0.5 < sum(plan.blocks == 3 for plan in made) / len(made) < 0.8


def test_a_block_stands_under_the_prompt_of_its_first_frame() -> None:
    prompt_BF = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [0] * 12])
    short = stages._Plan((4, 4), blocks=3, learned=3, block=3)
    assert short.prompts_of_learned(prompt_BF).tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 1], [0] * 9]
    longer = stages._Plan((4, 4), blocks=4, learned=3, block=3)
    torch.manual_seed(0)
    drawn = {tuple(longer.prompts_of_learned(prompt_BF)[0].tolist()) for _ in range(50)}
    assert {row.index(1) for row in drawn} == {3, 6}, "the change falls on one block or another, never inside one"


def rolled_out(blocks: int, learned: int) -> torch.Tensor:
    made = tiny.network(extent=CLIP).float()
    torch.manual_seed(3)
    plan = stages._Plan((2, 2), blocks, learned, RECIPE.block)
    prompt_BF = torch.zeros(1, learned * RECIPE.block, dtype=torch.long)
    text = tiny.text(prompts=2).float()
    run = Run(out=None, device=torch.device("cpu"))  # type: ignore[arg-type]  # nothing is written
    return stages._rolled_out(made, text, prompt_BF, tiny.LATENTS[1:], RECIPE, plan, 3.0, run)


def test_the_learned_part_of_a_long_rollout_is_the_end_of_the_whole() -> None:
    whole, learned = rolled_out(5, 5), rolled_out(5, 2)
    assert learned.requires_grad and torch.isfinite(learned).all()
    torch.testing.assert_close(learned, whole[:, -2 * RECIPE.block :])
    assert len({round(frame.sum().item(), 4) for frame in whole.unbind(1)}) == whole.shape[1], "all were produced"
