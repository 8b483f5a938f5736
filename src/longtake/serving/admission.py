"""Whether there is room for another stream: by number, by measured speed and by predicted memory."""

from collections.abc import Callable, Sequence
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
    lead: float = 1.0
    stall: float = 60.0
    pause: float = 300.0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the device. stream: that each stream keeps at most. block: that making one of its blocks takes on top.
    prompt: that reading and taking one of its prompts does. free: asks how many nothing holds now."""

    stream: int
    block: int
    prompt: int
    free: Callable[[], int]

    def holds(self, streams: int, together: int, room: int) -> bool:
        """Whether so many streams fit, so many of which are made in one pass. room: what is free, or theirs."""
        copied = self.stream if together > 1 else 0  # a pass joins what several keep
        work = max(together * (self.block + copied), self.prompt)  # prompts are read one by one
        return streams * self.stream + work <= _LOAD * room


def has_room(streams: int, limits: Limits, share: float, holds: Callable[[int], bool]) -> bool:
    """Whether another stream can be taken beside so many; a first one always, even where it is slow.

    share: seconds of the device that a second of video takes. holds: whether memory does for so many.
    """
    count = streams + 1
    return not streams or (count <= limits.sessions and count * share <= _LOAD and holds(count))


def retry_seconds(
    sessions: Sequence[Session], limits: Limits, frame_rate: float, now: float, slower: float = 1.0
) -> int:  # fmt: skip
    """Until the first session is sure to be over; a guess where none is. slower: seconds that one of video takes."""
    left = [slower * (one.pictures - one.sent) / frame_rate for one in sessions if one.pictures is not None]
    left += [one.paused_at + limits.pause - now for one in sessions if one.playback.paused]
    return max(1, round(min(left, default=10.0)))
