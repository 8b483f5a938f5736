"""An engine whose pictures tell which stream, words and block they are of, and a clock that is moved by hand."""

from threading import RLock
from types import MappingProxyType, SimpleNamespace

import numpy as np
import torch

from longtake.generation.stream import Chunk, Timings, chunk_of

RATE, HEIGHT, WIDTH, BLOCK = 16, 16, 16, 12


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeStream:
    def __init__(self, engine: "FakeEngine", prompt: str, seed: int) -> None:
        self.engine, self.prompt, self.seed, self.blocks = engine, prompt, seed, 0
        self.closed, self.in_company, self.prompts = False, False, [(0, prompt)]
        self.lock = RLock()
        engine.open_streams.add(self)

    @property
    def pictures(self) -> int:
        return self.engine.pictures_in(self.blocks) if self.blocks else 0

    history = ()

    def state(self) -> dict:
        told = {"words": self.prompt, "seeds": [self.seed], "blocks": self.blocks, "pictures": self.pictures}
        return told | {"memory": {}}

    def restore(self, state) -> None:
        assert not self.closed
        self.prompt, self.blocks, (self.seed,) = state["words"], state["blocks"], state["seeds"]
        self.prompts = [(self.blocks, self.prompt)]

    def redirect(self, prompt: str, *, over: int = 1, blend: str = "lerp") -> None:
        self._go_on(prompt, self.engine.recipe.in_flight - 1 if self.blocks else 0)

    def cut(self, prompt: str) -> None:
        self._go_on(prompt, 0)

    def _go_on(self, prompt: str, older: int) -> None:
        self.engine.refuse(prompt)
        self.prompt = prompt
        self.prompts = [*(one for one in self.prompts if one[0] <= self.blocks), (self.blocks + older, prompt)]

    @property
    def since(self) -> int:
        return self.prompts[-1][0]

    def prompt_of(self, block: int) -> str:
        return [prompt for since, prompt in self.prompts if since <= block][-1]

    @property
    def phase(self) -> tuple:
        return (min(self.blocks, 3),)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __next__(self) -> Chunk:
        assert not self.closed
        if "explode" in self.prompt:
            self.close()
            raise RuntimeError("out of memory")
        self.engine.clock.now += self.engine.block_seconds
        return self.chunk(self.engine.block_seconds)

    def chunk(self, seconds: float) -> Chunk:
        count = BLOCK if self.blocks else BLOCK - 3
        frames = np.full((count, HEIGHT, WIDTH, 3), 40 * (len(self.prompt) % 6), np.uint8)
        timings = Timings(0.1, 0.05, 0.1, seconds)
        chunk = chunk_of(frames, timings, self.blocks, max(0, BLOCK * self.blocks - 3) / RATE)
        self.engine.words[id(frames)] = self.prompt
        self.engine.kept.append(frames)
        self.blocks += 1
        return chunk

    def close(self) -> None:
        self.closed = True
        self.engine.open_streams.discard(self)


class FakeEngine:
    """Takes `block_seconds` of its clock for a block; refuses words with "xyzzy" in them.

    gain: what share of the time one after the other a pass over several streams takes. passes: their sizes so far.
    """

    frame_rate, height, width = RATE, HEIGHT, WIDTH
    model_name, codec_name, base_name = "fake", None, None
    weights = codec_weights = "none"
    shift, latent_size, device = 1.0, (1, 1, 1), torch.device("cpu")
    circumstances = MappingProxyType({"dtype": "float32", "device": "cpu any"})
    fused = False

    def __init__(
        self, clock: Clock | None = None, block_seconds: float = 0.2, in_flight: int = 1, gain: float = 1.0
    ) -> None:
        self.clock = clock or Clock()
        self.block_seconds, self.gain = block_seconds, gain
        self.passes: list[int] = []
        self.blocks_until_full = 1
        self.recipe = SimpleNamespace(
            in_flight=in_flight,
            name="fake_recipe",
            steps=(1,),
            sink=0,
            past=0,
            block=3,
            levels=lambda shift: [1.0],
        )
        self.open_streams: set[FakeStream] = set()
        self.words: dict[int, str] = {}
        self.kept: list[np.ndarray] = []  # so that no other array takes the place of one told of

    def words_of(self, frames: np.ndarray) -> str:
        """What pictures of this engine were made under; they may be cut short."""
        return self.words[id(frames if frames.base is None else frames.base)]

    def pictures_in(self, blocks: int) -> int:
        return BLOCK * blocks - 3

    def refuse(self, prompt: str) -> None:
        if "xyzzy" in prompt or not prompt.strip():
            raise ValueError(f"cannot show {prompt!r}")

    def stream(self, prompt: str, *, seed: int = 42) -> FakeStream:
        self.refuse(prompt)
        return FakeStream(self, prompt, seed)

    def next_together(self, streams) -> list[Chunk]:
        assert len({stream.phase for stream in streams}) == 1 and not any(stream.closed for stream in streams)
        if any("explode" in stream.prompt for stream in streams):
            raise RuntimeError("out of memory")
        self.passes.append(len(streams))
        seconds = self.block_seconds * len(streams) * self.gain
        self.clock.now += seconds
        for stream in streams:
            stream.in_company = True
        return [stream.chunk(seconds) for stream in streams]
