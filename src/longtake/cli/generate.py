"""`longtake generate`: a video from a text, or one for each text in a file."""

import random
from collections.abc import Callable, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from longtake.cli.engines import load_engine, together
from longtake.cli.filming import made, opening, show
from longtake.cli.options import (
    Base,
    Codec,
    CodecDevice,
    Compile,
    Device,
    Levels,
    Method,
    Mp4,
    OneFile,
    Opening,
    Seconds,
    StreamPrecision,
    Switch,
)
from longtake.cli.terminal import say
from longtake.cli.videos import free_name, length_of, require_length, require_writable_take
from longtake.files import require_free_video

if TYPE_CHECKING:
    import torch

    from longtake.generation.script import Script
    from longtake.generation.stream import Engine


def generate(
    prompt: Annotated[Positional[str | None], arg(metavar="PROMPT")] = None,
    prompts: OneFile = None,
    seconds: Seconds = None,
    seed: int = 42,
    seeds: int = 1,
    names: Literal["numbered", "vbench"] = "numbered",
    rewrite: Annotated[str | None, arg(metavar="CHAT")] = None,
    image: Opening = None,
    recipe: Method = None,
    model: str = "toy",
    base: Base = None,
    codec: Codec = None,
    levels: Levels = None,
    out: Mp4 = None,
    force: Switch = False,
    take: OneFile = None,
    device: Device = None,
    codec_device: CodecDevice = None,
    dtype: StreamPrecision = "auto",
    compile: Compile = False,
    json: Switch = False,
) -> int:
    """Make a video from a text, or one for each text in a file, and print where it is. Ctrl-C keeps what is made.

    Texts follow one another in one video: "a red ball | 5s: it starts to snow", see docs/prompts.md. With a file, the
    same command again makes the videos that are missing. Many GPUs: torchrun -m longtake.cli generate ...

    Args:
        prompt: What is to be seen.
        prompts: A file of prompts, one a line, or .jsonl, .json or .yaml with times: one video each.
        seconds: Length of a video; unless given, what its text or file says, or else 10.
        seed: Same seed, same video; -1 draws one.
        seeds: Videos for each prompt of a file, with seeds from the one given on.
        names: Of the videos of a file: numbered, or prompt-0.mp4, prompt-1.mp4 as VBench wants them.
        rewrite: A chat model that writes prompts out first: a transformers model, or MODEL@http://host/v1.
        image: An image or a video to go on from; what is made follows it.
        model: The weights that make it; `longtake models` lists them.
        codec: What makes pictures of a Wan model's latents in place of its VAE: taew2_1.pth, say, for quick previews.
        out: The mp4 to write; unless given, a free name made of prompt and seed. For a file, the folder.
        force: Replace the mp4 that is there.
        take: Where to keep the stream as it ends, to go on from later; the video then ends with a whole block.
        json: Print one JSON object for each video in place of its name.
    """
    if (prompt is None) == (prompts is None):
        raise ValueError("give one PROMPT, or a file of them with --prompts")
    require_length(seconds)

    def load(place: "str | torch.device | None") -> "Engine":
        return load_engine(model, recipe, levels, place, dtype, codec, compile, codec_device, base)

    if prompts is not None:
        if image is not None:
            raise ValueError("--image goes with one PROMPT, not with --prompts")
        if take is not None:
            raise ValueError("--take goes with one PROMPT, not with --prompts")
        if out is None:
            raise ValueError("--prompts needs a folder for the videos: -o DIR")
        if force:
            raise ValueError("--force goes with one PROMPT: of a file, the videos that are missing are made")
        with together(device, codec_device) as (_, place):
            scripts = _scripts_in(prompts, rewrite, place)
            _make_many(scripts, seconds, seed, seeds, names, out, json, lambda: load(place))
        return 0
    if (seeds, names) != (1, "numbered"):
        raise ValueError("--seeds and --names go with --prompts")
    if out is not None:
        require_free_video(out, overwrite=force, way_out="replace it with --force")
    script = _script_of(prompt or "", rewrite, device)
    return _make_one(script, seconds, seed, out, force, image, take, json, lambda: load(device))


def _script_of(text: str, chat: str | None, device: str | None) -> "Script":
    """What a PROMPT says; if it is written out, the text is told."""
    from longtake.generation.script import script_from

    script = script_from(text)
    if chat is None:
        return script
    from longtake.recipes.devices import device_named

    (written,) = _written_out([script], chat, device_named(device))
    for cue in written.cues:
        say(f"{cue.prompt!r} is written out: {cue.shown}")
    return written


def _scripts_in(file: Path, chat: str | None, device: "torch.device") -> "list[Script]":
    from longtake.generation.script import read_scripts

    scripts = read_scripts(file)
    return scripts if chat is None else _written_out(scripts, chat, device)


def _written_out(scripts: "Sequence[Script]", chat: str, device: "torch.device") -> "list[Script]":
    """By a chat model, which is gone from the device when this returns."""
    from longtake.batch import write_out
    from longtake.models.rewrite import WORDS, Rewriter, chat_named, words_beside

    written = write_out(scripts, Rewriter(chat_named(chat, device)))
    lengths = [words_beside(cue.shown) for script in written for cue in script.cues]
    if beside := sum(map(bool, lengths)):
        say(f"{beside} of {len(lengths)} prompts are not of {WORDS[0]} to {WORDS[-1]} words, as was asked for")
    return written


def _make_one(
    script: "Script", seconds: float | None, seed: int, out: Path | None, force: bool, begin: Path | None,
    keep: Path | None, json: bool,
    load: "Callable[[], Engine]",
) -> int:  # fmt: skip
    from longtake.generation.script import record_of

    if seed == -1:
        seed = random.SystemRandom().randrange(2**31)
        say(f"seed {seed}")
    path = out or free_name(script.prompt, seed)
    require_writable_take(keep, path)
    engine = load()
    given = None if begin is None else opening(engine, begin)
    before = 0 if given is None else len(given)
    seconds, pictures = length_of(script, engine, seconds, before, whole=keep is not None)
    cues = script.by_block(engine, pictures, before)
    engine.prepare([cue.shown for cue in cues.values()])
    record = record_of(engine, script, seed, seconds) | ({"image": begin.name} if begin else {})
    with engine.stream(cues[0].shown, seed=seed, pictures=given) as stream:
        return show(stream, cues, pictures, path, record, keep, force=force, json=json)


def _make_many(
    scripts: "Sequence[Script]",
    seconds: float | None,
    seed: int,
    seeds: int,
    names: Literal["numbered", "vbench"],
    out: Path,
    json: bool,
    load: "Callable[[], Engine]",
) -> None:
    from longtake.batch import make_all, videos_of
    from longtake.media.mp4 import count_frames, read_record

    videos = videos_of(
        scripts,
        out,
        first_seed=seed,
        seeds=seeds,
        seconds=seconds,
        names=names,
    )
    engine = load()

    def told(path: Path) -> str:
        if not json:
            return str(path)
        return dumps(made(path, count_frames(path), engine, read_record(path)))

    make_all(engine, videos, made=lambda path: print(told(path), flush=True), say=say)
