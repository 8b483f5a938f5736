"""The words for the toy world: a small grammar that writes captions, and reads them back.

A caption is a few phrases in one of several orders: "a red ball / bounces / over green hills / at night". Every
phrase comes from a table with three ways to say each value, so captions of a whole batch are written by looking
tokens up, and a sentence is read by finding the same phrases in it.

Shapes: B captions, L tokens.
"""

import difflib
import random
import re
import textwrap
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from longtake.toy.scenes import ATTRIBUTES, CHANGEABLE, LANDMARK_COLOURS, LANDMARKS, TIMES, Scenes

EXAMPLES = (
    "a red ball bounces over green hills",
    "a white duck walks right in the forest at dusk",
    "a blue fish flies over the city at night",
    "a yellow car bounces on the beach in the rain",
    "a red ball bounces over green hills in the snow",
)
"""Words to begin with."""

# ---------------------------------------------------------------------------------------------------------------------
# The grammar
# ---------------------------------------------------------------------------------------------------------------------

WAYS = 3  # to say each thing

PHRASES: dict[str, dict[str, tuple[str, str, str]]] = {
    "subject": {
        "ball": ("ball", "sphere", "globe"),
        "cube": ("cube", "box", "block"),
        "star": ("star", "starlet", "star shape"),
        "heart": ("heart", "sweetheart", "heart shape"),
        "fish": ("fish", "guppy", "minnow"),
        "duck": ("duck", "duckling", "drake"),
        "car": ("car", "automobile", "auto"),
        "cat": ("cat", "kitten", "kitty"),
    },
    "colour": {
        "red": ("red", "scarlet", "crimson"),
        "orange": ("orange", "amber", "tangerine"),
        "yellow": ("yellow", "golden", "lemon"),
        "green": ("green", "emerald", "lime"),
        "blue": ("blue", "azure", "sapphire"),
        "purple": ("purple", "violet", "lilac"),
        "pink": ("pink", "rosy", "fuchsia"),
        "white": ("white", "ivory", "milky"),
    },
    "motion": {
        "bounces": ("bounces", "hops", "jumps"),
        "walks left": ("walks left", "strolls to the left", "goes left"),
        "walks right": ("walks right", "strolls to the right", "goes right"),
        "flies": ("flies", "soars", "glides"),
        "spins": ("spins", "twirls", "rotates"),
        "stands still": ("stands still", "rests", "waits"),
    },
    "place": {
        "hills": ("over green hills", "in the hills", "among rolling hills"),
        "desert": ("in the desert", "on desert sand", "among sandy dunes"),
        "beach": ("on the beach", "by the sea", "at the shore"),
        "forest": ("in the forest", "in the woods", "among tall trees"),
        "city": ("in the city", "in town", "on a city street"),
        "mountains": ("in the mountains", "near snowy mountains", "below high peaks"),
    },
    "time": {
        "day": ("by day", "in daylight", "in the daytime"),
        "dusk": ("at dusk", "at sunset", "in the evening"),
        "night": ("at night", "after dark", "in the moonlight"),
    },
    "weather": {
        "clear": ("under a clear sky", "in clear weather", "in fine weather"),
        "rain": ("in the rain", "while rain falls", "in rainy weather"),
        "snow": ("in the snow", "while snow falls", "in snowy weather"),
    },
    "camera": {
        "still": ("while the camera stays still", "with a still camera", "as the view holds still"),
        "pans left": ("while the camera pans left", "as the camera moves left", "as the view slides left"),
        "pans right": ("while the camera pans right", "as the camera moves right", "as the view slides right"),
        "looks away": (
            "while the camera looks away and returns",
            "as the camera turns away and back",
            "as the view leaves and returns",
        ),
    },
}

LANDMARK_WAYS = ("near a {} {}", "beside a {} {}", "by a {} {}")

