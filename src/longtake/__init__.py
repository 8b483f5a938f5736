"""Endless, live, steerable video from text.

The names below are imported when first used, so that `import longtake` and `longtake --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longtake.generation.stream import Chunk, Engine, Stream
    from longtake.generation.take import Take
    from longtake.recipes import load

__version__ = "0.1.0"
__all__ = ["Chunk", "Engine", "Stream", "Take", "__version__", "load"]

_HOME = {
    "Chunk": "longtake.generation.stream",
    "Engine": "longtake.generation.stream",
    "Stream": "longtake.generation.stream",
    "Take": "longtake.generation.take",
    "load": "longtake.recipes",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module it lives in, the first time it is asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
