"""The fused kernels equal the plain code they stand for: compiled where there is a GPU, interpreted elsewhere."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton", reason="triton is not installed (it comes with longtake[dev] on Linux)")

from longtake.attention import fused_triton as kernels
from longtake.attention import join, linear, rope
from longtake.models.wan import Block, RMSNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
drawn = partial(torch.randn, device=DEVICE)

# Of float16 and bfloat16 the last bit, which sums in another order may turn.
TYPES = pytest.mark.parametrize(
    "dtype, last_bit", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
)
BFLOAT16 = pytest.param(
    torch.bfloat16, 1.6e-2, marks=pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter multiplies no bfloat16")
)
# Rows that fill their tile and rows that do not; heads that are no power of two.
WIDTHS = pytest.mark.parametrize("heads, size", [(2, 16), (3, 20), (12, 128)])


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def assert_alike(got: Tensor, want: Tensor, last_bit: float) -> None:
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=last_bit, rtol=2 * last_bit)


def rotation(size: int, frames: tuple[int, ...] = (0, 7, 300)) -> rope.Rotation:
    return rope.RotaryAxes(split=rope.split_like_wan(size)).rotation(frames, 1, 2, DEVICE)


@TYPES
@WIDTHS
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # the smaller, and what keeps a norm from dividing by 0 is seen
def test_queries_and_keys_are_normed_and_turned(
    heads: int, size: int, dtype: torch.dtype, last_bit: float, scale: float
) -> None:
    x, norm = scale * drawn(2, 6, heads * size), RMSNorm(heads * size).to(DEVICE, dtype).requires_grad_(False)
    x, norm.weight.data = x.to(dtype), drawn(heads * size).to(dtype)
    plain = norm(x).unflatten(-1, (heads, size))
    got_turned, got_plain = kernels.norm_rotate_(x.clone(), norm.weight, heads, rotation(size))
    assert_alike(got_plain, plain, last_bit)
    assert_alike(got_turned, rope.rotate(plain, rotation(size)), last_bit)
    assert_alike(kernels.norm_(x.clone(), norm.weight), norm(x), last_bit)


@TYPES
@WIDTHS
def test_held_keys_are_turned(heads: int, size: int, dtype: torch.dtype, last_bit: float) -> None:
    x = drawn(2, 8, heads, size).to(dtype)[:, :6]  # a part of a buffer
    assert_alike(kernels.rotate(x, rotation(size)), rope.rotate(x, rotation(size)), last_bit)


def modulated(dtype: torch.dtype, width: int) -> tuple[Block, list[Tensor]]:
    """A layer; tokens of two clips of three frames, others to add to them, and a level embedding of each frame."""
    block = Block(width, 1, 8).to(DEVICE, dtype).requires_grad_(False)
    block.norm3.weight.data, block.norm3.bias.data = drawn(2, width).to(dtype)
    sizes = [(2, 3, 5, width), (2, 3, 5, width), (2, 3, 6, width)]
    return block, [drawn(*size).to(dtype) for size in sizes]


@TYPES
@pytest.mark.parametrize("width", [64, 60, 1536])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_norms_and_residuals_are_modulated_by_frame(
    width: int, dtype: torch.dtype, last_bit: float, scale: float
) -> None:
    """Against the plain code in float32 of the same rounded numbers: between its steps plain code rounds more often."""
    block, (x, more, levels) = modulated(dtype, width)
    x, more = scale * x, scale * more
    wide = copy.deepcopy(block).float()
    shift, scale_, gate, ffn_shift, ffn_scale, ffn_gate = wide._modulation(levels.float())

    def norm(total: Tensor) -> Tensor:
        """Of what is first rounded, for so it goes on."""
        return functional.layer_norm(total.to(dtype).float(), (width,), eps=1e-6)

    layer, wide_x, wide_more = (levels, block.modulation), x.float(), more.float()
    norm3 = block.norm3.weight, block.norm3.bias
    gated, added = wide_x + gate * wide_more, wide_x + wide_more
    pairs = [
        (kernels.modulate(x, *layer), norm(x) * (1 + scale_) + shift),
        *zip(
            kernels.add_gated_norm(x, more, *layer, *norm3),
            (gated, norm(gated) * wide.norm3.weight + wide.norm3.bias),
            strict=True,
        ),
        *zip(kernels.add_modulate(x, more, *layer), (added, norm(added) * (1 + ffn_scale) + ffn_shift), strict=True),
        (kernels.add_gated(x, more, *layer), wide_x + ffn_gate * wide_more),
    ]
    for got, want in pairs:
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, atol=3 * last_bit, rtol=3 * last_bit)


def assert_sums(got: linear.Sums, want: linear.Sums) -> None:
    """By far less than the last bit of what goes in, whose errors in sums would all be to one side."""
    assert torch.equal(got.mass_B, want.mass_B)
    for one, other in zip(got[:2], want[:2], strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("dtype, last_bit", [(torch.float32, 2e-6), (torch.float16, 2e-3), BFLOAT16])
@pytest.mark.parametrize("tokens, size", [(6, 16), (70, 20), (70, 6), (500, 16), (130, 128)])
def test_what_is_far_is_read_and_added(tokens: int, size: int, dtype: torch.dtype, last_bit: float) -> None:
    """Two clips, of which one has nothing far."""
    q, k, v = drawn(3, 2, tokens, 3, size).to(dtype)
    near = drawn(2, 3, tokens, size).to(dtype).transpose(1, 2)  # as torch's kernels lay their answers down
    turn = rope.RotaryAxes(split=rope.split_like_wan(size)).rotation([9], 1, tokens, DEVICE)
    keys = linear.PAPER.of_keys(k, turn)
    sums = linear.sums_of(keys, v).scaled(torch.tensor([1.0, 0.0], device=DEVICE))
    project = torch.nn.Linear(size, size).to(DEVICE, dtype).requires_grad_(False)
    far = linear.read(sums, linear.PAPER.of_queries(q, turn))
    for old in (None, sums.scaled(0.5)):
        assert_sums(kernels.absorb_far(old, k, v, turn), linear.absorb(old, keys, v))
    want = join.added(near, far, project, sums.mass_B > 0)
    assert_alike(kernels.add_far(near, q, turn, sums, project.weight, project.bias), want, last_bit)
    assert torch.equal(want[1], near[1])
