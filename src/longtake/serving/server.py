"""The process: listens, says where, and ends streams cleanly when it is told to go."""

import asyncio
import signal
import socket
import sys
from contextlib import suppress

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from longtake.serving.access import LOOPBACK

_LARGEST_FRAME = 2**20  # bytes; more than the protocol's largest message, so that most clients are told what is wrong
_MOST_CONNECTIONS = 256
_ASKING_SECONDS = 10.0
_CLOSING_SECONDS = 10.0
_TAKING_SECONDS = 60.0


class _Http(H11Protocol):
    """Drops who connects and asks for nothing: else it keeps its connection for as long as it likes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(_ASKING_SECONDS, self._require_request)

    def _require_request(self) -> None:
        if self.cycle is None and self in self.connections:  # a socket's protocol has taken this one's place there
            self.transport.abort()


class _Socket(WebSocketsSansIOProtocol):
    """Drops a client that takes nothing: else it keeps its connection until it has taken all that was sent."""

    async def run_asgi(self) -> None:
        await super().run_asgi()
        self.loop.call_later(_CLOSING_SECONDS, self.transport.abort)


class _Server(uvicorn.Server):
    """Streams end before their sockets are closed."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        application: FastAPI = self.config.app  # type: ignore[assignment]
        await application.state.house.leave()
        await super().shutdown(sockets)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    return host in LOOPBACK


def require_safe(host: str, key: str | None, insecure: bool) -> None:
    """ValueError for a server that others can reach without a key, unless that is asked for."""
    if not is_loopback(host) and key is None and not insecure:
        raise ValueError(
            f"everybody who can reach {host} could use this server: set LONGTAKE_API_KEY, or say --insecure"
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. OSError or ValueError, in one line, where that cannot be."""
    if not 0 <= port < 2**16:
        raise ValueError(f"a port is 0 to {2**16 - 1}, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error}") from None
    if sys.platform == "linux":  # who takes nothing of a file for so long is dropped; connections inherit it
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * _TAKING_SECONDS))
    return listening


def run(app: FastAPI, listening: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        http=_Http,
        ws=_Socket,
        ws_max_size=_LARGEST_FRAME,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=10,
    )
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn raises it once more when all is over: this is no failure
    with suppress(KeyboardInterrupt):  # so is Ctrl-C
        _Server(config).run(sockets=[listening])
