"""Where the videos that are scored come from: recipes, a teacher, a codec and renders of the truth; and their captions.

Shapes: B clips, T pictures of a piece, F of a clip, H W height and width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor

from longtake import parallel
from longtake.generation.stream import Engine, to_uint8
from longtake.models.codec import Codec
from longtake.toy.captions import captions, parse
from longtake.toy.scenes import RATE, Scenes, make_scene, sample_scenes
from longtake.toy.world import render

WINDOW_SECONDS = 5
CAPTION_SEED, CAPTION_COUNT = 20_001, 1000  # the fixed list of held-out captions
RENDERED_AT_ONCE = 8  # scenes, which bounds memory
CPU = torch.device("cpu")
Clip = TypeVar("Clip")


@dataclass(frozen=True)
class Source:
    """What makes videos, on one device, a batch at a time.

    play: from B prompts, as many seeds and rising marks in seconds: for each mark, the uint8 pictures
    [B, 80, H, W, 3] of the five seconds that end there. levels: denoising steps, None for what has none.
    weights: tell a recipe's network from others. guidance: of what is guided.
    """

    play: Callable[[Sequence[str], Sequence[int], Sequence[int]], Iterator[Tensor]]
    device: torch.device = CPU
    levels: int | None = None
    weights: str | None = None
    guidance: float | None = None


def batches(clips: Sequence[Clip], device: torch.device) -> list[Sequence[Clip]]:
    """Clips in batches for `parallel.share_out`. A GPU is idle with few at a time, a CPU gains nothing from many."""
    most = 125 if device.type == "cuda" else 8
    size = min(most, -(-len(clips) // parallel.processes()))
    return [clips[first : first + size] for first in range(0, len(clips), size)]


def clip_seed(seed: int, number: int) -> int:
    """The seed of one video: every caption of a list has noise of its own under each seed of the list of seeds."""
    return 100_000 * seed + number


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------


def held_out_captions(count: int) -> list[str]:
    """The first captions of a list that never changes, each of a combination that training never shows.

    ValueError unless there are so many.
    """
    if not 1 <= count <= CAPTION_COUNT:
        raise ValueError(f"there are {CAPTION_COUNT} held-out captions: ask for 1 to {CAPTION_COUNT}, not {count}")
    scenes = sample_scenes(CAPTION_COUNT, CAPTION_SEED, held_out=True, changes=0.0)
    return [before for before, _ in captions(scenes, CAPTION_SEED)[:count]]


def captions_in(path: Path) -> list[str]:
    """The lines of a file that are not blank. ValueError if there are none."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no captions")
    return lines


def seed_list(count: int) -> list[int]:
    """Seeds 0, 1, ... of the videos for each caption. ValueError for fewer than one."""
    if count < 1:
        raise ValueError(f"evaluation needs at least one seed, got {count}")
    return list(range(count))


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def truth_source(device: torch.device = CPU) -> Source:
    """Renders of scenes in which everything is as the captions say; what they leave open is drawn from the seed."""

    def play(prompts: Sequence[str], seeds: Sequence[int], marks: Sequence[int]) -> Iterator[Tensor]:
        scenes = scenes_of(prompts, seeds).to(device)
        for mark in marks:
            yield rendered(scenes, WINDOW_SECONDS * RATE, (mark - WINDOW_SECONDS) * RATE)

    return Source(play, device)


def codec_source(codec: Codec) -> Source:
    """The same renders, encoded and decoded from the first picture on."""

    def play(prompts: Sequence[str], seeds: Sequence[int], marks: Sequence[int]) -> Iterator[Tensor]:
        yield from windows(through_codec(codec, scenes_of(prompts, seeds), marks[-1] * RATE), RATE, marks)

    return Source(play, next(codec.parameters()).device)


