"""Blocks of several streams in one pass, against the same blocks one after the other.

python benchmarks/together.py [--recipe NAME] [--device NAME] [--threads N] [--rounds N]   # prints JSON

Streams of the embedded model with full windows; both ways by turns, so that what else a machine does weighs on both.
"""

import argparse
import json
import statistics
import time

import torch

import longtake

PROMPTS = (
    "a red ball bounces over green hills",
    "a blue cat walks left in the city",
    "a clear night",
    "a red star spins in the snow",
)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--recipe", default="self_forcing_sink")
    asked.add_argument("--device", default="cpu")
    asked.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked.add_argument("--rounds", type=int, default=7)
    options = asked.parse_args()
    torch.set_num_threads(options.threads)
    engine = longtake.load("toy", recipe=options.recipe, device=options.device)
    rows = [measured(engine, count, options.rounds) for count in (2, 3, 4)]
    print(json.dumps(vars(options) | engine.circumstances | {"rows": rows}, indent=1))


def measured(engine: longtake.Engine, count: int, rounds: int) -> dict[str, float]:
    streams = [engine.stream(prompt, seed=seed) for seed, prompt in enumerate(PROMPTS[:count])]
    for stream in streams:
        for _ in range(8):
            next(stream)
    engine.next_together(streams)  # the first pays for the start
    alone, together = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        for stream in streams:
            next(stream)
        between = time.perf_counter()
        engine.next_together(streams)
        alone.append(between - began)
        together.append(time.perf_counter() - between)
    one, other = statistics.median(alone), statistics.median(together)
    return {"streams": count, "in_turn_seconds": one, "together_seconds": other, "share": other / one}


if __name__ == "__main__":
    main()
