"""How well a recipe follows its prompts and keeps what they leave open, in the toy world, where detectors are exact.

A *source* makes videos: from prompts, a seed and marks in seconds it gives, for one mark after another, the five
seconds of pictures that end there. Scoring knows nothing of where pictures come from. Every clip is scored on what
its caption says; what detectors abstain from is wrong. What a caption leaves open must stay as it was at the start.

Shapes: B clips, F pictures of a clip, D features.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from longtake.generation.stream import to_uint8
from longtake.models.codec import Codec
from longtake.toy.captions import captions, encode, parse
from longtake.toy.detect import Detections, detect
from longtake.toy.scenes import ATTRIBUTES, RATE, Scenes, make_scene, sample_scenes
from longtake.toy.world import render

FOLLOWED = ("subject", "colour", "place", "time", "weather", "motion", "camera")
WINDOW_SECONDS = 5
OPENING_SECONDS = 2.5  # what a video shows so early is what it has to keep
CAPTION_SEED, CAPTION_COUNT = 20_001, 1000  # the fixed list of held-out captions
REFERENCE_SEED = 20_002  # of the renders that features are compared with; no recipe is given it
BATCH = 8  # prompts that a source is given at once

Source = Callable[[Sequence[str], int, Sequence[int]], Iterator[Tensor]]
"""From prompts, a seed and rising marks in seconds: for each mark, uint8 pictures [B, 80, H, W, 3] that end there."""


class HasFrames(Protocol):
    """A piece of a video: uint8 pictures [T, H, W, 3]."""

    @property
    def frames(self) -> np.ndarray: ...


class Streams(Protocol):
    """The part of an engine that evaluation uses."""

    @property
    def frame_rate(self) -> int: ...

    def stream(self, prompt: str, *, seed: int) -> AbstractContextManager[Iterator[HasFrames]]: ...


def evaluate_toy(
    recipes: Sequence[str],
    engine_of: Callable[[str], Streams],
    *,
    prompts: int | None = 100,
    prompt_file: Path | None = None,
    seeds: int = 2,
    at: Sequence[int] = (5,),
    sources: Mapping[str, Source] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Score recipes on held-out captions.

    Args:
        recipes: what to score: names that `sources` has, "truth" (fresh renders of what the captions say), or recipes.
        engine_of: loads the engine of a recipe.
        prompts: how many captions of the fixed held-out list; not used with a prompt file.
        prompt_file: captions to use instead, one a line.
        seeds: videos for each caption, with seeds 0, 1, ...
        at: T scores the pictures of the five seconds that end T seconds into a video.
        sources: where other videos come from, such as {"codec": codec_source(codec)}.
        progress: is told, in words, how far it is.

    Returns:
        For each recipe a table ready for JSON. Shares are between 0 and 1, or None where no caption says anything.

    Raises:
        ValueError: no captions or seeds, or a mark before the first window is full.
    """
    texts = _lines(prompt_file) if prompt_file else held_out_captions(prompts or 0)
    if not texts or seeds < 1:
        raise ValueError(f"evaluation needs captions and seeds, got {len(texts)} and {seeds}")
    if not at or min(at) < WINDOW_SECONDS:
        raise ValueError(f"windows of {WINDOW_SECONDS} seconds end at {WINDOW_SECONDS} or later, got {list(at)}")
    for text in texts:
        encode(text)  # a line that cannot be read is refused now, not after an hour
    known = {"truth": truth_source, **(sources or {})}
    chosen = {name: known[name] if name in known else engine_source(engine_of(name)) for name in recipes}
    plan = _Plan(texts, list(range(seeds)), sorted(set(at)), progress)
    reference = _watch("reference", truth_source, plan, [REFERENCE_SEED + seed for seed in plan.seeds])
    results = []
    for recipe, source in chosen.items():
        results.append(_table(recipe, plan, _watch(recipe, source, plan, plan.seeds), reference))
    return results


def held_out_captions(count: int) -> list[str]:
    """The first captions of a list that never changes, each of a combination that training never shows."""
    if count > CAPTION_COUNT:
        raise ValueError(f"there are {CAPTION_COUNT} held-out captions, not {count}")
    scenes = sample_scenes(CAPTION_COUNT, CAPTION_SEED, held_out=True, changes=0.0)
    return [before for before, _ in captions(scenes, CAPTION_SEED)[:count]]


