"""What a viewer saw of a stream that was steered live, as plain values from which it is made again.

A viewer does not see all that is made: pictures are dropped when words change, and rewinds and resets take back what
was seen. So a recording names its pictures: by the line of a stream that they belong to, and their numbers in it.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from longtake.generation.script import Cue, Script, record_of
from longtake.generation.stream import Chunk, Engine, Stream, Told, chunk_of
from longtake.generation.take import tell


@dataclass(frozen=True)
class Line:
    """A stream from its beginning: its seed, and all that it was told. A rewind or a reset begins another line.

    in_company: whether blocks of it were made together with other streams: made again alone, it may differ in rounding.
    """

    seed: int
    told: tuple[Told, ...]
    in_company: bool = False


class Span(NamedTuple):
    """Pictures in a row that were shown: numbers `begin` to before `end` of a line, by the line's place in a list."""

    line: int
    begin: int
    end: int


class Notes:
    """What is noted while pictures are shown: which they are, and under which words."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.words: list[tuple[int, str]] = []
        """From which picture shown on, from 0, there were which words."""
        self.pictures = 0

    def show(self, line: int, begin: int, count: int, words: str) -> None:
        """So many pictures of a line, from that one on."""
        if self.spans and self.spans[-1].line == line and self.spans[-1].end == begin:
            self.spans[-1] = self.spans[-1]._replace(end=begin + count)
        else:
            self.spans.append(Span(line, begin, begin + count))
        if not self.words or self.words[-1][1] != words:
            self.words.append((self.pictures, words))
        self.pictures += count

    def record(self, engine: Engine, lines: Mapping[int, Line]) -> dict[str, Any]:
        """The record of a video of these pictures, as `generate` has it, and how it came about. Some must be noted."""
        rate = engine.frame_rate
        script = Script(tuple(Cue(prompt=words, at=picture / rate) for picture, words in self.words))
        shown = sorted({span.line for span in self.spans})
        live = {
            "lines": [
                {
                    "seed": lines[number].seed,
                    "told": [asdict(told) for told in lines[number].told],
                    "in_company": lines[number].in_company,
                }
                for number in shown
            ],
            "spans": [list(span._replace(line=shown.index(span.line))) for span in self.spans],
        }
        seed = lines[self.spans[0].line].seed
        return record_of(engine, script, seed, self.pictures / rate) | {"live": live}


class Remade(Stream):
    """The pictures of a recording once more, from the beginning of every line: slow, and sure.

    Raises: ValueError for notes that cannot be read; where the pictures end, too.
    """

    def __init__(self, engine: Engine, record: Mapping[str, Any]) -> None:
        lines, spans = _noted(record)
        self._lines, self._spans = lines, deque(spans)
        self._begin(engine, spans[0].line)

    def _begin(self, engine: Engine, line: int) -> None:
        self._line, self._untold = line, deque(self._lines[line].told)
        super().__init__(engine, self._untold.popleft().prompts[0], self._lines[line].seed)

    def __next__(self) -> Chunk:
        if not self._spans:
            raise ValueError("the recording has no more pictures")
        line, begin, end = self._spans[0]
        if line != self._line or self.pictures > begin:
            self.close()
            self._begin(self.engine, line)
        chunk, before = self._told_chunk()
        while self.pictures <= begin:  # made and never shown
            chunk, before = self._told_chunk()
        self._spans.popleft()
        if self.pictures < end:
            self._spans.appendleft(Span(line, self.pictures, end))
        frames = chunk.frames[begin - before : end - before]
        return chunk_of(frames, chunk.timings, chunk.index, begin / self.engine.frame_rate)

    def _told_chunk(self) -> tuple[Chunk, int]:
        """The next chunk of the line, and how many pictures came before it."""
        while self._untold and self._untold[0].block == self.blocks:
            tell(self, self._untold.popleft())
        before = self.pictures
        return super().__next__(), before


def _noted(record: Mapping[str, Any]) -> tuple[Sequence[Line], Sequence[Span]]:
    try:
        lines = [Line(int(line["seed"]), tuple(map(Told.of, line["told"]))) for line in record["live"]["lines"]]
        spans = [Span(*map(int, span)) for span in record["live"]["spans"]]
        readable = _are_whole(lines, spans)
    except (KeyError, TypeError, AttributeError, ValueError):
        readable = False
    if not readable:
        raise ValueError("what this recording says of itself cannot be read")
    return lines, spans


def _are_whole(lines: Sequence[Line], spans: Sequence[Span]) -> bool:
    """Whether lines begin with a stream's beginning and can be told again, and spans hold pictures of them."""
    begun = all(line.told[:1] and line.told[0].verb == "begin" and not line.told[0].picture for line in lines)
    known = all(0 <= line < len(lines) and 0 <= begin < end for line, begin, end in spans)
    told = all(_can_be_told(told) for line in lines for told in line.told[1:])
    return bool(lines and spans) and begun and known and told


def _can_be_told(told: Told) -> bool:
    ways = {"cut": True, "redirect": told.in_flight is not None}
    return told.far is not None and ways.get(told.verb, False)
