"""Two processes that train together stay alike."""

import os
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

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
    module.register_buffer("seen", torch.tensor(float(rank)))
    unused = nn.Parameter(torch.ones(1))
    parallel.share_parameters(module)
    (module(torch.full((1, 2), float(rank)))).sum().backward()
    parallel.average_gradients([*module.parameters(), unused])
    own = torch.tensor(float(rank))
    seen = {
        "who": (own_rank, processes),
        "weight": module.weight.detach(),
        "buffer": module.seen,
        "gradient": module.weight.grad,
        "unused": unused.grad,
        "first": parallel.from_first([rank + 0.1, 1.0], device),
        "shared": parallel.share_out([3, 4, 5], lambda job: (10 * job, rank)),
        "gathered": (parallel.processes(), parallel.gather({"rank": rank})),
        "agreed": parallel.agree(lambda: rank + 7),
        "refused": refusal_of(rank),
        "own": (parallel.rank(), parallel.own_part("abc")),
        "mean": parallel.mean_over_processes(own),
        "own mean": own,
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
    assert (one["own mean"], two["own mean"]) == (0, 1) and one["buffer"] == two["buffer"] == 0
    for seen in (one, two):
        assert seen["gradient"].tolist() == [[0.5, 0.5]] and seen["unused"] is None
        assert (seen["first"], seen["mean"].item()) == ([0.1, 1.0], 0.5)
        assert seen["shared"] == [(30, 0), (40, 1), (50, 0)]
        assert (seen["agreed"], seen["refused"]) == ([7, 8], "the second cannot")
        assert seen["gathered"] == (2, [{"rank": 0}, {"rank": 1}])


class Pair(NamedTuple):
    one: object
    other: object


@dataclass(frozen=True)
class Holder:
    held: object
    name: str = "any"


ALIKE_BUT = [torch.ones(2, 3), torch.zeros(2, 3), torch.ones(3, 2).T, torch.ones(2, 3).long(), torch.ones(3, 2), 1, "a"]
TREES = [
    tree
    for leaf in ALIKE_BUT
    for tree in (leaf, [leaf], (leaf,), [leaf, leaf], Pair(leaf, 1), Pair(1, leaf), {"a": leaf}, {"b": leaf},
                 Holder(leaf), Holder(leaf, "other"), [Pair({"a": leaf}, Holder((leaf,)))])
]  # fmt: skip


def plain(tree: object) -> object:
    """What a record may rely on, written another way: a text of all but the values of tensors."""
    if isinstance(tree, torch.Tensor):
        return f"tensor {tree.dtype} {tuple(tree.shape)} {tree.stride()}"
    if isinstance(tree, Holder):
        return f"holder {tree.name!r} of {plain(tree.held)}"
    if isinstance(tree, dict):
        return "".join(f"{key!r}: {plain(part)}, " for key, part in tree.items()).join("{}")
    if isinstance(tree, list | tuple):
        return f"{type(tree).__name__} of " + "".join(f"{plain(part)}, " for part in tree).join("()")
    return repr(tree)


def test_arguments_are_of_one_kind_if_they_differ_in_the_values_of_tensors_alone() -> None:
    for one, other in product(TREES, TREES):
        assert (parallel.kind_of(one) == parallel.kind_of(other)) is (plain(one) == plain(other)), (one, other)


def test_every_tensor_of_a_tree_is_changed_in_one_order() -> None:
    for tree in TREES:
        met: list[torch.Tensor] = []
        again: list[torch.Tensor] = []
        changed = parallel.mapped_tensors(tree, lambda x, met=met: met.append(x) or x + len(met))
        parallel.mapped_tensors(changed, again.append)
        assert plain(changed) == plain(tree) and hash(parallel.kind_of(changed)) == hash(parallel.kind_of(tree))
        assert len(met) == plain(tree).count("tensor")
        assert all(torch.equal(x + i, y) for i, (x, y) in enumerate(zip(met, again, strict=True), 1))


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
