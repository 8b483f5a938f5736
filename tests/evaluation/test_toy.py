"""Scores of videos whose truth is known: renders, renders that stop, and streams that are cut into chunks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from longtake.evaluation import toy
from longtake.evaluation.toy import Tally
from longtake.toy.captions import parse
from longtake.toy.scenes import ATTRIBUTES, held_out_combinations

PROMPTS = ("a red ball bounces over green hills at night", "a blue cat stands still on a beach")


class RenderedChunk(NamedTuple):
    frames: np.ndarray


class RenderedStreams:
    """An engine whose network is the renderer: 9 pictures, then 12 at a time, and it never ends."""

    frame_rate = 16

    @contextmanager
    def stream(self, prompt: str, *, seed: int) -> Iterator[Iterator[RenderedChunk]]:
        yield self._chunks(toy.scenes_of([prompt], seed))

    def _chunks(self, scenes: toy.Scenes) -> Iterator[RenderedChunk]:
        first, length = 0, 9
        while True:
            yield RenderedChunk(toy._rendered(scenes, length, first)[0].numpy())
            first, length = first + length, 12


def no_engine(recipe: str) -> RenderedStreams:
    raise AssertionError(f"{recipe} needs no engine")


@pytest.fixture(scope="module")
def truth_table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS), encoding="utf-8")
    (table,) = toy.evaluate_toy(["truth"], no_engine, prompt_file=file, seeds=1, at=[5])
    return table


def test_renders_follow_their_captions(truth_table: dict[str, Any]) -> None:
    scores = truth_table["at"]["5"]
    for attribute in ("colour", "place", "time"):
        assert scores[attribute] == 1.0
    assert scores["weather"] is None  # no caption says it


def test_the_table_has_the_fields_that_others_read(truth_table: dict[str, Any]) -> None:
    assert truth_table["recipe"] == "truth"
    assert (truth_table["prompts"], truth_table["seeds"], truth_table["seed_list"]) == (2, 1, [0])
    assert set(truth_table["at"]["5"]) == set(toy.FOLLOWED) == set(truth_table["constancy"]["5"])
    assert truth_table["frechet"]["5"] >= 0
    assert truth_table["counts"]["5"]["at"]["place"]["scored"] == 2


def test_a_stream_is_scored_like_the_pictures_it_is_made_of() -> None:
    (windows,) = toy.engine_source(RenderedStreams())(PROMPTS, 3, [5])
    (whole,) = toy.truth_source(PROMPTS, 3, [5])
    assert torch.equal(windows, whole)


@pytest.mark.parametrize("pieces", [[80, 80, 80], [9] + [12] * 20, [240], [1, 239]])
def test_windows_end_at_their_marks(pieces: Sequence[int]) -> None:
    numbers = torch.arange(sum(pieces)).reshape(1, -1, 1, 1, 1)
    got = list(toy.windows(list(numbers.split(list(pieces), 1)), 16, [5, 7, 12]))
    assert [(int(window[0, 0]), int(window[0, -1])) for window in got] == [(0, 79), (32, 111), (112, 191)]


def test_clips_that_are_too_short_are_refused() -> None:
    source = toy.clip_source(lambda prompts, seed: torch.zeros(len(prompts), 81, 1, 1, 3, dtype=torch.uint8))
    assert next(source(PROMPTS, 0, [5])).shape == (2, 80, 1, 1, 3)
    with pytest.raises(ValueError, match="cannot be scored at 8"):
        next(source(PROMPTS, 0, [5, 8]))


def found(**indices: Sequence[int]) -> Any:
    """Detections of two clips, all abstaining but for those given."""
    return type("Found", (), {name: torch.tensor(indices.get(name, (-1, -1))) for name in ATTRIBUTES})


def test_abstaining_is_wrong_and_what_is_not_said_is_not_scored() -> None:
    score = toy.score_following(found(subject=(0, -1), place=(0, 2)), [parse(prompt) for prompt in PROMPTS])
    assert score["subject"] == Tally(right=1, scored=2, abstained=1)
    assert score["place"] == Tally(right=2, scored=2, abstained=0)
    assert score["time"] == Tally(right=0, scored=1, abstained=1)
    assert score["weather"] == Tally()


def test_what_is_left_open_must_stay() -> None:
    said = [parse(prompt) for prompt in PROMPTS]
    score = toy.score_constancy(found(weather=(1, 1), time=(0, 0)), found(weather=(1, 2), time=(0, 0)), said)
    assert score["weather"] == Tally(right=1, scored=2, abstained=0)
    assert score["time"] == Tally(right=1, scored=1, abstained=0)  # one caption says it
    assert score["subject"] == Tally()


def test_intervals_hold_their_share() -> None:
    low, high = Tally(97, 100, 1).interval or (1.0, 0.0)
    assert 0.91 < low < 0.97 < high < 1.0
    assert Tally().share is None and Tally().interval is None


def test_frechet_distance_of_gaussians() -> None:
    """Of normal features it is the squared distance of means plus that of deviations."""
    dice = torch.Generator().manual_seed(0)
    one = torch.randn(20_000, 3, generator=dice)
    other = 2 * torch.randn(20_000, 3, generator=dice) + torch.tensor([1.0, 0.0, 0.0])
    assert toy.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert toy.frechet_distance(one, other) == pytest.approx(1 + 3, rel=0.05)


def test_held_out_captions_never_change_with_their_number() -> None:
    assert toy.held_out_captions(3) == toy.held_out_captions(5)[:3]
    for said in map(parse, toy.held_out_captions(50)):
        if said.keys() >= {"subject", "colour", "place"}:
            assert (said["subject"], said["colour"], said["place"]) in held_out_combinations()


def test_wrong_use_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="end at 5 or later"):
        toy.evaluate_toy(["truth"], no_engine, at=[2])
    with pytest.raises(ValueError, match="captions and seeds"):
        toy.evaluate_toy(["truth"], no_engine, prompts=0)


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
    (window,) = toy.codec_source(Halves())(PROMPTS[:1], 0, [5])  # type: ignore[arg-type]
    (whole,) = toy.truth_source(PROMPTS[:1], 0, [5])
    assert torch.equal(window[:, 4::4], whole[:, 4::4])
    assert torch.equal(window[:, 1], whole[:, 4])
