"""Sums of absorbed tokens answer as the definition does, which sees every token at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention.test_attention import assert_alike
from torch import Tensor

from longtake.attention import join, linear, reference
from longtake.attention.rope import Grid, RotaryAxes, Rotation, fitted, rotate, split_like_wan

GRID = Grid(RotaryAxes(split=(4, 2, 2)), rows=1, columns=1)
FORMS = pytest.mark.parametrize(
    "form", [linear.PAPER, linear.REF_TRAIN, linear.REF_INFER, *(linear.WIDTHS[ratio] for ratio in (0.5, 2, 4))]
)
WIDTHS = pytest.mark.parametrize("ratio, form", linear.WIDTHS.items())


def tokens(count: int, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor, Rotation]:
    """Plain keys, values and their positions, one token a frame."""
    k, v = torch.randn(2, batch, count, 3, 8, generator=torch.Generator().manual_seed(seed))
    return k, v, GRID.rotation(range(count), "cpu")


def absorbed(form: linear.LinearForm, k: Tensor, v: Tensor, rotation: Rotation, sizes: list[int]) -> linear.Sums:
    """The sums of consecutive pieces of these sizes."""
    keys, sums, first = form.of_keys(k, rotation), None, 0
    for size in sizes:
        now = slice(first, first := first + size)
        sums = linear.absorb(sums, linear.Features(*(part[:, now] for part in keys)), v[:, now])
    assert sums is not None
    return sums


def pairs_of(features: int) -> list[int]:
    """By which of a head's four angles the pairs of so many features are turned."""
    return {4: [0, 2], 8: [0, 1, 2, 3], 16: [0, 1, 2, 3] * 2, 32: [0, 1, 2, 3] * 4}[features]


@FORMS
@pytest.mark.parametrize("queries, sizes", [(1, [1]), (5, [63]), (7, [30, 1, 32])])
def test_reading_sums_equals_the_definition_with_gradients(form: linear.LinearForm, queries: int, sizes: list[int]):
    k, v, rotation = tokens(sum(sizes))
    q, _, asked_at = tokens(queries, seed=1)

    def fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear.read(absorbed(form, k, v, rotation, sizes), form.of_queries(q, asked_at))

    def slow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pairs = pairs_of(form.features(8))
        angles, asked = (GRID.axes.angles(range(n), 1, 1)[:, pairs] for n in (len(rotation.cos_TA), queries))
        above_q, above_k = reference.rotate(form.queries(q), asked), reference.rotate(form.keys(k), angles)
        return reference.linear(above_q, form.below(q), above_k, form.below(k), v)

    assert_alike(fast, slow, [q, k, v])


@WIDTHS
def test_features_have_their_number_and_weigh_nothing_below_zero(ratio: float, form: linear.LinearForm) -> None:
    for size in (8, 12, 64, 128):  # 12: no power of two
        features = form.of_keys(
            torch.randn(1, 5, 2, size), RotaryAxes(split=split_like_wan(size)).rotation(range(5), 1, 1, "cpu")
        )
        assert form.features(size) == features.above.shape[-1] == features.below.shape[-1] == ratio * size
        assert features.below.min() >= 0 and features.below.dtype == features.above.dtype == torch.float32
        torch.testing.assert_close(features.above.norm(dim=-1), features.below.norm(dim=-1))


def test_a_form_of_its_own_size_is_the_published_one() -> None:
    assert linear.WIDTHS[1] is linear.PAPER == linear.LinearForm(keys=torch.relu, queries=torch.relu)


def test_wider_maps_hold_what_narrower_ones_see() -> None:
    x = torch.randn(50, 12)
    half, one, two, four = (linear.WIDTHS[ratio].keys(x) for ratio in (0.5, 1, 2, 4))
    assert torch.equal(two[:, :12], one) and torch.equal(four[:, :24], two)
    assert torch.equal(four[:, 24:36:2], half)
    assert torch.equal(two[:, :12] - two[:, 12:], x), "nothing is cut away"
    torch.testing.assert_close(linear.turned(four[:, 24:36] - four[:, 36:]), x, msg="turned twice")


def test_turned_vectors_keep_their_products() -> None:
    x, y = torch.randn(2, 50, 12)
    torch.testing.assert_close((linear.turned(x) * linear.turned(y)).sum(-1), (x * y).sum(-1), atol=1e-5, rtol=1e-5)


