"""Every layer's memory of one stream (or of a batch of streams that move together)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longtake.attention.dense import dense
from longtake.attention.rope import Grid, rotate
from longtake.memory.far import FarShape, FarState, SinkInFar, require_share
from longtake.memory.view import Attend, FarView, MemoryView, fitting, place_frames, rotated
from longtake.memory.window import Keys, RingWindow, Window, WindowShape

LayerKeys = Sequence[tuple[Tensor, Tensor]]
"""One (k_BTND unrotated, v_BTND) a layer: what a network hands over to be committed."""


@dataclass(frozen=True, kw_only=True)
class MemoryShape:
    """What a recipe remembers.

    window: latent frames kept exactly. extent: positions stay below it (None: they grow with the stream), and a pass
    reads what fits it beside its own frames: the sink, and the latest others. far: what is made of frames that left
    the window (None: they are gone). near: how the window is attended. commits_keep_sink: whether commits read so too;
    if not, the latest frames come before the sink.

    converted: layers, by number, that keep the last `overlap` frames in the place of that window, and read what is made
    of all frames before those under one denominator with them (ReHyAt, 2601.04342); of None nothing is made.
    """

    window: WindowShape
    extent: int | None
    far: FarShape | None = None
    near: Attend = dense
    commits_keep_sink: bool = True
    converted: Mapping[int, FarShape | None] = field(default_factory=dict)
    overlap: int = 0

    def window_of(self, layer: int) -> WindowShape:
        """What a layer keeps exactly."""
        return WindowShape(sink=0, past=self.overlap) if layer in self.converted else self.window

    def far_of(self, layer: int) -> FarShape | None:
        """What a layer makes of frames that left its window."""
        return self.converted.get(layer, self.far)

    def require_fit(self, block: int, trained_extent: int, in_flight: int = 1) -> None:
        """Refuse shapes that cannot be streamed, so many blocks at once: ValueError with the numbers."""
        sink, past = self.window.sink, self.window.past
        if sink % block or past % block:
            raise ValueError(
                f"sink ({sink}) and past ({past}) must be whole numbers of blocks of {block} latent frames"
            )
        leaving = block if self.far else 0
        needed = self.window.frames + block * in_flight + leaving
        if needed > (self.extent or trained_extent):
            raise ValueError(
                f"sink {sink} + past {past} + current {block}{f' x {in_flight} in flight' if in_flight > 1 else ''}"
                f"{f' + leaving {leaving}' if leaving else ''} = {needed} "
                f"latent frames do not fit the extent of {self.extent or trained_extent} that positions may take"
            )
        if self.converted and self.overlap + block > (self.extent or trained_extent):
            raise ValueError(
                f"a near span of {self.overlap} + {block} latent frames does not fit the extent of "
                f"{self.extent or trained_extent} that positions may take"
            )
        if self.extent is not None and self.extent > trained_extent:
            raise ValueError(f"extent {self.extent} exceeds the {trained_extent} latent frames that were trained")


class StreamMemory:
    """The windows of all layers, and how many frames (since the last cut) and blocks (ever) were committed.

    `view` is what a pass reads; `commit` is the one place that writes. With `ring` the windows live
    in fixed buffers, and a view stays valid until the next commit; without, every state is a value of its own.

    keeps_graph: whether what reads this memory teaches what wrote it (teacher forcing); otherwise keys are cut from
    their graph. ValueError with `ring`, where old frames are written over.
    """

    def __init__(self, shape: MemoryShape, layers: int, *, ring: bool, keeps_graph: bool = False):
        if ring and keeps_graph:
            raise ValueError("a ring buffer keeps no graph: make the memory without ring")
        self.shape = shape
        self.keeps_graph = keeps_graph
        self.frames = 0
        self.blocks = 0
        make: Callable[[WindowShape], RingWindow | Window] = RingWindow if ring else Window
        self._windows = [make(shape.window_of(layer)) for layer in range(layers)]
        fars = {layer: shape.far_of(layer) for layer in range(layers)}
        self._far = {layer: FarState(far) for layer, far in fars.items() if far}

    @property
    def layers(self) -> int:
        return len(self._windows)

    def held(self, layer: int) -> Keys | None:
        """What one layer remembers, unrotated."""
        return self._windows[layer].held

    def far(self, layer: int) -> FarState:
        """What one layer has summed up."""
        return self._far[layer]

    def view(
        self, grid: Grid, count: int, device: torch.device | str,
        projections: Sequence[Callable[[Tensor], Tensor]] = (), *, commits: bool = False,
    ) -> MemoryView:  # fmt: skip
        """What the passes of the next `count` frames read: keys rotated once, at the positions of this moment.

        projections: of what each layer reads from its far state, where there are any. commits: whether it is for the
        pass that commits them.
        """
        converted = self.shape.converted
        if self.shape.far and len(projections) < self.layers:
            raise ValueError(f"{self.layers} layers have a far state, but {len(projections)} a projection to read it")
        current, extent = range(self.frames, self.frames + count), self.shape.extent
        layers = []
        for window in self._windows:
            held = self._readable(window, count, commits)
            places = place_frames(held.frames if held else (), current, window.shape.sink, extent)
            layers.append(rotated(held, grid, places.held) if held else None)
        own = place_frames((), current, 0, extent).current
        far = {
            layer: FarView(
                state,
                None if layer in converted else projections[layer],
                state.shape.rotation(grid, own, device),
            )
            for layer, state in self._far.items()
            if state.sums is not None
        }
        return MemoryView(grid.rotation(own, device), layers, self.shape.near, far)

    def commit(self, keys: LayerKeys, count: int, grid: Grid | None = None) -> None:
        """Take the keys of the next `count` finished frames.

        grid: of their tokens; needed to place what slides into a far state.
        """
        if len(keys) != self.layers:
            raise ValueError(f"keys of {len(keys)} layers cannot enter a memory of {self.layers}")
        if self._far and grid is None:
            raise ValueError("frames can enter a far state only with the grid of their tokens")
        numbers = tuple(range(self.frames, self.frames + count))
        self.frames += count
        self.blocks += 1
        for i, (k_BTND, v_BTND) in enumerate(keys):
            new = (k_BTND, v_BTND) if self.keeps_graph else (k_BTND.detach(), v_BTND.detach())
            gone = self._slide(i, Keys(*new, numbers))
            if i in self._far and grid is not None:
                self._absorb(i, gone, count, grid)

    def _readable(self, window: RingWindow | Window, count: int, commits: bool) -> Keys | None:
        """What a pass over `count` frames reads of what a window holds."""
        held = window.held
        if held is None:
            return None
        sink = 0 if commits and not self.shape.commits_keep_sink else window.shape.sink
        frames = fitting(held.frames, count, sink, self.shape.extent)
        if len(frames) == len(held.frames):
            return held
        return held.select([held.frames.index(frame) for frame in frames]) if frames else None

    def _slide(self, layer: int, new: Keys) -> Keys | None:
        """Put new frames into a window; what slides out."""
        window = self._windows[layer]
        if isinstance(window, RingWindow):
            return window.append(new)
        self._windows[layer], gone = window.append(new)
        return gone

    def _absorb(self, layer: int, gone: Keys | None, count: int, grid: Grid) -> None:
        """Put frames that slid out into a far state, where the next block will see them: just behind its past."""
        following = range(self.frames, self.frames + count)
        for keys in (self._sink_behind_past(layer, count, grid), gone):
            if keys is not None:
                places = place_frames(keys.frames, following, self.shape.window_of(layer).sink, self.shape.extent)
                state = self._far[layer]
                rotation = state.shape.rotation(grid, places.held, keys.k_BTND.device)
                self._far[layer] = state.absorb(keys, rotation)

    def _sink_behind_past(self, layer: int, count: int, grid: Grid) -> Keys | None:
        """Sink frames that would just have slid out of a past without a sink, where published forms absorb them."""
        rule, held = self._far[layer].shape.sink, self._windows[layer].held
        end = min(self.shape.window.sink, self.frames - self.shape.window.past)
        late = range(max(0, self.frames - self.shape.window.past - count), end)
        if rule is SinkInFar.NEVER or held is None or not late:
            return None
        keys = held.select([held.frames.index(frame) for frame in late])
        if rule is SinkInFar.AS_WELL:
            return keys
        return keys._replace(k_BTND=rotate(keys.k_BTND, grid.rotation(keys.frames, keys.k_BTND.device)))

    def cut(self, far: float) -> None:
        """Begin a new shot: sink and past are forgotten and frames are numbered from 0; blocks are counted on.

        far: the share of the far states that weighs on, at the positions where they were absorbed.
        """
        self.fade_far(far)
        self._windows = [type(window)(self.shape.window) for window in self._windows]
        self.frames = 0

    def fade_far(self, share: float) -> None:
        """Let that share of the far states weigh on (1 keeps all, 0 forgets all). ValueError outside 0 to 1."""
        require_share(share)
        self._far = {layer: state.fade(share) for layer, state in self._far.items()}

    def fork(self) -> "StreamMemory":
        """An independent memory that goes on from the same moment."""
        twin = StreamMemory(self.shape, 0, ring=False, keeps_graph=self.keeps_graph)
        twin.frames, twin.blocks = self.frames, self.blocks
        twin._windows = [w.fork() if isinstance(w, RingWindow) else w for w in self._windows]
        twin._far = dict(self._far)
        return twin

    def nbytes(self) -> int:
        """Bytes of keys and values held, and of far states."""
        held = [window.held for window in self._windows]
        near = sum(x.nbytes for keys in held if keys is not None for x in keys[:2])
        return near + sum(state.nbytes() for state in self._far.values())

    def audit(self) -> None:
        """Check the books: every layer holds exactly the frames its shape allows. AssertionError otherwise."""
        for layer, window in enumerate(self._windows):
            sink, past = window.shape.sink, window.shape.past
            expected = {f for f in range(self.frames) if f < sink or f >= self.frames - past}
            found = set(window.held.frames) if window.held else set()
            assert found == expected, f"layer {layer} holds frames {sorted(found)}, expected {sorted(expected)}"
