import asyncio
import io
import json
import logging
import time

import av
import pytest
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from longtake.serving import realtime, steering
from longtake.serving.access import TOKEN_SECONDS, Access, require_host
from longtake.serving.admission import Limits
from longtake.serving.app import Served, create_app
from longtake.serving.protocol import LARGEST_MESSAGE, LONGEST_PROMPT
from longtake.serving.wire import Wire
from longtake.serving.worker import Worker
from tests.serving.fake import HEIGHT, RATE, WIDTH, FakeEngine

SERVED = Served(licence="Apache-2.0", version="1", weights="f00d", examples=("a ball", "it snows"))
QUICK = Limits(sessions=2, ahead=1000.0, lead=999.0)  # so that tests need not wait for real time
HERE = "http://localhost:8000"
SOCKET = "ws://localhost:8000/v1/realtime/video"  # the test client would call it testserver


def client(access=None, limits=QUICK, engine=None, store=None, **options) -> TestClient:
    worker = Worker(engine or FakeEngine(block_seconds=0.01), limits)
    return TestClient(create_app(worker, access or Access(), SERVED, store, **options), base_url=HERE)


@pytest.fixture
def house():
    with client() as served:
        wait_for(served)
        yield served


def wait_for(served) -> None:
    while served.get("/readyz").status_code != 200:
        time.sleep(0.01)


def start(socket, prompt="a ball", **more):
    socket.send_json({"type": "session.start", "prompt": prompt, **more})
    return socket.receive_json()


def until(socket, kind):
    """The first message of that kind, and the chunks that came before it, each with its description."""
    chunks = []
    while True:
        message = socket.receive_json()
        if message["type"] == kind:
            return message, chunks
        if message["type"] == "video.chunk_metadata":
            chunks.append((message, socket.receive_bytes()))


def until_seen(socket):
    """Up to the first chunk that shows a change, its bytes included."""
    while True:
        message = socket.receive_json()
        if message["type"] == "video.chunk_metadata":
            socket.receive_bytes()
            if message["started_event_ids"]:
                return


def test_a_client_of_vllm_omni_gets_a_video_that_plays(house):
    """Start, chunks, done: the bytes in a row are the pictures that were asked for."""
    with house.websocket_connect(SOCKET) as socket:
        told = start(socket, model="fake", format="m4s", width=WIDTH, height=HEIGHT, fps=RATE, num_frames=50, seed=7)
        assert (told["type"], told["format"]) == ("video.start", "m4s")
        assert told["config"]["seed"] == 7 and told["config"]["num_frames"] == 50
        assert told["mime"].startswith('video/mp4; codecs="avc1.42')
        done, chunks = until(socket, "session.done")
    assert done == {"type": "session.done", "request_id": told["request_id"], "chunks": len(chunks), "stopped": False}
    assert [about["transport_chunk_index"] for about, _ in chunks] == list(range(len(chunks)))
    assert all(about["byte_length"] == len(data) and about["kind"] == "media" for about, data in chunks)
    with av.open(io.BytesIO(b"".join(data for _, data in chunks))) as video:
        assert len(list(video.decode(video=0))) == 50 == sum(about["num_frames"] for about, _ in chunks)


def test_new_words_are_accepted_then_seen(house):
    with house.websocket_connect(SOCKET) as socket:
        assert start(socket)["capabilities"]["endless"]
        change = {"event_id": "snow", "event": {"prompt": "it snows"}}
        socket.send_json({"type": "session.interaction", "interaction": change})
        queued, _ = until(socket, "session.interaction.queued")
        assert queued["event_id"] == "snow"
        for _ in range(50):
            message = socket.receive_json()
            if message["type"] == "video.chunk_metadata":
                socket.receive_bytes()
                if message["started_event_ids"]:
                    break
        assert message["started_event_ids"] == message["completed_event_ids"] == ["snow"]
        socket.send_json({"type": "session.stop"})
        assert until(socket, "session.done")[0]["stopped"] is True


