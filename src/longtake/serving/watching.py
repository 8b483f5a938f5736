"""What a client is sent that watches another's session."""

import asyncio

from longtake.serving.broadcast import MOST_VIEWERS, Broadcast, Viewer
from longtake.serving.protocol import Ping, Refused, Stop
from longtake.serving.tasks import ended_well, raise_first, until_one_ends
from longtake.serving.wire import LAST_WORD_SECONDS, Wire

_LOST = "too much was left lying: the stream goes on without this viewer"


async def watch(wire: Wire, broadcast: Broadcast | None) -> None:
    """From the next fragment on, until it ends or the viewer leaves. broadcast: None where there is no such session.

    Raises Refused where that is so, where too many watch, and for a viewer that takes too little.
    """
    if broadcast is None:
        raise Refused("unknown_session", "there is no such session: it is over, or the link is wrong")
    if len(broadcast.viewers) >= MOST_VIEWERS:
        raise Refused("busy", f"{MOST_VIEWERS} watch this already", retry_after=10)
    with broadcast.watched() as viewer:
        tasks = await until_one_ends(show(wire, broadcast, viewer), _attend(wire), _lose(viewer))
    if ended_well(tasks[0]):
        return
    raise_first(tasks)
    if ended_well(tasks[-1]):
        raise Refused("stalled", _LOST)


async def show(wire: Wire, broadcast: Broadcast, viewer: Viewer) -> None:
    await wire.say(broadcast.start | {"watching": True})
    while (part := await viewer.next()) is not None:
        await wire.send(part, broadcast.header)
    if broadcast.end is None:
        raise Refused("stalled", _LOST)
    await wire.say(broadcast.end | {"chunks": wire.chunks})
    await wire.close()


async def _attend(wire: Wire) -> None:
    """Until the viewer leaves."""
    while not isinstance(message := await wire.next_message(), Stop):
        if isinstance(message, Ping):
            await wire.pong()
        else:
            await wire.refuse(Refused("watching", "only who started a session can steer it"))
    await wire.close()


async def _lose(viewer: Viewer) -> None:
    await viewer.lost.wait()
    await asyncio.sleep(LAST_WORD_SECONDS)
