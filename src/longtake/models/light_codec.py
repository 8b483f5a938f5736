"""A light causal codec: 2-D convolutions and a memory of one frame, quick on a CPU and to train.

Encoder and decoder are pyramids. A step between two resolutions trades height, width and frame rate, two of
each, for channels. Time enters in `MemoryBlock` only, which looks at the frame before its own.

Inside, tensors are [batch, frames, height, width, channels]: channels last is what convolutions on a CPU and
tensor cores want, and it makes every norm, join and shuffle below a contiguous one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from longtake.models.codec import PICTURE_CHANNELS, Carry, Codec

SIDE = 2  # a step between resolutions: this many times lower and narrower
PACE = 2  # and this many times fewer frames
FINEST_CHANNELS = PICTURE_CHANNELS * SIDE**2  # pictures enter and leave with SIDE x SIDE pixels in the channels
SMALLEST_SIZE = 1e-6  # below this a pixel's features count as zero
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # keeps the deviation a finite, positive float32


@dataclass(frozen=True, kw_only=True)
class LightCodecConfig:
    """Sizes of a light codec. The defaults have 2.2 M parameters in the encoder, 2.5 M in the decoder.

    Args:
        latent_channels: channels of a latent frame.
        encoder_widths: channels of each resolution of the encoder, from half the picture's height and width
            down to the latent's. Three of them make latents 8 x 8 times smaller, one per 4 pictures.
        encoder_blocks: memory blocks at each of these resolutions.
        decoder_widths, decoder_blocks: the same for the decoder, from the latent's resolution up. Outlines of
            one or two pixels are drawn by the last entries, which also cost the most time.
    """

    latent_channels: int = 16
    encoder_widths: Sequence[int] = (48, 96, 160)
    encoder_blocks: Sequence[int] = (2, 2, 2)
    decoder_widths: Sequence[int] = (160, 64, 32)
    decoder_blocks: Sequence[int] = (3, 2, 2)

    def __post_init__(self) -> None:
        sizes = (self.encoder_widths, self.encoder_blocks, self.decoder_widths, self.decoder_blocks)
        counts = [len(size) for size in sizes]
        if len(set(counts)) != 1 or not counts[0]:
            raise ValueError(f"widths and blocks need one entry per resolution each, got {counts} entries")

    @property
    def steps(self) -> int:
        """Steps between resolutions."""
        return len(self.decoder_widths) - 1


class Reconstruction(NamedTuple):
    """What a codec in training is judged by."""

    frames_BFCHW: Tensor  # decoded pictures, unclamped
    mean_BFCHW: Tensor  # of the raw latents
    log_variance_BFCHW: Tensor


class LightCodec(Codec):
    """The light codec. Without its encoder (`encoder=False`) it decodes only, and its state dict is smaller.

    The buffers `latent_mean` and `latent_std` are part of the state dict: 0 and 1 until
    `set_latent_statistics` is called at the end of training.
    """

    def __init__(self, config: LightCodecConfig, *, encoder: bool = True, span: int | None = None) -> None:
        super().__init__(config.latent_channels, SIDE ** (config.steps + 1), PACE**config.steps, span)
        self.config = config
        self.encoder = LightEncoder(config) if encoder else None
        self.decoder = LightDecoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def forward(self, frames_BFCHW: Tensor, noise_BFCHW: Tensor | None = None) -> Reconstruction:
        """A whole clip there and back, for training.

        Args:
            frames_BFCHW: pictures in -1..1, 1 + a multiple of `temporal_factor` of them.
            noise_BFCHW: standard normal, shaped like the latents: draws them from the posterior. None: its mean.
        """
        mean_BFCHW, log_variance_BFCHW = self.encode_moments(frames_BFCHW)
        raw_BFCHW = mean_BFCHW
        if noise_BFCHW is not None:
            raw_BFCHW = mean_BFCHW + torch.exp(0.5 * log_variance_BFCHW) * noise_BFCHW
        return Reconstruction(self.decode_piece(raw_BFCHW, Carry(None)), mean_BFCHW, log_variance_BFCHW)

    def encode_moments(self, frames_BFCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the raw latents of a whole clip, before normalisation."""
        self._check_frames(frames_BFCHW, fresh=True)
        return self._moments(frames_BFCHW, Carry(None))

    @torch.no_grad()
    def set_latent_statistics(self, mean_C: Tensor, std_C: Tensor) -> None:
        """Fixes the normalisation of the latents: each channel's mean and deviation over many raw latents."""
        if mean_C.shape != self.latent_mean.shape or std_C.shape != self.latent_std.shape or not (std_C > 0).all():
            raise ValueError(f"statistics need {self.latent_channels} means and as many deviations above 0")
        self.latent_mean.copy_(mean_C)
        self.latent_std.copy_(std_C)

    def encode_piece(self, frames_BFCHW: Tensor, carry: Carry) -> Tensor:
        mean_BFCHW, _ = self._moments(frames_BFCHW, carry)
        return mean_BFCHW

    def decode_piece(self, raw_BFCHW: Tensor, carry: Carry) -> Tensor:
        frames_BFCHW = self.decoder(raw_BFCHW, carry)
        # The first latent frame stands for one picture: the last of those it is decoded to.
        return frames_BFCHW[:, self.temporal_factor - 1 :] if carry.fresh else frames_BFCHW

    def _moments(self, frames_BFCHW: Tensor, carry: Carry) -> tuple[Tensor, Tensor]:
        if self.encoder is None:
            raise RuntimeError("this codec was made without its encoder: it can only decode")
        if carry.fresh:
            still = frames_BFCHW[:, :1].expand(-1, self.temporal_factor - 1, -1, -1, -1)
            frames_BFCHW = torch.cat([still, frames_BFCHW], dim=1)
        mean_BFCHW, log_variance_BFCHW = self.encoder(frames_BFCHW, carry).chunk(2, dim=2)
        return mean_BFCHW, log_variance_BFCHW.clamp(*LOG_VARIANCE_RANGE)


