"""Weights between those that training began with and those that it came to (WiSE-FT, arXiv 2109.01903).

What was learned last is often held in a part of the way, while what was known before comes back sooner.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from longtake.models.delta import Weights, network_hash, pair_of, require_new_file
from longtake.models.weights import load_weights, save_weights


def save_mix(
    path: Path, base_file: Path, tuned_file: Path, *, share: float, read: Callable[[Path], Weights] = load_weights
) -> dict[str, Any]:
    """Write weights that are so far on the way from one of our networks' files to one tuned from it, as int8.

    share: of the way, above 0 and below 1. read: gives the weights that a file stands for. Tensors that the base lacks,
    such as projections of a far state, are the tuned one's; so is all that the file says. Told, ready for JSON: the
    file, its bytes, the share. ValueError for another share, for files that do not go together, and where `path` is not
    new.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of the way is above 0 and below 1, got {share}")
    require_new_file(path)
    base, tuned, description = pair_of(base_file, tuned_file, read)
    mixed = {name: _between(base.get(name, after), after, share) for name, after in tuned.items()}
    save_weights(path, mixed, {**description, "mix": {"base": network_hash(base), "share": share}}, int8=True)
    return {"file": str(path), "bytes": path.stat().st_size, "share": share}


def _between(before: Tensor, after: Tensor, share: float) -> Tensor:
    return before.lerp(after, share) if after.is_floating_point() else after
