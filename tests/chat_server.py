"""An OpenAI-compatible endpoint on the loopback device, which answers by a function of the messages."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class ChatServer:
    """answer: from the messages to the reply; bytes are sent as they are. asked: bodies and keys of all requests."""

    answer: Callable[[list[dict]], str | bytes] = lambda messages: messages[-1]["content"]
    models: tuple[str, ...] = ("tiny-chat",)
    status: int = 200
    url: str = ""
    asked: list[dict] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@contextmanager
def chat_server(**options) -> Iterator[ChatServer]:
    server = ChatServer(**options)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = {"data": [{"id": name} for name in server.models]}
            self.reply(known if self.path == "/v1/models" else b"not here", 200 if self.path == "/v1/models" else 404)

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(body)
            server.keys.append(self.headers["Authorization"])
            said = server.answer(body["messages"])
            choices = (
                {"choices": [{"message": {"role": "assistant", "content": said}}]} if isinstance(said, str) else said
            )
            self.reply(choices, server.status)

        def reply(self, content: dict | bytes, status: int) -> None:
            sent = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *said: object) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listening.server_port}/v1"
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()
