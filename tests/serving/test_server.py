"""The whole of it as a process, with the embedded model: what a user starts, and how it ends."""

import asyncio
import io
import json
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import av
import pytest
import uvicorn
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from longtake.cli import main
from longtake.serving import server as serving
from tests.serving.process import server


@pytest.fixture(scope="module")
def served():
    with server() as running:
        yield running


def client(address: str, key: str = "sesame"):
    headers = {"Authorization": f"Bearer {key}"}
    return connect(f"ws://{address}/v1/realtime/video", additional_headers=headers, max_size=None)


def started(socket, **more) -> dict:
    message = {"type": "session.start", "prompt": "a red ball bounces over green hills"}
    socket.send(json.dumps(message | more))
    return json.loads(socket.recv(30))


def vanish(gone) -> None:
    """Without a word; where the machine is busy, the server may have closed first."""
    with suppress(OSError):
        gone.socket.shutdown(socket.SHUT_RDWR)


def rest_of(socket) -> tuple[dict, bytes]:
    """The last message, and all bytes that come before it."""
    video = b""
    while True:
        message = socket.recv(30)
        if isinstance(message, bytes):
            video += message
        elif json.loads(message)["type"] in ("session.done", "error"):
            return json.loads(message), video


def test_a_video_plays_whoever_else_misbehaves(served):
    _, address = served
    with pytest.raises(InvalidStatus, match="403"):
        client(address, "wrong")
    with client(address) as flooding:  # more than the socket itself takes
        flooding.send("x" * 10_000_000)
        with pytest.raises(ConnectionClosed) as closed:
            flooding.recv(30)
        assert closed.value.rcvd.code == 1009
    with client(address) as watching, client(address) as silent, client(address) as gone:
        assert started(watching, num_frames=40)["type"] == "video.start"
        started(silent)  # and never reads again
        started(gone)
        vanish(gone)
        done, video = rest_of(watching)
        vanish(silent)
    assert done["type"] == "session.done" and not done["stopped"]
    with av.open(io.BytesIO(video)) as container:
        assert len(list(container.decode(video=0))) == 40


def test_fifty_at_once_are_served_or_told_when_to_come_back(served):
    """As many streams as the device makes, for the others a clear no; nobody is left without an answer."""
    _, address = served

    def one(number: int) -> dict:
        with client(address) as socket:
            told = started(socket, seed=number, num_frames=9)
            return rest_of(socket)[0] if told["type"] == "video.start" else told

    with ThreadPoolExecutor(50) as viewers:
        answers = list(viewers.map(one, range(50)))
    kinds = Counter(answer.get("code", answer["type"]) for answer in answers)
    assert kinds.keys() <= {"session.done", "busy"} and kinds["session.done"] >= 1
    assert all(answer["retry_after"] >= 1 for answer in answers if answer["type"] == "error")
    with client(address) as socket:
        assert eventually(lambda: sessions(address) == [])
        assert started(socket, num_frames=9)["type"] == "video.start"
        assert rest_of(socket)[0]["type"] == "session.done"


def sessions(address: str) -> list:
    asking = urllib.request.Request(f"http://{address}/v1/sessions", headers={"Authorization": "Bearer sesame"})
    with urllib.request.urlopen(asking) as answer:
        return json.load(answer)["data"]


def eventually(holds) -> bool:
    deadline = time.monotonic() + 20
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def answer_of(socket, kind: str) -> dict:
    while True:
        message = socket.recv(30)
        if not isinstance(message, bytes) and (told := json.loads(message))["type"] == kind:
            return told


def record(watching) -> None:
    """Until pictures are written."""
    watching.send(json.dumps({"type": "session.record"}))
    for kind in ("session.record.started", "video.chunk_metadata", "video.chunk_metadata", "video.chunk_metadata"):
        answer_of(watching, kind)


