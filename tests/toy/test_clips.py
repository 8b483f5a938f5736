from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from torch.nn import functional

from longtake.models.light_codec import LightCodec, LightCodecConfig
from longtake.toy.captions import TEXT_LENGTH, decode, parse
from longtake.toy.clips import (
    HARDER,
    RECALL,
    STRESS,
    ClipPool,
    _own_words,
    focus,
    landmark_share,
    lingering,
    looking_soon,
    memory_focus,
    memory_scenes,
    moving,
    prompt_of_frames,
    recalled,
    returned,
    sample_prompts,
    shown,
    subject_share,
    training_scenes,
)
from longtake.toy.palettes import Look
from longtake.toy.poses import Pose, pose
from longtake.toy.scenes import (
    CAMERAS,
    COLOURS,
    HEIGHT,
    MOTIONS,
    PLACES,
    RATE,
    SUBJECTS,
    SWEEP_SECONDS,
    WIDTH,
    held_out_combinations,
    make_scene,
    sample_scenes,
)
from longtake.toy.world import Rendering, render

SMALL = LightCodecConfig(
    encoder_widths=(4, 4, 4), encoder_blocks=(1, 0, 0), decoder_widths=(4, 4, 4), decoder_blocks=(0, 0, 0)
)


def test_a_pool_hands_out_clips_and_renews_them() -> None:
    torch.manual_seed(0)
    pool = ClipPool(LightCodec(SMALL), 2, seed=1, device=torch.device("cpu"), at_once=1)
    drawn = pool.draw(5, 9)
    assert drawn.latents_BFCHW.shape == (5, 9, 16, 14, 24)
    assert drawn.tokens_BPL.shape == (5, 2, TEXT_LENGTH)
    assert drawn.prompt_BF.shape == (5, 9) and drawn.focus_BFHW.shape == (5, 9, 14, 24)
    assert drawn.focus_BFHW.min() >= 0 and 0.3 < drawn.focus_BFHW.max() <= 1 + STRESS
    whole = pool.draw(20, 33).latents_BFCHW
    assert len({round(x.double().sum().item(), 3) for x in whole}) == 2
    pool.renew()
    renewed = pool.draw(20, 33).latents_BFCHW
    assert len({round(x.double().sum().item(), 3) for x in torch.cat([whole, renewed])}) == 3


def test_clips_longer_than_they_are_made_are_refused_before_any_is_painted() -> None:
    pool = ClipPool(LightCodec(SMALL), 2, seed=1, device=torch.device("cpu"), painter=lambda *_: pytest.fail())
    with pytest.raises(ValueError, match="clips have 33 latent frames: 36 cannot be cut out of them"):
        pool.draw(5, 36)


def test_other_seeds_are_other_scenes_however_large() -> None:
    drawn = [
        training_scenes(2, (seed << 32) + made, torch.device("cpu"))[0] for seed, made in product((42, 43), (0, 8))
    ]
    assert len({tuple(scenes.uniforms.flatten().tolist()) for scenes in drawn}) == 4


def test_the_second_prompt_begins_with_the_first_latent_frame_after_the_change() -> None:
    scene = make_scene(time="day", change_seconds=1.0, after={"time": "night"})  # picture 16
    assert prompt_of_frames(scene, 8, 4).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]  # frame 5 holds pictures 17 to 20
    assert prompt_of_frames(make_scene(), 8, 4).sum() == 0


def test_the_share_of_a_cell_is_averaged_over_a_latent_frames_pictures() -> None:
    mask = torch.zeros(1, 5, 112, 192)
    mask[0, 0, :8, :4] = 1  # half of the first cell, in the first picture
    mask[0, 1:3, 8:16, 8:16] = 1  # another cell, in two of the next four
    share = subject_share(Rendering(torch.zeros(1, 5, 3, 112, 192), mask), LightCodec(SMALL))
    assert share.shape == (1, 2, 14, 24)
    assert share[0, 0, 0, 0] == 0.5 and share[0, 1, 1, 1] == 0.5 and share.sum() == 1


