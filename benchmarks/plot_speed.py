"""Time of a block by part: what was measured here, the published code of the same method, and what counting allows.

    longtake bench stream --model wan2.1-1.3b --random-weights --recipe hybrid_forcing:tokens=64 -o results
    python benchmarks/plot_speed.py results/*.json -o speed.png

Published numbers are those of `published_speed.json`, and drawn where sizes are the same. Their passes include the
commit. Counted: the operations of a block at the rate of one large product measured in the same run. Needs matplotlib.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PUBLISHED = Path(__file__).with_name("published_speed.json")
COLOURS = {
    "network pass": "#4878a8", "commit": "#7aa6d1", "memory": "#b5cfe8", "far state": "#6aa56a", "decode": "#d98c4a",
    "copy to host": "#b0b0b0", "other": "#d8d8d8",
}  # fmt: skip
Bar = tuple[str, Mapping[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files of `longtake bench stream -o`")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the png to draw")
    options = parser.parse_args()
    results = [json.loads(path.read_text()) for path in options.results]
    published = json.loads(PUBLISHED.read_text())
    draw([bar for result in results for bar in bars_of(result, published)], results[0], options.out)


def bars_of(result: Mapping[str, Any], published: Mapping[str, Any]) -> list[Bar]:
    """Milliseconds by part of one result: as published if that was measured alike, as measured, and as counted."""
    parts, setting = result["parts"], f"{result['decoder']}, {len(result['levels'])} levels"
    return [
        *(
            (f"{row['method']}, published ({published['device']})", _published(row, result))
            for row in published["rows"]
            if _alike(row, result, published)
        ),
        (f"{result['recipe']}, {setting}", _by_kind(parts, "ms")),
        (f"counted at {result['rates']['matrix_tflops']:.4g} TFLOP/s", _by_kind(parts, "least_ms")),
    ]


def _alike(row: Mapping[str, Any], result: Mapping[str, Any], published: Mapping[str, Any]) -> bool:
    """Whether the published code ran at the same sizes; its window and levels are in its row where they are told."""
    same = all(result[key] == published[key] for key in ("model", "size", "precision"))
    same = same and row["recipe"] == result["recipe"].partition(":")[0] and row["levels"] == len(result["levels"])
    decoder = {"WanVAE": "with_decoder", "NoDecoder": "network"}.get(result["decoder"])
    return same and row["past"] == result["window"]["past"] and decoder in row


def _published(row: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, float]:
    network = {"network pass": row["network"]}
    return network | ({"decode": row["with_decoder"] - row["network"]} if result["decoder"] == "WanVAE" else {})


def _by_kind(parts: Mapping[str, Mapping[str, float]], field: str) -> dict[str, float]:
    """Passes are of one kind, whatever their number."""
    kinds = dict.fromkeys(COLOURS, 0.0)
    for name, row in parts.items():
        kinds[next(kind for kind in COLOURS if name.startswith(kind))] += row[field]
    return kinds


def draw(bars: Sequence[Bar], result: Mapping[str, Any], path: Path) -> None:
    figure = Figure(figsize=(11, 1.2 + 0.45 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for place, (_, parts) in enumerate(bars):
        left = 0.0
        for kind, ms in parts.items():
            label = kind if not any(ms_of.get(kind) for _, ms_of in bars[:place]) and ms else None
            axes.barh(place, ms, left=left, color=COLOURS[kind], label=label)
            left += ms
        axes.text(
            left, place, f" {left:.0f} ms, {1000 * result['pictures_a_block'] / left:.1f}/s", va="center", fontsize=8
        )
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(right=1.15 * max(sum(parts.values()) for _, parts in bars))
    axes.set_xlabel(f"ms for a block of {result['pictures_a_block']} pictures; {result['size']}, {result['precision']}")
    axes.set_title(f"{result['model']}, {result['device']}", fontsize=10)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