@torch.no_grad()
def through_codec(codec: Codec, scenes: Scenes, pictures: int, first: int = 0) -> Iterator[Tensor]:
    """So many pictures of scenes from number `first` on, encoded and decoded, in pieces: uint8 [B, T, H, W, 3]."""
    weight = next(codec.parameters())
    scenes = scenes.to(weight.device)
    encoder_state = decoder_state = None
    for begin, count in _blocks(codec.temporal_factor, pictures):
        frames_BFCHW = render(scenes, count, first + begin).frames_BFCHW.to(weight)
        latents, encoder_state = codec.encode(frames_BFCHW, encoder_state)
        decoded, decoder_state = codec.decode(latents, decoder_state)
        yield to_uint8(decoded)


def clip_source(
    sample: Callable[[Sequence[str], Sequence[int]], Tensor],
    device: torch.device = CPU,
    levels: int | None = None,
    guidance: float | None = None,
) -> Source:
    """Whole clips, uint8 [B, F, H, W, 3], made at once from prompts and seeds: a teacher's. Marks end within them."""

    def play(prompts: Sequence[str], seeds: Sequence[int], marks: Sequence[int]) -> Iterator[Tensor]:
        clips = sample(prompts, seeds)
        if clips.shape[1] < marks[-1] * RATE:
            raise ValueError(f"clips of {clips.shape[1] / RATE:.1f} seconds cannot be scored at {marks[-1]}")
        yield from windows([clips], RATE, marks)

    return Source(play, device, levels, guidance=guidance)


def engine_source(engine: Engine) -> Source:
    """A batch of streams, as long as the last mark."""

    def play(prompts: Sequence[str], seeds: Sequence[int], marks: Sequence[int]) -> Iterator[Tensor]:
        with engine.stream_batch(prompts, seeds=seeds) as streams:
            yield from windows(streams, engine.frame_rate, marks)

    return Source(play, engine.device, len(engine.recipe.steps), engine.weights)


def windows(pieces: Iterator[Tensor] | Sequence[Tensor], rate: int, marks: Sequence[int]) -> Iterator[Tensor]:
    """Cut the window before each rising mark out of videos in pieces [B, T, H, W, 3], of which it keeps little."""
    remaining = iter(pieces)
    kept = next(remaining)
    seen = kept.shape[1]  # pictures so far, of which `kept` holds the last
    for mark in marks:
        while seen < mark * rate:
            piece = next(remaining)
            seen += piece.shape[1]
            longest = WINDOW_SECONDS * rate + piece.shape[1]  # the piece may go on beyond the mark
            kept = torch.cat([kept, piece], 1)[:, -longest:]
        end = kept.shape[1] - (seen - mark * rate)
        yield kept[:, end - WINDOW_SECONDS * rate : end]


def scenes_of(prompts: Sequence[str], seeds: Sequence[int]) -> Scenes:
    """A scene for each prompt, as it says; what it leaves open is drawn from its seed and the prompt."""
    pairs = zip(prompts, seeds, strict=True)
    return stacked([_scene_of(prompt, Random(f"{seed} {prompt}").getrandbits(32)) for prompt, seed in pairs])


def stacked(parts: Sequence[Scenes]) -> Scenes:
    """Scenes of several batches as one."""
    return Scenes(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Scenes)})


def _scene_of(prompt: str, seed: int) -> Scenes:
    said: dict[str, Any] = {**parse(prompt)}
    return make_scene(seed=seed, **said)


def rendered(scenes: Scenes, pictures: int, first: int) -> Tensor:
    """Pictures number `first` to `first + pictures` of scenes: uint8 [B, F, H, W, 3]."""
    few = (scenes[begin : begin + RENDERED_AT_ONCE] for begin in range(0, len(scenes), RENDERED_AT_ONCE))
    return torch.cat([to_uint8(render(some, pictures, first).frames_BFCHW) for some in few])


def _blocks(temporal_factor: int, pictures: int) -> Iterator[tuple[int, int]]:
    """First picture and length of pieces that a codec takes: one picture, then four latent frames at a time."""
    yield 0, 1
    for first in range(1, pictures, 4 * temporal_factor):
        yield first, 4 * temporal_factor
