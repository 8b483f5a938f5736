"""Every layer's memory of one stream (or of a batch of streams that move together)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.attention.rope import RotaryAxes
from longtake.memory.view import MemoryView, place_frames, rotated
from longtake.memory.window import Keys, RingWindow, Window, WindowShape

LayerKeys = Sequence[tuple[Tensor, Tensor]]
"""One (k_BTND unrotated, v_BTND) a layer: what a network hands over to be committed."""


@dataclass(frozen=True, kw_only=True)
class MemoryShape:
    """What a recipe remembers.

    window: latent frames kept exactly. extent: positions stay below it (None: they grow with the stream).
    """

    window: WindowShape
    extent: int | None

    def require_fit(self, block: int, trained_extent: int) -> None:
        """Refuse shapes that cannot be streamed: ValueError with the numbers."""
        sink, past = self.window.sink, self.window.past
        if sink % block or past % block:
            raise ValueError(
                f"sink ({sink}) and past ({past}) must be whole numbers of blocks of {block} latent frames"
            )
        if self.window.frames + block > (self.extent or trained_extent):
            raise ValueError(
                f"sink {sink} + past {past} + current {block} = {self.window.frames + block} latent frames do not fit "
                f"the extent of {self.extent or trained_extent} that positions may take"
            )
        if self.extent is not None and self.extent > trained_extent:
            raise ValueError(f"extent {self.extent} exceeds the {trained_extent} latent frames that were trained")


class StreamMemory:
    """The windows of all layers, and how many frames and blocks were committed.

    `view` is what the passes of one block read; `commit` is the one place that writes. With `ring` the windows live
    in fixed buffers, and a view stays valid until the next commit; without, every state is a value of its own.
    """

    def __init__(self, shape: MemoryShape, layers: int, *, ring: bool):
        self.shape = shape
        self.frames = 0
        self.blocks = 0
        make: Callable[[WindowShape], RingWindow | Window] = RingWindow if ring else Window
        self._windows = [make(shape.window) for _ in range(layers)]

    @property
    def layers(self) -> int:
        return len(self._windows)

    def held(self, layer: int) -> Keys | None:
        """What one layer remembers, unrotated."""
        return self._windows[layer].held

    def view(self, axes: RotaryAxes, count: int, rows: int, columns: int, device: torch.device | str) -> MemoryView:
        """What the passes of the next `count` frames read: keys rotated once, at the positions of this moment."""
        current = range(self.frames, self.frames + count)
        sink, extent = self.shape.window.sink, self.shape.extent
        layers = []
        for window in self._windows:
            held = window.held
            places = place_frames(held.frames if held else (), current, sink, extent)
            layers.append(rotated(held, axes, places.held, rows, columns) if held else None)
        return MemoryView(axes.rotation(places.current, rows, columns, device), layers)

    def commit(self, keys: LayerKeys, count: int) -> None:
        """Take the keys of the next `count` finished frames, cut from their graph."""
        if len(keys) != self.layers:
            raise ValueError(f"keys of {len(keys)} layers cannot enter a memory of {self.layers}")
        numbers = tuple(range(self.frames, self.frames + count))
        for i, (k_BTND, v_BTND) in enumerate(keys):
            new = Keys(k_BTND.detach(), v_BTND.detach(), numbers)
            window = self._windows[i]
            if isinstance(window, RingWindow):
                window.append(new)
            else:
                self._windows[i], _ = window.append(new)
        self.frames += count
        self.blocks += 1

    def fork(self) -> "StreamMemory":
        """An independent memory that goes on from the same moment."""
        twin = StreamMemory(self.shape, 0, ring=False)
        twin.frames, twin.blocks = self.frames, self.blocks
        twin._windows = [w.fork() if isinstance(w, RingWindow) else w for w in self._windows]
        return twin

    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        held = [window.held for window in self._windows]
        return sum(x.nbytes for keys in held if keys is not None for x in keys[:2])

    def audit(self) -> None:
        """Check the books: every layer holds exactly the frames its shape allows. AssertionError otherwise."""
        sink, past = self.shape.window.sink, self.shape.window.past
        expected = {f for f in range(self.frames) if f < sink or f >= self.frames - past}
        for layer, window in enumerate(self._windows):
            found = set(window.held.frames) if window.held else set()
            assert found == expected, f"layer {layer} holds frames {sorted(found)}, expected {sorted(expected)}"
