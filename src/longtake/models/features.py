"""What a far state learns for itself: features, or maps of what other features are made of.

Features: one small network for each head, with powers of its output (ReHyAt, 2601.04342). Unlike the forms of
`attention.linear` they have weights, one pair of maps a layer. What they make is above 0, so that every far key has a
weight above 0 and a denominator never passes through 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from longtake.attention.linear import Features
from longtake.attention.near_span import NearSpan, PowerWeights
from longtake.attention.rope import Rotation, fitted, rotate
from longtake.models.weights import sizes_of

_NEXT_TO_NOTHING = -30.0  # softplus of it is 1e-13: far from what weighs, and above 0


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Which layers of a network are converted, and how: they attend exactly to a near span, and read what came before
    it through learned features (`LearnedForm`). Part of a network's configuration, and so of its weight file.

    layers: by number. current, overlap: the near span in latent frames (Tc, To). degree: of the features. exact:
    whether anything is attended exactly, see `NearSpan`.
    turns_with_frames: whether what they are made of is turned with frames too, not with row and column alone: better in
    clips as long as those of training, of no use in longer ones and in streams (docs/rehyat.md, H4).
    ValueError for layers that are none, or named twice, and for a span that cannot be.
    """

    layers: tuple[int, ...]
    current: int = 3
    overlap: int = 1
    degree: int = 2
    turns_with_frames: bool = False
    exact: bool = True

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0:
            raise ValueError(f"converted layers are one or more different numbers from 0 on, got {list(self.layers)}")
        if self.degree < 1:
            raise ValueError(f"the degree of features is 1 or more, got {self.degree}")
        _ = self.span  # refuses what cannot be

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Self:
        """From its fields as JSON holds them, see `sizes_of`."""
        return sizes_of(cls, {**described, "layers": tuple(described.get("layers", ()))})

    @property
    def span(self) -> NearSpan:
        return NearSpan(current=self.current, overlap=self.overlap, exact=self.exact)

    def far_frames(self, frames: int) -> int:
        """How many latent frames are far to the last chunk of a clip of so many: the most there ever are."""
        return self.span.chunks(frames)[-1].near


class PowerMap(nn.Module):
    """Head vectors [B, T, N, D] -> features [B, T, N, R] above 0, R = degree * D; each head has a network of its own.

    phi(x) = [psi_1(x), psi_2(x)^2, ..., psi_P(x)^P], psi a network of two layers with R hidden numbers (R and biases
    follow from published counts of parameters: 1.186 million a map at 12 heads of 128, degree 2). GELU and softplus
    are ours: no source names an activation, and features of both signs gave denominators below 0.

    start: what each feature is near to at first, above 0. Output weights begin small, by the power they are raised
    to, so that features begin within some factor of `start`, alike for every power; biases set the level, hidden
    ones are 0. Output in float32 at least, whatever comes in.
    """

    def __init__(self, heads: int, head_dim: int, *, degree: int = 2, start: float = 0.01):
        super().__init__()
        if degree < 1 or not start > 0:
            raise ValueError(f"a degree is 1 or more and a start above 0, got {degree} and {start}")
        self.degree = degree
        features = degree * head_dim
        power_R = torch.arange(1, degree + 1).repeat_interleave(head_dim)
        self.hidden_weight = nn.Parameter(torch.randn(heads, head_dim, features) / head_dim**0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(heads, features))
        self.out_weight = nn.Parameter(torch.randn(heads, features, features) / features**0.5 / 2 / power_R)
        level_R = torch.special.expm1(start ** (1 / power_R.double())).log().float()  # of which softplus is start^(1/p)
        self.out_bias = nn.Parameter(level_R.expand(heads, -1).clone())

    @property
    def features(self) -> int:
        return self.out_bias.shape[-1]

    @property
    def weights(self) -> PowerWeights:
        return PowerWeights(self.hidden_weight, self.hidden_bias, self.out_weight, self.out_bias)

    def forward(self, x_BTND: Tensor) -> Tensor:
        hidden = functional.gelu(_per_head(x_BTND, self.hidden_weight, self.hidden_bias))
        psi = _per_head(hidden, self.out_weight, self.out_bias)
        psi = functional.softplus(psi.to(torch.promote_types(psi.dtype, torch.float32)))
        return torch.cat([part**power for power, part in enumerate(psi.chunk(self.degree, dim=-1), 1)], dim=-1)


class LearnedForm(nn.Module):
    """The features of one layer's queries and keys: two maps, and where positions enter.

    turned_after: features are rotated above the bar (as in `attention.linear`), not the vectors they are made of.
    Then they can be placed anew, but weights above the bar may be below 0. Whether frames turn, or rows and columns
    alone, is a matter of the rotation that is given (`FarShape.turns_with_frames`).
    """

    def __init__(
        self, heads: int, head_dim: int, *, degree: int = 2, far_tokens: int, turned_after: bool = False
    ):  # fmt: skip
        """far_tokens: how many are far in a clip of training. Maps start so that these weigh a tenth or so of what is
        near, if that weighs 1 (`Shift.LOG_MASS`): a layer begins near the window that it has, and not at it.
        """
        super().__init__()
        start = math.sqrt(0.1 / (degree * head_dim * max(1, far_tokens)))
        self.queries = PowerMap(heads, head_dim, degree=degree, start=start)
        self.keys = PowerMap(heads, head_dim, degree=degree, start=start)
        self.turned_after = turned_after

    @torch.no_grad()
    def leave_local(self, heads: Sequence[int]) -> None:
        """Let what is far weigh next to nothing in these heads (1e-20 of what is near), whatever it is."""
        for phi in (self.queries, self.keys):
            phi.out_weight[list(heads)] = 0
            phi.out_bias[list(heads)] = _NEXT_TO_NOTHING

    def features(self, size: int) -> int:
        """How many features a head vector of that size gets."""
        return self.keys.degree * size

    def of_keys(self, plain_BTND: Tensor, rotation: Rotation) -> Features:
        return self._features(self.keys, plain_BTND, rotation)

    def of_queries(self, plain_BTND: Tensor, rotation: Rotation) -> Features:
        return self._features(self.queries, plain_BTND, rotation)

    def _features(self, phi: PowerMap, plain_BTND: Tensor, rotation: Rotation) -> Features:
        if self.turned_after:
            below = phi(plain_BTND)
            return Features(rotate(below, fitted(rotation, below.shape[-1])), below)
        features = phi(rotate(plain_BTND, rotation))
        return Features(features, features)


class OwnMaps(nn.Module):
    """A linear map of head vectors [B, T, N, D] for queries of a far state and one for its keys, each head its own.

    Window and far state ask different things of the same vectors; so what one needs does not bend what the other sees.
    Each map is x + x A. Its A [N, D, D] is what has weights: zero at first, and small beside the identity, which eight
    bits could not hold beside it.
    """

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.queries, self.keys = (nn.Parameter(torch.zeros(heads, head_dim, head_dim)) for _ in range(2))

    def of_queries(self, plain_BTND: Tensor) -> Tensor:
        return plain_BTND + torch.einsum("btnd,nde->btne", plain_BTND, self.queries)

    def of_keys(self, plain_BTND: Tensor) -> Tensor:
        return plain_BTND + torch.einsum("btnd,nde->btne", plain_BTND, self.keys)


def _per_head(x_BTND: Tensor, weight_NDR: Tensor, bias_NR: Tensor) -> Tensor:
    return torch.einsum("btnd,ndr->btnr", x_BTND.to(weight_NDR.dtype), weight_NDR) + bias_NR
