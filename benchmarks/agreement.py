"""Do a stream's fused and recorded passes make what plain ones make? Both on this GPU, of the embedded model.

python benchmarks/agreement.py [--recipe NAME ...] [--streams 8] [--blocks 20] [--device cuda]   # prints JSON

Finished latents, block by block, of all streams together: the distance of fused bfloat16 from plain bfloat16 and of
plain bfloat16 from float32, each as a share of the latter's size. Streams go on from what they made, so both grow with
the blocks, and what rounding does to a single stream is luck: so many there are. Exits 1 where the first is ever more
than twice the largest that the second has been by then.
"""

import argparse
import json
import sys
from itertools import accumulate

import torch
from torch import Tensor

import longtake
from longtake.evaluation.steady import machine

TIMES = 2


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--recipe", nargs="+", default=["self_forcing_sink", "hybrid_forcing", "rolling_forcing"])
    asked.add_argument("--streams", type=int, default=8)
    asked.add_argument("--blocks", type=int, default=20)
    asked.add_argument("--device", default="cuda")
    options = asked.parse_args()
    rows, agree = [], True
    for recipe in options.recipe:
        exact, plain, fused = (
            latents(recipe, options, dtype, compile)
            for dtype, compile in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
        )
        far = {"fused_to_plain": distances(fused, plain, exact), "plain_to_float32": distances(plain, exact, exact)}
        allowed = accumulate(far["plain_to_float32"], max)
        agree &= all(one <= TIMES * most for one, most in zip(far["fused_to_plain"], allowed, strict=True))
        rows.append({"recipe": recipe, **far})
    found = {"agree": agree, "streams": options.streams, "rows": rows, **machine(torch.device(options.device))}
    print(json.dumps(found, indent=1))
    return 0 if agree else 1


def latents(recipe: str, options: argparse.Namespace, dtype: torch.dtype, compile: bool) -> list[Tensor]:
    """Of each block, as the codec is given them, those of all streams one after the other."""
    engine = longtake.load("toy", recipe=recipe, device=options.device, dtype=dtype, compile=compile)
    made: list[Tensor] = []
    decode = engine.codec.decode

    def noted(latents_BFCHW: Tensor, *more: object) -> object:
        made.append(latents_BFCHW.float())
        return decode(latents_BFCHW, *more)

    engine.codec.decode = noted  # type: ignore[assignment,method-assign]
    for seed in range(options.streams):
        with engine.stream("a red ball bounces over green hills", seed=seed) as stream:
            for _ in range(options.blocks):
                next(stream)
    return [torch.cat(made[block :: options.blocks]) for block in range(options.blocks)]


def distances(some: list[Tensor], others: list[Tensor], sizes: list[Tensor]) -> list[float]:
    return [float((x - y).norm() / size.norm()) for x, y, size in zip(some, others, sizes, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
