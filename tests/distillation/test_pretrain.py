import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from tests import returning, tiny
from torch.distributions import Normal, kl_divergence

from longtake import parallel
from longtake.attention.block_sparse import block_sparse
from longtake.attention.linear import WIDTHS
from longtake.distillation import pretrain
from longtake.distillation.pretrain import (
    Clips,
    codec_loss,
    flow_loss,
    forced_by_block,
    forced_in_one_pass,
    teacher_forcing_loss,
)
from longtake.distillation.rollout import steps_in_windows
from longtake.flow import clean_from_velocity
from longtake.generation.blockwise import commit
from longtake.generation.rolling import InFlight, calls
from longtake.memory.far import Delta, FarShape, SinkInFar
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.memory.window import WindowShape
from longtake.models.features import Conversion
from longtake.models.light_codec import Reconstruction
from longtake.models.wan import converted, with_far_maps
from longtake.recipes import hybrid_forcing, rehyat, rolling_forcing, self_forcing_sink

SHAPE = MemoryShape(window=WindowShape(sink=3, past=3), extent=15)
HYBRID = replace(SHAPE, far=FarShape(), near=partial(block_sparse, share=0.4, block_q=6, block_k=6))


def clips(batch: int = 2, frames: int = 6) -> Clips:
    torch.manual_seed(1)
    size = (batch, frames, *tiny.LATENTS[1:])
    return Clips(
        torch.randn(size, dtype=torch.float64),
        tiny.text(batch, prompts=2),
        torch.zeros(batch, frames, dtype=torch.long),
        torch.zeros(batch, frames, *size[3:], dtype=torch.float64),
    )


def by_windows(made, given: Clips, offset: int, **more) -> torch.Tensor:
    """The loss of clips by windows, under the memory of a stream that rolls."""
    settings = {"block": tiny.BLOCK, "memory": tiny.rolling_recipe().memory(made), "levels": tiny.LEVELS}
    return teacher_forcing_loss(made, given, 3.0, 5.0, offset=offset, **settings, **more)


def perfect(made, given: Clips):
    """A network that knows the clean clip and answers with the true velocity."""

    def forward(noisy, level, prompts, view, prompt_BF):
        copies = noisy.shape[1] // given.latents_BFCHW.shape[1]
        clean = given.latents_BFCHW.repeat(1, copies, 1, 1, 1)
        return (noisy - clean) / level[:, :, None, None, None].clamp_min(1e-9)

    made.forward = forward
    return made


def test_the_true_velocity_has_no_loss() -> None:
    given = clips()
    assert flow_loss(perfect(tiny.network(), given), given, 3.0, 5.0) < 1e-4
    loss = teacher_forcing_loss(perfect(tiny.network(), given), given, 3.0, 5.0, block=3, memory=SHAPE)
    assert loss < 1e-4
    for offset in range(len(tiny.LEVELS)):
        assert by_windows(perfect(tiny.network(), given), given, offset) < 1e-4


@pytest.mark.parametrize("offset", [None, 0, 2])
def test_staying_costs_nothing_as_long_as_one_stays(offset: int | None) -> None:
    anchor, given = tiny.network(), clips()
    memory = SHAPE if offset is None else tiny.rolling_recipe().memory(anchor)
    windows = {"offset": offset, "levels": tiny.LEVELS}
    stay = partial(
        teacher_forcing_loss, clips=given, shift=3.0, focus_weight=5.0, block=3, memory=memory, anchor=anchor, **windows
    )
    network = copy.deepcopy(anchor)
    loss = stay(network)
    loss.backward()
    assert loss < 1e-12 and all(p.grad is None or p.grad.abs().max() < 1e-6 for p in network.parameters())
    with torch.no_grad():
        network.head.head.bias += 0.1
    stay(network).backward()
    assert network.head.head.bias.grad.abs().max() > 1e-3
    assert all(p.grad is None for p in anchor.parameters())


