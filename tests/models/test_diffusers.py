"""The same weights in diffusers: it opens what we write, we open what it writes, and both compute the same.

For machines that have diffusers and accelerate, which nothing else here needs.
"""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.models.layouts import CONFIG, network

from longtake.models.checkpoints import WAN_1_3B, WAN_14B, load_wan, load_wan_vae
from longtake.models.convert import convert
from longtake.models.names import codec_name_in_diffusers, network_name_in_diffusers
from longtake.models.wan import WanTransformer
from longtake.models.wan_vae import WanVAE, WanVAEConfig

pytest.importorskip("accelerate")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("default")


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    tensors = other.state_dict()
    return all(torch.equal(tensors.pop(name), tensor) for name, tensor in one.state_dict().items()) and not tensors


@pytest.mark.parametrize("config", [WAN_1_3B, WAN_14B])
def test_names_and_shapes_of_the_published_networks(config) -> None:
    sizes = {"num_attention_heads": config.heads, "num_layers": config.layers, "ffn_dim": config.ffn_dim}
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel(**sizes).state_dict()
        ours = WanTransformer(config).state_dict()
    renamed = {network_name_in_diffusers(name): tensor.shape for name, tensor in ours.items()}
    assert renamed == {name: tensor.shape for name, tensor in theirs.items()}


def test_names_and_shapes_of_the_published_vae() -> None:
    with torch.device("meta"):
        theirs, ours = diffusers.AutoencoderKLWan().state_dict(), WanVAE(WanVAEConfig()).state_dict()
    renamed = {codec_name_in_diffusers(name, WanVAEConfig()): tensor.shape for name, tensor in ours.items()}
    assert renamed == {name: tensor.shape for name, tensor in theirs.items()}


@torch.no_grad()
def test_a_network_there_and_back(tmp_path: Path) -> None:
    ours = network(config=replace(CONFIG, channels=16, text_dim=32, level_dim=256)).eval()
    torch.save(ours.state_dict(), tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "there", "diffusers", shard_bytes=10**6)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "there")
    noisy, text, level = torch.randn(1, 3, 16, 8, 12), torch.randn(1, 7, 32), torch.full((1, 3), 0.5)
    expected = theirs(noisy.transpose(1, 2), torch.tensor([500]), text).sample.transpose(1, 2)
    got = ours(noisy, level, ours.prompt_keys(text[:, None]), ours.clip_view(noisy))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "back", max_shard_size="1MB")
    loaded = load_wan(tmp_path / "back")
    assert equal(loaded, ours)
    assert loaded.config == ours.config


@torch.no_grad()
def test_a_vae_there_and_back(tmp_path: Path) -> None:
    torch.manual_seed(1)
    ours = WanVAE(WanVAEConfig(dim=8)).eval()
    torch.save(ours.state_dict(), tmp_path / "vae.pth")
    convert(tmp_path / "vae.pth", tmp_path / "there", "diffusers")
    theirs = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "there")
    raw_BFCHW, frames_BFCHW = torch.randn(1, 3, 16, 4, 6), torch.rand(1, 9, 3, 32, 48) * 2 - 1
    decoded = ours.decode(ours.normalise(raw_BFCHW))[0].clamp(-1, 1)
    torch.testing.assert_close(
        decoded, theirs.decode(raw_BFCHW.transpose(1, 2)).sample.transpose(1, 2), atol=1e-4, rtol=0
    )
    encoded = theirs.encode(frames_BFCHW.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    torch.testing.assert_close(ours.denormalise(ours.encode(frames_BFCHW)[0]), encoded, atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "pipeline" / "vae")
    assert equal(load_wan_vae(tmp_path / "pipeline"), ours)
