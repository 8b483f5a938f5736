"""How near can learned features bring each layer of the embedded teacher to its own softmax, and which layers are easy?

    python benchmarks/rehyat_matching.py --out rehyat_matching --steps 100      # some fifteen minutes on one CPU core

`longtake train attention_matching` itself, with little of everything: few held-out clips, no pictures on the way. All
numbers are in its record.json: see `stages.train_attention_matching`.
"""

import argparse
from pathlib import Path

import torch

from longtake import training
from longtake.distillation import trainer
from longtake.distillation.stages import strips

HELD_OUT = 2  # clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    strips.LOOKED_AT = HELD_OUT
    trainer.train.__kwdefaults__["look_seconds"] = float("inf")
    few = ["seconds=1e9", "batch=1", "updates=10", "sampling_steps=8", f"steps={options.steps}"]
    training.train("attention_matching", start="toy", out=options.out, settings=[*few, *options.set])


if __name__ == "__main__":
    main()
