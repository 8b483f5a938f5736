import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import tiny

from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.memory.view import fitting, place_frames
from longtake.memory.window import WindowShape


def shape(sink: int, past: int, extent: int | None = None) -> MemoryShape:
    return MemoryShape(window=WindowShape(sink=sink, past=past), extent=extent)


@given(block=st.integers(0, 10**9), sink=st.sampled_from([0, 3]), past=st.sampled_from([3, 6]))
def test_positions_stay_within_the_extent_and_keep_their_distances(block: int, sink: int, past: int) -> None:
    extent, current = 15, range(3 * block, 3 * block + 3)
    held = [f for f in (*range(sink), *range(max(sink, current[0] - past), current[0])) if f < current[0]]
    places = place_frames(held, current, sink, extent)
    everything = (*places.held, *places.current)
    assert min(everything) >= 0 and max(everything) < extent
    assert len(set(everything)) == len(everything)
    recent = [(f, p) for f, p in zip(held, places.held, strict=True) if f >= sink]
    assert all(current[0] - f == places.current[0] - p for f, p in recent)
    if current[-1] < extent:
        assert places.current == tuple(current)


@given(block=st.integers(0, 12), sink=st.sampled_from([0, 3]), flight=st.integers(1, 4))
def test_a_pass_reads_the_sink_and_the_latest_frames_end_to_end(block: int, sink: int, flight: int) -> None:
    """Rolling Forcing's rule: what fits, laid end to end with the pass's own frames, whatever the memory's slots."""
    extent, current = 15, range(3 * block, 3 * (block + flight))
    held = [f for f in range(current[0]) if f < sink or f >= current[0] - 12]
    read = fitting(held[::-1], len(current), sink, extent)
    others = [f for f in held if f >= sink]
    room = max(0, extent - len(current) - (len(held) - len(others)))
    assert read == sorted([f for f in held if f < sink] + others[-room:] * (room > 0), reverse=True)
    places = place_frames(sorted(read), current, sink, extent)
    everything = (*places.held, *places.current)
    assert everything == tuple(range(everything[0], everything[0] + len(everything)))


def test_without_an_extent_positions_are_absolute() -> None:
    assert place_frames([0, 997], range(1000, 1003), 1, None).current == (1000, 1001, 1002)


@pytest.mark.parametrize(
    "memory, said",
    [
        (shape(2, 3), "whole numbers of blocks of 3"),
        (shape(3, 6, extent=11), "= 12 latent frames do not fit the extent of 11"),
        (shape(3, 3, extent=22), "extent 22 exceeds the 21 latent frames"),
    ],
)
def test_shapes_that_cannot_be_streamed_are_refused_with_the_numbers(memory: MemoryShape, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        memory.require_fit(block=3, trained_extent=21)


def test_shapes_that_fit_exactly_can_be_streamed() -> None:
    for fits in (shape(3, 15), shape(3, 15, extent=21), shape(3, 6, extent=12)):
        fits.require_fit(block=3, trained_extent=21)


@pytest.mark.parametrize("ring", [True, False])
def test_a_cut_forgets_the_window_and_counts_blocks_on(ring: bool) -> None:
    memory = tiny.memory(tiny.network(), ring=ring)
    keys = [(torch.randn(1, 18, 2, 12),) * 2 for _ in range(memory.layers)]
    for _ in range(4):
        memory.commit(keys, 3)
    twin = memory.fork()
    memory.cut(0)
    memory.audit()
    assert memory.held(0) is None and (memory.frames, memory.blocks) == (0, 4)
    for _ in range(6):  # twice the window
        memory.commit(keys, 3)
        memory.audit()
    assert sorted(memory.held(0).frames) == [0, 1, 2, 15, 16, 17]
    assert sorted(twin.held(0).frames) == [0, 1, 2, 9, 10, 11]


def test_keys_are_cut_from_their_graph_and_a_wrong_number_of_layers_is_refused() -> None:
    made = tiny.network()
    memory = tiny.memory(made, ring=False)
    layer = (torch.randn(1, 18, 2, 12, requires_grad=True), torch.randn(1, 18, 2, 12, requires_grad=True))
    with pytest.raises(ValueError, match="keys of 2 layers"):
        memory.commit([layer] * 2, 3)
    memory.commit([layer] * 3, 3)
    assert not memory.held(0).k_BTND.requires_grad
    memory.audit()
    keeping = StreamMemory(memory.shape, made.config.layers, ring=False, keeps_graph=True).fork()
    assert keeping.keeps_graph
    with pytest.raises(ValueError, match="a ring buffer keeps no graph"):
        StreamMemory(memory.shape, made.config.layers, ring=True, keeps_graph=True)
