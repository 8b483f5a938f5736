import math
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.processes import free_port, run_ranks
from torch import nn

from longtake import parallel
from longtake.distillation.optim import Muon, muon_and_adam, orthogonalized
from longtake.distillation.trainer import METRICS_FILE, STATE_FILE, Budget, Dice, Learner, Run, read_metrics, train

CPU = torch.device("cpu")


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 8, 8), (2, 4, 16), (2, 16, 4)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)).float())
        assert values.min() > 0.5 and values.max() < 1.4


def test_matrices_of_one_shape_turn_together_as_they_would_alone() -> None:
    torch.manual_seed(0)
    start = [torch.randn(6, 4), torch.randn(6, 4), torch.randn(3, 2, 3, 3)]
    gradients = [torch.randn_like(x) for x in start]

    def stepped(indices: list[int]) -> list[torch.Tensor]:
        parameters = [nn.Parameter(start[i].clone()) for i in indices]
        for parameter, i in zip(parameters, indices, strict=True):
            parameter.grad = gradients[i]
        Muon(parameters, lr=0.1).step()
        return [p.detach() for p in parameters]

    together = stepped([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(together[i], stepped([i])[0], atol=2e-3, rtol=0)
        assert not torch.allclose(together[i], start[i], atol=1e-2)


def test_vectors_and_named_parts_go_to_adam() -> None:
    module = nn.ModuleDict({"enter": nn.Linear(4, 4), "hidden": nn.Linear(4, 4)})
    muon, adam = muon_and_adam(module, 0.1, adamw_only=("enter",))
    assert [p.shape for g in muon.param_groups for p in g["params"]] == [(4, 4)]
    assert len([p for g in adam.param_groups for p in g["params"]]) == 3


def learner(**more) -> Learner:
    torch.manual_seed(0)
    module = nn.Linear(4, 4)
    return Learner(module, muon_and_adam(module, 0.05), **{"average": 0.9, **more})


def test_learning_lowers_a_loss_and_the_average_lags_behind() -> None:
    student, x = learner(), torch.randn(64, 4)
    losses = []
    for _ in range(60):
        loss = (student.module(x) - x).square().mean()
        losses.append(loss.item())
        student.step(loss)
    assert losses[-1] < 0.2 * losses[0]
    now = student.module.weight.detach().clone()
    student.swap_average()
    assert not torch.equal(student.module.weight, now)
    student.swap_average()
    assert torch.equal(student.module.weight, now)


def test_lessons_add_to_the_gradients_of_a_step() -> None:
    one, other, x = learner(), learner(), torch.randn(8, 4)
    lessons = [other.taught_by(lambda x, power=power: other.module(x).pow(power).mean()) for power in (2, 4)]
    for _ in range(3):
        loss = one.module(x).pow(2).mean() + one.module(x).pow(4).mean() + one.module(x).mean()
        values = [lesson(x) for lesson in lessons]
        assert not any(value.requires_grad for value in values)
        rest = other.module(x).mean()
        assert torch.allclose(loss, sum(values) + rest)
        assert torch.allclose(one.step(loss), other.step(rest))
        assert torch.allclose(one.module.weight, other.module.weight, atol=1e-6)


def test_a_short_run_forgets_where_it_began() -> None:
    student = learner(average=0.999)
    with torch.no_grad():
        for parameter in student.module.parameters():
            parameter.fill_(5.0)
    begun = [average.clone() for average in student.state_dict()["average"]]
    for _ in range(60):
        student.step(student.module(torch.zeros(1, 4)).sum() * 0)
    for start, average in zip(begun, student.state_dict()["average"], strict=True):
        assert ((average - 5).abs() < 0.1 * (start - 5).abs() + 0.1).all()


def test_an_average_keeps_no_graph() -> None:
    student = learner()
    for _ in range(2):
        student.step(student.module(torch.ones(1, 4)).sum())
    assert not any(average.requires_grad for average in student.state_dict()["average"])


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    student = learner()
    before = student.module.weight.detach().clone()
    norm = student.step(student.module(torch.full((1, 4), math.inf)).sum())
    assert not torch.isfinite(norm) and torch.equal(student.module.weight, before)
    assert student.module.weight.grad is None


def taught(student: Learner, inputs: Callable[[int], float]) -> Callable[[int], dict[str, torch.Tensor]]:
    """Turns on a loss whose gradient is finite where the input of the step is."""

    def turn(step: int) -> dict[str, torch.Tensor]:
        student.step(student.module(torch.full((1, 4), inputs(step))).sum())
        return {}

    return turn


def test_a_run_tells_of_steps_that_it_skipped_and_refuses_to_end_with_those_alone(tmp_path: Path) -> None:
    student, run = learner(), Run(tmp_path, CPU)
    now_and_then = taught(student, lambda step: math.nan if step % 3 == 0 else 1.0)
    assert train({"student": student}, now_and_then, Budget(steps=6), run)["skipped_student"] == 2
    assert "skipped_student" not in train({"student": learner()}, taught(student, float), Budget(steps=1), run)
    student = learner()
    with pytest.raises(ValueError, match="student learned nothing"):
        train({"student": student}, taught(student, lambda step: math.nan), Budget(steps=2), run)


def test_rates_rise_stay_and_fall_to_nothing() -> None:
    budget = Budget(steps=100, warmup=10, decay=0.5)
    rates = [budget.rate(step, step / 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1 and rates[49] == 1
    assert rates[75] == pytest.approx(0.5) and rates[99] < 0.03
    assert rates[60:] == sorted(rates[60:], reverse=True)


def test_a_budget_ends_in_steps_or_in_time_and_writes_its_metrics(tmp_path: Path) -> None:
    turn = lambda step: {"loss": torch.tensor(float(step))}  # noqa: E731
    spent = train({}, turn, Budget(steps=25), Run(tmp_path, CPU), log_every=10)
    assert spent["steps"] == 25
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(0, 0), (10, 10), (20, 20)]
    (tmp_path / "timed").mkdir()
    spent = train({}, turn, Budget(steps=10**9, seconds=0.2), Run(tmp_path / "timed", CPU), save_seconds=0.1)
    assert 0.2 <= spent["seconds"] < 2


class Crash(Exception):
    pass


@given(crash=st.integers(1, 19), steps=st.integers(20, 24))
@settings(max_examples=8)
def test_a_run_that_crashes_anywhere_goes_on_as_if_it_had_not(crash: int, steps: int) -> None:
    def run(out: Path, crash: int | None) -> tuple[list[torch.Tensor], list[dict[str, float]]]:
        student, dice = learner(), Dice(3)

        def turn(step: int) -> dict[str, torch.Tensor]:
            if step == crash:
                raise Crash
            x = torch.randn(8, 4) + dice.below(5)
            loss = (student.module(x) - x).square().mean()
            student.step(loss)
            return {"loss": loss.detach()}

        torch.manual_seed(1)
        budget = Budget(steps=steps, warmup=5)
        train({"student": student}, turn, budget, Run(out, CPU), keep={"dice": dice}, log_every=3, save_seconds=0)
        student.swap_average()
        rows = [{"step": row["step"], "loss": row["loss"]} for row in read_metrics(out)]
        return [p.detach().clone() for p in student.module.parameters()], rows

    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as broken:
        expected, expected_rows = run(Path(whole), None)
        with pytest.raises(Crash):
            run(Path(broken), crash)
        resumed, rows = run(Path(broken), None)
    assert all(torch.equal(a, b) for a, b in zip(expected, resumed, strict=True))
    assert rows == expected_rows


def test_a_state_of_other_processes_is_refused(tmp_path: Path) -> None:
    torch.save({"step": 1, "seconds": 0.0, "random": [{}, {}], "parts": {}}, tmp_path / STATE_FILE)
    with pytest.raises(ValueError, match="saved by 2 processes"):
        train({}, lambda step: {}, Budget(steps=2), Run(tmp_path, CPU))


def test_a_state_of_before_skipped_steps_were_counted_is_read() -> None:
    student = learner()
    student.load_state_dict({key: value for key, value in student.state_dict().items() if key != "skipped"})
    assert student.skipped == 0


def test_a_state_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    student = learner()
    with pytest.raises(KeyError):
        train({"student": student}, lambda step: {}["no turn"], Budget(steps=2), Run(tmp_path, CPU), save_seconds=0)
    whole = (tmp_path / STATE_FILE).read_bytes()
    for broken in (b"", b"nothing of torch's", whole[:-100]):
        (tmp_path / STATE_FILE).write_bytes(broken)
        with pytest.raises(ValueError, match=r"state\.pt is not whole: remove it"):
            train({"student": student}, lambda step: {}, Budget(steps=2), Run(tmp_path, CPU))


def test_a_run_whose_terminal_is_closed_is_saved(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", Mock(**{"write.side_effect": OSError(5, "Input/output error")}))

    def turn(step: int) -> dict[str, torch.Tensor]:
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return {"loss": torch.zeros(())}

    with pytest.raises(KeyboardInterrupt):
        train({"student": learner()}, turn, Budget(steps=3), Run(tmp_path, CPU), log_every=1, save_seconds=0)
    assert (tmp_path / STATE_FILE).exists()


def test_a_run_on_a_full_disk_says_so_and_goes_on_from_what_it_saved_before(tmp_path: Path) -> None:
    """Files may be no larger than what was saved meanwhile, so writing breaks off as on a full disk."""
    student, usual = learner(), resource.getrlimit(resource.RLIMIT_FSIZE)

    def turn(step: int) -> dict[str, torch.Tensor]:
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / STATE_FILE).stat().st_size // 2, usual[1]))
        return taught(student, float)(step)

    try:
        with pytest.raises(OSError, match=r"state\.pt could not be written"):
            train({"student": student}, turn, Budget(steps=6), Run(tmp_path, CPU), save_seconds=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    seen: list[int] = []
    train({"student": student}, lambda step: seen.append(step) or {}, Budget(steps=6), Run(tmp_path, CPU))
    assert seen == [3, 4, 5]


def test_a_last_line_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 0}\n{"st')
    assert read_metrics(tmp_path) == [{"step": 0}]


def test_pictures_are_taken_on_the_way_and_at_the_end(tmp_path: Path) -> None:
    looks: list[str] = []
    turn = lambda step: {"loss": torch.tensor(0.0)}  # noqa: E731
    train({}, turn, Budget(steps=3), Run(tmp_path, CPU), look=looks.append, save_seconds=0, look_seconds=0)
    assert looks == ["step_000000", "step_000001", "step_000002", "step_000003", "last"]


def work(rank: int, folder: str, crash: int | None) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    parallel.join()
    torch.manual_seed(rank)
    student = learner()

    def turn(step: int) -> dict[str, torch.Tensor]:
        if step == crash:
            os._exit(0)
        x = torch.randn(8, 4)
        loss = (student.module(x) - x).square().mean()
        student.step(loss)
        return {"loss": loss.detach()}

    train({"student": student}, turn, Budget(steps=12), Run(Path(folder), CPU, rank), save_seconds=0)
    torch.save([*student.module.parameters()], f"{folder}/weights{rank}.pt")
    parallel.leave()


def test_two_processes_go_on_each_with_its_own_random_state(tmp_path: Path) -> None:
    weights = []
    for name, crashes in (("whole", [None]), ("broken", [7, None])):
        folder = tmp_path / name
        folder.mkdir()
        for crash in crashes:
            (folder / "port").write_text(free_port())
            run_ranks(work, str(folder), crash)
            # Not their exit codes: connections may break while two part. Who failed before has saved no weights.
        weights.append([torch.load(folder / f"weights{rank}.pt", weights_only=False) for rank in range(2)])
    whole, broken = weights
    assert all(torch.equal(a, b) for a, b in zip(whole[0], whole[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[0], broken[1], strict=True))
