"""Which blocks suit block-sparse attention of the embedded model, and which way to read them is fast on a CPU?

    python benchmarks/sparse_blocks.py --out sparse_blocks             # minutes on one CPU core
    python benchmarks/sparse_blocks.py --out sparse_blocks --tiny      # the same lines, in a minute

The shipped student, which was trained with dense attention and never with sparse, streams held-out captions.

choices.json: on the queries and keys of its dense streams, the output of sparse attention beside that of dense
attention (L2 of the difference beside L2 of the dense one) and the share of dense attention's weight that lies on the
chosen blocks, beside that of the best choice of as many (by weight, per query block and head). Means over all layers,
passes and streams, by how many keys the window has, and for the whole window by layer.
streams.json: streams that attend sparsely, far=none: network seconds of a block, the least of all with a full window;
L2 of the difference of each block's latents from the dense stream of the same noise, beside L2 of the latter, which
says how far apart they are, not which is better.
ways.json: milliseconds of one call by ways to compute the same sparse result: a copy of the chosen blocks; attention to
all keys under a mask; and, as a mark, dense attention to all keys.
The least of many calls.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake import recipes
from longtake.attention import reference
from longtake.attention.block_sparse import attend_gathered, attend_masked, best_blocks, block_scores, block_sparse
from longtake.attention.dense import dense
from longtake.evaluation.growth import latents_of
from longtake.evaluation.sources import clip_seed, held_out_captions
from longtake.generation.stream import Engine
from longtake.memory.stream_memory import StreamMemory
from longtake.memory.view import Attend

STUDENT = "self_forcing_sink"  # which is hybrid_forcing:share=1,far=none
SHARE = 0.2
SIZES = [(28, 28), (12, 12), (12, 6), (12, 4), (6, 12), (6, 6), (6, 4), (4, 4), (12, 28)]  # of query and key blocks
WINDOWS = (252, 504, 756)  # keys of the first, the second and every later block
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=["ways", "choices", "streams"])
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    few = options.tiny
    about = {"torch": torch.__version__, "threads": 1, "capability": torch.backends.cpu.get_cpu_capability()}
    tables: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "ways": lambda: ways(repeats=3 if few else 40),
        "choices": lambda: choices(streams=1 if few else 4, blocks=3 if few else 8),
        "streams": lambda: streams(blocks=4 if few else 24),
    }
    for name in options.parts:
        (options.out / f"{name}.json").write_text(json.dumps(about | {"rows": tables[name]()}, indent=1) + "\n")
        print(f"{name}.json is written", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# What is chosen
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def choices(streams: int, blocks: int) -> list[dict[str, Any]]:
    found: dict[tuple[int, int, int], dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    attended: list[tuple[Tensor, Tensor, Tensor]] = []

    def noting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended.append((q, k, v))
        return dense(q, k, v)

    engine = student(noting)
    layers = engine.network.config.layers
    for _ in islice(latents(engine, streams), blocks):
        for number, (q, k, v) in enumerate(attended):
            weights = weights_of(q, k)
            exact = torch.einsum("bnts,bsnd->btnd", weights, v)
            for block_q, block_k in SIZES:
                row = judged(q, k, v, weights, exact, block_q, block_k)
                found[block_q, block_k, k.shape[1]][number % layers].append(row)
        attended.clear()
    return [row_of(*key, by_layer) for key, by_layer in sorted(found.items())]


def weights_of(q: Tensor, k: Tensor) -> Tensor:
    return (torch.einsum("btnd,bsnd->bnts", q, k) * q.shape[-1] ** -0.5).softmax(-1)


def judged(
    q: Tensor, k: Tensor, v: Tensor, weights_BNTS: Tensor, exact: Tensor, block_q: int, block_k: int
) -> Tensor:  # fmt: skip
    """Error, weight kept, weight that the best choice would keep."""
    chosen = best_blocks(block_scores(q, k, block_q=block_q, block_k=block_k), SHARE)
    read = reference.attend_blocks(q, k, v, chosen, block_q=block_q, block_k=block_k)
    of_queries = torch.stack([part.sum(2) for part in weights_BNTS.split(block_q, 2)], 2)
    of_blocks = torch.stack([part.sum(3) for part in of_queries.split(block_k, 3)], 3)
    kept, best = of_blocks.gather(-1, chosen).sum(), of_blocks.topk(chosen.shape[-1], -1).values.sum()
    return torch.stack([(read - exact).norm() / exact.norm(), kept / of_blocks.sum(), best / of_blocks.sum()])


def row_of(block_q: int, block_k: int, keys: int, by_layer: dict[int, list[Tensor]]) -> dict[str, Any]:
    of_layers = torch.stack([torch.stack(rows).mean(0) for _, rows in sorted(by_layer.items())])
    error, kept, best = (round(value, 4) for value in of_layers.mean(0).tolist())
    return {
        "block_q": block_q,
        "block_k": block_k,
        "keys": keys,
        "keys_kept": block_k * reference.kept_blocks(SHARE, -(-keys // block_k)),
        "error": error,
        "weight_kept": kept,
        "weight_of_best_choice": best,
        "error_by_layer": [round(value, 4) for value in of_layers[:, 0].tolist()] if keys == WINDOWS[-1] else None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def streams(blocks: int) -> list[dict[str, Any]]:
    """All streams in step, block by block, so that what else the machine does hits all alike."""
    rows = []
    nears = {sizes: partial(block_sparse, share=SHARE, block_q=sizes[0], block_k=sizes[1]) for sizes in SIZES}
    for name, dtype in DTYPES.items():
        running = {of: latents(student(near, dtype), 1) for of, near in {None: dense, **nears}.items()}
        seconds: dict[Any, list[float]] = defaultdict(list)
        apart: dict[Any, list[float]] = defaultdict(list)
        for _ in range(blocks):
            made = {}
            for of, stream in running.items():
                began = time.perf_counter()
                made[of] = next(stream).float()
                seconds[of].append(time.perf_counter() - began)
            for of, block in made.items():
                apart[of].append(round(((block - made[None]).norm() / made[None].norm()).item(), 4))
        rows += [
            {
                "dtype": name,
                "block_q": of[0] if of else None,  # none: dense attention
                "block_k": of[1] if of else None,
                "seconds": round(min(seconds[of][len(WINDOWS) - 1 :]), 4),
                "from_dense": apart[of][:4],
            }
            for of in running
        ]
    return rows


def student(near: Attend, dtype: torch.dtype = torch.float32) -> Engine:
    engine = recipes.load("toy", recipe=STUDENT, device="cpu", dtype=dtype)
    return replace(engine, recipe=replace(engine.recipe, near=near))


def latents(engine: Engine, count: int) -> Iterator[Tensor]:
    memory = StreamMemory(engine.recipe.memory(engine.network), engine.network.config.layers, ring=True)
    seeds = [clip_seed(0, number) for number in range(count)]
    return latents_of(engine, memory, engine.prompt_keys(*held_out_captions(count)), seeds)


# ---------------------------------------------------------------------------------------------------------------------
# Ways to compute the same
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ways(repeats: int) -> list[dict[str, Any]]:
    """At the embedded model's sizes: 252 queries, 4 heads of 64."""
    rows = []
    settings = [*product(SIZES, (SHARE,)), *product([(12, 12), (28, 28)], (0.5, 0.8))]
    for (dtype_name, dtype), clips, keys in product(DTYPES.items(), (1, 8), WINDOWS):
        q, k, v = (torch.randn(clips, tokens, 4, 64).to(dtype) for tokens in (WINDOWS[0], keys, keys))
        everything = milliseconds(lambda q=q, k=k, v=v: dense(q, k, v), repeats)
        for (block_q, block_k), share in settings:
            sizes = {"block_q": block_q, "block_k": block_k}

            def choose(q: Tensor = q, k: Tensor = k, share: float = share, sizes: dict[str, int] = sizes) -> Tensor:
                return best_blocks(block_scores(q, k, **sizes), share)

            given = (q, k, v, choose())
            gathered, masked = partial(attend_gathered, *given, **sizes), partial(attend_masked, *given, **sizes)
            torch.testing.assert_close(gathered(), masked(), atol=2e-2, rtol=2e-2)
            rows.append(
                {
                    "dtype": dtype_name,
                    "clips": clips,
                    "keys": keys,
                    **sizes,
                    "share": share,
                    "choice_ms": milliseconds(choose, repeats),
                    "gathered_ms": milliseconds(gathered, repeats),
                    "masked_ms": milliseconds(masked, repeats),
                    "dense_ms": everything,
                }
            )
    return rows


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """The least of so many calls: what else a machine does only ever adds."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return round(1000 * min(times), 4)


if __name__ == "__main__":
    main()
