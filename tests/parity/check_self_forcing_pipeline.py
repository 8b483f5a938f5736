"""Complete few-step sampling with recorded noise."""

from itertools import islice

import torch
from torch import Tensor

from longtake.flow import TIMESTEPS, warped_levels
from longtake.generation.blockwise import blockwise, commit
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.models.wan import WanTransformer
from tests.parity.check_causal_kv_stream import window_of
from tests.parity.fixture import Fixture, network_of


@torch.no_grad()
def check(fixture: Fixture) -> None:
    network = network_of(fixture)
    assert fixture.config["context_noise"] == 0, "commit passes are made at level 0"
    shift = fixture.config["timestep_shift"] if fixture.config["warp_denoising_step"] else 1.0
    levels = warped_levels(fixture.config["denoising_step_list"], shift)
    fixture.compare("timesteps", torch.tensor(levels) * TIMESTEPS)
    for variant in fixture.config["variants"]:
        fixture.compare(f"{variant['name']}.latents", _sample(fixture, network, levels, variant))


def _sample(fixture: Fixture, network: WanTransformer, levels: tuple[float, ...], variant: dict) -> Tensor:
    size, blocks = variant["num_frame_per_block"], variant["num_blocks"]
    given = fixture.inputs["initial_latent"] if variant["initial_latent"] else None
    given_frames = 0 if given is None else given.shape[1]
    window = window_of(variant, size, blocks * size + given_frames)
    memory = StreamMemory(MemoryShape(window=window, extent=None), network.config.layers, ring=True)
    prompt = network.prompt_keys(fixture.inputs["context"][:, None])
    finished = []
    if given is not None:
        for first in range(0, given_frames, size):
            finished.append(given[:, first : first + size])
            commit(network, memory, finished[-1], prompt)
    done = len(finished)

    def noise(block: int, step: int) -> Tensor:
        frames = slice((block - done) * size, (block - done + 1) * size)
        if step == 0:
            return fixture.inputs["noise"][:, frames]
        by_frame = (
            fixture.inputs["renoise"][:, step - 1].transpose(0, 1).flatten(1, 2)
        )  # [batch, frames, channels, height, width]
        return by_frame[:, frames]

    finished += islice(blockwise(network, memory, lambda block: prompt, noise, levels), blocks)
    return torch.cat(finished, dim=1)
