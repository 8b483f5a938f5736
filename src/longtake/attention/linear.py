"""Linear attention: keys and values absorbed into sums of fixed size, which any query can read.

An answer is a quotient. Above the bar features of queries and keys carry their positions, below it they do not
(RoFormer, 2104.09864, section 3.3). Pairs of features are turned by the angles of a head's pairs; where features are
more or fewer, by the same angles again or by some of them (`rope.fitted`). Sums have the type of the features, which
the forms here make in float32, whatever comes in and under autocast too: running means in bfloat16 stop learning after
some minutes of video. Nothing is written in place. Truth: `reference.linear`.

Shapes: B batch, T tokens, N heads, D per head, R features per head.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longtake.attention.rope import Rotation, fitted, rotate

EPS = 1e-6

FeatureMap = Callable[[Tensor], Tensor]
"""Head vectors [..., D] -> features [..., R]."""


class Features(NamedTuple):
    """What tokens put into the sums, or ask them with: above and below the bar, [B, T, N, R] each."""

    above: Tensor
    below: Tensor


class Form(Protocol):
    """What makes features of plain head vectors [B, T, N, D] that stand at a rotation."""

    def features(self, size: int) -> int: ...

    def of_keys(self, plain_BTND: Tensor, rotation: Rotation) -> Features: ...

    def of_queries(self, plain_BTND: Tensor, rotation: Rotation) -> Features: ...


@dataclass(frozen=True)
class LinearForm:
    """What keys and queries pass above the bar before they are rotated, and what both pass below it.

    All maps of a form make equally many features, and those below the bar are not negative.
    """

    keys: FeatureMap
    queries: FeatureMap
    below: FeatureMap = torch.relu

    def features(self, size: int) -> int:
        """How many features a head vector of that size gets."""
        return self.queries(torch.zeros(size)).shape[-1]

    def of_keys(self, plain_BTND: Tensor, rotation: Rotation) -> Features:
        return self._features(self.keys, plain_BTND, rotation)

    def of_queries(self, plain_BTND: Tensor, rotation: Rotation) -> Features:
        return self._features(self.queries, plain_BTND, rotation)

    def _features(self, above: FeatureMap, plain_BTND: Tensor, rotation: Rotation) -> Features:
        plain = plain_BTND.float()
        features = above(plain)
        below = features if self.below is above else self.below(plain)
        return Features(rotate(features, fitted(rotation, features.shape[-1])), below)


def unchanged(x: Tensor) -> Tensor:
    return x


# Hybrid Forcing (2604.10103): as its Figure 2 has it, and as its training and its inference code were released.
PAPER = LinearForm(keys=torch.relu, queries=torch.relu)
REF_TRAIN = LinearForm(keys=unchanged, queries=torch.relu)
REF_INFER = LinearForm(keys=unchanged, queries=unchanged)


def half_width(x: Tensor) -> Tensor:
    """D / 2 features: every other number of `turned`, rectified."""
    return turned(x)[..., ::2].relu()


def both_signs(x: Tensor) -> Tensor:
    """2 D features: nothing is cut away, what is below zero stands beside the rest (CReLU, 1603.05201)."""
    return torch.cat([x.relu(), (-x).relu()], dim=-1)


def both_signs_twice(x: Tensor) -> Tensor:
    """4 D features: those of the vector and of another look at it, `turned`."""
    return torch.cat([both_signs(x), both_signs(turned(x))], dim=-1)


def turned(x: Tensor) -> Tensor:
    """The same vector in other axes, each of which mixes all numbers: an orthonormal cosine transform (DCT-IV)."""
    with _unrounded(x):
        return x @ _cosines(x.shape[-1], x.device).to(x.dtype)


WIDTHS: dict[float, LinearForm] = {
    1 / 2: LinearForm(half_width, half_width, half_width),
    1: PAPER,
    2: LinearForm(both_signs, both_signs, both_signs),
    4: LinearForm(both_signs_twice, both_signs_twice, both_signs_twice),
}
"""Forms by their features R / D, the same map everywhere; nothing in them is learned or drawn. Maps of 2 and 4 hold
the features of 1, and 4 also those of 2 and of the half."""


class Weighed(NamedTuple):
    """Values summed with their weights, [B, T, N, D], and the weights summed, [B, T, N]."""

    above: Tensor
    below: Tensor


class Sums(NamedTuple):
    """What is left of absorbed tokens. mass: how many they were, less what was forgotten (float64: it counts on).

    Concatenated along B, the sums of several streams are those of their batch.
    """

    kv_BNRD: Tensor
    k_BNR: Tensor
    mass_B: Tensor

    def scaled(self, share: float | Tensor) -> "Sums":
        """Let that share weigh on, the same for every row or one a row [B]."""
        share_B = share * torch.ones_like(self.mass_B)
        kv_share, k_share = (share_B.float().view(-1, *[1] * (sums.ndim - 1)) for sums in self[:2])
        return Sums(self.kv_BNRD * kv_share, self.k_BNR * k_share, self.mass_B * share_B)


def sums_of(keys: Features, v_BTND: Tensor) -> Sums:
    """The sums of these tokens alone."""
    batch, tokens = v_BTND.shape[:2]
    with _unrounded(v_BTND):
        kv_BNRD = torch.einsum("btnr,btnd->bnrd", keys.above, v_BTND.to(keys.above.dtype))
    mass_B = torch.full((batch,), float(tokens), dtype=torch.float64, device=v_BTND.device)
    return Sums(kv_BNRD, keys.below.sum(dim=1), mass_B)


def absorb(sums: Sums | None, keys: Features, v_BTND: Tensor) -> Sums:
    """The sums after these tokens too."""
    return added(sums, sums_of(keys, v_BTND))


def added(sums: Sums | None, new: Sums) -> Sums:
    """The sums of what both hold."""
    return new if sums is None else Sums(*(old + more for old, more in zip(sums, new, strict=True)))


def read(sums: Sums, queries: Features) -> Tensor:
    """What the absorbed tokens answer, [B, T, N, D]; 0 where there are none."""
    above_BTND, below_BTN = weigh(sums, queries)
    return above_BTND / (below_BTN + EPS * sums.mass_B.clamp(min=1).float()[:, None, None]).unsqueeze(-1)


def weigh(sums: Sums, queries: Features) -> Weighed:
    """What the absorbed tokens put above and below the bar, not yet divided."""
    with _unrounded(queries.above):
        above_BTND = torch.einsum("btnr,bnrd->btnd", queries.above, sums.kv_BNRD)
        below_BTN = torch.einsum("btnr,bnr->btn", queries.below, sums.k_BNR)
    return Weighed(above_BTND, below_BTN)


def correct(sums: Sums | None, keys: Features, v_BTND: Tensor, stiffness: float) -> Sums:
    """The sums after these tokens by the delta rule: the map from keys to values is corrected, not added to.

    Of unit keys K and values V of a block it becomes argmin_M |K M - V|^2 / T + stiffness |M - old|^2, whatever the
    order of tokens. For one token that is the delta rule (2102.11174) at rate 1 / (1 + stiffness); the block's
    closed form stands for its T steps. The other sums grow as in `absorb`.
    """
    after = absorb(sums, keys, v_BTND)
    unit = _unit(keys.above)
    old = torch.zeros_like(after.kv_BNRD) if sums is None else sums.kv_BNRD
    with _unrounded(v_BTND):
        error_BTND = v_BTND.float() - torch.einsum("btnr,bnrd->btnd", unit, old)
        gram = torch.einsum("btnr,btns->bnrs", unit, unit) / v_BTND.shape[1]
        towards = torch.einsum("btnr,btnd->bnrd", unit, error_BTND) / v_BTND.shape[1]
        change = _StiffSolve.apply(gram, towards, stiffness)
    return after._replace(kv_BNRD=old + change)


class _StiffSolve(torch.autograd.Function):
    """(gram + stiffness)^-1 towards, of mean squares of unit vectors [..., R, R], whose eigenvalues are 0 to 1.

    By Newton's iteration (Schulz, 1933), products alone: a solver waits for the host, and no CUDA graph can hold it.
    """

    @staticmethod
    def forward(ctx: Any, gram: Tensor, towards: Tensor, stiffness: float) -> Tensor:
        one = torch.eye(gram.shape[-1], device=gram.device)
        stiff = gram + stiffness * one
        inverse = one * (2 / (1 + 2 * stiffness))
        far_off = 1 / (1 + 2 * stiffness)  # of the product from one, at most; each turn squares it
        for _ in range(math.ceil(math.log2(math.log(EPS) / math.log(far_off)))):
            inverse = 2 * inverse - inverse @ stiff @ inverse
        solved = _refined(stiff, inverse, towards)
        ctx.save_for_backward(stiff, inverse, solved)
        return solved

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        stiff, inverse, solved = ctx.saved_tensors
        grad = _refined(stiff, inverse, grad)
        return -grad @ solved.mT, grad, None


def _refined(stiff: Tensor, inverse: Tensor, towards: Tensor) -> Tensor:
    """What the inverse answers, and once more of what that leaves over: rounding counts where stiffness is small."""
    answer = inverse @ towards
    return answer + inverse @ (towards - stiff @ answer)


def recall(sums: Sums, queries: Features) -> Tensor:
    """What a map kept by `correct` answers to unit queries, [B, T, N, D]."""
    with _unrounded(queries.above):
        return torch.einsum("btnr,bnrd->btnd", _unit(queries.above), sums.kv_BNRD)


@lru_cache(maxsize=16)
def _cosines(size: int, device: torch.device) -> Tensor:
    """A symmetric orthogonal matrix, computed in float64 on the host: do not write to it."""
    middles = torch.arange(size, dtype=torch.float64) + 0.5
    cosines = (middles.outer(middles) * math.pi / size).cos() * math.sqrt(2 / size)
    return cosines.float().to(device)


def _unrounded(x: Tensor) -> AbstractContextManager[None]:
    """Products in the type that goes in: autocast, which the meta device has not, would round them to bfloat16."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1, eps=EPS)
