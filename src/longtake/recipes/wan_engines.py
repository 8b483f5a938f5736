"""Engines of Wan's shape: published checkpoints, converted ones, and random weights of their sizes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from longtake.distillation.trainer import STATE_FILE
from longtake.generation.recipe import Recipe
from longtake.generation.stream import Engine
from longtake.models import checkpoints
from longtake.models.codec import Codec
from longtake.models.features import Conversion
from longtake.models.hub import UNKNOWN, Published, located, nearest, registry
from longtake.models.standins import NoDecoder, RandomText, drawn
from longtake.models.taehv import TAEHV, TAEHVConfig
from longtake.models.umt5 import LENGTH, UMT5Files, UMT5Text
from longtake.models.wan import WanConfig, WanTransformer
from longtake.models.wan_vae import WanVAE, WanVAEConfig
from longtake.models.weights import described
from longtake.recipes.devices import device_named, fused, usual_dtype
from longtake.recipes.methods import AT_FULL_SIZE, recipe_named
from longtake.recipes.weight_files import CODEC_FILE, CONVERTED_FILE, NETWORK_FILE, TEACHER_FILE, model_names

WAN_BASE, WAN_RATE, WAN_SHIFT = "wan2.1-1.3b", 16, 5.0
DECODERS: dict[str, Callable[[], Codec]] = {
    "wan": lambda: WanVAE(WanVAEConfig()),
    "light": lambda: TAEHV(TAEHVConfig()),
    "none": lambda: NoDecoder(latent_channels=16, spatial_factor=8, temporal_factor=4),
}
"""What makes pictures of Wan's latents, for engines of random weights."""


def is_wan(model: str | Path) -> bool:
    """Whether a name or a path is that of a network which comes without text encoder and codec of ours."""
    path = Path(model)
    if str(model) in registry() or str(model) in model_names():  # names come first
        return str(model) in registry()
    if path.is_dir():
        ours = (NETWORK_FILE, TEACHER_FILE, CONVERTED_FILE, CODEC_FILE, STATE_FILE)
        theirs = ("transformer", "*.safetensors", "*.pt", "*.pth")
        return not any((path / file).is_file() for file in ours) and _holds(path, theirs)
    if path.suffix == ".safetensors":
        return path.is_file() and described(path).keys() <= {"network"}  # of our networks, one that was converted
    return path.is_file() and path.suffix in (".pt", ".pth", ".json")


