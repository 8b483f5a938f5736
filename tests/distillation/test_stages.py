"""What a step of distribution matching is made of: the shape of rollouts, their prompts and what they go on from."""

import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests import tiny

from longtake.distillation import dmd, pretrain, stages
from longtake.distillation.plan import Plan, Script, draw_plan, rolled_out
from longtake.distillation.pretrain import teacher_forcing_loss
from longtake.distillation.rollout import FreshNoise, rollout, windows
from longtake.distillation.stages import (
    AttentionMatchingStage,
    CodecStage,
    DmdStage,
    OdeStage,
    TeacherForcingStage,
    attention_matching,
    ode,
    strips,
    train_codec,
)
from longtake.distillation.stages.dmd import script_of
from longtake.distillation.stages.learners import dmd_adam, learner_of, resting
from longtake.distillation.stages.own_clips import OwnClips
from longtake.distillation.stages.world import drawn, renew
from longtake.distillation.trainer import STATE_FILE, Dice, Learner, Run, read_metrics, train
from longtake.generation.blockwise import blockwise
from longtake.generation.noise import SeededNoise
from longtake.generation.recipe import Recipe
from longtake.memory.stream_memory import StreamMemory
from longtake.models.delta import pays
from longtake.models.text import WordEncoder, WordEncoderConfig
from longtake.models.wan import WanTransformer, with_far_maps
from longtake.recipes import recipe_named, rolling_forcing, self_forcing_sink

CLIP = 9
RECIPE = self_forcing_sink()


@pytest.fixture(autouse=True)
def glances(monkeypatch) -> None:
    """Strips of pictures, of which nothing is asked here, take long: they are as short as can be."""
    monkeypatch.setattr(strips, "LOOKED_AT", 1)
    monkeypatch.setattr(strips, "LOOKED_AT_BLOCKS", 1)


def plans(recipe: Recipe = RECIPE, **settings) -> list[Plan]:
    dice, stage = Dice(1), DmdStage(**settings)
    chosen = {"levels": stage.levels_of(recipe), "self_forcing_share": stage.self_forcing_share}
    chosen |= {name: getattr(stage, name) for name in ("most_blocks", "most_given", "last_exits")}
    return [draw_plan(dice, recipe, CLIP, **chosen) for _ in range(400)]


def test_rollouts_have_every_length_and_every_exit() -> None:
    made = plans(most_blocks=5, most_given=0, levels=(4, 2))
    assert {plan.levels for plan in made} == {(4, 1), (4, 2), (4, 3), (4, 4), (2, 1), (2, 2)}
    assert {plan.blocks for plan in made} == {3, 4, 5} and all(plan.learned == 3 for plan in made)
    assert 0.5 < sum(plan.blocks == 3 for plan in made) / len(made) < 0.8


def test_exits_may_be_the_last_ones_alone() -> None:
    made = plans(most_blocks=5, levels=(4, 1), last_exits=2)
    assert {plan.levels for plan in made} == {(4, 3), (4, 4), (1, 1)}


def test_half_of_the_rollouts_go_on_from_given_blocks_to_the_end_of_the_clip() -> None:
    made = plans(most_blocks=5, most_given=2)
    given, free = [plan for plan in made if plan.given], [plan for plan in made if not plan.given]
    assert {(plan.given, plan.learned, plan.blocks) for plan in given} == {(1, 2, 3), (2, 1, 3)}
    assert {(plan.learned, plan.blocks) for plan in free} == {(3, 3), (3, 4), (3, 5)}
    assert {plan.levels for plan in given} == {(4, 1), (4, 2), (4, 3), (4, 4)}
    assert 0.4 < len(given) / len(made) < 0.6


def test_a_rollout_makes_at_least_one_block_itself() -> None:
    assert {plan.given for plan in plans(most_blocks=5, most_given=9)} == {0, 1, 2}


def test_half_of_the_rollouts_that_roll_go_by_windows_and_the_others_block_by_block() -> None:
    made = plans(rolling_forcing(), most_blocks=5, most_given=2)
    by_windows, others = ([plan for plan in made if (plan.offset is None) is which] for which in (False, True))
    assert 0.4 < len(by_windows) / len(made) < 0.6
    assert {(plan.levels, plan.offset) for plan in by_windows} == {((5, 5), offset) for offset in range(5)}
    assert {plan.levels for plan in others} == {(5, used) for used in range(1, 6)}
    lengths = {(0, 3, 3), (0, 3, 4), (0, 3, 5), (1, 2, 3), (2, 1, 3)}
    assert all({(plan.given, plan.learned, plan.blocks) for plan in some} == lengths for some in (by_windows, others))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_ablations_are_pure(share: float) -> None:
    made = plans(rolling_forcing(), most_blocks=5, self_forcing_share=share)
    assert all((plan.offset is None) == (share == 1) for plan in made)


def test_recipes_that_do_not_roll_draw_as_if_none_did() -> None:
    assert plans(most_blocks=5, self_forcing_share=0.0) == plans(most_blocks=5, self_forcing_share=1.0)
    assert all(plan.offset is None for plan in plans(most_blocks=5, self_forcing_share=0.0))


def test_levels_are_the_recipes_own_unless_given() -> None:
    assert {plan.levels[0] for plan in plans(most_blocks=5)} == {4}
    made = plans(rolling_forcing(), most_blocks=5, levels=(4, 2))
    assert {(plan.levels[0], plan.offset) for plan in made} == {
        (count, offset) for count in (2, 4) for offset in (None, *range(count))
    }
    with pytest.raises(ValueError, match=r"self_forcing_share must be at most 1, got 1\.5"):
        DmdStage(self_forcing_share=1.5)


def test_a_block_stands_under_the_prompt_of_its_first_frame() -> None:
    prompt_BF = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [0] * 12])
    short = Plan((4, 4), blocks=3, learned=3, block=3)
    assert short.prompts_of_judged(prompt_BF).tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 1], [0] * 9]
    longer = Plan((4, 4), blocks=4, learned=3, block=3)
    torch.manual_seed(0)
    drawn = {tuple(longer.prompts_of_judged(prompt_BF)[0].tolist()) for _ in range(50)}
    assert {row.index(1) for row in drawn} == {3, 6}, "the change falls on one block or another, never inside one"
    late = (torch.arange(12) >= 9).long().expand(200, -1)
    assert {sum(row) for row in longer.prompts_of_judged(late).tolist()} == {0, 3}, "up to the last moment of the clip"


class Source:
    """World and supply in one: two clips of random latents, their prompts changing inside the second block."""

    latents_BFCHW = torch.randn(2, CLIP, *tiny.LATENTS[1:], generator=torch.Generator().manual_seed(5))
    tokens_BPL = torch.ones(2, 2, 5, dtype=torch.long)
    prompt_BF = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0] * CLIP])

    def draw(self, count: int, frames: int) -> "Source":
        assert (count, frames) == (2, CLIP)
        return self

    def prompts(self, count: int, seed: int, frames: int, looks_away: bool = True) -> SimpleNamespace:
        assert (count, frames) == (2, CLIP)
        return SimpleNamespace(tokens_BPL=self.tokens_BPL, prompt_BF=1 - self.prompt_BF)


