"""The colours of the toy world: palettes, and the look of every picture that is mixed from them.

Palettes are in RGB from 0 to 1.
Shapes: B scenes, F pictures of a scene, N = B x F pictures.
"""

from typing import Generic, NamedTuple

import torch
from torch import Tensor

from longtake.toy.clock import fade
from longtake.toy.scenes import PLACES, TIMES, WEATHERS, Scenes
from longtake.toy.shapes import FACES, PATCH_TABLE, Kind

Rgb = tuple[float, float, float]

BODY: tuple[Rgb, ...] = (  # by COLOURS
    (0.90, 0.13, 0.16),
    (1.00, 0.52, 0.05),
    (1.00, 0.88, 0.14),
    (0.16, 0.70, 0.24),
    (0.13, 0.38, 0.96),
    (0.56, 0.22, 0.80),
    (1.00, 0.53, 0.76),
    (0.97, 0.97, 0.97),
)
LANDMARK_PAINT: tuple[Rgb, ...] = ((0.86, 0.18, 0.18), (1.00, 0.88, 0.20), (0.20, 0.44, 0.92), (0.97, 0.97, 0.97))
LANDMARK_BODY: tuple[Rgb, ...] = ((0.96, 0.87, 0.72), (0.45, 0.29, 0.18), (0.68, 0.67, 0.72), (0.70, 0.55, 0.40))
LANDMARK_DETAIL: tuple[Rgb, ...] = ((0.40, 0.27, 0.22), (0.45, 0.29, 0.18), (0.27, 0.25, 0.33), (0.26, 0.19, 0.20))
INK: Rgb = (0.09, 0.08, 0.13)
LAMPLIGHT: Rgb = (1.00, 0.84, 0.42)

# What the time of day multiplies colours by. Subject and landmark share the mild one, which keeps their colours apart.
SUBJECT_LIGHT: tuple[Rgb, ...] = ((1.00, 1.00, 1.00), (1.00, 0.90, 0.84), (0.80, 0.82, 0.96))
LAND_LIGHT: tuple[Rgb, ...] = ((1.00, 1.00, 1.00), (0.86, 0.64, 0.66), (0.30, 0.36, 0.58))

SKY_TOP: tuple[Rgb, ...] = ((0.33, 0.64, 0.96), (0.33, 0.25, 0.55), (0.03, 0.05, 0.18))
SKY_LOW: tuple[Rgb, ...] = ((0.82, 0.94, 1.00), (1.00, 0.62, 0.38), (0.15, 0.20, 0.43))
ORB: tuple[Rgb, ...] = ((1.00, 0.93, 0.55), (1.00, 0.55, 0.28), (0.97, 0.96, 0.84))  # the sun, the sun, the moon
ORB_HEIGHT_RADIUS = ((24.0, 11.0), (50.0, 15.0), (25.0, 11.0))
CLOUD: tuple[Rgb, ...] = ((1.00, 1.00, 1.00), (0.62, 0.65, 0.72), (0.86, 0.88, 0.93))  # by WEATHERS
OVERCAST: tuple[Rgb, ...] = ((0.80, 0.88, 0.95), (0.58, 0.63, 0.71), (0.80, 0.84, 0.91))
OVERCAST_SHARE = ((0.0,), (0.65,), (0.60,))

SKY_TINT: tuple[Rgb, ...] = (  # by PLACES
    (1.00, 1.00, 1.00),
    (1.08, 0.97, 0.84),
    (0.94, 1.02, 1.03),
    (0.90, 1.00, 0.90),
    (0.96, 0.92, 0.98),
    (0.90, 0.97, 1.06),
)


class Land(NamedTuple, Generic[Kind]):
    """The colours of a place by day."""

    far: Kind
    middle: Kind
    ground: Kind
    rim: Kind  # the line where the ground begins: lit grass, foam, pavement
    speck: Kind  # flowers, pebbles, shells


LANDS: tuple[Land[Rgb], ...] = (  # by PLACES
    Land((0.58, 0.79, 0.68), (0.45, 0.73, 0.42), (0.58, 0.82, 0.38), (0.76, 0.92, 0.50), (1.00, 0.97, 0.72)),
    Land((0.85, 0.62, 0.46), (0.93, 0.74, 0.50), (0.97, 0.85, 0.62), (1.00, 0.93, 0.76), (0.76, 0.58, 0.42)),
    Land((0.22, 0.55, 0.82), (0.24, 0.71, 0.83), (0.97, 0.89, 0.69), (1.00, 1.00, 1.00), (0.96, 0.66, 0.58)),
    Land((0.38, 0.58, 0.50), (0.19, 0.40, 0.31), (0.36, 0.52, 0.27), (0.50, 0.66, 0.34), (0.88, 0.40, 0.32)),
    Land((0.68, 0.72, 0.84), (0.47, 0.49, 0.62), (0.38, 0.39, 0.45), (0.74, 0.74, 0.77), (0.42, 0.43, 0.49)),
    Land((0.54, 0.58, 0.73), (0.36, 0.51, 0.50), (0.61, 0.75, 0.52), (0.80, 0.88, 0.68), (0.97, 0.97, 1.00)),
)


