"""Decides which subject a clip shows, from what its pictures show one by one, and follows it.

Shapes: B clips, S pictures of each, C candidates in each, K subject kinds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as nn

from longtake.toy.scenery import ABSTAIN
from longtake.toy.scenes import COLOURS, LANDMARK_COLOURS, SUBJECTS
from longtake.toy.sightings import Sightings

LEAST_MATCH = 0.28  # of the clip's kind, for a candidate to be the subject
LEAST_INK = 0.10
LEAST_PICTURES = 4  # that must show it
# How sure one must be of a subject: the mean match over the better half of its pictures, plus half of the mean face,
# plus the lead of its kind over all others. A landmark or a blurred subject matches a bit of everything.
LEAST_SURE = 0.60
DISCOUNT = 0.18  # from the match of a candidate that a landmark explains as well
LANDMARK_WIDTH = 34.0  # pixels from a landmark's middle to where it surely ends
ANOTHER_COLOUR = 0.10  # from the match, where the colour is not the clip's: it may have changed
SECOND_MATCH = 0.70  # as a part of the first one's, for another candidate to be a second subject
SECOND_SHARE = 0.4  # of the pictures with a subject must show a second one, to count it


@dataclass(frozen=True)
class Subject:
    """The subject of each clip and its track."""

    kind: Tensor  # [B], index or -1
    colour: Tensor  # [B], index or -1
    count: Tensor  # [B]: how many are seen at once
    x: Tensor  # [B, S], in screen pixels, nan where not seen
    y: Tensor
    angle: Tensor  # [B, S], radians
    soft: Tensor  # [B, K + colours + 4]: match of each kind, share of each colour, body, ink, face and how sure


def discounted(found: Sightings, landmark_colour_B: Tensor, landmark_x_BS: Tensor) -> Sightings:
    """Lower the match of what may be just a part of the clip's landmark: of its colour, and where it stands."""
    alike = [COLOURS.index(name) for name in LANDMARK_COLOURS]
    colour = torch.tensor([*alike, ABSTAIN], device=found.x.device)[landmark_colour_B]  # no landmark is the last entry
    there = (found.x - landmark_x_BS[..., None]).abs() < LANDMARK_WIDTH  # never where x is nan
    suspect = there & (found.colour == colour[:, None, None])
    return found._replace(match=found.match - DISCOUNT * suspect[..., None])


def read_subject(found_BSC: Sightings) -> Subject:
    """Choose kind and colour by the evidence of all pictures, then follow what has them."""
    kind, colour = _chosen(found_BSC)
    match = _match_of(found_BSC, kind, colour)
    best, index = match.max(2)
    seen = best > LEAST_MATCH
    at = Sightings(*(_at_candidate(value, index) for value in found_BSC))

    level = _better_half(best, seen)
    kinds = _mean_where(at.match, seen)
    body_ink_face = _mean_where(torch.stack([at.body, at.ink, at.face], 2), seen)
    first, runner_up = kinds.topk(2, 1).values.unbind(1)
    sure = level + body_ink_face[:, 2] / 2 + first - runner_up
    known = (seen.sum(1) >= LEAST_PICTURES) & (sure > LEAST_SURE)
    seen &= known[:, None]

    second = (match > SECOND_MATCH * level[:, None, None]).sum(2) > 1
    twice = (second & seen).sum(1) > SECOND_SHARE * seen.sum(1)
    colours = _mean_where(nn.one_hot(at.colour, len(COLOURS)).float(), seen)
    return Subject(
        kind=torch.where(known, kind, ABSTAIN),
        colour=torch.where(known, colour, ABSTAIN),
        count=torch.where(known, 1 + twice.long(), 0),
        x=torch.where(seen, at.x, torch.nan),
        y=torch.where(seen, at.y, torch.nan),
        angle=at.angle,
        soft=torch.cat([kinds, colours, body_ink_face, sure[:, None]], 1) * known[:, None],
    )


def _chosen(found: Sightings) -> tuple[Tensor, Tensor]:
    """The kind and the colour, [B] each, that together gather the most match over the pictures of a clip."""
    kinds, colours = len(SUBJECTS), len(COLOURS)
    own = nn.one_hot(found.colour, colours)[..., None]  # [B, S, C, colours, 1]
    gain = (found.match - LEAST_MATCH).clamp(min=0)[..., None, :] * own
    index = gain.amax(2).sum(1).flatten(1).argmax(1)  # the best candidate of each picture counts, so twins do not
    return index % kinds, index // kinds


def _match_of(found: Sightings, kind_B: Tensor, colour_B: Tensor) -> Tensor:
    """How well each candidate matches one kind and colour: [B, S, C]."""
    match = found.match.take_along_dim(kind_B[:, None, None, None], 3)[..., 0]
    match = match - ANOTHER_COLOUR * (found.colour != colour_B[:, None, None])
    return torch.where(found.ink > LEAST_INK, match, -1.0)


def _at_candidate(value: Tensor, index_BS: Tensor) -> Tensor:
    """One candidate of each picture: [B, S, C, ...] to [B, S, ...]."""
    return value.take_along_dim(index_BS.reshape(*index_BS.shape, *(1,) * (value.ndim - 2)), 2).squeeze(2)


def _better_half(match_BS: Tensor, seen_BS: Tensor) -> Tensor:
    """Mean match over the better half of the pictures with a subject, without blinks and what hides it in part: [B]."""
    half = ((seen_BS.sum(1) + 1) // 2).clamp(min=1)
    ranked = torch.where(seen_BS, match_BS, 0).sort(1, descending=True).values
    return ranked.cumsum(1).gather(1, half[:, None] - 1)[:, 0] / half


def _mean_where(value_BSX: Tensor, seen_BS: Tensor) -> Tensor:
    """The mean over the pictures with a subject, 0 where there is none: [B, X]."""
    return (value_BSX * seen_BS[..., None]).sum(1) / seen_BS.sum(1, keepdim=True).clamp(min=1)
