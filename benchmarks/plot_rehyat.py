"""Time and peak memory against the length of a clip, dense and converted, and where they cross.

    python benchmarks/rehyat_speed.py --out rehyat_speed.json
    python benchmarks/plot_rehyat.py rehyat_speed.json -o rehyat_speed.png

--later takes a run of other kernels: its points are drawn large, without lines, and cross nothing. Needs matplotlib.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Lines = Mapping[str, Sequence[Sequence[float]]]  # seconds of video and a number of each point, by kind

MARKS = {"dense": "o-", "converted": "s-", "plain": "x:", "step": "^--"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files of rehyat_speed.py")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the png to draw")
    parser.add_argument("--later", nargs="+", type=Path, default=[], help="files of a later run, drawn as mere points")
    parser.add_argument("--part", default="layer", choices=["attention", "self_attention", "layer"])
    options = parser.parse_args()
    cases, later = cases_of(options.results), cases_of(options.later)
    about = json.loads(options.results[0].read_text())["about"]
    draw(cases, later, options.part, about, options.out)


def cases_of(paths: Sequence[Path]) -> list[dict[str, Any]]:
    return [case for path in paths for case in json.loads(path.read_text())["cases"]]


def lines_of(cases: Sequence[Mapping[str, Any]], shape: str, part: str, number: str) -> dict[str, list[list[float]]]:
    """Seconds of video and a number of each measured case, by kind."""
    lines: dict[str, list[list[float]]] = {}
    for case in cases:
        if (case["shape"], case["part"]) == (shape, part) and case.get(number):
            lines.setdefault(case["kind"], []).append([case["clip_seconds"], case[number]])
    return {kind: sorted(points) for kind, points in lines.items()}


def crossing(lines: Lines) -> float | None:
    """The seconds of video from which on a converted layer is the faster one, by straight lines between those that were
    measured; none if it is so at the first of them already, or is not at the last."""
    dense, ours = (dict(lines.get(kind, ())) for kind in ("dense", "converted"))
    both = sorted(dense.keys() & ours.keys())
    slower = [x for x in both if ours[x] >= dense[x]]
    if not slower or slower[-1] == both[-1]:
        return None
    before, after = slower[-1], both[both.index(slower[-1]) + 1]
    low, high = (ours[x] - dense[x] for x in (before, after))
    return before + (after - before) * low / (low - high)


def told(lines: Lines) -> str:
    """Where a converted layer becomes the faster one; also if that is below or beyond all that was timed of both."""
    dense, ours = (dict(lines.get(kind, ())) for kind in ("dense", "converted"))
    both = sorted(dense.keys() & ours.keys())
    if not both:
        return ""
    if (meet := crossing(lines)) is not None:
        return f"converted is the faster one from {meet:.1f} s on"
    if ours[both[-1]] < dense[both[-1]]:
        return f"no crossing: converted is the faster one from {both[0]:.1f} s on, the least that was timed"
    return f"no crossing: dense is the faster one still at {both[-1]:.1f} s"


def draw(
    cases: Sequence[Mapping[str, Any]], later: Sequence[Mapping[str, Any]], part: str, about: Mapping[str, Any],
    path: Path,
) -> None:  # fmt: skip
    shapes = list(dict.fromkeys(case["shape"] for case in cases))
    figure = Figure(figsize=(11, 3.6 * len(shapes)), layout="constrained")
    for row, shape in zip(figure.subplots(len(shapes), 2, squeeze=False), shapes, strict=True):
        for axes, number, unit in zip(row, ("ms", "peak_mb"), ("ms", "peak MB beyond the input"), strict=True):
            lines = lines_of(cases, shape, part, number)
            _panel(axes, lines, lines_of(later, shape, part, number), unit)
            axes.set_title(f"{shape}, {part.replace('_', ' ')}", fontsize=10)
            if number == "ms":
                if (meet := crossing(lines)) is not None:
                    axes.axvline(meet, color="grey", linewidth=0.8)
                axes.annotate(told(lines), (0.98, 0.02), xycoords="axes fraction", ha="right", fontsize=8)
    figure.suptitle(f"{about['device']}, {about['type']}, Tc {about['current']}, To {about['overlap']}", fontsize=10)
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, lines: Lines, later: Lines, unit: str) -> None:
    for kind, points in lines.items():
        drawn = axes.plot(*zip(*points, strict=True), MARKS[kind], label=kind, markersize=4)
        if kind in later:
            look = {"color": drawn[0].get_color(), "fillstyle": "none", "markersize": 9}
            axes.plot(*zip(*later[kind], strict=True), MARKS[kind][0], label=f"{kind}, later", **look)
    if lines:
        axes.set(xscale="log", yscale="log")
        axes.legend(fontsize=8)
    axes.set_xlabel("seconds of video")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
