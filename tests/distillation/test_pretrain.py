import torch
from tests import tiny

from longtake.distillation.pretrain import Clips, codec_loss, flow_loss, teacher_forcing_loss
from longtake.memory.window import WindowShape
from longtake.models.light_codec import Reconstruction


def clips(batch: int = 2, frames: int = 6) -> Clips:
    torch.manual_seed(1)
    size = (batch, frames, *tiny.LATENTS[1:])
    return Clips(
        torch.randn(size, dtype=torch.float64),
        tiny.text(batch, prompts=2),
        torch.zeros(batch, frames, dtype=torch.long),
        torch.zeros(batch, frames, *size[3:], dtype=torch.float64),
    )


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
    window = WindowShape(sink=3, past=3)
    loss = teacher_forcing_loss(perfect(tiny.network(), given), given, 3.0, 5.0, block=3, window=window)
    assert loss < 1e-4


def test_every_parameter_learns_from_both_losses() -> None:
    for loss_of in (
        lambda made: flow_loss(made, clips(), 3.0, 5.0),
        lambda made: teacher_forcing_loss(made, clips(), 3.0, 5.0, block=3, window=WindowShape(sink=0, past=3)),
    ):
        made = tiny.network()
        loss_of(made).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters())


def test_the_subject_changes_the_weights_and_without_one_they_are_even() -> None:
    given = clips()
    everywhere = _with_subject(given, 1.0)
    torch.manual_seed(5)
    unweighted = flow_loss(_constant(tiny.network()), given, 3.0, 0.0)
    torch.manual_seed(5)
    weighted = flow_loss(_constant(tiny.network()), everywhere, 3.0, 5.0)
    assert not torch.isclose(weighted, unweighted)
    torch.manual_seed(5)
    torch.testing.assert_close(flow_loss(_constant(tiny.network()), given, 3.0, 5.0), unweighted)


def _constant(made):
    made.forward = lambda noisy, *rest: torch.zeros_like(noisy)
    return made


def _with_subject(given: Clips, share: float) -> Clips:
    return Clips(given.latents_BFCHW, given.text_BPLE, given.prompt_BF, torch.full_like(given.subject_BFHW, share))


def test_a_perfect_codec_pays_for_its_latents_only() -> None:
    frames, mask = torch.rand(1, 5, 3, 8, 8) * 2 - 1, torch.rand(1, 5, 8, 8)
    latents = torch.ones(1, 2, 4, 1, 1)
    parts = codec_loss(Reconstruction(frames, latents, torch.zeros_like(latents)), frames, mask, kl_weight=0.1)
    torch.testing.assert_close(parts["kl"], torch.tensor(0.5))
    torch.testing.assert_close(parts["loss"], torch.tensor(0.05))


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
