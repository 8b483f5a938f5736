"""Reads the landscape off pictures: place, time, weather, landmark, and how the camera moves.

Shapes: B clips, S pictures of a clip, N pictures, L looks. Pictures are [..., H, W, 3] in 0..1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nn

from longtake.toy import landscape, palettes
from longtake.toy.scenes import CAMERAS, HEIGHT, LANDMARKS, PLACES, TIMES, WEATHERS, WIDTH
from longtake.toy.templates import Looks, landmark_templates, looks

ABSTAIN = -1

# ---------------------------------------------------------------------------------------------------------------------
# Place, time and weather
# ---------------------------------------------------------------------------------------------------------------------

ROWS, COLUMNS = slice(2, HEIGHT, 4), slice(3, WIDTH, 6)  # the pixels that are looked at
COLOUR_SPREAD = 0.05  # how far a pixel may be from its layer's colour
STRAY = 0.02  # the likelihood of pixels that belong to none: subject, landmark, clouds, drops
LEAST_LIKELIHOOD = -3.4  # a mean below this (in logarithms; pure noise has log(STRAY) = -3.9) is no landscape of ours


def look_likelihoods(pictures_NHWC: Tensor) -> Tensor:
    """How well each place at each time in each weather explains pictures: mean log-likelihood of a pixel, [N, L].

    A row of a look is a mixture of sky and three layers, as much of each as the lines of the landscape let through.
    """
    table = _looks(pictures_NHWC.device)
    pixels = pictures_NHWC[:, ROWS, COLUMNS].transpose(1, 2)  # [N, X, Y, 3]
    result = []
    for colours, shares in zip(table.colours, table.shares, strict=True):  # one look at a time is what fits a cache
        likelihood = torch.full(pixels.shape[:-1], STRAY, device=pixels.device)
        for layer in range(colours.shape[1]):
            distance = (pixels - colours[:, layer]).square().sum(-1)
            likelihood = likelihood + shares[:, layer] * torch.exp(distance / (-2 * COLOUR_SPREAD**2))
        result.append(likelihood.log().mean((1, 2)))
    return torch.stack(result, 1)


class Setting(NamedTuple):
    """Place, time and weather of clips: indices [B] or -1, and soft scores."""

    place: Tensor
    time: Tensor
    weather: Tensor
    soft: Tensor  # [B, 10]: how likely each place, time and weather is, the last of each left out, and what falls


def read_setting(likelihoods_BSL: Tensor, falling_B: Tensor) -> Setting:
    """The look that explains the given pictures best; no weather if what falls from the sky does not fit it."""
    mean = likelihoods_BSL.mean(1)
    best, index = mean.max(1)
    table = _looks(mean.device)
    place, time, weather = (
        torch.where(best > LEAST_LIKELIHOOD, column[index], ABSTAIN)
        for column in (table.place, table.time, table.weather)
    )
    dry = weather == WEATHERS.index("clear")
    fits = dry == (falling_B < FALLING)
    soft = torch.cat([_marginals(mean), 4 * falling_B[:, None]], 1)
    return Setting(place, time, torch.where(fits, weather, ABSTAIN), soft)


def _marginals(likelihoods_BL: Tensor) -> Tensor:
    """How likely each place, time and weather is by itself; the last of each follows from the others: [B, 9]."""
    counts = (len(PLACES), len(TIMES), len(WEATHERS))
    chances = (likelihoods_BL / 0.1).softmax(1).unflatten(1, counts)
    by_attribute = (chances.sum((2, 3)), chances.sum((1, 3)), chances.sum((1, 2)))
    return torch.cat([chance[:, :-1] for chance in by_attribute], 1)


def best_times(likelihoods: Tensor) -> Tensor:
    """The time of day of each picture by itself: [..., L] to indices [...]."""
    return _looks(likelihoods.device).time[likelihoods.argmax(-1)]


def _looks(device: torch.device) -> Looks:
    return looks(tuple(range(HEIGHT))[ROWS], device)


FALLING = 0.03  # share of the upper sky that drops or flakes enter or leave from one picture to the next
SKY_ROWS, SKY_CELLS = 16, 8


def falling(pictures_BSHWC: Tensor) -> Tensor:
    """How much of the upper sky changes between neighbouring pictures, 0..1: [B].

    It is the median over cells of the sky: clouds are too slow to count, a subject or a roof is in few cells.
    """
    sky = pictures_BSHWC[:, :, :SKY_ROWS].mean(-1)
    change = (sky[:, 1:] - sky[:, :-1]).abs()
    changed = (nn.avg_pool2d(change, 2) > 0.06).float()  # [B, S - 1, H, W]
    return changed.unflatten(3, (SKY_CELLS, -1)).mean((1, 2, 4)).median(1).values


# ---------------------------------------------------------------------------------------------------------------------
# The camera
# ---------------------------------------------------------------------------------------------------------------------

FAST = torch.arange(-40.0, 41.0, 2.0)  # pixels from one picture to the next that are tried
STEADY = torch.arange(-28.0, 29.0, 2.0)  # pixels per second that are tried
SLOWEST_PAN = 6.0  # pixels per second
LEAST_SWEEP, LEAST_TURN = 6.0, 40.0  # pixels from one picture to the next, and in all, of a camera that turns away
LEAST_PAIRS = 5  # of neighbouring pictures, in which it turns one way
LEAST_GAIN = 0.05  # by which part fast shifts must explain all of these better than none
UNSTEADY = 0.0005  # what it costs a shift to differ from the one before, for every step of `FAST`
PAN_GAIN = 0.03  # by which part a steady shift must explain pictures better than none, to be a pan
FLAT = 0.01  # where no shift is worse than the best one by more than this part, there is no landscape to tell by


class Camera(NamedTuple):
    """How the camera moves: kind [B], an index or -1, and its way since the first picture."""

    kind: Tensor
    turned: Tensor  # [B, S]: the part of the way that went in fast turns, in pixels
    drift: Tensor  # [B]: the steady speed that fits best, in pixels per second


def read_camera(pictures_BSHWC: Tensor, rate: float) -> Camera:
    """How the landscape shifts between pictures, of which there are `rate` a second."""
    bands = _bands(pictures_BSHWC)
    clear = _without_flakes(pictures_BSHWC[:, :, TOP - FLAKE :])  # all that the land has a part in
    turned, turned_behind_snow = _turns(bands), _turns(_bands(clear, FLAKE))
    turned = torch.where(turned.any(1, keepdim=True), turned, turned_behind_snow).cumsum(1)
    away = (turned.amax(1) - turned.amin(1)) > LEAST_TURN
    drift, flat = _drift(bands, rate)
    still, left, right, looks_away = range(len(CAMERAS))
    kind = torch.where(drift < 0, left, right)
    kind = torch.where(drift.abs() < SLOWEST_PAN, still, kind)
    kind = torch.where(flat, ABSTAIN, kind)
    return Camera(torch.where(away, looks_away, kind), turned * away[:, None], drift)


def _turns(bands: Tensor) -> Tensor:
    """Fast shifts from each picture to the next, 0 where there is none beyond doubt: [B, S], the first 0.

    A turn is judged as a whole: while it lasts, the landscape may be blurred or behind snow, and no two pictures tell.
    """
    cost = torch.stack([_mismatch(bands[:, :-1], bands[:, 1:], shift) for shift in FAST.tolist()], -1)
    index = _steadiest(cost)
    shift, unmoved = FAST.to(bands.device)[index], cost[..., len(FAST) // 2]
    gained = unmoved - cost.gather(2, index[..., None])[..., 0]
    way = shift.sign() * (shift.abs() >= LEAST_SWEEP)
    run = nn.pad(way.diff(dim=1).ne(0).cumsum(1), (1, 0))  # pairs of pictures that turn the same way, or not at all
    same_run = (run[:, :, None] == run[:, None]).to(shift.dtype)
    turned, gained, unmoved, pairs = (
        (same_run @ x[..., None])[..., 0] for x in (shift, gained, unmoved, torch.ones_like(shift))
    )
    sure = (turned.abs() > LEAST_TURN) & (gained > LEAST_GAIN * unmoved) & (pairs >= LEAST_PAIRS)
    return nn.pad(shift * way.abs() * sure, (1, 0))


def _steadiest(cost_BPK: Tensor) -> Tensor:
    """Of K shifts for each of P pairs of pictures, those that cost least in all if changes cost too: [B, P]."""
    steps = torch.arange(cost_BPK.shape[-1], device=cost_BPK.device)
    change = UNSTEADY * (steps[:, None] - steps).abs()
    total, best_before = cost_BPK[:, 0], []
    for cost in cost_BPK[:, 1:].unbind(1):
        least, index = (total[:, None] + change).min(-1)
        best_before.append(index)
        total = least + cost
    path = [total.argmin(-1, keepdim=True)]
    for index in reversed(best_before):
        path.append(index.gather(1, path[-1]))
    return torch.cat(path[::-1], 1)


def _drift(bands: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """The steady speed, in pixels per second, that explains pictures one and two seconds apart, and where none does.

    So far apart, even a slow camera has moved on by much more than what falls or walks could hide.
    """
    speeds = STEADY.to(bands.device)
    cost = torch.zeros(len(bands), len(speeds), device=bands.device)
    for seconds in (1.0, 2.0):
        lag = min(round(seconds * rate), bands.shape[1] - 1)
        before, after = bands[:, :-lag:4], bands[:, lag::4]
        costs = [_mismatch(before, after, speed * lag / rate).mean(1) for speed in STEADY.tolist()]
        cost = cost + torch.stack(costs, 1)
    least, index = cost.min(1)
    unmoved = cost[:, len(speeds) // 2]
    pans = unmoved > (1 + PAN_GAIN) * least
    return speeds[index] * pans, cost.amax(1) <= (1 + FLAT) * least


BAND = 4  # rows that are averaged
TOP = 48  # above this is mostly sky, which the camera does not move
NEAR = (88 - TOP) // BAND  # the band where the ground begins
FLAKE = 5  # snow is smaller: it hides a landscape that goes by in a blur
CUT = 0.1  # differences beyond this count no more: else a subject's outline would outweigh the hills


def _without_flakes(pictures_BSHWC: Tensor) -> Tensor:
    """The pictures without what is bright and smaller than `FLAKE` pixels, such as snow (a grey opening)."""
    images = pictures_BSHWC.flatten(0, 1).movedim(-1, 1).contiguous()
    opened = _brightest(-_brightest(-images))
    return opened.movedim(1, -1).unflatten(0, pictures_BSHWC.shape[:2])


def _brightest(images_NCHW: Tensor) -> Tensor:
    """The brightest of the `FLAKE` x `FLAKE` pixels around each."""
    rows = nn.max_pool2d(images_NCHW, (1, FLAKE), 1, (0, FLAKE // 2))
    return nn.max_pool2d(rows, (FLAKE, 1), 1, (FLAKE // 2, 0))


def _bands(pictures_BSHWC: Tensor, top: int = TOP) -> Tensor:
    """The land, from row `top` on, as a few rows of half as many pixels: [B, S, 3, bands, W/2]."""
    land = pictures_BSHWC[:, :, top:].movedim(-1, 2)
    return nn.avg_pool2d(land.flatten(0, 2), (BAND, 2)).unflatten(0, land.shape[:3])


def _mismatch(before: Tensor, after: Tensor, shift: float) -> Tensor:
    """Mean difference of bands if the camera moved `shift` pixels: the ground by as much, what is farther by less.

    before, after: [B, pairs, 3, bands, W/2]. Returns [B, pairs].
    """
    near = _difference(before, after, shift)
    upper_before, upper_after = before[..., :NEAR, :], after[..., :NEAR, :]
    upper = torch.minimum(near[..., :NEAR, :], _difference(upper_before, upper_after, shift * landscape.MIDDLE.speed))
    upper = torch.minimum(upper, _difference(upper_before, upper_after, shift * landscape.FAR.speed))
    beyond = math.ceil(abs(shift) / 2)  # columns that were not seen before; a column is two pixels
    seen = slice(beyond, None) if shift < 0 else slice(None, near.shape[-1] - beyond)
    return torch.cat([upper, near[..., NEAR:, :]], -2)[..., seen].mean((-2, -1))


def _difference(before: Tensor, after: Tensor, shift: float) -> Tensor:
    """|after(x) - before(x + shift)| summed over colours and cut. Columns shifted in from outside mean nothing."""
    whole = math.floor(shift / 2)
    moved = torch.lerp(before.roll(-whole, -1), before.roll(-whole - 1, -1), shift / 2 - whole)
    return (after - moved).abs().sum(2).clamp(max=CUT)


# ---------------------------------------------------------------------------------------------------------------------
# The landmark
# ---------------------------------------------------------------------------------------------------------------------

LANDMARK_PIXEL = 4
LEAST_LANDMARK = 0.40


def membership(pixels_NCHW: Tensor, colours_NC3: Tensor, width: float = 0.17) -> Tensor:
    """How much pixels have each of the colours: near 1 within `width`, near 0 beyond twice that. [N, colours, H, W]"""
    distance = (pixels_NCHW[:, None] - colours_NC3[..., None, None]).square().sum(2)
    return 1 / (1 + (distance / width**2).square())


class LandmarkFound(NamedTuple):
    """The landmark of each clip."""

    kind: Tensor  # [B], index or -1
    colour: Tensor  # [B], index or -1
    score: Tensor  # [B]
    x: Tensor  # [B, S]: its middle in screen pixels, nan where it is not seen


def read_landmark(pictures_BSHWC: Tensor, times_BS: Tensor) -> LandmarkFound:
    """The landmark that stands out best in the clearest pictures."""
    score, column = (part.unflatten(0, times_BS.shape) for part in _landmark_scores(pictures_BSHWC, times_BS))
    best, index = score.topk(min(3, score.shape[1]), 1).values.mean(1).max(1)
    known = best > LEAST_LANDMARK
    score, column = (part.take_along_dim(index[:, None, None], 2)[..., 0] for part in (score, column))
    seen = known[:, None] & (score > LEAST_LANDMARK)
    kinds = len(LANDMARKS)
    return LandmarkFound(
        kind=torch.where(known, index % kinds, ABSTAIN),
        colour=torch.where(known, index // kinds, ABSTAIN),
        score=best,
        x=torch.where(seen, (column + 0.5) * LANDMARK_PIXEL, torch.nan),
    )


def _landmark_scores(pictures_BSHWC: Tensor, times_BS: Tensor) -> tuple[Tensor, Tensor]:
    """For every colour and kind, how well it fits where it fits best, and in which column: [N, colours x kinds]."""
    light = torch.tensor(palettes.SUBJECT_LIGHT, device=times_BS.device)[times_BS.flatten()][:, None]
    paint = torch.tensor(palettes.LANDMARK_PAINT, device=light.device) * light
    wall = torch.tensor(palettes.LANDMARK_BODY, device=light.device) * light
    pixels = nn.avg_pool2d(pictures_BSHWC.flatten(0, 1).movedim(-1, 1), LANDMARK_PIXEL)
    table = landmark_templates(LANDMARK_PIXEL, light.device)

    painted = _across(membership(pixels, paint), table.paint)  # [N, colours, S, X]
    built = _across(membership(pixels, wall), table.body)  # [N, kinds, S, X]
    template = torch.arange(len(table.body), device=built.device)
    built = built[:, template // 2, template][:, None]  # each template against its own kind's wall
    score, column = ((painted + built) / 2).max(3)  # [N, colours, S]
    score, front = score.unflatten(2, (-1, 2)).max(3)  # of each kind, behind or in front
    column = column.unflatten(2, (-1, 2)).take_along_dim(front[..., None], 3)[..., 0]
    return score.flatten(1), column.flatten(1)


def _across(maps_NCHW: Tensor, weights_SHT: Tensor) -> Tensor:
    """Every map against every template, moved from left to right: [N, C, S, X]."""
    padding = (0, weights_SHT.shape[-1] // 2)
    found = nn.conv2d(maps_NCHW.flatten(0, 1)[:, None], weights_SHT[:, None], padding=padding)
    return found[:, :, 0].unflatten(0, maps_NCHW.shape[:2])
