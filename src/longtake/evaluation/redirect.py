"""How well a recipe is redirected, in the toy world: does a new caption act, how soon, and does the rest stay?

Every stream runs for five seconds under a held-out caption. Then it is told the same caption with one attribute
changed, written anew in full, as half of the changes in training are; after five more seconds it ends. Only what
the caption says is changed, so every recipe is asked for the same. The control is the same streams, with the same
noise, that go on under their own caption: it says how often the new value would have been read anyway, and how much
is lost without any redirect.

- reached: the detectors read the new value in two successive windows of one second, half a second apart, the first of
  which ends at most four seconds after the redirect. Where the first one ends is the time it took.
- kept: of what the caption says besides, and what was read rightly in the five seconds before the redirect, all that
  is read rightly in the last three seconds too. By then two seconds have gone by, and the world fades in 1.25.

Shapes: B streams, T pictures, W windows.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtake import parallel
from longtake.evaluation.scores import Score, Tally, asked_for, joined, tally
from longtake.evaluation.sources import batches, clip_seed, held_out_captions, seed_list
from longtake.generation.stream import Engine
from longtake.toy.captions import describe, parse
from longtake.toy.detect import Detections, detect
from longtake.toy.scenes import ATTRIBUTES, CHANGEABLE, RATE

KEPT = ("subject", *CHANGEABLE)
BEFORE_SECONDS, AFTER_SECONDS, LAST_SECONDS = 5, 5, 3
WITHIN_SECONDS, STEP_SECONDS, READ_SECONDS = 4, 0.5, 1


class Redirect(NamedTuple):
    """One stream's change: `attribute` of its caption becomes `value`, and `told` is the caption that says so."""

    caption: str
    seed: int
    attribute: str
    value: str
    told: str


def redirects(captions: Sequence[str], seeds: Sequence[int]) -> list[Redirect]:
    """What changes in each caption, once for each seed: always the same, and each attribute as often as the others.

    A caption that says nothing that can change is left out.
    """
    uses = dict.fromkeys(CHANGEABLE, 0)
    chosen = []
    for seed, (number, caption) in product(seeds, enumerate(captions)):
        said, dice = parse(caption), Random(f"{seed} {caption}")
        changeable = [name for name in CHANGEABLE if name in said]
        if not changeable:
            continue
        attribute = min(changeable, key=uses.__getitem__)
        uses[attribute] += 1
        value = dice.choice([value for value in ATTRIBUTES[attribute] if value != said[attribute]])
        chosen.append(
            Redirect(caption, clip_seed(seed, number), attribute, value, describe(said | {attribute: value}, dice))
        )
    return chosen


