import torch
from torch import Tensor

from longtake import flow
from tests.parity.fixture import Fixture


def check(fixture: Fixture) -> None:
    x0, noise, velocity, t = (fixture.inputs[name] for name in ("x0", "noise", "flow", "t"))
    for shift in fixture.config["shifts"]:
        _check_shift(fixture, f"shift{shift:g}", shift, x0, noise, velocity, t)
    level = _column(t / flow.TIMESTEPS)
    noisy = flow.add_noise(x0, noise, level)
    fixture.compare("exact.add_noise", noisy)
    fixture.compare("exact.flow_to_x0", flow.clean_from_velocity(noisy, velocity, level))


def _check_shift(
    fixture: Fixture, name: str, shift: float, x0: Tensor, noise: Tensor, velocity: Tensor, t: Tensor
) -> None:
    steps = fixture.config["num_train_timesteps"]
    grid = torch.tensor(flow.even_levels(steps, shift), dtype=torch.float64)
    weights = flow.pretraining_weights(grid)
    nearest = (grid[None] * flow.TIMESTEPS - t[:, None]).abs().argmin(dim=1)
    used = flow.nearest_level(t.double() / flow.TIMESTEPS, shift)
    level = _column(used)
    noisy = flow.add_noise(x0, noise, level)
    clean = flow.clean_from_velocity(noisy, velocity, level)
    fixture.compare(f"{name}.sigmas", grid)
    fixture.compare(f"{name}.timesteps", grid * flow.TIMESTEPS)
    fixture.compare(f"{name}.loss_weights", weights)
    fixture.compare(f"{name}.loss_weight_at_t", weights[nearest])
    fixture.compare(f"{name}.sigma_used", used)
    fixture.compare(f"{name}.add_noise", noisy)
    fixture.compare(f"{name}.flow_to_x0", clean)
    fixture.compare(f"{name}.x0_to_flow", flow.velocity_from_clean(noisy, x0, level))
    draws = torch.arange(steps, dtype=torch.float64) / steps
    fixture.compare(f"{name}.dmd_timestep", flow.matching_level(draws, shift) * flow.TIMESTEPS)
    for nominal in fixture.config["nominal_lists"]:
        levels = torch.tensor(flow.warped_levels(nominal, shift))
        fixture.compare(f"{name}.warped.{'_'.join(map(str, nominal))}", levels * flow.TIMESTEPS)
    for count in fixture.config["euler_steps"]:
        _check_euler(fixture, f"{name}.steps{count}", flow.even_levels(count, shift), noise, velocity)


def _check_euler(fixture: Fixture, name: str, levels: tuple[float, ...], noise: Tensor, velocity: Tensor) -> None:
    fixture.compare(f"{name}.sigmas", torch.tensor(levels))
    fixture.compare(f"{name}.timesteps", torch.tensor(levels) * flow.TIMESTEPS)
    x = noise
    for level, lower in zip(levels, [*levels[1:], 0.0], strict=True):
        x = flow.euler_step(x, x.tanh() + 0.1 * velocity, torch.tensor([[level]]), torch.tensor([[lower]]))
    fixture.compare(f"{name}.euler_end", x)


def _column(level_B: Tensor) -> Tensor:
    return level_B[:, None]