def test_frames_matter_more_while_the_camera_moves() -> None:
    away = make_scene(camera="looks away", away_start=1.0, away_seconds=1.0, away_every=9.0)
    speed = moving(away, 97, 0, 4)[0]  # frame 5 holds pictures 17 to 20: it turns from picture 16 on, until 40
    assert speed.shape == (25,) and speed[:5].max() == 0
    assert speed[6:10].min() == 1
    assert speed[11:15].max() == 0 and speed[16:20].min() == 1 and speed[21:].max() == 0
    assert torch.equal(moving(away, 65, torch.tensor([32]), 4)[0, 1:], speed[9:]), "from any moment on"
    pan = moving(make_scene(camera="pans left"), 65, 0, 4)[0]
    assert pan[0] == 0 and pan[1:].min() > 0.5 and pan.max() <= 1
    assert moving(make_scene(camera="still"), 65, 0, 4).max() == 0


def test_frames_matter_more_that_show_again_what_was_out_of_sight() -> None:
    away = make_scene(camera="looks away", away_start=1.0, away_seconds=1.0, away_every=9.0)
    back = returned(away, 97, 0, 4)[0]  # it is back from picture 80 on, and turns away again after picture 160
    assert back[:20].max() == 0 and back[21:].min() == 1
    assert returned(away, 41, torch.tensor([40]), 4)[0].max() == 0, "what a clip did not show before has not returned"
    assert returned(make_scene(camera="pans left"), 65, 0, 4).max() == 0


def test_frames_matter_most_that_only_memory_can_know() -> None:
    away = make_scene(camera="looks away", away_start=1.0, away_seconds=1.0, away_every=9.0)
    codec = LightCodec(SMALL)
    rendered = render(away, 97)
    share = subject_share(rendered, codec)
    # The camera turns away from picture 16 to 40, and back from 56 to 80: in latent frames 15 to 20.
    in_sight = shown(share)[0].bool().tolist()
    back = in_sight.index(True, in_sight.index(False))
    assert 14 < back < 20
    again = recalled(share)[0]
    assert again.nonzero()[:, 0].tolist() == [back, back + 1, back + 2]
    nothing = torch.zeros_like(share)
    matters = memory_focus(nothing, away, rendered, 0, codec)[0]
    assert (matters[:15] == 0).all()
    assert matters[back : back + 3].amin() >= RECALL
    assert matters[back + 1][share[0, back + 1] > 0.9].min() > 0.9 * RECALL * (1 + RECALL) - RECALL
    landmark = landmark_share(away, 97, 0, codec)[0]
    comes = recalled(landmark[None])[0].nonzero()[0, 0]
    assert matters[comes][landmark[comes] > 0.5].min() > 0.5 * RECALL**2, "landmarks count as subjects do"
    still = make_scene(camera="still")
    assert (memory_focus(nothing, still, render(still, 97), 0, codec) == 0).all()


def test_frames_do_not_count_before_anything_that_returns_was_seen() -> None:
    away = make_scene(camera="looks away", away_start=-2.0, away_seconds=1.0, away_every=9.0)
    codec, first = LightCodec(SMALL), torch.tensor([-20])
    rendered = render(away, 97, first)
    told = focus(away, rendered, first, codec)
    matters = memory_focus(told, away, rendered, first, codec)[0]
    subject, landmark = subject_share(rendered, codec)[0], landmark_share(away, 97, first, codec)[0]
    comes = min(shown(share[None])[0].nonzero()[0, 0].item() for share in (subject, landmark))
    assert comes > 1 and (matters[:comes] == -1).all() and (matters[comes:] >= told[0, comes:]).all()


def test_a_landmark_covers_what_is_painted_otherwise_without_it() -> None:
    scene = make_scene(camera="still", weather="clear")
    share = landmark_share(scene, 5, 0, LightCodec(SMALL))
    one, other = (
        render(replace(scene, landmark_colour=torch.full_like(scene.landmark_colour, colour)), 5) for colour in (0, 2)
    )
    painted = functional.avg_pool2d((one.frames_BFCHW - other.frames_BFCHW).abs().amax(2), 8)[:, 0]
    assert share.shape == (1, 2, 14, 24) and painted.max() > 0
    assert share[0, 0][painted[0] > 0.05].min() > 0 and share[0, 0].sum() > 2