def test_what_is_given_comes_with_the_prompts_of_its_clip() -> None:
    source, stage = Source(), DmdStage(batch=2)

    def words(tokens_BL: torch.Tensor) -> torch.Tensor:
        return tokens_BL[..., None].expand(-1, -1, 8).float()

    def script(plan: Plan, step: int) -> Script:
        return script_of(words, source, source, plan, stage, step)  # type: ignore[arg-type]

    given = script(Plan((4, 4), blocks=3, learned=1, block=3, given=2), step=1)
    assert torch.equal(torch.cat(given.given, dim=1), source.latents_BFCHW[:, :6]) and len(given.given) == 2
    assert given.prompt_BF.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 1], [0] * CLIP]  # real frames have their own
    free = script(Plan((4, 4), blocks=3, learned=3, block=3), step=1)
    assert free.given == () and free.prompt_BF.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0, 0], [1] * CLIP]


@pytest.mark.parametrize("given", [0, 1, 2])
def test_the_student_learns_on_the_frames_it_made(given: int) -> None:
    torch.manual_seed(0)
    sample = torch.randn(2, CLIP, *tiny.LATENTS[1:], requires_grad=True)
    critic, teacher = torch.randn_like(sample).detach(), torch.randn_like(sample).detach()
    mask = Plan((4, 4), blocks=3, learned=3 - given, block=3, given=given).learned_frames(sample.device)
    loss = dmd.matching_loss(sample, lambda *_: teacher, lambda *_: critic, 3.0, mask)
    (gradient,) = torch.autograd.grad(loss, sample)
    reached = gradient.abs().sum(dim=(0, 2, 3, 4)) > 0
    assert reached.tolist() == [frame >= given * 3 for frame in range(CLIP)]


def test_only_what_the_teacher_could_have_made_of_the_same_noise_is_pulled_to_it() -> None:
    made = plans(most_blocks=5, most_given=2)
    pulled = [plan for plan in made if plan.can_be_pulled]
    assert {(plan.levels, plan.blocks, plan.learned, plan.given) for plan in pulled} == {((4, 1), 3, 3, 0)}
    assert 0.03 < len(pulled) / len(made) < 0.15, (
        "a quarter of the exits, half begin with nothing, two thirds are short"
    )


class Clips:
    """A supply whose clips are other ones whenever it is renewed, with what was drawn from it."""

    def __init__(self, frames: int, memory_share: float):
        self.frames, self.memory_share = frames, memory_share
        self.made, self.drawn = 0, []

    def renew(self) -> None:
        self.made += 1

    def draw(self, count: int, frames: int) -> SimpleNamespace:
        dice = torch.Generator().manual_seed(self.made)
        latents = torch.randn(count, frames, *tiny.LATENTS[1:], generator=dice)
        self.drawn.append(latents)
        return SimpleNamespace(
            latents_BFCHW=latents,
            tokens_BPL=torch.ones(count, 2, 5, dtype=torch.long),
            prompt_BF=torch.zeros(count, frames, dtype=torch.long),
            focus_BFHW=torch.zeros(count, frames, *tiny.LATENTS[2:]),
        )

    def state_dict(self) -> dict[str, int]:
        return {"made": self.made}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.made = state["made"]


def steps(
    monkeypatch, out: Path, recipe: Recipe = RECIPE, reads_far: bool = False, beside: Sequence[Recipe] = (), **settings
) -> SimpleNamespace:
    """Two steps of distribution matching: what the teacher sampled from, what rollouts began with, and the student."""
    seen = SimpleNamespace(targets=[], began=[], student=tiny.network(extent=12, reads_far=reads_far).float())
    seen.samplers, seen.given, seen.schedules, seen.memories = [], [], [], []
    seen.supplies, seen.lessons, seen.windows, seen.given_blocks, seen.prompt_seeds = [], [], [], [], []

    def sampled(teacher, noise, levels):
        seen.samplers.append(teacher)
        seen.targets.append((noise, levels))
        return torch.full_like(noise, 7.0)

    def rolled(schedule, network, memory, prompts, noise, *more, **named):
        seen.given.append(len(named["given"]))
        seen.given_blocks.append(named["given"])
        seen.schedules.append(schedule)
        seen.memories.append(memory)
        seen.began.append([])

        def heard(block, step):
            seen.began[-1].append(noise(block, step))
            return seen.began[-1][-1]

        return rollout(schedule, network, memory, prompts, heard, *more, **named)

    def forced(network, clips, *more, **named):
        seen.lessons.append(clips.latents_BFCHW)
        seen.windows.append((named["levels"], named["offset"]))
        return teacher_forcing_loss(network, clips, *more, **named)

    def clips(count, seed, frames, memory_share=0.0, looks_soon=False):
        seen.supplies.append(Clips(frames, memory_share))
        return seen.supplies[-1]

    monkeypatch.setattr("longtake.distillation.stages.dmd.teacher_sample", sampled)
    monkeypatch.setattr("longtake.distillation.stages.teacher_forcing.teacher_forcing_loss", forced)
    monkeypatch.setattr("longtake.distillation.plan.rollout", rolled)
    said = SimpleNamespace(tokens_BPL=Source.tokens_BPL, prompt_BF=torch.zeros(2, 12, dtype=torch.long))
    world = SimpleNamespace(
        latent_size=tiny.LATENTS[1:],
        prompts=lambda count, seed, frames: seen.prompt_seeds.append(seed) or said,
        clips=clips,
        held_out=lambda count: torch.ones(count, 5, dtype=torch.long),
        show=lambda name, latents: None,
    )
    text = WordEncoder(WordEncoderConfig(words=9, length=5, dim=8))
    out.mkdir(exist_ok=True)
    stage = DmdStage(**{"batch": 2, "steps": 2, "critic_turns": 1, "most_blocks": 4, "most_given": 0} | settings)
    torch.manual_seed(1)
    run = Run(out=out, device=torch.device("cpu"))
    teacher = tiny.network(extent=12, seed=1).float().requires_grad_(False)
    stages.train_dmd(text.requires_grad_(False), seen.student, teacher, world, [recipe, *beside], 3.0, stage, run)
    return seen


def test_the_teacher_samples_from_the_noise_that_the_rollout_began_with(monkeypatch, tmp_path: Path) -> None:
    seen = steps(monkeypatch, tmp_path, levels=(1,), pull=0.5, pull_steps=3)
    assert len(seen.targets) == 2, "with one level, every rollout as long as the clip is pulled"
    for (noise, levels), began in zip(seen.targets, seen.began, strict=True):
        assert torch.equal(noise, torch.cat(began, dim=1)) and len(levels) == 3
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1], "a step with a pull is always written"
    assert all(row["pull"] > 10 > row["matching"] for row in rows), "the two are told apart"


