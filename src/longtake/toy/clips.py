"""Clips of the toy world to learn from: rendered and encoded on the spot, in a pool that is renewed all the time."""

from dataclasses import replace
from functools import cache
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from longtake.models.codec import Codec
from longtake.toy.captions import LANDMARK_WAYS, PHRASES, VOCABULARY, caption_tokens
from longtake.toy.landscape import PERIOD
from longtake.toy.poses import Pose, pose
from longtake.toy.scenes import (
    ATTRIBUTES,
    CAMERAS,
    CLIP_PICTURES,
    HEIGHT,
    MOTIONS,
    RATE,
    SWEEP_SECONDS,
    WIDTH,
    Scenes,
    sample_scenes,
)
from longtake.toy.shapes import landmark_shape
from longtake.toy.world import Painter, Rendering, paint, render

HARDER: dict[str, dict[str, float]] = {
    "camera": {"looks away": 10.0, "pans left": 5.0, "pans right": 5.0},
    "motion": {"spins": 4.0},
}
"""What networks learn last, with the weight of scenes whose caption says it, against 1 of others."""

COLOURLESS = 0.35
"""The share of clips in which one colour stays and a caption is kept from saying it, so that memory has to be asked."""

# Of clips made for memory, in seconds: nothing is in sight before the camera first comes, for longer than a sink of
# three latent frames; then subject and landmark are, then they are not, then they are again, for the last of these.
LEAD, SHOWN, AWAY, BACK = (0.6, 1.0), (1.0, 4.0), (1.0, 6.0), 1.0

BEGINS, LINGERS = (0.5, 10.0), 1.5
"""Of `looking_soon`, in seconds: when a camera first looks away; after how long of standing level frames do not count
that show it still does, which is as far back as a student sees exactly."""

STRESS = 4.0
"""How much more a latent frame matters in which the camera moves, or is back from looking away. A subject has 1."""

RECALL, PAST = 30.0, 3
"""How much more a latent frame of a clip made for memory matters that shows again what the frame `PAST` before, the
oldest that the first of a block still sees, does not; and, as many times again, its cells that show this."""

QUICK_PAN = 20.0
"""Pixels per second at which a camera moves as fast as matters."""

FROM_THE_BEGINNING = 0.75
"""The share of shorter clips that are cut out of the beginning of a whole one."""


class LatentClips(NamedTuple):
    """A batch of B clips of F latent frames, each frame under one of its clip's two prompts.

    latents [B, F, C, H, W]; tokens [B, 2, L] of the captions before and after a change (twice the same without one);
    prompt [B, F], 0 or 1; focus [B, F, H, W], how much each latent cell matters, see `focus` and `memory_focus`.
    """

    latents_BFCHW: Tensor
    tokens_BPL: Tensor
    prompt_BF: Tensor
    focus_BFHW: Tensor


class Prompts(NamedTuple):
    """What clips would be about: tokens [B, 2, L] and prompt [B, F] as in `LatentClips`."""

    tokens_BPL: Tensor
    prompt_BF: Tensor


