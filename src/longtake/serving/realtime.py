"""One socket: a client starts a stream and steers it, or watches another's."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from json import dumps
from time import perf_counter
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from longtake.generation.take import Unfit
from longtake.serving.admission import Busy
from longtake.serving.broadcast import Broadcast
from longtake.serving.keeping import Keeping
from longtake.serving.metrics import Metrics
from longtake.serving.protocol import SEED, Ping, Refused, Start, Watch
from longtake.serving.session import Over, Session
from longtake.serving.showing import Showing
from longtake.serving.steering import Steering
from longtake.serving.store import Store
from longtake.serving.tasks import ended_well, raise_first, until_one_ends
from longtake.serving.watching import watch
from longtake.serving.wire import LAST_WORD_SECONDS, Wire
from longtake.serving.worker import Worker

START_SECONDS = 10.0

log = logging.getLogger(__name__)
prompts_log = logging.getLogger("longtake.serving.prompts")
"""Nothing is logged here unless `Behind.log_prompts` is set, and prompts are logged nowhere else."""


@dataclass(frozen=True, kw_only=True)
class Behind:
    """What all conversations of a server share.

    store: where snapshots and recordings are kept. files: threads that read and write them. config: what is told of
    the model, with its width, height and fps. log_prompts: whether prompts may be logged. on_air: what can be watched,
    by session.
    """

    worker: Worker
    store: Store
    files: Executor
    metrics: Metrics
    config: dict[str, Any]
    log_prompts: bool = False
    on_air: dict[str, Broadcast] = field(default_factory=dict)


class Conversation:
    """With one client, from the accepted socket until either side goes.

    session: once a stream was started. watching: whether another's is shown.
    """

    def __init__(self, socket: WebSocket, behind: Behind) -> None:
        self._wire, self._behind, self._worker = Wire(socket), behind, behind.worker
        self._keeping = Keeping(behind.worker, behind.store, behind.files)
        self.watching = False
        self.session: Session | None = None
        self._news, self._over = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        try:
            first = await asyncio.wait_for(self._first_message(), START_SECONDS)
            if isinstance(first, Watch):
                self.watching = True
                await watch(self._wire, self._behind.on_air.get(first.session))
            else:
                await self._own(first, perf_counter())
        except TimeoutError:
            await self._wire.leave(Refused("start_timeout", f"no session.start within {START_SECONDS:g} s"))
        except Refused as refused:
            await self._wire.leave(refused)
        except WebSocketDisconnect:
            pass
        except Exception:
            log.exception("a session failed")
            await self._wire.leave(Refused("generation_failed", "the server failed: see its log"))

    async def _first_message(self) -> Start | Watch:
        while True:
            message = await self._wire.next_message()
            if isinstance(message, Start | Watch):
                return message
            if isinstance(message, Ping):
                await self._wire.pong()
            else:
                await self._wire.refuse(Refused("no_session", "begin with session.start"))

    async def _own(self, start: Start, began: float) -> None:
        """A stream of the client's own, from its beginning to its end."""
        behind, worker = self._behind, self._worker
        session = self._admitted(start)
        showing: Showing | None = None
        try:
            await self._open(session, start)
            showing = Showing(session, self._wire, worker, self._keeping, behind.metrics, behind.config, began)
            behind.on_air[session.id] = showing.broadcast
            await self._stream(session, showing)
        finally:
            worker.close(session)
            if showing is not None:
                del behind.on_air[session.id]
                showing.broadcast.stop(showing.done())
            await self._keeping.end(session)  # for a client that has gone: it knows the name
            log.info("session %s over: %s, %d chunks", session.id, session.end, self._wire.chunks)

    def _admitted(self, start: Start) -> Session:
        """A place for a stream, before anything is done for it. Refused for what is not served, and without room."""
        config, loop = self._behind.config, asyncio.get_running_loop()
        for name, wanted in (("model", start.model), ("width", start.width), ("height", start.height)):
            if wanted not in (None, config[name]):
                raise Refused("unsupported", f"{name} {wanted} is not served here, but {config[name]}")
        if start.fps not in (None, config["fps"]):
            raise Refused("unsupported", f"fps {start.fps:g} is not served here, but {config['fps']}")
        try:
            return self._worker.admit(
                start.prompt or "",
                seed=SEED if start.seed is None else start.seed,
                pictures=start.num_frames,
                changed=lambda: _from_any_thread(loop, self._look),
            )
        except Busy as busy:
            raise Refused("busy", str(busy), retry_after=busy.retry_seconds) from None

    async def _open(self, session: Session, start: Start) -> None:
        take = None if start.resume_from is None else await self._keeping.take(start.resume_from)
        try:
            await asyncio.wrap_future(self._worker.begin(session, take))
        except Over as error:
            raise Refused("session_over", str(error)) from None
        except ValueError as error:
            code = "unfit_snapshot" if isinstance(error, Unfit) else "invalid_prompt"
            raise Refused(code, " ".join(str(error).split())) from None
        self.session = session
        self._hear(session, "begin", session.prompt)

    async def _stream(self, session: Session, showing: Showing) -> None:
        """Until the stream or the client ends, or the client takes nothing more."""
        steering = Steering(
            session, self._wire, self._worker, self._keeping, lambda verb, prompt: self._hear(session, verb, prompt)
        )  # fmt: skip
        tasks = await until_one_ends(
            showing.send(self._news, steering), steering.listen(), showing.tell(), self._grace(session)
        )  # fmt: skip
        if ended_well(tasks[0]):
            return  # all is said; what others tried to say meanwhile is of no account
        raise_first(tasks)
        if ended_well(tasks[-1]):  # it does not even take what is left
            raise Refused("stalled" if session.end == "stalled" else "stopped", f"the session is over: {session.end}")

    async def _grace(self, session: Session) -> None:
        """For the client to take what is left, once the session is over."""
        await self._over.wait()
        # Of a video that is whole, the last piece is still on its way.
        await asyncio.sleep(self._worker.limits.stall if session.end == "done" else LAST_WORD_SECONDS)
        while await self._keeping.settled():  # that long it was the client who waited
            await asyncio.sleep(LAST_WORD_SECONDS)

    def _hear(self, session: Session, verb: str, prompt: str) -> None:
        if self._behind.log_prompts:
            prompts_log.info("session %s: %s %s", session.id, verb, dumps(prompt))  # in one line, whatever it holds

    def _look(self) -> None:
        self._news.set()
        if self.session is not None and self.session.end:
            self._over.set()


def _from_any_thread(loop: asyncio.AbstractEventLoop, act: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
        loop.call_soon_threadsafe(act)
