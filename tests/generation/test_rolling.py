"""The laws of a window of blocks in flight, on a tiny random network."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch
from tests import tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longtake.generation.blockwise import blockwise, commit
from longtake.generation.recipe import Recipe
from longtake.generation.rolling import Call, InFlight, calls, rolling
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.memory.window import WindowShape
from longtake.models.wan import PromptKeys, WanTransformer
from longtake.recipes import self_forcing_sink

T = len(tiny.LEVELS)


def memory_of(made: WanTransformer, ring: bool = True) -> StreamMemory:
    return StreamMemory(tiny.rolling_recipe().memory(made), made.config.layers, ring=ring)


def stream(made: WanTransformer, *seeds: int, memory: StreamMemory | None = None, **settings) -> Iterator[Tensor]:
    prompts = tiny.prompt(made, batch=len(seeds))
    memory = memory or memory_of(made)
    return rolling(made, memory, lambda block: prompts, tiny.noise(*seeds), tiny.LEVELS, **settings)


def called(made: WanTransformer, end: int | None) -> Iterator[Call]:
    prompt = tiny.prompt(made)
    return calls(made, memory_of(made), lambda block: prompt, tiny.noise(7), tiny.LEVELS, lambda flight: False, end)


def take(blocks: Iterator[Tensor], count: int | None = None) -> Tensor:
    return torch.cat(list(islice(blocks, count)), dim=1)


def test_a_finished_block_costs_one_call_and_one_commit(monkeypatch) -> None:
    made, log = tiny.network(), []
    forward, keys_to_commit = made.forward, made.keys_to_commit
    monkeypatch.setattr(made, "forward", lambda x, *a, **k: log.append(x.shape[1]) or forward(x, *a, **k))
    monkeypatch.setattr(made, "keys_to_commit", lambda x, *a, **k: log.append("commit") or keys_to_commit(x, *a, **k))
    blocks = stream(made, 7)
    next(blocks)
    assert log == [3, 6, 9, "commit"]
    log.clear()
    take(blocks, 4)
    assert log == [9, "commit"] * 4


class FromHost(TorchDispatchMode):
    """Counts tensors made of the host's numbers: on a GPU their copies wait until it has done all it was told."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_between_two_calls() -> None:
    made = tiny.network()
    for schedule in (rolling, blockwise):
        prompts, noise = tiny.prompt(made), tiny.noise(7)
        blocks = schedule(made, memory_of(made), lambda block: prompts, noise, tiny.LEVELS)  # noqa: B023
        take(blocks, 30)  # from then on what depends on places is remembered
        with FromHost() as seen:
            take(blocks, 3)
        assert not seen.made, schedule
        with FromHost() as seen:
            torch.tensor([0.5])
        assert seen.made == 1


def test_a_commit_is_told_beforehand() -> None:
    made, prompt = tiny.network(), tiny.prompt(tiny.network())
    for schedule in (rolling, blockwise):
        memory, told = memory_of(made), []

        def tell(memory=memory, told=told) -> None:
            told.append(memory.blocks)

        take(schedule(made, memory, lambda block: prompt, tiny.noise(7), tiny.LEVELS, commits=tell), 3)
        assert told == [0, 1, 2], schedule


def test_a_stream_keeps_no_graph() -> None:
    made = tiny.network()
    prompts, noise = tiny.prompt(made), tiny.noise(7)
    for schedule in (rolling, blockwise):
        blocks = schedule(made, memory_of(made), lambda block: prompts, noise, tiny.LEVELS)
        assert not take(blocks, 3).requires_grad


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7])
def test_every_block_falls_through_all_levels_in_clips_of_any_length(blocks: int) -> None:
    made = list(called(tiny.network(), blocks))
    assert len(made) == blocks + T - 1 and [call.finishes for call in made] == [False] * (T - 1) + [True] * blocks
    for block in range(blocks):
        mine = [
            (number, call.levels[call.blocks.index(block)]) for number, call in enumerate(made) if block in call.blocks
        ]
        assert mine == [(block + step, level) for step, level in enumerate(tiny.LEVELS)]
    for call in made:
        assert list(call.levels) == sorted(call.levels) and len(call.clean) == len(call.blocks) <= T


def test_a_clip_is_a_stream_until_no_new_blocks_enter() -> None:
    made, blocks = tiny.network(), 7
    clip, endless = take(stream(made, 7, end=blocks)), take(stream(made, 7), blocks)
    alike = (blocks - T + 1) * tiny.BLOCK
    assert clip.shape == endless.shape
    torch.testing.assert_close(clip[:, :alike], endless[:, :alike])
    for block in range(blocks - T + 1, blocks):
        frames = slice(block * tiny.BLOCK, (block + 1) * tiny.BLOCK)
        assert not torch.allclose(clip[:, frames], endless[:, frames])


