"""Views at fixed addresses, so that passes which read them can be recorded as a graph of kernels and replayed."""

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from longtake.attention.linear import Sums
from longtake.attention.rope import Rotation
from longtake.memory.far import FarState
from longtake.memory.rows import Memory
from longtake.memory.view import FarView, MemoryView, Tokens

AddFar = Callable[[FarView, Tensor, Tensor], Tensor]
"""A layer's far memory, near answers and plain queries -> both answers in one; see `FarView.add_to`."""


class FixedView:
    """What a `MemoryView` reads, in tensors that stay where they are: blocks of a kind are held one after the other.

    A pass's own keys and values are written behind those remembered, into the room that is kept for them. So it is no
    value as other views are: it serves one pass at a time, on what it holds now. It answers as the view that it holds.
    """

    def __init__(self, view: MemoryView, rooms: list[tuple[Tensor, Tensor]], add_far: AddFar):
        """rooms: for each layer keys and values of all that a pass sees, [B, held + own, N, D] each."""
        self.rotation = Rotation(*map(torch.clone, view.rotation))
        self._near, self._add_far, self._rooms = view.near, add_far, rooms
        self._far = {layer: _copy(far) for layer, far in view.far.items()}
        own = len(self.rotation.cos_TA)
        held = [(k[:, :-own], v[:, :-own]) for k, v in rooms]
        self._fixed = list(_tensors(MemoryView(self.rotation, held, far=self._far)))
        self._own = [(k[:, -own:], v[:, -own:]) for k, v in rooms]

    def hold(self, view: MemoryView) -> None:
        """Take over what a view of the same kind reads."""
        tensors = list(_tensors(view))
        for dtype in {x.dtype for x in tensors}:  # of one type and layout a kernel copies many
            fixed, read = ([x for x in some if x.dtype == dtype] for some in (self._fixed, tensors))
            torch._foreach_copy_(fixed, read)

    @property
    def nbytes(self) -> int:
        """Beside its rooms, which it may share."""
        return sum(x.nbytes for x in _tensors(MemoryView(self.rotation, [], far=self._far)))

    def attend(self, layer: int, own: Tokens) -> Tensor:
        torch._foreach_copy_(self._own[layer], (own.k, own.v))
        near_BTND = self._near(own.q, *self._rooms[layer])
        return self._add_far(self._far[layer], near_BTND, own.plain_q) if layer in self._far else near_BTND


class FixedViews:
    """Gives a view as it is while a stream's memory fills, and at fixed addresses from then on: nothing grows any more.

    All share one room for keys and values, as large as the largest asks for: a view is read until the next is given.
    view_of: what gives views of a memory, `WanTransformer.memory_view`.
    """

    def __init__(self, view_of: Callable[..., MemoryView], add_far: AddFar = FarView.add_to):
        self._view_of, self._add_far = view_of, add_far
        self._made: dict[Hashable, FixedView] = {}
        self._room: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, memory: Memory, *arguments: Any, **more: Any) -> MemoryView | FixedView:
        view = self._view_of(memory, *arguments, **more)
        if type(view) is not MemoryView or not memory.is_full or None in view.layers:  # others watch what is read
            return view
        kind = _kind(view)
        if kind not in self._made:
            self._made[kind] = FixedView(view, self._rooms(view), self._add_far)
        self._made[kind].hold(view)
        return self._made[kind]

    @property
    def nbytes(self) -> int:
        """Of the room that there is now, and of what each view holds beside it."""
        rooms = sum(k.nbytes + v.nbytes for k, v in self._room.values())
        return rooms + sum(view.nbytes for view in self._made.values())

    def _rooms(self, view: MemoryView) -> list[tuple[Tensor, Tensor]]:
        """Room for what a view remembers and for its own tokens, layer by layer."""
        own, rooms = len(view.rotation.cos_TA), []
        for layer, remembered in enumerate(view.layers):
            assert remembered is not None, "there is no room without keys to be like"
            batch, held, *sizes = remembered[0].shape
            shape = torch.Size((batch, held + own, *sizes))
            k, v = (x[: shape.numel()].view(shape) for x in self._room_like(remembered[0], layer, shape.numel()))
            rooms.append((k, v))
        return rooms

    def _room_like(self, k_BTND: Tensor, layer: int, size: int) -> tuple[Tensor, Tensor]:
        """A layer's room, of that size at least. One that is too small is left to the views that were made in it."""
        room = self._room.get(layer)
        if room is None or room[0].dtype != k_BTND.dtype or room[0].numel() < size:
            room = self._room[layer] = k_BTND.new_empty(size), k_BTND.new_empty(size)
        return room


def _kind(view: MemoryView) -> Hashable:
    """Equal for views that differ in their numbers alone."""
    return view.near, tuple(view.far), *((x.shape, x.dtype) for x in _tensors(view))


def _tensors(view: MemoryView) -> Iterator[Tensor]:
    """All that a view reads, in a fixed order. Without the axis of a single clip, by which part of a room would seem to
    lie otherwise than what is put there."""
    yield from view.rotation
    for remembered in view.layers:
        yield from (x.squeeze(0) for x in remembered or ())
    for far in view.far.values():
        yield from (*(far.state.sums or ()), *far.rotation)


def _copy(far: FarView) -> FarView:
    assert far.state.sums is not None, "views have no far states without sums"
    state = FarState(far.state.shape, Sums(*map(torch.clone, far.state.sums)))
    return FarView(state, far.project, Rotation(*map(torch.clone, far.rotation)))
