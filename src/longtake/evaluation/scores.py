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
    """How many clips were right, out of how many that could be."""

    right: int = 0
    scored: int = 0
    abstained: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.right + other.right, self.scored + other.scored, self.abstained + other.abstained)

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
        }


Score = dict[str, Tally]  # by attribute


def tally(found_B: Tensor, wanted_B: Tensor) -> Tally:
    """Count indices where something is wanted (0 or more); -1 as found is to abstain, and wrong."""
    found, wanted = found_B.cpu(), wanted_B.cpu()
    scored = wanted >= 0
    counts = ((found == wanted) & scored, scored, (found < 0) & scored)
    return Tally(*(int(count.sum()) for count in counts))


def asked_for(name: str, said: Sequence[Mapping[str, str]]) -> Tensor:
    """What captions say of one attribute, as indices [B], -1 where nothing."""
    return torch.tensor([ATTRIBUTES[name].index(one[name]) if name in one else -1 for one in said])


def joined(parts: Sequence[Detections]) -> Detections:
    """Detections of several batches as one, on the CPU."""
    names = [field.name for field in fields(Detections)]
    return Detections(**{name: torch.cat([getattr(part, name).cpu() for part in parts]) for name in names})
