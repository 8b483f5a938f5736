"""How soon a redirect shows: counted on tiny engines, whatever the clock says."""

from tests import tiny

from longtake.evaluation.speed import time_redirects
from longtake.recipes import self_forcing_sink


def test_a_redirect_shows_when_a_block_has_fallen_through_all_levels() -> None:
    """T blocks are in flight, so the first that begins under the new prompt is the T-th to come."""
    shown = time_redirects(tiny.engine(tiny.rolling_recipe()), "anything")
    assert {way: one["blocks"] for way, one in shown.items()} == {"own": len(tiny.LEVELS), "new": 1}
    assert shown["own"]["seconds"] > 0


def test_block_by_block_it_shows_with_the_next_block() -> None:
    shown = time_redirects(tiny.engine(self_forcing_sink()), "anything")
    assert {way: one["blocks"] for way, one in shown.items()} == {"own": 1}