def test_what_is_harder_comes_up_more_often_where_captions_say_it_and_held_out_scenes_never_do() -> None:
    (often, tokens), plain = training_scenes(2000, 5, torch.device("cpu")), sample_scenes(6000, 5)
    said = [parse(decode(row.tolist())) for row in tokens[:, 0]]
    named = torch.tensor(["camera" in one for one in said])
    assert all(
        one["camera"] == CAMERAS[i] for one, i in zip(said, often.camera.tolist(), strict=True) if "camera" in one
    )
    away = often.camera == CAMERAS.index("looks away")
    share = (plain.camera == CAMERAS.index("looks away")).double().mean()
    changes = torch.isfinite(often.change_seconds)
    assert 2 < away[named & ~changes].double().mean() / share < 4
    assert away[~named].double().mean() < share  # captions rather leave a still camera out
    assert abs(changes.double().mean() - torch.isfinite(plain.change_seconds).double().mean()) < 0.03
    assert away[changes].double().mean() < 1.3 * share
    rows = zip(often.subject.tolist(), often.colour[:, 0].tolist(), often.place[:, 0].tolist(), strict=True)
    combinations = {(SUBJECTS[s], COLOURS[c], PLACES[p]) for s, c, p in rows}
    assert not combinations & held_out_combinations()


def test_a_share_of_captions_leaves_the_colour_out_and_nothing_else_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes, tokens = training_scenes(2000, 7, torch.device("cpu"))
    monkeypatch.setattr("longtake.toy.clips.COLOURLESS", 0.0)
    plain_scenes, plain_tokens = training_scenes(2000, 7, torch.device("cpu"))
    for field in fields(scenes):
        assert torch.equal(getattr(scenes, field.name), getattr(plain_scenes, field.name))
    lost = torch.zeros(2000, 2, dtype=torch.bool)
    for row, column in product(range(2000), range(2)):
        said, plain = (parse(decode(x[row, column].tolist())) for x in (tokens, plain_tokens))
        lost[row, column] = said != plain
        assert said == plain or said == {name: value for name, value in plain.items() if name != "colour"}

    changes = torch.isfinite(scenes.change_seconds)
    recoloured = scenes.colour[:, 0] != scenes.colour[:, 1]
    assert not lost[recoloured].any()
    assert torch.equal(tokens[~changes, 0], tokens[~changes, 1])
    said = 0.92  # how often a caption has a colour to lose
    assert abs(lost[~changes, 0].double().mean() - 0.35 * said) < 0.04
    assert abs(lost[changes & ~recoloured, 0].double().mean() - 0.175 * said) < 0.06
    # Half of second captions name only what changes.
    assert abs(lost[changes & ~recoloured, 1].double().mean() - 0.175 * said) < 0.06
    full = changes & lost[:, 1]
    assert 0.3 < lost[full, 0].double().mean() < 0.7


@pytest.mark.parametrize("attribute", HARDER)
def test_captions_are_known_to_say_an_attribute_as_parsing_has_it(attribute: str) -> None:
    _, tokens = training_scenes(300, 6, torch.device("cpu"))
    own = torch.isin(tokens[:, 0], _own_words(attribute)).any(1)
    assert own.tolist() == [attribute in parse(decode(row.tolist())) for row in tokens[:, 0]]


def test_a_pool_made_again_holds_the_same_clips() -> None:
    torch.manual_seed(0)
    codec = LightCodec(SMALL)
    pool, twin = (ClipPool(codec, 3, seed=1, device=torch.device("cpu"), at_once=2, pictures=33) for _ in range(2))
    pool.draw(1, 9)
    pool.renew()
    twin.load_state_dict(pool.state_dict())
    for one, other in zip(pool._pool, twin._pool, strict=True):
        assert torch.equal(one, other)


