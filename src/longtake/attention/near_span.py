"""Exact attention within a span of time, linear attention to all before it, one denominator (ReHyAt, 2601.04342).

A sequence is cut into chunks of whole latent frames. A chunk attends exactly to itself, in both directions, and to a
few frames before it; of everything earlier it reads sums (`linear`). Without an exact part it reads
itself from sums too: the end of a sweep, where there is no softmax. Here all chunks are answered at once, which the
recurrent form, `memory.span_memory`, and the kernels of `span_triton` are held to. Truth: `reference.one_bar`.

Shapes: B batch, T tokens (frame-major), N heads, D per head, R features per head, F latent frames, G chunks of a group.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.attention import linear
from longtake.attention.dense import dense, massed
from longtake.attention.join import under_one_bar
from longtake.attention.linear import Features, Sums, Weighed


class Chunk(NamedTuple):
    """Latent frames begin..end - 1, answered together; near..end - 1 are near to them, all before `near` far."""

    near: int
    begin: int
    end: int

    def own(self, tokens: int) -> slice:
        """Its own tokens, of frames of so many."""
        return slice(self.begin * tokens, self.end * tokens)

    def seen(self, tokens: int) -> slice:
        """All tokens that are near to it, its own included."""
        return slice(self.near * tokens, self.end * tokens)


@dataclass(frozen=True, kw_only=True)
class NearSpan:
    """What is near: `current` latent frames that are answered together (Tc), and `overlap` before them (To).

    exact: false: nothing is, and frames answered together are far to themselves. They then overlap nothing.
    """

    current: int
    overlap: int
    exact: bool = True

    def __post_init__(self) -> None:
        if self.current < 1 or self.overlap < 0:
            raise ValueError(
                f"a near span has 1 current latent frame or more and 0 before it or more, "
                f"got {self.current} and {self.overlap}"
            )
        if self.overlap and not self.exact:
            raise ValueError(f"where nothing is exact nothing overlaps, got an overlap of {self.overlap}")

    def require_exact(self, what: str) -> None:
        """ValueError for a span that leaves nothing exact, which whole clips in plain torch alone can do with."""
        if not self.exact:
            raise ValueError(f"{what} cannot do without an exact near span")

    def chunks(self, frames: int) -> list[Chunk]:
        """The chunks of so many frames, the last as long as what is left."""
        begins = range(0, frames, self.current)
        ends = [min(frames, begin + self.current) for begin in begins]
        nears = [max(0, begin - self.overlap) for begin in begins] if self.exact else ends
        return [Chunk(*one) for one in zip(nears, begins, ends, strict=True)]


class Shift(Enum):
    """By how much near scores are lowered before they are weights: what a far weight of 1 is worth.

    Not neutral, since the far part is not lowered with them. LOG_MASS: by their log-sum-exp, so that all that is near
    weighs 1. TOP: by the largest, as printed. A tensor [N] in the place of these: by a number a head; the one form in
    which far weights of exp(score - number) give dense attention whatever the span.
    """

    LOG_MASS = auto()
    TOP = auto()


class PowerWeights(NamedTuple):
    """What a map from head vectors to features learned, see `models.features.PowerMap`: [N, D, R], [N, R], [N, R, R],
    [N, R]."""

    hidden_NDR: Tensor
    hidden_bias_NR: Tensor
    out_NRR: Tensor
    out_bias_NR: Tensor


def joined(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, far: Weighed | None, shift: Shift | Tensor) -> Tensor:
    """Attention to near keys, and to what is far if anything is, under one denominator; returns [B, T, N, D].

    One of the two may be missing, not both.
    """
    if far is not None and not k_BSND.shape[1]:
        return under_one_bar(torch.zeros_like(q_BTND), far, torch.full_like(far.below, -torch.inf))
    if far is None or shift is Shift.LOG_MASS:  # the only shift that fused kernels can serve: it cancels
        near_BTND = dense(q_BTND, k_BSND, v_BSND)
        return near_BTND if far is None else under_one_bar(near_BTND, far)
    near = massed(q_BTND, k_BSND, v_BSND)
    return under_one_bar(near.out, far, near.log_mass_BTN - (shift if isinstance(shift, Tensor) else near.top_BTN))


def parallel(
    q_BTND: Tensor, k_BTND: Tensor, v_BTND: Tensor, queries: Features, keys: Features,
    *, span: NearSpan, tokens: int, shift: Shift | Tensor = Shift.LOG_MASS,
) -> Tensor:  # fmt: skip
    """All chunks of a sequence at once; returns [B, T, N, D]. Queries and keys are rotated, features too if they are.

    tokens: of a latent frame. ValueError where they do not divide the sequence, or there is none.
    """
    batch, length = q_BTND.shape[:2]
    chunks = span.chunks(whole_frames(length, tokens))
    before = _sums_before([chunk.near for chunk in chunks], keys, v_BTND, tokens)
    parts: dict[int, Tensor] = {}
    for group in alike(chunks):
        asking, near = [chunks[i].own(tokens) for i in group], [chunks[i].seen(tokens) for i in group]
        far = linear.weigh(
            Sums(*(x.unflatten(0, (batch, -1))[:, group].flatten(0, 1) for x in before)),
            Features(*(stacked(x, asking) for x in queries)),
        )
        answer = joined(stacked(q_BTND, asking), stacked(k_BTND, near), stacked(v_BTND, near), far, shift)
        parts |= zip(group, answer.unflatten(0, (batch, -1)).unbind(1), strict=True)
    return torch.cat([parts[i] for i in range(len(chunks))], dim=1)


def whole_frames(length: int, tokens: int) -> int:
    """How many latent frames a sequence of that length is. ValueError unless it is a whole number above 0."""
    if not length or length % tokens:
        raise ValueError(f"{length} tokens are no whole number of latent frames of {tokens}")
    return length // tokens


def stacked(x_BTND: Tensor, pieces: list[slice]) -> Tensor:
    """Pieces of time as rows of a batch, [B * G, T, N, D]: as long as each other, as far apart, and maybe overlapping.
    Those of one clip are not copied."""
    size = pieces[0].stop - pieces[0].start
    step = pieces[1].start - pieces[0].start if len(pieces) > 1 else max(1, size)
    part_BTND = x_BTND[:, pieces[0].start : pieces[-1].stop]
    return part_BTND.unfold(1, size, step).movedim(-1, 2).flatten(0, 1)


def _sums_before(frames: list[int], keys: Features, v_BTND: Tensor, tokens: int) -> Sums:
    """The sums of all tokens before each of these frames, as rows [B * frames, ...]."""
    batch = v_BTND.shape[0]
    above, below, v = (x.unflatten(1, (-1, tokens)).flatten(0, 1) for x in (*keys, v_BTND))
    each = linear.sums_of(Features(above, below), v)

    def before(x: Tensor) -> Tensor:
        upto = x.unflatten(0, (batch, -1)).cumsum(1)
        from_nothing = torch.cat([torch.zeros_like(upto[:, :1]), upto], dim=1)
        return from_nothing[:, frames].flatten(0, 1)

    return Sums(*(before(x) for x in each))


def alike(chunks: list[Chunk]) -> list[list[int]]:
    """Numbers of the chunks, grouped by how long they and what is near to them are; those of a group are neighbours."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, chunk in enumerate(chunks):
        groups.setdefault((chunk.end - chunk.begin, chunk.end - chunk.near), []).append(i)
    return list(groups.values())
