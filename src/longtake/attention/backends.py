"""Kernels of dense attention: which are there, whether they are right, and which is fastest for a shape.

Each is compared with `reference` once for a device, a type and a size of heads, before it is used: a wrong one gives
noise rather than an error. Then a short trial decides for each shape, on a GPU by the kernels' own time. Where two are
close the earlier one in `BACKENDS` wins, so that a machine answers the same each time. LONGTAKE_ATTENTION=name takes
one for all.
"""

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from longtake.attention import reference

FORCED = "LONGTAKE_ATTENTION"
GAIN, GPU_GAIN = 1.1, 1.03  # how many times faster a later one must be: on a GPU cuDNN reads the same to 1 %
ROUNDINGS, LEAST_BOUND = 4, 1e-4  # of the type, and what float32 is allowed at least
QUERIES, KEYS, HEADS = 90, 190, 3  # of the comparison: tokens, no multiple of any block
AT_ONCE = 256  # queries whose scores products hold: more of them leave a CPU's cache
ROUNDS, CALLS = 5, 4  # of a trial, and what is timed of each backend in a round, after one call that is not
HOLD = 8_000_000  # cycles that a GPU waits before timed calls: some 4 ms, longer than a host takes to queue them

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [B, T, N, D], keys and values [B, S, N, D] -> [B, T, N, D]."""


def by_torch(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, mask_TS: Tensor | None = None) -> Tensor:
    """Whichever of its kernels torch takes."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTND, k_BSND, v_BSND))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask_TS).transpose(1, 2)