ORDERS = (
    ("subject", "motion", "landmark", "place", "time", "weather", "camera"),
    ("subject", "motion", "landmark", "time", "weather", "place", "camera"),
    ("place", "subject", "motion", "landmark", "time", "weather", "camera"),
    ("time", "weather", "subject", "motion", "landmark", "place", "camera"),
    ("weather", "place", "subject", "motion", "landmark", "time", "camera"),
)

# A sentence that names only what changes is a row of clauses; {} is a noun, a colour or a phrase for a place.
COLOUR_CLAUSES = (("the", "turns"), ("the", "becomes"), ("now the", "is"))
PLACE_CLAUSES = ("now we are", "suddenly we are", "we are now")
TIME_CLAUSES = {word: (f"it becomes {word}", f"now it is {word}", f"it turns to {word}") for word in TIMES}
WEATHER_CLAUSES = {
    "clear": ("the sky clears", "now the sky is clear", "it clears up"),
    "rain": ("it starts to rain", "rain begins to fall", "now it is raining"),
    "snow": ("it starts to snow", "snow begins to fall", "now it is snowing"),
}

# Fragments that are understood wherever a longer phrase was not.
FRAGMENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "place": {
        "hills": ("hills",),
        "desert": ("desert", "dunes", "sand"),
        "beach": ("beach", "sea", "shore"),
        "forest": ("forest", "woods", "trees"),
        "city": ("city", "town", "street"),
        "mountains": ("mountains", "peaks"),
    },
    "time": {
        "day": ("day", "daylight", "daytime"),
        "dusk": ("dusk", "sunset", "evening"),
        "night": ("night", "dark", "moonlight"),
    },
    "weather": {
        "clear": ("clear", "clears", "fine weather"),
        "rain": ("rain", "raining", "rainy"),
        "snow": ("snow", "snowing", "snowy"),
    },
    "motion": {
        "walks left": ("strolls left", "walks to the left", "goes to the left"),
        "walks right": ("strolls right", "walks to the right", "goes to the right"),
    },
    "camera": {
        "pans left": ("pans left", "moves left", "slides left", "pans to the left"),
        "pans right": ("pans right", "moves right", "slides right", "pans to the right"),
        "looks away": ("looks away", "turns away"),
        "still": ("still camera", "camera stays", "camera holds still"),
    },
}

# How often a slot is left out. What a reader would assume anyway is said only half the time, so that
# "a red ball bounces over green hills" mostly means by day, in clear weather, seen by a still camera.
OMITTED = 0.08
ASSUMED = {"time": "day", "weather": "clear", "camera": "still"}
ASSUMED_OMITTED = 0.5
LANDMARK_OMITTED = 0.9
LITTLE = 0.1  # how often the subject is called little

# ---------------------------------------------------------------------------------------------------------------------
# Words and tokens
# ---------------------------------------------------------------------------------------------------------------------

PADDING, END = 0, 1
TEXT_LENGTH = 40
_NAMED = 5  # unknown words, in a message


def _all_phrases() -> Iterable[str]:
    yield "a an little and"
    for values in PHRASES.values():
        for ways in values.values():
            yield from ways
    for way in LANDMARK_WAYS:
        yield way.format(" ".join(LANDMARK_COLOURS), " ".join(LANDMARKS))
    for pair in COLOUR_CLAUSES:
        yield from pair
    yield from PLACE_CLAUSES
    for clauses in (*TIME_CLAUSES.values(), *WEATHER_CLAUSES.values()):
        yield from clauses


VOCABULARY: tuple[str, ...] = ("<padding>", "<end>", *sorted({w for text in _all_phrases() for w in text.split()}))
_NUMBER = {word: number for number, word in enumerate(VOCABULARY)}


def _words(text: str) -> list[str]:
    """The known words of a text; ValueError for one that has none, or has others."""
    words = re.findall(r"[^\W_]+", text.lower())
    if not words:
        raise ValueError("the text has no words; say what to show, such as 'a red ball bounces over green hills'")
    unknown = list(dict.fromkeys(word for word in words if word not in _NUMBER))
    if unknown:
        named = ", ".join(map(_with_neighbours, unknown[:_NAMED])) + ", ..." * (len(unknown) > _NAMED)
        said = textwrap.shorten(text, 60, placeholder=" ...")
        raise ValueError(f"{said!r} has words that the toy world does not know: {named}; it knows {_all_values()}")
    return words


