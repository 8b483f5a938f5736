"""`load`: text encoder, network and codec put together under a recipe, from a name, a folder or a file."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from longtake.generation.recipe import Recipe
from longtake.generation.stream import Engine
from longtake.models.light_codec import LightCodec
from longtake.models.text import WordText
from longtake.recipes.devices import device_named, faster_dtype, fused, require_dtype
from longtake.recipes.methods import recipe_named
from longtake.recipes.wan_engines import is_wan, load_wan
from longtake.recipes.weight_files import ENCODER_FILE, files_for, load_codec, load_network
from longtake.toy import captions
from longtake.toy.scenes import HEIGHT, RATE, WIDTH

ENCODED_AT_ONCE = 4  # latent frames of given pictures, which bounds memory


def load(
    model: str | Path,
    *,
    recipe: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    levels: int | None = None,
    codec: str | Path | None = None,
    base: str | Path | None = None,
    codec_device: str | torch.device | None = None,
    compile: bool = False,
) -> Engine:
    """Put text encoder, network and codec together under a recipe, with options if any follow its name.

    model: a name (`toy`), a folder that holds student.safetensors and codec_decoder.safetensors, or a network's
    weight file (its codec is looked for beside it, then in the package); whatever else there is goes to `load_wan`,
    with its defaults. device: the GPU if there is one. dtype: by default bfloat16 on a GPU; on a CPU whichever of
    float32 and bfloat16 a short trial finds faster. levels: the number of denoising steps, 1 to 1000; by default the
    recipe's own. codec, base: for `load_wan` alone. codec_device: of the codec, where that is another (docs/gpu.md).
    Streams that go on from pictures need codec_encoder.safetensors beside the codec; it is loaded when first needed.
    compile: whether the network's passes go by fused kernels and recorded graphs where there is a GPU with Triton;
    elsewhere nothing changes. Such a network is for streams alone.
    Raises ValueError, with what to do, for unknown names, for files that are not whole or do not fit, for a recipe that
    the network cannot be streamed under, and for one whose far state is not one that the weights learned to read, where
    their file says under which they were trained.
    """
    require_dtype(dtype)
    if is_wan(model):
        return load_wan(
            model, recipe=recipe, device=device, dtype=dtype, levels=levels, codec=codec, base=base,
            codec_device=codec_device, compile=compile,
        )  # fmt: skip
    if codec is not None:
        raise ValueError(f"model {model} has a codec of its own: others make pictures for networks of Wan's shape")
    if base is not None:
        raise ValueError(f"model {model} has a text encoder of its own: a base is for networks of Wan's shape")
    chosen = recipe_named(recipe, levels)
    network_file, codec_file = files_for(model, recipe)
    device = device_named(device)
    text, network, description = load_network(network_file, device)
    if description["role"] != "student":
        raise ValueError(f"{network_file} holds a {description['role']}, which cannot stream: name a student's weights")
    taught = description.get("recipes", ())
    if not can_read(chosen, taught):
        raise ValueError(
            f"{network_file} was trained under {' and '.join(taught)}, and cannot read the far state of {chosen.name}: "
            "name one of those recipes, or far=none"
        )
    chosen.memory(network)  # refuses what the network cannot read
    codec_place = device_named(codec_device or device)
    own_codec = load_codec([codec_file], codec_place)
    engine = Engine(
        model_name=str(model),
        recipe=chosen,
        text=WordText(text, captions.encode),
        network=network,
        codec=own_codec,
        latent_size=latent_size(own_codec),
        frame_rate=RATE,
        shift=description["shift"],
        encode=_encoding(codec_file, codec_place),
    )
    engine.to(dtype or (faster_dtype(engine) if device.type == "cpu" else torch.bfloat16))
    return fused(engine) if compile else engine


def can_read(recipe: Recipe, taught: Sequence[str]) -> bool:
    """Whether weights that were trained under those recipes can read the far state of another, if it has any.

    How much of a window is seen may change, and how much of what left it is forgotten. True of weights that do not say.
    """
    learned = [recipe_named(name).far for name in taught]
    return not (recipe.far and learned) or any(far and recipe.far.reads_like(far) for far in learned)


def _encoding(codec_file: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From pictures in -1..1 to the latents of a decoder's file, by the encoder beside it, in fp32.

    Loaded at the first call, so that streams without given pictures neither wait for it nor need it.
    """
    encoder_file = codec_file.with_name(ENCODER_FILE)

    @cache
    def codec() -> LightCodec:
        if not encoder_file.is_file():
            raise ValueError(f"pictures cannot be encoded without {encoder_file}, which a checkout of longtake has")
        return load_codec([codec_file, encoder_file], device, span=ENCODED_AT_ONCE)

    return lambda frames_BFCHW: codec().encode(frames_BFCHW)[0]


def latent_size(codec: LightCodec) -> tuple[int, int, int]:
    """Channels, height and width of the toy world's latent frames."""
    return codec.latent_channels, HEIGHT // codec.spatial_factor, WIDTH // codec.spatial_factor
