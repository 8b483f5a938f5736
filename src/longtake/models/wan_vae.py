"""The Wan 2.1 video VAE at any size (Wan technical report, arXiv 2503.20314, section 4.1).

Names of parameters are those of the published checkpoint, so its state dict loads strictly.

Inside, tensors are [batch, channels, frames, height, width], as 3-D convolutions want them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from longtake.models.codec import PICTURE_CHANNELS, Carry, Codec

FRAMES = 2  # the frame axis of BCFHW

# Channel means and deviations of the published Wan 2.1 latents.
WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WanVAEConfig:
    """Sizes of a Wan VAE; the defaults are the published Wan 2.1 one (127 M parameters).

    Args:
        dim: channels at picture resolution.
        z_dim: latent channels.
        dim_mult: channels of each resolution, finest first, as multiples of `dim`. Each resolution after the
            first halves height and width.
        num_res_blocks: residual blocks per resolution of the encoder; the decoder has one more.
        temporal_downsample: for each halving of height and width, whether it halves the frame rate as well.
        latent_mean, latent_std: statistics of each raw latent channel.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: Sequence[bool] = (False, True, True)
    latent_mean: Sequence[float] = WAN21_MEAN
    latent_std: Sequence[float] = WAN21_STD

    def __post_init__(self) -> None:
        halvings = len(self.dim_mult) - 1
        if len(self.temporal_downsample) != halvings:
            raise ValueError(f"temporal_downsample needs {halvings} entries, got {len(self.temporal_downsample)}")
        if {len(self.latent_mean), len(self.latent_std)} != {self.z_dim}:
            counts = f"{len(self.latent_mean)} and {len(self.latent_std)}"
            raise ValueError(f"latent_mean and latent_std need {self.z_dim} entries, got {counts}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each resolution, finest first."""
        return tuple(self.dim * mult for mult in self.dim_mult)


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution that looks at the present and past frames only."""

    def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(in_dim, out_dim, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x_BCFHW: Tensor, carry: Carry) -> Tensor:  # type: ignore[override]
        return super().forward(carry.extend(x_BCFHW, self.kernel_size[0] - 1, FRAMES))


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of each pixel, with a gain."""

    def __init__(self, dim: int, spatial_axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_axes))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (self.gamma * self.gamma.shape[0] ** 0.5)


class ResidualBlock(nn.Module):
    """Two causal convolutions beside a shortcut."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.ModuleList(
            [
                ChannelNorm(in_dim, 3),
                nn.SiLU(),
                CausalConv3d(in_dim, out_dim, (3, 3, 3)),
                ChannelNorm(out_dim, 3),
                nn.SiLU(),
                nn.Identity(),  # the published list has a dropout of rate zero here; names count places
                CausalConv3d(out_dim, out_dim, (3, 3, 3)),
            ]
        )
        self.shortcut = nn.Identity() if in_dim == out_dim else nn.Conv3d(in_dim, out_dim, 1)

    def forward(self, x_BCFHW: Tensor, carry: Carry) -> Tensor:
        return self.shortcut(x_BCFHW) + run(self.residual, x_BCFHW, carry)


class FrameAttention(nn.Module):
    """Every pixel of a frame attends to all pixels of the same frame, with one head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        batch, _, _, height, _ = x_BCFHW.shape
        frames = rearrange(x_BCFHW, "b c f h w -> (b f) c h w")
        # One head: (frame, 1, pixel, channel) is what the attention kernels take.
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "n (three c) h w -> three n 1 (h w) c", three=3)
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "n 1 (h w) c -> n c h w", h=height)
        return x_BCFHW + rearrange(self.proj(attended), "(b f) c h w -> b c f h w", b=batch)


class Downsample(nn.Module):
    """Halves height and width, and the frame rate if `temporal`; the first frame of a video stays by itself."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x_BCFHW: Tensor, carry: Carry) -> Tensor:
        x_BCFHW = each_frame(self.resample, x_BCFHW)
        return x_BCFHW if self.time_conv is None else self._halve_rate(self.time_conv, x_BCFHW, carry)

    def _halve_rate(self, time_conv: nn.Conv3d, x_BCFHW: Tensor, carry: Carry) -> Tensor:
        # Frames 0,1,2 give one frame, then 2,3,4, and so on: each piece needs the last frame of the one before.
        extended = carry.extend(x_BCFHW, 1, FRAMES)
        if not carry.fresh:
            return time_conv(extended)
        first, count = x_BCFHW[:, :, :1], x_BCFHW.shape[FRAMES]
        return first if count == 1 else torch.cat([first, time_conv(x_BCFHW)], FRAMES)


class Upsample(nn.Module):
    """Doubles height and width, halves the channels, doubles the frame rate if `temporal`."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x_BCFHW: Tensor, carry: Carry) -> Tensor:
        if self.time_conv is not None:
            x_BCFHW = self._double_rate(self.time_conv, x_BCFHW, carry)
        return each_frame(self.resample, x_BCFHW)

    def _double_rate(self, time_conv: CausalConv3d, x_BCFHW: Tensor, carry: Carry) -> Tensor:
        if not carry.fresh:
            return doubled(time_conv, x_BCFHW, carry)
        # The first frame of a video is not doubled, and the frames after it see zeros in its place.
        first, rest = x_BCFHW[:, :, :1], x_BCFHW[:, :, 1:]
        hidden = torch.cat([torch.zeros_like(first), rest], FRAMES)
        return torch.cat([first, doubled(time_conv, hidden, carry)[:, :, 2:]], FRAMES)