def _with_neighbours(word: str) -> str:
    near = difflib.get_close_matches(word, VOCABULARY[2:], n=3)
    return repr(word[:30]) + (f" (did you mean {' or '.join(near)}?)" if near else "")


def _all_values() -> str:
    """What can be said; there are other words for most of it, which `_with_neighbours` finds."""
    kinds = {**PHRASES, "landmark": LANDMARKS}
    return ", ".join(f"{kind} ({', '.join(values)})" for kind, values in kinds.items())


def encode(text: str) -> list[int]:
    """The tokens of a text, with the end token last; case and punctuation are ignored."""
    words = _words(text)
    if len(words) >= TEXT_LENGTH:
        raise ValueError(f"the text has {len(words)} words; at most {TEXT_LENGTH - 1} are read")
    return [_NUMBER[word] for word in words] + [END]


def decode(tokens: Iterable[int]) -> str:
    """The text of a row of tokens."""
    return " ".join(VOCABULARY[token] for token in tokens if token not in (PADDING, END))


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


@cache
def _meanings() -> dict[tuple[str, ...], dict[str, str]]:
    """What each phrase says."""
    meanings: dict[tuple[str, ...], dict[str, str]] = {}
    for table in (FRAGMENTS, PHRASES):
        for attribute, values in table.items():
            for value, ways in values.items():
                meanings.update({tuple(way.split()): {attribute: value} for way in ways})
    for landmark in LANDMARKS:
        for colour in LANDMARK_COLOURS:
            for way in ("{} {}", *LANDMARK_WAYS):
                phrase = tuple(way.format(colour, landmark).split())
                meanings[phrase] = {"landmark": landmark, "landmark_colour": colour}
    return meanings


def parse(text: str) -> dict[str, str]:
    """What a text says, attribute -> value; what it does not say is absent. Longer phrases are read before shorter."""
    words, meanings = _words(text), _meanings()
    longest = max(map(len, meanings))
    said: dict[str, str] = {}
    place = 0
    while place < len(words):
        lengths = (n for n in range(longest, 0, -1) if tuple(words[place : place + n]) in meanings)
        length = next(lengths, 0)
        said |= meanings.get(tuple(words[place : place + length]), {})
        place += max(length, 1)
    return said


# ---------------------------------------------------------------------------------------------------------------------
# Writing. What to say is an index for each attribute, [B], with -1 for what is left out.
# ---------------------------------------------------------------------------------------------------------------------

Said = dict[str, Tensor]


class _Dice:
    """Seeded draws for a batch, made on the CPU so that they are the same for every device."""

    def __init__(self, count: int, seed: int, device: torch.device) -> None:
        self.count, self.device = count, device
        self.generator = torch.Generator().manual_seed(seed)

    def way(self, ways: int = WAYS) -> Tensor:
        return torch.randint(ways, (self.count,), generator=self.generator).to(self.device)

    def chance(self) -> Tensor:
        return torch.rand(self.count, generator=self.generator).to(self.device)


def _table(rows: Iterable[Iterable[str]], device: torch.device) -> Tensor:
    """Phrases as tokens [1 + values, ways, L], padded; row 0 is silence, so that index -1 + 1 says nothing."""
    tokens = [[[_NUMBER[word] for word in way.split()] for way in ways] for ways in rows]
    longest = max(len(way) for ways in tokens for way in ways)
    padded = [[way + [PADDING] * (longest - len(way)) for way in ways] for ways in tokens]
    silence = [[[PADDING] * longest] * len(padded[0])]
    return torch.tensor(silence + padded, device=device)


