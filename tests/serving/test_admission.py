"""Whether another stream is taken: by number, speed and memory."""

import threading
from types import SimpleNamespace

import pytest
import torch

from longtake.cli.serve import _memory_for
from longtake.generation import take
from longtake.plan import bytes_of_stream, umt5_parameters
from longtake.recipes import recipe_named
from longtake.serving.admission import Busy, Limits, Memory, has_room, retry_seconds
from longtake.serving.session import Over
from longtake.serving.worker import Worker
from tests import tiny
from tests.serving.fake import FakeEngine, FakeStream
from tests.serving.watching import asked, opened, watch

MANY = Limits(sessions=100)


def serving(engine, memory):
    worker = Worker(engine, MANY, memory=lambda wait: memory, exact=True, clock=engine.clock)
    asked(worker, worker.warm_up("a ball"))
    return worker


def bytes_of(stream=0, block=0, prompt=0, free=0):
    return Memory(stream=stream, block=block, prompt=prompt, free=lambda: free)


def test_streams_are_taken_as_far_as_memory_goes():
    engine = FakeEngine(block_seconds=0.001)
    worker = serving(engine, bytes_of(stream=10, block=30, prompt=20, free=100))  # of which 90 hold six and a block
    worker.foresee()
    worker.step()
    sessions = [opened(worker) for _ in range(6)]
    with pytest.raises(Busy, match=r"busy, try in 10 s"):
        worker.admit("a ball")
    worker.close(sessions[0])
    opened(worker)


def test_until_it_is_known_what_streams_take_there_is_one():
    engine = FakeEngine(block_seconds=0.001)
    worker = serving(engine, bytes_of(stream=10, free=100))
    opened(worker)
    with pytest.raises(Busy, match=r"busy, try in 3 s"):
        worker.admit("a ball")
    worker.foresee()
    worker.step()
    opened(worker)


def test_what_is_predicted_waits_while_a_block_is_made():
    """Else it takes the lock of Python from the thread of the device, thousands of times a block."""
    engine, waits = FakeEngine(), []

    def predicted(wait):
        waits.append(wait)
        return bytes_of()

    worker = serving(engine, lambda: None)
    worker._predict = predicted
    worker.foresee()
    (wait,) = waits
    assert wait(0)
    during, chunk = [], FakeStream.chunk
    session = opened(worker)
    session.stream.chunk = lambda seconds: during.append(wait(0)) or chunk(session.stream, seconds)
    worker.step()
    assert during == [False] and wait(0)


def test_a_server_that_ends_does_not_wait_for_what_is_predicted():
    engine = FakeEngine()
    worker, asks = serving(engine, None), iter([True, True, False])
    worker._predict = lambda wait: [wait() for _ in range(9)]
    with pytest.raises(Over):
        worker.foresee(lambda: next(asks))
    assert not list(asks) and worker._memory is None and not worker._foreseen


def test_what_is_free_is_asked_for_again_and_again_and_what_our_streams_hold_counts_as_theirs():
    engine, free = FakeEngine(block_seconds=0.001), [100]
    worker = serving(engine, Memory(stream=20, block=0, prompt=0, free=lambda: free[0]))
    worker.foresee()
    first = opened(worker)
    state, kept = first.stream.state, torch.zeros(20, dtype=torch.uint8)
    first.stream.state = lambda: state() | {"memory": {"keys": kept}}
    free[0] = 30  # somebody else took the rest: 50 are free or ours, of which 45 hold two streams
    engine.clock.now += 2
    worker.step()
    second = worker.admit("a ball")
    worker.close(second)
    free[0] = 20
    assert worker.admit("a ball"), "it is looked at once a second"
    engine.clock.now += 2
    worker.step()
    with pytest.raises(Busy):
        worker.admit("a ball")


def test_memory_that_is_not_told_ends_no_stream_and_what_was_told_holds():
    """As when so many connect that no file can be opened, and what is free is read from one."""
    engine, free = FakeEngine(block_seconds=0.001), [100]
    worker = serving(engine, Memory(stream=20, block=0, prompt=0, free=free.pop))
    worker.foresee()
    sessions = [opened(worker)]
    for _ in range(3):
        engine.clock.now += 2
        worker.step()
    sessions += [opened(worker), opened(worker), opened(worker)]  # of 100, 90 hold four
    assert all(watch(worker, engine.clock, sessions, 3).values()) and not any(one.end for one in sessions)
    with pytest.raises(Busy):
        worker.admit("a ball")


