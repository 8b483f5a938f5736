"""A codec on a device of its own: chunks are waited for one behind what is begun, and stay what they are.

One device stands for two here: frames are noted when they are waited for, which on two is when they are there.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import tiny
from torch.utils._pytree import tree_leaves

import longtake
from longtake.generation import stream as streams
from longtake.generation.script import Cue, follow, shown
from longtake.generation.stream import Chunk, Engine, Stream, Timings, one_behind
from longtake.generation.take import Take, fork, retrace
from longtake.models import checkpoints
from longtake.models.standins import without_numbers
from longtake.models.wan_vae import WanVAE, WanVAEConfig
from longtake.recipes import hybrid_forcing, load_random, longlive, self_forcing_sink, wan_engines

CUES = {0: Cue(prompt="a ball"), 2: Cue(prompt="snow", over=2), 5: Cue(prompt="night")}
RECIPES = [self_forcing_sink(), hybrid_forcing(share=0.5), longlive(), tiny.rolling_recipe()]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Engines work ahead; what happens: passes of the network, and waiting for frames."""
    happened: list[str] = []
    to_host = streams.to_host

    def noted(pictures: torch.Tensor) -> Callable[[], np.ndarray]:
        frames = to_host(pictures)
        return lambda: happened.append("waited") or frames()  # type: ignore[func-returns-value]

    monkeypatch.setattr(Engine, "works_ahead", True)
    monkeypatch.setattr(streams, "to_host", noted)
    return happened


def frames(chunks) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in chunks])


