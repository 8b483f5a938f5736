"""The toy world: endless cartoon scenes, drawn by arithmetic alone, with the exact truth of every picture.

A scene is a row of attributes (a red ball, over green hills, at night...) and a few uniform numbers. From these and
the time, `pose` says where everything is, `look` says which colour it has, and `paint` turns both into pixels. Nothing
is stored between pictures, so any picture of any scene can be drawn first, today or ten hours in.

Positions are in pixels: x to the right, y down, the centre of the first pixel at (0.5, 0.5).
Shapes: B scenes, F pictures of a scene, N = B x F pictures, C channels, H W height and width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

HEIGHT, WIDTH, RATE = 112, 192, 16
CLIP_PICTURES = 129  # the clip length that sampled events are arranged for
CLIP_SECONDS = CLIP_PICTURES / RATE

SUBJECTS = ("ball", "cube", "star", "heart", "fish", "duck", "car", "cat")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
PLACES = ("hills", "desert", "beach", "forest", "city", "mountains")
TIMES = ("day", "dusk", "night")
WEATHERS = ("clear", "rain", "snow")
MOTIONS = ("bounces", "walks left", "walks right", "flies", "spins", "stands still")
CAMERAS = ("still", "pans left", "pans right", "looks away")
LANDMARKS = ("house", "tree", "tower", "tent")
LANDMARK_COLOURS = ("red", "yellow", "blue", "white")

SUBJECT_RADIUS = 23.0  # pixels to one unit of a subject's own coordinates; most subjects reach from -1 to 1
GROUND = 99.0  # the y on which subjects stand
OUTLINE = 2.0  # width in pixels of the dark line inside a silhouette's edge

PERIOD = 480.0  # pixels after which the landscape repeats
WALK_SPAN = 276.0  # pixels after which a walker is where it was: the screen, and a short absence beyond each edge
GLANCE = 264.0  # pixels the camera turns to look away: subject and landmark are both out of view there
SWEEP_SECONDS = 1.5  # the time it takes to turn away, and again to turn back
FADE_SECONDS = 1.25  # the time a change of time, weather, colour or place takes

NEVER = math.inf

# ---------------------------------------------------------------------------------------------------------------------
# Palettes, in RGB from 0 to 1
# ---------------------------------------------------------------------------------------------------------------------

Rgb = tuple[float, float, float]
Kind = TypeVar("Kind")  # what a row of a table holds: plain numbers when written down, tensors once gathered

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
# Scenes
# ---------------------------------------------------------------------------------------------------------------------

UNIFORMS = (
    "phase",  # where in its motion the subject begins
    "tempo",  # how fast it moves
    "start",  # where on the screen it begins
    "reach",  # how far a bouncing subject drifts sideways
    "blink",
    "pan",  # how fast the camera pans
    "turn",  # to which side the camera looks away
    "far",  # how the three layers of the landscape are shifted
    "middle",
    "near",
    "cloud",
    "sun",
    "weather",
)


@dataclass(frozen=True, eq=False)
class Scenes:
    """A batch of scenes. Attributes are indices into the tuples above; pairs hold the values before and after."""

    subject: Tensor  # [B]
    colour: Tensor  # [B, 2]
    place: Tensor  # [B, 2]
    time: Tensor  # [B, 2]
    weather: Tensor  # [B, 2]
    motion: Tensor  # [B]
    camera: Tensor  # [B]
    landmark: Tensor  # [B]
    landmark_colour: Tensor  # [B]
    landmark_x: Tensor  # [B] where on the screen the landmark stands while the camera has not moved, in pixels
    landmark_front: Tensor  # [B] whether it stands before the subject (and larger) or behind it
    change_seconds: Tensor  # [B] when "before" begins to fade into "after"; infinite for never
    away_start: Tensor  # [B] when a camera that looks away begins to turn
    away_seconds: Tensor  # [B] how long it stays turned away, not counting the two sweeps
    away_every: Tensor  # [B] seconds from one turning away to the next; infinite for once
    uniforms: Tensor  # [B, len(UNIFORMS)], each in 0..1

    def __len__(self) -> int:
        return len(self.subject)

    def __getitem__(self, index: int | slice | Tensor) -> "Scenes":
        rows = slice(index, index + 1 or None) if isinstance(index, int) else index
        return Scenes(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def to(self, device: torch.device | str) -> "Scenes":
        return Scenes(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """The named uniform, stretched to low..high: [B, 1] in float64."""
        column = self.uniforms[:, UNIFORMS.index(name), None].double()
        return low + (high - low) * column


@cache
def held_out_combinations() -> frozenset[tuple[str, str, str]]:
    """The (subject, colour, place) combinations that training never shows."""
    lines = resources.files(__package__).joinpath("held_out.txt").read_text(encoding="utf-8").splitlines()
    return frozenset((subject, colour, place) for subject, colour, place in map(str.split, lines))


def _allowed(held_out: bool) -> Tensor:
    """Which combinations may be drawn, as a table of booleans [subject, colour, place]."""
    table = torch.full((len(SUBJECTS), len(COLOURS), len(PLACES)), not held_out)
    for subject, colour, place in held_out_combinations():
        table[SUBJECTS.index(subject), COLOURS.index(colour), PLACES.index(place)] = held_out
    return table


def sample_scenes(
    count: int, seed: int, *, device: torch.device | str = "cpu", held_out: bool = False, changes: float = 0.25
) -> Scenes:
    """Draw scenes as training sees them; the share `changes` of them has a prompt change inside the clip.

    With `held_out`, subject, colour and place form a held-out combination before and after; without, never.
    """
    dice = torch.Generator().manual_seed(seed)

    def integers(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=dice)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=dice)

    def weighted(*weights: float) -> Tensor:
        return torch.multinomial(torch.tensor(weights), count, replacement=True, generator=dice)

    allowed = _allowed(held_out)
    combinations = allowed.nonzero()
    subject, colour, place = combinations[integers(len(combinations))].unbind(1)
    time, weather = weighted(0.4, 0.25, 0.35), weighted(0.46, 0.27, 0.27)

    named = integers(15) + 1  # which of colour, place, time and weather the change names: any non-empty subset
    named = torch.where(between(0, 1) < changes, named, torch.zeros_like(named))
    new_colour, new_place = _recombine(allowed[subject], colour, place, named & 1 > 0, named & 2 > 0, dice)
    new_time = torch.where(named & 4 > 0, (time + 1 + integers(2)) % len(TIMES), time)
    new_weather = torch.where(named & 8 > 0, (weather + 1 + integers(2)) % len(WEATHERS), weather)
    changed = (new_colour != colour) | (new_place != place) | (new_time != time) | (new_weather != weather)

    uniforms = torch.rand(count, len(UNIFORMS), generator=dice)
    motion, camera = weighted(0.18, 0.15, 0.15, 0.15, 0.19, 0.18), weighted(0.44, 0.17, 0.17, 0.22)
    walks = (motion == MOTIONS.index("walks left")) | (motion == MOTIONS.index("walks right"))
    # A walker starts its next lap out of view of a level camera; one that is turning could see it do so.
    camera = torch.where(walks & (camera == CAMERAS.index("looks away")), CAMERAS.index("still"), camera)
    front = between(0, 1) < 0.5
    away_seconds = between(1.0, 3.0)
    scenes = Scenes(
        subject=subject,
        colour=torch.stack([colour, new_colour], 1),
        place=torch.stack([place, new_place], 1),
        time=torch.stack([time, new_time], 1),
        weather=torch.stack([weather, new_weather], 1),
        motion=motion,
        camera=camera,
        landmark=integers(len(LANDMARKS)),
        landmark_colour=integers(len(LANDMARK_COLOURS)),
        landmark_x=_landmark_place(uniforms[:, UNIFORMS.index("start")], front, between(0, 1)),
        landmark_front=front,
        change_seconds=torch.where(changed, between(1.5, CLIP_SECONDS - 2.5), torch.full((count,), NEVER)),
        away_start=between(0.5, 2.0),
        away_seconds=away_seconds,
        away_every=away_seconds + 2 * SWEEP_SECONDS + between(4.0, 10.0),
        uniforms=uniforms,
    )
    return scenes.to(device)


def _recombine(
    allowed: Tensor, colour: Tensor, place: Tensor, new_colour: Tensor, new_place: Tensor, dice: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw the colour and place after a change among the allowed [B, colour, place]; what is not new stays."""
    other_colour = torch.arange(len(COLOURS)) != colour[:, None]
    other_place = torch.arange(len(PLACES)) != place[:, None]
    wanted = (other_colour == new_colour[:, None])[:, :, None] & (other_place == new_place[:, None])[:, None, :]
    weights = (wanted & allowed).flatten(1).float()
    stay = colour * len(PLACES) + place
    weights[torch.arange(len(stay)), stay] += (weights.sum(1) == 0).float()  # no such combination: nothing changes
    choice = torch.multinomial(weights, 1, generator=dice)[:, 0]
    return choice // len(PLACES), choice % len(PLACES)