def test_words_go_over_in_as_many_chunks_as_was_asked_for(house):
    with house.websocket_connect(SOCKET) as socket:
        told = start(socket)["capabilities"]
        assert {"lerp", "slerp", "cut"} == set(told["methods"]) and told["transition_chunks"] >= 3
        change = {"event_id": "snow", "event": {"prompt": "it snows"}, "transition_chunks": 3, "method": "slerp"}
        socket.send_json({"type": "session.interaction", "interaction": change})
        until(socket, "session.interaction.queued")
        active = []
        while not active or not active[-1]["completed_event_ids"]:
            message = socket.receive_json()
            if message["type"] == "video.chunk_metadata":
                socket.receive_bytes()
                active += [message] if message["active_event_ids"] else []
        assert [message["started_event_ids"] for message in active] == [["snow"], [], []]
        assert all(message["active_event_ids"] == ["snow"] for message in active)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"method": "cut", "transition_chunks": 4}, "a cut is at once"),
        ({"method": "slerp"}, "say how many"),
        ({"transition_chunks": 65}, "less than or equal to 64"),
        ({"transition_chunks": -1}, "greater than or equal to 0"),
        ({"transition_chunks": True}, "valid integer"),
        ({"transition_chunks": "4"}, "valid integer"),
        ({"method": "dissolve", "transition_chunks": 4}, "'lerp', 'slerp' or 'cut'"),
    ],
)
def test_a_transition_that_is_none_is_refused_and_the_stream_goes_on(house, how, says):
    with house.websocket_connect(SOCKET) as socket:
        start(socket)
        socket.send_json({"type": "session.interaction", "interaction": {"event": {"prompt": "it snows"}} | how})
        refused, _ = until(socket, "error")
        assert refused["code"] == "invalid_message" and says in refused["message"]
        until(socket, "video.chunk_metadata")


def test_pausing_stops_what_is_sent_and_going_on_does_not_lose_any(house):
    with house.websocket_connect(SOCKET) as socket:
        start(socket)
        socket.send_json({"type": "session.pause"})
        _, before = until(socket, "session.paused")
        socket.send_json({"type": "session.ping"})
        _, meanwhile = until(socket, "session.pong")
        time.sleep(0.2)
        socket.send_json({"type": "session.resume"})
        _, between = until(socket, "session.resumed")
        socket.send_json({"type": "session.stop"})
        _, after = until(socket, "session.done")
    numbers = [about["generation_chunk_index"] for about, _ in before + meanwhile + between + after]
    assert numbers == list(range(len(numbers)))
    assert len(meanwhile) + len(between) <= 1  # one may have been on its way


@pytest.mark.parametrize(
    ("message", "code", "says"),
    [
        ("{", "invalid_message", "Invalid JSON"),
        ("[]", "invalid_message", "object"),
        ('{"type": "session.begin"}', "invalid_message", "session.begin"),
        pytest.param(json.dumps({"type": "a" * 60_000}), "invalid_message", "a ...", id="long"),
        ('{"type": "session.start"}', "invalid_message", "a prompt is needed"),
        ('{"type": "session.start", "resume_from": "a", "seed": 7}', "invalid_message", "leave seed out"),
        ('{"type": "session.start", "prompt": "a", "guidance_scale": 3}', "invalid_message", "guidance_scale"),
        (json.dumps({"type": "session.start", "prompt": "a", "num_frames": 10**400}), "invalid_message", "num_frames"),
        (json.dumps({"type": "session.start", "prompt": "a" * (LONGEST_PROMPT + 1)}), "invalid_message", "prompt"),
        ('{"type": "session.stop"}', "no_session", "session.start"),
    ],
)
def test_what_cannot_be_followed_is_answered_and_forgiven(house, message, code, says):
    with house.websocket_connect(SOCKET) as socket:
        socket.send_text(message)
        error = socket.receive_json()
        assert (error["type"], error["code"]) == ("error", code) and says in error["message"]
        assert len(error["message"]) < 1100
        assert start(socket)["type"] == "video.start"


def test_bytes_are_no_message(house):
    with house.websocket_connect(SOCKET) as socket:
        socket.send_bytes(b"\x00")
        assert socket.receive_json()["code"] == "invalid_message"


