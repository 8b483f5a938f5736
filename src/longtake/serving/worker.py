"""One thread owns the device and makes every stream, block by block; whoever would run dry first is next.

It knows nothing of HTTP. Sockets open sessions, read pieces and give commands from threads of their own.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray

from longtake.generation.recording import Line
from longtake.generation.stream import Engine, Stream, Timings
from longtake.generation.take import Take
from longtake.serving.playback import Playback

T = TypeVar("T")
State = Literal["opening", "live", "paused", "ended"]
Method = Literal["redirect", "cut"]

_LOAD = 0.9  # the share of the device's time that may be promised
_RECENT = 0.1  # weight of the latest block in the measured speed
_LOOK_AFTER = 1.0  # seconds at most between looks at who has gone


class Busy(Exception):
    """There is no room for another stream. retry_seconds: when asking again may help."""

    def __init__(self, retry_seconds: int) -> None:
        super().__init__(f"busy, try in {retry_seconds} s")
        self.retry_seconds = retry_seconds


class Over(ValueError):
    """The session has ended, so there is nothing to be done with its stream."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one viewer may take. All in seconds but sessions.

    ahead: of video made beyond what is played; at least two blocks. lead: of video that the viewer is given of these.
    stall: while something waits to be read, without a read or a message, until a session ends. pause: how long one may
    pause.
    """

    sessions: int = 4
    ahead: float = 2.0
    lead: float = 0.75
    stall: float = 60.0
    pause: float = 300.0


class Piece(NamedTuple):
    """A chunk for one viewer: pictures uint8 [T, H, W, 3], its number and start among all made, and its cost.

    events: the changes that it is the first to show. words: that it shows. line: how often the stream was rewound
    before; numbers and starts go up within a line.
    """

    frames: NDArray[np.uint8]
    number: int
    start_seconds: float
    timings: Timings
    events: tuple[str, ...]
    words: str
    line: int


class Place(NamedTuple):
    """Where a change begins in its line: the seconds of all made, dropped pictures included, that come before it."""

    start_seconds: float


@dataclass(eq=False)
class Session:
    """One viewer's stream. Only the worker changes it; what is public here may be read by anybody.

    prompt: "" until it is open where it goes on from a take under its words. seed: the stream's own once it is open.
    pictures: how many it shall have, None for no end. sent: how many were handed out. end: why it is over, "" while it
    is not: done, stopped, stalled, or what went wrong.
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
    _stream: Stream | None = None
    _made: deque[Piece] = field(default_factory=deque)
    _events: list[str] = field(default_factory=list)  # not shown yet
    _older: int = 0  # blocks that were begun under other words and are shown before these events
    _words: str = ""  # that the next piece shows
    _line: int = 0  # how often it was rewound
    _lines: dict[int, Line] | None = None  # those left by rewinding while they are remembered
    _touched: float = 0.0
    _paused_at: float = 0.0

    @property
    def state(self) -> State:
        if self.end:
            return "ended"
        if self._stream is None:
            return "opening"
        return "paused" if self.playback.paused else "live"

    def _waiting(self) -> int:
        return sum(len(piece.frames) for piece in self._made)


