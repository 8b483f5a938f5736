"""Streams that go on from given pictures."""

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny

import longtake
from longtake.generation.stream import Engine
from longtake.recipes import RECIPES, recipe_named
from longtake.recipes.weight_files import CODEC_FILE, NETWORK_FILE, packaged

PROMPT = "anything"


def spied(engine: Engine) -> tuple[Engine, list, list]:
    """The engine, and where its streams' memories and latents can be found."""
    memories, latents = [], []

    def schedule(network, memory, *rest, **told):
        memories.append(memory)
        for made in engine.recipe.schedule(network, memory, *rest, **told):
            latents.append(made)
            yield made

    return replace(engine, recipe=replace(engine.recipe, schedule=schedule)), memories, latents


def blank(engine: Engine, blocks: int, streams: int = 1) -> torch.Tensor:
    return torch.zeros(streams, engine.pictures_in(blocks), engine.height, engine.width, 3, dtype=torch.uint8)


def tiny_engine(name: str) -> Engine:
    """Under a recipe with its usual options, by a network that saw enough frames at once."""
    recipe = recipe_named(name)
    made = tiny.engine(recipe)
    made.network.config = replace(made.network.config, extent=21)
    return made


@pytest.mark.parametrize("name", [name for name in RECIPES if not recipe_named(name).rolls])
@settings(max_examples=3, deadline=None)
@given(given_blocks=st.integers(1, 7), streams=st.integers(1, 2))
def test_to_go_on_from_ones_own_latents_is_never_to_have_stopped(name: str, given_blocks: int, streams: int) -> None:
    """But for rolling_forcing, whose next blocks were in flight already, and now begin behind what is given."""
    plain, memories, latents = spied(tiny_engine(name))
    prompts, seeds = [PROMPT] * streams, list(range(streams))
    with plain.stream_batch(prompts, seeds=seeds) as batch:
        pictures = torch.cat(list(islice(batch, given_blocks)), 1)
        following = [next(batch) for _ in range(3)]
        books = memories[-1].fork()
    own = torch.cat(latents[:given_blocks], 1)
    again, memories, _ = spied(replace(plain, encode=lambda frames: own))
    with again.stream_batch(prompts, seeds=seeds, pictures=pictures) as batch:
        assert (batch.blocks, batch.pictures) == (given_blocks, pictures.shape[1])
        for expected in following:
            assert torch.equal(next(batch), expected)
        memory = memories[-1]
    memory.audit()
    assert (memory.frames, memory.blocks) == (books.frames, books.blocks)
    for layer in range(memory.layers):
        assert all(
            torch.equal(one, other) for one, other in zip(memory.held(layer)[:2], books.held(layer)[:2], strict=True)
        )


@pytest.mark.parametrize("name", RECIPES)
def test_given_pictures_are_encoded_and_counted(name: str) -> None:
    engine = tiny_engine(name)
    dice = np.random.default_rng(0)
    pictures = dice.integers(0, 256, (engine.pictures_in(2), engine.height, engine.width, 3), np.uint8)
    pictures.flags.writeable = False
    with engine.stream(PROMPT, seed=7, pictures=pictures) as stream, engine.stream(PROMPT, seed=7) as other:
        chunk = next(stream)
        plain = list(islice(other, 3))[2]
    assert (chunk.index, chunk.start_seconds, len(chunk.frames)) == (2, 21 / 16, 12)
    assert (chunk.index, chunk.start_seconds) == (plain.index, plain.start_seconds)
    assert (chunk.frames != plain.frames).any()
    frames = torch.tensor(pictures)[None].movedim(-1, 2) / 127.5 - 1
    torch.testing.assert_close(engine.latents_of(torch.tensor(pictures)[None]), engine.codec.encode(frames)[0])


def test_pictures_may_be_laid_out_in_any_order() -> None:
    engine = tiny.engine()
    size = engine.pictures_in(1), engine.height, engine.width, 3
    turned = np.random.default_rng(0).integers(0, 256, size, np.uint8)[::-1, :, ::-1, ::-1]
    chunks = [next(engine.stream(PROMPT, pictures=pictures)) for pictures in (turned, turned.copy())]
    assert (chunks[0].frames == chunks[1].frames).all()


def test_pictures_that_do_not_fit_are_refused() -> None:
    engine = tiny.engine()
    two = blank(engine, 2)
    for count in (0, 1, 8, 10, 20):
        with pytest.raises(ValueError, match=f"which are 9, 21, 33, ... pictures, got {count}"):
            engine.stream(PROMPT, pictures=two[0, :count].numpy())
    for wrong in (two.float(), two[..., :2], two[:, :, :-1], two[0]):
        with pytest.raises(ValueError, match=r"uint8 \[streams, pictures, 32, 48, 3\]"):
            engine.stream_batch([PROMPT], seeds=[1], pictures=wrong) if len(wrong) == 1 else engine.latents_of(wrong)
    with pytest.raises(ValueError, match="2 streams cannot go on from the pictures of 1"):
        engine.stream_batch([PROMPT] * 2, seeds=[1, 2], pictures=two)
    with pytest.raises(ValueError, match="model tiny cannot go on from pictures: its codec only decodes"):
        replace(engine, encode=None).stream_batch([PROMPT], seeds=[1], pictures=two)


def test_the_embedded_model_goes_on_from_what_it_sees(tmp_path: Path) -> None:
    """And without an encoder's file it streams as ever, but takes no pictures."""
    for name in (NETWORK_FILE, CODEC_FILE):
        shutil.copy(packaged(name), tmp_path / name)
    prompt = "a red ball stands still over green hills"
    without = longtake.load(tmp_path, recipe="self_forcing_sink", dtype=torch.float32)
    pictures = np.concatenate([chunk.frames for chunk in islice(without.stream(prompt), 2)])
    with pytest.raises(ValueError, match=r"cannot be encoded without .*codec_encoder\.safetensors"):
        without.stream(prompt, pictures=pictures)
    engine = longtake.load("toy", recipe="self_forcing_sink", dtype=torch.float32)
    with engine.stream(prompt, seed=7, pictures=pictures) as stream:
        following = next(stream).frames
    with engine.stream(prompt, seed=7) as stream:
        other = next(stream).frames
    last, seam, elsewhere = (x.astype(float) for x in (pictures[-1], following[0], other[-1]))
    assert np.abs(seam - last).mean() < 8 < np.abs(elsewhere - last).mean()
