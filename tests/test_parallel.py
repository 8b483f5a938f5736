"""Two processes that train together stay alike."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from longtake import parallel
from tests.processes import free_port, run_ranks


def refusal_of(rank: int) -> str:
    def work() -> None:
        if rank == 1:
            raise ValueError("the second cannot")

    with pytest.raises(ValueError) as refusal:
        parallel.agree(work)
    return str(refusal.value)


def work(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    own_rank, processes, device = parallel.join()
    torch.manual_seed(rank)
    module = nn.Linear(2, 1)
    unused = nn.Parameter(torch.ones(1))
    parallel.share_parameters(module)
    (module(torch.full((1, 2), float(rank)))).sum().backward()
    parallel.average_gradients([*module.parameters(), unused])
    seen = {
        "who": (own_rank, processes),
        "weight": module.weight.detach(),
        "gradient": module.weight.grad,
        "unused": unused.grad,
        "first": parallel.from_first([float(rank + 5), 1.0], device),
        "shared": parallel.share_out([3, 4, 5], lambda job: (10 * job, rank)),
        "gathered": (parallel.processes(), parallel.gather({"rank": rank})),
        "agreed": parallel.agree(lambda: rank + 7),
        "refused": refusal_of(rank),
        "own": (parallel.rank(), parallel.own_part("abc")),
        "mean": parallel.mean_over_processes(torch.tensor(float(rank))),
    }
    torch.save(seen, f"{folder}/{rank}.pt")
    parallel.leave()


def test_two_processes_share_parameters_gradients_and_decisions(tmp_path) -> None:
    (tmp_path / "port").write_text(free_port())
    assert run_ranks(work, str(tmp_path)) == [0, 0]
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert (one["who"], two["who"]) == ((0, 2), (1, 2))
    assert torch.equal(one["weight"], two["weight"])
    assert (one["own"], two["own"]) == ((0, "ac"), (1, "b"))
    for seen in (one, two):
        assert seen["gradient"].tolist() == [[0.5, 0.5]] and seen["unused"] is None
        assert (seen["first"], seen["mean"].item()) == ([5.0, 1.0], 0.5)
        assert seen["shared"] == [(30, 0), (40, 1), (50, 0)]
        assert (seen["agreed"], seen["refused"]) == ([7, 8], "the second cannot")
        assert seen["gathered"] == (2, [{"rank": 0}, {"rank": 1}])


def test_alone_nothing_is_exchanged() -> None:
    rank, processes, device = parallel.join()
    assert (rank, processes) == (0, 1)
    assert (
        parallel.from_first([3.0], device) == [3.0]
        and parallel.gather(4) == [4]
        and parallel.share_out([1, 2], str) == ["1", "2"]
        and parallel.processes() == 1
        and (parallel.rank(), parallel.own_part([1, 2]), parallel.agree(lambda: 5)) == (0, [1, 2], [5])
    )
    assert parallel.mean_over_processes(torch.tensor(2.0)) == 2.0
    parallel.average_gradients([])
    parallel.leave()
