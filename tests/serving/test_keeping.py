"""Snapshots, rewinds, forks and recordings: by the worker, in the store, and as they are made again."""

import json
from random import Random

import numpy as np
import pytest

from longtake.generation.recording import Notes, Remade
from longtake.generation.take import Take
from longtake.media.mp4 import Mp4Writer, count_frames, first_difference, read_record
from longtake.recipes import recipe_named
from longtake.serving.recorder import Recorder
from longtake.serving.session import Over
from longtake.serving.store import Full, Store
from longtake.serving.worker import Worker
from tests import tiny
from tests.serving.fake import Clock
from tests.serving.watching import asked, idle, opened, opening, watch

SIZE = 1000


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "kept")
    yield store
    store.close()


def numbers(pieces):
    return [piece.number for piece in pieces]


def same(pieces, others):
    assert numbers(pieces) == numbers(others)
    for one, other in zip(pieces, others, strict=True):
        np.testing.assert_array_equal(one.frames, other.frames)


def test_a_rewound_stream_shows_the_same_again(clock):
    worker = Worker(tiny.engine(), clock=clock)
    session = opened(worker, seed=3)
    watch(worker, clock, [session], 2)
    idle(worker)
    take = asked(worker, worker.snapshot(session))
    waiting = len(session.made)
    first = watch(worker, clock, [session], 4)[session][waiting:]
    place = asked(worker, worker.rewind(session, take, "back"))
    second = watch(worker, clock, [session], 4)[session]
    assert place.start_seconds == second[0].start_seconds == first[0].start_seconds
    assert [piece.events for piece in second] == [("back",)] + [()] * (len(second) - 1)
    assert {piece.line for piece in first} == {0} and {piece.line for piece in second} == {1}
    count = min(len(first), len(second))
    assert count > 2
    same(first[:count], second[:count])


def test_a_stream_that_is_reset_is_the_one_that_its_words_and_seed_begin(clock):
    worker = Worker(tiny.engine(), clock=clock)
    session = opened(worker, seed=3)
    watch(worker, clock, [session], 2)
    asked(worker, worker.redirect(session, "a duck", "duck"))  # taken, and never seen
    before = session.stream
    assert asked(worker, worker.reset(session, "anew")).start_seconds == 0
    assert before.closed and not session.made
    pieces = watch(worker, clock, [session], 3)[session]
    assert [piece.events for piece in pieces] == [("duck", "anew")] + [()] * (len(pieces) - 1)
    assert {piece.line for piece in pieces} == {1} and {piece.words for piece in pieces} == {"a duck"}
    other = opened(worker, "a duck", seed=3)
    same(pieces, watch(worker, clock, [other], 3)[other][: len(pieces)])
    worker.close(session)
    with pytest.raises(Over):
        asked(worker, worker.reset(session, "late"))


def test_a_fork_goes_on_as_its_origin_does_and_leaves_it_alone(clock):
    worker = Worker(tiny.engine(), clock=clock)
    session = opened(worker, seed=3)
    idle(worker)
    take = asked(worker, worker.snapshot(session))
    asked(worker, worker.redirect(session, "a duck", "duck"))
    twin, other = opened(worker, "", take=take), opened(worker, "a cat", take=take)
    assert (twin.prompt, twin.seed, other.prompt) == ("a ball", 3, "a cat")
    asked(worker, worker.rewind(session, take, "back"))
    assert session.prompt == "a ball"
    pieces = watch(worker, clock, [session, twin], 4)
    same(pieces[session], pieces[twin])


def test_words_are_those_that_blocks_in_flight_were_begun_under(clock):
    """Of a stream that rolls: after a rewind to a take that was made between new words and their first block too."""
    worker = Worker(tiny.engine(tiny.rolling_recipe()), clock=clock)
    session = opened(worker)
    watch(worker, clock, [session], 3)
    idle(worker)
    asked(worker, worker.redirect(session, "a duck", "duck"))
    take = asked(worker, worker.snapshot(session))
    older = len(take.state["in_flight"])
    assert older == 2
    watch(worker, clock, [session], 5)
    asked(worker, worker.rewind(session, take, "back"))
    pieces = watch(worker, clock, [session], 5)[session]
    assert [piece.words for piece in pieces[: older + 1]] == ["a ball"] * older + ["a duck"]
    assert (pieces[0].number, pieces[0].events) == (take.state["blocks"], ("back",))


