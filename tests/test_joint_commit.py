"""What the benchmark of joint commits tells, at tiny size."""

import json
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.scripts import benchmark


@pytest.mark.parametrize("block", [1, 3])
def test_both_arms_answer_alike_and_are_timed(block: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script, out = benchmark("joint_commit"), tmp_path / "found.json"
    shape = script.Shape(tiny.network().config, tiny.LATENTS[2:], 5)
    monkeypatch.setattr(script, "shape_named", lambda name: shape)
    options = ["--shape", "toy", "--block", str(block), "--device", "cpu", "--rounds", "4", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["it", *options])
    script.main()
    found = json.loads(out.read_text())
    assert found["tokens_of_a_block"] == 6 * block
    assert found["off"] < 1e-5 and found["ms"]["apart"] > 0 and found["ms"]["joint"] > 0
    assert found["saved_ms_quartiles"][0] <= found["saved_ms"] <= found["saved_ms_quartiles"][2]
    assert found["peak_mib"] == {"apart": None, "joint": None}, "nothing tells of a CPU's"
    assert found["second_view_mib"] == pytest.approx(3 * 2 * 9 * 6 * 24 * 4 / 2**20)
