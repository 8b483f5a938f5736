"""Blocks of several streams in one pass: only where it was measured to pay, and nobody waits the longer."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.generation.recording import Notes
from longtake.serving.admission import Limits, Memory
from longtake.serving.turns import PAYS, how_many, trial
from longtake.serving.worker import Worker
from tests import tiny
from tests.serving.fake import Clock, FakeEngine
from tests.serving.watching import asked, idle, opened, watch


def warm(engine, *, exact=False, sessions=4):
    worker = Worker(engine, Limits(sessions=sessions), exact=exact, clock=engine.clock)
    worker.warm_up("a ball")
    idle(worker)
    engine.passes.clear()
    return worker


def late(dry_at, ends):
    return sum(max(0.0, end - dry) for end, dry in zip(ends, dry_at, strict=False))


@given(
    dry_at=st.lists(st.floats(-5, 5), min_size=1, max_size=9).map(sorted),
    alone=st.floats(0.01, 2),
    gains=st.dictionaries(st.sampled_from([2, 4, 8]), st.floats(0.2, 0.89)),
)
def test_a_pass_makes_viewers_wait_no_longer_than_turns_would(dry_at, alone, gains):
    size = how_many(dry_at, 0.0, alone, gains)
    assert 1 <= size <= max(1, min(len(dry_at), max(gains, default=1)))
    if size > 1:
        gain = gains[max(one for one in gains if one <= size)]  # what was measured of fewer holds for some more
        assert late(dry_at, [size * alone * gain] * size) <= late(dry_at, [alone * turn for turn in range(1, size + 1)])
    if gains and all(dry > 8 * alone for dry in dry_at):  # nobody waits either way
        most = min(len(dry_at), max(gains))
        assert size == (most if most >= min(gains) else 1)


def test_who_would_run_dry_meanwhile_is_made_alone():
    assert how_many([1.5, 9.0], 0.0, 1.0, {2: 0.8}) == 1
    assert how_many([1.7, 9.0], 0.0, 1.0, {2: 0.8}) == 2
    assert how_many([0.0, 0.0], 0.0, 1.0, {2: 0.8}) == 1  # the first would see nothing for longer than both gain
    assert how_many([0.0, 0.0], 0.0, 1.0, {2: 0.6}) == 2
    assert how_many([9.0] * 3, 0.0, 1.0, {4: 0.6}) == 1  # of so few nothing was measured


@pytest.mark.parametrize(("gain", "sizes"), [(0.5, [2, 4, 8]), (PAYS, []), (1.2, [])])
def test_a_trial_finds_what_pays(gain, sizes):
    engine, gains = FakeEngine(gain=gain), {}
    assert all(len(engine.open_streams) > 1 for _ in trial(engine, "a ball", 9, gains)) and not engine.open_streams
    assert list(gains) == sizes and all(found == pytest.approx(gain) for found in gains.values())


@pytest.mark.parametrize("slow", range(6))
def test_a_trial_takes_the_best_of_its_rounds(slow):
    """Whichever of its blocks something else held up, one by one or together."""
    engine, gains = FakeEngine(gain=0.5), {}
    for number, _ in enumerate(trial(engine, "a ball", 2, gains), -1):  # the first fills memories
        engine.block_seconds = 2.0 if number == slow else 0.2
    assert gains == {2: pytest.approx(0.5)}


def test_a_trial_measures_full_memories():
    engine = FakeEngine(gain=0.5)
    engine.blocks_until_full = 5
    gains = {}
    left_at = [engine.clock.now for _ in trial(engine, "a ball", 2, gains)]
    assert gains == {2: pytest.approx(0.5)} and engine.passes == [2] * (5 + 2)
    assert max(after - before for before, after in pairwise(left_at)) <= engine.block_seconds + 1e-9, "a pass at a time"


def test_a_trial_that_fails_finds_nothing_and_ends_nothing():
    engine, gains = FakeEngine(gain=0.5), {}
    assert len([*trial(engine, "explode", 4, gains)]) == 1 and gains == {} and not engine.open_streams
    worker = Worker(engine, clock=engine.clock)
    worker.warm_up("a ball")
    engine.next_together = lambda streams: {}["a recipe that cannot"]
    idle(worker)
    assert len(watch(worker, engine.clock, [session := opened(worker)], 5)[session]) > 5


def test_who_comes_during_a_trial_waits_for_one_pass_at_most_and_what_it_found_stays():
    engine = FakeEngine(gain=0.5)
    worker = Worker(engine, Limits(sessions=8), clock=engine.clock)
    worker.warm_up("a ball")
    while len(engine.open_streams) < 4:  # of two it is known
        assert worker.step()
    session, began = opened(worker), engine.clock.now
    assert engine.open_streams == {session.stream}
    while worker.read(session) is None:
        worker.step()
    assert engine.clock.now - began <= engine.block_seconds + 1e-9
    worker.close(session)
    idle(worker)
    assert list(worker.gains) == [2, 4, 8] and engine.passes.count(2) == 3 and not engine.open_streams


@pytest.mark.parametrize("viewers", [1, 2])
def test_a_server_that_is_never_empty_finishes_its_trial_and_nobody_waits_for_it(viewers):
    engine = FakeEngine(gain=0.5)
    worker = Worker(engine, Limits(sessions=4), clock=engine.clock)
    worker.warm_up("a ball")
    sessions = [opened(worker) for _ in range(viewers)]
    watch(worker, engine.clock, sessions, 60)
    assert list(worker.gains) == [2, 4] and {one.stream for one in sessions} == engine.open_streams
    assert [one.playback.misses for one in sessions] == [0] * viewers


def test_where_there_is_no_slack_or_no_room_or_graphs_are_recorded_a_trial_waits_for_an_empty_server():
    def tried(engine, memory=None):
        worker = Worker(engine, Limits(sessions=2), memory=memory and (lambda wait: memory), clock=engine.clock)
        asked(worker, worker.warm_up("a ball"))
        worker.foresee()
        session = opened(worker)
        watch(worker, engine.clock, [session], 30)
        found = dict(worker.gains)
        worker.close(session)
        idle(worker)
        return found, list(worker.gains)

    def memory(free):
        return Memory(stream=10, block=0, prompt=0, free=lambda: free)

    fused = FakeEngine(gain=0.5)
    fused.fused = True
    assert tried(FakeEngine(gain=0.5)) == tried(FakeEngine(gain=0.5), memory(70)) == ({2: pytest.approx(0.5)}, [2])
    assert tried(FakeEngine(gain=0.5, block_seconds=0.5)) == tried(FakeEngine(gain=0.5), memory(50)) == ({}, [2])
    assert tried(fused) == ({}, [2])
    assert tried(FakeEngine(gain=0.5), memory(40)) == ({}, [])  # two, and copies of what they keep, never fit


def test_a_pass_that_would_keep_whoever_comes_waiting_is_not_tried():
    engine = FakeEngine(gain=0.5, block_seconds=0.4)
    worker = warm(engine, sessions=8)
    assert list(worker.gains) == [2, 4]  # eight would take longer than a second


def test_a_worker_that_stops_ends_its_trial():
    engine = FakeEngine(gain=0.5)
    worker = Worker(engine, clock=engine.clock)
    worker.warm_up("a ball")
    worker.step(), worker.step()
    assert engine.open_streams
    worker.stop()
    assert not engine.open_streams


def test_streams_that_want_a_block_anyway_share_a_pass_and_each_has_its_own():
    engine = FakeEngine(gain=0.5)
    worker = warm(engine)
    sessions = [opened(worker, f"words {number}") for number in range(3)]
    got = watch(worker, engine.clock, sessions, 20)
    assert engine.passes and set(engine.passes) <= {2, 3}
    for session, pieces in got.items():
        assert {engine.words_of(piece.frames) for piece in pieces} == {session.prompt}
        assert [piece.number for piece in pieces] == list(range(len(pieces)))
        assert session.playback.misses == 0


@pytest.mark.parametrize(("gain", "exact"), [(0.5, True), (0.95, False)])
def test_where_it_does_not_pay_or_is_forbidden_each_is_made_alone(gain, exact):
    engine = FakeEngine(gain=gain)
    worker = warm(engine, exact=exact)
    sessions = [opened(worker) for _ in range(3)]
    watch(worker, engine.clock, sessions, 10)
    assert engine.passes == [] and not any(session.stream.in_company for session in sessions)


def test_more_streams_are_taken_once_passes_save_time():
    engine = FakeEngine(gain=0.4)
    worker = warm(engine)
    sessions = [opened(worker), opened(worker), opened(worker)]
    before = worker.device_share
    watch(worker, engine.clock, sessions, 30)
    assert worker.device_share < 0.7 * before


def test_nobody_is_overtaken_by_a_pass():
    """Not by a stream that could go along with the first, but runs dry later."""
    engine = FakeEngine(gain=0.6)
    worker = warm(engine)
    sessions = [opened(worker) for _ in range(3)]
    for session in sessions:
        session.stream.blocks = 5
        session.made.clear()
    sessions[1].stream.blocks = 1  # of another phase
    now = engine.clock.now + 1
    for session, seconds in zip(sessions, (1.0, 1.1, 1.2), strict=True):
        session.playback.send(seconds, now)
    assert worker._next(now) == sessions[:1]
    sessions[1].stream.blocks = 5
    assert worker._next(now) == sessions


def test_how_long_a_block_takes_alone_is_not_learned_from_company():
    engine = FakeEngine(gain=0.4)
    worker = warm(engine)
    watch(worker, engine.clock, [opened(worker), opened(worker)], 30)
    assert engine.passes and worker._alone_share == pytest.approx(0.2 / worker.block_seconds)


@pytest.mark.parametrize("guilty", [False, True])
def test_a_decoder_that_fails_for_several_is_asked_for_each_in_its_turn(guilty):
    """As for want of memory; guilty: it fails for one alone, too."""
    made, clock = tiny.engine(), Clock()
    worker = Worker(made, clock=clock)
    worker.gains = {2: 0.5}
    sessions = [opened(worker, seed=seed) for seed in (1, 2)]
    doomed, other = sessions
    got = watch(worker, clock, sessions, 3)
    decode, failed = made.codec.decode, []

    def fail(latents, state):
        its_own = guilty and failed and not failed[1:]  # of the first in turn
        if len(latents) > 1 or its_own:
            failed.append(len(latents))
            raise RuntimeError("out of memory")
        return decode(latents, state)

    made.codec.decode = fail
    more = watch(worker, clock, sessions, 5)
    assert failed == ([2, 1] if guilty else [2]) and worker.gains == {}
    ends = [session.end for session in (doomed, other)]
    assert sorted(ends) == (["", "RuntimeError: out of memory"] if guilty else ["", ""])
    for session in sessions:
        if not session.end:
            pieces = got[session] + more[session]
            with made.stream("a ball", seed=session.seed) as stream:
                alone = [next(stream) for _ in pieces]
            assert [piece.number for piece in pieces] == [chunk.index for chunk in alone]
            for piece, chunk in zip(pieces, alone, strict=True):
                assert np.abs(piece.frames.astype(int) - chunk.frames).max() <= 1
            assert len(more[session]) > 3


def test_a_pass_that_fails_ends_only_the_stream_that_fails_alone():
    engine = FakeEngine(gain=0.5)
    worker = warm(engine)
    doomed, other = opened(worker), opened(worker)
    watch(worker, engine.clock, [other, doomed], 5)
    assert set(engine.passes) == {2}
    worker.pause(doomed)  # so that it makes none alone meanwhile
    asked(worker, worker.redirect(doomed, "explode", "event"))
    worker.resume(doomed)
    engine.clock.now += 5  # both have played away what they had
    pieces = watch(worker, engine.clock, [other, doomed], 5)
    assert doomed.failed and not other.end and len(pieces[other]) > 5
    assert worker.gains == {}


def test_a_record_says_that_a_stream_had_company_and_so_does_what_goes_on_from_it():
    made, clock = tiny.engine(), Clock()
    worker = Worker(made, clock=clock)
    worker.gains = {2: 0.5}
    one, other = opened(worker), opened(worker, seed=2)
    worker.remember(one)
    assert not worker.lines(one)[0].in_company
    watch(worker, clock, [one, other], 4)
    worker.remember(one)
    (line,) = worker.lines(one).values()
    notes = Notes()
    notes.show(0, 0, 9, "a ball")
    assert notes.record(made, {0: line})["live"]["lines"][0]["in_company"] is True
    assert asked(worker, worker.snapshot(one)).resume(made).in_company
    assert not made.stream("a ball").in_company


@pytest.mark.parametrize("exact", [False, True])
def test_what_viewers_get_is_what_each_is_alone(exact):
    """In company but for rounding, one step of 255 here; exact, to the bit."""
    made, clock = tiny.engine(), Clock()
    worker = Worker(made, exact=exact, clock=clock)
    worker.gains = {} if exact else {2: 0.5}
    sessions = [opened(worker, seed=seed) for seed in (1, 2)]
    got = watch(worker, clock, sessions, 8)
    for session, pieces in got.items():
        assert session.stream.in_company != exact and len(pieces) > 8
        with made.stream("a ball", seed=session.seed) as stream:
            for piece in pieces:
                alone = next(stream).frames
                assert np.abs(piece.frames.astype(int) - alone).max() <= (0 if exact else 1)
