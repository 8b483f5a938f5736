"""The command line, `longtake VERB`: generate, replay, take, serve, bench, evaluate, train, models, verify, plan,
explain, doctor.

Results go to stdout, progress and complaints to stderr. Verbs import the parts of longtake that they use when they
run: torch takes seconds to import, and `longtake --help` should not wait for it.
"""

import itertools
import math
import os
import random
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from json import dumps
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg, create_mutex_group
from tyro.extras import SubcommandApp

if TYPE_CHECKING:
    import numpy as np
    import torch

    from longtake.evaluation.sources import Source
    from longtake.generation.recipe import Recipe
    from longtake.generation.script import Script
    from longtake.generation.stream import Chunk, Engine, Stream
    from longtake.generation.take import Take
    from longtake.media.mp4 import Mp4Writer
    from longtake.models.hub import Published

_CHECK_FAILED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130

app = SubcommandApp()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 done, 1 a check failed (`verify`, `doctor`, `replay`), 2 bad input (one
    line on stderr), 130 stopped by Ctrl-C.
    """
    # Before torch is imported: by default its threads spin long for work, which beside one other busy process makes a
    # block take minutes; not spinning at all costs an idle machine almost half its speed.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        exit_code: int = app.cli(
            prog="longtake",
            description="Endless, live, steerable video from text.",
            args=_with_default_verb(sys.argv[1:] if arguments is None else arguments),
            config=(FlagCreatePairsOff,),
        )
    except (ValueError, OSError) as error:
        _say(_in_one_line(error))
        return _BAD_INPUT
    except KeyboardInterrupt as stopped:
        if str(stopped):
            _say(str(stopped))
        return _INTERRUPTED
    return exit_code


@app.command
def generate(
    prompt: Annotated[Positional[str | None], arg(metavar="PROMPT")] = None,
    prompts: Annotated[Path | None, arg(metavar="FILE")] = None,
    seconds: Annotated[float | None, arg(metavar="FLOAT")] = None,
    seed: int = 42,
    seeds: int = 1,
    names: Literal["numbered", "vbench"] = "numbered",
    rewrite: Annotated[str | None, arg(metavar="CHAT")] = None,
    image: Annotated[Path | None, arg(aliases=["--video"], metavar="FILE")] = None,
    recipe: str = "self_forcing_sink",
    model: str = "toy",
    codec: Annotated[str | None, arg(metavar="NAME|PATH")] = None,
    levels: Annotated[int | None, arg(metavar="N")] = None,
    out: Annotated[Path | None, arg(aliases=["-o"], metavar="PATH")] = None,
    force: bool = False,
    take: Annotated[Path | None, arg(metavar="FILE")] = None,
    device: Annotated[str | None, arg(metavar="NAME")] = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    json: bool = False,
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
        recipe: The method that makes it; `longtake models` lists them.
        model: The weights that make it; `longtake models` lists them.
        codec: What makes pictures of a Wan model's latents in place of its VAE: taew2_1.pth, say, for quick previews.
        levels: Denoising steps of a block; unless given, as many as the recipe has.
        out: The mp4 to write; unless given, a free name made of prompt and seed. For a file, the folder.
        force: Replace the mp4 that is there.
        take: Where to keep the stream as it ends, to go on from later; the video then ends with a whole block.
        device: cpu, cuda, cuda:1, ...; unless given, the best there is.
        dtype: Precision; auto takes the fastest that is safe.
        json: Print one JSON object for each video in place of its name.
    """
    if (prompt is None) == (prompts is None):
        raise ValueError("give one PROMPT, or a file of them with --prompts")
    _require_length(seconds)

    def load(place: "str | torch.device | None") -> "Engine":
        return _load(model, recipe, levels, place, dtype, codec)

    if prompts is not None:
        if image is not None:
            raise ValueError("--image goes with one PROMPT, not with --prompts")
        if take is not None:
            raise ValueError("--take goes with one PROMPT, not with --prompts")
        if out is None:
            raise ValueError("--prompts needs a folder for the videos: -o DIR")
        if force:
            raise ValueError("--force goes with one PROMPT: of a file, the videos that are missing are made")
        with _together(device) as (_, place):
            scripts = _scripts_in(prompts, rewrite, place)
            _make_many(scripts, seconds, seed, seeds, names, out, json, lambda: load(place))
        return 0
    if (seeds, names) != (1, "numbered"):
        raise ValueError("--seeds and --names go with --prompts")
    if out is not None:
        _require_free(out, force)
    script = _script_of(prompt or "", rewrite, device)
    return _make_one(script, seconds, seed, out, force, image, take, json, lambda: load(device))


