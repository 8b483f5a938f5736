"""Views at fixed addresses answer bit for bit as those that they hold."""

import pytest
import torch
from tests import tiny

from longtake.memory.fixed_view import FixedView, FixedViews
from longtake.recipes import RECIPES

KINDS = {
    "self_forcing": 1, "hybrid_forcing": 1, "rolling_forcing": 2, "longlive": 1, "reward_forcing": 1, "memflow": 3,
    "rehyat": 1,
}  # fmt: skip
"""Of views that streams read: one for passes, one more where commits read something else, others while a bank fills."""


@pytest.mark.parametrize("name, count", KINDS.items())
def test_streams_are_the_same_through_fixed_views(name: str, count: int) -> None:
    """Past a redirect, which empties some memories, and long enough that a bank is full."""
    recipe = tiny.rolling_recipe() if name == "rolling_forcing" else RECIPES[name]()
    plain, fixed = tiny.engine(recipe), tiny.engine(recipe)
    given: list[object] = []
    views = FixedViews(fixed.network.memory_view)

    def noted(*arguments, **more):
        given.append(views(*arguments, **more))
        return given[-1]

    fixed.network.memory_view = noted
    with plain.stream("a ball") as one, fixed.stream("a ball") as other:
        for block in range(14):
            if block == 11:
                one.redirect("a cube")
                other.redirect("a cube")
            assert (next(one).frames == next(other).frames).all()
    assert len({id(view) for view in given if isinstance(view, FixedView)}) == count


def test_a_view_of_a_memory_that_still_fills_is_given_as_it_is() -> None:
    made, noisy = tiny.network(), torch.randn(1, *tiny.LATENTS, dtype=torch.float64)
    memory, views, level = tiny.memory(made), FixedViews(made.memory_view), torch.ones(1, tiny.BLOCK)
    found = []
    with torch.no_grad():
        for _ in range(4):
            view = views(memory, noisy)
            found.append(isinstance(view, FixedView))
            memory.commit(made.keys_to_commit(noisy, level, tiny.prompt(made), view), tiny.BLOCK)
    assert found == [False, False, True, True]


@torch.no_grad()
def test_the_room_is_shared_by_kinds_and_each_still_holds_its_own() -> None:
    made = tiny.network()
    views, memory = FixedViews(made.memory_view), tiny.memory(made)
    short, long = (torch.randn(1, frames, *tiny.LATENTS[1:], dtype=torch.float64) for frames in (1, tiny.BLOCK))
    prompt = tiny.prompt(made)
    for _ in range(2):
        level = torch.ones(1, tiny.BLOCK)
        memory.commit(made.keys_to_commit(long, level, prompt, views(memory, long)), tiny.BLOCK)
    for noisy in (short, long, short, long):
        level = torch.ones(noisy.shape[:2])
        want = made(noisy, level, prompt, made.memory_view(memory, noisy))
        assert torch.equal(made(noisy, level, prompt, views(memory, noisy)), want)
