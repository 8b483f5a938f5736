"""Memories of several streams as rows of one: read together in one pass, each written by itself."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from longtake.attention.rope import Grid, rotate
from longtake.memory.far import stacked
from longtake.memory.stream_memory import LayerKeys, MemoryShape, StreamMemory
from longtake.memory.view import MemoryView, Rotate


class Memory(Protocol):
    """What a schedule needs of a memory; see `StreamMemory`, which is one."""

    @property
    def shape(self) -> MemoryShape: ...
    @property
    def keeps_graph(self) -> bool: ...
    @property
    def frames(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def latents(self) -> tuple[Tensor, ...]: ...
    @property
    def is_full(self) -> bool: ...
    @property
    def clip_is_full(self) -> bool: ...

    def view(
        self, grid: Grid, count: int, device: torch.device | str,
        projections: Sequence[Callable[[Tensor], Tensor]] = (), *, commits: bool = False, text: Sequence[Tensor] = (),
        rotate: Rotate = rotate,
    ) -> MemoryView: ...  # fmt: skip

    def commit(
        self, keys: LayerKeys, count: int, grid: Grid | None = None, *,
        latents: Tensor | None = None, text: Sequence[Tensor] = (), again: bool = False,
    ) -> None: ...  # fmt: skip

    def unwind(self, count: int, *, keep_sink: bool) -> None: ...


class Rows:
    """Memories of one stream each and of one `phase`, in which they stay while they are written to.

    Each is read at its own positions, by its own frame numbers; `frames` and `blocks` are those of the first.
    """

    def __init__(self, memories: Sequence[StreamMemory]):
        self._memories = memories
        self.shape, self.keeps_graph = memories[0].shape, memories[0].keeps_graph

    @property
    def frames(self) -> int:
        return self._memories[0].frames

    @property
    def blocks(self) -> int:
        return self._memories[0].blocks

    @property
    def is_full(self) -> bool:
        return all(memory.is_full for memory in self._memories)

    @property
    def clip_is_full(self) -> bool:
        return self._memories[0].clip_is_full

    @property
    def latents(self) -> tuple[Tensor, ...]:
        return tuple(torch.cat(rows) for rows in zip(*(memory.latents for memory in self._memories), strict=True))

    def view(
        self, grid: Grid, count: int, device: torch.device | str,
        projections: Sequence[Callable[[Tensor], Tensor]] = (), *, commits: bool = False, text: Sequence[Tensor] = (),
        rotate: Rotate = rotate,
    ) -> MemoryView:  # fmt: skip
        """As `StreamMemory.view`, with a row of `text` for each memory."""
        views = [
            memory.view(grid, count, device, projections, commits=commits, text=_row(text, row), rotate=rotate)
            for row, memory in enumerate(self._memories)
        ]
        layers = [_joined(parts) for parts in zip(*(view.layers for view in views), strict=True)]
        far = {layer: one for view in views for layer, one in view.far.items()}
        for layer, one in far.items():
            far[layer] = one._replace(state=stacked([memory.far(layer) for memory in self._memories]))
        return MemoryView(views[0].rotation, layers, self.shape.near, far)

    def commit(
        self, keys: LayerKeys, count: int, grid: Grid | None = None, *,
        latents: Tensor | None = None, text: Sequence[Tensor] = (), again: bool = False,
    ) -> None:  # fmt: skip
        """As `StreamMemory.commit`, a row for each memory."""
        for row, memory in enumerate(self._memories):
            own = [(k_BTND[row : row + 1], v_BTND[row : row + 1]) for k_BTND, v_BTND in keys]
            kept = None if latents is None else latents[row : row + 1].clone()  # a view would keep the others' alive
            memory.commit(own, count, grid, latents=kept, text=_row(text, row), again=again)

    def unwind(self, count: int, *, keep_sink: bool) -> None:
        for memory in self._memories:
            memory.unwind(count, keep_sink=keep_sink)


def _row(text: Sequence[Tensor], row: int) -> list[Tensor]:
    return [layer_BND[row : row + 1] for layer_BND in text]


def _joined(layers: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    """One layer's keys and values of all rows; a phase has them in all or in none."""
    full = [layer for layer in layers if layer is not None]
    return (torch.cat([k for k, _ in full]), torch.cat([v for _, v in full])) if full else None
