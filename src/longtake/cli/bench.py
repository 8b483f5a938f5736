"""`longtake bench`: speed on this machine."""

from typing import Any

from tyro.extras import SubcommandApp

from longtake.cli.engines import load_engine
from longtake.cli.options import Codec, Compile, Device, Levels, Precision
from longtake.cli.terminal import print_result

app = SubcommandApp()


@app.command(name="stream")
def bench_stream(
    recipe: str = "self_forcing_sink",
    model: str = "toy",
    codec: Codec = None,
    levels: Levels = None,
    seconds: float = 10.0,
    repeats: int = 5,
    prompt: str = "a red ball bounces over green hills",
    device: Device = None,
    dtype: Precision = "auto",
    compile: Compile = True,
    json: bool = False,
) -> int:
    """Time one stream, network and codec together; the first block of each repeat is left out.

    Args:
        recipe: The method to time.
        model: The weights to time.
        codec: What makes pictures in place of a Wan model's VAE, such as taew2_1.pth.
        seconds: Length of each repeat, in seconds of video.
        repeats: How often; the fastest is the headline.
        prompt: What the stream shows.
        json: Print one JSON object, every repeat included.
    """
    from longtake.evaluation import speed

    engine = load_engine(model, recipe, levels, device, dtype, codec, compile)
    result = speed.bench_stream(engine, prompt, seconds, repeats)
    print_result(result, json, _speed_in_words)
    return 0


def _speed_in_words(result: dict[str, Any]) -> str:
    block = result["block_ms"]
    return (
        f"{result['frames_per_second']:.1f} frames a second, {result['real_time_factor']:.2f} times real time "
        f"({result['precision']}, {result['threads']} threads, best of {len(result['repeats'])})\n"
        f"first frame after {result['first_frame_seconds']:.2f} s; "
        f"a block takes {block['p50']:.0f} / {block['p95']:.0f} / {block['p99']:.0f} ms (p50 / p95 / p99); "
        f"{result['deadline_misses']} deadline misses; at most {result['peak_memory_mib']:.0f} MiB"
    )