def _lines(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def truth_source(prompts: Sequence[str], seed: int, marks: Sequence[int]) -> Iterator[Tensor]:
    """Renders of scenes in which everything is as the captions say; what they leave open is drawn from the seed."""
    scenes = scenes_of(prompts, seed)
    for mark in marks:
        yield _rendered(scenes, WINDOW_SECONDS * RATE, (mark - WINDOW_SECONDS) * RATE)


def codec_source(codec: Codec) -> Source:
    """The same renders, encoded and decoded from the first picture on."""

    @torch.no_grad()
    def source(prompts: Sequence[str], seed: int, marks: Sequence[int]) -> Iterator[Tensor]:
        scenes = scenes_of(prompts, seed)
        weight = next(codec.parameters())
        encoder_state = decoder_state = None

        def pieces() -> Iterator[Tensor]:
            nonlocal encoder_state, decoder_state
            for first, pictures in _blocks(codec.temporal_factor, marks[-1] * RATE):
                frames = render(scenes, pictures, first).frames_BFCHW.to(weight)
                latents, encoder_state = codec.encode(frames, encoder_state)
                decoded, decoder_state = codec.decode(latents, decoder_state)
                yield to_uint8(decoded)

        yield from windows(pieces(), RATE, marks)

    return source


def clip_source(sample: Callable[[Sequence[str], int], Tensor]) -> Source:
    """Whole clips, uint8 [B, F, H, W, 3], made at once from prompts and a seed: a teacher's. Marks end within them."""

    def source(prompts: Sequence[str], seed: int, marks: Sequence[int]) -> Iterator[Tensor]:
        clips = sample(prompts, seed)
        if clips.shape[1] < marks[-1] * RATE:
            raise ValueError(f"clips of {clips.shape[1] / RATE:.1f} seconds cannot be scored at {marks[-1]}")
        yield from windows([clips], RATE, marks)

    return source


def engine_source(engine: Streams) -> Source:
    """One stream after another, each as long as the last mark."""

    def source(prompts: Sequence[str], seed: int, marks: Sequence[int]) -> Iterator[Tensor]:
        clips = [list(_streamed(engine, prompt, seed, marks)) for prompt in prompts]
        yield from (torch.cat(parts) for parts in zip(*clips, strict=True))

    return source


def _streamed(engine: Streams, prompt: str, seed: int, marks: Sequence[int]) -> Iterator[Tensor]:
    with engine.stream(prompt, seed=seed) as stream:
        yield from windows((torch.from_numpy(chunk.frames)[None] for chunk in stream), engine.frame_rate, marks)


def windows(pieces: Iterator[Tensor] | Sequence[Tensor], rate: int, marks: Sequence[int]) -> Iterator[Tensor]:
    """Cut the window before each rising mark out of a video in pieces [B, T, H, W, 3], of which it keeps little."""
    remaining = iter(pieces)
    kept = next(remaining)
    seen = kept.shape[1]  # pictures so far, of which `kept` holds the last
    for mark in marks:
        while seen < mark * rate:
            piece = next(remaining)
            seen += piece.shape[1]
            longest = WINDOW_SECONDS * rate + piece.shape[1]  # the piece may go on beyond the mark
            kept = torch.cat([kept, piece], 1)[:, -longest:]
        end = kept.shape[1] - (seen - mark * rate)
        yield kept[:, end - WINDOW_SECONDS * rate : end]


def scenes_of(prompts: Sequence[str], seed: int) -> Scenes:
    """A scene for each prompt, as it says; what it leaves open is drawn from the seed and the prompt."""
    scenes = [_scene_of(prompt, Random(f"{seed} {prompt}").getrandbits(32)) for prompt in prompts]
    columns = {field.name: [getattr(scene, field.name) for scene in scenes] for field in fields(Scenes)}
    return Scenes(**{name: torch.cat(column) for name, column in columns.items()})


def _scene_of(prompt: str, seed: int) -> Scenes:
    said: dict[str, Any] = {**parse(prompt)}
    return make_scene(seed=seed, **said)


def _rendered(scenes: Scenes, pictures: int, first: int) -> Tensor:
    return to_uint8(render(scenes, pictures, first).frames_BFCHW)


def _blocks(temporal_factor: int, pictures: int) -> Iterator[tuple[int, int]]:
    """First picture and length of pieces that a codec takes: one picture, then four latent frames at a time."""
    yield 0, 1
    for first in range(1, pictures, 4 * temporal_factor):
        yield first, 4 * temporal_factor


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """How many clips were right, out of how many that could be."""

    right: int = 0
    scored: int = 0
    abstained: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.right + other.right, self.scored + other.scored, self.abstained + other.abstained)

    @property
    def share(self) -> float | None:
        return self.right / self.scored if self.scored else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the share: Wilson's, which also holds near 0 and 1 and for few clips."""
        if not self.scored:
            return None
        z, n, p = 1.96, self.scored, self.right / self.scored
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)


Score = dict[str, Tally]  # by attribute


def score_following(found: Detections, said: Sequence[Mapping[str, str]]) -> Score:
    """Compare what clips show with what their captions say; what a caption leaves open is not scored."""
    return {name: _tally(getattr(found, name), _indices(name, said)) for name in FOLLOWED}