def test_without_a_pull_the_teacher_does_not_sample_and_the_noise_is_the_same(monkeypatch, tmp_path: Path) -> None:
    pulled = steps(monkeypatch, tmp_path / "pulled", levels=(1,), pull=1e-9)
    plain = steps(monkeypatch, tmp_path / "plain", levels=(1,))
    assert not plain.targets and "pull" not in read_metrics(tmp_path / "plain")[0]
    assert len(plain.began) == len(pulled.began) == 2
    assert all(
        torch.equal(torch.cat(one), torch.cat(other)) for one, other in zip(plain.began, pulled.began, strict=True)
    )


def test_a_step_is_judged_under_its_prompts_and_guidance_on_what_was_made(monkeypatch, tmp_path: Path) -> None:
    told, guided, judged = {}, {}, []
    estimate_by, guided_estimate, matching_loss = dmd.estimate_by, dmd.guided_estimate, dmd.matching_loss

    def telling(network, text_BPLE, prompt_BF):
        made = estimate_by(network, text_BPLE, prompt_BF)
        told[made] = network, text_BPLE, prompt_BF
        return made

    def guiding(said, unsaid, weight):
        made = guided_estimate(said, unsaid, weight)
        guided[made] = told[said], told[unsaid], weight
        return made

    def matching(sample, teacher, critic, shift, mask=None):
        judged.append((guided[teacher], told[critic], mask))
        return matching_loss(sample, teacher, critic, shift, mask)

    monkeypatch.setattr(dmd, "estimate_by", telling)
    monkeypatch.setattr(dmd, "guided_estimate", guiding)
    monkeypatch.setattr(dmd, "matching_loss", matching)
    rates = {"guidance": 2.0, "pull_guidance": 5.0, "pull": 0.5}
    seen = steps(monkeypatch, tmp_path, steps=8, seed=1, levels=(1,), most_given=3, **rates)
    assert len(judged) == 8 and 0 in seen.given and len(set(seen.given)) > 1
    for (said, unsaid, weight), critic, _ in judged:
        assert said[0] is unsaid[0] and critic[0] is not said[0] and weight == 2
        assert torch.equal(critic[1], said[1]) and torch.equal(critic[2], said[2])
        assert said[1].shape[1] == 2 and unsaid[1].shape[1] == 1 and unsaid[2] is None
    learned = [12 * [True] if mask is None else mask.expand(1, 12, 1, 1, 1).flatten().tolist() for *_, mask in judged]
    assert learned == [[frame >= 3 * given for frame in range(12)] for given in seen.given]
    assert len(seen.samplers) == seen.given.count(0)
    assert all(guided[sampler][2] == 5 for sampler in seen.samplers)


def test_what_is_real_teaches_beside_the_matching_loss(monkeypatch, tmp_path: Path) -> None:
    def weights(name: str, **settings) -> torch.Tensor:
        seen = steps(monkeypatch, tmp_path / name, steps=1, lr=1e-3, **settings)
        assert ("real" in read_metrics(tmp_path / name)[0]) is ("real_weight" in settings)
        return torch.cat([weight.flatten() for weight in seen.student.state_dict().values()])

    plain, both, mostly = weights("plain"), weights("both", real_weight=1.0), weights("mostly", real_weight=1e6)
    matching_loss = dmd.matching_loss
    monkeypatch.setattr(dmd, "matching_loss", lambda *given: 0 * matching_loss(*given))
    alone = weights("alone", real_weight=1.0)
    far = (plain - alone).abs().mean()
    assert (mostly - alone).abs().mean() < 0.02 * far
    assert min((both - alone).abs().mean(), (both - plain).abs().mean()) > 0.02 * far


def test_what_is_real_is_walked_through_where_a_memory_has_to_be(monkeypatch, tmp_path: Path) -> None:
    steps(monkeypatch, tmp_path, recipe_named("reward_forcing"), steps=1, real_weight=1.0)
    released = recipe_named("hybrid_forcing:form=ref_train")
    steps(monkeypatch, tmp_path / "released", released, reads_far=True, steps=1, real_weight=1.0)
    assert read_metrics(tmp_path)[0]["real"] > 0


OWN = {"real_frames": 15, "real_batch": 3, "memory_share": 0.5}


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) > 0 and all(map(torch.equal, some, others))


def test_whole_clips_of_those_that_blocks_are_given_from_are_what_is_real(monkeypatch, tmp_path: Path) -> None:
    seen = steps(monkeypatch, tmp_path, seed=2, most_given=3, steps=6, real_weight=1.0)
    (clips,) = seen.supplies
    assert (clips.frames, clips.memory_share) == (12, 0)
    assert {x.shape[:2] for x in clips.drawn} == {(2, 12)} and len(clips.drawn) == 6 + sum(map(bool, seen.given))
    assert len(seen.lessons) == 6 and same(seen.lessons[:1], clips.drawn[:1])


@pytest.mark.parametrize(
    "name, own", [("hybrid_forcing", OWN), ("reward_forcing", {"real_frames": 6}), (RECIPE.name, {"memory_share": 1.0})]
)
def test_clips_of_their_own_teach_beside_rollouts_of_the_teachers_length(
    name: str, own: dict, monkeypatch, tmp_path: Path
) -> None:
    settings = {"seed": 2, "most_given": 3, "steps": 6, "real_weight": 1.0}
    seen = steps(monkeypatch, tmp_path, recipe_named(name), True, **settings, **own)
    real, given = seen.supplies
    frames = own.get("real_frames", 12)
    assert (given.frames, given.memory_share) == (12, 0)
    assert (real.frames, real.memory_share) == (frames, own.get("memory_share", 0))
    assert same(seen.lessons, real.drawn) and len(seen.lessons) == 6
    assert {x.shape[:2] for x in seen.lessons} == {(own.get("real_batch", 2), frames)}
    went_on = [torch.cat(blocks, dim=1) for blocks in seen.given_blocks if blocks]
    assert same(went_on, [x[:, : y.shape[1]] for x, y in zip(given.drawn, went_on, strict=True)])
    assert {x.shape[:2] for x in given.drawn} == {(2, 12)}


def test_no_clips_are_made_that_nothing_is_given_from(monkeypatch, tmp_path: Path) -> None:
    assert not steps(monkeypatch, tmp_path / "neither", steps=1).supplies
    (real,) = steps(monkeypatch, tmp_path / "real", steps=1, real_weight=1.0, **OWN).supplies
    assert real.memory_share == 0.5


def test_more_real_clips_leave_the_rollouts_as_they_are(monkeypatch, tmp_path: Path) -> None:
    """Plans, prompts and given blocks come from dice and clips that lessons do not touch."""
    settings = {"seed": 2, "most_given": 3, "steps": 6}
    plain = steps(monkeypatch, tmp_path / "plain", **settings)
    taught = steps(monkeypatch, tmp_path / "taught", **settings, real_weight=1.0, **OWN)
    assert plain.given == taught.given and same(plain.supplies[0].drawn, taught.supplies[-1].drawn)


