"""Converted layers as part of a network and of its file, in whole clips and in streams."""

import json
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests import tiny

from longtake import recipes
from longtake.attention.block_sparse import block_sparse
from longtake.distillation.pretrain import forced_by_block, forced_in_one_pass
from longtake.generation.blockwise import blockwise, commit
from longtake.memory.far import Keep
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.memory.view import Attend
from longtake.memory.window import WindowShape
from longtake.models.features import Conversion
from longtake.models.text import WordEncoder, WordEncoderConfig
from longtake.models.wan import WanConfig, WanTransformer, converted, converted_as
from longtake.recipes import rehyat
from longtake.recipes.devices import CPU
from longtake.recipes.weight_files import NETWORK_FILE, load_network, save_network

BLOCK = tiny.BLOCK


def student(layers: tuple[int, ...] = (0, 2), overlap: int = 1, extent: int = 15) -> WanTransformer:
    """A network with converted layers, whose features weigh enough to be seen."""
    torch.manual_seed(1)
    conversion = Conversion(layers=layers, current=BLOCK, overlap=overlap)
    return converted(tiny.network(extent=extent), conversion)


def clip(frames: int, batch: int = 1, seed: int = 5) -> torch.Tensor:
    size = (batch, frames, *tiny.LATENTS[1:])
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def text_encoder() -> WordEncoder:
    return WordEncoder(WordEncoderConfig(words=9, length=5, dim=8))


def saved(path: Path, network: WanTransformer, int8: bool = False) -> WanTransformer:
    save_network(path, text_encoder(), network, role="student", shift=3.0, int8=int8)
    return load_network(path, CPU)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Network and file
# ---------------------------------------------------------------------------------------------------------------------


def test_maps_are_saved_and_loaded_with_their_network(tmp_path: Path) -> None:
    made = student().float()
    loaded = saved(tmp_path / "student.safetensors", made)
    assert loaded.config == made.config and loaded.config.conversion == Conversion(layers=(0, 2))
    assert set(loaded.features) == {0, 2}
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in made.state_dict().items())


def test_packed_maps_make_nearly_the_same_features(tmp_path: Path) -> None:
    made = student().float()
    loaded = saved(tmp_path / "student.safetensors", made, int8=True)
    with safe_open(tmp_path / "student.safetensors", "pt") as file:
        kept = {
            end: file.get_tensor(f"network.blocks.0.self_attn.features.keys.out_{end}") for end in ("weight", "bias")
        }
    assert kept["weight"].dtype == torch.int8
    assert torch.equal(kept["bias"], made.features[0].keys.out_bias.bfloat16())
    x = torch.randn(1, 40, 2, 12)
    for layer in (0, 2):
        exact, packed = (network.features[layer].keys(x) for network in (made, loaded))
        assert ((packed - exact).abs() / exact).median() < 0.02 and not torch.equal(packed, exact)


def test_files_of_networks_that_know_nothing_of_maps_load_as_before(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    plain = tiny.network().float()
    saved(path, plain)
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["longtake"])
    assert description["network"].pop("conversion") is None
    save_file(load_file(path), path, metadata={"longtake": json.dumps(description)})
    loaded = load_network(path, CPU)[1]
    assert loaded.config == plain.config and not loaded.features


@torch.no_grad()
def test_a_network_takes_over_the_converted_layers_of_another() -> None:
    plain, other = tiny.network(extent=15), student()
    other.patch_embedding.bias += 1
    made = converted_as(plain, other)
    assert made.config == other.config
    for name, x in made.state_dict().items():
        assert torch.equal(x, (other if ".features." in name else plain).state_dict()[name]), name
    other.features[0].keys.out_bias += 1
    assert not torch.equal(made.features[0].keys.out_bias, other.features[0].keys.out_bias), "a copy"
    with pytest.raises(ValueError, match="do not fit"):
        converted_as(WanTransformer(replace(plain.config, layers=2)), other)


def test_configurations_come_back_from_json() -> None:
    for network in (tiny.network(), student()):
        assert WanConfig.of(json.loads(json.dumps(asdict(network.config)))) == network.config
    with pytest.raises(ValueError, match=r"one or more different numbers from 0 on, got \[\]"):
        Conversion.of({"current": 3})