def _landmark_place(start: Tensor, front: Tensor, draw: Tensor) -> Tensor:
    """Where the landmark stands. One in front keeps clear of where the subject begins, so that is seen first."""
    subject_x = _start_x(start)
    right = subject_x < WIDTH / 2
    low = torch.where(right, subject_x + 70, torch.full_like(start, 20))
    high = torch.where(right, torch.full_like(start, WIDTH - 20), subject_x - 70)
    return torch.where(front, low + (high - low) * draw, 30 + (WIDTH - 60) * draw)


def make_scene(
    *,
    seed: int = 0,
    change_seconds: float = NEVER,
    after: dict[str, str] | None = None,
    landmark_x: float | None = None,
    landmark_front: bool | None = None,
    away_start: float | None = None,
    away_seconds: float | None = None,
    away_every: float | None = None,
    **attributes: str,
) -> Scenes:
    """One scene from names, such as make_scene(subject="cat", place="beach"); what is not said is drawn from `seed`.

    `after` names what changes at `change_seconds`: make_scene(time="day", change_seconds=4, after={"time": "night"}).
    """
    scene = sample_scenes(1, seed, changes=0.0)
    numbers = {
        "landmark_x": landmark_x,
        "landmark_front": landmark_front,
        "away_start": away_start,
        "away_seconds": away_seconds,
        "away_every": away_every,
    }
    new = {name: torch.tensor([value]) for name, value in numbers.items() if value is not None}
    for name, word in attributes.items():
        index = _index(name, word)
        new[name] = torch.tensor([[index, index]]) if name in CHANGEABLE else torch.tensor([index])
    scene = replace(scene, change_seconds=torch.tensor([float(change_seconds)]), **new)
    for name, word in (after or {}).items():
        if name not in CHANGEABLE:
            raise ValueError(f"{name} cannot change inside a scene; one of {', '.join(CHANGEABLE)} can")
        pair = torch.stack([getattr(scene, name)[:, 0], torch.tensor([_index(name, word)])], 1)
        scene = replace(scene, **{name: pair})
    return scene


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "subject": SUBJECTS,
    "colour": COLOURS,
    "place": PLACES,
    "time": TIMES,
    "weather": WEATHERS,
    "motion": MOTIONS,
    "camera": CAMERAS,
    "landmark": LANDMARKS,
    "landmark_colour": LANDMARK_COLOURS,
}
CHANGEABLE = ("colour", "place", "time", "weather")


