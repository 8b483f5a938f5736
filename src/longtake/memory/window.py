"""The exact part of a memory: the first frames (sink) and the most recent ones (past), with unrotated keys.

Two forms of one rule, with the same verbs; each hands back the next window, and what slides out. `Window` makes new
tensors (training: autograd and forking are then trivial); `RingWindow` writes into fixed buffers and is its own next
(serving: nothing is allocated).
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class WindowShape:
    """How many latent frames stay: the first `sink` of the stream, and the latest `past` of those behind them."""

    sink: int
    past: int

    def __post_init__(self) -> None:
        if self.sink < 0 or self.past < 0:
            raise ValueError(f"a window cannot hold a negative number of frames: sink {self.sink}, past {self.past}")

    @property
    def frames(self) -> int:
        return self.sink + self.past


class Keys(NamedTuple):
    """Unrotated keys and values of whole latent frames, [B, frames * tokens a frame, N, D], and the frames' numbers."""

    k_BTND: Tensor
    v_BTND: Tensor
    frames: tuple[int, ...]

    def select(self, chosen: list[int]) -> "Keys":
        """The chosen frames (indices into `frames`), as copies."""
        k_BTND, v_BTND = (_taken(_by_frame(x, len(self.frames)), chosen).flatten(1, 2) for x in self[:2])
        return Keys(k_BTND, v_BTND, tuple(self.frames[i] for i in chosen))

    def seen(self, frames: Sequence[int]) -> "Keys":
        """These frames by their numbers, in this order; itself where nothing differs."""
        return self if tuple(frames) == self.frames else self.select([self.frames.index(frame) for frame in frames])

    def joined(self, later: "Keys") -> "Keys":
        """These frames, then others."""
        k_BTND, v_BTND = (torch.cat(pair, dim=1) for pair in zip(self[:2], later[:2], strict=True))
        return Keys(k_BTND, v_BTND, self.frames + later.frames)

    def nbytes(self) -> int:
        return self.k_BTND.nbytes + self.v_BTND.nbytes


@dataclass(frozen=True)
class Window:
    """Sink and past as a value: `append` returns the next window and leaves this one as it is."""

    shape: WindowShape
    held: Keys | None = None

    def append(self, new: Keys) -> tuple["Window", Keys | None]:
        """The window after `new` frames (numbered on from those before), and what slid out of it."""
        joined = new if self.held is None else self.held.joined(new)
        leaving = _leaving(joined.frames, self.shape)
        if not leaving:
            return Window(self.shape, joined), None
        staying = [i for i in range(len(joined.frames)) if i not in set(leaving)]
        held = joined.select(staying) if staying else None
        return Window(self.shape, held), joined.select(leaving)

    def only(self, frames: Container[int]) -> "Window":
        """The window that holds none but these of its frames."""
        held = self.held
        staying = [frame for frame in held.frames if frame in frames] if held is not None else []
        return Window(self.shape, held.seen(staying) if held is not None and staying else None)

    def rewritten(self, keys: Keys) -> "Window":
        """The window with these keys and values in the place of those that it holds of the same frames."""
        assert self.held is not None, "nothing is held yet"
        others = [i for i, frame in enumerate(self.held.frames) if frame not in keys.frames]
        return Window(self.shape, keys.joined(self.held.select(others)).seen(self.held.frames))


class RingWindow:
    """Sink and past in buffers that are allocated once; the frames stand in the order of their slots, not of time."""

    def __init__(self, shape: WindowShape):
        self.shape = shape
        self._frames: list[int] = []
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    @property
    def held(self) -> Keys | None:
        """What is remembered, as views of the buffers: valid until the next append."""
        if self._k is None or self._v is None or not self._frames:
            return None
        count = len(self._frames)
        return Keys(self._k[:, :count].flatten(1, 2), self._v[:, :count].flatten(1, 2), tuple(self._frames))

    @property
    def is_full(self) -> bool:
        """Whether it holds as many frames as it ever will."""
        return len(self._frames) == self.shape.frames

    def append(self, new: Keys) -> tuple[Self, Keys | None]:
        """Take `new` frames in place of the oldest of the past; returns itself, and copies of what slid out."""
        numbers = tuple(self._frames) + new.frames
        leaving = _leaving(numbers, self.shape)
        out = self._copy(leaving, new) if leaving else None
        gone = [numbers[i] for i in leaving]
        free = [slot for slot, frame in enumerate(self._frames) if frame in gone]
        for i, frame in enumerate(new.frames):
            if frame not in gone:
                self._write(free.pop(0) if free else len(self._frames), i, new)
        return self, out

    def only(self, frames: Container[int]) -> Self:
        """Forget all but these frames; returns itself."""
        staying = [slot for slot, frame in enumerate(self._frames) if frame in frames]
        for buffer in (self._k, self._v):
            if buffer is not None:
                buffer[:, : len(staying)] = buffer[:, staying]  # a copy: indices by list make one first
        self._frames = [self._frames[slot] for slot in staying]
        return self

    def rewritten(self, keys: Keys) -> Self:
        """Put these keys and values in the place of those that are held of the same frames; returns itself."""
        for index, frame in enumerate(keys.frames):
            self._write(self._frames.index(frame), index, keys)
        return self

    def _copy(self, indices: list[int], new: Keys) -> Keys:
        held = self.held
        if held is not None and max(indices) < len(held.frames):
            return held.select(indices)
        return (new if held is None else held.joined(new)).select(indices)

    def _write(self, slot: int, index: int, new: Keys) -> None:
        count = len(new.frames)
        if self._k is None or self._v is None:
            k = _by_frame(new.k_BTND, count)
            self._k = k.new_empty(k.shape[0], self.shape.frames, *k.shape[2:])
            self._v = torch.empty_like(self._k)
        self._k[:, slot] = _by_frame(new.k_BTND, count)[:, index]
        self._v[:, slot] = _by_frame(new.v_BTND, count)[:, index]
        self._frames[slot : slot + 1] = [new.frames[index]]


def _leaving(frames: tuple[int, ...], shape: WindowShape) -> list[int]:
    """Indices of the frames that do not stay, oldest first: all but the sink and the latest `past` behind it."""
    behind_sink = sorted((frame, i) for i, frame in enumerate(frames) if frame >= shape.sink)
    return [i for _, i in behind_sink[: max(0, len(behind_sink) - shape.past)]]


def _by_frame(x_BTND: Tensor, frames: int) -> Tensor:
    return x_BTND.unflatten(1, (frames, -1))


def _taken(x_BFTND: Tensor, chosen: list[int]) -> Tensor:
    """Copies of the chosen frames, run by run: an index would have to travel to the device."""
    ends = [i + 1 for i, (one, following) in enumerate(pairwise(chosen)) if following != one + 1]
    runs = [chosen[start:end] for start, end in pairwise([0, *ends, len(chosen)])]
    return torch.cat([x_BFTND[:, run[0] : run[-1] + 1] for run in runs if run] or [x_BFTND[:, :0]], dim=1)