@torch.no_grad()
def test_converting_keeps_the_network_and_the_maps_it_has() -> None:
    plain, made = tiny.network(), student()
    more = converted(made, Conversion(layers=(1, 2)))
    assert set(more.features) == {1, 2} and more.config.conversion.layers == (1, 2)
    assert torch.equal(more.features[2].keys.out_weight, made.features[2].keys.out_weight)
    back = converted(made, None)
    assert back.state_dict().keys() == plain.state_dict().keys() and back.config == plain.config
    noisy, level = clip(7), torch.full((1, 7), 0.5)
    answers = [n(noisy, level, tiny.prompt(plain), n.clip_view(noisy)) for n in (plain, back, more)]
    assert torch.equal(answers[0], answers[1]) and not torch.allclose(answers[0], answers[2], atol=1e-3)
    with pytest.raises(ValueError, match="of degree 2 cannot become features of degree 3"):
        converted(made, Conversion(layers=(0,), degree=3))
    for learns in (True, False):
        same = converted(plain.train(learns).requires_grad_(learns), Conversion(layers=(1,)))
        assert same.training == learns and all(p.requires_grad == learns for p in same.parameters())


@st.composite
def wan_shapes(draw: st.DrawFn) -> tuple[WanTransformer, tuple[int, ...]]:
    """A network of Wan's shape, and some of its layers."""
    heads, layers, reads_far = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.booleans())
    config = WanConfig(
        dim=heads * 2 * draw(st.integers(1, 7)), heads=heads, ffn_dim=draw(st.integers(1, 20)), layers=layers,
        text_dim=8, channels=draw(st.integers(1, 4)), patch=draw(st.integers(1, 3)), level_dim=4,
        extent=draw(st.integers(1, 21)), reads_far=reads_far, far_maps=reads_far and draw(st.booleans()),
    )  # fmt: skip
    torch.manual_seed(draw(st.integers(0, 99)))
    chosen = draw(st.sets(st.integers(0, layers - 1), min_size=1))
    return WanTransformer(config).double(), tuple(sorted(chosen))


@given(
    drawn=wan_shapes(), frames=st.integers(1, 9), sides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    span=st.tuples(st.integers(1, 9), st.integers(0, 3)), degree=st.integers(1, 3), turns=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
@torch.no_grad()
def test_any_network_of_wans_shape_is_converted(drawn, frames: int, sides, span, degree: int, turns: bool) -> None:
    """A near span as long as the clip changes nothing."""
    plain, layers = drawn
    config, (current, overlap), generator = plain.config, span, torch.Generator().manual_seed(0)
    size = (2, frames, config.channels, *(config.patch * side for side in sides))
    noisy, level = torch.randn(size, generator=generator, dtype=torch.float64), torch.full((2, frames), 0.5)
    made = converted(plain, Conversion(layers=layers, current=current, overlap=overlap, degree=degree,
                                       turns_with_frames=turns), far_tokens=9)  # fmt: skip
    assert set(made.features) == set(layers)
    answers = [one(noisy, level, tiny.prompt(plain, 2), one.clip_view(noisy)) for one in (plain, made)]
    assert answers[1].shape == noisy.shape and answers[1].isfinite().all()
    if current >= frames:
        torch.testing.assert_close(*answers, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"layers": ()}, "one or more different numbers"),
        ({"layers": (1, 1)}, "one or more different numbers"),
        ({"layers": (-1,)}, "one or more different numbers"),
        ({"layers": (3,)}, "layer 3 cannot be converted: there are 3"),
        ({"layers": (0,), "degree": 0}, "degree of features is 1 or more"),
        ({"layers": (0,), "current": 0}, "1 current latent frame or more"),
    ],
)
def test_what_cannot_be_converted_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(tiny.network().config, conversion=Conversion(**options))


def test_converted_layers_cannot_be_masked() -> None:
    with pytest.raises(ValueError, match="converted layers cannot be masked"):
        student().clip_view(clip(4), torch.eye(4, dtype=torch.bool))


# ---------------------------------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------------------------------


def fed(made: WanTransformer, memory: StreamMemory, clean: torch.Tensor, level: float = 0.0) -> torch.Tensor:
    """Velocities of blocks seen at a level, each committed as it is before the next."""
    out, prompts = [], tiny.prompt(made, len(clean))
    for block in clean.split(BLOCK, dim=1):
        view = made.memory_view(memory, block)
        out.append(made(block, torch.full(block.shape[:2], level), prompts, view))
        commit(made, memory, block, prompts, view)
    return torch.cat(out, dim=1)


