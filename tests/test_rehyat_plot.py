"""The plot of time against length: which points are drawn, where lines cross, and that it is drawn."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts import benchmark

pytest.importorskip("matplotlib", reason="matplotlib is not installed (it comes with longtake[train])")


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    return benchmark("plot_rehyat")


def cases() -> list[dict[str, Any]]:
    times = {"dense": (1.0, 4.0, 16.0), "converted": (2.0, 3.0, 5.0)}
    return [
        {"shape": "1.3B", "part": "layer", "kind": kind, "clip_seconds": seconds, "ms": ms, "peak_mb": None}
        for kind, row in times.items()
        for seconds, ms in zip((5.0, 10.0, 20.0), row, strict=True)
    ]


def test_lines_cross_between_the_last_length_that_is_slower_and_the_next(plot: ModuleType) -> None:
    lines = plot.lines_of(cases(), "1.3B", "layer", "ms")
    assert lines["dense"] == [[5.0, 1.0], [10.0, 4.0], [20.0, 16.0]]
    assert plot.crossing(lines) == 7.5
    assert plot.crossing({kind: points[1:] for kind, points in lines.items()}) is None
    assert plot.crossing({kind: points[:1] for kind, points in lines.items()}) is None
    assert plot.crossing({"dense": lines["dense"]}) is None


def test_a_plot_says_where_lines_cross_and_if_they_do_not(plot: ModuleType) -> None:
    lines = plot.lines_of(cases(), "1.3B", "layer", "ms")
    assert plot.told(lines) == "converted is the faster one from 7.5 s on"
    late, early = ({kind: points[some] for kind, points in lines.items()} for some in (slice(1, None), slice(1)))
    assert plot.told(late) == "no crossing: converted is the faster one from 10.0 s on, the least that was timed"
    assert plot.told(early) == "no crossing: dense is the faster one still at 5.0 s"
    assert plot.told({"dense": lines["dense"]}) == ""


def test_what_was_refused_is_not_drawn(plot: ModuleType) -> None:
    refused = {"shape": "1.3B", "part": "layer", "kind": "dense", "clip_seconds": 600.0, "refused": "no room"}
    assert plot.lines_of([refused], "1.3B", "layer", "ms") == {}


def test_a_plot_is_drawn(plot: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"device": "a GPU", "type": "torch.bfloat16", "current": 3, "overlap": 1}
    (tmp_path / "one.json").write_text(json.dumps({"about": about, "cases": cases()}))
    command = ["plot_rehyat.py", str(tmp_path / "one.json"), "-o", str(tmp_path / "it.png")]
    monkeypatch.setattr(sys, "argv", command)
    plot.main()
    alone = (tmp_path / "it.png").read_bytes()
    assert alone.startswith(b"\x89PNG")
    later = [{**case, "ms": case["ms"] / 2} for case in cases()[3:]]
    (tmp_path / "two.json").write_text(json.dumps({"about": about, "cases": later}))
    monkeypatch.setattr(sys, "argv", [*command, "--later", str(tmp_path / "two.json")])
    plot.main()
    assert (tmp_path / "it.png").read_bytes() != alone
