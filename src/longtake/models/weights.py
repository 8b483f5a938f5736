"""Weight files: safetensors with a description, stored as they are or as int8 per row.

An int8 tensor `name` comes with `name.scale`, one fp32 factor for each of its rows (first dimension): the largest
magnitude of a row is 127. Files are written beside and renamed, so a file that exists is whole.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

_DESCRIPTION = "longtake"
_SCALE = ".scale"


def save_weights(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any], *, int8: bool) -> None:
    """Write tensors and a JSON description. int8: matrices and kernels per row, the rest bf16; otherwise unchanged.

    What has one row, such as a layer's modulation, is of the rest: one scale for all of it would drown its small parts.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if int8:
        stored = _quantized(stored)
    beside = path.with_name(path.name + ".part")
    save_file(stored, beside, metadata={_DESCRIPTION: json.dumps(description)})
    beside.chmod(0o644)  # safetensors lets only the owner read
    os.replace(beside, path)


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


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load tensors by name, refusing leftovers, gaps and misfits with the first few names of each."""
    own = module.state_dict()
    misfits = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    problems = {
        "missing": sorted(own.keys() - tensors.keys()),
        "not known": sorted(tensors.keys() - own.keys()),
        "of another shape": sorted(misfits),
    }
    if any(problems.values()):
        said = "; ".join(f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in problems.items() if names)
        raise ValueError(f"{source} does not fit {type(module).__name__}: {said}")
    module.load_state_dict(dict(tensors))


def _quantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or len(tensor) == 1 or not tensor.is_floating_point():
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
