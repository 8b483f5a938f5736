# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""Near spans and far sums of a whole clip (ReHyAt, 2601.04342) by kernels, some chunks at a time.

In plain torch a layer writes and reads the hidden numbers and the features of every token several times, in float32,
each of them `degree` times as wide as the tokens are. Here one kernel goes from tokens to features, written once in the
type that products have, one from those of keys to the sums of each latent frame, and one from those of queries, near
answers and sums to answers. They know no gradients. Truth: `near_span.parallel` of the features that
`models.features.LearnedForm` makes, under `Shift.LOG_MASS`.

Sums are float32. Products have the type of bfloat16 tokens and add up in float32. Of float32 tokens they are three TF32
ones each, which is nearly exact, of float16 ones, whose range is too small for features, one. Heads are padded to a
power of two; what is beyond is zero.

Shapes: B batch, T tokens (frame-major), N heads, D per head, R features (degree * D), F latent frames.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.attention.dense import dense
from longtake.attention.near_span import Chunk, NearSpan, PowerWeights, alike, stacked, whole_frames
from longtake.attention.rope import Rotation

_TILE = 64  # tokens of a head
_HIDDEN = 32  # numbers of a map's hidden layer at once
_CHUNKS = 8  # at once: what is held beside input and output is theirs, however long the clip


class Blocks(NamedTuple):
    """Features at once, as registers have room: of those that are made, summed, and read."""

    made: int
    summed: int
    read: int


_BLOCKS = {torch.bfloat16: Blocks(made=256, summed=128, read=64), torch.float32: Blocks(made=64, summed=64, read=32)}
"""By the type that products have."""


def attended(
    q_BTND: Tensor, k_BTND: Tensor, v_BTND: Tensor, plain_q_BTND: Tensor, plain_k_BTND: Tensor, turned: Rotation,
    queries: PowerWeights, keys: PowerWeights, *, span: NearSpan, tokens: int,
) -> Tensor:  # fmt: skip
    """All chunks of a clip, some at a time; returns [B, T, N, D].

    q, k: rotated. turned: the rotation of what features are made of, of all tokens or, where every frame is turned
    alike, of one frame's. tokens: of a latent frame. ValueError as for `near_span.parallel`.
    """
    span.require_exact("a fused kernel")
    chunks = span.chunks(whole_frames(q_BTND.shape[1], tokens))
    out, before = q_BTND.new_empty(q_BTND.shape), None
    for begin in range(0, len(chunks), _CHUNKS):
        some = chunks[begin : begin + _CHUNKS]
        _answer_near(out, q_BTND, k_BTND, v_BTND, some, tokens)
        if reading := [chunk for chunk in some if chunk.near]:
            absorbed = range(chunks[begin - 1].near if begin else 0, some[-1].near)
            sums, before = _sums_before(plain_k_BTND, v_BTND, turned, keys, reading, absorbed, before, tokens)
            now = slice(reading[0].begin * tokens, reading[-1].end * tokens)
            asked = features(plain_q_BTND[:, now], _part(turned, now, tokens), queries)
            join_(out[:, now], asked, sums, span.current * tokens)
    return out


class FarSums(NamedTuple):
    """Of frames or chunks X: values by features [B, X, N, R, D], and features [B, X, N, R], float32."""

    kv_BXNRD: Tensor
    k_BXNR: Tensor


def features(plain_BTND: Tensor, turned: Rotation, weights: PowerWeights) -> Tensor:
    """[B, T, N, R], in the type that products have. Truth: a form's `of_keys` or `of_queries`."""
    (batch, length, heads, size), x = plain_BTND.shape, _lines(plain_BTND)
    own, width = _product_type(x.dtype), weights.out_bias_NR.shape[-1]
    block, made = _block(width, _BLOCKS[own].made), x.new_empty(batch, length, heads, width, dtype=own)
    angles, parts = (part.contiguous() for part in turned), (part.detach().to(own).contiguous() for part in weights)
    _features[triton.cdiv(length, _TILE) * triton.cdiv(width, block), batch * heads](
        x, *angles, *parts, made, length, x.stride(0) // (heads * size), len(turned.cos_TA), heads,
        BLOCK=block, HIDDEN=_HIDDEN, **_sizes(size, width, x.dtype),
    )  # fmt: skip
    return made


