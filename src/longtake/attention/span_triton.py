# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""Near spans and far sums of a whole clip (ReHyAt, 2601.04342) by kernels whose features never leave the chip.

In plain torch a layer writes and reads the hidden numbers and the features of every token several times, each of them
`degree` times as wide as the tokens are. Here one kernel goes from keys to the sums of each latent frame, and one from
queries, near answers and sums to answers. They know no gradients. Truth: `near_span.parallel` of the features that
`models.features.LearnedForm` makes, under `Shift.LOG_MASS`.

Sums are float32. Products have the type of bfloat16 tokens and add up in float32. Of float32 tokens they are three TF32
ones each, which is nearly exact, of float16 ones, whose range is too small for features, one. Heads are padded to a
power of two; what is beyond is zero.

Shapes: B batch, T tokens (frame-major), N heads, D per head, P degree, R features (P * D), F latent frames, G chunks.
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
_HIDDEN = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}  # numbers at once, as registers have room
_CHUNKS = 16  # at once: what is held beside input and output is theirs, however long the clip


def attended(
    q_BTND: Tensor, k_BTND: Tensor, v_BTND: Tensor, plain_q_BTND: Tensor, plain_k_BTND: Tensor, turned: Rotation,
    queries: PowerWeights, keys: PowerWeights, *, span: NearSpan, tokens: int,
) -> Tensor:  # fmt: skip
    """All chunks of a clip, some at a time; returns [B, T, N, D].

    q, k: rotated. turned: the rotation of what features are made of, of all tokens or, where every frame is turned
    alike, of one frame's. tokens: of a latent frame. ValueError as for `near_span.parallel`.
    """
    chunks = span.chunks(whole_frames(q_BTND.shape[1], tokens))
    out, before = torch.empty_like(q_BTND), None
    for begin in range(0, len(chunks), _CHUNKS):
        some = chunks[begin : begin + _CHUNKS]
        now = slice(some[0].begin * tokens, some[-1].end * tokens)
        near = _near(q_BTND, k_BTND, v_BTND, some, tokens)
        absorbed = range(chunks[begin - 1].near if begin else 0, some[-1].near)
        sums, before = _sums_before(plain_k_BTND, v_BTND, turned, keys, some, absorbed, before, tokens)
        if sums is None:
            out[:, now] = near
        else:
            asked = plain_q_BTND[:, now]
            out[:, now] = answered(near, asked, _part(turned, now, tokens), queries, sums, span.current * tokens)
    return out


class FarSums(NamedTuple):
    """Of frames or chunks X: values by features [B, X, N, R, D], and features [B, X, N, R], float32."""

    kv_BXNRD: Tensor
    k_BXNR: Tensor


