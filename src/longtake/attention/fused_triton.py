# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""Kernels that read and write each number once, where plain torch goes over it many times. They know no gradients.

Truth: the plain code that each docstring names. Sums and angles are float32; what plain torch rounds between two steps
is rounded here too, but for products that are added at once. A program has one row of the model's width, or tokens of
one head. Tiles are powers of two; what they have beyond a row or a head is read as zero and never written.

Shapes: B batch, F latent frames, T tokens, N heads, D per head, E model width (N * D).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.attention.linear import Sums
from longtake.attention.rope import Rotation

EPS = tl.constexpr(1e-6)
_TOKENS = 64  # of a head that make a tile
_TILES = 7  # that one program sums: 4,680 tokens of 12 heads are two programs for each of an H200's 132 multiprocessors


def norm_rotate_(x_BTE: Tensor, weight_E: Tensor, heads: int, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm over the width, then turned heads: (turned, plain), [B, T, N, D] each; x becomes plain.

    Truth: `models.wan.RMSNorm`, then `rope.rotate`. rotation: of the T tokens.
    """
    (batch, tokens, width), turned = x_BTE.shape, torch.empty_like(x_BTE)
    _norm_rotate[(batch * tokens,)](
        x_BTE, weight_E, *rotation, turned, tokens, width, width // heads // 2, **_launch(width)
    )
    return turned.unflatten(-1, (heads, -1)), x_BTE.unflatten(-1, (heads, -1))


def norm_(x_BTE: Tensor, weight_E: Tensor) -> Tensor:
    """Root-mean-square norm over the width, in place. Truth: `models.wan.RMSNorm`."""
    width = x_BTE.shape[-1]
    _norm[(x_BTE.numel() // width,)](x_BTE, weight_E, width, **_launch(width))
    return x_BTE


def rotate(x_BTND: Tensor, rotation: Rotation) -> Tensor:
    """Truth: `rope.rotate`. rotation: of the T tokens."""
    x, (batch, tokens, heads, size) = x_BTND.contiguous(), x_BTND.shape
    turned, width = torch.empty_like(x), heads * size
    _rotate[(batch * tokens,)](x, *rotation, turned, tokens, width, size // 2, **_launch(width))
    return turned


def modulate(x_BFTE: Tensor, levels_BF6E: Tensor, modulation: Tensor) -> Tensor:
    """Layer norm, scale and shift of each frame: what queries, keys and values are made of.

    Truth: `models.wan.Block.before_attention`, as of the other three `after_attention`. modulation: the layer's own,
    [1, 6, E], on top of the level's: shift, scale, gate, and the same again for the feed-forward part.
    """
    out = torch.empty_like(x_BFTE)
    _by_frame(_modulate, x_BFTE, levels_BF6E, modulation, out)
    return out


def add_gated_norm(
    x_BFTE: Tensor, attended_BFTE: Tensor, levels_BF6E: Tensor, modulation: Tensor, weight_E: Tensor, bias_E: Tensor
) -> tuple[Tensor, Tensor]:
    """x + gate * attended, and its layer norm with weight and bias: what asks the prompt."""
    total, normed = torch.empty_like(x_BFTE), torch.empty_like(x_BFTE)
    _by_frame(_add_gated_norm, x_BFTE, attended_BFTE, levels_BF6E, modulation, weight_E, bias_E, total, normed)
    return total, normed


def add_modulate(x_BFTE: Tensor, read_BFTE: Tensor, levels_BF6E: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    """x + what was read of the prompt, and its modulated norm: what the feed-forward part takes."""
    total, modulated = torch.empty_like(x_BFTE), torch.empty_like(x_BFTE)
    _by_frame(_add_modulate, x_BFTE, read_BFTE, levels_BF6E, modulation, total, modulated)
    return total, modulated


def add_gated(x_BFTE: Tensor, made_BFTE: Tensor, levels_BF6E: Tensor, modulation: Tensor) -> Tensor:
    """x + gate * what the feed-forward part made."""
    total = torch.empty_like(x_BFTE)
    _by_frame(_add_gated, x_BFTE, made_BFTE, levels_BF6E, modulation, total)
    return total


def eight_bit_rows(x_MI: Tensor, *, gelu: bool) -> tuple[Tensor, Tensor]:
    """Rows as e4m3 numbers, and the scale of each, [M, 1] in float32. Truth: `models.fp8.eight_bit`.

    gelu: of its GELU, by tanh.
    """
    x, (rows, width) = x_MI.contiguous(), x_MI.shape
    out, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(rows, 1, dtype=torch.float32)
    _eight_bit_rows[(rows,)](x, out, scale, width, GELU=gelu, **_launch(width))
    return out, scale


def add_far(
    near_BTND: Tensor, plain_q_BTND: Tensor, rotation: Rotation, sums: Sums, weight_DD: Tensor, bias_D: Tensor
) -> Tensor:
    """Near answers plus what absorbed tokens answer, through a projection that heads share; the type of near.

    Truth: `join.added` of `linear.read`, of the form `linear.PAPER`. The sums, less by their mass, go through the
    projection first, so that a token is one product, of that type.
    """
    near, q = near_BTND.contiguous(), plain_q_BTND.contiguous()
    kv, k, mass = (part.contiguous() for part in sums)
    (batch, tokens, heads, size), out = q.shape, torch.empty_like(near)
    wide, precision, columns, tiles = _head_tile(size), _precision(near), 32, 2
    made = near.new_empty(batch, heads, size, size)
    _project[wide // columns, batch * heads](
        kv, mass, weight_DD, made, heads, size, columns, wide, precision, num_warps=4
    )
    _add_far[triton.cdiv(tokens, _TOKENS * tiles), batch * heads](
        near, q, *rotation, made, k, mass, bias_D, out, tokens, heads, size, _TOKENS, tiles, wide, precision,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def absorb_far(sums: Sums | None, k_BTND: Tensor, v_BTND: Tensor, rotation: Rotation) -> Sums:
    """The sums after these tokens too. Truth: `linear.absorb`, of the form `linear.PAPER`.

    Programs sum some tokens each, others add those sums and the old ones, always in one order: bits are the same every
    time. A product takes a feature as two numbers of the values' type, of 16 bits or more together: TF32 would cut it
    off after 10, make every sum too small, and be slower.
    """
    k, v = k_BTND.contiguous(), v_BTND.contiguous()
    batch, tokens, heads, size = k.shape
    if sums is None:
        kv = k.new_zeros(batch, heads, size, size, dtype=torch.float32)
        sums = Sums(kv, torch.zeros_like(kv[:, :, 0]), kv.new_zeros(batch, dtype=torch.float64))
    old = tuple(part.contiguous() for part in sums)
    new = Sums(*(torch.empty_like(part) for part in old))
    count, lines, columns = triton.cdiv(tokens, _TOKENS * _TILES), batch * heads, 512
    parts = k.new_empty(count, lines, size + 1, size, dtype=torch.float32)
    _far_parts[2, lines, count](
        k, v, *rotation, parts, tokens, heads, size, _TOKENS, _TILES, _head_tile(size), num_warps=4, num_stages=2
    )
    _add_parts[triton.cdiv((size + 1) * size, columns), lines](
        parts, *old, *new, tokens, heads, size, count, columns, num_warps=4
    )
    return new


def _head_tile(size: int) -> int:
    """Half of it, the features of one kind, is the least that a product takes."""
    return max(32, triton.next_power_of_2(size))


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _by_frame(kernel: Any, x_BFTE: Tensor, *others: Tensor) -> None:
    """Run over the rows, whose kernel needs to know how many tokens a frame has."""
    width = x_BFTE.shape[-1]
    kernel[(x_BFTE.numel() // width,)](x_BFTE, *others, x_BFTE.shape[2], width, **_launch(width))


def _launch(width: int) -> dict[str, int]:
    """The tile of a row, and how many warps share it: 16 numbers a thread."""
    tile = triton.next_power_of_2(width)
    return {"TILE": tile, "num_warps": min(16, max(1, tile // 512))}


@triton.jit
def _place(WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Where this program's row begins, its columns, and which of a tile's are any."""
    column = tl.arange(0, TILE)
    return tl.program_id(0).to(tl.int64) * WIDTH, column, column < WIDTH


@triton.jit
def _load(x_ptr, column, real):
    return tl.load(x_ptr + column, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _rms_normed(x, weight_ptr, column, real, WIDTH: tl.constexpr):
    return x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + EPS) * _load(weight_ptr, column, real)


@triton.jit
def _turned(x, cos_ptr, sin_ptr, tokens, WIDTH: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr):
    """A row, every head of it turned by its token's angles, of which there are HALF."""
    even, odd = tl.split(tl.reshape(x, [TILE // 2, 2]))
    pair = tl.arange(0, TILE // 2)
    angle = (tl.program_id(0) % tokens) * HALF + pair % HALF
    cos, sin = _load(cos_ptr, angle, pair < WIDTH // 2), _load(sin_ptr, angle, pair < WIDTH // 2)
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [TILE])


@triton.jit
def _norm_rotate(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, turned_ptr, tokens, WIDTH: tl.constexpr, HALF: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    row, column, real = _place(WIDTH, TILE)
    x = _load(x_ptr + row, column, real)
    plain = _rms_normed(x, weight_ptr, column, real, WIDTH).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + row + column, plain, mask=real)
    turned = _turned(plain.to(tl.float32), cos_ptr, sin_ptr, tokens, WIDTH, HALF, TILE)
    tl.store(turned_ptr + row + column, turned.to(x_ptr.dtype.element_ty), mask=real)


@triton.jit
def _norm(x_ptr, weight_ptr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    row, column, real = _place(WIDTH, TILE)
    x = _rms_normed(_load(x_ptr + row, column, real), weight_ptr, column, real, WIDTH)
    tl.store(x_ptr + row + column, x.to(x_ptr.dtype.element_ty), mask=real)


@triton.jit
def _rotate(x_ptr, cos_ptr, sin_ptr, turned_ptr, tokens, WIDTH: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr):
    row, column, real = _place(WIDTH, TILE)
    turned = _turned(_load(x_ptr + row, column, real), cos_ptr, sin_ptr, tokens, WIDTH, HALF, TILE)
    tl.store(turned_ptr + row + column, turned.to(x_ptr.dtype.element_ty), mask=real)


@triton.jit
def _layer_normed(x, real, WIDTH: tl.constexpr):
    apart = tl.where(real, x - tl.sum(x, 0) / WIDTH, 0.0)
    return apart * tl.rsqrt(tl.sum(apart * apart, 0) / WIDTH + EPS)


@triton.jit
def _modulation(which: tl.constexpr, levels_ptr, modulation_ptr, tokens, column, real, WIDTH: tl.constexpr):
    """One of the six rows of this program's frame: the level's, and the layer's own."""
    at = which * WIDTH + column
    frame = (tl.program_id(0) // tokens).to(tl.int64)
    return _load(levels_ptr + frame * 6 * WIDTH, at, real) + _load(modulation_ptr, at, real)


@triton.jit
def _modulated(x, first: tl.constexpr, levels_ptr, modulation_ptr, tokens, column, real, WIDTH: tl.constexpr):
    shift = _modulation(first, levels_ptr, modulation_ptr, tokens, column, real, WIDTH)
    scale = _modulation(first + 1, levels_ptr, modulation_ptr, tokens, column, real, WIDTH)
    return _layer_normed(x, real, WIDTH) * (1 + scale) + shift


@triton.jit
def _modulate(x_ptr, levels_ptr, modulation_ptr, out_ptr, tokens, WIDTH: tl.constexpr, TILE: tl.constexpr):
    row, column, real = _place(WIDTH, TILE)
    x = _load(x_ptr + row, column, real)
    out = _modulated(x, 0, levels_ptr, modulation_ptr, tokens, column, real, WIDTH)
    tl.store(out_ptr + row + column, out.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _add_gated_norm(
    x_ptr, attended_ptr, levels_ptr, modulation_ptr, weight_ptr, bias_ptr, total_ptr, normed_ptr, tokens,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, column, real = _place(WIDTH, TILE)
    gate = _modulation(2, levels_ptr, modulation_ptr, tokens, column, real, WIDTH)
    total = _load(x_ptr + row, column, real) + gate * _load(attended_ptr + row, column, real)
    total = total.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row + column, total, mask=real)
    normed = _layer_normed(total.to(tl.float32), real, WIDTH) * _load(weight_ptr, column, real)
    normed += _load(bias_ptr, column, real)
    tl.store(normed_ptr + row + column, normed.to(normed_ptr.dtype.element_ty), mask=real)


@triton.jit
def _add_modulate(
    x_ptr, read_ptr, levels_ptr, modulation_ptr, total_ptr, out_ptr, tokens, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    row, column, real = _place(WIDTH, TILE)
    total = _load(x_ptr + row, column, real) + _load(read_ptr + row, column, real)
    total = total.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row + column, total, mask=real)
    out = _modulated(total.to(tl.float32), 3, levels_ptr, modulation_ptr, tokens, column, real, WIDTH)
    tl.store(out_ptr + row + column, out.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _add_gated(x_ptr, made_ptr, levels_ptr, modulation_ptr, total_ptr, tokens, WIDTH: tl.constexpr, TILE: tl.constexpr):
    row, column, real = _place(WIDTH, TILE)
    gate = _modulation(5, levels_ptr, modulation_ptr, tokens, column, real, WIDTH)
    total = _load(x_ptr + row, column, real) + gate * _load(made_ptr + row, column, real)
    tl.store(total_ptr + row + column, total.to(total_ptr.dtype.element_ty), mask=real)


@triton.jit
def _eight_bit_rows(x_ptr, out_ptr, scale_ptr, WIDTH: tl.constexpr, GELU: tl.constexpr, TILE: tl.constexpr):
    row, column, real = _place(WIDTH, TILE)
    x = _load(x_ptr + row, column, real)
    if GELU:  # half of 1 + tanh(y) is 1 / (1 + exp(-2 y))
        x = x / (1 + tl.exp(tl.minimum(-1.5957691216057308 * (x + 0.044715 * x * x * x), 80.0)))
    scale = tl.maximum(tl.max(tl.abs(x), 0) / 448.0, 1e-12)
    x = tl.minimum(tl.maximum(x / scale, -448.0), 448.0)
    tl.store(out_ptr + row + column, x.to(out_ptr.dtype.element_ty), mask=real)
    tl.store(scale_ptr + tl.program_id(0), scale)


@triton.jit
def _far_places(first, column, tokens, heads, HEAD: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Where tokens of this program's head begin, where their numbers from that column on lie from there, [TILE, WIDE],
    and which are any.

    The second number of a program counts heads, then clips.
    """
    line, row, dim = tl.program_id(1).to(tl.int64), tl.arange(0, TILE), column + tl.arange(0, WIDE)
    begin = ((line // heads * tokens + first) * heads + line % heads) * HEAD
    at = row[:, None] * (heads * HEAD) + dim[None, :]
    return begin, at, (first + row < tokens)[:, None] & (dim < HEAD)[None, :]


@triton.jit
def _far_features(
    x_ptr, at, real, cos_ptr, sin_ptr, first, column, tokens,
    HEAD: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Features of these numbers, even and odd ones below the bar, even and odd ones above it, [TILE, WIDE / 2] each."""
    row, pair = tl.arange(0, TILE), column // 2 + tl.arange(0, WIDE // 2)
    angle = first * (HEAD // 2) + row[:, None] * (HEAD // 2) + pair[None, :]
    is_angle = (first + row < tokens)[:, None] & (pair < HEAD // 2)[None, :]
    cos, sin = _load(cos_ptr, angle, is_angle), _load(sin_ptr, angle, is_angle)
    x = tl.load(x_ptr + at, mask=real, other=0.0)
    even, odd = tl.split(tl.reshape(x, [TILE, WIDE // 2, 2]))
    even, odd = tl.maximum(even.to(tl.float32), 0.0), tl.maximum(odd.to(tl.float32), 0.0)
    return even, odd, even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def _project(
    kv_ptr, mass_ptr, weight_ptr, made_ptr, heads,
    HEAD: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of one head of one clip, less by their mass, through some columns of the projection."""
    line, dim = tl.program_id(1).to(tl.int64), tl.arange(0, D)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    share = 1.0 / tl.maximum(tl.load(mass_ptr + line // heads).to(tl.float32), 1.0)
    is_dim, is_column = dim < HEAD, column < HEAD
    square = line * HEAD * HEAD + dim[:, None] * HEAD
    kv = _load(kv_ptr, square + dim[None, :], is_dim[:, None] & is_dim[None, :]) * share
    weight = _load(weight_ptr, column[:, None] * HEAD + dim[None, :], is_column[:, None] & is_dim[None, :])
    made = tl.dot(kv, tl.trans(weight), input_precision=PRECISION).to(made_ptr.dtype.element_ty)
    tl.store(made_ptr + square + column[None, :], made, mask=is_dim[:, None] & is_column[None, :])


@triton.jit
def _add_far(
    near_ptr, q_ptr, cos_ptr, sin_ptr, made_ptr, k_ptr, mass_ptr, bias_ptr, out_ptr, tokens, heads,
    HEAD: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some tiles of one head of one clip, by what `_project` made of its sums."""
    line, dim, even_row = tl.program_id(1).to(tl.int64), tl.arange(0, D), 2 * tl.arange(0, D // 2)
    mass = tl.load(mass_ptr + line // heads).to(tl.float32)
    share = 1.0 / tl.maximum(mass, 1.0)
    is_row = even_row < HEAD
    k_even = _load(k_ptr + line * HEAD, even_row, is_row) * share
    k_odd = _load(k_ptr + line * HEAD + 1, even_row, is_row) * share
    half, is_half = even_row[:, None] * HEAD + dim[None, :], is_row[:, None] & (dim < HEAD)[None, :]
    made_even = tl.load(made_ptr + line * HEAD * HEAD + half, mask=is_half, other=0.0)
    made_odd = tl.load(made_ptr + line * HEAD * HEAD + HEAD + half, mask=is_half, other=0.0)
    bias = _load(bias_ptr, dim, dim < HEAD)
    for tile in range(TILES):
        first = (tl.program_id(0) * TILES + tile) * TILE
        begin, at, real = _far_places(first, 0, tokens, heads, HEAD, TILE, D)
        even, odd, above_even, above_odd = _far_features(
            q_ptr + begin, at, real, cos_ptr, sin_ptr, first, 0, tokens, HEAD, TILE, D
        )
        bar = tl.sum(even * k_even[None, :] + odd * k_odd[None, :], 1) + EPS
        far = tl.dot(above_even.to(made_even.dtype), made_even, input_precision=PRECISION)
        far = tl.dot(above_odd.to(made_odd.dtype), made_odd, far, input_precision=PRECISION)
        far = far * (1 / bar)[:, None] + bias[None, :]
        out = _load(near_ptr + begin, at, real) + tl.where(mass > 0, far, 0.0)
        tl.store(out_ptr + begin + at, out.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _far_parts(
    k_ptr, v_ptr, cos_ptr, sin_ptr, parts_ptr, tokens, heads,
    HEAD: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sums of some tiles of one head of one clip, of half of its features: rows [HEAD, HEAD] above the bar, then one
    below it.

    Values are the left side of the product: those and the features are then read where they lie.
    """
    ROWS: tl.constexpr = D // 2
    column, line, part = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    kv = tl.zeros([D, ROWS], tl.float32)
    below_even, below_odd = tl.zeros([TILE, ROWS // 2], tl.float32), tl.zeros([TILE, ROWS // 2], tl.float32)
    start = part * TILES * TILE
    for first in range(start, tl.minimum(start + TILES * TILE, tokens), TILE):
        begin, at, real = _far_places(first, column, tokens, heads, HEAD, TILE, ROWS)
        even, odd, above_even, above_odd = _far_features(
            k_ptr + begin, at, real, cos_ptr, sin_ptr, first, column, tokens, HEAD, TILE, ROWS
        )
        below_even += even
        below_odd += odd
        above = tl.reshape(tl.join(above_even, above_odd), [TILE, ROWS])
        begin, at, real = _far_places(first, 0, tokens, heads, HEAD, TILE, D)
        v = tl.load(v_ptr + begin + at, mask=real, other=0.0)
        if v.dtype == tl.float32:
            kv = tl.dot(tl.trans(v), above, kv, input_precision="ieee")
        else:
            near = above.to(v.dtype)
            kv = tl.dot(tl.trans(v), near, kv)
            kv = tl.dot(tl.trans(v), (above - near.to(tl.float32)).to(v.dtype), kv)
    parts_ptr += (part.to(tl.int64) * tl.num_programs(1) + line) * ((HEAD + 1) * HEAD)
    row, even_row, dim = column + tl.arange(0, ROWS), column + 2 * tl.arange(0, ROWS // 2), tl.arange(0, D)
    square, is_square = row[:, None] * HEAD + dim[None, :], (row < HEAD)[:, None] & (dim < HEAD)[None, :]
    tl.store(parts_ptr + square, tl.trans(kv), mask=is_square)
    tl.store(parts_ptr + HEAD * HEAD + even_row, tl.sum(below_even, 0), mask=even_row < HEAD)
    tl.store(parts_ptr + HEAD * HEAD + even_row + 1, tl.sum(below_odd, 0), mask=even_row < HEAD)


@triton.jit
def _add_parts(
    parts_ptr, kv_ptr, k_ptr, mass_ptr, new_kv_ptr, new_k_ptr, new_mass_ptr, tokens, heads,
    HEAD: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Some numbers of what `_far_parts` made of one head of one clip, and the old sums; and the mass of a clip."""
    line, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_kv, is_real = at < HEAD * HEAD, at < (HEAD + 1) * HEAD
    is_k = is_real & (at >= HEAD * HEAD)
    total = tl.zeros([TILE], tl.float32)
    for part in tl.static_range(PARTS):
        begin = (part * tl.num_programs(1) + line) * ((HEAD + 1) * HEAD)
        total += _load(parts_ptr + begin, at, is_real)
    kv_at, k_at = line * HEAD * HEAD + at, line * HEAD + at - HEAD * HEAD
    total += _load(kv_ptr, kv_at, is_kv) + _load(k_ptr, k_at, is_k)  # of which one is zero
    tl.store(new_kv_ptr + kv_at, total, mask=is_kv)
    tl.store(new_k_ptr + k_at, total, mask=is_k)
    clip, is_first = line // heads, (tl.program_id(0) == 0) & (line % heads == 0)
    tl.store(new_mass_ptr + clip, tl.load(mass_ptr + clip) + tokens, mask=is_first)