def test_prompts_need_no_rendering_and_say_what_the_clips_would() -> None:
    said, of_longer = (sample_prompts(6, 9, torch.device("cpu"), 4, frames) for frames in (21, 40))
    assert said.tokens_BPL.shape == (6, 2, TEXT_LENGTH) and said.prompt_BF.shape == (6, 33)
    assert torch.equal(said.tokens_BPL, of_longer.tokens_BPL)
    assert of_longer.prompt_BF.shape == (6, 40) and torch.equal(of_longer.prompt_BF[:, :33], said.prompt_BF)


def test_prompts_may_be_of_scenes_alone_whose_camera_does_not_look_away() -> None:
    prompts = [sample_prompts(300, 9, torch.device("cpu"), 4, 21, looks_away=away) for away in (True, False)]
    said = [[parse(decode(row.tolist())) for row in of.tokens_BPL.flatten(0, 1)] for of in prompts]
    share = [sum(one.get("camera") == "looks away" for one in of) / 600 for of in said]
    assert share[0] > 0.1 and share[1] == 0 and prompts[1].tokens_BPL.shape == prompts[0].tokens_BPL.shape
    changes = [(of.prompt_BF == 1).any(1).float().mean().item() for of in prompts]
    assert changes[1] == pytest.approx(changes[0], abs=0.1), "as many change as in all"
    other = sample_prompts(300, 10, torch.device("cpu"), 4, 21, looks_away=False)
    assert not torch.equal(other.tokens_BPL, prompts[1].tokens_BPL)
    few = [len(sample_prompts(1, seed, torch.device("cpu"), 4, 21, looks_away=False).tokens_BPL) for seed in range(50)]
    assert few == [1] * 50


@pytest.mark.parametrize("pictures", [141, 237])
def test_clips_made_for_memory_show_what_no_caption_says_then_look_away_then_return(pictures: int) -> None:
    scenes, tokens, first = memory_scenes(300, 3, torch.device("cpu"), pictures / RATE)
    for row in tokens.flatten(0, 1):
        assert not {"colour", "landmark", "landmark_colour"} & parse(decode(row.tolist())).keys()
    assert not any(MOTIONS[i].startswith("walks") for i in scenes.motion.tolist())
    assert not torch.isfinite(scenes.change_seconds).any()
    where = pose(scenes, pictures, first)
    far_BF = torch.stack([(x - WIDTH / 2).abs() - WIDTH / 2 for x in (where.x, where.landmark_x)])
    near, gone = far_BF[1] < 0, (far_BF > 40).all(0)  # a flier may leave the picture by itself
    assert gone[:, :9].all(), "three latent frames, a sink, show nothing"
    assert min(min(_runs(row)[:2]) for row in near) >= RATE and min(len(_runs(row)) for row in near) > 1
    seconds = torch.tensor([_runs(row)[1] for row in gone]) / RATE
    assert seconds.min() >= 1 and (seconds.max() > 5.5 if pictures == 237 else seconds.max() < 3.5)


def blank(where: Pose, colours: Look) -> tuple[torch.Tensor, torch.Tensor]:
    """Paints nothing."""
    return torch.zeros(len(where.x), 3, HEIGHT, WIDTH), torch.zeros(len(where.x), HEIGHT, WIDTH)


def test_cameras_that_look_away_soon_again_are_level_as_long_as_in_clips_made_for_memory() -> None:
    scenes, _ = training_scenes(300, 3, torch.device("cpu"))
    soon = looking_soon(scenes, 3)
    changed = {f.name for f in fields(scenes) if not torch.equal(getattr(scenes, f.name), getattr(soon, f.name))}
    assert changed == {"away_start", "away_every"}, "nothing else is another, so that captions stay true"
    assert 0.5 <= soon.away_start.min() < 0.6 and 9.9 < soon.away_start.max() <= 10
    level = soon.away_every - soon.away_seconds - 2 * SWEEP_SECONDS
    assert 1 <= level.min() < 1.1 and 3.9 < level.max() <= 4.0001
    again, other = looking_soon(scenes, 3), looking_soon(scenes, 4)
    for name in changed:
        assert torch.equal(getattr(again, name), getattr(soon, name))
        assert not torch.equal(getattr(other, name), getattr(soon, name))


