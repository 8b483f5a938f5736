"""Choosing blocks of keys, and reading the chosen ones as the definition does."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention.test_attention import assert_alike
from torch import Tensor

from longtake.attention import block_sparse, reference


class Case(NamedTuple):
    """Tensors whose last blocks may be short, and the sizes of blocks."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: dict[str, int]

    def chosen(self, share: float) -> Tensor:
        return reference.best_blocks(reference.block_scores(self.q, self.k, **self.blocks), share)


def case(
    queries: int, keys: int, block_q: int, block_k: int, *, batch: int = 2, heads: int = 2, head_dim: int = 8,
    seed: int = 0,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, count, heads, head_dim, generator=generator) for count in (queries, keys, keys))
    return Case(q, k, v, {"block_q": block_q, "block_k": block_k})


SIZES = st.integers(1, 40)
CASES = st.builds(case, SIZES, SIZES, st.integers(1, 12), st.integers(1, 12), seed=st.integers(0, 99))
SHARES = st.floats(0.01, 1)
SCORES = [0.0, -0.0, 1e-40, 1.5, -1.5, -1e9, 3e38, -3e38, float("nan")]
FEW = settings(deadline=None, max_examples=40)


@given(it=CASES, centre_heads=st.booleans())
@FEW
def test_scores_equal_their_definition(it: Case, centre_heads: bool) -> None:
    fast, slow = (
        functions.block_scores(it.q, it.k, centre_heads=centre_heads, **it.blocks)
        for functions in (block_sparse, reference)
    )
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


@given(it=CASES, share=SHARES)
@FEW
def test_reading_the_chosen_equals_its_definition_with_gradients(it: Case, share: float) -> None:
    chosen = it.chosen(share)
    assert_alike(
        lambda q, k, v: block_sparse.attend_blocks(q, k, v, chosen, **it.blocks),
        lambda q, k, v: reference.attend_blocks(q, k, v, chosen, **it.blocks),
        [*it[:3]],
    )


@pytest.mark.parametrize("way", [block_sparse.attend_gathered, block_sparse.attend_masked])
@given(it=CASES, share=SHARES)
@FEW
def test_copied_or_under_a_mask_the_chosen_are_read_alike(way: Callable[..., Tensor], it: Case, share: float) -> None:
    chosen = it.chosen(share)
    assert_alike(
        lambda q, k, v: way(q, k, v, chosen, **it.blocks),
        lambda q, k, v: reference.attend_blocks(q, k, v, chosen, **it.blocks),
        [*it[:3]],
    )


