"""`longtake bench`: speed on this machine."""

from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg
from tyro.extras import SubcommandApp

from longtake.cli.engines import in_precision, load_engine, precision_named, tell_of_kernels, together
from longtake.cli.options import Base, Codec, CodecDevice, Compile, Device, Levels, Precision, StreamPrecision, Switch
from longtake.cli.terminal import CHECK_FAILED, print_result, say
from longtake.files import make_folder, whole

if TYPE_CHECKING:
    import torch

    from longtake.generation.stream import Engine

app = SubcommandApp()
STEADY_BLOCKS = 40

Size = Annotated[str | None, arg(metavar="WxH")]


@app.command(name="stream")
def bench_stream(
    recipe: Annotated[tuple[str, ...], arg(metavar="RECIPE")] = (),
    model: str = "toy",
    base: Base = None,
    codec: Codec = None,
    levels: Levels = None,
    seconds: float = 10.0,
    repeats: int = 5,
    blocks: Annotated[int | None, arg(metavar="N")] = None,
    minutes: Annotated[float | None, arg(metavar="FLOAT")] = None,
    random_weights: Switch = False,
    decoder: Annotated[Literal["wan", "light", "none"] | None, arg(metavar="wan|light|none")] = None,
    size: Size = None,
    prompt: str = "a red ball bounces over green hills",
    device: Device = None,
    codec_device: CodecDevice = None,
    dtype: StreamPrecision = "auto",
    compile: Compile = False,
    out: Annotated[Path | None, arg(aliases=["-o"], metavar="DIR")] = None,
    json: Switch = False,
) -> int:
    """Time streams, network and codec together, without the first block of each; and how soon a redirect shows.

    With --blocks, --minutes or --random-weights one long stream is timed once all that it remembers is full, and the
    time of its blocks told by part (docs/speed.md). With --minutes it exits 1 where blocks become slower, memory grows,
    or numbers are lost. More GPUs for one stream: torchrun -m longtake.cli bench stream ...

    Args:
        recipe: The methods to time, one after the other; unless given, hybrid_forcing for toy, the one a published
            model was trained under, or self_forcing_sink.
        model: The weights to time.
        codec: What makes pictures in place of a Wan model's VAE, such as taew2_1.pth.
        seconds: Length of each repeat, in seconds of video.
        repeats: How often; the fastest is the headline.
        blocks: Blocks of one long stream to time, in place of repeats; 40 unless given.
        minutes: Of video that such a stream is long at least: does it stay as fast, and as small?
        random_weights: Random numbers in place of weights and text: of a name of `longtake models`, nothing is pulled.
        decoder: With random weights: Wan's VAE (unless given), the light one, or none.
        size: With random weights: of the pictures; unless given, the model's own.
        prompt: What the stream shows.
        out: Folder for a file of each long stream's result, written as soon as it is there.
        json: Print one JSON object, or a list with one for each recipe.
    """
    if not random_weights and (decoder is not None or size is not None):
        raise ValueError("--decoder and --size are for --random-weights")
    if random_weights and base is not None:
        raise ValueError("--base names weights: random ones need none")
    if random_weights and codec is not None:
        raise ValueError("--codec names weights: with --random-weights it is --decoder")
    long = random_weights or blocks is not None or minutes is not None
    if out is not None and not long:
        raise ValueError("-o keeps results of long streams: add --blocks or --minutes")
    if out is not None:
        make_folder(out)
    from longtake.recipes.methods import recipe_for

    def engine(name: str, place: "torch.device") -> "Engine":
        if not random_weights:
            return load_engine(model, name, levels, place, dtype, codec, compile, codec_device, base)
        from longtake.recipes import load_random

        made = load_random(
            model, recipe=name, size=_height_width(size), decoder=decoder or "wan", device=place,
            codec_device=codec_device, dtype=precision_named(dtype), levels=levels, compile=compile,
        )  # fmt: skip
        tell_of_kernels(made)
        return in_precision(made, dtype)

    def timed(name: str, place: "torch.device", tell: Callable[[str], None]) -> dict[str, Any]:
        from longtake.evaluation import speed
        from longtake.evaluation.steady import bench_steady
        from longtake.recipes import split

        loaded = engine(name, place)
        split(loaded)
        if long:
            most = STEADY_BLOCKS if blocks is None else blocks
            return bench_steady(loaded, prompt, blocks=most, minutes=minutes or 0.0, say=tell)
        return speed.bench_stream(loaded, prompt, seconds, repeats) | {"redirect": speed.time_redirects(loaded, prompt)}

    results = []
    with together(device, codec_device) as (first, place):
        for name in recipe or (recipe_for(model),):
            result = timed(name, place, say if first else lambda line: None)
            results.append(result)
            if out is not None and first:
                say(f"{_keep(out, result)}: {result['frames_per_second']:.1f} frames a second")
    if not first:
        return 0
    _print(results, json, _steady_in_words if long else _speed_in_words)
    changed = [result for result in results if minutes is not None and _changes(result)]
    for result in changed:
        say(f"{result['recipe']}: changes over its minutes: {', '.join(_changes(result))}")
    return CHECK_FAILED if changed else 0


