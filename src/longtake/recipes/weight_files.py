"""Which file the weights of a model and a recipe are in, and such files read and written: networks and light codecs."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longtake.models.delta import is_delta, on_base
from longtake.models.hub import nearest, registry
from longtake.models.light_codec import LightCodec, LightCodecConfig
from longtake.models.text import WordEncoder, WordEncoderConfig
from longtake.models.wan import WanConfig, WanTransformer
from longtake.models.weights import load_into, load_weights, save_weights, sizes_of
from longtake.recipes.devices import CPU
from longtake.recipes.methods import MEMORY_RULES

TOY_WEIGHTS = "toy/weights"
NETWORK_FILE = "student.safetensors"
HYBRID_FILE = "student_hybrid.safetensors"
ROLLING_FILE = "student_rolling.safetensors"
REHYAT_FILE = "student_rehyat.safetensors"
TEACHER_FILE = "teacher.safetensors"
CONVERTED_FILE = "converted.safetensors"
CODEC_FILE = "codec_decoder.safetensors"
ENCODER_FILE = "codec_encoder.safetensors"

MODELS: dict[tuple[str, str], str] = {
    ("toy", "self_forcing"): NETWORK_FILE,
    ("toy", "self_forcing_sink"): NETWORK_FILE,
    ("toy", "hybrid_forcing"): HYBRID_FILE,
    ("toy", "rolling_forcing"): ROLLING_FILE,
    ("toy", "rehyat"): REHYAT_FILE,
    **{("toy", name): NETWORK_FILE for name in MEMORY_RULES},
}
"""(model, recipe) -> the network's weights: the student, distilled under the first two recipes, or a delta on it."""


def model_names() -> set[str]:
    """Names of embedded models."""
    return {name for name, _ in MODELS}


def files_for(model: str | Path, recipe: str) -> tuple[Path, Path]:
    """The network's and the codec's file of a model under a recipe.

    model: a name, a folder, or a network's file, whose codec is looked for beside it and then in the package.
    ValueError for others, and for a name without weights for the recipe.
    """
    name, path = str(model), Path(model)
    function = recipe.partition(":")[0]
    if (name, function) in MODELS:  # names come first: ./toy is a folder of that name
        return packaged(MODELS[name, function]), packaged(CODEC_FILE)
    if name in model_names():
        there = ", ".join(other for model, other in MODELS if model == name)
        raise ValueError(f"model {name} has no weights for recipe {function}: there are some for {there}")
    if path.is_dir():
        return path / NETWORK_FILE, path / CODEC_FILE
    if path.is_file():
        beside = path.with_name(CODEC_FILE)
        return path, beside if beside.is_file() else packaged(CODEC_FILE)
    raise ValueError(f"no model, folder or file {name!r}: {nearest(name, model_names() | registry().keys())}")


def packaged(name: str) -> Path:
    """The path of one of the embedded model's weight files. ValueError if this installation has none of that name."""
    path = _in_package(name)
    if not path.is_file():
        raise ValueError(f"{name} is not part of this installation: use a checkout of the repository")
    return path


def _in_package(name: str) -> Path:
    return Path(str(resources.files("longtake") / TOY_WEIGHTS / name))


def file_of(model: str | Path, name: str) -> Path:
    """One of the files of a model, which is a name or a folder; only a name's are looked for in the package."""
    if str(model) in model_names():
        if name == CONVERTED_FILE:  # none is both fast and keeps its cameras yet (docs/rehyat.md)
            raise ValueError(f"model {model} has no converted teacher: name a folder that holds {name}")
        return packaged(name)
    path = Path(model) / name
    if not path.is_file():
        raise ValueError(f"model {str(model)!r} is neither a known name nor a folder that holds {name}")
    return path


def student_file(model: str | Path) -> Path:
    """The weights of a model that is a name, a folder that holds student.safetensors, or a file; else ValueError."""
    path = Path(model)
    return path if path.is_file() and str(model) not in model_names() else file_of(model, NETWORK_FILE)


def load_network(path: Path, device: torch.device) -> tuple[WordEncoder, WanTransformer, dict[str, Any]]:
    """A network with its text encoder from one file, frozen and in fp32, and the file's description."""
    tensors, description = load_tensors(path)
    if missing := {"text", "network", "shift", "role"} - description.keys():
        raise ValueError(f"{path} does not hold a network: it says nothing of {', '.join(sorted(missing))}")
    text = WordEncoder(sizes_of(WordEncoderConfig, description["text"]))
    network = WanTransformer(WanConfig.of(description["network"]))
    load_into(nn.ModuleDict({"text": text, "network": network}), tensors, path)
    for module in (text, network):
        module.requires_grad_(False).eval().to(device)
    return text, network, description


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `load_weights`, but that a delta comes as the whole weights that it stands for.

    Its base is the student or the teacher beside it, or else the embedded ones. ValueError if none is.
    """
    tensors, description = load_weights(path)
    if not is_delta(description):
        return tensors, description
    return on_base(path, tensors, description, _bases(path))


def _bases(delta: Path) -> Iterator[Path]:
    for name in (NETWORK_FILE, TEACHER_FILE):
        beside, embedded = delta.with_name(name), _in_package(name)
        if beside.is_file() and beside not in (delta, embedded):
            yield beside
        if embedded.is_file():
            yield embedded


def save_network(
    path: Path,
    text: WordEncoder,
    network: WanTransformer,
    *,
    role: str,
    shift: float,
    int8: bool,
    recipes: Sequence[str] = (),
) -> None:
    """Write a network with its text encoder to one file that `load_network` reads.

    role: teacher or student. shift: of the levels it was trained with. recipes: the names, options included, of those
    that a student was trained under last.
    """
    parts = {"text": text.state_dict(), "network": network.state_dict()}
    tensors = {f"{prefix}.{name}": tensor for prefix, part in parts.items() for name, tensor in part.items()}
    description = {"role": role, "shift": shift, "text": asdict(text.config), "network": asdict(network.config)}
    if recipes:
        description["recipes"] = list(recipes)
    save_weights(path, tensors, description, int8=int8)


def load_codec(paths: Sequence[Path], device: torch.device, *, span: int | None = None) -> LightCodec:
    """A light codec, frozen and in fp32, from its decoder's file alone or from both parts' (decoder first).

    span: latent frames that go through it at once; None takes whole clips.
    """
    tensors, description = load_weights(paths[0])
    if "codec" not in description:
        raise ValueError(f"{paths[0]} does not hold a codec")
    for path in paths[1:]:
        tensors |= load_weights(path)[0]
    codec = LightCodec(sizes_of(LightCodecConfig, description["codec"]), encoder=len(paths) > 1, span=span)
    load_into(codec, tensors, paths[0])
    return codec.requires_grad_(False).eval().to(device)


def save_codec(folder: Path, codec: LightCodec, *, int8: bool) -> None:
    """Write a light codec as two files, so that a package that only decodes can leave the encoder out."""
    tensors = codec.state_dict()
    encoder = {name: x for name, x in tensors.items() if name.startswith("encoder.")}
    decoder = {name: x for name, x in tensors.items() if name not in encoder}
    description = {"codec": asdict(codec.config)}
    save_weights(folder / CODEC_FILE, decoder, description, int8=int8)
    save_weights(folder / ENCODER_FILE, encoder, description, int8=int8)


def toy_codec(device: torch.device = CPU, *, model: str | Path = "toy") -> LightCodec:
    """A model's whole codec, encoder included. model: a name, or a folder with both parts; ValueError for others."""
    return load_codec([file_of(model, CODEC_FILE), file_of(model, ENCODER_FILE)], device)
