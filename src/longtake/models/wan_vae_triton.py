# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""Wan's decoder in a stream that is under way, for GPUs. `models.wan_vae` is its definition.

Channels lie next to each other in memory, as convolutions on a GPU want them. One kernel adds a convolution's bias and
a block's shortcut, norms, applies SiLU, writes behind the frames that the next convolution looks back at, and keeps
those for its next turn. A picture is doubled and convolved in one: each of the four phases of the larger picture sees
2 x 2 places of the smaller one, and that kernel takes each place from its phase.

Tensors are [batch, channels, frames, height, width], as in `models.wan_vae`; `_rows` are the same with channels last.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from longtake.models.codec import Carry
from longtake.models.conv_triton import can_convolve, convolved
from longtake.models.wan_vae import FRAMES, ChannelNorm, FrameAttention, ResidualBlock, Upsample, WanVAE

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
    """A tensor that is still to be added up: x, a bias of its channels, and one like x.

    in_phases: whether x is what `in_phases` gives; then nothing stands beside it.
    """

    x: Tensor
    bias: Tensor | None = None
    beside: Tensor | None = None
    in_phases: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of the sum."""
        batch, channels, frames, height, width = self.x.shape
        if self.in_phases:
            return batch, channels // 4, frames, 2 * (height - 1), 2 * (width - 1)
        return batch, channels, frames, height, width

    def sum(self) -> Tensor:
        """In the place of x, which is not in phases."""
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
        self._last = aligned(cast(nn.Conv3d, codec.decoder.head[2]))

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
                parts = Parts(_laid_out(frame_attention(layer, parts.sum())))
        layers = decoder.head
        norm, _, last = layers
        weight, bias = self._last
        pictures = F.conv3d(norm_silu(parts, norm, carry), weight, bias, padding=last.padding)
        return pictures[:, : last.out_channels].transpose(1, 2)

    def _upsampled(self, layer: Upsample, x: Tensor, carry: Carry) -> Parts:
        if layer.time_conv is not None:
            two = _rows(F.conv3d(behind(x, carry), layer.time_conv.weight, layer.time_conv.bias))
            x = _from_rows(two.unflatten(-1, (2, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2))
        return Parts(in_phases(x, self._phases[layer]), cast(nn.Conv2d, layer.resample[1]).bias, in_phases=True)


def aligned(layer: nn.Conv3d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution, with zeros for channels up to a multiple of 8, which matrix units want."""
    assert layer.bias is not None
    more = -layer.out_channels % 8
    weight = F.pad(layer.weight, (0,) * 9 + (more,))
    return weight.contiguous(memory_format=torch.channels_last_3d), F.pad(layer.bias, (0, more))


def frame_attention(layer: FrameAttention, x: Tensor) -> Tensor:
    """As the layer, by plain products, where scores are float32: no fused kernel takes a head of all channels."""
    batch, channels, frames, height, width = x.shape
    normed = layer.norm(_rows(x).flatten(0, 1).permute(0, 3, 1, 2))
    q, k, v = layer.to_qkv(normed).flatten(2).mT.chunk(3, dim=2)
    q = q * channels**-0.5
    half = q.is_cuda and q.dtype != torch.float32
    scores = torch.bmm(q, k.mT, out_dtype=torch.float32) if half else q @ k.mT
    attended = scores.softmax(2).to(v.dtype) @ v
    answer = layer.proj(attended.mT.unflatten(2, (height, width)))
    return x + answer.unflatten(0, (batch, frames)).transpose(1, 2)


def phases(weight_OIHW: Tensor) -> Tensor:
    """Four kernels of 2 x 2, one after the other, of one of 3 x 3 that sees every place doubled.

    The upper row of a doubled place sees the place above it once and its own twice, the lower row its own twice and
    the one below once; columns alike. [4 * O, I, 2, 2], the phases by row and column.
    """
    seen = weight_OIHW.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32)
    four = torch.einsum("phk,qwl,oikl->pqoihw", seen, seen, weight_OIHW.float()).flatten(0, 2)
    return four.to(weight_OIHW.dtype).contiguous(memory_format=torch.channels_last)


def in_phases(x: Tensor, phases: Tensor) -> Tensor:
    """The doubled picture, convolved without its bias, as [batch, 4 * channels, frames, height + 1, width + 1].

    In the phase of row p and column q, place (i, j) of the smaller picture is at (i + p, j + q); what is left over has
    no meaning.
    """
    rows = _rows(x)
    four = F.conv2d(rows.flatten(0, 1).permute(0, 3, 1, 2), phases, padding=1)
    return _from_rows(four.permute(0, 2, 3, 1).contiguous().unflatten(0, rows.shape[:2]))


def behind(x: Tensor, carry: Carry) -> Tensor:
    """x with the two frames before it in front, as `Carry.extend`."""
    batch, channels, frames, height, width = x.shape
    joined = _room(x, (batch, channels, frames + 2, height, width))
    joined[:, :, :2] = carry.past([batch, channels, 2, height, width])
    joined[:, :, 2:] = x
    carry.keep(joined, 2, FRAMES)
    return joined


def norm_silu(parts: Parts, norm: ChannelNorm, carry: Carry) -> Tensor:
    """SiLU of the normed sum, with the two frames before it in front. Truth: `ChannelNorm`, SiLU, `Carry.extend`."""
    return _sum_norm_silu(parts, norm, carry, None)


def sum_norm_silu(parts: Parts, norm: ChannelNorm, carry: Carry) -> tuple[Tensor, Tensor]:
    """The sum, in the place of x where that is not in phases, and what `norm_silu` makes of it."""
    total = _room(parts.x, parts.shape) if parts.in_phases else parts.x
    return total, _sum_norm_silu(parts, norm, carry, total)


