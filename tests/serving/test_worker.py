import gc
import itertools
import math
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from longtake.generation.script import follow, script_from
from longtake.serving.admission import Busy, Limits
from longtake.serving.worker import Worker
from tests import tiny
from tests.serving.fake import BLOCK, RATE, Clock, FakeEngine
from tests.serving.watching import asked, idle, opened, opening, watch


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def worker(engine):
    return Worker(engine, clock=engine.clock)


def test_a_stream_is_made_a_little_ahead_and_rests_until_it_is_watched(worker, engine):
    session = opened(worker)
    idle(worker)
    made = sum(len(frames) for frames in engine.kept)
    assert 0 < made / RATE <= worker.limits.ahead
    engine.clock.now += worker.limits.stall / 2
    assert not worker.step()  # nobody reads: nothing more is made
    watch(worker, engine.clock, [session], 10)
    shown = sum(len(frames) for frames in engine.kept)
    assert 10 <= shown / RATE <= 10 + 1 + worker.limits.ahead


def test_one_who_pauses_has_the_time_of_a_pause(worker, engine):
    session = opened(worker)
    idle(worker)
    worker.pause(session)
    engine.clock.now += worker.limits.pause - 1
    idle(worker)
    assert session.end == ""
    engine.clock.now += 2
    idle(worker)
    assert session.end == "stalled"


def test_one_viewer_has_every_block_in_order_and_never_waits(worker, engine):
    session = opened(worker)
    pieces = watch(worker, engine.clock, [session], 20)[session]
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    assert session.playback.misses == 0
    assert session.sent == sum(len(piece.frames) for piece in pieces)


def test_who_runs_dry_first_is_next(worker, engine):
    first, second = opened(worker), opened(worker)
    both = watch(worker, engine.clock, [first, second], 20)
    assert abs(len(both[first]) - len(both[second])) <= 1
    assert first.playback.misses == second.playback.misses == 0


def test_a_device_too_slow_for_all_is_shared_evenly():
    engine = FakeEngine(block_seconds=0.6)  # measured only once the streams are open
    worker = Worker(engine, clock=engine.clock)
    sessions = [opened(worker) for _ in range(3)]
    counts = [len(pieces) for pieces in watch(worker, engine.clock, sessions, 60).values()]
    assert max(counts) - min(counts) <= 1


def test_new_words_drop_what_was_made_and_not_shown(worker, engine):
    session = opened(worker, "old words")
    watch(worker, engine.clock, [session], 5)
    idle(worker)
    asked(worker, worker.redirect(session, "new words", "event-1"))
    pieces = watch(worker, engine.clock, [session], 3)[session]
    assert {engine.words_of(piece.frames) for piece in pieces} == {"new words"}
    assert [piece.events for piece in pieces] == [("event-1",)] + [()] * (len(pieces) - 1)


def test_a_change_is_told_of_when_it_is_seen_not_before():
    engine = FakeEngine(in_flight=4)
    worker = Worker(engine, clock=engine.clock)
    session = opened(worker)
    asked(worker, worker.redirect(session, "new words", "event-1"))
    pieces = watch(worker, engine.clock, [session], 6)[session]
    assert [piece.events for piece in pieces[:5]] == [(), (), (), ("event-1",), ()]
    asked(worker, worker.redirect(session, "a cut", "event-2", method="cut"))
    assert watch(worker, engine.clock, [session], 3)[session][0].events == ("event-2",)


def test_words_overtaken_unseen_are_told_of_with_the_next(worker, engine):
    session = opened(worker)
    for name in ("one", "two"):
        asked(worker, worker.redirect(session, f"words {name}", name))
        idle(worker)
    assert worker.read(session).events == ("one", "two")


def test_words_that_go_over_are_told_of_while_they_do(worker, engine):
    session = opened(worker)
    asked(worker, worker.redirect(session, "new words", "one", over=3, method="slerp"))
    shown = [(one.events, one.active, one.completed) for one in watch(worker, engine.clock, [session], 4)[session]]
    assert shown[:4] == [
        (("one",), ("one",), ()), ((), ("one",), ()), ((), ("one",), ("one",)), ((), (), ()),
    ]  # fmt: skip
    asked(worker, worker.redirect(session, "other words", "two", over=3))
    watch(worker, engine.clock, [session], 0.8)
    asked(worker, worker.redirect(session, "third words", "three"))
    piece = watch(worker, engine.clock, [session], 2)[session][0]
    assert (piece.events, piece.active) == (("three",), ("two", "three")) and set(piece.completed) == {"two", "three"}


