"""What clients asked to keep: snapshots and recordings, as files that they know by opaque names alone."""

import fcntl
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from longtake.files import make_folder

Kind = Literal["take", "mp4"]

_WHOLE = re.compile(r"([0-9a-f]{32})\.(take|mp4)")
_LEFT = re.compile(r"[0-9a-f]{32}\.(take\.part|raw\.mp4|raw\.part\.mp4|mp4\.part)")  # by a server that was killed


class Full(Exception):
    """There is no room for more."""


class Kept(NamedTuple):
    """A whole file: its name for clients, where it is, its bytes, and when it was made, in seconds since 1970."""

    name: str
    path: Path
    bytes: int
    created: float


class Store:
    """A folder of files that are there when they are whole, few and not large together.

    folder: whose files outlive the server, made if it is missing; None for one that goes with the server. most,
    most_bytes: of all files together, those of earlier servers included. Names are drawn here, and only those drawn
    here are looked up: no text of a client becomes a path. Safe from any thread.

    Raises: OSError where the folder cannot be written, or another server has it.
    """

    def __init__(self, folder: Path | None = None, *, most: int = 64, most_bytes: int = 4 * 2**30) -> None:
        self.lasts = folder is not None
        self.most, self.most_bytes = most, most_bytes
        self._open = ExitStack()
        self.folder = folder or Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="longtake-")))
        make_folder(self.folder)
        self._open.callback(os.close, _hold(self.folder))
        self._lock = threading.Lock()
        self._growing: dict[str, int] = {}
        self._files: dict[tuple[str, Kind], Kept] = {}
        self._look()

    def close(self) -> None:
        """Let go of the folder; one that goes with the server is removed. Closing twice does nothing."""
        self._open.close()

    def kept(self, kind: Kind) -> list[Kept]:
        """All files of a kind, the oldest first."""
        with self._lock:
            found = [file for (_, own), file in self._there().items() if own == kind]
        return sorted(found, key=lambda file: file.created)

    def find(self, name: str, kind: Kind) -> Kept | None:
        with self._lock:
            return self._there().get((name, kind))

    def remove(self, name: str, kind: Kind) -> bool:
        """False if there is none of that name."""
        with self._lock:
            file = self._files.pop((name, kind), None)
        if file is not None:
            file.path.unlink(missing_ok=True)
        return file is not None

    @contextmanager
    def new(self, kind: Kind, size: int = 0) -> Iterator[str]:
        """A name for a file that is written meanwhile at `place`, and found from then on if it was.

        size: bytes that it takes, as far as is known; see `grow`. Raises Full where there is no room.
        """
        name = secrets.token_hex(16)
        with self._lock:
            if len(self._there()) + len(self._growing) >= self.most:
                raise Full(f"{self.most} snapshots and recordings are kept already: remove some first")
            self._require_room(size)
            self._growing[name] = size
        try:
            yield name
        finally:
            with self._lock:
                del self._growing[name]
                if self.place(name, kind).exists():
                    self._add(name, kind)

    def place(self, name: str, kind: Kind) -> Path:
        """Where a new file is to be when it is whole. Beside it, writers may use .part and .raw.mp4."""
        return self.folder / f"{name}.{kind}"

    def grow(self, name: str, size: int) -> None:
        """A new file has so many bytes by now. Raises Full where that is too much."""
        with self._lock:
            self._require_room(size - self._growing[name])
            self._growing[name] = size

    def _require_room(self, size: int) -> None:
        used = sum(file.bytes for file in self._there().values()) + sum(self._growing.values())
        if used + size > self.most_bytes:
            raise Full(f"{self.most_bytes / 2**30:g} GiB are kept already: remove some snapshots or recordings first")

    def _there(self) -> dict[tuple[str, Kind], Kept]:
        """The files but those that somebody has removed from the folder by hand."""
        return {name: file for name, file in self._files.items() if file.path.exists()}

    def _look(self) -> None:
        for path in self.folder.iterdir():
            if whole := _WHOLE.fullmatch(path.name):
                self._add(whole[1], "take" if whole[2] == "take" else "mp4")
            elif _LEFT.fullmatch(path.name):
                path.unlink()

    def _add(self, name: str, kind: Kind) -> None:
        path = self.place(name, kind)
        told = path.stat()
        self._files[name, kind] = Kept(name, path, told.st_size, told.st_mtime)


def _hold(folder: Path) -> int:
    """A lock on the folder, which goes with the process, however that ends."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise OSError(f"another server keeps its snapshots in {folder}") from None
    return held
