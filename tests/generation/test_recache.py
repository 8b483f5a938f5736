"""The published memory rules in streams: what a change of prompt and a cut do, and the laws that all of them keep."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import islice

import pytest
import torch
from tests import tiny
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longtake.attention.rope import rotate
from longtake.distillation.plan import Plan, Script, rolled_out
from longtake.distillation.pretrain import forced_by_block, forced_in_one_pass
from longtake.distillation.rollout import rollout
from longtake.generation.blockwise import blockwise, clean_estimate, commit, recache, redirect, view_for
from longtake.generation.recipe import Recipe
from longtake.generation.stream import StreamBatch
from longtake.memory.stream_memory import StreamMemory
from longtake.memory.view import MemoryView
from longtake.models.wan import PromptKeys, WanTransformer
from longtake.recipes import MODELS, recipe_named
from longtake.recipes.methods import MEMORY_RULES

B = tiny.BLOCK
EVERY = pytest.mark.parametrize("name", MEMORY_RULES)


@cache
def network() -> WanTransformer:
    return tiny.network(extent=21).requires_grad_(False)


@cache
def prompt(seed: int) -> PromptKeys:
    return tiny.prompt(network(), seed=seed)


def memory(name: str, *, ring: bool = True) -> StreamMemory:
    return StreamMemory(recipe_named(name).memory(network()), network().config.layers, ring=ring)


def given_blocks(count: int, seed: int = 5) -> list[Tensor]:
    return [tiny.noise(seed)(block, 0) for block in range(count)]


def after(kept: StreamMemory, blocks: Sequence[Tensor], said: PromptKeys) -> StreamMemory:
    """The memory after these blocks too."""
    for block in blocks:
        commit(network(), kept, block, said)
    return kept


def going_on(kept: StreamMemory, said: PromptKeys, blocks: int = 3) -> Tensor:
    made = blockwise(network(), kept, lambda block: said, tiny.noise(7), tiny.LEVELS)
    return torch.cat(list(islice(made, blocks)), dim=1)


def assert_alike(one: StreamMemory, other: StreamMemory) -> None:
    """In frames, keys and values of every layer; whatever their slots."""
    assert one.frames == other.frames
    for layer in range(one.layers):
        mine, theirs = one.held(layer), other.held(layer)
        assert sorted(mine.frames) == sorted(theirs.frames)
        for x, y in zip(mine[:2], theirs.seen(mine.frames)[:2], strict=True):
            torch.testing.assert_close(x, y)


# LongLive


@pytest.mark.parametrize("ring", [True, False])
@pytest.mark.parametrize("blocks", [1, 2, 4, 5, 9])
def test_a_recache_block_by_block_is_a_fresh_start_from_the_latest_blocks(blocks: int, ring: bool) -> None:
    """With a new sink: as if the latest frames had just been given, under the new prompt."""
    latents = given_blocks(blocks)
    kept = after(memory("longlive:mask=block_causal,old_sink=new", ring=ring), latents, prompt(1))
    redirect(network(), kept, prompt(2))
    fresh = after(memory("longlive"), latents[-4:], prompt(2))
    assert kept.blocks == blocks
    kept.audit()
    assert_alike(kept, fresh)
    fresh.blocks = blocks
    torch.testing.assert_close(going_on(kept, prompt(2)), going_on(fresh, prompt(2)))


def test_under_the_same_prompt_block_by_block_nothing_changes_while_all_is_seen() -> None:
    plain, again = (after(memory("longlive:mask=block_causal"), given_blocks(4), prompt(1)) for _ in range(2))
    redirect(network(), again, prompt(1))
    assert_alike(plain, again)
    redirect(network(), again, prompt(2))
    with pytest.raises(AssertionError):
        assert_alike(plain, again)


@torch.no_grad()
@pytest.mark.parametrize("blocks", [3, 4, 5, 8])
def test_a_recache_in_one_pass_sees_in_both_directions_behind_an_old_sink(blocks: int) -> None:
    """LongLive's code: one pass over the last 12 frames; the slots of an old sink are not written, but read."""
    made, latents = network(), given_blocks(blocks)
    kept = after(memory("longlive"), latents, prompt(1))
    frames, old = B * blocks, [kept.held(layer).seen([0, 1, 2]) for layer in range(3)]
    redirect(made, kept, prompt(2))
    count = 9 if frames > 12 else frames
    again, grid = torch.cat(latents, dim=1)[:, -count:], made.grid(latents[0])
    sinks = [(rotate(sink.k_BTND, grid.rotation(range(3), "cpu")), sink.v_BTND) for sink in old]
    view = MemoryView(grid.rotation(range(frames - count, frames), "cpu"), sinks if frames > 12 else [None] * 3)
    keys = made.keys_to_commit(again, torch.zeros(1, count), prompt(2), view)
    for layer in range(3):
        held, numbers = kept.held(layer), list(range(frames - count, frames))
        assert set(held.frames) == {0, 1, 2} | set(range(max(3, frames - 6), frames))
        for x, sink, whole in zip(held[:2], old[layer][:2], keys[layer], strict=True):
            own, tokens = whole.unflatten(1, (count, -1)), sink.shape[1] // 3
            for place, frame in enumerate(held.frames):
                was = sink[:, frame * tokens : (frame + 1) * tokens] if frame < 3 and frames > 12 else None
                expected = own[:, numbers.index(frame)] if was is None else was
                torch.testing.assert_close(x[:, place * tokens : (place + 1) * tokens], expected)
    kept.audit()


