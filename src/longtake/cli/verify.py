"""`longtake verify`: does a checkpoint of Wan's network do what it should?"""

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from longtake.cli.engines import precision_named
from longtake.cli.options import Codec, Device, PrecisionName, Switch
from longtake.cli.terminal import CHECK_FAILED, say
from longtake.files import make_folder

if TYPE_CHECKING:
    import torch

    from longtake.generation.recipe import Recipe


def verify(
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")],
    recipe: Annotated[str | None, arg(metavar="RECIPE")] = None,
    codec: Codec = None,
    text: Annotated[Path | None, arg(metavar="DIR")] = None,
    prompt: str = "a red fox walks through fresh snow in a pine forest, in warm morning light",
    size: Annotated[str, arg(metavar="WxH")] = "832x480",
    blocks: Annotated[int, arg(metavar="N")] = 3,
    seed: int = 42,
    device: Device = None,
    dtype: PrecisionName = "auto",
    out: Annotated[Path | None, arg(aliases=["-o"], metavar="DIR")] = None,
    json: Switch = False,
) -> int:
    """Check a Wan network: names, shapes, one step against plain attention, a short clip. Exits 1 if a check fails.

    Args:
        checkpoint: A file, an index of shards, a folder, or the name of one that was pulled.
        recipe: The method that makes the clip; unless given, the one a name was trained under, else self_forcing.
        codec: A Wan VAE or light decoder, which makes pictures of the clip; without one, latents are checked and drawn.
        text: Folder of a Wan model with its text encoder and tokenizer; without one, random numbers stand in for text.
        prompt: What the clip shows, where there is a text encoder.
        size: Of the pictures.
        blocks: Of the clip; 0 makes none, which is for teachers.
        seed: Of the clip's noise.
        dtype: Precision; auto is bfloat16 on a GPU and float32 on a CPU.
        out: Folder for verify.json, to send back, and contact_sheet.png.
        json: Print one JSON object.
    """
    from longtake.evaluation import verify as checks
    from longtake.models.checkpoints import load_codec, network_config, network_of, open_network, open_published
    from longtake.models.hub import registry
    from longtake.models.wan_vae import WanVAEConfig
    from longtake.plan import pixels
    from longtake.recipes.devices import device_named, usual_dtype
    from longtake.recipes.wan_engines import latent_sides

    chosen, shift = _recipe_to_verify(checkpoint, recipe, blocks)
    width, height = pixels(size)
    if out is not None:
        make_folder(out)
    place = device_named(device)
    precision = precision_named(dtype) or usual_dtype(place)
    opened, layout = open_published(checkpoint) if checkpoint in registry() else open_network(checkpoint)
    factor = 2 ** len(WanVAEConfig().temporal_downsample)
    latent_size = latent_sides((height, width), factor, network_config(opened).patch)
    results, pictures = [checks.fits(opened)], None
    report = {
        **checks.machine(place),
        "checkpoint": checks.facts(opened, layout),
        "recipe": chosen.name,
        "shift": shift,
        "precision": str(precision).removeprefix("torch."),
        "size": size,
        "blocks": blocks,
        "seed": seed,
        "text": f"a stand-in: numbers from seed {seed}, no words" if text is None else prompt,
        "pictures": "three channels of the latents" if codec is None else f"decoded by {Path(codec).name}",
    }
    if results[0].passed:
        decoder = None if codec is None else load_codec(codec, device=place, dtype=precision)
        network = network_of(opened, device=place, dtype=precision)
        embedding = checks.standin_text(network, seed) if text is None else _embedded(text, prompt, place)
        more, pictures = checks.verify(
            network, chosen, shift=shift, text_BLE=embedding, size=latent_size, blocks=blocks, seed=seed, codec=decoder
        )
        results += more
    passed = all(check.passed for check in results)
    report |= {"passed": passed, "checks": [check.table() for check in results]}
    print(dumps(report, indent=2) if json else "\n".join(check.in_words() for check in results))
    if out is not None:
        say(" and ".join(map(str, checks.save_report(out, report, pictures))))
    return 0 if passed else CHECK_FAILED


def _recipe_to_verify(checkpoint: str, recipe: str | None, blocks: int) -> "tuple[Recipe, float]":
    """The recipe of a checkpoint's clip and the shift of its levels, the registry's for names that it knows."""
    from longtake.models.hub import registry
    from longtake.recipes import recipe_named
    from longtake.recipes.methods import AT_FULL_SIZE, recipe_for
    from longtake.recipes.wan_engines import WAN_SHIFT, require_block

    known = registry().get(checkpoint)
    if known and known.recipe is None and blocks:
        raise ValueError(f"{checkpoint} is no student of any method, and cannot stream: verify it with --blocks 0")
    chosen = recipe_named(recipe or recipe_for(checkpoint, otherwise="self_forcing"), usual=AT_FULL_SIZE)
    if known:
        require_block(known, chosen)
    return chosen, float(known.shift) if known and isinstance(known.shift, float | int) else WAN_SHIFT


def _embedded(folder: Path, prompt: str, device: "torch.device") -> "torch.Tensor":
    from longtake.models.umt5 import UMT5Files, UMT5Text

    return UMT5Text(UMT5Files.in_folder(folder), device=device).encode([prompt])
