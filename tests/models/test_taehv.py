"""The light decoder: the published names, shapes and bytes, and the same pictures however latents come in."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from longtake.cli import main
from longtake.models.checkpoints import load_codec, load_taehv
from longtake.models.codec import CodecState
from longtake.models.taehv import TAEHV, TAEHVConfig
from longtake.models.wan_vae import WanVAE, WanVAEConfig

LATENTS = 5  # latent frames of a test clip
SMALL = TAEHVConfig(latent_channels=4, widths=(8, 6, 4, 4))

# What lies at each place of the published lists, by widths: b a 3x3 convolution with a bias, k one without, m a memory
# block, 2> and 2< a 1x1 convolution of two frames into one, or of one into two. Other places have no weights.
ENCODER = "b3-64 - 2>64 k64-64 m64 m64 m64 2>64 k64-64 m64 m64 m64 1>64 k64-64 m64 m64 m64 b64-16"
DECODER = "- b16-256 - m256 m256 m256 - 1<256 k256-128 m128 m128 m128 - 2<128 k128-64 m64 m64 m64 - 2<64 k64-64 - b64-3"


def shapes_at(place: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights at one place."""
    if place == "-":
        return {}
    if place[0] == "m":
        width = int(place[1:])
        inputs = {0: 2 * width, 2: width, 4: width}
        weights = {f"conv.{n}.weight": (width, inputs[n], 3, 3) for n in inputs}
        return weights | {f"conv.{n}.bias": (width,) for n in inputs}
    if place[1] in "<>":
        frames, width = int(place[0]), int(place[2:])
        return {"conv.weight": (frames * width, width, 1, 1) if place[1] == "<" else (width, frames * width, 1, 1)}
    given_width, width = map(int, place[1:].split("-"))
    return {"weight": (width, given_width, 3, 3)} | ({"bias": (width,)} if place[0] == "b" else {})


def layout(half: str, places: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{half}.{number}.{name}": shape
        for number, place in enumerate(places.split())
        for name, shape in shapes_at(place).items()
    }


def published(decoder: str = DECODER) -> dict[str, Tensor]:
    """A synthetic file as it is published: both halves, random numbers in float16."""
    draw = torch.Generator().manual_seed(0)
    shapes = layout("encoder", ENCODER) | layout("decoder", decoder)
    return {name: (torch.randn(shape, generator=draw) * scale(shape)).half() for name, shape in shapes.items()}


def scale(shape: tuple[int, ...]) -> float:
    return math.prod(shape[1:]) ** -0.5


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return published()


@pytest.fixture(scope="module")
def codec() -> TAEHV:
    torch.manual_seed(3)
    return TAEHV(SMALL).double().eval()


def latent_clip(batch: int = 1, latents: int = LATENTS) -> Tensor:
    draw = torch.Generator().manual_seed(6)
    return torch.randn(batch, latents, 4, 2, 3, generator=draw, dtype=torch.float64)


# the layout


