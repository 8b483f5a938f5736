"""Our own convolution answers as torch's does: compiled on a Hopper GPU, interpreted where there is none."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (it comes with longtake[dev] on Linux)")

from longtake import parallel
from longtake.models import conv_triton
from longtake.models.conv_triton import can_convolve, convolved

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter multiplies no bfloat16
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
OUT = 96

interpreted_or_on_hopper = pytest.mark.skipif(DEVICE == "cuda" and not HOPPER, reason="the kernel is for Hopper GPUs")
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


def drawn(size: tuple[int, int, int], channels: int = 32, batch: int = 1) -> tuple[Tensor, Tensor]:
    """size: frames of the answer, height, width."""
    draw = torch.Generator(DEVICE).manual_seed(sum(size))
    joined = torch.randn(batch, channels, size[0] + 2, *size[1:], generator=draw, device=DEVICE)
    weight = torch.randn(OUT, channels, 3, 3, 3, generator=draw, device=DEVICE) / (27 * channels) ** 0.5
    return _laid_out(joined), _laid_out(weight)


def _laid_out(x: Tensor) -> Tensor:
    return x.to(DTYPE).contiguous(memory_format=torch.channels_last_3d)


def assert_convolved(joined: Tensor, weight: Tensor) -> None:
    assert can_convolve(weight)
    got = convolved(joined, weight)
    want = F.conv3d(joined.cpu().float(), weight.cpu().float(), padding=(0, 1, 1))
    assert got.dtype == joined.dtype and got.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(got.cpu().float(), want, atol=0.02, rtol=0.01)


@interpreted_or_on_hopper
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (2, 127), (1, 128), (2, 129)])
def test_any_size_is_convolved(frames: int, height: int, width: int) -> None:
    """Programs end inside a picture, at its border and behind it; frames alike."""
    assert_convolved(*drawn((frames, height, width)))


@interpreted_or_on_hopper
@pytest.mark.parametrize("channels", [64, 96])
def test_products_sum_over_all_channels_and_clips_are_apart(channels: int) -> None:
    assert_convolved(*drawn((3, 2, 5), channels, batch=2))


@interpreted_or_on_hopper
def test_what_lies_otherwise_in_memory_is_copied() -> None:
    joined, weight = drawn((2, 3, 4))
    assert torch.equal(convolved(joined.contiguous(), weight.contiguous()), convolved(joined, weight))


@on_hopper
@pytest.mark.parametrize("size", [(4, 480, 832), (4, 704, 1280), (8, 480, 832), (1, 721, 1279), (4, 64, 96)])
def test_sizes_of_videos_as_the_library(size: tuple[int, int, int]) -> None:
    joined, weight = drawn(size, channels=96)
    got = convolved(joined, weight)
    torch.testing.assert_close(got, F.conv3d(joined, weight, padding=(0, 1, 1)), atol=0.03, rtol=0.01)
    assert torch.equal(convolved(joined, weight), got)


@on_hopper
@torch.no_grad()
def test_it_can_be_recorded() -> None:
    recorded = parallel.Recorded(convolved)
    for _ in range(3):
        joined, weight = drawn((4, 60, 104), channels=96)
        joined += torch.randn_like(joined)
        assert torch.equal(recorded(joined, weight), convolved(joined, weight))


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((96, 96, 3, 3, 3), torch.float32),
        ((96, 96, 1, 3, 3), torch.bfloat16),
        ((96, 96, 3, 1, 1), torch.bfloat16),
        ((96, 48, 3, 3, 3), torch.bfloat16),
        ((192, 96, 3, 3, 3), torch.bfloat16),
        ((8, 96, 3, 3, 3), torch.bfloat16),
    ],
)
def test_other_weights_are_the_librarys(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert not can_convolve(torch.empty(shape, dtype=dtype, device=DEVICE))


def test_a_weight_that_begins_between_two_places_of_a_descriptor_is_the_librarys() -> None:
    numbers = torch.empty(96 * 96 * 27 + 8, dtype=torch.bfloat16, device=DEVICE)
    assert not can_convolve(numbers[1:-7].view(96, 96, 3, 3, 3))


@pytest.mark.parametrize(
    "capability, hip, is_it", [((9, 0), None, True), ((9, 4), "6.4", False), ((10, 0), None, False)]
)
def test_it_is_for_one_kind_of_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, is_it: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert conv_triton._is_hopper(torch.device("cuda")) == is_it
