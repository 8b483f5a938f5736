# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""Wan's decoder in a stream that is under way, for GPUs. `models.wan_vae` is its definition.

Channels lie next to each other in memory, as convolutions on a GPU want them. One kernel adds a convolution's bias and
a block's shortcut, norms, applies SiLU and writes behind the frames that the next convolution looks back at. A picture
is doubled and convolved in one: each of the four phases of the larger picture sees 2 x 2 places of the smaller one.

Tensors are [batch, channels, frames, height, width], as in `models.wan_vae`; `_rows` are the same with channels last.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from longtake.models.codec import Carry
from longtake.models.wan_vae import FRAMES, ChannelNorm, ResidualBlock, Upsample, WanVAE

EPS = tl.constexpr(1e-12)  # of torch.nn.functional.normalize
_PROGRAM = 4096  # numbers of one program


def fuse_decoder(codec: WanVAE) -> None:
    """Let pieces that have something before them be decoded so, in calls without gradients; others are as they were.

    Weights change their place in memory, and no number. Answers differ from the definition's by rounding; states are
    the same, but for the order in which they lie in memory, so that either goes on from the other's.
    """
    for parameter in (*codec.conv2.parameters(), *codec.decoder.parameters()):
        if parameter.dim() > 3:
            flat = torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d
            parameter.data = parameter.data.contiguous(memory_format=flat)
    setattr(codec, "decode_piece", FusedDecoder(codec).decode_piece)  # noqa: B010  # as in `wan_triton`


class Parts(NamedTuple):
    """A tensor that is still to be added up: x, a bias of its channels, and one like x."""

    x: Tensor
    bias: Tensor | None = None
    beside: Tensor | None = None

    def sum(self) -> Tensor:
        """In the place of x."""
        for part in (self.bias if self.bias is None else self.bias.view(-1, 1, 1, 1), self.beside):
            if part is not None:
                self.x.add_(part)
        return self.x


class FusedDecoder:
    """The layers of a codec's decoder, whose parameters stay its own."""

    def __init__(self, codec: WanVAE) -> None:
        self._codec, self._plain = codec, codec.decode_piece
        upsamples = (layer for layer in codec.decoder.upsamples if isinstance(layer, Upsample))
        self._phases = {layer: phases(cast(nn.Conv2d, layer.resample[1]).weight) for layer in upsamples}

    def decode_piece(self, raw_BFCHW: Tensor, carry: Carry) -> Tensor:
        """As `WanVAE.decode_piece`."""
        if carry.fresh or torch.is_grad_enabled() or raw_BFCHW.is_meta:
            return self._plain(raw_BFCHW, carry)
        codec, decoder = self._codec, self._codec.decoder
        layers: Any  # of the kinds that `models.wan_vae` puts at these places
        x = behind(_laid_out(codec.conv2(raw_BFCHW.transpose(1, 2))), carry)
        parts = Parts(_convolved(decoder.conv1, x), decoder.conv1.bias)
        for layer in (*decoder.middle, *decoder.upsamples):
            if isinstance(layer, ResidualBlock):
                layers = layer.residual
                first, _, one, second, _, _, other = layers
                total, x = sum_norm_silu(parts, first, carry)
                del parts  # pictures take much memory: each goes as soon as it can
                x = _convolved(one, x)
                x = norm_silu(Parts(x, one.bias), second, carry)
                parts = _beside_shortcut(_convolved(other, x), other, layer.shortcut, total)
                del total, x
            elif isinstance(layer, Upsample):
                parts = self._upsampled(layer, parts.sum(), carry)
            else:
                parts = Parts(_laid_out(layer(parts.sum())))
        layers = decoder.head
        norm, _, last = layers
        return _convolved(last, norm_silu(parts, norm, carry), last.bias).transpose(1, 2)

    def _upsampled(self, layer: Upsample, x: Tensor, carry: Carry) -> Parts:
        if layer.time_conv is not None:
            two = _rows(F.conv3d(behind(x, carry), layer.time_conv.weight, layer.time_conv.bias))
            x = _from_rows(two.unflatten(-1, (2, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2))
        rows = _rows(x)
        pictures = rows.flatten(0, 1).permute(0, 3, 1, 2)
        larger = doubled_and_convolved(pictures, self._phases[layer]).permute(0, 2, 3, 1)
        return Parts(_from_rows(larger.unflatten(0, rows.shape[:2])), cast(nn.Conv2d, layer.resample[1]).bias)


def phases(weight_OIHW: Tensor) -> Tensor:
    """Four kernels of 2 x 2, one after the other, of one of 3 x 3 that sees every place doubled.

    The upper row of a doubled place sees the place above it once and its own twice, the lower row its own twice and
    the one below once; columns alike. [4 * O, I, 2, 2], the phases by row and column.
    """
    seen = weight_OIHW.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32)
    four = torch.einsum("phk,qwl,oikl->pqoihw", seen, seen, weight_OIHW.float()).flatten(0, 2)
    return four.to(weight_OIHW.dtype).contiguous(memory_format=torch.channels_last)


