"""Scores beside each other by seed: pairs share caption and noise, cameras are counted by what captions say."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import benchmark

CAPTIONS = 3  # held-out ones: the first pans right, the second stands still, the third pans left


def table(camera: str, place: str) -> list[dict[str, Any]]:
    """Of two seeds, whose verdicts are given seed by seed."""
    counts = {"at": {"camera": {"verdicts": camera}}, "constancy": {"place": {"verdicts": place}}}
    return [{"prompts": CAPTIONS, "seed_list": [0, 1], "counts": {"5": counts}}]


def test_each_group_of_seeds_is_compared_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, files = benchmark("seed_by_seed"), [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(json.dumps(table("11-" + "010", "1--" + "-1-")))
    files[1].write_text(json.dumps(table("01-" + "011", "1--" + "-0-")))
    monkeypatch.setattr(sys, "argv", ["seed_by_seed", *map(str, files), "--groups", "0,1", "0", "1"])
    script.main()
    both, first, second = json.loads(capsys.readouterr().out)["others"]
    assert [row["seeds"] for row in (both, first, second)] == [[0, 1], [0], [1]]
    assert [row["at"]["camera"]["pairs"] for row in (both, first, second)] == [5, 2, 3]
    assert (first["at"]["camera"]["second"], second["at"]["camera"]["second"]) == (1 / 2, 2 / 3)
    assert (both["constancy"]["place"]["first"], both["constancy"]["place"]["second"]) == (1, 1 / 2)
    assert both["cameras"] == {
        "pans left": {"scored": 1, "first": 0, "other": 1, "lost": 0, "gained": 1},
        "pans right": {"scored": 2, "first": 1, "other": 0, "lost": 1, "gained": 0},
        "still": {"scored": 2, "first": 2, "other": 2, "lost": 0, "gained": 0},
    }
