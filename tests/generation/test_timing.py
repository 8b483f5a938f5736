import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.generation.timing import count_misses, measure


def test_the_first_block_has_a_number_of_its_own():
    timing = measure([9.0, 0.5, 0.5], [9, 12, 12], frame_rate=16)
    assert timing.first_frame_seconds == 9.0
    assert timing.frames_per_second == 24.0
    assert timing.real_time_factor == 1.5
    assert timing.deadline_misses == 0


def test_percentiles_are_milliseconds_of_the_later_blocks():
    timing = measure([7.0, *(step / 100 for step in range(101))], [9] + [12] * 101, frame_rate=16)
    block = timing.block_ms
    assert (block.p50, block.p95, block.p99) == pytest.approx((500, 950, 990))


def test_one_slow_block_is_one_miss():
    on_time = 0.75  # 12 pictures at 16 a second
    assert count_misses([0.5, 3.0, on_time, on_time], [12] * 5, frame_rate=16) == 1


def test_pictures_in_hand_pay_for_a_slow_block():
    assert count_misses([0.1, 0.1, 1.9], [12] * 4, frame_rate=16) == 0
    assert count_misses([0.1, 0.1, 2.1], [12] * 4, frame_rate=16) == 1


@given(seconds=st.lists(st.floats(0.01, 10), min_size=1, max_size=30), pictures=st.integers(1, 40))
def test_a_stream_misses_exactly_when_pauses_are_needed(seconds, pictures):
    """Against a viewer played through event by event."""
    shown_until, arrived, misses = pictures / 16, 0.0, 0
    for step in seconds:
        arrived += step
        misses += arrived > shown_until + 1e-9
        shown_until = max(shown_until, arrived) + pictures / 16
    assert count_misses(seconds, [pictures] * (len(seconds) + 1), frame_rate=16) == misses


@pytest.mark.parametrize("seconds, pictures", [([1.0], [9]), ([], []), ([1.0, 1.0], [9])])
def test_speed_needs_two_whole_blocks(seconds, pictures):
    with pytest.raises(ValueError, match="at least two blocks"):
        measure(seconds, pictures, frame_rate=16)
