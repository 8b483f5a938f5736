"""Memory traffic of one layer, counted and not measured: dense, converted, and a block of a stream.

    python benchmarks/rehyat_traffic.py --out traffic.json   # the 1.3B shape, also at 320 x 480, and the embedded one

Tensors have shapes and types and no numbers (torch's fake ones), so any shape and length is counted on any machine in
seconds. Counted as `rehyat_length.py` does: bytes that operators read and write, each operator's inputs and outputs
once. traffic.json holds, of each shape, part, kind and number of latent frames:

part: `attention`, from queries, keys and values to answers; `layer`, the whole layer. kind: `dense`, every token of a
clip sees every token; `clip`, the same layer converted (Tc 3, To 1), in plain torch, chunk after chunk; `dense_kernels`
and `clip_kernels`, the same by the fused kernels of a GPU (`fuse_layers`, `fuse_clips`), each of whose calls reads what
it is given once and writes what it makes once; `step`, one block of a stream through a converted layer
(`models.block_step`), which is the same however much came before; `dense_step`, the block that is the last of so many
frames, where all before it are kept as exact keys. Blocks are of 3 frames, in plain torch.

traffic_mb: attention by softmax reads each key once. tiled_mb: attention and kernels read again what they do not keep:
keys for every 128 queries, a map's weights for every 64 tokens, sums for every 64 queries. scored_mb: of each key once,
and scores are written, read, written as weights and read, as where no kernel fuses attention. Products of projections
read their operands once in all three. least_mb, of blocks: their weights, inputs and outputs, state or keys included: a
program that fuses everything moves no less. of_dense: how many times more the same count has for the dense one.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rehyat_length import CURRENT, OVERLAP, PICTURES_A_SECOND, Traffic, drawn, network
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from longtake.attention import rope
from longtake.attention.dense import dense
from longtake.memory.far import Keep
from longtake.memory.view import Tokens
from longtake.models.block_step import BlockStep

FRAMES = (21, 31, 42, 126)  # 31: of which the paper is said to tell a phone's traffic
PROMPT_TOKENS = 512
PARTS = {
    "attention": ("dense", "clip", "clip_kernels"),
    "layer": ("dense", "clip", "dense_kernels", "clip_kernels", "dense_step", "step"),
}
BESIDE = {"clip": "dense", "clip_kernels": "dense_kernels", "step": "dense_step"}
COUNTS = ("traffic_mb", "tiled_mb", "scored_mb", "least_mb")
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["1.3B", "1.3B-small", "toy"])
    parser.add_argument("--frames", nargs="+", type=int, default=FRAMES)
    parser.add_argument("--type", default="bfloat16", choices=list(TYPES))
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    options = parser.parse_args()
    about = {"torch": torch.__version__, "type": options.type, "prompt_tokens": options.prompt_tokens}
    cases = [
        counted(shape, part, kind, frames, TYPES[options.type], options.prompt_tokens)
        for shape in options.shapes for part, kinds in PARTS.items() for frames in options.frames for kind in kinds
    ]  # fmt: skip
    beside_dense(cases)
    for case in cases:
        print(json.dumps(case))
    found = {"about": about | {"current": CURRENT, "overlap": OVERLAP}, "cases": cases}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def beside_dense(cases: list[dict[str, Any]]) -> None:
    """Add to converted cases what dense ones of the same part and length move, as times of what they do."""
    place = {(one["shape"], one["part"], one["frames"], one["kind"]): one for one in cases}
    for one in cases:
        # what attention's operands are does not depend on who makes them
        kind = "dense" if one["part"] == "attention" else BESIDE.get(one["kind"])
        other = place.get((one["shape"], one["part"], one["frames"], kind))
        if other is not None and other is not one:
            one["of_dense"] = {name: round(other[name] / one[name], 2) for name in COUNTS if name in one}


@torch.no_grad()
def counted(
    shape: str, part: str, kind: str, frames: int, dtype: torch.dtype = torch.bfloat16,
    prompt_tokens: int = PROMPT_TOKENS,
) -> dict[str, Any]:  # fmt: skip
    with without_numbers():
        run, carried = case(shape, part, kind, frames, dtype, prompt_tokens)
        for _ in range(2):  # rotations are there the second time
            with Moved() as moved, kernels_counted(moved):
                run()
    told = {
        "shape": shape, "part": part, "kind": kind, "frames": frames,
        "clip_seconds": round((4 * frames - 3) / PICTURES_A_SECOND, 1), "traffic_mb": moved.bytes,
        "tiled_mb": moved.bytes + moved.again, "scored_mb": moved.bytes + moved.scores,
    }  # fmt: skip
    told |= {"least_mb": carried} if carried else {}
    return {name: round(x / 1e6, 1) if name in COUNTS else x for name, x in told.items()}


@contextmanager
def without_numbers() -> Iterator[None]:
    """Tensors have none, no kernel is tried, and rotations are remembered for as long only as this lasts."""
    forgotten = rope._Latest(rope._rotation, most_bytes=2**40)
    torchs_own = patch("longtake.attention.dense._may_choose", return_value=False)
    with patch.object(rope, "_latest", forgotten), torchs_own, FakeTensorMode():
        yield


def case(
    shape: str, part: str, kind: str, frames: int, dtype: torch.dtype, prompt_tokens: int
) -> tuple[Callable[[], object], int]:
    """One pass, and the bytes of weights, inputs and outputs of a block."""
    made, grid = network(shape, converted="dense" not in kind)
    for module in made.modules():  # `to` cannot, of tensors without numbers
        for name, x in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(x.to(dtype), requires_grad=False))
    layer, config, tokens = made.layers[0], made.config, grid.rows * grid.columns
    prompt = made.prompt_keys(torch.empty(1, 1, prompt_tokens, config.text_dim, dtype=dtype)).layers[0]
    if kind.endswith("step"):
        x, levels = (x.to(dtype) for x in drawn(CURRENT, grid, config.dim))
        around = [*layer.parameters(), x, x, levels, *prompt]
        if kind == "step":
            assert config.conversion is not None
            step = BlockStep(layer, config.conversion, grid, Keep())
            state = step.empty(1)
            return lambda: step(x, levels, *prompt, *state), _nbytes(around, state, state)
        kept = torch.empty(1, frames * tokens, config.heads, config.dim // config.heads, dtype=dtype)
        values = torch.empty_like(kept)

        def last() -> Tensor:
            own = layer.before_attention(x, levels, grid.rotation(range(frames - CURRENT, frames), "cpu"))
            kept[:, -CURRENT * tokens :], values[:, -CURRENT * tokens :] = own.k, own.v
            return layer.after_attention(x, dense(own.q, kept, values), levels, prompt, None)

        return last, _nbytes(around, kept, values)
    if kind.endswith("kernels"):
        from longtake.models.wan_triton import fuse_clips, fuse_layers

        fuse_layers(made)
        fuse_clips(made)
    sides = (grid.rows * config.patch, grid.columns * config.patch)
    view = made.clip_view(torch.empty(1, frames, config.channels, *sides))
    if part == "attention":
        plain = [torch.empty(1, frames * tokens, config.heads, config.dim // config.heads, dtype=dtype)] * 3
        own = Tokens(*(rope.rotate(x, view.rotation) for x in plain[:2]), *plain)
        return lambda: view.attend(0, own), 0
    x, levels = (x.to(dtype) for x in drawn(frames, grid, config.dim))

    def whole() -> Tensor:
        own = layer.before_attention(x, levels, view.rotation)
        return layer.after_attention(x, view.attend(0, own), levels, prompt, None)

    return whole, 0


class Moved(Traffic):
    """scores: what attention moves beyond its operands if it writes its scores, and then its weights."""

    scores = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # questions about a tensor that is none
            return func(*args, **(kwargs or {}))
        if "scaled_dot_product" in func.__name__:
            q, k = args[:2]
            self.scores += 4 * q[..., 0].numel() * k.shape[2] * q.element_size()
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def kernels_counted(moved: Moved) -> Iterator[None]:
    """While it lasts a kernel makes nothing but tensors of the right shapes, and its reads and writes are counted."""
    try:
        from longtake.attention import fused_triton, span_triton
        from longtake.models import wan_triton
    except ImportError:  # no triton: kinds without kernels need none
        yield
        return

    def told(made: Any, *read: Any, again: int = 0) -> Any:
        moved.bytes += _nbytes(read, made)
        moved.again += again
        return made

    def like(x: Tensor) -> Tensor:
        with torch.utils._python_dispatch._disable_current_modes(), x.fake_mode:  # type: ignore[attr-defined]
            return torch.empty_like(x)

    def norm_rotate_(x: Tensor, weight: Tensor, heads: int, rotation: Any) -> tuple[Tensor, Tensor]:
        plain = x.unflatten(-1, (heads, -1))
        return told((like(plain), plain), x, weight, rotation)

    def features(plain: Tensor, turned: Any, weights: Any) -> Tensor:
        width, tiles = weights.out_bias_NR.shape[-1], -(-plain.shape[1] // span_triton._TILE)
        own = span_triton._product_type(plain.dtype)
        programs = -(-width // span_triton._block(width, span_triton._BLOCKS[own].made))
        again = (tiles * programs - 1) * _nbytes(weights[:2]) + (tiles - 1) * _nbytes(weights[2:])
        again += (programs - 1) * plain.nbytes
        return told(plain.new_empty(*plain.shape[:3], width, dtype=own), plain, turned, weights, again=again)

    def frame_sums(made: Tensor, v: Tensor, tokens: int) -> Any:
        (batch, length, heads, size), width = v.shape, made.shape[-1]
        programs = -(-width // span_triton._block(width, span_triton._BLOCKS[made.dtype].summed))
        kv = v.new_empty(batch, length // tokens, heads, width, size, dtype=torch.float32)
        sums = span_triton.FarSums(kv, kv[..., 0].clone())
        return told(sums, made, v, again=(programs - 1) * v.nbytes)

    def join_(near: Tensor, made: Tensor, sums: Any, chunk: int) -> None:
        held = (sums.kv_BXNRD.to(made.dtype).contiguous(), sums.k_BXNR)
        told(near, near, made, held, again=(-(-chunk // span_triton._TILE) - 1) * _nbytes(held))

    def feed_forward(ffn: Any, x: Tensor) -> Tensor:
        hidden = torch._addmm_activation(ffn[0].bias, x.flatten(0, 2), ffn[0].weight.t(), use_gelu=True)
        return ffn[2](hidden).view_as(x)

    ours: dict[Any, dict[str, Any]] = {
        fused_triton: {
            "norm_rotate_": norm_rotate_,
            "norm_": lambda x, weight: told(x, x, weight),
            "modulate": lambda x, *others: told(like(x), x, others),
            "add_gated_norm": lambda x, *others: told((like(x), like(x)), x, others),
            "add_modulate": lambda x, *others: told((like(x), like(x)), x, others),
            "add_gated": lambda x, *others: told(like(x), x, others),
        },
        span_triton: {"features": features, "frame_sums": frame_sums, "join_": join_},
        wan_triton: {"_feed_forward": feed_forward},
    }
    patches = [patch.multiple(module, **some) for module, some in ours.items()]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def _nbytes(*tensors: Any) -> int:
    return sum(x.nbytes for x in tree_leaves(tensors) if isinstance(x, Tensor))


if __name__ == "__main__":
    main()
