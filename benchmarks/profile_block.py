"""What one steady block of a stream is made of: kernels by their time, and operations of plain torch by shape.

python benchmarks/profile_block.py [--model NAME] [--recipe R] [--decoder wan|light|none] [--device NAME] [--eager]
    [--at-once N] [--try-convolutions] [--rows N]

Random weights of a published size by default, compiled; `--model toy` is the embedded model, with a decoder of its own.
--at-once: latent frames that go through the decoder at once. --try-convolutions: let cuDNN time its kernels at first
sight of a shape, and take the fastest. First comes what the block before took without the profiler, under which the
host is slower: where that is more than the sum of the kernels, the device waited. Kernels of recorded passes belong to
no operation; those of all others are told twice, under each heading once.
"""

import argparse
from collections.abc import Iterable
from time import perf_counter

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from longtake.generation.stream import Engine
from longtake.recipes import load
from longtake.recipes.wan_engines import load_random


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--model", default="wan2.1-1.3b")
    asked.add_argument("--recipe", default="hybrid_forcing:tokens=64")
    asked.add_argument("--decoder", default="wan")
    asked.add_argument("--device")
    asked.add_argument("--eager", action="store_true")
    asked.add_argument("--at-once", type=int)
    asked.add_argument("--try-convolutions", action="store_true")
    asked.add_argument("--rows", type=int, default=60)
    options = asked.parse_args()
    torch.backends.cudnn.benchmark = options.try_convolutions
    chosen = {"recipe": options.recipe, "device": options.device, "compile": not options.eager}
    if options.model == "toy":
        engine = load("toy", **chosen)
    else:
        engine = load_random(options.model, decoder=options.decoder, **chosen)
    if options.at_once:
        engine.codec.span = options.at_once
    print("\n".join(table(engine, options.rows)))


def table(engine: Engine, rows: int) -> list[str]:
    """Lines to print."""
    on_gpu = engine.device.type == "cuda"
    with engine.stream("a red ball", seed=1) as stream:
        for _ in range(engine.blocks_until_full + 3):
            before = perf_counter()
            next(stream)
        alone = 1000 * (perf_counter() - before)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        with profile(activities=activities, record_shapes=True) as seen:
            next(stream)
    column = "self_device_time_total" if on_gpu else "self_cpu_time_total"

    def lines(events: Iterable[FunctionEventAvg], shapes: bool) -> list[str]:
        spent = sorted(((getattr(event, column) / 1000, event) for event in events), key=lambda one: -one[0])
        return [
            f"{ms:9.3f} ms {event.count:6d}  {event.key[:110]} {event.input_shapes if shapes else ''}".rstrip()
            for ms, event in spent[:rows]
            if ms > 0
        ]

    kernels = [event for event in seen.key_averages() if not on_gpu or event.device_type.name == "CUDA"]
    by_shape = [event for event in seen.key_averages(group_by_input_shape=True) if event.device_type.name == "CPU"]
    total = sum(getattr(event, column) for event in kernels) / 1000
    return [
        f"{engine.model_name}, {engine.recipe.name}, {engine.width}x{engine.height}, {engine.circumstances['passes']}",
        f"a block: {alone:.1f} ms before the profiler; {total:.1f} ms in the sum of what follows",
        "",
        *lines(kernels, shapes=False),
        "",
        "Operations by the shapes that they were given:",
        *lines(by_shape, shapes=True),
    ]


if __name__ == "__main__":
    main()
