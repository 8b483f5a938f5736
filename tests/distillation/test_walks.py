"""Samplings that a stage takes on step by step."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests import tiny
from torch import Tensor

from longtake.distillation.pretrain import Asking, on_the_way_loss
from longtake.distillation.stages import FinetuneStage, strips, train_finetune
from longtake.distillation.stages.walks import Walks
from longtake.distillation.trainer import STATE_FILE, Run, read_metrics, train
from longtake.flow import euler_step, even_levels
from longtake.generation.clip import sample_clip
from longtake.models.features import Conversion
from longtake.models.text import WordEncoder, WordEncoderConfig
from longtake.models.wan import converted

FRAMES, LEVELS = 9, even_levels(4, 3.0)


class Prompts:
    """Tokens that tell the seed that they were drawn by."""

    latent_size = tiny.LATENTS[1:]

    def __init__(self) -> None:
        self.given: dict[int, Tensor] = {}

    def prompts(self, count: int, seed: int, frames: int) -> SimpleNamespace:
        self.given[seed] = torch.full((count, 1, 3), seed)
        return SimpleNamespace(tokens_BPL=self.given[seed], prompt_BF=torch.zeros(count, frames + 2, dtype=torch.long))


def walks(count: int, tmp_path: Path, world: Prompts | None = None) -> Walks:
    torch.manual_seed(1)
    return Walks(world or Prompts(), LEVELS, count, FRAMES, 7, Run(tmp_path, torch.device("cpu")))


def finetuned(out: Path) -> tuple[list[Tensor], list[dict[str, float]]]:
    """The weights of a tiny converted teacher after a stage on its own way, and its metrics."""
    teacher = tiny.network(extent=FRAMES).float().requires_grad_(False)
    network = converted(teacher, Conversion(layers=(0, 2), current=3))
    torch.manual_seed(1)
    text = WordEncoder(WordEncoderConfig(words=9, length=3, dim=8)).requires_grad_(False)
    world = SimpleNamespace(
        latent_size=tiny.LATENTS[1:],
        prompts=lambda count, seed, frames: SimpleNamespace(
            tokens_BPL=torch.full((count, 1, 3), seed % 9), prompt_BF=torch.zeros(count, frames, dtype=torch.long)
        ),
        held_out=lambda count: torch.ones(count, 3, dtype=torch.long),
        show=lambda name, latents: None,
    )
    own = {"anchored": True, "guided": True, "on_the_way": True}
    stage = FinetuneStage(steps=4, batch=2, sampling_steps=2, log_every=1, **own)
    out.mkdir(exist_ok=True)
    train_finetune(text, network, world, 3.0, stage, Run(out, torch.device("cpu")), teacher)
    return [*network.state_dict().values()], [{**row, "seconds": 0.0} for row in read_metrics(out)]


def test_a_stage_that_crashes_on_its_way_goes_on_as_if_it_had_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Crash(Exception): ...

    def crashing(some: Walks, noisy_BFCHW: Tensor) -> None:
        if some.state_dict()["begun"] > 3:
            raise Crash
        go_on(some, noisy_BFCHW)

    monkeypatch.setitem(train.__kwdefaults__, "save_seconds", 0.0)
    monkeypatch.setattr(strips, "LOOKED_AT", 1)
    whole, rows = finetuned(tmp_path / "whole")
    go_on = Walks.go_on
    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(Walks, "go_on", crashing)
        finetuned(tmp_path / "crashed")
    assert 0 < torch.load(tmp_path / "crashed" / STATE_FILE)["step"] < 4
    resumed, again = finetuned(tmp_path / "crashed")
    assert all(map(torch.equal, whole, resumed)) and again == rows


def test_a_walk_by_a_networks_own_velocity_is_its_sampling(tmp_path: Path) -> None:
    teacher = tiny.network(extent=FRAMES).float().requires_grad_(False)
    network = converted(teacher, Conversion(layers=(0, 2), current=3))
    text, nothing = tiny.text(seed=1).float(), tiny.text(seed=2).float()
    one = walks(1, tmp_path)
    one.go_on(one.steps().noisy_BFCHW)  # of a single one the first way is one step
    begun = one.steps().noisy_BFCHW
    for level in LEVELS:
        noisy, level_BF, lower_BF, _, prompt_BF = one.steps()
        assert level_BF.unique().item() == pytest.approx(level)
        loss, velocity = on_the_way_loss(network, teacher, Asking(noisy, level_BF, text, prompt_BF), nothing, 3.0)
        assert loss > 0
        reached = euler_step(noisy, velocity, level_BF, lower_BF)
        one.go_on(reached)
    keys = network.prompt_keys(text), network.prompt_keys(nothing)
    assert torch.allclose(reached, sample_clip(network, begun, *keys, LEVELS, 3.0), atol=1e-5)
    assert on_the_way_loss(teacher, teacher, Asking(noisy, level_BF, text, prompt_BF), nothing, 3.0)[0] < 1e-9


def test_walks_drift_apart_until_all_levels_are_among_them(tmp_path: Path) -> None:
    several = walks(len(LEVELS), tmp_path)
    assert several.steps().level_BF.unique().tolist() == [1.0]
    for _ in LEVELS:
        several.go_on(several.steps().noisy_BFCHW)
    for _ in range(6):
        level_BF, lower_BF = several.steps()[1:3]
        assert sorted(level_BF[:, 0].tolist(), reverse=True) == pytest.approx(list(LEVELS))
        assert sorted(lower_BF[:, 0].tolist(), reverse=True) == pytest.approx([*LEVELS[1:], 0.0])
        several.go_on(several.steps().noisy_BFCHW)


def test_one_that_arrives_begins_anew_under_another_prompt_and_the_others_go_on(tmp_path: Path) -> None:
    several = walks(2, tmp_path, world := Prompts())
    first = several.steps()
    several.go_on(torch.zeros_like(first.noisy_BFCHW))
    noisy, _, _, tokens, _ = several.steps()
    assert noisy[0].std() > 0.5 and not noisy[1].any(), "the first of two ends its first way after one step"
    assert tokens[0, 0, 0] == 7_000_002 and torch.equal(tokens[1], first.tokens_BPL[1])
    assert not torch.equal(noisy[0], first.noisy_BFCHW[0])
    assert all((tokens == seed).all() for seed, tokens in world.given.items()), "what is the world's stays as it is"


def test_walks_that_were_kept_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    def taken(some: Walks, count: int) -> list[Tensor]:
        seen: list[Tensor] = []
        for _ in range(count):
            steps = some.steps()
            seen += steps
            some.go_on(steps.noisy_BFCHW + 1)
        return seen

    ours = walks(3, tmp_path)
    taken(ours, 3)
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    dice = torch.get_rng_state()
    whole = taken(ours, 9)
    again = walks(3, tmp_path)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.set_rng_state(dice)
    assert all(torch.equal(a, b) for a, b in zip(taken(again, 9), whole, strict=True))
