"""The registry of published checkpoints, with their terms, and their download into Hugging Face's usual cache.

`hub.yaml` is the registry. Cache, offline mode, tokens, resuming and progress are huggingface_hub's, and so are their
settings (`HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN`, `HF_ENDPOINT`). It is imported when something is fetched.
"""

import hashlib
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import cache
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import yaml

from longtake.models.weights import json_object

UNKNOWN = "unknown"
_SHA256 = re.compile("[0-9a-f]{64}")
_AT_ONCE = 2**24  # bytes hashed at a time


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published checkpoint. Every field that is "unknown" is so because nobody has established it.

    repo: on the Hugging Face hub; url: of one that is published elsewhere. files: patterns, as the hub takes them.
    layout: original, diffusers or taehv. network: whose size it has, None for a codec. entry: the dictionary of a
    pickle that holds the weights, None where it is no such pickle. lora: which of the files is low-rank updates of the
    other. recipe: the method it was trained under, options included, None for a many-step teacher. steps: nominal
    timesteps of its levels, before the shift. extent: latent frames it saw at once. licence and commercial: of the
    weights.
    """

    name: str
    files: Sequence[str]
    layout: Literal["original", "diffusers", "taehv"]
    licence: str
    commercial: Literal["yes", "no", "unknown"]
    note: str
    gigabytes: float | str = UNKNOWN
    repo: str | None = None
    url: str | None = None
    network: str | None = None
    height: int | None = None
    width: int | None = None
    frame_rate: int | None = None
    extent: int | str | None = None
    block: int | str | None = None
    entry: str | None = None
    lora: str | None = None
    recipe: str | None = None
    steps: Sequence[float] | str | None = None
    shift: float | str | None = None
    paper: str | None = None


class Download(NamedTuple):
    """What fetching a checkpoint comes to: bytes of all its files, and of those that are not in the cache yet."""

    bytes: int
    missing_bytes: int


@cache
def registry() -> dict[str, Published]:
    """Every published checkpoint that is known here, by name."""
    entries: dict[str, dict[str, Any]] = yaml.safe_load(
        resources.files("longtake.models").joinpath("hub.yaml").read_text(encoding="utf-8")
    )
    return {name: Published(name=name, **entry) for name, entry in entries.items()}


def published(name: str) -> Published:
    """The checkpoint of that name. ValueError, with the nearest names, if there is none."""
    if name in registry():
        return registry()[name]
    raise ValueError(f"no published checkpoint {name!r}: {nearest(name, registry())}")


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is unknown: which known ones are like it, or else which there are."""
    there = sorted(known)
    close = get_close_matches(name, there, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(there)}"


def look_up(checkpoint: Published) -> Download | None:
    """Ask the hub how large the files are; None where it cannot be reached.

    ValueError if the hub answers that there is no such repository or file, or that its terms must be accepted first.
    """
    hub = _hub()
    try:
        found = hub.snapshot_download(checkpoint.repo, allow_patterns=list(checkpoint.files), dry_run=True)
    except hub.errors.DryRunError as error:
        _raise_refusal(hub, checkpoint, error.__cause__)
        return None
    except Exception as error:
        raise _in_words(hub, checkpoint, error) from None
    for pattern in checkpoint.files:
        if not any(fnmatch(file.filename, pattern) for file in found):
            raise ValueError(f"{checkpoint.repo} holds nothing called {pattern}")
    return Download(
        bytes=sum(file.file_size or 0 for file in found),
        missing_bytes=sum(file.file_size or 0 for file in found if file.will_download),
    )


def fetch(checkpoint: Published, download: Download | None) -> Path:
    """The folder of the checkpoint's files in the cache, after what is missing of them was fetched.

    download: what `look_up` said; None takes the cache as it is. Files come into the cache whole or not at all. Of a
    fetch, all files are checked, also those that were there: one whose SHA-256 is not the hub's is thrown away.
    ValueError, in one line, for whatever prevents it.
    """
    hub = _hub()
    patterns = list(checkpoint.files)
    if download is not None:
        _require_space(Path(hub.constants.HF_HUB_CACHE), download.missing_bytes)
    try:
        folder = Path(
            hub.snapshot_download(checkpoint.repo, allow_patterns=patterns, local_files_only=download is None)
        )
    except Exception as error:
        raise _in_words(hub, checkpoint, error) from None
    files = _files_of(checkpoint, folder)
    if missing := _missing(checkpoint, folder, files):
        raise ValueError(f"{checkpoint.name}: {', '.join(missing)} not in the cache, and the hub cannot be reached")
    if download is not None:
        _require_intact(files)
    return folder