def _index(attribute: str, word: str) -> int:
    if attribute not in ATTRIBUTES:
        raise ValueError(f"a scene has no {attribute!r}; it has {', '.join(ATTRIBUTES)}")
    if word not in ATTRIBUTES[attribute]:
        raise ValueError(f"{attribute} is one of {', '.join(ATTRIBUTES[attribute])}, not {word!r}")
    return ATTRIBUTES[attribute].index(word)


# ---------------------------------------------------------------------------------------------------------------------
# Where everything is
# ---------------------------------------------------------------------------------------------------------------------


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


def _seconds(scenes: Scenes, pictures: int, first: int | Tensor) -> Tensor:
    """The time of every picture: [B, F] in float64, which tells neighbouring pictures apart for centuries."""
    device = scenes.subject.device
    start = torch.as_tensor(first, device=device).expand(len(scenes))
    return (start[:, None] + torch.arange(pictures, device=device)).double() / RATE


def _cycles(seconds: Tensor, period: Tensor | float, offset: Tensor | float = 0.0) -> Tensor:
    """Time as a fraction of a period, in 0..1: what is periodic is computed from this, so hours cost no precision."""
    return torch.remainder(seconds / period + offset, 1.0)


def _sine(cycles: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * cycles)


def _smooth(x: Tensor) -> Tensor:
    """From 0 to 1 as x goes from 0 to 1, and level at both ends."""
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _start_x(uniform: Tensor) -> Tensor:
    return 34 + (WIDTH - 68) * uniform


def _glance(scenes: Scenes, seconds: Tensor) -> Tensor:
    """How far a camera that looks away has turned, in pixels."""
    since = (seconds - scenes.away_start[:, None]).clamp(min=0)
    since = torch.remainder(since, scenes.away_every[:, None].double())
    back = SWEEP_SECONDS + scenes.away_seconds[:, None]
    turned = _smooth(since / SWEEP_SECONDS) - _smooth((since - back) / SWEEP_SECONDS)
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


STANDING = GROUND - SUBJECT_RADIUS  # the y of the centre of a subject on the ground


def _bounce(scenes: Scenes, seconds: Tensor) -> _Path:
    leap = _cycles(seconds, scenes.uniform("tempo", 0.9, 1.2), scenes.uniform("phase"))
    height = 4 * leap * (1 - leap)
    start = _start_x(scenes.uniform("start"))
    inwards = torch.where(start < WIDTH / 2, 1.0, -1.0)
    there_and_back = (1 - torch.cos(2 * math.pi * _cycles(seconds, scenes.uniform("tempo", 12, 9)))) / 2
    x = start + inwards * scenes.uniform("reach", 20, 125) * there_and_back
    stretch = 0.84 + 0.22 * _smooth(height / 0.45) - 0.06 * _smooth((height - 0.5) / 0.5)
    return _Path(x, STANDING - 32 * height, torch.zeros_like(x), stretch)


def _walk(scenes: Scenes, seconds: Tensor, direction: int) -> _Path:
    begin = _start_x(scenes.uniform("start")) + WALK_SPAN / 2 - WIDTH / 2
    lap = _cycles(seconds, direction * WALK_SPAN / scenes.uniform("tempo", 24, 36), begin / WALK_SPAN)
    x = WALK_SPAN * lap - WALK_SPAN / 2 + WIDTH / 2
    step = _cycles(seconds, 1.1, scenes.uniform("phase"))
    bob = _sine(step).square()
    return _Path(x, STANDING - 3.5 * bob, 0.07 * _sine(step), torch.ones_like(x))


def _fly(scenes: Scenes, seconds: Tensor) -> _Path:
    loop = _cycles(seconds, scenes.uniform("tempo", 9, 6.5), scenes.uniform("phase"))
    x = WIDTH / 2 + 54 * _sine(loop)
    return _Path(x, 34 + 7 * _sine(2 * loop), 0.12 * _sine(loop + 0.25), 1 + 0.03 * _sine(4 * loop))


def _spin(scenes: Scenes, seconds: Tensor) -> _Path:
    turn = _cycles(seconds, scenes.uniform("tempo", 4.4, 3.6), scenes.uniform("phase"))
    x = _start_x(scenes.uniform("start")) + torch.zeros_like(turn)
    return _Path(x, torch.full_like(x, STANDING - 12), 2 * math.pi * turn, torch.ones_like(x))


