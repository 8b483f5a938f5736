"""Exact detectors for the toy world: which attributes does a video show, and where is its subject?

Everything is arithmetic on palettes, templates and tracks that follow from what draws it; nothing is learned. What no
template explains well enough is abstained from, as -1.

Published numbers depend on every line here, so the sources are frozen by a hash:
`python -m longtake.toy.detect --freeze` writes it, and then every published number is measured again.

Shapes: B clips, F pictures of a clip, S of them that are looked at.
"""

import argparse
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources

import torch
from torch import Tensor
from torch.nn import functional as nn

from longtake.toy.landscape import PERIOD
from longtake.toy.motion import is_frozen, motion_kind, read_track
from longtake.toy.scenery import (
    ABSTAIN,
    best_times,
    falling,
    look_likelihoods,
    read_camera,
    read_landmark,
    read_setting,
)
from longtake.toy.scenes import CAMERAS, COLOURS, HEIGHT, WIDTH, Scenes
from longtake.toy.scenes import RATE as FULL_RATE
from longtake.toy.sightings import Sightings, sightings
from longtake.toy.subjects import discounted, read_subject
from longtake.toy.truth import Truth, truth

STRIDE = 2  # every second picture is looked at
RATE = FULL_RATE / STRIDE
ANCHOR = 4  # every fourth of these is read for its light and its landmark
ENDING = 8  # of these, the last ones, that decide place, time and weather: one second
FEWEST = 16  # pictures that a clip must have


@dataclass(frozen=True)
class Detections:
    """What clips show. Indices into the tuples of `scenes` are int64 [B], -1 to abstain."""

    subject: Tensor
    colour: Tensor
    place: Tensor  # place, time and weather as they are at the end
    time: Tensor
    weather: Tensor
    motion: Tensor
    camera: Tensor
    landmark: Tensor
    landmark_colour: Tensor
    count: Tensor  # int64 [B]: how many subjects are seen at once
    x: Tensor  # float [B, F]: the subject's centre in screen pixels, nan where it is not seen
    y: Tensor
    features: Tensor  # float [B, features]: soft scores and statistics, for a Fréchet distance


@torch.no_grad()
def detect(frames_BFHWC: Tensor) -> Detections:
    """Read all attributes off clips: uint8 pictures of the toy world's size and rate, 16 of them or more."""
    clips, pictures = frames_BFHWC.shape[:2]
    if pictures < FEWEST or frames_BFHWC.shape[2:] != (HEIGHT, WIDTH, 3):
        expected = f"[B, {FEWEST} or more, {HEIGHT}, {WIDTH}, 3]"
        raise ValueError(f"clips are {expected}, got {list(frames_BFHWC.shape)}")
    looked_at = frames_BFHWC[:, (pictures - 1) % STRIDE :: STRIDE].float() / 255  # the last one is among them
    steps = torch.arange(looked_at.shape[1], device=looked_at.device)
    anchors = steps.flip(0)[::ANCHOR].flip(0)

    setting = read_setting(_likelihoods(looked_at[:, -ENDING::3]), falling(looked_at[:, -ENDING:]))
    times = best_times(_likelihoods(looked_at[:, anchors]))
    landmark = read_landmark(looked_at[:, anchors], times)
    camera = read_camera(looked_at, RATE)
    nearest = (steps[:, None] - anchors).abs().argmin(1)  # the anchor of each picture
    found = sightings(looked_at.flatten(0, 1), times[:, nearest].flatten())
    found = Sightings(*(value.unflatten(0, (clips, -1)) for value in found))
    subject = read_subject(discounted(found, landmark.colour, landmark.x[:, nearest]))
    track = read_track(subject, camera.turned, RATE)
    soft = [setting.soft, landmark.score[:, None], camera.drift[:, None] / 20, subject.soft, track.numbers()]
    return Detections(
        subject=subject.kind,
        colour=subject.colour,
        place=setting.place,
        time=setting.time,
        weather=setting.weather,
        motion=motion_kind(track, is_frozen(looked_at)),
        camera=camera.kind,
        landmark=landmark.kind,
        landmark_colour=landmark.colour,
        count=subject.count,
        x=_every_picture(subject.x, pictures),
        y=_every_picture(subject.y, pictures),
        features=torch.cat([*soft, _statistics(looked_at)], 1),
    )


def _likelihoods(pictures_BSHWC: Tensor) -> Tensor:
    """The likelihood of every look in every picture: [B, S, L]."""
    return look_likelihoods(pictures_BSHWC.flatten(0, 1)).unflatten(0, pictures_BSHWC.shape[:2])


def _every_picture(value_BS: Tensor, pictures: int) -> Tensor:
    """Spread what was read off every second picture over all, in between where both neighbours are known: [B, F]."""
    between = (value_BS[:, 1:] + value_BS[:, :-1]) / 2
    spread = torch.stack([value_BS, nn.pad(between, (0, 1))], 2).flatten(1)[:, :-1]  # 2 S - 1 of them
    missing = pictures - spread.shape[1]  # one before the first that was looked at, or none
    return torch.cat([spread[:, :1].expand(-1, missing), spread], 1)


