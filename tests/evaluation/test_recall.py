"""Scores of recall: by an engine that sees what it is given and remembers, and by ones that do not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import torch
from tests.rendered import RenderedBatch, RenderedEngine, in_pairs
from torch import Tensor

from longtake.evaluation import recall
from longtake.evaluation.sources import stacked
from longtake.generation.stream import to_uint8
from longtake.recipes import self_forcing_sink
from longtake.recipes.weight_files import toy_codec
from longtake.toy.captions import parse
from longtake.toy.detect import detect
from longtake.toy.scenes import ATTRIBUTES, RATE, Scenes, held_out_combinations, make_scene
from longtake.toy.truth import truth

REMEMBERED = ("subject", "colour", "landmark", "landmark_colour")
EVERYTHING, NOTHING = (dict.fromkeys(recall.RECALLED, share) for share in (1.0, 0.0))


class SeeingEngine(RenderedEngine):
    """Goes on with what it detects in the given pictures; a forgetful one with anything but what it sees.

    away_seconds: how long its camera stays away. looks_at: how many of the given pictures it looks at, from the first.
    """

    def __init__(self, remembers: bool = True, away_seconds: float = 2.0, looks_at: int | None = None) -> None:
        super().__init__()
        self.remembers, self.away_seconds, self.looks_at = remembers, away_seconds, looks_at
        self.given: list[int] = []  # pictures of each batch

    def pictures_in(self, blocks: int) -> int:
        return 12 * blocks - 3

    @contextmanager
    def stream_batch(
        self, prompts: Sequence[str], *, seeds: Sequence[int], pictures: Tensor | None = None
    ) -> Iterator[RenderedBatch]:
        assert pictures is not None
        self.given.append(pictures.shape[1])
        began = pictures.shape[1] // RATE - 1
        camera = {"away_start": float(began), "away_seconds": self.away_seconds, "away_every": 2000.0}
        found, scenes = detect(pictures[:, : self.looks_at]), []
        for row, said in enumerate(map(parse, prompts)):
            seen = {name: ATTRIBUTES[name][int(getattr(found, name)[row])] for name in REMEMBERED}
            if not self.remembers:
                seen = {name: other_than(value, name) for name, value in seen.items()}
            scenes.append(make_scene(**camera, **(said | seen), landmark_front=False, landmark_x=40.0))
        batch = RenderedBatch(prompts, seeds, obeys=True)
        batch.scenes, batch.pictures = stacked(scenes), pictures.shape[1]
        yield batch


@pytest.fixture(scope="module", autouse=True)
def renders() -> Iterator[None]:
    """Most tests begin with the same pictures: they are drawn once, and those at which detectors look alone."""
    known: dict[tuple, Tensor] = {}

    def rendered(scenes: Scenes, pictures: int, first: int) -> Tensor:
        rows = [scenes[row : row + 1] for row in range(len(scenes))]
        keys = [(pictures, first, *(value.numpy().tobytes() for value in vars(row).values())) for row in rows]
        for key, row in zip(keys, rows, strict=True):
            if key not in known:
                known[key] = to_uint8(in_pairs(row, pictures, first).frames_BFCHW)
        return torch.cat([known[key] for key in keys])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall, "rendered", rendered)
        yield


def other_than(value: str, name: str) -> str:
    return Random(value).choice([other for other in ATTRIBUTES[name] if other != value])


def score(engine: Any, prompts: int = 2, after: Sequence[int] = (2,), **more: Any) -> dict[str, Any]:
    (table,) = recall.evaluate_recall(["any"], lambda name: engine, prompts=prompts, seeds=1, after=after, **more)
    return table


def test_who_remembers_recalls_everything() -> None:
    table = score(SeeingEngine(), prompts=1)
    for seen in (table, table["seen_first"]):
        assert seen["after"] == {"2": EVERYTHING}
        assert seen["returned"] == seen["stayed_away"] == {"2": 1.0}
    assert (table["recipe"], table["levels"], table["weights"], table["prompts"]) == ("any", 4, "drawn", 1)
    assert (table["seeds"], table["seed_list"]) == (1, [0])
    low, high = table["counts"]["2"]["landmark"]["interval_95"]
    assert 0.1 < low < high == 1.0


def test_who_forgets_returns_but_recalls_nothing() -> None:
    table = score(SeeingEngine(remembers=False), prompts=1)
    assert table["after"] == table["seen_first"]["after"] == {"2": NOTHING}
    assert table["returned"] == {"2": 1.0}


def test_who_only_looks_at_the_first_pictures_recalls_only_what_was_seen_first() -> None:
    table = score(SeeingEngine(looks_at=24), prompts=1)
    assert table["seen_first"]["after"] == {"2": EVERYTHING}
    assert table["after"]["2"]["colour"] == table["after"]["2"]["landmark"] == 0.0
    assert table["returned"] == {"2": 1.0}


def test_who_never_returns_recalls_nothing() -> None:
    table = score(SeeingEngine(away_seconds=1000.0), prompts=1)
    assert table["after"] == {"2": NOTHING}
    assert (table["returned"], table["stayed_away"]) == ({"2": 0.0}, {"2": 1.0})


def test_where_the_absence_is_given_only_the_return_is_streamed() -> None:
    engine = SeeingEngine(away_seconds=0.5, looks_at=105)  # before it turns away
    table = score(engine, prompts=1, after=[2, 4], absence="given")
    # The last whole blocks before the camera turns back: 2 and 4 seconds after it has turned away.
    assert engine.given == [177, 213, 129, 165]
    for seen in (table, table["seen_first"]):
        assert seen["after"] == {"2": EVERYTHING, "4": EVERYTHING}
        assert seen["stayed_away"] == {"2": 1.0, "4": 1.0}
    forgets = score(SeeingEngine(remembers=False, away_seconds=0.5), prompts=1, after=[4], absence="given")
    assert forgets["after"] == {"4": NOTHING} and forgets["returned"] == {"4": 1.0}


def test_a_longer_lead_is_landscape_before_the_same() -> None:
    scene = recall.openings(1, [0])[0].scene
    end = round(recall.TURNED_SECONDS * RATE)
    long = truth(recall.turning(scene, 20), 20 * RATE + end, -20 * RATE)
    assert max(long.visible[:, : 18 * RATE].max(), long.landmark_visible[:, : 18 * RATE].max()) == 0
    engine = SeeingEngine()
    table = score(engine, prompts=1, after=[2], lead=20)
    assert table["after"] == {"2": EVERYTHING} and table["lead"] == 20
    assert engine.given[0] == 429, "the first whole block after 20 + 6.5 seconds"
    with pytest.raises(ValueError, match="a lead is 3 seconds"):
        score(SeeingEngine(), lead=2)
    with pytest.raises(ValueError, match="a lead is 3 seconds"):
        score(SeeingEngine(), lead=4, absence="given")


def test_one_stream_is_read_after_every_gap() -> None:
    """Its camera is back after two seconds: too early for a gap of four, but what is there is the same."""
    engine = SeeingEngine()
    table = score(engine, prompts=1, after=[4, 2])
    # The first whole block by which the camera has turned away, five seconds after it has come.
    assert engine.given == [153, 105]
    assert list(table["after"]) == ["2", "4"]
    assert table["stayed_away"] == {"2": 1.0, "4": 0.0}
    assert table["returned"] == {"2": 1.0, "4": 1.0}


def test_renders_keep_to_every_gap() -> None:
    (table,) = recall.evaluate_recall(["truth"], pytest.fail, prompts=1, seeds=1, after=[2, 4])
    for seen in (table, table["seen_first"]):
        assert seen["after"] == {"2": EVERYTHING, "4": EVERYTHING}
        assert seen["returned"] == seen["stayed_away"] == {"2": 1.0, "4": 1.0}
    assert table["levels"] is None


def test_captions_do_not_tell_what_is_to_be_recalled() -> None:
    chosen = recall.openings(20, [0, 1])
    assert [one.caption for one in chosen[:5]] == [one.caption for one in recall.openings(5, [0])]
    assert len({one.seed for one in chosen}) == len({one.caption for one in chosen}) == 40
    for one in chosen:
        assert parse(one.caption).keys() == {"subject", "motion", "place", "time", "weather", "camera"}
        said = [ATTRIBUTES[name][int(recall._first(one.scene, name))] for name in ("subject", "colour", "place")]
        assert tuple(said) in held_out_combinations()


@pytest.mark.parametrize("gap", [2, 60])
def test_what_is_seen_later_is_out_of_sight_at_first_and_for_the_whole_gap(gap: int) -> None:
    sink = toy_codec().pictures(self_forcing_sink().sink)
    scenes = recall.turning(stacked([one.scene for one in recall.openings(20, [0])]), gap)
    lead = recall.LEAD * RATE
    true = truth(scenes, lead + round((recall.TURNED_SECONDS + gap) * RATE), -lead)
    for visible_BF in (true.visible, true.landmark_visible):
        assert visible_BF[:, : 2 * sink].max() == 0  # by far: the codec does not look ahead
        assert visible_BF[:, -gap * RATE :].max() == 0
        shown_BF = visible_BF[:, lead : lead + recall.SEEN_SECONDS * RATE] > 0.9
        assert (shown_BF.sum(1) >= 24).all()
        assert shown_BF[:, :sink].any(1).all()  # the sink of a stream that begins here


def test_the_given_pictures_are_the_same_for_every_gap() -> None:
    scene = recall.openings(1, [0])[0].scene
    short, long = (truth(recall.turning(scene, gap), 48 + 104, -48) for gap in (2, 60))
    assert all(torch.equal(one, other) for one, other in zip(short, long, strict=True))


def test_what_cannot_be_scored_is_refused() -> None:
    for prompts in (0, 501):
        with pytest.raises(ValueError, match=f"1 to 500, not {prompts}"):
            score(None, prompts=prompts)
    for after in ([], [4, 1]):
        with pytest.raises(ValueError, match="2 seconds or longer"):
            score(None, after=after)


def test_the_codec_is_a_mark_like_the_truth() -> None:
    (table,) = recall.evaluate_recall(["codec"], pytest.fail, prompts=1, seeds=1, after=[2], codec=toy_codec())
    assert table["after"]["2"] == table["seen_first"]["after"]["2"] == EVERYTHING