@pytest.mark.parametrize("while_streaming", [False, True])
def test_ten_megabytes_are_refused_and_nobody_else_notices(house, while_streaming):
    with house.websocket_connect(SOCKET) as other, house.websocket_connect(SOCKET) as socket:
        start(other)
        if while_streaming:
            start(socket)
        socket.send_text('"' + "x" * 10_000_000 + '"')
        error, _ = until(socket, "error")
        assert error["code"] == "message_too_large" and str(LARGEST_MESSAGE) in error["message"]
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_json()
        assert closed.value.code == 1009
        other.send_json({"type": "session.stop"})
        assert until(other, "session.done")[0]["stopped"]


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"prompt": "xyzzy"}, "invalid_prompt"),
        ({"prompt": " "}, "invalid_prompt"),
        ({"model": "another"}, "unsupported"),
        ({"width": 640}, "unsupported"),
        ({"fps": 30}, "unsupported"),
    ],
)
def test_what_is_not_served_is_refused(house, more, code):
    with house.websocket_connect(SOCKET) as socket:
        assert start(socket, **{"prompt": "a ball", **more})["code"] == code
    assert house.get("/v1/sessions").json()["data"] == []


def test_refused_words_leave_the_stream_as_it_was(house):
    with house.websocket_connect(SOCKET) as socket:
        start(socket)
        for change in ({"event_id": "e", "event": {"prompt": "xyzzy"}}, {"event_id": "e", "event": {"prompt": "snow"}}):
            socket.send_json({"type": "session.interaction", "interaction": change})
        error, _ = until(socket, "error")
        assert (error["code"], error["event_id"]) == ("interaction_failed", "e")
        assert until(socket, "session.interaction.queued")[0]["event_id"] == "e"


def test_more_sessions_than_there_is_room_for_are_told_when_to_come_back(house):
    with house.websocket_connect(SOCKET) as one, house.websocket_connect(SOCKET) as two:
        start(one), start(two, num_frames=16 * 4000)
        with house.websocket_connect(SOCKET) as third:
            error = start(third)
            assert error["code"] == "busy" and error["retry_after"] >= 1
            assert error["message"] == f"busy, try in {error['retry_after']} s"
    wait_until_empty(house)
    with house.websocket_connect(SOCKET) as again:
        assert start(again)["type"] == "video.start"


