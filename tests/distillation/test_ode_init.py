"""The teacher's trajectories, and their regression under the causal mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import tiny

from longtake.distillation import ode_init
from longtake.flow import even_levels, warped_levels
from longtake.generation.clip import sample_clip
from longtake.memory.window import WindowShape

FRAMES, SHIFT = 6, 3.0


def trajectory(steps: int, stops: int) -> torch.Tensor:
    made = tiny.network()
    noise = torch.randn(1, FRAMES, *tiny.LATENTS[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    said, nothing = tiny.prompt(made, seed=1), tiny.prompt(made, seed=2)
    return ode_init.trajectories(made, noise, said, nothing, None, steps=steps, stops=stops, shift=SHIFT, guidance=3.0)


def test_a_trajectory_begins_in_noise_and_ends_in_the_teachers_clip() -> None:
    made = tiny.network()
    states = trajectory(8, 4)
    assert states.shape[:2] == (1, 5)
    said, nothing = tiny.prompt(made, seed=1), tiny.prompt(made, seed=2)
    clip = sample_clip(made, states[:, 0], said, nothing, even_levels(8, SHIFT), 3.0)
    torch.testing.assert_close(states[:, -1], clip)
    from_second_stop = even_levels(8, SHIFT)[2:]
    torch.testing.assert_close(sample_clip(made, states[:, 1], said, nothing, from_second_stop, 3.0), clip)


def test_stops_are_the_students_levels() -> None:
    assert even_levels(4, SHIFT) == pytest.approx(warped_levels([1000, 750, 500, 250], SHIFT))
    with pytest.raises(ValueError, match="5 stops do not fall on 8 steps"):
        trajectory(8, 5)


@given(block=st.integers(1, 4), blocks=st.integers(1, 6), sink=st.integers(0, 3), past=st.integers(0, 3))
def test_the_mask_is_what_a_stream_would_see(block: int, blocks: int, sink: int, past: int) -> None:
    window = WindowShape(sink=sink * block, past=past * block)
    allowed = ode_init.block_causal(block * blocks, block, window)
    for query in range(block * blocks):
        begin = query // block * block
        committed = [f for f in range(begin) if f < window.sink or f >= begin - window.past]
        seen = {*committed, *range(begin, begin + block)}
        assert set(allowed[query].nonzero()[:, 0].tolist()) == seen


def test_clean_blocks_carry_no_loss_and_a_perfect_student_has_none(monkeypatch) -> None:
    made, states = tiny.network(), trajectory(4, 2)
    stops: list[int] = []
    monkeypatch.setattr(
        ode_init.torch, "randint", lambda high, size, device: torch.tensor([stops]).expand(size).to(device)
    )
    window = WindowShape(sink=3, past=3)

    def loss() -> torch.Tensor:
        return ode_init.regression_loss(made, states, tiny.prompt(made), None, shift=SHIFT, block=3, window=window)

    stops[:] = [2, 2]
    assert loss() == 0
    stops[:] = [0, 2]
    first = loss()
    states[:, 2, 3:] += 1  # the clean second block is context alone, and the first does not see it
    torch.testing.assert_close(loss(), first)

    level_of_stop = even_levels(2, SHIFT)[1]

    def perfect(noisy, level_BF, prompts, view, prompt_BF):
        assert torch.allclose(level_BF, torch.tensor(level_of_stop).to(level_BF))
        return (noisy - states[:, -1]) / level_of_stop

    stops[:] = [1, 1]
    made.forward = perfect
    assert loss() < 1e-10

    def off_by_one(noisy, level_BF, prompts, view, prompt_BF):
        return (noisy - states[:, -1] - 1) / level_BF.clamp_min(1e-9)[..., None, None, None]

    made.forward = off_by_one
    for stops[:] in ([0, 0], [0, 1], [1, 2]):
        assert loss() == pytest.approx(1, abs=1e-4), "a mean over the blocks that learn, however many"
