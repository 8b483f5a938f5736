"""The field's memory rules, each against what its paper or code is said to do, written out in the plainest way."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.attention.rope import Grid, RotaryAxes, rotate
from longtake.memory.far import FarShape
from longtake.memory.policies import (
    Absolute,
    Average,
    BackAndForth,
    Bank,
    BankShape,
    Capped,
    EndToEnd,
    Policy,
    Recache,
    played,
)
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.memory.view import place_frames
from longtake.memory.window import Keys, RingWindow, Window, WindowShape

GRID = Grid(RotaryAxes(split=(4, 2, 2)), rows=2, columns=3)
TOKENS, HEADS, SIZE, BLOCK = 6, 2, 8, 3
SLOTS = [False, True]


def memory(policy: Policy, sink: int, past: int, *, ring: bool = True, layers: int = 1) -> StreamMemory:
    window = WindowShape(sink=sink, past=past)
    return StreamMemory(MemoryShape(window=window, extent=policy.reads.extent(21), policy=policy), layers, ring=ring)


def block_keys(number: int, batch: int = 1, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(number)
    k, v = torch.randn(2, batch, BLOCK * TOKENS, HEADS, SIZE, generator=dice, dtype=torch.float64)
    return k.to(dtype), v.to(dtype)


def held_frames(kept: StreamMemory) -> list[int]:
    held = kept.held(0)
    return sorted(held.frames) if held else []


# windows that are rewritten


@given(st.integers(0, 3), st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=5), st.randoms())
@settings(deadline=None, max_examples=50)
def test_both_forms_of_a_window_forget_and_rewrite_alike(sink: int, past: int, counts: list[int], dice) -> None:
    shape, first = WindowShape(sink=sink, past=past), 0
    plain, ring = Window(shape), RingWindow(shape)
    for count in counts:
        numbers = tuple(range(first, first + count))
        x = torch.randn(1, count * 2, 1, 2, dtype=torch.float64)
        plain, _ = plain.append(Keys(x, -x, numbers))
        ring.append(Keys(x, -x, numbers))
        first += count
        kept = [frame for frame in plain.held.frames if dice.random() < 0.7]
        before, plain = plain, plain.only(kept)
        ring.only(kept)
        if kept and dice.random() < 0.5:
            new = Keys(torch.ones(1, 2, 1, 2).double(), torch.zeros(1, 2, 1, 2).double(), (dice.choice(kept),))
            plain = plain.rewritten(new)
            ring.rewritten(new)
        assert sorted(plain.held.frames if plain.held else ()) == sorted(kept)
        assert before.held is not None and (ring.held is None) == (not kept)
        if kept:
            for one, other in zip(plain.held[:2], ring.held.seen(plain.held.frames)[:2], strict=True):
                assert torch.equal(one, other)


# positions


@given(block=st.integers(0, 10**6), sink=st.sampled_from([0, 1, 3]), past=st.sampled_from([2, 3, 6]))
def test_end_to_end_is_a_cap_at_the_window_where_the_window_has_no_gap(block: int, sink: int, past: int) -> None:
    """Reward Forcing and Infinity-RoPE, by their own words: 0 to n - 1, the current frames last."""
    window, current = WindowShape(sink=sink, past=past), range(BLOCK * block, BLOCK * (block + 1))
    held = list(range(min(sink, current[0])))
    held += list(range(max(len(held), current[0] - past), current[0]))
    read = EndToEnd()(held[::-1], current, window, None)
    assert read.frames == tuple(held[::-1])
    assert read.places.held == tuple(range(len(held)))[::-1]
    assert read.places.current == tuple(range(len(held), len(held) + BLOCK))
    capped = place_frames(held, current, sink, window.frames + BLOCK)
    assert (read.places.held[::-1], read.places.current) == (capped.held, capped.current)


def test_absolute_positions_are_numbers_whatever_the_extent() -> None:
    places = Absolute()([0, 997], range(1000, 1003), WindowShape(sink=1, past=3), 21).places
    assert (places.held, places.current) == ((0, 997), (1000, 1001, 1002))


@given(library=st.integers(1, 20), time=st.integers(0, 10**6))
def test_a_library_is_played_without_a_leap(library: int, time: int) -> None:
    assert 0 <= played(time, library) < library
    assert abs(played(time + 1, library) - played(time, library)) <= 1
    assert played(time + 2 * library, library) == played(time, library)
    assert time >= library or played(time, library) == time


def rolling_sink_slots(blocks: int, size: int = 21) -> list[list[tuple[int, int]]]:
    """What the denoising passes of each block see under Rolling Sink's published code: (frame, absolute position)."""
    length, slots, seen = size - BLOCK, [], []
    for first in range(0, BLOCK * blocks, BLOCK):
        slots = slots[max(0, len(slots) + BLOCK - size) :]
        seen.append(list(slots))
        slots += [(first + i, first + i) for i in range(BLOCK)]
        if first >= size:
            p = first - BLOCK
            if (p // length) % 2:
                top = length - p % length
                chosen = [top - 1, top - 2, top - 3]
            else:
                chosen = [p % length + i for i in range(BLOCK)]
            slots[-2 * BLOCK : -BLOCK] = [(frame, p + i) for i, frame in enumerate(chosen)]
    return seen


@pytest.mark.parametrize("ring", SLOTS)
def test_rolling_sink_sees_what_the_published_code_leaves_in_its_slots(ring: bool) -> None:
    kept = memory(Policy(reads=BackAndForth()), 18, 3, ring=ring)
    for number, slots in enumerate(rolling_sink_slots(60)):
        first = BLOCK * number
        held = kept.held(0)
        read = BackAndForth()(held.frames if held else (), range(first, first + BLOCK), kept.shape.window, None)
        back = first - read.places.current[0]
        assert [(f, p + back) for f, p in zip(read.frames, read.places.held, strict=True)] == slots
        assert set(read.frames) <= set(held.frames if held else ())
        assert read.places.current[-1] <= 20
        kept.commit([block_keys(number)], BLOCK, GRID)
        kept.audit()


@torch.no_grad()
def test_a_view_of_a_library_holds_each_frame_at_each_of_its_times() -> None:
    kept = memory(Policy(reads=BackAndForth()), 18, 3)
    for number in range(9):
        kept.commit([block_keys(number)], BLOCK, GRID)
    k, v = kept.view(GRID, BLOCK, "cpu").layers[0]
    frames = [*range(9, 18), *range(17, 11, -1), 24, 25, 26]
    for place, frame in enumerate(frames):
        plain, value = (x.unflatten(1, (BLOCK, TOKENS))[:, frame % BLOCK] for x in block_keys(frame // BLOCK))
        now = slice(place * TOKENS, (place + 1) * TOKENS)
        torch.testing.assert_close(k[:, now], rotate(plain, GRID.rotation([place], "cpu")))
        assert torch.equal(v[:, now], value)


# flush and jump


@pytest.mark.parametrize("ring", SLOTS)
@pytest.mark.parametrize("past, keep", [(2, 2), (5, 2), (5, 1), (5, 0), (2, 9)])
def test_a_flush_keeps_the_sink_and_the_latest_frames(past: int, keep: int, ring: bool) -> None:
    kept = memory(Policy(reads=EndToEnd(), flush=keep, jump=45), 1, past, ring=ring)
    kept.flush()
    for number in range(5):
        kept.commit([block_keys(number)], BLOCK, GRID)
    before = held_frames(kept)
    kept.flush()
    assert held_frames(kept) == [0, *range(15 - min(keep, past), 15)]
    assert (held_frames(kept) == before) == (keep >= past)  # published: 2 of 2, so that nothing is forgotten
    for number in range(5, 9):
        kept.audit()
        kept.commit([block_keys(number)], BLOCK, GRID)
    assert held_frames(kept) == [0, *range(27 - past, 27)]


@pytest.mark.parametrize("ring", SLOTS)
def test_a_cut_jumps_for_one_block(ring: bool) -> None:
    kept = memory(Policy(reads=EndToEnd(), flush=2, jump=45), 1, 5, ring=ring)
    kept.cut(0)
    assert torch.equal(kept.view(GRID, BLOCK, "cpu").rotation.cos_TA, GRID.rotation(range(3), "cpu").cos_TA)
    for number in range(4):
        kept.commit([block_keys(number)], BLOCK, GRID)
    kept.cut(0)
    twin = kept.fork()
    for one in (kept, twin):
        view = one.view(GRID, BLOCK, "cpu", commits=True)
        assert torch.equal(view.rotation.cos_TA, GRID.rotation(range(45, 48), "cpu").cos_TA)
        plain = one.held(0).seen([0, 10, 11]).k_BTND
        held = one.held(0).frames
        expected = rotate(one.held(0).k_BTND, GRID.rotation([[0, 10, 11].index(f) for f in held], "cpu"))
        assert plain.shape == expected.shape and torch.equal(view.layers[0][0], expected)
        one.commit([block_keys(4)], BLOCK, GRID)
        view = one.view(GRID, BLOCK, "cpu")
        assert torch.equal(view.rotation.cos_TA, GRID.rotation(range(6, 9), "cpu").cos_TA)
    assert kept.frames == 15


# the averaged sink


@pytest.mark.parametrize("ring", SLOTS)
def test_the_sink_is_the_average_of_what_left(ring: bool) -> None:
    keep, layers = 0.9, 2
    kept = memory(Policy(reads=EndToEnd(), average=keep), 3, 3, ring=ring, layers=layers)
    sinks = [block_keys(100 * layer) for layer in range(layers)]
    for number in range(8):
        kept.commit([block_keys(100 * layer + number) for layer in range(layers)], BLOCK, GRID)
        kept.audit()
        if number >= 2:
            gone = [block_keys(100 * layer + number - 1) for layer in range(layers)]
            sinks = [
                tuple(keep * mean + (1 - keep) * new for mean, new in zip(*pair, strict=True))
                for pair in zip(sinks, gone, strict=True)
            ]
        for layer, sink in enumerate(sinks):
            for found, mean in zip(kept.held(layer).seen([0, 1, 2])[:2], sink, strict=True):
                torch.testing.assert_close(found, mean)


def test_an_average_with_nothing_new_is_a_plain_sink() -> None:
    plain, averaged = (memory(Policy(reads=EndToEnd(), average=average), 3, 3) for average in (None, 1.0))
    for number in range(6):
        for kept in (plain, averaged):
            kept.commit([block_keys(number)], BLOCK, GRID)
    for one, other in zip(plain.held(0)[:2], averaged.held(0)[:2], strict=True):
        assert torch.equal(one, other)


def test_in_bfloat16_a_thousandth_still_moves_the_sink() -> None:
    """As it would not if the average itself were kept in bfloat16."""
    kept = memory(Policy(reads=EndToEnd(), average=0.999), 3, 3)
    ones, others = (torch.full((1, BLOCK * TOKENS, HEADS, SIZE), x, dtype=torch.bfloat16) for x in (1.0, 2.0))
    assert torch.equal(ones.lerp(others, 0.001), ones)
    kept.commit([(ones, ones)], BLOCK)
    for _ in range(301):
        kept.commit([(others, others)], BLOCK)
    found = kept.held(0).seen([0, 1, 2])
    assert found.k_BTND.dtype == torch.bfloat16
    torch.testing.assert_close(found.k_BTND[0, 0, 0, 0].double().item(), 2 - 0.999**300, rtol=1e-2, atol=0)


def test_what_left_is_averaged_into_as_many_frames_as_there_are() -> None:
    sink, gone = (Keys(*block_keys(i), (3 * i, 3 * i + 1, 3 * i + 2)) for i in range(2))
    mean = Average().after(sink, gone.select([0]), 0.5).keys
    torch.testing.assert_close(mean.k_BTND[:, :TOKENS], (sink.k_BTND + gone.k_BTND)[:, :TOKENS] / 2)
    assert torch.equal(mean.k_BTND[:, TOKENS:], sink.k_BTND[:, TOKENS:])


# the bank


def text_keys(seed: int, batch: int) -> torch.Tensor:
    """A prompt of five words, [B, L, N, D]."""
    return torch.randn(batch, 5, HEADS, SIZE, generator=torch.Generator().manual_seed(900 + seed), dtype=torch.float64)


def score(text_LND: torch.Tensor, number: int, row: int) -> float:
    """Of the first frame of a block, as released: the mean over heads, words and tokens of all products."""
    k_TND = block_keys(number, batch=2)[0][row, :TOKENS]
    turned = rotate(k_TND[None], GRID.rotation([BLOCK * number], "cpu"))[0]
    return torch.einsum("lnd,tnd->lnt", text_LND, turned).mean().item() / SIZE**0.5


def read_from_bank(kept: StreamMemory, text_BLND: torch.Tensor) -> list[list[int]]:
    """The frames, row by row, that a pass reads beside the window: found by their values."""
    _, v = kept.view(GRID, BLOCK, "cpu", text=[text_BLND.mean(1)]).layers[0]
    beside = v.shape[1] // TOKENS - len(kept.held(0).frames)
    known = {block_keys(n, batch=2)[1][row, 0, 0, 0].item(): BLOCK * n for n in range(40) for row in range(2)}
    return [[known[v[row, TOKENS * i, 0, 0].item()] for i in range(beside)] for row in range(2)]


@pytest.mark.parametrize("every, size", [(3, 3), (1, 3), (2, 1), (1, 2)])
def test_a_bank_keeps_the_newest_frame_and_those_that_the_prompt_asks_for(every: int, size: int) -> None:
    """MemFlow's code, written out row by row; the prompt changes now and then."""
    kept = memory(Policy(reads=Absolute(), bank=BankShape(frames=size, every=every)), 3, 6)
    banks: list[list[int]] = [[], []]
    pending, bytes_held = False, []
    for number in range(24):
        text = text_keys(number // 4, batch=2)
        if pending:
            for row, bank in enumerate(banks):
                *old, new = bank
                best = sorted(old, key=lambda n: -score(text[row], n, row))[: size - 1]
                banks[row] = [*old, new] if len(bank) <= size else [*sorted(best), new]
        if number:
            assert read_from_bank(kept, text) == [[BLOCK * n for n in bank] for bank in banks]
        kept.commit([block_keys(number, batch=2)], BLOCK, GRID, text=[text.mean(1)])
        kept.audit()
        pending = number % every == 0
        if pending:
            banks = [[*bank, number] for bank in banks]
        bytes_held.append(kept.nbytes())
    assert banks[0] != banks[1] or (every, size) != (1, 3), "rows choose for themselves"
    assert max(bytes_held) == max(bytes_held[every * size + 2 : every * size + 2 + 2 * every])


def test_keys_from_a_bank_stand_at_the_numbers_of_their_frames() -> None:
    kept = memory(Policy(reads=Absolute(), bank=BankShape()), 3, 6)
    text = [text_keys(0, batch=2).mean(1)]
    for number in range(7):
        kept.commit([block_keys(number, batch=2)], BLOCK, GRID, text=text)
    k, _ = kept.view(GRID, BLOCK, "cpu", text=text).layers[0]
    for place, number in enumerate((0, 3, 6)):
        plain = block_keys(number, batch=2)[0][:, :TOKENS]
        turned = rotate(plain, GRID.rotation([BLOCK * number], "cpu"))
        torch.testing.assert_close(k[:, place * TOKENS : (place + 1) * TOKENS], turned)


def test_a_bank_needs_the_prompt_and_the_grid() -> None:
    kept = memory(Policy(bank=BankShape()), 3, 6)
    for call in (
        lambda: kept.view(GRID, BLOCK, "cpu"),
        lambda: kept.commit([block_keys(0)], BLOCK, GRID),
        lambda: kept.commit([block_keys(0)], BLOCK, text=[text_keys(0, 1).mean(1)]),
    ):
        with pytest.raises(ValueError, match=r"the prompt's keys of 0 layers|only with the grid"):
            call()
    assert kept.frames == 0 and Bank(BankShape()).nbytes() == 0


@pytest.mark.parametrize("keep_sink", [True, False])
def test_after_an_unwind_nothing_is_left_but_the_sink(keep_sink: bool) -> None:
    kept = memory(Policy(recache=Recache(9)), 3, 9)
    for number in range(6):
        kept.commit([block_keys(number)], BLOCK, GRID, latents=torch.zeros(1, BLOCK, 1, 1, 1))
    kept.unwind(6, keep_sink=keep_sink)
    kept.audit()
    assert (kept.frames, kept.held(0) and kept.held(0).frames) == ((12, (0, 1, 2)) if keep_sink else (0, None))


# what does not go together


@pytest.mark.parametrize(
    "parts, said",
    [
        ({"recache": Recache(3), "average": 0.9}, "need a window that is as they left it"),
        ({"recache": Recache(3), "flush": 2}, "need a window that is as they left it"),
        ({"reads": BackAndForth(), "flush": 2}, "needs the frames that a flush forgets"),
        ({"jump": 45}, "say how many latent frames stay"),
        ({"bank": BankShape(), "recache": Recache(3, sink="new")}, "its recache must keep the sink"),
    ],
)
def test_rules_that_do_not_go_together_are_refused(parts: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Policy(**parts)


def test_shapes_that_a_rule_cannot_have_are_refused_with_the_numbers() -> None:
    window = WindowShape(sink=1, past=2)
    MemoryShape(window=window, extent=None, policy=Policy(reads=EndToEnd())).require_fit(3, 21)
    MemoryShape(window=WindowShape(sink=3, past=3), extent=None, policy=Policy(reads=BackAndForth())).require_fit(3, 21)
    for policy, shape, said in (
        (Policy(), window, r"sink \(1\) and past \(2\) must be whole numbers of blocks of 3"),
        (
            Policy(reads=EndToEnd()),
            WindowShape(sink=1, past=3),
            r"sink 1 \+ past 3 must be a whole number of blocks of 3",
        ),
        (Policy(reads=BackAndForth()), WindowShape(sink=3, past=6), "cannot stand before 6 real ones"),
        (Policy(bank=BankShape(frames=9)), WindowShape(sink=3, past=9), r"past 9 \+ bank 9 \+ current 3 = 24 latent"),
    ):
        with pytest.raises(ValueError, match=said):
            MemoryShape(window=shape, extent=policy.reads.extent(21), policy=policy).require_fit(3, 21)
    with pytest.raises(ValueError, match="a far state, or blocks in flight"):
        MemoryShape(window=window, extent=21, far=FarShape(), policy=Policy(reads=EndToEnd()))
    with pytest.raises(ValueError, match="into a sink of 1 latent frame or more"):
        memory(Policy(average=0.9), 0, 3)
    with pytest.raises(ValueError, match="of 3 latent frames to commit again, none is left beside a sink of 3"):
        memory(Policy(recache=Recache(3)), 3, 3)
    kept = memory(Policy(recache=Recache(9)), 3, 3)
    with pytest.raises(ValueError, match="kept as latents, which are missing"):
        kept.commit([block_keys(0)], BLOCK, GRID)
    assert (kept.frames, kept.blocks, kept.held(0)) == (0, 0, None), "what is refused changes nothing"
    with pytest.raises(ValueError, match="a recache takes 1 latent frame or more"):
        Recache(0)


def test_only_rules_that_hang_on_numbers_and_an_extent_go_in_one_pass() -> None:
    plain = Policy()
    assert plain.in_one_pass and replace(plain, reads=Absolute(), recache=Recache(12)).in_one_pass
    for other in (
        Policy(reads=EndToEnd()), Policy(reads=BackAndForth()), Policy(average=0.9), Policy(bank=BankShape()),
        Policy(recache=Recache(3, sink="new", each_clip=True)),
    ):  # fmt: skip
        assert not other.in_one_pass
    assert plain.reads == Capped()
