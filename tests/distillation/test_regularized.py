import pytest
import torch
from tests import tiny

from longtake.distillation import dmd
from longtake.distillation.regularized import regularized_loss, teacher_sample
from longtake.flow import even_levels
from longtake.generation.clip import sample_clip

LEVELS = even_levels(5, 3.0)
GUIDANCE = 3.5


def noise() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 6, *tiny.LATENTS[1:], dtype=torch.float64)


def teacher(weight: float) -> dmd.Estimate:
    made = tiny.network()
    said, nothing = (dmd.estimate_by(made, tiny.text(2, seed=seed), None) for seed in (1, 2))
    return dmd.guided_estimate(said, nothing, weight)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_the_teachers_sample_is_that_of_the_clip_sampler(steps: int) -> None:
    """A list of levels cut short ends in the last clean estimate: the same as one step from there to 0."""
    made = tiny.network()
    said, nothing = (tiny.prompt(made, 2, seed=seed) for seed in (1, 2))
    expected = sample_clip(made, noise(), said, nothing, LEVELS[:steps], GUIDANCE)
    torch.testing.assert_close(teacher_sample(teacher(GUIDANCE), noise(), LEVELS[:steps]), expected, rtol=0, atol=1e-5)


def test_another_may_make_the_last_estimate_alone() -> None:
    asked = []

    def last(noisy: torch.Tensor, level_BF: torch.Tensor) -> torch.Tensor:
        asked.append((noisy, level_BF))
        return noisy + 1

    made = teacher_sample(teacher(GUIDANCE), noise(), LEVELS[:3], last)
    ((noisy, level_BF),) = asked
    assert torch.equal(made, noisy + 1) and level_BF.shape == (2, 6)
    torch.testing.assert_close(level_BF, torch.full_like(level_BF, LEVELS[2]))
    usual = teacher_sample(teacher(GUIDANCE), noise(), LEVELS[:3])
    torch.testing.assert_close(usual, teacher(GUIDANCE)(noisy, level_BF))


def test_the_pull_moves_the_first_estimate_alone_and_where_the_mask_is() -> None:
    first, target, matching = noise().requires_grad_(), noise().flip(0).requires_grad_(), torch.tensor(2.0)
    mask = torch.tensor([0, 0, 0, 1, 1, 1]).reshape(1, 6, 1, 1, 1)
    losses = regularized_loss(matching, first, target, 0.05, mask)
    torch.testing.assert_close(losses["loss"], 2 + 0.05 * (first - target)[:, 3:].square().mean())
    losses["loss"].backward()
    expected = 0.05 * 2 * mask * (first - target) / first[:, 3:].numel()
    torch.testing.assert_close(first.grad, expected.detach())
    assert target.grad is None
