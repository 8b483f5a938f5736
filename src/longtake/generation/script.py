"""Prompts over time, read from every format that users already have, and the stream that follows them.

A list of times is one video; files may hold many. What each format means is told in docs/prompts.md.
"""

import itertools
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from longtake.generation.blend import Interpolation, require_blend
from longtake.generation.stream import Chunk, Engine, Stream, one_behind

Unit = Literal["seconds", "pictures", "latent frames", "blocks", "of the video"]
"""What a time counts; the last is a share, 0 to 1, of the video's length."""

SECONDS = 10.0  # of a video, where nothing says how long it is
EXTENDED = "_extended"  # in the name of a file of rewritten prompts


@dataclass(frozen=True, kw_only=True)
class Cue:
    """A prompt and when it begins. rewritten: what is shown in its place, where somebody wrote it out.

    over, blend: how the prompt before goes over into it, as for `Stream.redirect`.
    """

    prompt: str
    at: float = 0
    unit: Unit = "seconds"
    rewritten: str | None = None
    over: int = 1
    blend: Interpolation = "lerp"

    @property
    def shown(self) -> str:
        return self.prompt if self.rewritten is None else self.rewritten

    def __str__(self) -> str:
        return f"{self.prompt!r} at {self.at:g} {self.unit}"


@dataclass(frozen=True)
class Script:
    """What one video shows. seconds, pictures: how long it is, where its source says so in one of them.

    Raises: ValueError where there is no prompt, or the first does not begin with the video, or goes over from another.
    """

    cues: tuple[Cue, ...]
    seconds: float | None = None
    pictures: float | None = None

    def __post_init__(self) -> None:
        if not self.cues:
            raise ValueError("there is no prompt")
        if self.cues[0].at != 0:
            raise ValueError(f"the first prompt must begin at 0, but it is {self.cues[0]}")
        if self.cues[0].over != 1:
            raise ValueError(f"the first prompt has none to go over from, but a transition over {self.cues[0].over}")

    @property
    def prompt(self) -> str:
        """What the video is called by: its first prompt, as its writer gave it."""
        return self.cues[0].prompt

    def lasts(self, frame_rate: int, asked: float | None = None) -> float:
        """Seconds of video: those asked for, or else what its source says, or else 10."""
        own = self.pictures / frame_rate if self.pictures else self.seconds
        return asked or own or SECONDS

    def rewritten(self, texts: Sequence[str]) -> "Script":
        """The script that shows other texts, one for each prompt."""
        cues = (replace(cue, rewritten=text) for cue, text in zip(self.cues, texts, strict=True))
        return replace(self, cues=tuple(cues))

    def by_block(self, engine: Engine, pictures: int, given: int = 0) -> dict[int, Cue]:
        """What is shown from each block on. A prompt begins with the first block that begins at its time or later.

        pictures: how many the video has. given: how many, of whole blocks, the stream goes on from; blocks and times
        count from what follows them. ValueError for a prompt that would never be seen: it begins after the end, or
        another follows before the next block; or that would be late: it begins while the blocks are shown that are
        begun together with the first.
        """
        cues: dict[int, Cue] = {}
        pictures_in, together = _pictures_after(engine, given), engine.recipe.in_flight
        for cue in self.cues:
            block = _block_of(cue, engine, pictures, pictures_in)
            if 0 < block < together:
                earliest = pictures_in(together) / engine.frame_rate
                raise ValueError(
                    f"{cue} is too early: recipe {engine.recipe.name} begins {together} blocks together, "
                    f"so another prompt can begin from {earliest:g} seconds or {together} blocks on"
                )
            if cues and block <= max(cues):
                raise ValueError(
                    f"{cue} begins in the same block as the prompt before it, or earlier: write times apart"
                )
            cues[block] = cue
        return cues


def _pictures_after(engine: Engine, given: int) -> Callable[[int], int]:
    """How many pictures the first blocks after so many given ones are: a stream's very first block has fewer."""
    before = next(block for block in itertools.count() if engine.pictures_in(block) >= given)
    return lambda blocks: engine.pictures_in(before + blocks) - engine.pictures_in(before)


