"""Snapshots, rewinds, forks and recordings over the socket, with a real if tiny engine."""

import io
import itertools
import json
import threading
import time

import av
import pytest

from longtake.generation.recording import Remade
from longtake.generation.take import Take
from longtake.serving import keeping, realtime, recorder
from longtake.serving.access import Access
from longtake.serving.protocol import CAPABILITIES
from longtake.serving.store import Store
from tests import tiny
from tests.serving.test_app import SOCKET, client, start, until, wait_for


@pytest.fixture
def store():
    return Store(most=3)


@pytest.fixture
def house(store):
    with client(engine=tiny.engine(), store=store) as served:
        wait_for(served)
        yield served


def tell(socket, kind, answer, **more):
    socket.send_json({"type": kind, **more})
    return until(socket, answer)[0]


def snapshot(socket) -> dict:
    return tell(socket, "session.snapshot", "session.snapshot.done")


def seen_event(socket, event):
    """The first chunk that shows a change."""
    while True:
        message = socket.receive_json()
        if message["type"] == "video.chunk_metadata":
            socket.receive_bytes()
            if event in message["started_event_ids"]:
                return message


def test_a_snapshot_is_gone_back_to_and_gone_on_from(house):
    with house.websocket_connect(SOCKET) as socket:
        told = start(socket, seed=7)
        assert told["capabilities"] == CAPABILITIES and told["config"]["prompt"] == "a ball"
        kept = tell(socket, "session.snapshot", "session.snapshot.done", event_id="s")
        assert kept["event_id"] == "s" and not kept["lasts"] and kept["byte_length"] > 1000
        change = {"event_id": "duck", "event": {"prompt": "a duck"}}
        queued = tell(socket, "session.interaction", "session.interaction.queued", interaction=change)
        assert seen_event(socket, "duck")["start_seconds"] == queued["start_seconds"] >= kept["start_seconds"]
        queued = tell(socket, "session.rewind", "session.rewind.queued", snapshot=kept["id"], event_id="back")
        assert seen_event(socket, "back")["start_seconds"] == queued["start_seconds"] == kept["start_seconds"]
    with house.websocket_connect(SOCKET) as socket:
        socket.send_json({"type": "session.start", "resume_from": kept["id"]})
        config = socket.receive_json()["config"]
        assert (config["seed"], config["prompt"]) == (7, "a ball")
        assert until(socket, "stats")[1][0][0]["start_seconds"] == kept["start_seconds"]
    with house.websocket_connect(SOCKET) as socket:
        assert start(socket, "a cat", resume_from=kept["id"])["config"]["prompt"] == "a cat"
    assert [one["id"] for one in house.get("/v1/snapshots").json()["data"]] == [kept["id"]]
    assert house.delete(f"/v1/snapshots/{kept['id']}").json()["deleted"]
    assert house.delete(f"/v1/snapshots/{kept['id']}").status_code == 404
    with house.websocket_connect(SOCKET) as socket:
        socket.send_json({"type": "session.start", "resume_from": kept["id"]})
        assert socket.receive_json()["code"] == "unknown_snapshot"


def test_a_stream_is_reset_under_the_words_in_force(house):
    with house.websocket_connect(SOCKET) as socket:
        start(socket, seed=7)
        until(socket, "stats")
        change = {"event_id": "duck", "event": {"prompt": "a duck"}}
        tell(socket, "session.interaction", "session.interaction.queued", interaction=change)
        seen_event(socket, "duck")
        queued = tell(socket, "session.reset", "session.reset.queued", event_id="anew")
        assert (queued["event_id"], queued["start_seconds"]) == ("anew", 0)
        chunk = seen_event(socket, "anew")
        assert (chunk["generation_chunk_index"], chunk["start_seconds"], chunk["prompt"]) == (0, 0, "a duck")


