"""Published checkpoints of Wan2.1, its causal students and a light decoder, as our networks."""

from collections.abc import Sequence
from pathlib import Path

import torch

from longtake.models.codec import Codec
from longtake.models.hub import UNKNOWN, cached, located, published
from longtake.models.names import codec_in_ours, merged, network_in_ours, unwrapped
from longtake.models.taehv import TAEHV, TAEHVConfig
from longtake.models.wan import WanConfig, WanTransformer
from longtake.models.wan_vae import WanVAE, WanVAEConfig
from longtake.models.weights import ENTRIES, LORA_ENTRIES, Checkpoint, fill, open_checkpoint, sizes_of

WAN_1_3B = WanConfig(dim=1536, heads=12, ffn_dim=8960, layers=30, text_dim=4096)
WAN_14B = WanConfig(dim=5120, heads=40, ffn_dim=13824, layers=40, text_dim=4096)
NETWORKS = {"wan2.1-1.3b": WAN_1_3B, "wan2.1-14b": WAN_14B}
"""Sizes by the names that the registry has for them."""
HEAD = 128  # numbers per head of every Wan2.1; shapes do not tell
CODEC_FILE = "Wan2.1_VAE.pth"
DIFFUSERS_CODEC = {  # our words for the VAE's sizes, and its config.json's
    "dim": "base_dim",
    "z_dim": "z_dim",
    "dim_mult": "dim_mult",
    "num_res_blocks": "num_res_blocks",
    "temporal_downsample": "temperal_downsample",  # diffusers' spelling
    "latent_mean": "latents_mean",
    "latent_std": "latents_std",
}


def load_wan(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    entries: Sequence[str] = ENTRIES,
    lora: str | Path | None = None,
    alpha: float | None = None,
) -> WanTransformer:
    """A video network from a checkpoint of any layout, frozen, straight to a device and a type.

    path: a file, an index of shards or a folder; of a diffusers pipeline its `transformer` is taken. dtype: None keeps
    the file's. entries: of a pickle with several, the first of these that is there. lora: a file of low-rank updates
    to add, scaled by alpha / r, by default 1. The peak of memory is the weights and a few tensors.
    ValueError for files that are not whole, and for leftovers, gaps and misfits, by name and shape.
    """
    checkpoint, _ = open_network(path, entries=entries, lora=lora, alpha=alpha)
    return network_of(checkpoint, device=device, dtype=dtype)