@given(overlap=st.integers(0, 7), blocks=st.integers(1, 5), batch=st.integers(1, 2), ring=st.booleans())
@settings(max_examples=12)
@torch.no_grad()
def test_a_stream_of_clean_blocks_is_the_clip_they_make(overlap: int, blocks: int, batch: int, ring: bool) -> None:
    """All layers converted: a clip is answered from left to right, so that its stream is the same computation."""
    made = student((0, 1, 2), overlap)
    shape = MemoryShape(
        window=WindowShape(sink=3, past=3), extent=None, converted=made.far_shapes(Keep()), overlap=overlap
    )
    clean = clip(blocks * BLOCK, batch)
    streamed = fed(made, StreamMemory(shape, 3, ring=ring), clean)
    whole = made(clean, torch.zeros(clean.shape[:2]), tiny.prompt(made, batch), made.clip_view(clean))
    torch.testing.assert_close(streamed, whole, atol=1e-12, rtol=1e-12)


FARS = ("", "far=keep", "far=decay,frames=4", "far=cap,frames=2", "far=none")
NEARS = (MemoryShape.near, partial(block_sparse, share=0.4, block_q=6, block_k=6))


@given(
    overlap=st.integers(0, 7), blocks=st.integers(1, 7), far=st.sampled_from(FARS), near=st.sampled_from(NEARS),
    size=st.integers(1, 3),
)  # fmt: skip
@example(overlap=3, blocks=5, far="", near=NEARS[1], size=1)
@example(overlap=3, blocks=5, far="far=none", near=NEARS[0], size=2)
@settings(max_examples=20)
@torch.no_grad()
def test_teacher_forcing_sees_in_one_pass_what_a_stream_sees(
    overlap: int, blocks: int, far: str, near: Attend, size: int
) -> None:
    """However the window is attended, and where nothing is far, with several blocks denoised together."""
    made = student((0, 2), overlap)
    memory = replace(recipes.recipe_named(f"rehyat:{far}" if far else "rehyat").memory(made), near=near)
    together = [min(size, blocks - begin) for begin in range(0, blocks, size)] if far == "far=none" else []
    past, noisy = clip(blocks * BLOCK), clip(blocks * BLOCK, seed=6)
    level = torch.rand(1, blocks, generator=torch.Generator().manual_seed(0)).repeat_interleave(BLOCK, 1)
    numbers = torch.zeros(1, blocks * BLOCK, dtype=torch.long)
    one, other = (
        forced(made, past, noisy, level, tiny.prompt(made), numbers, BLOCK, memory, together)
        for forced in (forced_in_one_pass, forced_by_block)
    )
    torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_gradients_reach_the_maps_alike_in_one_pass_and_by_block() -> None:
    made = student().requires_grad_(True)
    memory, clean = rehyat().memory(made), clip(4 * BLOCK)
    numbers, level = torch.zeros(1, 4 * BLOCK, dtype=torch.long), torch.full((1, 4 * BLOCK), 0.5)
    found = []
    for forced in (forced_in_one_pass, forced_by_block):
        made.zero_grad()
        prompts = made.prompt_keys(tiny.text())
        forced(made, clean, clean + 1, level, prompts, numbers, BLOCK, memory).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None})
    assert any("features.keys" in name and gradient.abs().max() > 0 for name, gradient in found[0].items())
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-9, rtol=1e-6)


@torch.no_grad()
def test_a_batch_of_two_streams_is_two_streams() -> None:
    made = student()
    shape = rehyat().memory(made)

    def streamed(*seeds: int) -> torch.Tensor:
        memory = StreamMemory(shape, 3, ring=True)
        prompts = made.prompt_keys(tiny.text().expand(len(seeds), -1, -1, -1))
        blocks = blockwise(made, memory, lambda block: prompts, tiny.noise(*seeds), tiny.LEVELS, end=6)
        return torch.cat(list(blocks), dim=1)

    both = streamed(1, 2)
    torch.testing.assert_close(both[:1], streamed(1), atol=1e-12, rtol=1e-12)
    assert not torch.allclose(both[:1], both[1:])


