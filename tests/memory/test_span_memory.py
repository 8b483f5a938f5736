"""Chunk after chunk from a state of fixed size equals the whole clip at once."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.held import Held
from torch import Tensor

from longtake.attention import linear, reference
from longtake.attention.linear import Features
from longtake.attention.near_span import Chunk, NearSpan, Shift, parallel
from longtake.attention.rope import Grid, RotaryAxes, rotate
from longtake.memory.far import Delta, FarShape, FarState, Keep, MassCap, Rule
from longtake.memory.span_memory import SpanMemory, SpanShape, attended
from longtake.models.features import LearnedForm

GRID = Grid(RotaryAxes(split=(4, 2, 2)), rows=1, columns=2)
TOKENS, HEADS, HEAD = GRID.rows * GRID.columns, 2, 8
POSITIONS = {"all": (False, True), "space": (False, False), "after": (True, True)}  # turned_after, turns_with_frames
UNIT_N = torch.tensor([0.5, -1.0])
SHIFTS: dict[str, tuple[Shift | Tensor, Callable[[Tensor], Tensor]]] = {
    "log mass": (Shift.LOG_MASS, lambda scores: scores.logsumexp(-1, keepdim=True)),
    "top": (Shift.TOP, lambda scores: scores.amax(-1, keepdim=True)),
    "a number a head": (UNIT_N, lambda scores: UNIT_N.view(1, -1, 1, 1)),
}


def shape_of(
    span: NearSpan, shift: str = "log mass", positions: str = "all", rule: Rule | None = None, far_tokens: int = 20
) -> SpanShape:
    torch.manual_seed(1)
    after, with_frames = POSITIONS[positions]
    form = LearnedForm(HEADS, HEAD, far_tokens=far_tokens, turned_after=after).double()
    far = FarShape(form=form, turns_with_frames=with_frames, rule=rule or Keep())
    return SpanShape(span=span, grid=GRID, far=far, shift=SHIFTS[shift][0])


def form_of(shape: SpanShape) -> LearnedForm:
    assert isinstance(shape.far.form, LearnedForm)
    return shape.far.form


def drawn(frames: int, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Unrotated queries and keys, and values."""
    made = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, frames * TOKENS, HEADS, HEAD, generator=made, dtype=torch.float64)
    return q, k, v


def features(shape: SpanShape, q: Tensor, k: Tensor, frames: Sequence[int]) -> tuple[Features, Features]:
    rotation = shape.far.rotation(GRID, frames, "cpu")
    return shape.far.form.of_queries(q, rotation), shape.far.form.of_keys(k, rotation)