def _stand(scenes: Scenes, seconds: Tensor) -> _Path:
    breath = _cycles(seconds, scenes.uniform("tempo", 3.5, 2.5), scenes.uniform("phase"))
    x = _start_x(scenes.uniform("start")) + torch.zeros_like(breath)
    return _Path(x, torch.full_like(x, STANDING), torch.zeros_like(x), 1 + 0.025 * _sine(breath))


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
    seconds = _seconds(scenes, pictures, first)
    path, glance = _path(scenes, seconds), _glance(scenes, seconds)
    camera = torch.remainder(_pan(scenes, seconds) + glance, PERIOD)
    # The landscape repeats, so the landmark is taken at its nearest repetition; the cut lies far out of view.
    out_of_view = (PERIOD - WIDTH) / 2
    landmark_x = torch.remainder(scenes.landmark_x[:, None] - camera + out_of_view, PERIOD) - out_of_view
    blink = _cycles(seconds, 3.7, scenes.uniform("blink"))
    values = Pose(
        subject=scenes.subject[:, None],
        x=path.x - glance,
        y=path.y + SUBJECT_RADIUS * (1 - path.stretch),  # stretches from the feet
        angle=torch.remainder(path.angle + math.pi, 2 * math.pi) - math.pi,
        stretch=path.stretch,
        facing=torch.where(scenes.motion == MOTIONS.index("walks left"), -1.0, 1.0)[:, None],
        blink=_smooth(1 - (blink - 0.5).abs() / 0.05),
        camera_x=camera,
        landmark=scenes.landmark[:, None],
        landmark_x=landmark_x,
        landmark_front=scenes.landmark_front[:, None].double(),
        far=FAR.period * scenes.uniform("far"),
        middle=MIDDLE.period * scenes.uniform("middle"),
        near=NEAR.period * scenes.uniform("near"),
        cloud=_cycles(seconds, 90.0, scenes.uniform("cloud")),
        sun_x=scenes.uniform("sun", 30, WIDTH - 30),
        swell=_cycles(seconds, 3.0, scenes.uniform("weather")),
        fall=_cycles(seconds, RAIN_PERIOD / RAIN_SPEED, scenes.uniform("weather")),
        drift=_cycles(seconds, SNOW_PERIOD / SNOW_SPEED, scenes.uniform("weather")),
    )
    return Pose(*((v.float() if v.is_floating_point() else v).expand_as(seconds) for v in values))


# ---------------------------------------------------------------------------------------------------------------------
# Which colours everything has
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


def fade(scenes: Scenes, pictures: int, first: int | Tensor = 0) -> Tensor:
    """How far each picture has gone from "before" to "after": [B, F] in 0..1."""
    seconds = _seconds(scenes, pictures, first)
    return _smooth((seconds - scenes.change_seconds[:, None]) / FADE_SECONDS).float()


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


# ---------------------------------------------------------------------------------------------------------------------
# Signed distances: negative inside, and of slope one near the edge
# ---------------------------------------------------------------------------------------------------------------------


def _disc(x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    return torch.sqrt(x * x + y * y + 1e-9) - radius


def _ellipse(x: Tensor, y: Tensor, rx: Tensor | float, ry: Tensor | float) -> Tensor:
    """First-order distance: exact on the edge, which is all that drawing needs."""
    inner = torch.sqrt((x / rx) ** 2 + (y / ry) ** 2 + 1e-6)
    slope = torch.sqrt((x / (rx * rx)) ** 2 + (y / (ry * ry)) ** 2 + 1e-6)
    return inner * (inner - 1) / slope


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float, corner: float = 0.0) -> Tensor:
    dx, dy = x.abs() - half_width + corner, y.abs() - half_height + corner
    outside = torch.sqrt(dx.clamp(min=0) ** 2 + dy.clamp(min=0) ** 2 + 1e-9)
    return outside + torch.maximum(dx, dy).clamp(max=0) - corner


def _peak(x: Tensor, y: Tensor, apex: float, base: float, half_width: float) -> Tensor:
    """An upright triangle with its apex at (0, apex) and its base at y = base."""
    height = base - apex
    length = math.hypot(height, half_width)
    flank = (x.abs() * height - (y - apex) * half_width) / length
    return torch.maximum(flank, y - base)