def _holds(folder: Path, patterns: Sequence[str]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def load_wan(
    model: str | Path,
    *,
    recipe: str,
    base: str | Path | None = None,
    size: tuple[int, int] | None = None,
    shift: float | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    levels: int | None = None,
    codec: str | Path | None = None,
    codec_device: str | torch.device | None = None,
    compile: bool = False,
) -> Engine:
    """Put a network of Wan's shape together with Wan's text encoder and VAE, under a recipe.

    model: a name of `longtake models` that was pulled, or a path as `models.checkpoints.load_wan` takes it. base: where
    text encoder, tokenizer and VAE are, a pulled name or the folder of a whole Wan2.1 model, in its own layout or in
    that of diffusers; by default the model's own folder if it is one, else wan2.1-1.3b as pulled: all sizes share them.
    size: height and width of pictures, by default those of the registry (480 x 832). shift: of the levels; by default
    the registry's, and for a path 5, that of Self Forcing and most students. dtype: by default bfloat16 on a GPU and
    float32 on a CPU. levels: as for `load`. codec: what makes pictures in place of the base's VAE, as
    `models.checkpoints.load_codec` takes it: a light decoder, for previews. Given pictures are encoded by Wan's VAE all
    the same, which is then loaded when first needed. codec_device, compile: as for `load`.
    ValueError, with what to do, for what is missing, does not fit or cannot be streamed.
    """
    if shift is not None and not shift > 0:
        raise ValueError(f"the shift of levels is above 0, got {shift:g}")
    chosen = recipe_named(recipe, levels, AT_FULL_SIZE)
    known = registry().get(str(model), registry()[WAN_BASE])
    place = device_named(device)
    dtype = dtype or usual_dtype(place)
    if str(model) not in registry():  # what is no network is told of before a base is, which would have to be pulled
        checkpoints.network_config(checkpoints.open_network(model)[0])
    folder = _wan_base(model, base)
    files = UMT5Files.in_folder(folder)
    decoder = checkpoints.load_codec(codec or folder, device=device_named(codec_device or place), dtype=dtype)
    network = load_wan_network(model, recipe=recipe, device=place, dtype=dtype)
    chosen.memory(network)  # refuses what the network cannot read
    sides = latent_sides(size or (known.height, known.width), decoder.spatial_factor, network.config.patch)
    engine = Engine(
        model_name=str(model),
        recipe=chosen,
        text=UMT5Text(files, device=place),
        network=network,
        codec=decoder,
        latent_size=(decoder.latent_channels, *sides),
        frame_rate=known.frame_rate or WAN_RATE,
        shift=shift or (known.shift if isinstance(known.shift, int | float) else WAN_SHIFT),
        encode=_wan_encoding(network, decoder, folder),
        codec_name=None if codec is None else str(codec),
        base_name=None if base is None else str(base),
    )
    return fused(engine) if compile else engine


def load_wan_network(
    model: str | Path,
    *,
    recipe: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> WanTransformer:
    """A Wan network for a recipe, frozen, straight to a device and a type: the network's part of an engine.

    model: a name of `longtake models` that was pulled, or a path as `models.checkpoints.load_wan` takes it.
    ValueError where that does not load, is a many-step teacher, or was trained for blocks of another size or without
    the recipe's far state.
    """
    chosen = recipe_named(recipe, usual=AT_FULL_SIZE)
    known = registry().get(str(model))
    if known and known.recipe is None:
        raise ValueError(f"{model} is no student of any method, and cannot stream: name one that is")
    if known:
        require_block(known, chosen)
    load_named = checkpoints.load_wan if known is None else checkpoints.load_published
    network = load_named(str(model), device=device_named(device), dtype=dtype)
    if chosen.far and not network.config.reads_far:
        raise ValueError(f"{model} was not trained to read the far state of {chosen.name}")
    return network


def _wan_base(model: str | Path, base: str | Path | None) -> Path:
    """The folder that holds text encoder, tokenizer and VAE. ValueError if the default one was never pulled."""
    own = Path(model)
    if base is None and own.is_dir() and _holds(own, ("text_encoder", "models_t5_umt5*")):
        return own
    return located(base or WAN_BASE)


def _wan_encoding(network: WanTransformer, decoder: Codec, folder: Path) -> Callable[[Tensor], Tensor]:
    """From pictures in -1..1 to latents, by Wan's VAE, in whichever precision the network computes by now.

    If the decoder is none, the VAE in the folder is loaded at the first call.
    """

    @cache
    def vae() -> Codec:
        place = decoder.latent_mean.device
        return decoder if isinstance(decoder, WanVAE) else checkpoints.load_wan_vae(folder, device=place)

    def encode(frames_BFCHW: Tensor) -> Tensor:
        dtype = network.patch_embedding.weight.dtype
        return vae().to(dtype).encode(frames_BFCHW.to(dtype))[0]

    return encode


def require_block(known: Published, chosen: Recipe) -> None:
    """ValueError where a published checkpoint is known to make blocks of another size than a recipe's."""
    if known.block not in (None, UNKNOWN, chosen.block):
        raise ValueError(
            f"{known.name} makes blocks of {known.block} latent frames, and {chosen.name} of {chosen.block}"
        )


def load_random(
    model: str,
    *,
    recipe: str,
    size: tuple[int, int] | None = None,
    decoder: str = "wan",
    codec_device: str | torch.device | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    levels: int | None = None,
    compile: bool = False,
) -> Engine:
    """An engine of a published model's size whose weights are random numbers: as fast and as large as the real one.

    model: a name of `longtake models` that is a network; nothing needs to be pulled. The network can read whatever the
    recipe remembers. size: height and width of pictures, by default those of the registry. decoder: of `DECODERS`:
    Wan's VAE, the light one in TAEHV's layout, or none, whose pictures have no pixels. Random numbers stand in for
    text. codec_device, device, dtype, levels, compile: as for `load_wan`. ValueError for unknown names, and for
    what cannot be.
    """
    chosen = recipe_named(recipe, levels, AT_FULL_SIZE)
    config, height, width = published_sizes(model, size)
    place = device_named(device)
    dtype = dtype or usual_dtype(place)
    codec = drawn(decoder_named(decoder), device_named(codec_device or place), dtype)
    network = drawn(lambda: WanTransformer(reading(config, chosen)), place, dtype)
    chosen.memory(network)  # refuses what the network cannot read
    engine = Engine(
        model_name=model,
        recipe=chosen,
        text=RandomText(LENGTH, config.text_dim, place),
        network=network,
        codec=codec,
        latent_size=(codec.latent_channels, height, width),
        frame_rate=WAN_RATE,
        shift=WAN_SHIFT,
    )
    return fused(engine) if compile else engine


def published_sizes(model: str, size: tuple[int, int] | None = None) -> tuple[WanConfig, int, int]:
    """A published network's sizes, and height and width of the latents of pictures of such a size, by default its own.

    ValueError for unknown names, and for pictures that cannot be.
    """
    known = {name: one for name, one in registry().items() if one.network in checkpoints.NETWORKS}
    if model not in known:
        raise ValueError(f"no published network {model!r}: {nearest(model, known)}")
    config = checkpoints.NETWORKS[str(known[model].network)]
    factor = 2 ** len(WanVAEConfig().temporal_downsample)
    return config, *latent_sides(size or (known[model].height, known[model].width), factor, config.patch)


def decoder_named(name: str) -> Callable[[], Codec]:
    """What makes a decoder, of `DECODERS`. ValueError for others."""
    if name not in DECODERS:
        raise ValueError(f"no decoder {name!r}: there are {', '.join(DECODERS)}")
    return DECODERS[name]


def reading(config: WanConfig, recipe: Recipe) -> WanConfig:
    """The same network, able to read all that a recipe remembers.

    Where that takes converted layers and it has none, the first half of them are, as published (ReHyAt: 15 of 30).
    """
    conversion = config.conversion
    if recipe.joint and conversion is None:
        conversion = Conversion(layers=tuple(range(config.layers // 2)), current=recipe.block)
    return replace(config, reads_far=config.reads_far or recipe.far is not None, conversion=conversion)


def latent_sides(size: tuple[int | None, int | None], factor: int, patch: int) -> tuple[int, int]:
    """Height and width of the latents of pictures of that height and width. ValueError if there are none."""
    height, width = size
    step = factor * patch
    if not height or not width or height % step or width % step:
        raise ValueError(f"pictures must be multiples of {step} high and wide, not {height} x {width}")
    return height // factor, width // factor
