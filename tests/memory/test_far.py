"""What leaves the window enters the far state, once, and is answered for from there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from torch import Tensor

from longtake import parallel
from longtake.attention import reference
from longtake.attention.block_sparse import block_sparse
from longtake.attention.linear import WIDTHS, Features
from longtake.attention.rope import Grid, RotaryAxes, Rotation, rotate
from longtake.distillation.rollout import rollout
from longtake.generation.blockwise import blockwise, commit
from longtake.memory import far
from longtake.memory.far import Decay, Delta, FarShape, FarState, Keep, MassCap, Rule, SinkInFar, stacked
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.memory.view import Tokens
from longtake.memory.window import Keys, WindowShape
from longtake.models.features import OwnMaps
from longtake.models.wan import WanTransformer, with_far_maps

BLOCK = tiny.BLOCK
GRID = Grid(RotaryAxes(split=(4, 2, 2)), rows=1, columns=2)
RATIOS = pytest.mark.parametrize("ratio", WIDTHS)
RULES: list[Rule] = [Keep(), Decay(half_life=6), MassCap(frames=9), Delta(half_life=12)]


def memory_of(sink: int, past: int, shape: FarShape | None = None, extent: int = 21, ring: bool = True) -> StreamMemory:
    window = WindowShape(sink=sink, past=past)
    return StreamMemory(MemoryShape(window=window, extent=extent, far=shape or FarShape()), 1, ring=ring)


def frames_of(count: int, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Whole numbers, whose sums in float32 are exact."""
    size = (2, batch, count * GRID.rows * GRID.columns, 3, 8)
    k, v = torch.randint(-9, 10, size, generator=torch.Generator().manual_seed(seed)).float()
    return k, v


def state_after(rule: Rule, blocks: Sequence[tuple[Tensor, Tensor]], ratio: float = 1) -> FarState:
    state = FarState(FarShape(form=WIDTHS[ratio], rule=rule))
    for i, (k, v) in enumerate(blocks):
        numbers = tuple(range(BLOCK * i, BLOCK * (i + 1)))
        state = state.absorb(Keys(k, v, numbers), GRID.rotation(numbers, "cpu"))
    return state