def _changes(result: dict[str, Any]) -> list[str]:
    """What a long stream was not at its end any more that it was at its beginning."""
    from longtake.evaluation.steady import grown

    return grown(result["over_time"]["last_to_first"]) + ["lost numbers"] * (not result["finite"])


@app.command(name="attention")
def bench_attention(
    recipe: tuple[str, ...] = ("hybrid_forcing", "longlive", "self_forcing:past=18", "rolling_forcing"),
    model: str = "wan2.1-1.3b",
    size: Size = None,
    device: Device = None,
    dtype: Precision = "auto",
    json: Switch = False,
) -> int:
    """Time attention by itself: the windows of recipes by every backend there is, and block-sparse windows.

    Args:
        recipe: Whose windows.
        model: Whose heads: a name of `longtake models`; nothing is pulled.
        size: Of the pictures; unless given, the model's own.
        json: Print one JSON object.
    """
    from longtake.evaluation import pieces
    from longtake.evaluation.steady import machine
    from longtake.models.umt5 import LENGTH
    from longtake.recipes import recipe_named
    from longtake.recipes.methods import AT_FULL_SIZE
    from longtake.recipes.wan_engines import published_sizes

    place, precision = _place(device, dtype)
    config, height, width = published_sizes(model, _height_width(size))
    chosen = [recipe_named(name, usual=AT_FULL_SIZE) for name in recipe]
    rows = pieces.bench_attention(chosen, config, (height, width), LENGTH, device=place, dtype=precision, say=say)
    result = {"model": model, "latents": [height, width], "precision": str(precision).removeprefix("torch.")}
    print_result(result | machine(place) | {"rows": rows}, json, _rows_in_words)
    return 0


@app.command(name="codec")
def bench_codec(
    decoder: Annotated[tuple[str, ...], arg(metavar="wan|light")] = ("wan", "light"),
    model: str = "wan2.1-1.3b",
    size: Size = None,
    frames: Annotated[int, arg(metavar="N")] = 3,
    device: Device = None,
    dtype: Precision = "auto",
    compile: Compile = False,
    json: Switch = False,
) -> int:
    """Time decoders by themselves, with random weights, in a stream that is under way.

    Args:
        decoder: Which of them.
        model: Whose latents: a name of `longtake models`; nothing is pulled.
        size: Of the pictures; unless given, the model's own.
        frames: Latent frames of a block.
        json: Print one JSON object.
    """
    import torch

    from longtake.evaluation import pieces
    from longtake.evaluation.steady import machine
    from longtake.models.standins import drawn
    from longtake.recipes.devices import fused_codec
    from longtake.recipes.wan_engines import decoder_named, published_sizes

    if frames < 1:
        raise ValueError(f"a block has one latent frame or more, got {frames}")
    place, precision = _place(device, dtype)
    config, height, width = published_sizes(model, _height_width(size))
    latents = torch.randn(1, frames, config.channels, height, width, device=place, dtype=precision)
    rows: list[dict[str, Any]] = []
    for name in decoder:
        codec = drawn(decoder_named(name), place, precision)
        how = "fused" if compile and fused_codec(codec) else "eager"
        rows += [{"decoder": name, "passes": how} | row for row in pieces.bench_codec(codec, latents, say)]
    result = {"model": model, "latents": [frames, height, width], "precision": str(precision).removeprefix("torch.")}
    print_result(result | machine(place) | {"rows": rows}, json, _rows_in_words)
    return 0


def _place(device: str | None, dtype: str) -> "tuple[torch.device, torch.dtype]":
    """Where, and in which precision: bfloat16 on a GPU and float32 on a CPU unless one is named."""
    from longtake.recipes.devices import device_named, usual_dtype

    place = device_named(device)
    return place, precision_named(dtype) or usual_dtype(place)


