"""Do scores differ by the noise that videos began with, by kinds of camera, and in what captions leave open?

    python benchmarks/seed_by_seed.py FIRST.json OTHER.json ... [--groups 0,1 2,3]

takes what `longtake evaluate toy --json` printed and prints each other file beside the first one, of the first table of
each at five seconds: differences with their 95 % intervals in what captions ask (`at`) and in what they leave open
(`constancy`), and by kind of camera how many are right, lost and gained. Over the seeds that both have, or, with
--groups, over each group of seeds by itself.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longtake.evaluation.compare import difference, tables_in
from longtake.evaluation.sources import held_out_captions
from longtake.toy.captions import parse

Table = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", nargs="+", type=Path, metavar="FILE", help="what `evaluate toy --json` printed")
    parser.add_argument("--groups", nargs="+", metavar="SEEDS", help="seeds with commas between them")
    options = parser.parse_args()
    first, *others = (tables_in(file)[0] for file in options.scores)
    rows = []
    for file, other in zip(options.scores[1:], others, strict=True):
        both = [seed for seed in first["seed_list"] if seed in other["seed_list"]]
        groups = [list(map(int, group.split(","))) for group in options.groups or []] or [both]
        rows += [{"file": str(file), "seeds": seeds, **beside(first, other, seeds)} for seeds in groups]
    print(json.dumps({"first": str(options.scores[0]), "others": rows}, indent=1))


def beside(first: Table, other: Table, seeds: Sequence[int]) -> dict[str, Any]:
    """The other table less the first one, over these seeds."""
    less: dict[str, Any] = {}
    for part in ("at", "constancy"):
        found = {
            name: difference(verdicts(first, part, name, seeds), verdicts(other, part, name, seeds), len(seeds))
            for name in first["counts"]["5"][part]
        }
        less[part] = {name: one._asdict() for name, one in found.items() if one}
    return {**less, "cameras": cameras(first, other, seeds)}


def cameras(first: Table, other: Table, seeds: Sequence[int]) -> dict[str, dict[str, int]]:
    """By what captions say of the camera: how many are right in both tables, and in which one alone."""
    said = [parse(text).get("camera", "") for text in held_out_captions(first["prompts"])] * len(seeds)
    one, two = (verdicts(table, "at", "camera", seeds) for table in (first, other))
    found = {kind: dict.fromkeys(("scored", "first", "other", "lost", "gained"), 0) for kind in sorted({*said} - {""})}
    for kind, a, b in zip(said, one, two, strict=True):
        if a != "-":
            counts = {
                "scored": True,
                "first": a == "1",
                "other": b == "1",
                "lost": a == "1" != b,
                "gained": a != "1" == b,
            }
            found[kind] = {name: found[kind][name] + value for name, value in counts.items()}
    return found


def verdicts(table: Table, part: str, name: str, seeds: Sequence[int]) -> str:
    """Of an attribute, seed by seed."""
    every, prompts = table["counts"]["5"][part][name]["verdicts"], table["prompts"]
    begins = [prompts * table["seed_list"].index(seed) for seed in seeds]
    return "".join(every[begin : begin + prompts] for begin in begins)


if __name__ == "__main__":
    main()
