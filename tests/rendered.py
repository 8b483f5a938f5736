"""An engine whose network is the renderer, for tests of evaluation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from longtake.evaluation.sources import scenes_of
from longtake.generation.stream import to_uint8
from longtake.recipes import self_forcing_sink
from longtake.toy.captions import parse
from longtake.toy.detect import STRIDE
from longtake.toy.scenes import ATTRIBUTES, CHANGEABLE, RATE, Scenes
from longtake.toy.world import Painter, Rendering, render


class RenderedEngine:
    """9 pictures, then 12 at a time. Of two neighbours the second, odd one repeats the first, which costs half.

    obeys: whether a redirect changes what is shown.
    """

    frame_rate, device, recipe, weights = RATE, torch.device("cpu"), self_forcing_sink(), "drawn"

    def __init__(self, obeys: bool = True) -> None:
        self.obeys = obeys

    @contextmanager
    def stream_batch(self, prompts: Sequence[str], *, seeds: Sequence[int]) -> Iterator["RenderedBatch"]:
        yield RenderedBatch(prompts, seeds, self.obeys)


def in_pairs(scenes: Scenes, pictures: int, first: int | Tensor = 0, painter: Painter | None = None) -> Rendering:
    """What `render` makes, for half the cost.

    Drawn are the last picture and every second before it, at which detectors look; each is shown also before its time.
    """
    numbers = torch.arange((pictures - 1) % STRIDE, pictures, STRIDE)
    begins = torch.as_tensor(first).expand(len(scenes))
    every = torch.arange(len(scenes)).repeat_interleave(len(numbers))
    drawn = render(scenes[every], 1, (begins[:, None] + numbers).flatten(), painter)
    spread = (x[:, 0].unflatten(0, (len(scenes), -1)).repeat_interleave(STRIDE, 1)[:, -pictures:] for x in drawn)
    return Rendering(*spread)


class RenderedBatch:
    def __init__(self, prompts: Sequence[str], seeds: Sequence[int], obeys: bool) -> None:
        parts = [scenes_of([prompt], [seed]) for prompt, seed in zip(prompts, seeds, strict=True)]
        self.scenes = Scenes(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})
        self.obeys, self.pictures = obeys, 0

    def redirect(self, prompts: Sequence[str], *, over: int = 1, far: float = 1.0, in_flight: str = "own") -> None:
        if self.obeys:
            now = torch.full((len(prompts),), self.pictures / RATE)
            after = {name: getattr(self.scenes, name).clone() for name in CHANGEABLE}
            for row, said in enumerate(map(parse, prompts)):
                for name in CHANGEABLE & said.keys():
                    after[name][row, 1] = ATTRIBUTES[name].index(said[name])
            self.scenes = replace(self.scenes, change_seconds=now, **after)

    def __iter__(self) -> "RenderedBatch":
        return self

    def __next__(self) -> Tensor:
        first, count = self.pictures, 12 if self.pictures else 9
        self.pictures += count
        even = torch.arange(first, first + count) // 2 * 2
        numbers, back = even.unique(return_inverse=True)
        every = torch.arange(len(self.scenes)).repeat_interleave(len(numbers))
        drawn = to_uint8(render(self.scenes[every], 1, numbers.repeat(len(self.scenes))).frames_BFCHW)
        return drawn[:, 0].unflatten(0, (len(self.scenes), -1))[:, back]
