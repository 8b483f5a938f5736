"""The far part of a memory: sums of fixed size that take what slides out of the window.

A state is a value: nothing is written in place, so forks share it, graphs keep it, and rows of a batch are
concatenated states. A rule says how much of the old stays when new tokens come, and how the sums are read.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from numbers import Real
from typing import Protocol, Self

import torch
from torch import Tensor

from longtake.attention import linear
from longtake.attention.linear import Features, Form, Sums, Weighed
from longtake.attention.rope import Grid, Rotation
from longtake.memory.window import Keys


class Rule(Protocol):
    """How a far state takes the tokens of `frames` latent frames, and how it answers."""

    def absorb(self, sums: Sums | None, keys: Features, v_BTND: Tensor, frames: int) -> Sums: ...

    def read(self, sums: Sums, queries: Features) -> Tensor: ...


@dataclass(frozen=True)
class Keep:
    """Nothing is ever forgotten (published): after n blocks, one block's share is 1/n."""

    def absorb(self, sums: Sums | None, keys: Features, v_BTND: Tensor, frames: int) -> Sums:
        return self.add(sums, linear.sums_of(keys, v_BTND), frames)

    def add(self, sums: Sums | None, new: Sums, frames: int) -> Sums:
        """The sums after tokens of which only the sums are left."""
        return linear.added(self.kept(sums, new.mass_B, frames), new)

    def kept(self, sums: Sums | None, mass: float | Tensor, frames: int) -> Sums | None:
        """What weighs on of the old sums when tokens come: how many, in all rows or in each [B], of how many frames."""
        return sums

    def read(self, sums: Sums, queries: Features) -> Tensor:
        return linear.read(sums, queries)


@dataclass(frozen=True, kw_only=True)
class Decay(Keep):
    """What was absorbed `half_life` latent frames before the newest counts half."""

    half_life: float

    def kept(self, sums: Sums | None, mass: float | Tensor, frames: int) -> Sums | None:
        return _scaled(sums, 0.5 ** (frames / self.half_life))


@dataclass(frozen=True, kw_only=True)
class MassCap(Keep):
    """Never more than the mass of so many latent frames, or of those that came last if they are more: from there on the
    old makes room for the new."""

    frames: float

    def kept(self, sums: Sums | None, mass: float | Tensor, frames: int) -> Sums | None:
        if sums is None:
            return None
        room = mass * max(0.0, self.frames / frames - 1)
        return sums.scaled((room / sums.mass_B.clamp(min=1)).clamp(max=1))


@dataclass(frozen=True, kw_only=True)
class Delta:
    """Gated delta rule (2412.06464): the old fades by half in `half_life` latent frames, then errors are corrected.

    stiffness: how hard the old map holds on where a block says otherwise, beside the block's mean square of unit
    keys, which is 1 in total and 1 / features in one direction on average.
    """

    half_life: float = math.inf
    stiffness: float = 0.01

    def absorb(self, sums: Sums | None, keys: Features, v_BTND: Tensor, frames: int) -> Sums:
        old = _scaled(sums, 0.5 ** (frames / self.half_life))
        return linear.correct(old, keys, v_BTND, self.stiffness)

    def read(self, sums: Sums, queries: Features) -> Tensor:
        return linear.recall(sums, queries)


RULES: dict[str, Callable[[float, float], Rule]] = {
    "keep": lambda frames, stiffness: Keep(),
    "decay": lambda frames, stiffness: Decay(half_life=frames),
    "cap": lambda frames, stiffness: MassCap(frames=frames),
    "delta": lambda frames, stiffness: Delta(half_life=frames, stiffness=stiffness),
}
"""Rules by the names that recipes and the command line have for them; `rule_named` makes them."""


def rule_named(name: str, frames: float = math.inf, stiffness: float = Delta.stiffness) -> Rule:
    """The rule of that name, one of `RULES`.

    frames: latent frames above 0: the half life of decay and delta, or what cap holds. decay and cap need a finite
    number, keep takes none. stiffness: of delta alone, above 0 and finite. ValueError for what cannot be.
    """
    if name not in RULES:
        raise ValueError(f"no rule {name!r}: there are {', '.join(RULES)}")
    if not frames > 0:
        raise ValueError(f"frames must be above 0, got {frames}")
    if name != "delta" and math.isfinite(frames) != (name in ("decay", "cap")):
        raise ValueError("decay and cap need a number of latent frames, such as 60; keep takes none")
    if not 0 < stiffness < math.inf:
        raise ValueError(f"stiffness must be above 0 and finite, got {stiffness}")
    if name != "delta" and stiffness != Delta.stiffness:
        raise ValueError(f"only delta has a stiffness, {name} has none")
    return RULES[name](frames, stiffness)


class SinkInFar(Enum):
    """Whether the sink, exact for ever, enters the far state as well when it falls behind the past."""

    NEVER = auto()
    AS_WELL = auto()  # released: counted twice
    ROTATED_TWICE = auto()  # released for inference: also rotated before it is absorbed


