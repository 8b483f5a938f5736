"""What one forward pass reads: each view turns a layer's own tokens into attended values.

A view is a value: any number of passes may read it, none changes it. A network rotates its tokens by `view.rotation`
and calls `view.attend`, so every backbone can read through every view.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longtake.attention.dense import dense
from longtake.attention.join import added, under_one_bar
from longtake.attention.rope import Grid, RotaryAxes, Rotation, lasting, rotate
from longtake.memory.far import FarShape, FarState
from longtake.memory.window import Keys, WindowShape

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [B, T, N, D], keys and values [B, S, N, D] -> [B, T, N, D]."""

Rotate = Callable[[Tensor, Rotation], Tensor]
"""Keys [B, T, N, D], turned by the angles of their tokens; `rope.rotate` defines it."""


class Tokens(NamedTuple):
    """A layer's own tokens, [B, T, N, D] each: queries and keys rotated at their positions, both plain, values."""

    q: Tensor
    k: Tensor
    plain_q: Tensor
    plain_k: Tensor
    v: Tensor


class View(Protocol):
    """How the tokens of one pass attend. `rotation` holds their own positions; the answer has the shape of q."""

    @property
    def rotation(self) -> Rotation: ...

    def attend(self, layer: int, own: Tokens) -> Tensor: ...


@dataclass(frozen=True)
class ClipView:
    """A whole clip at once: every token sees every token, or those that a boolean mask of tokens allows."""

    rotation: Rotation
    mask_TT: Tensor | None = None

    def attend(self, layer: int, own: Tokens) -> Tensor:
        return dense(own.q, own.k, own.v, self.mask_TT)


class FarView(NamedTuple):
    """A layer's far memory, the layer's projection of what is read from it, and where those stand who ask.

    Without a projection the layer is a converted one: near and far stand under one denominator.
    """

    state: FarState
    project: Callable[[Tensor], Tensor] | None
    rotation: Rotation

    def add_to(self, near_BTND: Tensor, plain_q_BTND: Tensor) -> Tensor:
        if self.project is None:
            return under_one_bar(near_BTND, self.state.weigh(plain_q_BTND, self.rotation))
        return added(near_BTND, self.state.read(plain_q_BTND, self.rotation), self.project, self.state.present_B)


@dataclass(frozen=True)
class MemoryView:
    """A block in front of a memory: its tokens see what each layer remembers (rotated already), and each other.

    far: of the layers that have something far, by number.
    """

    rotation: Rotation
    layers: Sequence[tuple[Tensor, Tensor] | None]
    near: Attend = dense
    far: Mapping[int, FarView] = field(default_factory=dict)

    def attend(self, layer: int, own: Tokens) -> Tensor:
        k_BTND, v_BTND = own.k, own.v
        remembered = self.layers[layer]
        if remembered is not None:
            k_BTND = torch.cat([remembered[0], k_BTND], dim=1)
            v_BTND = torch.cat([remembered[1], v_BTND], dim=1)
        near_BTND = self.near(own.q, k_BTND, v_BTND)
        return self.far[layer].add_to(near_BTND, own.plain_q) if layer in self.far else near_BTND


