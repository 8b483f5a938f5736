"""Our network and VAE as parts of a diffusers pipeline, and back: the same tensors under other names, not copies.

What is written in place on one side is written on the other; moving or casting one of them parts them. diffusers and
accelerate are imported when something is handed over.
"""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from longtake.models.checkpoints import codec_config, codec_opened, network_config
from longtake.models.convert import diffusers_codec, diffusers_network, require_told
from longtake.models.names import codec_name_in_diffusers, network_in_ours, network_name_in_diffusers
from longtake.models.wan import WanTransformer
from longtake.models.wan_vae import WanVAE
from longtake.models.weights import Checkpoint, require_fit

_WITHOUT_END = "rope_max_seq_len"  # diffusers' positions end there, ours nowhere


def to_pipeline(pipeline: Any, *, network: WanTransformer | None = None, codec: WanVAE | None = None) -> Any:
    """Put our network and VAE in the places of a Wan pipeline's `transformer` and `vae`; returns the pipeline.

    What is None stays as it is. ValueError as `to_transformer` and `to_vae`, and then nothing is changed.
    """
    handed = {
        **({} if network is None else {"transformer": to_transformer(network)}),
        **({} if codec is None else {"vae": to_vae(codec)}),
    }
    pipeline.register_modules(**handed)
    return pipeline


def from_pipeline(pipeline: Any) -> tuple[WanTransformer, WanVAE]:
    """The network and the VAE of a Wan pipeline as ours. ValueError as `from_transformer` and `from_vae`."""
    if getattr(pipeline, "transformer_2", None) is not None:
        raise ValueError("the pipeline has two transformers: choose one of them for from_transformer")
    return from_transformer(pipeline.transformer), from_vae(pipeline.vae)


def to_transformer(network: WanTransformer) -> Any:
    """A network as diffusers' `WanTransformer3DModel`, to be given to a pipeline when that is loaded, for instance.

    It attends to a whole clip in both directions, as diffusers does: it neither streams nor remembers.
    ValueError for a far state, converted layers, an extent or a rotary split, for which diffusers has no place.
    """
    library, accelerate = _libraries()
    tensors = {network_name_in_diffusers(name): tensor for name, tensor in network.state_dict().items()}
    sizes = diffusers_network(network.config)
    found = _checkpoint("WanTransformer3DModel", network.state_dict(), sizes)
    require_told("diffusers' WanTransformer3DModel", network.config, network_config(found))
    return _theirs(library.WanTransformer3DModel, sizes, tensors, accelerate)


def to_vae(codec: WanVAE) -> Any:
    """A Wan VAE as diffusers' `AutoencoderKLWan`. ValueError for other codecs, for which diffusers has no place."""
    library, accelerate = _libraries()
    if not isinstance(codec, WanVAE):
        raise ValueError(f"diffusers has no place for a {type(codec).__name__}: its Wan pipelines take a Wan VAE")
    tensors = {codec_name_in_diffusers(name, codec.config): tensor for name, tensor in codec.state_dict().items()}
    sizes = diffusers_codec(codec.config)
    require_told("diffusers' AutoencoderKLWan", codec.config, codec_config(_checkpoint("", tensors, sizes)))
    return _theirs(library.AutoencoderKLWan, sizes, tensors, accelerate)


def from_transformer(transformer: Any) -> WanTransformer:
    """diffusers' `WanTransformer3DModel` as our network, frozen, all of it in the type of its patch embedding.

    What diffusers keeps in float32 beside bfloat16 is a copy, then. ValueError for any other class, for sizes that our
    network does not have, and for weights that are not in memory or are wrapped: names and shapes must fit.
    """
    opened = _opened(transformer, "WanTransformer3DModel")
    checkpoint, _ = network_in_ours(opened)
    config = network_config(checkpoint)
    _require_same(opened, diffusers_network(config))
    with torch.device("meta"):
        network = WanTransformer(config)
    _share(network, checkpoint)
    return network.to(network.patch_embedding.weight.dtype)


def from_vae(vae: Any) -> WanVAE:
    """diffusers' `AutoencoderKLWan` as our VAE, frozen. ValueError as `from_transformer`."""
    opened = _opened(vae, "AutoencoderKLWan")
    checkpoint, config, _ = codec_opened(opened)
    _require_same(opened, diffusers_codec(config))
    with torch.device("meta"):
        codec = WanVAE(config)
    _share(codec, checkpoint)
    return codec.to(codec.conv1.weight.dtype)  # the statistics of its latents, as the weights


def _libraries() -> tuple[ModuleType, ModuleType]:
    try:
        return import_module("diffusers"), import_module("accelerate")
    except ModuleNotFoundError:
        raise ValueError('pipelines are those of diffusers: pip install "longtake[diffusers]"') from None


def _theirs(kind: Any, sizes: Mapping[str, Any], tensors: Mapping[str, Tensor], accelerate: ModuleType) -> Any:
    """One of diffusers' modules around our tensors."""
    with accelerate.init_empty_weights():  # unlike on the meta device, its tables of positions are made
        module = kind(**{name: size for name, size in sizes.items() if not name.startswith("_")})
    _assign(module, tensors)
    return module


def _opened(module: Any, kind: str) -> Checkpoint:
    """One of diffusers' modules as if it were a file. ValueError unless it is of that class and in memory."""
    if not isinstance(module, getattr(_libraries()[0], kind)):
        raise ValueError(f"a {kind} of diffusers was expected, not a {type(module).__name__}")
    tensors = module.state_dict()
    if elsewhere := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"{kind} is not in memory, {elsewhere[0]} for one: load it without offloading")
    return _checkpoint(kind, tensors, module.config)


def _checkpoint(kind: str, tensors: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> Checkpoint:
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    return Checkpoint(source=Path(kind), meta=meta, read=tensors.__getitem__, config=dict(sizes))


def _require_same(opened: Checkpoint, sizes: Mapping[str, Any]) -> None:
    """ValueError where a module says other sizes than ours have, such as an epsilon, which is in no shape."""
    said = json.loads(json.dumps({name: opened.config.get(name, size) for name, size in sizes.items()}))
    if odd := [name for name in sizes if said[name] != sizes[name] and name not in ("_class_name", _WITHOUT_END)]:
        told = ", ".join(f"{name} {said[name]}, not {sizes[name]}" for name in odd)
        raise ValueError(f"{opened.source} is none that longtake has: {told}")


def _share(module: nn.Module, checkpoint: Checkpoint) -> None:
    require_fit(module, checkpoint.meta, checkpoint.source)
    _assign(module, {name: checkpoint.read(name) for name in checkpoint.meta})


def _assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module without weights these, as they are, and freeze it; what else it holds goes to their device."""
    module.load_state_dict(dict(tensors), assign=True)
    module.to(next(module.parameters()).device).requires_grad_(False).eval()