def test_refused_words_change_nothing(worker, engine):
    session = opened(worker)
    idle(worker)
    with pytest.raises(ValueError, match="xyzzy"):
        asked(worker, worker.redirect(session, "xyzzy", "event-1"))
    piece = worker.read(session)
    assert piece.number == 0 and piece.events == () and session.prompt == "a ball"
    with pytest.raises(ValueError, match="xyzzy"):
        opened(worker, "xyzzy")
    assert worker.sessions() == [session]


def test_a_paused_viewer_gets_and_costs_nothing_and_goes_on_where_it_was(worker, engine):
    session = opened(worker)
    worker.pause(session)
    assert not worker.step() and not engine.kept
    worker.resume(session)
    before = watch(worker, engine.clock, [session], 5)[session]
    worker.pause(session)
    made = len(engine.kept)
    assert watch(worker, engine.clock, [session], 30)[session] == [] and len(engine.kept) == made
    worker.resume(session)
    after = watch(worker, engine.clock, [session], 5)[session]
    assert after[0].number == before[-1].number + 1
    assert session.playback.misses == 0


def test_a_length_is_kept_to_the_picture(worker, engine):
    session = opened(worker, pictures=50)
    pieces = watch(worker, engine.clock, [session], 10)[session]
    assert sum(len(piece.frames) for piece in pieces) == 50
    assert session.end == "done" and not engine.open_streams


def test_a_viewer_who_never_reads_is_let_go_and_disturbs_nobody(worker, engine):
    silent, other = opened(worker), opened(worker)
    watch(worker, engine.clock, [other], worker.limits.stall + 5)
    assert silent.end == "stalled" and other.end == ""
    assert other.playback.misses == 0
    assert len(engine.open_streams) == 1


def test_a_stream_that_fails_ends_alone(worker, engine):
    doomed, other = opened(worker, "explode"), opened(worker)
    pieces = watch(worker, engine.clock, [other, doomed], 5)
    assert doomed.failed and "out of memory" in doomed.end
    assert len(pieces[other]) > 5


def test_more_than_the_device_can_make_are_told_to_come_back():
    engine = FakeEngine(block_seconds=0.3)  # two fit 0.9 of 0.75 s, three do not
    worker = Worker(engine, clock=engine.clock)
    worker.warm_up("a ball")
    assert worker.step()
    assert worker.device_share == pytest.approx(0.4)
    opened(worker), opened(worker, pictures=64)
    with pytest.raises(Busy, match="busy, try in 4 s"):
        worker.admit("a ball")


def test_all_of_torchs_threads_are_the_devices_alone():
    """Whatever another thread sets before the device's has done any work, which is when torch looks."""
    engine, here, there = FakeEngine(), torch.get_num_threads(), []
    worker = Worker(engine, clock=engine.clock, threads=here + 1)
    opening = engine.stream

    def open_stream(*words, **options):
        other = threading.Thread(target=torch.set_num_threads, args=[here])
        other.start(), other.join()
        there.append(torch.get_num_threads())
        return opening(*words, **options)

    engine.stream = open_stream
    worker.start()
    worker.warm_up("a ball").result(timeout=10)
    worker.stop()
    assert set(there) == {here + 1} and torch.get_num_threads() == here
    torch.set_num_threads(here)  # for threads that are yet to come


def test_who_has_ended_is_not_told_of_a_block_that_failed_then(worker, engine):
    session = opened(worker)

    def fail_after_its_end(seconds):
        worker.close(session)
        raise RuntimeError("out of memory")

    session.stream.chunk = fail_after_its_end
    worker.step()
    assert session.end == "stopped" and not session.failed


def test_even_a_device_slower_than_real_time_serves_one():
    engine = FakeEngine(block_seconds=2.0)
    worker = Worker(engine, clock=engine.clock)
    worker.warm_up("a ball")
    assert worker.step()
    opened(worker)
    with pytest.raises(Busy):
        worker.admit("a ball")


def test_commands_do_not_keep_others_from_their_pictures(worker, engine):
    first, _ = opened(worker), opened(worker)
    for number in range(40):
        worker.redirect(first, f"words {number}", str(number))
    for _ in range(12):
        worker.step()
    assert len(engine.kept) >= 4


