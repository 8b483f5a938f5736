"""The toy world: endless cartoon scenes, drawn by arithmetic alone.

From a scene and the time, `pose` says where everything is, `look` says which colour it has, and `paint` turns both into
pixels. Nothing is stored between pictures, so any picture of any scene can be drawn first, today or ten hours in.

A picture in the making is a tuple of three planes [N, H, W], so that all of it compiles into one kernel.
Positions are in pixels: x to the right, y down, the centre of the first pixel at (0.5, 0.5).
Shapes: B scenes, F pictures of a scene, N = B x F pictures, C channels, H W height and width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.toy.clock import sine
from longtake.toy.landscape import FAR, MIDDLE, NEAR, domes, noise_at, ridge
from longtake.toy.palettes import Land, Look, look
from longtake.toy.poses import GROUND, RAIN_PERIOD, SNOW_PERIOD, STANDING, Pose, own_coordinates, pose
from longtake.toy.scenes import HEIGHT, PLACES, WIDTH, Scenes
from longtake.toy.shapes import (
    MOST_PATCHES,
    OUTLINE,
    SUBJECT_RADIUS,
    Face,
    Landmark,
    box,
    disc,
    ellipse,
    landmark_shape,
    peak,
    silhouette,
    stroke,
    union,
)

Planes = tuple[Tensor, Tensor, Tensor]


class Rendering(NamedTuple):
    frames_BFCHW: Tensor  # float32 in -1..1
    mask_BFHW: Tensor  # how much of each pixel shows the subject, 0..1


def render(scenes: Scenes, pictures: int, first: int | Tensor = 0, painter: "Painter | None" = None) -> Rendering:
    """Draw pictures number `first` to `first + pictures` of every scene; `first` may differ between scenes, [B].

    painter: a compiled form of `paint`, which is used otherwise.
    """
    painter = painter or paint
    shape = (len(scenes), pictures)
    where, colours = pose(scenes, pictures, first), look(scenes, pictures, first)
    flat = Pose(*(value.reshape(-1) for value in where))
    step = 8 if flat.x.device.type == "cpu" else len(flat.x)  # a few pictures at a time stay in a processor's cache
    parts = [
        painter(Pose(*(v[i : i + step] for v in flat)), Look(*(v[i : i + step] for v in colours)))
        for i in range(0, len(flat.x), step)
    ]
    frames, masks = (torch.cat(part) for part in zip(*parts, strict=True))
    return Rendering(frames.reshape(*shape, 3, HEIGHT, WIDTH), masks.reshape(*shape, HEIGHT, WIDTH))


Painter = Callable[[Pose, Look], tuple[Tensor, Tensor]]


def paint(where: Pose, colours: Look) -> tuple[Tensor, Tensor]:
    """Pixels from geometry and colours: frames [N, 3, H, W] in -1..1 and the subject's mask [N, H, W].

    Only arithmetic on pixels, without branches: torch.compile makes one kernel of it.
    """
    at = Pose(*(value[:, None, None] for value in where))
    x = torch.arange(WIDTH, device=at.x.device) + 0.5
    y = (torch.arange(HEIGHT, device=at.x.device) + 0.5)[:, None]
    landmark = landmark_shape(at.landmark, at.landmark_front, x - at.landmark_x, y)
    hidden = _cover(landmark.whole) * at.landmark_front

    picture = _sky(at, colours, x, y)
    picture = _landscape(picture, at, colours, y)
    picture = _landmark(picture, landmark, colours, _cover(landmark.whole) * (1 - at.landmark_front))
    picture = _shadow(picture, at, x, y)
    picture, mask = _subject(picture, at, colours, x, y)
    picture = _landmark(picture, landmark, colours, hidden)
    picture = _snow(_rain(picture, at, colours, x, y), at, colours, x, y)
    frames = torch.stack(picture, 1) * 2 - 1
    return frames.clamp(-1, 1), mask * (1 - hidden)


def _share(weights: Tensor, index: int) -> Tensor:
    return weights[:, index, None, None]


def _planes(colour: Tensor) -> Planes:
    """A colour [N, 3] as three planes [N, 1, 1]."""
    red, green, blue = colour[:, :, None, None].unbind(1)
    return red, green, blue


def _over(picture: Planes, colour: Planes | Tensor, cover: Tensor) -> Planes:
    """Lay a colour over the picture where cover [N, H, W] is 1."""
    top = _planes(colour) if isinstance(colour, Tensor) else colour
    red, green, blue = (below + (above - below) * cover for below, above in zip(picture, top, strict=True))
    return red, green, blue


def _times(picture: Planes, factor: Tensor) -> Planes:
    return picture[0] * factor, picture[1] * factor, picture[2] * factor


def _cover(distance: Tensor, softness: Tensor | float = 1.0) -> Tensor:
    """A signed distance in pixels as coverage from 0 to 1."""
    return (0.5 - distance / softness).clamp(0, 1)


def _sky(at: Pose, colours: Look, x: Tensor, y: Tensor) -> Planes:
    """A gradient, stars by night, the sun or the moon, and two rows of drifting clouds."""
    night, clear = _share(colours.time, 2), _share(colours.weather, 0)
    depth = (y / 78).clamp(0, 1)
    top, low = _planes(colours.sky_top), _planes(colours.sky_low)
    picture = (torch.lerp(top[0], low[0], depth), torch.lerp(top[1], low[1], depth), torch.lerp(top[2], low[2], depth))
    picture = _over(picture, (torch.ones_like(night),) * 3, _stars(x, y) * night * (0.2 + 0.8 * clear))

    height, radius = colours.orb_height_radius[:, :, None, None].unbind(1)
    orb = disc(x - at.sun_x, y - height, radius)
    crescent = _cover(disc(x - at.sun_x - 6, y - height + 3, radius - 1)) * night
    seen = 0.35 + 0.65 * clear
    picture = _over(picture, colours.orb, 0.35 * seen * (1 - orb.clamp(min=0) / 26).clamp(min=0) ** 2)
    picture = _over(picture, colours.orb, _cover(orb) * (1 - crescent) * seen)

    for base, drift, width in ((20.0, 1.0, 128.0), (38.0, 2.0, 96.0)):
        u = x + width * drift * at.cloud + 2 * at.sun_x
        puffs = torch.maximum(domes(u, width, 1, 13), domes(u + 14, width, 1, 9))
        puffs = torch.maximum(puffs, domes(u - 15, width, 1, 8))
        cloud = ((y - base + puffs) / 1.5 + 0.5).clamp(0, 1) * ((base - y) / 1.5 + 0.5).clamp(0, 1)
        picture = _over(picture, colours.cloud, cloud * (puffs > 1) * 0.85)
    return picture


def _stars(x: Tensor, y: Tensor) -> Tensor:
    """Stars on a grid of cells, each somewhere inside its own; they do not move or twinkle."""
    size = 17.0
    column, row = torch.floor(x / size), torch.floor(y / size)
    noise = noise_at(column, row * 7)
    dx = x - (column + 0.2 + 0.6 * noise) * size
    dy = y - (row + 0.2 + 0.6 * torch.frac(noise * 7.3)) * size
    return (1.5 - torch.sqrt(dx * dx + dy * dy)).clamp(0, 1) * (0.4 + 0.6 * torch.frac(noise * 3.7))


def _landscape(picture: Planes, at: Pose, colours: Look, y: Tensor) -> Planes:
    """The three layers from back to front, each with what makes its place special."""
    desert, beach, city, mountains = (
        _share(colours.place, PLACES.index(name)) for name in ("desert", "beach", "city", "mountains")
    )
    land = Land(*colours.land.unbind(1))
    night = _share(colours.time, 2)

    far = ridge(FAR, at.far, at.camera_x, colours.place)
    cover = ((y - far.line) / far.softness + 0.5).clamp(0, 1)
    picture = _over(picture, _shaded(land.far, (y - far.line) / 60), cover)
    snow_line = 40 + 4 * (torch.frac(far.u / 12) - 0.5).abs()
    picture = _over(picture, colours.land[:, 4], cover * (snow_line - y + 0.5).clamp(0, 1) * mountains)
    picture = _over(picture, colours.cloud, _sail(far.u, y) * beach)

    middle = ridge(MIDDLE, at.middle, at.camera_x, colours.place)
    cover = ((y - middle.line) / middle.softness + 0.5).clamp(0, 1)
    picture = _over(picture, _shaded(land.middle, (y - middle.line) / 70), cover)
    picture = _over(picture, colours.lamp, _windows(middle.u, y - middle.line, y, night) * cover * city)
    picture = _over(picture, land.rim, _ripples(middle.u, y, at.swell) * cover * beach)
    picture = _over(picture, _shaded(land.middle, torch.full_like(y, 0.5)), _cactus(middle.u, y) * desert)

    near = ridge(NEAR, at.near, at.camera_x, colours.place)
    cover = ((y - near.line) / near.softness + 0.5).clamp(0, 1)
    foam = 2.5 + (1.5 * sine(at.swell)) * beach
    picture = _over(picture, land.rim, cover)
    picture = _over(picture, _shaded(land.ground, (y - near.line) / 60), cover * (y - near.line - foam).clamp(0, 1))
    return _over(picture, land.speck, _specks(near.u, y) * (1 - city) + _dashes(near.u, y) * city)


def _shaded(colour: Tensor, depth: Tensor) -> Planes:
    """A layer's colour, a little lighter along its upper edge than below."""
    return _times(_planes(colour), 1.06 - 0.22 * depth.clamp(0, 1))


