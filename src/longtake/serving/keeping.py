"""What one session keeps: snapshots, and a recording of what it is sent. Files are written by threads of their own."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from longtake.generation.take import Take
from longtake.serving.protocol import Refused
from longtake.serving.recorder import Recorder
from longtake.serving.session import Over, Piece, Session
from longtake.serving.store import Full, Store
from longtake.serving.worker import Worker

T = TypeVar("T")

log = logging.getLogger(__name__)


class Keeping:
    """Of one session.

    files: threads that read and write files, apart from those that code video: a slow disk makes no viewer wait.
    """

    def __init__(self, worker: Worker, store: Store, files: Executor) -> None:
        self._worker, self._store, self._files = worker, store, files
        self._snapshots: list[tuple[float, str]] = []  # where each stands in its video, and its name, as they were made
        self._recorder: Recorder | None = None
        self._ended, self._lock = False, Lock()
        self._at_work: set[asyncio.Future[Any]] = set()

    async def _in_files(self, act: Callable[..., T], *given: object) -> T:
        """Have a thread do it, to its end: a task that is cancelled meanwhile ends after it."""
        work = asyncio.get_running_loop().run_in_executor(self._files, act, *given)
        self._at_work.add(work)
        work.add_done_callback(self._at_work.discard)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise

    async def take(self, name: str, event: str | None = None) -> Take:
        """The snapshot of that name. Refused if there is none, or it cannot be read."""
        kept = self._store.find(name, "take")
        try:
            if kept is not None:
                return await self._in_files(Take.load, kept.path)
        except FileNotFoundError:  # removed just now
            pass
        except ValueError as error:
            raise Refused("unfit_snapshot", f"the snapshot cannot be read: {error}", event) from None
        raise Refused("unknown_snapshot", "there is no such snapshot", event)

    def snapshot_before(self, seconds: float, event: str | None) -> str:
        """The session's latest snapshot at or before a moment of its video, of several the newest. Refused if none."""
        before = sorted((one for one in self._still_kept() if one[0] <= seconds), key=lambda one: one[0])
        if not before:
            raise Refused("unknown_snapshot", f"no snapshot of this session is at or before {seconds:g} s", event)
        return before[-1][1]

    def _still_kept(self) -> list[tuple[float, str]]:
        return [one for one in self._snapshots if self._store.find(one[1], "take")]

    async def snapshot(self, session: Session, event: str | None) -> dict[str, Any]:
        """Keep the stream as it stands; what is to be said of it. There is room for it before it is copied."""
        try:
            size = await asyncio.wrap_future(self._worker.take_bytes(session))
            with ExitStack() as stack:
                name = stack.enter_context(self._store.new("take", size))
                take = await asyncio.wrap_future(self._worker.snapshot(session))
                growing = stack.pop_all()  # the thread's from here on: it goes on if the session ends meanwhile
            await self._in_files(_save, take, self._store.place(name, "take"), growing)
        except Over as error:
            raise Refused("session_over", str(error), event) from None
        except Full as full:
            raise Refused("store_full", str(full), event) from None
        except OSError:
            log.exception("a snapshot could not be written")
            raise Refused("snapshot_failed", "the server could not write it: see its log", event) from None
        kept = self._store.find(name, "take")
        if kept is None:
            raise Refused("snapshot_failed", "somebody removed it as soon as it was made", event)
        seconds = take.state["pictures"] / self._worker.engine.frame_rate
        self._snapshots = [*self._still_kept(), (seconds, kept.name)]
        told = {"type": "session.snapshot.done", "request_id": session.id, "id": kept.name, "event_id": event}
        return told | {"start_seconds": seconds, "byte_length": kept.bytes, "lasts": self._store.lasts}

    async def record(self, session: Session) -> dict[str, Any]:
        """Record what is sent from now on; what is to be said of it."""
        if self._recorder is not None:
            raise Refused("already_recording", "a recording is going on")

        def begin() -> Recorder:
            recorder = Recorder(self._store, self._worker.engine)
            self._worker.remember(session)
            with self._lock:  # in this thread, lest it is left behind if the session ends meanwhile
                if not self._ended:
                    self._recorder = recorder
                    return recorder
            recorder.finish(self._worker.lines(session))
            return recorder

        try:
            recorder = await self._in_files(begin)
        except Full as full:
            raise Refused("store_full", str(full)) from None
        except OSError:
            log.exception("a recording could not be written")
            raise Refused("record_failed", "the server could not write it: see its log") from None
        told = {"id": recorder.name, "lasts": self._store.lasts}
        return {"type": "session.record.started", "request_id": session.id, **told}

    @property
    def recorder(self) -> Recorder | None:
        """Of the recording that goes on."""
        return self._recorder

    async def add(self, piece: Piece, recorder: Recorder, session: Session) -> dict[str, Any] | None:
        """Record a piece; what is to be said if the recording ended with it, for want of room."""
        try:
            await self._in_files(recorder.write, piece)
        except OSError:
            log.exception("a recording could not be written")
            recorder.full = True
        return await self.finish(session) if recorder.full and self._recorder is recorder else None

    async def finish(self, session: Session) -> dict[str, Any] | None:
        """End the recording; what is to be said of it, None where there is none."""
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return None
        done = {"type": "session.record.done", "request_id": session.id, "id": None, "full": recorder.full}
        try:
            kept = await self._in_files(recorder.finish, self._worker.lines(session))
        except OSError:
            log.exception("a recording could not be finished")
            return done
        if kept is None:
            return done
        seconds = recorder.notes.pictures / self._worker.engine.frame_rate
        return done | {"id": kept.name, "seconds": seconds, "byte_length": kept.bytes}

    async def end(self, session: Session) -> None:
        """The session is over, and so is a recording of it, even one that is just being begun."""
        with self._lock:
            self._ended = True
        await self.finish(session)

    async def settled(self) -> bool:
        """Wait for files that are being read or written; whether there were any."""
        if not self._at_work:
            return False
        await asyncio.wait(self._at_work)
        return True


def _save(take: Take, path: Path, growing: ExitStack) -> None:
    with growing:
        take.save(path)
