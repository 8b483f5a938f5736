"""Calls that are recorded and replayed equal plain ones. What replays needs a GPU; what tells calls apart does not."""

import copy
from collections.abc import Callable

import pytest
import torch

from longtake import parallel
from longtake.attention.rope import Grid, RotaryAxes, Rotation, rotate
from longtake.distillation.pretrain import forced_in_one_pass
from longtake.distillation.rollout import rollout
from longtake.distillation.trainer import Learner
from longtake.generation.noise import SeededNoise
from longtake.generation.recipe import Recipe
from longtake.memory.view import ClipView
from longtake.models.wan import WanTransformer
from longtake.recipes import hybrid_forcing, self_forcing_sink
from tests import tiny


def test_trees_are_of_a_kind_if_only_values_differ() -> None:
    def view(angle: float, tokens: int) -> ClipView:
        return ClipView(Rotation(torch.full((tokens, 2), angle), torch.zeros(tokens, 2)))

    one = parallel.kind_of((view(0.0, 3), [1, {"far": None}]))
    assert one == parallel.kind_of((view(1.0, 3), [1, {"far": None}]))
    others = [(view(0.0, 4), [1, {"far": None}]), (view(0.0, 3), [2, {"far": None}]), (view(0.0, 3), [1, {}])]
    assert all(one != parallel.kind_of(other) for other in others)


def test_mapped_trees_keep_their_form() -> None:
    tree = (ClipView(Rotation(torch.zeros(3, 2), torch.ones(3, 2))), [None, {"mask": torch.ones(1)}])
    view, (nothing, mapping) = parallel.mapped_tensors(tree, lambda x: x + 1)
    assert isinstance(view, ClipView) and isinstance(view.rotation, Rotation) and nothing is None
    assert view.rotation.sin_TA.eq(2).all() and mapping["mask"].item() == 2


def test_on_the_host_calls_are_as_they_were() -> None:
    layer = torch.nn.Linear(2, 2)
    x = torch.ones(1, 2)
    plain = layer(x)
    parallel.record_calls([layer], ["forward"])
    with torch.no_grad():
        assert torch.equal(layer(x), plain)


