"""What a stream was told: from which block on it holds, and how much of it is kept."""

from random import Random

import pytest
from tests import tiny

from longtake.generation import stream as streams
from longtake.generation.stream import Told
from longtake.generation.take import Take, retrace


@pytest.mark.parametrize("seed", range(4))
def test_a_prompt_begins_behind_the_blocks_that_are_in_flight(seed):
    """Whenever it is told: before the first block, after a cut, once more, after going back."""
    random, engine = Random(seed), tiny.engine(tiny.rolling_recipe())
    stream, takes = engine.stream("a ball"), []
    for number in range(12):
        do = random.choice(["redirect", "new", "blend", "cut", "take", "rewind"])
        if do == "cut":
            stream.cut(f"words {number}")
        elif do == "take":
            takes.append(Take.of(stream))
        elif do == "rewind" and takes:
            random.choice(takes).rewind(stream)
        elif do in ("redirect", "new", "blend"):
            flying = len(stream.state()["in_flight"])
            way, over = "new" if do == "new" else "own", 3 if do == "blend" else 1
            stream.redirect(f"words {number}", in_flight=way, over=over)
            assert stream.since == stream.blocks + (0 if do == "new" else flying)
            assert stream.prompt_of(stream.since) == stream.prompt
        for _ in range(random.randrange(3)):
            number_of_next = stream.blocks
            prompts = stream.state()["in_flight"]
            plain = all(told.over == 1 for told in stream.history)
            if prompts and plain:  # numbered as `state` does: 0 is the present one
                assert (stream.prompt_of(number_of_next) == stream.prompt) == (prompts[0]["prompt"] == 0)
            next(stream)


def test_of_what_a_stream_was_told_so_much_is_kept(monkeypatch):
    monkeypatch.setattr(streams, "MOST_TOLD", 3)
    engine = tiny.engine()
    stream = engine.stream("a ball")
    for number in range(5):
        next(stream)
        stream.redirect(f"words {number}")
    assert [told.prompts for told in stream.history] == [("words 2",), ("words 3",), ("words 4",)]
    twin = Take.of(stream).resume(engine)
    assert twin.history == stream.history and twin.prompt == "words 4"
    assert (next(twin).frames == next(stream).frames).all()
    with pytest.raises(ValueError, match="not its beginning"):
        retrace(engine, 42, stream.history, stream.blocks)


@pytest.mark.parametrize("plain", [{}, {"prompts": ["a"]}, {"prompts": ["a"], "verb": "begin", "hue": 3}, None])
def test_what_is_no_telling_is_refused(plain):
    with pytest.raises((KeyError, TypeError)):
        Told.of(plain)
