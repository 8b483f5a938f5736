"""What watches kernels under Triton's interpreter sees each kind of access outside a tensor, and no other."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it comes with longtake[dev] on Linux)")

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")


@triton.jit
def _read(x_ptr, y_ptr, begin, count, TILE: tl.constexpr):
    own = tl.arange(0, TILE)
    tl.store(y_ptr + own, tl.load(x_ptr + begin + own, mask=own < count, other=0.0))


@triton.jit
def _write(x_ptr, y_ptr, begin, count, TILE: tl.constexpr):
    own = tl.arange(0, TILE)
    tl.store(x_ptr + begin + own, tl.load(y_ptr + own), mask=own < count)


@triton.jit
def _add(x_ptr, y_ptr, begin, count, TILE: tl.constexpr):
    own = tl.arange(0, TILE)
    tl.atomic_add(x_ptr + begin + own, tl.load(y_ptr + own), mask=own < count)


@triton.jit
def _swap(x_ptr, y_ptr, begin, count, TILE: tl.constexpr):
    tl.atomic_cas(x_ptr + begin + count - 1, tl.load(y_ptr), tl.load(y_ptr))


KERNELS = pytest.mark.parametrize("kernel", [_read, _write, _add, _swap], ids=lambda kernel: kernel.fn.__name__[1:])


def launch(kernel: Callable, begin: int, count: int, dtype: torch.dtype = torch.int32) -> None:
    """On the middle five of nine numbers, which are `x`: what lies beside them belongs to the process too."""
    kernel[1,](torch.ones(9, dtype=dtype)[2:7], torch.ones(8, dtype=dtype), begin, count, TILE=8)


@KERNELS
@pytest.mark.parametrize("begin, count", [(0, 5), (3, 2), (0, 1), (4, 1)])
def test_what_lies_within_a_tensor_is_touched(kernel: Callable, begin: int, count: int) -> None:
    launch(kernel, begin, count)


@KERNELS
@pytest.mark.parametrize("begin, count, bytes_", [(0, 6, "20|0 to 23"), (5, 1, "20 to 23"), (-1, 1, "-4 to -1")])
def test_what_lies_beside_it_is_not(kernel: Callable, begin: int, count: int, bytes_: str) -> None:
    with pytest.raises(Exception, match=f"({bytes_}).* of a tensor of 20"):
        launch(kernel, begin, count)


def test_a_tile_does_not_go_over_into_another_tensor() -> None:
    """Neighbours of one storage, as views are."""
    x, y = torch.ones(16).split(8)
    with pytest.raises(Exception, match="16 to 47 of a tensor of 32"):
        _read[1,](x, y, 4, 8, TILE=8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_numbers_are_as_wide_as_they_are(dtype: torch.dtype) -> None:
    launch(_read, 0, 5, dtype)
    with pytest.raises(Exception, match=f"of a tensor of {5 * dtype.itemsize}"):
        launch(_read, 1, 5, dtype)


def test_a_mask_that_allows_nothing_touches_nothing() -> None:
    launch(_read, 1000, 0)


@triton.jit
def _double(tiles, begin):
    tiles.store([begin, 0], tiles.load([begin, 0]) * 2)


def test_tiles_of_a_descriptor_are_looked_at() -> None:
    """They end where it says that its tensor does, which may be beside it."""
    x = torch.ones(9, 4)[2:7]
    _double[1,](TensorDescriptor.from_tensor(x, [2, 4]), 4)
    assert x.sum() == 6 * 4
    with pytest.raises(Exception, match="64 to 95 of a tensor of 80"):
        _double[1,](TensorDescriptor(x, [6, 4], [4, 1], [2, 4]), 4)
