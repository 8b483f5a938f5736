"""Finds subjects in single pictures by their colour, their dark outline and their face.

A coarse pass looks for coloured blobs with ink around and in them; around each, templates of all kinds in all poses
are compared, first coarsely, then the best pose of each kind precisely.

Shapes: N pictures, C candidates in each, K kinds, P poses, V variants of a pose.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nn

from longtake.toy import palettes
from longtake.toy.scenery import membership
from longtake.toy.templates import VARIANTS, poses, subject_templates

COARSE, FINE = 4, 2  # screen pixels to a pixel of the maps
CANDIDATES = 5  # per picture
APART = 3  # coarse pixels: of candidates nearer than this to a better one, nothing is kept
COARSE_SHIFT, FINE_SHIFT = 2, 2  # how far templates are moved around a candidate, in pixels of the maps
DARK, DARKEST = 0.8, 0.15  # ink by its brightest colour channel: none above the first, all below the second


class Sightings(NamedTuple):
    """The candidates of every picture, the best first: [N, C] each unless noted."""

    x: Tensor  # the centre, in screen pixels
    y: Tensor
    angle: Tensor  # radians, clockwise
    colour: Tensor  # index
    match: Tensor  # [N, C, K]: how well each kind fits, at most 1
    body: Tensor  # of the kind that fits best: how well the coloured area fits, at most 1
    ink: Tensor  # and how well outline and face do: this is what a blurred subject lacks
    face: Tensor  # how much darker pupils are than the white around them: only a face has that


PORTION = 64  # pictures at a time, which bounds memory


def sightings(pictures_NHWC: Tensor, times_N: Tensor) -> Sightings:
    """What looks like a subject in pictures of known time of day."""
    portions = zip(pictures_NHWC.split(PORTION), times_N.split(PORTION), strict=True)
    parts = [_sightings(pictures.movedim(-1, 1), times) for pictures, times in portions]
    return Sightings(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _sightings(pixels_NCHW: Tensor, times_N: Tensor) -> Sightings:
    coarse, fine = (_maps(nn.avg_pool2d(pixels_NCHW, pixel), times_N) for pixel in (COARSE, FINE))
    spots, pose = _coarse_fit(coarse, _candidates(coarse))
    result = Sightings(*(value.unflatten(0, (-1, CANDIDATES)) for value in _fine_fit(fine, spots, pose)))
    order = result.match.amax(-1).argsort(1, descending=True)
    return Sightings(*(value.take_along_dim(order[..., None] if value.ndim > 2 else order, 1) for value in result))


class _Maps(NamedTuple):
    body: Tensor  # [N, colours, H, W]: how much each pixel has each subject colour
    ink: Tensor  # [N, H, W]: how dark it is


def _maps(pixels_NCHW: Tensor, times_N: Tensor) -> _Maps:
    light = torch.tensor(palettes.SUBJECT_LIGHT, device=pixels_NCHW.device)[times_N][:, None]
    bodies = torch.tensor(palettes.BODY, device=pixels_NCHW.device) * light
    brightest = pixels_NCHW.amax(1)
    return _Maps(membership(pixels_NCHW, bodies), ((DARK - brightest) / (DARK - DARKEST)).clamp(0, 1))


class _Spots(NamedTuple):
    """Where something may be: indices [M], for M = N x C candidates."""

    picture: Tensor
    row: Tensor
    column: Tensor
    colour: Tensor


def _candidates(maps: _Maps) -> _Spots:
    """The places that look most like some kind in an average pose, so many in each picture."""
    table = subject_templates(COARSE, variants=False, device=maps.ink.device)
    body_like, ink_like = (weights.mean(1)[:, None] for weights in (table.body, table.ink))  # [K, 1, T, T]
    half = body_like.shape[-1] // 2
    body = nn.conv2d(maps.body.flatten(0, 1)[:, None], body_like, padding=half).unflatten(0, maps.body.shape[:2])
    ink = nn.conv2d(maps.ink[:, None], ink_like, padding=half)
    response, colour = (body + ink[:, None]).amax(2).max(1)  # [N, colours, K, H, W] to [N, H, W]
    peak = response == nn.max_pool2d(response, 2 * APART + 1, 1, APART)
    index = torch.where(peak, response, -torch.inf).flatten(1).topk(CANDIDATES, 1).indices
    picture = torch.arange(len(index), device=index.device)[:, None].expand_as(index)
    width = response.shape[-1]
    chosen = (picture, index // width, index % width, colour.flatten(1).gather(1, index))
    return _Spots(*(value.flatten() for value in chosen))


def _coarse_fit(maps: _Maps, spots: _Spots) -> tuple[_Spots, Tensor]:
    """Try all kinds in all poses: the spots moved to where they fit best, and the best pose of each kind [M, K]."""
    table = subject_templates(COARSE, variants=False, device=spots.row.device)
    windows = _windows(maps, spots, table.body.shape[-1], COARSE_SHIFT)
    weights = torch.stack([table.body, table.ink], 2).flatten(0, 1).flatten(1)  # [K P, 2 T T]
    score = (weights @ windows.flatten(1, 2)).unflatten(1, table.body.shape[:2])  # [M, K, P, shifts]
    shift = score.flatten(1).argmax(1) % score.shape[-1]
    return _moved(spots, shift, COARSE_SHIFT), score.amax(3).argmax(2)


def _fine_fit(maps: _Maps, spots: _Spots, pose_MK: Tensor) -> Sightings:
    """Compare the best pose of each kind and its variants precisely: [M] each, and match [M, K]."""
    ratio = COARSE // FINE
    spots = spots._replace(row=spots.row * ratio + ratio // 2, column=spots.column * ratio + ratio // 2)
    table = subject_templates(FINE, variants=True, device=pose_MK.device)
    windows = _windows(maps, spots, table.body.shape[-1], FINE_SHIFT)
    kinds, shifts = torch.arange(pose_MK.shape[1], device=pose_MK.device), windows.shape[-1]
    body, ink = (  # [M, K V, shifts] each
        weights[kinds, pose_MK].flatten(3).flatten(1, 2) @ window
        for weights, window in zip((table.body, table.ink), windows.unbind(1), strict=True)
    )
    match, index = (body + ink).unflatten(1, (len(kinds), -1)).flatten(2).max(2)  # of each kind, the best V and shift
    kind = match.argmax(1, keepdim=True)
    index = index.gather(1, kind)
    variant, shift = (index // shifts)[:, 0], (index % shifts)[:, 0]
    at_best = kind * len(VARIANTS) * shifts + index
    body, ink = (part.flatten(1).gather(1, at_best)[:, 0] for part in (body, ink))

    pose = pose_MK.gather(1, kind)[:, 0]
    face = table.face[kind[:, 0], pose, variant].flatten(1)
    everyone = torch.arange(len(face), device=face.device)
    spots = _moved(spots, shift, FINE_SHIFT)
    return Sightings(
        x=(spots.column + 0.5) * FINE,
        y=(spots.row + 0.5) * FINE,
        angle=poses().angle.to(face.device)[pose] + VARIANTS.to(face.device)[variant, 0],
        colour=spots.colour,
        match=match,
        body=body,
        ink=ink,
        face=(face * windows[everyone, 1, :, shift]).sum(1),
    )


def _windows(maps: _Maps, spots: _Spots, size: int, shift: int) -> Tensor:
    """The two maps around each spot, moved by up to `shift` pixels every way: [M, 2, size^2, shifts].

    Beyond the screen there is no colour and no ink.
    """
    reach = size // 2 + shift
    around = torch.arange(2 * reach + 1, device=spots.row.device)
    body, ink = (nn.pad(part, (reach,) * 4) for part in maps)
    rows = (spots.row[:, None, None] + around[:, None]).clamp(0, ink.shape[1] - 1)
    columns = (spots.column[:, None, None] + around).clamp(0, ink.shape[2] - 1)
    picture, colour = spots.picture[:, None, None], spots.colour[:, None, None]
    both = torch.stack([body[picture, colour, rows, columns], ink[picture, rows, columns]], 1)
    return nn.unfold(both, size).unflatten(1, (2, -1))


def _moved(spots: _Spots, index: Tensor, shift: int) -> _Spots:
    """The spots after the moves that `_windows` lists at `index`."""
    side = 2 * shift + 1
    return spots._replace(row=spots.row + index // side - shift, column=spots.column + index % side - shift)
