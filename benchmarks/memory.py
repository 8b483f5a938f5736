"""What `longtake plan` predicts, beside what a stream of random weights takes on this GPU.

python benchmarks/memory.py wan2.1-1.3b hybrid_forcing:tokens=64 [--decoder wan] [--size WxH] [--compile]

Prints JSON: by moment, in MiB, tensors alive at the peak, as predicted; as torch's allocator counted them, with what
recorded passes keep for themselves; and what the allocator had taken of the device by then, gaps and scratch memory
included. Random numbers stand in for text, so the text encoder is left out on both sides. Exits 1 where a prediction
is further than a tenth from the count.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from longtake.evaluation.steady import machine
from longtake.generation.stream import Engine
from longtake.plan import pixels, plan
from longtake.recipes import load_random

MIB = 2**20
WITHIN = 0.1
OTHER_BLOCKS = 3  # once the memory is full


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("model")
    asked.add_argument("recipe")
    asked.add_argument("--size", type=pixels, default=(832, 480))
    asked.add_argument("--decoder", default="wan")
    asked.add_argument("--compile", action="store_true")
    asked.add_argument("--device", default="cuda")
    options = asked.parse_args()
    told = plan(
        options.model, recipe=options.recipe, size=options.size, decoder=options.decoder, compile=options.compile
    )
    predicted = dict(told["totals"])
    del predicted["first prompt"]
    predicted["new prompt read"] -= told["moments"]["new prompt read"]["text encoder"]
    predicted["new prompt"] = max(predicted.pop("new prompt read"), predicted.pop("new prompt taken"))
    engine = load_random(
        options.model, recipe=options.recipe, size=options.size[::-1], decoder=options.decoder, device=options.device,
        dtype=torch.bfloat16, levels=None if "rolling" in options.recipe else 2, compile=options.compile,
    )  # fmt: skip
    counted, taken = measured(engine)
    rows = {
        name: {
            "predicted_mib": predicted[name] / MIB, "counted_mib": counted[name] / MIB, "taken_mib": taken[name] / MIB,
            "share": predicted[name] / counted[name] if counted[name] else None,
        }
        for name in predicted
    }  # fmt: skip
    most = max(predicted.values()) / max(max(counted[name] for name in predicted), 1)
    result = {name: told[name] for name in ("model", "recipe", "size", "decoder", "compile")}
    result |= {"passes": engine.circumstances["passes"], "moments": rows, "peak_share": most}
    print(json.dumps(result | machine(engine.device), indent=1))
    return 0 if abs(most - 1) <= WITHIN else 1


def measured(engine: Engine) -> tuple[dict[str, int], dict[str, int]]:
    """The most bytes of tensors by moment, and of what the allocator holds."""
    counted: dict[str, int] = {}
    taken: dict[str, int] = {}

    def note(moment: str) -> None:
        """What was most since the last note."""
        found = (0, 0)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
            recorded = recorded_idle()
            found = torch.cuda.max_memory_allocated() + recorded, torch.cuda.max_memory_reserved()
            torch.cuda.reset_peak_memory_stats()
        counted[moment] = max(counted.get(moment, 0), found[0])
        taken[moment] = max(taken.get(moment, 0), found[1])

    with engine.stream("a red ball") as stream:
        for _ in islice(stream, engine.blocks_until_full + 1):
            pass  # while passes are recorded, what they work in is counted twice
        note("filling")
        with noted_before_decoding(engine, lambda: note("network pass")):
            for _ in islice(stream, OTHER_BLOCKS):
                note("decoding")
        stream.redirect("a blue ball")
        note("new prompt")
    return counted, taken


def recorded_idle() -> int:
    """Bytes that recorded passes hold and no tensor has: their working memory."""
    segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()
    own = [one for one in segments if tuple(one["segment_pool_id"]) != (0, 0)]
    return sum(one["total_size"] - one["allocated_size"] for one in own)


@contextmanager
def noted_before_decoding(engine: Engine, note: Any) -> Iterator[None]:
    decode = engine.codec.decode

    def decoded(*arguments: Any) -> Any:
        note()
        return decode(*arguments)

    engine.codec.decode = decoded  # type: ignore[method-assign]
    yield
    del engine.codec.decode


if __name__ == "__main__":
    sys.exit(main())
