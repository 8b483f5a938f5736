"""The command line: `longtake generate | serve | bench | evaluate | train | models | verify | plan | explain | doctor`.

Results go to stdout, progress and complaints to stderr. Verbs import the parts of longtake that they use when they
run: torch takes seconds to import, and `longtake --help` should not wait for it.
"""

import itertools
import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
    from longtake.generation.stream import Chunk, Engine
    from longtake.media.mp4 import Mp4Writer
    from longtake.models.hub import Published

_CHECK_FAILED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130

app = SubcommandApp()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 done, 1 a check failed (`verify`, `doctor`), 2 bad input (one line on
    stderr), 130 stopped by Ctrl-C.
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
        device: cpu, cuda, cuda:1, ...; unless given, the best there is.
        dtype: Precision; auto takes the fastest that is safe.
        json: Print one JSON object for each video in place of its name.
    """
    if (prompt is None) == (prompts is None):
        raise ValueError("give one PROMPT, or a file of them with --prompts")
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"a video lasts more than 0 seconds, got {seconds:g}")

    def load(place: "str | torch.device | None") -> "Engine":
        return _load(model, recipe, levels, place, dtype, codec)

    if prompts is not None:
        if image is not None:
            raise ValueError("--image goes with one PROMPT, not with --prompts")
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
    return _make_one(script, seconds, seed, out, force, image, json, lambda: load(device))


def _require_free(path: Path, force: bool) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name the mp4 to write in it")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already: choose another name, or replace it with --force")


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
    script: "Script", seconds: float | None, seed: int, out: Path | None, force: bool, begin: Path | None, json: bool,
    load: "Callable[[], Engine]",
) -> int:  # fmt: skip
    from longtake.generation.script import follow, record_of
    from longtake.media.mp4 import Mp4Writer

    if seed == -1:
        seed = random.SystemRandom().randrange(2**31)
        _say(f"seed {seed}")
    path = out or _free_name(script.prompt, seed)
    engine = load()
    seconds = script.lasts(engine.frame_rate, seconds)
    pictures = max(1, round(seconds * engine.frame_rate))
    given = None if begin is None else _opening(engine, begin)
    texts = script.by_block(engine, pictures, 0 if given is None else len(given))
    engine.prepare([*texts.values()])
    with (
        _told_what_is_kept(path),
        engine.stream(texts[0], seed=seed, pictures=given) as stream,
        Mp4Writer(
            path,
            engine.width,
            engine.height,
            engine.frame_rate,
            overwrite=force,
            comment=dumps(record_of(engine, script, seed, seconds) | ({"image": begin.name} if begin else {})),
        ) as writer,
    ):
        complete = _film(follow(stream, texts), writer, pictures)
    if writer.frames_written:
        print(dumps(_made(engine, script, seed, path, writer.frames_written)) if json else path)
    return 0 if complete else _INTERRUPTED


def _made(engine: "Engine", script: "Script", seed: int, path: Path, pictures: int) -> dict[str, Any]:
    """What `generate --json` says of a video: what went into it, where it is and how long it came to be."""
    from longtake.generation.script import record_of

    record = record_of(engine, script, seed, pictures / engine.frame_rate)
    return {"path": str(path), "pictures": pictures, "fps": engine.frame_rate, **record}


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
        video = next(video for video in videos if video.path == path)
        return dumps(_made(engine, video.script, video.seed, path, video.pictures(engine)))

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
        device: cpu, cuda, cuda:1, ...; unless given, the best there is.
        dtype: Precision; auto takes the fastest that is safe.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise ValueError("serving needs more than is installed: pip install 'longtake[serve]'")
    from importlib.metadata import version

    from longtake.models.hub import registry
    from longtake.serving.access import Access
    from longtake.serving.app import Served, create_app
    from longtake.serving.server import is_loopback, listen, require_safe, run
    from longtake.serving.worker import Limits, Worker

    key = api_key or os.environ.get("LONGTAKE_API_KEY") or None
    require_safe(host, key, insecure)
    if sessions < 1:
        raise ValueError(f"a server has 1 session or more, got {sessions}")
    with listen(host, port) as listening:
        engine = _load(model, recipe, levels, device, dtype, codec)
        known = registry().get(model)
        served = Served(
            licence=known.licence if known else "Apache-2.0" if model == "toy" else "unknown",
            version=version("longtake"),
            weights=engine.weights,
            examples=_words_to_try(engine),
        )
        access = Access(key=key, origins=origin, loopback=is_loopback(host))
        where = listening.getsockname()
        print(f"http://{f'[{where[0]}]' if ':' in where[0] else where[0]}:{where[1]}", flush=True)
        run(create_app(Worker(engine, Limits(sessions=sessions)), access, served), listening)
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


def _film(stream: Iterable["Chunk"], writer: "Mp4Writer", pictures: int) -> bool:
    """Write the stream's first pictures; False when Ctrl-C came before the last of them."""
    line = LiveLine(writer.frames_per_second)
    try:
        for chunk in stream:
            writer.write(chunk.frames[: pictures - writer.frames_written])
            line.show(writer.frames_written)
            if writer.frames_written == pictures:
                return True
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
    from longtake.media.mp4 import part_of

    stem = f"{slug(prompt)}-{seed}"
    names = itertools.chain([f"{stem}.mp4"], (f"{stem}-{number}.mp4" for number in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists() and not part_of(path).exists())


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