@pytest.mark.parametrize("own", [{}, OWN])
def test_a_run_that_crashes_goes_on_with_the_clips_that_it_would_have_had(
    own: dict, monkeypatch, tmp_path: Path
) -> None:
    class Crash(Exception): ...

    def crashing(supply: Clips, step: int) -> None:
        if step == 3:
            raise Crash
        renew(supply, step)

    settings = {"seed": 2, "most_given": 3, "steps": 6, "real_weight": 1.0, **own}
    monkeypatch.setitem(train.__kwdefaults__, "save_seconds", 0.0)
    monkeypatch.setattr("longtake.distillation.stages.world.RENEW_EVERY", 2)
    whole = steps(monkeypatch, tmp_path / "whole", **settings)
    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr("longtake.distillation.stages.dmd.renew", crashing)
        steps(monkeypatch, tmp_path / "crashed", **settings)
    assert {clips.made for clips in whole.supplies} == {3}, "new ones came every other step"
    assert torch.load(tmp_path / "crashed" / STATE_FILE)["step"] == 3
    resumed = steps(monkeypatch, tmp_path / "crashed", **settings)
    assert same(resumed.lessons, whole.lessons[3:])
    assert same([*resumed.student.state_dict().values()], [*whole.student.state_dict().values()])


@pytest.mark.parametrize("name, value", OWN.items())
def test_settings_of_real_clips_are_refused_where_nothing_learns_from_them(
    name: str, value: float, monkeypatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{name} is for teacher forcing on real clips: set real_weight"):
        steps(monkeypatch, tmp_path, **{name: value})


def test_real_clips_are_whole_blocks_of_every_recipe(monkeypatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"real_frames \(16\) must be whole blocks of 3"):
        steps(monkeypatch, tmp_path, real_weight=1.0, real_frames=16)
    with pytest.raises(ValueError, match=r"memory_share must be at most 1, got 1\.5"):
        DmdStage(real_weight=1.0, memory_share=1.5)


@pytest.mark.parametrize("name", ["rolling_forcing", "rolling_forcing:sink=0"])
@pytest.mark.parametrize("share, schedules", [(0.0, {windows}), (1.0, {blockwise}), (0.5, {windows, blockwise})])
def test_rolling_forcing_is_learned_by_windows_and_block_by_block(
    name: str, share: float, schedules: set, monkeypatch, tmp_path: Path
) -> None:
    """With given blocks and prompts that change, over one memory."""
    settings = {"levels": (2,), "most_given": 3, "self_forcing_share": share, "steps": 6}
    seen = steps(monkeypatch, tmp_path, recipe_named(name), seed=2, **settings)
    assert {getattr(one, "func", one) for one in seen.schedules} == schedules
    assert len(set(seen.given)) > 1
    assert {(shape.window.sink, shape.window.past) for shape in seen.memories} == {(0 if "=0" in name else 3, 9)}
    before = tiny.network(extent=12).float().state_dict()
    assert all(not torch.equal(weight, before[key]) for key, weight in seen.student.state_dict().items())
    assert all(row["matching"] > 0 for row in read_metrics(tmp_path))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_rolling_forcing_is_learned_at_a_rank_beside_real_clips(share: float, monkeypatch, tmp_path: Path) -> None:
    settings = {"levels": (2,), "self_forcing_share": share, "rank": 2, "lr": 0.01, "real_weight": 1.0, "real_batch": 1}
    seen = steps(monkeypatch, tmp_path, rolling_forcing(), **settings)
    assert len(seen.lessons) == 2 and seen.schedules
    before = tiny.network(extent=12).float().state_dict()
    after = seen.student.state_dict()
    added = {name: after[name] - weight for name, weight in before.items()}
    assert after.keys() == before.keys() and all(change.any() for change in added.values())
    large = [change for change in added.values() if pays(change.shape, 2)]
    assert large and all(torch.linalg.matrix_rank(change, rtol=1e-4) <= 2 for change in large)


def test_what_does_not_fit_is_refused_before_work_begins(monkeypatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"current 3 x 3 in flight = 15 latent frames do not fit the extent of 12"):
        steps(monkeypatch, tmp_path, rolling_forcing(), levels=(2, 3))


@pytest.mark.parametrize(
    "name",
    ["causvid:past=6", "longlive", "reward_forcing", "memflow:past=3", "infinity_rope", "rolling_sink:library=9"],
)
def test_every_memory_can_be_learned_under(name: str, monkeypatch, tmp_path: Path) -> None:
    """With given blocks and prompts that change."""
    seen = steps(monkeypatch, tmp_path, recipe_named(name), seed=2, levels=(2,), most_given=3, steps=3)
    assert {shape.policy for shape in seen.memories} == {recipe_named(name).policy}
    before = tiny.network(extent=12).float().state_dict()
    assert all(not torch.equal(weight, before[key]) for key, weight in seen.student.state_dict().items())
    assert all(row["matching"] > 0 for row in read_metrics(tmp_path))


def test_teacher_forcing_refuses_what_has_to_be_walked_through_before_work_begins() -> None:
    nothing = None
    names = ("reward_forcing", "memflow", "rolling_sink", "infinity_rope", "causvid", "hybrid_forcing:form=ref_train")
    for name in names:
        with pytest.raises(ValueError, match="walked through block by block: set recompute=true"):
            made = tiny.network(extent=21, reads_far="hybrid" in name)
            stages.train_teacher_forcing(
                nothing, made, nothing, [recipe_named(name)], 3.0, TeacherForcingStage(), nothing
            )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name, extent, levels, said",
    [
        ("self_forcing:past=4,block=2", 11, 4, "clip, 11 latent frames, must be whole blocks of 2"),
        ("rolling_forcing", 21, 8, "current 3 x 8 in flight = 30 latent frames do not fit"),
    ],
)
def test_ode_refuses_what_it_could_not_train_or_show_before_work_begins(
    name: str, extent: int, levels: int, said: str
) -> None:
    network, nothing = tiny.network(extent=extent), None
    with pytest.raises(ValueError, match=said):
        stages.train_ode(
            nothing, network, network, nothing, [recipe_named(name)], 3.0, OdeStage(levels=levels), nothing
        )  # type: ignore[arg-type]


def said(count: int, seed: int, frames: int, looks_away: bool = True) -> SimpleNamespace:
    """Prompts of a world by their seed; they change in the last block."""
    words = torch.randint(1, 9, (count, 2, 5), generator=torch.Generator().manual_seed(seed))
    number = (torch.arange(frames) >= frames - 3).long().expand(count, -1)
    return SimpleNamespace(tokens_BPL=words, prompt_BF=number)