def test_a_pass_over_several_takes_more():
    """Their blocks, and copies of what they keep."""
    memory = bytes_of(stream=10, block=20)
    assert memory.holds(7, 1, 100) and not memory.holds(8, 1, 100)
    assert memory.holds(3, 2, 100) and not memory.holds(4, 2, 100)


def test_one_prompt_is_read_at_a_time():
    memory = bytes_of(stream=10, prompt=60)
    assert memory.holds(3, 3, 100) and not memory.holds(4, 1, 100)


def test_a_first_stream_is_taken_whatever_it_takes():
    assert has_room(0, MANY, 5.0, lambda streams: False) and not has_room(1, MANY, 0.0, lambda streams: False)
    four = Limits(sessions=4)
    assert has_room(3, four, 0.0, lambda streams: True) and not has_room(4, four, 0.0, lambda streams: True)
    assert has_room(1, MANY, 0.4, lambda streams: True) and not has_room(1, MANY, 0.5, lambda streams: True)


@pytest.mark.parametrize("recipe", ["self_forcing_sink", "hybrid_forcing", "rolling_forcing"])
def test_what_a_stream_takes_is_predicted(recipe):
    """As much as one that really runs keeps: its prompt, memory and codec state."""
    engine = tiny.engine(tiny.rolling_recipe() if recipe == "rolling_forcing" else recipe_named(recipe))
    waits = []
    kept, block, prompt = bytes_of_stream(engine, lambda: waits.append(1))
    assert len(waits) > 1000  # so that other work can go first
    with engine.stream("a ball") as stream:
        for _ in range(9):
            next(stream)
        sizes = take.bytes_of(stream.state())
    real = sum(size for part, size in sizes.items() if part not in ("in_flight", "prompt_keys"))
    assert real <= kept <= 1.5 * real + 1_500_000  # the prompt is as long as UMT5's here
    assert 0 < block < umt5_parameters() < prompt  # its encoder comes to the device for a prompt alone
    assert all(parameter.device == torch.device("cpu") for parameter in engine.network.parameters())


def test_the_thread_that_predicts_has_no_team():
    """One that idles is enough to make blocks nearly half slower: more of OpenMP's threads than cores do not spin."""
    here, there = torch.get_num_threads(), set()
    torch.set_num_threads(here + 1)  # which threads that are yet to come begin with
    given = tiny.engine(), 2, lambda: there.add(torch.get_num_threads())
    thread = threading.Thread(target=_memory_for, args=given)
    thread.start()
    thread.join(60)
    assert there == {1} and torch.get_num_threads() == here + 1
    torch.set_num_threads(here)


def test_who_is_refused_is_told_a_longer_time_the_longer_it_takes_to_foresee():
    """Beside a stream that takes nearly all of the device's time."""
    engine = FakeEngine(block_seconds=0.001)
    worker = serving(engine, Memory(stream=1, block=0, prompt=0, free=lambda: 100))
    opened(worker)

    def hint():
        with pytest.raises(Busy) as busy:
            worker.admit("a ball")
        return busy.value.retry_seconds

    hints = []
    for _ in range(4):
        hints.append(hint())
        engine.clock.now += 2.5
    assert hints[0] == 3 and hints == sorted(hints) and 3 < hints[-1] <= 10
    worker.foresee()
    worker.step()
    assert worker.admit("a ball")


def test_who_is_refused_is_told_of_the_first_that_is_sure_to_be_over():
    def session(pictures=None, sent=0, paused_at=None):
        playback = SimpleNamespace(paused=paused_at is not None)
        return SimpleNamespace(pictures=pictures, sent=sent, playback=playback, paused_at=paused_at or 0.0)

    def told(*sessions):
        return retry_seconds(sessions, Limits(pause=300.0), 16, 1000.0)

    endless, paused, short = session(), session(paused_at=750.0), session(pictures=800, sent=320)
    assert told() == told(endless) == 10  # nobody knows
    assert told(endless, paused) == 50 and told(endless, short) == told(paused, short) == 30
    assert told(session(pictures=800, sent=800)) == told(session(paused_at=600.0)) == 1  # at once, or nearly


@pytest.mark.parametrize(("block_seconds", "seconds"), [(0.2, 10), (1.5, 20)])
def test_who_is_refused_is_told_when_a_video_is_over_at_the_devices_speed(block_seconds, seconds):
    """A block is .75 s of video."""
    engine = FakeEngine(block_seconds=block_seconds)
    worker = Worker(engine, Limits(sessions=1), clock=engine.clock)
    asked(worker, worker.warm_up("a ball"))
    opened(worker, pictures=160)
    with pytest.raises(Busy) as busy:
        worker.admit("a ball")
    assert busy.value.retry_seconds == pytest.approx(seconds, abs=1)
