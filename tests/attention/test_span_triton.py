"""Kernels of near spans and far sums equal the plain code they stand for: compiled on a GPU, interpreted elsewhere."""

from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (it comes with longtake[dev] on Linux)")

from tests.held import Held

from longtake.attention import span_triton
from longtake.attention.linear import Features, sums_of
from longtake.attention.near_span import NearSpan, parallel
from longtake.attention.rope import Grid, RotaryAxes, Rotation, split_like_wan
from longtake.models.features import LearnedForm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, COLUMNS = 2, 3
TOKENS = ROWS * COLUMNS
TYPES = pytest.mark.parametrize(
    "dtype, off",
    [
        (torch.float32, 5e-6), (torch.float16, 2e-3),
        pytest.param(
            torch.bfloat16, 1.2e-2,
            marks=pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter multiplies no bfloat16"),
        ),
    ],
)  # fmt: skip


def form(heads: int, size: int, degree: int) -> LearnedForm:
    torch.manual_seed(0)
    made = LearnedForm(heads, size, degree=degree, far_tokens=20).to(DEVICE).requires_grad_(False)
    for phi in (made.queries, made.keys):
        phi.hidden_bias.normal_()
        phi.out_bias += 0.5  # far answers that weigh about as much as near ones
    return made


def rotations(size: int, frames: int, turns: bool) -> tuple[Rotation, Rotation]:
    """Of all tokens, as the plain code takes it, and as the kernels do."""
    grid = Grid(RotaryAxes(split=split_like_wan(size)), ROWS, COLUMNS)
    every = grid.rotation(range(frames) if turns else [0] * frames, DEVICE)
    return every, every if turns else grid.rotation([0], DEVICE)


def drawn(frames: int, heads: int, size: int, dtype: torch.dtype, batch: int = 2, tokens: int = TOKENS) -> list[Tensor]:
    made = torch.Generator().manual_seed(1)
    return list(torch.randn(5, batch, frames * tokens, heads, size, generator=made).to(DEVICE, dtype))


def assert_near(got: Tensor, want: Tensor, off: float) -> None:
    assert (got.double() - want.double()).norm() <= off * want.double().norm()


@TYPES
@pytest.mark.parametrize(
    "heads, size, degree, current, overlap, frames, turns",
    [(2, 16, 2, 3, 1, 11, False), (1, 20, 1, 2, 3, 9, True), (2, 12, 3, 1, 0, 5, False), (1, 16, 2, 4, 1, 3, False)],
)
def test_a_clip_is_answered_as_in_plain_torch(
    heads: int, size: int, degree: int, current: int, overlap: int, frames: int, turns: bool, dtype: torch.dtype,
    off: float, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Heads that are no power of two, ragged ends, several lots of chunks; against float32, and to rounding."""
    monkeypatch.setattr(span_triton, "_CHUNKS", 2)
    span, maps = NearSpan(current=current, overlap=overlap), form(heads, size, degree)
    q, k, v, plain_q, plain_k = tensors = drawn(frames, heads, size, dtype)
    every, turned = rotations(size, frames, turns)
    got = span_triton.attended(*tensors, turned, maps.queries.weights, maps.keys.weights, span=span, tokens=TOKENS)
    assert got.dtype == dtype and got.shape == q.shape
    features = maps.of_queries(plain_q.float(), every), maps.of_keys(plain_k.float(), every)
    want = parallel(q.float(), k.float(), v.float(), *features, span=span, tokens=TOKENS)
    assert_near(got, want, off)


@TYPES
def test_heads_and_frames_of_many_tiles(dtype: torch.dtype, off: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 128, frames of 1.5 tiles of tokens, two lots of chunks, the last one short."""
    monkeypatch.setattr(span_triton, "_CHUNKS", 2)
    frames, span, grid = 8, NearSpan(current=3, overlap=1), Grid(RotaryAxes(split=split_like_wan(128)), 8, 12)
    tokens, maps = grid.rows * grid.columns, form(2, 128, 2)
    turned, every = (grid.rotation([0] * n, DEVICE) for n in (1, frames))
    q, k, v, plain_q, plain_k = drawn(frames, 2, 128, dtype, batch=1, tokens=tokens)
    weights = maps.queries.weights, maps.keys.weights
    got = span_triton.attended(q, k, v, plain_q, plain_k, turned, *weights, span=span, tokens=tokens)
    features = maps.of_queries(plain_q.float(), every), maps.of_keys(plain_k.float(), every)
    want = parallel(q.float(), k.float(), v.float(), *features, span=span, tokens=tokens)
    for chunk in span.chunks(frames):  # what is near alone, as in the first, must not hide what is wrong in others
        assert_near(got[:, chunk.own(tokens)], want[:, chunk.own(tokens)], off)


@pytest.mark.parametrize("current, overlap", [(3, 1), (2, 5)])
def test_beside_its_answers_no_more_is_held_in_a_longer_clip(
    current: int, overlap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_triton, "_CHUNKS", 2)
    span, maps, beside = NearSpan(current=current, overlap=overlap), form(1, 16, 2), []
    for frames in (18, 36):
        tensors, turned = drawn(frames, 1, 16, torch.float32), rotations(16, frames, False)[1]
        answered = partial(span_triton.attended, span=span, tokens=TOKENS)
        for _ in range(2):  # on a GPU the first call tries kernels of attention
            with Held() as held:
                answer = answered(*tensors, turned, maps.queries.weights, maps.keys.weights)
        beside.append(max(held.after) - answer.nbytes)
    assert beside[0] == beside[1]


def test_a_clip_of_no_whole_frames_is_refused() -> None:
    """As in plain torch; what no chunk holds would be answered with whatever lay in memory."""
    maps, tensors = form(1, 16, 2), [x[:, :-1] for x in drawn(3, 1, 16, torch.float32)]
    span, turned = NearSpan(current=1, overlap=0), rotations(16, 3, False)[1]
    with pytest.raises(ValueError, match=f"{3 * TOKENS - 1} tokens are no whole number of latent frames of {TOKENS}"):
        span_triton.attended(*tensors, turned, maps.queries.weights, maps.keys.weights, span=span, tokens=TOKENS)


@TYPES
def test_sums_are_those_of_each_frame(dtype: torch.dtype, off: float) -> None:
    maps, frames = form(2, 16, 2), 3
    _, _, v, _, plain_k = drawn(frames, 2, 16, dtype)
    every, turned = rotations(16, frames, False)
    got = span_triton.frame_sums(span_triton.features(plain_k, turned, maps.keys.weights), v, TOKENS)
    features = maps.of_keys(plain_k.float(), every).above
    for frame in range(frames):
        now = slice(frame * TOKENS, (frame + 1) * TOKENS)
        want = sums_of(Features(features[:, now], features[:, now]), v[:, now].float())
        assert_near(got.kv_BXNRD[:, frame], want.kv_BNRD, off)
        assert_near(got.k_BXNR[:, frame], want.k_BNR, off)


def test_features_that_are_next_to_nothing_stay_above_it() -> None:
    """A head that was left local weighs 1e-20 or so, not 0 and not a rounding of 1."""
    maps = form(1, 16, 2)
    maps.leave_local([0])
    _, _, v, _, plain_k = drawn(1, 1, 16, torch.float32)
    made = span_triton.features(plain_k, rotations(16, 1, False)[1], maps.keys.weights)
    got = span_triton.frame_sums(made, v, TOKENS).k_BXNR
    want = maps.of_keys(plain_k, rotations(16, 1, False)[0]).below.sum(1)
    assert got.min() > 0
    torch.testing.assert_close(got[:, 0], want, rtol=1e-4, atol=0)
