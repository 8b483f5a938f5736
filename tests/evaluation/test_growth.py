"""How a change of one block grows: nothing from nothing, and only through what remembers it."""

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from tests import tiny

from longtake.evaluation import growth
from longtake.evaluation.growth import changed_block, error_growth, interval_95, latents_of, perturbed
from longtake.memory.stream_memory import StreamMemory
from longtake.recipes import self_forcing, self_forcing_sink

PROMPTS, SEEDS = ["one", "two"], [3, 4]


@pytest.mark.parametrize(
    "recipe", [self_forcing(), self_forcing_sink(), tiny.rolling_recipe()], ids=lambda recipe: recipe.name
)
def test_nothing_grows_from_nothing(recipe):
    found = error_growth(replace(tiny.engine(), recipe=recipe), PROMPTS, SEEDS, blocks=4, size=0.0)
    assert found.latents_BK.shape == found.pictures_BK.shape == (2, 5)
    assert not found.latents_BK.any() and not found.pictures_BK.any()
    assert (found.unrelated_latents_BK > 0.1).all() and (found.unrelated_pictures_BK > 0).all()


def test_blocks_in_flight_are_the_same_beside_a_changed_block(monkeypatch):
    engine, began = tiny.engine(tiny.rolling_recipe()), []
    latents = growth.latents_of
    monkeypatch.setattr(growth, "latents_of", lambda *a: began.append(a[4]) or latents(*a))
    found = error_growth(engine, PROMPTS, SEEDS, blocks=0, size=0.1)
    stream, twin = began
    assert [(one.block, one.step) for one in stream] == [(3, 2), (4, 1)] and stream == twin and stream is not twin
    torch.testing.assert_close(found.latents_BK, torch.full((2, 1), 0.1), atol=0, rtol=1e-5)
    found = error_growth(engine, PROMPTS, SEEDS, blocks=4, size=0.1)
    assert (found.latents_BK[:, 1:] > 0).all()


def test_the_first_difference_is_the_change_and_later_ones_follow_from_it():
    engine = tiny.engine()
    found = error_growth(engine, PROMPTS, SEEDS, blocks=3, size=0.1)
    torch.testing.assert_close(found.latents_BK[:, 0], torch.full((2,), 0.1), atol=0, rtol=1e-5)
    assert (found.latents_BK[:, 1:] > 0).all() and (found.pictures_BK[:, 0] > 0).all()
    larger = error_growth(engine, PROMPTS, SEEDS, blocks=3, size=0.4)
    assert (larger.latents_BK > found.latents_BK).all()


def test_without_a_window_nothing_remembers_a_change():
    engine = replace(tiny.engine(), recipe=replace(self_forcing(), past=0))
    assert changed_block(engine) == 0
    found = error_growth(engine, PROMPTS, SEEDS, blocks=2, size=0.3)
    assert found.latents_BK[:, 0].all() and not found.latents_BK[:, 1:].any()


def test_a_stream_alone_has_no_stranger():
    found = error_growth(tiny.engine(), ["one"], [3], blocks=1, size=0.1)
    assert found.unrelated_latents_BK.isnan().all() and found.unrelated_pictures_BK.isnan().all()


def test_the_streams_are_those_that_an_engine_shows():
    engine = tiny.engine()
    memory = StreamMemory(engine.recipe.memory(engine.network), engine.network.config.layers, ring=True)
    latents = torch.cat([*islice(latents_of(engine, memory, engine.prompt_keys(*PROMPTS), SEEDS), 3)], 1)
    with engine.stream_batch(PROMPTS, seeds=SEEDS) as streams:
        shown = torch.cat([*islice(streams, 3)], 1)
    frames, _ = engine.codec.decode(latents)
    torch.testing.assert_close((frames.clamp(-1, 1) + 1) * 127.5, shown.float().movedim(-1, 2), atol=0.51, rtol=0)


def test_a_change_is_the_same_for_the_same_seed():
    block = torch.randn(2, *tiny.LATENTS, generator=torch.Generator().manual_seed(0))
    changed = perturbed(block, [5, 6], 2, 0.25)
    norms = (changed - block).flatten(1).norm(dim=1) / block.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((2,), 0.25))
    assert torch.equal(perturbed(block[1:], [6], 2, 0.25), changed[1:])
    assert not torch.allclose(perturbed(block, [5, 6], 3, 0.25), changed)


def test_intervals_are_students():
    """Quantiles of t from tables: 12.706 for one degree, 2.201 for 11, 1.984 for 99."""
    for count, t in [(2, 12.706), (12, 2.201), (100, 1.984)]:
        values = torch.arange(count, dtype=torch.float64)
        low, high = interval_95(values)
        assert low + high == pytest.approx(2 * values.mean().item())
        assert (high - low) / 2 == pytest.approx(t * values.std().item() / math.sqrt(count), rel=2e-3)
