"""Several viewers of one stream: coded once, and nobody can hold up the others."""

import asyncio
import io

import av
import pytest

from longtake.media.fragments import FragmentWriter
from longtake.serving import watching
from longtake.serving.admission import Limits
from longtake.serving.broadcast import MOST_VIEWERS, Broadcast, Part
from tests.serving.fake import FakeEngine
from tests.serving.test_app import SOCKET, client, start, until, wait_for, wait_until_empty

SLOW = Limits(sessions=2)  # in real time, so that there is something left to watch


@pytest.fixture
def house():
    with client(limits=SLOW, engine=FakeEngine(block_seconds=0.01)) as served:
        wait_for(served)
        yield served


def watch(socket, session):
    socket.send_json({"type": "session.watch", "session": session})
    return socket.receive_json()


def pictures(chunks) -> int:
    with av.open(io.BytesIO(b"".join(data for _, data in chunks))) as video:
        return len(list(video.decode(video=0)))


def test_viewers_who_come_later_see_the_same_from_there_on_and_it_is_coded_once(house, monkeypatch):
    coded = []
    fragment = FragmentWriter.fragment
    monkeypatch.setattr(
        FragmentWriter, "fragment", lambda writer, frames: coded.append(len(frames)) or fragment(writer, frames)
    )
    with house.websocket_connect(SOCKET) as owner:
        told = start(owner, num_frames=64)
        first = [owner.receive_json(), owner.receive_bytes()]
        with house.websocket_connect(SOCKET) as one, house.websocket_connect(SOCKET) as other:
            for socket in (one, other):
                seen = watch(socket, told["request_id"])
                assert seen == told | {"watching": True}
            assert house.get("/v1/sessions").json()["data"][0]["viewers"] == 2
            one.send_json({"type": "session.interaction", "interaction": {"event": {"prompt": "it snows"}}})
            refused, before = until(one, "error")
            assert refused["code"] == "watching"
            done, chunks = until(owner, "session.done")
            end, after = until(one, "session.done")
            ends = [(end, before + after), until(other, "session.done")]
    chunks = [tuple(first), *chunks]
    for end, parts in ends:
        assert end == done | {"chunks": end["chunks"]} and parts
        assert pictures(parts) == sum(about["num_frames"] for about, _ in parts)
        seen = {about["generation_chunk_index"] for about, _ in parts}
        assert seen < {about["generation_chunk_index"] for about, _ in chunks} and max(seen) == len(chunks) - 1
    assert ends[1][1][-1][1] == chunks[-1][1]  # to the byte
    assert sum(coded) == 64


def test_viewers_come_and_go_and_the_stream_does_not_notice(house):
    with house.websocket_connect(SOCKET) as owner:
        session = start(owner)["request_id"]
        with house.websocket_connect(SOCKET) as gone:
            watch(gone, session)
        with house.websocket_connect(SOCKET) as polite:
            watch(polite, session)
            polite.send_json({"type": "session.ping"})
            until(polite, "session.pong")
            polite.send_json({"type": "session.stop"})
        owner.send_json({"type": "session.ping"})
        assert until(owner, "session.pong")
        with house.websocket_connect(SOCKET) as left:
            watch(left, session)
            owner.close()
            assert until(left, "session.done")[0]["stopped"]
    wait_until_empty(house)
    with house.websocket_connect(SOCKET) as late:
        assert watch(late, session)["code"] == "unknown_session"


def test_a_viewer_who_takes_nothing_is_let_go_and_holds_up_nobody(house, monkeypatch):
    monkeypatch.setattr(watching, "LAST_WORD_SECONDS", 0.2)
    monkeypatch.setattr("longtake.serving.broadcast._MOST_WAITING", 1)

    async def never(wire, broadcast, viewer):
        await asyncio.Event().wait()

    monkeypatch.setattr(watching, "show", never)
    with house.websocket_connect(SOCKET) as owner, house.websocket_connect(SOCKET) as silent:
        session = start(owner, num_frames=80)["request_id"]
        silent.send_json({"type": "session.watch", "session": session})
        assert until(silent, "error")[0]["code"] == "stalled"
        assert not until(owner, "session.done")[0]["stopped"]


def test_there_is_a_most_of_viewers(house, monkeypatch):
    monkeypatch.setattr(watching, "MOST_VIEWERS", 1)
    with house.websocket_connect(SOCKET) as owner, house.websocket_connect(SOCKET) as one:
        session = start(owner)["request_id"]
        watch(one, session)
        with house.websocket_connect(SOCKET) as other:
            assert watch(other, session)["code"] == "busy"
    assert MOST_VIEWERS > 1


def test_what_waits_for_a_viewer_is_bounded():
    async def leave_lying() -> None:
        broadcast = Broadcast({}, b"")
        with broadcast.watched() as quick, broadcast.watched() as slow:
            for number in range(100):
                broadcast.send(Part({"number": number}, b""))
                assert (await quick.next()).about == {"number": number}
            assert slow.lost.is_set() and await slow.next() is None and not quick.lost.is_set()
            broadcast.stop({"type": "one"})
            broadcast.stop({"type": "two"})
            assert await quick.next() is None and broadcast.end == {"type": "one"}
        assert not broadcast.viewers
        with broadcast.watched() as late:
            assert await late.next() is None

    asyncio.run(leave_lying())