class Worker:
    """Makes streams of one engine for many viewers.

    Each is made at most `limits.ahead` seconds beyond what its viewer has played, and then rests; pictures made and not
    handed out are dropped when the words change. Methods are safe to call from any thread; those that need the device
    return futures, which are done between two blocks. threads: that torch works with on the device's thread; unless
    given, as many as ever. clock: seconds, for tests.

    Raises: ValueError if `ahead` is shorter than two blocks or not longer than `lead`.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits | None = None,
        *,
        threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.limits = limits or Limits()
        self.clock = clock
        self.block_pictures = engine.pictures_in(2) - engine.pictures_in(1)
        self.block_seconds = self.block_pictures / engine.frame_rate
        self.device_share: float | None = None
        """Seconds of the device that a second of video takes, of late; None until measured."""
        if self.limits.ahead < max(2 * self.block_seconds, self.limits.lead):
            raise ValueError(
                f"a stream is made at least two blocks ahead, {2 * self.block_seconds:g} s, and no less than the "
                f"{self.limits.lead:g} s that a viewer holds: got {self.limits.ahead:g} s"
            )
        self._threads = threads
        self._sessions: dict[str, Session] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._commanded = False
        self._stopping = False
        self._lock = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="longtake-device", daemon=True)

    # For viewers

    def open(
        self,
        prompt: str = "",
        *,
        seed: int = 42,
        pictures: int | None = None,
        take: Take | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> "Future[Session]":
        """A new stream; ValueError through the future for a prompt, seed or take that the engine refuses.

        take: from which the stream goes on, with its seed, and with its words if the prompt is empty. changed: called,
        from any thread, whenever there may be something to read. Raises Busy if there is no room.
        """
        with self._lock:
            now = self.clock()
            self._let_go(now)
            if not self._has_room():
                raise Busy(self._retry_seconds(now))
            session = Session(prompt, seed, pictures, now, changed, Playback(now), _touched=now)
            self._sessions[session.id] = session
            return self._command(lambda: self._open(session, take))

    def redirect(self, session: Session, prompt: str, event: str, *, method: Method = "redirect") -> "Future[Place]":
        """Go on under other words, or cut to a new shot; what is made and not handed out is dropped, if they are taken.

        event: a name for this change, which the pieces it shows in carry. ValueError through the future for words that
        the engine refuses, or where the session is over: then nothing changes.
        """
        with self._lock:
            session._touched = self.clock()
            return self._command(lambda: self._redirect(session, prompt, event, method))

    def snapshot(self, session: Session) -> "Future[Take]":
        """The stream as it stands, between two blocks; what is made and not handed out comes before it.

        Over through the future where the session has ended.
        """
        with self._lock:
            session._touched = self.clock()
            return self._command(lambda: Take.of(_open_stream(session), "cpu"))

    def rewind(self, session: Session, take: Take, event: str) -> "Future[Place]":
        """Go on from a take of any stream that fits; what is made and not handed out is dropped.

        event: as for `redirect`. ValueError through the future for a take that does not fit this engine.
        """
        with self._lock:
            session._touched = self.clock()
            return self._command(lambda: self._rewind(session, take, event))

    def remember(self, session: Session) -> None:
        """Note from now on what is left by rewinding, for `lines`."""
        with self._lock:
            session._lines = {}

    def lines(self, session: Session) -> dict[int, Line]:
        """What the stream was told, by the lines that pieces name, since `remember`; from now on no more is noted."""
        with self._lock:
            noted, session._lines = session._lines or {}, None
            return {session._line: _line_of(session)} | noted  # the current one is noted while it is being left

    def pause(self, session: Session) -> None:
        """Hand out and make nothing until `resume`."""
        with self._lock:
            now = self.clock()
            session._touched = now
            if not session.playback.paused:
                session.playback.pause(now)
                session._paused_at = now

    def resume(self, session: Session) -> None:
        with self._lock:
            session._touched = self.clock()
            session.playback.resume(self.clock())
            self._lock.notify_all()
        session.changed()

    def touch(self, session: Session) -> None:
        """The viewer is still there."""
        with self._lock:
            session._touched = self.clock()

    def close(self, session: Session, reason: str = "stopped") -> None:
        """End a session; closing twice does nothing."""
        with self._lock:
            self._end(session, reason)

    def read(self, session: Session) -> Piece | None:
        """The next pictures if it is time for them: they count as sent. None if not, or if the session is over."""
        with self._lock:
            now = self.clock()
            if not session._made or self._too_early(session, now) > 0:
                return None
            piece = session._made.popleft()
            session.sent += len(piece.frames)
            session.playback.send(len(piece.frames) / self.engine.frame_rate, now)
            session._touched = now
            if session.pictures is not None and session.sent >= session.pictures:
                self._end(session, "done")
            self._lock.notify_all()
            return piece

    def seconds_until_due(self, session: Session) -> float | None:
        """How long until `read` may give what is made already; None if nothing is, or the viewer has paused."""
        with self._lock:
            if not session._made or session.playback.paused:
                return None
            return self._too_early(session, self.clock())

    def sessions(self) -> list[Session]:
        with self._lock:
            return list(self._sessions.values())

    def session(self, name: str) -> Session | None:
        with self._lock:
            return self._sessions.get(name)

    # The device

    def warm_up(self, prompt: str, blocks: int = 3) -> "Future[None]":
        """Make a few blocks for nobody, so that the first viewer does not pay for the start; this measures speed."""
        with self._lock:
            return self._command(lambda: self._warm_up(prompt, blocks))

    def _warm_up(self, prompt: str, blocks: int) -> None:
        with self.engine.stream(prompt, seed=0) as stream:
            for number in range(blocks):
                chunk = next(stream)
                if number:  # the first pays for the start
                    self._measure(chunk.timings.total_seconds, len(chunk.frames))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End every session and the thread, after the block that it is making."""
        with self._lock:
            for session in list(self._sessions.values()):
                self._end(session, "stopped")
            self._stopping = True
            self._lock.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        while self.step():  # what was asked for last: streams are closed
            pass

    def _run(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)  # what another thread has set does not hold for this one
        while not self._stopping:
            if not self.step():
                with self._lock:
                    if not self._stopping and not self._commands:
                        self._lock.wait(self._rest(self.clock()))

    def step(self) -> bool:
        """Do one thing on the device, a command or a block; False if there is nothing to do now.

        They take turns, so that nobody's commands keep the others from their pictures.
        """
        with self._lock:
            now = self.clock()
            self._let_go(now)
            session = self._next(now)
            command = self._commands.popleft() if self._commands and not (self._commanded and session) else None
            self._commanded = command is not None
        if command is not None:
            command()
        elif session is not None:
            self._make(session)
        return command is not None or session is not None

    def _next(self, now: float) -> Session | None:
        """The session whose video runs dry first, of those that want more."""
        hungry = [session for session in self._sessions.values() if self._full_for(session, now) <= 0]
        return min(hungry, key=lambda session: self._dry_at(session, now), default=None)

    def _dry_at(self, session: Session, now: float) -> float:
        return session.playback.dry_at(now) + session._waiting() / self.engine.frame_rate

    def _full_for(self, session: Session, now: float) -> float:
        """Seconds until another block would not be too far ahead, by playing alone; infinite if it wants none."""
        whole = session.pictures is not None and session.sent + session._waiting() >= session.pictures
        if session._stream is None or session.end or session.playback.paused or whole:
            return float("inf")
        waiting = session._waiting() / self.engine.frame_rate
        over = session.playback.unseen(now) + waiting + self.block_seconds - self.limits.ahead
        played_away = waiting + self.block_seconds <= self.limits.ahead and session.playback.started
        return over if over <= 0 or played_away else float("inf")

    def _too_early(self, session: Session, now: float) -> float:
        if session.playback.paused:
            return float("inf")
        return session.playback.unseen(now) - self.limits.lead

    def _rest(self, now: float) -> float:
        return min([_LOOK_AFTER, *(self._full_for(session, now) for session in self._sessions.values())])

    def _make(self, session: Session) -> None:
        assert session._stream is not None
        try:
            chunk = next(session._stream)
        except Exception as error:  # whatever it is, it ends this stream and no other
            with self._lock:
                session.failed = True
                self._end(session, f"{type(error).__name__}: {error}")
            return
        with self._lock:
            if chunk.index:  # the first pays for the start
                self._measure(chunk.timings.total_seconds, len(chunk.frames))
            if session.end:
                return
            left = None if session.pictures is None else session.pictures - session.sent - session._waiting()
            events: tuple[str, ...] = ()
            if session._older:
                session._older -= 1
            else:
                events, session._events = tuple(session._events), []
                session._words = session.prompt
            if not session._made:
                session._touched = self.clock()  # from here on it is the viewer who is waited for
            told = (events, session._words, session._line)
            session._made.append(Piece(chunk.frames[:left], chunk.index, chunk.start_seconds, chunk.timings, *told))
        session.changed()

    def _measure(self, seconds: float, pictures: int) -> None:
        share = seconds * self.engine.frame_rate / pictures
        known = share if self.device_share is None else self.device_share
        self.device_share = known + _RECENT * (share - known)

    # Commands, between two blocks

    def _command(self, act: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(act())
            except Exception as error:  # goes to whoever asked
                future.set_exception(error)

        self._commands.append(run)
        self._lock.notify_all()
        return future

    def _open(self, session: Session, take: Take | None) -> Session:
        if session.end:
            raise Over("the session was ended before it began")
        try:
            session._stream = self._stream(session, take)
        except Exception:
            self.close(session, "refused")
            raise
        session.seed = session._stream.seed
        session.prompt = session._words = session._stream.prompt
        return session

    def _stream(self, session: Session, take: Take | None) -> Stream:
        if take is None:
            return self.engine.stream(session.prompt, seed=session.seed)
        stream = take.resume(self.engine)
        if session.prompt:
            stream.redirect(session.prompt)
        return stream

    def _redirect(self, session: Session, prompt: str, name: str, method: Method) -> Place:
        stream = _open_stream(session)
        if method == "cut":
            stream.cut(prompt)
        else:
            stream.redirect(prompt)
        older = self.engine.recipe.in_flight - 1 if method == "redirect" else 0
        with self._lock:
            self._drop(session, name, older)
            session.prompt = prompt
        return Place((stream.pictures + older * self.block_pictures) / self.engine.frame_rate)

    def _rewind(self, session: Session, take: Take, name: str) -> Place:
        stream = _open_stream(session)
        take.require_fit(self.engine)
        with self._lock:  # before its history is another's, lest `lines` tells that
            if session._lines is not None:
                session._lines[session._line] = _line_of(session)
        take.rewind(stream)
        with self._lock:
            session._line += 1
            self._drop(session, name, 0)
            session.prompt, session.seed = stream.prompt, stream.seed
        return Place(stream.pictures / self.engine.frame_rate)

    # With the lock held

    def _drop(self, session: Session, name: str, older: int) -> None:
        """What was made before a change, all but so many blocks that are begun, and not handed out.

        It takes changes along that nobody has seen: they are told of with this one.
        """
        unseen = [event for piece in session._made for event in piece.events]
        session._made.clear()
        session._events = [*unseen, *session._events, name]
        session._older = older
        self._lock.notify_all()

    def _has_room(self) -> bool:
        count = len(self._sessions)
        fits = count == 0 or (count + 1) * (self.device_share or 0.0) <= _LOAD
        return not self._stopping and count < self.limits.sessions and fits

    def _retry_seconds(self, now: float) -> int:
        """Until the first session is sure to be over; a guess where none is."""
        left = []
        for session in self._sessions.values():
            if session.pictures is not None:
                left.append((session.pictures - session.sent) / self.engine.frame_rate)
            if session.playback.paused:
                left.append(session._paused_at + self.limits.pause - now)
        return max(1, round(min(left, default=10.0)))

    def _let_go(self, now: float) -> None:
        """End sessions of viewers who leave what is made lying without a word, or have paused for too long."""
        for session in list(self._sessions.values()):
            since, most = session._touched, self.limits.stall
            if session.playback.paused:
                since, most = session._paused_at, self.limits.pause
            if now - since > most and (session._made or session.playback.paused):
                self._end(session, "stalled")

    def _end(self, session: Session, reason: str) -> None:
        if session.end:
            return
        session.end = reason
        session._made.clear()
        self._sessions.pop(session.id, None)
        self._command(lambda: session._stream.close() if session._stream else None)
        session.changed()


def _open_stream(session: Session) -> Stream:
    if session._stream is None or session.end:
        raise Over("the session is over")
    return session._stream


def _line_of(session: Session) -> Line:
    stream = session._stream
    return Line(session.seed, stream.history if stream else ())
