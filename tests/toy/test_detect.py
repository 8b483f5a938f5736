"""Detectors are right on what the world draws, also after a lossy codec, and are not taken in by planted errors."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tests.rendered import in_pairs
from torch import Tensor
from torch.nn import functional as nn

from longtake.generation.stream import to_uint8
from longtake.recipes.weight_files import toy_codec
from longtake.toy.detect import STRIDE, Detections, detect, detector_fingerprint, frozen_fingerprint, window_truth
from longtake.toy.palettes import Look
from longtake.toy.poses import Pose
from longtake.toy.scenery import FLAKE, _without_flakes
from longtake.toy.scenes import (
    CAMERAS,
    COLOURS,
    HEIGHT,
    MOTIONS,
    SUBJECTS,
    TIMES,
    UNIFORMS,
    WEATHERS,
    WIDTH,
    Scenes,
    make_scene,
    sample_scenes,
)
from longtake.toy.truth import truth
from longtake.toy.world import paint, render

CLIPS = 10  # of the training sampler, and as many held-out ones
ATTRIBUTES = (
    "subject",
    "colour",
    "place",
    "time",
    "weather",
    "motion",
    "camera",
    "landmark",
    "landmark_colour",
    "count",
)
MOST_WRONG = 1  # of these clips, for each attribute; larger samples stand in the records


@torch.no_grad()
def lossy(frames_BFHWC: Tensor) -> Tensor:
    """Through the embedded model's codec, a few pictures at a time; the first is shown twice, to be 1 + 4 k."""
    codec, clips = toy_codec(), []
    for frames in frames_BFHWC.split(1):
        video, decoded, coding, decoding = frames.movedim(-1, 2).float() / 127.5 - 1, [], None, None
        for piece in (video[:, :1], *video.split(8, dim=1)):
            latents, coding = codec.encode(piece, coding)
            pictures, decoding = codec.decode(latents, decoding)
            decoded.append(to_uint8(pictures))
        clips.append(torch.cat(decoded, 1)[:, 1:])
    return torch.cat(clips)


@cache
def sampled() -> tuple[Scenes, Tensor]:
    """Scenes of both samplers and where their windows begin."""
    seen, held_out = sample_scenes(CLIPS, 5), sample_scenes(CLIPS, 6, held_out=True)
    both = Scenes(**{name: torch.cat([getattr(seen, name), getattr(held_out, name)]) for name in vars(seen)})
    return both, torch.randint(0, 50, (2 * CLIPS,), generator=torch.Generator().manual_seed(7))


@cache
def sampled_truth() -> dict[str, Tensor]:
    scenes, first = sampled()
    return window_truth(scenes, 80, first)


@pytest.fixture(scope="module")
def found_in_samples(shared_folder: Path) -> dict[str, Detections]:
    """What clips show as drawn, and every second one through the codec; one process of a run of tests looks for all."""
    made = shared_folder / "found_in_samples.pt"
    with FileLock(made.with_suffix(".lock")):
        if not made.exists():
            scenes, first = sampled()
            whole = to_uint8(render(scenes[::2], 80, first[::2]).frames_BFCHW)
            others = to_uint8(in_pairs(scenes[1::2], 80, first[1::2]).frames_BFCHW)
            drawn = torch.stack([whole, others], 1).flatten(0, 1)
            torch.save({"drawn": vars(detect(drawn)), "coded": vars(detect(lossy(whole)))}, made)
    return {how: Detections(**found) for how, found in torch.load(made).items()}


@pytest.mark.parametrize("how", ["drawn", "coded"])
@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_attributes_are_read_off_pictures(found_in_samples: dict[str, Detections], attribute: str, how: str) -> None:
    wanted, found = sampled_truth()[attribute], getattr(found_in_samples[how], attribute)
    wanted = wanted[::2] if how == "coded" else wanted  # every second clip is enough for what takes so long
    scored = wanted >= 0
    assert scored.sum() > len(wanted) / 4
    assert ((found != wanted) & scored).sum() <= MOST_WRONG


def test_position_is_right_to_a_few_pixels(found_in_samples: dict[str, Detections]) -> None:
    scenes, first = sampled()
    true, found = truth(scenes, 80, first), found_in_samples["drawn"]
    clear = (true.visible > 0.95) & ~found.x.isnan()
    assert clear.sum() > 0.85 * (true.visible > 0.95).sum()
    error = torch.hypot(found.x - true.x, found.y - true.y)[clear]
    assert (error < 4).float().mean() > 0.95


def test_features_are_finite_and_differ_between_clips(found_in_samples: dict[str, Detections]) -> None:
    features = found_in_samples["drawn"].features
    assert features.isfinite().all()
    assert (features.std(0) > 0.01).all()


# Planted errors: a still camera and a subject in plain view, of every kind in some place.

PLACES = ("hills", "city", "beach", "forest", "mountains", "desert", "hills", "beach")
LANDMARKS = ("tree", "house", "tower", "tent") * 2


