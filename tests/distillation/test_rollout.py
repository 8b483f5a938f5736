"""Training unrolls the schedule that serves."""

from dataclasses import replace
from functools import partial
from itertools import islice, pairwise

import pytest
import torch
from tests import tiny

from longtake.attention.block_sparse import block_sparse
from longtake.distillation.rollout import rollout, steps_in_windows, windows
from longtake.generation.blockwise import blockwise, commit
from longtake.generation.noise import SeededNoise
from longtake.generation.recipe import Schedule
from longtake.generation.rolling import calls, rolling
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
    made, texts = tiny.with_drawn_maps(hybrid_network()), tiny.text(batch=2)
    shape = made.with_own_far(HYBRID)

    def rolled(*rows: int) -> torch.Tensor:
        noise = SeededNoise(rows, tiny.LATENTS, "cpu", torch.float64)
        return roll(made, noise, blocks=6, learning=6, shape=shape, texts=texts[list(rows)])

    together = rolled(0, 1)
    for row in range(2):
        torch.testing.assert_close(together[row : row + 1], rolled(row))


def rolled(
    made, noise, levels=tiny.LEVELS, blocks=5, learning=5, given=(), schedule: Schedule = rolling
) -> torch.Tensor:
    prompt = made.prompt_keys(tiny.text())
    return rollout(
        schedule, made, tiny.rolling_recipe().memory(made), lambda block: prompt, noise, levels,
        blocks=blocks, learning=learning, given=given,
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


@pytest.mark.parametrize("learning", [2, 6])
def test_a_rolling_rollout_learns_by_the_calls_that_finish_blocks(learning: int) -> None:
    made = tiny.network()
    calls = []
    forward = made.forward
    made.forward = lambda *a, **k: calls.append(torch.is_grad_enabled()) or forward(*a, **k)
    out = rolled(made, tiny.noise(7), blocks=6, learning=learning)
    assert out.shape[1] == learning * tiny.BLOCK
    assert calls == [False] * (8 - learning) + [True] * learning
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


# windows


T = len(tiny.LEVELS)
OFFSETS = pytest.mark.parametrize("offset", range(T))


def watched(made) -> list[tuple[bool, torch.Tensor, object]]:
    """Of each call: whether it keeps its graph, its levels frame by frame, and its view."""
    seen = []
    forward = made.forward

    def watching(noisy, level_BF, prompts, view, prompt_BF=None):
        seen.append((torch.is_grad_enabled(), level_BF[0].tolist(), view))
        return forward(noisy, level_BF, prompts, view, prompt_BF)

    made.forward = watching
    return seen


@pytest.mark.parametrize(
    "offset, expected",
    [
        (0, {0: (0,), 5: (4, 3, 2, 1, 0), 10: (4,)}),
        (1, {1: (1, 0), 6: (4, 3, 2, 1, 0)}),
        (2, {2: (2, 1, 0), 7: (4, 3, 2, 1)}),
        (3, {3: (3, 2, 1, 0), 8: (4, 3, 2)}),
        (4, {4: (4, 3, 2, 1, 0), 9: (4, 3)}),
    ],
)
def test_the_windows_of_seven_blocks_and_five_levels_are_the_published_ones(offset: int, expected) -> None:
    """Their steps, oldest block first, by the number of the call."""
    made, levels = tiny.network(extent=21), (1.0, 0.875, 0.75, 0.625, 0.5)
    seen, prompt = watched(made), made.prompt_keys(tiny.text())
    out = rollout(
        partial(windows, offset=offset), made, tiny.rolling_recipe().memory(made), lambda block: prompt,
        tiny.noise(7), levels, blocks=7, learning=7,
    )  # fmt: skip
    kept = {
        number: tuple(levels.index(level) for level in level_F[:: tiny.BLOCK])
        for number, (grad, level_F, _) in enumerate(seen)
        if grad
    }
    assert kept == expected and len(seen) == 7 + 4
    assert [tuple(steps) for steps in steps_in_windows(7, 5, offset)] == [*expected.values()]
    assert out.shape[1] == 7 * tiny.BLOCK


@OFFSETS
def test_windows_are_calls_of_the_stream_and_every_block_is_in_one(offset: int) -> None:
    made, size = tiny.network(), 7
    keys, shape = tiny.prompt(made), tiny.rolling_recipe().memory(made)
    memory = StreamMemory(shape, made.config.layers, ring=True)
    served = list(calls(made, memory, lambda block: keys, tiny.noise(7), tiny.LEVELS, lambda flight: False, size))
    taken = [call for call in served if call.number % T == offset]
    assert [block for call in taken for block in call.blocks] == list(range(size))
    by_step = [[tiny.LEVELS[step] for step in steps] for steps in steps_in_windows(size, T, offset)]
    assert by_step == [list(call.levels) for call in taken]
    got = rolled(made, tiny.noise(7), blocks=size, learning=size, schedule=partial(windows, offset=offset))
    torch.testing.assert_close(got, torch.cat([one for call in taken for one in call.clean], 1))


@OFFSETS
def test_windows_commit_what_the_stream_shows(offset: int, monkeypatch) -> None:
    """Under the windows lies the stream itself: finished blocks are remembered, whatever is learned on."""
    made, size, committed = tiny.network(), 7, []
    with monkeypatch.context() as patched:
        patched.setattr(
            "longtake.generation.rolling.commit",
            lambda network, memory, clean, *more: committed.append(clean) or commit(network, memory, clean, *more),
        )
        rolled(made, tiny.noise(7), blocks=size, learning=size, schedule=partial(windows, offset=offset))
    keys, shape = tiny.prompt(made), tiny.rolling_recipe().memory(made)
    memory = StreamMemory(shape, made.config.layers, ring=True)
    stream = rolling(made, memory, lambda block: keys, tiny.noise(7), tiny.LEVELS, end=size)
    torch.testing.assert_close(torch.cat(committed, 1), torch.cat(list(stream), 1))


@OFFSETS
@pytest.mark.parametrize("blocks, learning, given", [(3, 3, 0), (5, 5, 0), (7, 3, 0), (8, 3, 0), (5, 2, 3), (4, 1, 3)])
def test_every_block_that_learns_was_produced_with_a_graph(offset: int, blocks: int, learning: int, given: int) -> None:
    made, first = tiny.network(), [tiny.noise(seed)(0, 0) for seed in range(given)]
    seen = watched(made)
    settings = {"blocks": blocks, "learning": learning, "given": first}
    out = rolled(made, tiny.noise(7), schedule=partial(windows, offset=offset), **settings)
    assert out.shape[1] == learning * tiny.BLOCK
    for block in out.split(tiny.BLOCK, dim=1):
        assert block.abs().sum() > 0
        (gradient,) = torch.autograd.grad(block.sum(), made.patch_embedding.weight, retain_graph=True)
        assert gradient.abs().sum() > 0
    numbers = [given + number for number, (grad, *_) in enumerate(seen) if grad]
    assert all(after - before == T for before, after in pairwise(numbers)), "no two share a block"
    assert {number % T for number in numbers} == {offset}


@OFFSETS
def test_no_gradient_passes_from_window_to_window_or_through_memory(offset: int) -> None:
    made, size = tiny.network(), 7
    seen = watched(made)
    for block in range(size):
        noise = LeafNoise()
        out = rolled(made, noise, blocks=size, learning=size, schedule=partial(windows, offset=offset))
        out.split(tiny.BLOCK, dim=1)[block].square().sum().backward()
        (number,) = [number for number in range(block, block + T) if number % T == offset]
        reached = {key for key, leaf in noise.drawn.items() if leaf.grad is not None and leaf.grad.abs().sum() > 0}
        assert reached == ({(number, 0)} if number < size else set()), "the one block of its call that is only noise"
    remembered = [x for *_, view in seen for pair in view.layers if pair is not None for x in pair]
    assert remembered and not any(x.requires_grad for x in remembered)


def test_rolling_block_by_block_remembers_as_a_rolling_stream() -> None:
    """The Self Forcing half: the sink and all that fits beside a block is seen, and commits see the latest frames."""
    made, seen, shape = tiny.network(), [], tiny.rolling_recipe().memory(tiny.network())
    view = StreamMemory.view

    def watching(self, grid, count, device, projections=(), *, commits=False, **more):
        readable = self._readable(self._windows[0], count, commits)
        seen.append((commits, sorted(readable.frames) if readable else []))
        return view(self, grid, count, device, projections, commits=commits, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StreamMemory, "view", watching)
        rolled(made, tiny.noise(7), blocks=7, learning=7, schedule=blockwise)
    denoising, committing = ([frames for commits, frames in seen if commits is which] for which in (False, True))
    assert shape.window.frames == 15 and len(denoising) == len(committing) == 7
    assert denoising[6] == [0, 1, 2, *range(9, 18)] and committing[6] == list(range(6, 18))
    assert denoising[:5] == committing[:5]


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