def frame_sums(features_BTNR: Tensor, v_BTND: Tensor, tokens: int) -> FarSums:
    """The sums of each latent frame by itself. Truth: `linear.sums_of`, frame by frame."""
    (batch, length, heads, size), v, width = v_BTND.shape, _lines(v_BTND), features_BTNR.shape[-1]
    frames, block = length // tokens, _block(width, _BLOCKS[features_BTNR.dtype].summed)
    kv = v.new_empty(batch, frames, heads, width, size, dtype=torch.float32)
    k_sums = v.new_empty(batch, frames, heads, width, dtype=torch.float32)
    _frame_sums[frames * triton.cdiv(width, block), batch * heads](
        features_BTNR, v, kv, k_sums, length, v.stride(0) // (heads * size), tokens, heads,
        BLOCK=block, **_sizes(size, width, v.dtype),
    )  # fmt: skip
    return FarSums(kv, k_sums)


def join_(near_BTND: Tensor, features_BTNR: Tensor, sums: FarSums, chunk: int) -> None:
    """Near answers, in place, joined with what each chunk's sums answer to its queries' features.

    Truth: `join.under_one_bar`, `linear.weigh`. chunk: tokens of each, of the last one maybe fewer. The heads of a
    token, and the tokens of a clip, lie side by side.
    """
    (batch, length, heads, size), width = near_BTND.shape, features_BTNR.shape[-1]
    kv, chunks = sums.kv_BXNRD.to(features_BTNR.dtype).contiguous(), sums.k_BXNR.shape[1]
    _join[chunks * triton.cdiv(chunk, _TILE), batch * heads](
        near_BTND, features_BTNR, kv, sums.k_BXNR.contiguous(), length, near_BTND.stride(0) // (heads * size),
        chunk, chunks, heads, BLOCK=_block(width, _BLOCKS[kv.dtype].read), **_sizes(size, width, near_BTND.dtype),
    )  # fmt: skip


def _answer_near(
    out_BTND: Tensor, q_BTND: Tensor, k_BTND: Tensor, v_BTND: Tensor, chunks: list[Chunk], tokens: int
) -> None:
    """Exact attention of each chunk to its near span, those of one length at once, to its place in `out`."""
    for group in alike(chunks):
        asking, near = [chunks[i].own(tokens) for i in group], [chunks[i].seen(tokens) for i in group]
        answer = dense(stacked(q_BTND, asking), stacked(k_BTND, near), stacked(v_BTND, near))
        now = slice(asking[0].start, asking[-1].stop)
        out_BTND[:, now] = answer.unflatten(0, (len(q_BTND), -1)).flatten(1, 2)


def _sums_before(
    plain_k_BTND: Tensor, v_BTND: Tensor, turned: Rotation, keys: PowerWeights,
    chunks: list[Chunk], absorbed: range, before: FarSums | None, tokens: int,
) -> tuple[FarSums, FarSums]:  # fmt: skip
    """The sums that these chunks read, and those after the last.

    before: the sums of all frames before `absorbed`, [B, 1, ...].
    """
    gone = slice(absorbed.start * tokens, absorbed.stop * tokens)
    new = frame_sums(features(plain_k_BTND[:, gone], _part(turned, gone, tokens), keys), v_BTND[:, gone], tokens)
    start = FarSums(*(torch.zeros_like(x[:, :1]) for x in new)) if before is None else before
    upto = FarSums(*(torch.cat([old, x], dim=1).cumsum(1) for old, x in zip(start, new, strict=True)))
    places = [chunk.near - absorbed.start for chunk in chunks]
    return FarSums(*(x[:, places] for x in upto)), FarSums(*(x[:, -1:] for x in upto))


def _part(turned: Rotation, piece: slice, tokens: int) -> Rotation:
    """The rotation of some whole frames: where it is one frame's, that of any."""
    return turned if len(turned.cos_TA) == tokens else Rotation(*(part[piece] for part in turned))