def test_a_camera_lingers_that_has_been_level_for_long_until_it_turns() -> None:
    away = make_scene(camera="looks away", away_start=3.0, away_seconds=1.0, away_every=7.0)
    # level to 3 s, away to 7, level to 10: so it lingers from 1.5 s on, and from 8.5; four latent frames are a second
    lingers = lingering(away, 177, 0, 4)[0]
    way = functional.pad(pose(away, 177, 0).camera_x[0, 1:].unflatten(0, (-1, 4)).abs().amax(1), (1, 0))
    assert not lingers[:7].any() and lingers[7:13].all() and not lingers[14:35].any() and lingers[36:41].all()
    assert way[lingers].max() < 1 and not lingers[42:].any()
    late = lingering(away, 97, torch.tensor([64]), 4)[0]
    assert torch.equal(late[8:], lingers[24:41]), "a clip that begins later knows what came since, and nothing before"
    assert not lingering(make_scene(camera="still"), 177, 0, 4).any()


def test_frames_do_not_count_in_which_a_camera_lingers_that_was_told_to_look_away() -> None:
    torch.manual_seed(0)
    codec, cpu = LightCodec(SMALL), torch.device("cpu")
    settings = {"at_once": 4, "pictures": 141, "memory_share": 0.5, "looks_soon": True}
    drawn = ClipPool(codec, 8, 1, cpu, blank, **settings).draw(64, 36)
    told = torch.tensor([parse(decode(row.tolist())).get("camera") == "looks away" for row in drawn.tokens_BPL[:, 0]])
    ignored = (drawn.focus_BFHW == -1).all(3).all(2)
    of_world = ~ignored[:, 0]  # clips made for memory begin so
    assert ignored[told & of_world].any() and not ignored[~told & of_world].any()
    assert (~ignored[told & of_world, 1:]).any(1).all(), "what it shows before and between still counts"


def test_a_pool_may_have_cameras_look_away_soon_again_but_for_clips_made_for_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("longtake.toy.clips.looking_soon", lambda scenes, seed: asked.append(seed) or scenes)
    codec, cpu = LightCodec(SMALL), torch.device("cpu")
    for looks_soon, seeds in ((False, []), (True, [1 << 32])):
        settings = {"at_once": 1, "pictures": 141, "memory_share": 0.5, "looks_soon": looks_soon}
        pool = ClipPool(codec, 2, 1, cpu, blank, **settings)
        pool.renew()
        pool.renew()  # made for memory
        assert asked == seeds


def _runs(row_F: torch.Tensor) -> list[int]:
    """Lengths of the runs of true."""
    return [len(run) for run in "".join("x" if x else " " for x in row_F.tolist()).split()]


def test_a_pool_holds_a_share_of_clips_made_for_memory_and_takes_room_for_them() -> None:
    torch.manual_seed(0)
    codec, cpu = LightCodec(SMALL), torch.device("cpu")
    with pytest.raises(ValueError, match="seconds or longer, not 8"):
        ClipPool(codec, 2, seed=1, device=cpu, memory_share=0.5)
    pool = ClipPool(codec, 2, seed=1, device=cpu, at_once=1, pictures=141, memory_share=0.5)
    drawn = pool.draw(8, 36)
    begun_unseen = (drawn.focus_BFHW[:, :3] == -1).all(3).all(2).all(1)
    said = [parse(decode(row.tolist())) for row in drawn.tokens_BPL[:, 0]]
    assert 0 < begun_unseen.sum() < 8 and drawn.focus_BFHW.sum((1, 2, 3)).min() > 0
    assert not any("colour" in one for one, unseen in zip(said, begun_unseen, strict=True) if unseen)
    most = drawn.focus_BFHW.amax((1, 2, 3))
    assert most[begun_unseen].min() > 10 * RECALL and most[~begun_unseen].max() <= 1 + STRESS
    ordinary = ClipPool(codec, 1, seed=1, device=cpu, at_once=1).draw(1, 33).latents_BFCHW
    assert any(torch.equal(ordinary[0, :3], one[:3]) for one in drawn.latents_BFCHW)
