"""Complete sampling with a window of blocks in flight and recorded noise, call by call."""

import torch
from torch import Tensor

from longtake.flow import TIMESTEPS
from longtake.generation.recipe import Recipe
from longtake.generation.rolling import calls, rolling
from longtake.memory.stream_memory import StreamMemory
from longtake.models.wan import WanTransformer
from longtake.recipes import rolling_forcing
from tests.parity.fixture import Fixture, network_of


@torch.no_grad()
def check(fixture: Fixture) -> None:
    network, recipe = network_of(fixture), rolling_forcing()
    config = fixture.config
    assert config["context_noise"] == 0, "commit passes are made at level 0"
    assert (recipe.block, list(recipe.steps)) == (config["num_frame_per_block"], config["denoising_step_list"])
    assert network.config.extent == config["max_attention_frames"]
    window = recipe.memory(network).window
    assert window.frames + recipe.block == config["cache_frames"]
    levels = recipe.levels(config["timestep_shift"] if config["warp_denoising_step"] else 1.0)
    fixture.compare("timesteps", torch.tensor(levels) * TIMESTEPS)
    for ring in (False, True):
        _check_calls(fixture, network, recipe, levels, ring)
    finished = rolling(*_start(fixture, network, recipe, ring=True), levels, end=config["num_blocks"])
    fixture.compare("latents", torch.cat(list(finished), dim=1))


def _check_calls(
    fixture: Fixture, network: WanTransformer, recipe: Recipe, levels: tuple[float, ...], ring: bool
) -> None:
    start = _start(fixture, network, recipe, ring)
    for number, call in enumerate(calls(*start, levels, lambda flight: False, fixture.config["num_blocks"])):
        timesteps = (torch.tensor(call.levels) * TIMESTEPS).repeat_interleave(recipe.block)
        fixture.compare(f"window.{number:02}.t", timesteps[None])
        fixture.compare(f"window.{number:02}.x0", torch.cat(call.clean, dim=1))


def _start(fixture: Fixture, network: WanTransformer, recipe: Recipe, ring: bool) -> tuple:
    """Network, memory, prompts and noise."""
    memory = StreamMemory(recipe.memory(network), network.config.layers, ring=ring)
    prompt = network.prompt_keys(fixture.inputs["context"][:, None])

    def noise(block: int, step: int) -> Tensor:
        if step:
            return fixture.inputs["renoise"][block, step - 1]
        return fixture.inputs["noise"][:, block * recipe.block : (block + 1) * recipe.block]

    return network, memory, lambda block: prompt, noise
