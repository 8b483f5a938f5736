"""Embeddings of levels that are computed once are those that each pass computes."""

import copy

import pytest
import torch
from tests import tiny

from longtake.generation.levels import _latest, level_tensor
from longtake.models.known_levels import KnownLevels
from longtake.models.wan import Levels, WanTransformer
from longtake.recipes import RECIPES

LATENTS = torch.zeros(2, *tiny.LATENTS)


def computed(made: WanTransformer) -> list[torch.Tensor]:
    """A note of the levels that are embedded from now on."""
    seen: list[torch.Tensor] = []
    made.time_projection.register_forward_hook(lambda *given: seen.append(given[1]))
    return seen


def same(one: Levels, other: Levels) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["self_forcing", "hybrid_forcing", "rolling_forcing", "rehyat"])
def test_streams_are_bit_for_bit_the_same_and_embed_each_list_of_levels_once(name: str) -> None:
    """One alone, then two made together, which have rows of their own."""
    recipe = tiny.rolling_recipe() if name == "rolling_forcing" else RECIPES[name]()
    plain, known = tiny.engine(recipe), tiny.engine(recipe)
    known.network.embed_levels = KnownLevels(known.network)
    made = computed(known.network)
    lists = 1 + len(recipe.steps)  # of each pass over a block, or over one more in flight each time; and of commits
    for seeds in ([0], [0, 1]):
        one, other = ([engine.stream("a ball", seed=seed) for seed in seeds] for engine in (plain, known))
        for block in range(8):
            if block == 6:
                for stream in (*one, *other):
                    stream.redirect("a cube")
            pictures = zip(plain.next_together(one), known.next_together(other), strict=True)
            assert all((a.frames == b.frames).all() for a, b in pictures)
        assert len(made) == lists * len(seeds)


@torch.no_grad()
def test_the_same_levels_are_the_same_tensor() -> None:
    one = level_tensor([1, 0.5, 0.5], LATENTS)
    assert one is level_tensor((1.0, 0.5, 0.5), LATENTS) and one.dtype == torch.float32
    assert one.tolist() == [[1.0, 0.5, 0.5]] * 2
    assert one is not level_tensor([1, 0.5, 0.5], LATENTS[:1])


@torch.no_grad()
def test_what_is_known_is_never_of_other_weights_or_levels() -> None:
    made = tiny.network()
    known, level = KnownLevels(made), torch.rand(2, 3)
    seen = computed(made)

    def told(times: int) -> None:
        """Asked twice, it answers as the network does, which it has asked so many times."""
        before = len(seen)
        one, other = known(level), known(level)
        assert len(seen) - before == times and one is other
        fresh = made.embed_levels(level)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, fresh, strict=True))

    told(1)
    told(0)
    made.time_embedding[0].weight.mul_(1.1)  # as a step of training does
    told(1)
    made.load_state_dict(copy.deepcopy(tiny.network(seed=1).state_dict()))
    told(1)
    made.load_state_dict(tiny.network(seed=2).state_dict(), assign=True)
    told(1)
    made.to(torch.bfloat16).to(torch.float64)  # rounded, in numbers of the same type
    told(1)
    made.to(torch.bfloat16)
    told(1)
    level.mul_(0.5)
    told(1)
    level = torch.rand(2, 3)
    told(1)
    told(0)


def test_streams_and_weights_may_be_made_in_inference_mode() -> None:
    recipe = RECIPES["self_forcing"]()

    def shown(known: bool, loads: bool) -> list[object]:
        engine = tiny.engine(recipe)
        with torch.inference_mode(loads):
            weights = {name: x.clone() for name, x in engine.network.state_dict().items()}
        engine.network.load_state_dict(weights, assign=True)
        engine.network.embed_levels = KnownLevels(engine.network) if known else engine.network.embed_levels
        _latest.cache_clear()
        with torch.inference_mode(), engine.stream("a ball", seed=0) as stream:
            frames = [next(stream).frames for _ in range(2)]
        with torch.no_grad():
            level_BF = level_tensor([recipe.levels(3.0)[0]] * 3, LATENTS[:1])
            assert not level_BF.is_inference(), "a gradient may need it"
            return [*frames, engine.network.embed_levels(level_BF).level_BFE.numpy()]

    for loads in (False, True):
        assert all((one == other).all() for one, other in zip(shown(False, loads), shown(True, loads), strict=True))


def test_with_gradients_levels_are_embedded_in_each_pass() -> None:
    made = tiny.network()
    known, level = KnownLevels(made), torch.rand(1, 3)
    with torch.no_grad():
        known(level)
    for _ in range(2):
        known(level).layers_BF6E.sum().backward()
    assert all(one.grad is not None for one in made.time_embedding.parameters())
    with torch.no_grad():
        assert not known(level).level_BFE.requires_grad
