"""One socket: a client starts a stream, steers it, and is sent its fragments."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from time import perf_counter
from typing import Any

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from longtake.generation.take import Take, bytes_of
from longtake.media.fragments import FragmentWriter
from longtake.serving.broadcast import MOST_VIEWERS, Broadcast, Part, Viewer
from longtake.serving.metrics import Metrics
from longtake.serving.protocol import (
    CAPABILITIES,
    SEED,
    STATS_SECONDS,
    Interaction,
    Message,
    Pause,
    Ping,
    Record,
    RecordStop,
    Refused,
    Resume,
    Rewind,
    Snapshot,
    Start,
    Stop,
    Watch,
    parse,
)
from longtake.serving.recorder import Recorder
from longtake.serving.store import Full, Kept, Store
from longtake.serving.worker import Busy, Over, Piece, Place, Session, Worker

START_SECONDS = 10.0
LAST_WORD_SECONDS = 3.0  # for a client that takes nothing more to hear that it is over
MOST_UNSEEN = 8  # changes that may wait to be seen
_TRY_LATER, _WENT_WRONG, _TOO_LARGE, _DONE = 1013, 1011, 1009, 1000

log = logging.getLogger(__name__)


class Conversation:
    """With one client, from the accepted socket until either side goes.

    store: where snapshots and recordings are kept. metrics: of the server. on_air: what can be watched, by session.
    config: what is told of the model, with its width, height and fps. session: once a stream was started. watching:
    whether another's is shown.
    """

    def __init__(
        self,
        socket: WebSocket,
        worker: Worker,
        store: Store,
        metrics: Metrics,
        on_air: dict[str, Broadcast],
        config: dict[str, Any],
    ) -> None:
        self._socket, self._worker, self._store, self._metrics = socket, worker, store, metrics
        self._on_air, self._config = on_air, config
        self.watching = False
        self.session: Session | None = None
        self._sending = asyncio.Lock()  # a chunk's description and its bytes are not parted
        self._news, self._over = asyncio.Event(), asyncio.Event()
        self._asked: dict[str, float] = {}
        self._took: deque[float] = deque(maxlen=100)
        self._chunks = self._changes = 0
        self._ttfc = 0.0
        self._recorder: Recorder | None = None

    async def run(self) -> None:
        session = None
        try:
            first = await asyncio.wait_for(self._first_message(), START_SECONDS)
            if isinstance(first, Watch):
                await self._watch(first.session)
            else:
                began = perf_counter()
                session = await self._open(first)
                await self._stream(session, began)
        except TimeoutError:
            await self._leave(Refused("start_timeout", f"no session.start within {START_SECONDS:g} s"), _WENT_WRONG)
        except Refused as refused:
            await self._leave(refused, _TRY_LATER if refused.code == "busy" else _WENT_WRONG)
        except WebSocketDisconnect:
            pass
        except Exception:
            log.exception("a session failed")
            await self._leave(Refused("generation_failed", "the server failed: see its log"), _WENT_WRONG)
        finally:
            if session is not None:
                self._worker.close(session)
                if (broadcast := self._on_air.pop(session.id, None)) is not None:
                    broadcast.stop(self._done(session))
                await self._finish_recording(session)  # for a client that has gone: it knows the name
                log.info("session %s over: %s, %d chunks", session.id, session.end, self._chunks)

    # What comes in

    async def _first_message(self) -> Start | Watch:
        while True:
            message = await self._next_message()
            if isinstance(message, Start | Watch):
                return message
            if isinstance(message, Ping):
                await self._say({"type": "session.pong"})
            else:
                await self._say(Refused("no_session", "begin with session.start").message())

    async def _next_message(self) -> Message:
        """The next that can be understood; others are answered with what is wrong with them.

        Raises Refused for one that is too large, after which the socket is closed.
        """
        while True:
            received = await self._socket.receive()
            if received["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(received.get("code", _DONE))
            try:
                if received.get("text") is None:
                    raise Refused("invalid_message", "messages are JSON text, not bytes")
                return parse(received["text"])
            except Refused as refused:
                if refused.code == "message_too_large":
                    raise
                await self._say(refused.message())

    async def _open(self, start: Start) -> Session:
        for name, wanted in (("model", start.model), ("width", start.width), ("height", start.height)):
            if wanted not in (None, self._config[name]):
                raise Refused("unsupported", f"{name} {wanted} is not served here, but {self._config[name]}")
        if start.fps not in (None, self._config["fps"]):
            raise Refused("unsupported", f"fps {start.fps:g} is not served here, but {self._config['fps']}")
        take = None if start.resume_from is None else await self._take(start.resume_from)
        loop = asyncio.get_running_loop()
        try:
            opening = self._worker.open(
                start.prompt or "",
                seed=SEED if start.seed is None else start.seed,
                pictures=start.num_frames,
                take=take,
                changed=lambda: _from_any_thread(loop, self._look),
            )
            self.session = await asyncio.wrap_future(opening)
        except Busy as busy:
            raise Refused("busy", str(busy), retry_after=busy.retry_seconds) from None
        except Over as error:
            raise Refused("session_over", str(error)) from None
        except ValueError as error:
            code = "invalid_prompt" if take is None or start.prompt else "unfit_snapshot"
            raise Refused(code, " ".join(str(error).split())) from None
        return self.session

    async def _take(self, name: str, event: str | None = None) -> Take:
        kept = self._store.find(name, "take")
        try:
            if kept is not None:
                return await asyncio.to_thread(Take.load, kept.path)
        except FileNotFoundError:  # removed just now
            pass
        except ValueError as error:
            raise Refused("unfit_snapshot", f"the snapshot cannot be read: {error}", event) from None
        raise Refused("unknown_snapshot", "there is no such snapshot", event)

    async def _listen(self, session: Session) -> None:
        """Follow the client until it stops or has gone."""
        while not session.end:
            message = await self._next_message()
            self._worker.touch(session)
            try:
                await self._follow(session, message)
            except Refused as refused:
                await self._say(refused.message())
        await asyncio.Event().wait()  # the rest is said by whoever sends

    async def _follow(self, session: Session, message: Message) -> None:
        if isinstance(message, Interaction):
            change = message.interaction
            prompt, method = change.event.prompt, change.method or "redirect"
            await self._change(
                session, change.event_id, ("session.interaction.queued", "interaction_failed"),
                lambda event: self._worker.redirect(session, prompt, event, method=method),
            )  # fmt: skip
        elif isinstance(message, Rewind):
            take = await self._take(message.snapshot, message.event_id)
            await self._change(
                session, message.event_id, ("session.rewind.queued", "unfit_snapshot"),
                lambda event: self._worker.rewind(session, take, event),
            )  # fmt: skip
        elif isinstance(message, Snapshot):
            await self._snapshot(session, message.event_id)
        elif isinstance(message, Record):
            await self._record(session)
        elif isinstance(message, RecordStop):
            if self._recorder is None:
                raise Refused("not_recording", "nothing is being recorded")
            await self._end_recording(session)
        elif isinstance(message, Pause):
            self._worker.pause(session)
            await self._say({"type": "session.paused", "request_id": session.id})
        elif isinstance(message, Resume):
            self._worker.resume(session)
            await self._say({"type": "session.resumed", "request_id": session.id})
        elif isinstance(message, Ping):
            await self._say({"type": "session.pong"})
        elif isinstance(message, Start | Watch):
            raise Refused("already_started", "a socket carries one session")
        else:
            self._worker.close(session)

    async def _change(
        self, session: Session, name: str | None, answers: tuple[str, str], change: "Callable[[str], Future[Place]]"
    ) -> None:
        """Have something changed that is seen later, under a name for it. answers: when it is taken; why it is not."""
        taken, wrong = answers
        self._changes += 1
        event = name or f"event-{self._changes}-{self._chunks}"
        if event in self._asked:
            raise Refused("interaction_failed", "this event_id is in use until its words are shown", event)
        if len(self._asked) >= MOST_UNSEEN:
            raise Refused("interaction_failed", f"at most {MOST_UNSEEN} changes may wait to be seen", event)
        self._asked[event] = perf_counter()
        try:
            place = await asyncio.wrap_future(change(event))
        except ValueError as error:
            del self._asked[event]
            code = "session_over" if isinstance(error, Over) else wrong
            raise Refused(code, " ".join(str(error).split()), event) from None
        await self._say({"type": taken, "request_id": session.id, "event_id": event, **place._asdict()})

    async def _snapshot(self, session: Session, event: str | None) -> None:
        try:
            take = await asyncio.wrap_future(self._worker.snapshot(session))
            kept = await asyncio.to_thread(self._keep, take)
        except Over as error:
            raise Refused("session_over", str(error), event) from None
        except Full as full:
            raise Refused("store_full", str(full), event) from None
        except OSError:
            log.exception("a snapshot could not be written")
            raise Refused("snapshot_failed", "the server could not write it: see its log", event) from None
        told = {"type": "session.snapshot.done", "request_id": session.id, "id": kept.name, "event_id": event}
        seconds = take.state["pictures"] / self._config["fps"]
        await self._say(told | {"start_seconds": seconds, "byte_length": kept.bytes, "lasts": self._store.lasts})

    def _keep(self, take: Take) -> Kept:
        with self._store.new("take", sum(bytes_of(take.state).values())) as name:
            take.save(self._store.place(name, "take"))
        kept = self._store.find(name, "take")
        assert kept is not None
        return kept

    async def _record(self, session: Session) -> None:
        if self._recorder is not None:
            raise Refused("already_recording", "a recording is going on")
        try:
            recorder = Recorder(self._store, self._worker.engine)
        except Full as full:
            raise Refused("store_full", str(full)) from None
        except OSError:
            log.exception("a recording could not be written")
            raise Refused("record_failed", "the server could not write it: see its log") from None
        self._worker.remember(session)
        self._recorder = recorder
        told = {"id": recorder.name, "lasts": self._store.lasts}
        await self._say({"type": "session.record.started", "request_id": session.id, **told})

    async def _end_recording(self, session: Session) -> None:
        if (done := await self._finish_recording(session)) is not None:
            await self._say(done)

    async def _finish_recording(self, session: Session) -> dict[str, Any] | None:
        """What is to be said of it, None where there is no recording."""
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return None
        done = {"type": "session.record.done", "request_id": session.id, "id": None, "full": recorder.full}
        try:
            finishing = asyncio.to_thread(recorder.finish, self._worker.lines(session))
            kept = await asyncio.shield(finishing)  # to its end, whatever ends this conversation
        except OSError:
            log.exception("a recording could not be finished")
            return done
        if kept is None:
            return done
        seconds = recorder.notes.pictures / self._config["fps"]
        return done | {"id": kept.name, "seconds": seconds, "byte_length": kept.bytes}

    # What goes out

    async def _stream(self, session: Session, began: float) -> None:
        """Until the stream or the client ends, or the client takes nothing more."""
        tasks = await _until_one_ends(
            self._send(session, began), self._listen(session), self._tell(session), self._grace(session)
        )
        if _ended_well(tasks[0]):
            return  # all is said; what others tried to say meanwhile is of no account
        _raise_first(tasks)
        if _ended_well(tasks[-1]):  # it does not even take what is left
            raise Refused("stalled" if session.end == "stalled" else "stopped", f"the session is over: {session.end}")

    async def _grace(self, session: Session) -> None:
        await self._over.wait()
        # Of a video that is whole, the last piece is still on its way.
        await asyncio.sleep(self._worker.limits.stall if session.end == "done" else LAST_WORD_SECONDS)

    async def _send(self, session: Session, began: float) -> None:
        config = self._config
        writer = FragmentWriter(config["width"], config["height"], config["fps"])
        start = {
            "type": "video.start",
            "request_id": session.id,
            "format": "m4s",
            "mime": f'video/mp4; codecs="{writer.codec}"',
            "config": config | {"prompt": session.prompt, "seed": session.seed, "num_frames": session.pictures},
            "capabilities": CAPABILITIES,
        }
        self._on_air[session.id] = broadcast = Broadcast(start, writer.header)
        await self._say(start)
        waited = (0, 0.0)
        last = began
        while (piece := await self._next_piece(session)) is not None:
            recorder = self._recorder  # of this moment: a piece is of a line that it remembers
            encoding = perf_counter()
            data = await asyncio.to_thread(writer.fragment, piece.frames)
            encoded = perf_counter() - encoding
            broadcast.send(Part(self._about(session, piece), data))
            await self._send_chunk(session, piece, writer.header + data if not self._chunks else data)
            if recorder is not None:
                await self._add(piece, recorder, session)
            now = perf_counter()
            self._note(piece, encoded, now, last if self._chunks else None, began)
            playback = session.playback
            self._metrics.waited(playback.misses - waited[0], playback.dry_seconds - waited[1])
            waited = (playback.misses, playback.dry_seconds)
            self._chunks += 1
            last = now
        await self._end_recording(session)
        if session.failed:
            log.error("session %s failed: %s", session.id, session.end)
            raise Refused("generation_failed", session.end)
        if session.end == "stalled":
            raise Refused("stalled", "nothing was taken, or the pause was too long: the session is over")
        await self._say(self._done(session))
        await self._socket.close(_DONE)

    def _done(self, session: Session) -> dict[str, Any]:
        stopped = session.end != "done"
        return {"type": "session.done", "request_id": session.id, "chunks": self._chunks, "stopped": stopped}

    async def _add(self, piece: Piece, recorder: Recorder, session: Session) -> None:
        try:
            await asyncio.to_thread(recorder.write, piece)
        except OSError:
            log.exception("a recording could not be written")
            recorder.full = True
        if recorder.full and self._recorder is recorder:
            await self._end_recording(session)

    async def _next_piece(self, session: Session) -> Piece | None:
        """What is to be sent next, when it is time; None when the session is over."""
        while True:
            self._news.clear()
            if (piece := self._worker.read(session)) is not None:
                return piece
            if session.end:
                return None
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), self._worker.seconds_until_due(session))

    def _about(self, session: Session, piece: Piece) -> dict[str, Any]:
        events = list(piece.events)
        return {
            "type": "video.chunk_metadata",
            "request_id": session.id,
            "kind": "media",
            "generation_chunk_index": piece.number,
            "start_seconds": piece.start_seconds,
            "prompt": piece.words,
            "num_frames": len(piece.frames),
            "started_event_ids": events,
            "active_event_ids": events,
            "completed_event_ids": events,
        }

    async def _send_chunk(self, session: Session, piece: Piece, data: bytes) -> None:
        await self._send_part(Part(self._about(session, piece), data))

    async def _send_part(self, part: Part) -> None:
        async with self._sending:
            await self._socket.send_json(
                part.about | {"transport_chunk_index": self._chunks, "byte_length": len(part.data)}
            )
            await self._socket.send_bytes(part.data)

    def _note(self, piece: Piece, encoded: float, now: float, last: float | None, began: float) -> None:
        if last is None:
            self._ttfc = now - began
            self._metrics.first_chunk(self._ttfc)
        else:
            self._metrics.interval(now - last)
        timings = piece.timings
        self._took.append(timings.total_seconds + encoded)
        self._metrics.chunk(denoise=timings.network_seconds, decode=timings.codec_seconds, encode=encoded)
        for event in piece.events:
            if (asked := self._asked.pop(event, None)) is not None:
                self._metrics.prompt_shown(now - asked)

    async def _tell(self, session: Session) -> None:
        """Numbers, once a second."""
        worker = self._worker
        while True:
            await asyncio.sleep(STATS_SECONDS)
            if not self._took:
                continue
            playback, share = session.playback, worker.device_share
            await self._say(
                {
                    "type": "stats",
                    "request_id": session.id,
                    "state": session.state,
                    "ttfc_seconds": round(self._ttfc, 3),
                    "chunk_p95_seconds": round(float(np.percentile(self._took, 95)), 3),
                    "chunk_budget_seconds": worker.block_seconds,
                    "realtime_factor": round(1 / share, 2) if share else None,
                    "buffer_seconds": round(playback.unseen(worker.clock()), 2),
                    "underruns": playback.misses,
                    "underrun_seconds": round(playback.dry_seconds, 2),
                    "sessions": len(worker.sessions()),
                }
            )

    # What another's session is sent

    async def _watch(self, name: str) -> None:
        broadcast = self._on_air.get(name)
        if broadcast is None:
            raise Refused("unknown_session", "there is no such session")
        if len(broadcast.viewers) >= MOST_VIEWERS:
            raise Refused("busy", f"{MOST_VIEWERS} watch this already", retry_after=10)
        self.watching = True
        with broadcast.watched() as viewer:
            tasks = await _until_one_ends(self._show(broadcast, viewer), self._attend(), self._lose(viewer))
        if _ended_well(tasks[0]):
            return
        _raise_first(tasks)
        if _ended_well(tasks[-1]):
            raise Refused("stalled", "too much was left lying: the stream goes on without this viewer")

    async def _show(self, broadcast: Broadcast, viewer: Viewer) -> None:
        await self._say(broadcast.start | {"watching": True})
        while (part := await viewer.next()) is not None:
            await self._send_part(part if self._chunks else part._replace(data=broadcast.header + part.data))
            self._chunks += 1
        if broadcast.end is None:
            raise Refused("stalled", "too much was left lying: the stream goes on without this viewer")
        await self._say(broadcast.end | {"chunks": self._chunks})
        await self._socket.close(_DONE)

    async def _attend(self) -> None:
        """Until the viewer leaves."""
        while not isinstance(message := await self._next_message(), Stop):
            if isinstance(message, Ping):
                await self._say({"type": "session.pong"})
            else:
                await self._say(Refused("watching", "only who started a session can steer it").message())
        await self._socket.close(_DONE)

    async def _lose(self, viewer: Viewer) -> None:
        await viewer.lost.wait()
        await asyncio.sleep(LAST_WORD_SECONDS)

    # Words

    async def _say(self, message: dict[str, Any]) -> None:
        async with self._sending:
            await self._socket.send_json(message)

    async def _leave(self, refused: Refused, code: int) -> None:
        """Say why, if the client still listens, and close."""
        code = _TOO_LARGE if refused.code == "message_too_large" else code
        with suppress(TimeoutError, WebSocketDisconnect, RuntimeError):
            async with asyncio.timeout(LAST_WORD_SECONDS):
                await self._socket.send_json(refused.message())
                await self._socket.close(code)

    def _look(self) -> None:
        self._news.set()
        if self.session is not None and self.session.end:
            self._over.set()


def _from_any_thread(loop: asyncio.AbstractEventLoop, act: Any) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
        loop.call_soon_threadsafe(act)


async def _until_one_ends(*works: Coroutine[Any, Any, None]) -> Sequence[asyncio.Task[None]]:
    """The tasks of them all, once one has ended and the others were stopped."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    return tasks


def _ended_well(task: asyncio.Task[None]) -> bool:
    return not task.cancelled() and task.exception() is None


def _raise_first(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
