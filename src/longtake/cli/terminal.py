"""How every verb talks: results go to stdout, progress and complaints to stderr, and the exit code says how it went."""

import os
import sys
from collections.abc import Callable
from json import dumps
from time import perf_counter
from typing import Any, TextIO

CHECK_FAILED, BAD_INPUT, INTERRUPTED, UNREAD = 1, 2, 130, 141


def say(text: str) -> None:
    """One line of progress or complaint, on stderr."""
    _tell(f"longtake: {text}\n")


def _tell(text: str) -> None:
    """A log on a full disk, or a terminal that was closed, ends no work."""
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        leave_unread(sys.stderr)


def print_result(result: Any, json: bool, in_words: Callable[[Any], str]) -> None:
    """What a verb found out, on stdout: as JSON, or in words."""
    print(dumps(result, indent=2) if json else in_words(result))


def in_one_line(error: Exception) -> str:
    """An error as one line, without Python's error number in front of what the system says."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device's memory did not do."""
    torch = sys.modules.get("torch")  # not imported for this alone
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def leave_unread(*streams: TextIO) -> None:
    """Print nothing more there, not even what still waits: whoever read it has gone, or the disk is full."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())


class LiveLine:
    """How far a video has come, on stderr: one line rewritten in a terminal, a line now and then in a log."""

    _LOG_EVERY_SECONDS = 5.0

    def __init__(self, frame_rate: int) -> None:
        self._frame_rate = frame_rate
        self._rewrites = sys.stderr.isatty()
        self._start: tuple[int, float] | None = None  # pictures and time after the first block
        self._text = self._logged = ""
        self._next_log = 0.0

    def show(self, pictures: int) -> None:
        """Tell of `pictures` made so far; called once a block."""
        now = perf_counter()
        self._start = self._start or (pictures, now)
        self._text = f"{pictures / self._frame_rate:.1f} s made{self._speed(pictures, now)}"
        if self._rewrites:
            _tell(f"\r{self._text}\x1b[K")
        elif now >= self._next_log:
            self._next_log = now + self._LOG_EVERY_SECONDS
            self._log()

    def end(self) -> None:
        """Leave the last state standing."""
        if self._rewrites:
            _tell("\n")
        elif self._text != self._logged:
            self._log()

    def _log(self) -> None:
        self._logged = self._text
        say(self._text)

    def _speed(self, pictures: int, now: float) -> str:
        assert self._start is not None
        pictures_before, before = self._start
        if pictures == pictures_before:
            return ""  # the first block pays for the start and says nothing about speed
        rate = (pictures - pictures_before) / (now - before)
        return f", {rate:.1f} frames a second, {rate / self._frame_rate:.1f} times real time"
