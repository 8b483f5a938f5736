"""Weight files: our own, safetensors with a description, and the published ones, read tensor by tensor.

Our files hold tensors as they are or as int8 per row. An int8 tensor `name` comes with `name.scale`, one fp32 factor
for each of its rows (first dimension): the largest magnitude of a row is 127. Files are written beside and renamed, so
a file that exists is whole.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_DESCRIPTION = "longtake"
_SCALE = ".scale"
_INDEX = ".safetensors.index.json"
_MAPPED_SHARE = 32  # of a pickle, one part in this many is mapped before it is opened anew
ENTRIES = ("generator_ema", "generator", "model")
LORA_ENTRIES = ("generator_lora",)
Sizes = TypeVar("Sizes")


def save_weights(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any], *, int8: bool) -> None:
    """Write tensors and a JSON description. int8: matrices and kernels per row, the rest bf16; otherwise unchanged.

    What has one row, such as a layer's modulation, and every bias is of the rest: one scale for all of it, or for a
    head's biases, would drown its small parts. ValueError where it cannot be written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if int8:
        stored = _quantized(stored)
    with written_whole(path) as beside:
        save_file(stored, beside, metadata={_DESCRIPTION: json.dumps(description)})
        beside.chmod(0o644)  # safetensors lets only the owner read


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Where to write a file or a folder that is renamed when it is whole. Where writing fails it goes: ValueError."""
    try:
        with TemporaryDirectory(prefix=f"{target.name}.", suffix=".part", dir=target.parent) as beside:
            yield Path(beside) / target.name
            os.replace(Path(beside) / target.name, target)
    except (SafetensorError, RuntimeError, OSError) as error:  # the first two are how a full disk is told of
        raise ValueError(f"{target} could not be written: {error}") from error


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in fp32 (int8 ones multiplied out) and the description. ValueError if a file is not whole or not ours."""
    try:
        with safe_open(path, "pt") as file:
            description = (file.metadata() or {}).get(_DESCRIPTION)
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise ValueError(f"no weights at {path}") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None
    if description is None:
        raise ValueError(f"{path} holds no description by longtake")
    return _multiplied_out(stored), json.loads(description)


def described(path: Path) -> dict[str, Any]:
    """The description of a safetensors file, empty if it is none of ours. ValueError if it is not whole."""
    with _complete(path), safe_open(path, "pt") as file:
        return dict(json.loads((file.metadata() or {}).get(_DESCRIPTION, "{}")))


