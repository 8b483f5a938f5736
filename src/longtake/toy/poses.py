"""The poses of the toy world: where everything is in every picture, from a scene and the time alone.

Nothing is stored between pictures, so any picture of any scene can be posed first, today or ten hours in.

Positions are in pixels: x to the right, y down, the centre of the first pixel at (0.5, 0.5).
Shapes: B scenes, F pictures of a scene, N = B x F pictures.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.toy.clock import cycle, picture_seconds, sine, smooth
from longtake.toy.landscape import FAR, MIDDLE, NEAR, PERIOD
from longtake.toy.scenes import CAMERAS, MOTIONS, SWEEP_SECONDS, WIDTH, Scenes, start_x
from longtake.toy.shapes import SUBJECT_RADIUS

GROUND = 99.0  # the y on which subjects stand
STANDING = GROUND - SUBJECT_RADIUS  # the y of the centre of a subject on the ground

WALK_SPAN = 276.0  # pixels after which a walker is where it was: the screen, and a short absence beyond each edge
GLANCE = 264.0  # pixels the camera turns to look away: subject and landmark are both out of view there

RAIN_SPEED, RAIN_PERIOD = 150.0, 36.0  # pixels per second; pixels from one drop to the next below it
SNOW_SPEED, SNOW_PERIOD = 24.0, 176.0


class Pose(NamedTuple):
    """The geometry of pictures, one number per picture: [B, F], or [N] once flattened."""

    subject: Tensor  # index into SUBJECTS
    x: Tensor  # subject centre on the screen, in pixels
    y: Tensor
    angle: Tensor  # radians, clockwise on the screen, in -pi..pi
    stretch: Tensor  # its height is multiplied by this and its width divided by it
    facing: Tensor  # 1 to the right, -1 to the left
    blink: Tensor  # 0 open eyes, 1 closed
    camera_x: Tensor  # how far the landscape has scrolled to the left, in 0..PERIOD
    landmark: Tensor  # index into LANDMARKS
    landmark_x: Tensor  # its middle on the screen, in pixels
    landmark_front: Tensor  # 1 before the subject, 0 behind it
    far: Tensor  # shift of each layer of the landscape, in pixels
    middle: Tensor
    near: Tensor
    cloud: Tensor  # drift of the clouds, in cycles
    sun_x: Tensor
    swell: Tensor  # phase of waves on the sea, in cycles
    fall: Tensor  # phase of falling rain, in cycles
    drift: Tensor  # phase of falling snow, in cycles


def _glance(scenes: Scenes, seconds: Tensor) -> Tensor:
    """How far a camera that looks away has turned, in pixels."""
    since = (seconds - scenes.away_start[:, None]).clamp(min=0)
    since = torch.remainder(since, scenes.away_every[:, None].double())
    back = SWEEP_SECONDS + scenes.away_seconds[:, None]
    turned = smooth(since / SWEEP_SECONDS) - smooth((since - back) / SWEEP_SECONDS)
    side = torch.where(scenes.uniform("turn") < 0.5, -1.0, 1.0)
    looks_away = (scenes.camera == CAMERAS.index("looks away"))[:, None]
    return GLANCE * side * turned * looks_away


def _pan(scenes: Scenes, seconds: Tensor) -> Tensor:
    """How far a panning camera has gone, in pixels."""
    right, left = (scenes.camera == CAMERAS.index(name) for name in ("pans right", "pans left"))
    return (right.long() - left.long())[:, None] * scenes.uniform("pan", 13, 22) * seconds


class _Path(NamedTuple):
    """A subject's own movement, before the camera's: [B, F] each."""

    x: Tensor
    y: Tensor
    angle: Tensor
    stretch: Tensor


def _bounce(scenes: Scenes, seconds: Tensor) -> _Path:
    leap = cycle(seconds, scenes.uniform("tempo", 0.9, 1.2), scenes.uniform("phase"))
    height = 4 * leap * (1 - leap)
    start = start_x(scenes.uniform("start"))
    inwards = torch.where(start < WIDTH / 2, 1.0, -1.0)
    there_and_back = (1 - torch.cos(2 * math.pi * cycle(seconds, scenes.uniform("tempo", 12, 9)))) / 2
    x = start + inwards * scenes.uniform("reach", 20, 125) * there_and_back
    stretch = 0.84 + 0.22 * smooth(height / 0.45) - 0.06 * smooth((height - 0.5) / 0.5)
    return _Path(x, STANDING - 32 * height, torch.zeros_like(x), stretch)


def _walk(scenes: Scenes, seconds: Tensor, direction: int) -> _Path:
    begin = start_x(scenes.uniform("start")) + WALK_SPAN / 2 - WIDTH / 2
    lap = cycle(seconds, direction * WALK_SPAN / scenes.uniform("tempo", 24, 36), begin / WALK_SPAN)
    x = WALK_SPAN * lap - WALK_SPAN / 2 + WIDTH / 2
    step = cycle(seconds, 1.1, scenes.uniform("phase"))
    bob = sine(step).square()
    return _Path(x, STANDING - 3.5 * bob, 0.07 * sine(step), torch.ones_like(x))


def _fly(scenes: Scenes, seconds: Tensor) -> _Path:
    loop = cycle(seconds, scenes.uniform("tempo", 9, 6.5), scenes.uniform("phase"))
    x = WIDTH / 2 + 54 * sine(loop)
    return _Path(x, 34 + 7 * sine(2 * loop), 0.12 * sine(loop + 0.25), 1 + 0.03 * sine(4 * loop))


def _spin(scenes: Scenes, seconds: Tensor) -> _Path:
    turn = cycle(seconds, scenes.uniform("tempo", 4.4, 3.6), scenes.uniform("phase"))
    x = start_x(scenes.uniform("start")) + torch.zeros_like(turn)
    return _Path(x, torch.full_like(x, STANDING - 12), 2 * math.pi * turn, torch.ones_like(x))


def _stand(scenes: Scenes, seconds: Tensor) -> _Path:
    breath = cycle(seconds, scenes.uniform("tempo", 3.5, 2.5), scenes.uniform("phase"))
    x = start_x(scenes.uniform("start")) + torch.zeros_like(breath)
    return _Path(x, torch.full_like(x, STANDING), torch.zeros_like(x), 1 + 0.025 * sine(breath))


def _path(scenes: Scenes, seconds: Tensor) -> _Path:
    """The movement each scene's motion names: all are computed, one is kept."""
    walk_left, walk_right = _walk(scenes, seconds, -1), _walk(scenes, seconds, 1)
    paths = (_bounce(scenes, seconds), walk_left, walk_right, _fly(scenes, seconds), _spin(scenes, seconds))
    chosen = _stand(scenes, seconds)
    for motion, path in enumerate(paths):
        kept = (scenes.motion == motion)[:, None]
        chosen = _Path(*(torch.where(kept, new, old) for new, old in zip(path, chosen, strict=True)))
    return chosen


