"""Random networks small enough for tests: the same classes as the real ones."""

from collections.abc import Sequence
from zlib import crc32

import torch

from longtake.generation.noise import SeededNoise
from longtake.generation.recipe import Recipe
from longtake.generation.stream import Engine
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.memory.window import WindowShape
from longtake.models.features import Conversion
from longtake.models.light_codec import LightCodec, LightCodecConfig
from longtake.models.wan import PromptKeys, WanConfig, WanTransformer, converted, reading_far, with_far_maps
from longtake.recipes import rolling_forcing, self_forcing_sink

BLOCK = 3
LATENTS = (BLOCK, 4, 4, 6)  # frames, channels, height, width of a block
LEVELS = (1.0, 0.8, 0.5)


def network(extent: int = 15, seed: int = 0, reads_far: bool = False) -> WanTransformer:
    torch.manual_seed(seed)
    config = WanConfig(
        dim=24, heads=2, ffn_dim=32, layers=3, text_dim=8, channels=LATENTS[1], level_dim=16, extent=extent,
        reads_far=reads_far,
    )  # fmt: skip
    return WanTransformer(config).double().eval()


def with_drawn_maps(network: WanTransformer) -> WanTransformer:
    """The same network with maps of its own for its far state, as if trained."""
    made = with_far_maps(reading_far(network))
    torch.manual_seed(9)
    for maps in made.far_maps.values():
        for parameter in maps.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return made


def text(batch: int = 1, prompts: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, prompts, 5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prompt(made: WanTransformer, batch: int = 1, seed: int = 1) -> PromptKeys:
    with torch.no_grad():
        return made.prompt_keys(text(batch, seed=seed))


def noise(*seeds: int) -> SeededNoise:
    return SeededNoise(seeds, LATENTS, "cpu", torch.float64)


class AnyText:
    """A text encoder that takes all words, each prompt for another."""

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        return torch.cat([text(seed=crc32(prompt.encode()))[:, 0] for prompt in prompts]).float()

    def prepare(self, prompts: Sequence[str]) -> None: ...


def rolling_recipe() -> Recipe:
    """As many levels as `LEVELS`, for a network of the usual extent."""
    return rolling_forcing().with_levels(len(LEVELS))


def engine(recipe: Recipe | None = None) -> Engine:
    """A stream's whole engine, in fp32; its network can read what the recipe remembers."""
    chosen = recipe or self_forcing_sink()
    made = network(reads_far=chosen.far is not None)
    if chosen.joint:
        made = converted(made, Conversion(layers=(0, 2), current=BLOCK))
    torch.manual_seed(3)
    codec = LightCodec(
        LightCodecConfig(
            latent_channels=LATENTS[1],
            encoder_widths=(4, 4, 4),
            encoder_blocks=(0, 0, 0),
            decoder_widths=(4, 4, 4),
            decoder_blocks=(1, 1, 0),
        )
    )
    return Engine(
        model_name="tiny",
        recipe=chosen,
        text=AnyText(),
        network=made.float().requires_grad_(False),
        codec=codec.requires_grad_(False),
        latent_size=LATENTS[1:],
        frame_rate=16,
        shift=3.0,
        encode=lambda frames_BFCHW: codec.encode(frames_BFCHW)[0],
    )


def memory(made: WanTransformer, sink: int = 3, past: int = 3, ring: bool = True) -> StreamMemory:
    shape = MemoryShape(window=WindowShape(sink=sink, past=past), extent=made.config.extent)
    return StreamMemory(shape, made.config.layers, ring=ring)
