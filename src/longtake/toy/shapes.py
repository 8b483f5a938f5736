"""The shapes of the toy world: signed distances to subjects and landmarks, and what is drawn on subjects.

A signed distance is negative inside, and of slope one near the edge. A subject has its own coordinates: y down, feet
near y = 1, facing right. All tensors broadcast.
"""

import math
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Kind = TypeVar("Kind")  # what a row of a table holds: plain numbers when written down, tensors once gathered

SUBJECT_RADIUS = 23.0  # pixels to one unit of a subject's own coordinates; most subjects reach from -1 to 1
OUTLINE = 2.0  # width in pixels of the dark line inside a silhouette's edge


def disc(x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    return torch.sqrt(x * x + y * y + 1e-9) - radius


def ellipse(x: Tensor, y: Tensor, rx: Tensor | float, ry: Tensor | float) -> Tensor:
    """First-order distance: exact on the edge, which is all that drawing needs."""
    inner = torch.sqrt((x / rx) ** 2 + (y / ry) ** 2 + 1e-6)
    slope = torch.sqrt((x / (rx * rx)) ** 2 + (y / (ry * ry)) ** 2 + 1e-6)
    return inner * (inner - 1) / slope


def box(x: Tensor, y: Tensor, half_width: float, half_height: float, corner: float = 0.0) -> Tensor:
    dx, dy = x.abs() - half_width + corner, y.abs() - half_height + corner
    outside = torch.sqrt(dx.clamp(min=0) ** 2 + dy.clamp(min=0) ** 2 + 1e-9)
    return outside + torch.maximum(dx, dy).clamp(max=0) - corner


def peak(x: Tensor, y: Tensor, apex: float, base: float, half_width: float) -> Tensor:
    """An upright triangle with its apex at (0, apex) and its base at y = base."""
    height = base - apex
    length = math.hypot(height, half_width)
    flank = (x.abs() * height - (y - apex) * half_width) / length
    return torch.maximum(flank, y - base)


def stroke(x: Tensor, y: Tensor, begin: tuple[float, float], end: tuple[float, float], radius: float) -> Tensor:
    """A thick line with round ends."""
    dx, dy = end[0] - begin[0], end[1] - begin[1]
    px, py = x - begin[0], y - begin[1]
    along = ((px * dx + py * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return disc(px - along * dx, py - along * dy, radius)


def union(*distances: Tensor) -> Tensor:
    nearest = distances[0]
    for distance in distances[1:]:
        nearest = torch.minimum(nearest, distance)
    return nearest


# ---------------------------------------------------------------------------------------------------------------------
# Subjects, in their own coordinates
# ---------------------------------------------------------------------------------------------------------------------


def _ball(x: Tensor, y: Tensor) -> Tensor:
    return disc(x, y, 1.0)


def _cube(x: Tensor, y: Tensor) -> Tensor:
    return box(x, y - 0.05, 0.92, 0.92, 0.18)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """A five-pointed star: the plane is folded onto half a point, which is one edge."""
    cosine, sine = math.cos(math.pi / 5), math.sin(math.pi / 5)
    px, py = x.abs(), -(y - 0.06)
    for side in (1, -1):
        beyond = 2 * (side * cosine * px - sine * py).clamp(min=0)
        px, py = px - beyond * side * cosine, py + beyond * sine
    px, py = px.abs(), py - 1.05
    edge_x, edge_y = 0.52 * sine, 0.52 * cosine - 1.0
    along = ((px * edge_x + py * edge_y) / (edge_x**2 + edge_y**2)).clamp(0, 1.05)
    distance = torch.sqrt((px - along * edge_x) ** 2 + (py - along * edge_y) ** 2 + 1e-9)
    return distance * torch.sign(py * edge_x - px * edge_y) - 0.12


def _heart(x: Tensor, y: Tensor) -> Tensor:
    scale = 0.56
    px, py = x.abs() * scale, 0.56 - y * scale
    lobe = torch.sqrt((px - 0.25) ** 2 + (py - 0.75) ** 2 + 1e-9) - math.sqrt(2) / 4
    middle = (px + py).clamp(min=0) / 2
    notch, flank = px**2 + (py - 1) ** 2, (px - middle) ** 2 + (py - middle) ** 2
    point = torch.sqrt(torch.minimum(notch, flank) + 1e-9) * torch.sign(px - py)
    return torch.where(px + py > 1, lobe, point) / scale - 0.04


def _fish(x: Tensor, y: Tensor) -> Tensor:
    tail = torch.maximum(-(x + 1.3), 0.75 * y.abs() + 0.66 * (x + 0.35))
    return union(ellipse(x - 0.17, y, 1.0, 0.72), tail, ellipse(x - 0.05, y + 0.62, 0.46, 0.34))


def _duck(x: Tensor, y: Tensor) -> Tensor:
    body, head = ellipse(x + 0.12, y - 0.42, 0.95, 0.58), disc(x - 0.40, y + 0.45, 0.53)
    return union(body, head, ellipse(x - 0.98, y + 0.36, 0.38, 0.19), ellipse(x + 0.95, y - 0.05, 0.26, 0.30))


def _car(x: Tensor, y: Tensor) -> Tensor:
    wheels = disc(x.abs() - 0.70, y - 0.62, 0.38)
    return union(box(x, y - 0.26, 1.28, 0.40, 0.24), box(x + 0.08, y + 0.26, 0.80, 0.60, 0.34), wheels)


def _cat(x: Tensor, y: Tensor) -> Tensor:
    head, body = ellipse(x - 0.08, y + 0.33, 0.70, 0.56), ellipse(x, y - 0.58, 0.54, 0.46)
    ears = peak((x - 0.08).abs() - 0.43, y, -1.1, -0.4, 0.27)
    return union(head, body, ears, stroke(x, y, (-0.40, 0.80), (-0.92, 0.15), 0.14))


SILHOUETTES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (  # by SUBJECTS
    _ball,
    _cube,
    _star,
    _heart,
    _fish,
    _duck,
    _car,
    _cat,
)


def silhouette(subject: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to a subject's edge in its own coordinates, where SUBJECT_RADIUS pixels are 1. All broadcast."""
    distance = SILHOUETTES[0](x, y)
    for index, shape in enumerate(SILHOUETTES[1:], 1):
        distance = torch.where(subject == index, shape(x, y), distance)
    return distance


# ---------------------------------------------------------------------------------------------------------------------
# Landmarks
# ---------------------------------------------------------------------------------------------------------------------


class Landmark(NamedTuple):
    """Signed distances, in pixels, to the parts of a landmark."""

    whole: Tensor
    paint: Tensor  # the part that has the landmark's colour
    detail: Tensor  # doors and windows


def _house(x: Tensor, y: Tensor) -> Landmark:
    walls, roof = box(x, y + 13, 20, 13), peak(x, y, -48, -24, 27)
    chimney = box(x - 12, y + 38, 3, 7)
    door_window = union(box(x + 8, y + 7, 4.5, 8), box(x - 8, y + 13, 5, 5))
    return Landmark(union(walls, roof, chimney), roof, door_window)


def _tree(x: Tensor, y: Tensor) -> Landmark:
    crown = union(disc(x, y + 37, 17), disc(x.abs() - 12, y + 26, 13.5))
    return Landmark(union(crown, box(x, y + 9, 4, 9)), crown, torch.full_like(crown, 9.0))


def _tower(x: Tensor, y: Tensor) -> Landmark:
    shaft, roof = box(x, y + 23, 14.5, 23), peak(x, y, -70, -45, 19)
    band = box(x, y + 9, 14.5, 3)
    window = union(box(x, y + 32, 3.5, 5), box(x, y + 19, 3.5, 3.5))
    return Landmark(union(shaft, roof), union(roof, band), window)


def _tent(x: Tensor, y: Tensor) -> Landmark:
    canvas = peak(x, y, -48, 0, 33)
    fan = x / (y + 54).clamp(min=4)  # stripes run together at the top
    stripes = ((fan.abs() - 0.26).abs() - 0.11) * (y + 54).clamp(min=4)
    return Landmark(canvas, torch.maximum(stripes, canvas), peak(x, y, -26, 0, 9))


LANDMARK_SHAPES = (_house, _tree, _tower, _tent)
BEHIND_BASE, BEHIND_SCALE = 88.0, 1.0  # where a landmark behind the subject stands, and its size
FRONT_BASE, FRONT_SCALE = 113.0, 1.6


def landmark_stand(front: Tensor) -> tuple[Tensor, Tensor]:
    """The y of a landmark's foot, and its size."""
    return BEHIND_BASE + (FRONT_BASE - BEHIND_BASE) * front, BEHIND_SCALE + (FRONT_SCALE - BEHIND_SCALE) * front


def landmark_shape(kind: Tensor, front: Tensor, x: Tensor, y: Tensor) -> Landmark:
    """Distances in pixels to a landmark's parts, at x pixels from its middle and y from the top of the screen."""
    base, scale = landmark_stand(front)
    own_x, own_y = x / scale, (y - base) / scale
    parts = LANDMARK_SHAPES[0](own_x, own_y)
    for index, shape in enumerate(LANDMARK_SHAPES[1:], 1):
        new = shape(own_x, own_y)
        parts = Landmark(*(torch.where(kind == index, n, p) for n, p in zip(new, parts, strict=True)))
    return Landmark(*(part * scale for part in parts))


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn on the subjects, in their own coordinates: patches of colour, then eyes, then a mouth
# ---------------------------------------------------------------------------------------------------------------------


Patch = tuple[float, float, float, float, float, float, float, float]  # x, y, radii, RGB, and how much of it
NO_PATCH: Patch = (9.0, 9.0, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0)  # out of sight
BLUSH = (0.98, 0.45, 0.50, 0.75)
SHINE = (1.0, 1.0, 1.0, 0.55)
SHADE = (0.0, 0.0, 0.0, 0.22)
TYRE = (0.15, 0.14, 0.18, 1.0)
HUB = (0.80, 0.82, 0.86, 1.0)
GLASS = (0.70, 0.90, 1.00, 1.0)
BEAK = (1.00, 0.58, 0.10, 1.0)
NOSE = (0.85, 0.30, 0.38, 1.0)

PATCHES: tuple[tuple[Patch, ...], ...] = (  # by SUBJECTS
    ((-0.42, -0.58, 0.28, 0.17, *SHINE), (-0.42, 0.26, 0.17, 0.11, *BLUSH), (0.60, 0.26, 0.17, 0.11, *BLUSH)),
    ((0.0, -0.74, 0.74, 0.11, *SHINE), (-0.52, 0.30, 0.17, 0.11, *BLUSH), (0.60, 0.30, 0.17, 0.11, *BLUSH)),
    ((0.0, -0.66, 0.10, 0.20, *SHINE), (-0.36, 0.18, 0.13, 0.09, *BLUSH), (0.36, 0.18, 0.13, 0.09, *BLUSH)),
    ((-0.52, -0.62, 0.24, 0.15, *SHINE), (-0.50, 0.02, 0.16, 0.10, *BLUSH), (0.50, 0.02, 0.16, 0.10, *BLUSH)),
    ((-0.30, 0.16, 0.26, 0.17, *SHADE), (0.20, 0.50, 0.60, 0.18, *SHINE), (-1.05, 0.0, 0.16, 0.40, *SHADE)),
    ((1.00, -0.36, 0.36, 0.19, *BEAK), (-0.32, 0.38, 0.46, 0.27, *SHADE), (0.10, 0.84, 0.60, 0.12, *SHINE)),
    (
        (-0.70, 0.62, 0.38, 0.38, *TYRE),
        (0.70, 0.62, 0.38, 0.38, *TYRE),
        (-0.70, 0.62, 0.16, 0.16, *HUB),
        (0.70, 0.62, 0.16, 0.16, *HUB),
        (0.06, -0.34, 0.60, 0.36, *GLASS),
    ),
    (
        (-0.35, -0.74, 0.11, 0.17, *BLUSH),
        (0.51, -0.74, 0.11, 0.17, *BLUSH),
        (0.10, -0.08, 0.32, 0.19, *SHINE),
        (0.10, -0.18, 0.09, 0.06, *NOSE),
        (0.0, 0.68, 0.28, 0.24, *SHINE),
    ),
)
MOST_PATCHES = max(map(len, PATCHES))
PATCH_TABLE = [[*row, *[NO_PATCH] * (MOST_PATCHES - len(row))] for row in PATCHES]


class Face(NamedTuple, Generic[Kind]):
    """Two eyes (one, seen from the side, where both are given alike) and a mouth."""

    left_x: Kind
    left_y: Kind
    right_x: Kind
    right_y: Kind
    eye: Kind  # radius
    mouth_x: Kind
    mouth_y: Kind
    mouth: Kind  # half its width


FACES: tuple[Face[float], ...] = (  # by SUBJECTS
    Face(-0.18, -0.18, 0.38, -0.18, 0.22, 0.10, 0.22, 0.26),
    Face(-0.24, -0.16, 0.36, -0.16, 0.22, 0.06, 0.24, 0.26),
    Face(-0.21, -0.10, 0.21, -0.10, 0.18, 0.00, 0.16, 0.18),
    Face(-0.25, -0.26, 0.25, -0.26, 0.21, 0.00, 0.06, 0.22),
    Face(0.66, -0.16, 0.66, -0.16, 0.22, 0.86, 0.22, 0.15),
    Face(0.50, -0.58, 0.50, -0.58, 0.19, 0.98, -0.40, 0.12),
    Face(-0.14, -0.32, 0.38, -0.32, 0.23, 0.86, 0.22, 0.20),
    Face(-0.20, -0.38, 0.37, -0.38, 0.18, 0.10, -0.08, 0.13),
)