@cache
def _tables(device: torch.device) -> dict[str, Tensor]:
    """Every phrase and clause of the grammar."""
    tables = {attribute: _table(values.values(), device) for attribute, values in PHRASES.items()}
    pairs = [(colour, landmark) for landmark in LANDMARKS for colour in LANDMARK_COLOURS]
    tables["landmark"] = _table(([way.format(*pair) for way in LANDMARK_WAYS] for pair in pairs), device)
    tables["little"] = _table([["little"]], device)
    tables["article"] = _table([["a"], ["an"]], device)
    tables["and"] = _table([["and"]], device)
    tables["time clause"] = _table(TIME_CLAUSES.values(), device)
    tables["weather clause"] = _table(WEATHER_CLAUSES.values(), device)
    tables["place clause"] = _table([PLACE_CLAUSES], device)
    tables["colour clause, begun"] = _table([[begin for begin, _ in COLOUR_CLAUSES]], device)
    tables["colour clause, ended"] = _table([[end for _, end in COLOUR_CLAUSES]], device)
    tables["vowel"] = torch.tensor([word[0] in "aeiou" for word in VOCABULARY], device=device)
    return tables


def _say(name: str, index: Tensor, dice: _Dice, way: Tensor | None = None) -> Tensor:
    """Tokens [B, L] for values [B] of a table; nothing where the index is -1."""
    table = _tables(dice.device)[name]
    return table[index + 1, dice.way(table.shape[1]) if way is None else way]


def _squeezed(tokens: Tensor) -> Tensor:
    """Close the gaps between phrases, end the text, and pad it: [B, L] to [B, TEXT_LENGTH]."""
    tokens = torch.cat([tokens, torch.full_like(tokens[:, :1], END)], 1)
    order = torch.sort((tokens == PADDING).long(), dim=1, stable=True).indices
    tokens = tokens.gather(1, order)
    missing = max(TEXT_LENGTH - tokens.shape[1], 0)
    return torch.nn.functional.pad(tokens, (0, missing))[:, :TEXT_LENGTH]


def _subject_phrase(said: Said, dice: _Dice) -> Tensor:
    """Such as "a red ball" or "an orange little star", the article chosen by the sound that follows."""
    little = torch.where(dice.chance() < LITTLE, 0, -1)
    parts = [_say("little", little, dice), _say("colour", said["colour"], dice), _say("subject", said["subject"], dice)]
    name = torch.cat(parts, 1)
    first = name.gather(1, (name != PADDING).int().argmax(1, keepdim=True))[:, 0]
    vowel = _tables(dice.device)["vowel"][first].long()
    return torch.cat([_say("article", vowel, dice), name], 1)


def _captions(said: Said, dice: _Dice) -> Tensor:
    """A full caption for each row of what is to be said: [B, TEXT_LENGTH]."""
    pieces = {slot: _say(slot, said[slot], dice) for slot in ORDERS[0] if slot != "subject"}
    pieces["subject"] = _subject_phrase(said, dice)
    orders = torch.stack([torch.cat([pieces[slot] for slot in order], 1) for order in ORDERS], 1)
    chosen = orders[torch.arange(dice.count, device=dice.device), dice.way(len(ORDERS))]
    return _squeezed(chosen)


def _change_sentences(said: Said, subject: Tensor, dice: _Dice) -> Tensor:
    """A sentence that names only what changes, such as "it starts to snow at night": [B, TEXT_LENGTH]."""
    silent = torch.full_like(subject, -1)
    recoloured, moved = torch.where(said["colour"] < 0, -1, 0), torch.where(said["place"] < 0, -1, 0)
    way = dice.way()
    colour = [
        _say("colour clause, begun", recoloured, dice, way),
        _say("subject", torch.where(recoloured < 0, silent, subject), dice),
        _say("colour clause, ended", recoloured, dice, way),
        _say("colour", said["colour"], dice),
    ]
    place = [_say("place clause", moved, dice), _say("place", said["place"], dice)]
    weather = [_say("weather clause", said["weather"], dice)]
    # "it starts to snow at night" rather than "it starts to snow and it becomes night", half the time
    adverb = (said["weather"] >= 0) & (dice.chance() < 0.5)
    weather.append(_say("time", torch.where(adverb, said["time"], silent), dice))
    time = [_say("time clause", torch.where(adverb, silent, said["time"]), dice)]

    sentence = torch.zeros_like(subject)[:, None]
    for clause in (torch.cat(parts, 1) for parts in (colour, place, weather, time)):
        joined = (sentence != PADDING).any(1) & (clause != PADDING).any(1)
        sentence = torch.cat([sentence, _say("and", joined.long() - 1, dice), clause], 1)
    return _squeezed(sentence)


