"""The toy world keeps its promises: it is repeatable, endless, smooth, needs memory, and its truth is its pictures'."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from longtake.toy.clock import FADE_SECONDS
from longtake.toy.landscape import FAR, MIDDLE, NEAR, PERIOD, Layer
from longtake.toy.palettes import BODY, SUBJECT_LIGHT
from longtake.toy.poses import pose
from longtake.toy.scenes import (
    CLIP_PICTURES,
    COLOURS,
    HEIGHT,
    MOTIONS,
    PLACES,
    RATE,
    SUBJECTS,
    SWEEP_SECONDS,
    TIMES,
    UNIFORMS,
    WIDTH,
    Scenes,
    held_out_combinations,
    make_scene,
    sample_scenes,
)
from longtake.toy.shapes import silhouette
from longtake.toy.truth import truth
from longtake.toy.world import render

TEN_HOURS = 10 * 3600 * RATE


def combinations(scenes: Scenes) -> set[tuple[str, str, str]]:
    """The subject, colour and place of every scene, before and after."""
    rows = [(scenes.subject, scenes.colour[:, side], scenes.place[:, side]) for side in (0, 1)]
    numbers = torch.cat([torch.stack(row, 1) for row in rows]).tolist()
    return {(SUBJECTS[s], COLOURS[c], PLACES[p]) for s, c, p in numbers}


def test_sampling_is_repeatable() -> None:
    one, same, other = sample_scenes(20, 7), sample_scenes(20, 7), sample_scenes(20, 8)
    assert all(torch.equal(getattr(one, f.name), getattr(same, f.name)) for f in fields(one))
    assert not torch.equal(one.uniforms, other.uniforms)


def test_scenes_are_sliced_and_moved() -> None:
    scenes = sample_scenes(5, 0)
    assert len(scenes[1:3]) == 2 and len(scenes[4]) == 1 and len(scenes[-1]) == 1
    assert torch.equal(scenes[-1].uniforms, scenes.uniforms[4:])
    assert torch.equal(scenes.to("cpu").subject, scenes.subject)


def test_pictures_have_their_shape_and_range() -> None:
    frames, mask = render(sample_scenes(3, 1), 4)
    assert frames.shape == (3, 4, 3, HEIGHT, WIDTH) and frames.dtype == torch.float32
    assert mask.shape == (3, 4, HEIGHT, WIDTH)
    assert frames.isfinite().all() and frames.min() >= -1 and frames.max() <= 1
    assert mask.min() >= 0 and mask.max() <= 1


def test_a_film_is_the_same_in_one_go_or_in_halves() -> None:
    scenes = sample_scenes(2, 3, changes=1.0)
    whole = render(scenes, 40)
    halves = render(scenes, 20), render(scenes, 20, first=torch.tensor([20, 20]))
    for at_once, pieces in zip(whole, zip(*halves, strict=True), strict=True):
        torch.testing.assert_close(at_once, torch.cat(pieces, 1), rtol=0, atol=1e-5)


def returns(share: Tensor) -> Tensor:
    """Whether something that was seen is (almost) gone and is seen again later: [B, F] to [B]."""
    seen = (share > 0.7).long()
    before, after = seen.cumsum(1) > 0, seen.flip(1).cumsum(1).flip(1) > 0
    return ((share < 0.1) & before & after).any(1)


def test_sampled_clips_need_memory() -> None:
    facts = truth(sample_scenes(80, 11), CLIP_PICTURES)
    remembered = returns(facts.visible) | returns(facts.landmark_visible)
    assert remembered.float().mean() >= 0.30
    assert (facts.visible[:, 0] > 0.7).float().mean() > 0.9, "the first picture introduces the subject"


def test_training_and_held_out_combinations_are_apart() -> None:
    held_out = held_out_combinations()
    assert len(held_out) >= 0.1 * len(SUBJECTS) * len(COLOURS) * len(PLACES)
    assert not combinations(sample_scenes(4000, 0, changes=0.5)) & held_out
    assert combinations(sample_scenes(1000, 0, held_out=True, changes=0.5)) <= held_out


def test_training_covers_every_pair_of_subject_colour_and_place() -> None:
    held_out = held_out_combinations()
    for left, right in ((0, 1), (0, 2), (1, 2)):
        pairs = [(row[left], row[right]) for row in held_out]
        assert max(map(pairs.count, pairs)) <= 2, "most scenes with any two of the three remain"


def test_changes_change_something_and_only_then_differ() -> None:
    scenes = sample_scenes(500, 2, changes=0.5)
    differs = torch.stack([(p[:, 0] != p[:, 1]) for p in (scenes.colour, scenes.place, scenes.time, scenes.weather)])
    assert torch.equal(differs.any(0), scenes.change_seconds.isfinite())
    assert 0.4 < differs.any(0).float().mean() < 0.6
    assert not sample_scenes(100, 2, changes=0.0).change_seconds.isfinite().any()


def test_a_change_fades_and_is_told() -> None:
    scene = make_scene(time="day", place="hills", change_seconds=2.0, after={"time": "night"})
    facts, frames = truth(scene, 64), render(scene, 64, 0).frames_BFCHW[0]
    end = int((2.0 + FADE_SECONDS) * RATE)
    assert set(facts.time[0, : 2 * RATE].tolist()) == {0} and set(facts.time[0, end:].tolist()) == {2}
    assert set(facts.time[0, 2 * RATE + 1 : end].tolist()) == {-1}
    assert set(facts.place[0].tolist()) == {0}
    assert frames[0].mean() - frames[-1].mean() > 0.3, "night is darker"


def test_nothing_flickers() -> None:
    # The pace of change, seen from afar, never jumps, prompt changes included. (Rain is left out: it does jump.)
    scenes = sample_scenes(3, 5, changes=1.0)
    scenes = replace(scenes, weather=torch.tensor([[0, 2]]).expand(3, 2))
    scenes = replace(scenes, change_seconds=torch.full_like(scenes.change_seconds, 0.5))
    frames = render(scenes, 32).frames_BFCHW
    afar = torch.nn.functional.avg_pool2d(frames.flatten(0, 1), 16).reshape(3, 32, 3, 7, 12)
    assert afar.diff(n=2, dim=1).abs().mean(dim=(2, 3, 4)).max() < 0.02


@pytest.mark.parametrize("stay", [2.0, 60.0])
def test_looking_away_loses_everything_and_finds_it_again(stay: float) -> None:
    scene = make_scene(
        camera="looks away", motion="stands still", away_start=1.0, away_seconds=stay, away_every=stay + 20, seed=4
    )
    sweep = int(SWEEP_SECONDS * RATE)
    gone = truth(scene, int(stay * RATE), first=RATE + sweep)
    assert gone.visible.max() == 0 and gone.landmark_visible.max() == 0
    before, after = truth(scene, 1), truth(scene, 1, first=RATE + 2 * sweep + int(stay * RATE))
    assert after.landmark_x == before.landmark_x and after.x == before.x
    assert after.visible == before.visible > 0.9


@pytest.mark.parametrize("layer", [FAR, MIDDLE, NEAR])
def test_the_landscape_repeats(layer: Layer) -> None:
    u = torch.arange(0, layer.period) + 0.25
    for line in layer.lines:
        torch.testing.assert_close(line(u), line(u + layer.period), rtol=0, atol=2e-3)


def test_a_panning_camera_brings_the_landmark_back() -> None:
    scene = make_scene(camera="pans right", motion="spins")
    scene.uniforms[:, UNIFORMS.index("pan")] = 1 / 3  # 16 pixels a second
    lap = int(PERIOD / 16 * RATE)
    now, later = truth(scene, 20), truth(scene, 20, first=lap)
    torch.testing.assert_close(now.landmark_x, later.landmark_x, rtol=0, atol=1e-2)


def test_motion_stays_smooth_after_ten_hours() -> None:
    for motion in MOTIONS:
        scene = make_scene(motion=motion, camera="pans left")
        early, late = (pose(scene, 200, first) for first in (0, TEN_HOURS))
        for name in ("x", "y", "landmark_x"):
            steps = [getattr(where, name).diff().abs() for where in (early, late)]
            steps = [step[step < 100] for step in steps]  # a lap begins anew out of view
            torch.testing.assert_close(steps[0].max(), steps[1].max(), rtol=0.03, atol=0.02)


def test_a_walker_keeps_its_pace_after_ten_hours() -> None:
    where = pose(make_scene(motion="walks right"), 60, first=TEN_HOURS)
    pace = where.x.diff()
    pace = pace[pace > 0]
    assert pace.max() - pace.min() < 1e-3


def own_area(subject: str) -> Tensor:
    alone = make_scene(subject=subject, motion="spins", camera="still", landmark_front=False)
    alone.uniforms[:, UNIFORMS.index("start")] = 0.5
    return render(alone, 1).mask_BFHW.sum()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_what_is_told_visible_is_what_the_mask_shows(subject: str) -> None:
    scene = make_scene(subject=subject, motion="walks right", camera="still", landmark="house", landmark_front=True)
    for first in (0, 20, 40, 60, 80):
        shown = render(scene, 1, first).mask_BFHW.sum() / own_area(subject)
        told = truth(scene, 1, first).visible[0, 0]
        assert abs(shown - told) < 0.08


def test_the_centre_told_is_where_the_mask_is() -> None:
    scene = make_scene(subject="ball", motion="bounces", camera="still", landmark_front=False)
    mask, facts = render(scene, 6).mask_BFHW[0], truth(scene, 6)
    x = torch.arange(WIDTH) + 0.5
    y = torch.arange(HEIGHT) + 0.5
    area = mask.sum((1, 2))
    torch.testing.assert_close((mask.sum(1) * x).sum(1) / area, facts.x[0], rtol=0, atol=0.5)
    torch.testing.assert_close((mask.sum(2) * y).sum(1) / area, facts.y[0], rtol=0, atol=0.5)


def test_silhouettes_are_told_apart() -> None:
    axis = torch.linspace(-1.4, 1.4, 57)
    x, y = axis[None, :], axis[:, None]
    masks = [silhouette(torch.tensor(index), x, y) < 0 for index in range(len(SUBJECTS))]
    for index, mask in enumerate(masks):
        for other in masks[index + 1 :]:
            assert (mask & other).sum() / (mask | other).sum() < 0.88


def test_the_body_has_the_colour_of_the_palette() -> None:
    for time, light in zip(TIMES, SUBJECT_LIGHT, strict=True):
        scene = make_scene(
            subject="ball", colour="blue", time=time, weather="clear", motion="stands still", landmark_front=False
        )
        frames, mask = render(scene, 1)
        pixels = (frames[0, 0, :, mask[0, 0] > 0.99] + 1) / 2
        expected = torch.tensor(BODY[COLOURS.index("blue")]) * torch.tensor(light)
        torch.testing.assert_close(pixels.median(1).values, expected, rtol=0, atol=0.06)


def test_wrong_names_say_what_is_right() -> None:
    with pytest.raises(ValueError, match=r"subject is one of ball, cube.*'dog'"):
        make_scene(subject="dog")
    with pytest.raises(ValueError, match=r"no 'size'; it has subject"):
        make_scene(size="large")
    with pytest.raises(ValueError, match=r"motion cannot change"):
        make_scene(after={"motion": "flies"})
