"""Both codec families, at tiny sizes: one protocol, so most tests run on each of them."""

import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longtake.models.codec import Codec, CodecState
from longtake.models.light_codec import LightCodec, LightCodecConfig
from longtake.models.wan_vae import WanVAE, WanVAEConfig

LATENTS = 5  # latent frames of a test clip
FAMILIES = ("wan", "light")
SMALL_LIGHT = LightCodecConfig(
    latent_channels=4, encoder_widths=(4, 8, 8), encoder_blocks=(1, 1, 2), decoder_widths=(8, 8, 4),
    decoder_blocks=(2, 1, 1),
)  # fmt: skip
SMALL_WAN = WanVAEConfig(
    dim=2, z_dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1, latent_mean=(0.1, -0.2, 0.0, 0.3),
    latent_std=(1.5, 0.5, 1.0, 2.0),
)  # fmt: skip

cuttings = st.lists(st.integers(1, LATENTS), min_size=1, max_size=LATENTS)
families = st.sampled_from(FAMILIES)
spans = st.sampled_from([None, 1, 2])


def make(family: str) -> Codec:
    torch.manual_seed(3)
    codec = WanVAE(SMALL_WAN) if family == "wan" else LightCodec(SMALL_LIGHT)
    return codec.double().eval()  # so that differences are mistakes, not rounding that tiny widths amplify


@pytest.fixture(params=FAMILIES)
def codec(request: pytest.FixtureRequest) -> Codec:
    return make(request.param)


def pictures(batch: int = 1, latents: int = LATENTS) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.rand(batch, 1 + 4 * (latents - 1), 3, 16, 24, generator=draw, dtype=torch.float64) * 2 - 1


def latent_clip(batch: int = 1, latents: int = LATENTS) -> Tensor:
    draw = torch.Generator().manual_seed(6)
    return torch.randn(batch, latents, 4, 2, 3, generator=draw, dtype=torch.float64)


