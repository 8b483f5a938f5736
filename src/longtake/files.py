"""Files that grow beside their names and take them when they are whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_free(path: Path, *, overwrite: bool = False, way_out: str = "remove it first") -> None:
    """OSError where no file of that name can be made; FileExistsError, with a way out, for a name in use."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name the file to write in it")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another name, or {way_out}")


def require_free_video(path: Path, *, overwrite: bool = False, way_out: str = "remove it first") -> None:
    """As `require_free`; ValueError for a name that promises another kind of file than is written."""
    require_free(path, overwrite=overwrite, way_out=way_out)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"videos are mp4 files: name {path} {path.stem}.mp4")


def make_folder(folder: Path) -> None:
    """Make a folder if it is missing. OSError where it cannot be made or written in, before work is spent on that."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write in {folder}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that takes its name when it is whole. If it never is, what was there before stays."""
    beside = unfinished(path)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def unfinished(path: Path) -> Path:
    """Where a file grows before it takes its name."""
    return path.with_name(path.name + ".part")


def claim(beside: Path, note: str = "") -> None:
    """Begin the file that grows beside a name, empty. FileExistsError where there is one, with a note on what it is."""
    try:
        beside.open("xb").close()
    except FileExistsError:
        raise FileExistsError(
            f"{beside} is being written, or was left when its writer was killed{note}: move it away first"
        ) from None
