# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, assignment, var-annotated"
"""Convolutions of 3 x 3 x 3 to 96 channels, for a Hopper GPU, whose matrix units take their tiles from shared memory.

Where channels are few, what a convolution reads of the cache holds it up: each number meets few others there. Here a
program makes a piece of a line in two frames, and for each place that a kernel sees it reads each of four frames of
the clip once. Where channels are more the library is faster.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_WIDE, _NARROW = 64, 32  # channels out, in two tiles, as sizes of tiles are powers of two
_FRAMES, _COLUMNS = 2, 128  # what one program makes; of 22 forms the fastest on an H200
_DEPTH = 32  # channels in that a product sums over
_ALIGNED = 16  # bytes: the address of a descriptor's tensor is a multiple
_HOPPER = 9  # the generation, as torch.cuda.get_device_capability counts


def can_convolve(weight: Tensor) -> bool:
    """Whether `convolved` takes that weight: it fills tiles, and is on the GPU that they are for, or interpreted."""
    out, channels, *kernel = weight.shape
    return (
        kernel == [3, 3, 3]
        and out == _WIDE + _NARROW
        and channels % _DEPTH == 0
        and weight.dtype in (torch.float16, torch.bfloat16)
        and weight.data_ptr() % _ALIGNED == 0
        and (not weight.is_cuda or _is_hopper(weight.device))
    )


def convolved(joined_BCFHW: Tensor, weight: Tensor) -> Tensor:
    """Frames of the answer are those that have two before them.

    Truth: `torch.nn.functional.conv3d(joined_BCFHW, weight, padding=(0, 1, 1))`. Channels of both lie next to each
    other in memory, or are copied so; those of the answer do.
    """
    batch, channels, joined_frames, height, width = joined_BCFHW.shape
    frames, lines = joined_frames - 2, triton.cdiv(width, _COLUMNS)
    rows = joined_BCFHW.permute(0, 2, 3, 4, 1).contiguous().flatten(0, 1)
    taps = weight.permute(0, 2, 3, 4, 1).contiguous().flatten(1)
    made = rows.new_empty(batch * frames, height, width, _WIDE + _NARROW)
    _kernel[lines * height, triton.cdiv(frames, _FRAMES), batch](
        TensorDescriptor.from_tensor(rows, [1, 1, _COLUMNS, _DEPTH]),
        TensorDescriptor.from_tensor(taps, [_WIDE, _DEPTH]),
        TensorDescriptor.from_tensor(taps, [_NARROW, _DEPTH]),
        TensorDescriptor.from_tensor(made, [1, 1, _COLUMNS, _WIDE]),
        TensorDescriptor.from_tensor(made, [1, 1, _COLUMNS, _NARROW]),
        frames, lines, channels, _WIDE, _NARROW, _FRAMES, _COLUMNS, _DEPTH, num_warps=8, num_stages=2,
    )  # fmt: skip
    return made.unflatten(0, (batch, frames)).permute(0, 4, 1, 2, 3)


def _is_hopper(device: torch.device) -> bool:
    """Not one of AMD's, which torch counts in the same words."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == _HOPPER


@triton.jit
def _kernel(
    joined, wide_taps, narrow_taps, wide_made, narrow_made, frames, lines,
    CHANNELS: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    FRAMES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Tiles know where pictures end: places outside are read as zeros, and are not written."""
    row, column = tl.program_id(0) // lines, tl.program_id(0) % lines * COLUMNS
    frame, clip = tl.program_id(1) * FRAMES, tl.program_id(2)
    seen = clip * (frames + 2) + frame
    wides, narrows = (), ()
    for _ in tl.static_range(FRAMES):
        wides += (tl.zeros([COLUMNS, WIDE], tl.float32),)
        narrows += (tl.zeros([COLUMNS, NARROW], tl.float32),)
    for turn in range(9 * (CHANNELS // DEPTH)):
        place, channel = turn // (CHANNELS // DEPTH), turn % (CHANNELS // DEPTH) * DEPTH
        at_row, at_column = row + place // 3 - 1, column + place % 3 - 1
        wide, narrow = (), ()
        for late in tl.static_range(3):
            tap = (late * 9 + place) * CHANNELS + channel
            wide += (wide_taps.load([0, tap]).T,)
            narrow += (narrow_taps.load([WIDE, tap]).T,)
        for kind in tl.static_range(3):  # of the clip's frames, modulo three: each sum is added to once
            tiles, wide_sums, narrow_sums = (), (), ()
            for i in tl.static_range(kind, FRAMES + 2, 3):
                tiles += (joined.load([seen + i, at_row, at_column, channel]).reshape(COLUMNS, DEPTH),)
            for i in tl.static_range(FRAMES):  # frame i sees tile i + late, and late is kind - i modulo three
                tile = tiles[(i + (kind + 2 * i) % 3) // 3]
                wide_sums += (tl.dot(tile, wide[(kind + 2 * i) % 3], wides[i]),)
                narrow_sums += (tl.dot(tile, narrow[(kind + 2 * i) % 3], narrows[i]),)
            wides, narrows = wide_sums, narrow_sums
    for i in tl.static_range(FRAMES):
        if frame + i < frames:  # that of an odd number's last program has no second
            at = clip * frames + frame + i
            wide_made.store([at, row, column, 0], wides[i].to(wide_made.dtype).reshape(1, 1, COLUMNS, WIDE))
            narrow_made.store([at, row, column, WIDE], narrows[i].to(narrow_made.dtype).reshape(1, 1, COLUMNS, NARROW))
