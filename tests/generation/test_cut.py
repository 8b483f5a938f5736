"""What a redirect and a cut do to what a stream remembers."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import pytest
import torch
from tests import tiny
from torch import Tensor

from longtake.generation.stream import Engine, StreamBatch
from longtake.memory.far import FarShape
from longtake.memory.stream_memory import StreamMemory

PROMPT = "anything"
WINDOW = 3  # blocks: sink, past and current


def far_engine() -> Engine:
    """One whose network reads a far state, as if trained to."""
    made = tiny.network(reads_far=True).float().requires_grad_(False)
    for block in made.layers:
        torch.nn.init.normal_(block.self_attn.linear_proj.weight)
    engine = tiny.engine()
    return replace(engine, network=made, recipe=replace(engine.recipe, far=FarShape()))


ENGINES = pytest.mark.parametrize("engine", [tiny.engine(), far_engine()], ids=["near", "far"])


def memory_of(batch: StreamBatch) -> StreamMemory:
    assert batch._memory is not None
    return batch._memory


def opened(engine: Engine, blocks: int, streams: int = 1) -> StreamBatch:
    """Streams after so many blocks."""
    batch = engine.stream_batch([PROMPT] * streams, seeds=list(range(streams)))
    for _ in range(blocks):
        next(batch)
    return batch


def following(batch: StreamBatch, blocks: int = 2 * WINDOW) -> list[Tensor]:
    return list(islice(batch, blocks))


class Told:
    """A text encoder that tells prompts apart by their length, so that they matter."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.cat([tiny.text(seed=len(prompt))[:, 0] for prompt in prompts]).float()


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("verb, far", [("redirect", 0.0), ("cut", 0.5)])
def test_a_stream_alone_takes_a_share_as_a_batch_does(verb: str, far: float) -> None:
    engine = far_engine()
    batch = opened(engine, 5)
    getattr(batch, verb)([PROMPT], far=far)
    with engine.stream(PROMPT, seed=0) as stream:
        list(islice(stream, 5))
        getattr(stream, verb)(PROMPT, far=far)
        shown = [torch.from_numpy(chunk.frames)[None] for chunk in islice(stream, 2 * WINDOW)]
    assert same(shown, following(batch))


# redirect


@ENGINES
def test_a_redirect_keeps_all_unless_told_otherwise(engine: Engine) -> None:
    """The tiny network takes every prompt for the same, so nothing else can change."""
    plain, redirected, told = (opened(engine, 5) for _ in range(3))
    redirected.redirect([PROMPT])
    told.redirect([PROMPT], far=1)
    expected = following(plain)
    assert same(following(redirected), expected) and same(following(told), expected)


def test_a_redirect_that_keeps_no_far_state_is_one_of_a_stream_that_had_none() -> None:
    engine = far_engine()
    faded, emptied, kept = (opened(engine, 5) for _ in range(3))
    faded.redirect([PROMPT], far=0)
    memory = memory_of(emptied)
    memory._far = {layer: replace(state, sums=None) for layer, state in memory._far.items()}
    shown = following(faded)
    assert same(shown, following(emptied)) and not same(shown, following(kept))


def test_a_part_of_the_far_state_weighs_on() -> None:
    engine = far_engine()
    batch = opened(engine, 5)
    mass = memory_of(batch).far(0).sums.mass_B.clone()
    batch.redirect([PROMPT], far=0.25)
    assert torch.equal(memory_of(batch).far(0).sums.mass_B, mass / 4)


def test_without_a_far_state_every_share_is_taken_and_changes_nothing() -> None:
    plain, faded = (opened(tiny.engine(), 5) for _ in range(2))
    faded.redirect([PROMPT], far=0)
    assert same(following(faded), following(plain))