@pytest.mark.parametrize(
    "way, most, kernel, one, pieces",
    [
        ("attend_masked", "MASKED_AT_ONCE", "by_torch", 2 * 2 * 4 * 50, 6),  # a mask of a query block, in both clips
        ("attend_gathered", "GATHERED_AT_ONCE", "scaled_dot_product_attention", 2 * 6 * 8, 24),  # two key blocks' keys
    ],
)
def test_query_blocks_are_read_as_many_at_once_as_there_is_room_for_and_never_none(
    way: str, most: str, kernel: str, one: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    it, calls, run = case(23, 50, 4, 6), [], getattr(block_sparse, kernel)
    chosen, attend = it.chosen(0.3), getattr(block_sparse, way)
    whole = attend(*it[:3], chosen, **it.blocks)
    monkeypatch.setattr(block_sparse, kernel, lambda *given: calls.append(kernel) or run(*given))
    for room, expected in ((1, pieces), (one, pieces), (2 * one, pieces // 2)):
        monkeypatch.setattr(block_sparse, most, room)
        calls.clear()
        torch.testing.assert_close(attend(*it[:3], chosen, **it.blocks), whole)
        assert len(calls) == expected


@pytest.mark.parametrize(
    "block, share, dtype, way",
    [
        (4, 0.2, torch.float32, "attend_masked"),
        (12, 0.2, torch.float32, "attend_gathered"),
        (12, 0.6, torch.float32, "attend_masked"),
        (4, 0.2, torch.bfloat16, "attend_gathered"),
    ],
)
def test_many_small_blocks_are_read_under_a_mask(
    block: int, share: float, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = case(24, 240, block, block)
    monkeypatch.setattr(block_sparse, way, lambda *given, **sizes: way)
    assert block_sparse.attend_blocks(*(x.to(dtype) for x in it[:3]), it.chosen(share), **it.blocks) == way


@given(it=CASES, share=SHARES)
@FEW
def test_reading_the_chosen_in_bfloat16_is_off_by_its_rounding(it: Case, share: float) -> None:
    chosen = it.chosen(share)
    q, k, v = (x.bfloat16().requires_grad_() for x in it[:3])
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    read = block_sparse.attend_blocks(q, k, v, chosen, **it.blocks)
    expected = reference.attend_blocks(*exact, chosen, **it.blocks)
    towards = torch.ones_like(expected)
    gradients = torch.autograd.grad(read, (q, k, v), towards.to(read)), torch.autograd.grad(expected, exact, towards)
    for fast, slow in zip((read, *gradients[0]), (expected, *gradients[1]), strict=True):
        assert (fast.double() - slow).norm() <= 0.02 * (slow.norm() + exact[2].norm())


@pytest.mark.parametrize("keys", [4680, 9360, 14040])  # of the first, the second and later blocks at 480p
def test_published_windows_equal_their_definition_with_gradients(keys: int) -> None:
    it = case(72, keys, 64, 64, batch=1, heads=1, head_dim=16)
    assert_alike(
        lambda q, k, v: block_sparse.block_sparse(q, k, v, share=0.2, **it.blocks),
        lambda q, k, v: reference.attend_blocks(q, k, v, it.chosen(0.2), **it.blocks),
        [*it[:3]],
    )


@given(it=CASES, share=SHARES)
@FEW
def test_choosing_and_reading_in_one_is_one_after_the_other(it: Case, share: float) -> None:
    assert_alike(
        lambda q, k, v: block_sparse.block_sparse(q, k, v, share=share, **it.blocks),
        lambda q, k, v: reference.attend_blocks(q, k, v, it.chosen(share), **it.blocks),
        [*it[:3]],
    )


@given(it=CASES)
@FEW
def test_all_blocks_are_dense_attention(it: Case) -> None:
    everything = it.chosen(1.0)
    for fast in (
        lambda q, k, v: block_sparse.block_sparse(q, k, v, share=1.0, **it.blocks),
        lambda q, k, v: block_sparse.attend_blocks(q, k, v, everything, **it.blocks),
    ):
        assert_alike(fast, reference.dense, [*it[:3]])


@given(it=CASES, share=SHARES)
@FEW
def test_two_clips_at_once_are_two_clips(it: Case, share: float) -> None:
    together = block_sparse.block_sparse(*it[:3], share=share, **it.blocks)
    for b in range(2):
        alone = block_sparse.block_sparse(*(x[b : b + 1] for x in it[:3]), share=share, **it.blocks)
        torch.testing.assert_close(together[b : b + 1], alone, atol=1e-5, rtol=1e-5)


@given(it=CASES, share=SHARES)
@FEW
def test_the_chosen_are_a_share_in_rising_order_and_never_none(it: Case, share: float) -> None:
    scores = block_sparse.block_scores(it.q, it.k, **it.blocks)
    chosen = block_sparse.best_blocks(scores, share)
    assert chosen.shape == (*scores.shape[:3], max(1, int(share * scores.shape[-1])))
    assert (chosen.diff(dim=-1) > 0).all()
    dropped = torch.ones_like(scores, dtype=torch.bool).scatter(-1, chosen, False)
    worst_kept = scores.gather(-1, chosen).amin(-1, keepdim=True)
    assert (scores.masked_fill(~dropped, float("-inf")) <= worst_kept).all()


@given(
    rows=st.lists(st.lists(st.sampled_from(SCORES), min_size=7, max_size=7)),
    share=st.floats(0.01, 1),
)
def test_the_same_blocks_are_best_ties_included(rows: list[list[float]], share: float) -> None:
    scores = torch.tensor(rows).view(1, 1, -1, 7)
    assert block_sparse.best_blocks(scores, share).equal(reference.best_blocks(scores, share))


@pytest.mark.parametrize("share, expected", [(0.01, [1]), (0.34, [1, 3]), (0.5, [1, 2, 3]), (0.8, [0, 1, 2, 3])])
def test_of_equal_scores_the_earlier_block_is_chosen(share: float, expected: list[int]) -> None:
    scores = torch.tensor([0.0, 2.0, 1.0, 2.0, -1.0, 0.0]).expand(1, 2, 3, -1)
    assert (block_sparse.best_blocks(scores, share) == torch.tensor(expected)).all()


def test_half_precision_is_averaged_and_compared_in_float32() -> None:
    """The second block's mean is above the first's by less than bfloat16 can tell."""
    k = torch.ones(1, 32, 1, 8)
    k[:, 16] += 2**-7
    q, k = torch.ones(1, 16, 1, 8).bfloat16(), k.bfloat16()
    assert k[:, 16:].mean(1).equal(k[:, :16].mean(1))
    scores = block_sparse.block_scores(q, k, block_q=16, block_k=16)
    assert scores.dtype == torch.float32
    assert block_sparse.best_blocks(scores, 0.5).item() == 1


def test_centring_over_tokens_changes_no_choice_and_over_heads_does() -> None:
    it = case(40, 200, 8, 8, heads=3)
    plain = it.chosen(0.2)
    assert plain.equal(it._replace(k=it.k - it.k.mean(dim=1, keepdim=True)).chosen(0.2))
    scores = block_sparse.block_scores(it.q, it.k, centre_heads=True, **it.blocks)
    assert not plain.equal(block_sparse.best_blocks(scores, 0.2))


def test_what_nobody_chose_is_neither_seen_nor_taught() -> None:
    it = case(10, 30, 5, 10)
    chosen = torch.tensor([1]).expand(2, 2, 2, 1)
    k, v = it.k.clone().requires_grad_(), it.v.clone().requires_grad_()
    read = block_sparse.attend_blocks(it.q, k, v, chosen, **it.blocks)
    torch.testing.assert_close(read, reference.dense(it.q, k[:, 10:20], v[:, 10:20]), atol=1e-5, rtol=1e-4)
    for grad in torch.autograd.grad(read.sum(), (k, v)):
        assert not grad[:, :10].any() and not grad[:, 20:].any() and grad[:, 10:20].any()


def test_choosing_leaves_no_gradient_behind() -> None:
    it = case(10, 30, 5, 10)
    assert not block_sparse.block_scores(it.q.requires_grad_(), it.k.requires_grad_(), **it.blocks).requires_grad


@given(it=CASES, share=SHARES, window=st.floats(0, 8))
@FEW
def test_of_fewer_keys_than_a_window_as_many_blocks_are_chosen(it: Case, share: float, window: float) -> None:
    keys, of = it.k.shape[1], max(it.k.shape[1], window * it.q.shape[1])
    assert_alike(
        lambda q, k, v: block_sparse.block_sparse(q, k, v, share=share, full_window=window, **it.blocks),
        lambda q, k, v: reference.attend_blocks(q, k, v, it.chosen(min(1.0, share * of / keys)), **it.blocks),
        [*it[:3]],
    )


@pytest.mark.parametrize("share", [0, -0.2, 1.2])
def test_a_share_is_above_nothing_and_at_most_all(share: float) -> None:
    it = case(10, 30, 5, 10)
    with pytest.raises(ValueError, match=str(share)):
        block_sparse.block_sparse(*it[:3], share=share, **it.blocks)


def test_autocast_changes_no_choice() -> None:
    c = case(24, 60, 6, 6)
    expected = block_sparse.block_scores(c.q, c.k, **c.blocks)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block_sparse.block_scores(c.q, c.k, **c.blocks), expected)