def forced(
    out: Path, recipe: Recipe = RECIPE, beside: Sequence[Recipe] = (), **settings
) -> tuple[WanTransformer, list[Clips]]:
    """A tiny network after steps of teacher forcing, and the supplies of clips it was taught on."""
    supplies = []

    def clips(count: int, seed: int, frames: int, memory_share: float = 0.0, looks_soon: bool = False) -> Clips:
        supplies.append(Clips(frames, memory_share))
        return supplies[-1]

    world = SimpleNamespace(
        latent_size=tiny.LATENTS[1:],
        clips=clips,
        prompts=said,
        held_out=lambda count: torch.ones(count, 5, dtype=torch.long),
        show=lambda name, latents: None,
    )
    torch.manual_seed(1)
    text = WordEncoder(WordEncoderConfig(words=9, length=5, dim=8)).requires_grad_(False)
    network = tiny.network(extent=12, reads_far=recipe.far is not None).float()
    stage = TeacherForcingStage(**{"batch": 1, "frames": 6} | settings)
    out.mkdir(exist_ok=True)
    run = Run(out=out, device=torch.device("cpu"))
    stages.train_teacher_forcing(text, network, world, [recipe, *beside], 3.0, stage, run)
    return network, supplies


def begun(out: Path, monkeypatch, beside: Sequence[Recipe] = (), rank: int = 0, **settings) -> SimpleNamespace:
    """A tiny network after steps on a teacher's trajectories, the windows it learned under, and the seeds of these."""
    seen = SimpleNamespace(network=tiny.network(extent=CLIP).float(), windows=[], noise_seeds=[])
    regression_loss, start_of = ode.ode_init.regression_loss, ode.start_of

    def regressed(*given, window, **named):
        seen.windows.append(window)
        return regression_loss(*given, window=window, **named)

    def started(text, network, text_BPLE, seeds, world):
        seen.noise_seeds += seeds
        return start_of(text, network, text_BPLE, seeds, world)

    text = WordEncoder(WordEncoderConfig(words=9, length=5, dim=8)).requires_grad_(False)
    world = SimpleNamespace(
        latent_size=tiny.LATENTS[1:], prompts=said, show=lambda name, latents: None,
        held_out=lambda count: torch.ones(count, 5, dtype=torch.long),
    )  # fmt: skip
    teacher = tiny.network(extent=CLIP, seed=1).float().requires_grad_(False)
    stage = OdeStage(**{"batch": 2, "pairs": 4, "levels": 2, "sampling_steps": 2} | settings)
    out.mkdir(exist_ok=True)
    torch.manual_seed(1)
    with monkeypatch.context() as patched:
        patched.setattr(ode.ode_init, "regression_loss", regressed)
        patched.setattr(ode, "start_of", started)
        run = Run(out=out, device=torch.device("cpu"), rank=rank)
        stages.train_ode(text, seen.network, teacher, world, [RECIPE, *beside], 3.0, stage, run)
    return seen


def test_recipes_take_turns(monkeypatch, tmp_path: Path) -> None:
    other = recipe_named("self_forcing:past=6")
    assert RECIPE.sink == 3 and other.sink == 0
    matched = steps(monkeypatch, tmp_path / "dmd", beside=[other], steps=4)
    assert [shape.window.sink for shape in matched.memories] == [3, 0, 3, 0]
    regressed = begun(tmp_path / "ode", monkeypatch, [other], steps=4)
    assert [window.sink for window in regressed.windows] == [3, 0, 3, 0]
    heard = heard_lessons(monkeypatch)
    forced(tmp_path / "teacher_forcing", beside=[rolling_forcing().with_levels(2)], steps=4)
    assert [offset is None for _, offset in heard] == [True, False, True, False]


def test_no_two_steps_seeds_or_processes_draw_alike(monkeypatch, tmp_path: Path) -> None:
    """A world sees to it that processes have prompts of their own."""
    prompts = [steps(monkeypatch, tmp_path / f"dmd{seed}", steps=3, seed=seed).prompt_seeds for seed in (1, 2)]
    noise = [
        begun(tmp_path / f"ode{seed}{rank}", monkeypatch, rank=rank, steps=1, seed=seed).noise_seeds
        for seed in (1, 2) for rank in (0, 1)
    ]  # fmt: skip
    for found, count in ((prompts, 2 * 3), (noise, 4 * 4)):
        seeds = [seed for some in found for seed in some]
        assert len(seeds) == len(set(seeds)) == count


def test_no_two_samples_of_a_teacher_begin_with_the_same_noise(monkeypatch, tmp_path: Path) -> None:
    stage, asked = AttentionMatchingStage(batch=2), []

    def prompts(count: int, seed: int, frames: int) -> SimpleNamespace:
        asked.append(seed)
        return said(count, seed, frames)

    world = SimpleNamespace(prompts=prompts, latent_size=tiny.LATENTS[1:])
    monkeypatch.setattr(attention_matching._Samples, "_made", lambda self, tokens, numbers, seeds: [*seeds])
    monkeypatch.setattr(attention_matching.parallel, "processes", lambda: 3)
    drawn: list[int] = []
    for rank in range(3):
        run = Run(out=tmp_path, device=torch.device("cpu"), rank=rank)
        samples = attention_matching._Samples(None, tiny.network(), world, 3.0, stage, run)  # type: ignore[arg-type]
        for number in range(4):
            drawn += samples.of(number)
            assert samples.of(number) == drawn[-2:], "made once"
    assert len(set(drawn)) == len(drawn) == 3 * 4 * 2
    assert len(asked) == 3 * 4 and len(set(asked)) == 4


ZERO_MEANS_NONE = {
    "seed", "kl_weight", "focus_weight", "no_prompt_share", "most_given", "self_forcing_share", "real_weight",
    "overlap",
}  # fmt: skip


@pytest.mark.parametrize("stage", stages.Stage.__subclasses__())
def test_numbers_of_a_stage_are_above_0_or_0_where_that_means_something(stage: type[stages.Stage]) -> None:
    for one in fields(stage):
        if type(one.default) not in (int, float):
            continue
        for number in (-1, math.nan):
            with pytest.raises(ValueError, match=f"{one.name} must be "):
                stage(**{one.name: number})
        if one.name == "average" or one.name.endswith("_share"):
            with pytest.raises(ValueError, match=f"{one.name} must be at most 1"):
                stage(**{one.name: 1.5})
        refused = ""
        try:
            stage(**{one.name: 0})
        except ValueError as error:  # it may go with others
            refused = str(error)
        assert ("must be above 0" in refused) is (one.default != 0 and one.name not in ZERO_MEANS_NONE), one.name


def test_lists_and_switches_of_a_stage_are_asked_alike() -> None:
    CodecStage(encoder_blocks=(1, 0, 0), decoder_blocks=(0, 0, 0))
    AttentionMatchingStage(exact=False, layers=(0, 2))
    for stage, settings in ((CodecStage, {"encoder_widths": (8, 0, 8)}), (DmdStage, {"levels": (4, 0)})):
        with pytest.raises(ValueError, match="must be above 0"):
            stage(**settings)