def _after_omissions(said: Said, needed: Said, dice: _Dice) -> Said:
    """Leave slots out as training captions do; where `needed` is true the slot stays."""
    kept: Said = {"subject": said["subject"]}
    for slot, value in said.items():
        if slot == "subject":
            continue
        omitted = torch.full_like(dice.chance(), LANDMARK_OMITTED if slot == "landmark" else OMITTED)
        if slot in ASSUMED:
            omitted[value == ATTRIBUTES[slot].index(ASSUMED[slot])] = ASSUMED_OMITTED
        omit = dice.chance() < omitted
        if slot in needed:
            omit &= ~needed[slot]
        kept[slot] = torch.where(omit, torch.full_like(value, -1), value)
    return kept


def caption_tokens(scenes: Scenes, seed: int) -> Tensor:
    """The captions before and after the change, [B, 2, TEXT_LENGTH]; the same twice where nothing changes.

    The second is the new caption in full, or, half the time, a sentence that names only what changes.
    """
    dice = _Dice(len(scenes), seed, scenes.subject.device)
    pairs = {name: getattr(scenes, name) for name in CHANGEABLE}
    happens = torch.isfinite(scenes.change_seconds)
    changed = {name: (pair[:, 0] != pair[:, 1]) & happens for name, pair in pairs.items()}
    changes = torch.stack(list(changed.values())).any(0)

    constant = {name: getattr(scenes, name) for name in ("subject", "motion", "camera")}
    constant["landmark"] = scenes.landmark * len(LANDMARK_COLOURS) + scenes.landmark_colour
    before = constant | {name: pair[:, 0] for name, pair in pairs.items()}
    after = constant | {name: pair[:, 1] for name, pair in pairs.items()}
    news = {name: torch.where(changed[name], pair[:, 1], -1) for name, pair in pairs.items()}

    first = _captions(_after_omissions(before, {}, dice), dice)
    full = _captions(_after_omissions(after, changed, dice), dice)
    short = _change_sentences(news, scenes.subject, dice)
    second = torch.where((dice.chance() < 0.5)[:, None], full, short)
    return torch.stack([first, torch.where(changes[:, None], second, first)], 1)


def captions(scenes: Scenes, seed: int) -> list[tuple[str, str]]:
    """The captions of `caption_tokens`, as text."""
    return [(decode(before), decode(after)) for before, after in caption_tokens(scenes, seed).tolist()]


def describe(attributes: dict[str, str], rng: random.Random, keep: float = 1.0) -> str:
    """A caption that says these attributes, each but the subject with chance `keep`.

    A landmark is said with its colour or not at all.
    """
    if "subject" not in attributes:
        raise ValueError("a caption needs a subject")
    said = {name: value for name, value in attributes.items() if name == "subject" or rng.random() < keep}
    index = {slot: _index(slot, said) for slot in (*PHRASES, "landmark")}
    dice = _Dice(1, rng.getrandbits(32), torch.device("cpu"))
    return decode(_captions({slot: torch.tensor([value]) for slot, value in index.items()}, dice)[0].tolist())


def _index(slot: str, said: dict[str, str]) -> int:
    if slot not in said or (slot == "landmark" and "landmark_colour" not in said):
        return -1
    index = ATTRIBUTES[slot].index(said[slot])
    if slot == "landmark":
        return index * len(LANDMARK_COLOURS) + LANDMARK_COLOURS.index(said["landmark_colour"])
    return index
