"""The embedded model's streams, as a user meets them."""

from dataclasses import replace
from itertools import combinations, islice
from threading import Thread
from unittest.mock import patch
from weakref import ref

import numpy as np
import pytest
import torch
from tests import tiny

import longtake
from longtake.generation.stream import on_host

PROMPT = "a red ball bounces over green hills"


@pytest.fixture(scope="module")
def engine():
    return longtake.load("toy", recipe="self_forcing_sink", dtype=torch.float32)


@pytest.fixture(scope="module")
def alone(engine) -> np.ndarray:
    """Four chunks of one stream, which nothing happens to: 9 + 3 * 12 pictures."""
    with engine.stream(PROMPT, seed=7) as stream:
        return take(stream, 4)


def take(stream, count: int) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in islice(stream, count)])


def test_chunks_say_where_they_stand(engine) -> None:
    with engine.stream(PROMPT, seed=7) as stream:
        chunks = list(islice(stream, 3))
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    assert [len(chunk.frames) for chunk in chunks] == [9, 12, 12]
    assert [chunk.start_seconds for chunk in chunks] == [0, 9 / 16, 21 / 16]
    for chunk in chunks:
        assert chunk.frames.dtype == np.uint8 and chunk.frames.shape[1:] == (engine.height, engine.width, 3)
        timings = chunk.timings
        parts = timings.denoise_seconds, timings.commit_seconds, timings.codec_seconds
        assert min(parts) > 0 and sum(parts) <= timings.total_seconds * 1.001
        assert timings.commit_seconds < timings.denoise_seconds  # one pass, and four


def test_a_seed_is_a_video(engine, alone: np.ndarray) -> None:
    again, other = take(engine.stream(PROMPT, seed=7), 3), take(engine.stream(PROMPT, seed=8), 1)
    assert (again == alone[: len(again)]).all() and (other != again[: len(other)]).any()


def test_streams_side_by_side_do_not_touch_each_other(engine, alone: np.ndarray) -> None:
    one, two = engine.stream(PROMPT, seed=7), engine.stream("a blue fish spins in the city", seed=9)
    woven = []
    for _ in range(3):
        woven.append(next(one).frames)
        next(two)
    assert (np.concatenate(woven) == alone[:33]).all()


def test_a_redirect_acts_from_the_next_block(engine, alone: np.ndarray) -> None:
    with engine.stream(PROMPT, seed=7) as stream:
        before = take(stream, 2)
        stream.redirect("it starts to snow at night")
        after = take(stream, 2)
        assert stream.prompt == "it starts to snow at night"
    assert (before == alone[: len(before)]).all()
    assert (after != alone[len(before) :]).any()


@pytest.mark.parametrize("call", ["cut", "redirect", "take"])
def test_another_thread_waits_for_the_end_of_the_block(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny.engine()
    stream, told = (engine.stream("a ball", seed=7) for _ in range(2))
    kept = []
    calls = {"cut": lambda: stream.cut("a cat"), "redirect": lambda: stream.redirect("a cat")}
    caller = Thread(target=calls.get(call, lambda: kept.append(longtake.Take.of(stream))))
    forward = engine.network.forward

    def forward_and_call(*given, **named):
        if not caller.ident:
            caller.start()
            caller.join(0.05)
        return forward(*given, **named)

    with monkeypatch.context() as called:
        called.setattr(engine.network, "forward", forward_and_call)
        first = next(stream)
    caller.join()
    assert (first.frames == next(told).frames).all()
    if call == "take":
        stream = kept[0].resume(engine)
    else:
        getattr(told, call)("a cat")
    assert stream.history == told.history
    assert (take(stream, 3) == take(told, 3)).all()


def test_a_redirect_that_cannot_be_read_changes_nothing(engine, alone: np.ndarray) -> None:
    with engine.stream(PROMPT, seed=7) as stream:
        take(stream, 1)
        with pytest.raises(ValueError, match="zeppelin"):
            stream.redirect("a red zeppelin")
        with pytest.raises(ValueError, match="empty"):
            stream.redirect("   ")
        assert stream.prompt == PROMPT
        assert (take(stream, 1) == alone[9:21]).all()


def test_prompts_that_cannot_be_read_are_refused(engine) -> None:
    with pytest.raises(ValueError, match="empty"):
        engine.stream(" ")
    with pytest.raises(ValueError, match="zeppelin"):
        engine.stream("a red zeppelin")
    with pytest.raises(ValueError, match="at most 39"):
        engine.stream("a red ball " * 30)


def test_a_closed_stream_says_so_and_lets_go_of_its_memory(engine) -> None:
    made = []

    def schedule(*given, **told):
        made.append(ref(given[1]))
        return engine.recipe.schedule(*given, **told)

    spying = replace(engine, recipe=replace(engine.recipe, schedule=schedule))
    with spying.stream(PROMPT) as stream:
        next(stream)
        assert made[0]() is not None
    assert made[0]() is None
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)


