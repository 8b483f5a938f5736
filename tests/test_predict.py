"""What is predicted of other cards: bounds that follow from data sheets and measured parts."""

from types import ModuleType
from typing import Any

import pytest

from tests.scripts import benchmark


@pytest.fixture
def predict() -> ModuleType:
    return benchmark("predict")


def result(**more: Any) -> dict[str, Any]:
    parts = {"network pass 1": {"ms": 60.0}, "decode": {"ms": 30.0}, "other": {"ms": 10.0}}
    described = {"model": "wan2.1-1.3b", "recipe": "self_forcing", "size": "832x480", "decoder": "WanVAE"}
    return described | {
        "precision": "bfloat16", "device": "NVIDIA H200", "parts": parts, "pictures_a_block": 12,
        "peak_memory_mib": 12 * 1024.0,
    } | more  # fmt: skip


def test_the_card_that_was_measured_is_as_fast_as_it_was(predict: ModuleType) -> None:
    told = predict.predicted(result(), "NVIDIA H200")
    assert told["frames_per_second"] == [120.0, 120.0] and told["fits"] and told["predicted"]


def test_parts_scale_by_the_slower_and_the_faster_of_two_rates_and_the_host_by_neither(predict, monkeypatch) -> None:
    h200 = predict.CARDS["NVIDIA H200"]
    small = predict.Card(h200.tflops / 9, h200.terabytes_a_second / 3, 11)
    monkeypatch.setitem(predict.CARDS, "small", small)
    told = predict.predicted(result(), "small")
    assert told["frames_per_second"] == [round(12000 / (90 * ratio + 10), 1) for ratio in (9, 3)]
    assert not told["fits"], "12 GiB on a card of 11"


def test_what_was_measured_elsewhere_has_no_prediction(predict: ModuleType) -> None:
    with pytest.raises(ValueError, match="no data sheet of 'a toaster': there are NVIDIA H200, "):
        predict.predicted(result(device="a toaster"), "RTX 4090")
