import pytest

from longtake.serving.playback import Playback


def test_pictures_are_played_in_real_time_and_waiting_is_counted():
    playback = Playback(0.0)
    assert playback.unseen(5.0) == 0 and playback.dry_at(5.0) == 0  # nothing begun: it waits since it came
    playback.pause(6.0)
    assert playback.dry_at(8.0) == 6.0  # paused or not
    playback.resume(9.0)
    playback.send(2.0, 10.0)
    assert playback.unseen(10.5) == 1.5 and playback.dry_at(10.5) == 12.0
    playback.send(1.0, 14.0)  # two seconds late
    assert (playback.dry_seconds, playback.misses) == (2.0, 1)
    assert playback.unseen(14.25) == 0.75 and playback.sent == 3.0
    playback.send(1.0, 15.5)
    assert (playback.dry_seconds, playback.misses, playback.sent) == (2.5, 2, 4.0)


def test_nothing_is_played_while_paused():
    playback = Playback(0.0)
    playback.send(2.0, 0.0)
    playback.pause(0.5)
    assert playback.unseen(100.0) == 1.5 and playback.dry_at(100.0) == 101.5
    playback.resume(100.0)
    assert playback.unseen(101.0) == pytest.approx(0.5)
    assert playback.misses == 0
