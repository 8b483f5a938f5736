"""Rotary positions on three axes (frame, row, column), for any frame numbers: no table, so none that ends.

Truth of the rotation: `reference.rotate`.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosine and sine of every token's angles, [T, D/2] each, float32."""

    cos_TA: Tensor
    sin_TA: Tensor


@dataclass(frozen=True, kw_only=True)
class RotaryAxes:
    """How a head's numbers are shared among the axes: `split` counts numbers (not pairs) for frame, row and column."""

    split: tuple[int, int, int]
    theta: float = 10000.0

    def __post_init__(self) -> None:
        if any(part % 2 for part in self.split):
            raise ValueError(f"rotary axes need even sizes, got {self.split}")

    def angles(self, frames: Sequence[float], rows: int, columns: int) -> Tensor:
        """Angles [T, D/2] in float64 of the tokens of the given frames, frame-major, then row, then column."""
        grid = torch.cartesian_prod(
            torch.tensor(frames, dtype=torch.float64),
            torch.arange(rows, dtype=torch.float64),
            torch.arange(columns, dtype=torch.float64),
        )
        return torch.cat([grid[:, i, None] * self._frequencies(size) for i, size in enumerate(self.split)], dim=1)

    def rotation(self, frames: Sequence[float], rows: int, columns: int, device: torch.device | str) -> Rotation:
        """Cosines and sines of `angles`, computed in float64 on the host and moved to the device in float32.

        Capped positions repeat for ever, so the latest answers are remembered: do not write to them.
        """
        return Rotation(*map(lasting, _latest(self, tuple(frames), rows, columns, torch.device(device))))

    def _frequencies(self, size: int) -> Tensor:
        return self.theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


@dataclass(frozen=True)
class Grid:
    """Where the tokens of a latent frame stand, on which axes."""

    axes: RotaryAxes
    rows: int
    columns: int

    def rotation(self, frames: Sequence[float], device: torch.device | str) -> Rotation:
        """`RotaryAxes.rotation` of the tokens of frames at these positions."""
        return self.axes.rotation(frames, self.rows, self.columns, device)


class _Latest:
    """The latest rotations that were asked for, as many as bytes allow; those of a small model are hundreds.

    Counted in bytes, since absolute positions are new for every block and take 2 to 10 MiB each at full size, whereas
    training steps, recorded as graphs, ask for dozens of small ones that must be there by then.
    """

    def __init__(self, make: Callable[..., Rotation], most_bytes: int) -> None:
        self._make, self._most_bytes, self._bytes = make, most_bytes, 0
        self._made: OrderedDict[tuple[Any, ...], Rotation] = OrderedDict()
        self._lock = Lock()

    def __call__(self, *asked: Any) -> Rotation:
        with self._lock:
            if asked in self._made:
                self._made.move_to_end(asked)
                return self._made[asked]
            made = self._made[asked] = self._make(*asked)
            self._bytes += _size(made)
            while self._bytes > self._most_bytes and len(self._made) > 1:
                self._bytes -= _size(self._made.popitem(last=False)[1])
            return made


def _size(rotation: Rotation) -> int:
    return sum(part.nbytes for part in rotation)


def _rotation(axes: RotaryAxes, frames: tuple[float, ...], rows: int, columns: int, device: torch.device) -> Rotation:
    """Made axis by axis and spread out on the device: positions that grow with a stream are new for every block."""
    sides, places = (len(frames), rows, columns), (frames, range(rows), range(columns))
    angles = [
        torch.tensor(place, dtype=torch.float64)[:, None] * axes._frequencies(size)
        for place, size in zip(places, axes.split, strict=True)
    ]

    def spread(of: Callable[[Tensor], Tensor]) -> Tensor:
        frame, row, column = (of(one).float().to(device) for one in angles)
        parts = frame[:, None, None], row[None, :, None], column[None, None]
        return torch.cat([part.expand(*sides, part.shape[-1]) for part in parts], dim=-1).flatten(0, 2)

    return Rotation(spread(torch.cos), spread(torch.sin))


_latest = _Latest(_rotation, most_bytes=32 * 2**20)
_recorded: list[Tensor] = []


def lasting(remembered: Tensor) -> Tensor:
    """The same tensor, which no cache may drop any more if a graph of kernels is being recorded: that will read it."""
    if remembered.is_cuda and torch.cuda.is_current_stream_capturing():
        _recorded.append(remembered)
    return remembered


def split_like_wan(head_dim: int) -> tuple[int, int, int]:
    """Wan2.1's sharing of a head among frame, row and column: rows and columns get a third each, the frame the rest."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotate(x_BTND: Tensor, rotation: Rotation) -> Tensor:
    """Turn consecutive pairs of each head vector by its token's angles, in float32 at least; returns the dtype of x.

    Leading dimensions of the rotation beyond [T, D/2] broadcast against those of x.
    """
    cos, sin = rotation.cos_TA.unsqueeze(-2), rotation.sin_TA.unsqueeze(-2)
    wide = x_BTND.to(torch.promote_types(x_BTND.dtype, torch.float32))
    pairs = wide.unflatten(-1, (-1, 2))
    if _whole_vectors(x_BTND):
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
    else:
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x_BTND.dtype)


def _whole_vectors(x: Tensor) -> bool:
    """Whether a CPU turns such heads in one operation in place of eight, as complex numbers, and rounds all alike: what
    fills no whole vector of its registers it would round otherwise. Compiled code is better off without them."""
    return x.is_cpu and x.shape[-1] % 32 == 0 and not torch.compiler.is_compiling()


def fitted(rotation: Rotation, size: int) -> Rotation:
    """The rotation of vectors of another size: a multiple or an even part of the one it was made for.

    Wider vectors are as many of that size, side by side. Narrower ones take every so many-th angle, so that each axis
    keeps its share of them and its range, from fast to slow. ValueError for other sizes.
    """
    own = 2 * rotation.cos_TA.shape[-1]
    if size % own == 0:
        return rotation if size == own else Rotation(*(torch.cat([part] * (size // own), -1) for part in rotation))
    if size % 2 or own % size:
        raise ValueError(f"the angles of vectors of {own} numbers fit multiples and even parts of that, not {size}")
    return Rotation(*(part[..., :: own // size] for part in rotation))
