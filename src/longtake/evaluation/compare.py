"""Is one table of scores worse than another, made of the same captions and the same noise?

Videos are compared in pairs: what both show of one caption under one noise. Captions are what was sampled, so the
interval is that of a bootstrap over captions, each with all its seeds (Efron, 1979; percentiles).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RESAMPLES, DICE_SEED = 10_000, 0
SAME = ("prompts", "captions", "seed_list", "seed_of_a_video", "lead", "absence")  # else two tables have no pairs


class Difference(NamedTuple):
    """Of two shares over the pairs that are scored in both, second less first, with its 95 % interval."""

    first: float
    second: float
    pairs: int
    interval_95: tuple[float, float]


def tables_in(path: Path) -> list[dict[str, Any]]:
    """The tables of a file that `evaluate --json` wrote. ValueError for what is no such file."""
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not JSON: give what `longtake evaluate ... --json` printed") from None
    if not isinstance(tables, list) or not all(isinstance(one, dict) and "counts" in one for one in tables):
        raise ValueError(f"{path} holds no scores: give what `longtake evaluate ... --json` printed")
    return tables


def compared(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Difference]:
    """All that two tables of `evaluate toy`, `redirect` or `recall` count, by its name: "5 at camera".

    ValueError for tables of other captions or seeds, and for those without verdicts on each video.
    """
    for key in SAME:
        if first.get(key) != second.get(key):
            raise ValueError(f"these scores are of other videos: {key} is {first.get(key)} and {second.get(key)}")
    if not first.get("seed_list"):
        raise ValueError("these scores do not say of which seeds they are: score both anew")
    others = dict(_verdicts(second))
    pairs = [(name, verdicts, others[name]) for name, verdicts in _verdicts(first) if name in others]
    if not pairs:
        raise ValueError("these scores have no verdict on each video in common: score both anew, in the same way")
    found = {name: difference(one, other, len(first["seed_list"])) for name, one, other in pairs}
    return {name: one for name, one in found.items() if one is not None}


def _verdicts(table: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The verdicts of a table of tables, each by the way that leads there, but for the name `counts`."""
    if "verdicts" in table:
        yield name.strip(), table["verdicts"]
        return
    for key, inner in table.items():
        if isinstance(inner, Mapping):
            yield from _verdicts(inner, name if key == "counts" else f"{name} {key}")


def difference(first: str, second: str, seeds: int) -> Difference | None:
    """Of two series of verdicts, see `scores.Tally`, whose videos go through the captions seed by seed.

    None where no pair is scored. ValueError for series that are not of the same videos.
    """
    if len(first) != len(second) or len(first) % seeds:
        raise ValueError(f"{len(first)} and {len(second)} verdicts are not those of as many captions for {seeds} seeds")
    one, other = _by_caption(first, seeds), _by_caption(second, seeds)
    scored = (one >= 0) & (other >= 0)
    if not scored.any():
        return None
    counts = np.stack([np.where(scored, x, 0).sum(1) for x in (one, other)] + [scored.sum(1)])
    captions = len(one)  # of redirects fewer than prompts: some say nothing that can change
    drawn = np.random.default_rng(DICE_SEED).multinomial(captions, np.full(captions, 1 / captions), size=RESAMPLES)
    right, more_right, pairs = counts @ drawn.T
    gains = (more_right - right)[pairs > 0] / pairs[pairs > 0]
    low, high = np.percentile(gains, [2.5, 97.5])
    total = counts.sum(1)
    return Difference(total[0] / total[2], total[1] / total[2], int(total[2]), (float(low), float(high)))


def _by_caption(verdicts: Sequence[str], seeds: int) -> np.ndarray:
    """1 right, 0 wrong, -1 not scored, [captions, seeds]."""
    return np.array([{"1": 1, "-": -1}.get(one, 0) for one in verdicts]).reshape(seeds, -1).T