def _stroke(x: Tensor, y: Tensor, begin: tuple[float, float], end: tuple[float, float], radius: float) -> Tensor:
    """A thick line with round ends."""
    dx, dy = end[0] - begin[0], end[1] - begin[1]
    px, py = x - begin[0], y - begin[1]
    along = ((px * dx + py * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return _disc(px - along * dx, py - along * dy, radius)


def _union(*distances: Tensor) -> Tensor:
    nearest = distances[0]
    for distance in distances[1:]:
        nearest = torch.minimum(nearest, distance)
    return nearest


# The subjects, in their own coordinates: y down, feet near y = 1, facing right.


def _ball(x: Tensor, y: Tensor) -> Tensor:
    return _disc(x, y, 1.0)


def _cube(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y - 0.05, 0.92, 0.92, 0.18)


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
    return _union(_ellipse(x - 0.17, y, 1.0, 0.72), tail, _ellipse(x - 0.05, y + 0.62, 0.46, 0.34))


def _duck(x: Tensor, y: Tensor) -> Tensor:
    body, head = _ellipse(x + 0.12, y - 0.42, 0.95, 0.58), _disc(x - 0.40, y + 0.45, 0.53)
    return _union(body, head, _ellipse(x - 0.98, y + 0.36, 0.38, 0.19), _ellipse(x + 0.95, y - 0.05, 0.26, 0.30))


def _car(x: Tensor, y: Tensor) -> Tensor:
    wheels = _disc(x.abs() - 0.70, y - 0.62, 0.38)
    return _union(_box(x, y - 0.26, 1.28, 0.40, 0.24), _box(x + 0.08, y + 0.26, 0.80, 0.60, 0.34), wheels)


def _cat(x: Tensor, y: Tensor) -> Tensor:
    head, body = _ellipse(x - 0.08, y + 0.33, 0.70, 0.56), _ellipse(x, y - 0.58, 0.54, 0.46)
    ears = _peak((x - 0.08).abs() - 0.43, y, -1.1, -0.4, 0.27)
    return _union(head, body, ears, _stroke(x, y, (-0.40, 0.80), (-0.92, 0.15), 0.14))


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


class Landmark(NamedTuple):
    """Signed distances, in pixels, to the parts of a landmark."""

    whole: Tensor
    paint: Tensor  # the part that has the landmark's colour
    detail: Tensor  # doors and windows


def _house(x: Tensor, y: Tensor) -> Landmark:
    walls, roof = _box(x, y + 13, 20, 13), _peak(x, y, -48, -24, 27)
    chimney = _box(x - 12, y + 38, 3, 7)
    door_window = _union(_box(x + 8, y + 7, 4.5, 8), _box(x - 8, y + 13, 5, 5))
    return Landmark(_union(walls, roof, chimney), roof, door_window)


def _tree(x: Tensor, y: Tensor) -> Landmark:
    crown = _union(_disc(x, y + 37, 17), _disc(x.abs() - 12, y + 26, 13.5))
    return Landmark(_union(crown, _box(x, y + 9, 4, 9)), crown, torch.full_like(crown, 9.0))


def _tower(x: Tensor, y: Tensor) -> Landmark:
    shaft, roof = _box(x, y + 23, 14.5, 23), _peak(x, y, -70, -45, 19)
    band = _box(x, y + 9, 14.5, 3)
    window = _union(_box(x, y + 32, 3.5, 5), _box(x, y + 19, 3.5, 3.5))
    return Landmark(_union(shaft, roof), _union(roof, band), window)


def _tent(x: Tensor, y: Tensor) -> Landmark:
    canvas = _peak(x, y, -48, 0, 33)
    fan = x / (y + 54).clamp(min=4)  # stripes run together at the top
    stripes = ((fan.abs() - 0.26).abs() - 0.11) * (y + 54).clamp(min=4)
    return Landmark(canvas, torch.maximum(stripes, canvas), _peak(x, y, -26, 0, 9))


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


def own_coordinates(pose: Pose, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Screen pixels in the subject's own coordinates; the pose's fields broadcast against x and y."""
    dx, dy = (x - pose.x) / SUBJECT_RADIUS, (y - pose.y) / SUBJECT_RADIUS
    cosine, sine = torch.cos(pose.angle), torch.sin(pose.angle)
    own_x, own_y = cosine * dx + sine * dy, cosine * dy - sine * dx
    return own_x * pose.stretch * pose.facing, own_y / pose.stretch


# What is drawn on the subjects, in their own coordinates: patches of colour, then eyes, then a mouth.

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

# ---------------------------------------------------------------------------------------------------------------------
# The landscape: three layers, each the area below a line, with the line of every place
# ---------------------------------------------------------------------------------------------------------------------


def _wave(u: Tensor, length: float, phase: float = 0.0) -> Tensor:
    return torch.sin(2 * math.pi * u / length + phase)


def _cell(u: Tensor, width: float, count: int) -> tuple[Tensor, Tensor]:
    """Cut a line into cells: the distance to the middle of each, and its own random number in 0..1."""
    number = torch.floor(u / width)
    return u - (number + 0.5) * width, _noise(torch.remainder(number, count))


def _noise(number: Tensor, other: Tensor | float = 0.0) -> Tensor:
    """A well-spread number in 0..1 for small whole numbers (interleaved gradient noise; no large factors, so the same
    on every device)."""
    return torch.frac(52.9829189 * torch.frac(0.06711056 * (number + 5.0) + 0.00583715 * (other + 3.0)))


def _roofs(u: Tensor, width: float, count: int, low: float, high: float) -> Tensor:
    """The skyline of a row of buildings, its steps softened over a pixel and a half."""
    across = u / width
    number, part = torch.floor(across), torch.frac(across)
    height, neighbour = _noise(torch.remainder(number, count)), _noise(torch.remainder(number + 1, count))
    step = ((part - 1) * width / 1.5 + 1).clamp(0, 1)
    return low + (high - low) * torch.lerp(height, neighbour, step)


def _teeth(u: Tensor, width: float, count: int, low: float, high: float, slope: float) -> Tensor:
    """A row of triangles of different heights: firs, pyramids, peaks."""
    offset, noise = _cell(u, width, count)
    return (low + (high - low) * noise - slope * offset.abs()).clamp(min=0)


def _domes(u: Tensor, width: float, count: int, radius: float) -> Tensor:
    """A row of half-discs of different sizes: bushes."""
    offset, noise = _cell(u, width, count)
    size = radius * (0.55 + 0.45 * noise)
    return torch.sqrt((size * size - offset * offset).clamp(min=1e-6))


class Layer(NamedTuple):
    """A layer of the landscape; `lines` gives, by PLACES, the y of its upper edge along u pixels."""

    period: float
    speed: float  # pixels for one pixel of the camera
    lines: tuple[Callable[[Tensor], Tensor], ...]


FAR = Layer(
    0.4 * PERIOD,
    0.4,
    (
        lambda u: 58 - 7 * _wave(u, 192) - 4 * _wave(u, 64, 1.0),
        lambda u: 72 - _teeth(u, 96, 2, 24, 38, 0.8),
        lambda u: 60 + 0 * u,
        lambda u: 70 - _teeth(u, 16, 12, 14, 34, 2.4),
        lambda u: 70 - _roofs(u, 16, 12, 10, 46),
        lambda u: 72 - torch.maximum(_teeth(u, 96, 2, 40, 58, 1.0), _teeth(u + 40, 64, 3, 22, 40, 0.9)),
    ),
)
MIDDLE = Layer(
    0.7 * PERIOD,
    0.7,
    (
        lambda u: 75 - 5 * _wave(u, 168, 0.5) - _domes(u, 48, 7, 13),
        lambda u: 84 - 13 * _wave(u, 336).abs() - 3 * _wave(u, 112, 2.0),
        lambda u: 71 + 1.3 * _wave(u, 42),
        lambda u: 86 - _teeth(u, 28, 12, 26, 46, 2.6),
        lambda u: 84 - _roofs(u, 28, 12, 12, 48),
        lambda u: 77 - 4 * _wave(u, 336) - _teeth(u, 14, 24, 4, 15, 2.2),
    ),
)
NEAR = Layer(
    PERIOD,
    1.0,
    (
        lambda u: 86 - 2.0 * _wave(u, 240),
        lambda u: 87 - 2.5 * _wave(u, 160),
        lambda u: 87 - 2.0 * _wave(u, 120),
        lambda u: 85 - 1.5 * _wave(u, 120) - 0.8 * _wave(u, 32),
        lambda u: 86 + 0 * u,
        lambda u: 86 - 2.0 * _wave(u, 160),
    ),
)


class Ridge(NamedTuple):
    """A layer as it stands in pictures, by column: [N, 1, W]."""

    u: Tensor
    line: Tensor
    softness: Tensor  # pixels over which the edge fades, along y: more where it is steep


def _ridge(layer: Layer, shift: Tensor, camera: Tensor, place: Tensor) -> Ridge:
    """The layer's line, mixed between places while they fade into each other. Inputs [N, 1, 1], place [N, PLACES]."""
    column = torch.arange(-1, WIDTH + 1, device=shift.device) + 0.5
    u = column + shift + layer.speed * camera
    line = torch.zeros_like(u)
    for index, shape in enumerate(layer.lines):
        line = line + place[:, index, None, None] * shape(u)
    slope = (line[..., 2:] - line[..., :-2]) / 2
    return Ridge(u[..., 1:-1], line[..., 1:-1], torch.sqrt(1 + slope * slope))


# ---------------------------------------------------------------------------------------------------------------------
# Painting. A picture in the making is a tuple of three planes [N, H, W], so that all of it compiles into one kernel.
# ---------------------------------------------------------------------------------------------------------------------

Planes = tuple[Tensor, Tensor, Tensor]

RAIN_SPEED, RAIN_PERIOD = 150.0, 36.0  # pixels per second; pixels from one drop to the next below it
SNOW_SPEED, SNOW_PERIOD = 24.0, 176.0


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


class Rendering(NamedTuple):
    frames_BFCHW: Tensor  # float32 in -1..1
    mask_BFHW: Tensor  # how much of each pixel shows the subject, 0..1


def render(scenes: Scenes, pictures: int, first: int | Tensor = 0) -> Rendering:
    """Draw pictures number `first` to `first + pictures` of every scene; `first` may differ between scenes, [B]."""
    shape = (len(scenes), pictures)
    where, colours = pose(scenes, pictures, first), look(scenes, pictures, first)
    flat = Pose(*(value.reshape(-1) for value in where))
    step = 8 if flat.x.device.type == "cpu" else len(flat.x)  # a few pictures at a time stay in a processor's cache
    parts = [
        paint(Pose(*(v[i : i + step] for v in flat)), Look(*(v[i : i + step] for v in colours)))
        for i in range(0, len(flat.x), step)
    ]
    frames, masks = (torch.cat(part) for part in zip(*parts, strict=True))
    return Rendering(frames.reshape(*shape, 3, HEIGHT, WIDTH), masks.reshape(*shape, HEIGHT, WIDTH))


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


def _sky(at: Pose, colours: Look, x: Tensor, y: Tensor) -> Planes:
    """A gradient, stars by night, the sun or the moon, and two rows of drifting clouds."""
    night, clear = _share(colours.time, 2), _share(colours.weather, 0)
    depth = (y / 78).clamp(0, 1)
    top, low = _planes(colours.sky_top), _planes(colours.sky_low)
    picture = (torch.lerp(top[0], low[0], depth), torch.lerp(top[1], low[1], depth), torch.lerp(top[2], low[2], depth))
    picture = _over(picture, (torch.ones_like(night),) * 3, _stars(x, y) * night * (0.2 + 0.8 * clear))

    height, radius = colours.orb_height_radius[:, :, None, None].unbind(1)
    orb = _disc(x - at.sun_x, y - height, radius)
    crescent = _cover(_disc(x - at.sun_x - 6, y - height + 3, radius - 1)) * night
    seen = 0.35 + 0.65 * clear
    picture = _over(picture, colours.orb, 0.35 * seen * (1 - orb.clamp(min=0) / 26).clamp(min=0) ** 2)
    picture = _over(picture, colours.orb, _cover(orb) * (1 - crescent) * seen)

    for base, drift, width in ((20.0, 1.0, 128.0), (38.0, 2.0, 96.0)):
        u = x + width * drift * at.cloud + 2 * at.sun_x
        puffs = torch.maximum(_domes(u, width, 1, 13), _domes(u + 14, width, 1, 9))
        puffs = torch.maximum(puffs, _domes(u - 15, width, 1, 8))
        cloud = ((y - base + puffs) / 1.5 + 0.5).clamp(0, 1) * ((base - y) / 1.5 + 0.5).clamp(0, 1)
        picture = _over(picture, colours.cloud, cloud * (puffs > 1) * 0.85)
    return picture


def _stars(x: Tensor, y: Tensor) -> Tensor:
    """Stars on a grid of cells, each somewhere inside its own; they do not move or twinkle."""
    size = 17.0
    column, row = torch.floor(x / size), torch.floor(y / size)
    noise = _noise(column, row * 7)
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

    far = _ridge(FAR, at.far, at.camera_x, colours.place)
    cover = ((y - far.line) / far.softness + 0.5).clamp(0, 1)
    picture = _over(picture, _shaded(land.far, (y - far.line) / 60), cover)
    snow_line = 40 + 4 * (torch.frac(far.u / 12) - 0.5).abs()
    picture = _over(picture, colours.land[:, 4], cover * (snow_line - y + 0.5).clamp(0, 1) * mountains)
    picture = _over(picture, colours.cloud, _sail(far.u, y) * beach)

    middle = _ridge(MIDDLE, at.middle, at.camera_x, colours.place)
    cover = ((y - middle.line) / middle.softness + 0.5).clamp(0, 1)
    picture = _over(picture, _shaded(land.middle, (y - middle.line) / 70), cover)
    picture = _over(picture, colours.lamp, _windows(middle.u, y - middle.line, y, night) * cover * city)
    picture = _over(picture, land.rim, _ripples(middle.u, y, at.swell) * cover * beach)
    picture = _over(picture, _shaded(land.middle, torch.full_like(y, 0.5)), _cactus(middle.u, y) * desert)

    near = _ridge(NEAR, at.near, at.camera_x, colours.place)
    cover = ((y - near.line) / near.softness + 0.5).clamp(0, 1)
    foam = 2.5 + (1.5 * _sine(at.swell)) * beach
    picture = _over(picture, land.rim, cover)
    picture = _over(picture, _shaded(land.ground, (y - near.line) / 60), cover * (y - near.line - foam).clamp(0, 1))
    return _over(picture, land.speck, _specks(near.u, y) * (1 - city) + _dashes(near.u, y) * city)


def _shaded(colour: Tensor, depth: Tensor) -> Planes:
    """A layer's colour, a little lighter along its upper edge than below."""
    return _times(_planes(colour), 1.06 - 0.22 * depth.clamp(0, 1))


def _sail(u: Tensor, y: Tensor) -> Tensor:
    """One sailing boat on the horizon."""
    x = torch.remainder(u, FAR.period) - FAR.period / 2
    return torch.maximum(_cover(_peak(x, y, 42, 58, 8)), _cover(_box(x, y - 61, 9, 1.5)))


def _windows(u: Tensor, below_roof: Tensor, y: Tensor, night: Tensor) -> Tensor:
    """Windows in rows: all of them pale by day, two in three lit by night."""
    column, row = torch.floor(u / 7), torch.floor(y / 8)
    dx, dy = (torch.frac(u / 7) - 0.5).abs() * 7, (torch.frac(y / 8) - 0.5).abs() * 8
    lit = (_noise(torch.remainder(column, 48), row * 5) > 0.35).float()
    glass = (2.2 - dx).clamp(0, 1) * (2.7 - dy).clamp(0, 1) * (below_roof - 4).clamp(0, 1)
    return glass * torch.lerp(0.45 * torch.ones_like(lit), 0.95 * lit, night)


def _ripples(u: Tensor, y: Tensor, swell: Tensor) -> Tensor:
    """Short bright lines on the sea, rocking sideways."""
    row = torch.floor(y / 4)
    sway = u + 3 * _sine(swell + 0.3 * row)
    line = (torch.frac(sway / 28 + 0.37 * row) - 0.5).abs() * 28
    return (5 - line).clamp(0, 1) * (1.2 - (y - 4 * row - 2).abs()).clamp(0, 1) * 0.55


def _cactus(u: Tensor, y: Tensor) -> Tensor:
    """A cactus with two arms, three times around the landscape."""
    x = torch.remainder(u, 112) - 56
    trunk = _stroke(x, y, (0, 60), (0, 92), 3.2)
    left = _union(_stroke(x, y, (-9, 66), (-9, 72), 2.2), _stroke(x, y, (-9, 73), (0, 76), 2.2))
    right = _union(_stroke(x, y, (9, 62), (9, 70), 2.2), _stroke(x, y, (9, 71), (0, 74), 2.2))
    return _cover(_union(trunk, left, right))


def _specks(u: Tensor, y: Tensor) -> Tensor:
    """Flowers or pebbles on the ground, which show that it scrolls."""
    column, row = torch.floor(u / 20), torch.floor(y / 9)
    noise = _noise(torch.remainder(column, 24), row * 11)
    dx = u - (column + 0.15 + 0.7 * noise) * 20
    dy = y - (row + 0.3 + 0.4 * torch.frac(noise * 5.1)) * 9
    return _cover(_disc(dx, dy * 1.4, 1.9)) * (y - 92).clamp(0, 1)


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
        spot = _ellipse(own_x - px, own_y - py, rx, ry) * SUBJECT_RADIUS
        picture = _over(picture, colours.patches[:, index], inside * _cover(spot))

    face = Face(*colours.face[:, :, None, None].unbind(1))
    picture = _over(picture, colours.ink, inside * _smile(face, own_x, own_y))
    for eye_x, eye_y in ((face.left_x, face.left_y), (face.right_x, face.right_y)):
        picture = _eye(picture, own_x - eye_x, own_y - eye_y, face.eye, at.blink, colours)
    return picture, mask


def _smile(face: Face[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The lower third of a circle."""
    dx, dy = x - face.mouth_x, y - face.mouth_y
    arc = _disc(dx, dy, face.mouth).abs() - 0.055
    return _cover(torch.maximum(arc, 0.35 * face.mouth - dy) * SUBJECT_RADIUS)


def _eye(picture: Planes, x: Tensor, y: Tensor, radius: Tensor, blink: Tensor, colours: Look) -> Planes:
    """A white eye with a dark rim and a pupil that looks ahead; the rim is what stays when it blinks."""
    open_y = y / (1 - 0.85 * blink)
    white = _disc(x, open_y, radius) * SUBJECT_RADIUS
    pupil = _disc(x - 0.25 * radius, open_y - 0.1 * radius, radius * 0.58) * SUBJECT_RADIUS
    glint = _disc(x - 0.45 * radius, open_y + 0.22 * radius, radius * 0.22) * SUBJECT_RADIUS
    picture = _over(picture, colours.ink, _cover(white - 1.2))
    picture = _over(picture, colours.eye, _cover(white))
    picture = _over(picture, colours.ink, _cover(pupil))
    return _over(picture, colours.eye, _cover(glint))


def _rain(picture: Planes, at: Pose, colours: Look, x: Tensor, y: Tensor) -> Planes:
    """Slanted drops, wide and slow enough that a lossy codec keeps them."""
    across = (x + 0.22 * y) / 13
    column = torch.floor(across)
    fallen = torch.frac(y / RAIN_PERIOD - at.fall + 4 + _noise(torch.remainder(column, 32)))
    drop = _box((across - column - 0.5) * 13, (fallen - 0.5) * RAIN_PERIOD, 1.1, 6.5, 1.0)
    light = torch.lerp(colours.eye, torch.ones_like(colours.eye), 0.4)
    tint = torch.stack([light[:, 0] * 0.78, light[:, 1] * 0.88, light[:, 2]], 1)
    return _over(picture, tint, _cover(drop) * 0.75 * _share(colours.weather, 1))


def _snow(picture: Planes, at: Pose, colours: Look, x: Tensor, y: Tensor) -> Planes:
    """Two sizes of soft flakes that sway as they fall."""
    cover = torch.zeros_like(y)
    for size, radius in ((22.0, 2.9), (16.0, 1.9)):
        column = torch.floor(x / size)
        own = _noise(column, size)
        down = y / size - SNOW_PERIOD / size * at.drift + 64 + own
        row = torch.floor(down)
        noise = _noise(column, torch.remainder(row, SNOW_PERIOD / size) * 13)
        sway = _sine(at.drift * 4 + noise) * 2.2
        dx = x - (column + 0.3 + 0.4 * noise) * size - sway
        dy = (down - row - 0.3 - 0.4 * torch.frac(noise * 9.7)) * size
        flake = ((radius - torch.sqrt(dx * dx + dy * dy)) / 1.6 + 0.5).clamp(0, 1)
        cover = torch.maximum(cover, flake * (torch.frac(noise * 17.3) > 0.3))
    return _over(picture, (torch.ones_like(at.x),) * 3, cover * 0.9 * _share(colours.weather, 2))


# ---------------------------------------------------------------------------------------------------------------------
# The truth
# ---------------------------------------------------------------------------------------------------------------------


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
