"""Does it pay to fold a doubled picture into its convolution? The three places of Wan's decoder, both ways.

python benchmarks/doubling.py [--device cuda] [--size WxH] [--frames 3]   # prints JSON: ms of each

Folded, the larger picture is left in phases: whoever reads it next takes it from there.
"""

import argparse
import json
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.evaluation.rates import seconds
from longtake.evaluation.steady import machine
from longtake.models.wan_vae import WanVAEConfig
from longtake.models.wan_vae_triton import in_phases, phases
from longtake.plan import pixels


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--device", default="cuda")
    asked.add_argument("--size", type=pixels, default=(832, 480))
    asked.add_argument("--frames", type=int, default=3)
    options = asked.parse_args()
    place, config, rows = torch.device(options.device), WanVAEConfig(), []
    pictures, scale = options.frames, 2 ** len(config.temporal_downsample)
    for width, doubles in zip(config.widths[:0:-1], (*config.temporal_downsample[::-1],), strict=True):
        pictures *= 2 if doubles else 1
        size = (pictures, width, options.size[1] // scale, options.size[0] // scale)
        x, weight = (
            torch.randn(shape, device=place, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
            for shape in (size, (width // 2, width, 3, 3))
        )
        ways = {"plain": partial(plain, x, weight), "folded": partial(in_phases, x.unsqueeze(2), phases(weight))}
        rows.append({"pictures": size} | {name: 1000 * seconds(way, place) for name, way in ways.items()})
        scale //= 2
    print(json.dumps({"rows": rows} | machine(place), indent=1))


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest-exact"), weight, padding=1)


if __name__ == "__main__":
    main()