class ClipPool:
    """So many encoded clips; `renew` replaces the oldest, `draw` cuts training clips out of random ones.

    seed: of the scenes; processes that train together take different ones. Scenes never repeat. pictures: of a clip, 1
    more than a multiple of the codec's pictures a latent frame. memory_share: of clips made for memory, see
    `memory_scenes`, 0 to 1; they come at once, so many together as any. ValueError if clips are too short for those.
    looks_soon: whether in the others cameras that look away do so soon again, see `looking_soon`, and in all of them
    frames do not count, at a focus of -1, in which one that its caption tells to look away is `lingering`.
    """

    def __init__(
        self, codec: Codec, size: int, seed: int, device: torch.device, painter: Painter = paint, at_once: int = 16,
        *, pictures: int = CLIP_PICTURES, memory_share: float = 0.0, looks_soon: bool = False,
    ):  # fmt: skip
        if memory_share:
            _require_room(pictures / RATE)
        self._pictures, self._memory_share, self._looks_soon = pictures, memory_share, looks_soon
        self._codec, self._seed, self._device = codec, seed, device
        self._painter, self._at_once = painter, min(at_once, size)
        self._size, self._made = size, 0
        self._pool: LatentClips | None = None

    @property
    def frames(self) -> int:
        """Latent frames of a whole clip."""
        return 1 + (self._pictures - 1) // self._codec.temporal_factor

    def renew(self) -> None:
        """Render and encode a few new clips in place of the oldest."""
        size, new = self._size, self._make()
        if self._pool is None:
            self._pool = LatentClips(*(x.new_empty(size, *x.shape[1:]) for x in new))
        rows = [i % size for i in range(self._made, self._made + self._at_once)]
        for kept, few in zip(self._pool, new, strict=True):
            kept[rows] = few
        self._made += self._at_once

    def draw(self, count: int, frames: int) -> LatentClips:
        """Clips of `frames` latent frames, `FROM_THE_BEGINNING` of a whole clip or from a random moment of it.

        ValueError for more frames than clips have.
        """
        length = self.frames
        if frames > length:
            raise ValueError(f"clips have {length} latent frames: {frames} cannot be cut out of them, ask for fewer")
        latents, tokens, prompt, matters = self._filled()
        size = len(latents)
        rows = torch.randint(size, (count, 1), device=self._device)
        starts = torch.randint(length - frames + 1, (count, 1), device=self._device)
        starts = starts * (torch.rand(count, 1, device=self._device) >= FROM_THE_BEGINNING)
        taken = rows, starts + torch.arange(frames, device=self._device)
        return LatentClips(latents[taken].float(), tokens[rows[:, 0]], prompt[taken], matters[taken].float())

    def state_dict(self) -> dict[str, Any]:
        """How many clips were made: enough, for the clips follow from their numbers."""
        return {"made": self._made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the clips again that were held when so many had been made."""
        made = int(state["made"])
        self._made = max(0, made - self._size) // self._at_once * self._at_once
        while self._made < made:
            self.renew()

    def _filled(self) -> LatentClips:
        while self._pool is None or self._made < self._size:
            self.renew()
        return self._pool

    @torch.no_grad()
    def _make(self) -> LatentClips:
        seed = (self._seed << 32) + self._made
        number = self._made // self._at_once
        first: int | Tensor = 0
        for_memory = _is_one(number, self._memory_share)
        if for_memory:
            scenes, tokens_BPL, first = memory_scenes(self._at_once, seed, self._device, self._pictures / RATE)
        else:
            scenes, tokens_BPL = training_scenes(self._at_once, seed, self._device)
            scenes = looking_soon(scenes, seed) if self._looks_soon else scenes
        rendered = render(scenes, self._pictures, first, self._painter)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            latents, _ = self._codec.encode(rendered.frames_BFCHW)
        matters_BFHW = focus(scenes, rendered, first, self._codec)
        if for_memory:
            matters_BFHW = memory_focus(matters_BFHW, scenes, rendered, first, self._codec)
        if self._looks_soon:
            told_B = torch.isin(tokens_BPL[:, 0], _own_words("camera").to(self._device)).any(1)
            lingers_BF = lingering(scenes, self._pictures, first, self._codec.temporal_factor) & told_B[:, None]
            matters_BFHW = matters_BFHW.masked_fill(lingers_BF[..., None, None], -1.0)
        return LatentClips(
            latents.bfloat16(),
            tokens_BPL,
            prompt_of_frames(scenes, latents.shape[1], self._codec.temporal_factor),
            matters_BFHW.bfloat16(),
        )


def _is_one(number: int, share: float) -> bool:
    """Whether a thing of this number, from 0, is among a share of them that is spread evenly."""
    return int((number + 1) * share) > int(number * share)


def sample_prompts(
    count: int, seed: int, device: torch.device, pictures_a_frame: int, frames: int, *, looks_away: bool = True
) -> Prompts:
    """The captions of scenes that are not rendered. The same seed gives the same ones.

    frames: latent frames that they are told for, at least: those of a clip of `CLIP_PICTURES`, or more if so many.
    looks_away: whether cameras of some of them do.
    """
    scenes, tokens_BPL = training_scenes(count if looks_away else 4 * max(count, 16), seed, device)
    if not looks_away:
        others = (scenes.camera != CAMERAS.index("looks away")).nonzero()[:, 0]
        some = others[torch.randperm(len(others), generator=_own_dice(seed, "not away"))[:count].to(device)]
        scenes, tokens_BPL = scenes[some], tokens_BPL[some]
    frames = max(frames, 1 + (CLIP_PICTURES - 1) // pictures_a_frame)
    return Prompts(tokens_BPL, prompt_of_frames(scenes, frames, pictures_a_frame))


def training_scenes(count: int, seed: int, device: torch.device) -> tuple[Scenes, Tensor]:
    """Scenes with the tokens [B, 2, L] of their captions, chosen among five times as many.

    What is `HARDER` comes up more often where a caption says it and nothing changes: what captions leave open, how many
    clips have a change and what those show is as in the world. Of clips whose colour stays, the share `COLOURLESS` has
    captions that leave it out; where something else changes, half of these leave it out of the second caption only.

    seed: a whole number of any size, all of which counts.
    """
    scenes = sample_scenes(5 * count, _own_seed(seed, "scenes"))
    tokens_BPL = _caption_tokens(scenes, seed)
    weights = torch.ones(len(scenes))
    for attribute, values in HARDER.items():
        said = torch.isin(tokens_BPL[:, 0], _own_words(attribute)).any(1)
        for value, times in values.items():
            weights[said & (getattr(scenes, attribute) == ATTRIBUTES[attribute].index(value))] *= times
    changes = torch.isfinite(scenes.change_seconds)
    as_they_come, others = changes[:count].nonzero()[:, 0], (~changes).nonzero()[:, 0]
    # The first of a race of exponential clocks: drawn by weight without replacement, as few as none.
    waits = torch.empty(len(others)).exponential_(generator=_own_dice(seed, "waits")) / weights[others]
    chosen = torch.cat([as_they_come, others[waits.argsort()[: count - len(as_they_come)]]])
    return scenes[chosen].to(device), tokens_BPL[chosen].to(device)


def looking_soon(scenes: Scenes, seed: int) -> Scenes:
    """The same, but cameras that look away may begin late, and then are level for 1 to 4 seconds until they do again.

    The world's own begin within 2 seconds and are level for 4 to 10: there, one that has been level for longer never
    looks away. seed: as of `training_scenes`.
    """
    dice = _own_dice(seed, "looks soon")
    begins, shown = (
        torch.empty(len(scenes)).uniform_(*seconds, generator=dice).to(scenes.away_seconds.device)
        for seconds in (BEGINS, SHOWN)
    )
    return replace(scenes, away_start=begins, away_every=scenes.away_seconds + 2 * SWEEP_SECONDS + shown)


def _standing_subjects(scenes: Scenes, dice: torch.Generator) -> Scenes:
    """The same, but other motions for walkers, which begin their next lap where only a level camera cannot see it."""
    stays = torch.tensor([number for number, name in enumerate(MOTIONS) if not name.startswith("walks")])
    other = stays[torch.randint(len(stays), (len(scenes),), generator=dice)]
    return replace(scenes, motion=torch.where(torch.isin(scenes.motion, stays), scenes.motion, other))


def memory_scenes(count: int, seed: int, device: torch.device, seconds: float) -> tuple[Scenes, Tensor, Tensor]:
    """Scenes that only memory can show rightly, the tokens [B, 2, L] of their captions, and their first pictures [B].

    A clip of so many seconds begins while the camera is turned away, for 0.6 to 1 second, so that a sink never sees
    what comes. Subject and landmark are shown for 1 to 4 seconds, out of sight for 1 to 6 (sweeps not counted), and
    back for 1 or more. It goes on so for as long as the clip lasts. Captions say neither colour nor landmark, and
    nothing changes. seed: as of `training_scenes`. ValueError for less than 8.5 seconds, which have no room for this.
    """
    room = _require_room(seconds)
    scenes = sample_scenes(count, _own_seed(seed, "scenes for memory"), changes=0.0)
    dice = _own_dice(seed, "times")

    def between(low: float, high: Tensor | float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=dice)

    shown = between(SHOWN[0], min(SHOWN[1], room - AWAY[0]))
    away = between(AWAY[0], (room - shown).clamp(max=AWAY[1]))
    first = -((SWEEP_SECONDS + between(*LEAD)) * RATE).round().long()
    scenes = replace(
        _standing_subjects(scenes, dice),
        camera=torch.full_like(scenes.camera, CAMERAS.index("looks away")),
        away_start=-(away + 2 * SWEEP_SECONDS),  # so that the camera has come at second 0
        away_seconds=away,
        away_every=away + 2 * SWEEP_SECONDS + shown,
    )
    unsaid = {name: torch.full_like(getattr(scenes, name), -1) for name in ("colour", "landmark_colour")}
    tokens_BPL = caption_tokens(
        replace(scenes, landmark=torch.zeros_like(scenes.landmark), **unsaid), _own_seed(seed, "words")
    )
    return scenes.to(device), tokens_BPL.to(device), first.to(device)


def _require_room(seconds: float) -> float:
    """The seconds that a clip made for memory has for showing and for being away. ValueError if they are too few."""
    others = LEAD[1] + 3 * SWEEP_SECONDS + BACK
    if seconds < others + SHOWN[0] + AWAY[0]:
        raise ValueError(
            f"clips made for memory last {others + SHOWN[0] + AWAY[0]:g} seconds or longer, not {seconds:.2f}: "
            "take more frames"
        )
    return seconds - others


def _own_seed(seed: int, what: str) -> int:
    """For one of the things that a seed decides, lest its draws be those of another. All of the seed counts: torch's
    generators on the host look at no more than 32 bits."""
    return Random(f"{seed} {what}").getrandbits(32)


def _own_dice(seed: int, what: str) -> torch.Generator:
    return torch.Generator().manual_seed(_own_seed(seed, what))


def _caption_tokens(scenes: Scenes, seed: int) -> Tensor:
    """The captions of `caption_tokens`, [B, 2, L], but for the colours that they are kept from saying."""
    words = _own_seed(seed, "words")
    saying = caption_tokens(scenes, words)
    # A colour of -1 is not said; all else is said in the same words, for the dice are the same.
    leaving_out = caption_tokens(replace(scenes, colour=torch.full_like(scenes.colour, -1)), words)
    draw = torch.rand(len(scenes), generator=_own_dice(seed, "colour"))
    second = (scenes.colour[:, 0] == scenes.colour[:, 1]) & (draw < COLOURLESS)
    first = second & (torch.isinf(scenes.change_seconds) | (draw < COLOURLESS / 2))
    return torch.where(torch.stack([first, second], 1)[:, :, None], leaving_out, saying)


@cache
def _own_words(attribute: str) -> Tensor:
    """The tokens of words that phrases about this attribute have, and no others: a caption with one says it."""
    words = {
        name: {word for ways in values.values() for way in ways for word in way.split()}
        for name, values in PHRASES.items()
    }
    others = set().union(*(words[name] for name in words if name != attribute), *map(str.split, LANDMARK_WAYS))
    return torch.tensor(sorted(VOCABULARY.index(word) for word in words[attribute] - others))


def prompt_of_frames(scenes: Scenes, frames: int, pictures_a_frame: int) -> Tensor:
    """The prompt of each latent frame, [B, frames]: 0 before a clip's change, 1 once all its pictures come after it."""
    first_picture = (torch.arange(frames, device=scenes.subject.device) - 1) * pictures_a_frame + 1
    return (first_picture.clamp_min(0) / RATE >= scenes.change_seconds[:, None]).long()


def focus(scenes: Scenes, rendered: Rendering, first: int | Tensor, codec: Codec) -> Tensor:
    """How much more each latent cell matters than it would by itself, [B, F, H, W]: by the share of it that the subject
    covers, 0 to 1, and by up to `STRESS` in frames that show how the camera moves or what a memory has to know."""
    pictures, pace = rendered.mask_BFHW.shape[1], codec.temporal_factor
    stressed_BF = torch.maximum(moving(scenes, pictures, first, pace), returned(scenes, pictures, first, pace))
    return subject_share(rendered, codec) + STRESS * stressed_BF[:, :, None, None]


def moving(scenes: Scenes, pictures: int, first: int | Tensor, pictures_a_frame: int) -> Tensor:
    """How fast the camera moves in each latent frame, [B, F], as a share of `QUICK_PAN`, at most 1."""
    way = _turned(scenes, pictures, first).diff(dim=1)
    way = torch.remainder(way + PERIOD / 2, PERIOD) - PERIOD / 2  # the landscape comes round
    speed = RATE * way.abs().unflatten(1, (-1, pictures_a_frame)).mean(2)
    return functional.pad((speed / QUICK_PAN).clamp(max=1), (1, 0))


def returned(scenes: Scenes, pictures: int, first: int | Tensor, pictures_a_frame: int) -> Tensor:
    """1 for each latent frame, [B, F], that shows again what the clip showed before its camera looked away, else 0."""
    level = _is_level(scenes, pictures, first)
    looks_away = (scenes.camera == CAMERAS.index("looks away"))[:, None]
    left = (~level & (level.cumsum(1) > 0)).cumsum(1) > 0
    back = (level & left & looks_away).float()
    return functional.pad(back[:, 1:].unflatten(1, (-1, pictures_a_frame)).amin(2), (1, 0))


def lingering(scenes: Scenes, pictures: int, first: int | Tensor, pictures_a_frame: int) -> Tensor:
    """Whether a latent frame [B, F] shows a camera that looks away after more than `LINGERS` seconds of being level.

    To aim at the mean of what may come is never to begin what is seldom begun. Where only the frames count in which it
    has begun to turn, whatever has been level for so long is about to.
    """
    level = _is_level(scenes, pictures, first)
    number = torch.arange(1, pictures + 1, device=level.device)
    since = number - (number * ~level).cummax(1).values  # pictures in a row, this one counted
    lingers = (since > LINGERS * RATE) & (scenes.camera == CAMERAS.index("looks away"))[:, None]
    return functional.pad(lingers[:, 1:].unflatten(1, (-1, pictures_a_frame)).all(2), (1, 0))


def memory_focus(focus_BFHW: Tensor, scenes: Scenes, rendered: Rendering, first: int | Tensor, codec: Codec) -> Tensor:
    """What `focus` says of clips made for memory and, far above it, what returns into sight, subject or landmark.

    Frames before either was seen do not count, at -1: a video whose caption says that it looks away begins with what
    it looks away from, and these clips do not.
    """
    pictures = rendered.mask_BFHW.shape[1]
    shares = torch.stack([subject_share(rendered, codec), landmark_share(scenes, pictures, first, codec)])
    again = torch.stack([recalled(share) for share in shares])[..., None, None]
    seen_BF = torch.stack([shown(share) for share in shares]).amax(0).cumsum(1) > 0
    wanted_BFHW = focus_BFHW + (RECALL * again * (1 + RECALL * shares)).sum(0)
    return wanted_BFHW.where(seen_BF[..., None, None], -1.0)


def recalled(share_BFHW: Tensor) -> Tensor:
    """1 for each latent frame, [B, F], that shows again what the frame `PAST` before does not show, else 0.

    share: of each latent cell that it covers, [B, F, H, W].
    """
    shown_BF = shown(share_BFHW)
    then_BF = functional.pad(shown_BF, (PAST, 0))[:, :-PAST]
    return shown_BF * (1 - then_BF) * (then_BF.cumsum(1) > 0)


def shown(share_BFHW: Tensor) -> Tensor:
    """1 for each latent frame, [B, F], in which half a latent cell or more is covered, else 0."""
    return (share_BFHW.sum((2, 3)) > 0.5).float()


def _is_level(scenes: Scenes, pictures: int, first: int | Tensor) -> Tensor:
    """Whether the camera is less than a pixel from where it began, in each picture, [B, pictures]."""
    turned = _turned(scenes, pictures, first)
    return torch.minimum(turned, PERIOD - turned) < 1


def _turned(scenes: Scenes, pictures: int, first: int | Tensor) -> Tensor:
    """How far the camera has turned in each picture, in pixels from 0 to `PERIOD`, [B, pictures]."""
    return pose(scenes, pictures, first).camera_x


def subject_share(rendered: Rendering, codec: Codec) -> Tensor:
    """The share of each latent cell that the subject covers, [B, F, H, W]."""
    return _latent_share(rendered.mask_BFHW, codec)


def landmark_share(scenes: Scenes, pictures: int, first: int | Tensor, codec: Codec) -> Tensor:
    """The share of each latent cell that the landmark covers, [B, F, H, W], a subject before it or not."""
    at = Pose(*(value[..., None, None] for value in pose(scenes, pictures, first)))
    x = torch.arange(WIDTH, device=at.x.device) + 0.5
    y = (torch.arange(HEIGHT, device=at.x.device) + 0.5)[:, None]
    distance_BFHW = landmark_shape(at.landmark, at.landmark_front, x - at.landmark_x, y).whole
    return _latent_share((0.5 - distance_BFHW).clamp(0, 1), codec)


def _latent_share(mask_BFHW: Tensor, codec: Codec) -> Tensor:
    """A mask of pixels, averaged over each latent cell and over a latent frame's pictures: [B, F, H, W]."""
    mask = functional.avg_pool2d(mask_BFHW, codec.spatial_factor)
    rest = mask[:, 1:].unflatten(1, (-1, codec.temporal_factor)).mean(dim=2)
    return torch.cat([mask[:, :1], rest], dim=1)
