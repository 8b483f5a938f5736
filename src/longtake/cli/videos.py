"""The file that a video goes to and how long it is: free names, and what is refused before anything is made."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longtake.generation.script import Script
    from longtake.generation.stream import Engine

_LONGEST_SECONDS = 1e9


def require_length(seconds: float | None) -> None:
    """ValueError unless a length that was asked for can be made."""
    if seconds is not None and not 0 < seconds < _LONGEST_SECONDS:
        raise ValueError(f"a video lasts more than 0 seconds, and less than {_LONGEST_SECONDS:g}, got {seconds:g}")


def require_writable_take(path: Path | None, video: Path | None) -> None:
    """ValueError or OSError, before anything is made, where no take can be kept beside the video."""
    from longtake.generation import take

    if path is None:
        return
    if video is not None and path.absolute() == video.absolute():
        raise ValueError(f"{path} cannot be both the video and the take: choose another name")
    take.require_writable(path)


def free_name(prompt: str, seed: int) -> Path:
    """A file name that nobody has yet, such as `a-red-ball-bounces-42.mp4`, in the current folder."""
    from longtake.generation.script import slug

    return unused(Path(f"{slug(prompt)}-{seed}.mp4"))


def unused(path: Path) -> Path:
    """The path, or the first of -2, -3, ... after its stem that nobody has yet."""
    from longtake.media.mp4 import part_of

    paths = itertools.chain([path], (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2)))
    return next(one for one in paths if not one.exists() and not part_of(one).exists())


def length_of(
    script: "Script", engine: "Engine", asked: float | None, before: int, *, whole: bool
) -> tuple[float, int]:  # fmt: skip
    """How long a video is, in seconds and pictures. whole: up to the end of a block, so that a take goes on from it."""
    from longtake.generation.script import whole_blocks

    seconds = script.lasts(engine.frame_rate, asked)
    pictures = max(1, round(seconds * engine.frame_rate))
    if not whole:
        return seconds, pictures
    pictures = whole_blocks(engine, pictures, before)
    return pictures / engine.frame_rate, pictures
