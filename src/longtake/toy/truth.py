"""The exact truth of every picture of the toy world: where things are, which are seen, and what they are like.

Shapes: B scenes, F pictures of a scene, N = B x F pictures, P points.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.toy.clock import fade
from longtake.toy.poses import Pose, own_coordinates, pose
from longtake.toy.scenes import HEIGHT, WIDTH, Scenes
from longtake.toy.shapes import landmark_shape, landmark_stand, silhouette


class Truth(NamedTuple):
    """What is true of every picture: [B, F] each."""

    x: Tensor  # subject centre on the screen, in pixels
    y: Tensor
    visible: Tensor  # the share of the subject's silhouette that is seen, 0..1
    angle: Tensor  # radians, clockwise on the screen
    camera_x: Tensor  # how far the landscape has scrolled to the left, in 0..PERIOD
    landmark_x: Tensor  # the landmark's middle on the screen, in pixels
    landmark_visible: Tensor  # the share of the landmark that is seen, 0..1
    colour: Tensor  # the attributes that can change, as indices; -1 while they do
    place: Tensor
    time: Tensor
    weather: Tensor


def truth(scenes: Scenes, pictures: int, first: int | Tensor = 0) -> Truth:
    """What is true of pictures number `first` to `first + pictures` of every scene."""
    where, mix = pose(scenes, pictures, first), fade(scenes, pictures, first)

    def current(pair: Tensor) -> Tensor:
        before, after = pair[:, :1], pair[:, 1:]
        return torch.where((mix <= 0) | (before == after), before, torch.where(mix >= 1, after, -1))

    return Truth(
        x=where.x,
        y=where.y,
        visible=_in_portions(_subject_visible, where),
        angle=where.angle,
        camera_x=where.camera_x,
        landmark_x=where.landmark_x,
        landmark_visible=_in_portions(_landmark_visible, where),
        colour=current(scenes.colour),
        place=current(scenes.place),
        time=current(scenes.time),
        weather=current(scenes.weather),
    )


def _in_portions(count: Callable[[Pose], Tensor], where: Pose) -> Tensor:
    """Apply `count` to a few hundred pictures at a time, so that what it allocates stays small: [B, F]."""
    portions = zip(*(torch.split(value.reshape(-1, 1), 512) for value in where), strict=True)
    return torch.cat([count(Pose(*portion)) for portion in portions]).reshape(where.x.shape)


def _points(half_width: float, top: float, bottom: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """A grid of points five pixels apart: x and y [P]."""
    x = torch.arange(-half_width, half_width + 1, 5.0, device=device)
    y = torch.arange(top, bottom + 1, 5.0, device=device)
    return x.repeat(len(y)), y.repeat_interleave(len(x))


def _on_screen(x: Tensor, y: Tensor) -> Tensor:
    return (x >= 0) & (x < WIDTH) & (y >= 0) & (y < HEIGHT)


def _share_of(part: Tensor, whole: Tensor) -> Tensor:
    return (part & whole).float().sum(-1) / whole.float().sum(-1).clamp(min=1)


def _is_subject(at: Pose, x: Tensor, y: Tensor) -> Tensor:
    return silhouette(at.subject, *own_coordinates(at, x, y)) < 0


def _subject_visible(at: Pose) -> Tensor:
    """Count, among points on the silhouette, those on the screen and not behind a landmark. Fields [N, 1]; [N]."""
    dx, dy = _points(32.5, -32.5, 32.5, at.x.device)
    x, y = at.x + dx, at.y + dy
    landmark = landmark_shape(at.landmark, at.landmark_front, x - at.landmark_x, y).whole < 0
    seen = _on_screen(x, y) & ~(landmark & (at.landmark_front > 0))
    return _share_of(seen, _is_subject(at, x, y))


def _landmark_visible(at: Pose) -> Tensor:
    """Count, among points on the landmark, those on the screen and not behind the subject. Fields [N, 1]; [N]."""
    own_x, own_y = _points(32.5, -68.0, -3.0, at.x.device)
    base, scale = landmark_stand(at.landmark_front)
    dx, y = own_x * scale, base + own_y * scale
    whole = landmark_shape(at.landmark, at.landmark_front, dx, y).whole < 0
    subject = _is_subject(at, at.landmark_x + dx, y) & (at.landmark_front <= 0)
    return _share_of(_on_screen(at.landmark_x + dx, y) & ~subject, whole)
