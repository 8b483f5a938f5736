"""Blocks with given inputs over a memory: velocities, and the keys that the published cache would hold."""

import torch
from torch import Tensor

from longtake import flow
from longtake.attention.rope import rotate
from longtake.memory.stream_memory import LayerKeys, MemoryShape, StreamMemory
from longtake.memory.window import WindowShape
from longtake.models.wan import WanTransformer
from tests.parity.fixture import Fixture, network_of


@torch.no_grad()
def check(fixture: Fixture) -> None:
    network = network_of(fixture)
    for variant in fixture.config["variants"]:
        for ring in (False, True):
            _check_variant(fixture, network, variant, ring)


def window_of(variant: dict, block: int, frames: int) -> WindowShape:
    """The published cache sizes count the current block; -1 remembers everything."""
    size, sink = variant["local_attn_size"], variant["sink_size"]
    return WindowShape(sink=sink, past=(frames if size < 0 else size - block) - sink)


def _check_variant(fixture: Fixture, network: WanTransformer, variant: dict, ring: bool) -> None:
    x, t, name = fixture.inputs["x"], fixture.inputs["t"], variant["name"]
    block, blocks = x.shape[3], variant["num_blocks"]
    window = window_of(variant, block, blocks * block)
    memory = StreamMemory(MemoryShape(window=window, extent=None), network.config.layers, ring=ring)
    prompts = network.prompt_keys(fixture.inputs["context"][:, None])
    velocities, ends = [], []
    for b in range(blocks):
        view = network.memory_view(memory, x[b, 0])
        level_BF = [(step / flow.TIMESTEPS).expand(x.shape[2], block) for step in t]
        velocities += [network(x[b, i], level_BF[i], prompts, view) for i in range(len(t))]
        keys = network.keys_to_commit(x[b, -1], level_BF[-1], prompts, view)
        cache = _published_cache(network, memory, keys, x[b, 0])
        memory.commit(keys, block)
        memory.audit()
        ends.append([memory.frames * fixture.config["tokens_per_frame"], cache[0].shape[2]])
    fixture.compare(f"{name}.flow", torch.stack(velocities).unflatten(0, (blocks, len(t))))
    fixture.compare(f"{name}.cache_k", cache[0])
    fixture.compare(f"{name}.cache_v", cache[1])
    fixture.compare(f"{name}.end_indices", torch.tensor(ends))


def _published_cache(
    network: WanTransformer, memory: StreamMemory, keys: LayerKeys, latents: Tensor
) -> tuple[Tensor, Tensor]:
    """Held and current keys in the order of time, rotated at absolute positions: [layer, B, T, N, D] each."""
    rows, columns = latents.shape[-2] // network.config.patch, latents.shape[-1] // network.config.patch
    layers = []
    for layer, (k, v) in enumerate(keys):
        held = memory.held(layer)
        frames = tuple(range(memory.frames, memory.frames + latents.shape[1]))
        if held is not None:
            order = sorted(range(len(held.frames)), key=lambda i: held.frames[i])
            held = held.select(order)
            k, v, frames = torch.cat([held.k_BTND, k], 1), torch.cat([held.v_BTND, v], 1), held.frames + frames
        layers.append((rotate(k, network.config.axes.rotation(frames, rows, columns, k.device)), v))
    return torch.stack([k for k, _ in layers]), torch.stack([v for _, v in layers])
