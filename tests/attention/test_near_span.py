"""What is near and what is far stand under one denominator, in every cut of time and at any size of numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention.test_attention import value_and_grads
from torch import Tensor

from longtake.attention import reference
from longtake.attention.dense import dense, massed
from longtake.attention.join import under_one_bar
from longtake.attention.linear import Features, Weighed
from longtake.attention.near_span import NearSpan, Shift, joined, parallel

UNIT_N = torch.tensor([0.5, -1.0], dtype=torch.float64)
SHIFTS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "log mass": (Shift.LOG_MASS, lambda scores: scores.logsumexp(-1, keepdim=True)),
    "top": (Shift.TOP, lambda scores: scores.amax(-1, keepdim=True)),
    "a number a head": (UNIT_N, lambda scores: UNIT_N.view(1, -1, 1, 1).to(scores.dtype)),
}


@st.composite
def cuts(draw: st.DrawFn) -> tuple[NearSpan, int, int]:
    """A span, a number of latent frames (whole chunks or not) and of tokens in each."""
    span = NearSpan(current=draw(st.integers(1, 7)), overlap=draw(st.integers(0, 5)))
    return span, draw(st.integers(1, 16)), draw(st.integers(1, 3))


def drawn(length: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values, and features of both above 0, of two rows and two heads."""
    made = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, length, 2, 4, generator=made, dtype=torch.float64)
    features = torch.rand(2, 2, length, 2, 6, generator=made, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v, *features)]


def in_parallel(span: NearSpan, tokens: int, shift: Shift | Tensor) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor) -> Tensor:
        return parallel(q, k, v, Features(fq, fq), Features(fk, fk), span=span, tokens=tokens, shift=shift)

    return function


