"""What takes long to make is kept on disk and made once: text embeddings, rewritten prompts."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

_DIGEST = hashlib.sha256().digest_size


def cache_home() -> Path:
    """Where caches of this user are, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longtake"


class DiskCache:
    """Bytes by key in a folder, one file each: a digest, then the bytes.

    Files are written beside and renamed, so that many processes may share the folder; one that is damaged counts as
    missing. Nothing is ever thrown away.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> bytes | None:
        """The bytes kept under a key, or None where there are none or they are damaged."""
        try:
            stored = self.path_of(key).read_bytes()
        except FileNotFoundError:
            return None
        digest, value = stored[:_DIGEST], stored[_DIGEST:]
        return value if hashlib.sha256(value).digest() == digest else None

    def put(self, key: str, value: bytes) -> None:
        """Keep bytes under a key. OSError, with what to do, where nothing can be written."""
        path = self.path_of(key)
        beside = path.with_name(f"{path.name}.{uuid4().hex}.part")  # machines that share the folder share process ids
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(hashlib.sha256(value).digest() + value)
            os.replace(beside, path)
        except OSError as error:
            with suppress(OSError):
                beside.unlink()
            reason = error.strerror or error
            raise OSError(
                f"{self.folder} cannot keep anything ({reason}): let XDG_CACHE_HOME name a folder that can"
            ) from None

    def path_of(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / hashlib.sha256(key.encode()).hexdigest()
