"""Scores of redirects: by an engine that obeys at once, and by one that is deaf."""

from collections import Counter
from typing import Any

import pytest
import torch
from tests.rendered import RenderedBatch, RenderedEngine

from longtake.evaluation import redirect
from longtake.evaluation.sources import held_out_captions
from longtake.toy.captions import parse
from longtake.toy.scenes import CHANGEABLE


def score(engine: Any, prompts: int) -> dict[str, Any]:
    (table,) = redirect.evaluate_redirect(["any"], lambda name: engine, prompts=prompts, seeds=1)
    return table


@pytest.fixture(scope="module")
def obedient() -> dict[str, Any]:
    return score(RenderedEngine(), prompts=3)


def test_a_change_that_is_shown_is_reached_and_the_rest_is_kept(obedient: dict[str, Any]) -> None:
    assert obedient["reached_within_4s"] == {"colour": 1.0, "place": 1.0, "time": None, "weather": 1.0}
    assert 0.5 <= obedient["median_seconds"] <= 2.5  # the world fades in 1.25
    assert obedient["kept_unchanged"] == obedient["kept_unchanged_control"] == 1.0


def test_streams_that_are_left_alone_do_not_change(obedient: dict[str, Any]) -> None:
    assert obedient["reached_within_4s_control"] == {"colour": 0.0, "place": 0.0, "time": None, "weather": 0.0}
    assert obedient["counts"]["reached_within_4s_control"]["place"]["scored"] == 1


def test_the_table_says_what_was_done(obedient: dict[str, Any]) -> None:
    assert (obedient["recipe"], obedient["levels"], obedient["weights"], obedient["prompts"]) == ("any", 4, "drawn", 3)
    assert (obedient["seeds"], obedient["seed_list"]) == (1, [0])
    assert obedient["counts"]["kept_unchanged"]["right"] == obedient["counts"]["kept_unchanged"]["scored"] > 5
    kept = [form["kept_unchanged"]["scored"] for form in obedient["by_form"].values()]
    assert len(kept) == 2 and sum(kept) == obedient["counts"]["kept_unchanged"]["scored"]


def test_a_deaf_engine_reaches_nothing() -> None:
    table = score(RenderedEngine(obeys=False), prompts=1)
    assert 1.0 not in table["reached_within_4s"].values() and 0.0 in table["reached_within_4s"].values()
    assert table["median_seconds"] is None
    assert table["kept_unchanged"] == 1.0


def test_streams_are_told_how_the_words_change(monkeypatch: pytest.MonkeyPatch) -> None:
    told, act = [], RenderedBatch.redirect
    monkeypatch.setattr(
        RenderedBatch, "redirect", lambda self, prompts, **how: told.append(how) or act(self, prompts, **how)
    )
    engine = RenderedEngine()
    (table,) = redirect.evaluate_redirect(["any"], lambda name: engine, prompts=1, seeds=1, over=4, in_flight="new")
    assert (table["in_flight"], table["over"]) == ("new", 4)
    assert told == [{"over": 4, "far": 1.0, "in_flight": "new"}] * 2
    with pytest.raises(ValueError, match="acts at once"):
        redirect.evaluate_redirect(["any"], lambda name: engine, prompts=1, seeds=1, over=4, transition="cut")
    for how, why in (({"over": 0}, "over 1 block or more"), ({"far": float("nan")}, "a share of 0 to 1")):
        with pytest.raises(ValueError, match=why):
            redirect.evaluate_redirect(["any"], lambda name: pytest.fail("work was begun"), **how)


def test_the_first_of_two_windows_is_when_it_is_reached() -> None:
    day_to_night = redirect.Redirect("a ball by day", 0, "time", "night", "full", "a ball at night")
    read = torch.tensor([[0, 2, 0, 2, 2], [2, 0, 2, 0, 2], [-1, -1, -1, 2, 2], [0, 0, 0, 0, 0]])
    assert redirect._seconds(read, [day_to_night] * 4).tolist() == [2.0, torch.inf, 2.0, torch.inf]


def test_every_caption_gets_one_change_and_every_attribute_as_many() -> None:
    captions = held_out_captions(1000)
    chosen = redirect.redirects(captions, [0, 1])
    assert chosen == redirect.redirects(captions, [0, 1])
    uses = Counter(one.attribute for one in chosen)
    assert uses.keys() == set(CHANGEABLE) and max(uses.values()) - min(uses.values()) <= 1
    assert len(chosen) > 1990  # a few captions say nothing that can change
    for one in chosen:
        said = parse(one.caption)
        assert said[one.attribute] != one.value
        asked = {one.attribute: one.value}
        assert parse(one.told) == (said | asked if one.form == "full" else _alone(asked, said))
    forms = Counter((one.attribute, one.form) for one in chosen)
    assert all(abs(forms[name, "short"] - forms[name, "full"]) <= 1 for name in CHANGEABLE)


def _alone(asked: dict[str, str], said: dict[str, str]) -> dict[str, str]:
    """What a short redirect says: a colour needs to say whose."""
    return asked | ({"subject": said["subject"]} if "colour" in asked else {})