def by_definition(span: NearSpan, frames: int, tokens: int, shift: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    near, far = reference.near_and_far(frames, tokens, span.current, span.overlap)

    def function(q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor) -> Tensor:
        return reference.one_bar(q, k, v, torch.einsum("btnr,bsnr->bnts", fq, fk), near, far, shift)

    return function


@given(cut=cuts(), shift=st.sampled_from(sorted(SHIFTS)), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_all_chunks_at_once_equal_the_definition_with_gradients(
    cut: tuple[NearSpan, int, int], shift: str, seed: int
) -> None:
    span, frames, tokens = cut
    ours, theirs = SHIFTS[shift]
    fast, slow = in_parallel(span, tokens, ours), by_definition(span, frames, tokens, theirs)
    tensors = drawn(frames * tokens, seed)
    for got, want in zip(value_and_grads(fast, tensors), value_and_grads(slow, tensors), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    narrow = fast(*(x.float() for x in tensors))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, slow(*tensors).float(), atol=1e-5, rtol=1e-5)


@given(
    frames=st.integers(1, 9), tokens=st.integers(1, 3), more=st.integers(0, 3), shift=st.sampled_from(sorted(SHIFTS))
)
@settings(deadline=None, max_examples=10)
def test_a_span_as_long_as_the_sequence_is_dense_attention(frames: int, tokens: int, more: int, shift: str) -> None:
    q, k, v, fq, fk = drawn(frames * tokens)
    for span in (NearSpan(current=frames + more, overlap=0), NearSpan(current=1, overlap=frames + more - 1)):
        got = in_parallel(span, tokens, SHIFTS[shift][0])(q, k, v, fq, fk)
        allowed = reference.near_and_far(frames, tokens, span.current, span.overlap)[0]
        torch.testing.assert_close(got, reference.dense(q, k, v, allowed), atol=1e-15, rtol=1e-14)
        if span.current >= frames:
            torch.testing.assert_close(got, reference.dense(q, k, v), atol=1e-15, rtol=1e-14)


def test_what_is_near_and_what_is_far_is_everything_up_to_the_end_of_a_chunk() -> None:
    near, far = reference.near_and_far(frames=7, tokens=1, current=3, overlap=1)
    assert [row.nonzero().flatten().tolist() for row in near] == [[0, 1, 2]] * 3 + [[2, 3, 4, 5]] * 3 + [[5, 6]]
    assert [row.nonzero().flatten().tolist() for row in far] == [[]] * 3 + [[0, 1]] * 3 + [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("span", [NearSpan(current=c, overlap=o) for c, o in [(3, 1), (2, 3), (3, 0), (1, 1), (5, 2)]])
def test_only_a_number_a_head_gives_dense_attention_for_every_cut(span: NearSpan) -> None:
    """With far weights that are exp(score - number) exactly: features of as many numbers as there are tokens."""
    frames, tokens = 8, 2
    q, k, v, _, _ = drawn(frames * tokens)
    scores_BTNS = torch.einsum("btnd,bsnd->btns", q, k) / 2
    fq = (scores_BTNS - UNIT_N[:, None]).exp()
    fk = torch.eye(frames * tokens, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1)
    everything = sum(reference.near_and_far(frames, tokens, span.current, span.overlap)) > 0
    expected = reference.dense(q, k, v, everything)
    errors = {
        name: (in_parallel(span, tokens, ours)(q, k, v, fq, fk) - expected).abs().max().item()
        for name, (ours, _) in SHIFTS.items()
    }
    assert errors["a number a head"] < 1e-14 and min(errors["top"], errors["log mass"]) > 0.01


def test_the_printed_shift_weighs_what_is_far_by_the_largest_near_probability() -> None:
    q, k, v, fq, _ = drawn(9)
    far = Weighed(torch.randn_like(v), fq.sum(-1))
    near = massed(q, k, v)
    largest = (near.top_BTN - near.log_mass_BTN).exp()
    expected = (near.out + largest.unsqueeze(-1) * far.above) / (1 + largest * far.below).unsqueeze(-1)
    torch.testing.assert_close(joined(q, k, v, far, Shift.TOP), expected, atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize("shift", SHIFTS)
def test_without_far_mass_what_is_near_comes_back_with_finite_gradients(shift: str) -> None:
    q, k, v, fq, fk = drawn(12)
    span = NearSpan(current=2, overlap=1)
    run = in_parallel(span, 2, SHIFTS[shift][0])
    expected = reference.dense(q, k, v, reference.near_and_far(6, 2, 2, 1)[0])
    torch.testing.assert_close(run(q, k, v, fq, fk * 0), expected, atol=1e-15, rtol=1e-14)
    assert all(x.isfinite().all() for x in value_and_grads(run, [q, k, v, fq, fk * 0]))


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("log_near", [-1e4, -100.0, 0.0, 100.0, 1e4])
@pytest.mark.parametrize("mass", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_no_size_of_masses_overflows(dtype: torch.dtype, atol: float, log_near: float, mass: float) -> None:
    near, far = torch.randn(2, 1, 5, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = near.to(dtype)

    def run(near: Tensor, above: Tensor, below: Tensor, log_near: Tensor) -> Tensor:
        return under_one_bar(near, Weighed(above, below), log_near)

    narrow = [near, far.float() * mass, torch.full((1, 5, 2), mass), torch.full((1, 5, 2), log_near)]
    value, *grads = value_and_grads(run, narrow)
    share = torch.sigmoid(torch.tensor(mass, dtype=torch.float64).log() - log_near)
    assert value.dtype == dtype and all(x.isfinite().all() for x in grads)
    torch.testing.assert_close(value.double(), near.double() + share * (far - near.double()), atol=atol, rtol=atol)


@pytest.mark.parametrize("size", [1.0, 100.0])
@pytest.mark.parametrize("shift", SHIFTS)
def test_scores_far_beyond_what_exp_can_take_do_no_harm(shift: str, size: float) -> None:
    q, k, v, fq, fk = drawn(12)
    ours, theirs = SHIFTS[shift]
    span, narrow = NearSpan(current=2, overlap=1), [x.float() for x in (q * size, k * size, v, fq, fk)]
    found = value_and_grads(in_parallel(span, 2, ours), narrow)
    assert all(x.isfinite().all() for x in found)
    if size == 1:
        expected = by_definition(span, 6, 2, theirs)(q, k, v, fq, fk)
        torch.testing.assert_close(found[0], expected.float(), atol=1e-5, rtol=1e-5)


@given(current=st.integers(1, 5), frames=st.integers(1, 9), tokens=st.integers(1, 3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_without_an_exact_part_all_up_to_the_end_of_a_chunk_is_read_from_sums(
    current: int, frames: int, tokens: int, seed: int
) -> None:
    seen = reference.near_and_far(frames, tokens, current, 0)
    tensors = drawn(frames * tokens, seed)

    def defined(q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor) -> Tensor:
        return reference.far_alone(v, torch.einsum("btnr,bsnr->bnts", fq, fk), seen[0] | seen[1]) + 0 * (q + k)

    for shift in SHIFTS.values():
        fast = in_parallel(NearSpan(current=current, overlap=0, exact=False), tokens, shift[0])
        found = value_and_grads(lambda q, k, *x, fast=fast: fast(q, k, *x) + 0 * (q + k), tensors)
        for got, want in zip(found, value_and_grads(defined, tensors), strict=True):
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing overlaps, got an overlap of 1"):
        NearSpan(current=3, overlap=1, exact=False)
    for current, overlap in ((0, 1), (3, -1)):
        with pytest.raises(ValueError, match=f"got {current} and {overlap}"):
            NearSpan(current=current, overlap=overlap)
    with pytest.raises(ValueError, match="7 tokens are no whole number of latent frames of 3"):
        in_parallel(NearSpan(current=1, overlap=0), 3, Shift.LOG_MASS)(*drawn(7))


def test_a_fused_answer_and_one_that_tells_its_mass_are_the_same() -> None:
    q, k, v, _, _ = drawn(9)
    near = massed(q, k, v)
    torch.testing.assert_close(near.out, dense(q, k, v), atol=1e-15, rtol=1e-14)


def test_masses_are_told_in_float32_whatever_comes_in_and_under_autocast_too() -> None:
    narrow = drawn(9, dtype=torch.bfloat16)[:3]
    wide = [x.float() for x in narrow]
    expected, rounded = massed(*wide), massed(*narrow)
    assert rounded.out.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        again = massed(*wide)
    for got in (again, rounded):
        torch.testing.assert_close(got.log_mass_BTN, expected.log_mass_BTN)
        torch.testing.assert_close(got.top_BTN, expected.top_BTN)
    torch.testing.assert_close(again.out, expected.out)
