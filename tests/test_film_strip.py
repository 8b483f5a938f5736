"""The pictures of the README can be made again."""

import numpy as np
import pytest

import longtake
from longtake.media.pictures import contact_sheet
from longtake.toy.scenes import HEIGHT, WIDTH
from tests.scripts import benchmark


def test_a_sheet_of_recall_shows_what_was_given_and_what_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    strip, moments = benchmark("film_strip"), (0.5, 5.0, 10.2)
    monkeypatch.setattr(strip, "RECALLED", 1)
    monkeypatch.setattr(strip, "RECALL_MOMENTS", moments)
    sheet = strip.sheet_of_recall(longtake.load("toy", recipe="self_forcing_sink"))
    assert sheet.shape == contact_sheet(np.zeros((3, HEIGHT, WIDTH, 3), np.uint8), len(moments)).shape
