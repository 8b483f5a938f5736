"""`longtake take`: streams that were kept, what they are and how they go on."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from longtake.cli.engines import load_again
from longtake.cli.filming import show
from longtake.cli.options import DeviceName, Mp4, OneFile, Seconds, Switch
from longtake.cli.terminal import print_result, say
from longtake.cli.videos import free_name, length_of, require_length, require_writable_take
from longtake.files import require_free_video

File = Annotated[Positional[Path], arg(metavar="FILE")]

app = SubcommandApp()


@app.command(name="info")
def take_info(file: File, json: Switch = False) -> int:
    """Say what a take is: what made it, what was told when, and how large its parts are.

    Args:
        file: The take.
        json: Print one JSON object.
    """
    from longtake.generation.take import Take

    told = Take.load(file).info()
    print_result(told, json, _take_in_words)
    return 0


@app.command(name="resume")
def take_resume(
    file: File,
    seconds: Seconds = None,
    out: Mp4 = None,
    take: OneFile = None,
    device: DeviceName = None,
) -> int:
    """Go on with a take where it stands, bit for bit, and print where the video of what follows is.

    Args:
        file: The take; it stays as it is.
        seconds: Length of the video; unless given, 10.
        out: The mp4 to write; unless given, a free name made of prompt and seed.
        take: Where to keep the stream as this video ends.
        device: cpu, cuda, cuda:1, ...; unless given, the kind that the take is from. Another kind is refused.
    """
    return _go_on(file, None, seconds, out, take, device)


@app.command(name="fork")
def take_fork(
    file: File,
    prompt: Annotated[str, arg(metavar="PROMPT")],
    seconds: Seconds = None,
    out: Mp4 = None,
    take: OneFile = None,
    device: DeviceName = None,
) -> int:
    """Go on with a take under another prompt, and print where the video of what follows is.

    Args:
        file: The take; it stays as it is, for other forks and for what would have followed.
        prompt: What is to be seen from here on, or several at times: "a | 5s: b".
        seconds: Length of the video; unless given, what the text says, or else 10.
        out: The mp4 to write; unless given, a free name made of prompt and seed.
        take: Where to keep the stream as this video ends.
        device: cpu, cuda, cuda:1, ...; unless given, the kind that the take is from. Another kind is refused.
    """
    return _go_on(file, prompt, seconds, out, take, device)


@app.command(name="sizes")
def take_sizes(
    model: tuple[str, ...] = ("toy", "wan2.1-1.3b"),
    recipe: tuple[str, ...] = (),
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    json: Switch = False,
) -> int:
    """Count how large takes get, part by part, without weights and without a GPU; prints a table.

    Args:
        model: Models: toy, or names of `longtake models`; nothing needs to be pulled.
        recipe: Recipes; unless given, all of them.
        dtype: Precision of network and codec.
        json: Print one JSON list.
    """
    from longtake import plan as planning
    from longtake.recipes import RECIPES

    counted = []
    for one in model:
        for name in recipe or RECIPES:
            sizes = planning.take_sizes(one, name, dtype=dtype)
            counted.append({"model": one, "recipe": name, "bytes": sizes})
            say(f"{one}, {name}: {sum(sizes.values()) / 1e6:,.1f} MB")
    print_result(counted, json, planning.takes_in_words)
    return 0


def _go_on(
    file: Path, prompt: str | None, seconds: float | None, out: Path | None, keep: Path | None, device: str | None
) -> int:  # fmt: skip
    """prompt: of what follows; None goes on under the one that was told last."""
    from longtake.generation.script import Cue, Script, record_of, script_from
    from longtake.generation.take import Take

    require_length(seconds)
    require_writable_take(keep, out)
    new = None if prompt is None else script_from(prompt)
    kept = Take.load(file)
    script = new or Script((Cue(prompt=kept.history[-1].prompts[0]),))
    if out is not None:
        require_free_video(out)
    engine = load_again(dict(kept.made_with), len(kept.made_with["levels"]), device)
    try:
        stream = kept.resume(engine)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    with stream:
        seconds, pictures = length_of(script, engine, seconds, stream.pictures, whole=keep is not None)
        cues = script.by_block(engine, pictures, stream.pictures)
        if new:
            engine.prepare([cue.shown for cue in cues.values()])
            stream.redirect(cues[0].shown)
        history = [asdict(told) for told in stream.history]
        begun = {"take": {"blocks": stream.blocks, "history": history, "in_company": stream.in_company}}
        record = record_of(engine, script, stream.seed, seconds) | begun
        path = out or free_name(script.prompt, stream.seed)
        return show(stream, cues, pictures, path, record, keep)


def _how(one: Mapping[str, Any]) -> str:
    return f" (over {one['over']} blocks, {one['blend']})" if "over" in one else ""


def _take_in_words(told: dict[str, Any]) -> str:
    sizes = told["bytes"]
    return "\n".join(
        [
            f"{told['model']}, {told['recipe']}, {len(told['levels'])} levels, seed {told['seed']}: "
            f"{told['seconds']:g} s made, {told['blocks']} blocks",
            *(f"{one['at']:8.2f} s  {one['verb']:9} {one['prompt']}{_how(one)}" for one in told["told"]),
            f"longtake {told['longtake']}, torch {told['torch']}, {told['device']}, {told['dtype']}, "
            f"weights {told['weights']}, codec {told['codec_weights']}",
            f"{sum(sizes.values()) / 1e6:.2f} MB: "
            + ", ".join(f"{part.replace('_', ' ')} {size / 1e6:.2f}" for part, size in sizes.items()),
        ]
    )