class WanEncoder(nn.Module):
    """Pictures to the mean and log-variance of each latent, before the last 1x1x1 convolution."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv1 = CausalConv3d(PICTURE_CHANNELS, config.dim, (3, 3, 3))
        layers: list[nn.Module] = []
        for level, (in_dim, dim) in enumerate(zip((config.dim, *widths), widths, strict=False)):
            layers += residual_blocks(in_dim, dim, config.num_res_blocks)
            if level < len(widths) - 1:
                layers.append(Downsample(dim, config.temporal_downsample[level]))
        self.downsamples = nn.ModuleList(layers)
        self.middle = middle(widths[-1])
        self.head = head(widths[-1], 2 * config.z_dim)

    def forward(self, x_BCFHW: Tensor, carry: Carry) -> Tensor:
        return run([self.conv1, *self.downsamples, *self.middle, *self.head], x_BCFHW, carry)


class WanDecoder(nn.Module):
    """Latents, after the first 1x1x1 convolution, to pictures."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        temporal = config.temporal_downsample[::-1]
        self.conv1 = CausalConv3d(config.z_dim, widths[0], (3, 3, 3))
        self.middle = middle(widths[0])
        layers: list[nn.Module] = []
        in_dim = widths[0]
        for level, dim in enumerate(widths):
            layers += residual_blocks(in_dim, dim, config.num_res_blocks + 1)
            if level < len(widths) - 1:
                layers.append(Upsample(dim, temporal[level]))
            in_dim = dim // 2  # an upsampling halves the channels
        self.upsamples = nn.ModuleList(layers)
        self.head = head(widths[-1], PICTURE_CHANNELS)

    def forward(self, x_BCFHW: Tensor, carry: Carry) -> Tensor:
        return run([self.conv1, *self.middle, *self.upsamples, *self.head], x_BCFHW, carry)


class WanVAE(Codec):
    """The Wan VAE as a streaming codec; `encode` returns the mean of the posterior and draws nothing."""

    def __init__(self, config: WanVAEConfig, span: int | None = 1) -> None:
        spatial_factor = 2 ** len(config.temporal_downsample)
        super().__init__(config.z_dim, spatial_factor, 2 ** sum(config.temporal_downsample), span)
        self.config = config
        self.encoder = WanEncoder(config)
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = WanDecoder(config)
        # Not in the published state dict, hence not in ours; on the CPU even where a codec is made on the meta device.
        self.register_buffer("latent_mean", torch.tensor(config.latent_mean, device="cpu"), persistent=False)
        self.register_buffer("latent_std", torch.tensor(config.latent_std, device="cpu"), persistent=False)

    def encode_piece(self, frames_BFCHW: Tensor, carry: Carry) -> Tensor:
        mean_BCFHW, _ = self.conv1(self.encoder(frames_BFCHW.transpose(1, 2), carry)).chunk(2, dim=1)
        return mean_BCFHW.transpose(1, 2)

    def decode_piece(self, raw_BFCHW: Tensor, carry: Carry) -> Tensor:
        return self.decoder(self.conv2(raw_BFCHW.transpose(1, 2)), carry).transpose(1, 2)


def run(layers: Iterable[nn.Module], x_BCFHW: Tensor, carry: Carry) -> Tensor:
    """Applies layers in order; those that look back in time are given the carry."""
    for layer in layers:
        looks_back = isinstance(layer, CausalConv3d | ResidualBlock | Downsample | Upsample)
        x_BCFHW = layer(x_BCFHW, carry) if looks_back else layer(x_BCFHW)
    return x_BCFHW


def each_frame(layer: nn.Module, x_BCFHW: Tensor) -> Tensor:
    """Applies a picture layer to every frame."""
    pictures = layer(rearrange(x_BCFHW, "b c f h w -> (b f) c h w"))
    return rearrange(pictures, "(b f) c h w -> b c f h w", b=x_BCFHW.shape[0])


def doubled(time_conv: CausalConv3d, x_BCFHW: Tensor, carry: Carry) -> Tensor:
    """Two frames for each frame."""
    return rearrange(time_conv(x_BCFHW, carry), "b (two c) f h w -> b c (f two) h w", two=2)


def residual_blocks(in_dim: int, dim: int, count: int) -> list[nn.Module]:
    """`count` residual blocks at one resolution, the first of which changes the width."""
    return [ResidualBlock(in_dim if index == 0 else dim, dim) for index in range(count)]


def middle(dim: int) -> nn.ModuleList:
    """The layers at the coarsest resolution."""
    return nn.ModuleList([ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim)])


def head(in_dim: int, out_dim: int) -> nn.ModuleList:
    """The last layers of the encoder and of the decoder."""
    return nn.ModuleList([ChannelNorm(in_dim, 3), nn.SiLU(), CausalConv3d(in_dim, out_dim, (3, 3, 3))])
