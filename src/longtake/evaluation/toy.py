"""How well a recipe follows its prompts and keeps what they leave open, in the toy world, where detectors are exact.

Scoring knows nothing of where pictures come from (see `sources`). Every clip is scored on what its caption says; what
detectors abstain from is wrong. What a caption leaves open must stay as it was at the start. And there must be one
subject, not two.

Shapes: B clips, D features.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtake import parallel
from longtake.evaluation.scores import Score, Tally, asked_for, joined, shares, tables, tally
from longtake.evaluation.sources import (
    CPU,
    WINDOW_SECONDS,
    Source,
    batches,
    captions_in,
    clip_seed,
    engine_source,
    held_out_captions,
    seed_list,
    truth_source,
)
from longtake.generation.stream import Engine
from longtake.toy.captions import encode, parse
from longtake.toy.detect import Detections, detect
from longtake.toy.scenes import ATTRIBUTES, RATE

FOLLOWED = ("subject", "colour", "place", "time", "weather", "motion", "camera")
OPENING_SECONDS = 2.5  # what a video shows so early is what it has to keep
REFERENCE_SEED = 20_002  # of the renders that features are compared with; no recipe is given it


def evaluate_toy(
    recipes: Sequence[str],
    engine_of: Callable[[str], Engine],
    *,
    prompts: int = 100,
    prompt_file: Path | None = None,
    seeds: int = 2,
    at: Sequence[int] = (5,),
    sources: Mapping[str, Source] | None = None,
    device: torch.device = CPU,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Score recipes on held-out captions.

    Args:
        recipes: what to score: names that `sources` has, "truth" (fresh renders of what the captions say), or recipes.
        engine_of: loads the engine of a recipe.
        prompts: how many captions of the fixed held-out list, 1 to 1000; not used with a prompt file.
        prompt_file: captions to use instead, one a line.
        seeds: videos for each caption; their noise is seeded by `sources.clip_seed` of 0, 1, ...
        at: T scores the pictures of the five seconds that end T seconds into a video.
        sources: where other videos come from, such as {"codec": codec_source(codec)}.
        device: where truth is rendered, and the reference that features are compared with.
        progress: is told, in words, how far it is.

    Returns:
        For each recipe a table ready for JSON. Shares are between 0 and 1, or None where no caption says anything.

    Raises:
        ValueError: no captions or seeds, or a mark before the first window is full.
    """
    texts = captions_in(prompt_file) if prompt_file else held_out_captions(prompts)
    if not at or min(at) < WINDOW_SECONDS:
        raise ValueError(f"windows of {WINDOW_SECONDS} seconds end at {WINDOW_SECONDS} or later, got {list(at)}")
    for text in texts:
        encode(text)  # a line that cannot be read is refused now, not after an hour
    own = sha256("\n".join(texts).encode()).hexdigest()[:16] if prompt_file else None
    plan = _Plan(texts, own, seed_list(seeds), sorted(set(at)), progress)
    truth = truth_source(device)
    known = {"truth": truth, **(sources or {})}
    chosen = {name: known[name] if name in known else engine_source(engine_of(name)) for name in recipes}
    reference = _watch("reference", truth, plan, [REFERENCE_SEED + seed for seed in plan.seeds])
    return [
        _table(name, source, plan, _watch(name, source, plan, plan.seeds), reference) for name, source in chosen.items()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------


def score_following(found: Detections, said: Sequence[Mapping[str, str]]) -> Score:
    """Compare what clips show with what their captions say; what a caption leaves open is not scored."""
    return {name: tally(getattr(found, name), asked_for(name, said)) for name in FOLLOWED}


def score_by_value(found: Detections, said: Sequence[Mapping[str, str]]) -> dict[str, Score]:
    """The same, apart for each value that captions ask for: by attribute and value."""
    scores = {}
    for name in FOLLOWED:
        wanted, read = asked_for(name, said), getattr(found, name)
        values = {value: torch.where(wanted == index, wanted, -1) for index, value in enumerate(ATTRIBUTES[name])}
        scores[name] = {value: tally(read, asked) for value, asked in values.items() if (asked >= 0).any()}
    return scores


def score_constancy(found: Detections, opening: Detections, said: Sequence[Mapping[str, str]]) -> Score:
    """Compare what clips show now with what they showed at the start, where their captions leave it open."""
    scores = {}
    for name in FOLLOWED:
        open_to_choice = asked_for(name, said) < 0
        scores[name] = tally(getattr(found, name), torch.where(open_to_choice, getattr(opening, name), -1))
    return scores


def score_one_subject(count_B: Tensor, said: Sequence[Mapping[str, str]], mark: int) -> Tally:
    """Of clips that end at a mark, the share that shows one subject, where the caption names one. Two are wrong.

    None is wrong too (and counted as abstained), but for what may be out of view: later than in the opening, a caption
    that says it walks or that the camera looks away excuses it, and the clip is not scored.
    """
    none = count_B.cpu() == 0
    excused = none & torch.tensor([mark > WINDOW_SECONDS and _may_hide(one) for one in said])
    named = torch.tensor(["subject" in one for one in said])
    return tally(torch.where(none, -1, count_B.cpu()), torch.where(named & ~excused, 1, -1))


def _may_hide(said: Mapping[str, str]) -> bool:
    return said.get("motion", "").startswith("walks") or said.get("camera") == "looks away"


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
    """What every recipe is asked for. own: tells the captions of a file from those of others."""

    prompts: list[str]
    own: str | None
    seeds: list[int]
    marks: list[int]
    progress: Callable[[str], None]


@dataclass(frozen=True)
class _Watched:
    """What captions said, and what was read off their clips: at the start, and at each mark."""

    said: list[dict[str, str]]
    opening: Detections
    at: dict[int, Detections]


def _watch(name: str, source: Source, plan: _Plan, seeds: Sequence[int]) -> _Watched:
    """Make all videos of a recipe and read them, a batch at a time; pictures are forgotten at once."""
    clips = [(text, clip_seed(seed, number)) for seed in seeds for number, text in enumerate(plan.prompts)]
    jobs = batches(list(enumerate(clips, 1)), source.device)
    marks = sorted({WINDOW_SECONDS, *plan.marks})  # the opening is needed, whatever is scored

    def read(job: Sequence[tuple[int, tuple[str, int]]]) -> _Watched:
        prompts, seeds = zip(*(clip for _, clip in job), strict=True)
        found = {}
        for mark, pictures in zip(marks, source.play(prompts, seeds, marks), strict=True):
            if mark == WINDOW_SECONDS:
                opening = detect(pictures[:, : int(OPENING_SECONDS * RATE)])
            if mark in plan.marks:
                found[mark] = joined([detect(pictures)])
            plan.progress(f"{name}: videos {job[0][0]} to {job[-1][0]} of {len(clips)}, {mark} s")
        return _Watched([parse(prompt) for prompt in prompts], joined([opening]), found)

    parts = parallel.share_out(jobs, read)
    return _Watched(
        [one for part in parts for one in part.said],
        joined([part.opening for part in parts]),
        {mark: joined([part.at[mark] for part in parts]) for mark in plan.marks},
    )


def _table(recipe: str, source: Source, plan: _Plan, watched: _Watched, reference: _Watched) -> dict[str, Any]:
    """The scores of one recipe, ready for JSON."""
    said = watched.said
    by_mark = {str(mark): found for mark, found in watched.at.items()}
    following = {mark: score_following(found, said) for mark, found in by_mark.items()}
    constancy = {mark: score_constancy(found, watched.opening, said) for mark, found in by_mark.items()}
    one_subject = {mark: score_one_subject(found.count, said, int(mark)) for mark, found in by_mark.items()}
    distances = {
        mark: frechet_distance(found.features, reference.at[int(mark)].features) for mark, found in by_mark.items()
    }
    return {
        "recipe": recipe,
        "levels": source.levels,
        "weights": source.weights,
        **({} if source.guidance is None else {"guidance": source.guidance}),
        "prompts": len(plan.prompts),
        **({"captions": plan.own} if plan.own else {}),
        "seeds": len(plan.seeds),
        "at": {mark: shares(score) for mark, score in following.items()},
        "constancy": {mark: shares(score) for mark, score in constancy.items()},
        "one_subject": shares(one_subject),
        "frechet": {mark: distance if math.isfinite(distance) else None for mark, distance in distances.items()},
        "by_value": {
            mark: {
                name: {value: {"right": one.right, "scored": one.scored} for value, one in score.items()}
                for name, score in score_by_value(found, said).items()
            }
            for mark, found in by_mark.items()
        },
        "counts": {
            mark: {
                "at": tables(following[mark]),
                "constancy": tables(constancy[mark]),
                "one_subject": one_subject[mark].table(),
            }
            for mark in by_mark
        },
        "seed_list": plan.seeds,
        "seed_of_a_video": "100000 * seed + number of the caption, from 0",
    }
