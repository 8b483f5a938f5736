"""What a recipe does, block by block, against what was published."""

from dataclasses import replace
from functools import partial
from itertools import islice

import pytest
from tests import tiny

from longtake.attention.block_sparse import block_sparse
from longtake.attention.dense import dense
from longtake.evaluation.trace import BlockTrace, Placed, keys_attended, traced
from longtake.generation.recipe import Recipe
from longtake.memory import far
from longtake.memory.far import Decay, Delta, FarShape
from longtake.memory.policies import PLAIN
from longtake.recipes import RECIPES, hybrid_forcing, rolling_forcing, self_forcing, self_forcing_sink

EXTENT = 21
SINK = tuple(Placed(frame, frame) for frame in range(3))


def rows(recipe: Recipe, count: int = 21, extent: int = EXTENT) -> list[BlockTrace]:
    return list(islice(traced(recipe, extent), count))


def run(first: int, position: int, count: int = 3) -> tuple[Placed, ...]:
    return tuple(Placed(first + i, position + i) for i in range(count))


def test_hybrid_forcing_places_frames_as_published() -> None:
    """Its table of windows: chunks that begin at latent frame 0, 3, ... 60, at most 21 positions."""
    for row, f in zip(rows(hybrid_forcing()), range(0, 61, 3), strict=True):
        place = min(f, 18)
        assert row.made == (f, f + 1, f + 2)
        assert row.current == run(f, place)
        assert row.sink == (SINK if f else ())
        assert row.past == (run(f - 3, place - 3) if f >= 6 else ())
        assert max(one.position for one in (*row.sink, *row.past, *row.current)) <= 20


def test_hybrid_forcing_absorbs_what_leaves_at_published_positions() -> None:
    """A chunk that began at `a` enters at min(a, 12), as soon as the one after it is committed."""
    for row, f in zip(rows(hybrid_forcing()), range(0, 61, 3), strict=True):
        a = f - 3
        assert row.absorbed == (run(a, min(a, 12)) if a >= 3 else ())
        assert row.leaves == tuple(one.frame for one in row.absorbed)
        assert row.far == max(0, f - 3)


def test_published_forms_absorb_the_sink_too() -> None:
    for form in ("ref_train", "ref_infer"):
        absorbed = [row.absorbed for row in rows(hybrid_forcing(form=form), 4)]
        assert absorbed[0] == () and absorbed[2:] == [run(3, 3), run(6, 6)]
        twice = 2 if form == "ref_infer" else 1
        assert absorbed[1] == tuple(one._replace(position=twice * one.position) for one in SINK)


@pytest.mark.parametrize("rule", [Decay(half_life=6), Delta()], ids=["decay", "delta"])
def test_every_rule_is_handed_the_same(rule: far.Rule) -> None:
    expected = [row.absorbed for row in rows(hybrid_forcing())]
    forgetful = rows(replace(hybrid_forcing(), far=FarShape(rule=rule)))
    assert [row.absorbed for row in forgetful] == expected


def test_self_forcing_slides_and_keeps_nothing() -> None:
    for row, f in zip(rows(self_forcing()), range(0, 61, 3), strict=True):
        before = min(f, 6)
        assert (row.sink, row.absorbed, row.far) == ((), (), 0)
        assert row.past == run(f - before, min(f, 18) - before, before)
        assert row.leaves == (tuple(range(f - 6, f - 3)) if f >= 6 else ())
        assert row.held == tuple(range(max(0, f - 3), f + 3))


def test_a_sink_stays_where_it_is() -> None:
    *_, last = rows(self_forcing_sink())
    assert (last.sink, last.past, last.current) == (SINK, run(57, 15), run(60, 18))
    assert last.held == (0, 1, 2, 60, 61, 62)


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name]().policy == PLAIN])
def test_blocks_are_alike_once_positions_are_capped(name: str) -> None:
    recipe = RECIPES[name]()
    made = rows(recipe)
    alike = [one.looks_like(other, recipe.sink) for one, other in zip(made[1:], made, strict=False)]
    differ = 7 if recipe.rolls else 6
    assert alike == [False] * differ + [True] * (20 - differ)


def test_rolling_forcing_places_frames_as_published() -> None:
    """Its tables of denoising and committing calls, positions counted from the first key of a call."""
    for row, f in zip(rows(rolling_forcing()), range(0, 61, 3), strict=True):
        assert row.made == (f, f + 1, f + 2)
        assert row.current == run(f, min(f, 6), 15)
        assert row.sink == (SINK if f else ())
        assert row.past == (run(f - 3, 3) if f >= 6 else ())
        first = max(0, f - 18)
        assert tuple(sorted(row.commit)) == run(first, 0, f + 3 - first)


def test_fewer_blocks_in_flight_leave_room_for_more_of_the_past() -> None:
    *_, last = rows(rolling_forcing().with_levels(4))
    assert (last.sink, last.past, last.current) == (SINK, run(54, 3, 6), run(60, 9, 12))


def test_a_window_that_holds_nothing() -> None:
    for row in rows(replace(self_forcing(), past=0), 3):
        assert (row.sink, row.past, row.leaves, row.held) == ((), (), row.made, ())


def test_what_is_told_is_what_a_stream_does() -> None:
    """The books of a real stream's memory after each block, tiny network and all."""
    engine = tiny.engine()
    batch = engine.stream_batch(["anything"], seeds=[1])
    for row in rows(engine.recipe, 8, engine.network.config.extent):
        next(batch)
        assert tuple(sorted(batch._memory.held(0).frames)) == row.held


@pytest.mark.parametrize("keys, kept", [(4680, 14 * 64), (9360, 29 * 64), (14040, 44 * 64)])
def test_sparse_attention_sees_the_published_number_of_blocks(keys: int, kept: int) -> None:
    small = partial(block_sparse, share=0.2, block_q=8, block_k=8)  # an eighth of everything
    assert keys_attended(small, 3, keys // 8) == kept // 8
    assert keys_attended(dense, 3, keys // 8) == keys // 8
