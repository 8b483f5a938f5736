import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from longtake.distillation.optim import Muon, muon_and_adam, orthogonalized
from longtake.distillation.trainer import Budget, Learner, train


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


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    student = learner()
    before = student.module.weight.detach().clone()
    norm = student.step(student.module(torch.full((1, 4), math.inf)).sum())
    assert not torch.isfinite(norm) and torch.equal(student.module.weight, before)
    assert student.module.weight.grad is None


def test_rates_rise_stay_and_fall_to_nothing() -> None:
    budget = Budget(steps=100, warmup=10, decay=0.5)
    rates = [budget.rate(step, step / 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1 and rates[49] == 1
    assert rates[75] == pytest.approx(0.5) and rates[99] < 0.03
    assert rates[60:] == sorted(rates[60:], reverse=True)


def test_a_budget_ends_in_steps_or_in_time_and_writes_its_metrics(tmp_path: Path) -> None:
    device = torch.device("cpu")
    turn = lambda step: {"loss": torch.tensor(float(step))}  # noqa: E731
    spent = train([], turn, Budget(steps=25), tmp_path / "m.jsonl", device, every=10)
    assert spent["steps"] == 25
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 0), (10, 10), (20, 20)]
    spent = train([], turn, Budget(steps=10**9, seconds=0.2), tmp_path / "n.jsonl", device)
    assert 0.2 <= spent["seconds"] < 2