def test_a_stream_seeks_to_its_latest_snapshot_at_or_before_a_moment(house):
    def seeks(seconds):
        """Which place it comes to, under the words that the snapshot there has."""
        event = f"back-{next(count)}"
        queued = tell(socket, "session.seek", "session.seek.queued", seconds=seconds, event_id=event)
        chunk = seen_event(socket, event)
        assert chunk["start_seconds"] == queued["start_seconds"]
        return queued["start_seconds"], chunk["prompt"]

    count = itertools.count()
    with house.websocket_connect(SOCKET) as other:
        start(other)
        snapshot(other)  # of another session: never gone to
    with house.websocket_connect(SOCKET) as socket:
        start(socket)
        refused = tell(socket, "session.seek", "error", seconds=1e6, event_id="back")
        assert (refused["code"], refused["event_id"]) == ("unknown_snapshot", "back")
        until(socket, "stats")
        early = snapshot(socket)
        change = {"event_id": "duck", "event": {"prompt": "a duck"}}
        tell(socket, "session.interaction", "session.interaction.queued", interaction=change)
        seen_event(socket, "duck")
        until(socket, "stats")
        late = snapshot(socket)
        first, second = early["start_seconds"], late["start_seconds"]
        assert 0 < first < second
        assert seeks(second - 0.001) == seeks(first) == (first, "a ball")
        assert seeks(second) == seeks(1e6) == (second, "a duck")
        assert tell(socket, "session.seek", "error", seconds=first - 0.001)["code"] == "unknown_snapshot"
        house.delete(f"/v1/snapshots/{late['id']}")
        assert seeks(1e6) == (first, "a ball")
        for seconds in (-1, "NaN", None):
            assert tell(socket, "session.seek", "error", seconds=seconds)["code"] == "invalid_message"


def test_a_fork_is_a_snapshot_that_another_stream_starts_from(house):
    with house.websocket_connect(SOCKET) as socket:
        start(socket, seed=7)
        done = tell(socket, "session.fork", "session.fork.done", event_id="f")
        assert done["event_id"] == "f" and done["resume_from"] == done["id"]
        _, chunks = until(socket, "stats")
        assert chunks and {chunk["prompt"] for chunk, _ in chunks} == {"a ball"}  # it goes on as it was
    with house.websocket_connect(SOCKET) as socket:
        socket.send_json({"type": "session.start", "resume_from": done["resume_from"]})
        assert socket.receive_json()["config"]["seed"] == 7
        assert until(socket, "stats")[1][0][0]["start_seconds"] == done["start_seconds"]
    assert [one["id"] for one in house.get("/v1/snapshots").json()["data"]] == [done["id"]]


def test_a_recording_can_be_fetched_and_says_how_it_came_about(house):
    with house.websocket_connect(SOCKET) as socket:
        start(socket, seed=7)
        assert tell(socket, "session.record.stop", "error")["code"] == "not_recording"
        kept = snapshot(socket)
        name = tell(socket, "session.record", "session.record.started")["id"]
        assert tell(socket, "session.record", "error")["code"] == "already_recording"
        tell(socket, "session.rewind", "session.rewind.queued", snapshot=kept["id"], event_id="back")
        seen_event(socket, "back")
        done = tell(socket, "session.record.stop", "session.record.done")
    assert done["id"] == name and done["seconds"] > 0 and not done["full"]
    address = f"/v1/recordings/{name}"
    video = house.get(f"{address}/video.mp4")
    assert video.headers["content-type"] == "video/mp4" and len(video.content) == done["byte_length"]
    with av.open(io.BytesIO(video.content)) as container:
        assert len(list(container.decode(video=0))) == done["seconds"] * 16
        comment = container.metadata["comment"]
    record = house.get(f"{address}/run.json")
    assert record.text == comment and "run.json" in record.headers["content-disposition"]
    with Remade(tiny.engine(), record.json()) as stream:
        next(stream)
    assert [one["id"] for one in house.get("/v1/recordings").json()["data"]] == [name]
    assert house.delete(address).json()["deleted"]
    assert house.get(f"{address}/video.mp4").status_code == house.get(f"{address}/run.json").status_code == 404
    assert house.delete(address).status_code == 404


