"""A stream: prompt in, pictures out, block by block, redirected while it runs."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from longtake.generation.noise import SeededNoise
from longtake.generation.recipe import Recipe
from longtake.memory.stream_memory import StreamMemory
from longtake.models.codec import Codec, CodecState
from longtake.models.wan import PromptKeys, WanTransformer


class TextEncoder(Protocol):
    """Whatever turns B prompts into embeddings [B, L, E]; ValueError for a prompt it cannot read."""

    def encode(self, prompts: list[str]) -> Tensor: ...


class Timings(NamedTuple):
    """Seconds spent on one chunk: network (denoising and commit), codec, and both with everything between."""

    network_seconds: float
    codec_seconds: float
    total_seconds: float


@dataclass(frozen=True)
class Chunk:
    """The pictures of one block: uint8 [T, H, W, 3], and where they stand in the stream."""

    frames: np.ndarray
    index: int
    start_seconds: float
    timings: Timings


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A text encoder, a network and a codec under one recipe, on one device: opens streams.

    latent_size: [C, H, W] of a latent frame. shift: of the levels the network was trained with.
    """

    model_name: str
    recipe: Recipe
    text: TextEncoder
    network: WanTransformer
    codec: Codec
    latent_size: tuple[int, int, int]
    frame_rate: int
    shift: float

    @property
    def height(self) -> int:
        return self.latent_size[1] * self.codec.spatial_factor

    @property
    def width(self) -> int:
        return self.latent_size[2] * self.codec.spatial_factor

    @property
    def dtype(self) -> torch.dtype:
        return self.network.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.network.patch_embedding.weight.device

    def to(self, dtype: torch.dtype) -> None:
        """Compute in another precision from now on; streams already open do not go on."""
        self.network.to(dtype)
        self.codec.to(dtype)

    @torch.no_grad()
    def prompt_keys(self, prompt: str) -> PromptKeys:
        """Cross-attention keys of one prompt. ValueError if it is empty or cannot be read."""
        if not prompt.strip():
            raise ValueError("the prompt is empty: say what to show")
        return self.network.prompt_keys(self.text.encode([prompt])[:, None].to(self.dtype))

    def stream(self, prompt: str, *, seed: int = 42) -> "Stream":
        """Open an endless stream. The same seed gives the same pictures on one device, version and precision.

        seed: -1 draws one; `stream.seed` tells which. ValueError for other negative ones.
        """
        if seed < -1:
            raise ValueError(f"a seed is a whole number from 0, or -1 to draw one, got {seed}")
        return Stream(self, prompt, random.SystemRandom().randrange(2**31) if seed == -1 else seed)


class Stream:
    """One endless video being made: an iterator of chunks that never ends by itself; close it or leave its `with`."""

    def __init__(self, engine: Engine, prompt: str, seed: int):
        self.engine = engine
        self.seed = seed
        self.prompt = prompt
        self._prompt_keys = engine.prompt_keys(prompt)
        self._codec_state: CodecState | None = None
        self._pictures = self._chunks = 0
        self._blocks: Iterator[Tensor] | None = engine.recipe.schedule(
            engine.network,
            StreamMemory(engine.recipe.memory(engine.network), engine.network.config.layers, ring=True),
            lambda block: self._prompt_keys,
            SeededNoise([seed], (engine.recipe.block, *engine.latent_size), engine.device, torch.float32),
            engine.recipe.levels(engine.shift),
        )

    def redirect(self, prompt: str) -> None:
        """Go on under another prompt, from the next block; what is remembered stays. ValueError leaves the old one."""
        self._prompt_keys = self.engine.prompt_keys(prompt)
        self.prompt = prompt

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        if self._blocks is None:
            raise RuntimeError("this stream is closed, or failed: open another one")
        try:
            return self._next_chunk(self._blocks)
        except BaseException:  # Ctrl-C too: half a block is in no state to go on from
            self.close()
            raise

    def _next_chunk(self, blocks: Iterator[Tensor]) -> Chunk:
        started = time.perf_counter()
        latents = next(blocks)
        self._wait()
        made = time.perf_counter()
        frames = self._decode(latents)
        decoded = time.perf_counter()
        chunk = Chunk(
            frames,
            index=self._chunks,
            start_seconds=self._pictures / self.engine.frame_rate,
            timings=Timings(made - started, decoded - made, decoded - started),
        )
        self._pictures += len(frames)
        self._chunks += 1
        return chunk

    def close(self) -> None:
        """Let go of memory and codec state; a closed stream makes no more chunks."""
        self._blocks = self._codec_state = None  # the schedule holds the memory

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @torch.no_grad()
    def _decode(self, latents_BFCHW: Tensor) -> np.ndarray:
        frames, self._codec_state = self.engine.codec.decode(latents_BFCHW.to(self.engine.dtype), self._codec_state)
        frames_FHWC: np.ndarray = to_uint8(frames)[0].cpu().numpy()
        return frames_FHWC

    def _wait(self) -> None:
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)


def to_uint8(frames_BFCHW: Tensor) -> Tensor:
    """Pictures in -1..1 (values beyond are cut) as uint8 [B, F, H, W, C]."""
    scaled = (frames_BFCHW.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).movedim(2, -1)
