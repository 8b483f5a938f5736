"""Counting what detectors read rightly, and how sure such a count is.

Shapes: B clips.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from longtake.toy.detect import Detections
from longtake.toy.scenes import ATTRIBUTES


@dataclass(frozen=True)
class Tally:
    """What became of clips, in order, a character each: 1 right, 0 wrong, ? abstained and so wrong, - not scored."""

    verdicts: str = ""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.verdicts + other.verdicts)

    @property
    def right(self) -> int:
        return self.verdicts.count("1")

    @property
    def scored(self) -> int:
        return len(self.verdicts) - self.verdicts.count("-")

    @property
    def abstained(self) -> int:
        return self.verdicts.count("?")

    @property
    def share(self) -> float | None:
        return self.right / self.scored if self.scored else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the share: Wilson's, which also holds near 0 and 1 and for few clips."""
        if not self.scored:
            return None
        z, n, p = 1.96, self.scored, self.right / self.scored
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)

    def table(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            "right": self.right,
            "scored": self.scored,
            "abstained": self.abstained,
            "interval_95": self.interval,
            "verdicts": self.verdicts,
        }


Score = dict[str, Tally]  # by attribute


def shares(score: Score) -> dict[str, float | None]:
    return {name: one.share for name, one in score.items()}


def tables(score: Score) -> dict[str, dict[str, Any]]:
    """All counts, ready for JSON."""
    return {name: one.table() for name, one in score.items()}


def tally(found_B: Tensor, wanted_B: Tensor) -> Tally:
    """Compare indices where something is wanted (0 or more); -1 as found is to abstain, and wrong."""
    return Tally("".join(map(_verdict, found_B.tolist(), wanted_B.tolist())))


def _verdict(found: int, wanted: int) -> str:
    if wanted < 0:
        return "-"
    return "?" if found < 0 else str(int(found == wanted))


def asked_for(name: str, said: Sequence[Mapping[str, str]]) -> Tensor:
    """What captions say of one attribute, as indices [B], -1 where nothing."""
    return torch.tensor([ATTRIBUTES[name].index(one[name]) if name in one else -1 for one in said])


def joined(parts: Sequence[Detections]) -> Detections:
    """Detections of several batches as one, on the CPU."""
    names = [field.name for field in fields(Detections)]
    return Detections(**{name: torch.cat([getattr(part, name).cpu() for part in parts]) for name in names})
