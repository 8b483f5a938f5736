"""How often the toy world's detectors are right, on fresh renders and on renders sent through the embedded codec.

    python benchmarks/detectors.py [--clips 100] > detectors.json

Half the clips are drawn as training draws them, half are held-out combinations; windows of 80 pictures begin anywhere
in a clip. An abstention is wrong; what a window cannot show (`window_truth`) is not scored.
"""

import argparse
import json
import sys

import torch

from longtake.generation.stream import to_uint8
from longtake.recipes import toy_codec
from longtake.toy.detect import detect, detector_fingerprint, window_truth
from longtake.toy.scenes import sample_scenes
from longtake.toy.world import render

AT_ONCE, PICTURES, SEEDS = 5, 80, {"train": 9001, "held_out": 9002}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=100, help="clips of each kind")
    clips = parser.parse_args().clips
    codec = toy_codec()
    counts: dict[str, dict[str, list[int]]] = {"fresh": {}, "codec": {}}
    for kind, seed in SEEDS.items():
        scenes = sample_scenes(clips, seed, held_out=kind == "held_out")
        first = torch.randint(49, (clips,), generator=torch.Generator().manual_seed(seed))
        for start in range(0, clips, AT_ONCE):
            some, now = scenes[start : start + AT_ONCE], first[start : start + AT_ONCE]
            frames = render(some, PICTURES + 1, now).frames_BFCHW
            decoded = codec.decode(codec.encode(frames)[0])[0]
            truth = window_truth(some, PICTURES, now + 1)
            for name, video in (("fresh", frames), ("codec", decoded)):
                found = detect(to_uint8(video[:, 1:]))
                for attribute, wanted in truth.items():
                    scored = wanted >= 0
                    row = counts[name].setdefault(attribute, [0, 0])
                    row[0] += int(((getattr(found, attribute) == wanted) & scored).sum())
                    row[1] += int(scored.sum())
            print(f"{kind}: {start + len(now)} of {clips}", file=sys.stderr)
    shares = {
        name: {attribute: {"right": right, "scored": scored, "share": round(right / scored, 4)}
               for attribute, (right, scored) in rows.items()}
        for name, rows in counts.items()
    }  # fmt: skip
    print(json.dumps({"detectors": detector_fingerprint(), "clips": 2 * clips, **shares}, indent=1))


if __name__ == "__main__":
    main()