def test_a_stream_that_failed_does_not_end_as_if_it_were_complete(engine) -> None:
    stream = engine.stream(PROMPT)
    next(stream)
    with patch.object(type(engine.codec), "decode", side_effect=MemoryError), pytest.raises(MemoryError):
        next(stream)
    with pytest.raises(RuntimeError, match="failed"):
        next(stream)


def test_a_seed_may_be_drawn(engine) -> None:
    one, two = engine.stream(PROMPT, seed=-1), engine.stream(PROMPT, seed=-1)
    assert one.seed >= 0 and one.seed != two.seed
    with pytest.raises(ValueError, match="seed"):
        engine.stream(PROMPT, seed=-2)


def test_the_picture_follows_the_prompt(engine) -> None:
    """Night is dark, day is bright: a rough check that text reaches the network at all."""
    night, day = (
        take(engine.stream(f"a red ball stands still over green hills {when}", seed=3), 2).mean()
        for when in ("at night", "in the daytime")
    )
    assert day > night + 40


OTHER = "a blue fish spins in the city"


def test_a_batch_shows_what_its_streams_show_alone(engine) -> None:
    told = ["it starts to snow at night", "a blue fish spins on the beach"]
    with engine.stream_batch([PROMPT, OTHER], seeds=[7, 9]) as batch:
        pictures = [next(batch)]
        batch.redirect(told)
        pictures += [next(batch), next(batch)]
    together = torch.cat(pictures, 1).cpu().numpy()
    assert together.dtype == np.uint8 and batch.prompts == told
    for video, prompt, seed, after in zip(together, [PROMPT, OTHER], [7, 9], told, strict=True):
        with engine.stream(prompt, seed=seed) as stream:
            before = take(stream, 1)
            stream.redirect(after)
            single = np.concatenate([before, take(stream, 2)])
        # Rounding differs with the size of a batch, by a grey level here and there.
        apart = np.abs(video.astype(int) - single)
        assert apart.max() <= 8 and (apart > 1).mean() < 0.001


def test_a_batch_of_one_is_a_stream_bit_for_bit(engine, alone: np.ndarray) -> None:
    with engine.stream_batch([PROMPT], seeds=[7]) as batch:
        pictures = torch.cat(list(islice(batch, 3)), 1)
    assert (pictures[0].cpu().numpy() == alone[:33]).all()
    assert (batch.blocks, batch.pictures) == (3, 33)


def test_a_batch_needs_a_prompt_and_a_seed_for_each_stream(engine) -> None:
    for prompts, seeds in (([], []), ([PROMPT], [1, 2]), ([PROMPT], [-1])):
        with pytest.raises(ValueError, match="a prompt and a seed"):
            engine.stream_batch(prompts, seeds=seeds)
    batch = engine.stream_batch([PROMPT], seeds=[7])
    with pytest.raises(ValueError, match="1 streams cannot go on under 2 prompts"):
        batch.redirect([PROMPT, OTHER])
    batch.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(batch)


def test_prompts_are_prepared_by_the_text_encoder_unless_one_is_empty(monkeypatch):
    made, seen = tiny.engine(), []
    monkeypatch.setattr(tiny.AnyText, "prepare", lambda text, prompts: seen.append(prompts))
    made.prepare(["a ball", "a cube"])
    with pytest.raises(ValueError, match="the prompt is empty"):
        made.prepare(["a ball", "  "])
    with pytest.raises(ValueError, match="a prompt is a string, got None"):
        made.stream(None)  # type: ignore[arg-type]
    assert seen == [["a ball", "a cube"]]


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_pictures_come_to_the_host_as_arrays_of_their_own(device: str) -> None:
    """Laid out in whatever order."""
    given = [torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8, device=device).movedim(1, -1) for _ in range(3)]
    arrays = [on_host(pictures) for pictures in given]
    for array, pictures in zip(arrays, given, strict=True):
        assert array.shape == (2, 4, 5, 3) and (array == pictures.cpu().numpy()).all()
    assert not any(np.shares_memory(one, other) for one, other in combinations(arrays, 2))
