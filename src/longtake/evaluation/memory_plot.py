"""Pictures of what `evaluate_memory` measured, drawn by matplotlib, which is only needed here."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from longtake.files import require_free, whole


def require(path: Path) -> None:
    """Refuse what could not be drawn, before anything is measured: ValueError or OSError."""
    if find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install matplotlib")
    if path.suffix != ".png":
        raise ValueError(f"plots are png files, not {path.name}")
    require_free(path, overwrite=True)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the tables of recipes into one file: means over layers, and the growth of errors with its 95 % interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    (rank, news, back), (recalled, share, growth) = figure.subplots(2, 3)
    for result in results:
        seconds, ages = result["at_seconds"], [max(age, result["block_seconds"] / 2) for age in result["ages_seconds"]]
        for name, state in result["mean_of_layers"].items():
            label = f"{result['recipe']}, {name}"
            rank.plot(seconds, state["effective_rank"], label=label)
            news.plot(seconds, state["news"], label=label)
            recalled.plot(ages, state["recalled"], label=label)
            (line,) = back.plot(ages, state["read_back"], label=label)
            back.axhline(state["read_back_never"], color=line.get_color(), linestyle=":")
        for number, layer in enumerate(result["layers"]):
            if layer["share_of_output"]:
                share.plot(layer["share_of_output"], label=f"{result['recipe']}, layer {number}")
        found = result["error_growth"]
        blocks = range(len(found["latents"]["mean"]))
        (line,) = growth.plot(blocks, found["latents"]["mean"], label=result["recipe"])
        growth.fill_between(
            blocks, *zip(*found["latents"]["interval_95"], strict=True), color=line.get_color(), alpha=0.2
        )
        growth.plot(blocks, found["unrelated_latents"], color=line.get_color(), linestyle=":")
    rank.set(title="effective rank", xlabel="seconds", xscale="log")
    news.set(title="news of one more block", xlabel="seconds", xscale="log", yscale="log")
    back.set(title="error of reading a block back (dotted: never seen)", xlabel="seconds ago", xscale="log")
    recalled.set(title="worth of having seen it", xlabel="seconds ago", xscale="log", yscale="log")
    nothing = "" if share.lines else ": nothing far is read"
    share.set(title=f"far beside near in the output{nothing}", xlabel="block of a real stream")
    growth.set(title="growth of a change in latents (dotted: unrelated)", xlabel="blocks after", yscale="log")
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    with whole(path) as beside:
        figure.savefig(beside, dpi=110, format="png")
