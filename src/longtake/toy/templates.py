"""What the toy world looks like, as templates that pictures are compared with: made from its own code, none fitted.

Shapes: K subject kinds, P poses, V variants of a pose, L looks (every place at every time in every weather),
T rows and columns of a template, Y rows of a picture. Colours are RGB from 0 to 1.
"""

import math
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nn

from longtake.toy import shapes
from longtake.toy.landscape import FAR, MIDDLE, NEAR, Layer
from longtake.toy.palettes import Look, look
from longtake.toy.poses import own_coordinates, pose
from longtake.toy.scenes import HEIGHT, LANDMARKS, PLACES, SUBJECTS, TIMES, WEATHERS, sample_scenes

RING = 5.0  # pixels outside a silhouette where its colour must not go on
BODY, OUTLINE, FACE = 0.35, 0.55, 0.1  # how much each of these counts
REACH = 36  # a subject's template goes this many pixels to every side of its centre


class SubjectTemplates(NamedTuple):
    """Weights for the two maps that show a subject, each a mean over what should be 1 minus one over what should be 0.

    body: [..., T, T] weights for the map of pixels that have the subject's colour.
    ink: [..., T, T] weights for the map of dark pixels, of outline against body, and of the face.
    face: [..., T, T] weights for the same map, of pupils against the white of the eyes alone.
    """

    body: Tensor
    ink: Tensor
    face: Tensor


class Poses(NamedTuple):
    """The poses that templates are drawn in: [P] each."""

    angle: Tensor  # radians, clockwise
    stretch: Tensor
    facing: Tensor


def poses() -> Poses:
    """Upright and squashed, leaning, walking left, and every 15 degrees around."""
    upright = [(0.0, stretch, 1.0) for stretch in (0.86, 0.92, 0.98, 1.04)]
    leaning = [(angle, 1.0, facing) for angle, facing in ((-0.11, 1.0), (0.11, 1.0), (-0.05, -1.0), (0.05, -1.0))]
    around = [(2 * math.pi * step / 24, 1.0, 1.0) for step in range(1, 24)]
    return Poses(*torch.tensor(upright + leaning + around).unbind(1))


VARIANTS = torch.tensor([(0.0, 0.0), (-0.09, 0.0), (0.09, 0.0), (0.0, -0.03), (0.0, 0.03)])  # of angle and stretch


@cache
def subject_templates(pixel: int, variants: bool, device: torch.device) -> SubjectTemplates:
    """All kinds in all poses, [K, P, T, T], or with their variants, [K, P, V, T, T].

    `pixel` is the size in screen pixels of a pixel of the template, whose middle one lies on the subject's centre.
    """
    own = poses()
    if variants:
        angle, stretch = (own.angle[:, None] + VARIANTS[:, 0]), (own.stretch[:, None] + VARIANTS[:, 1])
        own = Poses(angle, stretch, own.facing[:, None].expand_as(angle))
    kinds = [_drawn(kind, own, pixel) for kind in range(len(SUBJECTS))]
    return SubjectTemplates(*(torch.stack(parts).to(device) for parts in zip(*kinds, strict=True)))


def _drawn(kind: int, own: Poses, pixel: int) -> SubjectTemplates:
    """One kind in the given poses."""
    parts = _parts(kind, own, pixel)
    outside, body, outline, pupils, eyes = (_share(_coarser(part.float(), pixel)) for part in parts)
    face = pupils - eyes
    return SubjectTemplates(BODY * (body - outside), OUTLINE * (outline - body) + FACE * face, face)


class _Parts(NamedTuple):
    """Where parts of a subject are seen: [..., pixel T, pixel T] of booleans each."""

    outside: Tensor  # close around it
    body: Tensor  # in its plain colour
    outline: Tensor  # and tyres
    pupils: Tensor
    eyes: Tensor  # the white of them


def _parts(kind: int, own: Poses, pixel: int) -> _Parts:
    """Draw one kind in the given poses, part by part."""
    x, y = _own_grid(own, pixel)
    distance = shapes.silhouette(torch.tensor(kind), x, y) * shapes.SUBJECT_RADIUS
    inside = distance < -shapes.OUTLINE
    face = shapes.Face(*shapes.FACES[kind])
    aside, down = face.eye * 0.25, face.eye * 0.1  # pupils look ahead
    eyes = _either_eye(face, x, y) < face.eye
    pupils = _either_eye(face, x - aside, y - down) < face.eye * 0.58
    around_face = (_either_eye(face, x, y) < face.eye + 0.08) | (
        torch.hypot(x - face.mouth_x, y - face.mouth_y) < face.mouth + 0.08
    )
    patches, tyres = torch.zeros_like(inside), torch.zeros_like(inside)
    for middle_x, middle_y, radius_x, radius_y, red, _, _, strength in shapes.PATCHES[kind]:
        patch = ((x - middle_x) / radius_x) ** 2 + ((y - middle_y) / radius_y) ** 2 < 1
        patches |= patch
        if strength == 1 and red < 0.2:
            tyres |= patch & inside
    return _Parts(
        outside=(distance > 0) & (distance < RING),
        body=inside & ~around_face & ~patches,
        outline=((distance < 0) & ~inside) | tyres,
        pupils=pupils,
        eyes=eyes & ~pupils,
    )


