"""What one viewer has been sent and has seen, by the server's clock."""


class Playback:
    """A viewer who plays in real time from the first pictures on, waits when there are no more, and may pause.

    All times are seconds of one clock that never goes back. sent: seconds of video handed over. dry_seconds: how long
    the viewer waited for pictures. misses: how often.
    """

    def __init__(self, now: float) -> None:
        self.sent = self.dry_seconds = 0.0
        self.misses = 0
        self.paused = self.started = False
        self._unseen = 0.0
        self._at = now

    def unseen(self, now: float) -> float:
        """Seconds of video that the viewer has and has not played yet."""
        return max(0.0, self._unseen - self._played_since(now))

    def dry_at(self, now: float) -> float:
        """When there is nothing left to play; in the past if that was so since. Who has begun nothing waits already."""
        return self._at + self._unseen if self._plays() or not self.started else now + self._unseen

    def send(self, seconds: float, now: float) -> None:
        self._settle(now)
        self.started = True
        self._unseen += seconds
        self.sent += seconds

    def pause(self, now: float) -> None:
        self._settle(now)
        self.paused = True

    def resume(self, now: float) -> None:
        self._settle(now)
        self.paused = False

    def _plays(self) -> bool:
        return self.started and not self.paused

    def _played_since(self, now: float) -> float:
        return now - self._at if self._plays() else 0.0

    def _settle(self, now: float) -> None:
        dry = self._played_since(now) - self._unseen
        if dry > 0:
            self.dry_seconds += dry
            self.misses += 1
        self._unseen = self.unseen(now)
        self._at = now