def sizes_of(kind: type[Sizes], described: Mapping[str, Any]) -> Sizes:
    """A dataclass of sizes from what a description says of its fields; those that it leaves out are as by default.

    ValueError for fields that it does not have, as in files of later versions.
    """
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(described.keys() - known):
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)} in this version of longtake")
    return kind(**described)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Tells weights from others, in any precision: a hash of what each tensor sums up to.

    Summed are the bits of its values in bfloat16, as whole numbers, so that no device or order rounds the sum.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole = tensor.bfloat16().view(torch.int16) if tensor.is_floating_point() else tensor
        digest.update(f"{name} {list(tensor.shape)} {int(whole.sum(dtype=torch.int64))}\n".encode())
    return digest.hexdigest()[:16]


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load tensors by name, refusing leftovers, gaps and misfits with the first few names of each."""
    require_fit(module, tensors, source)
    module.load_state_dict(dict(tensors))


def require_fit(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """ValueError, with the first few names of each, for tensors that are missing, not known or of another shape.

    Only names and shapes are looked at, so both sides may be on the meta device.
    """
    own = module.state_dict()
    misfits = [name for name in sorted(own.keys() & tensors.keys()) if own[name].shape != tensors[name].shape]
    problems = {
        "missing": sorted(own.keys() - tensors.keys()),
        "not known": sorted(tensors.keys() - own.keys()),
        "of another shape": [f"{name} {_size(tensors[name])} for {_size(own[name])}" for name in misfits],
    }
    if any(problems.values()):
        said = "; ".join(f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in problems.items() if names)
        raise ValueError(f"{source} does not fit {type(module).__name__}: {said}")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of a published checkpoint by name. None is read before it is asked for.

    source: the file that was opened, for messages; of shards, their index. entry: which of a pickle's dictionaries
    the tensors are from, None if it has one only. meta: every tensor's shape and dtype, on the meta device. read: a
    tensor by name, on the CPU; it may be a mapped part of the file, so copy what is kept and let go of the rest.
    description: of one of our own files. config: what a `config.json` beside it says.
    """

    source: Path
    meta: Mapping[str, Tensor]
    read: Callable[[str], Tensor]
    entry: str | None = None
    description: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def renamed(self, old_names: Mapping[str, str]) -> "Checkpoint":
        """Those of the tensors whose old names are given, under the new names that they are given for."""
        meta = {new: self.meta[old] for new, old in old_names.items()}
        return replace(self, meta=meta, read=lambda new: self.read(old_names[new]))

    def changed(self, shape: Mapping[str, torch.Size], change: Callable[[str, Tensor], Tensor]) -> "Checkpoint":
        """The same, but that `change` is applied to the tensors named in `shape`, which gives what shape they get."""
        meta = {name: x.new_empty(shape[name]) if name in shape else x for name, x in self.meta.items()}
        return replace(
            self, meta=meta, read=lambda name: change(name, self.read(name)) if name in shape else self.read(name)
        )


def open_checkpoint(path: str | Path, *, entries: Sequence[str] = ENTRIES) -> Checkpoint:
    """Open a `.safetensors` file, the index of its shards, a `.pt` or `.pth` file, or a folder that holds one of them.

    entries: of a pickle of several dictionaries the first of these that is there. Pickles are read as tensors only:
    no code in them runs. ValueError, with what there is instead, for a file that is missing, not whole, holds other
    things than tensors, or has none of the entries.
    """
    path = _file_in(Path(path))
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    if path.name.endswith(".json"):
        opened = _open_shards(path)
    elif path.suffix == ".safetensors":
        opened = _open_safetensors(path)
    else:
        opened = _open_pickle(path, entries)
    beside = path.with_name("config.json")
    if path.name.startswith("diffusion_pytorch_model") and beside.is_file():
        return replace(opened, config=json_object(beside))
    return opened


def fill(module: nn.Module, checkpoint: Checkpoint, device: str | torch.device, dtype: torch.dtype | None) -> None:
    """Load a checkpoint into a module that was made on the meta device: one tensor after the other, in its place.

    No tensor is held twice but the one in hand, so the peak is the weights themselves. dtype: None keeps the file's.
    ValueError for leftovers, gaps and misfits.
    """
    require_fit(module, checkpoint.meta, checkpoint.source)
    placed = {
        name: checkpoint.read(name).to(device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format)
        for name in checkpoint.meta
    }
    module.load_state_dict(placed, assign=True)


def _file_in(path: Path) -> Path:
    """The one checkpoint in a folder: the one of diffusers' name, else the only one. Other paths are left alone."""
    if not path.is_dir():
        return path
    for usual in (f"diffusion_pytorch_model{_INDEX}", "diffusion_pytorch_model.safetensors"):
        if (path / usual).is_file():
            return path / usual
    indices = sorted(path.glob(f"*{_INDEX}"))
    found = indices or sorted(one for one in path.iterdir() if one.suffix in (".safetensors", ".pt", ".pth"))
    if len(found) != 1:
        there = ", ".join(one.name for one in found) or "none"
        raise ValueError(f"{path} must hold one checkpoint, or be given with a file's name: there is {there}")
    return found[0]


