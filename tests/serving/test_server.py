"""The whole of it as a process, with the embedded model: what a user starts, and how it ends."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress

import av
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from longtake.cli import main


@contextmanager
def server():
    """A server with a key, and its address."""
    command = [sys.executable, "-m", "longtake.cli", "serve", "--port", "0", "--dtype", "float32"]
    environment = os.environ | {"LONGTAKE_API_KEY": "sesame"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        address = process.stdout.readline().strip().removeprefix("http://")
        deadline = time.monotonic() + 60
        while not is_ready(address):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        yield process, address
        process.kill()


@pytest.fixture(scope="module")
def served():
    with server() as running:
        yield running


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/readyz") as answer:
            return answer.status == 200
    except urllib.error.HTTPError as error:
        error.close()
        return False


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
