"""What the client that started a session asks of it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from time import perf_counter

from longtake.serving.keeping import Keeping
from longtake.serving.protocol import (
    Fork,
    Interaction,
    Message,
    Pause,
    Ping,
    Record,
    RecordStop,
    Refused,
    Reset,
    Resume,
    Rewind,
    Seek,
    Snapshot,
    Start,
    Watch,
)
from longtake.serving.session import Over, Session
from longtake.serving.wire import Wire
from longtake.serving.worker import Place, Worker

MOST_UNSEEN = 8  # changes that may wait to be seen


class Steering:
    """Follows messages about one session. heard: told of prompts that were taken, with what they do."""

    def __init__(
        self, session: Session, wire: Wire, worker: Worker, keeping: Keeping, heard: Callable[[str, str], None]
    ) -> None:  # fmt: skip
        self._session, self._wire, self._worker, self._keeping = session, wire, worker, keeping
        self._heard = heard
        self._asked: dict[str, float] = {}
        self._changes = 0

    def shown(self, event: str) -> float | None:
        """A change is on its way to the client: when it was asked for, the first time."""
        return self._asked.pop(event, None)

    async def listen(self) -> None:
        """Follow the client until it stops or has gone."""
        while not self._session.end:
            message = await self._wire.next_message()
            self._worker.touch(self._session)
            try:
                await self._follow(message)
            except Refused as refused:
                await self._wire.refuse(refused)
        await asyncio.Event().wait()  # the rest is said by whoever sends

    async def _follow(self, message: Message) -> None:
        session, worker, wire = self._session, self._worker, self._wire
        if isinstance(message, Interaction):
            await self._interact(message)
        elif isinstance(message, Rewind):
            await self._rewind(message.snapshot, message.event_id, "session.rewind.queued")
        elif isinstance(message, Seek):
            name = self._keeping.snapshot_before(message.seconds, message.event_id)
            await self._rewind(name, message.event_id, "session.seek.queued")
        elif isinstance(message, Reset):
            await self._change(
                message.event_id, ("session.reset.queued", "interaction_failed"),
                lambda event: worker.reset(session, event),
            )  # fmt: skip
        elif isinstance(message, Snapshot):
            await wire.say(await self._keeping.snapshot(session, message.event_id))
        elif isinstance(message, Fork):
            kept = await self._keeping.snapshot(session, message.event_id)
            await wire.say(kept | {"type": "session.fork.done", "resume_from": kept["id"]})
        elif isinstance(message, Record):
            await wire.say(await self._keeping.record(session))
        elif isinstance(message, RecordStop):
            if (done := await self._keeping.finish(session)) is None:
                raise Refused("not_recording", "nothing is being recorded")
            await wire.say(done)
        elif isinstance(message, Pause):
            worker.pause(session)
            await wire.say({"type": "session.paused", "request_id": session.id})
        elif isinstance(message, Resume):
            worker.resume(session)
            await wire.say({"type": "session.resumed", "request_id": session.id})
        elif isinstance(message, Ping):
            await wire.pong()
        elif isinstance(message, Start | Watch):
            raise Refused("already_started", "a socket carries one session")
        else:
            worker.close(session)

    async def _interact(self, message: Interaction) -> None:
        change = message.interaction
        prompt, over, method = change.event.prompt, max(1, change.transition_chunks or 1), change.method or "lerp"
        await self._change(
            change.event_id, ("session.interaction.queued", "interaction_failed"),
            lambda event: self._worker.redirect(self._session, prompt, event, over=over, method=method),
        )  # fmt: skip
        self._heard("cut" if method == "cut" else "redirect", prompt)

    async def _rewind(self, snapshot: str, event_id: str | None, taken: str) -> None:
        take = await self._keeping.take(snapshot, event_id)
        await self._change(
            event_id, (taken, "unfit_snapshot"), lambda event: self._worker.rewind(self._session, take, event)
        )  # fmt: skip

    async def _change(
        self, name: str | None, answers: tuple[str, str], change: "Callable[[str], Future[Place]]"
    ) -> None:  # fmt: skip
        """Have something changed that is seen later, under a name for it. answers: when it is taken; why it is not."""
        taken, wrong = answers
        self._changes += 1
        event = name or f"event-{self._changes}-{self._wire.chunks}"
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
        await self._wire.say({"type": taken, "request_id": self._session.id, "event_id": event, **place._asdict()})
