import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny

from longtake.generation.blockwise import commit
from longtake.memory.stream_memory import MemoryShape
from longtake.memory.window import WindowShape
from longtake.models.wan import WanConfig, WanTransformer, level_features, reading_far, with_far_maps

BLOCK = tiny.BLOCK


def clip(frames: int, batch: int = 1, seed: int = 5) -> torch.Tensor:
    size = (batch, frames, *tiny.LATENTS[1:])
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_levels_are_told_by_cosines_then_sines_in_double_precision() -> None:
    level_BF = torch.tensor([[1 / 3, 0.999]])
    expected = [
        [of(1000 * level * 10_000 ** (-i / 4)) for of in (math.cos, math.sin) for i in range(4)]
        for level in level_BF[0].tolist()
    ]
    torch.testing.assert_close(level_features(level_BF, 8), torch.tensor([expected]), atol=1e-7, rtol=0)


@given(sink=st.sampled_from([0, 3]), past=st.sampled_from([0, 3, 6, 12]), blocks=st.integers(1, 7))
@settings(max_examples=12)
@torch.no_grad()
def test_streaming_equals_the_parallel_form(sink: int, past: int, blocks: int) -> None:
    """Teacher forcing sees in one pass what streaming sees: capped positions, far sinks, windows beyond the extent."""
    made = tiny.network()
    prompts = tiny.prompt(made)
    clean, noisy = clip(blocks * BLOCK), clip(blocks * BLOCK, seed=6)
    level_BF = torch.rand(1, blocks, dtype=torch.float64).repeat_interleave(BLOCK, 1)
    view = made.teacher_forced_view(
        clean, BLOCK, MemoryShape(window=WindowShape(sink=sink, past=past), extent=made.config.extent)
    )
    parallel = made(torch.cat([clean, noisy], 1), torch.cat([0 * level_BF, level_BF], 1), prompts, view)
    memory = tiny.memory(made, sink, past)
    streamed = []
    for first in range(0, blocks * BLOCK, BLOCK):
        now = slice(first, first + BLOCK)
        view = made.memory_view(memory, noisy[:, now])
        streamed.append(made(noisy[:, now], level_BF[:, now], prompts, view))
        commit(made, memory, clean[:, now], prompts)
    torch.testing.assert_close(parallel[:, clean.shape[1] :], torch.cat(streamed, 1))


@torch.no_grad()
def test_a_memory_that_holds_everything_equals_a_causal_mask() -> None:
    made = tiny.network(extent=100)
    prompts, noisy = tiny.prompt(made), clip(9)
    level_BF = torch.zeros(1, 9, dtype=torch.float64)
    block_of = torch.arange(9) // BLOCK
    masked = made(noisy, level_BF, prompts, made.clip_view(noisy, block_of[:, None] >= block_of[None]))
    memory = tiny.memory(made, 0, 9)
    streamed = []
    for now in noisy.split(BLOCK, dim=1):
        streamed.append(made(now, level_BF[:, :BLOCK], prompts, made.memory_view(memory, now)))
        commit(made, memory, now, prompts)
    torch.testing.assert_close(masked, torch.cat(streamed, 1))


@torch.no_grad()
def test_a_pass_writes_nothing_and_repeats_itself() -> None:
    made = tiny.network()
    prompts, noisy = tiny.prompt(made), clip(BLOCK)
    memory = tiny.memory(made)
    commit(made, memory, clip(BLOCK, seed=9), prompts)
    before = memory.held(1).k_BTND.clone()
    view, level = made.memory_view(memory, noisy), torch.ones(1, BLOCK)
    first = made(noisy, level, prompts, view)
    assert torch.equal(first, made(noisy, level, prompts, view))
    assert torch.equal(before, memory.held(1).k_BTND) and memory.frames == BLOCK


@torch.no_grad()
def test_each_frame_reads_its_own_prompt() -> None:
    """With attention among frames masked off, a clip under two prompts is two clips under one each."""
    made = tiny.network()
    both = made.prompt_keys(tiny.text(prompts=2))
    noisy, level = clip(4), torch.full((1, 4), 0.5)
    view = made.clip_view(noisy, torch.eye(4, dtype=torch.bool))
    mixed = made(noisy, level, both, view, torch.tensor([[0, 0, 1, 1]]))
    for number, frames in ((0, slice(0, 2)), (1, slice(2, 4))):
        alone = made(noisy, level, both.select(torch.tensor([number])), view)
        torch.testing.assert_close(mixed[:, frames], alone[:, frames])
        assert not torch.allclose(
            mixed[:, frames], made(noisy, level, both.select(torch.tensor([1 - number])), view)[:, frames]
        )


@torch.no_grad()
def test_each_frame_has_its_own_level() -> None:
    made = tiny.network()
    prompts, noisy = tiny.prompt(made), clip(4)
    view = made.clip_view(noisy, torch.eye(4, dtype=torch.bool))
    mixed = made(noisy, torch.tensor([[0.1, 0.1, 0.9, 0.9]]), prompts, view)
    for level, frames in ((0.1, slice(0, 2)), (0.9, slice(2, 4))):
        alone = made(noisy, torch.full((1, 4), level), prompts, view)
        torch.testing.assert_close(mixed[:, frames], alone[:, frames])