def _height_width(size: str | None) -> tuple[int, int] | None:
    """Of --size. ValueError for what is none."""
    from longtake.plan import pixels

    return None if size is None else pixels(size)[::-1]


def _rows_in_words(result: dict[str, Any]) -> str:
    heads = f"{result['model']}, latents {result['latents']}, {result['precision']}, {result['device']}"
    return "\n".join(
        [heads, *(", ".join(f"{key} {_short(value)}" for key, value in row.items()) for row in result["rows"])]
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print(results: list[dict[str, Any]], json: bool, in_words: Callable[[dict[str, Any]], str]) -> None:
    if len(results) == 1:
        print_result(results[0], json, in_words)
    else:
        print_result(results, json, lambda several: "\n\n".join(f"{one['recipe']}: {in_words(one)}" for one in several))


def _keep(folder: Path, result: dict[str, Any]) -> Path:
    """Write a result beside and rename it, under a name that says what ran."""
    from longtake.evaluation.steady import file_name

    path = folder / file_name(result)
    with whole(path) as beside:
        beside.write_text(dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def _speed_in_words(result: dict[str, Any]) -> str:
    block, redirect = result["block_ms"], result["redirect"]
    new = redirect.get("new")
    soon = f"{redirect['own']['seconds']:.2f} s, with block {redirect['own']['blocks']}" + (
        f' (in_flight="new": {new["seconds"]:.2f} s, with block {new["blocks"]})' if new else ""
    )
    return (
        f"{result['frames_per_second']:.1f} frames a second, {result['real_time_factor']:.2f} times real time "
        f"({result['precision']}, {result['threads']} threads, best of {len(result['repeats'])})\n"
        f"first frame after {result['first_frame_seconds']:.2f} s; "
        f"a block takes {block['p50']:.0f} / {block['p95']:.0f} / {block['p99']:.0f} ms (p50 / p95 / p99); "
        f"{result['deadline_misses']} deadline misses; at most {result['peak_memory_mib']:.0f} MiB\n"
        f"a redirect shows after {soon}"
    )


def _steady_in_words(result: dict[str, Any]) -> str:
    block, first, most = result["block_ms"], result["first_chunk_seconds"], result["rates"]
    window, length = result["window"], result["over_time"]["video_seconds"]
    changed, apart = result["over_time"]["last_to_first"], result["codec_apart"]
    codec = f", codec on {apart['device']}" if apart else ""
    eight_bit = most["eight_bit_tflops"]
    rows = [("", "ms", "TFLOP", "GB", "of products", "of copies")]
    for name, row in [*result["parts"].items(), ("whole, unmarked", result["whole"])]:
        numbers = f"{row['ms']:.2f}", f"{row['tflop']:.3g}", f"{row['gigabytes']:.3g}"
        rows.append((name, *numbers, f"{row['matrix_share']:.0%}", f"{row['copy_share']:.0%}"))
    return "\n".join(
        [
            f"{result['frames_per_second']:.2f} frames a second, {result['real_time_factor']:.2f} times real time; "
            f"a block of {result['pictures_a_block']} takes {block['p50']:.1f} / {block['p95']:.1f} / "
            f"{block['p99']:.1f} ms (p50 / p95 / p99 of {result['blocks']})",
            f"first chunk after {first['cold']:.2f} s cold, {first['warm']:.2f} s warm; "
            f"at most {result['peak_memory_mib']:.0f} MiB"
            + (f", and {apart['peak_memory_mib']:.0f} MiB for the codec" if apart else ""),
            f"{result['model']}, {result['size']}, {result['decoder']}, {result['precision']}, "
            f"{result['processes']} x {result['device']}{codec}; "
            f"{len(result['levels'])} levels, sink {window['sink']} + past {window['past']} + {window['current']} x "
            f"{window['in_flight']}, sparsity {result['sparsity'] or 'none'}",
            f"over {length:.0f} s of video: at its end blocks take {changed['block_ms']:.3f} times as long, "
            f"{changed['device_mib']:+.1f} MiB on the device, {changed['host_mib']:+.1f} MiB on the host",
            f"measured here: {most['matrix_tflops']:.4g} TFLOP/s of products, {most['copy_tbs']:.3g} TB/s of copies"
            + (f", {eight_bit:.4g} TFLOP/s of eight-bit products" if eight_bit else ""),
            *(f"{row[0]:18}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows),
        ]
    )
