"""Weights as a delta on others: what is added to every matrix as a product of low rank, to what is small in full.

A file of ours whose description says which base it is on, by the hash that records tell of networks, and at which rank;
all else it says is said of base and delta together. Tensors that the base has are differences, W' - W of a W that
became W', others are new and as they are; what did not change is left out. Factors bear PEFT's names, and are the best
of their rank: U and S V of the singular values of W' - W, so that an int8 step of a row is small beside what it adds.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.models.names import OURS, is_low_rank, low_rank_names, merged
from longtake.models.weights import Checkpoint, fingerprint, load_weights, save_weights

_DELTA = "delta"
Weights = tuple[dict[str, Tensor], dict[str, Any]]
_SAME = 1e-6  # of a number: what int8 files change of it when they are read and written again


def save_delta(path: Path, base_file: Path, tuned_file: Path, *, rank: int) -> dict[str, Any]:
    """Write what one of our networks' files is beside another, as int8, and tell what it came to, ready for JSON.

    rank: of each matrix that takes less room so than in full; 0: any, and all is in full. Told are the file's bytes,
    and of what is read back the error that is left: as a share of the weights and of their change (Frobenius norms),
    and the worst tensor's share. ValueError for files that hold no whole network, that do not go together, or do not
    differ, and where `path` is not new.
    """
    if rank < 0:
        raise ValueError(f"the rank of a delta is 0 (any) or more, got {rank}")
    require_new_file(path)
    base, tuned, description = pair_of(base_file, tuned_file)
    delta = difference(base, tuned, rank)
    if not delta:
        raise ValueError(f"{tuned_file} does not differ from {base_file}")
    about = {"base": network_hash(base), "rank": rank}
    save_weights(path, delta, {**description, _DELTA: about}, int8=True)
    pairs = sum(map(is_low_rank, delta)) // 2
    read_back, _ = on_base(path, *load_weights(path), [base_file])
    return {
        "file": str(path), "bytes": path.stat().st_size, **about, "low_rank": pairs, "in_full": len(delta) - 2 * pairs,
        **_error_left(base, tuned, read_back),
    }  # fmt: skip


def require_new_file(path: Path) -> None:
    """ValueError unless weights can be written there, and nothing is there yet."""
    if path.exists() or path.suffix != ".safetensors" or not path.parent.is_dir():
        raise ValueError(f"{path} must be a new file, NAME.safetensors, in a folder that is there")


def pair_of(
    base_file: Path, tuned_file: Path, read: Callable[[Path], Weights] = load_weights
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The tensors of two of our networks' files, and what the second says of itself.

    ValueError for files in which `read` finds no whole network, and unless the second has all that the first has, or
    more.
    """
    base, _ = _whole_network(base_file, read)
    tuned, description = _whole_network(tuned_file, read)
    if misfits := [name for name, x in base.items() if name not in tuned or tuned[name].shape != x.shape]:
        some = ", ".join(misfits[:3])
        raise ValueError(f"{tuned_file} is not {base_file} tuned: it lacks or reshapes {len(misfits)} tensors ({some})")
    return base, tuned, description


def is_delta(description: Mapping[str, Any]) -> bool:
    """Whether a file of this description holds no whole weights, but what they are beside others."""
    return _DELTA in description


def on_base(
    path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any], bases: Iterable[Path]
) -> Weights:
    """The whole weights of a delta that was read from a file, in float32, on the first of these files that is its base,
    and what the file says of them.

    ValueError if none is, and for factors that have no place in it; what else does not fit shows in the network.
    """
    found = {}
    for file in bases:
        base, _ = load_weights(file)
        found[file] = network_hash(base)
        if found[file] == description[_DELTA]["base"]:
            said = {name: value for name, value in description.items() if name != _DELTA}
            return with_delta(_opened(file, base), _opened(path, tensors)), said
    seen = ", ".join(f"{file} holds {held}" for file, held in found.items())
    raise ValueError(f"{path} is a delta on the weights {description[_DELTA]['base']}, which are not here: {seen}")


def difference(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The tensors of a delta, from those of base and tuned weights, which has all that the base has.

    What is added to a matrix is there in full where factors of that rank would not be smaller, or the rank is any (0).
    """
    delta = {name: after for name, after in tuned.items() if name not in base}
    for name, before in base.items():
        if torch.allclose(tuned[name], before, rtol=_SAME, atol=0):
            continue
        added = tuned[name].float() - before.float()
        if rank and name.endswith(".weight") and pays(added.shape, rank):
            u, s, v = torch.linalg.svd(added, full_matrices=False)
            down, up = low_rank_names(name)
            delta |= {down: s[:rank, None] * v[:rank], up: u[:, :rank]}
        else:
            delta[name] = added
    return delta


def pays(shape: torch.Size, rank: int) -> bool:
    """Whether factors of that rank are smaller than a weight of that shape."""
    return len(shape) == 2 and rank * sum(shape) < shape.numel()


def with_delta(base: Checkpoint, delta: Checkpoint) -> dict[str, Tensor]:
    """Weights with a delta: products (`names.merged`) and differences added, new tensors as they are.

    ValueError for what does not fit the weight that it would be added to.
    """
    factors = {name: name for name in delta.meta if is_low_rank(name)}
    full = {name: delta.read(name) for name in delta.meta if name not in factors}
    for name, added in full.items():
        if name in base.meta and base.meta[name].shape != added.shape:
            raise ValueError(f"{delta.source}: {list(added.shape)} does not fit {name} {list(base.meta[name].shape)}")
    changed = merged(base, delta.renamed(factors))
    whole = {name: changed.read(name) for name in base.meta}
    return whole | {name: whole[name] + added if name in whole else added for name, added in full.items()}


def _error_left(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> dict[str, Any]:
    """How far weights are from those that they stand for."""
    size = {name: x.double().norm().item() for name, x in tuned.items()}
    missed = {name: (x.double() - made[name].double()).norm().item() for name, x in tuned.items()}
    change = {
        name: (x.double() - base[name].double()).norm().item() if name in base else size[name]
        for name, x in tuned.items()
    }
    share = {name: _share(missed[name], size[name]) for name in tuned}
    worst = max(share, key=lambda name: share[name])
    return {
        "error": _share(_norm(missed), _norm(size)), "error_of_change": _share(_norm(missed), _norm(change)),
        "worst": worst, "worst_error": share[worst],
    }  # fmt: skip


def _share(missed: float, whole: float) -> float:
    """Of a whole that is nothing, 1 if anything is missed."""
    return missed / whole if whole else float(missed > 0)


def _norm(norms: Mapping[str, float]) -> float:
    return sum(norm**2 for norm in norms.values()) ** 0.5


def _whole_network(path: Path, read: Callable[[Path], Weights]) -> Weights:
    tensors, description = read(path)
    if "network" not in description:
        raise ValueError(f"{path} does not hold a network")
    if is_delta(description):
        raise ValueError(f"{path} is a delta itself: name whole weights")
    return tensors, description


def network_hash(tensors: Mapping[str, Tensor]) -> str:
    """That of the network alone, as an engine tells it of its own."""
    return fingerprint({name.removeprefix(OURS): x for name, x in tensors.items() if name.startswith(OURS)})


def _opened(source: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    return Checkpoint(source=source, meta={name: x.to("meta") for name, x in tensors.items()}, read=tensors.__getitem__)
