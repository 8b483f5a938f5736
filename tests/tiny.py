"""Random networks small enough for tests: the same classes as the real ones."""

import torch

from longtake.generation.noise import SeededNoise
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.memory.window import WindowShape
from longtake.models.wan import PromptKeys, WanConfig, WanTransformer

BLOCK = 3
LATENTS = (BLOCK, 4, 4, 6)  # frames, channels, height, width of a block
LEVELS = (1.0, 0.8, 0.5)


def network(extent: int = 15, seed: int = 0) -> WanTransformer:
    torch.manual_seed(seed)
    made = WanTransformer(
        WanConfig(dim=24, heads=2, ffn_dim=32, layers=3, text_dim=8, channels=LATENTS[1], level_dim=16, extent=extent)
    )
    return made.double().eval()


def text(batch: int = 1, prompts: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, prompts, 5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prompt(made: WanTransformer, batch: int = 1, seed: int = 1) -> PromptKeys:
    with torch.no_grad():
        return made.prompt_keys(text(batch, seed=seed))


def noise(*seeds: int) -> SeededNoise:
    return SeededNoise(seeds, LATENTS, "cpu", torch.float64)


def memory(made: WanTransformer, sink: int = 3, past: int = 3, ring: bool = True) -> StreamMemory:
    shape = MemoryShape(window=WindowShape(sink=sink, past=past), extent=made.config.extent)
    return StreamMemory(shape, made.config.layers, ring=ring)
