"""Complete few-step sampling with recorded noise, a far state in every layer."""

from itertools import islice

import torch
from torch import Tensor

from longtake.flow import TIMESTEPS, warped_levels
from longtake.generation.blockwise import blockwise
from tests.parity.check_hybrid_attention import means_of, memory_of, near_of
from tests.parity.fixture import Fixture, network_of


@torch.no_grad()
def check(fixture: Fixture) -> None:
    network = network_of(fixture)
    config = fixture.config
    assert config["context_noise"] == 0 and config["warp_denoising_step"]
    levels = warped_levels(config["denoising_step_list"], config["timestep_shift"])
    fixture.compare("timesteps", torch.tensor(levels) * TIMESTEPS)
    prompt = network.prompt_keys(fixture.inputs["context"][:, None])
    start, renoise = fixture.inputs["noise"].split(config["num_frame_per_block"], dim=1), fixture.inputs["renoise"]

    def noise(block: int, step: int) -> Tensor:
        return renoise[block, step - 1] if step else start[block]

    for variant in config["variants"]:
        name = variant["name"]
        memory = memory_of(config, variant, near_of(config, variant), network.config.layers, ring=True)
        blocks = blockwise(network, memory, lambda block: prompt, noise, levels)
        finished, states = [], []
        for clean in islice(blocks, variant["num_blocks"]):
            finished.append(clean)
            sums = [memory.far(layer).sums for layer in range(memory.layers)]
            states.append([means_of(of_layer, config["num_heads"], config["head_dim"]) for of_layer in sums])
        fixture.compare(f"{name}.latents", torch.cat(finished, dim=1))
        # Published code absorbs when a block begins, this when the one before it is committed: recorded after the last.
        for part, values in zip(("kmean", "kv", "tokens"), zip(*states[-2], strict=True), strict=True):
            fixture.compare(f"{name}.state_{part}", torch.stack(values))