def _sail(u: Tensor, y: Tensor) -> Tensor:
    """One sailing boat on the horizon."""
    x = torch.remainder(u, FAR.period) - FAR.period / 2
    return torch.maximum(_cover(peak(x, y, 42, 58, 8)), _cover(box(x, y - 61, 9, 1.5)))


def _windows(u: Tensor, below_roof: Tensor, y: Tensor, night: Tensor) -> Tensor:
    """Windows in rows: all of them pale by day, two in three lit by night."""
    column, row = torch.floor(u / 7), torch.floor(y / 8)
    dx, dy = (torch.frac(u / 7) - 0.5).abs() * 7, (torch.frac(y / 8) - 0.5).abs() * 8
    lit = (noise_at(torch.remainder(column, 48), row * 5) > 0.35).float()
    glass = (2.2 - dx).clamp(0, 1) * (2.7 - dy).clamp(0, 1) * (below_roof - 4).clamp(0, 1)
    return glass * torch.lerp(0.45 * torch.ones_like(lit), 0.95 * lit, night)


def _ripples(u: Tensor, y: Tensor, swell: Tensor) -> Tensor:
    """Short bright lines on the sea, rocking sideways."""
    row = torch.floor(y / 4)
    sway = u + 3 * sine(swell + 0.3 * row)
    line = (torch.frac(sway / 28 + 0.37 * row) - 0.5).abs() * 28
    return (5 - line).clamp(0, 1) * (1.2 - (y - 4 * row - 2).abs()).clamp(0, 1) * 0.55


