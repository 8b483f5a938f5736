"""How much is recalled after how long out of sight: a line for each file of scores, with its 95 % intervals.

    longtake evaluate recall --recipe hybrid_forcing --after 2 4 8 16 60 --json > hybrid.json
    python benchmarks/plot_recall.py "far state=hybrid.json" "sink=sink.json" -o recall.png

Needs matplotlib.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ASKED = {"colour": 1 / 8, "landmark": 1 / 4}  # and what chance gives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", nargs="+", metavar="LABEL=FILE", help="what `evaluate recall --json` printed")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the picture to draw")
    options = parser.parse_args()
    named = dict(one.rpartition("=")[::2] for one in options.scores)
    tables = {label: json.loads(Path(file).read_text(encoding="utf-8"))[0] for label, file in named.items()}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, what in zip(figure.subplots(1, len(ASKED), sharey=True), ASKED, strict=True):
        draw(axes, what, tables)
    figure.axes[0].set_ylabel("recalled")
    figure.axes[-1].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(options.out, dpi=110)


def draw(axes: Axes, what: str, tables: Mapping[str, Mapping[str, Any]]) -> None:
    for label, table in tables.items():
        seconds = [int(gap) for gap in table["after"]]
        shares = [table["after"][str(gap)][what] for gap in seconds]
        ends = [table["counts"][str(gap)][what]["interval_95"] for gap in seconds]
        away = [[share - low for share, (low, _) in zip(shares, ends, strict=True)],
                [high - share for share, (_, high) in zip(shares, ends, strict=True)]]  # fmt: skip
        axes.errorbar(seconds, shares, away, label=label, marker="o", markersize=3, capsize=2, linewidth=1.2)
    axes.axhline(ASKED[what], color="0.6", linewidth=0.8, linestyle=":", label="by chance")
    axes.set(title=what, xlabel="seconds out of sight", xscale="log", ylim=(0, 1))
    axes.set_xticks(seconds, [str(gap) for gap in seconds], minor=False)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
