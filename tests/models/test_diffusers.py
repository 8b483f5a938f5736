"""The same weights in diffusers: it opens what we write, we open what it writes, both compute the same, and pipelines
take our modules.

For machines that have diffusers and accelerate, which nothing else here needs.
"""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.models.layouts import CONFIG, network

from longtake.models.checkpoints import WAN_1_3B, WAN_14B, load_wan, load_wan_vae
from longtake.models.convert import convert
from longtake.models.diffusers import from_pipeline, from_transformer, from_vae, to_pipeline, to_transformer, to_vae
from longtake.models.names import codec_name_in_diffusers, network_name_in_diffusers
from longtake.models.taehv import TAEHV, TAEHVConfig
from longtake.models.wan import WanTransformer
from longtake.models.wan_vae import WanVAE, WanVAEConfig

MISSING = 'diffusers and accelerate are not here: pip install "longtake[diffusers]"'
pytest.importorskip("accelerate", reason=MISSING)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers", reason=MISSING)
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


# pipelines


def transformer(**sizes):
    torch.manual_seed(0)
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32, "text_dim": 8}
    return diffusers.WanTransformer3DModel(**small | sizes).eval()


def pipeline(transformer=None, vae=None):
    made = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae,
        transformer=transformer,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def theirs():
    torch.manual_seed(1)
    return pipeline(transformer(), diffusers.AutoencoderKLWan(base_dim=8).eval())


def clip(made) -> torch.Tensor:
    said, nothing = torch.full((1, 5, 8), 0.3), torch.zeros(1, 5, 8)
    return made(
        prompt_embeds=said, negative_prompt_embeds=nothing, height=32, width=48, num_frames=9, num_inference_steps=2,
        generator=torch.Generator().manual_seed(1), output_type="pt",
    ).frames  # fmt: skip


def sizes(module) -> dict:
    return json.loads(json.dumps({name: size for name, size in module.config.items() if name[0] != "_"}))


def test_a_pipeline_there_and_back(theirs) -> None:
    """The same tensors, names, sizes and pictures, and no weight copied."""
    network, codec = from_pipeline(theirs)
    assert network.config.heads == 2 and codec.config.dim == 8
    assert not any(x.requires_grad for x in (*network.parameters(), *codec.parameters()))
    back = to_pipeline(pipeline(), network=network, codec=codec)
    for one, other in ((theirs.transformer, back.transformer), (theirs.vae, back.vae)):
        assert equal(one, other) and sizes(one) == sizes(other)
        assert {x.data_ptr() for x in one.parameters()} == {x.data_ptr() for x in other.parameters()}
    assert torch.equal(clip(theirs), clip(back)) and clip(back).std() > 0


@torch.no_grad()
def test_our_modules_there_and_back() -> None:
    ours = network(config=replace(CONFIG, channels=16, level_dim=256)).eval()
    vae = WanVAE(WanVAEConfig(dim=8, latent_mean=(0.1,) * 16)).eval()
    assert equal(from_transformer(to_transformer(ours)), ours) and equal(from_vae(to_vae(vae)), vae)
    assert from_transformer(to_transformer(ours)).config == ours.config
    assert to_vae(vae).config.latents_mean == [0.1] * 16
    torch.testing.assert_close(from_vae(to_vae(vae)).latent_mean, vae.latent_mean, atol=0, rtol=0)
    noisy, text = torch.randn(1, 3, 16, 8, 12), torch.randn(1, 7, 8)
    expected = ours(noisy, torch.full((1, 3), 0.5), ours.prompt_keys(text[:, None]), ours.clip_view(noisy))
    got = to_transformer(ours)(noisy.transpose(1, 2), torch.tensor([500]), text).sample.transpose(1, 2)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_pipeline_in_half_precision(theirs, tmp_path: Path) -> None:
    """diffusers loads some of a transformer's weights in float32 all the same; ours is of one type, and runs."""
    theirs.transformer.save_pretrained(tmp_path)
    loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {x.dtype for x in loaded.parameters()} == {torch.bfloat16, torch.float32}
    ours = from_transformer(loaded)
    assert {x.dtype for x in ours.parameters()} == {torch.bfloat16}
    noisy, text = torch.randn(1, 3, 16, 4, 6), torch.randn(1, 5, 8).bfloat16()
    made = ours(noisy.bfloat16(), torch.full((1, 3), 0.5), ours.prompt_keys(text[:, None]), ours.clip_view(noisy))
    assert made.isfinite().all()
    assert clip(to_pipeline(theirs, network=ours)).isfinite().all()


def test_what_only_one_side_has_is_refused(theirs) -> None:
    with pytest.raises(ValueError, match=r"no place for blocks\.0\.self_attn\.linear_proj"):
        to_transformer(network(config=replace(CONFIG, reads_far=True)))
    with pytest.raises(ValueError, match="WanTransformer3DModel would not tell extent"):
        to_transformer(network(config=replace(CONFIG, extent=9)))
    before = theirs.transformer
    with pytest.raises(ValueError, match="no place for a TAEHV"):
        to_pipeline(theirs, network=network(config=replace(CONFIG, channels=16)), codec=TAEHV(TAEHVConfig()))
    assert theirs.transformer is before, "a pipeline is changed as a whole or not at all"
    with pytest.raises(ValueError, match=r"none that longtake has: eps 0\.001, not 1e-06"):
        from_transformer(transformer(eps=1e-3))
    with pytest.raises(ValueError, match=r"does not fit WanTransformer: 18 not known .*add_k_proj"):
        from_transformer(transformer(image_dim=8, added_kv_proj_dim=24))
    with pytest.raises(ValueError, match="a WanTransformer3DModel of diffusers was expected, not a AutoencoderKLWan"):
        from_transformer(theirs.vae)
    with pytest.raises(ValueError, match="not in memory"):
        from_vae(theirs.vae.to("meta"))
    theirs.register_modules(transformer_2=transformer())
    with pytest.raises(ValueError, match="two transformers"):
        from_pipeline(theirs)