def _require_free(path: Path, force: bool | None = None) -> None:
    """OSError where no mp4 can be written. force: whether one may be replaced; None where a verb has no --force."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name the mp4 to write in it")
    if path.exists() and not force:
        way_out = "remove it first" if force is None else "replace it with --force"
        raise FileExistsError(f"{path} exists already: choose another name, or {way_out}")


def _require_length(seconds: float | None) -> None:
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"a video lasts more than 0 seconds, got {seconds:g}")


def _script_of(text: str, chat: str | None, device: str | None) -> "Script":
    """What a PROMPT says; if it is written out, the text is told."""
    from longtake.generation.script import script_from

    script = script_from(text)
    if chat is None:
        return script
    from longtake.recipes import device_named

    (written,) = _written_out([script], chat, device_named(device))
    for cue in written.cues:
        _say(f"{cue.prompt!r} is written out: {cue.shown}")
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
        _say(f"{beside} of {len(lengths)} prompts are not of {WORDS[0]} to {WORDS[-1]} words, as was asked for")
    return written


def _make_one(
    script: "Script", seconds: float | None, seed: int, out: Path | None, force: bool, begin: Path | None,
    keep: Path | None, json: bool,
    load: "Callable[[], Engine]",
) -> int:  # fmt: skip
    from longtake.generation.script import record_of

    if seed == -1:
        seed = random.SystemRandom().randrange(2**31)
        _say(f"seed {seed}")
    path = out or _free_name(script.prompt, seed)
    _require_free_take(keep, path)
    engine = load()
    given = None if begin is None else _opening(engine, begin)
    before = 0 if given is None else len(given)
    seconds, pictures = _length(script, engine, seconds, before, whole=keep is not None)
    texts = script.by_block(engine, pictures, before)
    engine.prepare([*texts.values()])
    record = record_of(engine, script, seed, seconds) | ({"image": begin.name} if begin else {})
    with engine.stream(texts[0], seed=seed, pictures=given) as stream:
        return _show(stream, texts, pictures, path, record, keep, force=force, json=json)


def _length(
    script: "Script", engine: "Engine", asked: float | None, before: int, *, whole: bool
) -> tuple[float, int]:  # fmt: skip
    """How long a video is, in seconds and pictures. whole: up to the end of a block, so that a take goes on from it."""
    from longtake.generation.script import whole_blocks

    seconds = script.lasts(engine.frame_rate, asked)
    pictures = max(1, round(seconds * engine.frame_rate))
    if not whole:
        return seconds, pictures
    pictures = whole_blocks(engine, pictures, before)
    return pictures / engine.frame_rate, pictures


def _show(
    stream: "Stream", texts: dict[int, str], pictures: int, path: Path, record: dict[str, Any], keep: Path | None,
    *, force: bool = False, json: bool = False,
) -> int:  # fmt: skip
    """Film a stream, keep it as a take if that is asked for, and print where the video is."""
    from longtake.generation.script import follow
    from longtake.media.mp4 import Mp4Writer

    engine, begun = stream.engine, stream.pictures if keep is not None else 0
    with (
        _told_what_is_kept(path),
        Mp4Writer(
            path, engine.width, engine.height, engine.frame_rate, overwrite=force, comment=dumps(record)
        ) as writer,
        _between_blocks(keep is not None) as stopped,
    ):
        complete = _film(follow(stream, texts), writer, pictures, whole=keep is not None, stopped=stopped)
    if writer.frames_written:
        print(dumps(_made(path, writer.frames_written, engine, record)) if json else path)
    if keep is not None:
        _keep(stream, keep, whole=writer.frames_written == stream.pictures - begun)
    return 0 if complete else _INTERRUPTED


def _made(path: Path, pictures: int, engine: "Engine", record: dict[str, Any]) -> dict[str, Any]:
    """What `generate --json` says of a video: where it is, how long it came to be, and what went into it."""
    seconds = pictures / engine.frame_rate
    return {"path": str(path), "pictures": pictures, "fps": engine.frame_rate, **record, "seconds": seconds}


@contextmanager
def _told_what_is_kept(path: Path) -> "Iterator[None]":
    """Adds to what went wrong while a video was written, say on a full disk, that its first pictures are there."""
    from longtake.media.reading import plays

    before = path.stat() if path.exists() else None
    try:
        yield
    except OSError as error:
        is_new = path.exists() and not (before and os.path.samestat(before, path.stat()))
        if is_new and plays(path):
            raise OSError(f"{_in_one_line(error)}; {path} keeps what was made until then") from None
        raise


def _keep(stream: "Stream", path: Path, *, whole: bool) -> None:
    """whole: whether the video has all that the stream has made, so that what goes on from the take follows it."""
    from longtake.generation.take import Take

    if stream.closed or not whole:
        _say(f"no take at {path}: the stream was stopped within a block")
        return
    Take.of(stream, "cpu").save(path)
    _say(f"the take is {path}")


def _require_free_take(path: Path | None, video: Path | None) -> None:
    """Said before anything is made."""
    from longtake.generation.take import require_free

    if path is None:
        return
    if video is not None and path.absolute() == video.absolute():
        raise ValueError(f"{path} cannot be both the video and the take: choose another name")
    require_free(path)


@contextmanager
def _between_blocks(wanted: bool) -> "Iterator[Callable[[], bool]]":
    """Whether Ctrl-C was pressed: it waits for the block being made, since nothing goes on from half a one. Pressed
    once more, or where this is not wanted, it stops at once.
    """
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    wanted = wanted and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # as in a job that a script left behind
    before = signal.signal(signal.SIGINT, note) if wanted else None
    try:
        yield lambda: bool(pressed)
    finally:
        if wanted:
            signal.signal(signal.SIGINT, before)


@app.command
def replay(
    video: Annotated[Positional[Path], arg(metavar="MP4")],
    out: Annotated[Path | None, arg(aliases=["-o"], metavar="PATH")] = None,
    image: Annotated[Path | None, arg(aliases=["--video"], metavar="FILE")] = None,
    device: Annotated[str | None, arg(metavar="NAME")] = None,
) -> int:
    """Make a video of longtake's again from what it says of itself, and compare the two. Exits 1 if they differ.

    With the same version on the same kind of device, they are the same to the bit.

    Args:
        video: The mp4 to make again.
        out: The mp4 to write; unless given, its name with -again.
        image: The image or video that it went on from, where it did.
        device: cpu, cuda, cuda:1, ...; unless given, the kind that it was made on.
    """
    from longtake.generation.script import script_in
    from longtake.media.mp4 import count_frames, first_difference, read_record

    record = read_record(video)
    _require_said(video, record)
    script = script_in(record)
    if (image is None) == ("image" in record):
        needs = f"goes on from {record['image']}: name it with --image" if "image" in record else "needs no --image"
        raise ValueError(f"{video} {needs}")
    if out is not None:
        _require_free(out)
    engine = _load_again(record, record["levels"], device)
    _require_same(video, record, engine)
    path = out or _unused(video.with_stem(f"{video.stem}-again"))
    engine.prepare([cue.shown for cue in script.cues])
    with _begun_again(engine, script, record, image) as stream:
        pictures = round(record["seconds"] * engine.frame_rate) or 1
        texts = {} if "live" in record else script.by_block(engine, pictures, stream.pictures)
        told = _show(stream, texts, count_frames(video), path, record | engine.circumstances, None)
    if told:
        return told
    number = first_difference(video, path)
    _say("the same, picture by picture" if number is None else f"they differ from picture {number} on")
    return 0 if number is None else _CHECK_FAILED


def _require_said(path: Path, record: dict[str, Any]) -> None:
    """ValueError unless a record says all that is needed to make a video again."""
    needed: dict[str, type | tuple[type, ...]] = dict.fromkeys(("model", "recipe", "dtype", "weights"), str)
    needed |= {"levels": int, "seed": int, "seconds": (int, float), "prompts": list}
    missing = [key for key, kind in needed.items() if not isinstance(record.get(key), kind)]
    if missing:
        raise ValueError(f"{path} does not tell all of how it was made: {', '.join(missing)} is missing or unreadable")
    _require_length(record["seconds"])


def _require_same(path: Path, record: dict[str, Any], engine: "Engine") -> None:
    """ValueError for other weights; other versions and devices, which may change bits, are told."""
    for key, here in (("weights", engine.weights), ("codec_weights", engine.codec_weights)):
        if record.get(key, here) != here:
            name = key.replace("_", " ")
            raise ValueError(f"{path} was made with {name} {record[key]}, and {engine.model_name} has {here}")
    for key, here in engine.circumstances.items():
        if (there := record.get(key, "unknown")) != here:
            _say(f"{path} was made with {key} {there}, and this is {here}: pictures may differ")


def _begun_again(engine: "Engine", script: "Script", record: dict[str, Any], image: Path | None) -> "Stream":
    """The stream of a record, where its video begins."""
    from longtake.generation.recording import Remade
    from longtake.generation.stream import Told
    from longtake.generation.take import retrace

    if "live" in record:
        return Remade(engine, record)
    if "take" not in record:
        given = None if image is None else _opening(engine, image)
        return engine.stream(script.cues[0].shown, seed=record["seed"], pictures=given)
    try:
        blocks = int(record["take"]["blocks"])
        history = [Told(**told | {"prompts": tuple(told["prompts"])}) for told in record["take"]["history"]]
        if not history or any(told.far is None for told in history[1:]):
            raise KeyError("history")
    except (KeyError, TypeError):
        raise ValueError("the history of this video cannot be read") from None
    _say(f"it went on from a take: {blocks} blocks come before it")
    return retrace(engine, record["seed"], history, blocks)


def _load_again(said: dict[str, Any], levels: int, device: str | None) -> "Engine":
    """The engine of a take or a record, by default on its kind of device. ValueError if there is none such here."""
    if said["dtype"] not in ("float32", "bfloat16"):
        raise ValueError(f"precision is float32 or bfloat16, not {said['dtype']}")
    place = device or said.get("device", "").partition(" ")[0] or None
    return _load(said["model"], said["recipe"], levels, place, said["dtype"], said.get("codec"))


take = app.command(SubcommandApp(), name="take", help="Go on with streams that were kept: generate --take keeps one.")


@take.command(name="info")
def take_info(file: Annotated[Positional[Path], arg(metavar="FILE")], json: bool = False) -> int:
    """Say what a take is: what made it, what was told when, and how large its parts are.

    Args:
        file: The take.
        json: Print one JSON object.
    """
    from longtake.generation.take import Take

    told = Take.load(file).info()
    print(dumps(told, indent=2) if json else _take_in_words(told))
    return 0


@take.command(name="resume")
def take_resume(
    file: Annotated[Positional[Path], arg(metavar="FILE")],
    seconds: Annotated[float | None, arg(metavar="FLOAT")] = None,
    out: Annotated[Path | None, arg(aliases=["-o"], metavar="PATH")] = None,
    take: Annotated[Path | None, arg(metavar="FILE")] = None,
    device: Annotated[str | None, arg(metavar="NAME")] = None,
) -> int:
    """Go on with a take where it stands, bit for bit, and print where the video of what follows is.

    Args:
        file: The take; it stays as it is.
        seconds: Length of the video; unless given, 10.
        out: The mp4 to write; unless given, a free name made of prompt and seed.
        take: Where to keep the stream as this video ends.
        device: cpu, cuda, cuda:1, ...; unless given, the kind that the take is from. Another kind is refused.
    """
    from longtake.generation.script import Cue, Script
    from longtake.generation.take import Take

    _require_length(seconds)
    _require_free_take(take, out)
    kept = Take.load(file)
    script = Script((Cue(prompt=kept.history[-1].prompts[0]),))
    return _go_on(file, kept, script, seconds, out, take, device, redirects=False)


@take.command(name="fork")
def take_fork(
    file: Annotated[Positional[Path], arg(metavar="FILE")],
    prompt: Annotated[str, arg(metavar="PROMPT")],
    seconds: Annotated[float | None, arg(metavar="FLOAT")] = None,
    out: Annotated[Path | None, arg(aliases=["-o"], metavar="PATH")] = None,
    take: Annotated[Path | None, arg(metavar="FILE")] = None,
    device: Annotated[str | None, arg(metavar="NAME")] = None,
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
    from longtake.generation.script import script_from
    from longtake.generation.take import Take

    _require_length(seconds)
    _require_free_take(take, out)
    script = script_from(prompt)
    return _go_on(file, Take.load(file), script, seconds, out, take, device, redirects=True)


@take.command(name="sizes")
def take_sizes(
    model: tuple[str, ...] = ("toy", "wan2.1-1.3b"),
    recipe: tuple[str, ...] = (),
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    json: bool = False,
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

    counted = [
        {"model": one, "recipe": name, "bytes": planning.take_sizes(one, name, dtype=dtype)}
        for one in model
        for name in recipe or RECIPES
    ]
    print(dumps(counted, indent=2) if json else planning.takes_in_words(counted))
    return 0


def _go_on(
    file: Path, kept: "Take", script: "Script", seconds: float | None, out: Path | None, keep: Path | None,
    device: str | None, *, redirects: bool,
) -> int:  # fmt: skip
    from longtake.generation.script import record_of

    if out is not None:
        _require_free(out)
    engine = _load_again(dict(kept.made_with), len(kept.made_with["levels"]), device)
    try:
        stream = kept.resume(engine)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    with stream:
        seconds, pictures = _length(script, engine, seconds, stream.pictures, whole=keep is not None)
        texts = script.by_block(engine, pictures, stream.pictures)
        if redirects:
            engine.prepare([*texts.values()])
            stream.redirect(texts[0])
        begun = {"take": {"blocks": stream.blocks, "history": [asdict(told) for told in stream.history]}}
        record = record_of(engine, script, stream.seed, seconds) | begun
        path = out or _free_name(script.prompt, stream.seed)
        return _show(stream, texts, pictures, path, record, keep)


def _take_in_words(told: dict[str, Any]) -> str:
    sizes = told["bytes"]
    return "\n".join(
        [
            f"{told['model']}, {told['recipe']}, {len(told['levels'])} levels, seed {told['seed']}: "
            f"{told['seconds']:g} s made, {told['blocks']} blocks",
            *(f"{one['at']:8.2f} s  {one['verb']:9} {one['prompt']}" for one in told["told"]),
            f"longtake {told['longtake']}, torch {told['torch']}, {told['device']}, {told['dtype']}, "
            f"weights {told['weights']}, codec {told['codec_weights']}",
            f"{sum(sizes.values()) / 1e6:.2f} MB: "
            + ", ".join(f"{part.replace('_', ' ')} {size / 1e6:.2f}" for part, size in sizes.items()),
        ]
    )


def _opening(engine: "Engine", path: Path) -> "np.ndarray":
    """Pictures of whole blocks for a stream to go on from: an image that stands still for one, or the end of a video.

    Of a video as much as the network was trained to see at once.
    """
    from longtake.media.reading import read_pictures

    size = {"width": engine.width, "height": engine.height, "frames_per_second": engine.frame_rate}
    most = engine.network.config.extent // engine.recipe.block
    pictures = read_pictures(path, **size, most=engine.pictures_in(most))
    if len(pictures) == 1:
        return pictures.repeat(engine.pictures_in(1), axis=0)
    whole = [count for blocks in range(1, most + 1) if (count := engine.pictures_in(blocks)) <= len(pictures)]
    if not whole:
        raise ValueError(f"{path} has {len(pictures)} pictures; a stream goes on from {engine.pictures_in(1)} or more")
    return pictures[-whole[-1] :]


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
        return dumps(_made(path, count_frames(path), engine, read_record(path)))

    make_all(engine, videos, made=lambda path: print(told(path), flush=True), say=_say)


@app.command
def serve(
    host: str = "127.0.0.1",
    port: int = 8000,
    model: str = "toy",
    recipe: str = "self_forcing_sink",
    codec: Annotated[str | None, arg(metavar="NAME|PATH")] = None,
    levels: Annotated[int | None, arg(metavar="N")] = None,
    sessions: int = 4,
    api_key: Annotated[str | None, arg(metavar="KEY")] = None,
    insecure: bool = False,
    origin: Annotated[tuple[str, ...], arg(metavar="HOST")] = (),
    keep: Annotated[Path | None, arg(metavar="DIR")] = None,
    device: Annotated[str | None, arg(metavar="NAME")] = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> int:
    """Serve a page that plays at once, and live streams over a socket, until Ctrl-C. See docs/serve.md.

    Args:
        host: Where to listen; others than this machine reach it only if you say so, and then a key is needed.
        port: Where to listen; 0 takes a free one.
        model: The weights that make the streams; `longtake models` lists them.
        recipe: The method that makes them.
        codec: What makes pictures of a Wan model's latents in place of its VAE.
        levels: Denoising steps of a block; unless given, as many as the recipe has.
        sessions: Streams at most; fewer are taken where the device is too slow for so many.
        api_key: What clients must send; better set as LONGTAKE_API_KEY, since others can see command lines.
        insecure: Listen for others without a key.
        origin: Hosts whose pages may use this server, such as the name of a proxy in front of it.
        keep: Where snapshots and recordings are kept, to outlive the server; unless given, they go with it.
        device: cpu, cuda, cuda:1, ...; unless given, the best there is.
        dtype: Precision; auto takes the fastest that is safe.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise ValueError("serving needs more than is installed: pip install 'longtake[serve]'")

    from longtake.models.hub import registry
    from longtake.serving.access import Access, require_host
    from longtake.serving.app import Served, create_app
    from longtake.serving.server import is_loopback, listen, require_safe, run
    from longtake.serving.store import Store
    from longtake.serving.worker import Limits, Worker

    key = api_key or os.environ.get("LONGTAKE_API_KEY") or None
    require_safe(host, key, insecure)
    if sessions < 1:
        raise ValueError(f"a server has 1 session or more, got {sessions}")
    origins = tuple(map(require_host, origin))
    with listen(host, port) as listening, closing(Store(keep)) as store:
        engine = _load(model, recipe, levels, device, dtype, codec)
        known = registry().get(model)
        served = Served(
            licence=known.licence if known else "Apache-2.0" if model == "toy" else "unknown",
            version=engine.circumstances["longtake"],
            weights=engine.weights,
            examples=_words_to_try(engine),
        )
        access = Access(key=key, origins=origins, loopback=is_loopback(host))
        where = listening.getsockname()
        print(f"http://{f'[{where[0]}]' if ':' in where[0] else where[0]}:{where[1]}", flush=True)
        run(create_app(Worker(engine, Limits(sessions=sessions)), access, served, store), listening)
    return 0


