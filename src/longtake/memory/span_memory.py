"""What one layer carries from chunk to chunk under ReHyAt (2601.04342): a few exact frames and sums of fixed size.

The recurrent form of `attention.near_span`. A chunk is read against the state any number of times, then committed once;
whatever thereby leaves the near span enters the sums, at that moment and never again. With w the first frame that is
near, the sums hold exactly the frames before w, and a commit adds those from the old w to the new one. The recursions
that the paper is said to print add the near span itself, or all that is far, at every step: with an overlap they count
frames more than once (docs/rehyat.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from longtake.attention.dense import dense
from longtake.attention.near_span import NearSpan, Shift, joined, whole_frames
from longtake.attention.rope import Grid, Rotation, rotate
from longtake.memory.far import FarShape, FarState, Keep
from longtake.memory.view import Tokens
from longtake.memory.window import Keys, Window, WindowShape


@dataclass(frozen=True, kw_only=True)
class SpanShape:
    """How a layer under ReHyAt remembers.

    far: its features, by which rule they are summed (one that adds) and with which positions. shift: `near_span.Shift`.
    Positions are those of the clip: they grow with it, so a clip may not be longer than what was trained. ValueError
    for a rule that does not add: what it keeps has no mass to stand under a bar.
    """

    span: NearSpan
    grid: Grid
    far: FarShape
    shift: Shift | Tensor = Shift.LOG_MASS

    def __post_init__(self) -> None:
        if not isinstance(self.far.rule, Keep):
            raise ValueError(f"what is far must be a sum under a denominator that it shares, not {self.far.rule}")

    @property
    def tokens(self) -> int:
        """Of a latent frame."""
        return self.grid.rows * self.grid.columns

    def rotation(self, frames: Sequence[int], device: torch.device | str) -> Rotation:
        """Of the near queries and keys of these frames."""
        return self.grid.rotation(frames, device)


@dataclass(frozen=True)
class SpanMemory:
    """A value: `attend` leaves it as it is, `commit` returns the next. Gradients pass through it.

    Every committed frame is either in `overlap`, exact and unrotated, or in `far`.
    """

    shape: SpanShape
    overlap: Window
    far: FarState
    frames: int = 0

    @classmethod
    def empty(cls, shape: SpanShape) -> Self:
        """Of a layer that has seen nothing."""
        return cls(shape, Window(WindowShape(sink=0, past=shape.span.overlap)), FarState(shape.far))

    def attend(self, q_BTND: Tensor, k_BTND: Tensor, v_BTND: Tensor) -> Tensor:
        """What the next frames' unrotated queries find in themselves and in what came before, [B, T, N, D].

        ValueError unless they are as many as a near span's current ones, or fewer.
        """
        own = self._next(k_BTND, v_BTND)
        if len(own.frames) > self.shape.span.current:
            raise ValueError(
                f"{len(own.frames)} latent frames exceed the {self.shape.span.current} that are answered together"
            )
        shape, device, held = self.shape, q_BTND.device, self.overlap.held
        if not shape.span.exact:
            far = self.commit(k_BTND, v_BTND).far.weigh(q_BTND, shape.far.rotation(shape.grid, own.frames, device))
            return joined(q_BTND, k_BTND[:, :0], v_BTND[:, :0], far, shape.shift)
        rotation = shape.rotation(own.frames, device)
        q, k, v = rotate(q_BTND, rotation), rotate(k_BTND, rotation), v_BTND
        if held is not None:
            k = torch.cat([rotate(held.k_BTND, shape.rotation(held.frames, device)), k], dim=1)
            v = torch.cat([held.v_BTND, v], dim=1)
        if self.far.sums is None:
            return joined(q, k, v, None, shape.shift)
        far = self.far.weigh(q_BTND, shape.far.rotation(shape.grid, own.frames, device))
        return joined(q, k, v, far, shape.shift)

    def commit(self, k_BTND: Tensor, v_BTND: Tensor) -> Self:
        """The memory after the next frames too, given their unrotated keys and values."""
        own = self._next(k_BTND, v_BTND)
        overlap, gone = self.overlap.append(own)
        far = self.far
        if gone is not None:
            far = far.absorb(gone, self.shape.far.rotation(self.shape.grid, gone.frames, k_BTND.device))
        return replace(self, overlap=overlap, far=far, frames=self.frames + len(own.frames))

    def nbytes(self) -> int:
        """Bytes of exact keys and values, and of the far state."""
        held = self.overlap.held
        return (0 if held is None else held.nbytes()) + self.far.nbytes()

    def _next(self, k_BTND: Tensor, v_BTND: Tensor) -> Keys:
        """The keys of the frames that follow."""
        frames = whole_frames(k_BTND.shape[1], self.shape.tokens)
        return Keys(k_BTND, v_BTND, tuple(range(self.frames, self.frames + frames)))


def attended(memory: SpanMemory, q_BTND: Tensor, k_BTND: Tensor, v_BTND: Tensor) -> Tensor:
    """Chunk after chunk of a clip that follows what a memory holds, from unrotated queries and keys; [B, T, N, D].

    Where nothing is forgotten (`Keep`), the same numbers as `near_span.parallel`. Beside its input and output it holds
    one near span and one state, however long the clip.
    """
    parts, tokens = [], memory.shape.tokens
    for chunk in memory.shape.span.chunks(whole_frames(k_BTND.shape[1], tokens)):
        now = chunk.own(tokens)
        parts.append(memory.attend(q_BTND[:, now], k_BTND[:, now], v_BTND[:, now]))
        memory = memory.commit(k_BTND[:, now], v_BTND[:, now])
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class SpanView:
    """A whole clip at one moment of its denoising, some of whose layers are converted (the published way).

    converted: layers by number, each with its own features. They go through the clip from left to right; in all others
    every token sees every token. So this is no stream: what a chunk becomes depends on later ones, and what the
    converted layers sum up are keys at the present noise level. `rotation` is that of the clip from frame 0.
    """

    rotation: Rotation
    converted: Mapping[int, SpanShape]

    def attend(self, layer: int, own: Tokens) -> Tensor:
        if layer not in self.converted:
            return dense(own.q, own.k, own.v)
        return attended(SpanMemory.empty(self.converted[layer]), own.plain_q, own.plain_k, own.v)
