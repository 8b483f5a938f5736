"""`longtake plan`: the memory that a stream will take."""

from typing import Annotated, Literal

from tyro.conf import arg

from longtake.cli.options import Switch
from longtake.cli.terminal import BAD_INPUT, print_result, say


def plan(
    model: str = "toy",
    size: Annotated[str | None, arg(metavar="WxH")] = None,
    recipe: Annotated[str | None, arg(metavar="RECIPE")] = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    decoder: Annotated[Literal["wan", "light", "none"] | None, arg(metavar="wan|light|none")] = None,
    compile: bool = False,
    vram: Annotated[str | None, arg(metavar="SIZE")] = None,
    json: Switch = False,
) -> int:
    """Predict the memory of a stream, part by part, without weights and without a GPU. Exits 2 if it does not fit.

    Tensors are counted, by running the stream without numbers: within a tenth of what an H200 was measured to hold. The
    device's context, scratch memory and what the allocator loses come on top: see docs/checkpoints.md.

    Args:
        model: toy, or a name of `longtake models`; nothing needs to be pulled.
        size: Of the pictures; unless given, the model's own.
        recipe: The method; unless given, hybrid_forcing for toy, the one that a published model was trained under, or
            self_forcing_sink.
        dtype: Precision of network and codec.
        decoder: What makes pictures of a Wan model's latents: its VAE, or the light one that --codec names elsewhere.
        compile: As for `generate --compile` on a GPU, which keeps fixed views and recorded passes.
        vram: What there is, such as 24G; if that is too little, changes are tried, and the peak of each is told.
        json: Print one JSON object.
    """
    from longtake import plan as planning

    there = None if vram is None else planning.vram(vram)
    told = planning.plan(
        model, size=None if size is None else planning.pixels(size), recipe=recipe, dtype=dtype, decoder=decoder,
        compile=compile, say=say,
    )  # fmt: skip
    fits = there is None or told["peak"] <= there
    if there is not None:
        told |= {"vram": there, "fits": fits, "ways_to_fit": {} if fits else planning.ways_to_fit(told, say)}
    print_result(told, json, planning.in_words)
    if not fits:
        say(f"this does not fit {vram}: it takes {planning.gib(told['peak'])}")
    return 0 if fits else BAD_INPUT
