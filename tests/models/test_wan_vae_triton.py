"""Wan's decoder by its kernel answers as its definition does: compiled on a GPU, interpreted elsewhere."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (it comes with longtake[dev] on Linux)")

from longtake.models import wan_vae_triton
from longtake.models.codec import CodecState
from longtake.models.conv_triton import convolved
from longtake.models.standins import without_numbers
from longtake.models.wan_vae import WanVAE, WanVAEConfig
from longtake.models.wan_vae_triton import fuse_decoder, in_phases, phases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = WanVAEConfig(
    dim=6, z_dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1, latent_mean=(0.1, -0.2, 0.0, 0.3),
    latent_std=(1.5, 0.5, 1.0, 2.0),
)  # fmt: skip
TYPES = [(torch.float32, 1e-4)]
if DEVICE == "cuda":
    TYPES.append((torch.bfloat16, 0.1))  # norms over so few channels make rounding larger


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU convolutions of float32 are TF32 otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def both(dtype: torch.dtype = torch.float32, span: int | None = 1) -> tuple[WanVAE, WanVAE]:
    """The definition, and the same by kernels. Gains and biases are drawn, as those of a new codec do nothing."""
    torch.manual_seed(3)
    plain = WanVAE(SMALL, span).requires_grad_(False).eval()
    for name, parameter in plain.decoder.named_parameters():
        if name.endswith(("gamma", "bias")):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    plain.to(DEVICE, dtype)
    quick = copy.deepcopy(plain)
    fuse_decoder(quick)
    return plain, quick


def latents(dtype: torch.dtype = torch.float32, batch: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(6)
    return torch.randn(batch, 5, 4, 2, 3, generator=draw).to(DEVICE, dtype)


def assert_near(got: Tensor, want: Tensor, share: float) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).norm() <= share * want.norm()


@pytest.mark.parametrize("dtype, share", TYPES)
@pytest.mark.parametrize("batch, span", [(1, 1), (1, 2), (2, None)])
@torch.no_grad()
def test_a_stream_is_decoded_as_by_the_definition(dtype: torch.dtype, share: float, batch: int, span: int) -> None:
    """Each goes on from the other's state, too."""
    plain, quick = both(dtype, span)
    first, rest = latents(dtype, batch).split((2, 3), dim=1)
    want, state = plain.decode(first)
    got, own = quick.decode(first)
    assert_near(got, want, share)
    want, after = plain.decode(rest, state)
    for codec, before in ((quick, own), (quick, state), (plain, own)):
        got, after_it = codec.decode(rest, before)
        assert_near(got, want, share)
        for ours, theirs in zip(after_it.tensors, after.tensors, strict=True):
            assert_near(ours, theirs, share)


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability()[0] != 9, reason="the convolution is for Hopper GPUs"
)
@torch.no_grad()
def test_convolutions_of_few_channels_are_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def noted(joined: Tensor, weight: Tensor) -> Tensor:
        taken.append(tuple(weight.shape[:2]))
        return convolved(joined, weight)

    monkeypatch.setattr(wan_vae_triton, "convolved", noted)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter multiplies no bfloat16
    codec = WanVAE(replace(SMALL, dim=96, dim_mult=(1, 2), temporal_downsample=(True,)))
    fuse_decoder(codec.requires_grad_(False).to(DEVICE, dtype))
    first, second = latents(dtype)[:, :2].split(1, dim=1)
    _, state = codec.decode(first)
    assert not taken  # a video's first piece is the definition's
    got, _ = codec.decode(second, state)
    assert taken == [(96, 96)] * 4  # two blocks at the finest level
    monkeypatch.setattr(wan_vae_triton, "can_convolve", lambda weight: False)
    want, _ = codec.decode(second, state)
    assert len(taken) == 4
    assert_near(got, want, 0.02)


@torch.no_grad()
def test_a_state_can_be_continued_twice_and_is_left_alone() -> None:
    (_, quick), few = both(), latents()[:, :2]
    _, state = quick.decode(few)
    before = [x.clone() for x in state.tensors]
    one, _ = quick.decode(few, state)
    again, _ = quick.decode(few, state)
    assert torch.equal(one, again) and all(map(torch.equal, state.tensors, before))
    with pytest.raises(ValueError, match="the state does not continue here"):
        quick.decode(few, CodecState(state.tensors[::-1]))


@torch.no_grad()
def test_a_copy_decodes_as_it_does() -> None:
    (_, quick), few = both(), latents()[:, :2]
    pictures, state = quick.decode(few)
    copied = copy.deepcopy(quick)
    assert torch.equal(copied.decode(few)[0], pictures)
    assert torch.equal(copied.decode(few, state)[0], quick.decode(few, state)[0])


def test_with_gradients_it_is_the_definition() -> None:
    plain, quick = both()
    x = latents().requires_grad_()
    with torch.no_grad():
        _, state = plain.decode(x)
    gradients = [torch.autograd.grad(codec.decode(x, state)[0].square().sum(), x)[0] for codec in (plain, quick)]
    assert_near(*gradients, share=1e-4)


@torch.no_grad()
def test_it_has_a_twin_without_numbers() -> None:
    _, quick = both()
    twin = without_numbers(quick)
    pictures, state = twin.decode(latents().to("meta"))
    assert twin.decode(latents().to("meta"), state)[0].shape == (1, 20, 3, 16, 24) and pictures.is_meta


@pytest.mark.parametrize("height, width", [(1, 1), (3, 4)])
def test_doubled_pictures_are_convolved_by_phases(height: int, width: int) -> None:
    x, weight = torch.randn(2, 5, 3, height, width, device=DEVICE), torch.randn(7, 5, 3, 3, device=DEVICE)
    larger = F.interpolate(x.transpose(1, 2).flatten(0, 1), scale_factor=2, mode="nearest-exact")
    want = F.conv2d(larger, weight, padding=1).unflatten(0, (2, 3)).transpose(1, 2)
    four = in_phases(x, phases(weight)).unflatten(1, (2, 2, 7))
    for row in range(2):
        for column in range(2):
            got = four[:, row, column, :, :, row : row + height, column : column + width]
            torch.testing.assert_close(got, want[:, :, :, row::2, column::2], atol=1e-4, rtol=1e-4)