def test_a_snapshot_of_another_model_is_refused_and_changes_nothing(clock):
    worker = Worker(tiny.engine(), clock=clock)
    session = opened(worker)
    strange = Take({**asked(worker, worker.snapshot(session)).made_with, "weights": "other"}, {})
    with pytest.raises(ValueError, match="weights other"):
        asked(worker, worker.rewind(session, strange, "back"))
    with pytest.raises(ValueError, match="weights other"):
        opened(worker, "", take=strange)
    assert worker.sessions() == [session]
    pieces = watch(worker, clock, [session], 2)[session]
    assert numbers(pieces) == list(range(len(pieces))) and pieces[0].line == 0


def test_what_is_over_is_told_apart_from_what_is_wrong(clock):
    worker = Worker(tiny.engine(), clock=clock)
    waiting = opening(worker)
    worker.close(worker.sessions()[0])
    with pytest.raises(Over):
        asked(worker, waiting)
    session = opened(worker)
    worker.close(session)
    with pytest.raises(Over):
        asked(worker, worker.snapshot(session))


@pytest.mark.parametrize("recipe", ["self_forcing_sink", "rolling_forcing", "infinity_rope"])
def test_what_was_seen_is_made_again_from_its_record(recipe, clock, store):
    """Words, cuts, rewinds, resets and forks at random, recorded from anywhere on: to the bit."""
    random = Random(recipe)
    made = tiny.engine(tiny.rolling_recipe() if recipe == "rolling_forcing" else recipe_named(recipe))
    worker = Worker(made, clock=clock)
    origin = opened(worker, seed=5)
    watch(worker, clock, [origin], 1)
    takes = [asked(worker, worker.snapshot(origin))]
    worker.close(origin)
    session = opened(worker, "a cat", take=takes[0])
    watch(worker, clock, [session], 1)
    asked(worker, worker.rewind(session, takes[0], "before"))
    worker.remember(session)
    notes, shown = Notes(), []
    steps = ["snapshot", "rewind", "redirect", "blend", "snapshot", "reset", "cut", "rewind"]
    for number in range(11):
        for piece in watch(worker, clock, [session], random.choice([0.2, 1.0, 2.0]))[session]:
            begin = round(piece.start_seconds * made.frame_rate)
            notes.show(piece.line, begin, len(piece.frames), piece.words)
            shown.append(piece.frames)
        do = steps[number] if number < len(steps) else random.choice(["rewind", "cut", "reset"])
        if do == "snapshot":
            takes.append(asked(worker, worker.snapshot(session)))
        elif do == "rewind":
            asked(worker, worker.rewind(session, takes[-1], f"{number}"))
        elif do == "reset":
            asked(worker, worker.reset(session, f"{number}"))
        else:
            how = {"redirect": {}, "blend": {"over": 5, "method": "slerp"}, "cut": {"method": "cut"}}[do]
            asked(worker, worker.redirect(session, f"words {number}", f"{number}", **how))
    record = json.loads(json.dumps(notes.record(made, worker.lines(session))))
    assert len(record["live"]["lines"]) > 1 and len(record["live"]["spans"]) > 2
    whole = np.concatenate(shown)
    again, count = [], 0
    with Remade(made, record) as stream:
        while count < len(whole):
            again.append(next(stream).frames)
            count += len(again[-1])
        np.testing.assert_array_equal(np.concatenate(again), whole)
        with pytest.raises(ValueError, match="no more pictures"):
            next(stream)


def test_a_recording_says_when_words_changed(clock, store, tmp_path):
    made = tiny.engine()
    worker = Worker(made, clock=clock)
    session = opened(worker, seed=3)
    watch(worker, clock, [session], 3)
    worker.remember(session)
    recorder = Recorder(store, made)
    pieces = watch(worker, clock, [session], 2)[session]
    asked(worker, worker.redirect(session, "a duck", "duck"))
    seen = sum(len(piece.frames) for piece in pieces)
    pieces += watch(worker, clock, [session], 2)[session]
    for piece in pieces:
        recorder.write(piece)
    kept = recorder.finish(worker.lines(session))
    recorder.write(pieces[0])  # one that was on its way changes nothing
    record = read_record(kept.path)
    assert record["prompts"] == [
        {"at": 0, "unit": "seconds", "prompt": "a ball"},
        {"at": seen / 16, "unit": "seconds", "prompt": "a duck"},
    ]
    shown = np.concatenate([piece.frames for piece in pieces])
    assert record["seconds"] == len(shown) / 16 and count_frames(kept.path) == len(shown)
    with Mp4Writer(tmp_path / "generated.mp4", made.width, made.height, made.frame_rate) as writer:
        writer.write(shown)
    assert first_difference(kept.path, tmp_path / "generated.mp4") is None  # so that `replay` can compare the two
    assert [file.name for file in store.kept("mp4")] == [kept.name]
    assert [path.name for path in store.folder.iterdir()] == [kept.path.name]


