"""What a far state still holds after hours: real blocks, absorbed by its own rule and read back.

A state needs keys and values only, so it can be judged before any network has learned to read it. Recorded shots (the
blocks of one real stream, in order) follow each other at random for as long as asked, absorbed at the positions that
streaming gives them. Blocks of other streams are held out: put in the place of one block, such a block is something
seen once, among everything else, and its retention is followed with age. The mark to compare with is the error of
reading back a block that was never absorbed.

What is exact. The first blocks go through a real `StreamMemory`. From then on positions repeat for ever (they are
capped), so what a recorded block does to a state is computed once and applied again, block after block, in float32.
For rules that add (`Keep` and its kind) this is the same arithmetic, bit for bit. A block under `Delta` is an affine
map of the state, whose matrix is what the rule makes of the identity: results agree within rounding. The state with
another block in one place is found without running again, because both kinds of rules are linear in the difference.
Nothing is extrapolated. What is not real: the few recorded shots return for hours. Held-out blocks never do.

Shapes: L layers (as rows of a batch: they share positions), T tokens, N heads, D per head, R features per head, M
marks, A ages.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from math import ceil
from random import Random
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from longtake.attention import linear
from longtake.attention.linear import Features, Sums
from longtake.attention.rope import Grid, Rotation
from longtake.memory.far import Decay, Delta, FarShape, Keep, Rule, SinkInFar
from longtake.memory.stream_memory import MemoryShape, StreamMemory
from longtake.memory.view import place_frames

REMEMBERED = 0.01  # how much a block is recalled that counts as remembered
_NOTHING = 1e-20  # what is left of a difference, from where on it counts as nothing
_LOOK_EVERY, _TELL_EVERY = 50, 8000  # blocks


class Block(NamedTuple):
    """Unrotated keys and values of all layers, as one real block committed them: [L, T, N, D] each."""

    k_LTND: Tensor
    v_LTND: Tensor


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Blocks of real streams: shots that fill hours; blocks of other streams; queries of those, [L, T, N, D] each."""

    shots: Sequence[Sequence[Block]]
    held_out: Sequence[Block]
    queries: Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where the blocks of a stream stand. memory: its window and extent, whatever its far state; block: its frames."""

    memory: MemoryShape
    block: int
    grid: Grid

    @property
    def past(self) -> int:
        """Blocks in a full past."""
        return self.memory.window.past // self.block

    @property
    def opening(self) -> int:
        """Blocks after which something is absorbed, and whatever comes will be absorbed at the same positions."""
        assert self.memory.extent is not None, "positions that grow never repeat"
        return max(ceil(self.memory.extent / self.block) - 2, self._window) + 1

    def delay(self, far: FarShape) -> int:
        """Blocks committed before the first that is absorbed."""
        return self._window if far.sink is SinkInFar.NEVER else self.past

    def absorbed_at(self, far: FarShape, device: torch.device | str) -> Rotation:
        """Where blocks slide into a far state, from the opening on."""
        newest = self._following.start - self.memory.window.past
        places = place_frames(range(newest - self.block, newest), self._following, *self._rule)
        return far.rotation(self.grid, places.held, device)

    def asked_at(self, far: FarShape, device: torch.device | str) -> Rotation:
        """Where the block stands that reads a far state, from the opening on."""
        return far.rotation(self.grid, place_frames((), self._following, *self._rule).current, device)

    @property
    def _window(self) -> int:
        return self.memory.window.frames // self.block

    @property
    def _following(self) -> range:
        first = self.block * (self.opening + 1)
        return range(first, first + self.block)

    @property
    def _rule(self) -> tuple[int, int | None]:
        return self.memory.window.sink, self.memory.extent


# ---------------------------------------------------------------------------------------------------------------------
# A stream of hours
# ---------------------------------------------------------------------------------------------------------------------


class Course(Protocol):
    """Blocks by number, absorbed at the positions of a stream after its opening. All that can be is prepared once."""

    def absorb(self, sums: Sums, number: int) -> Sums:
        """The sums after this block too."""
        ...

    def fading(self, number: int, mass: float) -> Tensor:
        """What this block makes of a difference between two states of that mass: a matrix [L or 1, N or 1, R, R]."""
        ...


def course_of(far: FarShape, blocks: Sequence[Block], rotation: Rotation, frames: int) -> Course:
    """The quick way to absorb these blocks of so many frames at one place. ValueError for a rule unknown to it."""
    tokens = ((far.form.of_keys(block.k_LTND, rotation), block.v_LTND) for block in blocks)
    if isinstance(far.rule, Keep):
        return _Added(far.rule, frames, [linear.sums_of(keys, v_LTND) for keys, v_LTND in tokens])
    if isinstance(far.rule, Delta):
        return _Corrected.of(far.rule, frames, tokens)
    raise ValueError(f"a far state can be followed for hours under rules that add and under Delta, not {far.rule}")


@dataclass(frozen=True)
class _Added:
    """Rules that add the sums of a block to what is left of the old."""

    rule: Keep
    frames: int
    sums: Sequence[Sums]

    def absorb(self, sums: Sums, number: int) -> Sums:
        return self.rule.add(sums, self.sums[number], self.frames)

    def fading(self, number: int, mass: float) -> Tensor:
        """The share that the rule leaves of a state of one number, for every feature."""
        new = self.sums[number]
        one, mass_B = new.kv_BNRD.new_ones(1, 1, 1, 1), new.mass_B[:1]
        nothing = Sums(0 * one, 0 * one[0], mass_B)
        left = self.rule.add(Sums(one, one[0], torch.full_like(mass_B, mass)), nothing, self.frames)
        return left.kv_BNRD * torch.eye(new.kv_BNRD.shape[2], device=one.device)


@dataclass(frozen=True)
class _Corrected:
    """The delta rule: a block makes slope @ map + start of the map from keys to values. The rule itself makes both."""

    rule: Delta
    frames: int
    starts: Sequence[Sums]
    slopes_LNRR: Sequence[Tensor]

    @classmethod
    def of(cls, rule: Delta, frames: int, tokens: Iterator[tuple[Features, Tensor]]) -> Self:
        starts, slopes = [], []
        for keys, v_LTND in tokens:
            starts.append(rule.absorb(None, keys, v_LTND, frames))
            size = keys.above.shape[-1]
            identity = torch.eye(size, device=v_LTND.device).expand(*starts[-1].k_BNR.shape, size)
            nothing = v_LTND.new_zeros(*v_LTND.shape[:3], size)
            slopes.append(rule.absorb(starts[-1]._replace(kv_BNRD=identity), keys, nothing, frames).kv_BNRD)
        return cls(rule, frames, starts, slopes)

    def absorb(self, sums: Sums, number: int) -> Sums:
        start = self.starts[number]
        counted = Decay(half_life=self.rule.half_life).add(sums, start, self.frames)  # as all but the map grows
        return counted._replace(kv_BNRD=self.slopes_LNRR[number] @ sums.kv_BNRD + start.kv_BNRD)

    def fading(self, number: int, mass: float) -> Tensor:
        return self.slopes_LNRR[number]


def cut_together(lengths: Sequence[int], blocks: int, seed: int) -> list[int]:
    """Numbers of so many blocks: whole shots of these lengths, one after the other as drawn from a seed.

    Blocks are numbered through all shots.
    """
    dice, starts = Random(seed), [sum(lengths[:shot]) for shot in range(len(lengths))]
    order: list[int] = []
    while len(order) < blocks:
        shot = dice.randrange(len(lengths))
        order += range(starts[shot], starts[shot] + lengths[shot])
    return order[:blocks]


def states(
    setting: Setting, far: FarShape, blocks: Sequence[Block], order: Sequence[int], course: Course | None = None
) -> Iterator[Sums]:
    """The sums after each block that enters the far state, while blocks are committed in this order.

    course: the quick way through all but the opening; without it everything goes through a real memory.
    """
    memory = StreamMemory(replace(setting.memory, far=far), 1, ring=False)
    for number in order[: setting.opening] if course else order:
        memory.commit([blocks[number]], setting.block, setting.grid)
        sums = memory.far(0).sums
        if sums is not None:
            yield sums
    for number in order[setting.opening - setting.past : len(order) - setting.past] if course else ():
        assert course is not None and sums is not None
        sums = course.absorb(sums, number)
        yield sums


# ---------------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------------


def effective_rank(kv_LNRD: Tensor) -> Tensor:
    """How many directions a state uses, the mean over heads: [L], from 1 to the smaller of R and D (nan for zeros).

    exp(-sum p log p) of the singular values p, scaled to a sum of 1 (Roy and Vetterli, 2007, Definition 1).
    """
    values = torch.linalg.svdvals(kv_LNRD)
    return torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp().mean(-1)


class Retention(NamedTuple):
    """What was measured of one far state, on the host. Marks are counts of absorbed blocks; ages count blocks too.

    rank_LM: `effective_rank` of the sums.
    news_LM: how much one more (held-out) block changes the answers to real queries: |after - before| / |before| in L2
        over all tokens and heads of the queries, the mean over held-out blocks. From 0; about 1 / n of blocks that
        all weigh the same.
    newest_LM: the error of reading back a held-out block that was absorbed right after the mark.
    read_back_LA: the error of one absorbed in the place of the block that has so many after it at the last mark.
    never_L: the error of one that was not absorbed, at the last mark: what its likes have taught the state.

    An error is |answer - v| / |mean - v| in L2 over tokens and heads, the mean over held-out blocks: a block's own
    keys ask, from where it was absorbed, for its own values v; `mean` is each head's mean value of all shots. 0 is
    exact, 1 no better than to know the mean, and more is worse.
    """

    marks: list[int]
    ages: list[int]
    rank_LM: Tensor
    news_LM: Tensor
    newest_LM: Tensor
    read_back_LA: Tensor
    never_L: Tensor

    @property
    def saturation_LM(self) -> Tensor:
        """1 - news / news at the first mark: 0 at the start, 1 where new blocks no longer register.

        News by itself depends on how alike a layer's blocks are; beside its own start it does not.
        """
        return 1 - self.news_LM / self.news_LM[:, :1]

    @property
    def recalled_LA(self) -> Tensor:
        """1 - read_back / never: what it is worth to have absorbed a block, at most 1; 0 once it is forgotten.

        The block that it replaced was worth something too: where old blocks weigh as much as new ones this is noisy.
        """
        return 1 - self.read_back_LA / self.never_L[:, None]

    @property
    def remembered_L(self) -> list[int | None]:
        """The greatest age at which a block is recalled by 0.01 or more; None if it is at no age."""
        rows = (self.recalled_LA >= REMEMBERED).tolist()
        ages = [[age for age, kept in zip(self.ages, row, strict=True) if kept] for row in rows]
        return [max(row, default=None) for row in ages]


@torch.no_grad()
def retention(
    setting: Setting,
    far: FarShape,
    recorded: Recorded,
    *,
    blocks: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda absorbed: None,
) -> Retention:
    """Let a far state follow a stream of so many blocks and measure it on the way.

    Args:
        setting: where blocks stand.
        far: the state: its form and its rule.
        recorded: what the stream is made of.
        blocks: how many are committed; the last of them stay in the window.
        seed: of the order of shots.
        progress: is told now and then how many blocks were absorbed.

    Raises:
        ValueError: too few blocks for positions to repeat, or a rule that is not known here.
    """
    if blocks <= setting.opening:
        raise ValueError(f"a far state is followed for more than {setting.opening} blocks, got {blocks}")
    shots = [block for shot in recorded.shots for block in shot]
    device = shots[0].k_LTND.device
    course = course_of(far, [*shots, *recorded.held_out], setting.absorbed_at(far, device), setting.block)
    probes = range(len(shots), len(shots) + len(recorded.held_out))
    judge = _Judge.of(setting, far, recorded)
    order = cut_together([len(shot) for shot in recorded.shots], blocks, seed)
    last = blocks - setting.delay(far)  # blocks that are absorbed, of which so many at the same positions:
    quick = blocks - setting.opening
    marks, ages = one_two_five(last), [0, *one_two_five(quick - 1)]

    masses, before, measured = [0.0], {}, []
    for absorbed, sums in enumerate(states(setting, far, shots, order, course), 1):
        masses.append(sums.mass_B[0].item())
        if last - 1 - absorbed in ages:
            before[last - 1 - absorbed] = sums
        if absorbed in marks:
            after = [course.absorb(sums, number) for number in probes]
            measured.append((effective_rank(sums.kv_BNRD), judge.news(sums, after), judge.read_back(after)))
        if absorbed % _TELL_EVERY == 0:
            progress(absorbed)

    rank, news, newest = (torch.stack(parts, 1).cpu() for parts in zip(*measured, strict=True))
    never_L = judge.read_back([sums] * len(probes))
    entered = order[: blocks - setting.past][-quick:]
    back = _Back(sums, before, entered, masses[-1 - quick : -1])
    read_back = [judge.read_back(of_each) if of_each else never_L for of_each in _replaced(course, back, probes)]
    return Retention(marks, ages, rank, news, newest, torch.stack(read_back, 1).cpu(), never_L.cpu())


class _Back(NamedTuple):
    """What it takes to look back: a last state, those that blocks of some ages came into, and the blocks, newest last,
    with the mass of the state that each came into."""

    last: Sums
    before: Mapping[int, Sums]
    entered: Sequence[int]
    masses: Sequence[float]


def _replaced(course: Course, back: _Back, probes: Sequence[int]) -> Iterator[list[Sums]]:
    """For each age, newest first, the last states had each of the probes been there instead of the block of that age.

    Empty where nothing is left of the difference. It fades by a product of matrices [L or 1, N or 1, R, R]. That `k`
    fades by it too holds for rules that add; the delta rule does not read `k`.
    """
    left: Tensor | None = torch.eye(back.last.kv_BNRD.shape[2], device=back.last.kv_BNRD.device)[None, None]
    for age, (number, mass) in enumerate(zip(reversed(back.entered), reversed(back.masses), strict=True)):
        if left is None:
            if age in back.before:
                yield []
            continue
        if age in back.before:
            old = back.before[age]
            kept = course.absorb(old, number)
            yield [_moved(back.last, left, kept, course.absorb(old, probe)) for probe in probes]
        left = left @ course.fading(number, mass)
        if age % _LOOK_EVERY == 0 and left.abs().max() < _NOTHING:
            left = None


def _moved(sums: Sums, left_LNRR: Tensor, kept: Sums, other: Sums) -> Sums:
    """The sums, had `other` been there instead of `kept`, of a difference of which this is left."""
    k_LNR = torch.einsum("...rs,...s->...r", left_LNRR, other.k_BNR - kept.k_BNR)
    return Sums(sums.kv_BNRD + left_LNRR @ (other.kv_BNRD - kept.kv_BNRD), sums.k_BNR + k_LNR, sums.mass_B)


def one_two_five(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... and at last `most` itself; nothing for 0."""
    series = (digit * 10**power for power in count() for digit in (1, 2, 5))
    return [*takewhile(lambda number: number < most, series), *([most] if most else [])]


