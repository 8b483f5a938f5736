"""A stream that remembers all that it can: its speed, where the time of its blocks goes, and whether it stays so.

Everything is measured as a user would see it: `Engine.stream` hands over pictures on the host.
"""

import math
import platform
import re
import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from longtake import __version__, parallel
from longtake.attention.backends import choices
from longtake.evaluation.parts import Work, seconds_by_part, work_by_part
from longtake.evaluation.rates import Rates, rates
from longtake.evaluation.speed import MIB, cpu_name, forget_peak_memory, peak_memory_mib
from longtake.generation.stream import Chunk, Engine, Stream, one_behind
from longtake.generation.timing import Percentiles, measure

SEED = 0
MARKED_BLOCKS = 8  # whose time is told by part
ROWS = 60  # of what is told over a stream's time, at most
MEMORY = ("device_mib", "reserved_mib", "host_mib")  # fields of a `Moment`
END = 0.1  # shares of a stream that are compared: how it begins and how it ends
MOST_LATER = {"block_ms": 1.05, "device_mib": 1.0, "reserved_mib": 1.0, "host_mib": 64.0}
"""Of a stream that stays as it is: times as long, and MiB more, at its end. Hosts keep some of what was let go."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One block of a stream: seconds it took, pictures it brought, and MiB that were taken when it was there. reserved:
    by torch's allocator; host: by the process, where the system tells."""

    seconds: float
    pictures: int
    device_mib: float
    reserved_mib: float
    host_mib: float


def bench_steady(
    engine: Engine,
    prompt: str,
    *,
    blocks: int,
    minutes: float = 0.0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time a stream's blocks once all that it remembers is full.

    Args:
        engine: the loaded model and recipe.
        prompt: what the stream shows.
        blocks: how many are timed, two at least.
        minutes: of video that the stream is long at least, from its first block on.
        say: told how far it has come, now and then.

    Returns:
        A table ready for JSON (docs/speed.md).

    Raises:
        ValueError: fewer than two blocks, or minutes without end or below 0.
    """
    if blocks < 2:
        raise ValueError(f"a benchmark needs at least two blocks, got {blocks}")
    if not 0 <= minutes < math.inf:
        raise ValueError(f"a benchmark comes to an end, got {minutes:g} minutes")
    most = rates(engine.device, engine.dtype)
    say(f"{engine.recipe.name}: {most.matrix / 1e12:.4g} TFLOP/s of products, {most.copy / 1e12:.3g} TB/s of copies")
    full = engine.blocks_until_full
    pictures = engine.pictures_in(2) - engine.pictures_in(1)
    blocks = max(blocks, math.ceil(minutes * 60 * engine.frame_rate / pictures) - full)

    for device in {engine.device, engine.codec_device}:
        forget_peak_memory(device)
    before = perf_counter()
    with engine.stream(prompt, seed=SEED) as stream:
        next(stream).wait()
        cold = perf_counter() - before
        chunks = one_behind(engine, stream)  # one more is begun than is timed, so that all are timed alike
        for _ in islice(chunks, full - 1):
            pass
        moments = _moments(islice(chunks, blocks), blocks, engine, say)
        peak, codec_peak = peak_memory_mib(engine.device), peak_memory_mib(engine.codec_device)
        finite = _finite(stream)
        seconds = seconds_by_part(engine, stream, min(blocks, MARKED_BLOCKS))
    warm = _first_chunk(engine, prompt)
    say(f"{engine.recipe.name}: counting")
    work = work_by_part(engine, prompt)

    timing = measure(
        [cold, *(one.seconds for one in moments)], [pictures, *(one.pictures for one in moments)], engine.frame_rate
    )
    return {
        "frames_per_second": timing.frames_per_second,
        "real_time_factor": timing.real_time_factor,
        "block_ms": asdict(timing.block_ms),
        "deadline_misses": timing.deadline_misses,
        "first_chunk_seconds": {"cold": cold, "warm": warm},
        "peak_memory_mib": peak,
        "finite": finite,
        "blocks": blocks,
        "blocks_before": full,
        "pictures_a_block": pictures,
        "parts": parts_table(seconds, work, most),
        "whole": _row(sum(one.seconds for one in moments) / blocks, _sum(list(work.values())), most),
        "rates": {
            "matrix_tflops": most.matrix / 1e12,
            "copy_tbs": most.copy / 1e12,
            "eight_bit_tflops": most.eight_bit and most.eight_bit / 1e12,
        },
        "over_time": over_time(moments, engine.frame_rate),
        "codec_apart": {"device": device_name(engine.codec_device), "peak_memory_mib": codec_peak}
        if engine.codec_device != engine.device
        else None,
        **circumstances(engine),
    }


def parts_table(seconds: dict[str, float], work: dict[str, Work], most: Rates) -> dict[str, dict[str, float]]:
    """A row for each part of a block: what it took, what work it was, and which share of the device's rates that is."""
    names = dict.fromkeys([*seconds, *work])
    return {name: _row(seconds.get(name, 0.0), work.get(name, Work(0, 0)), most) for name in names}


def _row(seconds: float, work: Work, most: Rates) -> dict[str, float]:
    """least_ms: what the operations alone would take at the rate of a large product, each of its own precision."""
    a_second = 1 / seconds if seconds > 0 else 0.0
    least = (work.operations - work.eight_bit) / most.matrix + work.eight_bit / (most.eight_bit or most.matrix)
    return {
        "ms": 1000 * seconds,
        "tflop": work.operations / 1e12,
        "gigabytes": work.bytes / 1e9,
        "least_ms": 1000 * least,
        "matrix_share": least * a_second,
        "copy_share": work.bytes * a_second / most.copy,
    }


def _sum(several: Sequence[Work]) -> Work:
    return Work(*(sum(amounts) for amounts in zip(*several, strict=True)))


def circumstances(engine: Engine) -> dict[str, Any]:
    """What the numbers hang on."""
    recipe, near = engine.recipe, engine.recipe.near
    extent = recipe.memory(engine.network).extent
    return {
        "model": engine.model_name,
        "recipe": recipe.name,
        "size": f"{engine.width}x{engine.height}",
        "levels": list(recipe.steps),
        "window": {
            "sink": recipe.sink, "past": recipe.past, "current": recipe.block, "in_flight": recipe.in_flight,
            "extent": extent,
        },
        "sparsity": dict(near.keywords) if isinstance(near, partial) else None,
        "far_state": recipe.far is not None or recipe.joint is not None,
        "decoder": type(engine.codec).__name__,
        "precision": engine.circumstances["dtype"],
        "passes": engine.circumstances["passes"],
        "attention": attention_taken(),
        "processes": parallel.processes(),
        **machine(engine.device),
    }  # fmt: skip


def attention_taken() -> dict[str, str]:
    """Which backend of dense attention was chosen so far, by queries x keys x heads x size of a head."""
    return {
        f"{shape.queries}x{shape.keys}x{shape.heads}x{shape.head_dim}": choice.name
        for shape, choice in choices().items()
    }


def file_name(result: Mapping[str, Any]) -> str:
    """For a result's file: what tells it from others of one machine, in letters that every file system takes."""
    told = [result[name] for name in ("model", "recipe", "decoder", "size", "precision", "passes")]
    told.append(f"{len(result['levels'])}levels")
    if result["processes"] > 1:
        told.append(f"{result['processes']}processes")
    if result["codec_apart"]:
        told.append("codec_apart")
    return re.sub(r"[^\w.-]+", "_", "-".join(told)) + ".json"


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the versions of what computes on it."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "longtake": __version__,
            **{name: _version(name) for name in ("torch", "triton")},
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        },
    }


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_chunk(engine: Engine, prompt: str) -> float:
    """Seconds from opening a stream to its first pictures."""
    before = perf_counter()
    with engine.stream(prompt, seed=SEED) as stream:
        next(stream).wait()
        return perf_counter() - before