def score_constancy(found: Detections, opening: Detections, said: Sequence[Mapping[str, str]]) -> Score:
    """Compare what clips show now with what they showed at the start, where their captions leave it open."""
    scores = {}
    for name in FOLLOWED:
        open_to_choice = _indices(name, said).to(found.subject.device) < 0
        scores[name] = _tally(getattr(found, name), torch.where(open_to_choice, getattr(opening, name), -1))
    return scores


def _indices(name: str, said: Sequence[Mapping[str, str]]) -> Tensor:
    """What captions say of one attribute, as indices [B], -1 where nothing."""
    return torch.tensor([ATTRIBUTES[name].index(one[name]) if name in one else -1 for one in said])


def _tally(found: Tensor, wanted: Tensor) -> Tally:
    """Count indices [B] where something is wanted (0 or more)."""
    found, wanted = found.cpu(), wanted.cpu()
    scored = wanted >= 0
    counts = ((found == wanted) & scored, scored, (found < 0) & scored)
    return Tally(*(int(count.sum()) for count in counts))


# Fréchet distance (Dowson and Landau, 1982; "FID" in arXiv 1706.08500, Equation 6) of two sets of features.


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Distance of the Gaussians that fit two sets of features [clips, D]; 0 for the same, nan for fewer than two."""
    if min(len(features), len(reference)) < 2:
        return math.nan
    first, second = features.double().cpu(), reference.double().cpu()
    first_cov, second_cov = torch.cov(first.T), torch.cov(second.T)
    values, vectors = torch.linalg.eigh(first_cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ second_cov @ root).clamp(min=0).sqrt().sum()  # trace of the mixed root
    apart = (first.mean(0) - second.mean(0)).square().sum()
    return max(0.0, float(apart + first_cov.trace() + second_cov.trace() - 2 * overlap))


# ---------------------------------------------------------------------------------------------------------------------
# From videos to tables
# ---------------------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What every recipe is asked for."""

    prompts: list[str]
    seeds: list[int]
    marks: list[int]
    progress: Callable[[str], None]


@dataclass
class _Watched:
    """What was seen at one mark, over all clips."""

    following: Score
    constancy: Score
    features: list[Tensor]  # [B, D] each


def _watch(name: str, source: Source, plan: _Plan, seeds: Sequence[int]) -> dict[int, _Watched]:
    """Make all videos of a recipe and score them, a batch at a time; pictures are forgotten at once."""
    nothing = {attribute: Tally() for attribute in FOLLOWED}
    watched = {mark: _Watched(dict(nothing), dict(nothing), []) for mark in plan.marks}
    jobs = list(itertools.product(seeds, range(0, len(plan.prompts), BATCH)))
    for number, (seed, first) in enumerate(jobs, 1):
        prompts = plan.prompts[first : first + BATCH]
        _watch_batch(source, prompts, seed, watched)
        plan.progress(f"{name}: {number} of {len(jobs)} batches, {len(prompts)} prompts each, seed {seed}")
    return watched


def _watch_batch(source: Source, prompts: Sequence[str], seed: int, watched: dict[int, _Watched]) -> None:
    said = [parse(prompt) for prompt in prompts]
    marks = sorted({WINDOW_SECONDS, *watched})  # the opening is needed, whatever is scored
    opening: Detections | None = None
    for mark, pictures in zip(marks, source(prompts, seed, marks), strict=True):
        opening = opening or detect(pictures[:, : int(OPENING_SECONDS * RATE)])
        if mark in watched:
            found, at = detect(pictures), watched[mark]
            at.following = _sum(at.following, score_following(found, said))
            at.constancy = _sum(at.constancy, score_constancy(found, opening, said))
            at.features.append(found.features.cpu())


def _sum(one: Score, other: Score) -> Score:
    return {name: one[name] + other[name] for name in one}


def _table(recipe: str, plan: _Plan, watched: dict[int, _Watched], reference: dict[int, _Watched]) -> dict[str, Any]:
    """The scores of one recipe, ready for JSON."""
    by_mark = {str(mark): at for mark, at in watched.items()}
    distances = {
        mark: frechet_distance(torch.cat(at.features), torch.cat(reference[int(mark)].features))
        for mark, at in by_mark.items()
    }
    return {
        "recipe": recipe,
        "prompts": len(plan.prompts),
        "seeds": len(plan.seeds),
        "at": {mark: {name: tally.share for name, tally in at.following.items()} for mark, at in by_mark.items()},
        "constancy": {
            mark: {name: tally.share for name, tally in at.constancy.items()} for mark, at in by_mark.items()
        },
        "frechet": {mark: distance if math.isfinite(distance) else None for mark, distance in distances.items()},
        "counts": {
            mark: {"at": _counts(at.following), "constancy": _counts(at.constancy)} for mark, at in by_mark.items()
        },
        "seed_list": plan.seeds,
    }


def _counts(score: Score) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "right": tally.right,
            "scored": tally.scored,
            "abstained": tally.abstained,
            "interval_95": tally.interval,
        }
        for name, tally in score.items()
    }
