"""Scores of recall: by an engine that sees what it is given and remembers, and by ones that do not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
from tests.rendered import RenderedBatch, RenderedEngine
from torch import Tensor

from longtake.evaluation import recall
from longtake.evaluation.sources import stacked
from longtake.recipes import toy_codec
from longtake.toy.captions import parse
from longtake.toy.detect import detect
from longtake.toy.scenes import ATTRIBUTES, held_out_combinations, make_scene

REMEMBERED = ("subject", "colour", "landmark", "landmark_colour")
TWO_SECONDS = {"away_start": 2.0, "away_seconds": 2.0, "away_every": 100.0}


class SeeingEngine(RenderedEngine):
    """Goes on with what it detects in the given pictures; a forgetful one with anything but what it sees.

    camera: when it looks away.
    """

    def __init__(self, remembers: bool = True, **camera: float) -> None:
        super().__init__()
        self.remembers, self.camera = remembers, camera or TWO_SECONDS

    def pictures_in(self, blocks: int) -> int:
        return 12 * blocks - 3

    @contextmanager
    def stream_batch(
        self, prompts: Sequence[str], *, seeds: Sequence[int], pictures: Tensor | None = None
    ) -> Iterator[RenderedBatch]:
        assert pictures is not None and pictures.shape[1] == 57  # the first whole block by which it has turned away
        found, scenes = detect(pictures), []
        for row, said in enumerate(map(parse, prompts)):
            seen = {name: ATTRIBUTES[name][int(getattr(found, name)[row])] for name in REMEMBERED}
            if not self.remembers:
                seen = {name: other_than(value, name) for name, value in seen.items()}
            scenes.append(make_scene(**self.camera, **(said | seen), landmark_front=False, landmark_x=40.0))
        batch = RenderedBatch(prompts, seeds, obeys=True)
        batch.scenes, batch.pictures = stacked(scenes), pictures.shape[1]
        yield batch


def other_than(value: str, name: str) -> str:
    return Random(value).choice([other for other in ATTRIBUTES[name] if other != value])


def score(engine: Any, prompts: int = 2, after: Sequence[int] = (2,)) -> dict[str, Any]:
    (table,) = recall.evaluate_recall(["any"], lambda name: engine, prompts=prompts, seeds=1, after=after)
    return table


def test_who_remembers_recalls_everything() -> None:
    table = score(SeeingEngine(), prompts=3)
    assert table["after"] == {"2": {"colour": 1.0, "subject": 1.0, "landmark": 1.0}}
    assert table["returned"] == table["stayed_away"] == {"2": 1.0}
    assert (table["recipe"], table["levels"], table["prompts"]) == ("any", 4, 3)
    assert (table["seeds"], table["seed_list"]) == (1, [0])
    low, high = table["counts"]["2"]["landmark"]["interval_95"]
    assert 0.4 < low < high == 1.0


def test_who_forgets_returns_but_recalls_nothing() -> None:
    table = score(SeeingEngine(remembers=False))
    assert table["after"] == {"2": {"colour": 0.0, "subject": 0.0, "landmark": 0.0}}
    assert table["returned"] == {"2": 1.0}


def test_who_never_returns_recalls_nothing() -> None:
    table = score(SeeingEngine(away_start=2.0, away_seconds=1000.0, away_every=2000.0))
    assert table["after"] == {"2": {"colour": 0.0, "subject": 0.0, "landmark": 0.0}}
    assert (table["returned"], table["stayed_away"]) == ({"2": 0.0}, {"2": 1.0})


def test_one_stream_is_read_after_every_gap() -> None:
    """Its camera is back after two seconds: too early for a gap of four, but what is there is the same."""
    table = score(SeeingEngine(), prompts=1, after=[4, 2])
    assert list(table["after"]) == ["2", "4"]
    assert table["stayed_away"] == {"2": 1.0, "4": 0.0}
    assert table["returned"] == {"2": 1.0, "4": 1.0}


def test_renders_keep_to_every_gap() -> None:
    (table,) = recall.evaluate_recall(["truth"], pytest.fail, prompts=1, seeds=1, after=[2, 4])
    everything = {"colour": 1.0, "subject": 1.0, "landmark": 1.0}
    assert table["after"] == {"2": everything, "4": everything}
    assert table["returned"] == table["stayed_away"] == {"2": 1.0, "4": 1.0}
    assert table["levels"] is None


def test_captions_do_not_tell_what_is_to_be_recalled() -> None:
    chosen = recall.openings(20, [0, 1])
    assert [one.caption for one in chosen[:5]] == [one.caption for one in recall.openings(5, [0])]
    assert len({one.seed for one in chosen}) == len({one.caption for one in chosen}) == 40
    for one in chosen:
        assert parse(one.caption).keys() == {"subject", "motion", "place", "time", "weather", "camera"}
        said = [ATTRIBUTES[name][int(recall._first(one.scene, name))] for name in ("subject", "colour", "place")]
        assert tuple(said) in held_out_combinations()


def test_what_cannot_be_scored_is_refused() -> None:
    for prompts in (0, 501):
        with pytest.raises(ValueError, match=f"1 to 500, not {prompts}"):
            score(None, prompts=prompts)
    for after in ([], [4, 1]):
        with pytest.raises(ValueError, match="2 seconds or longer"):
            score(None, after=after)


def test_the_codec_is_a_mark_like_the_truth() -> None:
    (table,) = recall.evaluate_recall(["codec"], pytest.fail, prompts=1, seeds=1, after=[2], codec=toy_codec())
    assert table["after"]["2"] == {"colour": 1.0, "subject": 1.0, "landmark": 1.0}
