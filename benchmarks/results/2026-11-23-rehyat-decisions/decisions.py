"""Numbers of ReHyAt's checks that need no training: what tests only bound, told.

python benchmarks/results/2026-11-23-rehyat-decisions/decisions.py > decisions.json   # a minute on a CPU core
"""

import json
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.attention import test_near_span as near
from tests.memory import test_span_memory as memory

from longtake.attention import linear, reference
from longtake.attention.near_span import NearSpan
from longtake.attention.rope import Grid
from longtake.memory.far import FarShape, FarState, Keep, MassCap
from longtake.memory.span_memory import SpanMemory, attended
from longtake.models.features import LearnedForm

CUTS = [(3, 1), (5, 2), (2, 3), (3, 0), (1, 1)]  # Tc, To


def largest(got: torch.Tensor, want: torch.Tensor) -> float:
    return (got - want).abs().max().item()


def shifts() -> dict[str, Any]:
    """H1. Features that weigh exactly exp(score - number): how far from dense attention, beside its L2, cut by cut."""
    frames, tokens = 8, 2
    q, k, v, *_ = near.drawn(frames * tokens)
    fq = (torch.einsum("btnd,bsnd->btns", q, k) / 2 - near.UNIT_N[:, None]).exp()
    fk = torch.eye(frames * tokens, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1)
    found: dict[str, Any] = {name: [] for name in near.SHIFTS}
    for current, overlap in CUTS:
        span = NearSpan(current=current, overlap=overlap)
        want = reference.dense(q, k, v, sum(reference.near_and_far(frames, tokens, current, overlap)) > 0)
        for name, (ours, _) in near.SHIFTS.items():
            got = near.in_parallel(span, tokens, ours)(q, k, v, fq, fk)
            found[name].append(((got - want).norm() / want.norm()).item())
    alone, whole = [], []
    q, k, v, fq, fk = near.drawn(frames * tokens)
    for ours, _ in near.SHIFTS.values():
        span = NearSpan(current=3, overlap=1)
        got = near.in_parallel(span, tokens, ours)(q, k, v, 0 * fq, 0 * fk)
        alone.append(largest(got, reference.dense(q, k, v, reference.near_and_far(frames, tokens, 3, 1)[0])))
        span = NearSpan(current=frames, overlap=0)
        whole.append(largest(near.in_parallel(span, tokens, ours)(q, k, v, fq, fk), reference.dense(q, k, v)))
    return {
        "cuts": CUTS,
        "l2": found,
        "no_far_mass_beside_near_alone": max(alone),
        "span_of_all_beside_dense": max(whole),
    }


