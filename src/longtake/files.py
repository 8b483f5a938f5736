"""Files that grow beside their names and take them when they are whole."""

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


def claim(beside: Path, note: str = "") -> None:
    """Begin the file that grows beside a name, empty. FileExistsError where there is one, with a note on what it is."""
    try:
        beside.open("xb").close()
    except FileExistsError:
        raise FileExistsError(
            f"{beside} is being written, or was left when its writer was killed{note}: move it away first"
        ) from None