@pytest.mark.parametrize("sink", [0, 3])
def test_with_one_level_it_is_blockwise(sink: int) -> None:
    """Over the same memory, whatever that shows commits."""
    made, prompt = tiny.network(), tiny.prompt(tiny.network())
    shape = MemoryShape(window=WindowShape(sink=sink, past=12), extent=15, commits_keep_sink=False)
    one, other = (
        take(
            schedule(
                made,
                StreamMemory(shape, made.config.layers, ring=True),
                lambda block: prompt,
                tiny.noise(7),
                tiny.LEVELS[:1],
                end=9,
            )
        )
        for schedule in (rolling, blockwise)
    )
    torch.testing.assert_close(one, other)


def test_ring_and_functional_memory_stream_alike() -> None:
    made = tiny.network()
    one, other = (take(stream(made, 7, memory=memory_of(made, ring)), 9) for ring in (True, False))
    torch.testing.assert_close(one, other)


def test_a_batch_of_two_streams_is_two_streams() -> None:
    made, text = tiny.network(), tiny.text(batch=2)

    def streamed(rows: list[int]) -> Tensor:
        with torch.no_grad():
            keys = made.prompt_keys(text[rows])
        return take(rolling(made, memory_of(made), lambda block: keys, tiny.noise(*rows), tiny.LEVELS), 7)

    together = streamed([0, 1])
    for row in (0, 1):
        torch.testing.assert_close(together[row : row + 1], streamed([row]))


def test_a_fork_goes_on_identically_with_the_blocks_in_flight_and_only_then() -> None:
    made = tiny.network()
    memory, prompt = memory_of(made), tiny.prompt(made)

    def going_on(from_memory: StreamMemory, flight: list[InFlight]) -> Iterator[Tensor]:
        return rolling(made, from_memory, lambda block: prompt, tiny.noise(7), tiny.LEVELS, in_flight=flight)

    flight: list[InFlight] = []
    original = going_on(memory, flight)
    take(original, 5)
    assert [(one.block, one.step) for one in flight] == [(5, 2), (6, 1)]
    twin, without = going_on(memory.fork(), list(flight)), going_on(memory.fork(), [])
    expected = take(original, 4)
    assert torch.equal(take(twin, 4), expected)
    assert not torch.allclose(take(without, 4), expected)


def test_it_goes_on_from_given_blocks_with_a_window_of_its_own() -> None:
    made, prompt, memory = tiny.network(), tiny.prompt(tiny.network()), memory_of(tiny.network())
    for seed in range(3):
        commit(made, memory, tiny.noise(seed)(0, 0), prompt)
    made_calls = calls(made, memory, lambda block: prompt, tiny.noise(7), tiny.LEVELS, lambda flight: False, end=5)
    assert [call.blocks for call in made_calls] == [(3,), (3, 4), (3, 4), (4,)]
    memory.audit()
    assert memory.blocks == 5


def test_blocks_in_flight_keep_their_prompt() -> None:
    made, seen, asked = tiny.network(), [], []
    first, second = tiny.prompt(made, seed=1), tiny.prompt(made, seed=2)
    forward = made.forward

    def watched(noisy, level_BF, prompts, view, prompt_BF=None):
        seen.append([0] if prompt_BF is None else prompt_BF[0, :: tiny.BLOCK].tolist())
        return forward(noisy, level_BF, prompts, view, prompt_BF)

    def prompts(block: int) -> PromptKeys:
        asked.append(block)
        return first if block < 4 else second

    made.forward = watched
    changed = take(rolling(made, memory_of(made), prompts, tiny.noise(7), tiny.LEVELS), 5)
    assert asked == list(range(7))
    assert seen == [[0]] * 4 + [[0, 0, 1], [0, 1, 1], [0]]
    same = take(stream(made, 7), 5)
    before = 2 * tiny.BLOCK  # what was finished when the first block under the new prompt entered
    assert torch.equal(changed[:, :before], same[:, :before])
    assert not torch.allclose(changed[:, before:], same[:, before:])


def test_equal_prompts_of_their_own_are_one_prompt() -> None:
    made = tiny.network()
    own = rolling(made, memory_of(made), lambda block: tiny.prompt(made), tiny.noise(7), tiny.LEVELS)
    torch.testing.assert_close(take(own, 5), take(stream(made, 7), 5))


