"""The loop: rates that warm up and fall, gradients averaged and clipped, running averages, metrics, an end in time."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from longtake import parallel


class Learner:
    """A module in training with its optimisers and, if `average` is given, the running average of its parameters."""

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        average: float | None,
        clip: float = 1.0,
    ):
        self.module = module
        self._optimizers = optimizers
        self._peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
        self._parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        self._clip = clip
        self._decay = average
        self._average = [p.detach().clone() for p in self._parameters] if average is not None else []

    def step(self, loss: Tensor) -> Tensor:
        """Backward and one step; returns the gradient norm. A step whose gradient is not finite changes nothing."""
        loss.backward()
        parallel.average_gradients(self._parameters)
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip)
        if torch.isfinite(norm):
            for optimizer in self._optimizers:
                optimizer.step()
            if self._decay is not None:
                torch._foreach_lerp_(self._average, self._parameters, 1 - self._decay)
        for parameter in self._parameters:
            parameter.grad = None
        return norm

    def set_rate(self, share: float) -> None:
        """Set every learning rate to a share of its peak."""
        for optimizer, peaks in zip(self._optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange the parameters with their running average; call again to change back."""
        for parameter, average in zip(self._parameters, self._average, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When training ends: after `steps`, or after `seconds` if that comes first. Rates follow whichever is further."""

    steps: int
    seconds: float = float("inf")
    warmup: int = 100
    decay: float = 0.6

    def rate(self, step: int, progress: float) -> float:
        """Share of the peak rate: a linear rise over `warmup` steps, then a linear fall over the last `decay`."""
        return min(1.0, (step + 1) / self.warmup, max(0.0, (1 - progress) / self.decay))


def train(
    learners: Sequence[Learner],
    turn: Callable[[int], dict[str, Tensor]],
    budget: Budget,
    metrics: Path,
    device: torch.device,
    every: int = 50,
) -> dict[str, float]:
    """Run `turn(step)` until the budget is spent; append its metrics to a JSONL file `every` so many steps.

    The first process's clock decides for all, and only it writes.
    Returns {"steps", "seconds"}.
    """
    started, step, first = time.perf_counter(), 0, _is_first()
    while True:
        progress = max(step / budget.steps, (time.perf_counter() - started) / budget.seconds)
        progress = parallel.from_first(progress, device)
        if progress >= 1:
            break
        for learner in learners:
            learner.set_rate(budget.rate(step, progress))
        values = turn(step)
        if step % every == 0:
            means = {name: parallel.mean_over_processes(value.float()).item() for name, value in values.items()}
            if first:
                _log(metrics, {"step": step, "seconds": round(time.perf_counter() - started, 2), **means})
        step += 1
    return {"steps": step, "seconds": time.perf_counter() - started}


def _is_first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _log(path: Path, row: dict[str, float]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    sys.stderr.write(" ".join(f"{name} {value:.4g}" for name, value in row.items()) + "\n")