@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_neither_order_nor_pieces_matter(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    k, v, rotation = tokens(sum(sizes))
    order = torch.tensor(data.draw(st.permutations(range(sum(sizes)))))
    mixed = Rotation(*(part[order] for part in rotation))
    form = linear.WIDTHS[data.draw(st.sampled_from(sorted(linear.WIDTHS)))]
    expected = absorbed(form, k, v, rotation, [sum(sizes)])
    for got, want in zip(absorbed(form, k[:, order], v[:, order], mixed, sizes), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_batch_is_its_rows() -> None:
    k, v, rotation = tokens(9)
    together = absorbed(linear.PAPER, k, v, rotation, [9])
    rows = [absorbed(linear.PAPER, k[i : i + 1], v[i : i + 1], rotation, [9]) for i in range(2)]
    for got, want in zip(together, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(got, torch.cat(want))
    together, rows[1] = together.scaled(torch.tensor([1.0, 0.2])), rows[1].scaled(0.2)
    queries = linear.PAPER.of_queries(1e-6 * k, rotation)  # so small that what keeps from dividing by 0 is seen
    read = [linear.read(row, linear.Features(*(part[i : i + 1] for part in queries))) for i, row in enumerate(rows)]
    torch.testing.assert_close(linear.read(together, queries), torch.cat(read))


def test_bfloat16_keys_are_summed_in_float32_and_a_thousand_blocks_do_not_drift() -> None:
    form, (k, v, rotation) = linear.PAPER, tokens(8)
    k, v = k.bfloat16(), v.bfloat16()
    keys, sums = form.of_keys(k, rotation), None
    for _ in range(1000):
        sums = linear.absorb(sums, keys, v)
    once = absorbed(form, k, v, rotation, [8])
    assert sums is not None and sums.kv_BNRD.dtype == sums.k_BNR.dtype == torch.float32
    queries = form.of_queries(k, rotation)
    torch.testing.assert_close(linear.read(sums, queries), linear.read(once, queries), atol=1e-4, rtol=1e-4)
    assert sums.mass_B.tolist() == [8000, 8000]


def test_counting_goes_on_where_float32_would_stop() -> None:
    k, v, rotation = tokens(1)
    sums = absorbed(linear.PAPER, k, v, rotation, [1])._replace(mass_B=torch.full((2,), 2.0**24, dtype=torch.float64))
    sums = linear.absorb(sums, linear.PAPER.of_keys(k, rotation), v)
    assert sums.mass_B.tolist() == [2**24 + 1] * 2


def test_what_holds_nothing_answers_nothing_and_the_bias_stays_away() -> None:
    k, v, rotation = tokens(4)
    sums = absorbed(linear.PAPER, k, v, rotation, [4]).scaled(torch.tensor([1.0, 0.0]))
    far = linear.read(sums, linear.PAPER.of_queries(k, rotation))
    assert far[0].all() and not far[1].any()
    near = torch.randn_like(far)
    joined = join.added(near, far, lambda x: x + 5, sums.mass_B > 0)
    torch.testing.assert_close(joined[0], near[0] + far[0] + 5)
    assert torch.equal(joined[1], near[1])


def test_one_token_is_corrected_by_the_delta_rule() -> None:
    """old + k (v - k old) / (1 + stiffness) for a unit key."""
    stiffness, (k, v, rotation) = 0.25, tokens(7)
    old = absorbed(linear.PAPER, k, v, rotation, [7])
    key = linear.Features(*(part[:, :1] for part in linear.PAPER.of_keys(k, rotation)))
    unit = key.above / key.above.norm(dim=-1, keepdim=True)
    error = v[:, :1] - torch.einsum("btnr,bnrd->btnd", unit, old.kv_BNRD)
    expected = old.kv_BNRD + torch.einsum("btnr,btnd->bnrd", unit, error) / (1 + stiffness)
    got = linear.correct(old, key, v[:, :1], stiffness)
    torch.testing.assert_close(got.kv_BNRD, expected, atol=1e-5, rtol=1e-5)
    assert got.mass_B.tolist() == [8, 8]


@WIDTHS
def test_a_corrected_map_is_the_best_whatever_the_order_of_tokens(ratio: float, form: linear.LinearForm) -> None:
    stiffness, (k, v, rotation) = 0.1, tokens(12)
    old, keys = absorbed(form, k, v, rotation, [12]), form.of_keys(k.flip(1), rotation)
    got = linear.correct(old, keys, v, stiffness)
    unit = torch.nn.functional.normalize(keys.above, dim=-1)
    moved = got.kv_BNRD.clone().requires_grad_()
    error = torch.einsum("btnr,bnrd->btnd", unit, moved) - v
    cost = error.square().sum() / 12 + stiffness * (moved - old.kv_BNRD).square().sum()
    assert torch.autograd.grad(cost, moved)[0].abs().max() < 1e-4
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    mixed = linear.correct(old, linear.Features(*(part[:, order] for part in keys)), v[:, order], stiffness)
    torch.testing.assert_close(mixed.kv_BNRD, got.kv_BNRD, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "stiffness, alike, off",
    [
        (1.0, False, 1e-5),
        (0.1, False, 1e-5),
        (0.01, False, 1e-5),
        (0.001, False, 1e-5),
        (0.1, True, 3e-5),
        (0.001, True, 2e-2),
    ],
)
def test_a_corrected_map_is_that_of_a_solver_gradients_included(stiffness: float, alike: bool, off: float) -> None:
    """alike: all keys are one, whose mean square has the largest eigenvalue there is, 1, beside zeros."""
    k, v, rotation = tokens(30)
    if alike:
        k, rotation = k[:, :1].expand_as(k), GRID.rotation([0] * 30, "cpu")
    old = absorbed(linear.PAPER, k, v, rotation, [30])
    k, v = (x.flip(1).clone().requires_grad_() for x in (k, v))

    def solved() -> Tensor:
        unit = torch.nn.functional.normalize(linear.PAPER.of_keys(k, rotation).above, dim=-1).double()
        gram = torch.einsum("btnr,btns->bnrs", unit, unit) / 30 + stiffness * torch.eye(unit.shape[-1])
        error = v - torch.einsum("btnr,bnrd->btnd", unit, old.kv_BNRD.double())
        return old.kv_BNRD + torch.linalg.solve(gram, torch.einsum("btnr,btnd->bnrd", unit, error) / 30)

    expected, got = solved(), linear.correct(old, linear.PAPER.of_keys(k, rotation), v, stiffness).kv_BNRD
    assert (got - expected).abs().max() < off * expected.abs().max()
    towards = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    for one, other in zip(
        torch.autograd.grad(got, (k, v), towards), torch.autograd.grad(expected, (k, v), towards.double()), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-3 * other.abs().max().item(), rtol=1e-3)


def test_a_corrected_map_answers_with_what_was_written_last() -> None:
    """Where sums would answer with the mean of both."""
    k, v, rotation = tokens(4)
    keys = linear.PAPER.of_keys(k, rotation)
    sums = linear.correct(linear.correct(None, keys, -v, 1e-6), keys, v, 1e-6)
    torch.testing.assert_close(linear.recall(sums, keys), v, atol=1e-2, rtol=1e-2)


@WIDTHS
def test_autocast_rounds_nothing(ratio: float, form: linear.LinearForm) -> None:
    k, v, rotation = tokens(12)

    def everything() -> list[Tensor]:
        keys, queries = form.of_keys(k, rotation), form.of_queries(k.flip(1), rotation)
        sums = linear.absorb(linear.sums_of(keys, v), keys, v)
        corrected = linear.correct(sums, keys, v, 0.1)
        return [*sums, *corrected, linear.read(sums, queries), linear.recall(corrected, queries)]

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        assert (k[0, :, 0] @ k[0, :, 0].mT).dtype == torch.bfloat16, "it does round elsewhere"
        for got, want in zip(everything(), expected, strict=True):
            assert got.dtype in (torch.float32, torch.float64) and torch.equal(got, want)


@pytest.mark.parametrize("size", [12, 64, 128])
def test_every_axis_keeps_its_share_of_the_angles(size: int) -> None:
    split = split_like_wan(size)
    axis_of_A = torch.tensor([axis for axis, part in enumerate(split) for _ in range(part // 2)])
    marked = Rotation(axis_of_A[None], axis_of_A[None])
    for features in (size // 2, 2 * size, 4 * size):
        counts = [int((fitted(marked, features).cos_TA == axis).sum()) for axis in range(3)]
        assert sum(counts) == features // 2
        for count, part in zip(counts, split, strict=True):
            assert abs(count - part / 2 * features / size) < 1


def test_the_rotation_of_a_wider_vector_is_that_of_its_parts() -> None:
    x, rotation = torch.randn(1, 6, 2, 16), GRID.rotation(range(6), "cpu")
    parts = [rotate(part, rotation) for part in x.split(8, -1)]
    assert torch.equal(rotate(x, fitted(rotation, 16)), torch.cat(parts, -1))
    assert fitted(rotation, 8) is rotation


@pytest.mark.parametrize("size", [10, 12, 6, 1])
def test_what_no_angles_fit_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"vectors of 8 numbers fit multiples and even parts of that, not {size}"):
        fitted(GRID.rotation(range(3), "cpu"), size)