def _statistics(pictures_BSHWC: Tensor) -> Tensor:
    """Colour, edges and change of four strips of the screen, whatever they show: [B, 20]."""
    small = nn.avg_pool2d(pictures_BSHWC.movedim(-1, 2).flatten(0, 1), 2).unflatten(0, pictures_BSHWC.shape[:2])
    strips = small.unflatten(3, (4, -1))  # [B, S, 3, 4, H/8, W/2]
    colour = strips.mean((1, 4, 5)).flatten(1)
    edges = (strips[..., 1:] - strips[..., :-1]).abs().mean((1, 2, 4, 5))
    change = (strips[:, 1:] - strips[:, :-1]).abs().mean((1, 2, 4, 5))
    return torch.cat([colour, 10 * edges, 10 * change], 1)  # all of about one


# ---------------------------------------------------------------------------------------------------------------------
# What is right
# ---------------------------------------------------------------------------------------------------------------------

SEEN_SECONDS = 1.5  # for so long a subject must be in view, for a window to show its kind and colour
TRACKED_SECONDS = 1.0  # and for so long also half a second later, to show its motion
SETTLED_SECONDS = 1.0  # for so long place, time and weather must have been the same at the end
MAJORITY = 0.7  # of the pictures with the subject must agree on its colour
CLEARLY, PARTLY = 0.9, 0.1  # shares of a silhouette
TURNED, UNTURNED = 60.0, 4.0  # pixels: whether a camera that looks away does so in a window; between, nothing is right


def window_truth(scenes: Scenes, pictures: int, first: int | Tensor = 0) -> dict[str, Tensor]:
    """What a detector should say about pictures number `first` to `first + pictures` of scenes, by attribute: [B].

    -1 is what the window cannot show, and is not scored: the kind of a subject that is hidden throughout, the colour
    halfway through a change, a landmark out of view.
    """
    true = truth(scenes, pictures, first)
    visible = true.visible > CLEARLY
    shown = visible.sum(1) >= SEEN_SECONDS * FULL_RATE
    half_second = FULL_RATE // 2
    tracked = (visible[:, half_second:] & visible[:, :-half_second]).sum(1) >= TRACKED_SECONDS * FULL_RATE
    result = {"subject": torch.where(shown, scenes.subject, ABSTAIN)}
    result["motion"] = torch.where(shown & tracked, scenes.motion, ABSTAIN)
    result["colour"] = torch.where(shown, _majority(true.colour, visible), ABSTAIN)
    for name in ("place", "time", "weather"):
        ending = getattr(true, name)[:, -round(SETTLED_SECONDS * FULL_RATE) :]
        result[name] = torch.where((ending == ending[:, -1:]).all(1), ending[:, -1], ABSTAIN)
    result["camera"] = _visible_camera(scenes, true)
    landmark_shown = (true.landmark_visible > CLEARLY).sum(1) >= SEEN_SECONDS * FULL_RATE
    for name in ("landmark", "landmark_colour"):
        result[name] = torch.where(landmark_shown, getattr(scenes, name), ABSTAIN)
    result["count"] = torch.where(shown, 1, torch.where((true.visible < PARTLY).all(1), 0, ABSTAIN))
    return result


def _majority(colour_BF: Tensor, visible_BF: Tensor) -> Tensor:
    """The colour that most pictures with the subject show, -1 where there is none: [B]."""
    votes = (nn.one_hot(colour_BF.clamp(min=0), len(COLOURS)) * (visible_BF & (colour_BF >= 0))[..., None]).sum(1)
    most, colour = votes.max(1)
    return torch.where(most >= MAJORITY * visible_BF.sum(1), colour, ABSTAIN)


def _visible_camera(scenes: Scenes, true: Truth) -> Tensor:
    """The camera's kind as far as a window shows it: one that looks away at another time is still."""
    half = PERIOD / 2
    steps = torch.remainder(true.camera_x[:, 1:] - true.camera_x[:, :-1] + half, PERIOD) - half
    way = nn.pad(steps.cumsum(1), (1, 0))
    span = way.amax(1) - way.amin(1)
    away, still = CAMERAS.index("looks away"), CAMERAS.index("still")
    seen = torch.where(span > TURNED, away, torch.where(span < UNTURNED, still, ABSTAIN))
    return torch.where(scenes.camera == away, seen, scenes.camera)


# ---------------------------------------------------------------------------------------------------------------------
# Frozen sources
# ---------------------------------------------------------------------------------------------------------------------

SOURCES = (
    "scenes.py",
    "clock.py",
    "shapes.py",
    "landscape.py",
    "poses.py",
    "palettes.py",
    "world.py",
    "truth.py",
    "captions.py",
    "templates.py",
    "scenery.py",
    "sightings.py",
    "subjects.py",
    "motion.py",
    "detect.py",
)
FROZEN = "detectors.sha256"


def detector_fingerprint() -> str:
    """A hash of all sources that decide a score: the world, its captions and the detectors."""
    folder = resources.files(__package__)
    texts = [folder.joinpath(name).read_text(encoding="utf-8") for name in SOURCES]
    return sha256("\0".join(texts).encode()).hexdigest()


def frozen_fingerprint() -> str:
    """The hash under which the published numbers were measured."""
    return resources.files(__package__).joinpath(FROZEN).read_text(encoding="utf-8").strip()


def freeze() -> None:
    """Accept the sources as they are now. Every published number must be measured again."""
    with resources.as_file(resources.files(__package__).joinpath(FROZEN)) as path:
        path.write_text(detector_fingerprint() + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare the detectors with their frozen fingerprint.")
    parser.add_argument("--freeze", action="store_true", help="write the fingerprint of the sources as they are now")
    if parser.parse_args().freeze:
        freeze()
    raise SystemExit(0 if detector_fingerprint() == frozen_fingerprint() else "the detectors are not the frozen ones")
