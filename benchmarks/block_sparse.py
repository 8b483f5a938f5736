"""Are the kernels of block-sparse attention right, and how fast are they beside dense attention?

    python benchmarks/block_sparse.py > block_sparse.json    # on a GPU; nothing is timed while a check fails
    python benchmarks/block_sparse.py --tiny                 # the same lines in seconds, interpreted on a CPU

Checks: outputs and gradients against the definition in float32 of the same rounded numbers, as the norm of the
difference over the norm of the definition; chosen blocks must be equal. Times: medians in milliseconds by CUDA events,
the cache flushed before every call; under "graph" CUDA graphs are replayed, without the host's part and with a warm
cache. Backward is all three gradients. "far" is what a far state answers to as many queries, added. Every launch of
every kernel of attention is tried, one kernel after the other; what cannot run says why.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longtake.attention import block_sparse, linear, reference, rope
from longtake.attention.backends import by_torch

LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
LAUNCHES = [*itertools.product([4], range(1, 8)), (8, 2), (8, 3)]  # warps, stages
DENSE = {"torch's choice": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}

Call = Callable[[], object]
Milliseconds = float | str  # or why there are none


@dataclass(frozen=True, kw_only=True)
class Sizes:
    clips: int = 1
    queries: int = 4680
    keys: int = 14040
    heads: int = 12
    head_dim: int = 128
    block_q: int = 64
    block_k: int = 64
    share: float = 0.2

    @property
    def blocks(self) -> dict[str, int]:
        return {"block_q": self.block_q, "block_k": self.block_k}

    def random(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Queries, keys, values, and a direction for the gradients."""
        counts = self.queries, self.keys, self.keys, self.queries
        return [torch.randn(self.clips, n, self.heads, self.head_dim, device=device).to(dtype) for n in counts]


TINY = Sizes(queries=40, keys=100, heads=2, head_dim=16, block_q=16, block_k=16)
TINY_CHECKS = [Sizes(clips=2, queries=20, keys=50, heads=2, head_dim=16, block_q=16, block_k=8, share=0.4)]
CHECKS = [
    Sizes(clips=2, queries=200, keys=900, heads=2),
    Sizes(clips=2, queries=252, keys=756, heads=4, head_dim=64, block_q=16, block_k=16),
    Sizes(queries=100, keys=300, heads=3, head_dim=20, block_q=12, block_k=24, share=0.5),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--tiny", action="store_true", help="interpreted on a CPU, at sizes of its own")
    options = vars(parser.parse_args())
    tiny = options.pop("tiny")
    if tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    import triton

    from longtake.attention import block_sparse_triton as kernels

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    sizes, device = (TINY, "cpu") if tiny else (Sizes(**options), "cuda")
    dtypes = [torch.float32, torch.float16] if tiny else list(LIMITS)  # the interpreter multiplies no bfloat16
    checks = [
        check(kernels, some, dtype, device) for some in [*(TINY_CHECKS if tiny else CHECKS), sizes] for dtype in dtypes
    ]
    right = all(row["right"] for row in checks)
    report = {
        "device": "interpreter" if tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "right": right,
        "sizes": asdict(sizes),
        "times": times(kernels, sizes, dtypes[-1], device) if right else None,
        "checks": checks,
    }
    print(json.dumps(report, indent=1))
    raise SystemExit(not right)


def choose(kernels: ModuleType, sizes: Sizes, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the blocks and the best of them, by the kernels."""
    scores = kernels.block_means(q, sizes.block_q) @ kernels.block_means(k, sizes.block_k).mT
    return scores, kernels.best_blocks(scores, sizes.share)


def check(kernels: ModuleType, sizes: Sizes, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Errors at one size and type. What is not a number is not below a limit."""
    q, k, v, direction = sizes.random(dtype, device)
    scores, chosen = choose(kernels, sizes, q, k)
    answers = []
    for attend, wanted in ((kernels.attend_blocks, dtype), (reference.attend_blocks, torch.float32)):
        leaves = [x.to(wanted, copy=True).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, chosen, **sizes.blocks)
        answers.append([out.detach(), *torch.autograd.grad(out, leaves, direction.to(wanted))])
    errors = {
        name: relative(got, want) for name, got, want in zip(("out", "dq", "dk", "dv"), *answers, strict=True)
    } | {"scores": relative(scores, reference.block_scores(q, k, **sizes.blocks))}
    same_choice = chosen.long().equal(reference.best_blocks(scores, sizes.share))
    return {
        "right": same_choice and all(error < LIMITS[dtype] for error in errors.values()),
        "dtype": str(dtype),
        "sizes": asdict(sizes),
        "same_choice": same_choice,
        "errors": errors,
    }


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want).norm() / want.norm()).item()


