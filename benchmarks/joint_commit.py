"""What could a commit made together with the next block's first pass save? Two arms in turn.

python benchmarks/joint_commit.py [--shape 1.3b|toy] [--block N] [--device NAME] [--rounds N] [--json FILE]

apart: the commit of a block at level 0, then a pass over the next at level 1, as streams make them. joint: both blocks
in one pass, each frame at its level; the last layer is left early for those committed. Random weights of the shape, and
no self-attention, whose operations are the same in both arms: queries are taken for its answers. All else is the
network's own, on a GPU by fused kernels, each pass a recorded graph. The prompt's keys are no arguments of these:
streams copy them for each replay, which is left out of both arms. Not counted against joint: to remember and turn keys
in mid-pass, and a change of prompt, for which the pass would be made again.

saved_ms: the median difference of a round, with quartiles. peak_mib: what an arm works in at most, with its answers, by
kernels launched one by one; joint keeps copies there, of the committed keys alone. second_view_mib: keys and values of
a window of 9 frames: there would be two, if they are not turned layer by layer. off: the distance of the joint arm's
answers, as a share of their size.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.attention.backends import distance
from longtake.attention.rope import Rotation
from longtake.evaluation import rates
from longtake.evaluation.speed import MIB, forget_peak_memory
from longtake.evaluation.steady import machine
from longtake.generation.levels import level_tensor
from longtake.memory.view import Tokens
from longtake.models.checkpoints import WAN_1_3B
from longtake.models.standins import drawn
from longtake.models.umt5 import LENGTH
from longtake.models.wan import Levels, PromptKeys, WanConfig, WanTransformer
from longtake.models.weights import described
from longtake.parallel import Recorded
from longtake.recipes.devices import device_named, usual_dtype
from longtake.recipes.weight_files import NETWORK_FILE, packaged

WINDOW, WARM_UP = 9, 3  # latent frames; rounds
Call = Callable[[Levels, Tensor], tuple[Tensor, ...]]
Arm = Callable[[], tuple[Tensor, ...]]


class Shape(NamedTuple):
    """latents: height and width. text: rows of a prompt."""

    config: WanConfig
    latents: tuple[int, int]
    text: int


class Unattended(NamedTuple):
    """A view in which tokens see nothing: their queries are taken for the answers."""

    rotation: Rotation

    def attend(self, layer: int, own: Tokens) -> Tensor:
        return own.q


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--shape", choices=["1.3b", "toy"], default="1.3b")
    asked.add_argument("--block", type=int, default=3, help="latent frames of a block")
    asked.add_argument("--device")
    asked.add_argument("--rounds", type=int, default=50)
    asked.add_argument("--json", type=Path)
    options = asked.parse_args()
    if options.block < 1:
        asked.error("a block has one latent frame or more")
    device = device_named(options.device)
    found = {
        "shape": options.shape,
        **measured(shape_named(options.shape), options.block, device, options.rounds),
        **machine(device),
    }
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def shape_named(name: str) -> Shape:
    if name == "1.3b":
        return Shape(WAN_1_3B, (60, 104), LENGTH)
    told = described(packaged(NETWORK_FILE))
    return Shape(WanConfig.of(told["network"]), (14, 24), told["text"]["length"])


@torch.no_grad()
def measured(shape: Shape, block: int, device: torch.device, rounds: int) -> dict[str, object]:
    dtype, config = usual_dtype(device), shape.config
    network = drawn(partial(WanTransformer, config), device, dtype)
    kernels = device.type == "cuda" and find_spec("triton") is not None
    if kernels:
        from longtake.models.wan_triton import fuse_layers

        fuse_layers(network)
    latents = torch.randn(1, 2 * block, config.channels, *shape.latents, device=device)
    prompt = network.prompt_keys(torch.randn(1, 1, shape.text, config.text_dim, device=device, dtype=dtype))
    plain = arms(network, passes(network, prompt, latents, kept=Tensor.clone), latents)
    first, second = (torch.cat([x.flatten().float() for x in run()]) for run in plain.values())
    off = distance(second, first)
    del first, second
    peaks = {name: peak_mib(run, device) for name, run in plain.items()}
    calls = passes(network, prompt, latents, kept=lambda x: x)
    ready = {name: Recorded(call, lends=True) for name, call in calls.items()}
    ms = in_turn(arms(network, ready, latents), device, rounds)
    saved = [apart - joint for apart, joint in zip(ms["apart"], ms["joint"], strict=True)]
    tokens = network.grid(latents).rows * network.grid(latents).columns
    return {
        "config": {name: getattr(config, name) for name in ("dim", "heads", "ffn_dim", "layers")},
        "tokens_of_a_block": block * tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": "fused, recorded" if kernels else "plain",
        "rounds": rounds,
        "ms": {name: median(of) for name, of in ms.items()},
        "saved_ms": median(saved),
        "saved_ms_quartiles": quantiles(saved, n=4),
        "weights_of_layers_mib": sum(one.nbytes for one in network.blocks.parameters()) / MIB,
        "peak_mib": peaks,
        "second_view_mib": config.layers * 2 * WINDOW * tokens * config.dim * dtype.itemsize / MIB,
        "off": off,
    }


def passes(
    network: WanTransformer, prompt: PromptKeys, latents: Tensor, *, kept: Callable[[Tensor], Tensor]
) -> dict[str, Call]:  # fmt: skip
    """Those of which the arms are made, as functions of levels and latents. kept: how joint gives committed keys."""
    grid, last = network.grid(latents), network.config.layers - 1
    frames = range(latents.shape[1])
    half = len(frames) // 2
    first, second, both = (
        Unattended(grid.rotation(some, latents.device)) for some in (frames[:half], frames[half:], frames)
    )

    def commit(levels: Levels, clean: Tensor) -> tuple[Tensor, ...]:
        return tuple(x for layer in network.keys_at(levels, clean, prompt, first) for x in layer)

    def step(levels: Levels, noisy: Tensor) -> tuple[Tensor, ...]:
        return (network.velocity_at(levels, noisy, prompt, second),)

    def joint(levels: Levels, latents: Tensor) -> tuple[Tensor, ...]:
        x, keys, tokens = network.embed(latents), [], half * grid.rows * grid.columns
        for i, layer in enumerate(network.layers):
            own = layer.before_attention(x, levels.layers_BF6E, both.rotation)
            keys += [kept(own.plain_k[:, :tokens]), kept(own.v[:, :tokens])]
            attended, modulation = both.attend(i, own), levels.layers_BF6E
            if i == last:
                x, attended, modulation = x[:, half:], attended[:, tokens:], modulation[:, half:]
            x = layer.after_attention(x, attended, modulation, prompt.layers[i], None)
        return *keys, network._unpatch(network.head(x, levels.level_BFE[:, half:]), latents[:, half:].shape)

    return {"commit": commit, "step": step, "joint": joint}


def arms(network: WanTransformer, calls: Mapping[str, Call], latents: Tensor) -> dict[str, Arm]:
    """Both, with levels that are embedded beforehand."""
    half = latents.shape[1] // 2
    level_BF = level_tensor([0.0] * half + [1.0] * half, latents)

    def arm(*own: Call) -> Arm:
        parts = zip(*(x.chunk(len(own), dim=1) for x in (level_BF, latents)), strict=True)
        given = [(network.embed_levels(level), some) for level, some in parts]
        return lambda: tuple(x for call, one in zip(own, given, strict=True) for x in call(*one))

    return {"apart": arm(calls["commit"], calls["step"]), "joint": arm(calls["joint"])}


def peak_mib(run: Arm, device: torch.device) -> float | None:
    """Of its second call; nothing is known of a CPU's."""
    if device.type != "cuda":
        return None
    run()
    forget_peak_memory(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def in_turn(run: Mapping[str, Arm], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, round by round; which goes first changes."""
    took: dict[str, list[float]] = {name: [] for name in run}
    for number in range(WARM_UP + rounds):
        for name in [*run][:: 1 if number % 2 else -1]:
            took[name].append(1000 * rates._once(run[name], device))
    return {name: ms[WARM_UP:] for name, ms in took.items()}


if __name__ == "__main__":
    main()