def frame_sums(plain_k_BTND: Tensor, v_BTND: Tensor, turned: Rotation, keys: PowerWeights, tokens: int) -> FarSums:
    """The sums of each latent frame by itself. Truth: `linear.sums_of` of a form's `of_keys`, frame by frame."""
    k, v = plain_k_BTND.contiguous(), v_BTND.contiguous()
    (batch, length, heads, size), features = k.shape, keys.out_bias_NR.shape[-1]
    frames = length // tokens
    kv = k.new_empty(batch, frames, heads, features, size, dtype=torch.float32)
    k_sums = k.new_empty(batch, frames, heads, features, dtype=torch.float32)
    _frame_sums[frames * (features // size), batch * heads](
        k, v, *_angles(turned), *_weights(keys, k.dtype), kv, k_sums, length, len(turned.cos_TA), tokens, heads,
        **_sizes(size, features, k.dtype),
    )  # fmt: skip
    return FarSums(kv, k_sums)


def answered(
    near_BTND: Tensor, plain_q_BTND: Tensor, turned: Rotation, queries: PowerWeights, sums: FarSums, chunk: int
) -> Tensor:
    """Near answers joined with what each chunk's sums answer. Truth: `join.under_one_bar`, `linear.weigh`, a form's
    `of_queries`. chunk: tokens of each, of the last one maybe fewer."""
    near, q = near_BTND.contiguous(), plain_q_BTND.contiguous()
    (batch, length, heads, size), features = q.shape, queries.out_bias_NR.shape[-1]
    chunks, out = sums.k_BXNR.shape[1], torch.empty_like(near)
    _answered[chunks * triton.cdiv(chunk, _TILE), batch * heads](
        near, q, *_angles(turned), *_weights(queries, q.dtype), sums.kv_BXNRD.contiguous(), sums.k_BXNR.contiguous(),
        out, length, len(turned.cos_TA), chunk, chunks, heads, **_sizes(size, features, q.dtype),
    )  # fmt: skip
    return out


def _near(q_BTND: Tensor, k_BTND: Tensor, v_BTND: Tensor, chunks: list[Chunk], tokens: int) -> Tensor:
    """Exact attention of each chunk to its near span, those of one length at once."""
    parts: dict[int, Tensor] = {}
    for group in alike(chunks):
        asking, near = [chunks[i].own(tokens) for i in group], [chunks[i].seen(tokens) for i in group]
        answer = dense(stacked(q_BTND, asking), stacked(k_BTND, near), stacked(v_BTND, near))
        parts |= zip(group, answer.unflatten(0, (len(q_BTND), -1)).unbind(1), strict=True)
    return torch.cat([parts[i] for i in range(len(chunks))], dim=1)


def _sums_before(
    plain_k_BTND: Tensor, v_BTND: Tensor, turned: Rotation, keys: PowerWeights,
    chunks: list[Chunk], absorbed: range, before: FarSums | None, tokens: int,
) -> tuple[FarSums | None, FarSums | None]:  # fmt: skip
    """The sums that these chunks read, and those after the last; None where nothing is far.

    before: the sums of all frames before `absorbed`, [B, 1, ...].
    """
    if not absorbed:  # so nothing ever was: each chunk leaves some more behind than the one before
        return None, None
    gone = slice(absorbed.start * tokens, absorbed.stop * tokens)
    new = frame_sums(plain_k_BTND[:, gone], v_BTND[:, gone], _part(turned, gone, tokens), keys, tokens)
    start = FarSums(*(torch.zeros_like(x[:, :1]) for x in new)) if before is None else before
    upto = FarSums(*(torch.cat([old, x], dim=1).cumsum(1) for old, x in zip(start, new, strict=True)))
    places = [max(0, chunk.near - absorbed.start) for chunk in chunks]
    return FarSums(*(x[:, places] for x in upto)), FarSums(*(x[:, -1:] for x in upto))


def _part(turned: Rotation, piece: slice, tokens: int) -> Rotation:
    """The rotation of some whole frames: where it is one frame's, that of any."""
    return turned if len(turned.cos_TA) == tokens else Rotation(*(part[piece] for part in turned))


def _angles(turned: Rotation) -> list[Tensor]:
    return [part.contiguous() for part in turned]


def _weights(weights: PowerWeights, dtype: torch.dtype) -> list[Tensor]:
    """In the type that products have."""
    own = torch.float32 if dtype == torch.float16 else dtype
    return [part.detach().to(own).contiguous() for part in weights]


def _sizes(size: int, features: int, dtype: torch.dtype) -> dict[str, int | str]:
    """The least heads take 4 warps: 8 cut tiles into so many products that uniform registers run out, and `ptxas` 12.8
    takes one that it never wrote for a tile's address, at times an illegal one."""
    padded = max(16, triton.next_power_of_2(size))
    return {
        "HEAD": size, "DEGREE": features // size, "D": padded,
        "TILE": _TILE, "HIDDEN": _HIDDEN[dtype], "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "num_warps": 4 if padded == 16 else 8, "num_stages": 2 if dtype == torch.bfloat16 else 1,
    }  # fmt: skip


@triton.jit
def _placed(token, is_token, length, heads, HEAD: tl.constexpr, D: tl.constexpr):
    """Where the numbers of some tokens of this program's head lie, [TILE, D], and which of them are any."""
    line, dim = tl.program_id(1).to(tl.int64), tl.arange(0, D)
    at = ((line // heads * length + token[:, None]) * heads + line % heads) * HEAD + dim[None, :]
    return at, is_token[:, None] & (dim < HEAD)[None, :]


@triton.jit
def _turned(x_ptr, cos_ptr, sin_ptr, token, length, period, is_token, heads, HEAD: tl.constexpr, D: tl.constexpr):
    """Head vectors [TILE, D], turned, in their own type. Every number is loaded twice: as itself and as the other of
    its pair."""
    at, real = _placed(token, is_token, length, heads, HEAD, D)
    dim = tl.arange(0, D)
    sign = (dim % 2 * 2 - 1)[None, :]
    x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
    pair = tl.load(x_ptr + at - sign, mask=real, other=0.0).to(tl.float32)
    angle = (token % period)[:, None] * (HEAD // 2) + (dim // 2)[None, :]
    cos = tl.load(cos_ptr + angle, mask=real, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=real, other=0.0)
    return (x * cos + pair * sin * sign).to(x_ptr.dtype.element_ty)


@triton.jit
def _times(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, in the type of b."""
    return tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION)


@triton.jit
def _features(
    x, power, hidden_ptr, hidden_bias_ptr, out_ptr, out_bias_ptr, heads,
    HEAD: tl.constexpr, DEGREE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The features of one power, [TILE, D] float32: softplus of the map's output there, to that power."""
    width: tl.constexpr = DEGREE * HEAD
    head, dim = tl.program_id(1) % heads, tl.arange(0, D)
    column = (power - 1) * HEAD + dim
    psi = tl.zeros([TILE, D], tl.float32)
    for begin in range(0, width, HIDDEN):
        place = begin + tl.arange(0, HIDDEN)
        is_place = place < width
        weight_at = head * HEAD * width + dim[:, None] * width + place[None, :]
        weight = tl.load(hidden_ptr + weight_at, mask=(dim < HEAD)[:, None] & is_place[None, :], other=0.0)
        bias = tl.load(hidden_bias_ptr + head * width + place, mask=is_place, other=0.0).to(tl.float32)
        hidden = _times(x, weight, tl.zeros([TILE, HIDDEN], tl.float32), PRECISION) + bias[None, :]
        hidden = 0.5 * hidden * (1 + tl.erf(hidden * 0.7071067811865476))
        weight_at = head * width * width + place[:, None] * width + column[None, :]
        weight = tl.load(out_ptr + weight_at, mask=is_place[:, None] & (dim < HEAD)[None, :], other=0.0)
        psi = _times(hidden, weight, psi, PRECISION)
    psi += tl.load(out_bias_ptr + head * width + column, mask=dim < HEAD, other=0.0).to(tl.float32)[None, :]
    small = tl.exp(-tl.abs(psi))  # its logarithm after 1 + x would round features away that are next to nothing
    log1p = tl.where(small < 1e-3, small * (1 - small / 2), tl.log(1 + small))
    feature = tl.maximum(psi, 0.0) + log1p
    made = feature
    for more in tl.static_range(2, DEGREE + 1):
        made *= tl.where(power >= more, feature, 1.0)
    return made


@triton.jit
def _frame_sums(
    k_ptr, v_ptr, cos_ptr, sin_ptr, hidden_ptr, hidden_bias_ptr, out_ptr, out_bias_ptr, kv_ptr, k_sums_ptr,
    length, period, tokens, heads,
    HEAD: tl.constexpr, DEGREE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of one frame, of one head of one clip, in the features of one power."""
    frame, line, dim = tl.program_id(0) // DEGREE, tl.program_id(1).to(tl.int64), tl.arange(0, D)
    frames = tl.num_programs(0) // DEGREE
    head_at = ((line // heads * frames + frame) * heads + line % heads) * DEGREE * HEAD
    power = tl.program_id(0) % DEGREE + 1
    kv, k_sum = tl.zeros([D, D], tl.float32), tl.zeros([D], tl.float32)
    for begin in range(0, tokens, TILE):
        own = begin + tl.arange(0, TILE)
        token, is_token = frame * tokens + own, own < tokens
        x = _turned(k_ptr, cos_ptr, sin_ptr, token, length, period, is_token, heads, HEAD, D)
        feature = _features(
            x, power, hidden_ptr, hidden_bias_ptr, out_ptr, out_bias_ptr, heads,
            HEAD, DEGREE, D, TILE, HIDDEN, PRECISION,
        )  # fmt: skip
        feature = tl.where(is_token[:, None], feature, 0.0)
        at, real = _placed(token, is_token, length, heads, HEAD, D)
        v = tl.load(v_ptr + at, mask=real, other=0.0).to(out_ptr.dtype.element_ty)
        kv = _times(tl.trans(feature), v, kv, PRECISION)
        k_sum += tl.sum(feature, 0)
    row = head_at + (power - 1) * HEAD + dim
    square = (dim < HEAD)[:, None] & (dim < HEAD)[None, :]
    tl.store(kv_ptr + row[:, None] * HEAD + dim[None, :], kv, mask=square)
    tl.store(k_sums_ptr + row, k_sum, mask=dim < HEAD)


@triton.jit
def _answered(
    near_ptr, q_ptr, cos_ptr, sin_ptr, hidden_ptr, hidden_bias_ptr, out_ptr, out_bias_ptr, kv_ptr, k_sums_ptr, made_ptr,
    length, period, chunk_tokens, chunks, heads,
    HEAD: tl.constexpr, DEGREE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(near + above) / (1 + below) of one tile of a chunk."""
    tiles = tl.cdiv(chunk_tokens, TILE)
    chunk, line, dim = tl.program_id(0) // tiles, tl.program_id(1).to(tl.int64), tl.arange(0, D)
    own = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    token = chunk * chunk_tokens + own
    is_token = (own < chunk_tokens) & (token < length)
    x = _turned(q_ptr, cos_ptr, sin_ptr, token, length, period, is_token, heads, HEAD, D)
    above, below = tl.zeros([TILE, D], tl.float32), tl.zeros([TILE], tl.float32)
    sums_at = ((line // heads * chunks + chunk) * heads + line % heads) * DEGREE * HEAD
    for power in tl.static_range(1, DEGREE + 1):
        feature = _features(
            x, power, hidden_ptr, hidden_bias_ptr, out_ptr, out_bias_ptr, heads,
            HEAD, DEGREE, D, TILE, HIDDEN, PRECISION,
        )  # fmt: skip
        row = sums_at + (power - 1) * HEAD + dim
        square = (dim < HEAD)[:, None] & (dim < HEAD)[None, :]
        kv = tl.load(kv_ptr + row[:, None] * HEAD + dim[None, :], mask=square, other=0.0)
        above = _times(feature, kv.to(out_ptr.dtype.element_ty), above, PRECISION)
        below += tl.sum(feature * tl.load(k_sums_ptr + row, mask=dim < HEAD, other=0.0)[None, :], 1)
    at, real = _placed(token, is_token, length, heads, HEAD, D)
    near = tl.load(near_ptr + at, mask=real, other=0.0).to(tl.float32)
    made = (near + above) / (1 + below)[:, None]
    tl.store(made_ptr + at, made.to(made_ptr.dtype.element_ty), mask=real)