def wait_until_empty(house) -> None:
    deadline = time.monotonic() + 10
    while house.get("/v1/sessions").json()["data"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_who_leaves_in_the_middle_is_forgotten():
    engine = FakeEngine(block_seconds=0.01)
    with client(engine=engine) as house:
        wait_for(house)
        with house.websocket_connect(SOCKET) as socket:
            start(socket)
            while socket.receive_json()["type"] != "video.chunk_metadata":
                pass  # and the bytes are never taken
        wait_until_empty(house)
        deadline = time.monotonic() + 10
        while engine.open_streams:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_one_who_never_reads_is_let_go_and_others_go_on(monkeypatch):
    """Its socket takes nothing: sends hang for ever, as they do when a network buffer is full."""
    monkeypatch.setattr(realtime, "LAST_WORD_SECONDS", 0.2)
    send = Wire.send

    async def clogged(self, part, header):
        if part.about["prompt"] == "clogged":
            await asyncio.Event().wait()
        await send(self, part, header)

    monkeypatch.setattr(Wire, "send", clogged)
    with client(limits=Limits(sessions=2, stall=4.0)) as house:
        wait_for(house)
        with house.websocket_connect(SOCKET) as stuck, house.websocket_connect(SOCKET) as other:
            start(stuck, "clogged"), start(other, num_frames=40)
            error = stuck.receive_json()
            assert (error["type"], error["code"]) == ("error", "stalled")
            done, chunks = until(other, "session.done")
            assert sum(about["num_frames"] for about, _ in chunks) == 40 and not done["stopped"]


def test_only_so_many_changes_wait_to_be_seen(house):
    with house.websocket_connect(SOCKET) as socket:
        start(socket)
        socket.send_json({"type": "session.pause"})
        until(socket, "session.paused")
        for number in range(steering.MOST_UNSEEN + 1):
            event = {"event_id": f"e{number}", "event": {"prompt": f"words {number}"}}
            socket.send_json({"type": "session.interaction", "interaction": event})
        refused, _ = until(socket, "error")
        assert (refused["code"], refused["event_id"]) == ("interaction_failed", f"e{steering.MOST_UNSEEN}")


@pytest.mark.parametrize("host", ["[", ""])
def test_a_host_that_is_none_is_refused(house, host):
    assert house.get("/v1/models", headers={"host": host}).status_code == 403


def test_without_a_start_the_socket_is_closed(house, monkeypatch):
    monkeypatch.setattr(realtime, "START_SECONDS", 0.05)
    with house.websocket_connect(SOCKET) as socket:
        assert socket.receive_json()["code"] == "start_timeout"


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_that_is_told_is_taken_and_a_ping_is_answered_before(seed, house):
    with house.websocket_connect(SOCKET) as socket:
        socket.send_json({"type": "session.ping"})
        assert socket.receive_json()["type"] == "session.pong"
        start(socket, seed=seed)
        assert [one["seed"] for one in house.get("/v1/sessions").json()["data"]] == [seed]


def test_a_stream_that_fails_says_so(house):
    with house.websocket_connect(SOCKET) as socket:
        start(socket, "explode")
        assert until(socket, "error")[0]["code"] == "generation_failed"


def test_numbers_are_told_every_second(house):
    with house.websocket_connect(SOCKET) as socket:
        start(socket)
        stats, _ = until(socket, "stats")
    assert stats["ttfc_seconds"] > 0 and stats["underruns"] >= 0 and stats["chunk_budget_seconds"] == 0.75


def test_sessions_can_be_listed_and_ended_and_tell_no_prompts(house):
    with house.websocket_connect(SOCKET) as socket:
        told = start(socket, "a secret ball", seed=5)
        listed = house.get("/v1/sessions")
        (session,) = listed.json()["data"]
        assert (session["id"], session["seed"], session["state"]) == (told["request_id"], 5, "live")
        assert "secret" not in listed.text
        assert house.delete(f"/v1/sessions/{session['id']}").json()["deleted"]
        assert until(socket, "session.done")[0]["stopped"]
    assert house.delete("/v1/sessions/nobody").status_code == 404


@pytest.mark.parametrize("asked_for", [False, True])
def test_prompts_are_logged_only_if_that_was_asked_for(asked_for, caplog):
    caplog.set_level(logging.DEBUG)
    with client(log_prompts=asked_for) as house:
        wait_for(house)
        with house.websocket_connect(SOCKET) as socket:
            start(socket, "a secret\nball")
            socket.send_json({"type": "session.interaction", "interaction": {"event": {"prompt": "secret snow"}}})
            until_seen(socket)
            socket.send_json({"type": "session.interaction", "interaction": {"event": {"prompt": "secret xyzzy"}}})
            assert until(socket, "error")[0]["code"] == "interaction_failed"
        wait_until_empty(house)
        with house.websocket_connect(SOCKET) as socket:
            start(socket, "a secret xyzzy")
        with house.websocket_connect(SOCKET) as socket:
            start(socket, "explode secretly")
            until(socket, "error")
    told = [record.getMessage() for record in caplog.records if "secret" in record.getMessage()]
    names = {record.name for record in caplog.records if "secret" in record.getMessage() + (record.exc_text or "")}
    assert names == ({"longtake.serving.prompts"} if asked_for else set())
    said = ['begin "a secret\\nball"', 'redirect "secret snow"', 'begin "explode secretly"']
    assert len(told) == (3 if asked_for else 0) and all(map(str.endswith, told, said))


def test_the_names_of_the_numbers_hold(house):
    with house.websocket_connect(SOCKET) as socket:
        start(socket, "a secret ball")
        socket.send_json({"type": "session.interaction", "interaction": {"event": {"prompt": "more"}}})
        until_seen(socket)
        until(socket, "stats")
    text = house.get("/metrics").text
    for name in (
        "longtake_ttfc_seconds_count", 'longtake_chunk_seconds_count{model="fake",stage="decode"}',
        *(f'longtake_chunk_seconds_count{{model="fake",stage="{stage}"}}' for stage in ("denoise", "cache", "encode")),
        "longtake_chunk_interval_seconds_count", "longtake_realtime_factor", "longtake_deadline_misses_total",
        "longtake_underrun_seconds_total", 'longtake_sessions{model="fake",state="live"}',
        'longtake_prompt_latency_seconds_count{model="fake"} 1.0',
    ):  # fmt: skip
        assert name in text
    assert "secret" not in text


def test_what_tools_ask_for(house):
    assert house.get("/health").json() == {"status": "ok", "ready": True} == house.get("/healthz").json()
    assert house.head("/health").status_code == house.head("/healthz").status_code == 200
    (model,) = house.get("/v1/models").json()["data"]
    assert (model["id"], model["license"], model["recipe"]) == ("fake", "Apache-2.0", "fake_recipe")
    assert "session.interaction" in house.get("/docs").text and "/v1/sessions" in house.get("/docs").text


def test_the_page_and_all_it_names_come_from_here(house):
    page = house.get("/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("page.js", "player.js", "timeline.js", "kept.js", "command.js", "style.css", "icon.svg"):
        text = house.get(f"/{name}")
        assert text.status_code == 200 and text.headers["cache-control"] == "no-cache"
        assert "https://" not in text.text and "http://" not in text.text.replace("http://www.w3.org/2000/svg", "")
    assert "http" not in page.text
    for path in ("/../app.py", "/..%2fapp.py", "/%2e%2e/app.py"):
        assert house.get(path).status_code == 404


def refused(served, path=SOCKET, **headers) -> bool:
    try:
        with served.websocket_connect(path, headers=headers):
            return False
    except WebSocketDisconnect:
        return True


def test_other_pages_and_other_names_are_kept_out(house):
    assert refused(house, origin="https://evil.example")
    assert refused(house, origin="http://localhost:9999")
    assert refused(house, host="evil.example:8000", origin="http://evil.example:8000")  # a name pointed at this machine
    assert house.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert not refused(house, origin=HERE)
    with client(Access(origins=("studio.example",))) as served:
        wait_for(served)
        assert not refused(served, origin="https://studio.example")


def test_a_key_is_asked_for_everywhere_but_at_the_door():
    now = [0.0]
    with client(Access(key="sesame", clock=lambda: now[0])) as served:
        wait_for(served)
        right = {"authorization": "Bearer sesame"}
        for path in ("/v1/models", "/v1/sessions", "/metrics"):
            assert served.get(path).status_code == 401
            assert served.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
            assert served.get(path, headers=right).status_code == 200
        assert served.get("/").status_code == served.get("/health").status_code == 200
        assert served.post("/v1/realtime/token").status_code == 401
        assert refused(served) and refused(served, f"{SOCKET}?token=wrong")
        assert refused(served, authorization="Bearer wrong") and not refused(served, **right)
        token = served.post("/v1/realtime/token", headers=right).json()["token"]
        assert not refused(served, f"{SOCKET}?token={token}")
        assert refused(served, f"{SOCKET}?token={token}")  # it is used up
        late = served.post("/v1/realtime/token", headers=right).json()["token"]
        now[0] += TOKEN_SECONDS + 1
        assert refused(served, f"{SOCKET}?token={late}")


@pytest.mark.parametrize(
    "text", ["https://studio.example", "studio.example:443", "studio.example/x", "*", "", "a b", "-x"]
)
def test_an_origin_that_no_page_could_have_is_refused(text):
    with pytest.raises(ValueError, match="an origin is a host"):
        require_host(text)


def test_origins_are_known_as_browsers_write_them():
    assert [*map(require_host, ("Studio.Example", "10.0.0.7", "[::1]", "::1"))] == [
        "studio.example", "10.0.0.7", "::1", "::1",
    ]  # fmt: skip


def test_a_session_that_is_ended_while_it_opens_is_told_so_and_not_that_its_words_are_wrong(house, monkeypatch):
    worker = house.app.state.house.worker
    opens = worker._begin

    def ended_first(session, take):
        worker.close(session)
        return opens(session, take)

    monkeypatch.setattr(worker, "_begin", ended_first)
    with house.websocket_connect(SOCKET) as socket:
        assert start(socket)["code"] == "session_over"
