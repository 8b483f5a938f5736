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


def test_a_student_that_is_the_teacher_is_left_alone() -> None:
    x = sample(requires_grad=True)
    same = torch.randn_like(x).detach()
    loss = dmd.matching_loss(x, lambda noisy, level: same, lambda noisy, level: same, shift=3.0)
    assert loss == 0 and torch.autograd.grad(loss, x)[0].abs().sum() == 0


def test_a_sample_on_the_teachers_estimate_gives_no_nan() -> None:
    x = sample()
    assert torch.isfinite(dmd.matching_gradient(x, x, x)).all()


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


def test_guided_estimates_mix_clean_estimates() -> None:
    a, b = sample(), sample() + 1
    mixed = dmd.guided_estimate(lambda *_: a, lambda *_: b, 3.0)(a, torch.ones(2, 6))
    torch.testing.assert_close(mixed, guided(a, b, 3.0))
