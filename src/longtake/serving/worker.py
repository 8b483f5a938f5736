"""One thread owns the device and makes every stream, block by block; whoever would run dry first is next.

It knows nothing of HTTP. Sockets open sessions, read pieces and give commands from threads of their own.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import takewhile
from typing import Literal, NamedTuple, TypeVar

import torch

from longtake.generation.blend import Interpolation
from longtake.generation.recording import Line
from longtake.generation.stream import Chunk, Engine, Stream
from longtake.generation.take import Take, bytes_of
from longtake.serving.admission import Busy, Limits, Memory, has_room, retry_seconds
from longtake.serving.playback import Playback
from longtake.serving.session import Over, Piece, Session
from longtake.serving.turns import how_many, next_size, trial

T = TypeVar("T")
Method = Interpolation | Literal["cut"]

_MEASURED = 2  # blocks, before anyone comes
_RECENT = 0.1  # weight of each of the latest blocks in the measured speed
_LOOK_AFTER = 1.0  # seconds at most between looks at who has gone, and at memory
_FORESEEN_AFTER = 3  # seconds, about, that it takes to predict what streams take of memory
_LONGEST_TRIAL = 1.0  # seconds that a pass of a trial may take, for which whoever comes waits

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a change begins in its line: the seconds of all made, dropped pictures included, that come before it."""

    start_seconds: float