def test_the_forms_of_a_recache_differ() -> None:
    names = (
        "longlive",
        "longlive:mask=block_causal",
        "longlive:old_sink=new",
        "longlive:mask=block_causal,old_sink=new",
    )
    shown = []
    for name in (*names, "longlive:positions=relative"):
        kept = after(memory(name), given_blocks(6), prompt(1))
        redirect(network(), kept, prompt(2))
        shown.append(going_on(kept, prompt(2)))
    unswitched = going_on(after(memory("longlive"), given_blocks(6), prompt(1)), prompt(2))
    shown.append(unswitched)
    assert not any(torch.allclose(a, b) for i, a in enumerate(shown) for b in shown[:i])


def test_redirect_after_redirect_keeps_the_books() -> None:
    for name in ("longlive", "longlive:old_sink=new", "memflow"):
        kept = memory(name)
        redirect(network(), kept, prompt(1))  # nothing to commit again yet
        for number, block in enumerate(given_blocks(9)):
            after(kept, [block], prompt(1 + number))
            redirect(network(), kept, prompt(2 + number))
            kept.audit()
        assert kept.blocks == 9 and sum(x.shape[1] for x in kept.latents) == 12


def test_while_a_bank_is_recached_nothing_is_offered_to_it() -> None:
    kept = after(memory("memflow"), given_blocks(6), prompt(1))  # the next one would be offered
    before = [row.frames for row in kept.bank(0).rows]
    redirect(network(), kept, prompt(2))
    assert [row.frames for row in kept.bank(0).rows] == before == [(0, 9)]


# CausVid


@pytest.mark.parametrize("ring", [True, False])
@pytest.mark.parametrize("past, clips", [(18, 2), (6, 4)])
def test_clips_overlap_by_a_block(past: int, clips: int, ring: bool) -> None:
    """Each clip is a stream of its own that goes on from the last block of the one before, and sees nothing else."""
    made, blocks, shown = network(), past // B, []
    fresh = memory(f"self_forcing:past={past}")
    shown.append(going_on(fresh, prompt(1), blocks + 1))
    for clip in range(1, clips):
        fresh = after(memory(f"self_forcing:past={past}"), [shown[-1][:, -B:]], prompt(1))
        fresh.blocks = 1 + clip * blocks
        shown.append(going_on(fresh, prompt(1), blocks))
    kept = memory(f"causvid:past={past}", ring=ring)
    assert torch.equal(going_on(kept, prompt(1), 1 + clips * blocks), torch.cat(shown, dim=1))
    kept.audit()
    assert made.config.extent == 21


def test_a_change_of_prompt_begins_the_next_clip() -> None:
    latents = given_blocks(4)
    kept = after(memory("causvid"), latents, prompt(1))
    redirect(network(), kept, prompt(2))
    fresh = after(memory("causvid"), latents[-1:], prompt(2))
    assert_alike(kept, fresh)
    kept.audit()


# Streams


