"""Whether there is room for another stream: by number, by measured speed and by predicted memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from longtake.serving.session import Session

_LOAD = 0.9  # the share of the device's time, and of its memory, that may be promised


class Busy(Exception):
    """There is no room for another stream. retry_seconds: when asking again may help."""

    def __init__(self, retry_seconds: int) -> None:
        super().__init__(f"busy, try in {retry_seconds} s")
        self.retry_seconds = retry_seconds


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one viewer may take. All in seconds but sessions.

    ahead: of video made beyond what is played; at least two blocks. lead: of video that the viewer is given of these.
    stall: while something waits to be read, without a read or a message, until a session ends. pause: how long one may
    pause.
    """

    sessions: int = 4
    ahead: float = 2.0
    lead: float = 0.75
    stall: float = 60.0
    pause: float = 300.0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the device. stream: that each stream keeps at most. block: that making one of its blocks takes on top.
    prompt: that reading and taking one of its prompts does. free: that all streams have together."""

    stream: int
    block: int
    prompt: int
    free: int

    def holds(self, streams: int, together: int) -> bool:
        """Whether so many streams fit, so many of which are made in one pass."""
        copied = self.stream if together > 1 else 0  # a pass joins what several keep
        work = max(together * (self.block + copied), self.prompt)  # prompts are read one by one
        return streams * self.stream + work <= _LOAD * self.free


def has_room(streams: int, limits: Limits, share: float, memory: Memory | None, together: int) -> bool:
    """Whether another stream can be taken beside so many; a first one always, even where it is slow.

    share: seconds of the device that a second of video takes. memory: None where nothing is known of it. together: how
    many are made in one pass at most.
    """
    if not streams:
        return True
    count = streams + 1
    fits = memory is None or memory.holds(count, min(count, together))
    return count <= limits.sessions and count * share <= _LOAD and fits


def retry_seconds(sessions: Sequence[Session], limits: Limits, frame_rate: float, now: float) -> int:
    """Until the first session is sure to be over; a guess where none is."""
    left = [(one.pictures - one.sent) / frame_rate for one in sessions if one.pictures is not None]
    left += [one.paused_at + limits.pause - now for one in sessions if one.playback.paused]
    return max(1, round(min(left, default=10.0)))
