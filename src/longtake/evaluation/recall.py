"""What a recipe remembers of what is out of sight, in the toy world: is what returns the same?

Streams go on from rendered truth: five seconds that show a subject and a landmark, then the camera turns away. The
caption says that it looks away and returns, but neither the colour nor the landmark, so only memory can know them. (It
names the kind of the subject: the captions' grammar has no other word for it.) For each gap, the five seconds are read
that begin when a camera that stays away for so long is back.

Every scene opens two streams, which differ in where they begin:

- seen later: the camera is turned away at first, and comes to the subject and the landmark after that. The first latent
  frames, which an attention sink keeps for ever, show a landscape, and the window forgets within a second, so this asks
  for memory of what came and went. It is what `after` says.
- seen first: the stream begins with both in sight, so a recipe with a sink may look there. `seen_first` says it.

Nothing but the caption makes a stream's camera stay or return. What does not return within the window is not recalled;
`returned` says how often anything did, and `stayed_away` how often nothing was in sight shortly before it was due. A
stream that comes back too early has a chance to remember what it showed then. Where the absence is given, too, that
cannot be: streams go on from truth up to the last whole block before the camera turns back.

A longer lead, minutes of landscape before the camera comes, asks how much a memory that is full still learns.

Shapes: B streams, T pictures.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice, takewhile
from random import Random
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from longtake import parallel
from longtake.evaluation.scores import Score, Tally, tables, tally
from longtake.evaluation.sources import (
    CPU,
    WINDOW_SECONDS,
    batches,
    clip_seed,
    rendered,
    seed_list,
    stacked,
    through_codec,
    windows,
)
from longtake.generation.stream import Engine
from longtake.models.codec import Codec
from longtake.toy.captions import describe
from longtake.toy.detect import detect, window_truth
from longtake.toy.scenes import (
    ATTRIBUTES,
    CAMERAS,
    MOTIONS,
    RATE,
    SWEEP_SECONDS,
    UNIFORMS,
    Scenes,
    sample_scenes,
)

Absence = Literal["streamed", "given"]
RECALLED = ("colour", "subject", "landmark")
SAID = ("subject", "motion", "place", "time", "weather", "camera")
SCENE_SEED, SCENE_COUNT = 20_003, 1500  # of the scenes that openings are chosen among, for the first seed
OPENING_COUNT = 500
SHOWN_SECONDS = 5  # from when the camera has come until it begins to turn away; time is counted from its coming
SEEN_SECONDS = 2  # in so many, all that is to be recalled is clear to see for 1.5: in the first half second too
TURNED_SECONDS = SHOWN_SECONDS + SWEEP_SECONDS  # when it has turned away; streams go on from there
SHORTEST_GAP = 2  # so that there is a whole second out of sight to look at
# Before its coming, what is seen later is out of sight for 1.5 seconds and a sweep: the sink is the first half second.
LEAD = 3  # the seconds of video before the camera comes to what is seen later


class Opening(NamedTuple):
    """What one stream goes on from."""

    scene: Scenes  # one, whose camera looks away; `turning` says when
    caption: str  # leaves out what only memory is to know
    seed: int  # of the stream's noise


def openings(prompts: int, seeds: Sequence[int]) -> list[Opening]:
    """The first openings of lists that never change, one list for each seed. ValueError unless there are so many."""
    if not 1 <= prompts <= OPENING_COUNT:
        raise ValueError(f"there are {OPENING_COUNT} openings: ask for 1 to {OPENING_COUNT}, not {prompts}")
    return [
        Opening(scene, _caption(scene, Random(f"{seed} {number}")), clip_seed(seed, number))
        for seed in seeds
        for number, scene in enumerate(islice(_opening_scenes(seed), prompts))
    ]


def _opening_scenes(seed: int) -> Iterator[Scenes]:
    """Held-out scenes, one at a time, in which all that is to be recalled is seen soon after the camera has come."""
    drawn = sample_scenes(SCENE_COUNT, SCENE_SEED + seed, held_out=True, changes=0.0)
    uniforms = drawn.uniforms.clone()
    uniforms[:, UNIFORMS.index("reach")] = 0  # one that bounces away may be behind the landmark when the camera is back
    scenes = turning(replace(drawn, uniforms=uniforms), SHORTEST_GAP)
    for scene in (scenes[row] for row in range(len(scenes))):
        shown = window_truth(scene, SEEN_SECONDS * RATE)
        walks = MOTIONS[int(scene.motion)].startswith("walks")  # by the time the camera is back it may be out of view
        if not walks and all(shown[name] >= 0 for name in RECALLED):
            yield scene


def turning(scenes: Scenes, gap: int) -> Scenes:
    """The scenes with a camera that comes at second 0, shows what is there, turns away for `gap` seconds, and so on.

    It was turned away before second 0 too. Up to then and until it turns back, nothing depends on the gap.
    """
    away_seconds = torch.full_like(scenes.away_seconds, gap)
    absence = away_seconds + 2 * SWEEP_SECONDS
    return replace(
        scenes,
        camera=torch.full_like(scenes.camera, CAMERAS.index("looks away")),
        away_start=-absence,
        away_seconds=away_seconds,
        away_every=absence + SHOWN_SECONDS,
    )


def _caption(scene: Scenes, dice: Random) -> str:
    return describe({name: ATTRIBUTES[name][int(_first(scene, name))] for name in SAID}, dice)


def _first(scenes: Scenes, name: str) -> Tensor:
    """An attribute as it is at the start: [B]."""
    value: Tensor = getattr(scenes, name)
    return value[:, 0] if value.dim() == 2 else value


def evaluate_recall(
    recipes: Sequence[str],
    engine_of: Callable[[str], Engine],
    *,
    prompts: int = 40,
    seeds: int = 2,
    after: Sequence[int] = (2, 4, 8, 16),
    lead: int = LEAD,
    absence: Absence = "streamed",
    codec: Codec | None = None,
    device: torch.device = CPU,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Score whether what returns into sight is what was seen before, later than the first frames and from them on.

    Args:
        recipes: what to score: "truth" (renders), "codec" (renders, encoded and decoded), or recipes.
        engine_of: loads the engine of a recipe, which must be able to go on from pictures.
        prompts: how many openings for each seed, 1 to 500.
        seeds: lists of openings; those of one list differ from those of the others, and so does the noise.
        after: the gaps, in seconds out of sight, each at least 2.
        lead: of what is seen later, the seconds of video before the camera comes to it, 3 or more.
        absence: whether streams begin when the camera has turned away ("streamed") or when it turns back ("given").
        codec: what "codec" encodes and decodes with.
        device: where truth is rendered.
        progress: is told, in words, how far it is.

    Returns:
        For each recipe a table ready for JSON: `after`, `returned`, `stayed_away` and `counts` of what was seen later,
        and under `seen_first` the same of what was seen from the first frame on. Shares are of all streams, those
        included that never return.

    Raises:
        ValueError: no openings, more than there are, no seeds, a gap or a lead that is too short, or a longer lead
            where the absence is given: scenes cannot have both.
    """
    if lead < LEAD or (lead > LEAD and absence == "given"):
        raise ValueError(f"a lead is {LEAD} seconds, or longer where the absence is streamed, got {lead} ({absence})")
    gaps = sorted(set(after))
    if not gaps or gaps[0] < SHORTEST_GAP:
        raise ValueError(f"what is recalled is out of sight for {SHORTEST_GAP} seconds or longer, got {list(after)}")
    chosen = openings(prompts, seed_list(seeds))
    known = {"truth": _truth(device)} | ({"codec": _codec(codec)} if codec else {})
    sources = {name: known[name] if name in known else _streams(engine_of(name), absence) for name in recipes}
    return [
        {
            "recipe": name,
            "levels": source.levels,
            "weights": source.weights,
            "prompts": prompts,
            "seeds": seeds,
            "lead": lead,
            "absence": absence,
            **_table(_watch(f"{name}, seen later", source, chosen, lead, gaps, progress)),
            "seen_first": _table(_watch(f"{name}, seen first", source, chosen, 0, gaps, progress)),
            "seed_list": seed_list(seeds),
            "seed_of_a_video": "100000 * seed + number of the opening, from 0",
        }
        for name, source in sources.items()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Where videos come from
# ---------------------------------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """What goes on from openings.

    play: from B openings, a gap, and the seconds of video before the camera has come: the pictures, piece by piece.
    """

    play: Callable[[Sequence[Opening], int, int], Iterator[Tensor]]
    device: torch.device
    levels: int | None = None
    weights: str | None = None
    scripted: bool = True  # whether the camera keeps to the gap; if not, one video is good for all gaps


def _truth(device: torch.device) -> _Source:
    def play(batch: Sequence[Opening], gap: int, lead: int) -> Iterator[Tensor]:
        scenes = _scenes(batch, gap).to(device)
        return (rendered(scenes, RATE, first) for first in count(-lead * RATE, RATE))

    return _Source(play, device)


def _codec(codec: Codec) -> _Source:
    def play(batch: Sequence[Opening], gap: int, lead: int) -> Iterator[Tensor]:
        return through_codec(codec, _scenes(batch, gap), _back_mark(gap, lead) * RATE, -lead * RATE)

    return _Source(play, next(codec.parameters()).device)


def _streams(engine: Engine, absence: Absence) -> _Source:
    def given_pictures(gap: int, lead: int) -> int:
        turned = (lead + TURNED_SECONDS) * RATE
        if absence == "streamed":
            return next(n for n in map(engine.pictures_in, count(1)) if n >= turned)
        return list(takewhile(lambda n: n <= turned + gap * RATE, map(engine.pictures_in, count(1))))[-1]

    def play(batch: Sequence[Opening], gap: int, lead: int) -> Iterator[Tensor]:
        scenes = _scenes(batch, max(gap, lead)).to(engine.device)  # turned away for as long before it comes
        given_BTHWC = rendered(scenes, given_pictures(gap, lead), -lead * RATE)
        yield given_BTHWC
        captions, seeds = [one.caption for one in batch], [one.seed for one in batch]
        with engine.stream_batch(captions, seeds=seeds, pictures=given_BTHWC) as streams:
            yield from streams

    return _Source(play, engine.device, len(engine.recipe.steps), engine.weights, scripted=absence == "given")


def _scenes(batch: Sequence[Opening], gap: int) -> Scenes:
    """The scenes of openings, their cameras turned away for so many seconds."""
    return turning(stacked([one.scene for one in batch]), gap)


# ---------------------------------------------------------------------------------------------------------------------
# Watching and scoring
# ---------------------------------------------------------------------------------------------------------------------


def _away_mark(gap: int, lead: int) -> int:
    """The last full second of the video at which a camera that keeps to the gap has not begun to turn back."""
    return lead + int(TURNED_SECONDS) + gap


def _back_mark(gap: int, lead: int) -> int:
    """Where the window ends that begins when such a camera is back."""
    return lead + round(TURNED_SECONDS + gap + SWEEP_SECONDS) + WINDOW_SECONDS


def _watch(
    name: str,
    source: _Source,
    chosen: Sequence[Opening],
    lead: int,
    gaps: Sequence[int],
    progress: Callable[[str], None],
) -> dict[int, Score]:
    """Make all videos of one kind and count what is recalled after each gap, a batch at a time."""
    videos = [[gap] for gap in gaps] if source.scripted else [list(gaps)]

    def read(job: Sequence[tuple[int, Opening]]) -> dict[int, Score]:
        batch = [one for _, one in job]
        scores: dict[int, Score] = {}
        for together in videos:
            scores |= _read(source.play(batch, together[0], lead), batch, together, lead)
        progress(f"{name}: streams {job[0][0]} to {job[-1][0]} of {len(chosen)}")
        return scores

    parts = parallel.share_out(batches(list(enumerate(chosen, 1)), source.device), read)
    return {gap: {key: sum((part[gap][key] for part in parts), Tally()) for key in parts[0][gap]} for gap in gaps}


def _read(pieces: Iterator[Tensor], batch: Sequence[Opening], gaps: Sequence[int], lead: int) -> dict[int, Score]:
    """Count what one video of each opening shows after gaps."""
    scores: dict[int, Score] = {gap: {} for gap in gaps}
    marks = sorted({mark(gap, lead) for gap in gaps for mark in (_away_mark, _back_mark)})
    for mark, window_BTHWC in zip(marks, windows(pieces, RATE, marks), strict=True):
        for gap in gaps:
            if mark == _back_mark(gap, lead):
                scores[gap] |= _recalled(window_BTHWC, stacked([one.scene for one in batch]))
            if mark == _away_mark(gap, lead):
                none = detect(window_BTHWC[:, -RATE:]).count == 0
                scores[gap]["stayed_away"] = Tally(_bits(none))
    return scores


def _recalled(window_BTHWC: Tensor, scenes: Scenes) -> Score:
    found = detect(window_BTHWC)
    seen = (found.subject >= 0) | (found.landmark >= 0)
    score = {name: tally(getattr(found, name), _first(scenes, name)) for name in RECALLED}
    return score | {"returned": Tally(_bits(seen))}


def _bits(right_B: Tensor) -> str:
    return "".join(str(int(one)) for one in right_B.tolist())


def _table(scores: dict[int, Score]) -> dict[str, Any]:
    """The scores of one recipe and kind, ready for JSON."""
    return {
        "after": {str(gap): {name: score[name].share for name in RECALLED} for gap, score in scores.items()},
        "returned": {str(gap): score["returned"].share for gap, score in scores.items()},
        "stayed_away": {str(gap): score["stayed_away"].share for gap, score in scores.items()},
        "counts": {str(gap): tables(score) for gap, score in scores.items()},
    }
