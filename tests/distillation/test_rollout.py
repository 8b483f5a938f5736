"""Training unrolls the schedule that serves."""

from dataclasses import replace
from functools import partial
from itertools import islice

import pytest
import torch
from tests import tiny

from longtake.attention.block_sparse import block_sparse
from longtake.distillation.rollout import rollout
from longtake.generation.blockwise import blockwise
from longtake.generation.noise import SeededNoise
from longtake.generation.rolling import rolling
from longtake.memory.far import FarShape
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.memory.window import WindowShape

SHAPE = MemoryShape(window=WindowShape(sink=3, past=3), extent=15)
HYBRID = replace(SHAPE, far=FarShape(), near=partial(block_sparse, share=0.4, block_q=6, block_k=6))


def hybrid_network():
    """One whose projections are not zero, as if trained."""
    made = tiny.network(reads_far=True)
    for projection in made.projections:
        torch.nn.init.normal_(projection.weight)
    return made


def roll(
    made, noise, levels=tiny.LEVELS, blocks=4, learning=4, given=(), changes_at=99, shape=SHAPE, texts=None
) -> torch.Tensor:
    early = made.prompt_keys(tiny.text() if texts is None else texts)
    late = made.prompt_keys(tiny.text(seed=2))
    return rollout(
        blockwise, made, shape, lambda block: late if block >= changes_at else early, noise, levels,
        blocks=blocks, learning=learning, given=given,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [SHAPE, HYBRID])
def test_a_rollout_to_the_last_step_is_the_stream(shape: MemoryShape) -> None:
    made = hybrid_network()
    keys, memory = tiny.prompt(made), StreamMemory(shape, made.config.layers, ring=True)
    stream = blockwise(made, memory, lambda block: keys, tiny.noise(7), tiny.LEVELS)
    torch.testing.assert_close(
        roll(made, tiny.noise(7), blocks=6, learning=6, shape=shape), torch.cat(list(islice(stream, 6)), 1)
    )


def test_a_hybrid_rollout_of_two_is_two_rollouts() -> None:
    made, texts = hybrid_network(), tiny.text(batch=2)

    def rolled(*rows: int) -> torch.Tensor:
        noise = SeededNoise(rows, tiny.LATENTS, "cpu", torch.float64)
        return roll(made, noise, blocks=6, learning=6, shape=HYBRID, texts=texts[list(rows)])

    together = rolled(0, 1)
    for row in range(2):
        torch.testing.assert_close(together[row : row + 1], rolled(row))


def rolled(made, noise, levels=tiny.LEVELS, blocks=5, learning=5) -> torch.Tensor:
    prompt = made.prompt_keys(tiny.text())
    return rollout(
        rolling, made, tiny.rolling_recipe().memory(made), lambda block: prompt, noise, levels,
        blocks=blocks, learning=learning,
    )  # fmt: skip


def test_a_rolling_rollout_is_the_clip_and_begins_as_the_stream() -> None:
    made, size = tiny.network(), 6
    keys, shape = tiny.prompt(made), tiny.rolling_recipe().memory(made)
    clip, stream = (
        rolling(
            made,
            StreamMemory(shape, made.config.layers, ring=True),
            lambda block: keys,
            tiny.noise(7),
            tiny.LEVELS,
            end=end,
        )
        for end in (size, None)
    )
    got = rolled(made, tiny.noise(7), blocks=size, learning=size)
    torch.testing.assert_close(got, torch.cat(list(clip), 1))
    alike = size - len(tiny.LEVELS) + 1
    torch.testing.assert_close(got[:, : alike * tiny.BLOCK], torch.cat(list(islice(stream, alike)), 1))


