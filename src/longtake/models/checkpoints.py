"""Published checkpoints of Wan2.1 and its causal students as our networks, and from one layout to another."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from longtake.models.hub import UNKNOWN, cached, published
from longtake.models.names import (
    OURS,
    codec_in_ours,
    codec_name_in_diffusers,
    merged,
    network_in_ours,
    network_name_in_diffusers,
    unwrapped,
)
from longtake.models.wan import WanConfig, WanTransformer
from longtake.models.wan_vae import WanVAE, WanVAEConfig
from longtake.models.weights import (
    ENTRIES,
    LORA_ENTRIES,
    Checkpoint,
    fill,
    open_checkpoint,
    require_fit,
    save_weights,
)

WAN_1_3B = WanConfig(dim=1536, heads=12, ffn_dim=8960, layers=30, text_dim=4096)
WAN_14B = WanConfig(dim=5120, heads=40, ffn_dim=13824, layers=40, text_dim=4096)
HEAD = 128  # numbers per head of every Wan2.1; shapes do not tell
LAYOUTS = ("original", "diffusers", "longtake")
SHARD_BYTES = 5 * 10**9
CODEC_FILE = "Wan2.1_VAE.pth"
_WEIGHTS = "diffusion_pytorch_model"


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


def load_published(
    name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> WanTransformer:
    """The network of a checkpoint of the registry that was pulled: its entry, and its low-rank updates merged.

    Otherwise as `load_wan`. ValueError, with what to do, for unknown names and for what is not in the cache.
    """
    checkpoint = published(name)
    folder = cached(checkpoint)
    file = folder / checkpoint.files[0]
    entries = ENTRIES if checkpoint.entry in (None, UNKNOWN) else (checkpoint.entry,)
    return load_wan(
        file if file.suffix in (".pt", ".pth") else folder,
        device=device,
        dtype=dtype,
        entries=entries,
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
    if "patch_embedding.weight" not in checkpoint.meta:
        some = ", ".join(sorted(checkpoint.meta)[:3])
        raise ValueError(f"{checkpoint.source} does not hold a Wan network: it begins with {some}")
    if lora is not None:
        checkpoint = merged(checkpoint, open_checkpoint(lora, entries=LORA_ENTRIES), alpha=alpha)
    elif alpha is not None:
        raise ValueError("alpha scales a LoRA, and none is given")
    return checkpoint, layout


def open_codec(path: str | Path, *, config: WanVAEConfig | None = None) -> tuple[Checkpoint, WanVAEConfig, str]:
    """A Wan VAE's checkpoint in our names, its sizes and the layout it had; nothing is read yet."""
    checkpoint = unwrapped(open_checkpoint(_inside(Path(path), "vae", CODEC_FILE)))
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
        return WanConfig(**described)
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
    )


def codec_config(checkpoint: Checkpoint) -> WanVAEConfig:
    """The sizes of a Wan VAE: what our own file or a config.json says, else the published ones at the width it has."""
    described = (checkpoint.description or {}).get("wan_vae")
    if described is not None:
        return WanVAEConfig(**described)
    told = checkpoint.config
    sizes = {ours: told[theirs] for ours, theirs in _CODEC_KEYS.items() if theirs in told}
    entrances = [name for name in ("encoder.conv1.bias", "encoder.conv_in.bias") if name in checkpoint.meta]
    if entrances:
        sizes["dim"] = checkpoint.meta[entrances[0]].numel()
    return WanVAEConfig(**sizes)


