"""Time and peak memory of one layer against the length of a clip on a GPU: dense, converted, chunk by chunk.

    python benchmarks/rehyat_speed.py --out rehyat_speed.json            # the embedded model's shape, and the 1.3B one
    python benchmarks/rehyat_speed.py --out rehyat_speed.json --tiny     # the same lines on a CPU, in seconds
    python benchmarks/rehyat_speed.py --out longer.json --span 11 3      # Tc and To
    python benchmarks/plot_rehyat.py rehyat_speed.json -o rehyat_speed.png

Random weights and tokens, bfloat16 on a GPU, no gradients; Tc 3, To 1 unless told. Kinds are timed in turn, pass by
pass, in one process. rehyat_speed.json holds, of each shape, part, kind and number of latent frames:

part: `attention`, from queries, keys and values to answers; `self_attention`, with their projections, norms and
rotations; `layer`, the whole layer. kind: `dense`, every token sees every token, by cuDNN on a GPU; `converted`, the
same converted, by the fused kernels there; `plain`, that in plain torch, chunk after chunk; `step`, the layer as a
function of tensors (`models.block_step`), whose input is made chunk by chunk, whole ones. ms: median of the passes.
peak_mb: what was allocated at most beyond the input. off: how far the kernels are from plain torch, beside its size.
refused: why there is no number. gains: how many times faster `converted` is. crossing: the fewest of the measured
frames from which on it is faster. export: the layer of each shape as an exported program, Tc 3, To 1.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rehyat_length import CURRENT, OVERLAP, PICTURES_A_SECOND, crossing, exported, network
from torch import Tensor

from longtake.attention.backends import BACKENDS, choices, distance, one_line
from longtake.attention.rope import Grid, Rotation, rotate
from longtake.memory.far import Keep
from longtake.memory.view import Tokens, View
from longtake.models.block_step import BlockStep
from longtake.models.wan import WanTransformer

GPU = torch.cuda.is_available()
PLACE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
DENSE = "cudnn" if GPU else "flash"
PARTS = ("attention", "self_attention", "layer")
FRAMES = (3, 6, 9, 12, 15, 18, 21, 42, 63, 84, 126, 252, 630, 1260, 2400)
MOST = {  # frames that are measured, where it is not all: of what grows with their square, and of what has no room
    ("1.3B", "attention", "dense"): 630, ("1.3B", "self_attention", "dense"): 252, ("1.3B", "layer", "dense"): 252,
    ("1.3B", "layer", "converted"): 1260,
    ("toy", "attention", "plain"): 252, ("1.3B", "attention", "plain"): 252,
}  # fmt: skip
PASSES = 15  # of one case
COMPARED = 42  # frames, at most, at which the kernels are compared with plain torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["1.3B", "toy"])
    parser.add_argument("--frames", nargs="+", type=int)
    parser.add_argument("--span", nargs=2, type=int, default=(CURRENT, OVERLAP), metavar=("CURRENT", "OVERLAP"))
    parser.add_argument("--enough", type=float, default=1.0, help="seconds after which a case is not timed again")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    shapes, frames = (["tiny"], [6, 12]) if options.tiny else (options.shapes, FRAMES)
    frames = options.frames or frames
    about = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if GPU else "cpu", "type": str(DTYPE)}
    span = tuple(options.span)
    about |= {"dense": DENSE, "current": span[0], "overlap": span[1]}
    found: dict[str, Any] = {"about": about, "cases": []}
    for shape in shapes:
        for part in PARTS:
            for count in frames:
                found["cases"] += measured(shape, part, count, options.enough, span)
                found |= summed_up(found["cases"])
                options.out.write_text(json.dumps(found, indent=1) + "\n")
    chosen = {f"{c.batch} x {c.queries} x {c.keys} x {c.heads}": made.name for c, made in choices().items()}
    found["backends"] = chosen  # of near spans
    found["export"] = {shape: exported(shape) for shape in shapes}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def summed_up(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """How many times faster a converted part is than a dense one, by shape, part and frames; and from when on."""
    gains: dict[str, dict[int, float]] = {}
    crossings: dict[str, int | None] = {}
    timed = [case for case in cases if "ms" in case]
    for name in dict.fromkeys(f"{case['shape']} {case['part']}" for case in timed):
        own = [case for case in timed if f"{case['shape']} {case['part']}" == name]
        ms = {kind: {c["frames"]: c["ms"] for c in own if c["kind"] == kind} for kind in ("dense", "converted")}
        gains[name] = {n: round(ms["dense"][n] / ms["converted"][n], 2) for n in ms["dense"] if n in ms["converted"]}
        crossings[name] = crossing([{**case, "seconds": case["ms"]} for case in own], "converted")
    return {"gains": gains, "crossing": crossings}


@torch.no_grad()
def measured(shape: str, part: str, frames: int, enough: float, span: tuple[int, int]) -> list[dict[str, Any]]:
    """The cases of one length, timed in turn."""
    kinds = ["dense", "converted", *(["plain"] if part == "attention" else []), *(["step"] if part == "layer" else [])]
    kinds = [kind for kind in kinds if frames <= MOST.get((shape, part, kind), frames)]
    told = [
        {"shape": shape, "part": part, "kind": kind, "frames": frames,
         "clip_seconds": round((4 * frames - 3) / PICTURES_A_SECOND, 1)}
        for kind in kinds
    ]  # fmt: skip
    if not told:
        return []
    inputs = Inputs.drawn(shape, part, frames, span, whole=kinds != ["step"])
    passes: dict[int, Callable[[], Tensor]] = {}
    seconds: dict[int, list[float]] = {}
    for i, one in enumerate(told):
        try:
            run = inputs.case(one["kind"])
            _timed(run)  # which also chooses and compiles kernels
            _free()
            before = torch.cuda.memory_allocated() if GPU else 0
            seconds[i] = [_timed(run)]
            one["peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1) if GPU else None
            passes[i] = run
            if one["kind"] == "converted" and part == "attention" and frames <= COMPARED:
                one["off"] = distance(run(), inputs.case("plain")())
        except Exception as error:  # no room, or a shape that a kernel does not take: it raises anything
            one["refused"] = one_line(error)
    for _ in range(PASSES - 1):
        for i, run in passes.items():
            if sum(seconds[i]) < enough:
                seconds[i].append(_timed(run))
    for i, some in seconds.items():
        told[i] |= {"ms": round(1e3 * statistics.median(some), 4), "passes": len(some)}
    for one in told:
        print(json.dumps(one), flush=True)
    del inputs, passes
    _free()
    return told


@dataclass(frozen=True)
class Inputs:
    """What all kinds of one part and length are given."""

    part: str
    frames: int
    dense: WanTransformer
    converted: WanTransformer
    grid: Grid
    own: Tokens | None
    x: Tensor | None
    levels: Tensor | None

    @classmethod
    def drawn(cls, shape: str, part: str, frames: int, span: tuple[int, int], *, whole: bool) -> "Inputs":
        """whole: whether the clip is there at once."""
        (dense, grid), (made, _) = (layer_of(shape, converted, span) for converted in (False, True))
        tokens, config = frames * grid.rows * grid.columns, made.config
        own = x = levels = None
        if part == "attention":
            size = (1, tokens, config.heads, config.dim // config.heads)
            q, k, v = (torch.randn(size, device=PLACE, dtype=DTYPE) for _ in range(3))
            own = Tokens(*(placed(x, grid, frames) for x in (q, k)), q, k, v)
        elif whole:
            x = torch.randn(1, frames, grid.rows * grid.columns, config.dim, device=PLACE, dtype=DTYPE)
            levels = torch.randn(1, frames, 6, config.dim, device=PLACE, dtype=DTYPE)
        return cls(part, frames, dense, made, grid, own, x, levels)

    def case(self, kind: str) -> Callable[[], Tensor]:
        made = self.dense if kind == "dense" else self.converted
        layer, config = made.layers[0], made.config
        prompt = made.prompt_keys(torch.randn(1, 1, 512, config.text_dim, device=PLACE, dtype=DTYPE)).layers[0]
        if kind == "step":
            return self._stepped(prompt)
        view = self._view(kind)
        own, x, levels = self.own, self.x, self.levels
        if own is not None:
            return lambda: view.attend(0, own)
        assert x is not None and levels is not None

        def attended() -> Tensor:
            return view.attend(0, layer.before_attention(x, levels, view.rotation))

        if self.part == "self_attention":
            return lambda: layer.self_attn.o(attended().flatten(2))
        return lambda: layer.after_attention(x, attended(), levels, prompt, None)

    def _view(self, kind: str) -> View:
        if kind == "dense":
            return DenseView(self.grid.rotation(range(self.frames), PLACE))
        sides = (self.grid.rows * self.converted.config.patch, self.grid.columns * self.converted.config.patch)
        latents = torch.empty(1, self.frames, self.converted.config.channels, *sides, device=PLACE)
        plain = WanTransformer.clip_view(self.converted, latents)
        return plain if kind == "plain" else self.converted.clip_view(latents)

    def _stepped(self, prompt: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
        config = self.converted.config
        assert config.conversion is not None
        step = BlockStep(self.converted.layers[0], config.conversion, self.grid, Keep()).to(PLACE)
        chunk = config.conversion.current
        size = (1, chunk, self.grid.rows * self.grid.columns, config.dim)
        x = torch.randn(size, device=PLACE, dtype=DTYPE)
        levels = torch.randn(1, chunk, 6, config.dim, device=PLACE, dtype=DTYPE)

        def chunks() -> Tensor:
            held = step.empty(1)
            for _ in range(-(-self.frames // chunk)):
                answer, *held = step(x, levels, *prompt, *held)
            return answer

        return chunks


@dataclass(frozen=True)
class DenseView:
    """Every token sees every token, by the kernel that is compared with."""

    rotation: Rotation

    def attend(self, layer: int, own: Tokens) -> Tensor:
        return BACKENDS[DENSE].attend(own.q, own.k, own.v)


@cache
def layer_of(shape: str, converted: bool, span: tuple[int, int]) -> tuple[WanTransformer, Grid]:
    """A network of one layer, on a GPU by the fused kernels."""
    made, grid = network(shape, converted=converted, span=span)
    made.to(PLACE, DTYPE)
    if GPU:
        from longtake.models.wan_triton import fuse_clips, fuse_layers

        fuse_layers(made)
        fuse_clips(made)
    return made, grid


def placed(plain_BTND: Tensor, grid: Grid, frames: int) -> Tensor:
    """The same tokens, rotated at their positions; frame by frame, as a long clip in float32 has no room."""
    tokens = grid.rows * grid.columns
    angles = (part.split(tokens) for part in grid.rotation(range(frames), PLACE))
    turned = map(rotate, plain_BTND.split(tokens, dim=1), map(Rotation, *angles))
    return torch.cat(list(turned), dim=1)


def _timed(run: Callable[[], Tensor]) -> float:
    _wait()
    began = perf_counter()
    run()
    _wait()
    return perf_counter() - began


def _wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def _free() -> None:
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