class Worker:
    """Makes streams of one engine for many viewers.

    Each is made at most `limits.ahead` seconds beyond what its viewer has played, and then rests; pictures made and not
    handed out are dropped when the words change. Methods are safe to call from any thread; those that need the device
    return futures, which are done between two blocks. memory: predicts what streams take of the device, see `foresee`,
    calling what it is given again and again; None where that is not known, and they take what they do. exact: never
    make blocks of several streams in one pass, so that each is made again to the bit. threads: that torch works with on
    the device's thread; unless given, as many as ever. clock: seconds, for tests.

    Raises: ValueError if `ahead` is shorter than two blocks or not longer than `lead`.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits | None = None,
        *,
        memory: Callable[[Callable[[], object]], Memory | None] | None = None,
        exact: bool = False,
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
        self._alone_share = 0.0  # the same of blocks that were made alone
        self.gains: dict[int, float] = {}
        """Of how many streams a pass saves time, and what share of it is left, as a trial measured."""
        self._untried: str | None = None  # the words of the trial that is to be made
        self._trial: Iterator[Sequence[Stream]] | None = None
        self._tried: Sequence[Stream] = ()  # over which its next pass goes
        if self.limits.ahead < max(2 * self.block_seconds, self.limits.lead):
            raise ValueError(
                f"a stream is made at least two blocks ahead, {2 * self.block_seconds:g} s, and no less than the "
                f"{self.limits.lead:g} s that a viewer holds: got {self.limits.ahead:g} s"
            )
        self._predict, self._foreseen, self._foreseeing_since = memory, memory is None, self.clock()
        self._memory: Memory | None = None
        self._room, self._looked = 0, -math.inf  # bytes that are free or our streams', and when that was found
        self._exact, self._threads = exact, threads
        self._sessions: dict[str, Session] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._commanded = False
        self._stopping = False
        self._lock = threading.Condition()
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="longtake-device", daemon=True)

    # For viewers

    def admit(
        self,
        prompt: str = "",
        *,
        seed: int = 42,
        pictures: int | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> Session:
        """A place for a new stream, which `begin` opens. Raises Busy if there is no room.

        changed: called, from any thread, whenever there may be something to read.
        """
        with self._lock:
            now = self.clock()
            self._let_go(now)
            room = has_room(len(self._sessions), self.limits, self.device_share or 0.0, self._holds)
            if self._stopping or not room:
                raise Busy(self._retry_seconds(now))
            session = Session(prompt, seed, pictures, now, changed, Playback(now), touched=now)
            self._sessions[session.id] = session
            return session

    def _retry_seconds(self, now: float) -> int:
        """When asking again may help: once a session is over, or once it is foreseen what streams take. Beside streams
        that leave little of the time nobody knows when that is: as long again as it takes already."""
        slower = max(1.0, len(self._sessions) * (self.device_share or 0.0))
        left = retry_seconds(self.sessions(), self.limits, self.engine.frame_rate, now, slower)
        return left if self._foreseen else min(left, max(_FORESEEN_AFTER, round(now - self._foreseeing_since)))

    def begin(self, session: Session, take: Take | None = None) -> "Future[Session]":
        """Open its stream; ValueError through the future for a prompt, seed or take that the engine refuses.

        take: from which the stream goes on, with its seed, and with its words if the prompt is empty; Unfit through the
        future for one of another engine.
        """
        with self._lock:
            return self._command(lambda: self._begin(session, take))

    def redirect(
        self, session: Session, prompt: str, event: str, *, over: int = 1, method: Method = "lerp"
    ) -> "Future[Place]":
        """Go on under other words, or cut to a new shot; what is made and not handed out is dropped, if they are taken.

        over, method: as over and blend for `Stream.redirect`; or a cut. event: a name for this change, which the pieces
        it shows in carry. ValueError through the future for words that the engine refuses, or where the session is
        over: then nothing changes.
        """
        with self._lock:
            session.touched = self.clock()
            return self._command(lambda: self._redirect(session, prompt, event, over, method))

    def take_bytes(self, session: Session) -> "Future[int]":
        """What a snapshot takes, as the stream stands; nothing is copied. Over as for `snapshot`."""
        with self._lock:
            return self._command(lambda: _bytes_of(session.opened_stream()))

    def snapshot(self, session: Session) -> "Future[Take]":
        """The stream as it stands, between two blocks; what is made and not handed out comes before it.

        Over through the future where the session has ended.
        """
        with self._lock:
            session.touched = self.clock()
            return self._command(lambda: Take.of(session.opened_stream(), "cpu"))

    def rewind(self, session: Session, take: Take, event: str) -> "Future[Place]":
        """Go on from a take of any stream that fits; what is made and not handed out is dropped.

        event: as for `redirect`. Unfit through the future for a take of another engine.
        """
        with self._lock:
            session.touched = self.clock()
            return self._command(lambda: self._rewind(session, take, event))

    def reset(self, session: Session, event: str) -> "Future[Place]":
        """Begin anew, from the first picture, with the same seed and under the words that are in force; what is made
        and not handed out is dropped.

        event: as for `redirect`. Over through the future where the session has ended.
        """
        with self._lock:
            session.touched = self.clock()
            return self._command(lambda: self._reset(session, event))

    def remember(self, session: Session) -> None:
        """Note from now on what is left by rewinds and resets, for `lines`."""
        with self._lock:
            session.lines = {}

    def lines(self, session: Session) -> dict[int, Line]:
        """What the stream was told, by the lines that pieces name, since `remember`; from now on no more is noted."""
        with self._lock:
            noted, session.lines = session.lines or {}, None
            return {session.line: session.present_line()} | noted  # the current one is noted while it is being left

    def pause(self, session: Session) -> None:
        """Hand out and make nothing until `resume`."""
        with self._lock:
            now = self.clock()
            session.touched = now
            if not session.playback.paused:
                session.playback.pause(now)
                session.paused_at = now

    def resume(self, session: Session) -> None:
        with self._lock:
            session.touched = self.clock()
            session.playback.resume(self.clock())
            self._lock.notify_all()
        session.changed()

    def touch(self, session: Session) -> None:
        """The viewer is still there."""
        with self._lock:
            session.touched = self.clock()

    def close(self, session: Session, reason: str = "stopped") -> None:
        """End a session; closing twice does nothing."""
        with self._lock:
            self._end(session, reason)

    def read(self, session: Session) -> Piece | None:
        """The next pictures if it is time for them: they count as sent. None if not, or if the session is over."""
        with self._lock:
            now = self.clock()
            if not session.made or self._too_early(session, now) > 0:
                return None
            piece = session.hand_out()
            session.playback.send(len(piece.frames) / self.engine.frame_rate, now)
            session.touched = now
            if session.pictures is not None and session.sent >= session.pictures:
                self._end(session, "done")
            self._lock.notify_all()
            return piece

    def seconds_until_due(self, session: Session) -> float | None:
        """How long until `read` may give what is made already; None if nothing is, or the viewer has paused."""
        with self._lock:
            if not session.made or session.playback.paused:
                return None
            return self._too_early(session, self.clock())

    def sessions(self) -> list[Session]:
        with self._lock:
            return list(self._sessions.values())

    def session(self, name: str) -> Session | None:
        with self._lock:
            return self._sessions.get(name)

    # The device

    def warm_up(self, prompt: str) -> "Future[None]":
        """Fill a memory for nobody, so that no viewer pays for kernels that are chosen, compiled and recorded.

        A few blocks more measure speed.
        """
        with self._lock:
            return self._command(lambda: self._warm_up(prompt))

    def _warm_up(self, prompt: str) -> None:
        with self.engine.stream(prompt, seed=0) as stream:
            for _ in range(self.engine.blocks_until_full):
                next(stream)
            for _ in range(_MEASURED):
                self._measure([next(stream)])
        self._untried = None if self._exact else prompt

    def foresee(self, wanted: Callable[[], bool] = lambda: True) -> None:
        """Predict what streams take of memory, in this thread, for some seconds of what blocks leave of the time.

        One stream at a time is taken until then. wanted: asked again and again; Over once it says no.
        """

        def wait(seconds: float | None = None) -> bool:
            if not wanted():
                raise Over("what streams take of memory is not wanted any more")
            return self._idle.wait(seconds)

        self._foreseeing_since = self.clock()
        memory = self._predict(wait) if self._predict else None
        with self._lock:
            self._memory, self._foreseen = memory, True
            self._lock.notify_all()

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
        while self._commands:  # what was asked for last: streams are closed
            self.step()
        self._end_trial()

    def _run(self) -> None:
        if self._threads:
            torch.get_num_threads()  # else this thread's first work takes what another thread has set last
            torch.set_num_threads(self._threads)
        while not self._stopping:
            if not self.step():
                with self._lock:
                    if not self._stopping and not self._commands:
                        self._lock.wait(self._rest(self.clock()))

    def step(self) -> bool:
        """Do one thing on the device, a command or a block; False if there is nothing to do now.

        They take turns, so that nobody's commands keep the others from their pictures. Where nobody would wait for it,
        passes over several streams are tried.
        """
        with self._lock:
            now = self.clock()
            self._let_go(now)
            self._look_at_memory(now)
            sessions = self._next(now)
            command = self._commands.popleft() if self._commands and not (self._commanded and sessions) else None
            self._commanded = command is not None
            tries = command is None and not sessions and self._may_try(now)
        self._idle.clear()
        try:
            if command is not None:
                command()
            elif sessions:
                self._make(sessions)
            else:
                return tries and self._try()
        finally:
            self._idle.set()
        return True

    def _try(self) -> bool:
        """Go on with the trial, or begin it; False where there is none."""
        assert self._untried is not None
        if self._trial is None:
            self._trial = trial(self.engine, self._untried, self.limits.sessions, self.gains)
        self._tried = next(self._trial, ())
        if not self._tried:
            self._trial = self._untried = None
        return bool(self._tried)

    def _end_trial(self) -> None:
        self._trial, self._tried = None, ()

    def _may_try(self, now: float) -> bool:
        """Whether a pass of the trial, as long as its blocks one by one, leaves time for a block of each stream before
        the first runs dry, and its streams room for another one."""
        if self._untried is None or not self._foreseen:
            return False
        size = len(self._tried) or next_size(self.gains)
        block = self._alone_share * self.block_seconds
        if size * block * self.gains.get(size // 2, 1.0) > _LONGEST_TRIAL:
            self._end_trial()
            self._untried = None
            return False
        if not self._sessions:
            return self._holds(size, size)
        if self.engine.fused or any(session.stream is None for session in self._sessions.values()):
            return False  # recording graphs of a size takes as long as it takes
        playing = [one for one in self._sessions.values() if not one.playback.paused and not one.whole]
        late = now + (size + len(playing)) * block
        return all(self._dry_at(session, now) >= late for session in playing) and self._holds(
            len(self._sessions) + 1 + size, size
        )

    def _next(self, now: float) -> list[Session]:
        """Of those that want more, the session whose video runs dry first, and those that a pass takes along."""
        hungry = [session for session in self._sessions.values() if self._full_for(session, now) <= 0]
        hungry.sort(key=lambda session: self._dry_at(session, now))
        if len(hungry) < 2 or not self.gains:
            return hungry[:1]
        phase = _phase(hungry[0])
        if phase is None:
            return hungry[:1]
        # Nobody of another phase is overtaken: a pass ends no later than the turns of those before them.
        alike = list(takewhile(lambda session: _phase(session) == phase, hungry))
        dry_at = [self._dry_at(session, now) for session in alike]
        return alike[: how_many(dry_at, now, self._alone_share * self.block_seconds, self.gains)]

    def _dry_at(self, session: Session, now: float) -> float:
        return session.playback.dry_at(now) + session.waiting / self.engine.frame_rate

    def _full_for(self, session: Session, now: float) -> float:
        """Seconds until another block would not be too far ahead, by playing alone; infinite if it wants none."""
        if session.stream is None or session.end or session.playback.paused or session.whole:
            return float("inf")
        waiting = session.waiting / self.engine.frame_rate
        over = session.playback.unseen(now) + waiting + self.block_seconds - self.limits.ahead
        played_away = waiting + self.block_seconds <= self.limits.ahead and session.playback.started
        return over if over <= 0 or played_away else float("inf")

    def _too_early(self, session: Session, now: float) -> float:
        if session.playback.paused:
            return float("inf")
        return session.playback.unseen(now) - self.limits.lead

    def _rest(self, now: float) -> float:
        return min([_LOOK_AFTER, *(self._full_for(session, now) for session in self._sessions.values())])

    def _make(self, sessions: Sequence[Session]) -> None:
        try:
            chunks = self._chunks([session.stream for session in sessions if session.stream is not None])
        except Exception as error:  # whatever it is, it ends no other stream
            if len(sessions) == 1:
                self._fail(sessions[0], error)
            else:
                self._make_in_turn(sessions, error)
            return
        with self._lock:
            if chunks[0].index:  # the first pays for the start
                self._measure(chunks)
            now = self.clock()
            for session, chunk in zip(sessions, chunks, strict=True):
                if not session.end:
                    session.take_in(chunk, now)
        for session in sessions:
            session.changed()

    def _make_in_turn(self, sessions: Sequence[Session], error: Exception) -> None:
        """After a pass over them failed: no command may come between, as they may have a block that is not decoded."""
        log.exception("a pass over %d streams failed: they go on one by one", len(sessions))
        for size in [size for size in self.gains if size >= len(sessions)]:
            del self.gains[size]
        for session in sessions:
            if session.stream is not None and session.stream.closed:  # its memory was being written
                self._fail(session, error)
            else:
                self._make([session])

    def _fail(self, session: Session, error: Exception) -> None:
        with self._lock:
            session.failed = not session.end  # who has ended already is told of that
            self._end(session, f"{type(error).__name__}: {error}")

    def _chunks(self, streams: Sequence[Stream]) -> list[Chunk]:
        return self.engine.next_together(streams) if len(streams) > 1 else [next(streams[0])]

    def _measure(self, chunks: Sequence[Chunk]) -> None:
        """Note the speed of a pass."""
        pictures = sum(len(chunk.frames) for chunk in chunks)
        share = chunks[0].timings.total_seconds * self.engine.frame_rate / pictures
        known = share if self.device_share is None else self.device_share
        self.device_share = share + (1 - _RECENT) ** len(chunks) * (known - share)
        if len(chunks) == 1:
            self._alone_share = share + (1 - _RECENT) * ((self._alone_share or share) - share)

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

    def _begin(self, session: Session, take: Take | None) -> Session:
        if session.end:
            raise Over("the session was ended before it began")
        self._end_trial()  # its streams have memory that others were promised
        try:
            session.stream = self._stream(session, take)
        except Exception:
            self.close(session, "refused")
            raise
        session.seed, session.prompt = session.stream.seed, session.stream.prompt
        return session

    def _stream(self, session: Session, take: Take | None) -> Stream:
        if take is None:
            return self.engine.stream(session.prompt, seed=session.seed)
        stream = take.resume(self.engine)
        if session.prompt:
            stream.redirect(session.prompt)
        return stream

    def _redirect(self, session: Session, prompt: str, name: str, over: int, method: Method) -> Place:
        stream = session.opened_stream()
        if method == "cut":
            stream.cut(prompt)
        else:
            stream.redirect(prompt, over=over, blend=method)
        older = stream.since - stream.blocks
        with self._lock:
            self._drop(session, name, stream.since, stream.since + over - 1)
            session.prompt = prompt
        return Place((stream.pictures + older * self.block_pictures) / self.engine.frame_rate)

    def _rewind(self, session: Session, take: Take, name: str) -> Place:
        stream = session.opened_stream()
        take.require_fit(self.engine)
        with self._lock:  # before its history is another's, lest `lines` tells that
            session.leave_line()
        take.rewind(stream)
        with self._lock:
            session.begin_line()
            self._drop(session, name, stream.blocks)
            session.prompt, session.seed = stream.prompt, stream.seed
        return Place(stream.pictures / self.engine.frame_rate)

    def _reset(self, session: Session, name: str) -> Place:
        old = session.opened_stream()
        new = self.engine.stream(session.prompt, seed=session.seed)
        with self._lock:
            session.leave_line()
            session.stream = new
            session.begin_line()
            self._drop(session, name, 0)
        old.close()
        return Place(0.0)

    # With the lock held

    def _look_at_memory(self, now: float) -> None:
        """Between two blocks, so that what a pass takes does not count; once in a while."""
        if self._memory is not None and now - self._looked >= _LOOK_AFTER:
            opened = [session.stream for session in self._sessions.values() if session.stream is not None]
            ours = sum(_bytes_of(stream) for stream in (*opened, *self._tried) if not stream.closed)
            self._looked = now
            try:
                self._room = self._memory.free() + ours
            except Exception:  # say for want of file handles: it ends no stream, and what was found before holds
                log.exception("what is free of memory is not told")

    def _holds(self, streams: int, together: int | None = None) -> bool:
        """Whether memory does for so many streams; as far as it is foreseen. together: made in one pass at most."""
        if self._memory is None:
            return self._foreseen
        together = min(streams, max(self.gains, default=1)) if together is None else together
        return self._memory.holds(streams, together, self._room)

    def _drop(self, session: Session, name: str, since: int, until: int | None = None) -> None:
        session.drop(name, since, until)
        self._lock.notify_all()

    def _let_go(self, now: float) -> None:
        """End sessions of viewers who leave what is made lying without a word, or have paused for too long."""
        for session in list(self._sessions.values()):
            since, most = session.touched, self.limits.stall
            if session.playback.paused:
                since, most = session.paused_at, self.limits.pause
            if now - since > most and (session.made or session.playback.paused):
                self._end(session, "stalled")

    def _end(self, session: Session, reason: str) -> None:
        if session.end:
            return
        session.end = reason
        session.made.clear()
        self._sessions.pop(session.id, None)
        self._command(lambda: session.stream.close() if session.stream else None)
        session.changed()


def _bytes_of(stream: Stream) -> int:
    """What it keeps from block to block."""
    return sum(bytes_of(stream.state()).values())


def _phase(session: Session) -> object:
    """What its stream has in common with those that it can be made together with; None for one that failed."""
    return None if session.stream is None or session.stream.closed else session.stream.phase
