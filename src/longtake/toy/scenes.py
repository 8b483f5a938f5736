"""The scenes of the toy world: rows of attributes (a red ball, over green hills, at night...) and a few numbers.

Nothing here is drawn: a scene is only what everything else follows from. It is sampled, as training does, or made from
names.

Positions are in pixels: x to the right, y down, the centre of the first pixel at (0.5, 0.5).
Shapes: B scenes.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources

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

SWEEP_SECONDS = 1.5  # the time a camera takes to turn away, and again to turn back
NEVER = math.inf

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
    subject_x = start_x(start)
    right = subject_x < WIDTH / 2
    low = torch.where(right, subject_x + 70, torch.full_like(start, 20))
    high = torch.where(right, torch.full_like(start, WIDTH - 20), subject_x - 70)
    return torch.where(front, low + (high - low) * draw, 30 + (WIDTH - 60) * draw)


def start_x(uniform: Tensor) -> Tensor:
    """Where on the screen a subject begins, from a uniform number, in pixels."""
    return 34 + (WIDTH - 68) * uniform


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


def _index(attribute: str, word: str) -> int:
    if attribute not in ATTRIBUTES:
        raise ValueError(f"a scene has no {attribute!r}; it has {', '.join(ATTRIBUTES)}")
    if word not in ATTRIBUTES[attribute]:
        raise ValueError(f"{attribute} is one of {', '.join(ATTRIBUTES[attribute])}, not {word!r}")
    return ATTRIBUTES[attribute].index(word)