def test_a_rolling_rollout_learns_by_the_calls_that_finish_blocks() -> None:
    made = tiny.network()
    calls = []
    forward = made.forward
    made.forward = lambda *a, **k: calls.append(torch.is_grad_enabled()) or forward(*a, **k)
    out = rolled(made, tiny.noise(7), blocks=6, learning=2)
    assert out.shape[1] == 2 * tiny.BLOCK
    assert calls == [False] * 6 + [True] * 2
    out.square().mean().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_no_gradient_passes_from_call_to_call_or_through_memory() -> None:
    made = tiny.network()

    def reached(block: int, levels=tiny.LEVELS) -> set[tuple[int, int]]:
        """The noise that the loss on a block gives a gradient."""
        noise = LeafNoise()
        rolled(made, noise, levels).split(tiny.BLOCK, dim=1)[block].square().sum().backward()
        return {key for key, leaf in noise.drawn.items() if leaf.grad is not None and leaf.grad.abs().sum() > 0}

    assert reached(1) == {(3, 0)}, "the one block that is only noise yet in the call that finishes block 1"
    assert reached(4) == set(), "in a clip's last call there is none"
    assert reached(4, levels=(1.0,)) == {(4, 0)}


def test_an_early_exit_gives_the_estimate_made_there() -> None:
    made = tiny.network()
    early = roll(made, tiny.noise(7), tiny.LEVELS[:1], blocks=1, learning=1)
    assert not torch.allclose(early, roll(made, tiny.noise(7), blocks=1, learning=1))


class LeafNoise:
    """Recorded noise as leaves, to see which blocks a loss reaches."""

    def __init__(self) -> None:
        self.drawn: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, block: int, step: int) -> torch.Tensor:
        return self.drawn.setdefault((block, step), tiny.noise(7)(block, step).requires_grad_())


@pytest.mark.parametrize("shape", [SHAPE, HYBRID])
def test_no_gradient_passes_through_memory_or_earlier_steps(shape: MemoryShape) -> None:
    made = hybrid_network()
    noise = LeafNoise()
    out = roll(made, noise, levels=(1.0,), shape=shape)
    out[:, -tiny.BLOCK :].square().sum().backward()
    reached = {block for (block, _), leaf in noise.drawn.items() if leaf.grad is not None and leaf.grad.abs().sum() > 0}
    assert reached == {3}
    noise = LeafNoise()
    roll(made, noise, shape=shape).square().sum().backward()
    assert all(leaf.grad is None for leaf in noise.drawn.values()), "only the last estimate keeps its graph"


@pytest.mark.parametrize("blocks, learning", [(4, 4), (6, 2)])
def test_the_last_blocks_learn_and_only_they_come_back(blocks: int, learning: int) -> None:
    made = tiny.network()
    calls = []
    forward = made.forward
    made.forward = lambda *a, **k: calls.append(torch.is_grad_enabled()) or forward(*a, **k)
    out = roll(made, tiny.noise(7), blocks=blocks, learning=learning)
    assert out.shape[1] == learning * tiny.BLOCK and out.requires_grad
    assert sum(calls) == learning and len(calls) == blocks * len(tiny.LEVELS)
    out.square().mean().backward()
    missing = [name for name, p in made.named_parameters() if p.grad is None]
    assert not missing, f"no gradient for {missing}"


@pytest.mark.parametrize("given, changes_at", [(1, 1), (2, 1), (3, 4), (4, 2)])
def test_a_rollout_goes_on_from_given_blocks_as_the_stream_that_made_them(given: int, changes_at: int) -> None:
    made = tiny.network()
    with torch.no_grad():
        whole = roll(made, tiny.noise(7), blocks=5, learning=5, changes_at=changes_at)
    first = whole.split(tiny.BLOCK, dim=1)[:given]
    rest = roll(made, tiny.noise(7), blocks=5, learning=5 - given, changes_at=changes_at, given=first)
    torch.testing.assert_close(rest, whole[:, given * tiny.BLOCK :])


def test_what_is_given_is_remembered_but_learns_nothing() -> None:
    made = tiny.network()
    given = [tiny.noise(seed)(0, 0).requires_grad_() for seed in (1, 2)]
    calls = []
    forward = made.forward
    made.forward = lambda *a, **k: calls.append(torch.is_grad_enabled()) or forward(*a, **k)
    out = roll(made, tiny.noise(7), learning=2, given=given)
    assert out.shape[1] == 2 * tiny.BLOCK and sum(calls) == 2 and len(calls) == 2 * len(tiny.LEVELS)
    assert not torch.allclose(out, roll(made, tiny.noise(7), learning=2, given=given[::-1]))
    out.square().mean().backward()
    assert all(block.grad is None for block in given)
    assert all(p.grad is not None for p in made.parameters())