def _moments(chunks: Iterable[Chunk], blocks: int, engine: Engine, say: Callable[[str], None]) -> list[Moment]:
    moments: list[Moment] = []
    told = before = perf_counter()
    for chunk in chunks:
        now = perf_counter()
        device, reserved = _device_mib({engine.device, engine.codec_device})
        moments.append(
            Moment(
                seconds=now - before, pictures=len(chunk.frames), device_mib=device, reserved_mib=reserved,
                host_mib=_host_mib(),
            )
        )  # fmt: skip
        if now - told > 10:
            told = now
            say(f"{engine.recipe.name}: block {len(moments)} of {blocks}, {1000 * (now - before):.0f} ms")
        before = perf_counter()
    return moments


def over_time(moments: Sequence[Moment], frame_rate: int) -> dict[str, Any]:
    """How blocks and memory went: rows of many blocks each, and what changed from the first tenth to the last."""
    pictures = np.cumsum([one.pictures for one in moments])
    groups = [list(group) for group in np.array_split(np.arange(len(moments)), min(ROWS, len(moments)))]
    rows = [
        {
            "video_seconds": float(pictures[group[-1]]) / frame_rate,
            "block_ms": _percentiles([moments[i].seconds for i in group]),
            "block_ms_max": 1000 * max(moments[i].seconds for i in group),
            **{name: max(getattr(moments[i], name) for i in group) for name in MEMORY},
        }
        for group in groups
    ]
    share = max(1, int(END * len(moments)))
    first, last = moments[:share], moments[-share:]
    return {
        "video_seconds": float(pictures[-1]) / frame_rate,
        "last_to_first": {
            "block_ms": _percentiles([one.seconds for one in last])["p50"]
            / _percentiles([one.seconds for one in first])["p50"],
            **{
                name: max(getattr(one, name) for one in last) - max(getattr(one, name) for one in first)
                for name in MEMORY
            },
        },
        "rows": rows,
    }


def grown(changed: Mapping[str, float]) -> list[str]:
    """What of `last_to_first` is above `MOST_LATER`."""
    return [name for name, most in MOST_LATER.items() if changed[name] > most]


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p95, p99 = (1000 * float(value) for value in np.percentile(seconds, [50, 95, 99]))
    return asdict(Percentiles(p50=p50, p95=p95, p99=p99))


def _device_mib(devices: Iterable[torch.device]) -> tuple[float, float]:
    """MiB that tensors take on GPUs, and that torch's allocator holds for them."""
    gpus = [device for device in devices if device.type == "cuda"]
    taken, reserved = (sum(map(of, gpus)) for of in (torch.cuda.memory_allocated, torch.cuda.memory_reserved))
    return taken / MIB, reserved / MIB


def _host_mib() -> float:
    """MiB of the process that are in memory now, 0 where the system does not tell."""
    table = Path("/proc/self/statm")
    return int(table.read_text().split()[1]) * resource.getpagesize() / MIB if table.exists() else 0.0


def _finite(stream: Stream) -> bool:
    """Whether all that a stream goes on from are numbers."""
    kept = [x for x in tree_leaves(stream.state()) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return all(bool(x.isfinite().all()) for x in kept)
