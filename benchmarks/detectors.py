"""How often the toy world's detectors are right, and how often planted errors take them in.

    python benchmarks/detectors.py [--clips 50] > detectors.json

Right: windows of 80 pictures that begin anywhere in a clip, fresh and sent through the embedded codec; half the clips
are drawn as training draws them, half are held-out combinations. An abstention is not right; what a window cannot show
(`window_truth`) is not scored. "wrong" counts values that were claimed and are not there: a wrong kind or colour taken
for real. Planted, in as many clips of 32 pictures: no subject, a subject blurred by 4 pixels, a frozen video.
"""

import argparse
import json
import sys

import torch
from torch import Tensor
from torch.nn import functional

from longtake.generation.stream import to_uint8
from longtake.models.codec import Codec
from longtake.recipes.weight_files import toy_codec
from longtake.toy.detect import detect, detector_fingerprint, window_truth
from longtake.toy.palettes import look
from longtake.toy.poses import Pose, pose
from longtake.toy.scenes import Scenes, sample_scenes
from longtake.toy.world import paint, render

AT_ONCE, PICTURES, PLANTED_PICTURES = 5, 80, 32
SEEDS = {"train": 9001, "held_out": 9002}
GONE = 1000.0  # pixels aside: out of every picture
BLUR = 4.0

Rows = dict[str, dict[str, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=50, help="clips of each kind")
    clips = parser.parse_args().clips
    codec = toy_codec()
    rows: dict[str, Rows] = {"fresh": {}, "codec": {}, "planted": {}}
    for kind, seed in SEEDS.items():
        scenes = sample_scenes(clips, seed, held_out=kind == "held_out")
        first = torch.randint(49, (clips,), generator=torch.Generator().manual_seed(seed))
        for start in range(0, clips, AT_ONCE):
            some = scenes[start : start + AT_ONCE]
            judge(some, first[start : start + AT_ONCE], codec, rows)
            plant(some, rows["planted"])
            print(f"{kind}: {start + len(some)} of {clips}", file=sys.stderr)
    print(json.dumps({"detectors": detector_fingerprint(), "clips": 2 * clips, **rows}, indent=1))


@torch.no_grad()
def judge(scenes: Scenes, first: Tensor, codec: Codec, rows: dict[str, Rows]) -> None:
    """Compare what is found in fresh and in decoded pictures with the truth."""
    frames = render(scenes, PICTURES + 1, first).frames_BFCHW
    decoded = codec.decode(codec.encode(frames)[0])[0]
    wanted = window_truth(scenes, PICTURES, first + 1)
    for name, video in (("fresh", frames), ("codec", decoded)):
        found = detect(to_uint8(video[:, 1:]))
        for attribute, truth in wanted.items():
            value, scored = getattr(found, attribute), truth >= 0
            right = (value == truth) & scored
            wrong = (value >= 0) & ~right & scored
            _count(rows[name], attribute, right=right, wrong=wrong, scored=scored)


def plant(scenes: Scenes, rows: Rows) -> None:
    """Count the planted errors that are accepted."""
    frames, mask = _painted(scenes, PLANTED_PICTURES, aside=0.0)
    nothing, _ = _painted(scenes, PLANTED_PICTURES, aside=GONE)
    near = functional.max_pool2d(mask.flatten(0, 1), 9, 1, 4).unflatten(0, mask.shape[:2])
    soft = torch.lerp(frames, _blurred(frames), near)
    frozen = frames[:, :1].expand(-1, PLANTED_PICTURES, -1, -1, -1)
    for name, video, attribute in (
        ("missing subject", nothing, "subject"),
        ("blurred subject", soft, "subject"),
        ("frozen video", frozen, "motion"),
    ):
        value = getattr(detect(to_uint8(video)), attribute)
        _count(rows, name, accepted=value >= 0, clips=value > -2)


def _count(rows: Rows, name: str, **which: Tensor) -> None:
    row = rows.setdefault(name, dict.fromkeys(which, 0))
    for what, mask in which.items():
        row[what] += int(mask.sum())


def _painted(scenes: Scenes, pictures: int, aside: float) -> tuple[Tensor, Tensor]:
    """Pictures with the subject moved aside by so many pixels, and its mask [B, F, 1, H, W]."""
    where = pose(scenes, pictures)
    moved = Pose(*(value.reshape(-1) for value in where._replace(x=where.x + aside)))
    frames, mask = paint(moved, look(scenes, pictures))
    return frames.unflatten(0, (-1, pictures)), mask.unflatten(0, (-1, pictures))[:, :, None]


def _blurred(frames_BFCHW: Tensor) -> Tensor:
    weights = torch.exp(-torch.arange(-9, 10.0).square() / (2 * BLUR**2))
    weights = weights / weights.sum()
    planes = functional.conv2d(frames_BFCHW.flatten(0, 2)[:, None], weights[None, None, None], padding=(0, 9))
    planes = functional.conv2d(planes, weights[None, None, :, None], padding=(9, 0))
    return planes[:, 0].unflatten(0, frames_BFCHW.shape[:3])


if __name__ == "__main__":
    main()
