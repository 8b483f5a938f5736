"""A server on this machine that speaks as much of the Hugging Face hub's protocol as a download needs."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class Hub(ThreadingHTTPServer):
    """One repository and its files.

    breaks: how many bodies of files still break off in the middle. damage: the first byte of each is flipped. fails:
    files are answered with an error. gated: everything is.
    """

    def __init__(self, repo: str, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repo, self.files = repo, files
        self.breaks = 0
        self.damage = self.fails = self.gated = False
        self.asked: list[tuple[str, str, str | None, str | None]] = []  # method, path, range, token

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(repo: str, files: Mapping[str, bytes]) -> Iterator[Hub]:
    with Hub(repo, files) as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        path, hub = self.path.partition("?")[0], self.server
        hub.asked.append((self.command, path, self.headers["Range"], self.headers["Authorization"]))
        if hub.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif path == f"/api/models/{hub.repo}/revision/main":
            self._json({"id": hub.repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]})
        elif path == f"/api/models/{hub.repo}/tree/{COMMIT}":
            self._json([_listed(name, content) for name, content in hub.files.items()])
        elif (name := path.removeprefix(f"/{hub.repo}/resolve/{COMMIT}/")) in hub.files:
            self._file(hub.files[name], with_body)
        else:
            missing = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self._send(404, b"{}", missing)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _file(self, content: bytes, with_body: bool) -> None:
        hub, start = self.server, 0
        headers = {"ETag": f'"{_sha256(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.headers["Range"]:
            start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if hub.damage:
            body = bytes([body[0] ^ 255]) + body[1:]
        if with_body and hub.fails:
            return self._send(500, b"out of order", {})
        if with_body and hub.breaks:
            hub.breaks -= 1
            self.close_connection = True  # after fewer bytes than were promised
            return self._send(200, body, headers, sent=len(body) // 2)
        self._send(206 if start else 200, body, headers, sent=len(body) if with_body else 0)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:sent])


def _listed(name: str, content: bytes) -> dict[str, object]:
    large = {"oid": _sha256(content), "size": len(content), "pointerSize": 100}
    return {"type": "file", "path": name, "size": len(content), "oid": "0" * 40, "lfs": large}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
