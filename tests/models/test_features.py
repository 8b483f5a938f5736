"""Learned features: their number, their sign, how they begin, and that each head has its own."""

import pytest
import torch

from longtake.attention.rope import Grid, RotaryAxes
from longtake.models.features import LearnedForm, OwnMaps, PowerMap

GRID = Grid(RotaryAxes(split=(4, 2, 2)), rows=1, columns=2)


def test_the_published_size_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        sizes = {degree: PowerMap(12, 128, degree=degree) for degree in (1, 2, 3)}
        form = LearnedForm(12, 128, far_tokens=1)
    assert {degree: made.features for degree, made in sizes.items()} == {1: 128, 2: 256, 3: 384}
    assert sum(p.numel() for p in sizes[2].parameters()) == 1_185_792  # published: 1.2 million a map
    assert sum(p.numel() for p in form.parameters()) == 2_371_584  # and 2.4 million a layer
    products = 12 * (128 * 256 + 256 * 256)
    assert products * 2 * 12_600 == pytest.approx(30e9, rel=0.02)  # FLOP of one map at 12,600 tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_features_are_above_zero_and_float32_at_least(dtype: torch.dtype) -> None:
    made = PowerMap(3, 8, start=1e-4).to(dtype)
    features = made(10 * torch.randn(2, 50, 3, 8, dtype=dtype))
    assert features.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert features.shape == (2, 50, 3, 16) and features.min() > 0


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_every_power_begins_near_the_start(degree: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 200, 3, 16)
    for part in PowerMap(3, 16, degree=degree, start=1e-3)(x).chunk(degree, dim=-1):
        assert 0.7e-3 < part.median() < 1.4e-3 and part.max() < 20e-3


@pytest.mark.parametrize("far_tokens", [100, 30_000])
@pytest.mark.parametrize("head", [8, 64])
def test_what_is_far_begins_as_a_tenth_of_what_is_near(far_tokens: int, head: int) -> None:
    torch.manual_seed(0)
    form = LearnedForm(3, head, far_tokens=far_tokens)
    queries, keys = form.queries(torch.randn(1, 100, 3, head)), form.keys(torch.randn(1, 100, 3, head))
    mass_BTN = torch.einsum("btnr,bnr->btn", queries, keys.mean(dim=1) * far_tokens)
    assert 0.05 < mass_BTN.median() < 0.25


def test_heads_know_nothing_of_each_other() -> None:
    made, x = PowerMap(3, 8), torch.randn(1, 5, 3, 8)
    other = x.clone()
    other[:, :, 1] += 1
    changed = (made(x) != made(other)).flatten(0, 1).any(dim=0).any(dim=-1)
    assert changed.tolist() == [False, True, False]


def test_features_turned_after_keep_their_denominator_and_turn_above_it() -> None:
    form, x = LearnedForm(3, 8, degree=3, far_tokens=10, turned_after=True), torch.randn(1, 4, 3, 8)
    at, later = (form.of_keys(x, GRID.rotation(frames, "cpu")) for frames in ([0, 1], [5, 6]))
    assert torch.equal(at.below, later.below) and not torch.allclose(at.above, later.above)
    torch.testing.assert_close(at.above.norm(dim=-1), at.below.norm(dim=-1))
    assert form.features(8) == at.above.shape[-1]


def test_maps_of_its_own_are_a_product_a_head_beside_the_identity() -> None:
    made, x = OwnMaps(3, 8), torch.randn(2, 5, 3, 8)
    for one, weight_NDD in ((made.of_queries, made.queries), (made.of_keys, made.keys)):
        assert torch.equal(one(x), x), "zero at first"
        torch.nn.init.normal_(weight_NDD)
        by_head = [x[:, :, n] @ (torch.eye(8) + weight_NDD[n]) for n in range(3)]
        torch.testing.assert_close(one(x), torch.stack(by_head, dim=2), atol=1e-5, rtol=1e-5)


def test_heads_left_local_weigh_next_to_nothing_and_others_as_before() -> None:
    form, x = LearnedForm(3, 8, far_tokens=10), torch.randn(1, 40, 3, 8)
    before = form.keys(x).clone()
    form.leave_local([0, 2])
    queries, keys = form.queries(x), form.keys(x)
    assert torch.equal(keys[:, :, 1], before[:, :, 1]) and keys.min() > 0
    mass_BTN = torch.einsum("btnr,bnr->btn", queries, keys.sum(dim=1))
    assert mass_BTN[..., [0, 2]].max() < 1e-20 and mass_BTN[..., 1].min() > 1e-3


@pytest.mark.parametrize("degree, start", [(0, 1.0), (2, 0.0), (2, -1.0)])
def test_what_cannot_be_is_refused(degree: int, start: float) -> None:
    with pytest.raises(ValueError, match=f"got {degree} and {start}"):
        PowerMap(1, 8, degree=degree, start=start)