@pytest.mark.parametrize("ends", ["whole", "stopped", "vanished"])
def test_a_recording_is_whole_however_the_session_ends(house, ends):
    with house.websocket_connect(SOCKET) as socket:
        start(socket, **({"num_frames": 800} if ends == "whole" else {}))
        name = tell(socket, "session.record", "session.record.started")["id"]
        if ends != "whole":
            until(socket, "stats")
        if ends == "stopped":
            socket.send_json({"type": "session.stop"})
        if ends != "vanished":
            assert until(socket, "session.record.done")[0]["id"] == name
            assert socket.receive_json()["type"] == "session.done"
    deadline = time.monotonic() + 20
    while not house.get("/v1/recordings").json()["data"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with av.open(io.BytesIO(house.get(f"/v1/recordings/{name}/video.mp4").content)) as container:
        assert len(list(container.decode(video=0))) > 1
        assert json.loads(container.metadata["comment"])["live"]["spans"]


def test_a_recording_that_takes_long_to_finish_is_told_of_all_the_same(house, monkeypatch):
    """The client takes all it is given: it is the server that is waited for."""
    monkeypatch.setattr(realtime, "LAST_WORD_SECONDS", 0.5)
    finish = recorder.Recorder.finish

    def slowly(self, lines):
        time.sleep(1.5)
        return finish(self, lines)

    monkeypatch.setattr(recorder.Recorder, "finish", slowly)
    with house.websocket_connect(SOCKET) as socket:
        start(socket)
        name = tell(socket, "session.record", "session.record.started")["id"]
        until(socket, "stats")
        socket.send_json({"type": "session.stop"})
        assert until(socket, "session.record.done")[0]["id"] == name
        assert socket.receive_json()["type"] == "session.done"


@pytest.mark.parametrize("kind", ["session.snapshot", "session.record"])
def test_what_is_being_begun_when_a_session_ends_is_not_left_behind(house, store, monkeypatch, kind):
    """A thread goes on with it: there is nothing that the store does not know of."""
    begun, going = threading.Event(), threading.Event()

    def slowly(act):
        def later(*given, **named):
            begun.set()
            assert going.wait(20)
            return act(*given, **named)

        return later

    if kind == "session.record":
        monkeypatch.setattr(keeping, "Recorder", slowly(keeping.Recorder))
    else:
        monkeypatch.setattr(Take, "save", slowly(Take.save))
    with house.websocket_connect(SOCKET) as socket:
        start(socket)
        until(socket, "stats")
        socket.send_json({"type": kind})
        assert begun.wait(20)
        (session,) = house.get("/v1/sessions").json()["data"]
        house.delete(f"/v1/sessions/{session['id']}")
        until(socket, "session.done")
        time.sleep(0.2)  # what the socket's task awaited is cancelled
        going.set()
    end = time.monotonic() + 20
    while store._growing or len(store.kept("take")) != (kind == "session.snapshot"):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert {path.suffix for path in store.folder.iterdir()} <= {".take"}


def test_without_room_no_snapshot_is_read(house, monkeypatch):
    with house.websocket_connect(SOCKET) as one, house.websocket_connect(SOCKET) as two:
        start(one), start(two)
        kept = snapshot(one)
        monkeypatch.setattr(Take, "load", lambda path: pytest.fail("a file was read for nobody"))
        with house.websocket_connect(SOCKET) as third:
            third.send_json({"type": "session.start", "resume_from": kept["id"]})
            assert third.receive_json()["code"] == "busy"


def test_a_snapshot_that_cannot_be_read_leaves_its_place_to_others(house):
    for _ in range(3):
        with house.websocket_connect(SOCKET) as socket:
            socket.send_json({"type": "session.start", "resume_from": "0" * 32})
            assert socket.receive_json()["code"] == "unknown_snapshot"
    assert house.get("/v1/sessions").json()["data"] == []


def test_without_room_in_the_store_nothing_is_copied_from_the_device(house, store, monkeypatch):
    with house.websocket_connect(SOCKET) as socket:
        start(socket)
        until(socket, "stats")
        store.most_bytes = 1000
        monkeypatch.setattr(house.app.state.house.worker, "snapshot", lambda session: pytest.fail("it was copied"))
        assert tell(socket, "session.snapshot", "error")["code"] == "store_full"
        assert tell(socket, "session.ping", "session.pong") and not list(store.folder.iterdir())


def test_a_full_store_refuses_and_a_full_recording_ends_whole(house, store):
    with house.websocket_connect(SOCKET) as socket:
        start(socket)
        for _ in range(store.most):
            snapshot(socket)
        refused = tell(socket, "session.snapshot", "error", event_id="s")
        assert (refused["code"], refused["event_id"]) == ("store_full", "s")
        assert tell(socket, "session.record", "error")["code"] == "store_full"
        store.remove(store.kept("take")[0].name, "take")
        store.most_bytes = sum(kept.bytes for kept in store.kept("take")) + 2000
        tell(socket, "session.record", "session.record.started")
        done, _ = until(socket, "session.record.done")
        assert done["full"] and done["id"] is not None
        assert tell(socket, "session.ping", "session.pong")  # the stream goes on


def test_a_recording_tells_of_so_many_jumps(house, monkeypatch):
    monkeypatch.setattr(recorder, "MOST_SPANS", 2)
    with house.websocket_connect(SOCKET) as socket:
        start(socket)
        kept = snapshot(socket)
        tell(socket, "session.record", "session.record.started")
        until(socket, "stats")
        tell(socket, "session.rewind", "session.rewind.queued", snapshot=kept["id"])
        assert until(socket, "session.record.done")[0]["full"]


def test_a_snapshot_of_other_weights_is_refused_and_the_stream_goes_on(house, store):
    with house.websocket_connect(SOCKET) as socket:
        start(socket)
        kept = snapshot(socket)
        path = store.find(kept["id"], "take").path
        take = Take.load(path)
        Take({**take.made_with, "weights": "other"}, take.state).save(path, overwrite=True)
        refused = tell(socket, "session.rewind", "error", snapshot=kept["id"], event_id="back")
        assert (refused["code"], refused["event_id"]) == ("unfit_snapshot", "back")
        path.write_bytes(b"no take")
        assert tell(socket, "session.rewind", "error", snapshot=kept["id"])["code"] == "unfit_snapshot"
        path.unlink()
        assert tell(socket, "session.rewind", "error", snapshot=kept["id"])["code"] == "unknown_snapshot"
        assert tell(socket, "session.ping", "session.pong")


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "0" * 32])
def test_a_snapshot_that_is_none_changes_nothing(house, name):
    with house.websocket_connect(SOCKET) as socket:
        start(socket)
        refused = tell(socket, "session.rewind", "error", snapshot=name, event_id="back")
        assert (refused["code"], refused["event_id"]) == ("unknown_snapshot", "back")
        assert tell(socket, "session.ping", "session.pong")


