"""Takes: a stream kept between two blocks, which goes on bit for bit. Saved, resumed, forked, rewound, retraced.

A file is safetensors; its description holds all that is no tensor, in JSON. What a take holds is told in docs/takes.md.
"""

import json
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longtake.files import claim, require_free, unfinished, whole
from longtake.generation.stream import MOST_TOLD, UNTOLD, Engine, Stream, Told

_DESCRIPTION, _TENSOR = "longtake_take", "tensor"
_FORM, _READ = 2, (1, 2)  # of the file, and those that are read; the first knows of no blends
_MADE_WITH = {"model", "recipe", "levels", "weights", "codec_weights", "longtake", "torch", "device", "dtype"}
_NAMES = ("model", "codec", "base")  # what only helps to find the weights again: their hashes decide


class Unfit(ValueError):
    """A take does not go on under an engine, as another one made it."""


@dataclass(frozen=True, eq=False)
class Take:
    """A stream between two blocks: a value, from which any number of streams go on.

    made_with: what its bits hang on beside the state. state: see `StreamBatch.state`; the tensors are its own.
    """

    made_with: Mapping[str, Any]
    state: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, stream: Stream, device: torch.device | str | None = None) -> Self:
        """The take of a stream as it stands, by default on its own device. RuntimeError for a closed stream."""
        with stream.lock:
            copied = _changed(stream.state(), lambda tensor: tensor.detach().to(device or tensor.device, copy=True))
        return cls(made_with(stream.engine), copied)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The take in a file, on the CPU. ValueError for a file that is not whole or no take, OSError if none is."""
        described, tensors = _read(Path(path))
        try:
            take = cls(described["made_with"], _unpacked(described["state"], tensors))
            told = take.info().keys() >= _MADE_WITH and len(take.made_with["levels"]) > 0 and bool(take.history)
        except (LookupError, TypeError, ValueError):
            told = False
        if not told:
            raise ValueError(f"{path} is damaged: what it says of its stream cannot be read")
        return take

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the take to a file, which is there when it is whole and not before.

        FileExistsError if there is one of that name and `overwrite` is not set, OSError if it cannot be written.
        """
        path = Path(path)
        require_writable(path, overwrite=overwrite)
        tensors: dict[str, Tensor] = {}
        described = {"form": _FORM, "made_with": self.made_with, "state": _packed(self.state, tensors)}
        try:
            with whole(path) as beside:
                beside.touch()
                mode = stat.S_IMODE(beside.stat().st_mode)  # as the user wants files; safetensors: the owner's alone
                stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                save_file(stored, beside, metadata={_DESCRIPTION: json.dumps(described)})
                beside.chmod(mode)
        except SafetensorError as error:  # how it tells of a full disk
            raise OSError(f"cannot write {path}: {error}") from None

    def resume(self, engine: Engine) -> Stream:
        """A stream that goes on from here, bit for bit. ValueError, with the reason, for an engine that would not."""
        self.require_fit(engine)
        return Stream.of_state(engine, self._on(engine.device))

    def rewind(self, stream: Stream) -> None:
        """Take a stream back to here, or on to here; a closed one is open again. ValueError as for `resume`."""
        self.require_fit(stream.engine)
        stream.restore(self._on(stream.engine.device))

    def require_fit(self, engine: Engine) -> None:
        """Unfit, with the first difference, unless a stream of this engine would go on bit for bit."""
        for key, here in made_with(engine).items():
            there = {**UNTOLD, **self.made_with}.get(key)
            if key not in _NAMES and there != here:
                name = key.replace("_", " ")
                raise Unfit(f"this take does not go on here: it was made with {name} {there}, and here it is {here}")

    def _on(self, device: torch.device) -> dict[str, Any]:
        """The state on a device. Streams write over none of its tensors, so several may go on from the same ones."""
        moved: dict[str, Any] = _changed(self.state, lambda tensor: tensor.to(device))
        return moved

    @property
    def history(self) -> list[Told]:
        """What the stream was told, from the beginning."""
        return list(map(Told.of, self.state["history"]))

    def info(self) -> dict[str, Any]:
        """What it is, as plain values: what it was made with, seed, place, prompts with their times, bytes by part."""
        rate = self.made_with["frame_rate"]
        return {
            **self.made_with,
            "seed": self.state["seeds"][0],
            "blocks": self.state["blocks"],
            "seconds": self.state["pictures"] / rate,
            "told": [
                {
                    "at": told.picture / rate,
                    "verb": told.verb,
                    "prompt": told.prompts[0],
                    **({"over": told.over, "blend": told.blend} if told.over > 1 else {}),
                }
                for told in self.history
            ],
            "bytes": bytes_of(self.state),
        }