def pose(scenes: Scenes, pictures: int, first: int | Tensor = 0) -> Pose:
    """Where everything is in each of the pictures from number `first` on: [B, F] each."""
    seconds = picture_seconds(scenes, pictures, first)
    path, glance = _path(scenes, seconds), _glance(scenes, seconds)
    camera = torch.remainder(_pan(scenes, seconds) + glance, PERIOD)
    # The landscape repeats, so the landmark is taken at its nearest repetition; the cut lies far out of view.
    out_of_view = (PERIOD - WIDTH) / 2
    landmark_x = torch.remainder(scenes.landmark_x[:, None] - camera + out_of_view, PERIOD) - out_of_view
    blink = cycle(seconds, 3.7, scenes.uniform("blink"))
    values = Pose(
        subject=scenes.subject[:, None],
        x=path.x - glance,
        y=path.y + SUBJECT_RADIUS * (1 - path.stretch),  # stretches from the feet
        angle=torch.remainder(path.angle + math.pi, 2 * math.pi) - math.pi,
        stretch=path.stretch,
        facing=torch.where(scenes.motion == MOTIONS.index("walks left"), -1.0, 1.0)[:, None],
        blink=smooth(1 - (blink - 0.5).abs() / 0.05),
        camera_x=camera,
        landmark=scenes.landmark[:, None],
        landmark_x=landmark_x,
        landmark_front=scenes.landmark_front[:, None].double(),
        far=FAR.period * scenes.uniform("far"),
        middle=MIDDLE.period * scenes.uniform("middle"),
        near=NEAR.period * scenes.uniform("near"),
        cloud=cycle(seconds, 90.0, scenes.uniform("cloud")),
        sun_x=scenes.uniform("sun", 30, WIDTH - 30),
        swell=cycle(seconds, 3.0, scenes.uniform("weather")),
        fall=cycle(seconds, RAIN_PERIOD / RAIN_SPEED, scenes.uniform("weather")),
        drift=cycle(seconds, SNOW_PERIOD / SNOW_SPEED, scenes.uniform("weather")),
    )
    return Pose(*((v.float() if v.is_floating_point() else v).expand_as(seconds) for v in values))


def own_coordinates(pose: Pose, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Screen pixels in the subject's own coordinates; the pose's fields broadcast against x and y."""
    dx, dy = (x - pose.x) / SUBJECT_RADIUS, (y - pose.y) / SUBJECT_RADIUS
    cos, sin = torch.cos(pose.angle), torch.sin(pose.angle)
    own_x, own_y = cos * dx + sin * dy, cos * dy - sin * dx
    return own_x * pose.stretch * pose.facing, own_y / pose.stretch