def _cactus(u: Tensor, y: Tensor) -> Tensor:
    """A cactus with two arms, three times around the landscape."""
    x = torch.remainder(u, 112) - 56
    trunk = stroke(x, y, (0, 60), (0, 92), 3.2)
    left = union(stroke(x, y, (-9, 66), (-9, 72), 2.2), stroke(x, y, (-9, 73), (0, 76), 2.2))
    right = union(stroke(x, y, (9, 62), (9, 70), 2.2), stroke(x, y, (9, 71), (0, 74), 2.2))
    return _cover(union(trunk, left, right))


def _specks(u: Tensor, y: Tensor) -> Tensor:
    """Flowers or pebbles on the ground, which show that it scrolls."""
    column, row = torch.floor(u / 20), torch.floor(y / 9)
    noise = noise_at(torch.remainder(column, 24), row * 11)
    dx = u - (column + 0.15 + 0.7 * noise) * 20
    dy = y - (row + 0.3 + 0.4 * torch.frac(noise * 5.1)) * 9
    return _cover(disc(dx, dy * 1.4, 1.9)) * (y - 92).clamp(0, 1)


def _dashes(u: Tensor, y: Tensor) -> Tensor:
    """The markings along the middle of a road."""
    along = (torch.frac(u / 40) - 0.5).abs() * 40
    return (10.5 - along).clamp(0, 1) * (1.9 - (y - 106).abs()).clamp(0, 1)


def _landmark(picture: Planes, parts: Landmark, colours: Look, cover: Tensor) -> Planes:
    """A landmark with a thin outline, where `cover` says it is seen."""
    picture = _over(picture, colours.ink, cover)
    inside = cover * _cover(parts.whole + 1.3)
    picture = _over(picture, colours.landmark_body, inside)
    picture = _over(picture, colours.landmark_paint, inside * _cover(parts.paint + 0.3))
    return _over(picture, colours.landmark_detail, inside * _cover(parts.detail))


def _shadow(picture: Planes, at: Pose, x: Tensor, y: Tensor) -> Planes:
    """A soft shadow on the ground under the subject, smaller and fainter the higher it is."""
    height = ((STANDING - at.y) / 45).clamp(0, 1)
    spread = torch.sqrt(((x - at.x) / (24 - 8 * height)) ** 2 + ((y - GROUND - 0.5) / 4.5) ** 2)
    cover = (1.3 - spread).clamp(0, 1) * (0.38 - 0.22 * height)
    return _times(picture, 1 - cover)