def network_of(
    checkpoint: Checkpoint, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> WanTransformer:
    """The network of an opened checkpoint in our names; otherwise as `load_wan`."""
    with torch.device("meta"):
        network = WanTransformer(network_config(checkpoint))
    fill(network, checkpoint, device, dtype)
    return network.requires_grad_(False).eval()


def load_wan_vae(
    path: str | Path,
    *,
    config: WanVAEConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    span: int | None = 1,
) -> WanVAE:
    """The Wan VAE from a checkpoint of any layout, frozen, straight to a device and a type.

    path: a file or a folder; of a whole repository its `vae` or `Wan2.1_VAE.pth` is taken. config: by default what the
    file or a config.json beside it says, else the published sizes. span: latent frames that go through it at once.
    ValueError as in `load_wan`.
    """
    checkpoint, config, _ = open_codec(path, config=config)
    with torch.device("meta"):
        codec = WanVAE(config, span)
    fill(codec, checkpoint, device, dtype)
    return codec.to(device=device, dtype=dtype).requires_grad_(False).eval()


def load_codec(
    codec: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, span: int | None = 1
) -> Codec:
    """Whatever makes pictures of Wan2.1's latents, frozen: its VAE, or a light decoder in TAEHV's layout.

    codec: a name of the registry that was pulled, or a path as `load_wan_vae` takes it, or `load_taehv`. Otherwise as
    these two.
    """
    path = located(codec)
    load = load_taehv if holds_taehv(path) else load_wan_vae
    return load(path, device=device, dtype=dtype, span=span)


def load_taehv(
    path: str | Path,
    *,
    config: TAEHVConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    span: int | None = 1,
) -> TAEHV:
    """A light decoder in TAEHV's layout, frozen, straight to a device and a type; the encoder in its file is left.

    path: a file, or a folder that holds it alone. config: by default the sizes of the published `taew2_1`. span: latent
    frames that go through it at once. ValueError as in `load_wan`.
    """
    checkpoint = unwrapped(open_checkpoint(path))
    decoding = checkpoint.renamed({name: name for name in checkpoint.meta if not name.startswith("encoder.")})
    with torch.device("meta"):
        codec = TAEHV(config or TAEHVConfig(), span)
    fill(codec, decoding, device, dtype)
    return codec.to(device=device, dtype=dtype).requires_grad_(False).eval()


def load_published(
    name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> WanTransformer:
    """The network of a checkpoint of the registry that was pulled: its entry, and its low-rank updates merged.

    Otherwise as `load_wan`. ValueError, with what to do, for unknown names and for what is not in the cache.
    """
    return network_of(open_published(name)[0], device=device, dtype=dtype)


def open_published(name: str) -> tuple[Checkpoint, str]:
    """As `open_network`, of a checkpoint of the registry that was pulled; errors as `load_published`."""
    checkpoint = published(name)
    folder = cached(checkpoint)
    file = folder / checkpoint.files[0]
    return open_network(
        file if file.suffix in (".pt", ".pth") else folder,
        entries=ENTRIES if checkpoint.entry in (None, UNKNOWN) else (checkpoint.entry,),
        lora=folder / checkpoint.lora if checkpoint.lora else None,
    )


def open_network(
    path: str | Path,
    *,
    entries: Sequence[str] = ENTRIES,
    lora: str | Path | None = None,
    alpha: float | None = None,
) -> tuple[Checkpoint, str]:
    """A video network's checkpoint in our names, and the layout it had; nothing is read yet. Errors as `load_wan`."""
    path = Path(path)
    checkpoint, layout = network_in_ours(open_checkpoint(_inside(path, "transformer"), entries=entries))
    if "text" in (checkpoint.description or {}):
        raise ValueError(
            f"{checkpoint.source} holds a text encoder beside its network, as training here writes them: it is no "
            "published checkpoint, and is given as --model"
        )
    if "patch_embedding.weight" not in checkpoint.meta:
        some = ", ".join(sorted(checkpoint.meta)[:3])
        raise ValueError(f"{checkpoint.source} does not hold a Wan network: it begins with {some}")
    if lora is not None:
        checkpoint = merged(checkpoint, open_checkpoint(lora, entries=LORA_ENTRIES), alpha=alpha)
    elif alpha is not None:
        raise ValueError("alpha scales a LoRA, and none is given")
    return checkpoint, layout


def open_codec(
    path: str | Path, *, config: WanVAEConfig | None = None, entries: Sequence[str] = ENTRIES
) -> tuple[Checkpoint, WanVAEConfig, str]:
    """A Wan VAE's checkpoint in our names, its sizes and the layout it had; nothing is read yet."""
    return codec_opened(open_checkpoint(_inside(Path(path), "vae", CODEC_FILE), entries=entries), config)


def codec_opened(checkpoint: Checkpoint, config: WanVAEConfig | None = None) -> tuple[Checkpoint, WanVAEConfig, str]:
    """As `open_codec`, of what is opened already."""
    checkpoint = unwrapped(checkpoint)
    config = config or codec_config(checkpoint)
    with torch.device("meta"):
        names = WanVAE(config).state_dict()
    renamed, layout = codec_in_ours(checkpoint, config, names)
    return renamed, config, layout


def network_config(checkpoint: Checkpoint) -> WanConfig:
    """The sizes of a network in our names: what our own file says, else what its shapes say.

    Heads are not in the shapes: a config.json tells their number, else each has 128 numbers, as in every published Wan.
    ValueError for what is not a whole network.
    """
    described = (checkpoint.description or {}).get("network")
    if described is not None:
        return WanConfig.of(described)
    needed = ("patch_embedding", "text_embedding.0", "time_embedding.0", "blocks.0.ffn.0")
    shapes = {name: checkpoint.meta[f"{name}.weight"].shape for name in needed if f"{name}.weight" in checkpoint.meta}
    if lacking := [name for name in needed if len(shapes.get(name, ())) != (5 if name == needed[0] else 2)]:
        raise ValueError(
            f"{checkpoint.source} does not hold a whole Wan network: {lacking[0]}.weight is missing or odd"
        )
    dim, channels, _, patch, _ = shapes["patch_embedding"]
    projection = checkpoint.meta.get("blocks.0.self_attn.linear_proj.weight")
    told = checkpoint.config.get("num_heads") or checkpoint.config.get("num_attention_heads")
    size = HEAD if projection is None else projection.shape[0]
    heads = told or dim // size
    if heads < 1 or dim % heads:
        raise ValueError(f"{checkpoint.source} is {dim} wide, which {heads} heads of a Wan cannot share")
    return WanConfig(
        dim=dim,
        heads=heads,
        ffn_dim=shapes["blocks.0.ffn.0"][0],
        layers=len({name.split(".")[1] for name in checkpoint.meta if name.startswith("blocks.")}),
        text_dim=shapes["text_embedding.0"][1],
        channels=channels,
        patch=patch,
        level_dim=shapes["time_embedding.0"][1],
        reads_far=projection is not None,
        far_maps="blocks.0.self_attn.far_maps.keys" in checkpoint.meta,
    )


def codec_config(checkpoint: Checkpoint) -> WanVAEConfig:
    """The sizes of a Wan VAE: what our own file or a config.json says, else the published ones at the width it has."""
    described = (checkpoint.description or {}).get("wan_vae")
    if described is not None:
        return sizes_of(WanVAEConfig, described)
    told = checkpoint.config
    sizes = {ours: told[theirs] for ours, theirs in DIFFUSERS_CODEC.items() if theirs in told}
    entrances = [name for name in ("encoder.conv1.bias", "encoder.conv_in.bias") if name in checkpoint.meta]
    if entrances:
        sizes["dim"] = checkpoint.meta[entrances[0]].numel()
    return WanVAEConfig(**sizes)


def holds_codec(path: str | Path, entries: Sequence[str]) -> bool:
    """Whether a checkpoint holds a Wan VAE rather than a network; of a whole repository, the network counts."""
    meta = open_checkpoint(_inside(Path(path), "transformer"), entries=entries).meta
    return any("decoder.middle." in name or "decoder.mid_block." in name for name in meta)


def holds_taehv(path: str | Path) -> bool:
    """Whether a checkpoint is a light decoder in TAEHV's layout, rather than a Wan VAE in any."""
    checkpoint = unwrapped(open_checkpoint(_inside(Path(path), "vae", CODEC_FILE)))
    return "decoder.1.weight" in checkpoint.meta


def _inside(path: Path, *parts: str) -> Path:
    """Of a folder that holds more than one part, the part that is asked for; other paths as they are."""
    return next((path / part for part in parts if (path / part).exists()), path)