@dataclass(frozen=True)
class _Judge:
    """Asks states: real queries, and for each held-out block its own keys, whose values it knows."""

    rule: Rule
    queries: Sequence[Features]
    own: Sequence[tuple[Features, Tensor, Tensor]]  # keys as queries, values, and how far those are from the mean [L]

    @classmethod
    def of(cls, setting: Setting, far: FarShape, recorded: Recorded) -> Self:
        device = recorded.held_out[0].k_LTND.device
        asked_at, absorbed_at = setting.asked_at(far, device), setting.absorbed_at(far, device)
        values = [block.v_LTND.float().mean(1, keepdim=True) for shot in recorded.shots for block in shot]
        mean_L1ND = torch.stack(values).mean(0)
        return cls(
            far.rule,
            [far.form.of_queries(q_LTND, asked_at) for q_LTND in recorded.queries],
            [
                (far.form.of_queries(k_LTND, absorbed_at), v_LTND.float(), _norm(mean_L1ND - v_LTND.float()))
                for k_LTND, v_LTND in recorded.held_out
            ],
        )

    def news(self, sums: Sums, after: Sequence[Sums]) -> Tensor:
        """[L], as `Retention` has it."""
        before_LTND = self._answer(sums)
        return torch.stack([_norm(self._answer(one) - before_LTND) / _norm(before_LTND) for one in after]).mean(0)

    def read_back(self, of_each: Sequence[Sums]) -> Tensor:
        """The mean error [L] over held-out blocks, each read from a state of its own."""
        errors = [
            _norm(self.rule.read(sums, keys) - v_LTND) / distance_L
            for sums, (keys, v_LTND, distance_L) in zip(of_each, self.own, strict=True)
        ]
        return torch.stack(errors).mean(0)

    def _answer(self, sums: Sums) -> Tensor:
        return torch.cat([self.rule.read(sums, asked) for asked in self.queries], 1)


def _norm(x_LTND: Tensor) -> Tensor:
    return x_LTND.flatten(1).norm(dim=1)
