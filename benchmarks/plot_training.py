"""Trainings side by side: their losses and the norms of their gradients over steps, a colour for each way to train.

    python benchmarks/plot_training.py "joint=j_1.jsonl" "joint=j_2.jsonl" "two stages=s1_1.jsonl,s2_1.jsonl" \
        --steps 120 -o training.png

Files are the metrics.jsonl of trainings. Of several, with commas between them, each goes on where the last one ended:
--steps says after how many steps. Needs matplotlib.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

SHOWN = {"matching": "matching loss", "critic": "critic's loss", "norm": "norm of the student's gradient"}

Run = tuple[str, list[dict[str, float]]]
"""The way it was trained, and its rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="WAY=FILE[,FILE]", help="metrics of one training each")
    parser.add_argument("--steps", type=int, default=0, help="steps of each file but the last of a training")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the picture to draw")
    options = parser.parse_args()
    draw([run_of(named, options.steps) for named in options.runs], options.out)


def run_of(named: str, steps: int) -> Run:
    """The rows of a training that may have several files."""
    way, _, files = named.partition("=")
    parts = [Path(file).read_text(encoding="utf-8").splitlines() for file in files.split(",")]
    rows = [(part, json.loads(line)) for part, lines in enumerate(parts) for line in lines]
    return way, [row | {"step": row["step"] + part * steps} for part, row in rows]


def draw(runs: Sequence[Run], path: Path) -> None:
    figure = Figure(figsize=(11, 3), layout="constrained")
    ways = list(dict.fromkeys(way for way, _ in runs))
    for axes, (metric, title) in zip(figure.subplots(1, len(SHOWN)), SHOWN.items(), strict=True):
        for way, rows in runs:
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            axes.plot(*zip(*points, strict=True), color=f"C{ways.index(way)}", label=way, linewidth=1.2, alpha=0.8)
        axes.set(title=title, xlabel="step", ylim=(0, None))
        axes.grid(alpha=0.3)
    lines = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    figure.axes[0].legend(lines.values(), lines.keys(), frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
