"""Every layer's memory of one stream (or of a batch of streams that move together)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from longtake.attention.dense import dense
from longtake.attention.linear import Sums
from longtake.attention.rope import Grid, rotate
from longtake.memory.far import FarShape, FarState, Maps, SinkInFar, require_share
from longtake.memory.policies import PLAIN, Average, Bank, Policy
from longtake.memory.view import Attend, FarView, MemoryView, Rotate, fitting, place_frames, rotated
from longtake.memory.window import Keys, RingWindow, Window, WindowShape

LayerKeys = Sequence[tuple[Tensor, Tensor]]
"""One (k_BTND unrotated, v_BTND) a layer: what a network hands over to be committed."""


@dataclass(frozen=True, kw_only=True)
class MemoryShape:
    """What a recipe remembers.

    window: latent frames kept exactly. extent: positions stay below it (None: they grow with the stream), and a pass
    reads what fits it beside its own frames: the sink, and the latest others. far: what is made of frames that left
    the window (None: they are gone). near: how the window is attended. commits_keep_sink: whether commits read so too;
    if not, the latest frames come before the sink. policy: what else makes it the memory of a paper; ValueError beside
    far states or commits without the sink, which go with none of those rules. maps: of layers, by number, what their
    queries and keys pass on the way into `far`.

    converted: layers, by number, that keep the last `overlap` frames in the place of that window, and read what is made
    of all frames before those under one denominator with them (ReHyAt, 2601.04342); of None nothing is made.
    """

    window: WindowShape
    extent: int | None
    far: FarShape | None = None
    near: Attend = dense
    commits_keep_sink: bool = True
    policy: Policy = PLAIN
    maps: Mapping[int, Maps] = field(default_factory=dict)
    converted: Mapping[int, FarShape | None] = field(default_factory=dict)
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.policy != PLAIN and (self.far or self.converted or not self.commits_keep_sink):
            raise ValueError("a far state, or blocks in flight, need a memory of sink and past as they are")
        if self.policy.average is not None and not self.window.sink:
            raise ValueError("what leaves the past can only be averaged into a sink of 1 latent frame or more")
        recache = self.policy.recache
        if recache and recache.sink == "kept" and recache.frames <= self.window.sink:
            raise ValueError(
                f"of {recache.frames} latent frames to commit again, none is left beside a sink of {self.window.sink}"
            )

    def window_of(self, layer: int) -> WindowShape:
        """What a layer keeps exactly."""
        return WindowShape(sink=0, past=self.overlap) if layer in self.converted else self.window

    def far_of(self, layer: int) -> FarShape | None:
        """What a layer makes of frames that left its window."""
        if layer in self.converted:
            return self.converted[layer]
        return self.far and replace(self.far, maps=self.maps.get(layer))

    @property
    def in_one_pass(self) -> bool:
        """Whether teacher forcing can show it in one pass: no policy that forbids it, and no sink in a far state."""
        return self.policy.in_one_pass and (self.far is None or self.far.sink is SinkInFar.NEVER)

    def blocks_until_full(self, block: int) -> int:
        """How many blocks a stream makes until all that is remembered is full; the last one finds something far."""
        bank = self.policy.bank
        return -(-self.window.frames // block) + 2 + (bank.frames * bank.every if bank else 0)

    def require_fit(self, block: int, trained_extent: int, in_flight: int = 1) -> None:
        """Refuse shapes that cannot be streamed, so many blocks at once: ValueError with the numbers."""
        sink, past = self.window.sink, self.window.past
        if self.policy.reads.whole_blocks and (sink % block or past % block):
            raise ValueError(
                f"sink ({sink}) and past ({past}) must be whole numbers of blocks of {block} latent frames"
            )
        if (sink + past) % block:
            raise ValueError(f"sink {sink} + past {past} must be a whole number of blocks of {block} latent frames")
        leaving = block if self.far else 0
        seen, bank = self.policy.seen(self.window), self.policy.bank
        needed = seen + block * in_flight + leaving
        if needed > (self.extent or trained_extent):
            flying = f" x {in_flight} in flight" if in_flight > 1 else ""
            raise ValueError(
                f"sink {sink} + past {past}{f' + bank {bank.frames}' if bank else ''} + current {block}{flying}"
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
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Nothing of a window that is forgotten is left beside it."""
        bank, average = self.shape.policy.bank, self.shape.policy.average
        self._averages = [Average() for _ in self._windows] if average is not None else []
        self._banks = [Bank(bank) for _ in self._windows] if bank else []
        self._latents: tuple[Tensor, ...] = ()
        self._first = 0  # of the frames behind the sink, those that were forgotten before their time end here
        self._jump: int | None = None  # where the next block stands, if it begins a scene

    @property
    def layers(self) -> int:
        return len(self._windows)

    def held(self, layer: int) -> Keys | None:
        """What one layer remembers, unrotated."""
        return self._windows[layer].held

    def bank(self, layer: int) -> Bank:
        """What one layer keeps in its bank."""
        return self._banks[layer]

    @property
    def is_full(self) -> bool:
        """Whether what is read grows no more: every window is a ring buffer that holds all frames it ever will, and
        every far state has absorbed something."""
        full = all(isinstance(window, RingWindow) and window.is_full for window in self._windows)
        return full and all(state.sums is not None for state in self._far.values())

    @property
    def clip_is_full(self) -> bool:
        """Whether the next block would see less than all of its clip, where the policy goes clip by clip."""
        recache = self.shape.policy.recache
        return recache is not None and recache.each_clip and self.frames > self.shape.window.frames

    @property
    def latents(self) -> tuple[Tensor, ...]:
        """Finished latents [B, F, C, H, W] of the latest blocks, kept for a policy that commits them once more."""
        return self._latents

    def far(self, layer: int) -> FarState:
        """What one layer has summed up."""
        return self._far[layer]

    def phase(self, count: int) -> tuple[object, ...]:
        """What memories of one shape have in common that can be rows of one (`Rows`) for the next `count` frames.

        How much each layer reads, and where those frames stand. Streams of any age are in one phase once their windows
        are full, unless the policy counts positions without end.
        """
        policy, current = self.shape.policy, range(self.frames, self.frames + count)
        held = [window.held.frames if window.held else () for window in self._windows]
        read = [
            policy.reads(frames, current, window.shape, self.shape.extent)
            for frames, window in zip(held, self._windows, strict=True)
        ]
        banks = [len(bank.rows[0].frames) if bank.rows else 0 for bank in self._banks]
        offered = self.blocks % self._banks[0].shape.every if self._banks else 0
        clip = self.frames if policy.recache and policy.recache.each_clip else 0
        sizes = tuple((len(frames), len(one.frames)) for frames, one in zip(held, read, strict=True))
        return sizes, read[-1].places.current, self._jump, tuple(banks), offered, clip, len(self._latents)

    def view(
        self, grid: Grid, count: int, device: torch.device | str,
        projections: Sequence[Callable[[Tensor], Tensor]] = (), *, commits: bool = False, text: Sequence[Tensor] = (),
        rotate: Rotate = rotate,
    ) -> MemoryView:  # fmt: skip
        """What the passes of the next `count` frames read: keys rotated once, at the positions of this moment.

        projections: of what each layer reads from its far state, where there are any. commits: whether it is for the
        pass that commits them. text: each layer's mean key of the prompt, [B, N, D], which chooses from a bank.
        rotate: what turns the keys of a window.
        """
        if self.shape.far and len(projections) < self.layers:
            raise ValueError(f"{self.layers} layers have a far state, but {len(projections)} a projection to read it")
        self._require_text(text)
        policy, extent = self.shape.policy, self.shape.extent
        current = range(self.frames, self.frames + count)
        layers = []
        for window in self._windows:
            held = self._readable(window, count, commits)
            frames, places = policy.reads(held.frames if held else (), current, window.shape, extent)
            layers.append(rotated(held.seen(frames), grid, places.held, rotate) if held and frames else None)
        own = places.current if self._jump is None else range(self._jump, self._jump + count)
        if self._banks:
            banks = [bank.chosen(text_BND, grid) for bank, text_BND in zip(self._banks, text, strict=True)]
            layers = [_beside(bank, near, grid) for bank, near in zip(banks, layers, strict=True)]
        far = {
            layer: FarView(
                state,
                None if layer in self.shape.converted else projections[layer],
                state.shape.rotation(grid, own, device),
            )
            for layer, state in self._far.items()
            if state.sums is not None
        }
        return MemoryView(grid.rotation(own, device), layers, self.shape.near, far)

    def commit(
        self, keys: LayerKeys, count: int, grid: Grid | None = None, *,
        latents: Tensor | None = None, text: Sequence[Tensor] = (), again: bool = False,
    ) -> None:  # fmt: skip
        """Take the keys of the next `count` finished frames.

        grid: of their tokens; needed to place what slides into a far state, and by a bank. latents: those of the frames
        [B, F, C, H, W], for a policy that will commit them again. text: as for `view`. again: whether this is such a
        commit: then neither blocks nor latents nor what a bank takes are counted twice.
        """
        if len(keys) != self.layers:
            raise ValueError(f"keys of {len(keys)} layers cannot enter a memory of {self.layers}")
        if self._far and grid is None:
            raise ValueError("frames can enter a far state only with the grid of their tokens")
        self._require_text(text)
        if self._banks and grid is None:
            raise ValueError("a bank takes frames only with the grid of their tokens")
        if self.shape.policy.recache and latents is None:
            raise ValueError("frames that will be committed once more are kept as latents, which are missing")
        numbers = tuple(range(self.frames, self.frames + count))
        records = bool(self._banks) and not again and self.blocks % self._banks[0].shape.every == 0
        self.frames += count
        self._jump = None
        if not again:
            self.blocks += 1
            self._latents = self._latest(latents)
        for i, (k_BTND, v_BTND) in enumerate(keys):
            new = Keys(*((k_BTND, v_BTND) if self.keeps_graph else (k_BTND.detach(), v_BTND.detach())), numbers)
            self._windows[i], gone = self._windows[i].append(new)
            if i in self._far and grid is not None:
                self._absorb(i, gone, count, grid)
            if self._averages and gone is not None:
                self._average(i, gone)
            if self._banks and grid is not None:
                settled = self._banks[i].chosen(text[i], grid)
                self._banks[i] = settled.recorded(new) if records else settled

    def _require_text(self, text: Sequence[Tensor]) -> None:
        if self._banks and len(text) != self.layers:
            raise ValueError(f"the prompt's keys of {len(text)} layers cannot choose from {self.layers} banks")

    def _readable(self, window: RingWindow | Window, count: int, commits: bool) -> Keys | None:
        """What a pass over `count` frames reads of what a window holds."""
        held = window.held
        if held is None:
            return None
        sink = 0 if commits and not self.shape.commits_keep_sink else window.shape.sink
        frames = fitting(held.frames, count, sink, self.shape.extent)
        return held.seen(frames) if frames else None

    def _average(self, layer: int, gone: Keys) -> None:
        """Move a sink towards what slid out of its window."""
        window, keep = self._windows[layer], self.shape.policy.average
        assert window.held is not None and keep is not None
        sink = window.held.seen([f for f in sorted(window.held.frames) if f < self.shape.window.sink])
        self._averages[layer] = self._averages[layer].after(sink, gone, keep)
        mean = self._averages[layer].keys
        assert mean is not None
        moved = Keys(mean.k_BTND.to(sink.k_BTND.dtype), mean.v_BTND.to(sink.v_BTND.dtype), mean.frames)
        self._windows[layer] = window.rewritten(moved)

    def _latest(self, latents: Tensor | None) -> tuple[Tensor, ...]:
        """The latest blocks, these included: as few as have the frames that will be committed once more."""
        rule = self.shape.policy.recache
        if rule is None or latents is None:
            return ()
        kept = (*self._latents, latents.detach())
        while sum(block.shape[1] for block in kept[1:]) >= rule.frames:
            kept = kept[1:]
        return kept

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
        keys = held.seen(late)
        if rule is SinkInFar.AS_WELL:
            return keys
        return keys._replace(k_BTND=rotate(keys.k_BTND, grid.rotation(keys.frames, keys.k_BTND.device)))

    def cut(self, far: float) -> None:
        """Begin a new shot: sink and past are forgotten and frames are numbered from 0; blocks are counted on.

        far: the share of the far states that weighs on, at the positions where they were absorbed. Under a policy with
        a jump the window is flushed instead and frames are counted on; the next block stands apart from what stays.
        """
        self.fade_far(far)
        if self.shape.policy.jump is not None:
            self.flush()
            self._jump = self.shape.policy.jump if self.frames else None
            return
        self._windows = [type(window)(window.shape) for window in self._windows]
        self.frames = 0
        self._begin_anew()

    def flush(self) -> None:
        """Forget all but the sink and as many of the latest frames as the policy says; nothing if it says nothing."""
        keep = self.shape.policy.flush
        if keep is not None:
            self._first = max(self._first, self.frames - keep)
            self._only([*range(self.shape.window.sink), *range(self._first, self.frames)])

    def unwind(self, count: int, *, keep_sink: bool) -> None:
        """Forget the latest `count` frames, which are to be committed again, and all before them but the sink.

        Without `keep_sink` the sink goes too, and frames are numbered from 0.
        """
        self._only(range(self.shape.window.sink if keep_sink else 0))
        self.frames = self.frames - count if keep_sink else 0
        self._first = self.frames

    def _only(self, frames: Sequence[int]) -> None:
        """Forget all frames of the windows but these."""
        self._windows = [window.only(frames) for window in self._windows]

    def fade_far(self, share: float) -> None:
        """Let that share of the far states weigh on (1 keeps all, 0 forgets all). ValueError outside 0 to 1."""
        require_share(share)
        self._far = {layer: state.fade(share) for layer, state in self._far.items()}

    def fork(self) -> Self:
        """An independent memory that goes on from the same moment."""
        ring = any(isinstance(window, RingWindow) for window in self._windows)
        twin = self.of_state(self.shape, self.state(), ring=ring)
        twin.keeps_graph = self.keeps_graph
        return twin

    def state(self) -> dict[str, Any]:
        """All that is remembered: plain values, in which tensors stand as they are; `of_state` is the way back.

        Tensors of windows in ring buffers are views, which the next commit writes over.
        """
        return {
            "frames": self.frames,
            "blocks": self.blocks,
            "first": self._first,
            "jump": self._jump,
            "windows": [_plain(window.held) for window in self._windows],
            "far": {str(layer): None if far.sums is None else list(far.sums) for layer, far in self._far.items()},
            "averages": [_plain(average.keys) for average in self._averages],
            "banks": [[_plain(row) for row in bank.rows] for bank in self._banks],
            "latents": list(self._latents),
        }

    @classmethod
    def of_state(cls, shape: MemoryShape, state: Mapping[str, Any], *, ring: bool) -> Self:
        """The memory of that shape whose `state()` this is. Only windows in ring buffers copy its tensors."""
        made = cls(shape, len(state["windows"]), ring=ring)
        made.frames, made.blocks = state["frames"], state["blocks"]
        made._first, made._jump = state["first"], state["jump"]
        for layer, held in enumerate(map(_keys, state["windows"])):
            if held is not None:
                made._windows[layer], _ = made._windows[layer].append(held)  # each frame gets the slot that it had
        for layer, sums in state["far"].items():
            made._far[int(layer)] = FarState(made._far[int(layer)].shape, None if sums is None else Sums(*sums))
        made._averages = [Average(_keys(keys)) for keys in state["averages"]]
        made._banks = [
            Bank(bank.shape, tuple(keys for row in rows if (keys := _keys(row))))
            for bank, rows in zip(made._banks, state["banks"], strict=True)
        ]
        made._latents = tuple(state["latents"])
        return made

    def nbytes(self) -> int:
        """Bytes of keys and values held, of far states, and of what a policy keeps beside them."""
        held = [window.held for window in self._windows]
        near = sum(keys.nbytes() for keys in held if keys is not None)
        beside = sum(latents.nbytes for latents in self._latents)
        parts: list[FarState | Average | Bank] = [*self._far.values(), *self._averages, *self._banks]
        return near + beside + sum(part.nbytes() for part in parts)

    def audit(self) -> None:
        """Check the books: every layer holds exactly the frames its shape allows. AssertionError otherwise."""
        for layer, window in enumerate(self._windows):
            sink, past = window.shape.sink, window.shape.past
            expected = {f for f in range(self.frames) if f < sink or f >= max(self.frames - past, self._first)}
            found = set(window.held.frames) if window.held else set()
            assert found == expected, f"layer {layer} holds frames {sorted(found)}, expected {sorted(expected)}"


def _plain(keys: Keys | None) -> dict[str, Any] | None:
    return None if keys is None else {"k": keys.k_BTND, "v": keys.v_BTND, "frames": list(keys.frames)}


def _keys(plain: Mapping[str, Any] | None) -> Keys | None:
    return None if plain is None else Keys(plain["k"], plain["v"], tuple(plain["frames"]))


def _beside(bank: Bank, near: tuple[Tensor, Tensor] | None, grid: Grid) -> tuple[Tensor, Tensor] | None:
    """What is read of a bank, in front of what is read of the window."""
    if not bank.rows:
        return near
    read = bank.read(grid)
    return read if near is None else (torch.cat([read[0], near[0]], dim=1), torch.cat([read[1], near[1]], dim=1))
