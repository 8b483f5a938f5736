"""What one viewer is sent, as an mp4 that says how it is made again."""

from collections.abc import Mapping
from contextlib import ExitStack
from json import dumps
from logging import getLogger
from threading import Lock

from longtake.generation.recording import Line, Notes
from longtake.generation.stream import Engine
from longtake.media.mp4 import Mp4Writer, copy_with_comment, part_of
from longtake.serving.session import Piece
from longtake.serving.store import Full, Kept, Store

log = getLogger(__name__)

MOST_SPANS = 500
"""Of pictures in a row, which rewinds, and changes that dropped pictures, part; and of words in a row."""


class Recorder:
    """Writes pieces as they are sent, at the quality of `generate`. Methods are safe to call from any thread.

    full: it ended early, for want of room, or after as many jumps as one recording tells of. Raises: Full where the
    store has no room for it.
    """

    def __init__(self, store: Store, engine: Engine) -> None:
        self._store, self._engine, self._lock = store, engine, Lock()
        self._over = False
        self.notes = Notes()
        self.full = False
        with ExitStack() as stack:
            self.name = stack.enter_context(store.new("mp4"))
            self._whole = store.place(self.name, "mp4")
            self._raw = self._whole.with_suffix(".raw.mp4")  # what it says of itself is known at its end
            self._writer = Mp4Writer(self._raw, engine.width, engine.height, engine.frame_rate)
            stack.callback(self._raw.unlink, missing_ok=True)
            stack.callback(self._writer.close)
            self._open = stack.pop_all()

    def write(self, piece: Piece) -> None:
        """Add pictures; none where it is full or finished."""
        with self._lock:
            if self.full or self._over:
                return
            self._writer.write(piece.frames)
            begin = round(piece.start_seconds * self._engine.frame_rate)
            self.notes.show(piece.line, begin, len(piece.frames), piece.words)
            self.full = max(len(self.notes.spans), len(self.notes.words)) >= MOST_SPANS
            try:
                self._store.grow(self.name, 2 * part_of(self._raw).stat().st_size)  # at its end it is copied once
            except Full:
                self.full = True

    def finish(self, lines: Mapping[int, Line]) -> Kept | None:
        """The whole file, None without a picture. lines: all that the pieces named.

        On a full disk what was written is kept, without a record: it plays, but cannot be made again.
        """
        beside = self._whole.with_name(self._whole.name + ".part")
        with self._lock, self._open as ending:
            self._over = True
            ending.callback(beside.unlink, missing_ok=True)
            if self.notes.pictures:
                try:
                    self._writer.close()
                    copy_with_comment(self._raw, beside, dumps(self.notes.record(self._engine, lines)))
                    beside.replace(self._whole)
                except OSError:
                    log.exception("a recording could not be finished: what was written is kept")
                    self._raw.replace(self._whole)
        return self._store.find(self.name, "mp4")
