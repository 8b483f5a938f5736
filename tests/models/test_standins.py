"""Engines of random weights stream as real ones do."""

from dataclasses import replace

import pytest
import torch

from longtake.evaluation.parts import work_by_part
from longtake.evaluation.steady import bench_steady
from longtake.models import checkpoints
from longtake.models.checkpoints import WAN_1_3B
from longtake.models.standins import NoDecoder, RandomText, drawn, without_numbers
from longtake.models.wan import WanTransformer
from longtake.models.wan_vae import WanVAE, WanVAEConfig
from longtake.recipes import RECIPES, load_random, recipe_named
from longtake.recipes.wan_engines import DECODERS, reading

CPU = torch.device("cpu")
SMALL = replace(WAN_1_3B, dim=24, heads=2, ffn_dim=32, layers=2, text_dim=8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wan's 1.3B and its VAE, tiny in width alone."""
    monkeypatch.setitem(checkpoints.NETWORKS, "wan2.1-1.3b", SMALL)
    monkeypatch.setitem(DECODERS, "wan", lambda: WanVAE(WanVAEConfig(dim=4)))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_streams_without_weights_and_is_counted_without_numbers(name: str) -> None:
    engine = load_random("wan2.1-1.3b", recipe=name, size=(16, 32), decoder="none", device="cpu", levels=2)
    with engine.stream("any words") as stream:
        chunks = [next(stream) for _ in range(4)]
    assert [len(chunk.frames) for chunk in chunks] == [9, 12, 12, 12]
    assert engine.text.encode(["any"]).shape == (1, 512, 8)
    work = work_by_part(engine, "any words")
    assert work["network pass 1"].operations > work["commit"].operations / 2 > 0


@pytest.mark.parametrize("name", ["self_forcing:block=1", "hybrid_forcing:block=1"])
def test_blocks_may_be_single_frames(name: str) -> None:
    engine = load_random("wan2.1-1.3b", recipe=name, size=(16, 32), decoder="none", device="cpu", levels=2)
    with engine.stream("any words") as stream:
        assert [len(next(stream).frames) for _ in range(9)] == [1, *[4] * 8]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_parts_are_timed_on_its_own_line() -> None:
    engine = load_random("wan2.1-1.3b", recipe="hybrid_forcing:tokens=16", size=(64, 96), device="cuda", levels=2)
    result = bench_steady(engine, "any words", blocks=3)
    parts = {name: row["ms"] for name, row in result["parts"].items()}
    assert result["precision"] == "bfloat16" and result["finite"]
    assert all(
        parts[name] > 0 for name in ("network pass 1", "network pass 2", "commit", "memory", "far state", "decode")
    )
    assert sum(parts.values()) < 3 * result["whole"]["ms"], "marks cost something, and no more than that"


@pytest.mark.parametrize("decoder", ["wan", "light"])
def test_decoders_make_pictures_of_the_size_asked_for(decoder: str) -> None:
    engine = load_random("wan2.1-1.3b", recipe="self_forcing", size=(16, 32), decoder=decoder, device="cpu", levels=1)
    with engine.stream("any words") as stream:
        frames = next(stream).frames
    assert frames.shape == (9, 16, 32, 3) and frames.std() > 0


def test_nothing_is_left_at_zero_and_a_seed_is_a_network() -> None:
    config = reading(SMALL, recipe_named("hybrid_forcing"))
    made, again, other = (drawn(lambda: WanTransformer(config), CPU, torch.bfloat16, seed) for seed in (0, 0, 1))
    assert len(made.projections) == 2 and all(bool(x.any()) for x in made.parameters())
    assert {x.dtype for x in made.parameters()} == {torch.bfloat16} and torch.get_default_dtype() == torch.float32
    pairs = list(zip(made.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y, _ in pairs)
    assert any(not torch.equal(x, z) for x, _, z in pairs)


def test_drawing_leaves_other_draws_alone() -> None:
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    drawn(lambda: WanTransformer(SMALL), CPU, torch.float32)
    assert torch.equal(torch.randn(3), expected)


def test_a_twin_without_numbers_has_every_shape() -> None:
    made = drawn(lambda: WanVAE(WanVAEConfig(dim=4)), CPU, torch.float32)
    twin = without_numbers(made)
    sizes = {name: x.shape for name, x in made.state_dict().items()}
    assert {name: x.shape for name, x in twin.state_dict().items()} == sizes
    assert {x.device.type for x in (*twin.parameters(), *twin.buffers())} == {"meta"}
    assert {x.device.type for x in (*made.parameters(), *made.buffers())} == {"cpu"}


def test_words_tell_random_text_apart() -> None:
    text = RandomText(5, 8, CPU)
    one, other = text.encode(["one", "other"])
    assert torch.equal(text.encode(["one"])[0], one) and not torch.equal(one, other)


def test_pictures_without_pixels_are_counted() -> None:
    codec = NoDecoder(latent_channels=4, spatial_factor=8, temporal_factor=4)
    first, state = codec.decode(torch.zeros(2, 3, 4, 2, 2))
    later, _ = codec.decode(torch.zeros(2, 3, 4, 2, 2), state)
    assert (first.shape, later.shape) == ((2, codec.pictures(3), 3, 0, 0), (2, 12, 3, 0, 0))


@pytest.mark.parametrize(
    "model, options, said",
    [
        ("wan2.1-1.3", {}, "did you mean wan2.1-1.3b"),
        ("toy", {}, "no published network"),
        ("wan2.1-1.3b", {"decoder": "heavy"}, "there are wan, light, none"),
        ("wan2.1-1.3b", {"size": (20, 32)}, "multiples of 16 high and wide, not 20 x 32"),
        ("wan2.1-1.3b", {"recipe": "self_forcing:past=60"}, "do not fit the extent"),
    ],
)
def test_what_there_is_not_is_one_line(model: str, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_random(model, **{"recipe": "self_forcing", "size": (16, 32), "device": "cpu"} | options)
