"""How fast a stream is on this machine, codec included, files and players left out.

Short streams from their first block on; for one that remembers all that it can see `steady`.
"""

import gc
import math
import platform
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from longtake import __version__, parallel
from longtake.generation.stream import Engine, PromptInFlight, one_behind
from longtake.generation.timing import Timing, measure

MIB = 2**20


def bench_stream(engine: Engine, prompt: str, seconds: float, repeats: int) -> dict[str, Any]:
    """Time the same stream several times over.

    Args:
        engine: the loaded model and recipe.
        prompt: what the stream shows.
        seconds: length of each run, in seconds of video; at least two blocks.
        repeats: how many runs. The fastest is the headline, because noise from other programs only ever slows a run
            down; all are listed.

    Returns:
        A table ready for JSON: the fields of `Timing`, what ran, on what, and every repeat.

    Raises:
        ValueError: no repeats, or seconds without end or too few for two blocks.
    """
    if repeats < 1:
        raise ValueError(f"a benchmark needs at least one repeat, got {repeats}")
    if not math.isfinite(seconds):
        raise ValueError(f"a benchmark comes to an end, got {seconds:g} seconds")
    for device in {engine.device, engine.codec_device}:
        forget_peak_memory(device)
    timings = [time_stream(engine, prompt, seconds) for _ in range(repeats)]
    best = max(timings, key=lambda timing: timing.frames_per_second)
    return {
        **asdict(best),
        "peak_memory_mib": peak_memory_mib(engine.device),
        "codec_peak_memory_mib": peak_memory_mib(engine.codec_device),
        "model": engine.model_name,
        "codec": engine.codec_name,
        "recipe": engine.recipe.name,
        "levels": len(engine.recipe.steps),
        "precision": engine.circumstances["dtype"],
        "device": str(engine.device),
        "codec_device": str(engine.codec_device),
        "processes": parallel.processes(),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "longtake": __version__,
        "repeats": [asdict(timing) for timing in timings],
    }


def time_stream(engine: Engine, prompt: str, seconds: float) -> Timing:
    """Run one stream for that many seconds of video and time its blocks."""
    block_seconds, block_pictures = [], []
    before = perf_counter()
    with engine.stream(prompt, seed=0) as stream:
        for chunk in one_behind(engine, iter(stream)):
            now = perf_counter()
            block_seconds.append(now - before)
            block_pictures.append(len(chunk.frames))
            before = now
            if sum(block_pictures) >= seconds * engine.frame_rate:
                break
    return measure(block_seconds, block_pictures, engine.frame_rate)


def time_redirects(engine: Engine, prompt: str) -> dict[str, dict[str, float]]:
    """How soon a redirect shows, by the prompt that blocks in flight go on under: "own", and "new" where there are any.

    blocks: that come up to the first under the new prompt, itself included: a viewer sees all but that one before.
    seconds: that these take, reading the prompt included.
    """
    ways: tuple[PromptInFlight, ...] = ("own", "new") if engine.recipe.in_flight > 1 else ("own",)
    return {way: _time_redirect(engine, prompt, way) for way in ways}


def _time_redirect(engine: Engine, prompt: str, in_flight: PromptInFlight) -> dict[str, float]:
    with engine.stream(prompt, seed=0) as stream:
        chunks = iter(stream)
        next(chunks).wait()
        before = perf_counter()
        stream.redirect(prompt, in_flight=in_flight)
        blocks = stream.since - stream.blocks + 1
        for _ in range(blocks):
            next(chunks).wait()
        return {"blocks": blocks, "seconds": perf_counter() - before}


def peak_memory_mib(device: torch.device) -> float:
    """The most memory taken so far: of the device on a GPU, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def cpu_name() -> str:
    """The processor as its maker calls it, where the system tells."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_mib` count anew, on a GPU, and give back what is not in use; a process on the CPU cannot."""
    if device.type == "cuda":
        gc.collect()  # a network with recorded passes and what they hold know each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