def state_equals(stream: Stream, other: Stream) -> bool:
    pairs = zip(tree_leaves(stream.state()), tree_leaves(other.state()), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@given(st.integers(0, 6), st.integers(0, 6))
def test_one_behind_gives_all_in_order_and_waits_for_each_once_the_next_has_begun(blocks: int, fails_at: int) -> None:
    events: list[tuple[str, int]] = []

    def chunks() -> Iterator[Chunk]:
        for block in range(blocks):
            if block == fails_at:
                raise KeyboardInterrupt
            events.append(("begun", block))
            yield Chunk(lambda block=block: (events.append(("waited", block)), Timings(0, 0, 0, 0)), 12, block, 0.0)

    read, stopped = [], False
    try:
        for chunk in one_behind(SimpleNamespace(works_ahead=True), chunks()):
            assert chunk.timings and events[-1] == ("waited", chunk.index), "once"
            read.append(chunk.index)
    except KeyboardInterrupt:
        stopped = True
    made = min(blocks, fails_at)
    assert read == list(range(made)) and stopped == (fails_at < blocks)
    order = [("begun", 0)] if made else []
    for block, following in pairwise(range(made)):
        order += [("begun", following), ("waited", block)]
    assert events == order + ([("waited", made - 1)] if made else [])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_what_is_shown_and_what_is_left_is_the_same_bit_for_bit(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny.engine(recipe)
    with engine.stream("a ball", seed=3) as plain, engine.stream("a ball", seed=3) as stream:
        slow = list(islice(follow(plain, CUES), 7))
        monkeypatch.setattr(Engine, "works_ahead", True)
        fast = list(shown(stream, CUES, engine.pictures_in(7) - 5))
        assert stream.blocks == 7, "no block is made that is not read"
        assert [chunk.pictures for chunk in fast] == [len(chunk.frames) for chunk in slow]
        assert [(one.index, one.start_seconds) for one in fast] == [(one.index, one.start_seconds) for one in slow]
        assert (frames(fast) == frames(slow)).all() and stream.history == plain.history
        assert state_equals(stream, plain)


def test_the_network_goes_on_before_frames_are_waited_for(ahead: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny.engine()
    forward = engine.network.forward
    monkeypatch.setattr(engine.network, "forward", lambda *given: ahead.append("pass") or forward(*given))
    with engine.stream("a ball", seed=3) as stream:
        list(shown(stream, {}, engine.pictures_in(4)))
    passes = ["pass"] * len(engine.recipe.steps)
    assert ahead == [*passes, *([*passes, "waited"] * 3), "waited"]


def test_with_one_device_a_chunk_is_there_at_once(ahead: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "works_ahead", False)
    with tiny.engine().stream("a ball", seed=3) as stream:
        for count in (1, 2):
            chunk = next(stream)
            assert ahead == ["waited"] * count
            assert chunk.frames is chunk.frames and len(ahead) == count


def test_what_is_told_acts_as_ever_however_late_chunks_are_read(ahead: list[str]) -> None:
    engine = tiny.engine()
    kept: list[Chunk] = []

    def steered(read: Callable[[Chunk], object]) -> list[Chunk]:
        with engine.stream("a ball", seed=3) as stream:
            chunks = [next(stream)]
            read(chunks[-1])
            take = Take.of(stream)
            for tell in (lambda: stream.redirect("snow", over=2), lambda: None, lambda: stream.cut("night")):
                tell()
                chunks.append(next(stream))
                read(chunks[-1])
            take.rewind(stream)
            stream.redirect("rain")
            forked = fork(stream)
            chunks += [next(forked), next(stream)]
        return chunks

    late, early = steered(kept.append), steered(Chunk.wait)
    assert ahead == ["waited"] * (len(early) - 2)
    assert [(chunk.index, chunk.start_seconds) for chunk in late] == [
        (chunk.index, chunk.start_seconds) for chunk in early
    ]
    assert (frames(late) == frames(early)).all(), "of a closed stream too"


def test_words_given_while_a_chunk_is_read_act_on_the_block_after_the_begun_one(ahead: list[str]) -> None:
    engine = tiny.engine()
    with engine.stream("a ball", seed=3) as stream:
        read = []
        for chunk in shown(stream, {}, engine.pictures_in(6)):
            read.append(chunk)
            if chunk.index == 2:
                stream.redirect("snow")
        assert stream.history[-1].block == 4
        with retrace(engine, 3, stream.history, 4) as again:
            assert (frames(islice(again, 2)) == frames(read[4:])).all()


def test_what_is_stopped_brings_all_that_was_made(ahead: list[str]) -> None:
    with tiny.engine().stream("a ball", seed=3) as stream:
        chunks = list(shown(stream, CUES, 1000, lambda: stream.blocks == 3))
        assert [chunk.index for chunk in chunks] == [0, 1, 2] and stream.blocks == 3


def test_a_decoder_that_fails_takes_no_chunk_with_it(ahead: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny.engine()
    decode, calls = engine.codec.decode, []

    def failing(*given):
        calls.append(given)
        if len(calls) == 3:
            raise MemoryError("no room")
        return decode(*given)

    monkeypatch.setattr(engine.codec, "decode", failing)
    with engine.stream("a ball", seed=3) as stream:
        chunks = shown(stream, {}, 1000)
        assert [next(chunks).index, next(chunks).index] == [0, 1]
        with pytest.raises(MemoryError):
            next(chunks)
        assert stream.closed


def test_latents_and_states_travel_to_the_codec() -> None:
    """torch's meta device stands for the other one: there are shapes and places, and no numbers."""
    plain = tiny.engine()
    engine = replace(plain, codec=without_numbers(plain.codec))
    assert engine.device.type == "cpu" and not engine.works_ahead, "no GPU"
    with engine.stream_batch(["a ball"], seeds=[3]) as batch, plain.stream_batch(["a ball"], seeds=[3]) as other:
        assert next(batch).device == engine.codec_device == torch.device("meta")
        assert batch.timings is not None and batch.timings.denoise_seconds > 0
        next(other)
        batch.restore(other.state())
        assert next(batch).shape == next(other).shape and batch.state()["codec"][0].is_meta


def test_a_device_that_is_not_there_is_refused() -> None:
    for name in ("cuda:99", "meta", "nonsense"):
        with pytest.raises(ValueError, match=f"^cannot compute on device '{name}': .*$"):
            longtake.load("toy", recipe="self_forcing_sink", device="cpu", codec_device=name)


@pytest.fixture
def small_wan(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(checkpoints.WAN_1_3B, dim=256, heads=2, ffn_dim=512, layers=3, text_dim=64)
    monkeypatch.setattr(checkpoints, "NETWORKS", dict.fromkeys(checkpoints.NETWORKS, config))
    monkeypatch.setitem(wan_engines.DECODERS, "wan", lambda: WanVAE(WanVAEConfig(dim=16)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
@pytest.mark.parametrize("compile", [False, True])
def test_two_gpus_show_what_one_shows(small_wan: None, compile: bool) -> None:
    one, two = (
        load_random(
            "wan2.1-1.3b", recipe="hybrid_forcing:tokens=64", size=(256, 384), device="cuda:0",
            codec_device=place, compile=compile,
        )
        for place in ("cuda:0", "cuda:1")
    )  # fmt: skip
    assert two.works_ahead and two.codec_device == torch.device("cuda:1") and two.circumstances == one.circumstances
    blocks = two.blocks_until_full + 6
    with one.stream("a ball", seed=3) as plain, two.stream("a ball", seed=3) as stream:
        fast = list(shown(stream, CUES, two.pictures_in(blocks)))
        assert (frames(fast) == frames(islice(follow(plain, CUES), blocks))).all()
        assert (next(fork(stream)).frames == next(plain).frames).all()
        assert torch.cuda.current_device() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
def test_the_network_s_gpu_does_not_wait_for_the_codec_s() -> None:
    engine = longtake.load("toy", recipe="self_forcing_sink", device="cuda:0", codec_device="cuda:1")
    with engine.stream("a ball", seed=3) as stream:
        warm = [next(stream) for _ in range(4)]  # with room for as many pictures on the host
        warm.pop().wait()
        del warm
        with torch.cuda.device(1):
            torch.cuda._sleep(10_000_000_000)  # some five seconds
            busy = torch.cuda.Event()
            busy.record()
        chunks = [next(stream), next(stream)]
        torch.cuda.synchronize(0)
        assert not busy.query(), "two blocks are made meanwhile"
        assert [len(chunk.frames) for chunk in chunks] == [12, 12] and busy.query()
