"""Many prompts, a video each, in one folder: what is there already is not made again, processes share the rest."""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import IO, Any, Literal

from longtake import parallel
from longtake.generation.script import Script, record_of, shown, slug
from longtake.generation.stream import Engine
from longtake.media.mp4 import Mp4Writer, part_of, read_record
from longtake.models.rewrite import Rewriter

Names = Literal["numbered", "vbench"]
"""0001-a-red-ball-42.mp4: number in the file, prompt, seed. "A red ball.-0.mp4": prompt and number of the seed."""

_LONGEST_NAME = 255  # bytes, on all usual file systems
_TELL_EVERY_SECONDS = 5.0  # of a video that is being made


@dataclass(frozen=True, kw_only=True)
class Video:
    """One video to make. seconds: as asked for, if so. unfinished: where it is until its last picture is there."""

    script: Script
    seed: int
    seconds: float | None
    path: Path
    unfinished: Path

    def lasts(self, engine: Engine) -> float:
        """Seconds."""
        return self.script.lasts(engine.frame_rate, self.seconds)

    def pictures(self, engine: Engine) -> int:
        return max(1, round(self.lasts(engine) * engine.frame_rate))


def videos_of(
    scripts: Sequence[Script],
    folder: Path,
    *,
    first_seed: int,
    seeds: int,
    seconds: float | None,
    names: Names,
) -> list[Video]:
    """Every script with every seed, the seeds of one script in a row.

    ValueError for seeds that are no count, and for names that no file can have or that two videos would share.
    """
    if seeds < 1 or first_seed < 0:
        raise ValueError(f"videos have seeds from 0, one or more, got {seeds} from {first_seed}")
    videos = []
    for number, script in enumerate(scripts, 1):
        for repeat in range(seeds):
            seed = first_seed + repeat
            name = f"{number:04d}-{slug(script.prompt)}-{seed}" if names == "numbered" else f"{script.prompt}-{repeat}"
            path, unfinished = (folder / f"{one}.mp4" for one in (name, f"unfinished-{number:04d}-{seed}"))
            videos.append(Video(script=script, seed=seed, seconds=seconds, path=path, unfinished=unfinished))
    _require_names([video.path.relative_to(folder).as_posix() for video in videos])
    return videos


def _require_names(names: Sequence[str]) -> None:
    for name in names:
        if {"/", "\0", "\n"} & set(name) or len(name.encode()) > _LONGEST_NAME:
            raise ValueError(f"no file can be called {name!r}: leave --names vbench out")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} videos would be called {name!r}: leave --names vbench out, or repeated prompts")


def write_out(scripts: Sequence[Script], rewriter: Rewriter) -> list[Script]:
    """The scripts with every prompt written out by a chat model, each process its part.

    ValueError where they are written out already, or the model does not answer.
    """
    if any(cue.rewritten is not None for script in scripts for cue in script.cues):
        raise ValueError("these prompts are written out already: leave --rewrite out")
    texts = parallel.share_out(scripts, lambda script: rewriter.rewrite(cue.prompt for cue in script.cues))
    return [script.rewritten(one) for script, one in zip(scripts, texts, strict=True)]


def make_all(
    engine: Engine, videos: Sequence[Video], *, made: Callable[[Path], None], say: Callable[[str], None]
) -> None:
    """Make the videos that are not there yet, each process its part; a prompt that cannot be shown stops it at once.

    Ctrl-C leaves finished videos, and the pictures of the one being made under `unfinished`. The same call again goes
    on with the videos that are missing. made, say: called with each finished file, and with what there is to tell.

    Raises:
        ValueError: a prompt cannot be read or would never be seen, a file of that name was made otherwise, or another
            run is writing to the folder.
        OSError: something cannot be written.
    """
    folder = videos[0].path.parent
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        for video in videos:
            video.script.by_block(engine, video.pictures(engine))
        missing = _missing(engine, videos)
        own = parallel.own_part(missing)
        parallel.agree(lambda: engine.prepare([cue.shown for video in own for cue in video.script.cues]))
        if parallel.rank() == 0:
            say(f"{len(videos)} videos: {len(videos) - len(missing)} are there, {len(missing)} to make")
        try:
            for video in own:  # nobody waits at the end: the others may take longer than an exchange is given
                made(_make(engine, video, say if parallel.rank() == 0 else lambda line: None))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped: the same command goes on with the videos that are missing") from None


def _missing(engine: Engine, videos: Sequence[Video]) -> list[Video]:
    """What is not there yet, as the first process sees it before any is made: all must share out the same list."""
    first, *_ = parallel.agree(lambda: [_is_there(engine, one) for one in videos if parallel.rank() == 0])
    return [video for video, there in zip(videos, first, strict=True) if not there]


def _is_there(engine: Engine, video: Video) -> bool:
    if not video.path.exists():
        return False
    wanted, got = _record(engine, video), _record_in(video.path)
    keys = (wanted.keys() | got.keys()) - engine.circumstances.keys()  # machines that share a folder may differ in them
    other = sorted(key for key in keys if wanted.get(key) != got.get(key))
    if other:
        raise ValueError(f"{video.path} is there, but was made with other {', '.join(other)}: choose another folder")
    return True


def _record(engine: Engine, video: Video) -> dict[str, Any]:
    return record_of(engine, video.script, video.seed, video.lasts(engine))


def _record_in(path: Path) -> dict[str, Any]:
    try:
        return read_record(path)
    except ValueError:
        raise ValueError(f"{path} is there, but tells nothing of how it was made: choose another folder") from None


def _make(engine: Engine, video: Video, say: Callable[[str], None]) -> Path:
    """Make one video; its name is given to it when it is whole. say: is told now and then how far it is."""
    pictures = video.pictures(engine)
    cues = video.script.by_block(engine, pictures)
    part_of(video.unfinished).unlink(missing_ok=True)  # of a run that was killed: no other is here
    with (
        engine.stream(cues[0].shown, seed=video.seed) as stream,
        Mp4Writer(
            video.unfinished, engine.width, engine.height, engine.frame_rate,
            overwrite=True, comment=json.dumps(_record(engine, video)),
        ) as writer,
    ):  # fmt: skip
        tell_at = monotonic() + _TELL_EVERY_SECONDS
        for chunk in shown(stream, cues, pictures):
            writer.write(chunk.frames[: pictures - writer.frames_written])
            if writer.frames_written == pictures:
                break
            if monotonic() >= tell_at:
                tell_at = monotonic() + _TELL_EVERY_SECONDS
                done, whole = writer.frames_written / engine.frame_rate, pictures / engine.frame_rate
                say(f"{video.path.name}: {done:.1f} of {whole:.1f} s made")
    os.replace(video.unfinished, video.path)
    return video.path


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the lock goes when the last process of this run ends, however it ends."""
    with (folder / ".longtake.lock").open("a") as lock:
        parallel.agree(lambda: _first_takes(lock, folder) if parallel.rank() == 0 else None)
        parallel.agree(lambda: _take(lock, folder, fcntl.LOCK_SH))
        yield


def _first_takes(lock: IO[str], folder: Path) -> None:
    """Make sure that no other run holds the lock, then let the other processes of this one share it."""
    _take(lock, folder, fcntl.LOCK_EX)
    _take(lock, folder, fcntl.LOCK_SH)


def _take(lock: IO[str], folder: Path, kind: int) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing to {folder}: wait for it, or choose another folder") from None