class Maps(Protocol):
    """What plain head vectors [B, T, N, D] of one layer pass before a far state makes features of them; no window sees
    what comes of it."""

    def of_keys(self, plain_BTND: Tensor) -> Tensor: ...

    def of_queries(self, plain_BTND: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class FarShape:
    """What a recipe makes of what left the window.

    turns_with_frames: whether positions of features are those of frame, row and column (published), or of row and
    column alone: then it is the same wherever in time a state is read from. maps: a layer's own; published are none.
    """

    form: Form = linear.PAPER
    rule: Rule = field(default_factory=Keep)
    sink: SinkInFar = SinkInFar.NEVER
    turns_with_frames: bool = True
    maps: Maps | None = None

    def mapped_keys(self, plain_BTND: Tensor) -> Tensor:
        """What is absorbed of a layer's keys."""
        return plain_BTND if self.maps is None else self.maps.of_keys(plain_BTND)

    def mapped_queries(self, plain_BTND: Tensor) -> Tensor:
        """What is asked by a layer's queries."""
        return plain_BTND if self.maps is None else self.maps.of_queries(plain_BTND)

    def rotation(self, grid: Grid, positions: Sequence[float], device: torch.device | str) -> Rotation:
        """Of the features of the tokens of frames at these positions. Frames all at 0 do not turn with their axis."""
        return grid.rotation(positions if self.turns_with_frames else [0] * len(positions), device)

    def reads_like(self, learned: "FarShape") -> bool:
        """Whether who learned to read that one can read this: rules that add may differ in how much is forgotten."""
        adds = isinstance(self.rule, Keep) and isinstance(learned.rule, Keep)
        return self == (replace(learned, rule=self.rule) if adds else learned)

    def plain(self) -> "FarShape":
        """The same, of whose sums no kernel takes care."""
        return FarShape(**vars(self))

    def absorb(self, sums: Sums | None, keys: Keys, rotation: Rotation) -> Sums:
        """The sums after these frames too, whose keys are mapped already, placed once and for all by `rotation`."""
        return self.rule.absorb(sums, self.form.of_keys(keys.k_BTND, rotation), keys.v_BTND, len(keys.frames))


# Hybrid Forcing (2604.10103): its paper, its released training code, its released inference code.
PAPER = FarShape()
REF_TRAIN = FarShape(form=linear.REF_TRAIN, sink=SinkInFar.AS_WELL)
REF_INFER = FarShape(form=linear.REF_INFER, sink=SinkInFar.ROTATED_TWICE)
PRESETS = {"paper": PAPER, "ref_train": REF_TRAIN, "ref_infer": REF_INFER}


@dataclass(frozen=True)
class FarState:
    """One layer's far memory. Without sums nothing was absorbed yet."""

    shape: FarShape
    sums: Sums | None = None

    def absorb(self, keys: Keys, rotation: Rotation) -> Self:
        """The state after these frames too, placed once and for all by `rotation`."""
        mapped = keys._replace(k_BTND=self.shape.mapped_keys(keys.k_BTND))
        return self._with(self.shape.absorb(self.sums, mapped, rotation))

    def read(self, plain_q_BTND: Tensor, rotation: Rotation) -> Tensor:
        """What the far past answers to unrotated queries that stand at `rotation`."""
        assert self.sums is not None, "nothing was absorbed yet"
        return self.shape.rule.read(self.sums, self._asking(plain_q_BTND, rotation))

    def weigh(self, plain_q_BTND: Tensor, rotation: Rotation) -> Weighed:
        """What the far past puts above and below a bar that it shares with others. Only for rules that add."""
        assert self.sums is not None, "nothing was absorbed yet"
        return linear.weigh(self.sums, self._asking(plain_q_BTND, rotation))

    @property
    def present_B(self) -> Tensor:
        """Which rows of the batch remember anything here."""
        assert self.sums is not None, "nothing was absorbed yet"
        return self.sums.mass_B > 0

    def fade(self, share: float) -> Self:
        """The state at a redirect or a cut: that share of it weighs on (1 keeps all, 0 forgets all)."""
        require_share(share)
        return self._with(_scaled(self.sums, share))

    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.sums or ())

    def _asking(self, plain_q_BTND: Tensor, rotation: Rotation) -> Features:
        return self.shape.form.of_queries(self.shape.mapped_queries(plain_q_BTND), rotation)

    def _with(self, sums: Sums | None) -> Self:
        return type(self)(self.shape, sums)


def require_share(share: float) -> None:
    """ValueError for what cannot be a share of a far state."""
    if not isinstance(share, Real) or not 0 <= share <= 1:
        raise ValueError(f"a far state keeps a share of 0 to 1, not {share!r}")


def stacked(states: Sequence[FarState]) -> FarState:
    """The state of a batch whose rows are those of the given ones, all of one shape; some may be empty."""
    full = [state.sums for state in states if state.sums is not None]
    if not full:
        return states[0]
    rows = [full[0].scaled(0) if state.sums is None else state.sums for state in states]
    return FarState(states[0].shape, Sums(*(torch.cat(parts) for parts in zip(*rows, strict=True))))


def _scaled(sums: Sums | None, share: float) -> Sums | None:
    return None if sums is None else sums.scaled(share)
