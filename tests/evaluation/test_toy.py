"""Scores of videos whose truth is known."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from longtake.evaluation import toy
from longtake.evaluation.scores import Tally
from longtake.toy.captions import parse
from longtake.toy.scenes import ATTRIBUTES

PROMPTS = ("a red ball bounces over green hills at night", "a blue cat stands still on a beach")


def no_engine(recipe: str) -> Any:
    raise AssertionError(f"{recipe} needs no engine")


@pytest.fixture(scope="module")
def truth_table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS), encoding="utf-8")
    (table,) = toy.evaluate_toy(["truth"], no_engine, prompt_file=file, seeds=1, at=[5])
    return table


def test_renders_follow_their_captions(truth_table: dict[str, Any]) -> None:
    scores = truth_table["at"]["5"]
    for attribute in ("colour", "place", "time"):
        assert scores[attribute] == 1.0
    assert scores["weather"] is None  # no caption says it


def test_the_table_has_the_fields_that_others_read(truth_table: dict[str, Any]) -> None:
    assert truth_table["recipe"] == "truth"
    assert (truth_table["prompts"], truth_table["seeds"], truth_table["seed_list"]) == (2, 1, [0])
    assert set(truth_table["at"]["5"]) == set(toy.FOLLOWED) == set(truth_table["constancy"]["5"])
    assert truth_table["frechet"]["5"] >= 0
    assert truth_table["counts"]["5"]["at"]["place"]["scored"] == 2
    assert truth_table["levels"] is None and len(truth_table["captions"]) == 16  # which tells a file's from others


def test_the_table_shows_what_was_asked_and_how_often(truth_table: dict[str, Any]) -> None:
    by_value = truth_table["by_value"]["5"]
    assert by_value["time"] == {"night": {"right": 1, "scored": 1}}
    assert by_value["colour"] == {"red": {"right": 1, "scored": 1}, "blue": {"right": 1, "scored": 1}}
    assert by_value["weather"] == {}
    assert truth_table["one_subject"] == {"5": 1.0}
    assert truth_table["counts"]["5"]["one_subject"]["scored"] == 2


def found(**indices: Sequence[int]) -> Any:
    """Detections of two clips, all abstaining but for those given."""
    return type("Found", (), {name: torch.tensor(indices.get(name, (-1, -1))) for name in ATTRIBUTES})


def test_abstaining_is_wrong_and_what_is_not_said_is_not_scored() -> None:
    score = toy.score_following(found(subject=(0, -1), place=(0, 2)), [parse(prompt) for prompt in PROMPTS])
    assert score["subject"] == Tally("1?")
    assert score["place"] == Tally("11")
    assert score["time"] == Tally("?-")
    assert score["weather"] == Tally("--")


def test_what_is_left_open_must_stay() -> None:
    said = [parse(prompt) for prompt in PROMPTS]
    score = toy.score_constancy(found(weather=(1, 1), time=(0, 0)), found(weather=(1, 2), time=(0, 0)), said)
    assert score["weather"] == Tally("10")
    assert score["time"] == Tally("-1")  # one caption says it
    assert score["subject"] == Tally("--")


def test_one_subject_is_neither_two_nor_none() -> None:
    captions = ["a red ball bounces", "a red ball walks left", "a ball spins while the camera looks away and returns"]
    said = [parse(caption) for caption in [*captions, "in the desert"]]
    score = toy.score_one_subject
    assert score(torch.tensor([1, 1, 1, 1]), said, 5) == Tally("111-")
    assert score(torch.tensor([2, 2, 2, 2]), said, 60) == Tally("000-")
    assert score(torch.tensor([0, 0, 0, 0]), said, 5) == Tally("???-")
    assert score(torch.tensor([0, 0, 0, 0]), said, 60) == Tally("?---")


def test_intervals_hold_their_share() -> None:
    low, high = Tally(97 * "1" + "00?").interval or (1.0, 0.0)
    assert 0.91 < low < 0.97 < high < 1.0
    assert Tally().share is None and Tally().interval is None


def test_frechet_distance_of_gaussians() -> None:
    """Of normal features it is the squared distance of means plus that of deviations."""
    dice = torch.Generator().manual_seed(0)
    one = torch.randn(20_000, 3, generator=dice)
    other = 2 * torch.randn(20_000, 3, generator=dice) + torch.tensor([1.0, 0.0, 0.0])
    assert toy.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert toy.frechet_distance(one, other) == pytest.approx(1 + 3, rel=0.05)


def test_wrong_use_is_told() -> None:
    with pytest.raises(ValueError, match="end at 5 or later"):
        toy.evaluate_toy(["truth"], no_engine, at=[2])
    with pytest.raises(ValueError, match="1 to 1000, not 0"):
        toy.evaluate_toy(["truth"], no_engine, prompts=0)
    with pytest.raises(ValueError, match="at least one seed"):
        toy.evaluate_toy(["truth"], no_engine, seeds=0)