@ENGINES
@pytest.mark.parametrize("verb", ["redirect", "cut"])
def test_what_is_refused_changes_nothing(engine: Engine, verb: str) -> None:
    plain, refused = (opened(engine, 5) for _ in range(2))
    act = getattr(refused, verb)
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="a share of 0 to 1"):
            act(["another"], far=share)
    for prompts, said in (([" "], "empty"), ([PROMPT] * 2, "1 streams cannot go on under 2 prompts")):
        with pytest.raises(ValueError, match=said):
            act(prompts, far=0)
    assert refused.prompts == [PROMPT]
    assert same(following(refused), following(plain))
    refused.close()
    with pytest.raises(RuntimeError, match="closed"):
        act([PROMPT])


# cut


@ENGINES
@pytest.mark.parametrize("streams", [1, 2])
def test_after_a_cut_nothing_of_the_old_shot_is_held(engine: Engine, streams: int) -> None:
    batch = opened(engine, 5, streams)
    old = memory_of(batch).held(0).v_BTND.clone()
    batch.cut(["a new shot"] * streams)
    memory = memory_of(batch)
    assert memory.held(0) is None
    for blocks in range(1, 2 * WINDOW + 1):
        next(batch)
        memory.audit()
        assert memory.frames == 3 * blocks
    assert not torch.isin(memory.held(0).v_BTND, old).any()
    assert batch.prompts == ["a new shot"] * streams
    if engine.recipe.far:  # nothing but what left the new window
        tokens = old.shape[1] // 6
        assert memory.far(0).sums.mass_B.tolist() == [tokens * (memory.frames - 6)] * streams


@ENGINES
def test_a_shot_begins_like_a_stream_that_draws_other_noise(engine: Engine) -> None:
    """What comes after a cut hangs on nothing that was before it but the number of blocks."""
    fresh = engine.stream_batch([PROMPT], seeds=[0])
    memory_of(fresh).blocks = 5
    late = opened(engine, 5)
    late.cut([PROMPT])
    shown = following(late)
    assert same(shown, following(fresh))
    assert not torch.equal(shown[0], next(opened(engine, 0)))


@ENGINES
def test_a_shot_is_made_under_its_own_prompt(engine: Engine) -> None:
    engine = replace(engine, text=Told())
    fresh = engine.stream_batch(["a new shot"], seeds=[0])
    memory_of(fresh).blocks = 5
    late, unchanged = opened(engine, 5), opened(engine, 5)
    late.cut(["a new shot"])
    unchanged.cut([PROMPT])
    shown = following(late)
    assert same(shown, following(fresh))
    assert not any(torch.equal(one, other) for one, other in zip(shown, following(unchanged), strict=True))


@ENGINES
def test_a_share_of_the_far_state_reaches_the_new_shot(engine: Engine) -> None:
    plain, dim = (opened(engine, 5) for _ in range(2))
    plain.cut([PROMPT])
    dim.cut([PROMPT], far=0.5)
    assert same(following(plain), following(dim)) == (engine.recipe.far is None)


@ENGINES
def test_blocks_pictures_and_seconds_are_counted_on(engine: Engine) -> None:
    with engine.stream(PROMPT) as stream:
        chunks = list(islice(stream, 2))
        stream.cut("a new shot")
        chunks += list(islice(stream, 2))
        assert stream.prompt == "a new shot"
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    assert [len(chunk.frames) for chunk in chunks] == [9, 12, 9, 12]
    assert [chunk.start_seconds for chunk in chunks] == [0, 9 / 16, 21 / 16, 30 / 16]


@ENGINES
def test_the_same_calls_make_the_same_video(engine: Engine) -> None:
    def video() -> list[Tensor]:
        batch = opened(engine, 4)
        batch.redirect(["it snows"], far=0.5)
        shown = following(batch, 2)
        batch.cut(["a new shot"], far=0.1)
        return shown + following(batch)

    assert same(video(), video())


def test_a_cut_before_the_first_block_is_a_redirect() -> None:
    cut = opened(tiny.engine(), 0)
    cut.cut([PROMPT])
    assert same(following(cut), following(opened(tiny.engine(), 0)))
