"""`longtake replay`: a video made again from its record, and compared."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from longtake.cli.engines import load_again
from longtake.cli.filming import opening, show
from longtake.cli.options import DeviceName, Mp4, Opening
from longtake.cli.terminal import CHECK_FAILED, say
from longtake.cli.videos import require_length, unused
from longtake.files import require_free_video

if TYPE_CHECKING:
    from longtake.generation.script import Script
    from longtake.generation.stream import Engine, Stream


def replay(
    video: Annotated[Positional[Path], arg(metavar="MP4")],
    out: Mp4 = None,
    image: Opening = None,
    device: DeviceName = None,
) -> int:
    """Make a video of longtake's again from what it says of itself, and compare the two. Exits 1 if they differ.

    With the same version on the same kind of device, they are the same to the bit.

    Args:
        video: The mp4 to make again.
        out: The mp4 to write; unless given, its name with -again.
        image: The image or video that it went on from, where it did.
        device: cpu, cuda, cuda:1, ...; unless given, the kind that it was made on.
    """
    from longtake.generation.script import script_in
    from longtake.media.mp4 import count_frames, first_difference, read_record

    record = read_record(video)
    _require_said(video, record)
    script = script_in(record)
    if (image is None) == ("image" in record):
        needs = f"goes on from {record['image']}: name it with --image" if "image" in record else "needs no --image"
        raise ValueError(f"{video} {needs}")
    if out is not None:
        require_free_video(out)
    engine = load_again(record, record["levels"], device)
    _require_same(video, record, engine)
    path = out or unused(video.with_stem(f"{video.stem}-again"))
    engine.prepare([cue.shown for cue in script.cues])
    with _begun_again(engine, script, record, image) as stream:
        pictures = round(record["seconds"] * engine.frame_rate) or 1
        cues = {} if "live" in record else script.by_block(engine, pictures, stream.pictures)
        told = show(stream, cues, count_frames(video), path, record | engine.circumstances, None)
    if told:
        return told
    number = first_difference(video, path)
    say("the same, picture by picture" if number is None else f"they differ from picture {number} on")
    return 0 if number is None else CHECK_FAILED


def _require_said(path: Path, record: dict[str, Any]) -> None:
    """ValueError unless a record says all that is needed to make a video again."""
    needed: dict[str, type | tuple[type, ...]] = dict.fromkeys(("model", "recipe", "dtype", "weights"), str)
    needed |= {"levels": int, "seed": int, "seconds": (int, float), "prompts": list}
    missing = [key for key, kind in needed.items() if not isinstance(record.get(key), kind)]
    missing += [key for key in ("device", "codec", "base") if not isinstance(record.get(key, ""), str)]
    if missing:
        raise ValueError(f"{path} does not tell all of how it was made: {', '.join(missing)} is missing or unreadable")
    require_length(record["seconds"])


def _require_same(path: Path, record: dict[str, Any], engine: "Engine") -> None:
    """ValueError for other weights; other versions and devices, which may change bits, are told."""
    from longtake.generation.stream import UNTOLD

    for key, here in (("weights", engine.weights), ("codec_weights", engine.codec_weights)):
        if record.get(key, here) != here:
            name = key.replace("_", " ")
            raise ValueError(f"{path} was made with {name} {record[key]}, and {engine.model_name} has {here}")
    for key, here in engine.circumstances.items():
        if (there := (UNTOLD | record).get(key, "unknown")) != here:
            say(f"{path} was made with {key} {there}, and this is {here}: pictures may differ")


def _begun_again(engine: "Engine", script: "Script", record: dict[str, Any], image: Path | None) -> "Stream":
    """The stream of a record, where its video begins."""
    from longtake.generation.recording import Remade
    from longtake.generation.stream import Told
    from longtake.generation.take import retrace

    if "live" in record:
        remade = Remade(engine, record)
        _say_in_company(record["live"]["lines"])
        return remade
    if "take" not in record:
        given = None if image is None else opening(engine, image)
        return engine.stream(script.cues[0].shown, seed=record["seed"], pictures=given)
    try:
        blocks = int(record["take"]["blocks"])
        history = list(map(Told.of, record["take"]["history"]))
        if not history or any(told.far is None for told in history[1:]):
            raise KeyError("history")
    except (KeyError, TypeError):
        raise ValueError("the history of this video cannot be read") from None
    say(f"it went on from a take: {blocks} blocks come before it")
    _say_in_company([record["take"]])
    return retrace(engine, record["seed"], history, blocks)


def _say_in_company(streams: Sequence[Mapping[str, Any]]) -> None:
    if any(stream.get("in_company") for stream in streams):
        say("blocks of it were made together with other streams (see serve --exact): pictures may differ")