def _own_grid(own: Poses, pixel: int) -> tuple[Tensor, Tensor]:
    """Every screen pixel of a template in the subject's own coordinates: x and y [..., pixel T, pixel T]."""
    steps = 2 * (REACH // pixel) + 1
    offset = (torch.arange(steps * pixel) + 0.5) - steps * pixel / 2
    angle, stretch, facing = (value[..., None, None] for value in own)
    zero = torch.zeros_like(angle)
    somewhere = pose(sample_scenes(1, 0), 1)
    at = somewhere._replace(x=zero, y=zero, angle=angle, stretch=stretch, facing=facing)
    return own_coordinates(at, offset, offset[:, None])


def _either_eye(face: shapes.Face[float], x: Tensor, y: Tensor) -> Tensor:
    """Distance to the nearer eye's centre."""
    return torch.minimum(torch.hypot(x - face.left_x, y - face.left_y), torch.hypot(x - face.right_x, y - face.right_y))


def _coarser(mask: Tensor, pixel: int) -> Tensor:
    return nn.avg_pool2d(mask.flatten(0, -3)[:, None], pixel)[:, 0].unflatten(0, mask.shape[:-2])


def _share(mask: Tensor) -> Tensor:
    """Weights that sum to one."""
    return mask / mask.sum((-2, -1), keepdim=True)


class LandmarkTemplates(NamedTuple):
    """Weights [S, T, W'] as in SubjectTemplates for S = landmark kinds x (behind, in front), as tall as a picture."""

    paint: Tensor
    body: Tensor


@cache
def landmark_templates(pixel: int, device: torch.device) -> LandmarkTemplates:
    """Landmarks stand at fixed heights, so only where they are from left to right is open."""
    half_width = 60
    steps = 2 * (half_width // pixel) + 1
    x = (torch.arange(steps * pixel) + 0.5) - steps * pixel / 2
    y = (torch.arange(HEIGHT) + 0.5)[:, None]
    kinds = torch.arange(len(LANDMARKS)).repeat_interleave(2)[:, None, None]
    front = torch.arange(2.0).repeat(len(LANDMARKS))[:, None, None]
    parts = shapes.landmark_shape(kinds, front, x, y)
    inside = (parts.whole < -1.3) & (parts.detail > 0)
    outside = (parts.whole > 0) & (parts.whole < 8)
    paint, body = inside & (parts.paint < -1), inside & (parts.paint > 1)
    outside_share, paint_share, body_share = (
        _share(nn.avg_pool2d(mask.float()[:, None], pixel)[:, 0]) for mask in (outside, paint, body)
    )
    paint_weights = paint_share - (outside_share + body_share) / 2
    body_weights = body_share - (outside_share + paint_share) / 2
    return LandmarkTemplates(paint_weights.to(device), body_weights.to(device))


class Looks(NamedTuple):
    """What a picture's rows are made of, for every look."""

    colours: Tensor  # [L, Y, 4, 3]: sky, far, middle and near layer at that height
    shares: Tensor  # [L, Y, 4]: how much of the row they fill
    place: Tensor  # [L], indices
    time: Tensor
    weather: Tensor


@cache
def looks(rows: tuple[int, ...], device: torch.device) -> Looks:
    """The looks of all places, times and weathers, at the given rows of the screen."""
    counts = len(PLACES), len(TIMES), len(WEATHERS)
    place, time, weather = torch.cartesian_prod(*map(torch.arange, counts)).unbind(1)
    scenes = sample_scenes(len(place), 0, changes=0.0)
    pairs = {name: torch.stack([value, value], 1) for name, value in zip(_LOOK, (place, time, weather), strict=True)}
    colours = look(replace(scenes, **pairs), 1)
    y = torch.tensor(rows) + 0.5
    lines = torch.stack([_lines(layer) for layer in (FAR, MIDDLE, NEAR)], 1)[place]  # [L, 3, U]
    return Looks(
        *(value.to(device) for value in (_layer_colours(colours, lines, y), _shares(lines, y), place, time, weather))
    )


_LOOK = ("place", "time", "weather")


def _lines(layer: Layer) -> Tensor:
    """The upper edge of a layer, for every place, along its period: [places, U]."""
    u = torch.linspace(0, layer.period, 400)
    return torch.stack([line(u) for line in layer.lines])


def _shares(lines: Tensor, y: Tensor) -> Tensor:
    """How much of each row shows the sky and the three layers, which are shifted at random: [L, Y, 4]."""
    below = (lines[..., None] < y).float().mean(2)  # [L, 3, Y]: how likely the layer reaches as high as this row
    far, middle, near = below.unbind(1)
    sky = (1 - far) * (1 - middle) * (1 - near)
    return torch.stack([sky, far * (1 - middle) * (1 - near), middle * (1 - near), near], -1)


def _layer_colours(colours: Look, lines: Tensor, y: Tensor) -> Tensor:
    """The colour of the sky and of the three layers at every row: [L, Y, 4, 3]."""
    height = (y / 78).clamp(0, 1)[:, None]
    sky = torch.lerp(colours.sky_top[:, None], colours.sky_low[:, None], height)
    depth = (y - lines.mean(2, keepdim=True)) / torch.tensor([60.0, 70.0, 60.0])[:, None]
    shade = 1.06 - 0.22 * depth.clamp(0, 1)
    land = colours.land[:, :3, None] * shade[..., None]  # [L, 3, Y, 3]
    return torch.cat([sky[:, None], land], 1).transpose(1, 2)
