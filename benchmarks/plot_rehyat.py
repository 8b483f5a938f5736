"""Time and peak memory against the length of a clip, dense and converted, and where they cross.

    python benchmarks/rehyat_speed.py --out rehyat_speed.json
    python benchmarks/plot_rehyat.py rehyat_speed.json -o rehyat_speed.png

Needs matplotlib.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

MARKS = {"dense": "o-", "converted": "s-", "plain": "x:", "step": "^--"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files of rehyat_speed.py")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the png to draw")
    parser.add_argument("--part", default="layer", choices=["attention", "self_attention", "layer"])
    options = parser.parse_args()
    results = [json.loads(path.read_text()) for path in options.results]
    draw([case for result in results for case in result["cases"]], options.part, results[0]["about"], options.out)


def lines_of(cases: Sequence[Mapping[str, Any]], shape: str, part: str, number: str) -> dict[str, list[list[float]]]:
    """Seconds of video and a number of each measured case, by kind."""
    lines: dict[str, list[list[float]]] = {}
    for case in cases:
        if (case["shape"], case["part"]) == (shape, part) and case.get(number):
            lines.setdefault(case["kind"], []).append([case["clip_seconds"], case[number]])
    return {kind: sorted(points) for kind, points in lines.items()}


def crossing(lines: Mapping[str, Sequence[Sequence[float]]]) -> float | None:
    """The seconds of video from which on a converted layer is the faster one, by straight lines between those that were
    measured; the first of them, if it is faster there already."""
    dense, ours = (dict(lines.get(kind, ())) for kind in ("dense", "converted"))
    both = sorted(dense.keys() & ours.keys())
    slower = [x for x in both if ours[x] >= dense[x]]
    if not both or (slower and slower[-1] == both[-1]):
        return None
    if not slower:
        return both[0]
    before, after = slower[-1], both[both.index(slower[-1]) + 1]
    low, high = (ours[x] - dense[x] for x in (before, after))
    return before + (after - before) * low / (low - high)


def draw(cases: Sequence[Mapping[str, Any]], part: str, about: Mapping[str, Any], path: Path) -> None:
    shapes = list(dict.fromkeys(case["shape"] for case in cases))
    figure = Figure(figsize=(11, 3.6 * len(shapes)), layout="constrained")
    for row, shape in zip(figure.subplots(len(shapes), 2, squeeze=False), shapes, strict=True):
        for axes, number, unit in zip(row, ("ms", "peak_mb"), ("ms", "peak MB beyond the input"), strict=True):
            lines = lines_of(cases, shape, part, number)
            _panel(axes, lines, unit)
            axes.set_title(f"{shape}, {part.replace('_', ' ')}", fontsize=10)
            if number == "ms" and (meet := crossing(lines)):
                axes.axvline(meet, color="grey", linewidth=0.8)
                axes.annotate(f"{meet:.1f} s", (meet, 0.02), xycoords=("data", "axes fraction"), fontsize=8)
    figure.suptitle(f"{about['device']}, {about['type']}, Tc {about['current']}, To {about['overlap']}", fontsize=10)
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, lines: Mapping[str, Sequence[Sequence[float]]], unit: str) -> None:
    for kind, points in lines.items():
        axes.plot(*zip(*points, strict=True), MARKS[kind], label=kind, markersize=4)
    if lines:
        axes.set(xscale="log", yscale="log")
        axes.legend(fontsize=8)
    axes.set_xlabel("seconds of video")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