def _words_to_try(engine: "Engine") -> tuple[str, ...]:
    from longtake.models.text import WordText
    from longtake.toy.captions import EXAMPLES

    if isinstance(engine.text, WordText):
        return EXAMPLES
    return "a red fox walks through fresh snow", "waves roll in at sunset", "a city street at night in the rain"


bench = app.command(SubcommandApp(), name="bench", help="Measure speed on this machine.")


@bench.command(name="stream")
def bench_stream(
    recipe: str = "self_forcing_sink",
    model: str = "toy",
    codec: Annotated[str | None, arg(metavar="NAME|PATH")] = None,
    levels: Annotated[int | None, arg(metavar="N")] = None,
    seconds: float = 10.0,
    repeats: int = 5,
    prompt: str = "a red ball bounces over green hills",
    device: Annotated[str | None, arg(metavar="NAME")] = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    json: bool = False,
) -> int:
    """Time one stream, network and codec together; the first block of each repeat is left out.

    Args:
        recipe: The method to time.
        model: The weights to time.
        codec: What makes pictures in place of a Wan model's VAE, such as taew2_1.pth.
        levels: Denoising steps of a block; unless given, as many as the recipe has.
        seconds: Length of each repeat, in seconds of video.
        repeats: How often; the fastest is the headline.
        prompt: What the stream shows.
        device: cpu, cuda, cuda:1, ...; unless given, the best there is.
        dtype: Precision; auto takes the fastest that is safe.
        json: Print one JSON object, every repeat included.
    """
    from longtake.evaluation import speed

    result = speed.bench_stream(_load(model, recipe, levels, device, dtype, codec), prompt, seconds, repeats)
    print(dumps(result, indent=2) if json else _speed_in_words(result))
    return 0


