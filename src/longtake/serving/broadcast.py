"""One stream's fragments for others who watch it: coded once, and handed to each as fast as it takes them.

All of it belongs to one event loop.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

MOST_VIEWERS = 32  # of one stream
_MOST_WAITING = 8  # fragments that one viewer may leave lying


class Part(NamedTuple):
    """A fragment, and what is told of it but for what differs from viewer to viewer."""

    about: dict[str, Any]
    data: bytes


class Viewer:
    """What one who watches has still to be sent. lost: it left too much lying, and gets no more."""

    def __init__(self) -> None:
        self.lost = asyncio.Event()
        self._parts: deque[Part] = deque()
        self._news = asyncio.Event()
        self._over = False

    async def next(self) -> Part | None:
        """The next part; None when there is no more, or where it is lost."""
        while True:
            if self.lost.is_set():
                return None
            if self._parts:
                return self._parts.popleft()
            if self._over:
                return None
            self._news.clear()
            await self._news.wait()

    def _give(self, part: Part) -> None:
        if len(self._parts) >= _MOST_WAITING:
            self._parts.clear()
            self.lost.set()
        else:
            self._parts.append(part)
        self._news.set()

    def _end(self) -> None:
        self._over = True
        self._news.set()


class Broadcast:
    """A stream as others see it. start: the message it begins with. header: that of its mp4. end: the last message."""

    def __init__(self, start: dict[str, Any], header: bytes) -> None:
        self.start, self.header = start, header
        self.end: dict[str, Any] | None = None
        self.viewers: set[Viewer] = set()

    def send(self, part: Part) -> None:
        for viewer in self.viewers:
            viewer._give(part)

    def stop(self, message: dict[str, Any]) -> None:
        """There is no more, and why; only the first time counts."""
        if self.end is None:
            self.end = message
            for viewer in self.viewers:
                viewer._end()

    @contextmanager
    def watched(self) -> Iterator[Viewer]:
        """Somebody who watches from the next fragment on."""
        viewer = Viewer()
        if self.end is not None:
            viewer._end()
        self.viewers.add(viewer)
        try:
            yield viewer
        finally:
            self.viewers.discard(viewer)
