import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.memory.window import Keys, RingWindow, Window, WindowShape

TOKENS = 2


def keys(first: int, count: int) -> Keys:
    """Frames whose numbers can be read off their keys."""
    numbers = tuple(range(first, first + count))
    k = torch.tensor(numbers, dtype=torch.float64).repeat_interleave(TOKENS).view(1, -1, 1, 1).expand(2, -1, 3, 4)
    return Keys(k, -k, numbers)


def numbers_in(held: Keys | None) -> list[int]:
    """Frame numbers as the keys themselves tell, after checking that keys, values and books agree."""
    if held is None:
        return []
    seen = held.k_BTND[0, ::TOKENS, 0, 0].tolist()
    assert seen == list(held.frames)
    assert torch.equal(held.v_BTND, -held.k_BTND)
    return [int(number) for number in seen]


traffic = st.tuples(st.integers(0, 4), st.integers(0, 5), st.lists(st.integers(1, 4), min_size=1, max_size=9))


@given(traffic)
@settings(deadline=None)
def test_ring_and_functional_forms_are_equal_and_every_frame_is_in_one_place(drawn) -> None:
    sink, past, counts = drawn
    shape = WindowShape(sink=sink, past=past)
    plain, ring, first = Window(shape), RingWindow(shape), 0
    left: list[int] = []
    for count in counts:
        plain, gone = plain.append(keys(first, count))
        ring, ring_gone = ring.append(keys(first, count))
        first += count
        assert numbers_in(gone) == numbers_in(ring_gone)
        left += numbers_in(gone)
        held = numbers_in(plain.held)
        assert held == sorted(numbers_in(ring.held))
        assert held == [f for f in range(first) if f < sink or f >= first - past]
        assert sorted(left + held) == list(range(first))
        assert (plain.held is None) == (ring.held is None) == (not held)
        assert ring.is_full == (len(held) == sink + past)
    assert left == sorted(left)
    odd = [frame for frame in held if frame % 2]
    plain, ring = plain.only(odd), ring.only(odd)
    assert odd == numbers_in(plain.held) == sorted(numbers_in(ring.held))
    assert (plain.held is None) == (ring.held is None) == (not odd)


def test_a_window_is_a_value() -> None:
    before, _ = Window(WindowShape(sink=1, past=2)).append(keys(0, 3))
    after, _ = before.append(keys(3, 3))
    assert numbers_in(before.held) == [0, 1, 2]
    assert numbers_in(after.held) == [0, 4, 5]


def test_the_buffers_of_a_ring_never_move() -> None:
    ring = RingWindow(WindowShape(sink=1, past=2))
    ring.append(keys(0, 3))
    place = ring.held.k_BTND.data_ptr()
    ring.append(keys(3, 3))
    assert ring.held.k_BTND.data_ptr() == place
    assert sorted(numbers_in(ring.held)) == [0, 4, 5]


def test_negative_sizes_are_refused() -> None:
    for sink, past in ((-1, 3), (3, -1)):
        with pytest.raises(ValueError, match=f"negative number of frames: sink {sink}, past {past}"):
            WindowShape(sink=sink, past=past)