evaluate = app.command(SubcommandApp(), name="evaluate", help="Score what a recipe makes.")
_one_source = create_mutex_group(required=False, title="prompts: how many, or which")


@evaluate.command(name="toy")
def evaluate_toy(
    recipe: tuple[str, ...] = ("self_forcing_sink",),
    model: str = "toy",
    levels: Annotated[int | None, arg(metavar="N")] = None,
    prompts: Annotated[int, _one_source] = 100,
    prompt_file: Annotated[Path | None, arg(metavar="PATH"), _one_source] = None,
    seeds: int = 2,
    at: tuple[int, ...] = (5,),
    device: Annotated[str | None, arg(metavar="NAME")] = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    json: bool = False,
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
        device: cpu, cuda, cuda:1, ...; unless given, the best there is.
        dtype: Precision; auto takes the fastest that is safe.
        json: Print a JSON list with one object for each recipe.
    """
    from longtake.evaluation import toy

    with _together(device) as (first, place):
        results = toy.evaluate_toy(
            recipe,
            lambda name: _load(model, name, levels, place, dtype),
            prompts=prompts,
            prompt_file=prompt_file,
            seeds=seeds,
            at=at,
            sources={name: source(model, place, dtype) for name, source in _MARKS.items() if name in recipe},
            device=place,
            progress=_say,
        )
    if first:
        print(dumps(results, indent=2) if json else _scores_in_words(results))
    return 0


@evaluate.command(name="redirect")
def evaluate_redirect(
    recipe: tuple[str, ...] = ("self_forcing_sink",),
    model: str = "toy",
    levels: Annotated[int | None, arg(metavar="N")] = None,
    prompts: int = 40,
    seeds: int = 2,
    in_flight: Literal["own", "new"] = "own",
    device: Annotated[str | None, arg(metavar="NAME")] = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    json: bool = False,
) -> int:
    """Redirect streams of the toy world: does one changed attribute act, how soon, and does the rest stay?

    Args:
        recipe: Recipes to score.
        model: The weights to score; `longtake models` lists them.
        levels: Denoising steps of a block; unless given, as many as the recipe has.
        prompts: How many held-out captions.
        seeds: Streams for each caption.
        in_flight: The prompt that blocks in flight go on under, their own or the new one, where a recipe has any.
        device: cpu, cuda, cuda:1, ...; unless given, the best there is.
        dtype: Precision; auto takes the fastest that is safe.
        json: Print a JSON list with one object for each recipe.
    """
    from longtake.evaluation import redirect

    with _together(device) as (first, place):
        results = redirect.evaluate_redirect(
            recipe,
            lambda name: _load(model, name, levels, place, dtype),
            prompts=prompts,
            seeds=seeds,
            in_flight=in_flight,
            progress=_say,
        )
    if first:
        print(dumps(results, indent=2) if json else _redirects_in_words(results))
    return 0


@evaluate.command(name="recall")
def evaluate_recall(
    recipe: tuple[str, ...] = ("self_forcing_sink",),
    model: str = "toy",
    levels: Annotated[int | None, arg(metavar="N")] = None,
    prompts: int = 40,
    seeds: int = 2,
    after: tuple[int, ...] = (2, 4, 8, 16),
    device: Annotated[str | None, arg(metavar="NAME")] = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    json: bool = False,
) -> int:
    """Let streams go on from the toy world while its camera looks away: is what returns the same?

    Each scene is asked for twice: what came into sight later than the first frames, and what is there from them on.

    Args:
        recipe: Recipes to score; also codec and truth, the marks to compare with.
        model: The weights to score: a name, a folder, or a network's file. The codec is taken from a folder.
        levels: Denoising steps of a block; unless given, as many as the recipe has.
        prompts: How many scenes that open a stream, for each seed.
        seeds: How many lists of scenes.
        after: Seconds out of sight, 2 or more each.
        device: cpu, cuda, cuda:1, ...; unless given, the best there is.
        dtype: Precision; auto takes the fastest that is safe.
        json: Print a JSON list with one object for each recipe.
    """
    from longtake.evaluation import recall
    from longtake.recipes import toy_codec

    with _together(device) as (first, place):
        results = recall.evaluate_recall(
            recipe,
            lambda name: _load(model, name, levels, place, dtype),
            prompts=prompts,
            seeds=seeds,
            after=after,
            codec=toy_codec(place, model=model) if "codec" in recipe else None,
            device=place,
            progress=_say,
        )
    if first:
        print(dumps(results, indent=2) if json else _recall_in_words(results))
    return 0


@evaluate.command(name="memory")
def evaluate_memory(
    recipe: tuple[str, ...] = ("self_forcing_sink",),
    model: str = "toy",
    levels: Annotated[int | None, arg(metavar="N")] = None,
    hours: float = 10.0,
    rule: Annotated[tuple[str, ...], arg(metavar="NAME[=FRAMES]")] = (),
    prompts: int = 6,
    seeds: int = 1,
    blocks: int = 12,
    perturb: float = 0.05,
    device: Annotated[str | None, arg(metavar="NAME")] = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    json: bool = False,
    plot: Annotated[Path | None, arg(metavar="PATH")] = None,
) -> int:
    """Follow a far state through hours of real keys, and errors from block to block: what stays, and what grows?

    Args:
        recipe: Recipes to measure; without a far state, they are given one that only takes and is not read.
        model: The weights to measure: a name, a folder, or a network's file.
        levels: Denoising steps of a block; unless given, as many as the recipe has.
        hours: How long a far state is followed, in hours of video.
        rule: Rules to compare: keep, decay, cap, delta, with latent frames such as decay=480; else the recipe's own.
        prompts: How many held-out captions.
        seeds: Streams for each caption.
        blocks: How many each stream is recorded for, and followed for after a change.
        perturb: Size of the change of one block, beside the block's own.
        device: cpu, cuda, cuda:1, ...; unless given, the best there is.
        dtype: Precision of the network; auto takes the fastest that is safe. Far states are always float32.
        json: Print a JSON list with one object for each recipe.
        plot: A png to draw it all to; needs matplotlib.
    """
    from longtake.evaluation import memory, memory_plot

    if plot is not None:
        memory_plot.require(plot)
    with _together(device) as (first, place):
        results = memory.evaluate_memory(
            recipe,
            lambda name: _load(model, name, levels, place, dtype),
            hours=hours,
            rules=rule,
            prompts=prompts,
            seeds=seeds,
            blocks=blocks,
            perturb=perturb,
            progress=_say,
        )
    if first:
        print(dumps(results) if json else _memory_in_words(results))
    if first and plot is not None:
        memory_plot.draw(results, plot)
    return 0


train = app.command(SubcommandApp(), name="train", help="Train the embedded model's parts, one stage a call.")
_STAGES = {
    "codec": "Pictures to latents and back, from nothing.",
    "teacher": "The bidirectional teacher, on the codec's latents; goes on from a teacher if --from holds one.",
    "attention_matching": "The teacher with some layers converted (ReHyAt), taught to answer as their softmax does.",
    "finetune": "The whole converted teacher on clips; with softmax=true the teacher itself, to compare it with.",
    "teacher_forcing": "The causal student from the teacher, in front of clean clips.",
    "ode": "The causal student by regression of the teacher's trajectories, from a student if --from holds one.",
    "dmd": "The few-step student, by distribution matching on its own rollouts.",
}


def _stage_verb(stage: str) -> Callable[..., int]:
    def run(
        out: Annotated[Path, arg(metavar="DIR")],
        start: Annotated[str | None, arg(name="from", metavar="DIR")] = None,
        recipe: tuple[str, ...] = ("self_forcing_sink", "self_forcing"),
        set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE")] = (),
    ) -> int:
        from longtake.training import train

        record = train(stage, start=start, out=out, recipe_names=recipe, settings=set)
        if record:
            print(dumps(record, indent=2))
        return 0

    run.__doc__ = f"""{_STAGES[stage]}

    A run that was stopped goes on when the same command is given again. Many processes: torchrun -m longtake.cli ...

    Args:
        out: Folder for weights, record, metrics and samples.
        start: Folder of the weights to start from; toy is the embedded model.
        recipe: What a student is trained under, in turn; options may follow: hybrid_forcing:share=0.1,far=none.
        set: Settings of the stage, values in JSON: seconds=60 lr=1e-4.
    """
    return run


for _stage in _STAGES:
    train.command(name=_stage)(_stage_verb(_stage))


@train.command(name="report")
def train_report(out: Annotated[Path, arg(metavar="DIR")]) -> int:
    """Draw a run's curves and film its student, where the machine that trained could not.

    Args:
        out: The folder of the run.
    """
    from longtake.training import report

    print(*report(out), sep="\n")
    return 0


models = app.command(SubcommandApp(), name="models", help="List, fetch and convert weights; alone, it lists them.")


@models.command(name="list")
def models_list(json: bool = False) -> int:
    """List what runs, each model with each recipe that it has weights for, and the published checkpoints.

    Args:
        json: Print one JSON object, with all that is known of each checkpoint.
    """
    from longtake.models.hub import registry
    from longtake.recipes import MODELS, RECIPES

    if json:
        runs = [{"model": model, "recipe": recipe} for model, recipe in MODELS]
        known = [asdict(one) | {"recipe_is_here": one.recipe in RECIPES} for one in registry().values()]
        print(dumps({"runs": runs, "published": known}, indent=2))
        return 0
    for model, recipe in MODELS:
        print(f"--model {model} --recipe {recipe}")
    print("\npublished, for `longtake models pull`:")
    for one in registry().values():
        print(f"{one.name:25} {_terms_in_words(one)}")
    return 0


@models.command(name="pull")
def models_pull(name: Annotated[Positional[str], arg(metavar="NAME")]) -> int:
    """Fetch a published checkpoint into Hugging Face's cache and print its folder; size and licence are told first.

    Args:
        name: Which one; `longtake models` lists them.
    """
    from longtake.models import hub

    checkpoint = hub.published(name)
    _say(f"{name}: {_terms_in_words(checkpoint)}; {checkpoint.note}")
    if checkpoint.repo is None:
        raise ValueError(f"{name} is not on the hub: fetch {', '.join(checkpoint.files)} from {checkpoint.url}")
    download = hub.look_up(checkpoint)
    if download is None:
        _say("the hub cannot be reached: taking what is in the cache")
    else:
        _say(f"{download.bytes / 1e9:.2f} GB from {checkpoint.repo}, {download.missing_bytes / 1e9:.2f} GB to fetch")
    print(hub.fetch(checkpoint, download))
    return 0


@models.command(name="convert")
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
        target: A file, NAME.safetensors, or a folder that is made, as diffusers has them; not there yet.
        to: The names that tensors get: those of Wan's publication, of diffusers, or of our own files.
        entry: Of a pickle with several sets of weights, the one to take; unless given, averaged ones come first.
        lora: A file of low-rank updates to merge.
        alpha: Their scale times their rank; unless given, the scale is 1.
    """
    from longtake.models.convert import convert
    from longtake.models.weights import ENTRIES

    read = convert(source, target, to, entries=ENTRIES if entry is None else (entry,), lora=lora, alpha=alpha)
    _say(f"{len(read.meta)} tensors of {read.source}" + (f", entry {read.entry}" if read.entry else ""))
    print(target)
    return 0


@app.command
def verify(
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")],
    recipe: Annotated[str | None, arg(metavar="RECIPE")] = None,
    codec: Annotated[str | None, arg(metavar="NAME|PATH")] = None,
    text: Annotated[Path | None, arg(metavar="DIR")] = None,
    prompt: str = "a red fox walks through fresh snow in a pine forest, in warm morning light",
    size: Annotated[str, arg(metavar="WxH")] = "832x480",
    blocks: Annotated[int, arg(metavar="N")] = 3,
    seed: int = 42,
    device: Annotated[str | None, arg(metavar="NAME")] = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    out: Annotated[Path | None, arg(aliases=["-o"], metavar="DIR")] = None,
    json: bool = False,
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
        device: cpu, cuda, cuda:1, ...; unless given, the best there is.
        dtype: Precision; auto is bfloat16 on a GPU and float32 on a CPU.
        out: Folder for verify.json, to send back, and contact_sheet.png.
        json: Print one JSON object.
    """
    import torch

    from longtake.evaluation import verify as checks
    from longtake.models.checkpoints import load_codec, network_of, open_network, open_published
    from longtake.models.hub import registry
    from longtake.recipes import device_named

    chosen, shift = _recipe_to_verify(checkpoint, recipe, blocks)
    latent_size = _latent_size(size)
    place = device_named(device)
    precision = _precision(dtype) or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    opened, layout = open_published(checkpoint) if checkpoint in registry() else open_network(checkpoint)
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
        _say(" and ".join(map(str, checks.save_report(out, report, pictures))))
    return 0 if passed else _CHECK_FAILED


def _recipe_to_verify(checkpoint: str, recipe: str | None, blocks: int) -> "tuple[Recipe, float]":
    """The recipe of a checkpoint's clip and the shift of its levels, the registry's for names that it knows."""
    from longtake.models.hub import registry
    from longtake.recipes import WAN_SHIFT, recipe_named, require_block

    known = registry().get(checkpoint)
    if known and known.recipe is None and blocks:
        raise ValueError(f"{checkpoint} is no student of any method, and cannot stream: verify it with --blocks 0")
    chosen = recipe_named(recipe or (known and known.recipe) or "self_forcing")
    if known:
        require_block(known, chosen)
    return chosen, float(known.shift) if known and isinstance(known.shift, float | int) else WAN_SHIFT


def _latent_size(size: str) -> tuple[int, int]:
    """Height and width of the latents of pictures WxH through Wan's VAE."""
    from longtake.models.wan_vae import WanVAEConfig

    factor = 2 ** (len(WanVAEConfig().dim_mult) - 1)
    width, _, height = size.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"--size is a width and a height, such as 832x480, got {size!r}")
    if int(width) % factor or int(height) % factor:
        raise ValueError(f"--size must be multiples of {factor}, got {size}")
    return int(height) // factor, int(width) // factor


def _embedded(folder: Path, prompt: str, device: "torch.device") -> "torch.Tensor":
    from longtake.models.umt5 import UMT5Files, UMT5Text

    return UMT5Text(UMT5Files.in_folder(folder), device=device).encode([prompt])


@app.command
def plan(
    model: str = "toy",
    size: Annotated[str | None, arg(metavar="WxH")] = None,
    recipe: Annotated[str | None, arg(metavar="RECIPE")] = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    vram: Annotated[str | None, arg(metavar="SIZE")] = None,
    json: bool = False,
) -> int:
    """Predict the memory of a stream, part by part, without weights and without a GPU. Exits 2 if it does not fit.

    Tensors are counted, by running the stream without numbers. The device's context, scratch memory and what the
    allocator loses come on top, and were not measured: see docs/checkpoints.md.

    Args:
        model: toy, or a name of `longtake models`; nothing needs to be pulled.
        size: Of the pictures; unless given, the model's own.
        recipe: The method; unless given, the one that a model was trained under, or self_forcing_sink.
        dtype: Precision of network and codec.
        vram: What there is, such as 24G; if that is too little, changes are tried, and the peak of each is told.
        json: Print one JSON object.
    """
    from longtake import plan as planning

    there = None if vram is None else planning.vram(vram)
    told = planning.plan(model, size=None if size is None else planning.pixels(size), recipe=recipe, dtype=dtype)
    fits = there is None or told["peak"] <= there
    if there is not None:
        told |= {"vram": there, "fits": fits, "ways_to_fit": {} if fits else planning.ways_to_fit(told)}
    print(dumps(told, indent=2) if json else planning.in_words(told))
    if not fits:
        _say(f"this does not fit {vram}: it takes {planning.gib(told['peak'])}")
    return 0 if fits else _BAD_INPUT


@app.command
def explain(
    recipe: Annotated[Positional[str | None], arg(metavar="RECIPE")] = None,
    blocks: Annotated[int | None, arg(metavar="N")] = None,
    json: bool = False,
) -> int:
    """Say what a recipe does, block by block: what is attended, at which positions, and what becomes of the past.

    Args:
        recipe: The method to explain; without one, all are listed.
        blocks: How many blocks to tell of; unless given, those until all that follow are alike.
        json: Print one JSON object.
    """
    from longtake import explain as words

    if recipe is None:
        listed = words.recipes_in_short()
        print(dumps(listed, indent=2) if json else "\n".join(f"{name:18} {about}" for name, about in listed.items()))
    else:
        told = words.explain(recipe, blocks)
        print(dumps(told, indent=2) if json else words.in_words(told))
    return 0


@app.command
def doctor(json: bool = False) -> int:
    """Try what this machine can do, and say what to do about each problem. Exits 1 if there is one.

    Args:
        json: Print one JSON object, with every number.
    """
    from longtake.doctor import examine

    findings = []
    for finding in examine(_say):
        findings.append(finding)
        if not json:
            print(finding.in_words(), flush=True)
    problems = sum(finding.state == "problem" for finding in findings)
    if json:
        print(dumps({"healthy": not problems, "findings": [asdict(finding) for finding in findings]}, indent=2))
    elif not problems:
        print("all that longtake needs works here")
    return _CHECK_FAILED if problems else 0


def _with_default_verb(arguments: Sequence[str]) -> Sequence[str]:
    """`longtake models`, with or without options, is short for `longtake models list`."""
    verb, *rest = arguments or ("",)
    if verb == "models" and (not rest or (rest[0].startswith("-") and rest[0] not in ("-h", "--help"))):
        return [verb, "list", *rest]
    return arguments


@contextmanager
def _together(device: str | None) -> "Iterator[tuple[bool, torch.device]]":
    """Whether this process is the first of those that torchrun started, and the device to use; one alone is."""
    from longtake import parallel
    from longtake.recipes import device_named

    rank, processes, own = parallel.join()
    try:
        if processes > 1 and device is not None:
            raise ValueError("each of several processes takes a device of its own: leave --device out")
        yield rank == 0, own if processes > 1 else device_named(device)
    finally:
        parallel.leave()


def _codec_source(model: str, device: "torch.device", dtype: str) -> "Source":
    from longtake.evaluation.sources import codec_source
    from longtake.recipes import toy_codec

    return codec_source(toy_codec(device, model=model))


def _teacher_source(model: str, device: "torch.device", dtype: str) -> "Source":
    from longtake.evaluation.sources import clip_source
    from longtake.recipes import TEACHER_STEPS, toy_teacher

    return clip_source(toy_teacher(device, model=model, dtype=_precision(dtype)), device, TEACHER_STEPS)


def _converted_source(model: str, device: "torch.device", dtype: str) -> "Source":
    from longtake.evaluation.sources import clip_source
    from longtake.recipes import CONVERTED_FILE, TEACHER_STEPS, toy_teacher

    sample = toy_teacher(device, model=model, dtype=_precision(dtype), file=CONVERTED_FILE)
    return clip_source(sample, device, TEACHER_STEPS)


_MARKS = {"codec": _codec_source, "teacher": _teacher_source, "converted": _converted_source}  # not recipes


def _load(
    model: str, recipe: str, levels: int | None, device: "str | torch.device | None", dtype: str,
    codec: str | None = None,
) -> "Engine":  # fmt: skip
    from longtake.recipes import load

    return load(model, recipe=recipe, levels=levels, device=device, dtype=_precision(dtype), codec=codec)


def _precision(name: str) -> "torch.dtype | None":
    import torch

    return {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _film(
    stream: Iterable["Chunk"], writer: "Mp4Writer", pictures: int, *, whole: bool, stopped: Callable[[], bool]
) -> bool:
    """Write the stream's first pictures; False when Ctrl-C came before the last of them.

    whole: write each block to its end, though it has more pictures than that. stopped: asked after each block.
    """
    line = LiveLine(writer.frames_per_second)
    try:
        for chunk in stream:
            writer.write(chunk.frames if whole else chunk.frames[: pictures - writer.frames_written])
            line.show(writer.frames_written)
            if writer.frames_written >= pictures:
                return True
            if stopped():
                break
    except KeyboardInterrupt:
        pass
    finally:
        line.end()
    return False


class LiveLine:
    """How far a video has come, on stderr: one line rewritten in a terminal, a line now and then in a log."""

    _LOG_EVERY_SECONDS = 5.0

    def __init__(self, frame_rate: int) -> None:
        self._frame_rate = frame_rate
        self._rewrites = sys.stderr.isatty()
        self._start: tuple[int, float] | None = None  # pictures and time after the first block
        self._text = self._logged = ""
        self._next_log = 0.0

    def show(self, pictures: int) -> None:
        """Tell of `pictures` made so far; called once a block."""
        now = perf_counter()
        self._start = self._start or (pictures, now)
        self._text = f"{pictures / self._frame_rate:.1f} s made{self._speed(pictures, now)}"
        if self._rewrites:
            print(f"\r{self._text}\x1b[K", end="", file=sys.stderr, flush=True)
        elif now >= self._next_log:
            self._next_log = now + self._LOG_EVERY_SECONDS
            self._log()

    def end(self) -> None:
        """Leave the last state standing."""
        if self._rewrites:
            print(file=sys.stderr)
        elif self._text != self._logged:
            self._log()

    def _log(self) -> None:
        self._logged = self._text
        _say(self._text)

    def _speed(self, pictures: int, now: float) -> str:
        assert self._start is not None
        pictures_before, before = self._start
        if pictures == pictures_before:
            return ""  # the first block pays for the start and says nothing about speed
        rate = (pictures - pictures_before) / (now - before)
        return f", {rate:.1f} frames a second, {rate / self._frame_rate:.1f} times real time"


def _free_name(prompt: str, seed: int) -> Path:
    """A file name that nobody has yet, such as `a-red-ball-bounces-42.mp4`, in the current folder."""
    from longtake.generation.script import slug

    return _unused(Path(f"{slug(prompt)}-{seed}.mp4"))


def _unused(path: Path) -> Path:
    """The path, or the first of -2, -3, ... after its stem that nobody has yet."""
    from longtake.media.mp4 import part_of

    paths = itertools.chain([path], (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2)))
    return next(one for one in paths if not one.exists() and not part_of(one).exists())


def _speed_in_words(result: dict[str, Any]) -> str:
    block = result["block_ms"]
    return (
        f"{result['frames_per_second']:.1f} frames a second, {result['real_time_factor']:.2f} times real time "
        f"({result['precision']}, {result['threads']} threads, best of {len(result['repeats'])})\n"
        f"first frame after {result['first_frame_seconds']:.2f} s; "
        f"a block takes {block['p50']:.0f} / {block['p95']:.0f} / {block['p99']:.0f} ms (p50 / p95 / p99); "
        f"{result['deadline_misses']} deadline misses; at most {result['peak_memory_mib']:.0f} MiB"
    )


def _scores_in_words(results: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{result['recipe']} at {second} s: {_shares_in_words(shares)}, "
        f"one subject {_share(result['one_subject'][second])}"
        for result in results
        for second, shares in result["at"].items()
    )


def _redirects_in_words(results: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{result['recipe']}: reached within 4 s: {_shares_in_words(result['reached_within_4s'])} "
        f"(by chance: {_shares_in_words(result['reached_within_4s_control'])}), "
        f"after {_share(result['median_seconds'])} s in the middle; kept {_share(result['kept_unchanged'])} "
        f"({_share(result['kept_unchanged_control'])} when left alone)"
        for result in results
    )


def _recall_in_words(results: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{result['recipe']}, seen {seen}, after {second} s: {_shares_in_words(shares)} "
        f"(returned {_share(table['returned'][second])}, stayed away {_share(table['stayed_away'][second])})"
        for result in results
        for seen, table in (("later", result), ("first", result["seen_first"]))
        for second, shares in table["after"].items()
    )


def _memory_in_words(results: list[dict[str, Any]]) -> str:
    return "\n".join(line for result in results for line in _memory_lines(result))


def _memory_lines(result: dict[str, Any]) -> Iterator[str]:
    name = result["recipe"]
    for rule, state in result["mean_of_layers"].items():
        yield (
            f"{name}, far state {rule}, after {result['hours']:g} h: "
            f"rank {state['effective_rank'][-1]:.1f}, saturation {state['saturation'][-1]:.4f}; "
            f"reads back with an error of {state['read_back'][0]:.3f} at once, {state['read_back'][-1]:.3f} oldest, "
            f"{state['read_back_never']:.3f} what it never saw; remembers "
            f"{_span([layer['states'][rule]['remembered_seconds'] for layer in result['layers']])}"
        )
    growth = result["error_growth"]
    latents, pictures = growth["latents"]["mean"], growth["pictures"]["mean"]
    yield (
        f"{name}: a change of {growth['perturb']:g} is {latents[-1]:.3f} after {len(latents) - 1} blocks "
        f"({_share(growth['unrelated_latents'][-1])} between unrelated streams), in pictures {pictures[-1]:.3f} "
        f"({_share(growth['unrelated_pictures'][-1])})"
    )


def _terms_in_words(one: "Published") -> str:
    """Size, method and terms of a published checkpoint."""
    size = f"{one.gigabytes:g} GB" if isinstance(one.gigabytes, float | int) else "size unknown"
    use = {"yes": "commercial use allowed", "no": "no commercial use", "unknown": "commercial use unknown"}
    return f"{size}, {one.recipe or one.network or one.layout}, licence {one.licence}, {use[one.commercial]}"


def _span(seconds: Sequence[float | None]) -> str:
    """How far back layers remember."""
    known = [one for one in seconds if one is not None]
    if not known:
        return "nothing"
    return f"{min(known):g} to {max(known):g} s in {len(known)} of {len(seconds)} layers"


def _shares_in_words(shares: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {_share(share)}" for name, share in shares.items())


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.2f}"


def _in_one_line(error: Exception) -> str:
    """An error as one line, without Python's error number in front of what the system says."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _say(text: str) -> None:
    print(f"longtake: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