def _torch(kind: SDPBackend) -> Kernel:
    def attend(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return by_torch(q_BTND, k_BSND, v_BSND)

    return attend


def _flash_attention(module: str) -> Kernel:
    def attend(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
        with torch.cuda.device_of(q_BTND):  # such kernels run on the current GPU, wherever their tensors are
            made = import_module(module).flash_attn_func(q_BTND, k_BSND, v_BSND)
        return made[0] if isinstance(made, tuple) else made  # some versions hand over a log-sum-exp too

    return attend


def _triton(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, *, block: int = 64) -> Tensor:
    """Our block-sparse kernel over all blocks."""
    from longtake.attention import block_sparse_triton

    queries, keys = (-(-x.shape[1] // block) for x in (q_BTND, k_BSND))
    all_of_them = torch.arange(keys, device=q_BTND.device, dtype=torch.int32)
    chosen_BNIK = all_of_them.expand(q_BTND.shape[0], q_BTND.shape[2], queries, keys)
    with torch.cuda.device_of(q_BTND):
        return block_sparse_triton.attend_blocks(q_BTND, k_BSND, v_BSND, chosen_BNIK, block_q=block, block_k=block)


def by_products(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
    """Plain products, a head and a few of its queries at a time. Scores are rounded to the type of their tensors."""
    scaled = q_BTND * q_BTND.shape[3] ** -0.5
    heads = zip(*(x.transpose(1, 2).flatten(0, 1) for x in (scaled, k_BSND, v_BSND)), strict=True)
    answers = [(part @ k.T).softmax(-1) @ v for q, k, v in heads for part in q.split(AT_ONCE)]
    return torch.cat(answers).unflatten(0, (q_BTND.shape[0], q_BTND.shape[2], -1)).transpose(1, 2)


@dataclass(frozen=True)
class Backend:
    """A kernel, the package that it comes with if that is not torch, and where it runs."""

    attend: Kernel
    package: str | None = None
    on_cpu: bool = False
    on_gpu: bool = True

    def missing(self, device: torch.device) -> str | None:
        """Why it is not there on a device; None if it is."""
        if device.type != "cuda" and not self.on_cpu:
            return "runs on a GPU alone"
        if device.type == "cuda" and not self.on_gpu:
            return "runs on a CPU alone"
        return None if self.package is None or _installed(self.package) else "not installed"


BACKENDS: dict[str, Backend] = {
    "cudnn": Backend(_torch(SDPBackend.CUDNN_ATTENTION)),
    "fa4": Backend(_flash_attention("flash_attn.cute"), "flash_attn.cute"),
    "fa3": Backend(_flash_attention("flash_attn_interface"), "flash_attn_interface"),
    "flash": Backend(_torch(SDPBackend.FLASH_ATTENTION), on_cpu=True),
    "efficient": Backend(_torch(SDPBackend.EFFICIENT_ATTENTION)),
    "triton": Backend(_triton, "triton"),
    "products": Backend(by_products, on_cpu=True, on_gpu=False),
    "math": Backend(_torch(SDPBackend.MATH), on_cpu=True),
}
"""cudnn, flash, efficient and math are torch's. math holds all scores, and is tried only where no other runs."""


class Choice(NamedTuple):
    """The backend for a shape; the least seconds a call of those that were tried, and why the others were not."""

    name: str
    seconds: Mapping[str, float]
    refused: Mapping[str, str]


class Shape(NamedTuple):
    """What a choice is made for: batch, queries, keys, heads and their sizes, where and in which type."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


_choices: dict[Shape, Choice] = {}


def choices() -> dict[Shape, Choice]:
    """All that was chosen so far."""
    return dict(_choices)


def fastest(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Kernel:
    """The kernel for such tensors. The first call for a shape tries them all; later ones look it up.

    While a graph is recorded nothing can be tried: torch's own choice is taken for a shape that is new there.
    ValueError where LONGTAKE_ATTENTION names none, or one that does not run here or is wrong.
    """
    batch, queries, heads, head_dim = q_BTND.shape
    keys, value_dim = k_BSND.shape[1], v_BSND.shape[3]
    shape = Shape(batch, queries, keys, heads, head_dim, value_dim, q_BTND.dtype, q_BTND.device)
    found = _choices.get(shape)
    if found is None:
        if q_BTND.is_cuda and torch.cuda.is_current_stream_capturing():
            return by_torch
        with torch.no_grad():
            found = _choices[shape] = choose(q_BTND, k_BSND, v_BSND)
    return BACKENDS[found.name].attend


def choose(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Choice:
    """Try all backends on these tensors, or take the one that LONGTAKE_ATTENTION names. ValueError as for `fastest`."""
    kind = q_BTND.device, q_BTND.dtype, q_BTND.shape[3]
    if (name := os.environ.get(FORCED)) is not None:
        if name not in BACKENDS:
            raise ValueError(f"{FORCED}: no attention backend {name!r}: there are {', '.join(BACKENDS)}")
        if reason := verdict(name, *kind):
            raise ValueError(f"{FORCED}: attention backend {name} cannot be taken on {kind[0]} in {kind[1]}: {reason}")
        return Choice(name, {}, {})
    refused = {name: reason for name in BACKENDS if (reason := verdict(name, *kind))}
    seconds: dict[str, float] = {}
    for name in ROUNDS * tuple(BACKENDS):  # in turn, so that clocks and heat are alike for all
        if name in refused or (name == "math" and seconds.keys() - {name}):
            continue
        try:
            taken = _seconds(BACKENDS[name].attend, q_BTND, k_BSND, v_BSND)
        except Exception as error:  # of a shape that a kernel does not take, or has no room for: it raises anything
            refused[name] = one_line(error)
            seconds.pop(name, None)
        else:
            seconds[name] = min(taken, seconds.get(name, math.inf))  # what disturbs a reading only adds to it
    if not seconds:
        raise ValueError(f"no attention backend runs on {kind[0]} in {kind[1]}: {refused}")
    return Choice(preferred(seconds, GPU_GAIN if q_BTND.is_cuda else GAIN), seconds, refused)


def preferred(seconds: Mapping[str, float], gain: float) -> str:
    """The fastest, or the earliest that is slower by no more than a factor."""
    return next(name for name in BACKENDS if seconds.get(name, math.inf) <= gain * min(seconds.values()))


@cache
def verdict(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend is not used for heads of that size; None if it is right. A wrong one is warned of."""
    backend = BACKENDS[name]
    if reason := backend.missing(device):
        return reason
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, HEADS, head_dim, generator=draw).to(device, dtype) for n in (QUERIES, KEYS, KEYS))
    try:
        with warnings.catch_warnings():  # in which torch says why it has no kernel
            warnings.simplefilter("ignore")
            answer = backend.attend(q, k, v)
    except Exception as error:  # kernels and compilers raise anything; another kernel is there to be taken
        return one_line(error)
    off = distance(answer, reference.dense(q.double(), k.double(), v.double()))
    if off <= tolerance(dtype):
        return None
    reason = f"it answers wrong: {off:.2g} from the definition, at most {tolerance(dtype):.2g} is right"
    warnings.warn(f"attention backend {name} is not used on {device} in {dtype}: {reason}", stacklevel=2)
    return reason


def distance(answer: Tensor, truth: Tensor) -> float:
    """Of an answer from the true one, as a share of its size."""
    return float((answer.double() - truth).norm() / truth.norm())


def tolerance(dtype: torch.dtype) -> float:
    """The largest distance at which attention in a type is right."""
    return max(LEAST_BOUND, ROUNDINGS * torch.finfo(dtype).eps)


def _seconds(attend: Kernel, q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> float:
    """A call among others, on a GPU without the host's part in it, as recorded graphs replay it.

    Queued rather than recorded: so every backend can be timed, one that waits for the device with its waits.
    """

    def calls() -> None:
        for _ in range(CALLS):
            attend(q_BTND, k_BSND, v_BSND)

    attend(q_BTND, k_BSND, v_BSND)
    if not q_BTND.is_cuda:
        before = perf_counter()
        calls()
        return (perf_counter() - before) / CALLS
    with torch.cuda.device_of(q_BTND):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HOLD)  # all are queued by the time that the first begins
        begun.record()
        calls()
        ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1000 / CALLS


def one_line(error: Exception) -> str:
    """What an error says first."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@cache
def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ImportError:  # what it is a part of is not there
        return False