def test_an_anchor_sees_all_of_its_window() -> None:
    network, given = tiny.network(reads_far=True), clips()
    stay = partial(teacher_forcing_loss, network, given, 3.0, 5.0, block=3, anchor=copy.deepcopy(network))
    assert stay(memory=replace(HYBRID, near=MemoryShape.near)) < 1e-12
    assert stay(memory=HYBRID) > 1e-6, "that of the network, which sees two fifths"


def test_an_anchor_attends_exactly_where_layers_are_converted() -> None:
    """In clips and in streams: it is the network before its conversion, and its features count for nothing."""
    plain, given = tiny.network(extent=15), clips(frames=12)
    made = converted(plain, Conversion(layers=(0, 2)))

    def clip(network, anchor, recipe) -> float:
        return flow_loss(network, given, 3.0, 5.0, anchor).item()

    def stream(network, anchor, recipe) -> float:
        memory = recipe.memory(network)
        return teacher_forcing_loss(network, given, 3.0, 5.0, block=3, memory=memory, anchor=anchor).item()

    for way in (clip, stream):
        costs = []
        for anchor in (plain, made):
            torch.manual_seed(2)
            costs.append(way(made, anchor, rehyat()))
        assert costs[0] == costs[1] > 1e-6
        assert way(plain, made, self_forcing_sink()) < 1e-12


def test_a_guided_anchor_is_that_of_sampling() -> None:
    """Errors with a prompt and without are weighed as guidance weighs them; under guidance 1 the prompt's is all."""
    anchor, given = tiny.network(extent=15), clips(frames=12)
    network, nothing_BPLE = tiny.network(extent=15, seed=5), tiny.text(2, seed=9)

    def cost(clips: Clips = given, **more) -> float:
        torch.manual_seed(2)
        return flow_loss(network, clips, 3.0, 5.0, anchor, **more).item()

    assert cost(nothing_BPLE=nothing_BPLE, guidance=1.0) == pytest.approx(cost(), rel=1e-5)
    same = replace(given, text_BPLE=nothing_BPLE.expand_as(given.text_BPLE))
    assert flow_loss(anchor, same, 3.0, 5.0, anchor, nothing_BPLE, 3.0) < 1e-12
    # The velocity is u + w (c - u), a line in w; so a squared error is a parabola, which three of its points tell.
    at = {weight: cost(nothing_BPLE=nothing_BPLE, guidance=weight) for weight in (0.0, 1.0, 2.0, 3.0)}
    assert at[0.0] == pytest.approx(cost(same), rel=1e-5) and at[0.0] != pytest.approx(at[1.0], rel=1e-3)
    assert at[3.0] == pytest.approx(at[0.0] - 3 * at[1.0] + 3 * at[2.0], rel=1e-4)


def test_chosen_levels_are_the_only_ones() -> None:
    seen = []

    def forward(noisy, level, prompts, view, prompt_BF):
        seen.append(level[:, 6:])
        return noisy

    made = tiny.network()
    made.forward = forward
    for levels in ((1.0, 0.9), (0.5,), ()):
        teacher_forcing_loss(made, clips(batch=32), 3.0, 0.0, block=3, memory=SHAPE, levels=levels)
    assert seen[0].unique().tolist() == pytest.approx([0.9, 1.0]) and (seen[1] == 0.5).all()
    assert seen[2].unique().numel() == 64, "one a block, from anywhere"


def test_a_clean_past_carries_a_little_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given, seen = clips(batch=32), []

    def forced(network, past, noisy, level_BF, *rest):
        seen.append((past, noisy))
        return 0 * noisy

    monkeypatch.setattr(pretrain, "forced_in_one_pass", forced)
    teacher_forcing_loss(tiny.network(), given, 3.0, 0.0, block=3, memory=SHAPE, levels=(1.0,))
    ((past, noise),) = seen  # at level 1 there is nothing else
    carried = past - given.latents_BFCHW
    assert carried.std() == pytest.approx(pretrain.CONTEXT_NOISE, rel=0.05)
    assert (carried * noise).mean().abs() < 0.05 * pretrain.CONTEXT_NOISE


