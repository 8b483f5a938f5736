"""Checkpoints from one layout to another: every tensor as it is, under other names."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from longtake.models.checkpoints import (
    DIFFUSERS_CODEC,
    codec_config,
    holds_codec,
    network_config,
    open_codec,
    open_network,
)
from longtake.models.names import OURS, codec_name_in_diffusers, network_name_in_diffusers
from longtake.models.wan import WanConfig, WanTransformer
from longtake.models.wan_vae import WanVAE, WanVAEConfig
from longtake.models.weights import ENTRIES, Checkpoint, require_fit, save_weights, written_whole

LAYOUTS = ("original", "diffusers", "longtake")
SHARD_BYTES = 5 * 10**9
_FILES = (".pth", ".safetensors")  # what a target that is one file may end in
_WEIGHTS = "diffusion_pytorch_model"


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
    target that exists is whole. ValueError for a source that does not load, or a layout that has no place for it or
    its sizes: files but ours tell them by shapes, and folders by their config.json too.
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
    if holds_codec(source, entries):
        if lora is not None or alpha is not None:
            raise ValueError(f"{source} is a Wan VAE, which takes no LoRA and no alpha")
        checkpoint, config, _ = open_codec(source, entries=entries)
        _require_space(target.parent, checkpoint)
        _convert_codec(checkpoint, config, target, layout, shard_bytes)
    else:
        checkpoint, _ = open_network(source, entries=entries, lora=lora, alpha=alpha)
        _require_space(target.parent, checkpoint)
        _convert_network(checkpoint, target, layout, shard_bytes)
    return checkpoint


def _convert_network(checkpoint: Checkpoint, target: Path, layout: str, shard_bytes: int) -> None:
    config = network_config(checkpoint)
    with torch.device("meta"):
        require_fit(WanTransformer(config), checkpoint.meta, checkpoint.source)
    if layout == "longtake":
        _save_ours(target, checkpoint.renamed({OURS + name: name for name in checkpoint.meta}), "network", config)
        return
    written = diffusers_network(config) if layout == "diffusers" else _original_network(config)
    in_theirs = checkpoint
    if layout == "diffusers":
        in_theirs = checkpoint.renamed({network_name_in_diffusers(name): name for name in checkpoint.meta})
    require_told(target, config, network_config(_as_read_back(checkpoint, target, written)))
    _save_theirs(target, in_theirs, written, shard_bytes)


def _convert_codec(checkpoint: Checkpoint, config: WanVAEConfig, target: Path, layout: str, shard_bytes: int) -> None:
    with torch.device("meta"):
        require_fit(WanVAE(config), checkpoint.meta, checkpoint.source)
    if layout == "longtake":
        _save_ours(target, checkpoint, "wan_vae", config)
    elif layout == "diffusers":
        renamed = checkpoint.renamed({codec_name_in_diffusers(name, config): name for name in checkpoint.meta})
        written = diffusers_codec(config)
        require_told(target, config, codec_config(_as_read_back(checkpoint, target, written)))
        _save_theirs(target, renamed, written, shard_bytes)
    elif target.suffix in _FILES:
        require_told(target, config, codec_config(_as_read_back(checkpoint, target, {})))
        _save_theirs(target, checkpoint, {}, shard_bytes)
    else:
        raise ValueError(f"{target}: the original Wan VAE is one file, NAME.pth or NAME.safetensors")


def _as_read_back(checkpoint: Checkpoint, target: Path, written: Mapping[str, Any]) -> Checkpoint:
    """What would be found of a checkpoint in another layout than ours, in our names: a single file has no config."""
    return replace(checkpoint, source=target, description=None, config={} if target.suffix in _FILES else written)


def require_told(target: Path | str, config: WanConfig | WanVAEConfig, found: WanConfig | WanVAEConfig) -> None:
    """ValueError unless the sizes that would be read back are those that there are."""
    sizes, read_back = _sizes(config), _sizes(found)
    if lost := [name for name in sizes if sizes[name] != read_back[name]]:
        raise ValueError(f"{target} would not tell {', '.join(lost)}: a file in the layout longtake does")


def _sizes(config: WanConfig | WanVAEConfig) -> dict[str, Any]:
    """As JSON holds them; a rotary split that goes without saying is said."""
    said = replace(config, rotary_split=config.axes.split) if isinstance(config, WanConfig) else config
    return dict(json.loads(json.dumps(asdict(said))))


def _save_ours(target: Path, checkpoint: Checkpoint, part: str, config: WanConfig | WanVAEConfig) -> None:
    save_weights(target, _read(checkpoint, checkpoint.meta), {part: asdict(config)}, int8=False)


def _save_theirs(target: Path, checkpoint: Checkpoint, config: Mapping[str, Any], shard_bytes: int) -> None:
    """One file, or a folder as diffusers and Wan publish it."""
    with written_whole(target) as beside:
        if target.suffix == ".pth":
            torch.save(_read(checkpoint, checkpoint.meta), beside)
        elif target.suffix == ".safetensors":
            _save_file(beside, _read(checkpoint, checkpoint.meta))
        else:
            beside.mkdir()
            (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            _save_shards(beside, checkpoint, shard_bytes)


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


def diffusers_codec(config: WanVAEConfig) -> dict[str, Any]:
    """A Wan VAE's sizes as diffusers' config.json has them."""
    sizes = {field.name: getattr(config, field.name) for field in fields(config)}
    return {"_class_name": "AutoencoderKLWan", "attn_scales": [], "dropout": 0.0} | {
        theirs: list(sizes[ours]) if isinstance(sizes[ours], Sequence) else sizes[ours]
        for ours, theirs in DIFFUSERS_CODEC.items()
    }


def diffusers_network(config: WanConfig) -> dict[str, Any]:
    """A network's sizes as diffusers' config.json has them."""
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