class TeacherForcedView:
    """Streaming in one pass: a clean copy of a clip in front of a noisy one, [B, 2 * frames * tokens per frame, N, D].

    A clean block answers as if it were being committed, a noisy block as if it were being denoised: each sees the
    clean frames that the window would hold at that moment, at the positions it would give them, and itself. Equal
    to streaming with that memory (tested), but parallel. Blocks with equally many remembered frames share a call; only
    the sums of what is far are made block by block.

    near: how the window is attended. commits_keep_sink: see `MemoryShape`. far: what each layer, by number, makes of
    frames that left the window, all placed alike, and projections: of what a layer reads from it; without one it stands
    under the window's denominator; the sink must not enter it. together: how many noisy blocks, one after
    the other, are denoised in one call and see each other; none given: each alone. They read no far state: ValueError.
    """

    def __init__(
        self, axes: RotaryAxes, shape: WindowShape, extent: int | None, block: int, blocks: int,
        rows: int, columns: int, device: torch.device | str, *,
        near: Attend = dense, commits_keep_sink: bool = True, far: Mapping[int, FarShape] | None = None,
        projections: Sequence[Callable[[Tensor], Tensor]] = (), together: Sequence[int] = (),
    ):  # fmt: skip
        if far and together:
            raise ValueError("blocks that are denoised together cannot read a far state")
        self.block, self.blocks, self.tokens = block, blocks, rows * columns
        self._near, self._far, self._projections = near, far or {}, projections
        frames, windows = (
            [range(a * block, b * block) for a, b in pairwise((0, *accumulate(counts)))]
            for counts in ([1] * blocks, together or [1] * blocks)
        )
        grid = Grid(axes, rows, columns)
        placed = next(iter(self._far.values()), None)
        self._moments = [_moment(own, placed, grid, shape, extent, device) for own in frames] if placed else []
        positions = [f for own in (*frames, *windows) for f in place_frames((), own, shape.sink, extent).current]
        self.rotation = grid.rotation(positions, device)

        def readings(passes: list[range], sink: int) -> list[_Reading]:
            held = [fitting(_held_frames(own.start, shape), len(own), sink, extent) for own in passes]
            return list(zip(passes, map(tuple, held), strict=True))

        def at_their_places(own: range, held: Sequence[int]) -> Rotation:
            return grid.rotation(place_frames(held, own, shape.sink, extent).held, device)

        self._groups = [
            _Group(
                halves=halves,
                own=lasting(_numbers(tuple(tuple(own) for own, _ in alike), device)),
                held=lasting(_numbers(tuple(held for _, held in alike), device)),
                rotation=_stack([at_their_places(*one) for one in alike]),
            )
            for halves, alike in _equally_long(
                readings(frames, shape.sink if commits_keep_sink else 0), readings(windows, shape.sink)
            )
        ]

    def attend(self, layer: int, own: Tokens) -> Tensor:
        halves = (2, self.blocks * self.block, self.tokens)
        q, k, plain_k, v = (x.unflatten(1, halves) for x in (own.q, own.k, own.plain_k, own.v))
        clean_k, clean_v = plain_k[:, 0], v[:, 0]
        out = torch.empty_like(q)
        for group in self._groups:
            own_q, own_k, own_v = (x[:, group.halves, group.own] for x in (q, k, v))
            out[:, group.halves, group.own] = group.attend(
                self._near, own_q, own_k, own_v, clean_k[:, group.held], clean_v[:, group.held]
            )
        out = out.flatten(1, 3)
        if layer in self._far:
            halves = (2, self.blocks, self.block * self.tokens)
            answers, plain_q = out.unflatten(1, halves), own.plain_q.unflatten(1, halves)
            project = self._projections[layer] if self._projections else None
            state = FarState(self._far[layer])
            out = self._with_far(answers, plain_q, clean_k, clean_v, state, project).flatten(1, 3)
        return out

    def _with_far(
        self, near: Tensor, plain_q: Tensor, clean_k: Tensor, clean_v: Tensor, state: FarState,
        project: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """near, plain_q [B, 2, blocks, T, N, D], with what is far added to near; clean [B, frames, tokens, N, D]."""
        answers = []
        for answer, asked, moment in zip(near.unbind(2), plain_q.unbind(2), self._moments, strict=True):
            if state.sums is not None:
                far = FarView(state, project, moment.asking)
                answer = far.add_to(answer.flatten(1, 2), asked.flatten(1, 2)).view_as(answer)
            answers.append(answer)
            if moment.gone:
                frames = slice(moment.gone[0], moment.gone[-1] + 1)
                keys = Keys(clean_k[:, frames].flatten(1, 2), clean_v[:, frames].flatten(1, 2), moment.gone)
                state = state.absorb(keys, moment.behind)
        return torch.stack(answers, dim=2)


@dataclass(frozen=True)
class LayeredView:
    """One view for most layers, others for some, by number; all rotate a layer's own tokens alike."""

    most: View
    others: Mapping[int, View]

    @property
    def rotation(self) -> Rotation:
        return self.most.rotation

    def attend(self, layer: int, own: Tokens) -> Tensor:
        return self.others.get(layer, self.most).attend(layer, own)


class _Moment(NamedTuple):
    """When a block is made, and what leaves the window once it is: those frames' numbers and their place, where a far
    state puts them; where the block's tokens stand who ask it, those of the clean copy and those of the noisy one."""

    gone: tuple[int, ...]
    behind: Rotation
    asking: Rotation


def _moment(
    own: range, far: FarShape, grid: Grid, shape: WindowShape, extent: int | None, device: torch.device | str
) -> _Moment:
    following = range(own.stop, own.stop + len(own))
    gone = tuple(f for f in range(shape.sink, own.stop) if own.start <= f + shape.past < own.stop)
    behind = place_frames(gone, following, shape.sink, extent).held
    asking = place_frames((), own, shape.sink, extent).current * 2
    return _Moment(gone, far.rotation(grid, behind, device), far.rotation(grid, asking, device))


_Reading = tuple[range, tuple[int, ...]]
"""A pass in a clip: its own frames, and those that it remembers."""


@dataclass(frozen=True)
class _Group:
    """Passes over equally many frames that remember equally many: in which halves of the tokens they are (clean,
    noisy), their own frames [G, F], the frames they read [G, R] and those' rotation."""

    halves: slice
    own: Tensor
    held: Tensor
    rotation: Rotation

    def attend(self, near: Attend, q: Tensor, k: Tensor, v: Tensor, held_k: Tensor, held_v: Tensor) -> Tensor:
        """q, k, v [B, halves, G, F, tokens, N, D]; held [B, G, R, tokens, N, D], all clean."""
        passes = q.shape[:3]
        held_k = rotate(held_k.flatten(2, 3), self.rotation)
        k, v = (
            torch.cat([held.unsqueeze(1).expand(*passes, *held.shape[2:]), own.flatten(3, 4)], dim=3)
            for held, own in ((held_k, k), (held_v.flatten(2, 3), v))
        )
        return near(*(x.flatten(0, 2) for x in (q.flatten(3, 4), k, v))).view_as(q)


@dataclass(frozen=True)
class Places:
    """Positions for rotation, of the frames a memory holds and of the current block."""

    held: tuple[int, ...]
    current: tuple[int, ...]


def place_frames(held: Sequence[int], current: Sequence[int], sink: int, extent: int | None) -> Places:
    """Positions of frames by number: natural until the newest would pass the trained extent, then capped.

    Beyond it everything but the sink moves back, so that the newest frame stays at extent - 1 and no position ever
    grows (Hybrid Forcing, 2604.10103; Rolling Forcing, 2509.25161). None: absolute, as Self Forcing (2506.08009).
    """
    back = 0 if extent is None else max(0, current[-1] + 1 - extent)
    return Places(tuple(f if f < sink else f - back for f in held), tuple(f - back for f in current))


def fitting(held: Sequence[int], current: int, sink: int, extent: int | None) -> list[int]:
    """Of the frames a memory holds, those that fit the extent beside so many current ones: sink, and latest others.

    In the order they came in. None: all.
    """
    if extent is None or len(held) + current <= extent:
        return list(held)
    others = sorted(frame for frame in held if frame >= sink)
    too_many = len(held) + current - extent
    return [frame for frame in held if frame not in others[:too_many]]


def rotated(keys: Keys, grid: Grid, positions: Sequence[int], rotate: Rotate = rotate) -> tuple[Tensor, Tensor]:
    """A window's keys at the given positions, with their values: what a `MemoryView` reads."""
    return rotate(keys.k_BTND, grid.rotation(positions, keys.k_BTND.device)), keys.v_BTND


def frame_mask(allowed_FF: Tensor, tokens: int) -> Tensor:
    """A mask of frames (query, key) repeated for the tokens of each frame."""
    return allowed_FF.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


def _held_frames(committed: int, shape: WindowShape) -> list[int]:
    return [f for f in range(committed) if f < shape.sink or f >= committed - shape.past]


def _equally_long(clean: list[_Reading], noisy: list[_Reading]) -> list[tuple[slice, list[_Reading]]]:
    """Passes of a clip's halves by their lengths, with the halves that they are in: both where both read alike."""
    groups: dict[tuple[int, int, int, int], list[_Reading]] = {}
    for one in dict.fromkeys([*clean, *noisy]):
        own, held = one
        groups.setdefault((0 if one in clean else 1, 2 if one in noisy else 1, len(own), len(held)), []).append(one)
    return [(slice(*halves), alike) for (*halves, _, _), alike in groups.items()]


@lru_cache(maxsize=256)
def _numbers(numbers: tuple[Any, ...], device: torch.device | str) -> Tensor:
    """Whole numbers on a device. Remembered, as the rotations are: a trip from the host waits for the device."""
    return torch.tensor(numbers, dtype=torch.long, device=device)


def _stack(rotations: list[Rotation]) -> Rotation:
    return Rotation(*(torch.stack(parts) for parts in zip(*rotations, strict=True)))