class LightEncoder(nn.Module):
    """Pictures, a multiple of the temporal factor, to mean and log-variance of their latents."""

    def __init__(self, config: LightCodecConfig) -> None:
        super().__init__()
        widths = config.encoder_widths
        self.enter = frame_conv(FINEST_CHANNELS, widths[0], 3)
        self.levels = levels(widths, config.encoder_blocks)
        self.steps = nn.ModuleList(frame_conv(fine * PACE * SIDE**2, coarse, 1) for fine, coarse in pairwise(widths))
        self.leave = frame_conv(widths[-1], 2 * config.latent_channels, 3)

    def forward(self, frames_BFCHW: Tensor, carry: Carry) -> Tensor:
        x_BFHWC = each_frame(self.enter, fold(frames_BFCHW.permute(0, 1, 3, 4, 2), pace=1))
        for index, level in enumerate(self.levels):
            if index > 0:
                x_BFHWC = each_frame(self.steps[index - 1], fold(x_BFHWC, PACE))
            x_BFHWC = through(level, x_BFHWC, carry)
        return each_frame(self.leave, channel_norm(x_BFHWC)).permute(0, 1, 4, 2, 3)


class LightDecoder(nn.Module):
    """Raw latents to pictures, the same number for every latent frame."""

    def __init__(self, config: LightCodecConfig) -> None:
        super().__init__()
        widths = config.decoder_widths
        self.enter = frame_conv(config.latent_channels, widths[0], 3)
        self.levels = levels(widths, config.decoder_blocks)
        self.steps = nn.ModuleList(frame_conv(coarse, fine * PACE * SIDE**2, 1) for coarse, fine in pairwise(widths))
        self.leave = frame_conv(widths[-1], FINEST_CHANNELS, 3)

    def forward(self, raw_BFCHW: Tensor, carry: Carry) -> Tensor:
        x_BFHWC = each_frame(self.enter, raw_BFCHW.permute(0, 1, 3, 4, 2))
        for index, level in enumerate(self.levels):
            if index > 0:
                x_BFHWC = unfold(each_frame(self.steps[index - 1], x_BFHWC), PACE)
            x_BFHWC = through(level, x_BFHWC, carry)
        x_BFHWC = each_frame(self.leave, channel_norm(x_BFHWC))
        return unfold(x_BFHWC, pace=1).permute(0, 1, 4, 2, 3)


class MemoryBlock(nn.Module):
    """Adds to each frame what two convolutions make of it and of the frame before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = frame_conv(2 * width, width, 3)
        self.refine = frame_conv(width, width, 3)

    def forward(self, x_BFHWC: Tensor, carry: Carry) -> Tensor:
        # Nested so that the pairs, the largest tensor here, are let go before the second convolution.
        mixed_BFHWC = F.silu(each_frame(self.mix, beside_the_one_before(channel_norm(x_BFHWC), carry)))
        return x_BFHWC + each_frame(self.refine, mixed_BFHWC)


def beside_the_one_before(x_BFHWC: Tensor, carry: Carry) -> Tensor:
    """The channels of each frame followed by those of the frame before it."""
    joined_BFHWC = carry.extend(x_BFHWC, 1, dim=1)
    return torch.cat([joined_BFHWC[:, 1:], joined_BFHWC[:, :-1]], dim=-1)


def frame_conv(in_width: int, out_width: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the size of a frame, its weights laid out channels last."""
    conv = nn.Conv2d(in_width, out_width, kernel, padding=kernel // 2)
    return conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def levels(widths: Sequence[int], counts: Sequence[int]) -> nn.ModuleList:
    """The memory blocks of each resolution."""
    return nn.ModuleList(
        nn.ModuleList(MemoryBlock(width) for _ in range(count)) for width, count in zip(widths, counts, strict=True)
    )


def through(blocks: nn.Module, x_BFHWC: Tensor, carry: Carry) -> Tensor:
    """Applies the memory blocks of one resolution in order."""
    for block in blocks.children():
        x_BFHWC = block(x_BFHWC, carry)
    return x_BFHWC


def each_frame(conv: nn.Module, x_BFHWC: Tensor) -> Tensor:
    """Applies a picture layer to every frame; the permutations only relabel axes and move nothing."""
    pictures_NCHW = x_BFHWC.flatten(0, 1).permute(0, 3, 1, 2)
    return conv(pictures_NCHW).permute(0, 2, 3, 1).unflatten(0, x_BFHWC.shape[:2])


def channel_norm(x_BFHWC: Tensor) -> Tensor:
    """Root-mean-square 1 over the channels of each pixel; a gain is left to the convolution that follows."""
    size_BFHW1 = torch.linalg.vector_norm(x_BFHWC, dim=-1, keepdim=True) * x_BFHWC.shape[-1] ** -0.5
    return x_BFHWC / size_BFHW1.clamp_min(SMALLEST_SIZE)


def fold(x_BFHWC: Tensor, pace: int) -> Tensor:
    """Puts `pace` frames of SIDE x SIDE pixels into the channels of one pixel."""
    sizes = {"t": pace, "i": SIDE, "j": SIDE}
    return rearrange(x_BFHWC, "b (f t) (h i) (w j) c -> b f h w (t i j c)", **sizes)


def unfold(x_BFHWC: Tensor, pace: int) -> Tensor:
    """Undoes `fold`."""
    sizes = {"t": pace, "i": SIDE, "j": SIDE}
    return rearrange(x_BFHWC, "b f h w (t i j c) -> b (f t) (h i) (w j) c", **sizes)
