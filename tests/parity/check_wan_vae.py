"""The Wan VAE against recorded numbers of the published one: encode, decode, and decode in pieces."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longtake.models.codec import Codec
from longtake.models.wan_vae import WanVAE, WanVAEConfig

CONFIG_KEYS = ("dim", "z_dim", "dim_mult", "num_res_blocks", "temporal_downsample")


def check(fixture: Any) -> None:
    """Compares every output of one `wan_vae` fixture."""
    codec = load(fixture)
    with torch.inference_mode():
        check_encode(fixture, codec)
        check_decode(fixture, codec)
        check_streams(fixture, codec)


def load(fixture: Any) -> WanVAE:
    """The codec of a fixture, every size from its configuration."""
    sizes = {key: fixture.meta["config"][key] for key in CONFIG_KEYS}
    mean, std = (tuple(fixture.inputs[name].tolist()) for name in ("mean", "std"))
    codec = WanVAE(WanVAEConfig(**sizes, latent_mean=mean, latent_std=std))
    codec.load_state_dict(fixture.weights, strict=True)
    return codec.eval()


def check_encode(fixture: Any, codec: WanVAE) -> None:
    frames_BFCHW = fixture.inputs["video"].transpose(1, 2)
    latents_BFCHW, _ = codec.encode(frames_BFCHW)
    fixture.compare("encode.normalised", latents_BFCHW)
    fixture.compare("encode.raw_mu", codec.denormalise(latents_BFCHW).transpose(1, 2))
    fixture.compare("image.encode.normalised", codec.encode(frames_BFCHW[:, :1])[0])


def check_decode(fixture: Any, codec: WanVAE) -> None:
    """Whole clip, one latent frame inside at a time and all at once."""
    for codec.span in (1, None):
        fixture.compare("decode.unclamped", codec.decode(fixture.inputs["latent"])[0])


def check_streams(fixture: Any, codec: WanVAE) -> None:
    """Every recorded cutting gives the recorded numbers of frames, and all the same frames."""
    config, name = fixture.meta["config"], "stream.first_two_chunks"
    for cutting, chunks in config["stream_chunks"].items():
        pieces = stream(codec, fixture.inputs["latent"], chunks)
        assert [piece.shape[1] for piece in pieces] == config["stream_frames"][cutting]
        fixture.compare("decode.unclamped", torch.cat(pieces, 1))
        if cutting == config["stored_stream"]:
            batch, frames = fixture.outputs[name].shape[:2]
            fixture.compare(name, torch.cat(pieces[:2], 1)[:batch, -frames:])


def stream(codec: Codec, latents_BFCHW: Tensor, chunks: list[int]) -> list[Tensor]:
    """The pictures of each chunk of latent frames, decoded one after the other."""
    ends = torch.tensor([0, *chunks]).cumsum(0).tolist()
    pieces, state = [], None
    for start, end in pairwise(ends):
        frames_BFCHW, state = codec.decode(latents_BFCHW[:, start:end], state)
        pieces.append(frames_BFCHW)
    return pieces
