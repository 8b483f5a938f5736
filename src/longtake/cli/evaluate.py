"""`longtake evaluate`: does what a recipe makes follow, last and remember?"""

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg, create_mutex_group
from tyro.extras import SubcommandApp

from longtake.cli.engines import load_engine, precision_named, together
from longtake.cli.options import Device, Levels, Precision, PrecisionName, Switch
from longtake.cli.scores import (
    differences_in_words,
    memory_in_words,
    recall_in_words,
    redirects_in_words,
    scores_in_words,
)
from longtake.cli.terminal import print_result, say

if TYPE_CHECKING:
    import torch

    from longtake.evaluation.sources import Source


app = SubcommandApp()
_one_source = create_mutex_group(required=False, title="prompts: how many, or which")


@app.command(name="toy")
def evaluate_toy(
    recipe: tuple[str, ...] = ("self_forcing_sink",),
    model: str = "toy",
    levels: Annotated[int | None, arg(metavar="N")] = None,
    prompts: Annotated[int, _one_source] = 100,
    prompt_file: Annotated[Path | None, arg(metavar="PATH"), _one_source] = None,
    seeds: int = 2,
    at: tuple[int, ...] = (5,),
    guidance: Annotated[float | None, arg(metavar="N")] = None,
    device: Device = None,
    dtype: Precision = "auto",
    json: Switch = False,
) -> int:
    """Score recipes against the toy world, where the truth is known. Many GPUs: torchrun -m longtake.cli evaluate ...

    Args:
        recipe: Recipes to score; also teacher, converted, codec and truth, the marks to compare with.
        model: The weights to score: a name, a folder, or a network's file. All marks but truth are taken from a folder.
        levels: Denoising steps of a block; unless given, as many as the recipe has. The marks keep their own.
        prompts: How many held-out captions.
        prompt_file: A file with one caption a line.
        seeds: Videos for each caption.
        at: Seconds at which the pictures just shown are scored.
        guidance: Of the teacher and of converted, which are guided: 1 is none; unless given, 3.
        json: Print a JSON list with one object for each recipe.
    """
    from longtake.evaluation import toy

    if guidance is not None and not {*recipe} & {*_GUIDED}:
        raise ValueError(f"a guidance is of {' and '.join(_GUIDED)}, and none of {', '.join(recipe)} is one of them")
    with together(device) as (first, place):
        results = toy.evaluate_toy(
            recipe,
            lambda name: load_engine(model, name, levels, place, dtype),
            prompts=prompts,
            prompt_file=prompt_file,
            seeds=seeds,
            at=at,
            sources={name: _mark(name, model, place, dtype, guidance) for name in _MARKS if name in recipe},
            device=place,
            progress=say,
        )
    if first:
        print_result(results, json, scores_in_words)
    return 0


@app.command(name="redirect")
def evaluate_redirect(
    recipe: tuple[str, ...] = ("self_forcing_sink",),
    model: str = "toy",
    levels: Levels = None,
    prompts: int = 40,
    seeds: int = 2,
    transition: Literal["redirect", "cut"] = "redirect",
    over: Annotated[int, arg(metavar="BLOCKS")] = 1,
    far: Annotated[float | None, arg(metavar="SHARE")] = None,
    in_flight: Literal["own", "new"] = "own",
    device: Device = None,
    dtype: Precision = "auto",
    json: Switch = False,
) -> int:
    """Redirect streams of the toy world: does one changed attribute act, how soon, and does the rest stay?

    Args:
        recipe: Recipes to score.
        model: The weights to score; `longtake models` lists them.
        prompts: How many held-out captions.
        seeds: Streams for each caption.
        transition: Whether streams are redirected or begin a new shot.
        over: Blocks that the words of a redirect go over in.
        far: The share of the far state that weighs on then, 0 to 1, where a recipe has any; unless given, its default.
        in_flight: The prompt that blocks in flight go on under, their own or the new one, where a recipe has any.
        json: Print a JSON list with one object for each recipe.
    """
    from longtake.evaluation import redirect

    with together(device) as (first, place):
        results = redirect.evaluate_redirect(
            recipe,
            lambda name: load_engine(model, name, levels, place, dtype),
            prompts=prompts,
            seeds=seeds,
            transition=transition,
            over=over,
            far=far,
            in_flight=in_flight,
            progress=say,
        )
    if first:
        print_result(results, json, redirects_in_words)
    return 0


