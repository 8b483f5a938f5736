"""Every fast function equals its definition, gradients included."""

import pytest
import torch
from torch import Tensor

from longtake.attention import dense, reference, rope


def value_and_grads(function, tensors: list[Tensor]) -> list[Tensor]:
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    direction = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), tensors)]


def assert_alike(fast, slow, tensors: list[Tensor]) -> None:
    for got, want in zip(value_and_grads(fast, tensors), value_and_grads(slow, tensors), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("queries, keys", [(1, 1), (63, 100), (64, 256)])
@pytest.mark.parametrize("masked", [False, True])
def test_dense_attention_equals_its_definition(queries: int, keys: int, masked: bool) -> None:
    torch.manual_seed(queries)
    q, k, v = torch.randn(2, queries, 3, 8), torch.randn(2, keys, 3, 8), torch.randn(2, keys, 3, 8)
    mask = torch.rand(queries, keys) < 0.6 if masked else None
    if mask is not None:
        mask[:, 0] = True  # no query without keys
    assert_alike(lambda q, k, v: dense.dense(q, k, v, mask), lambda q, k, v: reference.dense(q, k, v, mask), [q, k, v])


@pytest.mark.parametrize("split", [(44, 42, 42), (8, 0, 4)])
@pytest.mark.parametrize("frames", [(), (3,), (0, 7.5, -3.25, 40_000_000)])
def test_a_rotation_is_that_of_its_angles(frames: tuple[float, ...], split: tuple[int, int, int]) -> None:
    axes = rope.RotaryAxes(split=split)
    angles, rotation = axes.angles(frames, 5, 7), axes.rotation(frames, 5, 7, "cpu")
    assert torch.equal(rotation.cos_TA, angles.cos().float()) and torch.equal(rotation.sin_TA, angles.sin().float())


def test_angles_are_the_published_ones_in_double_precision() -> None:
    """From fast to slow on every axis, at a frame that float32 would miss."""
    places = (40_000_001, 8), (2, 4), (3, 4)  # of the last token on each axis, and how many numbers that has
    expected = [at * 10_000 ** (-i / size) for at, size in places for i in range(0, size, 2)]
    angles = rope.RotaryAxes(split=(8, 4, 4)).angles([40_000_001], 3, 4)
    assert angles[-1].tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("split", [(8, 4, 4), (24, 20, 20)])  # the second fills whole registers
@pytest.mark.parametrize("frames", [(0,), (5, 6, 7), (0, 1, 40_000_000)])
def test_rotation_equals_its_definition(frames: tuple[int, ...], split: tuple[int, int, int]) -> None:
    axes = rope.RotaryAxes(split=split)
    angles = axes.angles(frames, 2, 3)
    x = torch.randn(2, len(frames) * 6, 3, sum(split), generator=torch.Generator().manual_seed(0))
    rotation = axes.rotation(frames, 2, 3, "cpu")
    assert_alike(lambda x: rope.rotate(x, rotation), lambda x: reference.rotate(x, angles), [x])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [16, 64])  # the second fills whole registers
def test_where_positions_are_0_nothing_is_turned_or_rounded(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 2, size + 1, dtype=torch.float64)[..., 1:].to(dtype)  # float64: part of another tensor
    turned = rope.rotate(x, rope.RotaryAxes(split=rope.split_like_wan(size)).rotation([0, 0, 0], 1, 1, "cpu"))
    assert turned.dtype == dtype and torch.equal(turned, x)


def test_only_distances_between_positions_matter_even_after_a_year() -> None:
    axes = rope.RotaryAxes(split=(8, 4, 4))
    q, k = torch.randn(2, 1, 6, 1, 16, generator=torch.Generator().manual_seed(0))
    scores = [
        (rope.rotate(q, axes.rotation([shift + 2], 2, 3, "cpu")) * rope.rotate(k, axes.rotation([shift], 2, 3, "cpu")))
        .sum(-1)
        for shift in (0, 365 * 24 * 3600 * 4)
    ]  # fmt: skip
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-4)


def test_many_small_rotations_are_remembered_and_few_large_ones() -> None:
    """A recorded training step asks for dozens again; positions that grow with a stream must not fill memory."""
    made: list[int] = []

    def make(numbers: int) -> rope.Rotation:
        made.append(numbers)
        return rope.Rotation(torch.zeros(numbers), torch.zeros(numbers))

    latest = rope._Latest(make, most_bytes=8 * 100)
    for numbers in (*range(1, 13), *range(12, 0, -1)):
        latest(numbers)
    assert made == list(range(1, 13))  # 8 x 78 bytes
    latest(40)  # those that were not asked for longest make room for it
    latest(1), latest(12)
    assert made == [*range(1, 13), 40, 12]
    latest(1000)  # more than all that may be: it alone stays
    latest(1000), latest(1)
    assert made == [*range(1, 13), 40, 12, 1000, 1]


@pytest.mark.parametrize("head, split", [(128, (44, 42, 42)), (64, (24, 20, 20)), (20, (8, 6, 6))])
def test_a_head_is_shared_among_the_axes_as_published(head: int, split: tuple[int, int, int]) -> None:
    assert rope.split_like_wan(head) == split


def test_axes_of_odd_size_are_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        rope.RotaryAxes(split=(3, 4, 4))
