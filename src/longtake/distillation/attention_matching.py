"""Teach learned features, layer by layer, to answer as the softmax attention that they stand in for.

Value distillation (Attention Surgery, 2509.24899, eq. 7; ReHyAt, 2601.04342, eq. 19): the frozen layer's own queries,
keys and values are attended exactly, and by its near span with sums of all before; the L1 between the two answers
teaches the maps, and nothing else learns. What is taught knows of no network: `Asked` is all it sees of an attention.

Shapes: B batch, T tokens, N heads, D per head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.attention import linear
from longtake.attention.dense import dense
from longtake.attention.linear import Sums
from longtake.attention.near_span import NearSpan, Shift, joined
from longtake.attention.rope import Rotation, rotate
from longtake.memory.view import Tokens
from longtake.models.features import LearnedForm


class Asked(NamedTuple):
    """What one softmax attention asks and holds, [B, T, N, D] each, as it enters the softmax (scores over sqrt(D)).

    frame_T: the latent frame of each token, whole numbers on the host, in any order, as many of each as there are.
    features_q, features_k: queries and keys as features shall see them, where that is with other positions than the
    softmax does, or with none; None: the same.
    """

    q_BTND: Tensor
    k_BTND: Tensor
    v_BTND: Tensor
    frame_T: Tensor
    features_q_BTND: Tensor | None = None
    features_k_BTND: Tensor | None = None


class Match(NamedTuple):
    """How far a head's answers are from the exact ones, in L1 [N]: beside the error of the near span alone (1: its sums
    are of no use), and beside the size of the exact answers. The same where nothing is near, whose answer is 0."""

    beside_near_N: Tensor
    beside_answer_N: Tensor


def match(form: LearnedForm, asked: Asked, span: NearSpan, *, both_ways: bool = False) -> Match:
    """Answer by near span and features, and compare; gradients reach the form's maps.

    both_ways: whether the exact answer is that of attention to all tokens, later ones included, as in a network that
    looks both ways (published). Otherwise it is that of attention up to the end of each chunk, all that an answer from
    left to right can know. ValueError where nothing is far: there is nothing to teach; and where not every token has a
    frame.
    """
    asked, _ = _in_order(asked)
    pieces = _pieces(asked.frame_T, span)
    if not any(_length(piece.leaving) for piece in pieces):
        raise nothing_far(span)
    with torch.no_grad():
        q, k, v = asked[:3]

        def exactly(piece: _Piece, seen: slice) -> Tensor:
            if not _length(seen):
                return torch.zeros_like(q[:, piece.asking])
            return dense(q[:, piece.asking], k[:, seen], v[:, seen])

        near = torch.cat([exactly(piece, piece.near) for piece in pieces], dim=1)
        upto = (exactly(piece, slice(0, piece.asking.stop)) for piece in pieces)
        exact = dense(q, k, v) if both_ways else torch.cat(list(upto), dim=1)
    error_N, near_N, size_N = (_l1(x) for x in (hybrid(form, asked, span) - exact, near - exact, exact))
    return Match(error_N / near_N.clamp_min(1e-12), error_N / size_N.clamp_min(1e-12))


def nothing_far(span: NearSpan) -> ValueError:
    """What is said where a clip is no longer than the near span of its last chunk."""
    return ValueError(
        f"near spans of {span.current} + {span.overlap} latent frames hold the whole clip: nothing is far"
    )


def hybrid(form: LearnedForm, asked: Asked, span: NearSpan) -> Tensor:
    """Each chunk's exact attention to its near span joined with sums of all before it, [B, T, N, D].

    ValueError where not every token has a frame.
    """
    asked, order = _in_order(asked)
    q, k, v = asked[:3]
    queries = form.queries(q if asked.features_q_BTND is None else asked.features_q_BTND)
    keys = form.keys(k if asked.features_k_BTND is None else asked.features_k_BTND)
    sums: Sums | None = None
    answers: list[Tensor] = []
    for piece in _pieces(asked.frame_T, span):
        if _length(piece.leaving):
            gone = keys[:, piece.leaving]
            sums = linear.absorb(sums, linear.Features(gone, gone), v[:, piece.leaving])
        asking = queries[:, piece.asking]
        far = linear.weigh(sums, linear.Features(asking, asking)) if sums else None
        answers.append(joined(q[:, piece.asking], k[:, piece.near], v[:, piece.near], far, Shift.LOG_MASS))
    answer = torch.cat(answers, dim=1)
    return answer if order is None else answer[:, order.argsort()]


@dataclass(frozen=True)
class AskingView:
    """A whole clip in which every token sees every token, telling what each layer asks as it is asked.

    turned: where features see their queries and keys; see `FarShape.rotation`.
    """

    rotation: Rotation
    turned: Rotation
    frame_T: Tensor
    tell: Callable[[int, Asked], None]

    def attend(self, layer: int, own: Tokens) -> Tensor:
        seen_q, seen_k = rotate(own.plain_q, self.turned), rotate(own.plain_k, self.turned)
        self.tell(layer, Asked(own.q, own.k, own.v, self.frame_T, seen_q, seen_k))
        return dense(own.q, own.k, own.v)


def easiest(errors: Mapping[int, float], share: float) -> tuple[int, ...]:
    """A share of the layers, at least one: those whose answers are nearest to the exact ones. In order of layers."""
    count = max(1, round(share * len(errors)))
    return tuple(sorted(sorted(errors, key=lambda layer: (errors[layer], layer))[:count]))


def _in_order(asked: Asked) -> tuple[Asked, Tensor | None]:
    """The same with its tokens frame by frame, and their old numbers in the new order; None: they stood so.

    Pieces of time are then slices. Picked by number they would be copied, and summed up by a sort on the way back.
    """
    for x_BTND in asked[:3]:
        if asked.frame_T.shape != x_BTND.shape[1:2]:
            raise ValueError(f"frames {list(asked.frame_T.shape)} are not those of {x_BTND.shape[1]} tokens")
    order = asked.frame_T.argsort(stable=True)
    if torch.equal(asked.frame_T[order], asked.frame_T):
        return asked, None
    q, k, v = (x[:, order] for x in asked[:3])
    features_q, features_k = (x if x is None else x[:, order] for x in asked[4:])
    return Asked(q, k, v, asked.frame_T[order], features_q, features_k), order


class _Piece(NamedTuple):
    """A chunk's tokens, which stand frame by frame: those that ask, those that are near to them, and those that were
    near to the chunk before and are so no longer."""

    asking: slice
    near: slice
    leaving: slice


def _pieces(frame_T: Tensor, span: NearSpan) -> list[_Piece]:
    frame_T = frame_T - frame_T[0]
    pieces, near_before = [], 0
    for chunk in span.chunks(int(frame_T[-1]) + 1):
        begin, end, near = (int((frame_T < frame).sum()) for frame in (chunk.begin, chunk.end, chunk.near))
        if begin < end:
            pieces.append(_Piece(slice(begin, end), slice(near, end), slice(near_before, near)))
            near_before = near
    return pieces


def _length(piece: slice) -> int:
    return int(piece.stop - piece.start)


def _l1(x_BTND: Tensor) -> Tensor:
    return x_BTND.float().abs().mean((0, 1, 3))
