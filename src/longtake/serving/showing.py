"""What the client that started a session is sent: fragments when it is time for them, and numbers once a second."""

import asyncio
import logging
from collections import deque
from contextlib import suppress
from time import perf_counter
from typing import Any

import numpy as np

from longtake.media.fragments import FragmentWriter
from longtake.serving.broadcast import Broadcast, Part
from longtake.serving.keeping import Keeping
from longtake.serving.metrics import Metrics
from longtake.serving.protocol import CAPABILITIES, STATS_SECONDS, Refused
from longtake.serving.session import Piece, Session
from longtake.serving.steering import Steering
from longtake.serving.wire import Wire
from longtake.serving.worker import Worker

log = logging.getLogger(__name__)


class Showing:
    """One session's video: coded once, sent, handed to whoever watches (`broadcast`), and recorded.

    began: when its client asked for it. config: what is told of the model, with its width, height and fps.
    """

    def __init__(
        self, session: Session, wire: Wire, worker: Worker, keeping: Keeping, metrics: Metrics,
        config: dict[str, Any], began: float,
    ) -> None:  # fmt: skip
        self._session, self._wire, self._worker, self._keeping = session, wire, worker, keeping
        self._metrics, self._began = metrics, began
        self._writer = FragmentWriter(config["width"], config["height"], config["fps"])
        self._took: deque[float] = deque(maxlen=100)
        self._ttfc = 0.0
        self._last: float | None = None
        self._waited = (0, 0.0)
        start = {
            "type": "video.start",
            "request_id": session.id,
            "format": "m4s",
            "mime": f'video/mp4; codecs="{self._writer.codec}"',
            "config": config | {"prompt": session.prompt, "seed": session.seed, "num_frames": session.pictures},
            "capabilities": CAPABILITIES,
        }
        self.broadcast = Broadcast(start, self._writer.header)

    def done(self) -> dict[str, Any]:
        """The last message."""
        stopped = self._session.end != "done"
        chunks = self._wire.chunks
        return {"type": "session.done", "request_id": self._session.id, "chunks": chunks, "stopped": stopped}

    async def send(self, news: asyncio.Event, steering: Steering) -> None:
        """Until the stream is over, and that is said. news: set whenever there may be something to send."""
        session, wire = self._session, self._wire
        await wire.say(self.broadcast.start)
        while (piece := await self._next_piece(news)) is not None:
            recorder = self._keeping.recorder  # of this moment: a piece is of a line that it remembers
            encoding = perf_counter()
            part = Part(self._about(piece), await asyncio.to_thread(self._writer.fragment, piece.frames))
            encoded = perf_counter() - encoding
            self.broadcast.send(part)
            await wire.send(part, self._writer.header)
            if recorder is not None and (full := await self._keeping.add(piece, recorder, session)) is not None:
                await wire.say(full)
            self._note(piece, encoded, steering)
        if (recorded := await self._keeping.finish(session)) is not None:
            await wire.say(recorded)
        if session.failed:
            log.error("session %s failed: %s", session.id, session.end)
            raise Refused("generation_failed", session.end)
        if session.end == "stalled":
            raise Refused("stalled", "nothing was taken, or the pause was too long: the session is over")
        await wire.say(self.done())
        await wire.close()

    async def _next_piece(self, news: asyncio.Event) -> Piece | None:
        """What is to be sent next, when it is time; None when the session is over."""
        while True:
            news.clear()
            if (piece := self._worker.read(self._session)) is not None:
                return piece
            if self._session.end:
                return None
            with suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), self._worker.seconds_until_due(self._session))

    def _about(self, piece: Piece) -> dict[str, Any]:
        return {
            "type": "video.chunk_metadata",
            "request_id": self._session.id,
            "kind": "media",
            "generation_chunk_index": piece.number,
            "start_seconds": piece.start_seconds,
            "prompt": piece.words,
            "num_frames": len(piece.frames),
            "started_event_ids": list(piece.events),
            "active_event_ids": list(piece.active),
            "completed_event_ids": list(piece.completed),
        }

    def _note(self, piece: Piece, encoded: float, steering: Steering) -> None:
        """A piece is on its way: what that says of speed."""
        now = perf_counter()
        if self._last is None:
            self._ttfc = now - self._began
            self._metrics.first_chunk(self._ttfc)
        else:
            self._metrics.interval(now - self._last)
        self._last = now
        timings, playback = piece.timings, self._session.playback
        self._took.append(timings.total_seconds + encoded)
        self._metrics.chunk(
            denoise=timings.denoise_seconds, cache=timings.commit_seconds, decode=timings.codec_seconds, encode=encoded
        )
        for event in piece.events:
            if (asked := steering.shown(event)) is not None:
                self._metrics.prompt_shown(now - asked)
        misses, dry_seconds = self._waited
        self._metrics.waited(playback.misses - misses, playback.dry_seconds - dry_seconds)
        self._waited = (playback.misses, playback.dry_seconds)

    async def tell(self) -> None:
        """Numbers, once a second."""
        worker, session = self._worker, self._session
        while True:
            await asyncio.sleep(STATS_SECONDS)
            if not self._took:
                continue
            playback, share = session.playback, worker.device_share
            await self._wire.say(
                {
                    "type": "stats",
                    "request_id": session.id,
                    "state": session.state,
                    "ttfc_seconds": round(self._ttfc, 3),
                    "chunk_p95_seconds": round(float(np.percentile(self._took, 95)), 3),
                    "chunk_budget_seconds": worker.block_seconds,
                    "realtime_factor": round(1 / share, 2) if share else None,
                    "buffer_seconds": round(playback.unseen(worker.clock()), 2),
                    "underruns": playback.misses,
                    "underrun_seconds": round(playback.dry_seconds, 2),
                    "sessions": len(worker.sessions()),
                }
            )