def doubled_and_convolved(x_NCHW: Tensor, phases: Tensor) -> Tensor:
    """Truth: `conv2d` of the nearest-neighbour picture of twice the size, padded by 1, without its bias."""
    count, _, height, width = x_NCHW.shape
    four = F.conv2d(x_NCHW, phases, padding=1).unflatten(1, (2, 2, -1))
    made = x_NCHW.new_empty(count, 2 * height, 2 * width, four.shape[3]).permute(0, 3, 1, 2)
    for row in range(2):
        for column in range(2):
            seen = four[:, row, column, :, row : row + height, column : column + width]
            made[:, :, row::2, column::2] = seen
    return made


def behind(x: Tensor, carry: Carry) -> Tensor:
    """x with the two frames before it in front, as `Carry.extend`."""
    joined, _ = _room_behind(x, carry)
    joined[:, :, 2:] = x
    carry.keep(joined, 2, FRAMES)
    return joined


def norm_silu(parts: Parts, norm: ChannelNorm, carry: Carry) -> Tensor:
    """SiLU of the normed sum, with the two frames before it in front. Truth: `ChannelNorm`, SiLU, `Carry.extend`."""
    return _sum_norm_silu(parts, norm, carry, None)


def sum_norm_silu(parts: Parts, norm: ChannelNorm, carry: Carry) -> tuple[Tensor, Tensor]:
    """The sum, and what `norm_silu` makes of it."""
    total = torch.empty_like(parts.x)
    return total, _sum_norm_silu(parts, norm, carry, total)


def _sum_norm_silu(parts: Parts, norm: ChannelNorm, carry: Carry, total: Tensor | None) -> Tensor:
    joined, past_rows = _room_behind(parts.x, carry)
    batch, width = parts.x.shape[:2]
    rows, tile = parts.x.numel() // width, triton.next_power_of_2(width)
    many = max(1, _PROGRAM // tile)
    unused = norm.gamma  # in the place of what there is not
    _kernel[(triton.cdiv(rows, many),)](
        parts.x, unused if parts.bias is None else parts.bias, unused if parts.beside is None else parts.beside,
        norm.gamma, unused if total is None else total, joined, rows, rows // batch, past_rows, width**0.5,
        width, tile, many, parts.bias is not None, parts.beside is not None, total is not None,
    )  # fmt: skip
    carry.keep(joined, 2, FRAMES)
    return joined


def _room_behind(x: Tensor, carry: Carry) -> tuple[Tensor, int]:
    """Room for x behind the two frames before it, which are there; and how many rows those take in each clip."""
    batch, channels, frames, height, width = x.shape
    joined = _from_rows(x.new_empty(batch, frames + 2, height, width, channels))
    joined[:, :, :2] = carry.past([batch, channels, 2, height, width])
    return joined, 2 * height * width


def _beside_shortcut(x: Tensor, last: nn.Conv3d, shortcut: nn.Module, total: Tensor) -> Parts:
    if not isinstance(shortcut, nn.Conv3d):
        return Parts(x, last.bias, total)
    assert last.bias is not None and shortcut.bias is not None
    return Parts(x, last.bias + shortcut.bias, _laid_out(F.conv3d(total, shortcut.weight)))


def _convolved(layer: nn.Conv3d, joined: Tensor, bias: Tensor | None = None) -> Tensor:
    """By its weight, and that bias."""
    return _laid_out(F.conv3d(joined, layer.weight, bias, padding=cast(tuple[int, ...], layer.padding)))


def _laid_out(x: Tensor) -> Tensor:
    """With channels next to each other; as it is where they are."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def _rows(x: Tensor) -> Tensor:
    return _laid_out(x).permute(0, 2, 3, 4, 1)


def _from_rows(rows_BFHWC: Tensor) -> Tensor:
    return rows_BFHWC.permute(0, 4, 1, 2, 3)


@triton.jit
def _kernel(
    x_ptr, bias_ptr, beside_ptr, gamma_ptr, total_ptr, out_ptr, rows, clip_rows, past_rows, gain,
    WIDTH: tl.constexpr, TILE: tl.constexpr, MANY: tl.constexpr,
    BIASED: tl.constexpr, ADDED: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)
    column = tl.arange(0, TILE)
    real = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
    if BIASED:
        x += tl.load(bias_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    if ADDED:
        x += tl.load(beside_ptr + at, mask=real, other=0.0).to(tl.float32)
    if KEPT:
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, mask=real)
        x = total.to(tl.float32)
    gains = gain * tl.load(gamma_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    normed = x / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), EPS)[:, None] * gains[None, :]
    out = normed / (1 + tl.exp(-normed))
    put = at + ((row // clip_rows + 1) * past_rows * WIDTH)[:, None]
    tl.store(out_ptr + put, out.to(out_ptr.dtype.element_ty), mask=real)
