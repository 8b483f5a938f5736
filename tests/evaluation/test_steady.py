"""What is said of a stream in its steady state."""

import json
import math

import pytest
import torch
from tests import tiny

from longtake.evaluation import steady
from longtake.evaluation.parts import Work
from longtake.evaluation.rates import Rates, rates, seconds
from longtake.evaluation.steady import Moment, bench_steady, file_name, grown, over_time, parts_table
from longtake.generation.recipe import Recipe
from longtake.recipes import hybrid_forcing, longlive, self_forcing_sink

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steady, "rates", lambda device, dtype: Rates(matrix=1e12, copy=1e10))


@pytest.mark.parametrize("recipe", [self_forcing_sink(), hybrid_forcing(share=0.5), tiny.rolling_recipe(), longlive()])
def test_a_stream_is_told_with_all_that_its_numbers_hang_on(recipe: Recipe) -> None:
    told: list[str] = []
    result = bench_steady(tiny.engine(recipe), "any", blocks=3, say=told.append)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["finite"] and result["blocks"] == 3 and result["pictures_a_block"] == 12
    assert result["recipe"] == recipe.name and result["size"] == "48x32" and result["precision"] == "float32"
    assert result["passes"] == "eager"
    assert result["window"]["past"] == recipe.past and result["window"]["in_flight"] == recipe.in_flight
    assert (result["sparsity"] or {}).get("share") == (0.5 if recipe.far else None)
    assert result["versions"]["torch"] == torch.__version__ and result["device"]
    assert result["first_chunk_seconds"]["cold"] > 0 < result["first_chunk_seconds"]["warm"]
    whole, parts = result["whole"], result["parts"]
    assert result["frames_per_second"] == pytest.approx(12 / (whole["ms"] / 1000))
    assert whole["tflop"] == pytest.approx(sum(part["tflop"] for part in parts.values()))
    assert whole["matrix_share"] == pytest.approx(whole["least_ms"] / whole["ms"])
    assert told, "progress"


def test_minutes_are_those_of_video() -> None:
    result = bench_steady(tiny.engine(), "any", blocks=2, minutes=0.25)
    pictures = 12 * (result["blocks"] + result["blocks_before"])
    assert 15 * 16 <= pictures < 15 * 16 + 12
    assert result["over_time"]["video_seconds"] == 12 * result["blocks"] / 16


@pytest.mark.parametrize("blocks, minutes", [(1, 0.0), (2, math.nan), (2, math.inf), (2, -1.0)])
def test_what_has_no_end_or_no_blocks_is_refused(blocks: int, minutes: float) -> None:
    with pytest.raises(ValueError, match="a benchmark"):
        bench_steady(tiny.engine(), "any", blocks=blocks, minutes=minutes)


def test_what_grows_is_seen() -> None:
    def moments(growth: float) -> list[Moment]:
        return [
            Moment(seconds=1 + growth * i, pictures=12, device_mib=100 + growth * i, reserved_mib=200, host_mib=50)
            for i in range(600)
        ]

    even, growing = over_time(moments(0), 16), over_time(moments(0.01), 16)
    assert even["last_to_first"] == {"block_ms": 1, "device_mib": 0, "reserved_mib": 0, "host_mib": 0}
    assert growing["last_to_first"]["block_ms"] > 4
    assert growing["last_to_first"]["device_mib"] == pytest.approx(5.4)
    assert grown(even["last_to_first"]) == [] and grown(growing["last_to_first"]) == ["block_ms", "device_mib"]
    assert len(even["rows"]) == steady.ROWS and even["rows"][-1]["video_seconds"] == even["video_seconds"] == 450
    assert sum(row["block_ms"]["p50"] for row in even["rows"]) == 1000 * steady.ROWS


def test_shares_are_of_measured_rates() -> None:
    table = parts_table({"pass": 0.5, "gap": 0.1}, {"pass": Work(1e11, 1e9)}, Rates(matrix=1e12, copy=1e10))
    assert table["pass"] == {
        "ms": 500, "tflop": 0.1, "gigabytes": 1.0, "least_ms": 100, "matrix_share": 0.2, "copy_share": 0.2,
    }  # fmt: skip
    assert table["gap"]["matrix_share"] == table["gap"]["tflop"] == 0
    half = {"pass": Work(1e11, 1e9, eight_bit=0.5e11)}
    for eight_bit, least in ((2e12, 75), (None, 100)):
        (row,) = parts_table({"pass": 0.5}, half, Rates(matrix=1e12, copy=1e10, eight_bit=eight_bit)).values()
        assert (row["least_ms"], row["matrix_share"]) == pytest.approx((least, least / 500))


def test_this_device_multiplies_and_copies() -> None:
    found = rates(CPU, torch.float32)
    assert 1e8 < found.matrix < 1e15 and 1e7 < found.copy < 1e13
    assert found.eight_bit is None


def test_a_call_is_timed_after_it_is_warm() -> None:
    calls: list[int] = []
    assert seconds(lambda: calls.append(len(calls)), CPU, least=0) >= 0
    assert len(calls) == 1 + 3


def test_files_are_called_by_what_ran() -> None:
    result = {"model": "toy", "recipe": "hybrid_forcing:share=0.1,far=none", "decoder": "WanVAE", "size": "48x32"}
    result |= {"precision": "float32", "passes": "fused", "levels": [1000], "processes": 1, "codec_apart": None}
    assert file_name(result) == "toy-hybrid_forcing_share_0.1_far_none-WanVAE-48x32-float32-fused-1levels.json"
    assert file_name(result | {"processes": 2}).endswith("-fused-1levels-2processes.json")
    apart = {"device": "a GPU", "peak_memory_mib": 1.0}
    assert file_name(result | {"codec_apart": apart}).endswith("-fused-1levels-codec_apart.json")
