"""Matching by its definition, on tokens in any order, on an attention that is not Wan's, and in a network."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from torch import Tensor, nn

from longtake.attention import near_span, reference
from longtake.attention.dense import dense
from longtake.attention.near_span import NearSpan
from longtake.attention.rope import Grid, RotaryAxes, rotate
from longtake.distillation.attention_matching import Asked, AskingView, Match, easiest, hybrid, match
from longtake.distillation.stages import AttentionMatchingStage, train_attention_matching
from longtake.memory.view import ClipView
from longtake.models.features import LearnedForm


def form(heads: int = 2, head: int = 4, seed: int = 0) -> LearnedForm:
    torch.manual_seed(seed)
    return LearnedForm(heads, head, far_tokens=4).double()


def drawn(frame_T: Tensor, seed: int = 1, batch: int = 2) -> Asked:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, batch, len(frame_T), 2, 4, generator=generator, dtype=torch.float64)
    return Asked(*x, frame_T)


def sets(frame_T: Tensor, span: NearSpan) -> tuple[Tensor, Tensor]:
    """Which tokens (columns) are near and which far to which (rows), by their frames alone."""
    frame_T = frame_T - frame_T.min()
    begin_T1 = (frame_T // span.current * span.current).unsqueeze(1)
    far_TT = frame_T < begin_T1 - span.overlap
    return (frame_T < begin_T1 + span.current) & ~far_TT, far_TT


frames = st.lists(st.integers(3, 11), min_size=1, max_size=24).map(torch.tensor)
spans = st.builds(NearSpan, current=st.integers(1, 4), overlap=st.integers(0, 4))


@given(frame_T=frames, span=spans)
@settings(max_examples=40)
@torch.no_grad()
def test_the_answer_is_the_definition_whatever_tokens_a_frame_has(frame_T: Tensor, span: NearSpan) -> None:
    maps, asked = form(), drawn(frame_T)
    weights_BNTS = torch.einsum("btnr,bsnr->bnts", maps.queries(asked.q_BTND), maps.keys(asked.k_BTND))
    near_TT, far_TT = sets(frame_T, span)

    def log_mass(scores: Tensor) -> Tensor:
        return scores.logsumexp(-1, keepdim=True)

    expected = reference.one_bar(*asked[:3], weights_BNTS, near_TT, far_TT, log_mass)
    torch.testing.assert_close(hybrid(maps, asked, span), expected, atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_whole_frames_in_order_are_answered_as_by_a_converted_layer() -> None:
    """Features may see other positions than scores do: rows and columns alone."""
    grid, span, maps = Grid(RotaryAxes(split=(0, 2, 2)), 2, 3), NearSpan(current=2, overlap=1), form()
    plain = drawn(torch.arange(7).repeat_interleave(6))
    all_turned, turned = grid.rotation(range(7), "cpu"), grid.rotation([0] * 7, "cpu")
    q, k = (rotate(x, all_turned) for x in plain[:2])
    asked = Asked(q, k, plain.v_BTND, plain.frame_T, *(rotate(x, turned) for x in plain[:2]))
    expected = near_span.parallel(
        q,
        k,
        plain.v_BTND,
        maps.of_queries(plain.q_BTND, turned),
        maps.of_keys(plain.k_BTND, turned),
        span=span,
        tokens=6,
    )
    torch.testing.assert_close(hybrid(maps, asked, span), expected, atol=1e-12, rtol=1e-12)


@given(frame_T=frames.filter(lambda x: x.max() - x.min() > 4), both_ways=st.booleans())
@settings(max_examples=20)
@torch.no_grad()
def test_errors_are_those_of_masked_attention(frame_T: Tensor, both_ways: bool) -> None:
    maps, asked, span = form(), drawn(frame_T), NearSpan(current=2, overlap=1)
    near_TT, far_TT = sets(frame_T, span)
    everything = torch.ones_like(near_TT) if both_ways else near_TT | far_TT
    near, exact = (dense(*asked[:3], mask) for mask in (near_TT, everything))

    def l1(x: Tensor) -> Tensor:
        return x.abs().mean((0, 1, 3)).float()

    wrong = l1(hybrid(maps, asked, span) - exact)
    found = match(maps, asked, span, both_ways=both_ways)
    torch.testing.assert_close(found.beside_near_N, wrong / l1(near - exact), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.beside_answer_N, wrong / l1(exact), atol=1e-5, rtol=1e-5)


def test_where_nothing_is_far_nothing_can_be_taught() -> None:
    with pytest.raises(ValueError, match=r"spans of 3 \+ 1 latent frames hold the whole clip"):
        match(form(), drawn(torch.tensor([4, 5, 6])), NearSpan(current=3, overlap=1))
    nobody: Any = None  # neither text nor world is there that clips could be made of
    with pytest.raises(ValueError, match=r"spans of 15 \+ 1 latent frames hold the whole clip"):
        stage = AttentionMatchingStage(current=15)
        train_attention_matching(nobody, tiny.network(extent=15), nobody, 3.0, stage, nobody)


@pytest.mark.parametrize("count", [5, 9])
def test_a_frame_is_given_for_every_token(count: int) -> None:
    """Tokens without one would be left out of the answer, and of the error."""
    asked = drawn(torch.arange(7))._replace(frame_T=torch.arange(count))
    for answer in (hybrid, match):
        with pytest.raises(ValueError, match=rf"frames \[{count}\] are not those of 7 tokens"):
            answer(form(), asked, NearSpan(current=2, overlap=1))


class OtherAttention(nn.Module):
    """One that is not Wan's: torch's own projections, no norms, no positions but what its input bears."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, batch_first=True)

    def asks(self, x_BTE: Tensor, frame_T: Tensor) -> Asked:
        projected = nn.functional.linear(x_BTE, 3 * self.inner.in_proj_weight, self.inner.in_proj_bias)
        return Asked(*(part.unflatten(-1, (2, 8)) for part in projected.chunk(3, dim=-1)), frame_T)


