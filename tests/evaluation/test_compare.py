"""Paired comparisons of scores."""

from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.evaluation.compare import Difference, compared, difference
from longtake.evaluation.scores import Tally

VERDICTS = st.lists(st.sampled_from("10?-"), min_size=12, max_size=12).map("".join)


def known(first: str, second: str, seeds: int = 2) -> Difference:
    found = difference(first, second, seeds)
    assert found is not None
    return found


@given(VERDICTS, VERDICTS)
def test_shares_are_those_of_the_pairs_scored_in_both_and_lie_around_their_difference(first: str, second: str) -> None:
    pairs = [(a == "1", b == "1") for a, b in zip(first, second, strict=True) if "-" not in (a, b)]
    found = difference(first, second, 2)
    if not pairs:
        assert found is None
        return
    assert found is not None and found.pairs == len(pairs)
    assert (found.first, found.second) == pytest.approx(tuple(np.mean(pairs, axis=0)))
    low, high = found.interval_95
    assert low <= found.second - found.first <= high or len(pairs) < 6, "but for a handful of captions"


@given(VERDICTS)
def test_a_series_is_not_better_than_itself(verdicts: str) -> None:
    found = difference(verdicts, verdicts, 2)
    assert found is None or (found.first == found.second and found.interval_95 == (0, 0))


def test_pairs_see_what_two_intervals_do_not() -> None:
    """Nine in ten of captions are easy for both, and of the others the second does more: always the same ones."""
    first = 900 * "1" + 100 * "0"
    second = 930 * "1" + 70 * "0"
    low, high = known(first, second, 1).interval_95
    assert 0.015 < low < 0.03 < high < 0.045
    a, b = Tally(first).interval, Tally(second).interval
    assert a and b and b[0] < a[1], "which their own intervals do not tell"


def test_the_interval_holds_the_truth_nineteen_times_of_twenty() -> None:
    """Captions differ in how hard they are, and seeds of one caption resemble each other."""
    held = 0
    for seed in range(120):
        dice = Random(seed)
        rates = [dice.choice((0.2, 0.9)) for _ in range(80)]
        first = "".join(str(int(dice.random() < rate)) for _ in range(4) for rate in rates)
        second = "".join(str(int(dice.random() < rate - 0.1)) for _ in range(4) for rate in rates)
        low, high = known(first, second, 4).interval_95
        held += low <= -0.1 <= high
    assert held >= 108


def table(verdicts: str, **more: Any) -> dict[str, Any]:
    counts = {"5": {"at": {"camera": Tally(verdicts).table()}, "one_subject": Tally(verdicts).table()}}
    return {"prompts": 2, "seed_list": [0, 1], "counts": counts, **more}


def test_tables_are_compared_by_name_and_only_with_their_like() -> None:
    found = compared(table("1100"), table("1111"))
    assert list(found) == ["5 at camera", "5 one_subject"]
    assert found["5 at camera"][:3] == (0.5, 1.0, 4)
    with pytest.raises(ValueError, match="other videos: seed_list"):
        compared(table("1100"), table("1111", seed_list=[0, 2]))
    with pytest.raises(ValueError, match="score both anew"):
        compared(table("1100"), {"prompts": 2, "seed_list": [0, 1], "counts": {"5": {"right": 3}}})
    with pytest.raises(ValueError, match="other videos: captions"):
        compared(table("1100"), table("1111", captions="of a file"))
    with pytest.raises(ValueError, match="as many captions for 2 seeds"):
        difference("101", "101", 2)


def test_captions_that_were_left_out_leave_the_others_in_their_pairs() -> None:
    """As of redirects, where a caption may say nothing that can change: both seeds go without it."""
    found = compared(table("100111", prompts=4), table("110111", prompts=4))["5 at camera"]
    assert found.pairs == 6 and found == difference("100111", "110111", 2)
