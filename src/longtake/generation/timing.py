"""What speed means, once, for the command line, the benchmarks and the server.

The first block of a stream pays for what happens only once (reading the prompt, warming up), so it has a number of its
own, the first frame's delay, and every other number leaves it out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """The middle and the slow end of a set of durations, in milliseconds."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How fast one stream ran."""

    frames_per_second: float
    """Pictures made a second."""
    real_time_factor: float
    """Times real time: above 1 the stream outruns a viewer."""
    first_frame_seconds: float
    """From opening the stream to its first pictures."""
    block_ms: Percentiles
    """Time between one block and the next."""
    deadline_misses: int
    """Blocks for which a viewer would have had to wait."""


def measure(block_seconds: Sequence[float], block_pictures: Sequence[int], frame_rate: float) -> Timing:
    """Speed of a stream from its blocks.

    Args:
        block_seconds: seconds each block took, the first counted from the opening of the stream.
        block_pictures: pictures each block brought.
        frame_rate: pictures a viewer sees a second.

    Raises:
        ValueError: fewer than two blocks, of which the first says nothing about speed.
    """
    if len(block_seconds) != len(block_pictures) or len(block_seconds) < 2:
        raise ValueError(
            "speed needs at least two blocks, each with its seconds and pictures: "
            f"got {len(block_seconds)} durations and {len(block_pictures)} picture counts"
        )
    later_seconds = block_seconds[1:]
    frames_per_second = sum(block_pictures[1:]) / sum(later_seconds)
    p50, p95, p99 = (1000 * float(value) for value in np.percentile(later_seconds, [50, 95, 99]))
    return Timing(
        frames_per_second=frames_per_second,
        real_time_factor=frames_per_second / frame_rate,
        first_frame_seconds=block_seconds[0],
        block_ms=Percentiles(p50=p50, p95=p95, p99=p99),
        deadline_misses=count_misses(later_seconds, block_pictures, frame_rate),
    )


def count_misses(later_seconds: Sequence[float], block_pictures: Sequence[int], frame_rate: float) -> int:
    """Blocks that come after a viewer has seen all pictures before them.

    The viewer starts to watch when the first block arrives, and after a miss goes on from the late block, so that one
    slow block is one miss and not one for every block behind it.

    Args:
        later_seconds: seconds each block after the first took.
        block_pictures: pictures each block brought, the first included.
        frame_rate: pictures a viewer sees a second.
    """
    misses = 0
    unseen_seconds = 0.0
    for pictures_before, seconds in zip(block_pictures, later_seconds, strict=False):
        unseen_seconds += pictures_before / frame_rate - seconds
        if unseen_seconds < 0:
            misses += 1
            unseen_seconds = 0.0
    return misses