@app.command(name="recall")
def evaluate_recall(
    recipe: tuple[str, ...] = ("self_forcing_sink",),
    model: str = "toy",
    levels: Levels = None,
    prompts: int = 40,
    seeds: int = 2,
    after: tuple[int, ...] = (2, 4, 8, 16),
    lead: Annotated[int, arg(metavar="SECONDS")] = 3,
    absence: Literal["streamed", "given"] = "streamed",
    device: Device = None,
    dtype: Precision = "auto",
    json: Switch = False,
) -> int:
    """Let streams go on from the toy world while its camera looks away: is what returns the same?

    Each scene is asked for twice: what came into sight later than the first frames, and what is there from them on.

    Args:
        recipe: Recipes to score; also codec and truth, the marks to compare with.
        model: The weights to score: a name, a folder, or a network's file. The codec is taken from a folder.
        prompts: How many scenes that open a stream, for each seed.
        seeds: How many lists of scenes.
        after: Seconds out of sight, 2 or more each.
        lead: Seconds of landscape before what is seen later comes into sight.
        absence: Whether streams stay away by themselves, or the absence is given to them as well.
        json: Print a JSON list with one object for each recipe.
    """
    from longtake.evaluation import recall
    from longtake.recipes.weight_files import toy_codec

    with together(device) as (first, place):
        results = recall.evaluate_recall(
            recipe,
            lambda name: load_engine(model, name, levels, place, dtype),
            prompts=prompts,
            seeds=seeds,
            after=after,
            lead=lead,
            absence=absence,
            codec=toy_codec(place, model=model) if "codec" in recipe else None,
            device=place,
            progress=say,
        )
    if first:
        print_result(results, json, recall_in_words)
    return 0


@app.command(name="memory")
def evaluate_memory(
    recipe: tuple[str, ...] = ("self_forcing_sink",),
    model: str = "toy",
    levels: Levels = None,
    hours: float = 10.0,
    rule: Annotated[tuple[str, ...], arg(metavar="NAME[=FRAMES]")] = (),
    prompts: int = 6,
    seeds: int = 1,
    blocks: int = 12,
    perturb: float = 0.05,
    device: Device = None,
    dtype: PrecisionName = "auto",
    json: Switch = False,
    plot: Annotated[Path | None, arg(metavar="PATH")] = None,
) -> int:
    """Follow a far state through hours of real keys, and errors from block to block: what stays, and what grows?

    Args:
        recipe: Recipes to measure; without a far state, they are given one that only takes and is not read.
        model: The weights to measure: a name, a folder, or a network's file.
        hours: How long a far state is followed, in hours of video.
        rule: Rules to compare: keep, decay, cap, delta, with latent frames such as decay=480; else the recipe's own.
        prompts: How many held-out captions.
        seeds: Streams for each caption.
        blocks: How many each stream is recorded for, and followed for after a change.
        perturb: Size of the change of one block, beside the block's own.
        dtype: Precision of the network; auto takes the fastest that is safe. Far states are always float32.
        json: Print a JSON list with one object for each recipe.
        plot: A png to draw it all to; needs matplotlib.
    """
    from longtake.evaluation import memory, memory_plot

    if plot is not None:
        memory_plot.require(plot)
    with together(device) as (first, place):
        results = memory.evaluate_memory(
            recipe,
            lambda name: load_engine(model, name, levels, place, dtype),
            hours=hours,
            rules=rule,
            prompts=prompts,
            seeds=seeds,
            blocks=blocks,
            perturb=perturb,
            progress=say,
        )
    if first:
        print(dumps(results) if json else memory_in_words(results))
    if first and plot is not None:
        memory_plot.draw(results, plot)
    return 0


@app.command(name="compare")
def evaluate_compare(file: Annotated[tuple[Path, ...], Positional], json: Switch = False) -> int:
    """Compare scores of the same videos in pairs: the first table of the first file with each of the others.

    Args:
        file: What `evaluate toy`, `redirect` or `recall` printed with --json.
        json: Print a JSON list with one object for each comparison.
    """
    from longtake.evaluation.compare import compared, tables_in

    tables = [table for path in file for table in tables_in(path)]
    if len(tables) < 2:
        raise ValueError("nothing to compare with: name another file, or one with several recipes")
    first, *others = tables
    results = [
        {
            "first": first["recipe"],
            "second": other["recipe"],
            "differences": {name: one._asdict() for name, one in compared(first, other).items()},
        }
        for other in others
    ]
    print_result(results, json, differences_in_words)
    return 0


_GUIDED = ("teacher", "converted")
_MARKS = ("codec", *_GUIDED)  # not recipes


def _mark(name: str, model: str, device: "torch.device", dtype: str, guidance: float | None) -> "Source":
    from longtake.evaluation.sources import clip_source, codec_source
    from longtake.recipes.teacher import GUIDANCE, TEACHER_STEPS, toy_teacher
    from longtake.recipes.weight_files import CONVERTED_FILE, TEACHER_FILE, toy_codec

    if name == "codec":
        return codec_source(toy_codec(device, model=model))
    file = {"teacher": TEACHER_FILE, "converted": CONVERTED_FILE}[name]
    guidance = GUIDANCE if guidance is None else guidance
    sample = toy_teacher(device, model=model, dtype=precision_named(dtype), guidance=guidance, file=file)
    return clip_source(sample, device, TEACHER_STEPS, guidance)