def rolled_out(network: WanTransformer, name: str) -> torch.Tensor:
    """Ten blocks of two streams, the last three with their graph."""
    recipe = {"self_forcing_sink": self_forcing_sink(), "hybrid_forcing": hybrid_forcing()}[name]
    keys = network.prompt_keys(tiny.text(batch=2).float().cuda())
    noise = SeededNoise((0, 1), tiny.LATENTS, torch.device("cuda"), torch.float32)
    memory = recipe.memory(network)
    return rollout(recipe.schedule, network, memory, lambda block: keys, noise, tiny.LEVELS, blocks=10, learning=3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are recorded on a GPU alone")
@pytest.mark.parametrize("name", ["self_forcing_sink", "hybrid_forcing"])
def test_rollouts_are_the_same_when_passes_are_replayed(name: str) -> None:
    plain = tiny.network(extent=15, reads_far=name == "hybrid_forcing").float().cuda()
    recorded = copy.deepcopy(plain)
    parallel.record_calls([recorded], ("forward", "keys_to_commit"))
    for _ in range(2):  # the second time with other weights, in the same storage
        made, replayed = rolled_out(plain, name), rolled_out(recorded, name)
        assert torch.allclose(made, replayed, atol=1e-5)
        for network, latents in ((plain, made), (recorded, replayed)):
            network.zero_grad()
            latents.square().sum().backward()
        for one, other in zip(plain.parameters(), recorded.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.allclose(one.grad, other.grad, atol=1e-4, rtol=1e-3)
        with torch.no_grad():
            for network in (plain, recorded):
                for number, parameter in enumerate(network.parameters()):
                    parameter.mul_(1.1).add_(0.01 * (number % 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are recorded on a GPU alone")
def test_what_caches_forget_stays_where_a_recorded_graph_reads_it() -> None:
    grid, x = Grid(RotaryAxes(split=(4, 2, 2)), 2, 3), torch.randn(1, 6, 1, 8, device="cuda")

    def turned(x: torch.Tensor) -> torch.Tensor:
        return rotate(x, grid.rotation([7], "cuda"))

    replayed = parallel.Recorded(turned)
    with torch.no_grad():
        replayed(x)
        for position in range(1000):  # more than any cache holds
            grid.rotation([position + 0.5], "cuda")
        torch.cuda.empty_cache()
        assert torch.equal(replayed(x), turned(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are recorded on a GPU alone")
def test_replayed_lessons_have_the_gradients_of_plain_ones() -> None:
    def lesson_of(network: WanTransformer, recorded: bool) -> tuple[Learner, Callable[..., torch.Tensor]]:
        text = tiny.text(batch=2).float().cuda()

        def loss(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            level = torch.full(clean.shape[:2], 0.5, device=clean.device)
            velocity = network(clean + noise, level, network.prompt_keys(text), network.clip_view(clean))
            return (velocity - noise).square().mean()

        learner = Learner(network, [torch.optim.SGD(network.parameters(), lr=0.1)], average=None)
        return learner, learner.taught_by(loss, recorded=recorded)

    one = tiny.network(extent=6).float().cuda()
    (plain, taught), (other, replayed) = lesson_of(one, False), lesson_of(copy.deepcopy(one), True)
    for _ in range(3):
        clean, noise = torch.randn(2, 2, 6, *tiny.LATENTS[1:], device="cuda")
        before = torch.cuda.get_rng_state()
        assert torch.allclose(taught(clean, noise), replayed(clean, noise))
        assert torch.equal(before, torch.cuda.get_rng_state()), "to record draws nothing"
        assert torch.allclose(plain.step(), other.step(), rtol=1e-4)
    for a, b in zip(plain.module.parameters(), other.module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are recorded on a GPU alone")
@pytest.mark.parametrize("recipe, together", [(hybrid_forcing(), ()), (tiny.rolling_recipe(), (2, 3, 2))])
def test_lessons_that_read_a_far_state_or_go_by_windows_are_replayed_with_the_gradients_of_plain_ones(
    recipe: Recipe, together: tuple[int, ...]
) -> None:
    def lesson_of(network: WanTransformer, recorded: bool) -> tuple[Learner, Callable[..., torch.Tensor]]:
        text, memory = tiny.text(batch=2).float().cuda(), recipe.memory(network)

        def loss(clean: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
            level, prompts = torch.full(clean.shape[:2], 0.5, device=clean.device), network.prompt_keys(text)
            first = torch.zeros(clean.shape[:2], dtype=torch.long, device=clean.device)
            velocity = forced_in_one_pass(network, clean, noisy, level, prompts, first, tiny.BLOCK, memory, together)
            return velocity.square().mean()

        learner = Learner(network, [torch.optim.SGD(network.parameters(), lr=0.1)], average=None)
        return learner, learner.taught_by(loss, recorded=recorded)

    one = tiny.network(reads_far=True).float().cuda()
    torch.nn.init.normal_(one.blocks[0].self_attn.linear_proj.weight, std=0.1)
    (plain, taught), (other, replayed) = lesson_of(one, False), lesson_of(copy.deepcopy(one), True)
    for _ in range(3):
        clean, noisy = torch.randn(2, 2, 21, *tiny.LATENTS[1:], device="cuda")
        assert torch.allclose(taught(clean, noisy), replayed(clean, noisy), rtol=1e-4)
        assert torch.allclose(plain.step(), other.step(), rtol=1e-3)
    for a, b in zip(plain.module.parameters(), other.module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are recorded on a GPU alone")
def test_a_replay_draws_anew() -> None:
    draw = parallel.Recorded(lambda x: x + torch.rand_like(x))
    with torch.no_grad():
        first, second = (draw(torch.zeros(100, device="cuda")) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are recorded on a GPU alone")
def test_a_record_lends_its_own_tensors_for_chosen_calls_alone() -> None:
    double = parallel.Recorded(lambda x: 2 * x, chosen=lambda x: len(x) == 3, lends=True)
    with torch.no_grad():
        lent, own = double(torch.ones(3, device="cuda")), double(torch.ones(2, device="cuda"))
        assert double(torch.full((3,), 5.0, device="cuda")) is lent and lent.eq(10).all()
        assert double(torch.ones(2, device="cuda")) is not own
