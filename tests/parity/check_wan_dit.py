"""The bidirectional transformer, and its causal forms as masks over the frames of a clip."""

import torch
from torch import Tensor

from longtake import flow
from longtake.memory.stream_memory import MemoryShape
from longtake.memory.window import WindowShape
from longtake.models.wan import PromptKeys, WanTransformer, level_features
from tests.parity.fixture import Fixture, network_of, swap_frames_channels


@torch.no_grad()
def check(fixture: Fixture) -> None:
    network = network_of(fixture)
    prompts = network.prompt_keys(fixture.inputs["context"][:, None])
    _check_bidirectional(fixture, network, prompts)
    _check_masks(fixture, network, network.prompt_keys(fixture.inputs["context"][:1, None]))


def _check_bidirectional(fixture: Fixture, network: WanTransformer, prompts: PromptKeys) -> None:
    noisy = swap_frames_channels(fixture.inputs["x"])
    level = fixture.inputs["t"] / flow.TIMESTEPS
    level_BF = level[:, None].expand(*noisy.shape[:2])
    hidden: list[Tensor] = []
    for block in network.blocks:
        block.after_attention = _recording(block.after_attention, hidden)
    flow_BFCHW = network(noisy, level_BF, prompts, network.clip_view(noisy))
    fixture.compare("flow", swap_frames_channels(flow_BFCHW))
    for i, x in enumerate(hidden):
        fixture.compare(f"hidden.{i}", x.flatten(1, 2))
    embedding = network.time_embedding(level_features(level, network.config.level_dim))
    fixture.compare("time_embedding", embedding)
    fixture.compare("time_projection", network.time_projection(embedding))
    fixture.compare("text_embedding", network.text_embedding(fixture.inputs["context"]))
    level_BF = fixture.inputs["t_frames"] / flow.TIMESTEPS
    fixture.compare(
        "causal.one_call.flow", swap_frames_channels(network(noisy, level_BF, prompts, network.clip_view(noisy)))
    )


def _recording(after, hidden: list[Tensor]):
    def record(*arguments):
        hidden.append(after(*arguments))
        return hidden[-1]

    return record


def _check_masks(fixture: Fixture, network: WanTransformer, prompts: PromptKeys) -> None:
    noisy, clean = (swap_frames_channels(fixture.inputs[name]) for name in ("x_long", "clean_long"))
    level_BF = fixture.inputs["t_long"] / flow.TIMESTEPS
    block = fixture.config["num_frame_per_block"]
    ends = _block_ends(noisy.shape[1], block, block)
    allowed = _causal(ends)
    _compare_masked(fixture, "blockwise", network, prompts, noisy, level_BF, allowed)
    local = allowed & (torch.arange(len(ends))[None] >= ends[:, None] - fixture.config["blockwise_local_frames"])
    _compare_masked(fixture, "blockwise_local", network, prompts, noisy, level_BF, local)
    first = fixture.config["first_frame_variant_frames"]
    allowed = _causal(_block_ends(first, 1, block))
    _compare_masked(fixture, "first_frame_blockwise", network, prompts, noisy[:, :first], level_BF[:, :first], allowed)
    everything = WindowShape(sink=0, past=noisy.shape[1])
    view = network.teacher_forced_view(clean, block, MemoryShape(window=everything, extent=None))
    both = network(torch.cat([clean, noisy], 1), torch.cat([torch.zeros_like(level_BF), level_BF], 1), prompts, view)
    fixture.compare("causal.teacher_forcing.flow", swap_frames_channels(both[:, clean.shape[1] :]))


def _compare_masked(
    fixture: Fixture, name: str, network: WanTransformer, prompts: PromptKeys, noisy: Tensor, level_BF: Tensor,
    allowed_FF: Tensor,
) -> None:  # fmt: skip
    flow_BFCHW = network(noisy, level_BF, prompts, network.clip_view(noisy, allowed_FF))
    fixture.compare(f"causal.{name}.flow", swap_frames_channels(flow_BFCHW))


def _block_ends(frames: int, first: int, block: int) -> Tensor:
    """For each frame, the end of its block, where the first block may have another size."""
    number = (torch.arange(frames) - first).div(block, rounding_mode="floor") + 1
    return (first + number * block).clamp(max=frames)


def _causal(ends: Tensor) -> Tensor:
    return torch.arange(len(ends))[None] < ends[:, None]
