"""Tells the kind of motion from a subject's track: heights, speeds, and the angles of its silhouette and face.

Shapes: B clips, S pictures of each.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nn

from longtake.toy.scenery import ABSTAIN
from longtake.toy.scenes import MOTIONS
from longtake.toy.subjects import Subject

LEAST_STEPS = 2  # pairs of pictures half a second apart
TURNING = torch.tensor([-110.0, -100, -90, -80, -70, 0, 70, 80, 90, 100, 110])  # degrees per second that are tried
LEAST_STEADY = 0.5  # of the fit of a steady turning; random angles have about 0.3
FOLDS = (1, 4, 5, 1, 1, 1, 1, 1)  # by SUBJECTS: turned by a full circle over this, the silhouette looks the same
HOP = 6.0  # pixels that a bouncing subject rises and falls, at least
AIR, FLOOR = 43.0, 70.0  # a flying subject's centre stays above the first y, a walking one's below the second
STROLL, REST = 14.0, 8.0  # pixels per second: a walk is faster than the first, standing slower than the second


class Track(NamedTuple):
    """A subject's way in numbers: [B] each, nan for what was not seen."""

    speed: Tensor  # median, in pixels per second to the right
    drift: Tensor  # from left-most to right-most, in pixels
    middle: Tensor  # of its height on the screen, as y
    rise: Tensor  # between its low and its high points, in pixels
    turning: Tensor  # degrees per second
    steady: Tensor  # how well that steady turning explains its angles, 0..1
    steps: Tensor  # how many pairs of pictures half a second apart show it

    def numbers(self) -> Tensor:
        """The track in numbers of about one, 0 for what was not seen: [B, 6]."""
        scales = (30.0, 80.0, 60.0, 30.0, 90.0, 1.0)
        numbers = torch.stack([value / scale for value, scale in zip(self[:6], scales, strict=True)], 1)
        return numbers.nan_to_num(0.0).clamp(-3, 3)


def read_track(subject: Subject, turned_BS: Tensor, rate: float) -> Track:
    """Measure a way. A camera that has turned `turned` pixels took the subject along; one that pans goes with it."""
    x = subject.x + turned_BS
    half_second = round(rate / 2)
    speed = (x[:, half_second:] - x[:, :-half_second]) * (rate / half_second)
    levels = torch.tensor([0.1, 0.5, 0.9], device=x.device)
    high, middle, low = subject.y.nanquantile(levels, 1)
    left, _, right = x.nanquantile(levels, 1)
    turning, steady = _turning(subject, rate)
    return Track(
        speed=speed.nanmedian(1).values,
        drift=right - left,
        middle=middle,
        rise=low - high,
        turning=turning,
        steady=steady,
        steps=(~speed.isnan()).sum(1),
    )


def _turning(subject: Subject, rate: float) -> tuple[Tensor, Tensor]:
    """The steady turning that explains the angles best, in degrees per second, and how well, 0..1: [B] each."""
    time = torch.arange(subject.angle.shape[1], device=subject.angle.device) / rate
    tried = TURNING.to(time.device)
    folds = torch.tensor(FOLDS, device=time.device)[subject.kind][:, None, None]
    phase = (subject.angle[:, None] - tried.deg2rad()[:, None] * time) * folds  # [B, tried, S]: constant if right
    seen = (~subject.x.isnan())[:, None]
    steady = torch.hypot((phase.cos() * seen).sum(2), (phase.sin() * seen).sum(2)) / seen.sum(2).clamp(min=1)
    best, index = steady.max(1)
    return tried[index], best


def motion_kind(track: Track, frozen_B: Tensor) -> Tensor:
    """The kind of motion that a track shows, [B]; what is nan fulfils no condition."""
    bounces, walks_left, walks_right, flies, spins, stands = range(len(MOTIONS))
    sure = track.steady > LEAST_STEADY
    upright, turning = sure & (track.turning == 0), sure & (track.turning != 0)
    low, high, level = track.middle > FLOOR, track.middle < AIR, track.rise < 2 * HOP
    between = ~high & ~low
    motion = torch.full_like(track.steps, ABSTAIN)
    motion = torch.where(upright & low & level & (track.speed.abs() < REST), stands, motion)
    motion = torch.where(low & level & (track.speed < -STROLL), walks_left, motion)
    motion = torch.where(low & level & (track.speed > STROLL), walks_right, motion)
    motion = torch.where(high & (track.drift > HOP), flies, motion)
    motion = torch.where(between & (track.rise >= HOP), bounces, motion)
    spinning = turning & between & level & (track.speed.abs() < STROLL)
    motion = torch.where(spinning, spins, motion)
    return torch.where(frozen_B | (track.steps < LEAST_STEPS), ABSTAIN, motion)


STIRRED = 0.03  # a change of brightness that is more than noise
LEAST_STIR = 0.002  # the share of a picture that breathing, blinking, clouds or weather change in a second or two


def is_frozen(pictures_BSHWC: Tensor) -> Tensor:
    """Whether nothing at all moves in clips: [B]. Means of four pictures and of four by four pixels remove noise."""
    brightness = pictures_BSHWC.mean(-1)
    calm = brightness[:, : brightness.shape[1] // 4 * 4].unflatten(1, (-1, 4)).mean(2)
    calm = nn.avg_pool2d(calm, 4)
    return ((calm - calm[:, :1]).abs() > STIRRED).float().mean((2, 3)).amax(1) < LEAST_STIR