def test_snapshots_outlive_the_server_where_that_was_promised(tmp_path):
    folder = tmp_path / "kept"
    with client(engine=tiny.engine(), store=Store(folder)) as house:
        wait_for(house)
        with house.websocket_connect(SOCKET) as socket:
            start(socket, seed=7)
            kept = snapshot(socket)
            assert kept["lasts"] and house.get("/v1/models").json()["data"][0]["keeps"]
    other = tiny.engine()
    with client(engine=other, store=Store(folder)) as house:
        wait_for(house)
        with house.websocket_connect(SOCKET) as socket:
            socket.send_json({"type": "session.start", "resume_from": kept["id"]})
            assert socket.receive_json()["config"]["seed"] == 7
    other.network.patch_embedding.weight.data.add_(1.0)
    del other.__dict__["weights"]
    with client(engine=other, store=Store(folder)) as house:
        wait_for(house)
        with house.websocket_connect(SOCKET) as socket:
            socket.send_json({"type": "session.start", "resume_from": kept["id"]})
            refused = socket.receive_json()
            assert refused["code"] == "unfit_snapshot" and "weights" in refused["message"]
        with house.websocket_connect(SOCKET) as socket:
            assert start(socket, "a cat", resume_from=kept["id"])["code"] == "unfit_snapshot"
        with house.websocket_connect(SOCKET) as socket:
            assert start(socket, " ")["code"] == "invalid_prompt"


def test_what_is_kept_needs_the_key():
    with client(Access(key="sesame"), engine=tiny.engine()) as house:
        for path in ("/v1/snapshots", "/v1/recordings", "/v1/recordings/x/video.mp4", "/v1/recordings/x/run.json"):
            assert house.get(path).status_code == 401
        assert house.delete("/v1/snapshots/x").status_code == house.delete("/v1/recordings/x").status_code == 401