# ---------------------------------------------------------------------------------------------------------------------
# The look of pictures
# ---------------------------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """The colours of pictures: [N, 3] each unless noted, cross-faded and lit."""

    body: Tensor
    eye: Tensor
    ink: Tensor
    patches: Tensor  # [N, MOST_PATCHES, 3]
    patch_shapes: Tensor  # [N, MOST_PATCHES, 4]: x, y and radii in the subject's own coordinates
    face: Tensor  # [N, 8], in the order of Face
    sky_top: Tensor
    sky_low: Tensor
    orb: Tensor
    orb_height_radius: Tensor  # [N, 2]
    cloud: Tensor
    land: Tensor  # [N, 5, 3], in the order of Land
    lamp: Tensor  # what shines through windows
    landmark_body: Tensor
    landmark_paint: Tensor
    landmark_detail: Tensor
    place: Tensor  # [N, len(PLACES)]: how much of each place is there; one-hot but during a fade
    time: Tensor  # [N, len(TIMES)]
    weather: Tensor  # [N, len(WEATHERS)]


def look(scenes: Scenes, pictures: int, first: int | Tensor = 0) -> Look:
    """The colours of each of the pictures from number `first` on, flattened to N."""
    mix = fade(scenes, pictures, first)

    def table(rows: object) -> Tensor:
        return torch.tensor(rows, dtype=torch.float32, device=mix.device)

    def faded(rows: object, pair: Tensor) -> Tensor:
        """Rows of a table by a pair of indices [B, 2], cross-faded: [N, ...]."""
        before, after = table(rows)[pair].unsqueeze(2).unbind(1)
        weight = mix.reshape(mix.shape + (1,) * (before.ndim - 2))
        return torch.lerp(before.expand(-1, pictures, *before.shape[2:]), after, weight).flatten(0, 1)

    def fixed(rows: object, index: Tensor) -> Tensor:
        return table(rows)[index].repeat_interleave(pictures, 0)

    place = faded(torch.eye(len(PLACES)).tolist(), scenes.place)
    time = faded(torch.eye(len(TIMES)).tolist(), scenes.time)
    weather = faded(torch.eye(len(WEATHERS)).tolist(), scenes.weather)
    light, land_light = faded(SUBJECT_LIGHT, scenes.time), faded(LAND_LIGHT, scenes.time)
    night = time[:, 2:]
    body = faded(BODY, scenes.colour)
    patches = fixed(PATCH_TABLE, scenes.subject)
    tint, strength = patches[..., 4:7], patches[..., 7:]
    sky_tint, overcast = faded(SKY_TINT, scenes.place), faded(OVERCAST, scenes.weather) * land_light
    share = faded(OVERCAST_SHARE, scenes.weather)
    land = faded(LANDS, scenes.place)
    white = table((0.0, 0.35, 0.55, 0.7, 0.0))[:, None] * weather[:, 2:, None]  # snow settles
    lamp = table(LAMPLIGHT)
    detail = fixed(LANDMARK_DETAIL, scenes.landmark) * light
    lived_in = fixed(((1.0,), (0.0,), (1.0,), (0.6,)), scenes.landmark)
    return Look(
        body=body * light,
        eye=light,
        ink=table(INK).expand_as(light),
        patches=torch.lerp(body[:, None].expand_as(tint), tint, strength) * light[:, None],
        patch_shapes=patches[..., :4],
        face=fixed(FACES, scenes.subject),
        sky_top=torch.lerp(faded(SKY_TOP, scenes.time) * sky_tint, overcast * 0.8, share),
        sky_low=torch.lerp(faded(SKY_LOW, scenes.time) * sky_tint, overcast, share),
        orb=faded(ORB, scenes.time),
        orb_height_radius=faded(ORB_HEIGHT_RADIUS, scenes.time),
        cloud=faded(CLOUD, scenes.weather) * torch.lerp(land_light, torch.ones_like(land_light), 0.15),
        land=torch.lerp(land, torch.full_like(land, 0.95), white) * land_light[:, None],
        lamp=torch.lerp(table((0.78, 0.88, 0.96)) * land_light, lamp.expand_as(land_light), (time[:, 1:2] + night)),
        landmark_body=fixed(LANDMARK_BODY, scenes.landmark) * light,
        landmark_paint=fixed(LANDMARK_PAINT, scenes.landmark_colour) * light,
        landmark_detail=torch.lerp(detail, lamp.expand_as(detail), night * lived_in),
        place=place,
        time=time,
        weather=weather,
    )