def _subject(picture: Planes, at: Pose, colours: Look, x: Tensor, y: Tensor) -> tuple[Planes, Tensor]:
    """The subject and its mask: outline, body, patches, mouth and eyes."""
    own_x, own_y = own_coordinates(at, x, y)
    distance = silhouette(at.subject, own_x, own_y) * SUBJECT_RADIUS
    mask, inside = _cover(distance), _cover(distance + OUTLINE)
    picture = _over(picture, colours.ink, mask)
    picture = _over(picture, _times(_planes(colours.body), 1.0 - 0.10 * own_y.clamp(-1, 1)), inside)

    for index in range(MOST_PATCHES):
        px, py, rx, ry = colours.patch_shapes[:, index, :, None, None].unbind(1)
        spot = ellipse(own_x - px, own_y - py, rx, ry) * SUBJECT_RADIUS
        picture = _over(picture, colours.patches[:, index], inside * _cover(spot))

    face = Face(*colours.face[:, :, None, None].unbind(1))
    picture = _over(picture, colours.ink, inside * _smile(face, own_x, own_y))
    for eye_x, eye_y in ((face.left_x, face.left_y), (face.right_x, face.right_y)):
        picture = _eye(picture, own_x - eye_x, own_y - eye_y, face.eye, at.blink, colours)
    return picture, mask


def _smile(face: Face[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The lower third of a circle."""
    dx, dy = x - face.mouth_x, y - face.mouth_y
    arc = disc(dx, dy, face.mouth).abs() - 0.055
    return _cover(torch.maximum(arc, 0.35 * face.mouth - dy) * SUBJECT_RADIUS)


def _eye(picture: Planes, x: Tensor, y: Tensor, radius: Tensor, blink: Tensor, colours: Look) -> Planes:
    """A white eye with a dark rim and a pupil that looks ahead; the rim is what stays when it blinks."""
    open_y = y / (1 - 0.85 * blink)
    white = disc(x, open_y, radius) * SUBJECT_RADIUS
    pupil = disc(x - 0.25 * radius, open_y - 0.1 * radius, radius * 0.58) * SUBJECT_RADIUS
    glint = disc(x - 0.45 * radius, open_y + 0.22 * radius, radius * 0.22) * SUBJECT_RADIUS
    picture = _over(picture, colours.ink, _cover(white - 1.2))
    picture = _over(picture, colours.eye, _cover(white))
    picture = _over(picture, colours.ink, _cover(pupil))
    return _over(picture, colours.eye, _cover(glint))


def _rain(picture: Planes, at: Pose, colours: Look, x: Tensor, y: Tensor) -> Planes:
    """Slanted drops, wide and slow enough that a lossy codec keeps them."""
    across = (x + 0.22 * y) / 13
    column = torch.floor(across)
    fallen = torch.frac(y / RAIN_PERIOD - at.fall + 4 + noise_at(torch.remainder(column, 32)))
    drop = box((across - column - 0.5) * 13, (fallen - 0.5) * RAIN_PERIOD, 1.1, 6.5, 1.0)
    light = torch.lerp(colours.eye, torch.ones_like(colours.eye), 0.4)
    tint = torch.stack([light[:, 0] * 0.78, light[:, 1] * 0.88, light[:, 2]], 1)
    return _over(picture, tint, _cover(drop) * 0.75 * _share(colours.weather, 1))


def _snow(picture: Planes, at: Pose, colours: Look, x: Tensor, y: Tensor) -> Planes:
    """Two sizes of soft flakes that sway as they fall."""
    cover = torch.zeros_like(y)
    for size, radius in ((22.0, 2.9), (16.0, 1.9)):
        column = torch.floor(x / size)
        own = noise_at(column, size)
        down = y / size - SNOW_PERIOD / size * at.drift + 64 + own
        row = torch.floor(down)
        noise = noise_at(column, torch.remainder(row, SNOW_PERIOD / size) * 13)
        sway = sine(at.drift * 4 + noise) * 2.2
        dx = x - (column + 0.3 + 0.4 * noise) * size - sway
        dy = (down - row - 0.3 - 0.4 * torch.frac(noise * 9.7)) * size
        flake = ((radius - torch.sqrt(dx * dx + dy * dy)) / 1.6 + 0.5).clamp(0, 1)
        cover = torch.maximum(cover, flake * (torch.frac(noise * 17.3) > 0.3))
    return _over(picture, (torch.ones_like(at.x),) * 3, cover * 0.9 * _share(colours.weather, 2))
