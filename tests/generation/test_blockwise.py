"""The laws of a stream, on a tiny random network."""

import gc
import math
import statistics
import time
from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
import torch
from tests import tiny

from longtake.flow import add_noise
from longtake.generation.blockwise import blockwise, clean_estimate, commit
from longtake.generation.stream import Stream
from longtake.memory.stream_memory import StreamMemory
from longtake.memory.view import MemoryView
from longtake.recipes import recipe_named


def stream(made, *seeds: int, memory=None, **memory_shape):
    memory = memory or tiny.memory(made, **memory_shape)
    prompts = tiny.prompt(made, batch=len(seeds))
    return blockwise(made, memory, lambda block: prompts, tiny.noise(*seeds), tiny.LEVELS)


def take(blocks, count: int) -> torch.Tensor:
    return torch.cat(list(islice(blocks, count)), dim=1)


def test_remembering_equals_seeing_everything_again() -> None:
    made = tiny.network(extent=100)
    fast = take(stream(made, 7, sink=0, past=30), 5)
    noise, prompt, slow = tiny.noise(7), tiny.prompt(made), []
    for block in range(5):
        memory = tiny.memory(made, 0, 30, ring=False)
        with torch.no_grad():
            for past in slow:  # show the network its whole past again
                commit(made, memory, past, prompt)
            noisy = noise(block, 0)
            view = made.memory_view(memory, noisy)
            for step, level in enumerate(tiny.LEVELS):
                clean = clean_estimate(made, noisy, level, prompt, view)
                if step + 1 < len(tiny.LEVELS):
                    lower = torch.full((1, tiny.BLOCK), tiny.LEVELS[step + 1])
                    noisy = add_noise(clean, noise(block, step + 1), lower)
        slow.append(clean)
    assert torch.equal(fast, torch.cat(slow, 1))


def test_ring_and_functional_memory_stream_alike() -> None:
    made = tiny.network()
    torch.testing.assert_close(take(stream(made, 7, ring=True), 9), take(stream(made, 7, ring=False), 9))


def test_the_same_seed_gives_the_same_blocks_and_another_seed_others() -> None:
    made = tiny.network()
    assert torch.equal(take(stream(made, 7), 4), take(stream(made, 7), 4))
    assert not torch.allclose(take(stream(made, 7), 1), take(stream(made, 8), 1))


def test_a_batch_of_two_streams_is_two_streams() -> None:
    made = tiny.network()
    text = tiny.text(batch=2)
    keys = made.prompt_keys(text)
    with torch.no_grad():
        together = take(blockwise(made, tiny.memory(made), lambda _: keys, tiny.noise(3, 4), tiny.LEVELS), 6)
        for i, seed in enumerate((3, 4)):
            alone = made.prompt_keys(text[i : i + 1])
            one = take(blockwise(made, tiny.memory(made), lambda _, k=alone: k, tiny.noise(seed), tiny.LEVELS), 6)
            torch.testing.assert_close(together[i : i + 1], one)


def test_a_forked_stream_goes_on_identically() -> None:
    made = tiny.network()
    memory = tiny.memory(made)
    original = stream(made, 7, memory=memory)
    take(original, 4)
    fork = stream(made, 7, memory=memory.fork())
    assert torch.equal(take(original, 4), take(fork, 4))


def test_a_prompt_is_asked_for_once_a_block_and_holds_for_all_of_it() -> None:
    made = tiny.network()
    asked = []
    first, second = tiny.prompt(made, seed=1), tiny.prompt(made, seed=2)

    def prompts(block: int):
        asked.append(block)
        return first if block < 2 else second

    changed = take(blockwise(made, tiny.memory(made), prompts, tiny.noise(7), tiny.LEVELS), 4)
    assert asked == [0, 1, 2, 3]
    same = take(stream(made, 7), 4)
    assert torch.equal(changed[:, :6], same[:, :6]) and not torch.allclose(changed[:, 6:9], same[:, 6:9])


@pytest.mark.parametrize("name, latent_frames", [("self_forcing_sink", 1200), ("hybrid_forcing", 2000)])
def test_nothing_grows_over_thousands_of_frames(name: str, latent_frames: int) -> None:
    """Through a whole stream, codec included: as many live tensors, bytes and seconds late as early on."""
    engine = tiny.engine(recipe_named(name))
    with engine.stream("anything", seed=7) as old, engine.stream("anything", seed=8) as young:
        take_chunks(young, 20)
        frames = take_chunks(old, 20)
        held = live_tensors()
        frames = take_chunks(old, math.ceil(latent_frames / tiny.BLOCK))
        assert held == live_tensors()
        seconds = [[seconds_of(stream) for stream in (old, young)] for _ in range(40)]  # on a busy machine too
    assert len(frames) == 12 and frames.std() > 0
    late, early = (statistics.median(each) for each in zip(*seconds, strict=True))
    assert late < 1.5 * early


def take_chunks(stream: Stream, count: int) -> np.ndarray:
    """The pictures of the last of so many chunks."""
    return [next(stream).frames for _ in range(count)][-1]


def seconds_of(stream: Stream) -> float:
    started = time.thread_time()
    next(stream)
    return time.thread_time() - started


def live_tensors() -> tuple[int, int]:
    """How many tensors are alive, and their bytes."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return len(tensors), sum(x.nbytes for x in tensors)


def test_a_block_costs_a_pass_for_each_level_one_commit_and_one_view(monkeypatch) -> None:
    made, log = tiny.network(), []

    def noted(name: str, own: Callable) -> Callable:
        return lambda *given, **more: log.append(name) or own(*given, **more)

    for name in ("memory_view", "forward", "keys_to_commit"):
        monkeypatch.setattr(made, name, noted(name, getattr(made, name)))
    take(stream(made, 7), 2)
    assert log == 2 * ["memory_view", *len(tiny.LEVELS) * ["forward"], "keys_to_commit"]


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("keeps_graph", [True, False])
def test_what_is_committed_teaches_the_network_alone_and_only_where_graphs_are_kept(
    keeps_graph: bool, learns: bool
) -> None:
    made, block = tiny.network(), tiny.noise(7)(0, 0).requires_grad_()
    memory = StreamMemory(tiny.memory(made).shape, made.config.layers, ring=False, keeps_graph=keeps_graph)
    prompt = made.prompt_keys(tiny.text())
    with torch.set_grad_enabled(learns):
        commit(made, memory, block, prompt)
    remembered = [x for layer in range(memory.layers) for x in memory.held(layer)[:2]]
    assert {x.requires_grad for x in remembered} == {keeps_graph and learns}
    if keeps_graph and learns:
        sum(x.square().sum() for x in remembered).backward()
        assert made.patch_embedding.weight.grad.any() and block.grad is None


def test_a_long_stream_keeps_its_books() -> None:
    made = tiny.network()
    memory = tiny.memory(made)
    take(stream(made, 7, memory=memory), 50)
    memory.audit()
    assert memory.frames == 150 and memory.blocks == 50


def test_every_block_reads_sink_and_past_at_capped_positions() -> None:
    made = tiny.network(extent=15)
    memory = tiny.memory(made)
    blocks = stream(made, 7, memory=memory)
    for _ in range(20):
        next(blocks)
    view = made.memory_view(memory, tiny.noise(7)(20, 0))
    assert isinstance(view, MemoryView)
    expected = made.config.axes.rotation([12, 13, 14], 2, 3, "cpu")
    assert torch.equal(view.rotation.cos_TA, expected.cos_TA)
    assert sorted(memory.held(0).frames) == [0, 1, 2, 57, 58, 59]
