"""Of how many streams the next blocks are made in one pass: where that pays, and makes nobody wait the longer."""

import logging
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack

from longtake.generation.stream import Engine, Stream

PAYS = 0.9
"""Of the time that blocks take one after the other: a pass over several has to take less. It delays the first of them,
and what is made so is made again by nobody to the bit."""

log = logging.getLogger(__name__)


def how_many(dry_at: Sequence[float], now: float, alone: float, gains: Mapping[int, float]) -> int:
    """Of how many streams a pass is to be, those first that run dry first.

    dry_at: when each runs dry, the first first. alone: seconds that a block takes alone. gains: sizes that pay, and
    what share of the time one after the other such a pass takes, which holds up to the next of them. The largest size
    is taken for which viewers wait no longer, all together, than if their blocks were made in turn.
    """

    def waited(ends: Sequence[float]) -> float:
        return sum(max(0.0, end - dry) for end, dry in zip(ends, dry_at, strict=False))

    for size in range(min(len(dry_at), max(gains, default=1)), 1, -1):
        gain = gains.get(max((one for one in gains if one <= size), default=0), 1.0)
        together = waited([now + size * alone * gain] * size)
        if gain < 1 and together <= waited([now + alone * turn for turn in range(1, size + 1)]):
            return size
    return 1


def trial(
    engine: Engine, prompt: str, most: int, gains: dict[int, float], rounds: int = 2
) -> Iterator[Sequence[Stream]]:  # fmt: skip
    """Measure passes over 2, 4, 8, ... streams, up to `most`, once all that they remember is full: sizes that pay enter
    `gains`, see `how_many`.

    One pass for each step, over the streams that the step before gave, so that it can be left in between; another trial
    goes on with the sizes that are not in `gains`. It ends with the first that does not pay, or fails, say for want of
    memory.
    """
    while (size := next_size(gains)) <= most:
        gain = yield from _gain(engine, prompt, size, rounds)
        if gain >= PAYS:
            return
        gains[size] = gain


def next_size(gains: Mapping[int, float]) -> int:
    """Of how many streams a trial tries passes first."""
    return 2 * max(gains, default=1)


def _gain(engine: Engine, prompt: str, size: int, rounds: int) -> Generator[Sequence[Stream], None, float]:
    alone = together = math.inf
    with ExitStack() as opened:
        try:
            streams = [opened.enter_context(engine.stream(prompt, seed=seed)) for seed in range(size)]
            for _ in range(engine.blocks_until_full):
                yield streams
                engine.next_together(streams)  # while memories fill, kernels are tried and recorded
            for _ in range(rounds):
                in_turn = 0.0
                for stream in streams:
                    yield streams
                    in_turn += next(stream).timings.total_seconds
                alone = min(alone, in_turn)
                yield streams
                together = min(together, engine.next_together(streams)[0].timings.total_seconds)
        except Exception:  # whatever it is, streams are made alone as before
            log.exception("passes over %d streams are not made: one failed", size)
            return math.inf
    return together / alone