def test_a_critic_learns_as_often_as_it_is_told_to(monkeypatch, tmp_path: Path) -> None:
    samples, weights, critic_loss = [], [], dmd.critic_loss

    def learned(sample, critic, *more):
        samples.append(sample)
        weights.append(critic.patch_embedding.weight.detach().clone())
        return critic_loss(sample, critic, *more)

    monkeypatch.setattr(dmd, "critic_loss", learned)
    steps(monkeypatch, tmp_path, steps=2, critic_turns=3)
    assert len(samples) == 6 and not any(sample.requires_grad for sample in samples)
    assert not any(torch.equal(one, other) for one, other in pairwise(weights))


@pytest.mark.parametrize("stage", ["dmd", "teacher_forcing", "ode"])
def test_what_comes_out_is_the_average_of_the_way(stage: str, monkeypatch, tmp_path: Path) -> None:
    def trained(average: float) -> dict[str, torch.Tensor]:
        out, settings = tmp_path / f"{average}", {"steps": 3, "average": average}
        if stage == "dmd":
            return steps(monkeypatch, out, **settings).student.state_dict()
        if stage == "ode":
            return begun(out, monkeypatch, **settings).network.state_dict()
        return forced(out, **settings)[0].state_dict()

    last, mean = trained(1e-9), trained(0.9)
    assert all(not torch.equal(last[name], mean[name]) for name in last)


def test_losses_are_told_unweighed(monkeypatch, tmp_path: Path) -> None:
    def told(weight: float) -> list[float]:
        forced(tmp_path / f"forced{weight}", steps=1, real_weight=weight, anchor_weight=weight, anchor_frames=3)
        steps(monkeypatch, tmp_path / f"dmd{weight}", steps=1, real_weight=weight)
        rows = [read_metrics(tmp_path / f"{stage}{weight}")[0] for stage in ("forced", "dmd")]
        return [rows[0]["loss"], rows[1]["real"]]

    assert told(1.0) == pytest.approx(told(8.0), rel=1e-5)


def test_a_look_is_at_the_average_and_leaves_no_trace() -> None:
    made = tiny.network().float()
    student = learner_of(made, 1e-3, 1e-3, 0.9)
    before = [x.clone() for x in made.parameters()]
    with torch.no_grad():
        made.patch_embedding.weight += 1
    moved = [x.clone() for x in made.parameters()]
    with resting(student):
        assert same([*made.parameters()], before) and not torch.is_grad_enabled()
    assert same([*made.parameters()], moved) and torch.is_grad_enabled()


def test_latents_of_a_trained_codec_have_mean_0_and_deviation_1(tmp_path: Path) -> None:
    codec = tiny.engine().codec.requires_grad_(True).train()
    frames = torch.rand(1, 5, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    stage, run = CodecStage(steps=2, batch=1), Run(out=tmp_path, device=torch.device("cpu"))
    looks = []

    def look(name: str) -> None:
        looks.append([x.clone() for x in codec.parameters()])

    train_codec(codec, lambda dice: (frames, torch.zeros(1, 5, 16, 16)), look, stage, run)
    assert same([*codec.parameters()], looks[-1]), "what was looked at last is what comes out"
    latents = codec.encode(frames)[0]
    assert not latents.requires_grad and not codec.training
    torch.testing.assert_close(latents.mean((0, 1, 3, 4)), torch.zeros(latents.shape[2]), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 1, 3, 4)), torch.ones(latents.shape[2]), atol=0.1, rtol=0)


def test_teacher_forcing_is_at_the_levels_of_the_first_steps_where_they_are_asked_for(monkeypatch, tmp_path) -> None:
    heard = heard_lessons(monkeypatch)
    forced(tmp_path / "any", steps=1)
    forced(tmp_path / "first", steps=1, first_steps=2)
    assert heard == [((), None), (RECIPE.levels(3.0)[:2], None)], "none named: any"
    with pytest.raises(ValueError, match="has 4 steps: first_steps cannot be 5"):
        forced(tmp_path / "none", steps=1, first_steps=5)


