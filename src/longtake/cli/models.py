"""`longtake models`: what runs with what; published checkpoints: listed, fetched, converted; students as deltas."""

from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from longtake.cli.options import Switch
from longtake.cli.terminal import print_result, say

if TYPE_CHECKING:
    from longtake.models.hub import Published


app = SubcommandApp()


@app.command(name="list")
def models_list(json: Switch = False) -> int:
    """List what runs, each model with each recipe that it has weights for, and the published checkpoints.

    Args:
        json: Print one JSON object, with all that is known of each checkpoint.
    """
    from longtake.models.hub import registry
    from longtake.recipes import MODELS
    from longtake.recipes.methods import is_here

    if json:
        runs = [{"model": model, "recipe": recipe} for model, recipe in MODELS]
        known = [asdict(one) | {"recipe_is_here": is_here(one.recipe)} for one in registry().values()]
        print(dumps({"runs": runs, "published": known}, indent=2))
        return 0
    for model, recipe in MODELS:
        print(f"--model {model} --recipe {recipe}")
    print("\npublished, for `longtake models pull`:")
    for one in registry().values():
        print(f"{one.name:25} {_terms_in_words(one)}")
    return 0


@app.command(name="pull")
def models_pull(name: Annotated[Positional[str], arg(metavar="NAME")]) -> int:
    """Fetch a published checkpoint into Hugging Face's cache and print its folder; size and licence are told first.

    Args:
        name: Which one; `longtake models` lists them.
    """
    from longtake.models import hub

    checkpoint = hub.published(name)
    say(f"{name}: {_terms_in_words(checkpoint)}; {checkpoint.note}")
    if checkpoint.repo is None:
        raise ValueError(f"{name} is not on the hub: fetch {', '.join(checkpoint.files)} from {checkpoint.url}")
    download = hub.look_up(checkpoint)
    if download is None:
        say("the hub cannot be reached: taking what is in the cache")
    else:
        say(f"{download.bytes / 1e9:.2f} GB from {checkpoint.repo}, {download.missing_bytes / 1e9:.2f} GB to fetch")
    print(hub.fetch(checkpoint, download))
    return 0


@app.command(name="convert")
def models_convert(
    source: Annotated[Positional[Path], arg(metavar="A")],
    target: Annotated[Positional[Path], arg(metavar="B")],
    to: Literal["original", "diffusers", "longtake"] = "longtake",
    entry: Annotated[str | None, arg(metavar="NAME")] = None,
    lora: Annotated[Path | None, arg(metavar="PATH")] = None,
    alpha: Annotated[float | None, arg(metavar="NUMBER")] = None,
) -> int:
    """Write a checkpoint in another layout, every tensor as it is, and print where it is.

    Args:
        source: A Wan network or the Wan VAE: a file, the index of its shards, or a folder.
        target: A file, NAME.safetensors; any other name is a folder that is made, as diffusers has them. Not there yet.
        to: The names that tensors get: those of Wan's publication, of diffusers, or of our own files.
        entry: Of a pickle with several sets of weights, the one to take; unless given, averaged ones come first.
        lora: A file of low-rank updates to merge.
        alpha: Their scale times their rank; unless given, the scale is 1.
    """
    from longtake.models.convert import convert
    from longtake.models.weights import ENTRIES

    read = convert(source, target, to, entries=ENTRIES if entry is None else (entry,), lora=lora, alpha=alpha)
    say(f"{len(read.meta)} tensors of {read.source}" + (f", entry {read.entry}" if read.entry else ""))
    print(target)
    return 0


@app.command(name="delta")
def models_delta(
    base: Annotated[Positional[str], arg(metavar="BASE")],
    tuned: Annotated[Positional[str], arg(metavar="TUNED")],
    out: Annotated[Path, arg(aliases=["-o"], metavar="FILE")],
    rank: Annotated[int, arg(metavar="R")] = 32,
    json: Switch = False,
) -> int:
    """Write a student that was tuned from another as what it adds to it, and print the size and the error that is left.

    Args:
        base: The student that it was tuned from: toy, a folder, or a network's file.
        tuned: The tuned one: a folder, or a network's file.
        out: NAME.safetensors, not there yet. It streams as the tuned one does where the base is: beside it as
            student.safetensors, or in the package.
        rank: Of what is added to each matrix that takes less room so than in full; 0 for all of it.
        json: Print one JSON object.
    """
    from longtake.models.delta import save_delta
    from longtake.recipes.weight_files import student_file

    print_result(save_delta(out, student_file(base), student_file(tuned), rank=rank), json, _delta_in_words)
    return 0


@app.command(name="mix")
def models_mix(
    base: Annotated[Positional[str], arg(metavar="BASE")],
    tuned: Annotated[Positional[str], arg(metavar="TUNED")],
    out: Annotated[Path, arg(aliases=["-o"], metavar="FILE")],
    share: float,
    json: Switch = False,
) -> int:
    """Write a student between two: so far on the way from one to another that was tuned from it.

    Args:
        base: The student that it was tuned from: toy, a folder, or a network's file.
        tuned: The tuned one: a folder, or a network's file.
        out: NAME.safetensors, not there yet.
        share: Of the way, above 0 and below 1.
        json: Print one JSON object.
    """
    from longtake.models.mix import save_mix
    from longtake.recipes.weight_files import load_tensors, student_file

    told = save_mix(out, student_file(base), student_file(tuned), share=share, read=load_tensors)
    print_result(told, json, _mix_in_words)
    return 0


def _mix_in_words(told: dict[str, Any]) -> str:
    return f"{told['file']}: {told['bytes'] / 2**20:.2f} MiB, {told['share']:g} of the way"


def _delta_in_words(told: dict[str, Any]) -> str:
    return (
        f"{told['file']}: {told['bytes'] / 2**20:.2f} MiB on the weights {told['base']}, "
        f"{told['low_rank']} matrices at rank {told['rank']} and {told['in_full']} tensors in full\n"
        f"error left: {told['error']:.2%} of the weights, {told['error_of_change']:.2%} of their change; "
        f"most in {told['worst']}, {told['worst_error']:.2%}"
    )


def _terms_in_words(one: "Published") -> str:
    """Size, method and terms of a published checkpoint; of a student, whether its method is here."""
    from longtake.recipes.methods import is_here

    method = f"{one.recipe}{'' if is_here(one.recipe) else ' (not here)'}" if one.recipe else one.network or one.layout
    size = f"{one.gigabytes:g} GB" if isinstance(one.gigabytes, float | int) else "size unknown"
    use = {"yes": "commercial use allowed", "no": "no commercial use", "unknown": "commercial use unknown"}
    return f"{size}, {method}, licence {one.licence}, {use[one.commercial]}"
