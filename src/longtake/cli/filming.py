"""A stream on its way to an mp4: what it goes on from, Ctrl-C and full disks on the way, the take kept at its end."""

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtake.cli.terminal import INTERRUPTED, LiveLine, in_one_line, say
from longtake.cli.videos import unused

if TYPE_CHECKING:
    import numpy as np

    from longtake.generation.script import Cue
    from longtake.generation.stream import Chunk, Engine, Stream
    from longtake.media.mp4 import Mp4Writer


def opening(engine: "Engine", path: Path) -> "np.ndarray":
    """Pictures of whole blocks for a stream to go on from: an image that stands still for one, or the end of a video.

    Of a video as much as the network was trained to see at once.
    """
    from longtake.media.reading import read_pictures

    size = {"width": engine.width, "height": engine.height, "frames_per_second": engine.frame_rate}
    most = engine.network.config.extent // engine.recipe.block
    pictures = read_pictures(path, **size, most=engine.pictures_in(most))
    if len(pictures) == 1:
        return pictures.repeat(engine.pictures_in(1), axis=0)
    whole = [count for blocks in range(1, most + 1) if (count := engine.pictures_in(blocks)) <= len(pictures)]
    if not whole:
        raise ValueError(f"{path} has {len(pictures)} pictures; a stream goes on from {engine.pictures_in(1)} or more")
    return pictures[-whole[-1] :]


def show(
    stream: "Stream", cues: dict[int, "Cue"], pictures: int, path: Path, record: dict[str, Any], keep: Path | None,
    *, force: bool = False, json: bool = False,
) -> int:  # fmt: skip
    """Film a stream, keep it as a take if that is asked for, and print where the video is."""
    from longtake.generation.script import shown
    from longtake.media.mp4 import Mp4Writer

    engine, begun = stream.engine, stream.pictures if keep is not None else 0
    with ExitStack() as at_last:
        with (
            _told_what_is_kept(path),
            Mp4Writer(
                path, engine.width, engine.height, engine.frame_rate, overwrite=force, comment=dumps(record)
            ) as writer,
            _between_blocks(keep is not None) as stopped,
        ):
            if keep is not None:  # though the video's name be taken meanwhile, or the terminal closed
                at_last.callback(lambda: _keep(stream, keep, whole=writer.frames_written == stream.pictures - begun))
            complete = _film(shown(stream, cues, pictures, stopped), writer, pictures, whole=keep is not None)
        if writer.frames_written:
            print(dumps(made(path, writer.frames_written, engine, record)) if json else path)
    return 0 if complete else INTERRUPTED


def _film(chunks: Iterable["Chunk"], writer: "Mp4Writer", pictures: int, *, whole: bool) -> bool:
    """Write a stream's first pictures; False when Ctrl-C came before the last of them.

    whole: write each block to its end, though it has more pictures than that.
    """
    line = LiveLine(writer.frames_per_second)
    try:
        for chunk in chunks:
            writer.write(chunk.frames if whole else chunk.frames[: pictures - writer.frames_written])
            line.show(writer.frames_written)
            if writer.frames_written >= pictures:
                return True
    except KeyboardInterrupt:
        pass
    finally:
        line.end()
    return False


def made(path: Path, pictures: int, engine: "Engine", record: dict[str, Any]) -> dict[str, Any]:
    """What `generate --json` says of a video: where it is, how long it came to be, and what went into it."""
    seconds = pictures / engine.frame_rate
    return {"path": str(path), "pictures": pictures, "fps": engine.frame_rate, **record, "seconds": seconds}


def _keep(stream: "Stream", path: Path, *, whole: bool) -> None:
    """whole: whether the video has all that the stream has made, so that what goes on from the take follows it."""
    from longtake.generation.take import Take

    if stream.closed or not whole:
        say(f"no take at {path}: the stream was stopped within a block")
        return
    take = Take.of(stream, "cpu")
    try:
        take.save(path)
    except FileExistsError:  # there was none when the stream began
        path = unused(path)
        take.save(path)
    say(f"the take is {path}")


@contextmanager
def _told_what_is_kept(path: Path) -> "Iterator[None]":
    """Adds to what went wrong while a video was written, say on a full disk, that its first pictures are there."""
    from longtake.media.mp4 import part_of
    from longtake.media.reading import plays

    kept = part_of(path) if path.exists() else path  # a file that is to be replaced stays
    is_new = not kept.exists()
    try:
        yield
    except FileExistsError:  # says so itself
        raise
    except OSError as error:
        if is_new and plays(kept):
            raise OSError(f"{in_one_line(error)}; {kept} keeps what was made until then") from None
        raise


@contextmanager
def _between_blocks(wanted: bool) -> "Iterator[Callable[[], bool]]":
    """Whether Ctrl-C was pressed: it waits for the block being made, since nothing goes on from half a one. Pressed
    once more, or where this is not wanted, it stops at once. A terminal that is closed may well tell so twice.
    """
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        if pressed and number == signal.SIGINT:
            raise KeyboardInterrupt
        pressed.append(number)

    wanted = wanted and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # as in a job that a script left behind
    before = signal.signal(signal.SIGINT, note) if wanted else None
    try:
        yield lambda: bool(pressed)
    finally:
        if wanted:
            signal.signal(signal.SIGINT, before)