def convert(
    source: str | Path,
    target: str | Path,
    layout: str,
    *,
    entries: Sequence[str] = ENTRIES,
    lora: str | Path | None = None,
    alpha: float | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Checkpoint:
    """Write a network or a Wan VAE in another layout, every tensor as it is; returns what was read, in our names.

    target: a `.safetensors` file, or a folder that is made: with a config.json, and weights in files of at most
    `shard_bytes` (the original VAE's is one `.pth`). Our layout is a file. Nothing that is there is overwritten, and a
    target that exists is whole. ValueError for a source that does not load, or a layout that has no place for it.
    """
    target = Path(target)
    if layout not in LAYOUTS:
        raise ValueError(f"no layout {layout!r}: there are {', '.join(LAYOUTS)}")
    if target.exists():
        raise ValueError(f"{target} exists already")
    if layout == "longtake" and target.suffix != ".safetensors":
        raise ValueError(f"{target}: the layout longtake is one file, NAME.safetensors")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: there is no folder {target.parent}")
    if _holds_codec(source, entries):
        if lora is not None:
            raise ValueError(f"{source} is a Wan VAE, which takes no LoRA")
        checkpoint, config, _ = open_codec(source)
        _require_space(target.parent, checkpoint)
        _convert_codec(checkpoint, config, target, layout, shard_bytes)
    else:
        checkpoint, _ = open_network(source, entries=entries, lora=lora, alpha=alpha)
        _require_space(target.parent, checkpoint)
        _convert_network(checkpoint, target, layout, shard_bytes)
    return checkpoint


def _holds_codec(source: str | Path, entries: Sequence[str]) -> bool:
    meta = open_checkpoint(_inside(Path(source), "transformer"), entries=entries).meta
    return any("decoder.middle." in name or "decoder.mid_block." in name for name in meta)


def _convert_network(checkpoint: Checkpoint, target: Path, layout: str, shard_bytes: int) -> None:
    config = network_config(checkpoint)
    with torch.device("meta"):
        require_fit(WanTransformer(config), checkpoint.meta, checkpoint.source)
    if layout == "longtake":
        _save_ours(target, checkpoint.renamed({OURS + name: name for name in checkpoint.meta}), "network", config)
        return
    if layout == "diffusers":
        checkpoint = checkpoint.renamed({network_name_in_diffusers(name): name for name in checkpoint.meta})
    written = _diffusers_network(config) if layout == "diffusers" else _original_network(config)
    _save_theirs(target, checkpoint, written, shard_bytes)


def _convert_codec(checkpoint: Checkpoint, config: WanVAEConfig, target: Path, layout: str, shard_bytes: int) -> None:
    with torch.device("meta"):
        require_fit(WanVAE(config), checkpoint.meta, checkpoint.source)
    if layout == "longtake":
        _save_ours(target, checkpoint, "wan_vae", config)
    elif layout == "diffusers":
        renamed = checkpoint.renamed({codec_name_in_diffusers(name, config): name for name in checkpoint.meta})
        _save_theirs(target, renamed, _diffusers_codec(config), shard_bytes)
    elif target.suffix in (".pth", ".safetensors"):
        _save_theirs(target, checkpoint, {}, shard_bytes)
    else:
        raise ValueError(f"{target}: the original Wan VAE is one file, NAME.pth or NAME.safetensors")


def _save_ours(target: Path, checkpoint: Checkpoint, part: str, config: WanConfig | WanVAEConfig) -> None:
    with _written_whole(target) as beside:
        save_weights(beside, _read(checkpoint, checkpoint.meta), {part: asdict(config)}, int8=False)


def _save_theirs(target: Path, checkpoint: Checkpoint, config: Mapping[str, Any], shard_bytes: int) -> None:
    """One file, or a folder as diffusers and Wan publish it."""
    with _written_whole(target) as beside:
        if target.suffix == ".pth":
            torch.save(_read(checkpoint, checkpoint.meta), beside)
        elif target.suffix == ".safetensors":
            _save_file(beside, _read(checkpoint, checkpoint.meta))
        else:
            beside.mkdir()
            (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            _save_shards(beside, checkpoint, shard_bytes)


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """Where to write a file or a folder that is renamed when it is whole, and removed when writing fails."""
    beside = target.with_name(target.name + ".part")
    _remove(beside)  # of an attempt that was killed
    try:
        yield beside
        os.replace(beside, target)
    except (SafetensorError, RuntimeError, OSError) as error:  # the first two are how a full disk is told of
        raise ValueError(f"{target} could not be written: {error}") from error
    finally:
        _remove(beside)
        _remove(beside.with_name(beside.name + ".part"))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _require_space(folder: Path, checkpoint: Checkpoint) -> None:
    """ValueError unless the weights fit on the disk, said before anything is written."""
    needed, free = sum(tensor.nbytes for tensor in checkpoint.meta.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder} has {free / 1e9:.1f} GB free, and the weights take {needed / 1e9:.1f} GB")


def _save_shards(folder: Path, checkpoint: Checkpoint, shard_bytes: int) -> None:
    """Weights of a folder: one file, or several and an index, one of them in memory at a time."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, tensor in checkpoint.meta.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    if len(shards) == 1:
        _save_file(folder / f"{_WEIGHTS}.safetensors", _read(checkpoint, shards[0]))
        return
    files = [f"{_WEIGHTS}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        _save_file(folder / file, _read(checkpoint, names))
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in checkpoint.meta.values())},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    (folder / f"{_WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _save_file(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors lets only the owner read


def _read(checkpoint: Checkpoint, names: Sequence[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: checkpoint.read(name).contiguous() for name in names}


def _inside(path: Path, *parts: str) -> Path:
    """Of a folder that holds more than one part, the part that is asked for; other paths as they are."""
    return next((path / part for part in parts if (path / part).exists()), path)


_CODEC_KEYS = {
    "dim": "base_dim",
    "z_dim": "z_dim",
    "dim_mult": "dim_mult",
    "num_res_blocks": "num_res_blocks",
    "temporal_downsample": "temperal_downsample",  # diffusers' spelling
    "latent_mean": "latents_mean",
    "latent_std": "latents_std",
}


def _diffusers_codec(config: WanVAEConfig) -> dict[str, Any]:
    sizes = {field.name: getattr(config, field.name) for field in fields(config)}
    return {"_class_name": "AutoencoderKLWan", "attn_scales": [], "dropout": 0.0} | {
        theirs: list(sizes[ours]) if isinstance(sizes[ours], Sequence) else sizes[ours]
        for ours, theirs in _CODEC_KEYS.items()
    }


def _diffusers_network(config: WanConfig) -> dict[str, Any]:
    return {
        "_class_name": "WanTransformer3DModel",
        "attention_head_dim": config.dim // config.heads,
        "cross_attn_norm": True,
        "eps": 1e-6,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.level_dim,
        "in_channels": config.channels,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "out_channels": config.channels,
        "patch_size": [1, config.patch, config.patch],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }


def _original_network(config: WanConfig) -> dict[str, Any]:
    return {
        "_class_name": "WanModel",
        "dim": config.dim,
        "eps": 1e-6,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.level_dim,
        "in_dim": config.channels,
        "model_type": "t2v",
        "num_heads": config.heads,
        "num_layers": config.layers,
        "out_dim": config.channels,
        "text_len": 512,
    }
