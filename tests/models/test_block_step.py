"""A layer as a program of tensors: the same numbers as the layer in a clip, from the first chunk on, and exported."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import tiny
from torch import Tensor

from longtake.memory.far import Keep, MassCap
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.memory.window import WindowShape
from longtake.models.block_step import BlockStep, StepState
from longtake.models.features import Conversion
from longtake.models.wan import WanTransformer, converted

FRAMES, TOKENS = 12, 6


def network(overlap: int) -> WanTransformer:
    torch.manual_seed(0)
    return converted(tiny.network(), Conversion(layers=(1,), current=3, overlap=overlap))


def inputs(made: WanTransformer, frames: int = FRAMES, batch: int = 2) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Tokens [B, F, T, E] of a layer, level embeddings [B, F, 6, E], and its keys of a prompt."""
    dice = torch.Generator().manual_seed(2)
    x, levels = (torch.randn(batch, frames, count, 24, generator=dice, dtype=torch.float64) for count in (TOKENS, 6))
    return x, levels, made.prompt_keys(tiny.text(batch)).layers[1]


def stepped(step: Callable[..., tuple[Tensor, ...]], state: StepState, given: tuple) -> Tensor:
    x, levels, prompt = given
    parts = []
    for piece, level in zip(x.split(3, dim=1), levels.split(3, dim=1), strict=True):
        answer, *state = step(piece, level, *prompt, *state)
        parts.append(answer)
    return torch.cat(parts, dim=1)


def step_of(made: WanTransformer, rule: Keep | None = None) -> BlockStep:
    grid = made.grid(torch.zeros(1, 1, *tiny.LATENTS[1:]))
    return BlockStep(made.layers[1], made.config.conversion, grid, rule or Keep())


@pytest.mark.parametrize("overlap", [0, 1, 3, 5])
@torch.no_grad()
def test_chunk_by_chunk_is_the_layer_in_a_clip(overlap: int) -> None:
    made = network(overlap)
    x, levels, prompt = given = inputs(made)
    view = made.clip_view(torch.zeros(2, FRAMES, *tiny.LATENTS[1:]))
    layer = made.layers[1]
    attended = view.attend(1, layer.before_attention(x, levels, view.rotation))
    whole = layer.after_attention(x, attended, levels, prompt, None)
    step = step_of(made)
    torch.testing.assert_close(stepped(step, step.empty(2), given), whole, atol=2e-6, rtol=1e-6)  # cosines are float32


@torch.no_grad()
def test_under_a_cap_it_is_the_layer_in_a_stream() -> None:
    made = network(1)
    x, levels, prompt = given = inputs(made)
    rule, layer, grid = MassCap(frames=4), made.layers[1], made.grid(torch.zeros(1, 1, *tiny.LATENTS[1:]))
    shape = MemoryShape(
        window=WindowShape(sink=0, past=0), extent=15, converted={0: made.far_shapes(rule)[1]}, overlap=1
    )
    memory, parts = StreamMemory(shape, 1, ring=False), []
    for piece, level in zip(x.split(3, dim=1), levels.split(3, dim=1), strict=True):
        view = memory.view(grid, 3, "cpu")
        own = layer.before_attention(piece, level, view.rotation)
        parts.append(layer.after_attention(piece, view.attend(0, own), level, prompt, None))
        memory.commit([(own.plain_k, own.v)], 3, grid)
    step = step_of(made, rule)
    torch.testing.assert_close(stepped(step, step.empty(2), given), torch.cat(parts, 1), atol=2e-6, rtol=1e-6)


@torch.no_grad()
def test_an_exported_program_serves_every_chunk_and_its_state_keeps_its_size(tmp_path: Path) -> None:
    made = network(1)
    step, (x, levels, prompt) = step_of(made), inputs(made)
    state = step.empty(2)
    torch.export.save(torch.export.export(step, (x[:, :3], levels[:, :3], *prompt, *state)), tmp_path / "step.pt2")
    program = torch.export.load(tmp_path / "step.pt2").module()
    expected = stepped(step, state, (x, levels, prompt))
    torch.testing.assert_close(stepped(program, state, (x, levels, prompt)), expected, atol=1e-12, rtol=1e-12)
    _, *after = program(x[:, :3], levels[:, :3], *prompt, *state)
    assert [part.shape for part in after] == [part.shape for part in state]
    assert [part.dtype for part in after] == [part.dtype for part in state]


def test_a_layer_that_is_not_converted_is_refused() -> None:
    made = network(1)
    grid, conversion = made.grid(torch.zeros(1, 1, *tiny.LATENTS[1:])), made.config.conversion
    with pytest.raises(ValueError, match="only a converted layer"):
        BlockStep(made.layers[0], conversion, grid, Keep())


def test_layers_without_an_exact_part_are_refused() -> None:
    made = network(1)
    made = converted(made, replace(made.config.conversion, overlap=0, exact=False))
    with pytest.raises(ValueError, match="chunk to chunk cannot do without an exact near span"):
        step_of(made)


def test_features_that_turn_with_frames_are_refused() -> None:
    """Where they are in time they would not know: a clip answers otherwise from the first chunk that reads sums on."""
    made = network(1)
    made = converted(made, replace(made.config.conversion, turns_with_frames=True))
    with pytest.raises(ValueError, match="features that turn with frames cannot go from chunk to chunk"):
        step_of(made)
