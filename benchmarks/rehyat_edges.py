"""Do videos jump where one chunk ends and the next begins? Whole clips of a teacher, and of its converted layers (H12).

    python benchmarks/rehyat_edges.py --models runs/matched runs/converted --out edges.json

Of each latent frame but the first: how much its first picture differs from the last one of the frame before, mean over
pixels of 0 to 255. edge: mean over frames that begin a chunk of Tc; inside: over the others; ratio: of the two. The
teacher makes the same prompts from the same noise and knows no chunks: its own ratio, at the same frames, is the mark.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from longtake.evaluation.sources import held_out_captions
from longtake.recipes.devices import device_named
from longtake.recipes.teacher import TEACHER_STEPS, toy_teacher
from longtake.recipes.weight_files import CONVERTED_FILE, TEACHER_FILE, load_network

MARK = "teacher"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True, help="folders with converted.safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=TEACHER_STEPS)
    options = parser.parse_args()
    device = device_named(None)
    found = {}
    for folder in options.models:
        _, network, _ = load_network(folder / CONVERTED_FILE, torch.device("cpu"))
        assert network.config.conversion is not None
        current, found[str(folder)] = network.config.conversion.current, {}
        for name, file in {MARK: TEACHER_FILE, "converted": CONVERTED_FILE}.items():
            made = toy_teacher(device, model=folder, file=file, steps=options.steps)
            prompts = held_out_captions(options.prompts)
            pieces = [prompts[begin : begin + 25] for begin in range(0, len(prompts), 25)]
            steps_BF = torch.cat([changes(made(some, range(len(some)))) for some in pieces])
            found[str(folder)][name] = at_edges(steps_BF, current)
        print(folder, json.dumps(found[str(folder)]), flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def changes(frames_BFHWC: Tensor) -> Tensor:
    """How much each latent frame but the first begins by a change, [B, F - 1], of pictures of which the first latent
    frame has one and all others have four."""
    pictures = frames_BFHWC.float()
    return (pictures[:, 1::4] - pictures[:, 0:-1:4]).abs().mean((2, 3, 4)).cpu()


def at_edges(changes_BF: Tensor, current: int) -> dict[str, float]:
    """Of changes of the latent frames 1, 2, ...: their means where a chunk begins and elsewhere, and the ratio."""
    begins = torch.arange(1, changes_BF.shape[1] + 1) % current == 0
    edge, inside = changes_BF[:, begins].mean().item(), changes_BF[:, ~begins].mean().item()
    return {"edge": round(edge, 4), "inside": round(inside, 4), "ratio": round(edge / inside, 4)}


if __name__ == "__main__":
    main()
