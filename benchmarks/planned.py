"""What `longtake plan` predicts now, beside peaks that were recorded on a GPU.

python benchmarks/planned.py benchmarks/results/2026-11-22-full-size/plan/*.json    # files of benchmarks/memory.py
python benchmarks/planned.py benchmarks/results/2026-11-22-every-row/*.json         # of `longtake bench stream -o`

Prints a table in Markdown, in MiB. Each file counts otherwise: memory.py with the memory that recorded passes keep to
work in and without the blocks in which they are recorded, `bench stream` the other way round; in both random numbers
stand in for text. Files of other kinds and precisions are passed over. Exits 1 where a prediction is further than a
tenth from what was recorded.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longtake.plan import pixels, plan

MIB = 2**20
WITHIN = 0.1
DECODERS = {"NoDecoder": "none", "WanVAE": "wan", "TAEHV": "light"}


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("recorded", nargs="+", type=Path)
    near = True
    print("| | predicted, MiB | recorded | share |\n|---|---|---|---|")
    for path in asked.parse_args().recorded:
        if (found := recorded(path)) is None:
            continue
        how, peak = found
        made = predicted(how)
        near &= abs(made / peak - 1) <= WITHIN
        print(f"| `{path.name}` | {made:,.0f} | {peak:,.0f} | {made / peak:.3f} |", flush=True)
    return 0 if near else 1


def recorded(path: Path) -> tuple[Mapping[str, Any], float] | None:
    """What `plan` is to be asked for, with the moments that count, and the peak of a file in MiB."""
    result = json.loads(path.read_text())
    if "moments" in result:
        how = {name: result[name] for name in ("model", "recipe", "decoder", "compile")}
        most = max(moment["counted_mib"] for moment in result["moments"].values())
        return how | {"size": tuple(result["size"]), "redirected": True}, most
    if result.get("precision") != "bfloat16" or result["model"] == "toy":
        return None
    how = {name: result[name] for name in ("model", "recipe")} | {"compile": result["passes"] == "fused"}
    decoder = "none" if result.get("codec_apart") else DECODERS[result["decoder"]]
    return how | {"decoder": decoder, "size": pixels(result["size"]), "redirected": False}, result["peak_memory_mib"]


def predicted(how: Mapping[str, Any]) -> float:
    """The peak in MiB of a stream whose text encoder is not there. how: as of `recorded`."""
    told = plan(**{name: value for name, value in how.items() if name != "redirected"})
    totals, moments = told["totals"], told["moments"]
    counted = [totals["network pass"], totals["decoding"]]
    if how["redirected"]:
        read = totals["new prompt read"] - moments["new prompt read"]["text encoder"]
        counted += [read, totals["new prompt taken"]]
    return float(max(counted)) / MIB


if __name__ == "__main__":
    sys.exit(main())
