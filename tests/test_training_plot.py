"""The plot of trainings side by side: parts of one go on from each other, and it is drawn."""

import json
import sys
from pathlib import Path

import pytest

from tests.scripts import benchmark

pytest.importorskip("matplotlib", reason="matplotlib is not installed (it comes with longtake[train])")


def test_parts_of_a_training_go_on_from_each_other_and_are_drawn(tmp_path: Path, monkeypatch) -> None:
    plot = benchmark("plot_training")
    for name in ("first", "second"):
        rows = [{"step": step, "matching": 0.5, "critic": 0.4, "norm": 0.3} for step in (0, 25)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = f"two stages={tmp_path / 'first'},{tmp_path / 'second'}"
    way, rows = plot.run_of(named, 30)
    assert way == "two stages" and [row["step"] for row in rows] == [0, 25, 30, 55]
    out = tmp_path / "drawn.png"
    alone = f"both={tmp_path / 'first'}"
    monkeypatch.setattr(sys, "argv", ["plot_training.py", named, alone, "--steps", "30", "-o", str(out)])
    plot.main()
    assert out.read_bytes().startswith(b"\x89PNG")