def test_what_reads_what_is_far_learns_alone_where_that_is_asked_for(tmp_path: Path) -> None:
    recipe = recipe_named("hybrid_forcing:tokens=4")
    network, _ = forced(tmp_path / "run", recipe, frames=15, steps=2, far_only=True)
    before = tiny.network(extent=12, reads_far=True).float().state_dict()
    moved = {name for name, weight in network.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved and all(".linear_proj." in name for name in moved), "the network around it is as it was"
    with pytest.raises(ValueError, match="far_only is for recipes with a far state"):
        forced(tmp_path / "none", steps=1, far_only=True)
    with pytest.raises(ValueError, match="leaves no matrix that a rank could be of"):
        TeacherForcingStage(far_only=True, rank=2)


def heard_lessons(monkeypatch) -> list[tuple[tuple[float, ...], int | None]]:
    """The levels and the offset of each lesson."""
    heard = []

    def loss(network, clips, *more, **named):
        heard.append((named["levels"], named["offset"]))
        return teacher_forcing_loss(network, clips, *more, **named)

    monkeypatch.setattr("longtake.distillation.stages.teacher_forcing.teacher_forcing_loss", loss)
    return heard


@pytest.mark.parametrize("more", [{}, {"recompute": True}, {"anchor_weight": 1.0}, {"rank": 2}])
def test_teacher_forcing_of_a_recipe_that_rolls_is_by_windows(more: dict, monkeypatch, tmp_path: Path) -> None:
    heard, recipe = heard_lessons(monkeypatch), rolling_forcing().with_levels(2)
    network, _ = forced(tmp_path / "run", recipe, frames=15, steps=12, **more)
    assert {levels for levels, _ in heard} == {recipe.levels(3.0)}
    assert {offset for _, offset in heard} == {0, 1} and len(heard) == (24 if "anchor_weight" in more else 12)
    before = tiny.network(extent=12).float().state_dict()
    assert all(not torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    assert 0 < read_metrics(tmp_path / "run")[-1]["loss"] < 10


def test_blocks_in_flight_have_no_first_steps_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="blocks at all its steps in flight: first_steps is not for it"):
        forced(tmp_path / "run", rolling_forcing().with_levels(2), steps=1, first_steps=1)


def test_real_clips_teach_windows_whatever_goes_by_windows_beside_them(monkeypatch, tmp_path: Path) -> None:
    settings = {"levels": (2, 1), "real_weight": 1.0, "steps": 12, "most_given": 2, "last_exits": 1}
    seen = steps(monkeypatch, tmp_path, rolling_forcing(), **settings)
    levels = {count: rolling_forcing().with_levels(count).levels(3.0) for count in (1, 2)}
    assert set(seen.windows) == {(levels[2], 0), (levels[2], 1), (levels[1], 0)} and len(seen.windows) == 12
    assert len(set(seen.schedules)) > 1 and all(row["real"] > 0 for row in read_metrics(tmp_path))


def strayed(network: WanTransformer, recipe: Recipe = RECIPE, frames: int = 6) -> float:
    """How far its answers under a recipe are from those that it began with, when it saw all of its window."""
    torch.manual_seed(5)
    given = pretrain.Clips(
        torch.randn(8, frames, *tiny.LATENTS[1:]), torch.randn(8, 2, 5, 8), torch.zeros(8, frames, dtype=torch.long),
        torch.zeros(8, frames, *tiny.LATENTS[2:]),
    )  # fmt: skip
    start, memory = tiny.network(extent=12).float(), recipe.memory(network)
    return teacher_forcing_loss(network, given, 3.0, 1.0, block=3, memory=memory, anchor=start).item()


def test_an_anchor_holds_a_network_to_what_it_was_on_clips_not_made_for_memory(tmp_path) -> None:
    def held_by(weight: float) -> float:
        network, supplies = forced(tmp_path / str(weight), steps=30, memory_share=1.0, anchor_weight=weight)
        assert [supply.memory_share for supply in supplies] == ([1.0, 0.0] if weight else [1.0])
        return strayed(network)

    free, held = held_by(0.0), held_by(100.0)
    assert held < free / 2, (held, free)
    assert "anchor" in read_metrics(tmp_path / "100.0")[0] and "anchor" not in read_metrics(tmp_path / "0.0")[0]


def test_an_anchor_alone_teaches_a_network_to_do_with_a_part_of_its_window(tmp_path: Path) -> None:
    sparse = recipe_named("hybrid_forcing:far=none,share=0.2,tokens=2")
    settings = {"steps": 60, "batch": 4, "frames": 9, "real_weight": 0.0, "anchor_weight": 1.0}
    taught, supplies = forced(tmp_path / "run", sparse, **settings)
    assert [supply.memory_share for supply in supplies] == [0.0]
    assert "loss" not in read_metrics(tmp_path / "run")[0]
    before, after = (strayed(network, sparse, 9) for network in (tiny.network(extent=12).float(), taught))
    assert 0 < after < 0.8 * before, (after, before)
    with pytest.raises(ValueError, match="without a real_weight or an anchor_weight nothing would be learned"):
        TeacherForcingStage(real_weight=0.0)
    for name in ("memory_share", "first_steps"):
        with pytest.raises(ValueError, match=f"{name} is for teacher forcing on real clips: set real_weight"):
            TeacherForcingStage(real_weight=0.0, anchor_weight=1.0, **{name: 1})


def own_clips(recipe: Recipe, network: WanTransformer, size: int) -> OwnClips:
    text = WordEncoder(WordEncoderConfig(words=9, length=5, dim=8)).requires_grad_(False)
    torch.manual_seed(3)
    text.load_state_dict({name: torch.randn_like(weight) for name, weight in text.state_dict().items()})
    world = SimpleNamespace(latent_size=tiny.LATENTS[1:], prompts=said)
    run = Run(out=Path("."), device=torch.device("cpu"))
    return OwnClips(text, network, world, recipe, 3.0, run, size=size, seed=7, frames=9)  # type: ignore[arg-type]


def test_own_clips_are_what_the_student_streams_when_it_sees_all_of_its_window() -> None:
    recipe, network = recipe_named("hybrid_forcing:far=none,share=0.2,tokens=2"), tiny.network(extent=12).float()
    clips = own_clips(recipe, network, 2)
    drawn, words = clips.draw(30, 9), said(2, 7_000_000, 9)
    dense = recipe_named("hybrid_forcing:far=none,share=1,tokens=2")
    keys = network.prompt_keys(clips._text(words.tokens_BPL.flatten(0, 1)).unflatten(0, (2, 2)))
    noise = SeededNoise([7_000_000, 7_000_001], (3, *tiny.LATENTS[1:]), "cpu", torch.float32)
    memory = StreamMemory(dense.memory(network), network.config.layers, ring=True)
    with torch.no_grad():
        made = dense.schedule(
            network, memory, lambda block: keys.select(words.prompt_BF[:, 3 * block]), noise, dense.levels(3.0)
        )
        streamed = torch.cat(list(islice(made, 3)), dim=1)
    found = [min((clip - own).abs().max().item() for own in streamed) for clip in drawn.latents_BFCHW]
    assert max(found) < 1e-4 and drawn.tokens_BPL.shape == (30, 2, 5)
    assert len({clip.sum().item() for clip in drawn.latents_BFCHW}) == 2, "both are drawn"


def test_an_anchor_is_not_asked_to_look_away_where_lessons_tell_otherwise(monkeypatch, tmp_path: Path) -> None:
    asked: list[bool] = []
    monkeypatch.setitem(globals(), "said", lambda *given, of=said: asked.append(given[3]) or of(*given))
    own = {"steps": 1, "pool": 1, "real_weight": 1.0, "anchor_weight": 1.0, "anchor_streams": True}
    for looks_soon in (False, True):
        forced(tmp_path / str(looks_soon), recipe_named("self_forcing_sink"), **own, looks_soon=looks_soon)
    assert asked == [True, False]


def test_own_clips_are_the_same_again_when_a_run_goes_on(monkeypatch) -> None:
    """Few at a time, however many there are."""
    monkeypatch.setattr("longtake.distillation.stages.own_clips.AT_ONCE", 2)
    recipe, network = recipe_named("self_forcing_sink"), tiny.network(extent=12).float()
    clips, again = own_clips(recipe, network, 3), own_clips(recipe, network, 3)
    for _ in range(4):
        clips.renew()
    again.load_state_dict(clips.state_dict())
    for one, other in zip(clips._pool, again._pool, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    first = own_clips(recipe, network, 3)
    drawn = first.draw(30, 9).latents_BFCHW
    assert drawn.isfinite().all() and len({clip.sum().item() for clip in drawn}) == 3, "all are made, no two alike"
    assert not torch.equal(first._pool.latents_BFCHW, clips._pool.latents_BFCHW), "renewed"  # type: ignore[union-attr]


def test_a_run_in_front_of_its_own_clips_goes_on_after_a_crash_as_if_there_had_been_none(
    monkeypatch, tmp_path: Path
) -> None:
    class Crash(Exception): ...

    def crashing(supply: Clips, step: int, count: int, frames: int) -> None:
        if step == 2:
            raise Crash
        return drawn(supply, step, count, frames)

    monkeypatch.setitem(train.__kwdefaults__, "save_seconds", 0.0)
    own = {"steps": 4, "pool": 2, "frames": 9, "anchor_weight": 1.0, "anchor_streams": True}
    whole, _ = forced(tmp_path / "whole", **own)
    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr("longtake.distillation.stages.teacher_forcing.drawn", crashing)
        forced(tmp_path / "crashed", **own)
    assert torch.load(tmp_path / "crashed" / STATE_FILE)["step"] == 2
    resumed, _ = forced(tmp_path / "crashed", **own)
    assert same([*resumed.state_dict().values()], [*whole.state_dict().values()])


def test_an_anchor_can_hold_a_network_in_front_of_what_it_streams(tmp_path: Path) -> None:
    sparse = recipe_named("hybrid_forcing:far=none,share=0.2,tokens=2")
    settings = {
        "steps": 101,
        "batch": 4,
        "frames": 9,
        "pool": 4,
        "real_weight": 0.0,
        "anchor_weight": 1.0,
        "anchor_streams": True,
        "anchor_frames": 6,
    }
    _, supplies = forced(tmp_path / "run", sparse, **settings)
    losses = [row["anchor"] for row in read_metrics(tmp_path / "run")]
    assert not supplies and losses[-1] < 0.7 * losses[0], losses
    few = {**settings, "steps": 1, "anchor_streams": False, "real_weight": 1.0}
    _, supplies = forced(tmp_path / "both", sparse, **few)
    assert [clips.drawn[0].shape[1] for clips in supplies] == [9, 6], "an anchor's clips alone are short"
    with pytest.raises(ValueError, match="anchor_streams is for the clips of an anchor"):
        TeacherForcingStage(anchor_streams=True)
    with pytest.raises(ValueError, match="anchor_frames is for the clips of an anchor"):
        TeacherForcingStage(anchor_frames=6)
    with pytest.raises(ValueError, match=r"anchor_frames \(7\) must be whole blocks of 3"):
        forced(tmp_path / "uneven", sparse, **{**settings, "anchor_frames": 7})
    with pytest.raises(ValueError, match="block by block with exact attention: no anchor_streams"):
        forced(tmp_path / "none", rolling_forcing().with_levels(2), steps=1, anchor_weight=1.0, anchor_streams=True)


def test_a_pull_that_could_never_come_is_refused(monkeypatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="last_exits leaves that out"):
        steps(monkeypatch, tmp_path, levels=(4, 3), last_exits=2, pull=0.05)


@pytest.mark.parametrize("far", ["keep", "none"])
def test_projections_learn_where_something_is_far_and_stay_where_nothing_is(
    far: str, monkeypatch, tmp_path: Path
) -> None:
    seen = steps(monkeypatch, tmp_path, recipe_named(f"hybrid_forcing:far={far}"), reads_far=True)
    moved = [projection.weight.abs().max().item() for projection in seen.student.projections]
    assert all(moved) if far == "keep" else not any(moved)
    assert "far_weights" in read_metrics(tmp_path)[0]


def test_a_first_step_moves_each_weight_by_its_rate(monkeypatch, tmp_path: Path) -> None:
    rates = {"steps": 1, "lr": 1e-4, "far_lr": 1e-2}
    seen = steps(monkeypatch, tmp_path, recipe_named("hybrid_forcing:far=keep"), reads_far=True, **rates)
    before = tiny.network(extent=12, reads_far=True).float().patch_embedding.weight
    near = (seen.student.patch_embedding.weight - before).abs().max()
    far = max(projection.weight.abs().max() for projection in seen.student.projections)
    assert (far / near).item() == pytest.approx(100, rel=0.1)


def test_projections_have_a_rate_of_their_own_and_do_not_decay() -> None:
    made = tiny.network(reads_far=True)
    adam = dmd_adam(made, lr=1e-4, far_lr=1e-2)
    student = Learner(made, [adam], average=None)
    student.set_rate(0.5)
    rates = [(len(group["params"]), group["lr"], group["weight_decay"]) for group in adam.param_groups]
    count = len(list(tiny.network().parameters()))
    assert rates == [(count, 5e-5, 0.01), (2 * made.config.layers, 5e-3, 0.0)]
    assert len(dmd_adam(tiny.network(), lr=1e-4, far_lr=1e-2).param_groups) == 1
    muon, adam = learner_of(made, 1e-4, 1e-2, 0.9)._optimizers
    assert [(group["lr"], group["weight_decay"]) for group in adam.param_groups] == [(1e-4, 0.01), (1e-2, 0.0)]
    own = {parameter for projection in made.projections for parameter in projection.parameters()}
    assert set(adam.param_groups[1]["params"]) == own
    grouped = [p for group in (*muon.param_groups, *adam.param_groups) for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(made.parameters()))


def test_maps_of_far_states_have_the_rate_of_projections() -> None:
    made = with_far_maps(tiny.network(reads_far=True))
    maps = {parameter for one in made.far_maps.values() for parameter in one.parameters()}
    for adam in (dmd_adam(made, 1e-4, 1e-2), learner_of(made, 1e-4, 1e-2, 0.9)._optimizers[-1]):
        plain, far = adam.param_groups
        assert maps <= set(far["params"]) and not maps & set(plain["params"])
        assert (far["lr"], far["weight_decay"]) == (1e-2, 0.0)
    learner_of(made, 1e-4, 1e-2, 0.9, far_only=True)
    assert maps < {parameter for parameter in made.parameters() if parameter.requires_grad}


def judged_part(blocks: int, learned: int, given: tuple[torch.Tensor, ...] = ()) -> torch.Tensor:
    made = tiny.network(extent=CLIP).float()
    torch.manual_seed(3)
    plan = Plan((2, 2), blocks, learned, RECIPE.block, len(given))
    prompt_BF = torch.zeros(1, plan.judged * RECIPE.block, dtype=torch.long)
    text = tiny.text(prompts=2).float()
    noise = FreshNoise((1, *tiny.LATENTS), torch.device("cpu"))
    return rolled_out(made, Script(text, prompt_BF, given), noise, RECIPE, plan, 3.0)


@pytest.mark.parametrize("used", [1, 2, 4])
def test_a_rollout_exits_on_its_way_down(used: int) -> None:
    made, heard = tiny.network(extent=CLIP).float(), []
    forward = made.forward
    made.forward = lambda noisy, level_BF, *more: heard.append(level_BF[0, 0].item()) or forward(noisy, level_BF, *more)
    script = Script(tiny.text().float(), torch.zeros(1, CLIP, dtype=torch.long))
    noise = FreshNoise((1, *tiny.LATENTS), torch.device("cpu"))
    rolled_out(made, script, noise, RECIPE, Plan((4, used), 3, 3, RECIPE.block), 3.0)
    assert heard == pytest.approx(3 * RECIPE.with_levels(4).levels(3.0)[:used])


def test_the_learned_part_of_a_long_rollout_is_the_end_of_the_whole() -> None:
    whole, learned = judged_part(5, 5), judged_part(5, 2)
    assert learned.requires_grad and torch.isfinite(learned).all()
    torch.testing.assert_close(learned, whole[:, -2 * RECIPE.block :])
    assert len({round(frame.sum().item(), 4) for frame in whole.unbind(1)}) == whole.shape[1], "all were produced"


def test_teacher_and_critic_see_what_was_given_in_front_of_what_was_made() -> None:
    given = tiny.noise(1)(0, 0).float(), tiny.noise(2)(0, 0).float()
    sample = judged_part(3, 1, given)
    assert sample.shape[1] == CLIP and sample.requires_grad
    assert torch.equal(sample[:, :6], torch.cat(given, dim=1))
    assert not torch.allclose(sample[:, 6:], judged_part(3, 1, given[::-1])[:, 6:]), "it goes on from what was given"
