"""The field's rules for what a memory keeps and where it stands, as parts that a recipe puts together.

Beside the sizes of sink and past, papers differ in what a pass sees and at which positions (`reads`), in what becomes
of frames that leave the window (`average`, `bank`), and in what a change of prompt (`flush`, `recache`) and a cut
(`jump`) do. Rules name frames by number and take unrotated keys, so none of them knows a network or a schedule.

Where a published code is known to differ from its paper, the code's form is built, unless said otherwise.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from longtake.attention.rope import Grid, rotate
from longtake.memory.view import Places, place_frames
from longtake.memory.window import Keys, WindowShape

Mask = Literal["none", "block_causal"]
AfterRecache = Literal["kept", "new"]


class Reading(NamedTuple):
    """What a pass sees: frames of those that are held, by number and in order, and where they and its own stand."""

    frames: tuple[int, ...]
    places: Places


class Reads(ABC):
    """A rule for what a pass sees of what is held, and for positions."""

    in_words: ClassVar[str]
    """Its positions; an {extent} is the one that was trained."""
    whole_blocks: ClassVar[bool] = True
    """Whether sink and past have to be whole blocks each, or only their sum."""

    @abstractmethod
    def __call__(self, held: Sequence[int], current: Sequence[int], window: WindowShape, extent: int | None) -> Reading:
        """For a pass over the current frames. held: by number, in any order."""

    def extent(self, trained: int) -> int | None:
        """The extent that a memory has under this rule; None where the rule bounds positions itself, or none does."""
        return None

    def seen(self, window: WindowShape) -> int:
        """How many frames of a full window a pass sees."""
        return window.frames


@dataclass(frozen=True)
class Capped(Reads):
    """All that is held; natural positions, until the newest reaches the trained extent, see `place_frames`."""

    in_words: ClassVar[str] = "below {extent}, as in training"

    def __call__(self, held: Sequence[int], current: Sequence[int], window: WindowShape, extent: int | None) -> Reading:
        return Reading(tuple(held), place_frames(held, current, window.sink, extent))

    def extent(self, trained: int) -> int | None:
        return trained


@dataclass(frozen=True)
class Absolute(Reads):
    """All that is held, each frame at its number since the last cut: a sink falls ever farther behind (published)."""

    in_words: ClassVar[str] = "frame numbers, without end"

    def __call__(self, held: Sequence[int], current: Sequence[int], window: WindowShape, extent: int | None) -> Reading:
        return Reading(tuple(held), Places(tuple(held), tuple(current)))


@dataclass(frozen=True)
class EndToEnd(Reads):
    """All that is held, in the order of time at 0, 1, 2, ..., with the current frames right behind.

    Reward Forcing (2512.04678) and Infinity-RoPE (2511.20649), whose first frame thus stays at 0. Where a flush left a
    gap in time there is none in positions; after one, the latter's code places queries where a full window would.
    """

    in_words: ClassVar[str] = "0, 1, 2, ... over all that is seen"
    whole_blocks: ClassVar[bool] = False

    def __call__(self, held: Sequence[int], current: Sequence[int], window: WindowShape, extent: int | None) -> Reading:
        in_time = {frame: position for position, frame in enumerate(sorted(held))}
        behind = range(len(held), len(held) + len(current))
        return Reading(tuple(held), Places(tuple(in_time[frame] for frame in held), tuple(behind)))


@dataclass(frozen=True)
class BackAndForth(Reads):
    """Rolling Sink's reading (2602.07775): as many frames as the sink has, right before the current ones.

    The latest `past` of them are real. The others are played from the sink, which is a library of the first frames: by
    turns forwards and backwards, so that neighbours in time are neighbours in the library. Published at absolute
    positions; these are the same moved back together, which attention cannot tell apart, and end with the window.
    """

    in_words: ClassVar[str] = "those of the time that is seen, the newest of it at the end"

    def __call__(self, held: Sequence[int], current: Sequence[int], window: WindowShape, extent: int | None) -> Reading:
        now = current[0]
        times = range(max(0, now - window.sink), now)
        frames = tuple(time if time >= now - window.past else played(time, window.sink) for time in times)
        back = max(0, now - window.sink)
        return Reading(frames, Places(tuple(t - back for t in times), tuple(f - back for f in current)))

    def seen(self, window: WindowShape) -> int:
        if window.past > window.sink:
            raise ValueError(f"a library of {window.sink} latent frames cannot stand before {window.past} real ones")
        return window.sink


def played(time: int, library: int) -> int:
    """Which frame of a library of so many is shown at a time: 0, 1, ..., up to the last, and back, and so on."""
    turn, step = divmod(time, library)
    return library - 1 - step if turn % 2 else step


@dataclass(frozen=True)
class Recache:
    """At a change of prompt, commit the latest `frames` finished frames once more, under the new one (2509.22622).

    They are kept as latents for it. mask: "none" commits them in one pass, in which they see each other in both
    directions: what the released code does; "block_causal" commits them block by block: what it prepares a mask for.
    sink: "kept" leaves an old sink as it is, so that as many of the frames, the first, have no place and do not count;
    "new" forgets everything, and the first of the frames become the sink. While all that was ever made is among the
    frames, either way all of it is committed anew.
    each_clip: do so also whenever the window is full, with the block's own prompt: CausVid's clips that overlap.
    ValueError for less than one frame and for unknown words.
    """

    frames: int
    mask: Mask = "none"
    sink: AfterRecache = "kept"
    each_clip: bool = False

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"a recache takes 1 latent frame or more, got {self.frames}")
        if self.mask not in ("none", "block_causal"):
            raise ValueError(f"mask must be none or block_causal, got {self.mask}")
        if self.sink not in ("kept", "new"):
            raise ValueError(f"after a recache the sink is kept or new, got {self.sink}")

    @property
    def in_words(self) -> str:
        how = "in one pass" if self.mask == "none" else "block by block"
        return f"the latest {self.frames} latent frames are committed again, {how}; sink {self.sink}"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What makes a memory that of a paper, beside the sizes of its window. As it comes: sink and past, as they are.

    reads: what a pass sees, and where. average: each block that leaves the past moves the sink towards itself by 1 -
    average, frame by frame (Reward Forcing's EMA sink); None leaves the sink as it is. bank: single frames that the
    prompt chose among those of blocks long gone. flush: how many of the latest frames stay, beside the sink, at a
    change of prompt or a cut; None keeps all. recache: what is committed once more at a change of prompt. jump: the
    position at which the first block after a cut stands, for as long as it is the current one; None forgets the window
    at a cut instead, and everything begins anew.
    ValueError for what does not go together or is out of range.
    """

    reads: Reads = field(default_factory=Capped)
    average: float | None = None
    bank: "BankShape | None" = None
    flush: int | None = None
    recache: Recache | None = None
    jump: int | None = None

    def __post_init__(self) -> None:
        if self.average is not None and not 0 <= self.average <= 1:
            raise ValueError(f"a sink keeps a share of 0 to 1 of itself, got {self.average}")
        if self.flush is not None and self.flush < 0:
            raise ValueError(f"a flush keeps 0 latent frames or more, got {self.flush}")
        if self.recache and (self.average is not None or self.flush is not None or self.jump is not None):
            raise ValueError("frames that are committed once more need a window that is as they left it")
        if isinstance(self.reads, BackAndForth) and self.flush is not None:
            raise ValueError("a library that is played needs the frames that a flush forgets")
        if self.jump is not None and self.flush is None:
            raise ValueError("a cut that jumps flushes the window: say how many latent frames stay")
        if self.bank and self.recache and self.recache.sink == "new":
            raise ValueError("a bank keeps frames by number, so its recache must keep the sink")

    @property
    def in_one_pass(self) -> bool:
        """Whether a clip can be walked through in one pass: what is seen hangs on frame numbers and an extent alone."""
        each_clip = self.recache is not None and self.recache.each_clip
        return isinstance(self.reads, Capped | Absolute) and self.average is None and not self.bank and not each_clip

    def in_words(self, extent: int) -> dict[str, str]:
        """What it does, by headings: positions, and what else there is."""
        told = {"positions": self.reads.in_words.format(extent=extent)}
        if self.average is not None:
            told["sink"] = f"{1 - self.average:g} of what leaves the past is averaged into it"
        if self.bank:
            told["bank"] = (
                f"{self.bank.frames} latent frames, chosen by the prompt; one of {self.bank.every} blocks offered"
            )
        if self.flush is not None:
            told["redirect"] = f"the sink and the latest {self.flush} latent frames stay"
        if self.recache:
            told["redirect"] = self.recache.in_words
        if self.recache and self.recache.each_clip:
            told["clip"] = "when the window is full, that is done too: the next clip begins"
        if self.jump is not None:
            told["cut"] = f"the same, and the first block of the shot stands at {self.jump}"
        return told

    def seen(self, window: WindowShape) -> int:
        """How many finished frames a pass sees at most."""
        return self.reads.seen(window) + (self.bank.frames if self.bank else 0)


