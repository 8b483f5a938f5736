import torch
from tests import tiny

from longtake.flow import guided
from longtake.generation.clip import sample_clip


def test_a_clip_follows_the_guided_velocity_down_to_level_zero() -> None:
    made = tiny.network()
    said, nothing = tiny.prompt(made, seed=1), tiny.prompt(made, seed=2)
    noise = torch.randn(1, 6, *tiny.LATENTS[1:], dtype=torch.float64)
    steps: list[int] = []
    got = sample_clip(made, noise, said, nothing, (1.0, 0.4), 3.0, on_step=lambda step, x: steps.append(step))
    with torch.no_grad():
        x = noise
        for level, lower in ((1.0, 0.4), (0.4, 0.0)):
            level_BF = torch.full((1, 6), level)
            view = made.clip_view(x)
            v = guided(made(x, level_BF, said, view), made(x, level_BF, nothing, view), 3.0)
            x = x + (lower - level) * v
    torch.testing.assert_close(got, x)
    assert steps == [0, 1]


def test_a_clip_may_hold_two_prompts() -> None:
    made = tiny.network()
    both = made.prompt_keys(tiny.text(prompts=2))
    noise = torch.randn(1, 4, *tiny.LATENTS[1:], dtype=torch.float64)
    first = torch.zeros(1, 4, dtype=torch.long)
    one = sample_clip(made, noise, both, tiny.prompt(made), (1.0, 0.5), 2.0, first)
    same = sample_clip(made, noise, both.select(torch.tensor([0])), tiny.prompt(made), (1.0, 0.5), 2.0)
    torch.testing.assert_close(one, same)
    changed = sample_clip(made, noise, both, tiny.prompt(made), (1.0, 0.5), 2.0, torch.tensor([[0, 0, 1, 1]]))
    assert not torch.allclose(changed, one)