def test_a_layer_that_is_not_wans_is_taught() -> None:
    """Frames of one to three tokens in no order. The maps learn, the layer does not, and each head gains."""
    torch.manual_seed(0)
    layer, span = OtherAttention(), NearSpan(current=2, overlap=1)
    frame_T = torch.arange(12).repeat_interleave(torch.tensor([1, 3, 2] * 4))[torch.randperm(24)]
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    maps = LearnedForm(2, 8, far_tokens=20)
    optimizer = torch.optim.AdamW(maps.parameters(), lr=1e-2, weight_decay=0)

    def asked(seed: int) -> Asked:
        x = torch.randn(4, 24, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            return layer.asks(x, frame_T)

    def error(seeds: range) -> Tensor:
        with torch.no_grad():
            return torch.stack([match(maps, asked(seed), span).beside_near_N for seed in seeds]).mean(0)

    held_out = range(1000, 1004)
    first = error(held_out)
    for seed in range(150):
        loss = match(maps, asked(seed), span).beside_near_N.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = error(held_out)
    assert (last < 0.9 * first).all(), (first, last)
    assert all(torch.equal(x, layer.state_dict()[name]) for name, x in before.items())
    assert all(x.grad is None for x in layer.parameters())


def test_the_lines_that_docs_show_teach_an_attention() -> None:
    page = Path(__file__).parents[2] / "docs" / "rehyat.md"
    (shown,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    torch.manual_seed(0)
    told: dict[str, Any] = {}
    exec(shown, told)
    assert told["loss"] < 0.8 and told["answer_BTND"].shape == (1, 36, 2, 8)


@torch.no_grad()
def test_telling_what_is_asked_changes_no_answer() -> None:
    made = tiny.network()
    noisy, level, told = torch.randn(1, 5, *tiny.LATENTS[1:], dtype=torch.float64), torch.full((1, 5), 0.5), {}
    grid = made.grid(noisy)
    rotation, turned = grid.rotation(range(5), "cpu"), grid.rotation([0] * 5, "cpu")
    view = AskingView(rotation, turned, torch.arange(5).repeat_interleave(6), told.__setitem__)
    answers = [made(noisy, level, tiny.prompt(made), one) for one in (view, ClipView(rotation))]
    assert torch.equal(*answers) and set(told) == {0, 1, 2}
    asked = told[1]
    assert asked.q_BTND.shape == asked.features_q_BTND.shape and not torch.equal(asked.q_BTND, asked.features_q_BTND)
    assert torch.equal(asked.q_BTND[:, :6], asked.features_q_BTND[:, :6]), "the first frame stands at 0 in both"


@given(frame_T=frames)
@settings(max_examples=20)
@torch.no_grad()
def test_without_an_exact_part_the_near_span_answers_nothing(frame_T: Tensor) -> None:
    maps, asked, span = form(), drawn(frame_T), NearSpan(current=2, overlap=0, exact=False)
    weights_BNTS = torch.einsum("btnr,bsnr->bnts", maps.queries(asked.q_BTND), maps.keys(asked.k_BTND))
    near_TT, far_TT = sets(frame_T, span)
    expected = reference.far_alone(asked.v_BTND, weights_BNTS, near_TT | far_TT)
    torch.testing.assert_close(hybrid(maps, asked, span), expected, atol=1e-12, rtol=1e-12)
    found = match(maps, asked, span)
    torch.testing.assert_close(found.beside_near_N, found.beside_answer_N)
    exact = dense(*asked[:3], near_TT | far_TT)
    wrong = ((expected - exact).abs().mean((0, 1, 3)) / exact.abs().mean((0, 1, 3))).float()
    torch.testing.assert_close(found.beside_answer_N, wrong, atol=1e-5, rtol=1e-5)


def test_layers_with_the_smallest_errors_are_converted() -> None:
    errors = {0: 0.3, 1: 0.1, 2: 0.2, 5: 0.1, 7: 0.9}
    assert easiest(errors, 0.4) == (1, 5) and easiest(errors, 0.6) == (1, 2, 5)
    assert easiest(errors, 0.55) == (1, 2, 5), "the nearest whole number"
    assert easiest(dict(reversed(errors.items())), 0.2) == (1,), "the first of those that are alike"
    assert easiest(errors, 0.01) == (1,) and easiest(errors, 1.0) == tuple(errors)


def test_a_head_with_nothing_to_say_is_matched() -> None:
    asked = drawn(torch.arange(6))
    asked.v_BTND[:, :, 1] = 0
    found = match(form(), asked, NearSpan(current=1, overlap=0))
    for errors_N in found:
        assert errors_N[0] > 0 and errors_N[1] == 0


def test_a_match_has_a_number_a_head() -> None:
    found = match(form(), drawn(torch.arange(6)), NearSpan(current=1, overlap=0))
    assert isinstance(found, Match) and found.beside_near_N.shape == (2,) and found.beside_near_N.requires_grad