@torch.no_grad()
def test_memory_stays_as_it_is_and_reading_changes_nothing() -> None:
    made = student(overlap=2)
    memory = StreamMemory(rehyat().memory(made), 3, ring=True)
    sizes, block = [], clip(BLOCK)
    for _ in range(12):
        fed(made, memory, block)
        memory.audit()
        sizes.append(memory.nbytes())
    assert sizes[2:] == [sizes[2]] * 10
    assert [len(memory.held(layer).frames) for layer in range(3)] == [2, 6, 2]
    before = [x.clone() for x in memory.far(0).sums]
    view, level = made.memory_view(memory, block), torch.full((1, BLOCK), 0.5)
    answers = [made(block, level, tiny.prompt(made), view) for _ in range(2)]
    assert torch.equal(*answers) and all(map(torch.equal, before, memory.far(0).sums))


@torch.no_grad()
def test_what_is_far_weighs_no_more_than_in_training_however_long_the_stream() -> None:
    made = student()
    capped, kept = (StreamMemory(rehyat(far).memory(made), 3, ring=True) for far in ("cap", "keep"))
    for memory in (capped, kept):
        fed(made, memory, clip(12 * BLOCK))
    tokens = 2 * 3
    assert made.config.conversion.far_frames(15) == 11
    assert capped.far(0).sums.mass_B.item() == 11 * tokens and kept.far(0).sums.mass_B.item() == 35 * tokens


@torch.no_grad()
def test_blocks_are_answered_alike_however_far_along_a_stream_is() -> None:
    """The same block over and over, beyond the extent from the fourth on; a capped state comes to rest."""
    made = student((0, 1, 2), extent=9)
    memory = StreamMemory(rehyat(far="cap", frames=3).memory(made), 3, ring=False)
    answers = fed(made, memory, torch.cat([clip(BLOCK)] * 24, 1)).split(BLOCK, dim=1)
    torch.testing.assert_close(answers[11], answers[23], atol=1e-9, rtol=1e-9)
    assert not torch.allclose(answers[0], answers[23], atol=1e-4)


@torch.no_grad()
def test_far_sums_are_read() -> None:
    made, blocks = student(), clip(5 * BLOCK)
    shapes = [rehyat(far).memory(made) for far in ("cap", "none")]
    with_far, without = (fed(made, StreamMemory(shape, 3, ring=True), blocks) for shape in shapes)
    near = slice(0, BLOCK)
    assert torch.equal(with_far[:, near], without[:, near]) and not torch.allclose(with_far, without, atol=1e-6)


def test_a_redirect_reaches_far_sums() -> None:
    engine = tiny.engine(rehyat())

    def shown(far: float) -> torch.Tensor:
        with engine.stream("a", seed=1) as stream:
            first = [chunk.frames for chunk in islice(stream, 4)]
            stream.redirect("b", far=far)
            return torch.cat([torch.as_tensor(x) for x in (*first, next(stream).frames)])

    keeps, forgets = shown(1.0), shown(0.0)
    last = slice(-12, None)
    assert torch.equal(keeps[:-12], forgets[:-12]) and not torch.equal(keeps[last], forgets[last])


@pytest.mark.parametrize(
    "network, said",
    [
        (tiny.network, "these weights have none: longtake train attention_matching"),
        (lambda: converted(tiny.network(), Conversion(layers=(0,), current=5)), "blocks of 3 .* near spans of 5"),
        (partial(student, overlap=13), "near span of 13 [+] 3 latent frames does not fit the extent of 15"),
        (
            lambda: converted(tiny.network(), Conversion(layers=(0,), turns_with_frames=True)),
            "cannot stream features that turn with frames",
        ),
        (
            lambda: converted(tiny.network(), Conversion(layers=(0,), overlap=0, exact=False)),
            "recipe rehyat cannot do without an exact near span",
        ),
    ],
)
def test_weights_that_cannot_be_streamed_are_refused(network, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rehyat().memory(network())


def test_a_recipe_that_needs_maps_is_refused_by_one_line_when_weights_are_loaded(tmp_path: Path) -> None:
    saved(tmp_path / NETWORK_FILE, tiny.network().float())
    with pytest.raises(ValueError, match=r"these weights have none: longtake train attention_matching converts some$"):
        recipes.load(tmp_path / NETWORK_FILE, recipe="rehyat", device="cpu")


@pytest.mark.parametrize("name", ["far=delta", "far=cap,frames=0", "far=keep,frames=4", "far=none,frames=4"])
def test_far_states_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="does not work"):
        recipes.recipe_named(f"rehyat:{name}")
