import torch
from hypothesis import given
from hypothesis import strategies as st

from longtake import flow

levels = st.floats(0.01, 1.0)


@given(level=levels, shift=st.floats(0.5, 10))
def test_a_shift_keeps_the_ends_and_the_order(level: float, shift: float) -> None:
    assert flow.shift_level(0.0, shift) == 0 and flow.shift_level(1.0, shift) == 1
    assert flow.shift_level(level, shift) > flow.shift_level(level * 0.9, shift)


@given(level=levels)
def test_velocity_clean_and_noise_tell_the_same(level: float) -> None:
    clean, noise = torch.randn(2, 1, 2, 3, 4, 4, dtype=torch.float64)
    level_BF = torch.full((1, 2), level, dtype=torch.float64)
    noisy, velocity = flow.add_noise(clean, noise, level_BF), noise - clean
    torch.testing.assert_close(flow.clean_from_velocity(noisy, velocity, level_BF), clean)
    torch.testing.assert_close(flow.velocity_from_clean(noisy, clean, level_BF), velocity)
    torch.testing.assert_close(flow.euler_step(noisy, velocity, level_BF, 0 * level_BF), clean)


def test_each_frame_has_its_own_level() -> None:
    clean, noise = torch.zeros(1, 2, 1, 1, 1), torch.ones(1, 2, 1, 1, 1)
    assert flow.add_noise(clean, noise, torch.tensor([[0.25, 1.0]])).flatten().tolist() == [0.25, 1.0]


def test_samples_keep_their_type_whatever_that_of_levels() -> None:
    sample, other = torch.randn(2, 1, 2, 1, 4, 4).bfloat16()
    level_BF = torch.tensor([[0.5, 1.0]])
    for made in (
        flow.add_noise(sample, other, level_BF),
        flow.clean_from_velocity(sample, other, level_BF),
        flow.velocity_from_clean(sample, other, level_BF),
        flow.euler_step(sample, other, level_BF, 0 * level_BF),
    ):
        assert made.dtype == torch.bfloat16


def test_published_step_lists() -> None:
    warped = [round(1000 * level, 3) for level in flow.warped_levels([1000, 750, 500, 250], 5)]
    assert warped == [1000, 937.5, 833.333, 625]
    teacher = [
        1000, 991.7, 982.9, 973.5, 963.3, 952.4, 940.6, 927.8, 914.0, 898.9, 882.4, 864.2, 844.2, 821.9, 797.1, 769.2,
        737.7, 701.8, 660.4, 612.2, 555.6, 487.8, 405.4, 303.0, 172.4,
    ]  # fmt: skip
    assert [round(1000 * level, 1) for level in flow.even_levels(25, 5)] == teacher


def test_published_code_looks_levels_up_in_a_grid_that_ends_above_zero() -> None:
    found = flow.nearest_level(torch.tensor([[0.0, 0.5], [0.9, 1.0]]), 5)
    torch.testing.assert_close(found, torch.tensor([[0.00498, 0.5], [0.9, 1.0]]), atol=1e-3, rtol=0)
    assert found[0, 0] > 0 and found[1, 1] == 1 and torch.equal(flow.nearest_level(found, 5), found)


def test_guidance_of_one_is_the_prompt_alone() -> None:
    with_prompt, without = torch.randn(2, 5)
    torch.testing.assert_close(flow.guided(with_prompt, without, 1.0), with_prompt)
    torch.testing.assert_close(flow.guided(with_prompt, without, 4.0), with_prompt + 3 * (with_prompt - without))


def test_matching_levels_stay_off_the_ends() -> None:
    drawn = flow.matching_level(torch.linspace(0, 0.9999, 1000), 5)
    assert drawn.min() == 0.02 and drawn.max() == 0.98