@cache
def planted_scenes(motion: str = "flies") -> Scenes:
    scenes = [
        make_scene(
            seed=number,
            subject=subject,
            colour=COLOURS[-1 - number],
            place=PLACES[number],
            landmark=LANDMARKS[number],
            time=TIMES[number % 3],
            weather=WEATHERS[number // 3],
            motion=motion,
            camera="still",
            landmark_front=number % 2 == 0,
        )
        for number, subject in enumerate(SUBJECTS)
    ]
    return Scenes(**{name: torch.cat([getattr(scene, name) for scene in scenes]) for name in vars(scenes[0])})


def drawn(scenes: Scenes, pictures: int = 32, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Pictures with the subject moved aside, and its mask [B, F, 1, H, W]."""

    def aside(where: Pose, colours: Look) -> tuple[Tensor, Tensor]:
        return paint(where._replace(x=where.x + shift), colours)

    frames, mask = in_pairs(scenes, pictures, painter=aside)
    return frames, mask[:, :, None]


@cache
def in_flight() -> tuple[Tensor, Tensor]:
    return drawn(planted_scenes())


def blurred(frames_BFCHW: Tensor, spread: float) -> Tensor:
    """By products with matrices, which take a tenth of a convolution's time where there is one channel."""
    weights = torch.exp(-torch.arange(-9, 10.0).square() / (2 * spread**2))
    across, down = (
        sum(torch.diag(weight.expand(size - abs(by)), by) for by, weight in enumerate(weights / weights.sum(), -9))
        for size in (WIDTH, HEIGHT)
    )
    return down @ frames_BFCHW @ across


def test_a_missing_subject_is_not_found() -> None:
    frames, _ = drawn(planted_scenes(), shift=1000.0)
    found = detect(to_uint8(frames))
    assert (found.subject == -1).all() and (found.colour == -1).all() and (found.motion == -1).all()
    assert (found.count == 0).all() and found.x.isnan().all()


def test_a_blurred_subject_is_not_accepted() -> None:
    frames, mask = in_flight()
    area = nn.max_pool2d(mask.flatten(0, 1), 9, 1, 4).unflatten(0, mask.shape[:2])
    found = detect(to_uint8(torch.lerp(frames, blurred(frames, 4.0), area)))
    assert (found.subject == -1).all() and (found.count == 0).all()


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_frozen_video_shows_no_motion(motion: str) -> None:
    frames, _ = drawn(planted_scenes(motion), pictures=1)
    assert (detect(to_uint8(frames.expand(-1, 32, -1, -1, -1))).motion == -1).all()


@pytest.mark.parametrize("camera", ["looks away", "still"])
def test_a_camera_is_read_behind_snow_where_the_landscape_is_a_blur(camera: str) -> None:
    scenes = [
        make_scene(
            camera=camera, place=place, seed=number, weather="snow", away_start=0.5, away_seconds=1.0, away_every=9.0
        )
        for number, place in enumerate(("forest", "hills", "desert"))
    ]
    together = Scenes(**{name: torch.cat([getattr(scene, name) for scene in scenes]) for name in vars(scenes[0])})
    frames = in_pairs(together, 48).frames_BFCHW
    found = detect(to_uint8(torch.lerp(frames, blurred(frames, 2.0), 0.8)))
    assert (found.camera == CAMERAS.index(camera)).all()


def test_flakes_are_taken_off_pictures_and_what_is_larger_stays() -> None:
    clean = torch.full((1, 1, 112, 192, 3), 0.3)
    clean[:, :, 60:90, 40:80] = 0.9  # a house
    clean[:, :, 90:] = 0.2
    snowed = clean.clone()
    for y, x in ((20, 30), (75, 60), (58, 100), (100, 150), (5, 5)):
        snowed[:, :, y : y + FLAKE - 1, x : x + FLAKE - 1] = 1.0
    assert not torch.equal(snowed, clean)
    assert torch.equal(_without_flakes(snowed), clean)


def test_two_subjects_are_counted() -> None:
    scenes = replace(planted_scenes("stands still"), landmark_x=torch.full((8,), -60.0))
    scenes.uniforms[:, UNIFORMS.index("start")] = 0.1
    frames, _ = drawn(scenes)
    twins, mask = drawn(scenes, shift=80.0)
    found = detect(to_uint8(torch.lerp(frames, twins, mask)))
    assert (found.count == 2).sum() >= 7


def test_wrong_kind_and_colour_are_told_apart() -> None:
    """What is drawn is what is found, so that no other claim is accepted."""
    scenes = planted_scenes()
    found = detect(to_uint8(in_flight()[0]))
    assert ((found.subject == scenes.subject) | (found.subject == -1)).all()
    assert ((found.colour == scenes.colour[:, 0]) | (found.colour == -1)).all()
    assert (found.subject >= 0).sum() >= 7


def test_noise_shows_nothing() -> None:
    frames = torch.randint(0, 256, (2, 16, HEIGHT, WIDTH, 3), dtype=torch.uint8)
    found = detect(frames)
    for attribute in ("subject", "colour", "place", "time", "weather", "motion", "landmark", "landmark_colour"):
        assert (getattr(found, attribute) == -1).all(), attribute
    assert (found.count == 0).all()
    assert found.features.isfinite().all()


@pytest.mark.parametrize("pictures", [16, 17])
def test_of_pictures_drawn_in_pairs_those_that_are_looked_at_are_as_rendered(pictures: int) -> None:
    scenes, first = sampled()
    whole, pairs = (made(scenes[:2], pictures, first[:2]) for made in (render, in_pairs))
    for one, other in zip(whole, pairs, strict=True):
        assert one.shape == other.shape
        begin = (pictures - 1) % STRIDE
        torch.testing.assert_close(other[:, begin::STRIDE], one[:, begin::STRIDE])


def test_clips_of_a_batch_do_not_depend_on_each_other() -> None:
    scenes, first = sampled()
    clips = to_uint8(in_pairs(scenes[:2], 16, first[:2]).frames_BFCHW)
    together, alone = detect(clips), detect(clips[1:])
    torch.testing.assert_close(together.features[1:], alone.features, atol=1e-4, rtol=1e-4)
    assert together.subject[1] == alone.subject[0]


def test_what_is_not_a_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="16 or more"):
        detect(torch.zeros(1, 8, HEIGHT, WIDTH, 3, dtype=torch.uint8))


def test_the_detectors_are_the_frozen_ones() -> None:
    """After a change: python -m longtake.toy.detect --freeze, and measure every published number again."""
    assert detector_fingerprint() == frozen_fingerprint()
