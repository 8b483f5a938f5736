"""Time, peak memory and memory traffic of one layer against the length of a clip: dense, converted, chunk by chunk.

    python benchmarks/rehyat_length.py --out rehyat_length               # the embedded model's shape, on one CPU core
    python benchmarks/rehyat_length.py --out rehyat_length --tiny        # the same lines, in seconds

One transformer layer with random weights on random tokens, its feed-forward part and cross-attention included, without
gradients; every case in a process of its own, on Linux. rehyat_length.json holds, of each kind and number of frames:

kind: `dense`, every token sees every token; `clip`, the same layer converted (Tc 3, To 1) on a whole clip, as the
published sampler goes through it; `step`, the exported program (`models.block_step`), chunk after chunk, which holds
one chunk and its state. seconds: the fastest of some passes through the layer. peak_mb: how far the process's largest
resident size rose above what it was with the layer loaded and its input made (of `step`, whose input is made chunk by
chunk, input included). traffic_mb: bytes that torch's operators read and write in one pass, each operator's inputs and
outputs counted once, views and checks not: what a machine moves that fuses nothing but attention, and whose attention
reads every key once. tiled_mb: the same where attention reads its keys again for every 128 queries, as fused kernels
do. export: size of the program's file and of its state. crossing: the fewest of the measured frames from which on the
other is faster than dense.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtake.attention.rope import Grid
from longtake.memory.far import Keep
from longtake.models.block_step import BlockStep
from longtake.models.features import Conversion
from longtake.models.wan import WanConfig, WanTransformer

SHAPES = {
    "toy": ({"dim": 256, "heads": 4, "ffn_dim": 1024, "text_dim": 192}, (7, 12)),
    "tiny": ({"dim": 32, "heads": 2, "ffn_dim": 64, "text_dim": 16}, (2, 3)),
    "1.3B": ({"dim": 1536, "heads": 12, "ffn_dim": 8960, "text_dim": 4096}, (30, 52)),
    "1.3B-small": ({"dim": 1536, "heads": 12, "ffn_dim": 8960, "text_dim": 4096}, (20, 30)),  # 320 x 480
}
FRAMES = {
    "dense": (21, 42, 63, 84, 126, 252),
    "clip": (21, 42, 63, 84, 126, 252),
    "step": (21, 42, 63, 84, 126, 252, 2400),
}
KINDS = ("dense", "clip", "step")
CURRENT, OVERLAP = 3, 1
PICTURES_A_SECOND = 16
QUERIES_AT_ONCE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="toy", choices=list(SHAPES))
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", nargs=2, metavar=("KIND", "FRAMES"), help="one case alone, to stdout")
    options = parser.parse_args()
    shape = "tiny" if options.tiny else options.shape
    torch.set_num_threads(1)
    if options.case:
        print(json.dumps(measured(options.case[0], int(options.case[1]), shape, options.passes)))
        return
    lengths = dict.fromkeys(KINDS, (6, 12)) if options.tiny else FRAMES
    about = {"torch": torch.__version__, "threads": 1, "shape": shape, "current": CURRENT, "overlap": OVERLAP}
    found: dict[str, Any] = {"about": about, "export": exported(shape), "cases": []}
    options.out.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        for frames in lengths[kind]:
            again = [sys.executable, __file__, "--out", str(options.out), "--shape", options.shape]
            again += ["--passes", str(options.passes), *(["--tiny"] if options.tiny else [])]
            done = subprocess.run([*again, "--case", kind, str(frames)], check=True, capture_output=True, text=True)
            found["cases"].append(json.loads(done.stdout))
            print(done.stdout.strip(), flush=True)
            found["crossing"] = {other: crossing(found["cases"], other) for other in ("clip", "step")}
            (options.out / "rehyat_length.json").write_text(json.dumps(found, indent=1) + "\n")


def crossing(cases: list[dict[str, Any]], other: str) -> int | None:
    """The fewest latent frames of those measured from which on the other is faster than dense."""
    seconds = {
        kind: {one["frames"]: one["seconds"] for one in cases if one["kind"] == kind} for kind in ("dense", other)
    }
    both = sorted(seconds["dense"].keys() & seconds[other].keys())
    slower = [frames for frames in both if seconds[other][frames] >= seconds["dense"][frames]]
    faster = [frames for frames in both if not slower or frames > slower[-1]]
    return faster[0] if faster else None


@torch.no_grad()
def measured(kind: str, frames: int, shape: str, passes: int) -> dict[str, Any]:
    run = case(kind, frames, shape)
    before = _resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the largest size so far is the present one
    seconds = []
    for _ in range(passes):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    peak = _resident_mb("VmHWM") - before
    with Traffic() as traffic:
        run()
    return {
        "kind": kind, "frames": frames, "clip_seconds": round((4 * frames - 3) / PICTURES_A_SECOND, 1),
        "seconds": round(min(seconds), 4), "peak_mb": round(peak, 1), "traffic_mb": round(traffic.bytes / 1e6, 1),
        "tiled_mb": round((traffic.bytes + traffic.again) / 1e6, 1),
    }  # fmt: skip


def case(kind: str, frames: int, shape: str) -> Callable[[], object]:
    """One pass through the layer."""
    made, grid = network(shape, converted=kind != "dense")
    layer, size = made.layers[0], made.config.dim
    prompt = made.prompt_keys(torch.randn(1, 1, 16, made.config.text_dim)).layers[0]
    if kind == "step":
        step, state = chunk_step(made, grid)

        def chunks() -> Tensor:
            held = state
            for _ in range(frames // CURRENT):
                x, levels = drawn(CURRENT, grid, size)
                answer, *held = step(x, levels, *prompt, *held)
            return answer

        return chunks
    x, levels = drawn(frames, grid, size)
    patch, channels = made.config.patch, made.config.channels
    view = made.clip_view(torch.empty(1, frames, channels, grid.rows * patch, grid.columns * patch))

    def whole() -> Tensor:
        own = layer.before_attention(x, levels, view.rotation)
        return layer.after_attention(x, view.attend(0, own), levels, prompt, None)

    return whole


def network(shape: str, *, converted: bool, span: tuple[int, int] = (CURRENT, OVERLAP)) -> tuple[WanTransformer, Grid]:
    torch.manual_seed(0)
    sizes, (rows, columns) = SHAPES[shape]
    conversion = Conversion(layers=(0,), current=span[0], overlap=span[1]) if converted else None
    made = WanTransformer(WanConfig(layers=1, conversion=conversion, **sizes))
    return made.requires_grad_(False), Grid(made.config.axes, rows, columns)


def chunk_step(made: WanTransformer, grid: Grid) -> tuple[Callable[..., Any], Any]:
    assert made.config.conversion is not None
    step = BlockStep(made.layers[0], made.config.conversion, grid, Keep())
    state = step.empty(1)
    prompt = made.prompt_keys(torch.randn(1, 1, 16, made.config.text_dim)).layers[0]
    x, levels = drawn(CURRENT, grid, made.config.dim)
    return torch.export.export(step, (x, levels, *prompt, *state)).module(), state


def drawn(frames: int, grid: Grid, size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(1, frames, grid.rows * grid.columns, size), torch.randn(1, frames, 6, size)


@torch.no_grad()
def exported(shape: str) -> dict[str, float]:
    """The program's file, its weights included, and what it carries from chunk to chunk, in MB."""
    made, grid = network(shape, converted=True)
    step, state = chunk_step(made, grid)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.pt2"
        x, levels = drawn(CURRENT, grid, made.config.dim)
        prompt = made.prompt_keys(torch.randn(1, 1, 16, made.config.text_dim)).layers[0]
        torch.export.save(torch.export.export(step, (x, levels, *prompt, *state)), path)
        file_mb = path.stat().st_size / 1e6
    return {"file_mb": round(file_mb, 2), "state_mb": round(sum(part.nbytes for part in state) / 1e6, 2)}


class Traffic(TorchDispatchMode):
    """Counts the bytes of every operator's tensors, in and out. Views move nothing, nor does what returns nothing, by
    which an exported program checks types.

    again: what attention reads of its keys and values beyond the first time.
    """

    bytes = again = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        views = any(out.alias_info and not out.alias_info.is_write for out in func._schema.returns)
        if func._schema.returns and not views:
            moved = tree_leaves((args, kwargs, made))
            self.bytes += sum(x.nbytes for x in moved if isinstance(x, Tensor))
        if "scaled_dot_product" in func.__name__:
            q, k, v = args[:3]
            self.again += (-(-q.shape[2] // QUERIES_AT_ONCE) - 1) * (k.nbytes + v.nbytes)
        return made


def _resident_mb(name: str) -> float:
    """The resident size of this process, or the largest it was, by its name in Linux's status of a process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


if __name__ == "__main__":
    main()
