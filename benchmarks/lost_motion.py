"""What becomes of motion that is not read off: is the subject lost as well, and of what?

    python benchmarks/lost_motion.py FIRST.json OTHER.json ...

takes what `longtake evaluate toy --json` printed and prints, of the first table of each file at five seconds, how many
motions are lost with their subject and how many alone, by what captions say, and the differences from the first file,
with their 95 % intervals. Of files of other sizes the first captions and seeds that both have are compared.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longtake.evaluation.compare import difference, tables_in
from longtake.evaluation.sources import held_out_captions
from longtake.toy.captions import parse

COMPARED = ("subject", "colour", "motion", "camera")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", nargs="+", type=Path, metavar="FILE", help="what `evaluate toy --json` printed")
    files: Sequence[Path] = parser.parse_args().scores
    tables = [tables_in(file)[0] for file in files]
    rows = [
        {"file": str(file), "recipe": table["recipe"], **lost(table), "less_first": less(tables[0], table)}
        for file, table in zip(files, tables, strict=True)
    ]
    print(json.dumps(rows, indent=1))


def lost(table: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of motions that were asked for and not read off, in all and by the motion."""
    said = motions(table["prompts"]) * table["seeds"]
    moves, shown = (verdicts(table, name, table["prompts"], table["seeds"]) for name in ("motion", "subject"))
    by_value = {
        value: {"scored": 0, "lost_with_subject": 0, "lost_alone": 0} for value in sorted(filter(None, {*said}))
    }
    for value, move, show in zip(said, moves, shown, strict=True):
        if move != "-":
            by_value[value]["scored"] += 1
        if move in "0?":
            by_value[value]["lost_alone" if show == "1" else "lost_with_subject"] += 1
    everything = {key: sum(value[key] for value in by_value.values()) for key in ("lost_with_subject", "lost_alone")}
    return {"misread": moves.count("0"), "abstained": moves.count("?"), **everything, "by_value": by_value}


def less(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The second table less the first one, over what both have; of what spins or stands still its motion alone, too."""
    prompts, seeds = (min(first[size], second[size]) for size in ("prompts", "seeds"))
    said = motions(prompts) * seeds
    pairs = {name: [verdicts(table, name, prompts, seeds) for table in (first, second)] for name in COMPARED}
    for value in ("spins", "stands still"):
        pairs[value] = [
            "".join(v if s == value else "-" for v, s in zip(x, said, strict=True)) for x in pairs["motion"]
        ]
    found = {name: difference(*pair, seeds) for name, pair in pairs.items()}
    return {"prompts": prompts, "seeds": seeds, **{name: one._asdict() for name, one in found.items() if one}}


def motions(prompts: int) -> list[str]:
    """What held-out captions say of motion; "" where nothing."""
    return [parse(text).get("motion", "") for text in held_out_captions(prompts)]


def verdicts(table: Mapping[str, Any], name: str, prompts: int, seeds: int) -> str:
    """Of an attribute: of the first captions, seed by seed."""
    every = table["counts"]["5"]["at"][name]["verdicts"]
    return "".join(every[seed * table["prompts"] :][:prompts] for seed in range(seeds))


if __name__ == "__main__":
    main()