def test_a_cut_drops_what_is_in_flight() -> None:
    """What follows is what a stream shows whose blocks are counted from there."""
    made, memory, fresh = tiny.network(), memory_of(tiny.network()), memory_of(tiny.network())
    cut = stream(made, 7, memory=memory)
    take(cut, 4)
    memory.cut(far=0)
    fresh.blocks = 4
    assert torch.equal(take(cut, 4), take(stream(made, 7, memory=fresh), 4))


def test_a_long_stream_keeps_its_books_and_finite_positions() -> None:
    made = tiny.network()
    memory = memory_of(made)
    flight: list[InFlight] = []
    blocks = stream(made, 7, memory=memory, in_flight=flight)
    sizes = []
    for _ in range(40):
        next(blocks)
        memory.audit()
        sizes.append((memory.nbytes(), len(flight)))
    assert len(set(sizes[10:])) == 1
    assert all(one.block + 1 == other.block and one.step == other.step + 1 for one, other in pairwise(flight))


class Told:
    """A text encoder that tells prompts apart by their length, so that they matter."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.cat([tiny.text(seed=len(prompt))[:, 0] for prompt in prompts]).float()


def redirected(recipe: Recipe, blocks: int = 2, **how: str) -> list[bool]:
    """Whether the next four blocks, after so many, stand under what the stream is told then."""
    engine, under = replace(tiny.engine(recipe), text=Told()), []
    told, keys_to_commit = engine.prompt_keys("anything else").layers[0][0], engine.network.keys_to_commit

    def noted(clean, level_BF, prompts, *rest):
        under.append(torch.equal(prompts.layers[0][0], told))
        return keys_to_commit(clean, level_BF, prompts, *rest)

    engine.network.keys_to_commit = noted
    with engine.stream("anything", seed=7) as stream:
        for _ in range(blocks):
            next(stream)
        stream.redirect("anything else", **how)
        for _ in range(4):
            next(stream)
    assert not any(under[:blocks])
    return under[blocks:]


def test_blocks_in_flight_go_on_under_their_own_prompt_or_the_new_one() -> None:
    """With T blocks in flight a redirect is shown T - 1 blocks later than block by block, or as soon."""
    assert redirected(tiny.rolling_recipe()) == [False, False, True, True]
    assert redirected(tiny.rolling_recipe(), in_flight="own") == [False, False, True, True]
    assert redirected(tiny.rolling_recipe(), in_flight="new") == [True] * 4
    assert redirected(self_forcing_sink()) == redirected(self_forcing_sink(), in_flight="new") == [True] * 4


def test_a_redirect_before_the_first_block_finds_nothing_in_flight() -> None:
    assert redirected(tiny.rolling_recipe(), blocks=0) == [True] * 4


def test_under_the_new_prompt_blocks_in_flight_go_through_the_network_as_one() -> None:
    engine = replace(tiny.engine(tiny.rolling_recipe()), text=Told())
    forward, numbers = engine.network.forward, []
    with engine.stream_batch(["anything", "more"], seeds=[7, 8]) as streams:
        next(streams)
        engine.network.forward = lambda *a: numbers.append(a[4]) or forward(*a)
        streams.redirect(["anything else", "less"])
        next(streams)
        streams.redirect(["nothing", "all"], in_flight="new")
        next(streams)
    assert numbers[0][:, :: tiny.BLOCK].tolist() == [[0, 0, 1]] * 2 and numbers[1] is None


def test_another_choice_is_refused_and_changes_nothing() -> None:
    with tiny.engine(tiny.rolling_recipe()).stream("anything") as stream:
        with pytest.raises(ValueError, match="their own prompt or the new one, got 'all'"):
            stream.redirect("anything else", in_flight="all")
        assert stream.prompt == "anything"


def test_streams_of_an_engine_roll_too() -> None:
    engine = tiny.engine(tiny.rolling_recipe())
    with engine.stream("anything", seed=7) as opened:
        frames = [next(opened).frames for _ in range(5)]
        opened.redirect("anything else")
        frames.append(next(opened).frames)
        opened.cut("another scene")
        frames.append(next(opened).frames)
    assert [len(some) for some in frames] == [9, *[12] * 5, 9]
    with engine.stream("anything", seed=7) as again:
        assert all((next(again).frames == some).all() for some in frames[:5])
    given = torch.tensor(frames[0]).numpy()
    with engine.stream("anything", seed=7, pictures=given) as going_on:
        assert next(going_on).index == 1