def widths() -> dict[str, Any]:
    """H3. At heads of 128, 12 of them, degree 2."""
    form = LearnedForm(12, 128, far_tokens=1)
    layer = sum(p.numel() for p in form.parameters())
    products = 2 * 12 * (128 * 256 + 256 * 256)  # of a token, in one map
    return {"parameters_a_layer": layer, "a_map": layer // 2, "gflop_a_map_of_12600_tokens": 12_600 * products / 1e9}


def recursion(draws: int = 60) -> dict[str, Any]:
    """H5, H8. Random Tc, To, lengths (ragged ends too), shifts, positions, batch 2; and the two printed recursions."""
    die, worst = Random(0), {"values": 0.0, "gradients": 0.0, "float32": 0.0}
    for seed in range(draws):
        span = NearSpan(current=die.randint(1, 7), overlap=die.randint(0, 5))
        frames, shift = die.randint(1, 16), die.choice(sorted(memory.SHIFTS))
        shape, tensors = memory.shape_of(span, shift, die.choice(["all", "space"])), memory.drawn(frames, seed)
        made = [
            memory.results(partial(function, *bound), shape, tensors)
            for function, bound in (
                (attended, (SpanMemory.empty(shape),)),
                (memory.at_once, (shape,)),
                (memory.by_definition, (shape, shift)),
            )
        ]
        for other in made[1:]:
            worst["values"] = max(worst["values"], largest(made[0][0], other[0]))
            for got, want in zip(made[0][1:], other[1:], strict=True):
                worst["gradients"] = max(worst["gradients"], largest(got, want))
        memory.form_of(shape).float()
        narrow = attended(SpanMemory.empty(shape), *(x.float() for x in tensors))
        worst["float32"] = max(worst["float32"], largest(narrow.double(), made[0][0]))
    return {"draws": draws, "largest_difference": worst, "wrong_by_l2": printed()}


def printed() -> dict[str, list[float]]:
    """As `test_of_three_recursions_only_what_leaves_is_the_definition`, cut by cut."""
    found: dict[str, list[float]] = {}
    for current, overlap in CUTS:
        shape = memory.shape_of(NearSpan(current=current, overlap=overlap))
        q, k, v = memory.drawn(11)
        queries, keys = memory.features(shape, q, k, range(11))
        rotation = memory.GRID.rotation(range(11), "cpu")
        turned_q, turned_k = (memory.rotate(x, rotation) for x in (q, k))
        weights = torch.einsum("btnr,bsnr->bnts", queries.below, keys.below)
        exact, _ = reference.near_and_far(11, memory.TOKENS, current, overlap)
        got = attended(SpanMemory.empty(shape), q, k, v)
        for rule in (memory.leaving, memory.near_again, memory.far_again):
            times = torch.zeros(exact.shape, dtype=torch.float64)
            for chunk, following in pairwise(shape.span.chunks(11)):
                rows = slice(following.begin * memory.TOKENS, following.end * memory.TOKENS)
                added = rule(chunk, following)
                times[rows] = times[chunk.begin * memory.TOKENS]
                times[rows, added.start * memory.TOKENS : added.stop * memory.TOKENS] += 1
            one = reference.one_bar(turned_q, turned_k, v, weights, exact, times, memory.SHIFTS["log mass"][1])
            found.setdefault(rule.__name__, []).append(((one - got).norm() / got.norm()).item())
    return found


def masses() -> dict[str, Any]:
    """H7. Mean share of what is far, after so many chunks of like keys; 655 are 1,965 frames."""
    at = (5, 65, 165, 655)
    return {
        name: {count: round(shares[count - 1], 4) for count in at}  # the first is read after one chunk
        for name, shares in (
            ("keep", memory.far_share(Keep(), max(at) + 1)),
            ("cap of a clip of training", memory.far_share(MassCap(frames=15), max(at) + 1)),
        )
    }


def drift() -> float:
    """H14. float32 sums of 5,000 chunks beside those in float64: the larger of sums and masses, in L2."""
    grid: Grid = memory.GRID
    _, k, v = (x[:1] for x in memory.drawn(40))
    form = LearnedForm(memory.HEADS, memory.HEAD, far_tokens=10_000)
    wide = FarState(FarShape(form=LearnedForm(memory.HEADS, memory.HEAD, far_tokens=1).double())).shape.form
    wide.load_state_dict(form.state_dict())
    rotation, tokens = grid.rotation(range(1), "cpu"), memory.TOKENS
    pieces = [(k[:, i : i + tokens].float(), v[:, i : i + tokens].float()) for i in range(0, k.shape[1], tokens)]
    with torch.no_grad():
        narrow_keys = [form.of_keys(k, rotation) for k, _ in pieces]
        wide_keys = [wide.of_keys(k.double(), rotation) for k, _ in pieces]
        narrow = exact = None
        for i in range(5000):
            narrow = linear.absorb(narrow, narrow_keys[i % 40], pieces[i % 40][1])
            exact = linear.absorb(exact, wide_keys[i % 40], pieces[i % 40][1].double())
    return max(((got - want).norm() / want.norm()).item() for got, want in zip(narrow[:2], exact[:2], strict=True))


if __name__ == "__main__":
    torch.manual_seed(0)
    print(
        json.dumps(
            {
                "torch": torch.__version__, "H1": shifts(), "H3": widths(), "H5, H8": recursion(), "H7": masses(),
                "H14": {"drift_of_5000_chunks": drift()},
            },
            indent=1,
        )
    )  # fmt: skip