def _block_of(cue: Cue, engine: Engine, pictures: int, pictures_in: Callable[[int], int]) -> int:
    if cue.at == 0:
        return 0
    if cue.unit == "blocks":
        block = int(-(-cue.at // 1))
    elif cue.unit == "latent frames":
        block = int(-(-cue.at // engine.recipe.block))
    else:
        scale = {"seconds": engine.frame_rate, "pictures": 1, "of the video": pictures}[cue.unit]
        first = min(cue.at * scale, pictures) - 1e-6  # seconds are rarely whole pictures in binary
        block = next(block for block in itertools.count() if pictures_in(block) >= first)
    if pictures_in(min(block, pictures)) >= pictures:
        raise ValueError(f"{cue} would begin after the last picture of {pictures / engine.frame_rate:g} seconds")
    return block


def follow(stream: Stream, cues: Mapping[int, Cue]) -> Iterator[Chunk]:
    """The chunks of a stream that was opened with the first, redirected before the blocks that have another begin.

    Where blocks are in flight together, the last of them begins that many blocks before it is shown.
    """
    chunks = iter(stream)
    begun_before = stream.engine.recipe.in_flight - 1
    for block in itertools.count():
        cue = cues.get(block + begun_before)
        if block and cue:
            stream.redirect(cue.shown, over=cue.over, blend=cue.blend)
        yield next(chunks)


def shown(
    stream: Stream, cues: Mapping[int, Cue], pictures: int, stopped: Callable[[], bool] = lambda: False
) -> Iterator[Chunk]:
    """The chunks of `follow` up to that with the last of so many pictures. Of an engine that works ahead each comes
    once the next has begun. stopped: asked after each block that is made, whether it is the last.
    """

    def begun() -> Iterator[Chunk]:
        left = pictures
        for chunk in follow(stream, cues):
            yield chunk
            left -= chunk.pictures
            if left <= 0 or stopped():
                return

    return one_behind(stream.engine, begun())


def whole_blocks(engine: Engine, pictures: int, given: int = 0) -> int:
    """So many pictures, and those up to the end of their last block. given: how many the stream goes on from."""
    pictures_in = _pictures_after(engine, given)
    return next(pictures_in(blocks) for blocks in itertools.count() if pictures_in(blocks) >= pictures)


def record_of(engine: Engine, script: Script, seed: int, seconds: float) -> dict[str, Any]:
    """What a video was made of, as plain values; it goes into the file. `script_in` reads the prompts back."""
    return {
        "model": engine.model_name,
        "weights": engine.weights,
        **({} if engine.codec_name is None else {"codec": engine.codec_name}),
        **({} if engine.base_name is None else {"base": engine.base_name}),
        "codec_weights": engine.codec_weights,
        "recipe": engine.recipe.name,
        "levels": len(engine.recipe.steps),
        **engine.circumstances,
        "seed": seed,
        "seconds": seconds,
        "prompts": [_record_of_cue(cue) for cue in script.cues],
    }


def _record_of_cue(cue: Cue) -> dict[str, Any]:
    rewritten = {} if cue.rewritten is None else {"rewritten": cue.rewritten}
    going = {} if cue.over == 1 else {"over": cue.over, "blend": cue.blend}
    return {"at": cue.at, "unit": cue.unit, "prompt": cue.prompt, **rewritten, **going}


def script_in(record: Mapping[str, Any]) -> Script:
    """The prompts of a `record_of`. ValueError for others."""
    cues = record.get("prompts")
    if not isinstance(cues, list):
        raise ValueError(f"a record has prompts with their times, got {_short(cues)}")
    return Script(tuple(map(_recorded, cues)))


def _recorded(cue: Any) -> Cue:
    if not isinstance(cue, dict) or not cue.keys() <= {"at", "unit", "prompt", "rewritten", "over", "blend"}:
        raise ValueError(f"a prompt of a record has a time, got {_short(cue)}")
    texts = [cue.get("prompt"), cue.get("rewritten", "")]
    if cue.get("unit") not in get_args(Unit) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a prompt of a record is text at a time, got {_short(cue)}")
    require_blend(cue.get("over", 1), cue.get("blend", "lerp"))
    return Cue(**cue | {"at": _number(cue.get("at"))})


def slug(prompt: str) -> str:
    """A prompt as part of a file name, such as a-red-ball-bounces."""
    words = re.findall(r"[^\W_]+", prompt.lower())
    return "-".join(words)[:60].strip("-") or "video"


# On the command line

_MARK = re.compile(r"\[\s*(\d+(?:\.\d+)?)\s*([s%]?)\s*:\s*(\d+(?:\.\d+)?)\s*([s%]?)\s*\]")
_TIMED = re.compile(r"(\d+(?:\.\d+)?)\s*s\s*:\s*(.*)", re.DOTALL)
_MARK_UNITS: dict[str, tuple[Unit, float]] = {"s": ("seconds", 1), "%": ("of the video", 100), "": ("pictures", 1)}


def script_from(text: str) -> Script:
    """A prompt, or several: "a | b" in equal parts, "a | 5s: b" at times, "[0s:5s] a [5s:10s] b" in spans.

    Spans are in seconds, per cent or pictures; what stands before the first is said with each. ValueError for others.
    """
    if _MARK.search(text):
        return _from_spans(text)
    parts = [part.strip() for part in text.split("|")]
    timed = [_TIMED.fullmatch(part) for part in parts]
    if len(parts) > 1 and not any(timed):
        return Script(_equal_parts(parts))
    cues: list[Cue] = []
    for part, time in zip(parts, timed, strict=True):
        if time is None and cues:
            raise ValueError(f"{part!r} has no time, such as 5s: in front, but other parts have one")
        cues.append(Cue(prompt=part) if time is None else Cue(at=float(time[1]), prompt=time[2].strip()))
    return Script(tuple(cues))


def _from_spans(text: str) -> Script:
    marks = list(_MARK.finditer(text))
    shared = text[: marks[0].start()].strip()
    cues: list[Cue] = []
    spans: list[tuple[float, float, Unit]] = []
    for mark, following in itertools.zip_longest(marks, marks[1:]):
        begin, begin_unit, end, end_unit = mark.groups()
        if begin_unit and begin_unit != end_unit:
            raise ValueError(f"{mark[0]} is no span of time")
        unit, whole = _MARK_UNITS[end_unit]
        said = text[mark.end() : following.start() if following else None].strip()
        cues.append(Cue(prompt=f"{shared} {said}".strip(), at=float(begin) / whole, unit=unit))
        spans.append((float(begin), float(end), unit))
    _require_in_row(spans)
    _, last, unit = spans[-1]
    return Script(tuple(cues), last if unit == "seconds" else None, last if unit == "pictures" else None)


def _require_in_row(spans: Sequence[tuple[float, float, Unit]]) -> None:
    """ValueError unless spans, each with begin, end and unit, last and follow one another without gap or overlap."""
    for begin, end, unit in spans:
        if end <= begin:
            raise ValueError(f"a span ends after it begins, got {begin:g} to {end:g} {unit}")
    for (_, end, unit), (begin, _, following) in itertools.pairwise(spans):
        if (begin, following) != (end, unit):
            raise ValueError(f"a span ends at {end:g} {unit}, but the next begins at {begin:g} {following}")


def _equal_parts(prompts: Sequence[str]) -> tuple[Cue, ...]:
    return tuple(
        Cue(prompt=prompt, at=number / len(prompts), unit="of the video") for number, prompt in enumerate(prompts)
    )


# In files


def read_scripts(path: Path) -> list[Script]:
    """The videos that a file asks for: .txt, .jsonl, .json or .yaml.

    A file whose name ends in _extended.txt is paired by line with the one without, if that is beside it: its lines are
    shown, and the others are what videos are called by. ValueError, with file and line, for what cannot be read.
    """
    readers: dict[str, Callable[[Path], list[Script]]] = {
        ".txt": _from_text, ".jsonl": _from_json_lines,
        ".json": partial(_from_one, json.loads), ".yaml": partial(_from_one, yaml.safe_load),
    }  # fmt: skip
    reader = readers.get(path.suffix.lower().replace(".yml", ".yaml"))
    if reader is None:
        raise ValueError(f"{path} is no file of prompts: there are .txt, .jsonl, .json and .yaml")
    scripts = reader(path)
    if not scripts:
        raise ValueError(f"{path} holds no prompt")
    return scripts


def _from_text(path: Path) -> list[Script]:
    shown = [line for _, line in _lines(path)]
    plain = path.with_name(path.name.replace(f"{EXTENDED}.txt", ".txt"))
    if plain == path or not plain.is_file():
        return [Script((Cue(prompt=line),)) for line in shown]
    said = [line for _, line in _lines(plain)]
    if len(said) != len(shown):
        raise ValueError(f"{path} has {len(shown)} prompts, {plain.name} beside it has {len(said)}: they pair by line")
    return [Script((Cue(prompt=one, rewritten=other),)) for one, other in zip(said, shown, strict=True)]


def _from_json_lines(path: Path) -> list[Script]:
    scripts = []
    for number, line in _lines(path):
        with _told_of(f"{path}:{number}"):
            scripts.append(_script_of(json.loads(line)))
    return scripts


def _from_one(values: Callable[[str], Any], path: Path) -> list[Script]:
    """From a file that is one value."""
    text = _text_of(path)
    with _told_of(path):
        return _scripts_of(values(text))


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines that hold something, with their numbers from 1."""
    numbered = enumerate(_text_of(path).splitlines(), 1)
    return [(number, line.strip()) for number, line in numbered if line.strip()]


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


@contextmanager
def _told_of(place: object) -> Iterator[None]:
    """Complaints say where."""
    try:
        yield
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{place}: {' '.join(str(error).split())}") from None


def _scripts_of(value: Any) -> list[Script]:
    """A list of times is one video; any other list is one video each."""
    if isinstance(value, list) and not any(isinstance(one, dict) and one.keys() & _TIMES.keys() for one in value):
        return [_script_of(one) for one in value]
    return [_script_of(value)]


def _script_of(value: Any) -> Script:
    """One video: a list of times (ours, vLLM-Omni), prompts in parts (LongLive), a timeline (Scope), or a prompt."""
    if isinstance(value, list):
        return Script(tuple(_cue_of(one) for one in value))
    given = value if isinstance(value, dict) else {}
    if timed := given.keys() & _TIMES.keys():
        raise ValueError(f"{min(timed)} goes in a list of times, which is one video, got {_short(value)}")
    prompt, prompts = given.get("prompt", given.get("prompt_en")), given.get("prompts")  # prompt_en: VBench's list
    if prompt is not None and prompts is not None:
        raise ValueError(f"a video has a prompt or prompts, not both, got {_short(value)}")
    if isinstance(prompt, str):
        if _SWITCHES in given:
            raise ValueError(f"{_SWITCHES} goes with prompts, got {_short(value)}")
        return Script((Cue(prompt=prompt),))
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"a video is a list of times, or has a prompt or prompts, got {_short(value)}")
    if all(isinstance(one, str) for one in prompts):
        _require_known(given, ["prompts", _SWITCHES], "a video of prompts in parts")
        return Script(_parts_of(prompts, given.get(_SWITCHES)))
    spans = [_span_of(one) for one in prompts]
    _require_in_row([(cue.at, end, cue.unit) for cue, end in spans])
    return Script(tuple(cue for cue, _ in spans), spans[-1][1])


_SWITCHES = "switch_frame_indices"
_TIMES: dict[str, Unit] = {"at": "seconds", "chunk": "blocks", "frame": "latent frames"}


def _cue_of(entry: Any) -> Cue:
    """One time of a list."""
    if not isinstance(entry, dict):
        raise ValueError(f"a time is at, chunk or frame with its prompt, got {_short(entry)}")
    _require_known(entry, [*_TIMES, "prompt", "prompts", "transition", "method"], "a time")
    if "prompt" in entry and "prompts" in entry:
        raise ValueError(f"a time has a prompt or prompts, not both, got {_short(entry)}")
    times = [key for key in _TIMES if key in entry]
    if len(times) != 1:
        raise ValueError(f"a time has one of at, chunk and frame, got {_short(entry)}")
    transition, method = entry.get("transition", 0), entry.get("method", "lerp")
    if type(transition) is not int or transition < 0:  # yes and no are whole numbers, too
        raise ValueError(f"a transition is a number of blocks from 0, got {_short(transition)}")
    over = max(1, transition)
    require_blend(over, method)
    text = entry["prompt"] if "prompt" in entry else _single(entry.get("prompts"))
    if not isinstance(text, str):
        raise ValueError(f"a prompt is text, got {_short(text)}")
    return Cue(prompt=text, at=_number(entry[times[0]]), unit=_TIMES[times[0]], over=over, blend=method)


def _require_known(entry: Mapping[Any, Any], known: Sequence[str], what: str) -> None:
    for key in entry.keys() - set(known):
        close = get_close_matches(str(key), known, n=1)
        raise ValueError(f"no key {key!r} in {what}" + (f": did you mean {close[0]}?" if close else ""))


def _parts_of(prompts: list[str], switches: Any) -> tuple[Cue, ...]:
    """LongLive's: the latent frames at which the next prompt begins, or equal parts."""
    if switches is None:
        return _equal_parts(prompts)
    listed = switches.split(",") if isinstance(switches, str) else switches
    if not isinstance(listed, list) or len(listed) != len(prompts) - 1:
        raise ValueError(f"{len(prompts)} prompts need {len(prompts) - 1} {_SWITCHES}, got {_short(switches)}")
    frames = [0.0, *(_number(frame) for frame in listed)]
    return tuple(Cue(prompt=one, at=at, unit="latent frames") for one, at in zip(prompts, frames, strict=True))


def _span_of(entry: Any) -> tuple[Cue, float]:
    """One entry of Scope's timeline, and when it ends."""
    if not isinstance(entry, dict) or not {"startTime", "endTime", "prompts"} <= entry.keys():
        raise ValueError(f"an entry of a timeline has startTime, endTime and prompts, got {_short(entry)}")
    return Cue(prompt=_single(entry["prompts"]), at=_number(entry["startTime"])), _number(entry["endTime"])


def _single(weighted: Any) -> str:
    """The text of a list of weighted prompts, of which one has all the weight."""
    if not isinstance(weighted, list) or not all(isinstance(one, dict) and "text" in one for one in weighted):
        raise ValueError(f"prompts are a list of text and weight, got {_short(weighted)}")
    weighing = [one["text"] for one in weighted if one.get("weight", 1)]
    if len(weighing) != 1:
        raise ValueError(f"prompts are not mixed yet: one of them can have a weight, got {len(weighing)}")
    return str(weighing[0])


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"a time is a number from 0, got {_short(value)}")
    return number


def _short(value: Any) -> str:
    return textwrap.shorten(repr(value), 80, placeholder="...")
