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
_TILES = 8  # by one program; what programs summed is summed then


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
    (batch, tokens, heads, size), out = q.shape, torch.empty_like(near)
    precision = "ieee" if near.dtype == torch.float32 else "tf32"
    _add_far[triton.cdiv(tokens, _TOKENS * _TILES), batch * heads](
        near, q, *rotation, *(part.contiguous() for part in sums), weight_DD, bias_D, out, tokens, heads, size,
        _TOKENS, _TILES, max(16, triton.next_power_of_2(size)), precision, num_warps=4,
    )  # fmt: skip
    return out


def far_sums(k_BTND: Tensor, v_BTND: Tensor, rotation: Rotation) -> Sums:
    """The sums of these tokens alone. Truth: `linear.sums_of`, of the form `linear.PAPER`. Products as in `add_far`."""
    k, v = k_BTND.contiguous(), v_BTND.contiguous()
    batch, tokens, heads, size = k.shape
    parts = triton.cdiv(tokens, _TOKENS * _TILES)
    kv = k.new_empty(parts, batch, heads, size, size, dtype=torch.float32)
    k_sums = k.new_empty(parts, batch, heads, size, dtype=torch.float32)
    precision = "ieee" if k.dtype == torch.float32 else "tf32"
    _far_sums[parts, batch * heads](
        k, v, *rotation, kv, k_sums, tokens, heads, size,
        _TOKENS, _TILES, max(16, triton.next_power_of_2(size)), precision, num_warps=8, num_stages=1,
    )  # fmt: skip
    mass_B = torch.full((batch,), float(tokens), dtype=torch.float64, device=k.device)
    return Sums(kv.sum(0), k_sums.sum(0), mass_B)


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
def _far_features(
    x_ptr, cos_ptr, sin_ptr, token, tokens, heads, HEAD: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr
):
    """Features below the bar and above it, [TILE, D] each, of some tokens of this program's head.

    Where the tokens lie comes with them, and which of the places are real. The second number of a program counts heads,
    then clips.
    """
    line, dim, pair = tl.program_id(1).to(tl.int64), tl.arange(0, D), tl.arange(0, D // 2)
    at = ((line // heads * tokens + token[:, None]) * heads + line % heads) * HEAD + dim[None, :]
    real = (token < tokens)[:, None] & (dim < HEAD)[None, :]
    below = tl.maximum(_load(x_ptr, at, real), 0.0)
    angle = token[:, None] * (HEAD // 2) + pair[None, :]
    is_angle = (token < tokens)[:, None] & (pair < HEAD // 2)[None, :]
    cos, sin = _load(cos_ptr, angle, is_angle), _load(sin_ptr, angle, is_angle)
    even, odd = tl.split(tl.reshape(below, [TILE, D // 2, 2]))
    above = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [TILE, D])
    return below, above, at, real


@triton.jit
def _square(HEAD: tl.constexpr, D: tl.constexpr):
    """Where the numbers of a head's matrix lie, and which are any."""
    dim = tl.arange(0, D)
    return dim[:, None] * HEAD + dim[None, :], (dim < HEAD)[:, None] & (dim < HEAD)[None, :]


@triton.jit
def _add_far(
    near_ptr, q_ptr, cos_ptr, sin_ptr, kv_ptr, k_ptr, mass_ptr, weight_ptr, bias_ptr, out_ptr, tokens, heads,
    HEAD: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some tiles of one head of one clip."""
    line, dim = tl.program_id(1).to(tl.int64), tl.arange(0, D)
    square, is_square = _square(HEAD, D)
    mass = tl.load(mass_ptr + line // heads).to(tl.float32)
    share = 1.0 / tl.maximum(mass, 1.0)
    kv = _load(kv_ptr + line * HEAD * HEAD, square, is_square) * share
    k = _load(k_ptr + line * HEAD, dim, dim < HEAD) * share
    weight = _load(weight_ptr, square, is_square)
    kv = tl.dot(kv, tl.trans(weight), input_precision=PRECISION).to(out_ptr.dtype.element_ty)
    bias = _load(bias_ptr, dim, dim < HEAD)
    for tile in range(TILES):
        token = (tl.program_id(0) * TILES + tile) * TILE + tl.arange(0, TILE)
        below, above, at, real = _far_features(q_ptr, cos_ptr, sin_ptr, token, tokens, heads, HEAD, TILE, D)
        bar = tl.sum(below * k[None, :], 1) + EPS
        far = tl.dot(above.to(kv.dtype), kv, input_precision=PRECISION) / bar[:, None] + bias[None, :]
        out = _load(near_ptr, at, real) + tl.where(mass > 0, far, 0.0)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _far_sums(
    k_ptr, v_ptr, cos_ptr, sin_ptr, kv_ptr, k_sums_ptr, tokens, heads,
    HEAD: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of some tiles of one head of one clip."""
    kv, k_sum = tl.zeros([D, D], tl.float32), tl.zeros([D], tl.float32)
    for tile in range(TILES):
        token = (tl.program_id(0) * TILES + tile) * TILE + tl.arange(0, TILE)
        below, above, at, real = _far_features(k_ptr, cos_ptr, sin_ptr, token, tokens, heads, HEAD, TILE, D)
        kv += tl.dot(tl.trans(above), _load(v_ptr, at, real), input_precision=PRECISION)
        k_sum += tl.sum(below, 0)
    part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    square, is_square = _square(HEAD, D)
    tl.store(kv_ptr + part * HEAD * HEAD + square, kv, mask=is_square)
    tl.store(k_sums_ptr + part * HEAD + tl.arange(0, D), k_sum, mask=tl.arange(0, D) < HEAD)
