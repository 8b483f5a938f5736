"""Far states followed for hours: the quick way is the slow one, and what is measured means what it says."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longtake.attention import linear
from longtake.attention.linear import Sums
from longtake.attention.rope import Grid, RotaryAxes
from longtake.evaluation.retention import (
    Block,
    Recorded,
    Retention,
    Setting,
    course_of,
    cut_together,
    effective_rank,
    one_two_five,
    retention,
    states,
)
from longtake.memory.far import Decay, Delta, FarShape, Keep, MassCap, Rule, SinkInFar
from longtake.memory.stream_memory import MemoryShape
from longtake.memory.window import WindowShape

LAYERS, FRAMES, HEADS, SIZE = 2, 3, 2, 8
GRID = Grid(RotaryAxes(split=(4, 2, 2)), rows=2, columns=3)
RULES: list[Rule] = [
    Keep(),
    Decay(half_life=30),
    MassCap(frames=12),
    MassCap(frames=30),  # full only after the opening
    Delta(),
    Delta(half_life=60, stiffness=0.1),
]
OF_EACH_RULE = pytest.mark.parametrize("rule", RULES, ids=str)


def block(seed: int) -> Block:
    drawn = torch.randn(2, LAYERS, FRAMES * 6, HEADS, SIZE, generator=torch.Generator().manual_seed(seed))
    return Block(*drawn)


def setting(sink: int = 3, past: int = 3, extent: int = 21) -> Setting:
    shape = MemoryShape(window=WindowShape(sink=sink, past=past), extent=extent)
    return Setting(memory=shape, block=FRAMES, grid=GRID)


def recorded(shots: Sequence[int] = (2, 3), held_out: int = 2, queries: int = 2) -> Recorded:
    seeds = iter(range(100))
    return Recorded(
        shots=[[block(next(seeds)) for _ in range(length)] for length in shots],
        held_out=[block(50 + number) for number in range(held_out)],
        queries=[block(70 + number).k_LTND for number in range(queries)],
    )


def measured(rule: Rule, blocks: int, **made: int) -> Retention:
    return retention(setting(), FarShape(rule=rule), recorded(**made), blocks=blocks)


def assert_same(one: Sums, other: Sums, close: float = 1e-4) -> None:
    for got, want in zip(one, other, strict=True):
        torch.testing.assert_close(got, want, atol=close, rtol=close)


# the quick way


@given(
    rule=st.sampled_from(RULES),
    sink=st.sampled_from([0, 3, 6]),
    past=st.sampled_from([0, 3, 6]),
    extent=st.integers(18, 24),
    far_sink=st.sampled_from(SinkInFar),
    count=st.integers(9, 24),
    turns=st.booleans(),
)
@settings(max_examples=25)
def test_the_quick_way_goes_through_the_states_of_a_real_memory(
    rule: Rule, sink: int, past: int, extent: int, far_sink: SinkInFar, count: int, turns: bool
) -> None:
    where, far = setting(sink, past, extent), FarShape(rule=rule, sink=far_sink, turns_with_frames=turns)
    blocks = [block(seed) for seed in range(5)]
    order = cut_together([2, 3], count, seed=1)
    course = course_of(far, blocks, where.absorbed_at(far, "cpu"), FRAMES)
    quick = list(states(where, far, blocks, order, course))
    slow = list(states(where, far, blocks, order))
    assert len(quick) == len(slow) == count - where.delay(far)
    for one, other in zip(quick, slow, strict=True):
        assert_same(one, other, close=1e-4 if isinstance(rule, Delta) else 0)


@OF_EACH_RULE
def test_an_old_block_is_replaced_as_if_it_had_never_been_there(rule: Rule) -> None:
    """Read-back errors by age, against runs through a real memory that commit the held-out block itself."""
    count, where, far = 16, setting(), FarShape(rule=rule)
    made = recorded(held_out=1)
    found = retention(where, far, made, blocks=count, seed=5)
    fill = [block for shot in made.shots for block in shot]
    order = cut_together([2, 3], count, seed=5)
    keys, at = made.held_out[0], where.absorbed_at(far, "cpu")
    mean = torch.cat([block.v_LTND for block in fill], 1).mean(1, keepdim=True)

    def error(order: Sequence[int]) -> Tensor:
        *_, sums = states(where, far, [*fill, keys], order)
        answer = rule.read(sums, far.form.of_queries(keys.k_LTND, at))
        return ((answer - keys.v_LTND).square().sum((1, 2, 3)) / (mean - keys.v_LTND).square().sum((1, 2, 3))).sqrt()

    assert found.ages == [0, 1, 2, 5, 9]
    for column, age in enumerate(found.ages):
        place = count - 2 - age  # the last block is in the window
        slow = error([*order[:place], len(fill), *order[place + 1 :]])
        torch.testing.assert_close(found.read_back_LA[:, column], slow, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.never_L, error(order), atol=1e-4, rtol=1e-4)


def test_what_has_faded_altogether_is_as_if_never_seen() -> None:
    found = measured(Decay(half_life=0.1), 200)
    assert torch.equal(found.read_back_LA[:, -1], found.never_L)
    assert not found.recalled_LA[:, -1].any()
    assert found.remembered_L == [0, 0]


# what is measured


def test_what_one_block_fills_has_its_rank_however_often_it_comes() -> None:
    keys = block(0)
    features = linear.PAPER.of_keys(keys.k_LTND, GRID.rotation(range(FRAMES), "cpu"))
    sums = linear.sums_of(features, keys.v_LTND)
    once, often = sums, Keep().add(sums, sums.scaled(40), FRAMES)
    torch.testing.assert_close(effective_rank(often.kv_BNRD), effective_rank(once.kv_BNRD))


@given(rank=st.integers(1, SIZE))
def test_rank_counts_directions_that_weigh_the_same(rank: int) -> None:
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(rank))).Q
    kv = 3 * basis[:, :rank] @ basis[:, :rank].T
    torch.testing.assert_close(effective_rank(kv.expand(LAYERS, HEADS, -1, -1)), torch.full((LAYERS,), float(rank)))


def test_rank_is_the_mean_over_heads() -> None:
    one, full = torch.zeros(SIZE, SIZE), torch.eye(SIZE)
    one[0, 0] = 1
    torch.testing.assert_close(effective_rank(torch.stack([one, full])[None]), torch.tensor([(1 + SIZE) / 2]))


@pytest.mark.parametrize("rule, error", [(Keep(), 1e-4), (Delta(stiffness=1e-6), 1e-3)], ids=str)
def test_orthogonal_keys_are_read_back_exactly(rule: Rule, error: float) -> None:
    """Four tokens, each with a key of its own pair of numbers, so that rotation does not mix them."""
    where = Setting(memory=setting().memory, block=FRAMES, grid=Grid(GRID.axes, rows=1, columns=1))
    k = torch.zeros(LAYERS, FRAMES, HEADS, SIZE)
    for token in range(FRAMES):
        k[:, token, :, 2 * token] = 1 + token
    unlike = torch.zeros_like(k)
    unlike[..., 2 * FRAMES] = 1
    probe, other = Block(k, torch.randn_like(k)), Block(unlike, torch.randn_like(k))
    made = Recorded(shots=[[other]], held_out=[probe], queries=[k])
    found = retention(where, FarShape(rule=rule), made, blocks=20)
    assert found.read_back_LA.max() < error and found.newest_LM.max() < error
    assert found.never_L.min() > 0.5
    assert found.remembered_L == [found.ages[-1]] * LAYERS


def news_of_the_same(rule: Rule, blocks: int) -> Retention:
    """One block comes again and again; the held-out one has the same keys and values that are 2 more than its 1."""
    keys = block(0)
    made = Recorded(
        shots=[[Block(keys.k_LTND, torch.ones_like(keys.v_LTND))]],
        held_out=[Block(keys.k_LTND, torch.full_like(keys.v_LTND, 3))],
        queries=[block(1).k_LTND],
    )
    return retention(setting(sink=0, past=0, extent=2 * FRAMES), FarShape(rule=rule), made, blocks=blocks)


def test_news_of_a_state_that_keeps_all_falls_as_one_in_n() -> None:
    found = news_of_the_same(Keep(), 1000)
    expected = 2 / (torch.tensor(found.marks) + 1)
    torch.testing.assert_close(found.news_LM, expected.expand(LAYERS, -1), atol=0, rtol=1e-3)
    torch.testing.assert_close(found.saturation_LM, (1 - expected).expand(LAYERS, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "rule, share", [(Decay(half_life=FRAMES), 1 / 2), (MassCap(frames=4 * FRAMES), 1 / 4)], ids=str
)
def test_news_of_a_state_that_makes_room_stays(rule: Rule, share: float) -> None:
    found = news_of_the_same(rule, 1000)
    late = found.news_LM[:, [mark >= 50 for mark in found.marks]]
    torch.testing.assert_close(late, torch.full_like(late, 2 * share), atol=0, rtol=1e-3)


def test_a_state_that_keeps_all_recalls_every_age_alike_and_one_that_decays_the_new() -> None:
    keep, decay = measured(Keep(), 60), measured(Decay(half_life=12), 60)
    torch.testing.assert_close(keep.read_back_LA[:, 0], keep.read_back_LA[:, -1], atol=1e-3, rtol=0)
    assert (decay.read_back_LA.diff(dim=1) > 0).all()
    assert all(keep.read_back_LA[:, 0] > decay.read_back_LA[:, 0])


# what fills hours


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), count=st.integers(0, 60), seed=st.integers(0, 9))
def test_hours_are_whole_shots_one_after_the_other(lengths: list[int], count: int, seed: int) -> None:
    order = cut_together(lengths, count, seed)
    assert order == cut_together(lengths, count + 7, seed)[:count]
    firsts = {sum(lengths[:shot]) for shot in range(len(lengths))}
    for one, following in pairwise(order):
        assert following == one + 1 or following in firsts
    assert len(order) == count and all(0 <= number < sum(lengths) for number in order)


def test_another_seed_is_another_order() -> None:
    assert cut_together([2, 2, 2], 50, seed=0) != cut_together([2, 2, 2], 50, seed=1)


@pytest.mark.parametrize("most, series", [(0, []), (1, [1]), (7, [1, 2, 5, 7]), (50, [1, 2, 5, 10, 20, 50])])
def test_marks_are_evenly_spread_by_ratio(most: int, series: list[int]) -> None:
    assert one_two_five(most) == series


def test_progress_is_told() -> None:
    told: list[int] = []
    retention(setting(), FarShape(), recorded(shots=(1,), held_out=1), blocks=8010, progress=told.append)
    assert told == [8000]


def test_what_cannot_be_followed_is_refused() -> None:
    class Other:
        absorb = read = None

    where = setting()
    with pytest.raises(ValueError, match=f"more than {where.opening} blocks, got {where.opening}"):
        measured(Keep(), where.opening)
    assert measured(Keep(), where.opening + 1).ages == [0]
    with pytest.raises(ValueError, match="under rules that add and under Delta"):
        measured(Other(), 20)