def _lines(x_BTND: Tensor) -> Tensor:
    """The same, copied where the tokens of a clip do not lie side by side; clips may lie apart, as a piece's do."""
    beside = x_BTND[0].is_contiguous() and x_BTND.stride(0) % x_BTND[0, 0].numel() == 0
    return x_BTND if beside else x_BTND.contiguous()


def _product_type(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _block(width: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(width)))


def _sizes(size: int, width: int, dtype: torch.dtype) -> dict[str, int | str]:
    """4 warps, so that two programs share a processor: one computes activations while the other's products run. With 8,
    tiles of the least heads are cut into so many products that uniform registers run out, and `ptxas` 12.8 takes one
    that it never wrote for a tile's address, at times an illegal one."""
    return {
        "HEAD": size, "WIDTH": width, "D": max(16, triton.next_power_of_2(size)), "TILE": _TILE,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "num_warps": 4, "num_stages": 3 if dtype == torch.bfloat16 else 1,
    }  # fmt: skip


@triton.jit
def _row(token, clip, heads):
    """Where this program's head begins in some tokens, in heads. clip: tokens from a clip's first to the next's."""
    line = tl.program_id(1).to(tl.int64)
    return (line // heads * clip + token) * heads + line % heads


@triton.jit
def _times(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, in the type of b."""
    return tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION)


@triton.jit
def _turned(x_ptr, cos_ptr, sin_ptr, token, clip, period, is_token, heads, HEAD: tl.constexpr, D: tl.constexpr):
    """Head vectors [TILE, D], turned, in their own type."""
    TILE: tl.constexpr = token.shape[0]
    dim, pair = tl.arange(0, D)[None, :], tl.arange(0, D // 2)[None, :]
    at = _row(token, clip, heads)[:, None] * HEAD + dim
    x = tl.load(x_ptr + at, mask=is_token[:, None] & (dim < HEAD), other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, [TILE, D // 2, 2]))
    angle, real = (token % period)[:, None] * (HEAD // 2) + pair, is_token[:, None] & (pair < HEAD // 2)
    cos, sin = tl.load(cos_ptr + angle, mask=real, other=0.0), tl.load(sin_ptr + angle, mask=real, other=0.0)
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, [TILE, D]).to(x_ptr.dtype.element_ty)


@triton.jit
def _softplus(x):
    """As near to 0 as it may be, its rounding is a share of itself: log(1 + e) = 2 artanh(e / (2 + e)), by a series."""
    e = tl.exp(-tl.abs(x))
    z = e / (2 + e)
    y = z * z
    series = 1 + y * (1 / 3 + y * (1 / 5 + y * (1 / 7 + y * (1 / 9 + y * (1 / 11)))))
    return tl.maximum(x, 0.0) + 2 * z * series


@triton.jit
def _features(
    x_ptr, cos_ptr, sin_ptr, hidden_ptr, hidden_bias_ptr, out_ptr, out_bias_ptr, made_ptr, length, clip, period, heads,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some features of one tile of tokens: softplus of the map's output, to the power of its place."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    head, dim = tl.program_id(1) % heads, tl.arange(0, D)
    token = tl.program_id(0) // blocks * TILE + tl.arange(0, TILE)
    is_token = token < length
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_column = column < WIDTH
    x = _turned(x_ptr, cos_ptr, sin_ptr, token, clip, period, is_token, heads, HEAD, D)
    psi = tl.zeros([TILE, BLOCK], tl.float32)
    for begin in range(0, WIDTH, HIDDEN):
        place = begin + tl.arange(0, HIDDEN)
        is_place = place < WIDTH
        weight_at = head * HEAD * WIDTH + dim[:, None] * WIDTH + place[None, :]
        weight = tl.load(hidden_ptr + weight_at, mask=(dim < HEAD)[:, None] & is_place[None, :], other=0.0)
        bias = tl.load(hidden_bias_ptr + head * WIDTH + place, mask=is_place, other=0.0).to(tl.float32)
        hidden = _times(x, weight, tl.zeros([TILE, HIDDEN], tl.float32), PRECISION) + bias[None, :]
        hidden = 0.5 * hidden * (1 + tl.erf(hidden * 0.7071067811865476))
        weight_at = head * WIDTH * WIDTH + place[:, None] * WIDTH + column[None, :]
        weight = tl.load(out_ptr + weight_at, mask=is_place[:, None] & is_column[None, :], other=0.0)
        psi = _times(hidden, weight, psi, PRECISION)
    psi += tl.load(out_bias_ptr + head * WIDTH + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    feature = _softplus(psi)
    made = feature
    for more in tl.static_range(1, WIDTH // HEAD):
        made *= tl.where(column[None, :] >= more * HEAD, feature, 1.0)
    at = _row(token, length, heads)[:, None] * WIDTH + column[None, :]
    tl.store(made_ptr + at, made.to(made_ptr.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


@triton.jit
def _frame_sums(
    features_ptr, v_ptr, kv_ptr, k_sums_ptr, length, clip, tokens, heads,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of one frame, of one head of one clip, of some features."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    frame, dim = tl.program_id(0) // blocks, tl.arange(0, D)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    kv, k_sum = tl.zeros([BLOCK, D], tl.float32), tl.zeros([BLOCK], tl.float32)
    for begin in range(0, tokens, TILE):
        own = begin + tl.arange(0, TILE)
        token, is_token = frame * tokens + own, own < tokens
        at = _row(token, length, heads)[:, None] * WIDTH + column[None, :]
        feature = tl.load(features_ptr + at, mask=is_token[:, None] & (column < WIDTH)[None, :], other=0.0)
        at = _row(token, clip, heads)[:, None] * HEAD + dim[None, :]
        v = tl.load(v_ptr + at, mask=is_token[:, None] & (dim < HEAD)[None, :], other=0.0)
        kv = _times(tl.trans(feature), v.to(feature.dtype), kv, PRECISION)
        k_sum += tl.sum(feature.to(tl.float32), 0)
    row = _row(frame, length // tokens, heads) * WIDTH + column
    tl.store(kv_ptr + row[:, None] * HEAD + dim[None, :], kv, mask=(column < WIDTH)[:, None] & (dim < HEAD)[None, :])
    tl.store(k_sums_ptr + row, k_sum, mask=column < WIDTH)


@triton.jit
def _join(
    near_ptr, features_ptr, kv_ptr, k_sums_ptr, length, clip, chunk_tokens, chunks, heads,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(near + above) / (1 + below) of one tile of a chunk."""
    tiles = tl.cdiv(chunk_tokens, TILE)
    chunk, dim = tl.program_id(0) // tiles, tl.arange(0, D)
    own = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    token = chunk * chunk_tokens + own
    is_token = (own < chunk_tokens) & (token < length)
    sums_at = _row(chunk, chunks, heads) * WIDTH
    above, below = tl.zeros([TILE, D], tl.float32), tl.zeros([TILE], tl.float32)
    for begin in range(0, WIDTH, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        is_column = column < WIDTH
        at = _row(token, length, heads)[:, None] * WIDTH + column[None, :]
        feature = tl.load(features_ptr + at, mask=is_token[:, None] & is_column[None, :], other=0.0)
        at = (sums_at + column)[:, None] * HEAD + dim[None, :]
        kv = tl.load(kv_ptr + at, mask=is_column[:, None] & (dim < HEAD)[None, :], other=0.0)
        above = _times(feature, kv, above, PRECISION)
        k_sum = tl.load(k_sums_ptr + sums_at + column, mask=is_column, other=0.0)
        below += tl.sum(feature.to(tl.float32) * k_sum[None, :], 1)
    at = _row(token, clip, heads)[:, None] * HEAD + dim[None, :]
    real = is_token[:, None] & (dim < HEAD)[None, :]
    near = tl.load(near_ptr + at, mask=real, other=0.0).to(tl.float32)
    made = (near + above) / (1 + below)[:, None]
    tl.store(near_ptr + at, made.to(near_ptr.dtype.element_ty), mask=real)