def test_names_shapes_and_bytes_are_those_that_are_published(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """taew2_1.safetensors has 128 tensors and 22,642,902 bytes, of which the header tells every name and shape."""
    save_file(tensors, tmp_path / "taew2_1.safetensors")
    assert len(tensors) == 128
    assert (tmp_path / "taew2_1.safetensors").stat().st_size == 22_642_902
    with torch.device("meta"):
        ours = TAEHV(TAEHVConfig()).state_dict()
    theirs = {name: x.shape for name, x in tensors.items() if name.startswith("decoder.")}
    assert {name: x.shape for name, x in ours.items()} == theirs


@pytest.mark.parametrize("file", ["taew2_1.pth", "taew2_1.safetensors"])
def test_a_published_file_loads(file: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / file
    torch.save(tensors, path) if path.suffix == ".pth" else save_file(tensors, path)
    for given_path in (path, tmp_path):
        loaded = load_codec(given_path, dtype=torch.float32)
        assert isinstance(loaded, TAEHV) and not any(x.requires_grad for x in loaded.parameters())
        assert (loaded.latent_channels, loaded.spatial_factor, loaded.temporal_factor) == (16, 8, 4)
        assert all(torch.equal(x, tensors[name].float()) for name, x in loaded.state_dict().items())
    assert load_taehv(path).decoder[1].weight.dtype == torch.float16, "unless told otherwise, the file's"


def test_a_vae_is_not_taken_for_a_light_decoder(tmp_path: Path) -> None:
    torch.save(WanVAE(WanVAEConfig(dim=2)).state_dict(), tmp_path / "Wan2.1_VAE.pth")
    assert isinstance(load_codec(tmp_path), WanVAE)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x: x.pop("decoder.20.weight"), r"1 missing \(decoder.20.weight\)"),
        (lambda x: x.update({"decoder.23.bias": torch.ones(3)}), r"1 not known \(decoder.23.bias\)"),
        (lambda x: x.update({"head.bias": torch.ones(3)}), r"1 not known \(head.bias\)"),
    ],
)
def test_misfits_are_refused(change, said: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    changed = dict(tensors)
    change(changed)
    torch.save(changed, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"does not fit TAEHV: {said}"):
        load_codec(tmp_path / "other.pth")


def test_decoders_of_other_latents_are_refused(tmp_path: Path, capsys) -> None:
    """taew2_2, of Wan2.2's 48 channels."""
    torch.save(published(DECODER.replace("b16-", "b48-")), tmp_path / "taew2_2.pth")
    with pytest.raises(ValueError, match=r"1 of another shape \(decoder.1.weight 256x48x3x3 for 256x16x3x3\)"):
        load_codec(tmp_path / "taew2_2.pth")
    arguments = ["generate", "a ball", "--codec", str(tmp_path / "taew2_2.pth"), "--device", "cpu", "--seconds", "1"]
    assert main(arguments) == 2
    assert "model toy has a codec of its own" in capsys.readouterr().err


def test_a_name_that_is_not_on_the_hub_says_where_it_is() -> None:
    with pytest.raises(ValueError, match=r"fetch it from https://github\.com/madebyollin/taehv and name its file"):
        load_codec("taew2.1")


# decoding


def by_hand(weights: dict[str, Tensor], latents_FCHW: Tensor) -> Tensor:
    """A clip decoded frame by frame, as the layout is described: every frame meets the one before it, or zeros."""

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding="same")

    def memory_blocks(first: int, frames: list[Tensor]) -> list[Tensor]:
        for block in range(first, first + 3):
            before = [torch.zeros_like(frames[0]), *frames[:-1]]
            mixed = [torch.cat(pair) for pair in zip(frames, before, strict=True)]
            for place in (0, 2, 4):
                mixed = [conv(f"decoder.{block}.conv.{place}", x if place == 0 else x.relu()) for x in mixed]
            frames = [(x + y).relu() for x, y in zip(mixed, frames, strict=True)]
        return frames

    frames = [conv("decoder.1", 3 * (x / 3).tanh()).relu() for x in latents_FCHW]
    for first, made in ((3, 1), (9, 2), (15, 2)):
        larger = [x.repeat_interleave(2, 1).repeat_interleave(2, 2) for x in memory_blocks(first, frames)]
        grown = [part for x in larger for part in conv(f"decoder.{first + 4}.conv", x).chunk(made)]
        frames = [conv(f"decoder.{first + 5}", x) for x in grown]
    return torch.stack([2 * conv("decoder.22", x.relu()) - 1 for x in frames])[3:]


@torch.no_grad()
def test_pictures_are_those_of_the_plain_form(codec: TAEHV) -> None:
    latents = latent_clip()
    expected = by_hand(codec.state_dict(), latents[0])
    assert expected.shape == (17, 3, 16, 24) and expected.std() > 0
    torch.testing.assert_close(codec.decode(latents)[0][0], expected, atol=1e-12, rtol=1e-12)


@settings(max_examples=15)
@given(sizes=st.lists(st.integers(1, LATENTS), min_size=1, max_size=LATENTS), span=st.sampled_from([None, 1, 2]))
@torch.no_grad()
def test_decoding_in_pieces_equals_the_whole_clip(codec: TAEHV, sizes: list[int], span: int | None) -> None:
    latents, ends = latent_clip(batch=2), torch.tensor(sizes).cumsum(0).tolist()
    codec.span = None
    whole, whole_state = codec.decode(latents)
    codec.span = span
    pieces, state = [], None
    for start, end in pairwise([0, *[end for end in ends if end < LATENTS], LATENTS]):
        frames, state = codec.decode(latents[:, start:end], state)
        pieces.append(frames)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-12, rtol=1e-12)
    for got, expected in zip(state.tensors, whole_state.tensors, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_the_past_matters_and_the_future_does_not(codec: TAEHV) -> None:
    latents, changed = latent_clip(), latent_clip()
    changed[:, 2] += 1
    decoded, other = codec.decode(latents)[0], codec.decode(changed)[0]
    assert torch.equal(decoded[:, :5], other[:, :5])
    assert not torch.allclose(decoded[:, 9:], other[:, 9:], atol=1e-6)


@torch.no_grad()
def test_a_state_neither_grows_nor_changes(codec: TAEHV) -> None:
    _, state = codec.decode(latent_clip(latents=1))
    kept, size = [x.clone() for x in state.tensors], state.nbytes
    for latents in (2, 1, 3):
        _, later = codec.decode(latent_clip(latents=latents), state)
        assert later.nbytes == size and all(t.untyped_storage().nbytes() == t.nbytes for t in later.tensors)
    assert all(map(torch.equal, state.tensors, kept))
    with pytest.raises(ValueError, match="does not continue here"):
        codec.decode(latent_clip(batch=2), state)
    with pytest.raises(ValueError, match="the state has 10 tensors"):
        codec.decode(latent_clip(), CodecState((*state.tensors, state.tensors[0])))


def test_what_cannot_be_is_refused(codec: TAEHV) -> None:
    with pytest.raises(RuntimeError, match="only decodes"):
        codec.encode(torch.zeros(1, 1, 3, 16, 24))
    with pytest.raises(ValueError, match="doubles_rate needs 3 entries, got 2"):
        TAEHVConfig(doubles_rate=(True, True))
    with pytest.raises(ValueError, match="latents must be"):
        codec.decode(torch.zeros(1, 1, 3, 2, 3))