def test_limits_that_cannot_hold_are_refused(engine):
    with pytest.raises(ValueError, match=r"two blocks ahead, 1\.5 s"):
        Worker(engine, Limits(ahead=1.0))


def test_what_was_watched_can_be_made_again_by_a_script():
    """The page's "copy as command line": words at the start of the first piece that shows them, rounded down."""
    made, clock = tiny.engine(), Clock()
    worker = Worker(made, clock=clock)
    session = opened(worker, seed=3)
    pieces = watch(worker, clock, [session], 4)[session]
    asked(worker, worker.redirect(session, "a duck", "duck"))
    pieces += watch(worker, clock, [session], 3)[session]
    (at,) = (piece.start_seconds for piece in pieces if piece.events)
    script = script_from(f"a ball | {math.floor(at * 1e4) / 1e4}s: a duck")
    cues = script.by_block(made, 1000)
    with made.stream(cues[0].shown, seed=3) as stream:
        again = dict(enumerate(chunk.frames for chunk in itertools.islice(follow(stream, cues), pieces[-1].number + 1)))
    assert [piece.number for piece in pieces] != list(range(len(pieces)))  # some were dropped
    for piece in pieces:
        np.testing.assert_array_equal(piece.frames, again[piece.number])


def test_its_thread_serves_real_streams_bit_for_bit():
    """What viewers get is what the engine makes for one alone, whoever else is there."""
    made = tiny.engine()
    worker = Worker(made, Limits(ahead=1000.0, lead=999.0))
    worker.start()
    try:
        got, wake = {}, threading.Event()
        sessions = [
            opening(worker, seed=seed, pictures=45, changed=wake.set).result(20) for seed in (1, 2)
        ]  # fmt: skip
        while any(not session.end for session in sessions):
            for session in sessions:
                while (piece := worker.read(session)) is not None:
                    got.setdefault(session.seed, []).append(piece.frames)
            assert wake.wait(20)
            wake.clear()
    finally:
        worker.stop()
    for seed in (1, 2):
        with made.stream("a ball", seed=seed) as stream:
            alone = np.concatenate([next(stream).frames for _ in range(4)])
        np.testing.assert_array_equal(np.concatenate(got[seed]), alone[:45])


def test_memory_stays_as_it_is_however_long_a_stream_is_watched_and_steered():
    """Law 7, at full speed: what Python and torch hold of the host's memory, early and some 250 blocks later."""
    made, clock = tiny.engine(), Clock()
    worker = Worker(made, clock=clock)
    session = opened(worker)
    held = []
    for number in range(60):
        watch(worker, clock, [session], 4)
        asked(worker, worker.redirect(session, f"words {number % 5}", f"{number}"))
        if number == 5:
            gc.collect()
            tracemalloc.start()
        if number in (10, 59):
            gc.collect()
            tensors = sum(one.nbytes for one in gc.get_objects() if type(one) is torch.Tensor)
            held.append((tensors, tracemalloc.get_traced_memory()[0]))
    tracemalloc.stop()
    (tensors, python), (tensors_later, python_later) = held
    assert tensors_later <= tensors
    assert python_later - python < 49 * 2_000  # what it was told is remembered, and nothing else


