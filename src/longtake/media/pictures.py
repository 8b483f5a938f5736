"""Still pictures: many on one sheet, one in a PNG file."""

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_GAP = 2  # pixels of white between the pictures of a sheet


def contact_sheet(frames_FHWC: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Lay pictures out in rows of `columns`, uint8 [F, H, W, 3] to uint8 [sheet height, sheet width, 3].

    Reads as text does, white where the last row ends early.
    """
    count, height, width, colours = frames_FHWC.shape
    if count == 0 or columns < 1:
        raise ValueError(f"a sheet needs pictures and columns, got {count} pictures in {columns} columns")
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, colours), 255, np.uint8)
    for index, picture_HWC in enumerate(frames_FHWC):
        top, left = (index // columns) * (height + _GAP), (index % columns) * (width + _GAP)
        sheet[top : top + height, left : left + width] = picture_HWC
    return sheet


def save_png(path: str | Path, picture_HWC: NDArray[np.uint8]) -> None:
    """Write one picture, uint8 [H, W, 3], as a PNG file; a file of that name is replaced.

    By the standard library alone: a machine that trains may have no codecs.
    """
    if picture_HWC.dtype != np.uint8 or picture_HWC.ndim != 3 or picture_HWC.shape[2] != 3:
        raise ValueError(f"a picture must be uint8 [H, W, 3], got {picture_HWC.dtype} {list(picture_HWC.shape)}")
    height, width, _ = picture_HWC.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter: 0, none
    rows[:, 1:] = picture_HWC.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, red green blue, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*chunk) for chunk in chunks))


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