def cached(checkpoint: Published) -> Path:
    """The folder of a checkpoint that was pulled; the hub is not asked. ValueError, with what to do, for any other."""
    if checkpoint.repo is None:
        raise ValueError(f"{checkpoint.name} is not on the hub: fetch it from {checkpoint.url} and name its file")
    try:
        return fetch(checkpoint, None)
    except ValueError as error:
        raise ValueError(f"{error}: longtake models pull {checkpoint.name}") from None


def located(name: str | Path) -> Path:
    """The folder of a checkpoint of that name, errors as `cached`; what is no name of the registry is a path."""
    return cached(published(str(name))) if str(name) in registry() else Path(name)


def _files_of(checkpoint: Published, folder: Path) -> list[Path]:
    """Those files of a folder that its patterns name, which match across folders, as the hub's do."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        file for file in files if any(fnmatch(file.relative_to(folder).as_posix(), one) for one in checkpoint.files)
    ]


def _missing(checkpoint: Published, folder: Path, files: Sequence[Path]) -> list[str]:
    """What a pull that broke off left out: patterns without a file, and shards that an index names."""
    names = [file.relative_to(folder).as_posix() for file in files]
    shards = [
        (file.parent / shard).relative_to(folder).as_posix()
        for file in files
        if file.name.endswith(".index.json")
        for shard in sorted(set(json_object(file).get("weight_map", {}).values()))
    ]
    return [one for one in checkpoint.files if not any(fnmatch(name, one) for name in names)] + [
        shard for shard in shards if shard not in names
    ]


def _require_intact(files: Sequence[Path]) -> None:
    """Throw away all files whose content is not what their names in the cache say, and say so in a ValueError."""
    damaged = [file for file in files if not _is_intact(file.resolve())]
    for file in damaged:
        blob = file.resolve()
        file.unlink()
        blob.unlink(missing_ok=True)
    if damaged:
        raise ValueError(f"{', '.join(file.name for file in damaged)} arrived damaged and was thrown away: fetch again")


def _is_intact(blob: Path) -> bool:
    """Whether a file of the cache has the SHA-256 that is its name; small files have other names and pass."""
    if not _SHA256.fullmatch(blob.name):
        return True
    digest = hashlib.sha256()
    with blob.open("rb") as content:
        while piece := content.read(_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest() == blob.name


def cache_space() -> tuple[Path, int]:
    """The folder that checkpoints are fetched to, and bytes free on its disk. ValueError without huggingface_hub."""
    folder = Path(_hub().constants.HF_HUB_CACHE)
    return folder, _free_bytes(folder)


def _free_bytes(folder: Path) -> int:
    """Free on the disk of a folder that need not be there yet."""
    there = next(above for above in (folder, *folder.parents) if above.exists())
    return shutil.disk_usage(there).free


def _require_space(cache_folder: Path, needed: int) -> None:
    free = _free_bytes(cache_folder)
    if needed > free:
        raise ValueError(f"{cache_folder} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are to be fetched")


def _hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ModuleNotFoundError:
        raise ValueError(
            'published checkpoints are fetched with huggingface_hub: pip install "longtake[wan]"'
        ) from None
    return huggingface_hub


def _raise_refusal(hub: ModuleType, checkpoint: Published, error: BaseException | None) -> None:
    """Raise what the hub answered, as a ValueError; silent about a hub that did not answer."""
    if isinstance(error, hub.errors.RepositoryNotFoundError | hub.errors.GatedRepoError):
        raise _in_words(hub, checkpoint, error) from None


def _in_words(hub: ModuleType, checkpoint: Published, error: BaseException) -> ValueError:
    """Whatever went wrong at the hub, on the way or on the disk, as one line that says what to do.

    Everything is taken: what the client raises comes from several libraries and changes with its version.
    """
    errors = hub.errors
    if isinstance(error, errors.GatedRepoError):
        what = f"accept the terms at https://huggingface.co/{checkpoint.repo} and set HF_TOKEN"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = f"the hub has no {checkpoint.repo}, or shows it to nobody without a token (HF_TOKEN)"
    elif isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        what = "not all of it is in the cache, and the hub cannot be reached or is switched off (HF_HUB_OFFLINE)"
    else:
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        what = f"the fetch broke off ({said}); the same command fetches what is missing"
    return ValueError(f"{checkpoint.name}: {what}")
