"""From one run of `attention_matching` that converted every layer: the same maps, and only a share of the layers.

    longtake train attention_matching --from toy --out matched --set converted_share=1
    python benchmarks/rehyat_shares.py matched --shares 0.5 0.67 0.83 --out matched_    # matched_50, matched_67, ...

With --near-only all heads are left local: the same near spans and nothing far, which finetuned alike is the baseline
that tells what sums are good for.

Layers are those with the smallest errors of the run's record, as the stage chooses them. Each folder holds what
`longtake train finetune` and `teacher_forcing` start from.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from longtake.distillation.attention_matching import easiest
from longtake.models.wan import converted
from longtake.recipes.weight_files import (
    CODEC_FILE,
    CONVERTED_FILE,
    ENCODER_FILE,
    TEACHER_FILE,
    load_network,
    save_network,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matched", type=Path)
    parser.add_argument("--shares", nargs="+", type=float, required=True)
    parser.add_argument("--out", required=True, help="what the folders' names begin with")
    parser.add_argument("--near-only", action="store_true")
    options = parser.parse_args()
    text, network, description = load_network(options.matched / CONVERTED_FILE, torch.device("cpu"))
    matching = json.loads((options.matched / "record.json").read_text())["spent"]["matching"]
    errors = {int(layer): one["beside_answer"] for layer, one in matching.items()}
    assert network.config.conversion is not None
    if lost := errors.keys() - network.features.keys():
        raise SystemExit(
            f"{options.matched} did not keep the maps of layers {sorted(lost)}: match it by converted_share=1"
        )
    for share in options.shares:
        folder = Path(f"{options.out}{round(100 * share)}")
        folder.mkdir(parents=True)
        for file in (CODEC_FILE, ENCODER_FILE, TEACHER_FILE):
            shutil.copyfile(options.matched / file, folder / file)
        made = converted(network, replace(network.config.conversion, layers=easiest(errors, share)))
        if options.near_only:
            for form in made.features.values():
                form.leave_local(range(made.config.heads))
        path, shift = folder / CONVERTED_FILE, description["shift"]
        save_network(path, text, made, role=description["role"], shift=shift, int8=False)
        print(folder, made.config.conversion and made.config.conversion.layers)


if __name__ == "__main__":
    main()