def fork(stream: Stream) -> Stream:
    """A second stream that goes on from where this one stands; from here on neither knows of the other."""
    return Take.of(stream).resume(stream.engine)


def resume(path: str | Path, engine: Engine) -> Stream:
    """The stream in a file, going on bit for bit. ValueError or OSError as for `Take.load` and `Take.resume`."""
    take = Take.load(path)
    try:
        return take.resume(engine)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def retrace(engine: Engine, seed: int, history: Sequence[Told], blocks: int) -> Stream:
    """The stream that has made so many blocks, made again from its beginning: the slow truth of every take.

    ValueError for one that began with given pictures, which no history holds, and for one that was told too much.
    """
    first, *others = history
    if first.verb != "begin":
        raise ValueError(f"of what the stream was told the latest {MOST_TOLD} things are kept, but not its beginning")
    if first.picture:
        raise ValueError(f"the stream began with {first.picture} given pictures, which are not kept")
    stream = engine.stream(first.prompts[0], seed=seed)
    for block in range(blocks + 1):
        for told in others:
            if told.block == block:
                tell(stream, told)
        if block < blocks:
            next(stream)
    return stream


def tell(stream: Stream, told: Told) -> None:
    """Say again what a stream was told; its beginning cannot be."""
    assert told.far is not None
    if told.verb == "cut":
        stream.cut(told.prompts[0], far=told.far)
    else:
        assert told.in_flight is not None
        stream.redirect(told.prompts[0], over=told.over, blend=told.blend, far=told.far, in_flight=told.in_flight)


def made_with(engine: Engine) -> dict[str, Any]:
    """What a stream's bits hang on beside seed and prompts, as plain values, and the names that find it again."""
    recipe = engine.recipe
    return {
        "model": engine.model_name,
        "codec": engine.codec_name,
        "base": engine.base_name,
        "recipe": recipe.name,
        "sink": recipe.sink,
        "past": recipe.past,
        "block": recipe.block,
        "levels": list(recipe.levels(engine.shift)),
        "latent_size": list(engine.latent_size),
        "frame_rate": engine.frame_rate,
        "weights": engine.weights,
        "codec_weights": engine.codec_weights,
        **engine.circumstances,
    }


def bytes_of(state: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of a state's tensors, by its parts, where there are any."""
    sizes = {}
    for part, value in {**state, **state["memory"]}.items():
        tensors: dict[str, Tensor] = {}
        _packed(value, tensors)
        if tensors and part != "memory":
            sizes[part] = sum(tensor.nbytes for tensor in tensors.values())
    return sizes


def require_writable(path: Path, *, overwrite: bool = False) -> None:
    """OSError where no take can be written, FileExistsError for a name in use: best known before a stream runs."""
    require_free(path, overwrite=overwrite)
    beside = unfinished(path)
    claim(beside)
    beside.unlink()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file's description and tensors."""
    if not path.is_file():
        raise FileNotFoundError(f"no take at {path}")
    try:
        with safe_open(path, "pt") as file:
            described = json.loads((file.metadata() or {}).get(_DESCRIPTION, "{}"))
            # Copied: what is mapped may begin anywhere, and where numbers begin can change how they are summed.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole take ({error})") from None
    if not isinstance(described, dict) or "form" not in described:
        raise ValueError(f"{path} is no take")
    if described["form"] not in _READ:
        forms = " and ".join(map(str, _READ))
        raise ValueError(f"{path} is a take of form {described['form']}, and this version reads forms {forms}")
    if not {"made_with", "state"} <= described.keys():
        raise ValueError(f"{path} is no take")
    return described, tensors


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same plain values with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _changed(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(one, change) for one in value]
    return value


def _packed(value: Any, tensors: dict[str, Tensor], name: str = "state") -> Any:
    """The plain values with every tensor's name in its place; `tensors` takes them by name."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {key: _packed(one, tensors, f"{name}.{key}") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_packed(one, tensors, f"{name}.{index}") for index, one in enumerate(value)]
    return value


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _unpacked(one, tensors) for key, one in value.items()}
    if isinstance(value, list):
        return [_unpacked(one, tensors) for one in value]
    return value
