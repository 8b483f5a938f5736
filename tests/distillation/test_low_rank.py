"""Training at a low rank: what learns, how fast, and that what comes of it is a delta of that rank."""

from copy import deepcopy

import pytest
import torch
from tests import tiny
from torch.nn import functional

from longtake.distillation.low_rank import LowRankLinear, factor, merge
from longtake.distillation.stages.learners import dmd_adam, learner_of
from longtake.distillation.trainer import Learner
from longtake.models.delta import pays
from longtake.models.wan import WanTransformer

RANK = 3


def network(rank: int = RANK, seed: int = 0) -> WanTransformer:
    made = tiny.network(reads_far=True, seed=seed).float()
    if rank:
        factor(made, rank)
    return made


def layers(made: WanTransformer) -> dict[str, LowRankLinear]:
    return {name: layer for name, layer in made.named_modules() if isinstance(layer, LowRankLinear)}


@torch.no_grad()
def moved(made: WanTransformer) -> WanTransformer:
    """The same network with factors that are not zero."""
    dice = torch.Generator().manual_seed(4)
    for layer in layers(made).values():
        layer.lora_B.normal_(std=0.1, generator=dice)
    return made


def velocity(made: WanTransformer) -> torch.Tensor:
    dice = torch.Generator().manual_seed(2)
    noisy = torch.randn(1, *tiny.LATENTS, generator=dice)
    return made(noisy, torch.full((1, tiny.BLOCK), 0.5), made.prompt_keys(tiny.text().float()), made.clip_view(noisy))


def taught(made: WanTransformer, learner: Learner, steps: int = 4) -> WanTransformer:
    for step in range(steps):
        goal = torch.randn(1, *tiny.LATENTS, generator=torch.Generator().manual_seed(step))
        learner.step(functional.mse_loss(velocity(made), goal))
    return made


LEARNERS = {
    "dmd": lambda made, lr: Learner(made, [dmd_adam(made, lr, lr)], average=0.9),
    "teacher_forcing": lambda made, lr: learner_of(made, lr, lr, 0.9),
}


@torch.no_grad()
def test_it_begins_as_the_network_it_was_and_merged_is_the_network_it_became():
    assert torch.equal(velocity(network()), velocity(network(rank=0)))
    made = moved(network())
    expected = velocity(made)
    assert not torch.allclose(expected, velocity(network(rank=0)), atol=1e-3)
    merge(made)
    assert made.state_dict().keys() == network(rank=0).state_dict().keys() and not layers(made)
    assert torch.equal(velocity(made), expected)


@pytest.mark.parametrize("kind", LEARNERS)
def test_what_is_added_to_large_matrices_is_of_the_rank_and_all_else_learns_whole(kind):
    made = network()
    learner = LEARNERS[kind](made, 1e-2)
    taught(made, learner)
    learner.swap_average()
    merge(made)
    before = network(rank=0).state_dict()
    low = 0
    for name, after in made.state_dict().items():
        added = after - before[name]
        assert added.any() or ("linear_proj" in name), name  # a clip has nothing that is far
        if name.endswith(".weight") and pays(added.shape, RANK) and "linear_proj" not in name:
            values = torch.linalg.svdvals(added)
            assert values[RANK:].max() < 1e-5 * values[0] < values[RANK - 1], name
            low += 1
    assert low == 3 * 10 + 6  # of each layer two attentions and two of the feed-forward part; both ends


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_first_step_moves_a_matrix_as_far_as_if_it_learned_whole(kind):
    made, whole = network(), network(rank=0)
    for one in (made, whole):
        taught(one, LEARNERS[kind](one, 1e-4), steps=1)
    before = network(rank=0)
    for name, layer in layers(made).items():
        first = before.get_submodule(name).weight
        ratio = (layer.weight - first).norm() / (whole.get_submodule(name).weight - first).norm()
        assert 0.3 < ratio < 3, name


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_matrix_that_factors_are_added_to_is_no_optimisers(kind):
    made = network()
    learner = LEARNERS[kind](made, 1e-3)
    held = [p for one in learner._optimizers for group in one.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == set(made.parameters())
    assert not set(held) & {layer.whole for layer in layers(made).values()}


def test_gradients_of_factors_are_those_of_the_matrix_that_they_make():
    made, merged = moved(network()), moved(network())
    merge(merged)
    goal = torch.randn(1, *tiny.LATENTS)
    for one in (made, merged):
        functional.mse_loss(velocity(one), goal).backward()
    for name, layer in layers(made).items():
        whole = merged.get_submodule(name).weight.grad
        torch.testing.assert_close(layer.lora_B.grad, whole @ layer.lora_A.mT, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(layer.lora_A.grad, layer.lora_B.mT @ whole, rtol=1e-3, atol=1e-6)


def test_a_state_goes_on_as_if_it_had_not_been_saved():
    made = network()
    learner = LEARNERS["dmd"](made, 1e-3)
    taught(made, learner, 2)
    saved = deepcopy(learner.state_dict())
    other = network(seed=5)
    resumed = LEARNERS["dmd"](other, 1e-3)
    resumed.load_state_dict(saved)
    for one, its in ((made, learner), (other, resumed)):
        taught(one, its, 2)
    states = made.state_dict(), other.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_rank_that_makes_nothing_smaller_is_refused():
    with pytest.raises(ValueError, match="at rank 24 factors would be larger than every matrix of this network"):
        network(rank=24)