class Told:
    """A text encoder that tells prompts apart by their length."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.cat([tiny.text(seed=len(one))[:, 0] for one in prompts]).float()


def opened(recipe: Recipe, streams: int = 1) -> StreamBatch:
    engine = tiny.engine(recipe)
    engine = replace(engine, network=network_in_float(), text=Told())
    return engine.stream_batch(["one prompt"] * streams, seeds=list(range(streams)))


@cache
def network_in_float() -> WanTransformer:
    return tiny.network(extent=21).float().requires_grad_(False)


@EVERY
def test_a_stream_is_redirected_and_cut_and_nothing_grows(name: str) -> None:
    batch, sizes = opened(recipe_named(name)), []
    memory = batch._memory
    for number in range(28):
        if number == 12:
            batch.redirect(["another prompt"])
        if number == 15:
            batch.cut(["a third prompt of some length"])
        pictures = next(batch)
        memory.audit()
        sizes.append(memory.nbytes())
        assert sizes[-1] == sum(x.nbytes for x in tree_leaves(memory.state()) if isinstance(x, Tensor))
        begins = number == 0 or (number == 15 and name != "infinity_rope")
        assert pictures.shape[1] == (9 if begins else 12)
    assert max(sizes[14:]) <= max(sizes[:12]) and memory.blocks == 28


def test_what_a_redirect_is_refused_changes_nothing() -> None:
    for name in ("longlive", "infinity_rope:past=5"):
        plain, refused = (opened(recipe_named(name)) for _ in range(2))
        for _ in range(5):
            next(plain), next(refused)
        for far in (2, None, "0.5"):
            for call in (refused.redirect, refused.cut):
                with pytest.raises(ValueError, match="a share of 0 to 1"):
                    call(["another prompt"], far=far)
        assert all(torch.equal(next(plain), next(refused)) for _ in range(3))


@pytest.mark.parametrize("name", ["longlive", "memflow", "causvid", "infinity_rope:past=5"])
def test_a_redirect_under_these_rules_does_more_than_change_the_prompt(name: str) -> None:
    recipe = recipe_named(name)
    ruled, plain = (opened(one) for one in (recipe, recipe))
    for _ in range(6):
        next(ruled), next(plain)
    plain._prompt_keys = plain.engine.prompt_keys("another prompt")
    ruled.redirect(["another prompt"])
    assert not torch.equal(next(ruled), next(plain))


def test_a_jump_is_seen_and_only_in_its_block() -> None:
    """The same flush without a jump makes another first block."""
    shown = []
    for jump in (45, 3):  # 3 is where the block would stand anyway
        batch = opened(recipe_named(f"infinity_rope:jump={jump}"))
        list(islice(batch, 4))
        batch.cut(["one prompt"])
        shown.append(list(islice(batch, 1)))
    flushed = opened(recipe_named("infinity_rope"))
    list(islice(flushed, 4))
    flushed.redirect(["one prompt"])
    assert torch.equal(shown[1][0], next(flushed)) and not torch.equal(shown[0][0], shown[1][0])


# Laws


@EVERY
def test_passes_only_read_and_forks_go_on_alike(name: str) -> None:
    made, kept = network(), memory(name)
    going_on(kept, prompt(1), 8)
    twin, size = kept.fork(), kept.nbytes()
    before = [x.clone() for layer in range(3) for x in kept.held(layer)[:2]]
    noisy = tiny.noise(9)(8, 0)
    view = view_for(made, kept, noisy, prompt(2))
    one, other = (clean_estimate(made, noisy, 0.8, prompt(2), view) for _ in range(2))
    assert torch.equal(one, other) and kept.nbytes() == size
    assert all(torch.equal(x, y) for x, y in zip(before, (x for i in range(3) for x in kept.held(i)[:2]), strict=True))
    shown = going_on(kept, prompt(2), 9)
    redirect(made, kept, prompt(3))
    assert torch.equal(going_on(twin, prompt(2), 9), shown)
    redirect(made, twin, prompt(3))
    assert torch.equal(going_on(twin, prompt(3)), going_on(kept, prompt(3)))


@EVERY
def test_rings_and_values_remember_alike(name: str) -> None:
    shown = []
    for ring in (True, False):
        kept = memory(name, ring=ring)
        video = [going_on(kept, prompt(1), 8)]
        redirect(network(), kept, prompt(2))
        video.append(going_on(kept, prompt(2), 4))
        kept.cut(0)
        shown.append(torch.cat([*video, going_on(kept, prompt(3), 4)], dim=1))
    torch.testing.assert_close(*shown)


@EVERY
def test_training_unrolls_the_stream(name: str) -> None:
    recipe = recipe_named(name)
    made = tiny.network(extent=21)
    said, shape = made.prompt_keys(tiny.text()), recipe.memory(made)
    unrolled = rollout(
        recipe.schedule, made, shape, lambda block: said, tiny.noise(7), tiny.LEVELS, blocks=9, learning=3
    )
    torch.testing.assert_close(unrolled.detach(), going_on(memory(name), prompt(1), 9)[:, -3 * B :])
    unrolled.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


@EVERY
def test_a_rollout_whose_prompt_changes_is_a_stream_that_is_redirected(name: str) -> None:
    """In one clip of the batch after its first block, in the other two blocks later; as long as the clip, or longer."""
    recipe, made, words = recipe_named(name), network(), tiny.text(2, prompts=2)
    keys = made.prompt_keys(words)
    for early, given in ((0, ()), (2, ()), (0, [torch.cat([block] * 2) for block in given_blocks(3)])):
        prompt_BF = torch.tensor([[0] * 3 + [1] * 12, [0] * 9 + [1] * 6])
        plan = Plan((2, 2), 5 + early, 5 - len(given), B, len(given))
        noise = tiny.noise(7, 8)
        learned = rolled_out(made, Script(words, prompt_BF, tuple(given)), noise, recipe, plan, 3.0)
        kept = StreamMemory(recipe.memory(made), 3, ring=True)
        shown = []
        for block in range(5 + early):
            number_B = prompt_BF[:, max(0, B * (block - early))]
            if block in (early + 1, early + 3):
                redirect(made, kept, keys.select(number_B))
            if block < len(given):
                shown.append(given[block])
                commit(made, kept, given[block], keys.select(number_B))
            else:
                said, levels = keys.select(number_B), recipe.with_levels(2).levels(3.0)
                shown += blockwise(made, kept, lambda _, said=said: said, noise, levels, end=block + 1)
        torch.testing.assert_close(learned, torch.cat(shown[early:], dim=1))


@EVERY
def test_teacher_forcing_walks_or_refuses(name: str) -> None:
    made, shape, frames = tiny.network(extent=21), recipe_named(name).memory(tiny.network(extent=21)), 27
    past, noisy = (torch.randn(2, frames, *tiny.LATENTS[1:], dtype=torch.float64) for _ in range(2))
    given = (made, past, noisy, torch.full((2, frames), 0.5), made.prompt_keys(tiny.text(2, prompts=2)))
    prompt_BF = (torch.arange(frames) > torch.tensor([[4], [16]])).long()
    walked = forced_by_block(*given, prompt_BF, B, shape)
    walked.square().mean().backward()
    assert made.layers[0].self_attn.k.weight.grad.isfinite().all()
    if name in ("causal_forcing", "longlive"):
        torch.testing.assert_close(forced_in_one_pass(*given, prompt_BF, B, shape), walked)
    else:
        with pytest.raises(ValueError, match="can only be walked through block by block: set recompute=true"):
            forced_in_one_pass(*given, prompt_BF, B, shape)


def test_rules_are_a_few_lines_apart() -> None:
    """Each is Self Forcing's, but for its window and its policy; and each runs on the embedded student."""
    for name in MEMORY_RULES:
        recipe, base = recipe_named(name), recipe_named("self_forcing")
        same = replace(recipe, name=base.name, sink=base.sink, past=base.past, policy=base.policy, steps=base.steps)
        assert same == base and ("toy", name) in MODELS
    with pytest.raises(AssertionError, match="commits nothing once more"):
        recache(network(), memory("causal_forcing"), prompt(1))


def test_a_redirect_that_is_stopped_half_way_closes_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is forgotten for a recache would be missing from then on."""
    with tiny.engine(recipe_named("longlive")).stream("anything", seed=1) as stream:
        for _ in range(4):
            next(stream)

        def stopped(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with pytest.raises(ValueError, match="share"):
            stream.redirect("something else", far=2.0)
        next(stream)  # what is refused before anything changes does no harm
        monkeypatch.setattr(WanTransformer, "keys_to_commit", stopped)
        with pytest.raises(KeyboardInterrupt):
            stream.redirect("something else")
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="closed, or failed"):
            next(stream)
