"""The light decoder of Wan2.1's latents in TAEHV's layout, for previews (O. Boer Bohan, github.com/madebyollin/taehv).

Names of parameters are those of the published `taew2_1`, so its decoder's state dict loads strictly. They count places
in one list of layers, of which some have no weights. It takes latents as video networks make them, normalised, and
looks back by one frame only, at the input of each `MemoryBlock`.

The published file has an encoder too, which longtake has no use for: it makes a latent frame of pictures 0 to 3, where
Wan's first one stands for picture 0 alone, and so does the decoder's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from longtake.models.codec import PICTURE_CHANNELS, Carry, Codec

BLOCKS = 3  # memory blocks at each resolution
LIMIT = 3.0  # latents are squashed to this many deviations


@dataclass(frozen=True, kw_only=True)
class TAEHVConfig:
    """Sizes of a light decoder; the defaults are those of the published `taew2_1` (9.8 M parameters).

    Args:
        latent_channels: channels of a latent frame.
        widths: channels from the latent's resolution to the picture's; each after the first doubles height and width.
        doubles_rate: for each of these doublings, whether it doubles the frame rate as well.
    """

    latent_channels: int = 16
    widths: Sequence[int] = (256, 128, 64, 64)
    doubles_rate: Sequence[bool] = (False, True, True)

    def __post_init__(self) -> None:
        if len(self.doubles_rate) != len(self.widths) - 1:
            raise ValueError(f"doubles_rate needs {len(self.widths) - 1} entries, got {len(self.doubles_rate)}")


class TAEHV(Codec):
    """The light decoder as a streaming codec that only decodes: RuntimeError for whoever would encode with it."""

    def __init__(self, config: TAEHVConfig, span: int | None = 1) -> None:
        channels, spatial_factor = config.latent_channels, 2 ** len(config.doubles_rate)
        super().__init__(channels, spatial_factor, 2 ** sum(config.doubles_rate), span)
        self.config = config
        self.decoder = nn.ModuleList(decoder_layers(config))
        # Not in the published state dict: it was trained on latents that are normalised already.
        self.register_buffer("latent_mean", torch.zeros(channels, device="cpu"), persistent=False)
        self.register_buffer("latent_std", torch.ones(channels, device="cpu"), persistent=False)

    def encode_piece(self, frames_BFCHW: Tensor, carry: Carry) -> Tensor:
        raise RuntimeError("the light decoder only decodes: Wan's VAE encodes")

    def decode_piece(self, raw_BFCHW: Tensor, carry: Carry) -> Tensor:
        x_BFCHW = raw_BFCHW
        for layer in self.decoder:
            x_BFCHW = layer(x_BFCHW, carry) if isinstance(layer, MemoryBlock) else each_frame(layer, x_BFCHW)
        frames_BFCHW = 2 * x_BFCHW - 1  # it was trained to make pictures in 0..1
        # The first latent frame stands for one picture: the last of those it is decoded to.
        return frames_BFCHW[:, self.temporal_factor - 1 :] if carry.fresh else frames_BFCHW


class Limit(nn.Module):
    """Latents squashed smoothly to -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / LIMIT) * LIMIT


class MemoryBlock(nn.Module):
    """Three convolutions of each frame and the one before it, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            frame_conv(2 * width, width), nn.ReLU(), frame_conv(width, width), nn.ReLU(), frame_conv(width, width)
        )

    def forward(self, x_BFCHW: Tensor, carry: Carry) -> Tensor:
        joined_BFCHW = carry.extend(x_BFCHW, 1, dim=1)
        pairs_BFCHW = torch.cat([joined_BFCHW[:, 1:], joined_BFCHW[:, :-1]], dim=2)
        return F.relu(each_frame(self.conv, pairs_BFCHW) + x_BFCHW)


class Grow(nn.Module):
    """`frames` pictures of each picture of a batch, next to one another."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(width, frames * width, 1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return rearrange(self.conv(x_NCHW), "n (frames c) h w -> (n frames) c h w", frames=self.frames)


def decoder_layers(config: TAEHVConfig) -> list[nn.Module]:
    """From latents to pictures, in the published order."""
    widths = config.widths
    layers: list[nn.Module] = [Limit(), frame_conv(config.latent_channels, widths[0]), nn.ReLU()]
    for (width, finer_width), doubles_rate in zip(pairwise(widths), config.doubles_rate, strict=True):
        layers += [MemoryBlock(width) for _ in range(BLOCKS)]
        layers += [nn.Upsample(scale_factor=2), Grow(width, 2 if doubles_rate else 1)]
        layers.append(frame_conv(width, finer_width, bias=False))
    return [*layers, nn.ReLU(), frame_conv(widths[-1], PICTURE_CHANNELS)]


def frame_conv(in_width: int, out_width: int, bias: bool = True) -> nn.Conv2d:
    """A convolution that keeps the size of a frame."""
    return nn.Conv2d(in_width, out_width, 3, padding=1, bias=bias)


def each_frame(layer: nn.Module, x_BFCHW: Tensor) -> Tensor:
    """Applies a picture layer to every frame; of each it may make several."""
    return layer(x_BFCHW.flatten(0, 1)).unflatten(0, (x_BFCHW.shape[0], -1))