def test_what_was_promised_outlives_a_kill(tmp_path):
    """A snapshot and a recording that were told of are there again; what was being written is gone."""
    folder = tmp_path / "kept"
    with server("--keep", str(folder)) as (process, address), client(address) as watching:
        started(watching, seed=7)
        watching.send(json.dumps({"type": "session.snapshot"}))
        kept = answer_of(watching, "session.snapshot.done")
        record(watching)
        watching.send(json.dumps({"type": "session.record.stop"}))
        recorded = answer_of(watching, "session.record.done")
        record(watching)
        assert kept["lasts"] and recorded["id"]
        process.kill()
        process.wait(20)
    assert len(list(folder.iterdir())) == 3  # the last recording was under way
    with server("--keep", str(folder)) as (_, address), client(address) as watching:
        watching.send(json.dumps({"type": "session.start", "resume_from": kept["id"], "num_frames": 24}))
        told = answer_of(watching, "video.start")
        assert told["config"]["seed"] == 7
        assert json.loads(watching.recv(30))["start_seconds"] == kept["start_seconds"]
        assert rest_of(watching)[0]["type"] == "session.done"
        assert sorted(path.name for path in folder.iterdir()) == sorted([f"{kept['id']}.take", f"{recorded['id']}.mp4"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_streams_with_whole_fragments(number):
    with server() as (process, address):
        with client(address), client(address) as watching:  # the first has started nothing
            assert started(watching)["type"] == "video.start"
            process.send_signal(number)
            done, video = rest_of(watching)
            assert process.wait(20) == 0
        assert done["type"] == "session.done" and done["stopped"]
        if video:
            with av.open(io.BytesIO(video)) as container:
                assert len(list(container.decode(video=0))) >= 9
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "--insecure"),
        (["--host", "203.0.113.1", "--insecure"], "cannot listen"),
        (["--sessions", "0"], "1 session or more"),
        (["--recipe", "self_forcin"], "self_forcing"),
        (["--port", "70000"], "0 to 65535"),
        (["--origin", "https://studio.example"], "without scheme"),
        (["--api-key", "schlüssel"], "ASCII"),
        (["--api-key", "sesame "], "no space"),
        (["--keep", "/dev/null/kept"], "/dev/null/kept"),
        (["--keep-gib", "0"], "more than 0 GiB"),
        (["--keep-gib", "inf"], "more than 0 GiB"),
        (["--keep-gib", "1e308"], "more than 0 GiB"),
    ],
)
def test_what_cannot_be_served_is_told_in_one_line(arguments, says, capsys, monkeypatch):
    monkeypatch.delenv("LONGTAKE_API_KEY", raising=False)
    assert main(["serve", "--port", "0", *arguments]) == 2
    told = capsys.readouterr()
    assert says in told.err and len(told.err.splitlines()) == 1 and told.out == ""


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr("longtake.cli.serve.find_spec", lambda name: None)
    assert main(["serve"]) == 2
    assert "pip install 'longtake[serve]'" in capsys.readouterr().err


@contextmanager
def serving_only(app):
    """An application without a house, and its address."""
    config = uvicorn.Config(app, lifespan="off", log_level="critical", http=serving._Http, ws=serving._Socket)
    running = uvicorn.Server(config)
    listening = serving.listen("127.0.0.1", 0)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield running, listening.getsockname()
    finally:
        running.should_exit = True
        thread.join(20)


def test_one_who_takes_nothing_does_not_keep_its_connection(monkeypatch):
    """Its network buffers are full, so not even the closing of the socket reaches it."""
    monkeypatch.setattr(serving, "_CLOSING_SECONDS", 0.2)
    left = threading.Event()

    async def flood(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                while True:
                    await send({"type": "websocket.send", "bytes": bytes(2**20)})
        left.set()

    with serving_only(flood) as (running, address), socket.create_connection(address) as silent:
        silent.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert left.wait(20)
        assert eventually(lambda: not running.server_state.connections)


@pytest.mark.skipif(sys.platform != "linux", reason="only there is a connection dropped of which nothing is taken")
def test_one_who_takes_nothing_of_a_file_does_not_keep_its_connection(monkeypatch):
    monkeypatch.setattr(serving, "_TAKING_SECONDS", 1.0)
    asked = threading.Event()

    async def file(scope, receive, send):
        asked.set()
        await send({"type": "http.response.start", "status": 200})
        for _ in range(100):
            await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})

    with serving_only(file) as (running, address), socket.create_connection(address) as silent:
        silent.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert asked.wait(20) and running.server_state.connections
        assert eventually(lambda: not running.server_state.connections)


def test_one_who_asks_for_nothing_does_not_keep_its_connection(monkeypatch):
    monkeypatch.setattr(serving, "_ASKING_SECONDS", 0.5)

    async def accept(scope, receive, send):
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass

    with (
        serving_only(accept) as (running, address),
        socket.create_connection(address, timeout=20) as silent,
        connect(f"ws://{address[0]}:{address[1]}") as talking,
    ):
        assert silent.recv(1) == b""
        time.sleep(0.5)
        assert len(running.server_state.connections) == 1 and talking.ping().wait(5)
