"""H.264 in mp4: written while the video is being made, readable whatever ends the writing.

Shape letters: F pictures, H height, W width, C the three colours red, green, blue.
"""

import json
import os
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from longtake.files import claim, require_free

# Fragments, each complete in itself and flushed to disk, until the file is closed; then one index, as every player
# likes it. A writer that is killed leaves a file that plays up to its last fragment.
_CONTAINER = {"movflags": "hybrid_fragmented+frag_keyframe", "flush_packets": "1"}

# "zerolatency" holds no picture back to look ahead, so what was written is on its way to the disk.
_ENCODER = {"preset": "veryfast", "tune": "zerolatency", "crf": "18"}


class Mp4Writer:
    """Writes pictures to an mp4 as they come.

    The file grows beside its final name (`out.part.mp4` for `out.mp4`) and takes that name when it is closed, which
    happens on Ctrl-C and on errors too: pictures once written are kept. A file that is there already is replaced by a
    video that could be written as far as was wanted, or until Ctrl-C; after an error the two stand side by side, and so
    they do, with FileExistsError, where a file came to be meanwhile. Closed without a picture, it leaves nothing.

    Args:
        path: the file to make; its folder must exist.
        width, height: picture size in pixels, both even (H.264 halves the colour resolution).
        frames_per_second: pictures shown a second.
        overwrite: replace a file of that name instead of refusing.
        comment: a text that the file carries, see `read_comment`.

    Raises:
        FileExistsError: the file is there and `overwrite` is not set, or another writer makes it or was killed.
        OSError: the folder is missing or cannot be written.
        ValueError: width or height is odd.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        frames_per_second: int,
        *,
        overwrite: bool = False,
        comment: str = "",
    ) -> None:
        self.path = Path(path)
        self.width, self.height = width, height
        self.frames_per_second = frames_per_second
        self.frames_written = 0
        self._overwrite = overwrite
        require_even(width, height)
        require_free(self.path, overwrite=overwrite)
        self._part = part_of(self.path)
        claim(self._part, " (it plays)")  # a folder that refuses it says so now, not after the first block
        self._container = av.open(str(self._part), "w", format="mp4", options=_CONTAINER)
        self._container.metadata["comment"] = comment
        self._stream: Any = self._container.add_stream("libx264", rate=frames_per_second, options=_ENCODER)
        describe(self._stream, width, height)
        self._closed = self._failed = False

    def write(self, frames_FHWC: NDArray[np.uint8]) -> None:
        """Append pictures, uint8 [F, H, W, 3] of the writer's size; F may be 0."""
        if frames_FHWC.dtype != np.uint8 or frames_FHWC.shape[1:] != (self.height, self.width, 3):
            raise ValueError(
                f"pictures must be uint8 [F, {self.height}, {self.width}, 3], "
                f"got {frames_FHWC.dtype} {list(frames_FHWC.shape)}"
            )
        for picture_HWC in frames_FHWC:
            frame = to_yuv(picture_HWC)
            frame.pts = self.frames_written
            self._container.mux(self._stream.encode(frame))
            self.frames_written += 1

    def close(self) -> None:
        """Finish the file and give it its name. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
        except BaseException:  # on a full disk the index is missing, and the fragments still play
            self._settle(whole=False)
            raise
        self._settle(whole=not self._failed)

    def _settle(self, *, whole: bool) -> None:
        if not self.frames_written:
            self._part.unlink()
        elif not self.path.exists() or (whole and self._overwrite):
            os.replace(self._part, self.path)
        elif whole:
            raise FileExistsError(f"{self.path} came to be while the video was made, which is {self._part}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._failed = isinstance(error, Exception)  # Ctrl-C is none
        self.close()


def copy_with_comment(source: str | Path, target: str | Path, comment: str) -> None:
    """Copy a video, picture by picture as it is coded, and give the copy a comment and an index at its front."""
    with (
        av.open(str(source)) as read,
        av.open(str(target), "w", format="mp4", options={"movflags": "faststart"}) as written,
    ):
        written.metadata["comment"] = comment
        copied = written.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(video=0):
            if packet.size:  # the last is empty, and only says that there are no more
                packet.stream = copied
                written.mux(packet)


def read_frames(path: str | Path) -> NDArray[np.uint8]:
    """All pictures of a video file, uint8 [F, H, W, 3]."""
    return np.stack([*_frames(path)])


def read_comment(path: str | Path) -> str:
    """The text that a video file carries, empty if there is none."""
    with av.open(str(path)) as container:
        return container.metadata.get("comment", "")


def read_record(path: str | Path) -> dict[str, Any]:
    """What a video's comment says in JSON of how it was made. ValueError if it says nothing, or is no video."""
    try:
        record = json.loads(read_comment(path))
    except av.error.InvalidDataError:
        raise ValueError(f"{path} is no video") from None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{path} tells nothing of how it was made")
    return record


def count_frames(path: str | Path) -> int:
    """How many pictures a video file has."""
    with av.open(str(path)) as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


def first_difference(one: str | Path, other: str | Path) -> int | None:
    """The number of the first picture, from 0, in which two video files differ; None if they show the same."""
    for number, (first, second) in enumerate(zip_longest(_frames(one), _frames(other))):
        if first is None or second is None or not np.array_equal(first, second):
            return number
    return None


def _frames(path: str | Path) -> Iterator[NDArray[np.uint8]]:
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            picture_HWC: NDArray[Any] = frame.to_ndarray(format="rgb24")
            yield picture_HWC


def require_even(width: int, height: int) -> None:
    if width <= 0 or height <= 0 or width % 2 or height % 2:
        raise ValueError(f"an mp4 needs an even width and height, got {width} x {height}")


def part_of(path: Path) -> Path:
    """Where a video grows before it takes its name."""
    return path.with_suffix(".part.mp4")


def describe(stream: Any, width: int, height: int) -> None:
    """Size, and the colour standard: a player that has to guess it gets small videos slightly wrong."""
    context = stream.codec_context
    context.width, context.height, context.pix_fmt = width, height, "yuv420p"
    context.gop_size = stream.codec_context.framerate.numerator  # a key picture, and so a fragment, each second
    context.colorspace = Colorspace.ITU709
    context.color_range = ColorRange.MPEG
    context.color_primaries = context.color_trc = 1  # BT.709


def to_yuv(picture_HWC: NDArray[np.uint8]) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture_HWC), format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