def test_on_a_full_disk_what_was_recorded_is_kept(clock, store, monkeypatch):
    def full(source, target, comment):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longtake.serving.recorder.copy_with_comment", full)
    made = tiny.engine()
    worker = Worker(made, clock=clock)
    session = opened(worker)
    worker.remember(session)
    recorder = Recorder(store, made)
    pieces = watch(worker, clock, [session], 2)[session]
    for piece in pieces:
        recorder.write(piece)
    kept = recorder.finish(worker.lines(session))
    assert kept is not None and count_frames(kept.path) == sum(len(piece.frames) for piece in pieces)
    assert [path.name for path in store.folder.iterdir()] == [kept.path.name]


def test_a_recording_of_nothing_leaves_nothing(store):
    assert Recorder(store, tiny.engine()).finish({}) is None
    assert not list(store.folder.iterdir()) and not store.kept("mp4")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda live: live.pop("lines"),
        lambda live: live["lines"].clear(),
        lambda live: live["lines"][0].pop("seed"),
        lambda live: live["lines"][0].update(seed="one"),
        lambda live: live["lines"][0]["told"].clear(),
        lambda live: live["lines"][0]["told"][0].update(verb="cut"),
        lambda live: live["lines"][0]["told"].append(live["lines"][0]["told"][0]),
        lambda live: live["lines"][0]["told"].append({**live["lines"][0]["told"][0], "verb": "redirect", "far": 1.0}),
        lambda live: live["spans"].append([1, 0, 5]),
        lambda live: live["spans"].append([0, 5, 5]),
        lambda live: live["spans"].clear(),
        lambda live: live.update(spans=7),
    ],
)
def test_a_record_that_cannot_be_read_is_refused(spoil):
    told = {"verb": "begin", "prompts": ["a"], "block": 0, "picture": 0, "far": None, "in_flight": None}
    live = {"lines": [{"seed": 1, "told": [told]}], "spans": [[0, 0, 9]]}
    Remade(tiny.engine(), {"live": live})
    spoil(live)
    with pytest.raises(ValueError, match="cannot be read"):
        Remade(tiny.engine(), {"live": live})


# The store


def put(store, kind="take", size=SIZE):
    with store.new(kind, size) as name:
        store.place(name, kind).write_bytes(bytes(size))
    return store.find(name, kind)


def test_what_is_kept_outlives_the_store_and_leftovers_do_not(tmp_path):
    folder = tmp_path / "kept"
    store = Store(folder)
    kept = put(store)
    (folder / "mine.take").write_text("not the server's")
    (folder / f"{'0' * 32}.take.part").write_text("half")
    (folder / f"{'0' * 32}.raw.part.mp4").write_text("half")
    with pytest.raises(OSError, match="another server"):
        Store(folder)
    store.close()
    again = Store(folder)
    assert again.find(kept.name, "take") == kept and again.kept("take") == [kept]
    assert sorted(path.name for path in folder.iterdir()) == sorted([kept.path.name, "mine.take"])
    assert again.find("mine", "take") is None and again.find(kept.name, "mp4") is None
    assert again.remove(kept.name, "take") and not again.remove(kept.name, "take")
    assert [path.name for path in folder.iterdir()] == ["mine.take"]
    again.close()


def test_without_a_folder_nothing_is_left():
    store = Store()
    put(store)
    folder = store.folder
    assert folder.exists() and not store.lasts
    store.close()
    store.close()
    assert not folder.exists()


def test_a_store_is_bounded_in_number_and_bytes(tmp_path):
    store = Store(tmp_path, most=3, most_bytes=5 * SIZE)
    one = put(store), put(store)
    with pytest.raises(Full, match="GiB"):
        put(store, size=4 * SIZE)
    with store.new("mp4") as growing:
        store.grow(growing, 3 * SIZE)
        with pytest.raises(Full):
            store.grow(growing, 4 * SIZE)
        with pytest.raises(Full, match="3 snapshots"):
            put(store)
    assert store.find(growing, "mp4") is None  # nothing was written
    store.remove(one[0].name, "take")
    put(store, size=3 * SIZE)
    one[1].path.unlink()  # by hand
    put(store, size=2 * SIZE)
    assert store.find(one[1].name, "take") is None and one[1] not in store.kept("take")
    store.close()


@pytest.mark.parametrize("name", ["../secret", "..", "", "/etc/passwd", "secret.take"])
def test_no_text_of_a_client_reaches_the_file_system(tmp_path, name):
    (tmp_path / "secret.take").write_text("hidden")
    folder = tmp_path / "kept"
    store = Store(folder)
    assert store.find(name, "take") is None and not store.remove(name, "take")
    assert (tmp_path / "secret.take").exists()
    store.close()
