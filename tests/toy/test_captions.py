"""The grammar says what it is given, is understood when read back, and refuses what it does not know."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.toy import captions
from longtake.toy.captions import TEXT_LENGTH, VOCABULARY, caption_tokens, describe, encode, parse
from longtake.toy.scenes import (
    ATTRIBUTES,
    CHANGEABLE,
    LANDMARK_COLOURS,
    LANDMARKS,
    SUBJECTS,
    TIMES,
    Scenes,
    held_out_combinations,
    sample_scenes,
)

ALWAYS = {"subject": st.sampled_from(SUBJECTS)}
SOMETIMES = {name: st.sampled_from(ATTRIBUTES[name]) for name in captions.PHRASES if name != "subject"}
LANDMARK = st.sampled_from(LANDMARKS), st.sampled_from(LANDMARK_COLOURS)


@st.composite
def attributes(draw: st.DrawFn) -> dict[str, str]:
    chosen = draw(st.fixed_dictionaries(ALWAYS, optional=SOMETIMES))
    if draw(st.booleans()):
        chosen |= {"landmark": draw(LANDMARK[0]), "landmark_colour": draw(LANDMARK[1])}
    return chosen


@settings(max_examples=300)
@given(attributes(), st.integers(0, 10**6))
def test_what_is_said_is_read_back(said: dict[str, str], seed: int) -> None:
    text = describe(said, random.Random(seed))
    assert parse(text) == said
    assert len(encode(text)) <= TEXT_LENGTH


@settings(max_examples=50)
@given(attributes(), st.integers(0, 10**6))
def test_what_is_left_out_is_not_invented(said: dict[str, str], seed: int) -> None:
    read = parse(describe(said, random.Random(seed), keep=0.5))
    assert read.items() <= said.items() and read["subject"] == said["subject"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a red ball over green hills", {"colour": "red", "subject": "ball", "place": "hills"}),
        ("A cat, in the CITY!", {"subject": "cat", "place": "city"}),
        ("it starts to snow at night", {"weather": "snow", "time": "night"}),
        ("it becomes night", {"time": "night"}),
        ("the ball turns blue", {"subject": "ball", "colour": "blue"}),
        ("now we are in the city", {"place": "city"}),
        ("a duck near a red house", {"subject": "duck", "landmark": "house", "landmark_colour": "red"}),
    ],
)
def test_sentences_are_understood(text: str, said: dict[str, str]) -> None:
    assert parse(text) == said


def test_one_long_sentence_says_it_all() -> None:
    text = "a red ball bounces over green hills at night in the rain while the camera pans left"
    assert parse(text) == {
        "colour": "red",
        "subject": "ball",
        "motion": "bounces",
        "place": "hills",
        "time": "night",
        "weather": "rain",
        "camera": "pans left",
    }


def test_articles_are_right() -> None:
    texts = [text for pair in captions.captions(sample_scenes(500, 1), 1) for text in pair]
    for words in (text.split() for text in texts):
        for article, following in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (following[0] in "aeiou"), " ".join(words)


def test_the_vocabulary_is_small_lower_case_and_used() -> None:
    assert len(VOCABULARY) == len(set(VOCABULARY)) < 200
    assert all(word == word.lower() for word in VOCABULARY)
    used = caption_tokens(sample_scenes(4000, 2, changes=0.6), 2).flatten().tolist()
    assert sorted(set(used)) == list(range(len(VOCABULARY))), "every word is learned in training"


def test_tokens_and_texts_are_the_same_captions() -> None:
    scenes = sample_scenes(60, 4, changes=0.5)
    tokens = caption_tokens(scenes, 9)
    assert tokens.shape == (60, 2, TEXT_LENGTH) and tokens.dtype == torch.int64
    for row, texts in zip(tokens, captions.captions(scenes, 9), strict=True):
        for numbers, text in zip(row.tolist(), texts, strict=True):
            assert numbers == encode(text) + [captions.PADDING] * (TEXT_LENGTH - len(encode(text)))
    assert torch.equal(tokens, caption_tokens(scenes, 9))
    assert not torch.equal(tokens, caption_tokens(scenes, 10))


def names(scenes: Scenes, row: int, side: int) -> dict[str, str]:
    """A scene's attributes by name, before (side 0) or after (1)."""
    values = {name: getattr(scenes, name)[row] for name in ATTRIBUTES}
    return {name: ATTRIBUTES[name][int(value[side] if name in CHANGEABLE else value)] for name, value in values.items()}


def test_captions_tell_the_truth_and_name_what_changes() -> None:
    scenes = sample_scenes(300, 6, changes=0.5)
    for row, (before, after) in enumerate(captions.captions(scenes, 3)):
        old, new = names(scenes, row, 0), names(scenes, row, 1)
        assert parse(before).items() <= old.items()
        assert parse(after).items() <= new.items()
        assert (before == after) == (old == new)
        changed = {name: value for name, value in new.items() if old[name] != value}
        assert changed.items() <= parse(after).items()


def test_short_prompts_mean_a_clear_day() -> None:
    scenes = sample_scenes(3000, 8, changes=0.0)
    silent = [row for row, (text, _) in enumerate(captions.captions(scenes, 0)) if "time" not in parse(text)]
    assert (scenes.time[silent, 0] == TIMES.index("day")).float().mean() > 0.7


def test_training_captions_never_name_a_held_out_combination() -> None:
    held_out = held_out_combinations()
    for before, after in captions.captions(sample_scenes(1500, 5, changes=0.5), 5):
        known = parse(before)
        for said in (known, known | parse(after)):
            assert (said["subject"], said.get("colour"), said.get("place")) not in held_out


def test_unknown_words_are_named_and_neighbours_offered() -> None:
    with pytest.raises(ValueError, match=r"'bal'.*ball.*'mountain'.*mountains"):
        encode("a red bal in the mountain")
    with pytest.raises(ValueError, match=r"subject \(ball, .*place \(hills, .*landmark \(house"):
        encode("a red zorblax")
    with pytest.raises(
        ValueError, match=r"^'alfa bravo .* \.\.\.' has words .*: 'alfa', 'bravo', .*\.\.\.; it knows"
    ) as many:
        encode("alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november")
    assert "golf" not in str(many.value).partition(" has ")[2]
    with pytest.raises(ValueError, match=r"no words"):
        encode(" ... ")
    with pytest.raises(ValueError, match=r"at most 39"):
        encode("ball " * 40)
    with pytest.raises(ValueError, match=r"needs a subject"):
        describe({"colour": "red"}, random.Random(0))
