"""The plot of a block's time: what is set beside what, and that it is drawn."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts import benchmark

pytest.importorskip("matplotlib", reason="matplotlib is not installed (it comes with longtake[train])")

PARTS = {"network pass 1": 60.0, "network pass 2": 50.0, "commit": 40.0, "far state": 5.0, "decode": 80.0, "other": 1.0}


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    return benchmark("plot_speed")


def result(**more: Any) -> dict[str, Any]:
    return {
        "model": "wan2.1-1.3b", "recipe": "hybrid_forcing:tokens=64", "size": "832x480", "precision": "bfloat16",
        "decoder": "WanVAE", "levels": [1000, 750, 500, 250], "window": {"past": 3}, "device": "a GPU",
        "rates": {"matrix_tflops": 700.0}, "pictures_a_block": 12,
        "parts": {name: {"ms": ms, "least_ms": ms / 2} for name, ms in PARTS.items()},
    } | more  # fmt: skip


def test_a_result_stands_between_what_was_published_and_what_was_counted(plot: ModuleType) -> None:
    published, ours, counted = plot.bars_of(result(), json.loads(plot.PUBLISHED.read_text()))
    assert published[0] == "Hybrid Forcing, published (NVIDIA H200)" and sum(published[1].values()) == 601.5
    assert (ours[1]["network pass"], ours[1]["decode"], sum(ours[1].values())) == (110.0, 80.0, sum(PARTS.values()))
    assert sum(counted[1].values()) == sum(PARTS.values()) / 2
    network_alone, *_ = plot.bars_of(result(decoder="NoDecoder"), json.loads(plot.PUBLISHED.read_text()))
    assert network_alone[1] == {"network pass": 355.9}


@pytest.mark.parametrize(
    "other",
    [
        {"model": "wan2.1-14b"}, {"size": "1280x704"}, {"precision": "float32"}, {"decoder": "TAEHV"},
        {"levels": [1000, 500]}, {"recipe": "self_forcing_sink"}, {"window": {"past": 6}},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_nothing_is_set_beside_what_was_measured_otherwise(plot: ModuleType, other: dict[str, Any]) -> None:
    assert len(plot.bars_of(result(**other), json.loads(plot.PUBLISHED.read_text()))) == 2


def test_a_plot_is_drawn(plot: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.json").write_text(json.dumps(result()))
    monkeypatch.setattr(sys, "argv", ["plot_speed.py", str(tmp_path / "one.json"), "-o", str(tmp_path / "speed.png")])
    plot.main()
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
