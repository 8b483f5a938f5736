"""Videos to score: renders, renders through a codec, whole clips, and streams that are cut into windows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.rendered import RenderedEngine
from torch import Tensor

from longtake.evaluation import sources
from longtake.toy.captions import parse
from longtake.toy.scenes import held_out_combinations

PROMPTS = ("a red ball bounces over green hills at night", "a blue cat stands still on a beach")


def test_a_stream_is_scored_like_the_pictures_it_is_made_of() -> None:
    source = sources.engine_source(RenderedEngine())  # type: ignore[arg-type]
    (window,) = source.play(PROMPTS, [3, 3], [5])
    (whole,) = sources.truth_source().play(PROMPTS, [3, 3], [5])
    assert torch.equal(window[:, ::2], whole[:, ::2])
    assert source.levels == 4


@pytest.mark.parametrize("pieces", [[80, 80, 80], [9] + [12] * 20, [240], [1, 239]])
def test_windows_end_at_their_marks(pieces: Sequence[int]) -> None:
    numbers = torch.arange(sum(pieces)).reshape(1, -1, 1, 1, 1)
    got = list(sources.windows(list(numbers.split(list(pieces), 1)), 16, [5, 7, 12]))
    assert [(int(window[0, 0]), int(window[0, -1])) for window in got] == [(0, 79), (32, 111), (112, 191)]


def test_clips_that_are_too_short_are_refused() -> None:
    source = sources.clip_source(lambda prompts, seed: torch.zeros(len(prompts), 81, 1, 1, 3, dtype=torch.uint8))
    assert next(source.play(PROMPTS, [0, 1], [5])).shape == (2, 80, 1, 1, 3)
    with pytest.raises(ValueError, match="cannot be scored at 8"):
        next(source.play(PROMPTS, [0, 1], [5, 8]))


def test_held_out_captions_never_change_with_their_number() -> None:
    assert sources.held_out_captions(3) == sources.held_out_captions(5)[:3]
    for said in map(parse, sources.held_out_captions(50)):
        if said.keys() >= {"subject", "colour", "place"}:
            assert (said["subject"], said["colour"], said["place"]) in held_out_combinations()


@pytest.mark.parametrize("count", [-1, 0, 1001])
def test_only_captions_that_there_are_can_be_asked_for(count: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 1000, not {count}"):
        sources.held_out_captions(count)


def test_a_file_without_captions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no captions"):
        sources.captions_in(tmp_path / "empty.txt")


class Halves(torch.nn.Module):
    """A codec for tests: of four pictures it keeps the last, of one that one."""

    temporal_factor = 4

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, frames_BFCHW: Tensor, state: Any = None) -> tuple[Tensor, int]:
        latents = frames_BFCHW[:, :1] if state is None else frames_BFCHW[:, 3::4]
        return latents, 1

    def decode(self, latents_BFCHW: Tensor, state: Any = None) -> tuple[Tensor, int]:
        return (latents_BFCHW if state is None else latents_BFCHW.repeat_interleave(4, 1)), 1


def test_renders_go_through_the_codec_piece_by_piece() -> None:
    (window,) = sources.codec_source(Halves()).play(PROMPTS[:1], [0], [5])  # type: ignore[arg-type]
    (whole,) = sources.truth_source().play(PROMPTS[:1], [0], [5])
    assert torch.equal(window[:, 4::4], whole[:, 4::4])
    assert torch.equal(window[:, 1], whole[:, 4])