@torch.no_grad()
def test_a_batch_of_two_is_two() -> None:
    made = tiny.network()
    noisy, level = clip(6, batch=2), torch.rand(2, 6)
    together = made(noisy, level, tiny.prompt(made, batch=2), made.clip_view(noisy))
    text = tiny.text(batch=2)
    for i in range(2):
        alone = made(noisy[i : i + 1], level[i : i + 1], made.prompt_keys(text[i : i + 1]), made.clip_view(noisy))
        torch.testing.assert_close(together[i : i + 1], alone)


@torch.no_grad()
def test_keys_to_commit_are_those_of_a_whole_pass() -> None:
    """Stopping early in the last layer changes no key; and the keys carry no position."""
    made = tiny.network()
    prompts, clean, level = tiny.prompt(made), clip(BLOCK), torch.zeros(1, BLOCK)
    seen = []
    for block in made.blocks:
        original = block.before_attention
        block.before_attention = lambda *a, original=original: seen.append(original(*a)) or seen[-1]
    made(clean, level, prompts, made.clip_view(clean))
    whole = list(seen)
    keys = made.keys_to_commit(clean, level, prompts, made.clip_view(clean))
    for (k, v), tokens in zip(keys, whole, strict=True):
        assert torch.equal(k, tokens.plain_k) and torch.equal(v, tokens.v)
        assert not torch.equal(k, tokens.k)


def test_latents_that_no_patch_fits_and_heads_that_do_not_divide_are_refused() -> None:
    made = tiny.network()
    with pytest.raises(ValueError, match="3 x 6 cannot be cut into patches of 2 x 2"):
        made.clip_view(torch.zeros(1, 1, 4, 3, 6))
    with pytest.raises(ValueError, match="width 10"):
        WanTransformer(WanConfig(dim=10, heads=4, ffn_dim=8, layers=1, text_dim=4))
    with pytest.raises(ValueError, match="half of a level's features are cosines, half sines: 7 are an odd number"):
        replace(tiny.network().config, level_dim=7)


@torch.no_grad()
def test_a_network_that_learns_to_read_far_states_is_still_the_one_it_was() -> None:
    plain = tiny.network().requires_grad_(False)
    made = reading_far(plain)
    assert made.config.reads_far and not plain.config.reads_far and reading_far(made) is made
    weights = made.state_dict()
    assert all(torch.equal(weights.pop(name), weight) for name, weight in plain.state_dict().items())
    assert len(weights) == 2 * made.config.layers and not any(weight.any() for weight in weights.values())
    assert {p.dtype for p in made.parameters()} == {torch.float64}
    assert not made.training and not any(p.requires_grad for p in made.parameters())
    noisy, level, prompts = clip(4), torch.full((1, 4), 0.5), tiny.prompt(plain)
    assert torch.equal(
        made(noisy, level, prompts, made.clip_view(noisy)), plain(noisy, level, prompts, made.clip_view(noisy))
    )


def test_a_network_that_gets_maps_for_its_far_state_keeps_all_it_had() -> None:
    plain = tiny.network(reads_far=True)
    made = with_far_maps(plain)
    assert made.config == replace(plain.config, far_maps=True) and with_far_maps(made) is made and not plain.far_maps
    weights = made.state_dict()
    assert all(torch.equal(weights.pop(name), weight) for name, weight in plain.state_dict().items())
    assert {weight.shape for weight in weights.values()} == {(2, 12, 12)} and len(weights) == 2 * made.config.layers
    with pytest.raises(ValueError, match="far state, which this network does not read"):
        with_far_maps(tiny.network())


def test_the_published_size_has_the_published_number_of_tensors() -> None:
    """Wan2.1-T2V-1.3B, and what Hybrid Forcing adds to it."""
    shape = WanConfig(dim=1536, heads=12, ffn_dim=8960, layers=30, text_dim=4096)
    for config, tensors, numbers in (
        (shape, 825, 1_418_996_800),
        (replace(shape, reads_far=True), 885, 1_419_492_160),
    ):
        with torch.device("meta"):
            weights = WanTransformer(config).state_dict()
        assert (len(weights), sum(x.numel() for x in weights.values())) == (tensors, numbers)


@torch.no_grad()
def test_under_autocast_all_that_attention_gets_has_one_type() -> None:
    made = tiny.network(reads_far=True).float()
    seen: set[torch.dtype] = set()
    for block in made.blocks:
        original = block.before_attention
        block.before_attention = lambda *a, original=original: (
            seen.update(x.dtype for x in original(*a)),
            original(*a),
        )[1]
    with torch.autocast("cpu", torch.bfloat16):
        noisy = clip(4).float()
        made(noisy, torch.full((1, 4), 0.5), made.prompt_keys(tiny.text().float()), made.clip_view(noisy))
    assert seen == {torch.bfloat16}