def test_every_parameter_learns_from_both_losses() -> None:
    for loss_of in (
        lambda made: flow_loss(made, clips(), 3.0, 5.0),
        lambda made: teacher_forcing_loss(made, clips(), 3.0, 5.0, block=3, memory=SHAPE),
        lambda made: by_windows(made, clips(), offset=1),
    ):
        made = tiny.network()
        loss_of(made).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters())


def forced(
    by, made, shape: MemoryShape, frames: int, together: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """The velocities of two clips with a change of prompt, a sum of them, and what every parameter learns from it."""
    dice = torch.Generator().manual_seed(4)
    size = (2, frames, *tiny.LATENTS[1:])
    past, noisy, asked = (torch.randn(size, generator=dice, dtype=torch.float64) for _ in range(3))
    level_BF = torch.rand(2, frames // 3, generator=dice, dtype=torch.float64).repeat_interleave(3, dim=1)
    prompts = made.prompt_keys(tiny.text(2, prompts=2))
    prompt_BF = (torch.arange(frames) > torch.tensor([[4], [7]])).long()
    velocity = by(made, past, noisy, level_BF, prompts, prompt_BF, 3, shape, together)
    made.zero_grad()
    (velocity * asked).sum().backward()
    learned = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    return velocity.detach(), (velocity * asked).sum().detach(), learned


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("far", [None, FarShape(), FarShape(rule=Delta(half_life=9), turns_with_frames=False)])
@pytest.mark.parametrize("sink, past, extent, frames", [(3, 3, 12, 18), (0, 6, 12, 18), (3, 9, 18, 27), (6, 0, 12, 15)])
def test_teacher_forcing_in_one_pass_is_a_walk_through_the_memory_that_serves(
    sink: int, past: int, extent: int, frames: int, far: FarShape | None, sparse: bool
) -> None:
    made = tiny.network(extent=extent, reads_far=far is not None)
    for projection in made.projections:
        torch.nn.init.normal_(projection.weight)
    near = HYBRID.near if sparse else SHAPE.near
    shape = MemoryShape(window=WindowShape(sink=sink, past=past), extent=extent, far=far, near=near)
    at_once, _, learned_at_once = forced(forced_in_one_pass, made, shape, frames)
    walked, _, learned = forced(forced_by_block, made, shape, frames)
    torch.testing.assert_close(at_once, walked)
    assert learned.keys() == learned_at_once.keys() == dict(made.named_parameters()).keys()
    for name, gradient in learned.items():  # norms of queries and keys are in float32, whose rounding hangs on the CPU
        close = {"rtol": 1e-5, "atol": 1e-5 * max(1.0, gradient.abs().max().item())}
        torch.testing.assert_close(gradient, learned_at_once[name], msg=name, **close)


@pytest.mark.parametrize("rule", [FarShape(), FarShape(form=WIDTHS[2], rule=Delta(), turns_with_frames=False)])
def test_maps_of_a_far_state_learn_alike_in_one_pass_and_by_block(rule: FarShape) -> None:
    made = tiny.network(reads_far=True)
    for projection in made.projections:
        torch.nn.init.normal_(projection.weight)
    made = tiny.with_drawn_maps(made)
    shape = made.with_own_far(replace(SHAPE, far=rule))
    at_once, _, learned_at_once = forced(forced_in_one_pass, made, shape, 18)
    walked, _, learned = forced(forced_by_block, made, shape, 18)
    torch.testing.assert_close(at_once, walked)
    assert not torch.allclose(walked, forced(forced_by_block, made, replace(shape, maps={}), 18)[0])
    for name, gradient in learned.items():
        assert (gradient - learned_at_once[name]).norm() < 1e-5 * gradient.norm(), name
        assert ".far_maps." not in name or all(head.abs().max() > 0 for head in gradient), name
    assert sum(".far_maps." in name for name in learned) == 2 * made.config.layers


def test_maps_learn_before_they_are_other_than_nothing() -> None:
    """Not before projections are: what is read from far then counts for nothing."""
    made = with_far_maps(tiny.network(reads_far=True))
    for projection in made.projections:
        torch.nn.init.normal_(projection.weight)
    *_, learned = forced(forced_in_one_pass, made, made.with_own_far(replace(SHAPE, far=FarShape())), 12)
    assert all(gradient.abs().max() > 0 for name, gradient in learned.items() if ".far_maps." in name)


def test_an_anchor_answers_through_maps_of_its_own() -> None:
    """Whichever network's maps the memory was made with."""
    anchor = tiny.network(reads_far=True)
    for projection in anchor.projections:
        torch.nn.init.normal_(projection.weight)
    anchor, recipe, given = tiny.with_drawn_maps(anchor), hybrid_forcing(share=1), clips(frames=12)
    network = copy.deepcopy(anchor)
    with torch.no_grad():
        for maps in network.far_maps.values():
            maps.keys += 1
    costs = []
    for one in (network, anchor):
        torch.manual_seed(2)
        memory = recipe.memory(one)
        costs.append(teacher_forcing_loss(network, given, 3.0, 5.0, block=3, memory=memory, anchor=anchor).item())
    assert costs[0] == costs[1] > 1e-6
    assert teacher_forcing_loss(anchor, given, 3.0, 5.0, block=3, memory=recipe.memory(network), anchor=anchor) < 1e-12


@pytest.mark.parametrize("rule", [FarShape(), FarShape(rule=Delta(), turns_with_frames=False)])
def test_a_far_state_teaches_projections_at_once_and_then_the_keys_that_entered_it(rule: FarShape) -> None:
    """The fourth of four blocks reads what entered with the second."""
    made, shape = tiny.network(reads_far=True), replace(SHAPE, far=rule)
    *_, learned = forced(forced_by_block, made, shape, 12)
    for projection in ("linear_proj.weight", "linear_proj.bias"):
        assert all(learned[f"blocks.{i}.self_attn.{projection}"].abs().sum() > 0 for i in range(3))
    for projection in made.projections:
        torch.nn.init.normal_(projection.weight)
    *_, learned = forced(forced_by_block, made, shape, 12)
    name, step = "blocks.1.self_attn.k.weight", 1e-2
    weight, gradient = made.get_parameter(name), learned[name]
    along = gradient / gradient.norm()
    asked = []
    for side in (step, -2 * step, step):
        with torch.no_grad():
            weight += side * along
        asked.append(forced(forced_by_block, made, shape, 12)[1])
    torch.testing.assert_close((asked[0] - asked[1]) / (2 * step), gradient.norm(), rtol=1e-2, atol=0)


def test_a_walk_that_computes_passes_again_learns_the_same() -> None:
    plain, again = (tiny.with_drawn_maps(tiny.network()) for _ in range(2))
    for made in (plain, again):
        for projection in made.projections:
            torch.nn.init.constant_(projection.weight, 0.1)
    parallel.checkpoint_layers([again], ("forward", "keys_to_commit"))
    (velocity, _, learned), (same, _, learned_again) = (
        forced(forced_by_block, made, made.with_own_far(HYBRID), 15) for made in (plain, again)
    )
    assert torch.equal(velocity, same) and learned.keys() == learned_again.keys()
    assert all(torch.equal(learned[name], learned_again[name]) for name in learned)


def test_only_how_cells_compare_changes_what_they_count() -> None:
    given = clips()

    def loss(focus: torch.Tensor, weight: float) -> torch.Tensor:
        made = tiny.network()
        made.forward = lambda noisy, *rest: torch.zeros_like(noisy)
        torch.manual_seed(5)
        focused = Clips(given.latents_BFCHW, given.text_BPLE, given.prompt_BF, focus.expand_as(given.focus_BFHW))
        return flow_loss(made, focused, 3.0, weight)

    nowhere, everywhere = torch.zeros(()), torch.ones(())
    early = (torch.arange(given.focus_BFHW.shape[1]) < 2).float()[:, None, None]
    even = loss(nowhere, 5.0)
    torch.testing.assert_close(loss(everywhere, 5.0), even)
    torch.testing.assert_close(loss(early, 0.0), even)
    early_alone, late_alone, share = loss(early, 1e9), loss(1 - early, 1e9), early.mean()
    assert not torch.isclose(early_alone, late_alone)
    expected = (6 * share * early_alone + (1 - share) * late_alone) / (6 * share + 1 - share)
    torch.testing.assert_close(loss(early, 5.0), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss(-early, 5.0), late_alone, rtol=1e-4, atol=0)  # below 0: not at all
    assert loss(-everywhere, 5.0) == 0, "nothing counts"
    first = torch.zeros(given.focus_BFHW.shape)
    first[0] = 1.0
    torch.testing.assert_close(loss(first, 1e9), even)  # a clip that matters everywhere counts no more than the others


def test_a_perfect_codec_pays_for_its_latents_only() -> None:
    frames, mask = torch.rand(1, 5, 3, 8, 8) * 2 - 1, torch.rand(1, 5, 8, 8)
    latents = torch.ones(1, 2, 4, 1, 1)
    parts = codec_loss(Reconstruction(frames, latents, torch.zeros_like(latents)), frames, mask, kl_weight=0.1)
    torch.testing.assert_close(parts["kl"], torch.tensor(0.5))
    torch.testing.assert_close(parts["loss"], torch.tensor(0.05))


def test_a_codec_pays_for_errors_and_for_how_they_differ_from_their_neighbours() -> None:
    torch.manual_seed(0)
    made, frames = torch.randn(2, 2, 3, 3, 4, 5)
    mask, (mean, log_variance) = torch.rand(2, 3, 4, 5), torch.randn(2, 2, 1, 4, 2, 2).bfloat16()
    error, weight = made - frames, ((1 + 5 * mask) / (1 + 5 * mask).mean()).unsqueeze(2).expand_as(made)

    def differences(dim: int, power: int) -> torch.Tensor:
        """Along a dimension, weighed where the later neighbour is."""
        former, later = (error.narrow(dim, start, error.shape[dim] - 1) for start in (0, 1))
        return (weight.narrow(dim, 1, error.shape[dim] - 1) * (later - former).abs() ** power).mean()

    latents = Normal(mean.float(), (log_variance.float() / 2).exp())
    expected = {
        "l1": (weight * error.abs()).mean(),
        "mse": (weight * error.square()).mean(),
        "edges_l1": differences(3, 1) + differences(4, 1),
        "edges_mse": differences(3, 2) + differences(4, 2),
        "motion_l1": differences(1, 1),
        "kl": kl_divergence(latents, Normal(torch.zeros(()), torch.ones(()))).mean(),
    }
    factors = {"l1": 0.5, "mse": 6, "edges_l1": 0.3, "edges_mse": 3, "motion_l1": 0.2, "kl": 0.1}
    expected["loss"] = torch.stack([factors[name] * part for name, part in expected.items()]).sum()
    torch.testing.assert_close(codec_loss(Reconstruction(made, mean, log_variance), frames, mask, 0.1), expected)


def test_an_error_on_the_subject_costs_six_times_as_much() -> None:
    frames, latents = torch.zeros(1, 1, 3, 8, 8), torch.zeros(1, 1, 4, 1, 1)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    cost = []
    for columns in (slice(0, 4), slice(4, 8)):
        wrong = frames.clone()
        wrong[..., columns] = 0.5
        cost.append(codec_loss(Reconstruction(wrong, latents, latents), frames, mask, 0.0)["mse"])
    torch.testing.assert_close(cost[0] / cost[1], torch.tensor(6.0))


def test_commits_that_leave_the_sink_are_alike_in_one_pass() -> None:
    """Rolling Forcing's, once the window is longer than what fits beside a block."""
    made = tiny.network(extent=15)
    shape = tiny.rolling_recipe().memory(made)
    assert not shape.commits_keep_sink and shape.window.frames + 3 > shape.extent
    (at_once, _, learned_at_once), (walked, _, learned) = (
        forced(by, made, shape, 27) for by in (forced_in_one_pass, forced_by_block)
    )
    torch.testing.assert_close(at_once, walked)
    torch.testing.assert_close(learned_at_once, learned, rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_same_in_one_pass_and_block_by_block() -> None:
    made, seen, losses = tiny.network(reads_far=True), [], []
    forward = made.forward
    made.forward = lambda noisy, *more: seen.append(noisy.shape[1]) or forward(noisy, *more)
    for by_block in (False, True):
        torch.manual_seed(0)
        given = clips(frames=12)
        losses.append(teacher_forcing_loss(made, given, 3.0, 5.0, block=3, memory=HYBRID, by_block=by_block))
    assert seen == [24] + 4 * [3]
    torch.testing.assert_close(*losses)


def test_what_one_pass_cannot_show_is_refused() -> None:
    published = replace(SHAPE, far=FarShape(sink=SinkInFar.AS_WELL))
    with pytest.raises(ValueError, match="block by block"):
        forced(forced_in_one_pass, tiny.network(reads_far=True), published, 12)
    with pytest.raises(ValueError, match="together cannot read a far state"):
        forced(forced_in_one_pass, tiny.network(reads_far=True), HYBRID, 12, together=[2, 2])


def test_a_far_state_learns_to_remember_what_no_window_shows() -> None:
    made, memory = returning.learn("hybrid_forcing:share=1", steps=120, blocks=5, far_lr=2e-2)
    error = returning.errors(made, memory, blocks=5)
    assert error[-1] < 0.75 * error[1], "where it returns it is known, where it first comes it is not"
    unread = returning.errors(made, replace(memory, far=None), blocks=5)
    assert unread[-1] > 0.9 * unread[1]


# windows


OFFSETS = pytest.mark.parametrize("offset", range(len(tiny.LEVELS)))


@OFFSETS
@pytest.mark.parametrize("sink, extent, frames", [(3, 15, 27), (0, 15, 27), (6, 18, 30), (3, 15, 6)])
def test_windows_in_one_pass_are_a_walk_through_the_memory_that_serves(
    offset: int, sink: int, extent: int, frames: int
) -> None:
    made = tiny.network(extent=extent)
    shape = rolling_forcing(sink=sink).with_levels(len(tiny.LEVELS)).memory(made)
    together = [len(steps) for steps in steps_in_windows(frames // tiny.BLOCK, len(tiny.LEVELS), offset)]
    (at_once, _, learned_at_once), (walked, _, learned) = (
        forced(by, made, shape, frames, together) for by in (forced_in_one_pass, forced_by_block)
    )
    torch.testing.assert_close(at_once, walked)
    assert learned.keys() == learned_at_once.keys() == dict(made.named_parameters()).keys()
    torch.testing.assert_close(learned_at_once, learned, rtol=1e-5, atol=1e-5)


@OFFSETS
@pytest.mark.parametrize("blocks", [2, 8])
def test_a_window_is_answered_as_the_stream_answers_after_the_same_finished_blocks(offset: int, blocks: int) -> None:
    """The walk against the schedule that serves, which is given the window's blocks as those in flight."""
    made, levels = tiny.network(), tiny.LEVELS
    shape, prompt = tiny.rolling_recipe().memory(made), tiny.prompt(made)
    windows = steps_in_windows(blocks, len(levels), offset)
    steps = [step for window in windows for step in window]
    past, noisy = ([tiny.noise(seed)(block, 0) for block in range(blocks)] for seed in (1, 2))
    level_BF = torch.tensor([[levels[step] for step in steps]]).repeat_interleave(tiny.BLOCK, dim=1)
    said = torch.zeros(level_BF.shape, dtype=torch.long)
    together = [*map(len, windows)]
    with torch.no_grad():
        velocity = forced_by_block(
            made, torch.cat(past, 1), torch.cat(noisy, 1), level_BF, prompt, said, tiny.BLOCK, shape, together
        )
    answers = clean_from_velocity(torch.cat(noisy, 1), velocity, level_BF).split(tiny.BLOCK, dim=1)
    memory, begins = StreamMemory(shape, made.config.layers, ring=True), 0
    for window in windows:
        with torch.no_grad():
            for block in past[memory.blocks : begins]:
                commit(made, memory, block, prompt)
        numbers = range(begins, begins := begins + len(window))
        flight = [InFlight(b, steps[b], noisy[b], prompt) for b in numbers if steps[b]]  # the schedule adds the newest
        serving = calls(
            made, memory, lambda block: prompt, lambda block, step: noisy[block], levels,
            lambda flight: False, blocks, flight,
        )  # fmt: skip
        call = next(serving)
        assert call.blocks == tuple(numbers) and call.levels == tuple(levels[step] for step in window)
        torch.testing.assert_close(torch.cat(call.clean, 1), torch.cat(answers[numbers.start : numbers.stop], 1))
        memory = StreamMemory(shape, made.config.layers, ring=True)  # the call has committed its own answer


@OFFSETS
def test_a_lesson_hears_the_windows_of_a_stream_at_their_levels(offset: int) -> None:
    made, size, heard = tiny.network(), 7, []
    forward = made.forward
    made.forward = lambda noisy, level, *more: heard.append(level) or forward(noisy, level, *more)
    by_windows(made, clips(frames=size * tiny.BLOCK), offset, by_block=True)
    lesson, heard[:] = [*heard], []
    memory, prompt = StreamMemory(tiny.rolling_recipe().memory(made), made.config.layers, ring=True), tiny.prompt(made)
    for _ in calls(made, memory, lambda block: prompt, tiny.noise(1), tiny.LEVELS, lambda flight: False, size):
        ...
    served = [level.expand(2, -1) for level in heard[offset :: len(tiny.LEVELS)]]
    assert len(lesson) == len(served) and all(map(torch.equal, lesson, served))


def test_with_one_level_windows_are_teacher_forcing_block_by_block() -> None:
    made, shape = tiny.network(), tiny.rolling_recipe().memory(tiny.network())
    windows = steps_in_windows(6, 1, 0)
    assert windows == 6 * [[0]]
    for by in (forced_in_one_pass, forced_by_block):
        together, alone = (forced(by, made, shape, 18, counts) for counts in ([*map(len, windows)], ()))
        torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("by", [forced_in_one_pass, forced_by_block])
def test_blocks_of_a_window_see_each_other_and_what_was_finished_before_any_of_them(by) -> None:
    made, (past, noisy) = tiny.network(), (clips(1, 12).latents_BFCHW, clips(2, 12).latents_BFCHW[1:])
    shape, prompt = tiny.rolling_recipe().memory(made), tiny.prompt(made)
    level_BF, said = torch.full((1, 12), 0.8), torch.zeros(1, 12, dtype=torch.long)

    @torch.no_grad()
    def answer(past: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        return by(made, past, noisy, level_BF, prompt, said, tiny.BLOCK, shape, [1, 3])[:, 3:6]

    def sees(which: int, block: int) -> bool:
        changed = [past.clone(), noisy.clone()]
        changed[which][:, 3 * block : 3 * block + 3] += 1
        return not torch.equal(answer(*changed), answer(past, noisy))

    assert [sees(0, block) for block in range(4)] == [True, False, False, False]
    assert [sees(1, block) for block in range(4)] == [False, True, True, True]