def latent_edges(sizes: list[int]) -> list[int]:
    """Where a clip of LATENTS frames is cut when pieces of these sizes are taken until it ends."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [0, *[end for end in ends if end < LATENTS], LATENTS]


def picture_edge(latent_edge: int) -> int:
    return 4 * latent_edge - 3 if latent_edge else 0


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


@settings(max_examples=12)
@given(family=families, sizes=cuttings, span=spans)
@torch.no_grad()
def test_decoding_in_pieces_equals_the_whole_clip(family: str, sizes: list[int], span: int | None) -> None:
    codec, latents = make(family), latent_clip()
    codec.span = None
    whole, whole_state = codec.decode(latents)
    codec.span = span
    pieces, state = [], None
    for start, end in pairwise(latent_edges(sizes)):
        frames, state = codec.decode(latents[:, start:end], state)
        pieces.append(frames)
    close(torch.cat(pieces, 1), whole)
    for got, expected in zip(state.tensors, whole_state.tensors, strict=True):
        close(got, expected)


@settings(max_examples=12)
@given(family=families, sizes=cuttings, span=spans)
@torch.no_grad()
def test_encoding_in_pieces_equals_the_whole_clip(family: str, sizes: list[int], span: int | None) -> None:
    codec, frames = make(family), pictures()
    codec.span = None
    whole, _ = codec.encode(frames)
    codec.span = span
    pieces, state = [], None
    for start, end in pairwise(map(picture_edge, latent_edges(sizes))):
        latents, state = codec.encode(frames[:, start:end], state)
        pieces.append(latents)
    close(torch.cat(pieces, 1), whole)


@torch.no_grad()
def test_shapes(codec: Codec) -> None:
    assert codec.encode(pictures(batch=2))[0].shape == (2, LATENTS, 4, 2, 3)
    assert codec.decode(latent_clip(batch=2))[0].shape == (2, 17, 3, 16, 24)
    assert codec.encode(pictures(latents=1))[0].shape == (1, 1, 4, 2, 3)
    assert codec.decode(latent_clip(latents=1))[0].shape == (1, 1, 3, 16, 24)


@torch.no_grad()
def test_a_batch_of_two_equals_two(codec: Codec) -> None:
    frames, latents = pictures(batch=2), latent_clip(batch=2)
    for call, clips in ((codec.encode, frames), (codec.decode, latents)):
        together, state = call(clips)
        for row in range(2):
            alone, alone_state = call(clips[row : row + 1])
            close(together[row : row + 1], alone)
            for got, expected in zip(state.tensors, alone_state.tensors, strict=True):
                close(got[row : row + 1], expected)


@torch.no_grad()
def test_a_state_that_is_given_up_is_let_go_of(codec: Codec) -> None:
    _, state = codec.decode(latent_clip())
    want, _ = codec.decode(latent_clip(), state)
    given, held = state.given_up(), [weakref.ref(tensor) for tensor in state.tensors]
    del state
    got, after = codec.decode(latent_clip(), given)
    assert torch.equal(got, want) and len(after.tensors) == len(held)
    assert all(one() is None for one in held)


@torch.no_grad()
def test_a_state_can_be_continued_twice(codec: Codec) -> None:
    latents, frames = latent_clip(), pictures()
    for call, start, rest in (
        (codec.decode, latents[:, :2], latents[:, 2:]),
        (codec.encode, frames[:, :5], frames[:, 5:]),
    ):
        _, state = call(start)
        before = [x.clone() for x in state.tensors]
        first, _ = call(rest, state)
        call(-rest, state)
        again, _ = call(rest, state)
        assert torch.equal(first, again)
        assert all(map(torch.equal, state.tensors, before))


@torch.no_grad()
def test_the_past_matters_and_the_future_does_not(codec: Codec) -> None:
    latents, frames = latent_clip(), pictures()
    changed_latents, changed_frames = latents.clone(), frames.clone()
    changed_latents[:, 3] += 1
    changed_frames[:, 9] *= -1  # the first picture of latent frame 3
    decoded, other_decoded = codec.decode(latents)[0], codec.decode(changed_latents)[0]
    encoded, other_encoded = codec.encode(frames)[0], codec.encode(changed_frames)[0]
    assert torch.equal(decoded[:, :9], other_decoded[:, :9])
    assert torch.equal(encoded[:, :3], other_encoded[:, :3])
    assert not torch.allclose(decoded[:, 13:], other_decoded[:, 13:], atol=1e-6)
    assert not torch.allclose(encoded[:, 4:], other_encoded[:, 4:], atol=1e-6)


@torch.no_grad()
def test_a_state_does_not_grow(codec: Codec) -> None:
    _, decoding = codec.decode(latent_clip(latents=1))
    _, encoding = codec.encode(pictures(latents=1))
    sizes = decoding.nbytes, encoding.nbytes
    for _ in range(8):
        _, decoding = codec.decode(latent_clip(latents=2), decoding)
        _, encoding = codec.encode(pictures(latents=2)[:, 1:], encoding)
        assert (decoding.nbytes, encoding.nbytes) == sizes
    # Nor does it hold on to the larger tensors its own were taken from.
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in (*decoding.tensors, *encoding.tensors))


def test_gradients_are_finite_and_reach_every_parameter(codec: Codec) -> None:
    latents, _ = codec.encode(pictures(latents=3))
    frames, _ = codec.decode(latents)
    (frames.square().mean() + latents.square().mean()).backward()
    for name, parameter in codec.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@torch.no_grad()
def test_bfloat16_agrees_roughly(codec: Codec) -> None:
    frames, _ = codec.decode(latent_clip())
    half, _ = codec.bfloat16().decode(latent_clip().bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - frames).abs().mean() < 0.05 * frames.abs().mean()


@pytest.mark.parametrize("shape", [(1, 5, 4, 16, 24), (5, 3, 16, 24), (1, 5, 3, 12, 24), (1, 5, 3, 0, 24)])
def test_wrong_pictures_are_refused(codec: Codec, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="got"):
        codec.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 5, 3, 2, 3), (5, 4, 2, 3), (1, 0, 4, 2, 3)])
def test_wrong_latents_are_refused(codec: Codec, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="got"):
        codec.decode(torch.zeros(shape))


@torch.no_grad()
def test_wrong_numbers_of_pictures_are_refused(codec: Codec) -> None:
    frames = pictures()
    for count in (0, 4, 6):
        with pytest.raises(ValueError, match=f"1 \\+ a multiple of 4 pictures, got {count}"):
            codec.encode(frames[:, :count])
    _, state = codec.encode(frames[:, :5])
    for count in (0, 1, 5):
        with pytest.raises(ValueError, match=f"multiple of 4 pictures, got {count}"):
            codec.encode(frames[:, :count], state)


@torch.no_grad()
def test_a_foreign_state_is_refused(codec: Codec) -> None:
    _, state = codec.decode(latent_clip(batch=2))
    with pytest.raises(ValueError, match="does not continue here"):
        codec.decode(latent_clip(), state)
    with pytest.raises(ValueError, match="the state has"):
        codec.decode(latent_clip(batch=2), CodecState(state.tensors[:-1]))
    with pytest.raises(ValueError, match="the state has"):
        codec.decode(latent_clip(batch=2), CodecState((*state.tensors, state.tensors[0])))


def test_a_span_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="span"):
        LightCodec(SMALL_LIGHT, span=0)


def test_configurations_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="one entry per resolution"):
        LightCodecConfig(decoder_widths=(8, 8))
    with pytest.raises(ValueError, match="temporal_downsample needs 3"):
        WanVAEConfig(temporal_downsample=(True, True))
    with pytest.raises(ValueError, match="need 8 entries"):
        WanVAEConfig(z_dim=8)


def test_factors_follow_the_configuration() -> None:
    light = LightCodec(
        LightCodecConfig(
            latent_channels=4,
            encoder_widths=(4, 4),
            encoder_blocks=(1, 1),
            decoder_widths=(4, 4),
            decoder_blocks=(1, 1),
        )
    )
    wan = WanVAE(
        WanVAEConfig(
            dim=2, z_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, False),
            latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4,
        )
    )  # fmt: skip
    for codec in (light.double(), wan.double()):
        assert (codec.spatial_factor, codec.temporal_factor) == (4, 2)
        latents, _ = codec.encode(pictures()[:, :7])
        assert latents.shape == (1, 4, 4, 4, 6)
        assert codec.decode(latents)[0].shape == (1, 7, 3, 16, 24)


@torch.no_grad()
def test_a_light_codec_without_its_encoder_decodes_the_same() -> None:
    codec = make("light")
    decoder_only = LightCodec(SMALL_LIGHT, encoder=False).double()
    weights = {name: t for name, t in codec.state_dict().items() if not name.startswith("encoder.")}
    decoder_only.load_state_dict(weights, strict=True)
    assert torch.equal(decoder_only.decode(latent_clip())[0], codec.decode(latent_clip())[0])
    with pytest.raises(RuntimeError, match="can only decode"):
        decoder_only.encode(pictures())


@torch.no_grad()
def test_latent_statistics_normalise_and_stay_with_the_weights() -> None:
    codec = make("light")
    raw, _ = codec.encode(pictures())
    decoded, _ = codec.decode(raw)
    codec.set_latent_statistics(torch.tensor([1.0, -1.0, 0.5, 0.0]), torch.tensor([2.0, 0.5, 1.0, 4.0]))
    latents, _ = codec.encode(pictures())
    close(codec.denormalise(latents), raw)
    close(codec.decode(latents)[0], decoded)
    other = LightCodec(SMALL_LIGHT).double()
    other.load_state_dict(codec.state_dict())
    assert torch.equal(other.encode(pictures())[0], latents)
    with pytest.raises(ValueError, match="deviations above 0"):
        codec.set_latent_statistics(torch.zeros(4), torch.zeros(4))


def test_training_forward_is_encode_then_decode() -> None:
    codec = make("light")
    frames, noise = pictures(), latent_clip()
    plain, noisy = codec(frames), codec(frames, noise)
    mean, log_variance = codec.encode_moments(frames)
    close(plain.mean_BFCHW, codec.encode(frames)[0])  # the statistics are still 0 and 1
    close(plain.frames_BFCHW, codec.decode(mean)[0])
    close(noisy.frames_BFCHW, codec.decode(mean + torch.exp(0.5 * log_variance) * noise)[0])


def test_wan_keeps_the_published_names() -> None:
    names = set(WanVAE(SMALL_WAN).state_dict())
    assert {"conv1.weight", "conv2.bias", "encoder.downsamples.0.residual.6.weight"} < names
    assert not {"latent_mean", "latent_std"} & names