def at_once(shape: SpanShape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    frames = range(k.shape[1] // TOKENS)
    queries, keys = features(shape, q, k, frames)
    q, k = (rotate(x, GRID.rotation(frames, "cpu")) for x in (q, k))
    return parallel(q, k, v, queries, keys, span=shape.span, tokens=TOKENS, shift=shape.shift)


def by_definition(shape: SpanShape, shift: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    frames = range(k.shape[1] // TOKENS)
    queries, keys = features(shape, q, k, frames)
    near, far = reference.near_and_far(len(frames), TOKENS, shape.span.current, shape.span.overlap)
    weights = torch.einsum("btnr,bsnr->bnts", queries.below, keys.below)
    q, k = (rotate(x, GRID.rotation(frames, "cpu")) for x in (q, k))
    return reference.one_bar(q, k, v, weights, near, far, SHIFTS[shift][1])


def results(function: Callable[..., Tensor], shape: SpanShape, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A function's value, and gradients of its inputs and of the maps."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    value = function(*tensors)
    toward = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
    wanted = [*tensors, *form_of(shape).parameters()]
    grads = torch.autograd.grad((value * toward).sum(), wanted, allow_unused=True)  # nothing far, no use for maps
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True))]


@given(
    span=st.builds(NearSpan, current=st.integers(1, 7), overlap=st.integers(0, 5)),
    frames=st.integers(1, 16),
    shift=st.sampled_from(sorted(SHIFTS)),
    positions=st.sampled_from(["all", "space"]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_chunk_after_chunk_equals_all_at_once_and_the_definition(
    span: NearSpan, frames: int, shift: str, positions: str, seed: int
) -> None:
    shape, tensors = shape_of(span, shift, positions), drawn(frames, seed)
    found = results(lambda *x: attended(SpanMemory.empty(shape), *x), shape, tensors)
    parallel_ones = results(lambda *x: at_once(shape, *x), shape, tensors)
    defined = results(lambda *x: by_definition(shape, shift, *x), shape, tensors)
    for got, same, want in zip(found, parallel_ones, defined, strict=True):
        torch.testing.assert_close(got, same, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    form_of(shape).float()
    narrow = attended(SpanMemory.empty(shape), *(x.float() for x in tensors))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, found[0].float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(at_once(shape, *(x.float() for x in tensors)), narrow, atol=1e-5, rtol=1e-5)


@given(current=st.integers(1, 7), frames=st.integers(1, 16), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_without_an_exact_part_chunk_after_chunk_still_equals_all_at_once(current: int, frames: int, seed: int) -> None:
    shape, tensors = shape_of(NearSpan(current=current, overlap=0, exact=False)), drawn(frames, seed)

    def run(memory: SpanMemory, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attended(memory, q, k, v) + 0 * (q + k)

    found = results(lambda *x: run(SpanMemory.empty(shape), *x), shape, tensors)
    for got, same in zip(found, results(lambda *x: at_once(shape, *x), shape, tensors), strict=True):
        torch.testing.assert_close(got, same, atol=1e-12, rtol=1e-12)
    form_of(shape).float()
    narrow = attended(SpanMemory.empty(shape), *(x.float() for x in tensors))
    torch.testing.assert_close(narrow, found[0].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("current, overlap", [(3, 1), (2, 5), (1, 0)])
@torch.no_grad()
def test_beside_its_answers_no_more_is_held_in_a_longer_clip(current: int, overlap: int) -> None:
    shape, beside = shape_of(NearSpan(current=current, overlap=overlap)), []
    for frames in (12, 24, 60):
        tensors = drawn(frames)
        attended(SpanMemory.empty(shape), *tensors)  # rotations are remembered, within bounds of their own
        with Held() as held:
            answer = attended(SpanMemory.empty(shape), *tensors)
        *before, with_both = held.after  # the last operator joins the answers of all chunks
        assert with_both >= 2 * answer.nbytes
        beside.append(max(before) - answer.nbytes)
    assert beside == [beside[0]] * 3


def test_features_turned_after_are_alike_in_both_forms() -> None:
    """Their weights may be below 0, so they stand under a bar of their own: no definition by one matrix of weights."""
    shape, (q, k, v) = shape_of(NearSpan(current=2, overlap=1), positions="after"), drawn(7)
    torch.testing.assert_close(
        attended(SpanMemory.empty(shape), q, k, v), at_once(shape, q, k, v), atol=1e-12, rtol=1e-12
    )


@given(current=st.integers(1, 4), overlap=st.integers(0, 5), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6))
@settings(deadline=None, max_examples=25)
def test_every_token_is_absorbed_once_when_it_leaves(current: int, overlap: int, sizes: list[int]) -> None:
    """Whatever pieces frames come in."""
    shape = shape_of(NearSpan(current=current, overlap=overlap))
    _, k, v = drawn(sum(sizes))
    memory, first = SpanMemory.empty(shape), 0
    for size in sizes:
        now = slice(first * TOKENS, (first + size) * TOKENS)
        memory, first = memory.commit(k[:, now], v[:, now]), first + size
        left = max(0, first - overlap)
        held, sums = memory.overlap.held, memory.far.sums
        assert (held.frames if held else ()) == tuple(range(left, first))
        assert (sums.mass_B.tolist() if sums else [0, 0]) == [left * TOKENS] * 2
        if sums:
            _, keys = features(shape, k[:, : left * TOKENS], k[:, : left * TOKENS], range(left))
            for got, want in zip(sums, linear.sums_of(keys, v[:, : left * TOKENS]), strict=True):
                torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def near_again(chunk: Chunk, following: Chunk) -> range:
    """What is said to be printed, in one reading: each step adds the whole near span."""
    return range(chunk.near, chunk.end)


def far_again(chunk: Chunk, following: Chunk) -> range:
    """In the other: each step adds all that is far to it."""
    return range(following.near)


def leaving(chunk: Chunk, following: Chunk) -> range:
    return range(chunk.near, following.near)


@pytest.mark.parametrize("current, overlap", [(3, 1), (5, 2), (2, 3), (3, 0), (1, 1)])
def test_of_three_recursions_only_what_leaves_is_the_definition(current: int, overlap: int) -> None:
    shape = shape_of(NearSpan(current=current, overlap=overlap))
    q, k, v = drawn(11)
    queries, keys = features(shape, q, k, range(11))
    turned_q, turned_k = (rotate(x, GRID.rotation(range(11), "cpu")) for x in (q, k))

    weights = torch.einsum("btnr,bsnr->bnts", queries.below, keys.below)
    near, _ = reference.near_and_far(11, TOKENS, current, overlap)

    def recursion(added: Callable[[Chunk, Chunk], range]) -> Tensor:
        times_TT = torch.zeros(near.shape, dtype=torch.float64)  # how often a key is in the sums that a query reads
        for chunk, following in pairwise(shape.span.chunks(11)):
            rows, frames = slice(following.begin * TOKENS, following.end * TOKENS), added(chunk, following)
            times_TT[rows] = times_TT[chunk.begin * TOKENS]
            times_TT[rows, frames.start * TOKENS : frames.stop * TOKENS] += 1
        return reference.one_bar(turned_q, turned_k, v, weights, near, times_TT, SHIFTS["log mass"][1])

    got = attended(SpanMemory.empty(shape), q, k, v)
    errors = {
        rule.__name__: ((recursion(rule) - got).norm() / got.norm()).item() for rule in (leaving, near_again, far_again)
    }
    assert errors["leaving"] < 1e-14
    assert (errors["near_again"] < 1e-14) == (overlap == 0), "the near span is what leaves only without an overlap"
    assert errors["far_again"] > 1e-3


def test_a_state_is_as_large_after_a_thousand_chunks_as_after_one() -> None:
    memory = SpanMemory.empty(shape_of(NearSpan(current=3, overlap=1)))
    _, k, v = drawn(3)
    assert memory.nbytes() == 0
    sizes = set()
    with torch.no_grad():
        for _ in range(1000):
            memory = memory.commit(k, v)
            sizes.add(memory.nbytes())
    near, sums = 2 * 2 * TOKENS * HEADS * HEAD * 8, 2 * (HEADS * 2 * HEAD * (HEAD + 1) * 8 + 8)
    assert sizes == {near + sums} and memory.frames == 3000


def test_reading_any_number_of_times_changes_nothing() -> None:
    """As every denoising step does; a clip of one chunk is the same, streamed or at once."""
    shape, (q, k, v) = shape_of(NearSpan(current=3, overlap=1)), drawn(3)
    memory = SpanMemory.empty(shape)
    torch.testing.assert_close(memory.attend(q, k, v), at_once(shape, q, k, v), atol=1e-15, rtol=1e-14)
    memory = memory.commit(k, v)
    before = [x.clone() for x in memory.far.sums]
    one, other = memory.attend(q, k, v), memory.attend(q, k, v)
    assert torch.equal(one, other) and memory.frames == 3
    assert all(torch.equal(x, y) for x, y in zip(before, memory.far.sums, strict=True))


def test_two_clips_at_once_are_two_clips() -> None:
    shape, tensors = shape_of(NearSpan(current=2, overlap=3)), drawn(9)
    together = attended(SpanMemory.empty(shape), *tensors)
    for i in range(2):
        alone = attended(SpanMemory.empty(shape), *(x[i : i + 1] for x in tensors))
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize("positions, moves", [("all", True), ("space", False), ("after", False)])
def test_where_a_timeline_begins_matters_only_to_maps_of_turned_frames(positions: str, moves: bool) -> None:
    shape, (q, k, v) = shape_of(NearSpan(current=2, overlap=1), positions=positions, far_tokens=1), drawn(6)

    def read(first: int) -> Tensor:
        at, asked = (shape.far.rotation(GRID, range(first + a, first + b), "cpu") for a, b in ((0, 4), (4, 6)))
        keys = shape.far.form.of_keys(k[:, : 4 * TOKENS], at)
        far = linear.weigh(
            linear.sums_of(keys, v[:, : 4 * TOKENS]), shape.far.form.of_queries(q[:, 4 * TOKENS :], asked)
        )
        return far.above / far.below.unsqueeze(-1)

    change = ((read(100) - read(0)).norm() / read(0).norm()).item()
    assert change > 0.01 if moves else change < 1e-5  # rotations are float32


def test_five_thousand_chunks_do_not_drift_in_float32() -> None:
    _, k, v = (x[:1] for x in drawn(40))
    form = LearnedForm(HEADS, HEAD, far_tokens=10_000)
    rotation = GRID.rotation(range(1), "cpu")
    wide = FarState(FarShape(form=LearnedForm(HEADS, HEAD, far_tokens=1).double()))
    form_of_wide = wide.shape.form
    assert isinstance(form_of_wide, LearnedForm)
    form_of_wide.load_state_dict(form.state_dict())
    pieces = [(k[:, i : i + TOKENS].float(), v[:, i : i + TOKENS].float()) for i in range(0, k.shape[1], TOKENS)]
    with torch.no_grad():
        narrow_keys, wide_keys = (
            [made.of_keys(k.to(dtype), rotation) for k, _ in pieces]
            for made, dtype in ((form, torch.float32), (form_of_wide, torch.float64))
        )
        narrow = exact = None
        for i in range(5000):
            narrow = linear.absorb(narrow, narrow_keys[i % 40], pieces[i % 40][1])
            exact = linear.absorb(exact, wide_keys[i % 40], pieces[i % 40][1].double())
    assert narrow is not None and exact is not None and narrow.kv_BNRD.dtype == torch.float32
    for got, want in zip(narrow[:2], exact[:2], strict=True):
        assert (got - want).norm() / want.norm() < 1e-5


def test_bfloat16_keys_are_read_as_closely_as_they_are_known() -> None:
    shape, tensors = shape_of(NearSpan(current=2, overlap=1)), drawn(9)
    expected = attended(SpanMemory.empty(shape), *tensors)
    form_of(shape).float()
    narrow = [x.bfloat16() for x in tensors]
    got = attended(SpanMemory.empty(shape), *narrow)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, atol=0.05, rtol=0.05)
    memory = SpanMemory.empty(shape).commit(*narrow[1:])
    assert memory.far.sums.kv_BNRD.dtype == torch.float32


def test_autocast_rounds_no_sums_and_no_join() -> None:
    shape, tensors = shape_of(NearSpan(current=2, overlap=1)), [x.float() for x in drawn(9)]
    form_of(shape).float()
    expected = attended(SpanMemory.empty(shape), *tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert (tensors[0][0, :, 0] @ tensors[1][0, :, 0].mT).dtype == torch.bfloat16, "it does round elsewhere"
        memory = SpanMemory.empty(shape).commit(*tensors[1:])
        got = attended(SpanMemory.empty(shape), *tensors)
    assert memory.far.sums.kv_BNRD.dtype == torch.float32
    torch.testing.assert_close(got.float(), expected, atol=0.03, rtol=0.03)


def far_share(rule: Rule, chunks: int) -> list[float]:
    """Mean share of what is far, chunk after chunk of like keys."""
    shape = shape_of(NearSpan(current=3, overlap=1), rule=rule, far_tokens=15 * TOKENS)
    memory, shares = SpanMemory.empty(shape), []
    with torch.no_grad():
        for i in range(chunks):
            q, k, v = drawn(3, seed=i % 20, batch=1)
            if memory.far.sums is not None:
                mass = memory.far.weigh(q, shape.far.rotation(GRID, range(3), "cpu")).below
                shares.append((mass / (1 + mass)).mean().item())
            memory = memory.commit(k, v)
    return shares


def test_what_is_far_outgrows_what_is_near_unless_its_mass_is_held() -> None:
    kept, capped = far_share(Keep(), 400), far_share(MassCap(frames=15), 400)
    assert kept[-1] > 0.85 > 2 * kept[3], "a sum grows for ever, and what is near is forgotten"
    assert abs(sum(capped[-100:]) - sum(capped[100:200])) < 1 and max(capped) < 0.25
    torch.testing.assert_close(torch.tensor(capped[:4]), torch.tensor(kept[:4]))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a sum under a denominator that it shares, not Delta"):
        shape_of(NearSpan(current=2, overlap=1), rule=Delta())
    memory = SpanMemory.empty(shape_of(NearSpan(current=2, overlap=1)))
    q, k, v = drawn(3)
    with pytest.raises(ValueError, match="3 latent frames exceed the 2 that are answered together"):
        memory.attend(q, k, v)
    for wrong in (k[:, :3], k[:, :0]):
        with pytest.raises(ValueError, match="no whole number of latent frames of 2"):
            memory.commit(wrong, wrong)
    with pytest.raises(ValueError, match="no whole number of latent frames of 2"):
        attended(memory, k[:, :3], k[:, :3], v[:, :3])
