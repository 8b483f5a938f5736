"""How well a recipe is redirected, in the toy world: does a new caption act, how soon, and does the rest stay?

Every stream runs for five seconds under a held-out caption. Then one attribute changes, and after five more seconds it
ends. As in training, half of the redirects are short and name nothing but the change ("it starts to snow"), the others
are the whole caption written anew. Only what the caption says is changed, so every recipe is asked for the same. The
control is the same streams, with the same noise, that go on under their own caption: it says how often the new value
would have been read anyway, and how much is lost without any redirect.

- reached: the detectors read the new value in two successive windows of one second, half a second apart, the first of
  which ends at most four seconds after the redirect. Where the first one ends is the time it took.
- kept: of all attributes that were read in the five seconds before the redirect (rightly, where the caption says
  them), but for the one that changes, those that read the same in the last three seconds. By then two seconds have
  gone by, and the world fades in 1.25.

Shapes: B streams, T pictures, W windows.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from random import Random
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from longtake import parallel
from longtake.evaluation.scores import Score, Tally, asked_for, joined, shares, tables, tally
from longtake.evaluation.sources import batches, clip_seed, held_out_captions, seed_list
from longtake.generation.blend import require_blend
from longtake.generation.stream import FAR_AFTER_CUT, FAR_AFTER_REDIRECT, Engine, PromptInFlight, StreamBatch
from longtake.memory.far import require_share
from longtake.toy.captions import (
    COLOUR_CLAUSES,
    PHRASES,
    PLACE_CLAUSES,
    TIME_CLAUSES,
    WEATHER_CLAUSES,
    describe,
    parse,
)
from longtake.toy.detect import Detections, detect
from longtake.toy.scenes import ATTRIBUTES, CHANGEABLE, RATE

Transition = Literal["redirect", "cut"]
Change = Callable[[StreamBatch, Sequence[str]], None]
FORMS = ("short", "full")
KEPT = ("subject", *CHANGEABLE)
BEFORE_SECONDS, AFTER_SECONDS, LAST_SECONDS = 5, 5, 3
WITHIN_SECONDS, STEP_SECONDS, READ_SECONDS = 4, 0.5, 1


class Redirect(NamedTuple):
    """One stream's change: `attribute` of its caption becomes `value`, and `told` says so, in short or in full."""

    caption: str
    seed: int
    attribute: str
    value: str
    form: str
    told: str


def redirects(captions: Sequence[str], seeds: Sequence[int]) -> list[Redirect]:
    """What changes in each caption, once for each seed: always the same for a list of captions.

    Each attribute changes as often as the others, half the time in short. A caption that says nothing that can change
    is left out.
    """
    uses = dict.fromkeys(CHANGEABLE, 0)
    chosen = []
    for seed, (number, caption) in product(seeds, enumerate(captions)):
        said, dice = parse(caption), Random(f"{seed} {caption}")
        changeable = [name for name in CHANGEABLE if name in said]
        if not changeable:
            continue
        attribute = min(changeable, key=uses.__getitem__)
        form = FORMS[uses[attribute] % len(FORMS)]
        uses[attribute] += 1
        value = dice.choice([value for value in ATTRIBUTES[attribute] if value != said[attribute]])
        new = said | {attribute: value}
        told = describe(new, dice) if form == "full" else _in_short(attribute, new, dice)
        chosen.append(Redirect(caption, clip_seed(seed, number), attribute, value, form, told))
    return chosen


def _in_short(attribute: str, said: Mapping[str, str], dice: Random) -> str:
    """A sentence that names only the new value, by the grammar of the captions that training sees."""
    value = said[attribute]
    if attribute == "time":
        return dice.choice(TIME_CLAUSES[value])
    if attribute == "weather":
        return dice.choice(WEATHER_CLAUSES[value])
    way = dice.choice(PHRASES[attribute][value])
    if attribute == "place":
        return f"{dice.choice(PLACE_CLAUSES)} {way}"
    begun, ended = dice.choice(COLOUR_CLAUSES)
    return f"{begun} {dice.choice(PHRASES['subject'][said['subject']])} {ended} {way}"