def evaluate_redirect(
    recipes: Sequence[str],
    engine_of: Callable[[str], Engine],
    *,
    prompts: int = 100,
    seeds: int = 2,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Score how recipes follow a redirect of one attribute.

    Args:
        recipes: what to score.
        engine_of: loads the engine of a recipe.
        prompts: how many captions of the fixed held-out list, 1 to 1000.
        seeds: streams for each caption, with seeds 0, 1, ...
        progress: is told, in words, how far it is.

    Returns:
        For each recipe a table ready for JSON. Shares are between 0 and 1, or None where nothing could be scored.

    Raises:
        ValueError: no captions, more than there are, or no seeds.
    """
    chosen = redirects(held_out_captions(prompts), seed_list(seeds))
    engines = {recipe: engine_of(recipe) for recipe in recipes}  # an unknown name is refused before work begins
    results = []
    for recipe, engine in engines.items():
        told = _watch(f"{recipe}, redirected", engine, chosen, [one.told for one in chosen], progress)
        control = _watch(f"{recipe}, left alone", engine, chosen, [one.caption for one in chosen], progress)
        results.append(
            {
                "recipe": recipe,
                "levels": len(engine.recipe.steps),
                "prompts": prompts,
                "seeds": seeds,
                **_table(chosen, told, control),
                "seed_list": seed_list(seeds),
                "seed_of_a_video": "100000 * seed + number of the caption, from 0",
            }
        )
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Watching
# ---------------------------------------------------------------------------------------------------------------------


class _Watched(NamedTuple):
    """What was read off all streams: before the redirect, in the windows after it, and at the end."""

    before: Detections
    read_BW: Tensor  # of the attribute that changes, an index or -1; the first window ends half a second after
    last: Detections


def _watch(
    name: str, engine: Engine, chosen: Sequence[Redirect], told: Sequence[str], progress: Callable[[str], None]
) -> _Watched:
    """Stream every caption, go on as told, and read the pictures, a batch at a time."""
    jobs = batches(list(zip(chosen, told, strict=True)), engine.device)

    def read(job: Sequence[tuple[Redirect, str]]) -> _Watched:
        batch, texts = zip(*job, strict=True)
        watched = _read(*_pictures(engine, batch, texts), batch)
        progress(f"{name}: {len(batch)} of {len(chosen)} streams read")
        return watched

    before, reads, last = zip(*parallel.share_out(jobs, read), strict=True)
    return _Watched(joined(before), torch.cat(reads), joined(last))


def _pictures(engine: Engine, batch: Sequence[Redirect], told: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The pictures before and after streams are told how to go on: [B, T, H, W, 3] each."""
    with engine.stream_batch([one.caption for one in batch], seeds=[one.seed for one in batch]) as streams:
        before = _at_least(BEFORE_SECONDS * RATE, streams)
        streams.redirect(told)
        return before, _at_least(AFTER_SECONDS * RATE, streams)


def _at_least(pictures: int, streams: Iterator[Tensor]) -> Tensor:
    """The next whole blocks that hold so many pictures."""
    pieces = [next(streams)]
    while sum(piece.shape[1] for piece in pieces) < pictures:
        pieces.append(next(streams))
    return torch.cat(pieces, 1)


def _read(before: Tensor, after: Tensor, batch: Sequence[Redirect]) -> _Watched:
    length = READ_SECONDS * RATE
    around = torch.cat([before[:, -length:], after], 1)  # picture `end` is the last of a window that ends there
    ends = [round(number * STEP_SECONDS * RATE) for number in range(1, round(WITHIN_SECONDS / STEP_SECONDS) + 2)]
    reads = [_of_changed(detect(around[:, end : end + length]), batch) for end in ends]
    end = AFTER_SECONDS * RATE
    return _Watched(
        joined([detect(before[:, -BEFORE_SECONDS * RATE :])]),
        torch.stack(reads, 1),
        joined([detect(after[:, end - LAST_SECONDS * RATE : end])]),
    )


def _of_changed(found: Detections, batch: Sequence[Redirect]) -> Tensor:
    """What was read of each stream's own attribute: [B]."""
    read = {name: getattr(found, name).tolist() for name in CHANGEABLE}
    return torch.tensor([read[one.attribute][row] for row, one in enumerate(batch)])


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------


def _table(chosen: Sequence[Redirect], told: _Watched, control: _Watched) -> dict[str, Any]:
    """The scores of one recipe, ready for JSON."""
    reached, kept = _reached(told.read_BW, chosen), _kept(told, chosen)
    reached_control, kept_control = _reached(control.read_BW, chosen), _kept(control, chosen)
    seconds = _seconds(told.read_BW, chosen)
    return {
        "reached_within_4s": {name: one.share for name, one in reached.items()},
        "reached_within_4s_control": {name: one.share for name, one in reached_control.items()},
        "median_seconds": seconds[seconds.isfinite()].quantile(0.5).item() if seconds.isfinite().any() else None,
        "kept_unchanged": kept.share,
        "kept_unchanged_control": kept_control.share,
        "counts": {
            "reached_within_4s": {name: one.table() for name, one in reached.items()},
            "reached_within_4s_control": {name: one.table() for name, one in reached_control.items()},
            "kept_unchanged": kept.table(),
            "kept_unchanged_control": kept_control.table(),
        },
    }


def _seconds(read_BW: Tensor, chosen: Sequence[Redirect]) -> Tensor:
    """When each stream was first read as it was to be, in seconds after the redirect, infinite for never: [B]."""
    wanted = torch.tensor([ATTRIBUTES[one.attribute].index(one.value) for one in chosen])
    right = read_BW == wanted[:, None]
    lasting = right[:, :-1] & right[:, 1:]  # one window alone may flicker
    seconds = STEP_SECONDS * (1 + lasting.int().argmax(1))
    return torch.where(lasting.any(1), seconds, torch.inf)


def _reached(read_BW: Tensor, chosen: Sequence[Redirect]) -> Score:
    """The streams that were read as they were to be, by what changed; abstained: where nothing was read at all."""
    reached, unread = _seconds(read_BW, chosen).isfinite(), (read_BW < 0).all(1)
    scores = dict.fromkeys(CHANGEABLE, Tally())
    for one, right, nothing in zip(chosen, reached.tolist(), unread.tolist(), strict=True):
        scores[one.attribute] += Tally(int(right), 1, int(nothing))
    return scores


def _kept(watched: _Watched, chosen: Sequence[Redirect]) -> Tally:
    """What captions say besides the change: of what was right before, how much still is, over all attributes."""
    said = [{name: value for name, value in parse(one.caption).items() if name != one.attribute} for one in chosen]
    total = Tally()
    for name in KEPT:
        asked = asked_for(name, said)
        right_before = getattr(watched.before, name) == asked
        total += tally(getattr(watched.last, name), torch.where(right_before, asked, -1))
    return total
