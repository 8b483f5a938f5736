import pytest
import torch
from tests import tiny

from longtake.distillation import dmd
from longtake.flow import guided


def sample(requires_grad: bool = False) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 6, *tiny.LATENTS[1:], dtype=torch.float64).requires_grad_(requires_grad)


def test_the_loss_has_the_matching_gradient() -> None:
    x = sample(requires_grad=True)
    critic, teacher = torch.randn_like(x).detach(), torch.randn_like(x).detach()
    loss = dmd.matching_loss(x, lambda noisy, level: teacher, lambda noisy, level: critic, shift=3.0)
    (gradient,) = torch.autograd.grad(loss, x)
    size = (x - teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(gradient, ((critic - teacher) / size / x.numel()).detach())


@pytest.mark.parametrize("frames", [1, 6, 9])
def test_under_a_mask_the_gradient_is_shared_among_the_elements_that_count(frames: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, frames, *tiny.LATENTS[1:], dtype=torch.float64, requires_grad=True)
    critic, teacher = torch.randn_like(x).detach(), torch.randn_like(x).detach()
    counts = torch.ones(1, frames, 1, 1, 1, dtype=torch.uint8)
    counts[:, : frames // 2] = 0
    loss = dmd.matching_loss(x, lambda noisy, level: teacher, lambda noisy, level: critic, shift=3.0, mask=counts)
    (gradient,) = torch.autograd.grad(loss, x)
    full = dmd.matching_gradient(x, critic, teacher)
    number = x[:, frames // 2 :].numel()
    torch.testing.assert_close(gradient, (counts * full / number).detach())
    torch.testing.assert_close(loss, 0.5 * full[:, frames // 2 :].square().mean())


def test_a_full_mask_changes_nothing_and_a_wrong_one_is_refused() -> None:
    x, y = sample(), sample() + 1
    torch.testing.assert_close(dmd.masked_mse(x, y, torch.ones_like(x)), dmd.masked_mse(x, y, None))
    with pytest.raises(RuntimeError):
        dmd.masked_mse(x, y, torch.ones(2, 5, 1, 1, 1))


def test_a_student_that_is_the_teacher_is_left_alone() -> None:
    x = sample(requires_grad=True)
    same = torch.randn_like(x).detach()
    loss = dmd.matching_loss(x, lambda noisy, level: same, lambda noisy, level: same, shift=3.0)
    assert loss == 0 and torch.autograd.grad(loss, x)[0].abs().sum() == 0


def test_a_sample_on_the_teachers_estimate_has_no_gradient() -> None:
    x = sample()
    for critic in (x, x + 1, x - 1):
        assert not dmd.matching_gradient(x, critic, x).any()


def test_the_critic_learns_the_velocity_of_detached_samples_at_one_level_a_clip() -> None:
    made = tiny.network()
    seen = {}

    def spy(noisy, level, prompts, view, prompt_BF):
        seen.update(noisy=noisy, level=level)
        return torch.zeros_like(noisy, requires_grad=True)

    made.forward = spy
    x = sample(requires_grad=True)
    text = tiny.text(batch=2)
    loss = dmd.critic_loss(x, made, text, None, shift=3.0)
    level = seen["level"]
    assert torch.equal(level, level[:, :1].expand(2, 6)) and level[0, 0] != level[1, 0]
    wide = level[:, :, None, None, None]
    noise = (seen["noisy"] - (1 - wide) * x) / wide
    torch.testing.assert_close(loss, (noise - x).square().mean().detach(), check_dtype=False)
    loss.backward()
    assert x.grad is None


def test_the_gradient_of_a_linear_critic_is_that_of_least_squares() -> None:
    """v = W x over channels: d loss / d W = 2 / N * sum (W x - velocity) x^T."""
    made = tiny.network()
    channels = tiny.LATENTS[1]
    weight = torch.randn(channels, channels, dtype=torch.float64, requires_grad=True)
    seen = []

    def linear(noisy, level, prompts, view, prompt_BF):
        seen.append((noisy, level))
        return torch.einsum("oc,bfchw->bfohw", weight, noisy)

    made.forward = linear
    x = sample()
    dmd.critic_loss(x, made, tiny.text(batch=2), None, shift=3.0).backward()
    ((noisy, level_BF),) = seen
    velocity = (noisy - x) / level_BF[:, :, None, None, None]
    error = torch.einsum("oc,bfchw->bfohw", weight.detach(), noisy) - velocity
    expected = 2 / x.numel() * torch.einsum("bfohw,bfchw->oc", error, noisy)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-6)  # the loss is made in float32


def test_an_estimate_hangs_on_each_frames_own_prompt_and_not_on_its_number() -> None:
    made, x, text = tiny.network(), sample(), tiny.text(batch=2, prompts=2)
    prompt_BF, level_BF = torch.tensor([0, 0, 0, 1, 1, 1]).expand(2, -1), torch.full((2, 6), 0.5)
    with torch.no_grad():
        one = dmd.estimate_by(made, text, prompt_BF)(x, level_BF)
        other = dmd.estimate_by(made, text.flip(1), 1 - prompt_BF)(x, level_BF)
        first_alone = dmd.estimate_by(made, text[:, :1], None)(x, level_BF)
    torch.testing.assert_close(one, other)
    assert not torch.allclose(one, first_alone)


def test_guided_estimates_mix_clean_estimates() -> None:
    a, b = sample(), sample() + 1
    mixed = dmd.guided_estimate(lambda *_: a, lambda *_: b, 3.0)(a, torch.ones(2, 6))
    torch.testing.assert_close(mixed, guided(a, b, 3.0))
