"""Frames a second on another graphics card, PREDICTED from what was measured on one and the two cards' data sheets.

    longtake bench stream --model wan2.1-1.3b --random-weights --recipe hybrid_forcing:tokens=64 --compile -o results
    python benchmarks/predict.py results/*.json --card "RTX 4090"

Two bounds, part by part. As products: what was measured, by the ratio of the cards' rates of bfloat16 products. As
copies: by the ratio of their bandwidths. A part takes between the two, so a block does; no part is bound by less. What
is neither (launching, the host) is taken to stay as it was. Wrong where a kernel suits one card and not the other.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Card(NamedTuple):
    """Of the data sheet: bfloat16 products that add in float32, without sparsity; bandwidth; memory as it is sold."""

    tflops: float
    terabytes_a_second: float
    gibibytes: int


CARDS = {
    "NVIDIA H200": Card(989, 4.8, 141),
    "NVIDIA H100 80GB HBM3": Card(989, 3.35, 80),
    "RTX 5090": Card(209.5, 1.792, 32),
    "RTX 4090": Card(165.2, 1.008, 24),
    "RTX 3090": Card(71, 0.936, 24),
}
NEITHER = ("copy to host", "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files of `longtake bench stream -o`")
    parser.add_argument("--card", choices=CARDS, default="RTX 4090")
    options = parser.parse_args()
    rows = [predicted(json.loads(path.read_text()), options.card) for path in options.results]
    print(json.dumps(rows, indent=1))


def predicted(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A result's frames a second on the card of that name, from the slower bound to the faster, and whether it fits."""
    measured_on = result["device"]
    if measured_on not in CARDS:
        raise ValueError(f"no data sheet of {measured_on!r}: there are {', '.join(CARDS)}")
    ours, other = CARDS[measured_on], CARDS[name]
    ratios = (ours.tflops / other.tflops, ours.terabytes_a_second / other.terabytes_a_second)
    milliseconds = [
        sum(part["ms"] * (1 if named in NEITHER else ratio) for named, part in result["parts"].items())
        for ratio in (max(ratios), min(ratios))
    ]
    peak = result["peak_memory_mib"] / 1024
    return {
        "predicted": True, "card": name, "measured_on": measured_on,
        **{key: result[key] for key in ("model", "recipe", "size", "decoder", "precision")},
        "frames_per_second": [round(1000 * result["pictures_a_block"] / ms, 1) for ms in milliseconds],
        "peak_gib": round(peak, 1), "fits": peak < other.gibibytes,
    }  # fmt: skip


if __name__ == "__main__":
    main()
