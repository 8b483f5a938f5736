"""Pictures out of an image or a video file, in the size and at the rate of a stream."""

from collections import deque
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

_SAME_TIME = 0.01  # of the time between two pictures: files round their times


def read_pictures(
    path: str | Path, *, width: int, height: int, frames_per_second: int, most: int | None = None
) -> NDArray[np.uint8]:
    """All pictures of a file, or the last so many, uint8 [F, H, W, 3]; an image has one.

    Each is made as small as it can be and still cover the size, and cut to it around its middle. Of a video, those that
    are on the screen at multiples of 1 / frames_per_second seconds after its first. Raises FileNotFoundError, and
    ValueError for a file in which there is no picture.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no image or video at {path}")
    pictures: deque[NDArray[np.uint8]] = deque(maxlen=most)
    passed = 0
    try:
        with av.open(str(path)) as container:
            shown, began, came = None, 0.0, 0.0
            for frame in container.decode(video=0):
                came = (frame.time or 0.0) - began
                if shown is None:
                    began, came = came, 0.0
                while shown is not None and passed < came * frames_per_second - _SAME_TIME:
                    pictures.append(shown)
                    passed += 1
                shown = _fitted(frame, width, height)
            if shown is not None and passed <= came * frames_per_second + _SAME_TIME:
                pictures.append(shown)
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is no image or video that can be read ({error})") from None
    if not pictures:
        raise ValueError(f"there is no picture in {path}")
    return np.stack(pictures)


def plays(path: str | Path) -> bool:
    """Whether there is at least one picture that can be read in a file, which may have been cut off."""
    try:
        with av.open(str(path)) as container:
            return any(True for _ in container.decode(video=0))
    except (av.FFmpegError, IndexError, OSError):
        return False


def _fitted(frame: av.VideoFrame, width: int, height: int) -> NDArray[np.uint8]:
    scale = max(width / frame.width, height / frame.height)
    wide, high = max(width, round(frame.width * scale)), max(height, round(frame.height * scale))
    picture = frame.reformat(width=wide, height=high, format="rgb24").to_ndarray()
    top, left = (high - height) // 2, (wide - width) // 2
    return np.ascontiguousarray(picture[top : top + height, left : left + width], dtype=np.uint8)