def evaluate_redirect(
    recipes: Sequence[str],
    engine_of: Callable[[str], Engine],
    *,
    prompts: int = 40,
    seeds: int = 2,
    transition: Transition = "redirect",
    over: int = 1,
    far: float | None = None,
    in_flight: PromptInFlight = "own",
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Score how recipes follow a redirect of one attribute.

    Args:
        recipes: what to score.
        engine_of: loads the engine of a recipe.
        prompts: how many captions of the fixed held-out list, 1 to 1000.
        seeds: streams for each caption, with seeds 0, 1, ...
        transition: whether streams are redirected, or begin a new shot, as by `Stream.cut`.
        over: blocks that the words of a redirect go over in, as for `Stream.redirect`.
        far: the share of the far state that weighs on, 0 to 1; None: the transition's own default.
        in_flight: which prompt blocks in flight go on under, their own or the new one, as for `Stream.redirect`.
        progress: is told, in words, how far it is.

    Returns:
        For each recipe a table ready for JSON. Shares are between 0 and 1, or None where nothing could be scored;
        median_seconds counts a redirect that never acts as infinite, and is None if more than half never do.

    Raises:
        ValueError: no captions, more than there are, no seeds, or a share that is none.
    """
    if transition == "cut" and (in_flight != "own" or over != 1):
        raise ValueError("a cut drops blocks in flight, and acts at once: in_flight and over are for redirects")
    require_blend(over, "lerp")
    require_share(FAR_AFTER_REDIRECT if far is None else far)
    chosen = redirects(held_out_captions(prompts), seed_list(seeds))

    def change(streams: StreamBatch, told: Sequence[str]) -> None:
        if transition == "cut":
            streams.cut(told, far=FAR_AFTER_CUT if far is None else far)
        else:
            streams.redirect(told, over=over, far=FAR_AFTER_REDIRECT if far is None else far, in_flight=in_flight)

    watch = partial(_watch, chosen=chosen, change=change, progress=progress)
    engines = {recipe: engine_of(recipe) for recipe in recipes}  # an unknown name is refused before work begins
    results = []
    for recipe, engine in engines.items():
        told = watch(f"{recipe}, redirected", engine, [one.told for one in chosen])
        control = watch(f"{recipe}, left alone", engine, [one.caption for one in chosen])
        results.append(
            {
                "recipe": recipe,
                "levels": len(engine.recipe.steps),
                "weights": engine.weights,
                "prompts": prompts,
                "seeds": seeds,
                "transition": transition,
                "over": over,
                "far": far,
                "in_flight": in_flight,
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
    name: str, engine: Engine, told: Sequence[str],
    *, chosen: Sequence[Redirect], change: Change, progress: Callable[[str], None],
) -> _Watched:  # fmt: skip
    """Stream every caption, go on as told, and read the pictures, a batch at a time."""
    streams = zip(range(1, len(chosen) + 1), chosen, told, strict=True)

    def read(job: Sequence[tuple[int, Redirect, str]]) -> _Watched:
        numbers, batch, texts = zip(*job, strict=True)
        watched = _read(*_pictures(engine, batch, texts, change), batch)
        progress(f"{name}: streams {numbers[0]} to {numbers[-1]} of {len(chosen)}")
        return watched

    before, reads, last = zip(*parallel.share_out(batches(list(streams), engine.device), read), strict=True)
    return _Watched(joined(before), torch.cat(reads), joined(last))


def _pictures(engine: Engine, batch: Sequence[Redirect], told: Sequence[str], change: Change) -> tuple[Tensor, Tensor]:
    """The pictures before and after streams are told how to go on: [B, T, H, W, 3] each."""
    with engine.stream_batch([one.caption for one in batch], seeds=[one.seed for one in batch]) as streams:
        before = _at_least(BEFORE_SECONDS * RATE, streams)
        change(streams, told)
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
    everything = [True] * len(chosen)
    reached, kept = _scores(told, chosen, everything)
    reached_control, kept_control = _scores(control, chosen, everything)
    seconds = _seconds(told.read_BW, chosen).median().item()
    by_form = {form: _scores(told, chosen, [one.form == form for one in chosen]) for form in FORMS}
    return {
        "reached_within_4s": shares(reached),
        "reached_within_4s_control": shares(reached_control),
        "median_seconds": seconds if math.isfinite(seconds) else None,
        "kept_unchanged": kept.share,
        "kept_unchanged_control": kept_control.share,
        "counts": {
            "reached_within_4s": tables(reached),
            "reached_within_4s_control": tables(reached_control),
            "kept_unchanged": kept.table(),
            "kept_unchanged_control": kept_control.table(),
        },
        "by_form": {
            form: {"reached_within_4s": tables(reached), "kept_unchanged": kept.table()}
            for form, (reached, kept) in by_form.items()
        },
    }


def _scores(watched: _Watched, chosen: Sequence[Redirect], counted: Sequence[bool]) -> tuple[Score, Tally]:
    """Reached, by what changed (abstained: where nothing was read at all), and kept."""
    reached, unread = _seconds(watched.read_BW, chosen).isfinite(), (watched.read_BW < 0).all(1)
    scores = dict.fromkeys(CHANGEABLE, Tally())
    for one, right, nothing, counts in zip(chosen, reached.tolist(), unread.tolist(), counted, strict=True):
        verdict = "1" if right else "?" if nothing else "0"
        for name in CHANGEABLE:
            scores[name] += Tally(verdict if counts and name == one.attribute else "-")
    return scores, _kept(watched, chosen, torch.tensor(counted))


def _seconds(read_BW: Tensor, chosen: Sequence[Redirect]) -> Tensor:
    """When each stream was first read as it was to be, in seconds after the redirect, infinite for never: [B]."""
    wanted = torch.tensor([ATTRIBUTES[one.attribute].index(one.value) for one in chosen])
    right = read_BW == wanted[:, None]
    lasting = right[:, :-1] & right[:, 1:]  # one window alone may flicker
    seconds = STEP_SECONDS * (1 + lasting.int().argmax(1))
    return torch.where(lasting.any(1), seconds, torch.inf)


def _kept(watched: _Watched, chosen: Sequence[Redirect], counted_B: Tensor) -> Tally:
    """Of what was there before, rightly where the caption says it, and is not to change: what still is."""
    said = [parse(one.caption) for one in chosen]
    total = Tally()
    for name in KEPT:
        asked, before = asked_for(name, said), getattr(watched.before, name)
        stays = torch.tensor([one.attribute != name for one in chosen])
        there = (before >= 0) & ((asked < 0) | (before == asked))
        total += tally(getattr(watched.last, name), torch.where(there & stays & counted_B, before, -1))
    return total