def _open_safetensors(path: Path) -> Checkpoint:
    with _complete(path), safe_open(path, "pt") as file:
        described = (file.metadata() or {}).get(_DESCRIPTION)
        meta = {name: file.get_tensor(name).to("meta") for name in file.keys()}  # noqa: SIM118 (not a dict)

    def read(name: str) -> Tensor:
        # Opened for each tensor: what a handle has mapped stays in memory for as long as it is open.
        with _complete(path), safe_open(path, "pt") as file:
            return file.get_tensor(name)

    return Checkpoint(source=path, meta=meta, read=read, description=json.loads(described) if described else None)


def _open_shards(index: Path) -> Checkpoint:
    file_of = json_object(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(x, str) and Path(x).name == x for x in file_of.values()):
        raise ValueError(f"{index} does not say which of the files beside it holds what")
    shards = {}
    for file in sorted(set(file_of.values())):
        if not (index.parent / file).is_file():
            raise ValueError(f"{file}, a shard of {index}, is missing: fetch it again")
        shards[file] = _open_safetensors(index.parent / file)
        listed = {name for name, holder in file_of.items() if holder == file}
        if odd := sorted(listed ^ shards[file].meta.keys()):
            raise ValueError(f"{index} and its shard {file} do not agree: {', '.join(odd[:3])}")
    meta = {name: shards[file].meta[name] for name, file in file_of.items()}
    return Checkpoint(source=index, meta=meta, read=lambda name: shards[file_of[name]].read(name))


def _open_pickle(path: Path, entries: Sequence[str]) -> Checkpoint:
    entry, tensors = _chosen(_unpickled(path), entries, path)
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    if not zipfile.is_zipfile(path):  # of torch before 1.6: cannot be mapped, so it is in memory as a whole
        return Checkpoint(source=path, meta=meta, read=tensors.__getitem__, entry=entry)
    limit = path.stat().st_size // _MAPPED_SHARE
    mapped = 0

    def read(name: str) -> Tensor:
        # What was read stays in memory for as long as the file is open, hence opened anew at times.
        nonlocal tensors, mapped
        if mapped > limit:
            tensors, mapped = _chosen(_unpickled(path), entries, path)[1], 0
        mapped += tensors[name].nbytes
        return tensors[name]

    return Checkpoint(source=path, meta=meta, read=read, entry=entry)


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # of damaged bytes the unpickler makes anything
        if "weights_only" in str(error).lower():
            raise ValueError(f"{path} is not a whole file of tensors, or holds code, which is not run") from None
        raise ValueError(f"{path} is not a whole file of tensors; fetch it again") from None


def _chosen(loaded: Any, entries: Sequence[str], path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """The first entry that is there and its tensors; a file that is one dictionary of tensors has no entries."""
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path} holds no named tensors")
    entry, tensors = None, loaded
    if any(isinstance(value, dict) for value in loaded.values()):
        entry = next((name for name in entries if isinstance(loaded.get(name), dict)), None)
        if entry is None:
            raise ValueError(f"{path} has no entry {' or '.join(entries)}: there are {', '.join(map(str, loaded))}")
        tensors = loaded[entry]
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} holds {name!r}, a {type(value).__name__}, where tensors were expected")
    return entry, tensors


@contextmanager
def _complete(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds. ValueError, in one line, unless that is one object."""
    try:
        read = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path} must hold one JSON object")
    return read


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _quantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or len(tensor) == 1 or name.endswith("bias") or not tensor.is_floating_point():
            stored[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor
            continue
        rows = tensor.float().flatten(1)
        scale = rows.abs().amax(dim=1).clamp_min(1e-12) / 127
        stored[name] = (rows / scale[:, None]).round().to(torch.int8).view_as(tensor)
        stored[name + _SCALE] = scale
    return stored


def _multiplied_out(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.int8:
            scale = stored[name + _SCALE]
            tensors[name] = tensor.float() * scale.view(-1, *(1,) * (tensor.ndim - 1))
        elif not (name.endswith(_SCALE) and name.removesuffix(_SCALE) in stored):
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors
