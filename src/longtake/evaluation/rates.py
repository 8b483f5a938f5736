"""What a device can do at most, measured in a second or two, and how long a call takes on it."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

from longtake.models import fp8

LEAST_SECONDS, MOST_CALLS = 0.2, 200  # of one measurement, its warm-up left out


@dataclass(frozen=True, kw_only=True)
class Rates:
    """matrix: operations a second (a multiplication and an addition are two) of one large square product. copy: bytes a
    second of one large copy, read and written ones counted. eight_bit: as matrix, of e4m3 numbers with a scale for each
    row; None on a device that has no such products."""

    matrix: float
    copy: float
    eight_bit: float | None = None


def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of a device, in one precision."""
    side, size = (8192, 2**30) if device.type == "cuda" else (1024, 2**25)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    matrix = 2 * side**3 / seconds(lambda: a @ b, device)
    source = torch.zeros(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = 2 * size / seconds(lambda: target.copy_(source), device)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < fp8.CAPABILITY:
        return Rates(matrix=matrix, copy=copy)
    a_and_scales, b_and_scales = (fp8.eight_bit(x) for x in (a, b))
    eight_bit = seconds(lambda: fp8.product(*a_and_scales, *b_and_scales, None, torch.bfloat16), device)
    return Rates(matrix=matrix, copy=copy, eight_bit=2 * side**3 / eight_bit)


def seconds(call: Callable[[], Any], device: torch.device, *, least: float = LEAST_SECONDS) -> float:
    """The median over as many calls as take that many seconds, three at least, after one that is not counted.

    On a GPU the time between two events, which a call of less than .1 ms fills in part only.
    """
    call()
    took: list[float] = []
    while len(took) < 3 or (sum(took) < least and len(took) < MOST_CALLS):
        took.append(_once(call, device))
    return median(took)


def _once(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        before = perf_counter()
        call()
        return perf_counter() - before
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    call()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1000