PLAIN = Policy()


@dataclass(frozen=True)
class Average:
    """The sink as a running mean (Reward Forcing, 2512.04678): [B, frames * tokens, N, D] in fp32.

    In bfloat16 a share of .001 is less than half a step, and the sink would never move. Means of unrotated keys are
    keys, of rotated ones they would not be.
    """

    keys: Keys | None = None

    def after(self, sink: Keys, gone: Keys, keep: float) -> Self:
        """The mean once frames that left, as many as the sink has or the first of them, have been taken in.

        sink: as it stood, for the first time.
        """
        old = self.keys or sink._replace(k_BTND=_wide(sink.k_BTND), v_BTND=_wide(sink.v_BTND))
        count = min(len(old.frames), len(gone.frames))
        tokens = count * (old.k_BTND.shape[1] // len(old.frames))
        k, v = (
            torch.cat([mean[:, :tokens].lerp(_wide(new[:, :tokens]), 1 - keep), mean[:, tokens:]], dim=1)
            for mean, new in zip(old[:2], gone[:2], strict=True)
        )
        return replace(self, keys=Keys(k, v, old.frames))

    def nbytes(self) -> int:
        return 0 if self.keys is None else self.keys.nbytes()


@dataclass(frozen=True, kw_only=True)
class BankShape:
    """So many frames chosen by the prompt, out of the first ones of every so manyth block (MemFlow, 2512.14699)."""

    frames: int = 3
    every: int = 3

    def __post_init__(self) -> None:
        if self.frames < 1 or self.every < 1:
            raise ValueError(
                f"a bank has 1 latent frame or more, of every 1 block or more: {self.frames}, {self.every}"
            )


@dataclass(frozen=True)
class Bank:
    """One layer's bank. A value: `chosen` and `recorded` return others.

    rows: of each stream of a batch the frames in its bank, unrotated, [1, frames * tokens, N, D], oldest first. Just
    after one was recorded there may be one too many, until the next block's prompt chooses. A frame's score is the
    product of two means: of the prompt's keys (as released; the paper: its queries, under a softmax), and of the
    frame's own, rotated at its number.
    """

    shape: BankShape
    rows: tuple[Keys, ...] = ()

    def recorded(self, new: Keys) -> Self:
        """With the first of these frames too."""
        first = new.select([0])
        latest = [Keys(k[None], v[None], first.frames) for k, v in zip(first.k_BTND, first.v_BTND, strict=True)]
        rows = [old.joined(one) for old, one in zip(self.rows, latest, strict=True)] if self.rows else latest
        return replace(self, rows=tuple(rows))

    def chosen(self, text_BND: Tensor, grid: Grid) -> Self:
        """With no more frames than there is room for: the latest, and those others that the prompt scores highest."""
        if not self.rows or len(self.rows[0].frames) <= self.shape.frames:
            return self
        return replace(self, rows=tuple(self._best(*one, grid) for one in zip(self.rows, text_BND, strict=True)))

    def _best(self, row: Keys, text_ND: Tensor, grid: Grid) -> Keys:
        k_FTND = self._rotated(row, grid).unflatten(1, (len(row.frames), -1))[0]
        scores_F = (k_FTND.float().mean(1) * text_ND.float()).sum((-2, -1))[:-1]
        order = scores_F.sort(descending=True, stable=True).indices[: self.shape.frames - 1].tolist()
        return row.select([*sorted(order), len(row.frames) - 1])

    def read(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Keys rotated at the numbers of their frames, and values."""
        k_BTND = torch.cat([self._rotated(row, grid) for row in self.rows])
        return k_BTND, torch.cat([row.v_BTND for row in self.rows])

    def _rotated(self, row: Keys, grid: Grid) -> Tensor:
        return rotate(row.k_BTND, grid.rotation(row.frames, row.k_BTND.device))

    def nbytes(self) -> int:
        return sum(row.nbytes() for row in self.rows)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
