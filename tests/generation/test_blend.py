"""Words that go over into others block by block: what each block is under, in every schedule and recipe."""

from itertools import islice
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from tests.generation.test_take import NAMES, engine, pictures, same
from torch import Tensor

from longtake.generation import blockwise as rules
from longtake.generation.blend import between
from longtake.generation.rolling import begins_next
from longtake.generation.stream import Stream
from longtake.generation.take import Take
from longtake.memory.stream_memory import StreamMemory
from longtake.models.wan import PromptKeys

WAYS = ("lerp", "slerp")
shares = st.floats(0, 1)
seeds = st.integers(0, 10_000)


def rows(seed: int) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 7, generator=dice), 3 * torch.randn(2, 3, 7, generator=dice)


# Embeddings


@pytest.mark.parametrize("by", WAYS)
@given(seed=seeds)
def test_the_ends_are_those_given(by, seed) -> None:
    before, after = rows(seed)
    assert torch.equal(between(before, after, 0, by), before) and torch.equal(between(before, after, 1, by), after)


@given(seed=seeds, share=shares)
def test_lerp_is_a_straight_line(seed, share) -> None:
    before, after = rows(seed)
    torch.testing.assert_close(between(before, after, share, "lerp"), before + share * (after - before))


@given(seed=seeds, share=shares)
def test_slerp_turns_at_an_even_pace_and_its_length_goes_linearly(seed, share) -> None:
    before, after = rows(seed)
    made = between(before, after, share, "slerp")

    def angle(one: Tensor, other: Tensor) -> Tensor:
        return torch.cosine_similarity(one.double(), other.double(), dim=-1).clamp(-1, 1).acos()

    whole = angle(before, after)
    torch.testing.assert_close(angle(before, made), share * whole, atol=2e-3, rtol=0)
    torch.testing.assert_close(angle(made, after), (1 - share) * whole, atol=2e-3, rtol=0)
    torch.testing.assert_close(made.norm(dim=-1), before.norm(dim=-1).lerp(after.norm(dim=-1), share))


