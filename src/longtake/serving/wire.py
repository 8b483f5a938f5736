"""One accepted socket: messages in that can be understood, messages and fragments out that are not mixed up."""

import asyncio
from contextlib import suppress
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from longtake.serving.broadcast import Part
from longtake.serving.protocol import Message, Refused, parse

LAST_WORD_SECONDS = 3.0  # for a client that takes nothing more to hear that it is over
_TRY_LATER, _WENT_WRONG, _TOO_LARGE, _DONE = 1013, 1011, 1009, 1000


class Wire:
    """chunks: how many were sent."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._sending = asyncio.Lock()  # a chunk's description and its bytes are not parted
        self.chunks = 0

    async def next_message(self) -> Message:
        """The next that can be understood; others are answered with what is wrong with them.

        Raises Refused for one that is too large, after which the socket is closed.
        """
        while True:
            received = await self._socket.receive()
            if received["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(received.get("code", _DONE))
            try:
                if received.get("text") is None:
                    raise Refused("invalid_message", "messages are JSON text, not bytes")
                return parse(received["text"])
            except Refused as refused:
                if refused.code == "message_too_large":
                    raise
                await self.refuse(refused)

    async def say(self, message: dict[str, Any]) -> None:
        async with self._sending:
            await self._socket.send_json(message)

    async def refuse(self, refused: Refused) -> None:
        """Say what was wrong; the socket stays open."""
        await self.say(refused.message())

    async def pong(self) -> None:
        await self.say({"type": "session.pong"})

    async def send(self, part: Part, header: bytes) -> None:
        """A fragment with its description, behind the header of its mp4 if it is the first."""
        data = part.data if self.chunks else header + part.data
        async with self._sending:
            await self._socket.send_json(
                part.about | {"transport_chunk_index": self.chunks, "byte_length": len(data)}
            )  # fmt: skip
            await self._socket.send_bytes(data)
        self.chunks += 1

    async def close(self) -> None:
        """All is said."""
        await self._socket.close(_DONE)

    async def leave(self, refused: Refused) -> None:
        """Say why it ends, if the client still listens, and close."""
        code = {"busy": _TRY_LATER, "message_too_large": _TOO_LARGE}.get(refused.code, _WENT_WRONG)
        with suppress(TimeoutError, WebSocketDisconnect, RuntimeError):
            async with asyncio.timeout(LAST_WORD_SECONDS):
                await self._socket.send_json(refused.message())
                await self._socket.close(code)