class Sessions(RuleBasedStateMachine):
    """Viewers come, steer, keep, go back, pause, read and vanish in any order: what they were promised holds."""

    sessions, takes = Bundle("sessions"), Bundle("takes")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.engine = FakeEngine(self.clock)
        self.worker = Worker(self.engine, Limits(sessions=3, stall=20.0, pause=30.0), clock=self.clock)
        self.words: dict = {}
        self.seen: dict = {}
        self.events: dict = {}
        self.over: dict = {}
        self.going: dict = {}
        self.lines: dict = {}
        self.count = 0

    def done(self, future):
        for _ in range(100):
            if future.done():
                return future
            self.worker.step()
        raise AssertionError("a command was kept waiting for 100 steps")

    @rule(target=sessions, pictures=st.one_of(st.none(), st.integers(1, 100)))
    def open(self, pictures):
        try:
            session = self.done(opening(self.worker, "first", pictures=pictures)).result()
        except Busy as busy:
            assert len(self.worker.sessions()) > 0 and busy.retry_seconds >= 1
            return None
        self.words[session], self.seen[session], self.events[session] = "first", [], []
        self.going[session] = {}
        self.lines[session] = 0
        return session

    @rule(session=sessions, refused=st.booleans(), method=st.sampled_from(["slerp", "cut"]), over=st.integers(1, 4))
    def redirect(self, session, refused, method, over):
        if session is None:
            return
        self.count += 1
        words = f"{'xyzzy' if refused else 'words'} {self.count}"
        over = 1 if method == "cut" else over
        future = self.done(self.worker.redirect(session, words, str(self.count), over=over, method=method))
        if future.exception() is None:
            assert not refused
            self.words[session] = words
            self.events[session].append(str(self.count))
            self.over[str(self.count)] = over
        else:
            assert refused or session.end

    @rule(target=takes, session=sessions)
    def snapshot(self, session):
        if session is None:
            return None
        future = self.done(self.worker.snapshot(session))
        return None if session.end else (future.result(), self.words[session])

    @rule(session=sessions, kept=takes)
    def rewind(self, session, kept):
        if session is None or kept is None:
            return
        take, words = kept
        self.count += 1
        place = self.done(self.worker.rewind(session, take, str(self.count)))
        if place.exception() is not None:
            assert session.end
            return
        assert place.result().start_seconds * RATE == take.state["pictures"]
        self.words[session] = words
        self.lines[session] += 1
        self.seen[session] = [(self.lines[session], take.state["blocks"] - 1)]
        self.events[session].append(str(self.count))

    @rule(session=sessions)
    def reset(self, session):
        if session is None:
            return
        self.count += 1
        place = self.done(self.worker.reset(session, str(self.count)))
        if place.exception() is not None:
            assert session.end
            return
        assert place.result().start_seconds == 0 and session.prompt == self.words[session]
        self.lines[session] += 1
        self.seen[session] = [(self.lines[session], -1)]
        self.events[session].append(str(self.count))

    @rule(session=sessions)
    def pause(self, session):
        if session is not None:
            self.worker.pause(session)

    @rule(session=sessions)
    def resume(self, session):
        if session is not None:
            self.worker.resume(session)

    @rule(session=sessions)
    def read(self, session):
        if session is None:
            return
        paused, over = session.playback.paused, bool(session.end)
        piece = self.worker.read(session)
        if piece is None:
            return
        assert not paused and not over
        assert self.engine.words_of(piece.frames) == self.words[session], (
            "old words were shown after new ones were taken"
        )
        place = piece.line, piece.number
        assert piece.line == self.lines[session] and piece.words == self.words[session]
        assert not self.seen[session] or place > self.seen[session][-1]
        self.seen[session].append(place)
        going = self.going[session]
        for event in piece.events:
            assert self.events[session].pop(0) == event
            going[event] = piece.number
        assert set(piece.active) == going.keys()
        for event in piece.completed:
            overtaken = piece.events[-1:] not in ((), (event,))
            assert overtaken or piece.number == going[event] + self.over.get(event, 1) - 1
            del going[event]

    @rule(session=consumes(sessions))
    def vanish(self, session):
        """Never heard of again."""

    @rule(session=consumes(sessions))
    def close(self, session):
        if session is not None:
            self.worker.close(session)
            assert session.end and self.worker.read(session) is None

    @rule(steps=st.integers(1, 5))
    def work(self, steps):
        for _ in range(steps):
            self.worker.step()

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 3.0, 25.0]))
    def wait(self, seconds):
        self.clock.now += seconds

    @precondition(lambda self: self.worker.sessions())
    @rule()
    def nobody_comes_back(self):
        self.clock.now += 40.0
        for _ in range(200):
            if not self.worker.step():
                break
        self.clock.now += 40.0
        self.worker.step()
        for session in self.worker.sessions():
            assert session.stream is None or not session.made, "a viewer who has gone keeps a place"

    @invariant()
    def nothing_is_made_too_far_ahead(self):
        for session in self.worker.sessions():
            waiting = session.waiting / RATE
            assert waiting + session.playback.unseen(self.clock.now) <= self.worker.limits.ahead + 1e-9
            assert len(self.worker.sessions()) <= 3

    @invariant()
    def nobody_is_sent_more_than_a_block_beyond_the_lead(self):
        for session in self.worker.sessions():
            assert session.playback.unseen(self.clock.now) <= self.worker.limits.lead + BLOCK / RATE + 1e-9
            assert session.pictures is None or session.sent <= session.pictures

    def teardown(self):
        self.worker.stop()
        assert not self.engine.open_streams and not self.worker.sessions()


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
