"""Fragmented mp4 for players that are fed while a video is made: a header, then one fragment for each chunk.

Shape letters: F pictures, H height, W width, C the three colours red, green, blue.
"""

from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from longtake.media.mp4 import describe, require_even, to_yuv

# Each fragment is muxed alone and closed at once: a muxer that goes on keeps back a fragment, or its last picture,
# until the next one begins. "disabled" and "frag_discont": times stay as given, though every muxer thinks it is the
# first.
_FLAGS = "empty_moov+default_base_moof+frag_keyframe+frag_discont+skip_trailer"
_ENCODER = {"preset": "veryfast", "tune": "zerolatency", "crf": "20", "profile": "baseline"}


class _Sink(bytearray):
    """A file in memory that cannot be rewound."""

    def write(self, data: bytes) -> int:
        self.extend(data)
        return len(data)


class FragmentWriter:
    """Turns chunks of pictures into fragments; each begins with a key picture and needs nothing but the header.

    header: what a player is fed first. codec: as browsers name it ("avc1.42c00a"), read off the header.
    pictures: how many were written; times go on from one fragment to the next without a gap.

    Raises: ValueError where width or height is odd.
    """

    def __init__(self, width: int, height: int, frames_per_second: int) -> None:
        require_even(width, height)
        self.width, self.height = width, height
        self.frames_per_second = frames_per_second
        self.pictures = self.fragments = 0
        sink, container, _ = self._open()
        container.start_encoding()
        container.close()
        self.header = bytes(sink)
        self.codec = _codec_of(self.header)

    def fragment(self, frames_FHWC: NDArray[np.uint8]) -> bytes:
        """The next pictures, uint8 [F, H, W, 3] of the writer's size with F from 1, as one fragment (moof and mdat)."""
        shape = frames_FHWC.shape
        if (
            frames_FHWC.dtype != np.uint8
            or len(shape) != 4
            or not shape[0]
            or shape[1:] != (self.height, self.width, 3)
        ):
            raise ValueError(
                f"pictures must be uint8 [F, {self.height}, {self.width}, 3], got {frames_FHWC.dtype} {list(shape)}"
            )
        sink, container, stream = self._open()
        with container:
            for number, picture_HWC in enumerate(frames_FHWC, self.pictures):
                frame = to_yuv(picture_HWC)
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        if not sink.startswith(self.header):
            raise RuntimeError("the encoder changed its header, which players read only once")
        self.pictures += shape[0]
        self.fragments += 1
        return bytes(sink[len(self.header) :])

    def _open(self) -> tuple[_Sink, Any, Any]:
        sink = _Sink()
        options = {"movflags": _FLAGS, "avoid_negative_ts": "disabled", "fragment_index": str(self.fragments + 1)}
        container: Any = av.open(sink, "w", format="mp4", options=options)
        stream = container.add_stream("libx264", rate=self.frames_per_second, options=_ENCODER)
        describe(stream, self.width, self.height)
        stream.codec_context.gop_size = 2**16  # one key picture a fragment, however long it is
        return sink, container, stream


def _codec_of(header: bytes) -> str:
    """Profile, constraints and level, as an avcC box has them in its second to fourth byte (ISO/IEC 14496-15)."""
    start = header.index(b"avcC") + 4
    return f"avc1.{header[start + 1 : start + 4].hex()}"
