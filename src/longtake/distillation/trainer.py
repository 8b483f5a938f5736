"""The loop: rates that warm up and fall, averages, metrics, pictures on the way, and a state that survives a kill."""

import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from longtake import parallel
from longtake.files import whole

METRICS_FILE = "metrics.jsonl"
STATE_FILE = "state.pt"
MOST_NORM = 1.0  # of a step's gradient, to which longer ones are shortened
_CLOCK_SECONDS = 1.0  # from one look at the first process's clock to the next: each waits for the device


@dataclass(frozen=True)
class Run:
    """Where a stage runs and writes: this process's rank, its device, and the folder that all processes share."""

    out: Path
    device: torch.device
    rank: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        """bfloat16 on a GPU. Without autocast's cache: weights cast in no_grad passes would come back without graph."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False)


class Stateful(Protocol):
    """Part of a run that must be as it was when the run goes on after a kill."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Dice:
    """A random generator on the host whose state is part of a run's."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def below(self, high: int) -> int:
        """A whole number in 0..high - 1."""
        return int(torch.randint(high, (), generator=self.generator))

    def happens(self, share: float) -> bool:
        """Whether something does that happens in this share of all cases: never in 0, always in 1."""
        return bool(torch.rand((), generator=self.generator) < share)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


class Learner:
    """A module in training with its optimisers and, if `average` is given, the running average of its parameters.

    Early on the average forgets faster, as min(average, (1 + n) / (10 + n)) after n steps: a short run would otherwise
    end with a good share of what it began with.
    """

    def __init__(
        self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], *, average: float | None
    ):  # fmt: skip
        self.module = module
        self._optimizers = optimizers
        self._peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
        self._parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        self._decay = average
        self.steps = self.skipped = 0  # skipped are those whose gradient was not finite
        self._average = [p.detach().clone() for p in self._parameters] if average is not None else []

    def taught_by(self, loss: Callable[..., Tensor], *, recorded: bool = True) -> Callable[..., Tensor]:
        """The loss as a function that adds its gradients to those of the next step, and returns its value alone.

        recorded: whether it is replayed on a GPU, see `parallel.Recorded`. The loss turns autocast on by itself.
        """

        def gradients(*arguments: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            with torch.enable_grad():
                value = loss(*arguments)
                found = torch.autograd.grad(value, self._parameters, allow_unused=True)
            # Copied: parameters may share one, which what follows writes to.
            return value.detach(), tuple(None if gradient is None else gradient.clone() for gradient in found)

        found_by = parallel.Recorded(gradients) if recorded else gradients

        @torch.no_grad()
        def teach(*arguments: Any) -> Tensor:
            value, found = found_by(*arguments)
            for parameter, gradient in zip(self._parameters, found, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            return value

        return teach

    def step(self, loss: Tensor | None = None) -> Tensor:
        """Backward of a loss, where there is one, and one step; returns the gradient norm.

        A step whose gradient is not finite changes nothing.
        """
        if loss is not None:
            loss.backward()
        parallel.average_gradients(self._parameters)
        norm = nn.utils.clip_grad_norm_(self._parameters, MOST_NORM)
        if torch.isfinite(norm):
            for optimizer in self._optimizers:
                optimizer.step()
            self._follow()
            self.steps += 1
        else:
            self.skipped += 1
        for parameter in self._parameters:
            parameter.grad = None
        return norm

    @torch.no_grad()
    def _follow(self) -> None:
        """Let the average take its step; with gradients on, it would keep the graph of all steps."""
        if self._decay is not None:
            decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self._average, self._parameters, 1 - decay)

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

    def state_dict(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "optimizers": [o.state_dict() for o in self._optimizers],
            "average": self._average,
            "steps": self.steps,
            "skipped": self.skipped,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for average, saved in zip(self._average, state["average"], strict=True):
            average.copy_(saved)
        self.steps, self.skipped = state["steps"], state.get("skipped", 0)  # states of earlier versions do not tell


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
    learners: Mapping[str, Learner],
    turn: Callable[[int], dict[str, Tensor]],
    budget: Budget,
    run: Run,
    *,
    keep: Mapping[str, Stateful] | None = None,
    look: Callable[[str], None] = lambda name: None,
    log_every: int = 50,
    rare: Sequence[str] = (),
    save_seconds: float = 60.0,
    look_seconds: float = 120.0,
) -> dict[str, float]:
    """Run `turn(step)` until the budget is spent, going on from the folder's saved state if there is one.

    Metrics are appended to metrics.jsonl every `log_every` steps, and whenever a turn has one of the `rare` ones. Every
    `save_seconds` all of `learners`, of `keep` and of torch's random state is written beside and renamed, so that a run
    killed at any moment goes on and ends as if it had not been; Ctrl-C and SIGTERM do the same at once and raise
    KeyboardInterrupt. Every `look_seconds` the first process calls `look(name)`, and once more at the end; it must
    leave all random state alone.
    Returns {"steps", "seconds"}, which count over all parts of a run, and of each learner that skipped any how many
    steps. ValueError where one skipped all: it is as it began.
    """
    state = _State(run, {**learners, **(keep or {})})
    first_step, before = state.resume()
    step = first_step
    started = saved = looked = time.perf_counter()
    clock_share, asked_to_stop, next_look = before / budget.seconds, False, step
    pace = min(_CLOCK_SECONDS, save_seconds)
    with _Interrupt() as interrupt:
        while True:
            if step == next_look:
                now = time.perf_counter()
                steps_ahead = max(1, int(pace * (step - first_step) / (now - started)))
                clock = ((before + now - started) / budget.seconds, now - saved > save_seconds, interrupt.asked)
                clock_share, save, stop, ahead = parallel.from_first([*clock, steps_ahead], run.device)
                next_look, asked_to_stop = step + int(ahead), bool(stop)
                if save or asked_to_stop:
                    state.save(step, before + now - started)
                    saved = time.perf_counter()
                if run.first and now - looked > look_seconds and not asked_to_stop:
                    look(f"step_{step:06}")
                    looked = time.perf_counter()
            progress = max(step / budget.steps, clock_share)
            if progress >= 1 or asked_to_stop:
                break
            for learner in learners.values():
                learner.set_rate(budget.rate(step, progress))
            values = turn(step)
            if step % log_every == 0 or any(name in values for name in rare):
                means = {name: parallel.mean_over_processes(value.float()).item() for name, value in values.items()}
                if run.first:
                    _log(run.out, {"step": step, "seconds": round(before + time.perf_counter() - started, 2), **means})
            step += 1
    if asked_to_stop:
        raise KeyboardInterrupt(f"stopped at step {step}; the same command goes on from there")
    if nothing := [name for name, one in learners.items() if one.skipped and not one.steps]:
        raise ValueError(f"{', '.join(nothing)} learned nothing: no step had a gradient of finite numbers")
    if run.first:
        look("last")
    skipped = {f"skipped_{name}": learner.skipped for name, learner in learners.items() if learner.skipped}
    return {"steps": step, "seconds": before + time.perf_counter() - started, **skipped}


class _State:
    """A run's saved state: one file, whole at any moment, written by the first process for all."""

    def __init__(self, run: Run, parts: Mapping[str, Stateful]):
        self._run, self._parts = run, parts
        self._file = run.out / STATE_FILE

    def save(self, step: int, seconds: float) -> None:
        random = parallel.gather(_random_state(self._run.device))
        if self._run.first:
            parts = {name: part.state_dict() for name, part in self._parts.items()}
            try:
                with whole(self._file) as beside:
                    torch.save({"step": step, "seconds": seconds, "random": random, "parts": parts}, beside)
            except RuntimeError as error:  # how torch tells of a full disk
                raise OSError(f"{self._file} could not be written, what was there before stays: {error}") from None

    def resume(self) -> tuple[int, float]:
        """Load what was saved, if anything was; returns the step to go on from and the seconds already spent."""
        if not self._file.exists():
            if self._run.first:
                _forget_rows(self._run.out, 0)  # of a run that was stopped before it saved anything
            return 0, 0.0
        with self._file.open("rb") as file:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
            except (EOFError, OSError, RuntimeError, UnpicklingError):  # as after a power cut
                raise ValueError(f"{self._file} is not whole: remove it, and the run begins anew") from None
        if len(state["random"]) != parallel.processes():
            raise ValueError(
                f"{self._file} was saved by {len(state['random'])} processes and can only go on in as many, "
                f"not in {parallel.processes()}"
            )
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        _set_random_state(state["random"][self._run.rank], self._run.device)
        if self._run.first:
            _forget_rows(self._run.out, state["step"])
            tell(f"going on from step {state['step']}")
        return state["step"], state["seconds"]


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


class _Interrupt:
    """Turns Ctrl-C, and SIGTERM by which schedulers end a job, into a question asked between steps: none is left half
    done."""

    asked = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        tell("stopping after this step; the state is saved")

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


def read_metrics(out: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics; a last line cut off by a kill is left out."""
    rows = []
    for line in (out / METRICS_FILE).read_text().splitlines() if (out / METRICS_FILE).exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _forget_rows(out: Path, step: int) -> None:
    """Drop the metrics of steps that will be made again."""
    kept = [json.dumps(row) + "\n" for row in read_metrics(out) if row["step"] < step]
    with whole(out / METRICS_FILE) as beside:
        beside.write_text("".join(kept))


def _log(out: Path, row: dict[str, float]) -> None:
    with (out / METRICS_FILE).open("a") as file:
        file.write(json.dumps(row) + "\n")
    tell(" ".join(f"{name} {value:.4g}" for name, value in row.items()))


def tell(text: str) -> None:
    """A line of progress on stderr: a full disk, or a terminal that was closed, ends no run."""
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")