def assert_same_sums(one: FarState, other: FarState) -> None:
    assert one.sums is not None and other.sums is not None
    for got, want in zip(one.sums, other.sums, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@given(
    sink=st.integers(0, 4),
    past=st.integers(0, 5),
    count=st.integers(1, 4),
    blocks=st.integers(1, 8),
    ring=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_every_committed_token_is_in_exactly_one_place(sink: int, past: int, count: int, blocks: int, ring: bool):
    memory = memory_of(sink, past, ring=ring)
    committed = [frames_of(count, seed=i) for i in range(blocks)]
    for k, v in committed:
        memory.commit([(k, v)], count, GRID)
    held, sums = memory.held(0), memory.far(0).sums
    near_mass, near_k = (held.k_BTND.shape[1], held.k_BTND.relu().sum(1)) if held else (0, 0)
    far_mass, far_k = (sums.mass_B, sums.k_BNR) if sums else (torch.zeros(2), 0)
    assert (far_mass + near_mass).tolist() == [GRID.columns * count * blocks] * 2
    torch.testing.assert_close(near_k + far_k, torch.cat([k for k, _ in committed], 1).relu().sum(1), atol=0, rtol=0)
    memory.audit()


def test_published_positions_hold_for_ever_and_none_passes_the_extent() -> None:
    """Spec 1.1: a block that began at frame `a` is absorbed at min(a, 12), whatever comes later."""
    memory, expected, far_block = memory_of(3, 3), torch.zeros(2, 3, 8, 8), frames_of(BLOCK, seed=0)
    for b in range(20):
        now = frames_of(BLOCK, seed=b)
        memory.commit([now], BLOCK, GRID)
        if b >= 2:  # block b - 1 has left; block 0 is the sink
            a = BLOCK * (b - 1)
            k, v = far_block
            rotation = GRID.rotation(range(min(a, 12), min(a, 12) + BLOCK), "cpu")
            expected = expected + torch.einsum("btnr,btnd->bnrd", rotate(k.relu(), rotation), v)
            torch.testing.assert_close(memory.far(0).sums.kv_BNRD, expected, atol=1e-2, rtol=1e-5)
        far_block = now


@pytest.mark.parametrize("sink, mass", [(SinkInFar.NEVER, 3), (SinkInFar.AS_WELL, 6), (SinkInFar.ROTATED_TWICE, 6)])
def test_the_sink_is_absorbed_only_where_a_published_form_does(sink: SinkInFar, mass: int) -> None:
    memory = memory_of(3, 3, FarShape(sink=sink))
    for b in range(3):
        memory.commit([frames_of(BLOCK, seed=b)], BLOCK, GRID)
    assert memory.far(0).sums.mass_B.tolist() == [mass * GRID.columns] * 2


@RATIOS
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_every_rule_keeps_rows_apart_and_its_size(rule: Rule, ratio: float) -> None:
    blocks = [frames_of(BLOCK, seed=i) for i in range(5)]
    together = state_after(rule, blocks, ratio)
    rows = [state_after(rule, [(k[i : i + 1], v[i : i + 1]) for k, v in blocks], ratio) for i in range(2)]
    assert_same_sums(stacked(rows), together)
    q, rotation = frames_of(BLOCK, seed=9)[0], GRID.rotation(range(15, 18), "cpu")
    read = together.read(q, rotation)
    assert read.isfinite().all() and read.shape == q.shape
    for i, row in enumerate(rows):
        torch.testing.assert_close(row.read(q[i : i + 1], rotation), read[i : i + 1], atol=1e-4, rtol=1e-4)
    features = int(8 * ratio)
    assert together.nbytes() == state_after(rule, blocks[:1], ratio).nbytes() == 2 * (3 * features * (8 + 1) * 4 + 8)


@RATIOS
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_features_that_do_not_turn_with_frames_answer_alike_however_late(rule: Rule, ratio: float) -> None:
    k, v = frames_of(BLOCK)

    def answers(turns_with_frames: bool) -> Tensor:
        far_shape = FarShape(form=WIDTHS[ratio], rule=rule, turns_with_frames=turns_with_frames)
        first, *later = (far_shape.rotation(GRID, range(at, at + BLOCK), "cpu") for at in (12, 12, 18))
        state = FarState(far_shape).absorb(Keys(k, v, (0, 1, 2)), first)
        return torch.stack([state.read(k, rotation) for rotation in later])

    one, other = answers(turns_with_frames=False)
    assert torch.equal(one, other)
    one, other = answers(turns_with_frames=True)
    assert not torch.allclose(one, other, atol=1e-2, rtol=1e-2)


def test_rows_that_hold_nothing_stack_with_rows_that_do() -> None:
    k, v = frames_of(BLOCK, batch=1)
    full, empty = state_after(Keep(), [(k, v)]), FarState(FarShape())
    assert stacked([full, empty]).present_B.tolist() == [True, False]
    assert stacked([empty, empty]).sums is None


def share_of_newest(rule: Rule, blocks: int) -> float:
    """How much of the state's mass the last block has."""
    state = state_after(rule, [frames_of(BLOCK)] * blocks)
    return BLOCK * GRID.columns / state.sums.mass_B[0].item()


def test_without_forgetting_the_share_of_a_block_falls_and_with_it_the_share_holds() -> None:
    assert share_of_newest(Keep(), 40) == pytest.approx(1 / 40)
    assert share_of_newest(Decay(half_life=BLOCK), 40) == pytest.approx(1 / 2)
    assert share_of_newest(MassCap(frames=4 * BLOCK), 40) == pytest.approx(1 / 4)


def test_a_cap_changes_nothing_until_it_is_reached() -> None:
    blocks = [frames_of(BLOCK, seed=i) for i in range(4)]
    assert_same_sums(state_after(MassCap(frames=4 * BLOCK), blocks), state_after(Keep(), blocks))
    capped = state_after(MassCap(frames=1), blocks)  # no room for even one block: only the newest stays
    assert capped.sums.mass_B.tolist() == [BLOCK * GRID.columns] * 2


@pytest.mark.parametrize("rule", [Decay(half_life=2 * BLOCK), Delta(half_life=2 * BLOCK)], ids=["Decay", "Delta"])
def test_after_a_half_life_what_was_held_weighs_half(rule: Rule) -> None:
    state = before = state_after(rule, [frames_of(BLOCK)])
    nothing = torch.zeros_like(frames_of(BLOCK)[0])
    for first in (BLOCK, 2 * BLOCK):
        numbers = tuple(range(first, first + BLOCK))
        state = state.absorb(Keys(nothing, nothing, numbers), GRID.rotation(numbers, "cpu"))
    torch.testing.assert_close(state.sums.kv_BNRD, before.sums.kv_BNRD / 2)
    torch.testing.assert_close(state.sums.k_BNR, before.sums.k_BNR / 2)


@pytest.mark.parametrize("rule", [*RULES, MassCap(frames=1)], ids=repr)  # the last has no room for anything old
def test_a_faded_state_keeps_its_share_and_one_that_forgot_all_begins_anew(rule: Rule) -> None:
    blocks = [frames_of(BLOCK, seed=i) for i in range(2)]
    state = state_after(rule, blocks)
    assert_same_sums(state.fade(1), state)
    torch.testing.assert_close(state.fade(0.25).sums.mass_B, state.sums.mass_B / 4)
    forgot = state.fade(0)
    assert not forgot.present_B.any()
    assert not forgot.read(blocks[0][0], GRID.rotation(range(3), "cpu")).any()
    keys = Keys(*blocks[1], (3, 4, 5))
    rotation = GRID.rotation((3, 4, 5), "cpu")
    assert_same_sums(forgot.absorb(keys, rotation), FarState(FarShape(rule=rule)).absorb(keys, rotation))


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_only_a_share_can_be_kept(share: float) -> None:
    with pytest.raises(ValueError, match="share of 0 to 1"):
        FarState(FarShape()).fade(share)


def test_a_forked_memory_goes_its_own_way() -> None:
    memory = memory_of(3, 3)
    for b in range(3):
        memory.commit([frames_of(BLOCK, seed=b)], BLOCK, GRID)
    twin, before = memory.fork(), memory.far(0).sums.mass_B.clone()
    memory.commit([frames_of(BLOCK, seed=3)], BLOCK, GRID)
    memory.fade_far(0)
    assert torch.equal(twin.far(0).sums.mass_B, before)


def test_what_is_missing_is_said() -> None:
    memory = memory_of(3, 3)
    with pytest.raises(ValueError, match="grid of their tokens"):
        memory.commit([frames_of(BLOCK)], BLOCK)
    with pytest.raises(ValueError, match="1 layers have a far state, but 0 a projection"):
        memory.view(GRID, BLOCK, "cpu")
    with pytest.raises(ValueError, match=r"\+ leaving 3 = 12 latent frames do not fit the extent of 11"):
        memory_of(3, 3, extent=11).shape.require_fit(block=3, trained_extent=21)


# Through the network. What follows reads what is absorbed above.


def network(seed: int = 0) -> WanTransformer:
    """One whose projections are not zero, as if trained."""
    made = tiny.network(seed=seed, reads_far=True)
    for block in made.layers:
        torch.nn.init.normal_(block.self_attn.linear_proj.weight)
        torch.nn.init.normal_(block.self_attn.linear_proj.bias)
    return made


def shape_of(made: WanTransformer, far_shape: FarShape | None, past: int = 3) -> MemoryShape:
    window = WindowShape(sink=3, past=past)
    return MemoryShape(window=window, extent=made.config.extent, far=far_shape, maps=made.far_maps)


@dataclass(frozen=True)
class EverythingView:
    """A block in front of all that was ever committed, by the definitions: near by softmax, far by a sum."""

    network: WanTransformer
    layers: list[list[Keys]]
    current: range
    grid: Grid
    past: int
    far: FarShape

    @property
    def rotation(self) -> Rotation:
        return self.grid.rotation([f - self._back for f in self.current], "cpu")

    @property
    def _back(self) -> int:
        return max(0, self.current[-1] + 1 - self.network.config.extent)

    def attend(self, layer: int, own: Tokens) -> Tensor:
        window, gone = [(own.k, own.v)], []
        for keys in self.layers[layer]:
            first = keys.frames[0]
            back = 0 if first < 3 else self._back
            if first < 3 or first >= self.current[0] - self.past:
                place = [f - back for f in keys.frames]
                window.append((rotate(keys.k_BTND, self.grid.rotation(place, "cpu")), keys.v_BTND))
            else:
                first = min(first, self.network.config.extent - self.past - 2 * BLOCK)
                gone.append((keys, self._far_rotation(range(first, first + BLOCK))))
        k, v = (torch.cat(parts, 1) for parts in zip(*window, strict=True))
        near = reference.dense(own.q, k, v)
        if not gone:
            return near
        form = self.far.form
        maps = self.network.layers[layer].self_attn.far_maps
        added = (maps.queries, maps.keys) if maps else (0, 0)
        asked = form.of_queries(
            each_head_mapped(own.plain_q, added[0]), self._far_rotation([f - self._back for f in self.current])
        )
        features = [form.of_keys(each_head_mapped(keys.k_BTND, added[1]), rotation) for keys, rotation in gone]
        absorbed = Features(*(torch.cat(parts, 1) for parts in zip(*features, strict=True)))
        values = torch.cat([keys.v_BTND for keys, _ in gone], 1).float()
        read = reference.linear(asked.above, asked.below, absorbed.above, absorbed.below, values)
        return near + self.network.layers[layer].self_attn.linear_proj(read.double())

    def _far_rotation(self, positions: Sequence[int]) -> Rotation:
        rotation = self.grid.rotation(positions, "cpu")
        return rotation if self.far.turns_with_frames else without_frames(rotation, self.grid)


def each_head_mapped(x_BTND: Tensor, added: Tensor | int) -> Tensor:
    """x + x A of each head."""
    if isinstance(added, int):
        return x_BTND
    return torch.stack([x + x @ own for x, own in zip(x_BTND.unbind(2), added, strict=True)], dim=2)


def without_frames(rotation: Rotation, grid: Grid) -> Rotation:
    """Rows and columns turn, the pairs of the frame's axis do not."""
    of_frame = torch.arange(rotation.cos_TA.shape[1]) < grid.axes.split[0] // 2
    return Rotation(rotation.cos_TA.masked_fill(of_frame, 1), rotation.sin_TA.masked_fill(of_frame, 0))


@pytest.mark.parametrize("turns", [True, False], ids=["all", "space"])
@pytest.mark.parametrize(
    "past, ring, ratio, maps",
    [
        (3, True, 1, False), (6, False, 1, False), (0, True, 1, False), (3, True, 0.5, False), (3, False, 2, False),
        (0, True, 4, False), (3, True, 1, True), (0, False, 2, True),
    ],
)  # fmt: skip
@torch.no_grad()
def test_streaming_equals_seeing_everything_again(past: int, ring: bool, ratio: float, maps: bool, turns: bool) -> None:
    """A window and a state of fixed size answer as the definitions do with all of the stream at hand, B = 2."""
    made, far_shape = network(), FarShape(form=WIDTHS[ratio], turns_with_frames=turns)
    made = tiny.with_drawn_maps(made) if maps else made
    memory = StreamMemory(shape_of(made, far_shape, past), made.config.layers, ring=ring)
    prompts, level = tiny.prompt(made, batch=2), torch.full((2, BLOCK), 0.7, dtype=torch.float64)
    everything: list[list[Keys]] = [[] for _ in made.layers]
    for b in range(9):
        noisy, clean = tiny.noise(5, 6)(b, 0), tiny.noise(7, 8)(b, 0)
        current = range(memory.frames, memory.frames + BLOCK)
        slow = EverythingView(made, everything, current, made.grid(noisy), past, far_shape)
        got = made(noisy, level, prompts, made.memory_view(memory, noisy))
        torch.testing.assert_close(got, made(noisy, level, prompts, slow), atol=1e-5, rtol=1e-5)
        for layer, (k, v) in enumerate(made.keys_to_commit(clean, 0 * level, prompts, slow)):
            everything[layer].append(Keys(k, v, tuple(current)))
        commit(made, memory, clean, prompts)
    assert memory.far(0).sums.mass_B[0] == sum(len(k.frames) for k in everything[0]) * 6 - (3 + past) * 6


@torch.no_grad()
def test_projections_at_zero_or_no_far_state_are_the_plain_window() -> None:
    made = tiny.network(reads_far=True)
    plain = tiny.network()
    plain.load_state_dict({n: p for n, p in made.state_dict().items() if ".linear_proj." not in n})

    def video(model: WanTransformer, shape: FarShape | None) -> Tensor:
        memory = StreamMemory(shape_of(model, shape), model.config.layers, ring=True)
        prompt = tiny.prompt(model)
        blocks = blockwise(model, memory, lambda block: prompt, tiny.noise(3), tiny.LEVELS)
        return torch.cat(list(islice(blocks, 6)), dim=1)

    expected = video(plain, None)
    assert torch.equal(video(made, None), expected) and torch.equal(video(made, far.PAPER), expected)


@torch.no_grad()
def test_maps_begin_as_if_there_were_none() -> None:
    """But for the order in which float32 sums are rounded; once they are others, streams are until something is far."""
    made = network()
    q = torch.randn(2, 6, 2, 12).double()
    assert all(torch.equal(of(q), q) for of in (OwnMaps(2, 12).double().of_keys, OwnMaps(2, 12).double().of_queries))

    def video(model: WanTransformer) -> Tensor:
        memory = StreamMemory(shape_of(model, far.PAPER), model.config.layers, ring=True)
        prompt = tiny.prompt(model)
        return torch.cat(list(blockwise(model, memory, lambda _: prompt, tiny.noise(3), tiny.LEVELS, end=5)), dim=1)

    plain, begun, learned = map(video, (made, with_far_maps(made), tiny.with_drawn_maps(made)))
    torch.testing.assert_close(begun, plain, atol=1e-5, rtol=0)
    near = slice(0, 3 * BLOCK)
    assert torch.equal(learned[:, near], plain[:, near]) and not torch.allclose(learned, plain, atol=1e-2)


@RATIOS
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@torch.no_grad()
def test_maps_are_passed_before_all_else_and_by_nothing_else(rule: Rule, ratio: float) -> None:
    """Absorbing and asking through maps is to absorb and to ask what they make, faded in between or not."""
    maps, far_shape = OwnMaps(3, 8), FarShape(form=WIDTHS[ratio], rule=rule)
    for parameter in maps.parameters():
        torch.nn.init.normal_(parameter)
    plain, mapped = FarState(far_shape), FarState(replace(far_shape, maps=maps))
    for i, (k, v) in enumerate(frames_of(BLOCK, seed=seed) for seed in range(3)):
        numbers = tuple(range(BLOCK * i, BLOCK * (i + 1)))
        rotation = GRID.rotation(numbers, "cpu")
        plain = plain.fade(0.5).absorb(Keys(each_head_mapped(k, maps.keys), v, numbers), rotation)
        mapped = mapped.fade(0.5).absorb(Keys(k, v, numbers), rotation)
    assert_same_sums(mapped, plain)
    q = frames_of(BLOCK, seed=9)[0]
    read, expected = mapped.read(q, rotation), plain.read(each_head_mapped(q, maps.queries), rotation)
    torch.testing.assert_close(read, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_the_far_past_is_seen() -> None:
    """Two streams that differ only in a block that has left the window go on differently, and alike once it is cut."""
    made, prompts = network(), tiny.prompt(tiny.network(reads_far=True))
    memories = []
    for second in (20, 21):
        memory = StreamMemory(shape_of(made, far.PAPER), made.config.layers, ring=True)
        keys = [
            [(torch.randn(1, 18, 2, 12, generator=g).double(),) * 2 for _ in range(3)]
            for g in (torch.Generator().manual_seed(seed) for seed in (1, second, 2))
        ]
        for block in keys:
            memory.commit(block, BLOCK, made.grid(tiny.noise(1)(0, 0)))
        memories.append(memory)
    noisy, level = tiny.noise(4)(0, 0), torch.ones(1, BLOCK)
    one, other = (made(noisy, level, prompts, made.memory_view(memory, noisy)) for memory in memories)
    assert not torch.allclose(one, other)
    for memory in memories:
        memory.fade_far(0)
    one, other = (made(noisy, level, prompts, made.memory_view(memory, noisy)) for memory in memories)
    assert torch.equal(one, other)


def rolled(made: WanTransformer, learning: int) -> Tensor:
    """Near, a third of the key blocks."""
    keys = made.prompt_keys(tiny.text())
    near = partial(block_sparse, share=0.34, block_q=6, block_k=6)
    noise, shape = tiny.noise(7), replace(shape_of(made, far.PAPER), near=near)
    return rollout(blockwise, made, shape, lambda _: keys, noise, tiny.LEVELS, blocks=6, learning=learning)


@pytest.mark.parametrize("zero", [True, False])
def test_projections_learn_from_the_start_and_checkpointing_changes_no_gradient(zero: bool) -> None:
    plain, made = ((tiny.network(reads_far=True) if zero else tiny.with_drawn_maps(network())) for _ in range(2))
    parallel.checkpoint_layers(made.blocks, ("before_attention", "after_attention"))
    for model in (plain, made):
        rolled(model, learning=3).square().mean().backward()
    gradients = dict(made.named_parameters())
    for name, parameter in plain.named_parameters():
        if name.endswith("far_maps.keys"):
            assert parameter.grad is None, "what is absorbed in a rollout is cut from its graph"
            continue
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=0, atol=0, msg=name)
        assert not name.endswith(("linear_proj.weight", "far_maps.queries")) or parameter.grad.any(), name


def test_no_gradient_passes_through_the_far_state() -> None:
    """The last block's loss is a function of the parameters through its own pass alone: earlier blocks are given."""
    made = tiny.with_drawn_maps(network())
    last = rolled(made, learning=1)
    whole = rolled(made, learning=6)[:, -BLOCK:]
    for one, other in zip(
        torch.autograd.grad(last.square().mean(), made.parameters(), allow_unused=True),
        torch.autograd.grad(whole.square().mean(), made.parameters(), allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_presets_are_the_published_ones() -> None:
    k = torch.tensor([-1.0, 1.0])
    maps = [(preset.form.keys(k).tolist(), preset.form.queries(k).tolist(), preset.sink) for preset in PRESETS]
    assert maps == [
        ([0, 1], [0, 1], SinkInFar.NEVER),
        ([-1, 1], [0, 1], SinkInFar.AS_WELL),
        ([-1, 1], [-1, 1], SinkInFar.ROTATED_TWICE),
    ]
    assert all(preset.rule == Keep() and preset.turns_with_frames for preset in PRESETS)
    assert replace(far.PAPER, rule=MassCap(frames=21)) == FarShape(rule=MassCap(frames=21))


PRESETS = (far.PAPER, far.REF_TRAIN, far.REF_INFER)
