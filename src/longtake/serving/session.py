"""One viewer's stream: what is made of it and not handed out, and what was changed and is not shown yet."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from longtake.generation.recording import Line
from longtake.generation.stream import Chunk, Stream, Timings
from longtake.serving.playback import Playback

State = Literal["opening", "live", "paused", "ended"]


class Over(ValueError):
    """The session has ended, so there is nothing to be done with its stream."""


class Piece(NamedTuple):
    """A chunk for one viewer: pictures uint8 [T, H, W, 3], its number and start among all made, and its cost.

    events: the changes that it is the first to show. active, completed: those that it shows, and shows wholly. words:
    that it shows, or that others go over to. line: how often the stream was rewound or reset before; numbers and starts
    go up within a line.
    """

    frames: NDArray[np.uint8]
    number: int
    start_seconds: float
    timings: Timings
    events: tuple[str, ...]
    active: tuple[str, ...]
    completed: tuple[str, ...]
    words: str
    line: int


class Change(NamedTuple):
    """Something that is seen from block number `since` on, and wholly in `until`. begun: whether that was told."""

    name: str
    since: int
    until: int
    begun: bool = False


@dataclass(eq=False)
class Session:
    """One viewer's stream. Only the worker changes it; anybody may read it.

    prompt: "" until it is open where it goes on from a take under its words. seed: the stream's own once it is open.
    pictures: how many it shall have, None for no end. sent: how many were handed out. end: why it is over, "" while it
    is not: done, stopped, stalled, or what went wrong. stream: None until it is open. made: what waits to be handed
    out. changes: those that are not wholly shown by what is made. line: how often it was rewound or reset. lines: those
    left so that were shown, while they are remembered. touched, paused_at: when the viewer was last heard of, and
    paused.
    """

    prompt: str
    seed: int
    pictures: int | None
    opened: float
    changed: Callable[[], None]
    playback: Playback
    id: str = field(default_factory=lambda: uuid4().hex)
    sent: int = 0
    end: str = ""
    failed: bool = False
    stream: Stream | None = None
    made: deque[Piece] = field(default_factory=deque)
    changes: list[Change] = field(default_factory=list)
    line: int = 0
    lines: dict[int, Line] | None = None
    touched: float = 0.0
    paused_at: float = 0.0
    _line_shown: bool = False

    @property
    def state(self) -> State:
        if self.end:
            return "ended"
        if self.stream is None:
            return "opening"
        return "paused" if self.playback.paused else "live"

    @property
    def waiting(self) -> int:
        """Pictures made and not handed out."""
        return sum(len(piece.frames) for piece in self.made)

    @property
    def whole(self) -> bool:
        """Whether all pictures that it shall have are made."""
        return self.pictures is not None and self.sent + self.waiting >= self.pictures

    def opened_stream(self) -> Stream:
        """Its stream; Over where it has ended or has not begun."""
        if self.stream is None or self.end:
            raise Over("the session is over")
        return self.stream

    def take_in(self, chunk: Chunk, now: float) -> None:
        """A chunk that was made: it waits to be handed out."""
        assert self.stream is not None
        left = None if self.pictures is None else self.pictures - self.sent - self.waiting
        active = [change for change in self.changes if change.since <= chunk.index]
        events = tuple(change.name for change in active if not change.begun)
        completed = tuple(change.name for change in active if change.until <= chunk.index)
        self.changes = [
            change._replace(begun=change.begun or change in active)
            for change in self.changes
            if change.name not in completed
        ]
        if not self.made:
            self.touched = now  # from here on it is the viewer who is waited for
        shown = events, tuple(change.name for change in active), completed
        told = (*shown, self.stream.prompt_of(chunk.index), self.line)
        self.made.append(Piece(chunk.frames[:left], chunk.index, chunk.start_seconds, chunk.timings, *told))

    def hand_out(self) -> Piece:
        piece = self.made.popleft()
        self.sent += len(piece.frames)
        self._line_shown |= piece.line == self.line
        return piece

    def drop(self, name: str, since: int, until: int | None = None) -> None:
        """Drop what waits, for a change that the block of that number is the first to show, and `until` shows wholly.

        It takes changes along that nobody has seen, or seen wholly: they are told of with this one.
        """
        begun = {change.name for change in self.changes if change.begun} | {
            name for piece in self.made for name in piece.completed
        }
        begun -= {event for piece in self.made for event in piece.events}
        waiting = [name for piece in self.made for name in piece.active] + [change.name for change in self.changes]
        self.made.clear()
        self.changes = [Change(one, since, since, one in begun) for one in dict.fromkeys(waiting)]
        self.changes.append(Change(name, since, since if until is None else until))

    def leave_line(self) -> None:
        """Before a rewind or a reset: what `lines` will tell of the line that is left, if anybody has seen of it."""
        if self.lines is not None and self._line_shown:
            self.lines[self.line] = self.present_line()

    def begin_line(self) -> None:
        """After a rewind or a reset."""
        self.line += 1
        self._line_shown = False

    def present_line(self) -> Line:
        stream = self.stream
        return Line(self.seed, stream.history, stream.in_company) if stream else Line(self.seed, ())