@given(seed=seeds, share=shares, scale=st.sampled_from([0.0, 1.0, 2.0, -1.0, 1 + 1e-7]))
def test_where_there_is_no_great_circle_rows_go_linearly(seed, share, scale) -> None:
    """Padding of zeros, and the same or opposite directions."""
    before, _ = rows(seed)
    for one, other in ((before, scale * before), (scale * before, before)):
        torch.testing.assert_close(between(one, other, share, "slerp"), one.lerp(other, share), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("by", WAYS)
@given(seed=seeds, share=shares)
def test_half_precision_is_blended_in_float32(by, seed, share) -> None:
    before, after = (x.bfloat16() for x in rows(seed))
    made = between(before, after, share, by)
    assert made.dtype == torch.bfloat16
    assert torch.equal(made, between(before.float(), after.float(), share, by).bfloat16())


# Streams


def layers(keys: PromptKeys) -> list[list[Tensor]]:
    return [list(layer) for layer in keys.layers]


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_a_blend_is_the_schedule_under_words_that_go_over(name, by) -> None:
    """Against the schedule itself, with every block's words worked out by hand: k / over, and the rule once."""
    made, over = engine(name), 4
    with made.stream("abc", seed=3) as stream:
        pictures(stream, 5)
        stream.redirect("defgh", over=over, blend=by)
        pictures(stream, 7)
        streamed = stream.state()
    old, new = made.embedded("abc"), made.embedded("defgh")
    plain, whole = made.keys_of(old), made.prompt_keys("defgh")
    begins = 5 + made.recipe.in_flight - 1

    def under(block: int):
        if block < begins or block >= begins + over - 1:
            return plain if block < begins else whole
        return made.keys_of(between(old, new, (block - begins + 1) / over, by))

    memory, flight = StreamMemory(made.recipe.memory(made.network), made.network.config.layers, ring=True), []
    noise = stream._batch._noise
    blocks = made.recipe.schedule_with(flight)(made.network, memory, under, noise, made.recipe.levels(made.shift))
    list(islice(blocks, 5))
    memory.fade_far(1.0)
    rules.redirect(made.network, memory, under(begins))
    list(islice(blocks, 7))
    assert same(memory.state(), streamed["memory"])
    assert [one["block"] for one in streamed["in_flight"]] == [one.block for one in flight]
    assert same([one["noisy"] for one in streamed["in_flight"]], [one.noisy_BFCHW for one in flight])
    assert not streamed["blends"] or made.recipe.in_flight > 3
    assert same(streamed["prompt_keys"][0], layers(whole))


def next_of(stream: Stream) -> int:
    """The number of the block that begins next."""
    return begins_next(stream._batch._in_flight, stream._batch._memory)


@pytest.mark.parametrize("name", ["self_forcing_sink", "rolling_forcing"])
@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_whatever_is_said_a_blend_begins_from_what_is_shown(name, seed) -> None:
    """Breaking off other blends, before the first block, after cuts, twice between two blocks, over fewer and more,
    for blocks in flight and behind them, and after it was kept and taken up again."""
    made = engine(name)
    random = Random(seed)
    stream = made.stream("abc", seed=3)
    words = dict.fromkeys(range(-1, 60), made.embedded("abc"))  # of each block, as far as it is said
    for number in range(8):
        text = "x" * (4 + number)
        verb = random.choice(["on", "blend", "blend", "blend", "redirect", "cut", "keep"])
        if verb in ("blend", "redirect"):
            over, by = random.randrange(2, 6) if verb == "blend" else 1, random.choice(WAYS)
            in_flight = random.choice(["own", "new"])
            begin = stream.blocks if in_flight == "new" else next_of(stream)
            base, new = words[begin - 1], made.embedded(text)
            for block in range(begin, 60):
                words[block] = between(base, new, min((block - begin + 1) / over, 1), by)
            stream.redirect(text, over=over, blend=by, in_flight=in_flight)
        elif verb == "cut":
            stream.cut(text)
            words |= dict.fromkeys(range(stream.blocks - 1, 60), made.embedded(text))  # the shot before it is over
        elif verb == "keep":
            stream = Take.of(stream).resume(made)
        for _ in range(random.randrange(3)):
            next(stream)
        begins = next_of(stream)
        for block, prompt in [
            *((one.block, one.prompt) for one in stream._batch._in_flight),
            (begins, stream._batch._keys_at(begins)),
        ]:
            assert same(layers(prompt), layers(made.keys_of(words[block])))
        blends = stream._batch._blends
        assert [one.begin for one in blends] == sorted({one.begin for one in blends})
        assert all(one.begin >= stream.blocks for one in blends[1:])


def test_a_change_that_fails_half_way_for_blocks_in_flight_closes_the_stream() -> None:
    made = engine("rolling_forcing")
    stream = made.stream("abc", seed=3)
    pictures(stream, 4)
    keys, asked = made.keys_of, []

    def fails(text_BLE: Tensor) -> PromptKeys:
        asked.append(text_BLE)
        if len(asked) == 3:  # of the prompt, of the block that is the first to change, and of the one behind it
            raise MemoryError
        return keys(text_BLE)

    object.__setattr__(made, "keys_of", fails)
    with pytest.raises(MemoryError):
        stream.redirect("defgh", over=4, in_flight="new")
    assert stream.closed


def test_blocks_in_flight_take_the_first_steps_if_that_is_asked_for() -> None:
    made = engine("rolling_forcing")
    stream = made.stream("abc", seed=3)
    pictures(stream, 4)
    (flying,) = {len(stream.state()["in_flight"])}
    stream.redirect("defgh", over=4, in_flight="new")
    old, new = made.embedded("abc"), made.embedded("defgh")
    for step, one in enumerate(stream._batch._in_flight, 1):
        expected = made.keys_of(between(old, new, step / 4, "lerp"))
        assert same(layers(one.prompt), layers(expected))
    assert flying == 2 and stream.since == 4


@pytest.mark.parametrize("name", ["self_forcing_sink", "rolling_forcing", "longlive"])
def test_after_a_blend_a_stream_is_under_the_prompts_own_keys_and_keeps_nothing_of_it(name) -> None:
    made = engine(name)
    stream = made.stream("abc", seed=3)
    pictures(stream, 3)
    stream.redirect("defgh", over=3)
    assert "blends" in Take.of(stream).info()["bytes"]
    pictures(stream, 3 + made.recipe.in_flight)
    state = stream.state()
    assert state["blends"] == [] and len(state["prompt_keys"]) == 1
    assert same(state["prompt_keys"][0], layers(made.prompt_keys("defgh")))


def test_a_batch_goes_over_as_its_streams_do_alone() -> None:
    made = engine("self_forcing_sink")
    with made.stream_batch(["abc", "defgh"], seeds=[1, 2]) as batch:
        next(batch)
        batch.redirect(["defghi", "ab"], over=3, blend="slerp")
        together = torch.cat([next(batch) for _ in range(4)], 1).numpy()
    for video, (prompt, seed, told) in zip(together, [("abc", 1, "defghi"), ("defgh", 2, "ab")], strict=True):
        with made.stream(prompt, seed=seed) as stream:
            next(stream)
            stream.redirect(told, over=3, blend="slerp")
            assert np.abs(video.astype(int) - pictures(stream, 4)).max() <= 1


@pytest.mark.parametrize(
    "how, why",
    [
        ({"over": 0}, "1 block or more, got 0"),
        ({"over": 2.5}, "got 2.5"),
        ({"over": True}, "got True"),
        ({"blend": "cut"}, "lerp or slerp"),
    ],
)
def test_what_is_no_blend_is_refused_and_changes_nothing(how, why) -> None:
    stream = tiny.engine().stream("a ball")
    next(stream)
    before = Take.of(stream)
    with pytest.raises(ValueError, match=why):
        stream.redirect("a cube", **how)
    with pytest.raises(ValueError, match="share"):
        stream.redirect("a cube", over=3, far=2.0)
    assert same(Take.of(stream).state, before.state)
