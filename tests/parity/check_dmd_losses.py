"""Losses of distribution matching and of its regularised form, on recorded draws and given or analytic networks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longtake import flow
from longtake.distillation import dmd
from longtake.distillation.regularized import regularized_loss, teacher_sample
from tests.parity.fixture import Fixture

NO_TEXT = torch.empty(0)
GRID = {"grid_shift8": 8.0, "grid_shift5": 5.0, "exact": None}  # of the score networks


@dataclass(frozen=True)
class Given:
    """A network that answers with recorded velocities, whatever it is asked."""

    velocity: Tensor

    def prompt_keys(self, text: Tensor) -> Tensor:
        return text

    def clip_view(self, latents: Tensor) -> None: ...

    def __call__(self, *asked) -> Tensor:
        return self.velocity


@dataclass(frozen=True)
class Analytic:
    """v = tanh(M x + P^T mean(text) + level), M over channels."""

    channels: Tensor
    text: Tensor

    def prompt_keys(self, text: Tensor) -> Tensor:
        return text.mean(dim=1) @ self.text

    def clip_view(self, latents: Tensor) -> None: ...

    def __call__(self, noisy: Tensor, level_BF: Tensor, prompt: Tensor, view: None, prompt_BF: None) -> Tensor:
        mixed = torch.einsum("oc,bfchw->bfohw", self.channels, noisy)
        return (mixed + prompt[:, None, :, None, None] + level_BF[:, :, None, None, None]).tanh()


def check(fixture: Fixture) -> None:
    for variant in fixture.config["dmd_variants"]:
        _check_matching(fixture, variant)
    for variant in fixture.config["critic_variants"]:
        _check_critic(fixture, variant)
    for variant in fixture.config["reflow_variants"]:
        _check_regularized(fixture, variant)


def _check_matching(fixture: Fixture, variant: dict) -> None:
    name, grid, given = f"dmd.{variant['name']}", GRID[variant["conversion"]], fixture.inputs
    image = given["image"].clone().requires_grad_()
    real_c, real_u, fake_c, fake_u = (
        dmd.estimate_by(Given(given[f"{network}_flow_{prompt}"]), NO_TEXT, None, grid)
        for network in ("real", "fake")
        for prompt in ("cond", "uncond")
    )
    teacher = dmd.guided_estimate(real_c, real_u, 1 + fixture.config["real_guidance_scale"])
    critic = dmd.guided_estimate(fake_c, fake_u, 1 + variant["fake_guidance_scale"])
    at = _renoised(fixture, image, "dmd", exact=grid is None)
    gradient = dmd.matching_gradient(image, critic(at.noisy, at.level_BF), teacher(at.noisy, at.level_BF))
    loss = dmd.matching_loss_at(at, teacher, critic, _mask(fixture, variant))
    fixture.compare(f"{name}.timestep", at.level_BF * flow.TIMESTEPS)
    fixture.compare(f"{name}.mean_abs_gradient", gradient.abs().mean())
    fixture.compare(f"{name}.loss", loss)
    fixture.compare(f"{name}.grad_image", torch.autograd.grad(loss, image)[0])


def _check_critic(fixture: Fixture, variant: dict) -> None:
    """Published: the velocity goes through a clean estimate in the network's grid and back in that of the noise."""
    name, grid = f"critic.{variant['name']}", GRID[variant["conversion"]]
    velocity = fake = fixture.inputs["fake_flow_cond"].clone().requires_grad_()
    at = _renoised(fixture, fixture.inputs["image"], "critic", exact=grid is None)
    if grid is not None:
        clean = dmd.estimate_by(Given(fake), NO_TEXT, None, grid)(at.noisy, at.level_BF)
        noise_level = flow.nearest_level(at.level_BF, fixture.config["timestep_shift"])
        velocity = flow.velocity_from_clean(at.noisy, clean, noise_level)
    loss = dmd.velocity_loss(velocity, at)
    fixture.compare(f"{name}.timestep", at.level_BF * flow.TIMESTEPS)
    fixture.compare(f"{name}.loss", loss)
    fixture.compare(f"{name}.grad_fake_flow", torch.autograd.grad(loss, fake)[0])


def _check_regularized(fixture: Fixture, variant: dict) -> None:
    name, config, given = f"reflow.{variant['name']}", fixture.config, fixture.inputs
    image = given["image"][:1].clone().requires_grad_()
    step0 = given["step0_pred"].clone().requires_grad_()
    frames, grid, guidance = image.shape[1], GRID["grid_shift8"], config["rollout_guidance"]

    def real(weight: float, grid: float | None) -> dmd.Estimate:
        network = Analytic(fixture.weights["real.M"], fixture.weights["real.P"])
        prompts = (given["prompt"], given["negative_prompt"])
        return dmd.guided_estimate(*(dmd.estimate_by(network, text, None, grid) for text in prompts), weight)

    levels = flow.even_levels(variant["rollout_steps"], config["timestep_shift"])
    partial = variant["reflow_step"] < variant["rollout_steps"]
    last = real(1 + guidance, grid) if partial else None
    target = teacher_sample(
        real(guidance, None), given["init_noise"][:, -frames:], levels[: variant["reflow_step"]], last
    )
    fake = Analytic(fixture.weights["fake.M"], fixture.weights["fake.P"])
    critic = dmd.estimate_by(fake, given["prompt"], None, grid)
    mask = _mask(fixture, variant)
    mask = None if mask is None else mask[:1]
    at = _renoised(fixture, image, "dmd", exact=False)
    matching = dmd.matching_loss_at(at, real(1 + config["real_guidance_scale"], grid), critic, mask)
    losses = regularized_loss(matching, step0[:, -frames:], target, config["reflow_weight"], mask)
    fixture.compare(f"{name}.rollout_timesteps", torch.tensor(levels) * flow.TIMESTEPS)
    fixture.compare(f"{name}.teacher_latent", target)
    fixture.compare(f"{name}.dmd_loss", losses["matching"])
    fixture.compare(f"{name}.reflow_loss", losses["pull"])
    fixture.compare(f"{name}.total_loss", losses["loss"])
    by_image, by_step0 = torch.autograd.grad(losses["loss"], (image, step0))
    fixture.compare(f"{name}.grad_image", by_image)
    fixture.compare(f"{name}.grad_step0_pred", by_step0)


def _renoised(fixture: Fixture, image: Tensor, which: str, exact: bool) -> dmd.Renoised:
    """By the recorded draws; published code adds noise in the grid of the very shift that moved the draw."""
    draw_B1, noise = (fixture.inputs[f"{which}_{part}"][: len(image)] for part in ("t_draw", "noise"))
    shift = fixture.config["timestep_shift"]
    return dmd.renoised_by(image, draw_B1 / flow.TIMESTEPS, noise, shift, grid=None if exact else shift)


def _mask(fixture: Fixture, variant: dict) -> Tensor | None:
    return fixture.inputs["mask"] if variant["mask"] else None
