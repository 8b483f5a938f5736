"""Prompts over time: every format that is read, when a prompt begins, and a stream that follows."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests import tiny

from longtake.generation import rolling
from longtake.generation.script import (
    Cue,
    Script,
    follow,
    read_scripts,
    record_of,
    script_from,
    script_in,
    slug,
    whole_blocks,
)

ENGINE = tiny.engine()  # blocks of 3 latent frames: 9 pictures, then 12 each, 16 a second
ROLLING = tiny.engine(tiny.rolling_recipe())  # 3 blocks in flight
TEN_SECONDS = 160


def told(script: Script) -> list[tuple]:
    return [(cue.shown, cue.at, cue.unit) for cue in script.cues]


def read(folder: Path, name: str, text: str) -> list[Script]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_scripts(path)


# on the command line

NOT_IN_A_ROW = ["[0s:5s] a [3s:8s] b", "[0s:5s] a [10s:12s] b", "[0s:5s] a [5:9] b", "[0s:0s] a"]


@pytest.mark.parametrize(
    "text, cues",
    [
        ("a red ball", [("a red ball", 0, "seconds")]),
        ("a ratio of 5: 3", [("a ratio of 5: 3", 0, "seconds")]),
        ("0s: a ball | 5s: it snows", [("a ball", 0, "seconds"), ("it snows", 5, "seconds")]),
        ("a ball|2.5 s : it snows", [("a ball", 0, "seconds"), ("it snows", 2.5, "seconds")]),
        ("a | b", [("a", 0, "of the video"), ("b", 0.5, "of the video")]),
        ("[0s:5s] a [5s:9s] b", [("a", 0, "seconds"), ("b", 5, "seconds")]),
        ("cat: [0%:25%] sits [25%:99%] runs", [("cat: sits", 0, "of the video"), ("cat: runs", 0.25, "of the video")]),
        ("[0:40] a [40:81] b", [("a", 0, "pictures"), ("b", 40, "pictures")]),
        ("[0:5s] a", [("a", 0, "seconds")]),
    ],
)
def test_inline_scripts(text, cues) -> None:
    assert told(script_from(text)) == cues


def test_spans_tell_the_length() -> None:
    assert script_from("[0s:5s] a [5s:9.5s] b").lasts(16) == 9.5
    assert script_from("[0:40] a [40:84] b").lasts(16) == 5.25
    assert script_from("[0%:50%] a [50%:100%] b").lasts(16) == 10
    assert script_from("a | 5s: b").lasts(16) == 10
    assert script_from("[0s:5s] a").lasts(16, 7) == 7


@pytest.mark.parametrize(
    "text", ["5s: a", "a | 5s: b | c", "a | b | 5s: c", "[5s:2s] a", "[1%:5s] a", "[5s:9s] a", *NOT_IN_A_ROW]
)
def test_inline_scripts_that_make_no_sense(text) -> None:
    with pytest.raises(ValueError):
        script_from(text)


# in files


def test_a_prompt_a_line_as_it_stands(tmp_path) -> None:
    scripts = read(tmp_path, "prompts.txt", "\ufeffa | b\r\n\r\n  ein Hügel  \n")
    assert [told(script) for script in scripts] == [[("a | b", 0, "seconds")], [("ein Hügel", 0, "seconds")]]


def test_extended_prompts_are_shown_under_the_names_of_those_they_extend(tmp_path) -> None:
    extended = "a cat sits in the sun\n\na dog runs along a beach\n"
    (alone,) = read(tmp_path, "alone_extended.txt", "a cat sits in the sun")
    assert (alone.prompt, alone.cues[0].rewritten) == ("a cat sits in the sun", None)
    (tmp_path / "vbench.txt").write_text("a cat\na dog\n")
    scripts = read(tmp_path, "vbench_extended.txt", extended)
    assert [(script.prompt, script.cues[0].shown) for script in scripts] == [
        ("a cat", "a cat sits in the sun"),
        ("a dog", "a dog runs along a beach"),
    ]
    assert [script.cues[0].shown for script in read_scripts(tmp_path / "vbench.txt")] == ["a cat", "a dog"]
    with pytest.raises(ValueError, match=r"has 1 prompts, vbench\.txt beside it has 2"):
        read(tmp_path, "vbench_extended.txt", "a cat")


def test_ours(tmp_path) -> None:
    text = """
    - {at: 0, prompt: a ball}
    - {at: 6.5, prompt: it snows, transition: 0, method: slerp}
    - {chunk: 12, prompts: [{text: night}, {text: day, weight: 0}]}
    - {frame: 60, prompt: rain}
    """
    for name in ("schedule.yaml", "schedule.YML"):
        (script,) = read(tmp_path, name, text)
        assert told(script) == [
            ("a ball", 0, "seconds"),
            ("it snows", 6.5, "seconds"),
            ("night", 12, "blocks"),
            ("rain", 60, "latent frames"),
        ]


def test_longlive(tmp_path) -> None:
    lines = [
        {"prompts": ["a", "b", "c"], "switch_frame_indices": "40, 80"},
        {"prompts": ["a", "b"], "switch_frame_indices": [40]},
        {"prompts": ["a", "b", "c", "d"]},
        {"prompt": "a | b"},
    ]
    scripts = read(tmp_path, "interactive.jsonl", "\n".join(map(json.dumps, lines)))
    assert [told(script) for script in scripts] == [
        [("a", 0, "latent frames"), ("b", 40, "latent frames"), ("c", 80, "latent frames")],
        [("a", 0, "latent frames"), ("b", 40, "latent frames")],
        [(letter, i / 4, "of the video") for i, letter in enumerate("abcd")],
        [("a | b", 0, "seconds")],
    ]
    assert [told(one) for one in read(tmp_path, "many.json", json.dumps(lines))] == [told(one) for one in scripts]


def test_scope(tmp_path) -> None:
    spans = [
        {"startTime": 0, "endTime": 4, "prompts": [{"text": "a", "weight": 100}]},
        {"startTime": 4, "endTime": 9.5, "prompts": [{"text": "b", "weight": 100}]},
    ]
    (script,) = read(tmp_path, "timeline.json", json.dumps({"prompts": spans, "settings": {"seed": 3}}))
    assert (told(script), script.seconds) == ([("a", 0, "seconds"), ("b", 4, "seconds")], 9.5)


@pytest.mark.parametrize("times", [[(0, 4), (3, 9)], [(0, 4), (5, 9)], [(0, 4), (4, 2)]])
def test_a_timeline_has_no_gaps_overlaps_or_ends_before_it_begins(tmp_path, times) -> None:
    spans = [{"startTime": begin, "endTime": end, "prompts": [{"text": "a"}]} for begin, end in times]
    with pytest.raises(ValueError, match=r"a\.json: a span ends "):
        read(tmp_path, "a.json", json.dumps({"prompts": spans}))


def test_the_list_of_vbench(tmp_path) -> None:
    listed = [{"prompt_en": "a cat", "dimension": ["color"]}, {"prompt_en": "a dog", "dimension": ["scene"]}]
    scripts = read(tmp_path, "VBench_full_info.json", json.dumps(listed))
    assert [told(script) for script in scripts] == [[("a cat", 0, "seconds")], [("a dog", 0, "seconds")]]


def test_vllm_omni(tmp_path) -> None:
    (script,) = read(tmp_path, "events.json", '[{"at": 0, "prompt": "a"}, {"at": 6.0, "prompt": "b"}]')
    assert told(script) == [("a", 0, "seconds"), ("b", 6, "seconds")]


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a.txt", " \n", "a.txt holds no prompt"),
        ("a.csv", "a", "there are .txt, .jsonl, .json and .yaml"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', "a.jsonl:2: Expecting value"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": ', "a.jsonl:3: Expecting value"),
        ("a.json", 100_000 * "[", "a.json: maximum recursion depth exceeded"),
        ("a.jsonl", '{"prompt": 3}', "a.jsonl:1: a video is a list of times, or has a prompt or prompts"),
        ("a.jsonl", '{"prompts": ["a", "b"], "switch_frame_indices": "40, 80"}', "2 prompts need 1 switch_frame_ind"),
        ("a.jsonl", '{"prompts": ["a", "b"], "switch_frame_indices": "soon"}', "a time is a number from 0, got 'soon'"),
        ("a.jsonl", '{"at": 0, "prompt": "a"}\n{"at": 6, "prompt": "b"}', "a.jsonl:1: at goes in a list of times"),
        ("a.jsonl", '{"prompt": "a", "prompts": ["a", "b"]}', "a video has a prompt or prompts, not both"),
        ("a.jsonl", '{"prompt": "a", "switch_frame_indices": "40"}', "switch_frame_indices goes with prompts"),
        ("a.jsonl", '{"prompts": ["a", "b"], "switch_frames_indices": "4"}', "did you mean switch_frame_indices?"),
        ("a.yaml", "[{at: 0, prompt: a, prompts: [{text: b}]}]", "a time has a prompt or prompts, not both"),
        ("a.json", "7", "a.json: a video is a list of times"),
        ("a.json", '{"prompts": []}', "a.json: a video is a list of times"),
        ("a.json", '{"prompts": [{"text": "a"}]}', "an entry of a timeline has startTime, endTime and prompts"),
        ("a.yaml", "[{at: 0, prompt: a}, {at: -1, prompt: b}]", "a time is a number from 0, got -1"),
        ("a.yaml", "[{at: 0, prompt: a}, {at: yes, prompt: b}]", "a time is a number from 0, got True"),
        ("a.yaml", "[{at: 0, prompt: a}, {at: .inf, prompt: b}]", "a time is a number from 0, got inf"),
        ("a.yaml", "[{at: 0, prompt: a}, {at: .nan, prompt: b}]", "a time is a number from 0, got nan"),
        ("a.yaml", "[{at: 0, promt: a}]", "no key 'promt' in a time: did you mean prompt?"),
        ("a.yaml", "[{at: 0, chunk: 0, prompt: a}]", "a time has one of at, chunk and frame"),
        ("a.yaml", "[{at: 0, prompt: 3}]", "a prompt is text, got 3"),
        ("a.yaml", "[{at: 0, prompt: a}, b]", "a time is at, chunk or frame with its prompt, got 'b'"),
        ("a.yaml", "[{at: 1, prompt: a}]", "the first prompt must begin at 0, but it is 'a' at 1 seconds"),
        (
            "a.yaml",
            "[{at: 0, prompt: a}, {at: 1, prompt: b, transition: soon}]",
            "a number of blocks from 0, got 'soon'",
        ),
        ("a.yaml", "[{at: 0, prompt: a}, {at: 1, prompt: b, transition: yes}]", "a number of blocks from 0, got True"),
        ("a.yaml", "[{at: 0, prompt: a}, {at: 1, prompt: b, transition: -4}]", "a number of blocks from 0, got -4"),
        ("a.yaml", "[{at: 0, prompt: a}, {at: 1, prompt: b, method: cut}]", "blended by lerp or slerp, got 'cut'"),
        ("a.yaml", "[{at: 0, prompt: a, transition: 4}]", "the first prompt has none to go over from"),
        ("a.yaml", "[{at: 0, prompts: [{text: a}, {text: b}]}]", "prompts are not mixed yet"),
        ("a.yaml", "[{at: 0, prompts: a}]", "prompts are a list of text and weight, got 'a'"),
        ("a.yaml", "{a: [", "a.yaml: while parsing"),
        ("a.yaml", "", "a.yaml: a video is a list of times"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_place(tmp_path, name, text, says) -> None:
    with pytest.raises(ValueError) as error:
        read(tmp_path, name, text)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_other_encodings_are_refused(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes("ein Hügel".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text"):
        read_scripts(tmp_path / "a.txt")


# when a prompt begins


@given(at=st.floats(0.6, 9), unit=st.sampled_from(["seconds", "pictures", "of the video", "blocks", "latent frames"]))
def test_a_prompt_begins_with_the_first_block_at_its_time_or_later(at, unit) -> None:
    per_second = {"seconds": 1, "pictures": 16, "of the video": 0.1, "blocks": 4 / 3, "latent frames": 4}[unit]
    script = Script((Cue(prompt="a"), Cue(prompt="b", at=at * per_second, unit=unit)))
    cues = script.by_block(ENGINE, TEN_SECONDS)
    (first, later), (a, b) = cues, cues.values()
    assert (first, a, b) == (0, *script.cues)
    if unit in ("blocks", "latent frames"):
        frames = at * per_second * (3 if unit == "blocks" else 1)
        assert 3 * (later - 1) < frames <= 3 * later
    else:
        assert ENGINE.pictures_in(later - 1) < at * 16 + 1e-3 and at * 16 - 1e-3 <= ENGINE.pictures_in(later)


def test_a_time_that_is_the_start_of_a_block_is_that_block() -> None:
    for block in range(1, 13):
        seconds = ENGINE.pictures_in(block) / ENGINE.frame_rate
        cues = (Cue(prompt="a"), Cue(prompt="b", at=seconds))
        assert [*Script(cues).by_block(ENGINE, TEN_SECONDS)] == [0, block]


@given(block=st.integers(1, 40), later=st.integers(1, 60))
def test_a_share_that_is_the_start_of_a_block_is_that_block(block, later) -> None:
    begins, pictures = ENGINE.pictures_in(block), ENGINE.pictures_in(block + later)
    cues = (Cue(prompt="a"), Cue(prompt="b", at=begins / pictures, unit="of the video"))
    assert [*Script(cues).by_block(ENGINE, pictures)] == [0, block]


@given(before=st.integers(1, 4), block=st.integers(1, 12))
def test_times_count_from_what_follows_given_pictures(before, block) -> None:
    def at(pictures: int) -> list[int]:
        cues = (Cue(prompt="a"), Cue(prompt="b", at=pictures, unit="pictures"))
        return [*Script(cues).by_block(ENGINE, TEN_SECONDS, ENGINE.pictures_in(before))]

    assert at(12 * block) == [0, block]  # 12 pictures each: the block of 9 is among the given ones
    assert at(12 * block - 11) == [0, block]


@pytest.mark.parametrize(
    "at, unit", [(10, "seconds"), (1e12, "seconds"), (160, "pictures"), (14, "blocks"), (1e12, "blocks")]
)
def test_a_prompt_after_the_end_is_refused(at, unit) -> None:
    script = Script((Cue(prompt="a"), Cue(prompt="b", at=at, unit=unit)))
    with pytest.raises(ValueError, match="would begin after the last picture of 10 seconds"):
        script.by_block(ENGINE, TEN_SECONDS)


def test_a_prompt_that_would_never_be_seen_is_refused() -> None:
    script = script_from("a | 1s: b | 1.1s: c")
    with pytest.raises(ValueError, match=r"'c' at 1.1 seconds begins in the same block"):
        script.by_block(ENGINE, TEN_SECONDS)
    with pytest.raises(ValueError, match="or earlier"):
        script_from("a | 5s: b | 2s: c").by_block(ENGINE, TEN_SECONDS)


@given(pictures=st.integers(1, 200), before=st.integers(0, 4))
def test_whole_blocks_are_as_few_as_hold_the_pictures(pictures, before) -> None:
    given = ENGINE.pictures_in(before)
    whole = whole_blocks(ENGINE, pictures, given)
    last = 9 if whole == 9 and not before else 12  # only a stream's very first block has fewer
    assert whole in {ENGINE.pictures_in(before + blocks) - given for blocks in range(1, 30)}
    assert whole - last < pictures <= whole


# the stream


def test_a_stream_follows_its_script(monkeypatch) -> None:
    monkeypatch.setattr(tiny, "AnyText", ByLength)
    engine = tiny.engine()
    cues = script_from("a ball | 1.1s: it snows | 2s: dark").by_block(engine, TEN_SECONDS)
    assert {block: cue.shown for block, cue in cues.items()} == {0: "a ball", 2: "it snows", 3: "dark"}
    with engine.stream("a ball", seed=5) as stream:
        expected = [next(stream).frames, next(stream).frames]
        for prompt in ("it snows", "dark"):
            stream.redirect(prompt)
            expected.append(next(stream).frames)
        plain = [chunk.frames for chunk, _ in zip(engine.stream("a ball", seed=5), range(4), strict=False)]
    with engine.stream(cues[0].shown, seed=5) as stream:
        got = [chunk.frames for chunk, _ in zip(follow(stream, cues), range(4), strict=False)]
    assert all(map(np.array_equal, got, expected))
    assert [bool(np.array_equal(one, other)) for one, other in zip(got, plain, strict=True)] == [
        True,
        True,
        False,
        False,
    ]


def test_with_blocks_in_flight_a_prompt_is_shown_at_its_time(monkeypatch) -> None:
    monkeypatch.setattr(tiny, "AnyText", ByLength)
    engine = tiny.engine(tiny.rolling_recipe())
    cues = script_from("a ball | 2.1s: it snows").by_block(engine, TEN_SECONDS)
    assert [*cues] == [0, 4]
    shown = {}
    schedule = rolling.calls
    monkeypatch.setattr(rolling, "calls", lambda *given, **more: watched(schedule, shown, *given, **more))
    with engine.stream(cues[0].shown, seed=5) as stream:
        for _ in zip(follow(stream, cues), range(6), strict=False):
            pass
    first, *_ = shown.values()
    assert [shown[block] is first for block in range(6)] == [True, True, True, True, False, False]
    assert shown[4] is shown[5]


def watched(schedule, shown, network, memory, prompts, *given, **more):
    """The calls of a schedule; shown: the prompt that each block begins under."""
    return schedule(network, memory, lambda block: shown.setdefault(block, prompts(block)), *given, **more)


@given(block=st.integers(1, 12))
def test_a_prompt_among_the_blocks_that_begin_together_is_refused(block) -> None:
    script = Script((Cue(prompt="a"), Cue(prompt="b", at=block, unit="blocks")))
    if block < ROLLING.recipe.in_flight:
        with pytest.raises(ValueError, match=r"is too early: .* can begin from 2\.0625 seconds or 3 blocks on"):
            script.by_block(ROLLING, TEN_SECONDS)
    else:
        assert [*script.by_block(ROLLING, TEN_SECONDS)] == [0, block]


class ByLength(tiny.AnyText):
    """Prompts of different lengths are different."""

    def encode(self, prompts):
        import torch

        return torch.cat([tiny.text(seed=len(prompt))[:, 0].float() for prompt in prompts])


def test_both_prompts_are_recorded() -> None:
    script = script_from("a | 5s: b").rewritten(["a ball bounces", "it begins to snow"])
    record = record_of(ENGINE, script, 3, 10.0)
    assert record == json.loads(json.dumps(record))
    assert script_in(record) == script, "it is read back"
    with pytest.raises(ValueError):
        script.rewritten(["a ball bounces"])
    assert record["prompts"] == [
        {"at": 0.0, "unit": "seconds", "prompt": "a", "rewritten": "a ball bounces"},
        {"at": 5.0, "unit": "seconds", "prompt": "b", "rewritten": "it begins to snow"},
    ]
    assert (record["recipe"], record["levels"], record["seed"], record["dtype"]) == (
        "self_forcing_sink",
        4,
        3,
        "float32",
    )
    assert (record["weights"], record["codec_weights"]) == (ENGINE.weights, ENGINE.codec_weights)
    assert record_of(replace(ENGINE, codec_name="light", base_name="wan"), script, 3, 10.0) == record | {
        "codec": "light",
        "base": "wan",
    }
    shown = [cue.shown for cue in script.by_block(ENGINE, TEN_SECONDS).values()]
    assert shown == ["a ball bounces", "it begins to snow"]


def test_a_transition_is_followed_and_recorded(tmp_path) -> None:
    (script,) = read(tmp_path, "a.yaml", "[{at: 0, prompt: a}, {at: 2, prompt: b, transition: 4, method: slerp}]")
    engine = tiny.engine()
    record = record_of(engine, script, 3, 10.0)
    assert script_in(json.loads(json.dumps(record))) == script
    assert record["prompts"][1] == {"at": 2, "unit": "seconds", "prompt": "b", "over": 4, "blend": "slerp"}
    with engine.stream("a") as stream:
        for _ in zip(follow(stream, script.by_block(engine, TEN_SECONDS)), range(5), strict=False):
            pass
        assert (stream.history[1].block, stream.history[1].over, stream.history[1].blend) == (3, 4, "slerp")


@pytest.mark.parametrize(
    "prompt, expected", [("A red/ball, BOUNCES...", "a-red-ball-bounces"), ("!?", "video"), ("x" * 99, "x" * 60)]
)
def test_prompts_in_file_names(prompt, expected) -> None:
    assert slug(prompt) == expected


@given(st.text() | st.lists(st.sampled_from(["a", "bc", "...", "/", "_"]), max_size=90).map(" ".join))
@example("x" * 59 + " and more")
def test_any_prompt_is_words_in_a_file_name(prompt) -> None:
    assert re.fullmatch(r"[^\W_]+(-[^\W_]+)*", slug(prompt)) and len(slug(prompt)) <= 60


@pytest.mark.parametrize(
    "prompts",
    [None, "a ball", [], ["a ball"], [{"at": 0, "unit": "years", "prompt": "a"}], [{"at": 0, "unit": "seconds"}],
     [{"at": 0, "unit": "seconds", "prompt": "a"}, {"at": 1, "unit": "seconds", "prompt": "b", "over": 0}],
     [{"at": 0, "unit": "seconds", "prompt": "a", "rewritten": 3}],
     [{"at": 0, "unit": "seconds", "prompt": "a"},
      {"at": 1, "unit": "seconds", "prompt": "b", "over": 2, "blend": "cut"}],
     [{"at": 0, "unit": "seconds", "prompt": "a"}, {"at": -1, "unit": "seconds", "prompt": "b"}],
     [{"at": 0, "unit": "seconds", "prompt": "a", "colour": 3}]],
)  # fmt: skip
def test_records_that_cannot_be_read(prompts) -> None:
    with pytest.raises(ValueError, match=r"record|time|prompt|words"):
        script_in({"prompts": prompts})