def times(kernels: ModuleType, sizes: Sizes, dtype: torch.dtype, device: str) -> dict[str, Any]:
    q, k, v, direction = sizes.random(dtype, device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    chosen = choose(kernels, sizes, q, k)[1]

    def forward(launches: Any) -> Call:
        return lambda: kernels.attend_blocks(q, k, v, chosen, **sizes.blocks, launches=launches)

    def with_choice(launches: Any) -> Call:
        return lambda: kernels.attend_blocks(
            q, k, v, choose(kernels, sizes, q, k)[1], **sizes.blocks, launches=launches
        )

    def backward(launches: Any) -> Call:
        out = kernels.attend_blocks(*leaves, chosen, **sizes.blocks, launches=launches)
        return lambda: torch.autograd.grad(out, leaves, direction, retain_graph=True)

    def measured(launches: Any) -> dict[str, Milliseconds]:
        return {
            "forward": timed(lambda: forward(launches), device),
            "with choice": timed(lambda: with_choice(launches), device),
            "backward": timed(lambda: backward(launches), device),
        }

    best, tried = kernels.DEFAULT_LAUNCHES, {}
    for kernel in best._fields:
        what = forward if kernel == "forward" else backward
        options = [
            best._replace(**{kernel: kernels.Launch(*launch)})
            for launch in (LAUNCHES if device == "cuda" else [(4, 1)])
        ]
        rows = [timed(lambda what=what, it=it: what(it), device) for it in options]
        tried[kernel] = [{**getattr(it, kernel)._asdict(), "ms": ms} for it, ms in zip(options, rows, strict=True)]
        ran = [(ms, it) for ms, it in zip(rows, options, strict=True) if isinstance(ms, float)]
        best = min(ran, default=(0.0, best))[1]
    report = {
        "default launches": measured(kernels.DEFAULT_LAUNCHES),
        "best launches": {"launches": {name: tuple(it) for name, it in best._asdict().items()}, **measured(best)},
        "choice": timed(lambda: lambda: choose(kernels, sizes, q, k), device),
        "as called by models": timed(
            lambda: lambda: block_sparse.block_sparse(q, k, v, share=sizes.share, **sizes.blocks), device
        ),
        "far": timed(lambda: far(sizes, q), device),
        "dense": {name: dense_times(leaves, direction, backend, device) for name, backend in DENSE.items()},
        "tried": tried,
    }
    if device == "cuda":
        report["graph"] = {
            "forward": timed(lambda: forward(best), device, graph=True),
            "choice": timed(lambda: lambda: choose(kernels, sizes, q, k), device, graph=True),
            "with choice": timed(lambda: with_choice(best), device, graph=True),
            "backward": timed(lambda: backward(best), device, graph=True),
            "far": timed(lambda: far(sizes, q), device, graph=True),
        }
    return report


def far(sizes: Sizes, q: Tensor) -> Call:
    """What a far state answers to these queries, added to what is near; q stands for that, and for its keys too."""
    from longtake.attention import fused_triton

    project = torch.nn.Linear(sizes.head_dim, sizes.head_dim).to(q).requires_grad_(False)
    turn = rope.RotaryAxes(split=rope.split_like_wan(sizes.head_dim)).rotation([9], 1, sizes.queries, q.device)
    sums = linear.sums_of(linear.PAPER.of_keys(q, turn), q)
    return lambda: fused_triton.add_far(q, q, turn, sums, project.weight, project.bias)


def dense_times(
    leaves: list[Tensor], direction: Tensor, backend: SDPBackend | None, device: str
) -> dict[str, Milliseconds]:
    """Attention to every key, by one of torch's kernels."""

    def chosen_kernel() -> Any:
        return nullcontext() if backend is None else sdpa_kernel(backend)

    def forward() -> Call:
        still = [x.detach() for x in leaves]
        return lambda: by_torch(*still)

    def backward() -> Call:
        out = by_torch(*leaves)
        return lambda: torch.autograd.grad(out, leaves, direction, retain_graph=True)

    with chosen_kernel():
        return {"forward": timed(forward, device), "backward": timed(backward, device)}


def timed(prepare: Callable[[], Call], device: str, graph: bool = False) -> Milliseconds:
    """Median time of what `prepare` hands out, or why it could not run."""
    try:
        with torch.cuda.stream(torch.cuda.Stream()) if graph else nullcontext():  # gradients come where answers came
            call = prepare()  # from, and the default stream cannot be recorded
            call()
        if device == "cpu":
            began = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - began)
        from triton import testing

        bench = testing.do_bench_cudagraph if graph else testing.do_bench
        return float(bench(call, return_mode="median"))
    except Exception as error:  # a launch that the machine has no room for is an answer
        return f"{type(error).__name__}: {error}"[:200]


if __name__ == "__main__":
    main()
