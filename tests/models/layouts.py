"""Synthetic checkpoints: the same network in every layout that is published, each written without our own tables."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from longtake.models.wan import WanConfig, WanTransformer

CONFIG = WanConfig(dim=256, heads=2, ffn_dim=32, layers=2, text_dim=8, channels=4, level_dim=16)
Tensors = dict[str, Tensor]


def network(seed: int = 0, config: WanConfig = CONFIG) -> WanTransformer:
    torch.manual_seed(seed)
    return WanTransformer(config)


def in_diffusers(tensors: Tensors) -> Tensors:
    """By substitutions on the text of a name, where the library has tables of modules."""
    swaps = (
        (r"^text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
        (r"^text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
        (r"^time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
        (r"^time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
        (r"^time_projection\.1", "condition_embedder.time_proj"),
        (r"\bself_attn\b", "attn1"),
        (r"\bcross_attn\b", "attn2"),
        (r"(attn.)\.([qkv])\b", r"\1.to_\2"),
        (r"(attn.)\.o\b", r"\1.to_out.0"),
        (r"\bnorm3\b", "norm2"),
        (r"\bffn\.0\b", "ffn.net.0.proj"),
        (r"\bffn\.2\b", "ffn.net.2"),
        (r"^head\.head\b", "proj_out"),
        (r"^head\.modulation$", "scale_shift_table"),
        (r"\bmodulation$", "scale_shift_table"),
    )
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, new in swaps:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    return renamed


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def in_blocks(tensors: Tensors, wrapper: str) -> Tensors:
    """With a wrapper around each block of its own."""
    return {re.sub(r"(blocks\.\d+\.)", rf"\1{wrapper}.", name): tensor for name, tensor in tensors.items()}


def shards(folder: Path, tensors: Tensors, count: int = 3) -> Path:
    folder.mkdir(parents=True)
    names = sorted(tensors)
    weight_map = {}
    for number in range(count):
        file = f"diffusion_pytorch_model-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _pickle(content: Callable[[Tensors], object], **options: bool) -> Callable[[Path, Tensors], Path]:
    def write(folder: Path, tensors: Tensors) -> Path:
        torch.save(content(tensors), folder / "model.pt", **options)
        return folder / "model.pt"

    return write


def _one_safetensors(folder: Path, tensors: Tensors) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def _other(tensors: Tensors) -> Tensors:
    """What stands beside the entry that is wanted."""
    return prefixed({name: tensor + 1 for name, tensor in tensors.items()}, "model.")


def _rcm(tensors: Tensors) -> Tensors:
    flat = tensors | {"patch_embedding.weight": tensors["patch_embedding.weight"].flatten(1)}
    return prefixed(flat | {"accum_steps": torch.tensor(3)}, "net.")


LAYOUTS: dict[str, Callable[[Path, Tensors], Path]] = {
    "original, one file": _one_safetensors,
    "original, a folder": lambda folder, tensors: _one_safetensors(folder, tensors).parent,
    "original, shards": lambda folder, tensors: shards(folder / "wan", tensors),
    "original, an index": lambda folder, tensors: (
        shards(folder / "wan", tensors) / "diffusion_pytorch_model.safetensors.index.json"
    ),
    "diffusers, one file": lambda folder, tensors: _one_safetensors(folder, in_diffusers(tensors)),
    "diffusers, a pipeline": lambda folder, tensors: (
        shards(folder / "pipeline" / "transformer", in_diffusers(tensors)).parent
    ),
    "bare": _pickle(dict),
    "bare, model. (Reward Forcing)": _pickle(lambda tensors: prefixed(tensors, "model.")),
    "bare, of torch before 1.6": _pickle(dict, _use_new_zipfile_serialization=False),
    "generator (ode_init, CausVid, LongLive)": _pickle(lambda tensors: {"generator": prefixed(tensors, "model.")}),
    "generator_ema (Self Forcing)": _pickle(lambda tensors: {"generator_ema": prefixed(tensors, "model.")}),
    "generator_ema under FSDP, with others (Rolling Forcing)": _pickle(
        lambda tensors: {
            "generator": _other(tensors),
            "critic": _other(tensors),
            "generator_ema": prefixed(tensors, "model._fsdp_wrapped_module."),
            "step": 600,
        }
    ),
    "generator, each block wrapped twice": _pickle(
        lambda tensors: {
            "generator": prefixed(
                in_blocks(in_blocks(tensors, "_fsdp_wrapped_module"), "_checkpoint_wrapped_module"), "model."
            )
        }
    ),
    "compiled, in data parallel": _pickle(lambda tensors: {"model": prefixed(tensors, "module._orig_mod.")}),
    "generator. in front": _pickle(lambda tensors: prefixed(tensors, "generator.")),
    "rCM": _pickle(_rcm),
}
