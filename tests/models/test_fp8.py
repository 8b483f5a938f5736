"""Linear layers in eight bits answer as their numbers say, multiplied out."""

from dataclasses import replace

import pytest
import torch
from tests import tiny
from torch import nn
from torch.nn import functional

from longtake.models.fp8 import EightBitLinear, dequantised, eight_bit, into_eight_bits, is_eight_bit, product, rows_of
from longtake.models.wan import Attention

STEP = 1 / 16  # of an e4m3 number: half of its last bit, as a share of it
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("width", [1, 2, 40])
@pytest.mark.parametrize("size", [-6, 0, 6])
def test_numbers_keep_their_leading_bits(rows: int, width: int, size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, width) * 10.0**size * torch.logspace(-2, 2, rows)[:, None]
    eight, scale = eight_bit(x)
    assert eight.shape == x.shape and scale.shape == (rows, 1)
    off = (eight.float() * scale - x).abs()
    assert (off <= STEP * x.abs() + scale * 2**-10).all(), "half a bit, or half of the least number there is"
    assert (eight.float().abs().amax(1) == 448).all()


def test_a_row_of_zeros_stays_zero() -> None:
    eight, scale = eight_bit(torch.zeros(2, 3))
    assert not eight.float().any() and scale.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_near_the_one_that_it_stands_for(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 48).to(dtype)
    layer, x = EightBitLinear(plain), torch.randn(2, 3, 5, 64, dtype=dtype)
    want = plain(x)
    got = layer(x)
    assert got.shape == want.shape and got.dtype == dtype
    assert (got - want).norm() < 0.06 * want.norm()
    multiplied_out = dequantised(*eight_bit(x.flatten(0, 2)), *eight_bit(plain.weight), plain.bias, dtype)
    torch.testing.assert_close(got.flatten(0, 2), multiplied_out)
    torch.testing.assert_close(layer.weight, plain.weight.float(), rtol=STEP, atol=1e-3)
    after = layer.after_gelu(x)
    assert (after - plain(functional.gelu(x, approximate="tanh"))).norm() < 0.06 * after.norm()


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("width", [32, 40])
def test_rows_are_made_by_a_kernel_too(gelu: bool, width: int) -> None:
    kernels = pytest.importorskip("longtake.attention.fused_triton")
    torch.manual_seed(0)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    x = (torch.randn(6, width) * torch.logspace(-2, 2, 6)[:, None]).to(place)
    x[5] = 0
    want, want_scale = eight_bit(functional.gelu(x, approximate="tanh") if gelu else x)
    got, scale = kernels.eight_bit_rows(x, gelu=gelu)
    torch.testing.assert_close(scale, want_scale, atol=1e-10, rtol=1e-5)
    got, want = got.float(), want.float()
    if place == "cpu":  # Triton's interpreter loses the carry where a number is rounded up to a power of two
        there = want.abs().log2().frac() != 0
        got, want = got[there], want[there]
    assert ((got - want).abs() <= 2 * STEP * want.abs() + 2**-9).all()
    assert (got != want).float().mean() < 0.02, "but for the last bit of a few, the same"


@needs_gpu
def test_products_on_a_gpu_are_those_multiplied_out() -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in ((90, 64), (48, 64), (48,)))
    numbers = *rows_of(x), *eight_bit(weight), bias, torch.bfloat16
    got, want = product(*numbers), dequantised(*numbers)
    assert (got.float() - want.float()).norm() < 1e-2 * want.float().norm()


def test_a_network_keeps_what_is_sensitive_and_streams_on() -> None:
    plain, quick = tiny.engine(), tiny.engine()
    assert not is_eight_bit(quick.network) and quick.circumstances["dtype"] == "float32"
    into_eight_bits(quick.network)
    into_eight_bits(quick.network)  # a second time changes nothing
    assert is_eight_bit(quick.network) and quick.circumstances["dtype"] == "fp8"
    eight = {name for name, one in quick.network.named_modules() if isinstance(one, EightBitLinear)}
    assert len(eight) == 8 * 3 and all(name.startswith("blocks.") for name in eight)
    assert isinstance(quick.network.layers[0].cross_attn, Attention)
    assert all(isinstance(quick.network.layers[0].cross_attn.get_submodule(name), nn.Linear) for name in "kv")
    with plain.stream("a ball") as one, quick.stream("a ball") as other:
        for _ in range(5):
            want, got = (next(stream).frames.astype(float) for stream in (one, other))
            assert 0 < abs(got - want).mean() < 3


def test_takes_and_types_leave_the_bytes_alone() -> None:
    made = tiny.engine()
    into_eight_bits(made.network)
    before = made.weights
    made.to(torch.bfloat16)
    again = replace(made)
    assert again.weights == before and made.network.layers[0].ffn[0].bytes_OI.dtype == torch.uint8