def _sum_norm_silu(parts: Parts, norm: ChannelNorm, carry: Carry, total: Tensor | None) -> Tensor:
    batch, channels, frames, height, width = parts.shape
    past = _laid_out(carry.past([batch, channels, 2, height, width]))
    joined = _room(past, (batch, channels, frames + 2, height, width))
    kept = _room(past, (batch, channels, 2, height, width))
    tile = channels & -channels  # so that tiles, which are powers of two, fill a row
    many = triton.next_power_of_2(max(1, _PROGRAM // channels) + 1) // 2
    rows, unused = (frames + 2) * height * width, norm.gamma  # in the place of what there is not
    _kernel[triton.cdiv(rows, many), batch](
        parts.x, unused if parts.bias is None else parts.bias, unused if parts.beside is None else parts.beside,
        norm.gamma, past, unused if total is None else total, joined, kept, frames, channels**0.5,
        height, width, channels, tile, many,
        parts.bias is not None, parts.beside is not None, parts.in_phases, total is not None,
    )  # fmt: skip
    carry.hand_on(kept)
    return joined


def _room(like: Tensor, shape: tuple[int, int, int, int, int]) -> Tensor:
    """For a tensor of that shape, channels next to each other."""
    batch, channels, frames, height, width = shape
    return _from_rows(like.new_empty(batch, frames, height, width, channels))


def _beside_shortcut(x: Tensor, last: nn.Conv3d, shortcut: nn.Module, total: Tensor) -> Parts:
    if not isinstance(shortcut, nn.Conv3d):
        return Parts(x, last.bias, total)
    assert last.bias is not None and shortcut.bias is not None
    return Parts(x, last.bias + shortcut.bias, _laid_out(F.conv3d(total, shortcut.weight)))


def _convolved(layer: nn.Conv3d, joined: Tensor) -> Tensor:
    """Without its bias. Where channels are few, by our own kernel on a GPU that it is for; else by the library."""
    if can_convolve(layer.weight):
        return convolved(joined, layer.weight)
    return _laid_out(F.conv3d(joined, layer.weight, padding=cast(tuple[int, ...], layer.padding)))


def _laid_out(x: Tensor) -> Tensor:
    """With channels next to each other; as it is where they are."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def _rows(x: Tensor) -> Tensor:
    return _laid_out(x).permute(0, 2, 3, 4, 1)


def _from_rows(rows_BFHWC: Tensor) -> Tensor:
    return rows_BFHWC.permute(0, 4, 1, 2, 3)


@triton.jit
def _kernel(
    x_ptr, bias_ptr, beside_ptr, gamma_ptr, past_ptr, total_ptr, out_ptr, kept_ptr, frames, gain,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, MANY: tl.constexpr,
    BIASED: tl.constexpr, ADDED: tl.constexpr, IN_PHASES: tl.constexpr, TOTALLED: tl.constexpr,
):  # fmt: skip
    """Rows of a clip's past, then of its own frames; the second number of a program counts clips."""
    past_rows: tl.constexpr = 2 * HEIGHT * COLUMNS
    own_rows, clip = frames * (HEIGHT * COLUMNS), tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * MANY + tl.arange(0, MANY)
    is_past, is_any = (row < past_rows)[:, None], row < past_rows + own_rows
    is_own, is_kept = ((row >= past_rows) & is_any)[:, None], ((row >= own_rows) & is_any)[:, None]
    is_any = is_any[:, None]
    own = (clip * own_rows + row - past_rows)[:, None] * WIDTH
    if IN_PHASES:
        at_row, at_column = (row - past_rows) // COLUMNS, row % COLUMNS
        frame, line = clip * frames + at_row // HEIGHT, at_row % HEIGHT
        phase = line % 2 * 2 + at_column % 2
        place = (frame * (HEIGHT // 2 + 1) + line % 2 + line // 2) * (COLUMNS // 2 + 1) + at_column % 2 + at_column // 2
        x_ptr += (place * 4 + phase)[:, None] * WIDTH
    else:
        x_ptr += own
    sums, squares = (), tl.zeros([MANY], tl.float32)
    for part in tl.static_range(WIDTH // TILE):
        channel = part * TILE + tl.arange(0, TILE)
        column = channel[None, :]
        x = tl.load(x_ptr + column, mask=is_own, other=0.0).to(tl.float32)
        if BIASED:
            x += tl.load(bias_ptr + channel).to(tl.float32)[None, :]
        if ADDED:
            x += tl.load(beside_ptr + own + column, mask=is_own, other=0.0).to(tl.float32)
        if TOTALLED:
            total = x.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + own + column, total, mask=is_own)
            x = total.to(tl.float32)
        squares += tl.sum(x * x, 1)
        sums += (x,)  # type: ignore[assignment]
    scale = (gain / tl.maximum(tl.sqrt(squares), EPS))[:, None]
    past = (clip * past_rows + row)[:, None] * WIDTH
    out = (clip * (past_rows + own_rows) + row)[:, None] * WIDTH
    kept = (clip * past_rows + row - own_rows)[:, None] * WIDTH
    for part in tl.static_range(WIDTH // TILE):
        channel = part * TILE + tl.arange(0, TILE)
        column = channel[None, :]
        normed = sums[part] * scale * tl.load(gamma_ptr + channel).to(tl.float32)[None, :]
        made = (normed / (1 + tl.exp(-normed))).to(out_ptr.dtype.element_ty)
        made = tl.where(is_past, tl.load(past_ptr + past + column, mask=is_past, other=0.0), made)
        tl.store(out_ptr + out + column, made, mask=is_any)
        tl.store(kept_ptr + kept + column, made, mask=is_kept)
