"""Several streams made in one pass: each as it is alone, but for rounding."""

from itertools import count
from random import Random

import numpy as np
import pytest
import torch
from tests import tiny
from torch.utils._pytree import tree_leaves

from longtake.generation.noise import DrawnAhead
from longtake.generation.take import fork
from longtake.memory.window import RingWindow
from longtake.recipes import recipe_named

TOLERANCE = 1e-4  # of what is remembered, in float32; pictures are the same but for one step of 255
RECIPES = (
    "self_forcing", "self_forcing_sink", "hybrid_forcing", "longlive", "causvid:past=9", "memflow", "reward_forcing",
    "infinity_rope", "rolling_sink:library=9", "rehyat", "rolling_forcing",
)  # fmt: skip


def engine_of(name):
    return tiny.engine(tiny.rolling_recipe() if name == "rolling_forcing" else recipe_named(name))


def steer(stream, random):
    """Whatever can happen to a stream between two blocks."""
    for _ in range(random.randrange(9)):
        next(stream)
    match random.choice(["go on", "redirect", "blend", "cut"]):
        case "redirect":
            stream.redirect(f"words {random.random()}")
        case "blend":
            stream.redirect(f"words {random.random()}", over=random.randrange(2, 6), blend="slerp")
        case "cut":
            stream.cut(f"words {random.random()}")
    for _ in range(random.randrange(3)):
        next(stream)


def in_groups(streams):
    groups: dict = {}
    for stream in streams:
        groups.setdefault(stream.phase, []).append(stream)
    return list(groups.values())


def require_alike(stream, twin):
    one, other = stream.state(), twin.state()
    assert one.pop("in_company") and not other.pop("in_company")
    assert one["history"] == other["history"] and one["blocks"] == other["blocks"]
    for mine, its in zip(tree_leaves(one), tree_leaves(other), strict=True):
        if isinstance(mine, torch.Tensor):
            assert torch.allclose(mine, its, atol=TOLERANCE, rtol=TOLERANCE)
        else:
            assert mine == its


def require_same_chunks(chunk, alone):
    assert (chunk.index, chunk.start_seconds) == (alone.index, alone.start_seconds)
    assert np.abs(chunk.frames.astype(int) - alone.frames).max() <= 1


@pytest.mark.parametrize("name", RECIPES)
def test_together_is_alone_but_for_rounding(name):
    """Of any age and past: what is in one phase is made in one pass, and goes on alone as if it never had been."""
    engine, random, shared = engine_of(name), Random(name), 0
    for _ in range(3):
        streams = [engine.stream(f"a ball {seed}", seed=seed) for seed in range(4)]
        for stream in streams[:3]:
            steer(stream, random)
        streams += [fork(streams[0])]
        streams[-1].redirect("another prompt")
        for group in in_groups(streams):
            shared += len(group) - 1
            twins = [fork(stream) for stream in group]
            for _ in range(2):
                chunks = engine.next_together(group)
                for stream, twin, chunk in zip(group, twins, chunks, strict=True):
                    require_same_chunks(chunk, next(twin))
                    require_alike(stream, twin)
                if len({stream.phase for stream in group}) > 1:
                    break
            for stream, twin in zip(group, twins, strict=True):
                stream.cut("the end"), twin.cut("the end")
                require_same_chunks(next(stream), next(twin))
    assert shared


@pytest.mark.parametrize("name", ["self_forcing_sink", "hybrid_forcing", "reward_forcing", "rolling_forcing"])
def test_streams_of_any_age_come_into_one_phase(name):
    """Otherwise only streams that were opened together could ever share a pass."""
    engine = engine_of(name)
    streams = [engine.stream("a ball", seed=seed) for seed in range(3)]
    for stream, age in zip(streams, (7, 8, 13), strict=True):
        for _ in range(age):
            next(stream)
    assert len(in_groups(streams)) == 1
    streams[1].cut("a cat")
    assert len(in_groups(streams)) == 2


def test_what_does_not_go_together_is_refused():
    engine = engine_of("self_forcing_sink")
    old, new, strange = (engine.stream("a ball"), engine.stream("a ball"), tiny.engine().stream("a ball"))
    next(old)
    for pair in ((old, new), (new, strange)):
        with pytest.raises(ValueError, match="one engine and in one phase"):
            engine.next_together(pair)
    next(new)
    assert len(engine.next_together([old, new])) == 2
    with pytest.raises(ValueError, match="name each once"):
        engine.next_together([old, old])
    old.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.next_together([old, new])


def broken(*_, **__):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("name", ["self_forcing_sink", "rolling_forcing"])
@pytest.mark.parametrize("fails", ["forward", "draw", "decode"])
def test_a_pass_that_fails_costs_no_stream_a_block(name, fails, monkeypatch):
    engine = engine_of(name)
    streams = [engine.stream("a ball", seed=seed) for seed in range(2)]
    for stream in streams:
        next(stream)
    twins = [fork(stream) for stream in streams]
    with monkeypatch.context() as failing:
        failing.setattr({"forward": engine.network, "draw": DrawnAhead, "decode": engine.codec}[fails], fails, broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.next_together(streams)
    if fails != "forward":
        for change in (
            lambda: streams[0].state(),
            lambda: streams[0].redirect("a cat"),
            lambda: streams[0].cut("a cat"),
        ):
            with pytest.raises(RuntimeError, match="before this block was decoded"):
                change()
    for stream, twin in zip(streams, twins, strict=True):
        for _ in range(3):
            one, other = next(stream), next(twin)
            assert (one.index, one.start_seconds) == (other.index, other.start_seconds)
            assert np.abs(one.frames.astype(int) - other.frames).max() <= (0 if fails == "forward" else 1)


def test_who_is_being_written_to_memory_when_a_pass_fails_is_closed_and_others_go_on(monkeypatch):
    engine = engine_of("self_forcing_sink")
    streams = [engine.stream("a ball", seed=seed) for seed in range(2)]
    twin = fork(streams[1])
    append, layers = RingWindow.append, count()

    def half(window, new):
        return broken() if next(layers) else append(window, new)

    with monkeypatch.context() as failing:
        failing.setattr(RingWindow, "append", half)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.next_together(streams)
    assert streams[0].closed and not streams[1].closed
    np.testing.assert_array_equal(next(streams[1]).frames, next(twin).frames)
